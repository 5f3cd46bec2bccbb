//! DePT: a shorter prompt and a table of offsets, as good as a long prompt and cheaper.

use std::fmt::Write;

use retune_core::random::{Random, Seed};
use retune_train::training::Training;

use crate::encoder::{Encoder, Sizes};
use crate::lab::{Lab, Pace, Values, method};
use crate::sentences::{FILLER, VOCABULARY, document, keyed, pretrained, sentence};
use crate::{Claim, Clock, Proof, Prove, Result, each, mean, side_by_side};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 42,
    name: "DePT",
    source: "Shi and Lipani, DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning, \
             2024, arXiv 2309.05173",
    claims: "With as many trained values and steps, a shorter prompt beside a low-rank table of offsets \
             needs less time and memory than a long prompt and is no worse.",
    run: "Time: encoder of 4 blocks and width 128, 4 texts of 128 words, a prompt of 100 against DePT \
          with 20, 40 and 60 of as many values, 10 steps after 2 to warm up, the fastest of three \
          rounds; memory is not measured. Quality: encoder of 4 blocks and width 64 with rotary \
          positions that learned to fill gaps in texts of 16 words of a made-up language, up to 5 fillers before them; the task \
          is which of two key words comes first, 2000 rows, 300 steps of 16, no warm-up, linear decay; \
          a prompt of 20 against 10 with rank 8 (1280 values each, and the head). Rates of the prompt \
          0.05, 0.1 and 0.3, of the table 1e-3, 5e-3 or the prompt's; the best on 500 validation rows, \
          measured on 1000; three seeds. Then 1 to 5 fillers before the test texts.",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 3;
const LENGTH: usize = 16;

/// Fillers put before the test texts; the last is what is asserted.
const SHIFTS: [usize; 4] = [1, 2, 3, 5];
const SHIFT: usize = SHIFTS[SHIFTS.len() - 1];
const PROMPT: usize = 20;
const SHORT: usize = 10;
const NUM_TRAIN: usize = 2000;
const NUM_VALIDATION: usize = 500;
const NUM_TEST: usize = 1000;
const STEPS: u64 = 300;
const BATCH: usize = 16;
const RATES: [f64; 3] = [0.05, 0.1, 0.3];
const TABLE_RATES: [f64; 2] = [1e-3, 5e-3];

fn prove(clock: Clock) -> Result<Proof> {
    let mut proof = Proof::default();
    cost(clock, &mut proof)?;
    quality(&mut proof)?;
    Ok(proof)
}

/// Times steps and counts values.
fn cost(clock: Clock, proof: &mut Proof) -> Result<()> {
    const WORDS: usize = 128;
    const WIDTH: usize = 128;
    const LONG: usize = 100;
    const STEPS: u64 = 10;
    let seed = Seed(4200);
    let documents = (0..8).map(|row| {
        let mut random = seed.stream("cost", &[row as u64]);
        document(sentence(WORDS, &mut random), 0, row)
    });
    let model = Encoder::new(VOCABULARY, WORDS, Sizes::of(WIDTH, 4), Some(2));
    let lab = Lab::new(model, documents.collect(), seed);
    let rows: Vec<usize> = (0..8).collect();
    let mut table = "| | values | states a text | seconds a step |\n|---|---|---|---|\n".to_owned();
    let mut found = [LONG, 60, 40, 20].map(|prompt| (prompt, 0, f64::INFINITY));
    let seconds = |prompt: usize, num_steps: u64| -> Result<(f64, usize)> {
        let (name, options) = if prompt == LONG {
            ("prompt-tuning", format!("tokens = {LONG}"))
        } else {
            ("dept", format!("tokens = {prompt}\nbudget = {LONG}\nlength = {WORDS}"))
        };
        let started = clock();
        let pace = Pace::steps(num_steps, 4, 1e-3);
        let see = |training: &Training<'_>| Ok(training.parameters.num_trainable());
        let trained = lab.train(method(name, &options)?, &rows, pace, seed, see)?;
        Ok((clock() - started, trained))
    };
    // What else the machine does only adds to a round.
    for _ in 0..3 {
        for (prompt, trained, least) in &mut found {
            seconds(*prompt, 2)?;
            let (taken, count) = seconds(*prompt, STEPS)?;
            *trained = count;
            *least = least.min(taken / STEPS as f64);
        }
    }
    for (prompt, trained, taken) in found {
        let name = if prompt == LONG { "prompt tuning" } else { "DePT" };
        let states = prompt + WORDS;
        let _ = writeln!(table, "| {name}, {prompt} | {trained} | {states} | {taken:.4} |");
    }
    proof.figures.push_str(&table);
    proof.assert(
        "a step's time falls with the prompt's length",
        found.iter().map(|(_, _, taken)| format!("{taken:.4} s")).collect::<Vec<_>>().join(", "),
        found.windows(2).all(|pair| pair[1].2 < pair[0].2),
    );
    let (first, last) = (found[0], found[found.len() - 1]);
    proof.assert(
        "with 20 of 100 it is at least 20 % below the long prompt's",
        format!("{:+.0} %", 100.0 * (last.2 / first.2 - 1.0)),
        last.2 <= 0.8 * first.2,
    );
    // One more rank would be over the budget.
    let rank = WORDS + WIDTH;
    proof.assert(
        "as many values train, less at most what rounding the rank down leaves",
        found.iter().map(|(_, trained, _)| trained.to_string()).collect::<Vec<_>>().join(", "),
        found.iter().all(|(_, trained, _)| *trained <= first.1 && first.1 - trained < rank),
    );
    Ok(())
}

