//! The unified view's design table: which form, at which place, joined how.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::model::{Output, Tuned};
use retune_core::parameters::to_vec;
use retune_core::random::Seed;
use retune_models::config::Config;
use serde_json::json;

use crate::contest::each_seed;
use crate::families::gap;
use crate::lab::{Lab, Pace, method};
use crate::{Claim, Clock, Proof, Result, each, mean, prefix_identity};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 22,
    name: "the unified view",
    source: "He, Zhou, Ma, Berg-Kirkpatrick and Neubig, Towards a Unified View of \
             Parameter-Efficient Transfer Learning, 2022, arXiv 2110.04366",
    claims: "Prefix tuning is a gated adapter beside each head: attention over a prefix and the text \
             equals (1 - g) times attention over the text plus g times attention over the prefix, g \
             being the share of the soft-max that falls on the prefix. At equal parameters the parallel \
             adapter beats the sequential one, and the scaled parallel adapter of the feed-forward \
             network is the best single form.",
    run: "Identity: the program's own attention over random queries, keys and values of three seeds, \
          causal, 4 heads of width 8, 24 tokens, prefixes of 1, 5 and 20, against double precision \
          written out. Design table: a llama of 4 layers and width 64 pretrained on 2000 sequences of \
          24 (the first token chooses one of four maps from token to token, followed nine times of \
          ten; 500 steps), tuned on 1000 sequences of four new maps; 300 steps of 8, the better of two \
          rates on 100 sequences, loss on 300 others, five seeds; about 6200 values train (3.6 %), and \
          with one key or a bottleneck of one at the head's budget.",
    quick: false,
    prove,
};

const MODES: usize = 4;
const WORDS: usize = 48;
const LENGTH: usize = 24;
const WIDTH: usize = 64;
const LAYERS: usize = 4;

