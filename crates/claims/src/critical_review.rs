//! The critical review's protocol: methods side by side on three tasks, with equal trials.

use std::fmt::Write;

use retune_core::batch::Document;
use retune_core::random::{Random, Seed};

use crate::contest::{Arm, Reached, Rows};
use crate::encoder::{Encoder, Sizes};
use crate::lab::{Lab, Pace, Values, method};
use crate::{Claim, Clock, Proof, Prove, Result, each, mean, side_by_side};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 23,
    name: "a critical review",
    source: "Xu, Xie, Qin, Tao and Wang, Parameter-Efficient Fine-Tuning Methods for Pretrained \
             Language Models: A Critical Review and Assessment, 2023, arXiv 2312.12148",
    claims: "With equal trials several parameter-efficient methods reach full tuning's average within \
             noise; the head alone and a prompt alone do not.",
    run: "An encoder of 4 layers and width 32 pretrained to restore texts of 32 words, 15 % of them \
          hidden (words of one of 8 topics, every second text the same words twice; 1500 steps of 32); \
          three tasks: which of two topics has more words, whether both halves have the same words, \
          which of two words comes first; 800 rows of each, 3 passes in batches of 8, the best of \
          three rates on 200 rows, measured on 500; three seeds.",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 3;
const WORDS: usize = 96;
const TOPICS: usize = 8;
const LENGTH: usize = 32;
/// Stands where a word is hidden.
const HIDDEN: u32 = WORDS as u32;
/// Stands at the start and between the halves.
const BREAK: u32 = HIDDEN + 1;
const VOCABULARY: usize = WORDS + 2;

const LAYERS: usize = 4;
const WIDTH: usize = 32;
const INNER: usize = 2 * WIDTH;
const HEAD: usize = 2 * WIDTH + 2;

const ARMS: [Arm; 8] = [
    Arm { name: "full", method: "full", options: "", rates: &[3e-4, 1e-3, 3e-3] },
    Arm {
        name: "head only",
        method: "full",
        options: "targets = ['head']",
        rates: &[1e-3, 5e-3, 2e-2],
    },
    Arm { name: "BitFit", method: "bitfit", options: "", rates: &[1e-3, 5e-3, 2e-2] },
    Arm {
        name: "adapter",
        method: "autopeft",
        options: "parallel = { size = 0 }\nserial = { size = 8, place = 'both', activation = 'gelu' }",
        rates: &[1e-3, 3e-3, 1e-2],
    },
    Arm {
        name: "LoRA",
        method: "lora",
        options: "rank = 8\nalpha = 16",
        rates: &[1e-3, 3e-3, 1e-2],
    },
    Arm { name: "(IA)3", method: "ia3", options: "", rates: &[5e-3, 2e-2, 5e-2] },
    Arm {
        name: "prefix tuning",
        method: "prefix-tuning",
        options: "tokens = 8\nprojection = false",
        rates: &[3e-3, 1e-2, 3e-2],
    },
    Arm {
        name: "prompt tuning",
        method: "prompt-tuning",
        options: "tokens = 8",
        rates: &[1e-2, 1e-1, 3e-1],
    },
];

/// Values that train by each method's closed form, the head's aside.
const COUNTS: [Option<usize>; ARMS.len()] = [
    None,
    Some(0),
    // Biases of four projections, gate, up and down, two norms; of the last norm.
    Some(LAYERS * (4 * WIDTH + 2 * INNER + WIDTH + 2 * WIDTH) + WIDTH),
    Some(LAYERS * 2 * (2 * WIDTH * 8 + 8 + WIDTH)),
    Some(LAYERS * 8 * (4 * (WIDTH + WIDTH) + 3 * (WIDTH + INNER))),
    // Keys, values, and what the narrowing projection reads.
    Some(LAYERS * (2 * WIDTH + INNER)),
    Some(LAYERS * 2 * WIDTH * 8),
    Some(8 * WIDTH),
];

#[derive(Debug, Clone, Copy)]
enum Task {
    Sentiment,
    Pair,
    Order,
}

const TASKS: [(Task, &str); 3] =
    [(Task::Sentiment, "sentiment"), (Task::Pair, "pair"), (Task::Order, "order")];