/// What one contestant reached, seed by seed.
#[derive(Debug, Clone, Default)]
struct Arm {
    accuracies: Vec<f64>,
    /// With each of [`SHIFTS`] before the test texts, by seed.
    shifted: Vec<[f64; SHIFTS.len()]>,
    rates: Vec<String>,
    trained: usize,
}

impl Arm {
    /// Returns the mean accuracy behind each number of fillers.
    fn shifted(&self) -> [f64; SHIFTS.len()] {
        std::array::from_fn(|place| {
            mean(&self.shifted.iter().map(|seed| seed[place]).collect::<Vec<_>>())
        })
    }
}

fn quality(proof: &mut Proof) -> Result<()> {
    let draw = |random: &mut Random| {
        let mut words = vec![FILLER; random.below(SHIFT + 1)];
        words.extend(keyed(LENGTH, random).0);
        words
    };
    // As in the paper's model, only distances count: where learned positions do, a shift of the text
    // alone makes both forms guess.
    let sizes = Sizes::of(64, 4).with_rotary();
    let pace = Pace::steps(600, 32, 2e-3);
    let base = pretrained(sizes, LENGTH + SHIFT, 4000, pace, Seed(4210), draw)?;
    let mut arms = vec![Arm::default(); 3];
    let seeds = side_by_side(NUM_SEEDS, |number| {
        let mut arms = vec![Arm::default(); 3];
        one_seed(Seed(4220 + number), sizes, &base, &mut arms)?;
        Ok(arms)
    })?;
    for (arm, other) in seeds.into_iter().flat_map(|seed| seed.into_iter().enumerate()) {
        arms[arm].accuracies.extend(other.accuracies);
        arms[arm].shifted.extend(other.shifted);
        arms[arm].rates.extend(other.rates);
        arms[arm].trained = other.trained;
    }
    let names = ["prompt tuning, 20", "DePT, 10 and rank 8", "the same at one rate"];
    proof.figures.push_str(
        "\n| | values that train | accuracy, mean | each seed | rates | 1, 2, 3 and 5 fillers before the \
         text, means |\n|---|---|---|---|---|---|\n",
    );
    for (name, arm) in names.iter().zip(&arms) {
        let _ = writeln!(
            proof.figures,
            "| {name} | {} | {:.3} | {} | {} | {} |",
            arm.trained,
            mean(&arm.accuracies),
            each(&arm.accuracies),
            arm.rates.join("; "),
            each(&arm.shifted())
        );
    }
    let [prompt, dept, alike] = &arms[..] else { unreachable!("three arms") };
    let gap = mean(&dept.accuracies) - mean(&prompt.accuracies);
    proof.assert(
        "DePT's accuracy is at least the long prompt's less a point, on the mean",
        format!("{gap:+.3}"),
        gap >= -0.01,
    );
    let gain = mean(&dept.accuracies) - mean(&alike.accuracies);
    proof.assert(
        "the best two rates are above the best single rate, on the mean",
        format!("{gain:+.3}"),
        gain > 0.0,
    );
    if gain <= 0.0 {
        proof.notes.push(format!(
            "One rate does as well as two here ({:.3} and {:.3}): a table of {LENGTH} places learns at the \
             prompt's rate too, and neither form is far from the end of what there is to learn.",
            mean(&alike.accuracies),
            mean(&dept.accuracies)
        ));
    }
    let lost = |arm: &Arm| arm.shifted().map(|shifted| mean(&arm.accuracies) - shifted);
    let (ours, theirs) = (lost(dept), lost(prompt));
    let last = SHIFTS.len() - 1;
    proof.assert(
        "5 fillers before the text cost DePT more than the long prompt: its offsets go by place",
        format!("{:+.3} and {:+.3}", -ours[last], -theirs[last]),
        ours[last] > theirs[last],
    );
    if ours[last] <= theirs[last] {
        let costs = |lost: [f64; SHIFTS.len()]| each(&lost[..last]);
        proof.notes.push(format!(
            "Why is not known. 1, 2 and 3 fillers cost DePT {} and the long prompt {}.",
            costs(ours),
            costs(theirs)
        ));
    }
    Ok(())
}