/// A form: name, method, options, and the values it trains.
struct Form(&'static str, &'static str, &'static str, usize);

/// Values of a bottleneck of `size` in every layer, biases included.
const fn bottleneck(size: usize) -> usize {
    LAYERS * (2 * WIDTH * size + size + WIDTH)
}

/// Values of `count` keys and values in every layer.
const fn keys(count: usize) -> usize {
    LAYERS * 2 * WIDTH * count
}

const FORMS: [Form; 11] = [
    Form(
        "sequential, attention",
        "unified-view",
        "[[modules]]\nsize = 12\ninsertion = 'sequential'\nplace = 'attention'\ncomposition = 'add'",
        bottleneck(12),
    ),
    Form(
        "sequential, feed-forward",
        "unified-view",
        "[[modules]]\nsize = 12\ninsertion = 'sequential'\ncomposition = 'add'",
        bottleneck(12),
    ),
    Form(
        "parallel, attention",
        "unified-view",
        "[[modules]]\nsize = 12\nplace = 'attention'\ncomposition = 'add'",
        bottleneck(12),
    ),
    Form(
        "parallel, feed-forward",
        "unified-view",
        "[[modules]]\nsize = 12\ncomposition = 'add'",
        bottleneck(12),
    ),
    Form(
        "scaled parallel (4), feed-forward",
        "unified-view",
        "[[modules]]\nsize = 12",
        bottleneck(12),
    ),
    Form(
        "LoRA, feed-forward",
        "lora",
        "rank = 4\nalpha = 16\ntargets = ['up_proj', 'down_proj']",
        LAYERS * 2 * 4 * (WIDTH + 2 * WIDTH),
    ),
    Form(
        "prefix",
        "unified-view",
        "[[modules]]\nsize = 12\nplace = 'heads'\nform = 'softmax'\ncomposition = 'gated'",
        keys(12),
    ),
    Form(
        "MAM",
        "unified-view",
        "prefix = 6\nbottleneck = 6\nreparameterise = 0",
        keys(6) + bottleneck(6),
    ),
    Form(
        "one: parallel, attention",
        "unified-view",
        "[[modules]]\nsize = 1\nplace = 'attention'\ncomposition = 'add'",
        bottleneck(1),
    ),
    Form(
        "one: multi-head parallel",
        "unified-view",
        "[[modules]]\nsize = 1\nplace = 'heads'\ncomposition = 'add'",
        // The adapter of heads has a norm of its own input.
        keys(1) + LAYERS * 2 * WIDTH,
    ),
    Form(
        "one: prefix",
        "unified-view",
        "[[modules]]\nsize = 1\nplace = 'heads'\nform = 'softmax'\ncomposition = 'gated'",
        keys(1),
    ),
];

/// The order the paper leads one to expect: the better form, then the worse.
const ORDER: [(&str, &str); 7] = [
    ("parallel, attention", "sequential, attention"),
    ("parallel, feed-forward", "sequential, feed-forward"),
    ("scaled parallel (4), feed-forward", "parallel, feed-forward"),
    ("sequential, feed-forward", "sequential, attention"),
    ("parallel, feed-forward", "parallel, attention"),
    ("one: multi-head parallel", "one: parallel, attention"),
    ("one: prefix", "one: parallel, attention"),
];

const RATES: [f64; 2] = [1e-3, 3e-3];

/// What one seed found: the untuned loss, and each form's loss, count and difference at the start.
struct Found {
    untuned: f64,
    forms: Vec<(f64, usize, Option<f64>)>,
}

fn prove(_clock: Clock) -> Result<Proof> {
    let mut proof = prefix_identity::prove();
    let found = each_seed(220..225, one_seed)?;
    let untuned: Vec<f64> = found.iter().map(|found| found.untuned).collect();
    let _ = writeln!(
        proof.figures,
        "\n| form | values that train | validation loss, mean | each seed |\n|---|---|---|---|\n| \
         untuned | 0 | {:.3} | {} |",
        mean(&untuned),
        each(&untuned)
    );
    let losses = |name: &str| -> Vec<f64> {
        let form = FORMS.iter().position(|form| form.0 == name);
        let form = form.unwrap_or_else(|| unreachable!("no form is called {name}"));
        found.iter().map(|found| found.forms[form].0).collect()
    };
    for (place, Form(name, ..)) in FORMS.iter().enumerate() {
        let losses = losses(name);
        let count = found[0].forms[place].1;
        let _ = writeln!(
            proof.figures,
            "| {name} | {count} | {:.3} | {} |",
            mean(&losses),
            each(&losses)
        );
    }
    proof.figures.push_str(
        "\n| expected to be better | than | by, paired, with its standard error |\n|---|---|---|\n",
    );
    for (better, worse) in ORDER {
        let gains: Vec<f64> = losses(worse)
            .iter()
            .zip(losses(better))
            .map(|(worse, better)| worse - better)
            .collect();
        let (gain, error) = (mean(&gains), standard_error(&gains));
        let _ = writeln!(proof.figures, "| {better} | {worse} | {gain:+.4} ± {error:.4} |");
        // What lies within one standard error is no order, of either kind.
        if gain.abs() > error {
            let found = format!("{gain:+.4} ± {error:.4}");
            proof.assert(format!("{better} has the lower loss than {worse}"), found, gain > 0.0);
        }
    }
    let wrong: Vec<&str> = FORMS
        .iter()
        .zip(&found[0].forms)
        .filter(|(Form(.., count), (_, found, _))| count != found)
        .map(|(Form(name, ..), _)| *name)
        .collect();
    let said =
        if wrong.is_empty() { "all".to_owned() } else { format!("not {}", wrong.join(", ")) };
    proof.assert("the number of trained values is the closed form", said, wrong.is_empty());
    let starts = found.iter().flat_map(|found| found.forms.iter().filter_map(|form| form.2));
    let start = starts.fold(0.0, f64::max);
    proof.assert(
        "forms that begin at zero give the base's losses within 1e-5 before the first step",
        format!("at most {start:.1e}"),
        start <= 1e-5,
    );
    Ok(proof)
}

fn one_seed(seed: Seed) -> Result<Found> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": MODES + WORDS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": false,
    });
    let model = retune_models::build(&Config::new(Path::new("config.json"), config))?;
    let documents = sequences(2000, Seed(seed.0 + 1000)).chain(sequences(1400, seed)).collect();
    let mut lab = Lab::of(Arc::from(model), documents, seed);
    let rows = |from: usize, to: usize| (from..to).collect::<Vec<usize>>();
    let (train, validation, test) = (rows(2000, 3000), rows(3000, 3100), rows(3100, 3400));
    lab.pretrain(&rows(0, 2000), Pace::steps(500, 32, 3e-3), seed)?;
    let at_first = lab.plain(|tuned| losses(tuned, &lab, &validation))?;
    let untuned = lab.plain(|tuned| Ok(mean(&losses(tuned, &lab, &test)?)))?;
    let mut forms = Vec::new();
    for Form(_, name, options, _) in &FORMS {
        let mut best = (f64::INFINITY, f64::NAN, 0);
        for rate in RATES {
            let pace = Pace::steps(300, 8, rate);
            let found = lab.train(method(name, options)?, &train, pace, seed, |training| {
                let tuned = training.tuned();
                let steered = mean(&losses(&tuned, &lab, &validation)?);
                let count = training.parameters.num_trainable();
                Ok((steered, mean(&losses(&tuned, &lab, &test)?), count))
            })?;
            if found.0 < best.0 {
                best = found;
            }
        }
        let start = method(name, options)?;
        let start = if start.promises().starts_at_base {
            Some(lab.train(start, &train, Pace::steps(0, 8, 1e-3), seed, |training| {
                let found = losses(&training.tuned(), &lab, &validation)?;
                let single = |losses: &[f64]| losses.iter().map(|l| *l as f32).collect::<Vec<_>>();
                Ok(gap(&single(&found), &single(&at_first)))
            })?)
        } else {
            None
        };
        forms.push((best.1, best.2, start));
    }
    Ok(Found { untuned, forms })
}