impl Task {
    /// Writes a text and says its class.
    fn row(self, random: &mut Random) -> (Vec<u32>, u32) {
        let class = random.below(2) as u32;
        let half = LENGTH / 2 - 1;
        let any = |random: &mut Random| random.below(WORDS) as u32;
        match self {
            Self::Sentiment => {
                // Eight words of one topic and five of the other, among words of the others.
                let mut words: Vec<u32> = (0..2 * half)
                    .map(|place| match place {
                        0..8 => word(class as usize, random),
                        8..13 => word(1 - class as usize, random),
                        _ => word(2 + random.below(TOPICS - 2), random),
                    })
                    .collect();
                random.shuffle(&mut words);
                let other = words.split_off(half);
                (halves(words, other), class)
            }
            Self::Pair => {
                let words: Vec<u32> = (0..half).map(|_| any(random)).collect();
                let mut other = words.clone();
                if class == 0 {
                    for place in random.choose(half, 8) {
                        other[place] = any(random);
                    }
                }
                (halves(words, other), class)
            }
            Self::Order => {
                // Words 0 and 1 of the last topic stand at two places, one before the other.
                let last = ((TOPICS - 1) * WORDS / TOPICS) as u32;
                let rest = |word: u32| word != last && word != last + 1;
                let mut words: Vec<u32> = Vec::new();
                while words.len() < 2 * half {
                    words.extend(Some(any(random)).filter(|word| rest(*word)));
                }
                let places = random.choose(2 * half, 2);
                let [first, second] = [places[0].min(places[1]), places[0].max(places[1])];
                words[first] = last + class;
                words[second] = last + 1 - class;
                let other = words.split_off(half);
                (halves(words, other), class)
            }
        }
    }
}

fn word(topic: usize, random: &mut Random) -> u32 {
    (topic * WORDS / TOPICS + random.below(WORDS / TOPICS)) as u32
}

fn halves(words: Vec<u32>, other: Vec<u32>) -> Vec<u32> {
    [vec![BREAK], words, vec![BREAK], other].concat()
}

/// What one seed found: by task, by arm.
type Found = Vec<Vec<Reached>>;

fn prove(_clock: Clock) -> Result<Proof> {
    let found: Vec<Found> = side_by_side(NUM_SEEDS, |number| one_seed(Seed(2300 + number)))?;
    let mut proof = Proof::default();
    proof.figures.push_str(
        "| | values that train, head included | sentiment | pair | order | average | each seed \
         |\n|---|---|---|---|---|---|---|\n",
    );
    let mut averages = Vec::new();
    for (place, arm) in ARMS.iter().enumerate() {
        let of =
            |task: usize| mean(&found.iter().map(|f| f[task][place].accuracy).collect::<Vec<_>>());
        let by_seed: Vec<f64> = found
            .iter()
            .map(|tasks| mean(&tasks.iter().map(|arms| arms[place].accuracy).collect::<Vec<_>>()))
            .collect();
        let _ = writeln!(
            proof.figures,
            "| {} | {} | {:.3} | {:.3} | {:.3} | {:.3} | {} |",
            arm.name,
            found[0][0][place].num_trained,
            of(0),
            of(1),
            of(2),
            mean(&by_seed),
            each(&by_seed)
        );
        averages.push(mean(&by_seed));
    }
    let of = |name: &str| {
        let place = ARMS.iter().position(|arm| arm.name == name);
        averages[place.unwrap_or_else(|| unreachable!("no arm is called {name}"))]
    };
    for name in ["LoRA", "adapter"] {
        let gap = of(name) - of("full");
        proof.assert(
            format!("the average of {name} is within 0.02 of full tuning's"),
            format!("{gap:+.3}"),
            gap.abs() <= 0.02,
        );
    }
    let gap = of("head only") - of("full");
    proof.assert(
        "the average of the head alone is at least 0.05 below full tuning's",
        format!("{gap:+.3}"),
        gap <= -0.05,
    );
    let gap = of("prompt tuning") - of("LoRA");
    proof.assert("prompt tuning is not above LoRA", format!("{gap:+.3}"), gap <= 0.0);
    let wrong: Vec<&str> = ARMS
        .iter()
        .zip(COUNTS)
        .zip(&found[0][0])
        .filter(|((_, count), reached)| count.is_some_and(|c| c + HEAD != reached.num_trained))
        .map(|((arm, _), _)| arm.name)
        .collect();
    let said =
        if wrong.is_empty() { "all".to_owned() } else { format!("not {}", wrong.join(", ")) };
    proof.assert("the number of trained values is the closed form", said, wrong.is_empty());
    child(&mut proof)?;
    let full_on =
        |task: usize| mean(&found.iter().map(|f| f[task][0].accuracy).collect::<Vec<_>>());
    let unlearned: Vec<String> = (0..TASKS.len())
        .filter(|task| full_on(*task) < 0.6)
        .map(|task| format!("{} ({:.3})", TASKS[task].1, full_on(task)))
        .collect();
    if !unlearned.is_empty() {
        proof.notes.push(format!(
            "Full tuning itself is near chance on {}: a base this small, pretrained this briefly, does \
             not learn that from 800 rows in three passes, so that averages rest on the rest alone and \
             say little about the claim.",
            unlearned.join(" and ")
        ));
    }
    proof.notes.push(
        "ProPELT is no method of the program, and memory is not measured here: neither is part of \
         this proof. The encoder is far smaller than the paper's models."
            .to_owned(),
    );
    Ok(proof)
}