fn one_seed(seed: Seed, sizes: Sizes, base: &Values, arms: &mut [Arm]) -> Result<()> {
    let num_plain = NUM_TRAIN + NUM_VALIDATION + NUM_TEST;
    let mut documents = Vec::new();
    for row in 0..num_plain {
        let (words, class) = keyed(LENGTH, &mut seed.stream("keyed", &[row as u64]));
        documents.push(document(words, class, row));
    }
    for shift in SHIFTS {
        for row in num_plain - NUM_TEST..num_plain {
            let mut words = vec![FILLER; shift];
            words.extend(documents[row].tokens.iter());
            let class = documents[row].class.unwrap_or_default();
            documents.push(document(words, class, documents.len()));
        }
    }
    let rows = |from: usize, count: usize| (from..from + count).collect::<Vec<usize>>();
    let (train, validation) = (rows(0, NUM_TRAIN), rows(NUM_TRAIN, NUM_VALIDATION));
    let test = rows(num_plain - NUM_TEST, NUM_TEST);
    let model = Encoder::new(VOCABULARY, LENGTH + SHIFT, sizes, Some(2));
    let mut lab = Lab::new(model, documents, seed);
    lab.set(base.clone());

    let dept = |factor: f64| {
        format!("tokens = {SHORT}\nbudget = {PROMPT}\nlength = {LENGTH}\ntable_rate = {factor:?}")
    };
    let plain = RATES.map(|rate| ("prompt-tuning", format!("tokens = {PROMPT}"), rate, rate));
    let two = RATES.into_iter().flat_map(|rate| TABLE_RATES.map(|table| (rate, table)));
    let two = two.map(|(rate, table)| ("dept", dept(table / rate), rate, table));
    let alike = RATES.map(|rate| ("dept", dept(1.0), rate, rate));
    let grids = [plain.to_vec(), two.collect(), alike.to_vec()];
    for (grid, arm) in grids.into_iter().zip(arms) {
        let mut best = (f64::NEG_INFINITY, 0.0, [0.0; SHIFTS.len()], String::new());
        for (name, options, rate, table) in grid {
            let see = |training: &Training<'_>| {
                let tuned = training.tuned();
                let on = |rows: &[usize]| lab.accuracy_of(&tuned, rows);
                let trained = training.parameters.num_trainable();
                let mut shifted = [0.0; SHIFTS.len()];
                for (place, accuracy) in shifted.iter_mut().enumerate() {
                    *accuracy = on(&rows(num_plain + place * NUM_TEST, NUM_TEST))?;
                }
                Ok((on(&validation)?, on(&test)?, shifted, trained))
            };
            let pace = Pace::steps(STEPS, BATCH, rate);
            let (steered, plain, shifted, trained) =
                lab.train(method(name, &options)?, &train, pace, seed, see)?;
            arm.trained = trained;
            if steered > best.0 {
                let rates =
                    if rate == table { rate.to_string() } else { format!("{rate} and {table}") };
                best = (steered, plain, shifted, rates);
            }
        }
        arm.accuracies.push(best.1);
        arm.shifted.push(best.2);
        arm.rates.push(best.3);
    }
    Ok(())
}