/// Makes sequences of one set of maps.
fn sequences(count: usize, seed: Seed) -> impl Iterator<Item = Document> {
    let maps: Vec<Vec<usize>> = (0..MODES)
        .map(|mode| {
            let mut map: Vec<usize> = (0..WORDS).collect();
            seed.stream("map", &[mode as u64]).shuffle(&mut map);
            map
        })
        .collect();
    (0..count).map(move |row| {
        let mut random = seed.stream("sequence", &[row as u64]);
        let mode = random.below(MODES);
        let mut word = random.below(WORDS);
        let mut tokens = vec![mode as u32];
        while tokens.len() < LENGTH {
            tokens.push((MODES + word) as u32);
            let follows = random.uniform() < 0.9;
            word = if follows { maps[mode][word] } else { random.below(WORDS) };
        }
        let learn = (0..LENGTH).map(|place| place > 1).collect();
        Document { tokens, learn, row, ..Document::default() }
    })
}

/// Computes the loss of each predicted token.
fn losses(tuned: &Tuned<'_>, lab: &Lab, rows: &[usize]) -> Result<Vec<f64>> {
    let documents: Vec<Document> = rows.iter().map(|row| lab.document(*row).clone()).collect();
    let batch = Batch::new(&documents)?;
    let found = tuned.evaluate(&batch, None, |pass, output| match output {
        Output::States(states) => Ok(to_vec(pass.token_losses(states)?.inner())),
        Output::Classes(rows) | Output::Embeddings(rows) => Ok(to_vec(rows.inner())),
    })?;
    let predicted = found.iter().zip(&batch.targets).filter(|(_, target)| target.is_some());
    Ok(predicted.map(|(loss, _)| f64::from(*loss)).collect())
}

fn standard_error(values: &[f64]) -> f64 {
    let middle = mean(values);
    let squares = values.iter().map(|value| (value - middle).powi(2)).sum::<f64>();
    (squares / (values.len() as f64 - 1.0) / values.len() as f64).sqrt()
}