fn encoder(classes: Option<usize>) -> Encoder {
    Encoder::new(VOCABULARY, LENGTH, Sizes::of(WIDTH, LAYERS).with_biases(), classes)
}

fn one_seed(seed: Seed) -> Result<Found> {
    let base = restored(seed)?;
    let on_task = |(task, name): &(Task, &str)| {
        let lab = task_lab(*task, name, &base, seed);
        let rows = |from: usize, to: usize| (from..to).collect();
        let rows =
            Rows { train: rows(0, 800), validation: rows(800, 1000), test: rows(1000, 1500) };
        let reach = |arm: &Arm| arm.reach(&lab, &rows, Pace::passes(3, 800, 8, 0.0), seed);
        ARMS.iter().map(reach).collect::<Result<Vec<_>>>()
    };
    TASKS.iter().map(on_task).collect()
}

/// Joins the base's body, a new head and a task's rows.
fn task_lab(task: Task, name: &str, base: &Values, seed: Seed) -> Lab {
    let documents = (0..1500)
        .map(|row| {
            let (tokens, class) = task.row(&mut seed.stream(name, &[row as u64]));
            let learn = vec![false; tokens.len()];
            Document { tokens, learn, class: Some(class), row, ..Document::default() }
        })
        .collect();
    let mut lab = Lab::new(encoder(Some(2)), documents, seed);
    let body = base.iter().filter(|(name, _)| !name.starts_with("head."));
    lab.set(body.map(|(name, values)| (name.clone(), values.clone())).collect());
    lab
}

/// Pretrains on hidden words; no text comes twice.
fn restored(seed: Seed) -> Result<Values> {
    const STEPS: usize = 1500;
    const BATCH: usize = 32;
    let (mut documents, mut targets) = (Vec::new(), Vec::new());
    for row in 0..STEPS * BATCH {
        let mut random = seed.stream("hidden", &[row as u64]);
        let (mut tokens, mut wanted) = (text(&mut random), Vec::new());
        for token in &mut tokens {
            let hides = *token != BREAK && random.uniform() < 0.15;
            wanted.push(hides.then_some(*token));
            if hides {
                *token = HIDDEN;
            }
        }
        targets.push(wanted);
        documents.push(Document { learn: vec![false; LENGTH], tokens, row, ..Document::default() });
    }
    let rows: Vec<usize> = (0..documents.len()).collect();
    let mut lab = Lab::new(encoder(None), documents, seed).with_targets(targets);
    lab.pretrain(&rows, Pace::steps(STEPS as u64, BATCH, 3e-3), seed)?;
    Ok(lab.values().clone())
}

/// Writes a text of one topic, whose second half is the first again half of the time.
fn text(random: &mut Random) -> Vec<u32> {
    let half = LENGTH / 2 - 1;
    let topic = random.below(TOPICS);
    let write = |random: &mut Random| -> Vec<u32> {
        let any = |random: &mut Random| {
            if random.uniform() < 0.6 { word(topic, random) } else { random.below(WORDS) as u32 }
        };
        (0..half).map(|_| any(random)).collect()
    };
    let words = write(random);
    let other = if random.uniform() < 0.5 { words.clone() } else { write(random) };
    halves(words, other)
}

/// Checks child-tuning: with a share of 1 it is full tuning, and a mask has the share asked for.
fn child(proof: &mut Proof) -> Result<()> {
    let seed = Seed(1);
    let lab = task_lab(Task::Pair, "pair", &Values::new(), seed);
    let rows: Vec<usize> = (0..64).collect();
    let tune = |name: &str, options: &str| {
        lab.tune(method(name, options)?, &rows, Pace::steps(10, 8, 1e-3), seed, &[])
    };
    let full = tune("full", "")?.merged;
    let differ = |values: &Values| -> usize {
        let pairs = values.iter().flat_map(|(name, values)| values.iter().zip(&full[name]));
        pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count()
    };
    let wrong = differ(&tune("child-tuning", "share = 1.0")?.merged);
    proof.assert(
        "child-tuning with a share of 1 is full tuning, bit for bit",
        format!("{wrong} weights differ"),
        wrong == 0,
    );
    let child = method("child-tuning", "share = 0.3\nfisher_steps = 4")?;
    let (open, all) = lab.train(child, &rows, Pace::steps(10, 8, 1e-3), seed, |training| {
        let parameters = &training.parameters;
        let masks = parameters.iter().filter(|(_, p)| p.name.strip_suffix(".child").is_some());
        let values: Vec<f32> = masks.flat_map(|(id, _)| parameters.values(id)).collect();
        Ok((values.iter().filter(|open| **open == 1.0).count(), values.len()))
    })?;
    let wanted = (0.3 * all as f64).round() as usize;
    proof.assert(
        "a mask of child-tuning with a share of 0.3 has exactly that share open",
        format!("{open} of {all}, {wanted} wanted"),
        open == wanted,
    );
    Ok(())
}
