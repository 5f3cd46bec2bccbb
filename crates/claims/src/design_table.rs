//! The unified view's design table: which form, at which place, joined how.

use std::fmt::Write;
use std::path::Path;

use retune_core::random::Seed;
use retune_models::config::Config;
use serde_json::json;

use crate::chains::{self, WIDTH};
use crate::families::gap;
use crate::lab::{Pace, method};
use crate::{Claim, Clock, Proof, Prove, Result, each, mean, prefix_identity, side_by_side};

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
          written out. Design table: a llama of 4 layers and width 64 pretrained on 2000 chains of 24 \
          words (the first token chooses one of four maps from word to word, followed nine times of \
          ten; 500 steps of 32), tuned to 1000 chains of four new maps; 300 steps of 8, linear decay, \
          the better of 1e-3 and 3e-3 on 100 chains, loss on 300 others, five seeds; 6144 to 6448 \
          values train (3.7 %), and with one key or a bottleneck of one a tenth of that. All \
          bottlenecks begin with an upper matrix of zeros, so that forms differ in nothing else.",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 5;
const LAYERS: usize = 4;
const BATCH: usize = 8;
const STEPS: u64 = 300;

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
    let (count, closed) = roberta()?;
    let found = side_by_side(NUM_SEEDS, |number| one_seed(Seed(2200 + number)))?;
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
    proof.assert(
        "MAM on the shape of RoBERTa-base with l = r = 16 trains 2 x 294,912 values, and biases",
        format!("{count} of {closed}"),
        count == closed,
    );
    let starts = found.iter().flat_map(|found| found.forms.iter().filter_map(|form| form.2));
    let start = starts.fold(0.0, f64::max);
    proof.assert(
        "forms that begin at zero give the base's losses within 1e-5 before the first step",
        format!("at most {start:.1e}"),
        start <= 1e-5,
    );
    proof.notes.push(
        "No form has learned the new maps to their end (0.70 is the least loss there can be, guessing has \
         3.95), so that what is compared is how fast forms learn in 300 steps; the factor 4, which is \
         a larger step too, gains most. Orders within one standard error are not asserted, of either \
         kind."
            .to_owned(),
    );
    Ok(proof)
}

fn one_seed(seed: Seed) -> Result<Found> {
    let ground = chains::tuned_later(LAYERS, seed)?;
    let (lab, validation) = (&ground.lab, &ground.validation);
    let at_first = lab.plain(|tuned| lab.token_losses(tuned, validation))?;
    let untuned = lab.plain(|tuned| Ok(mean(&lab.token_losses(tuned, &ground.test)?)))?;
    let mut forms = Vec::new();
    for Form(_, name, options, _) in &FORMS {
        let mut best = (f64::INFINITY, f64::NAN, 0);
        for rate in RATES {
            let pace = Pace::steps(STEPS, BATCH, rate);
            let method = method(name, options)?;
            let found = lab.train(method, &ground.train, pace, seed, |training| {
                let tuned = training.tuned();
                let steered = mean(&lab.token_losses(&tuned, validation)?);
                let count = training.parameters.num_trainable();
                Ok((steered, mean(&lab.token_losses(&tuned, &ground.test)?), count))
            })?;
            if found.0 < best.0 {
                best = found;
            }
        }
        let start = method(name, options)?;
        let start = if start.promises().starts_at_base {
            let none = Pace::steps(0, BATCH, 1e-3);
            Some(lab.train(start, &ground.train, none, seed, |training| {
                Ok(gap(&lab.token_losses(&training.tuned(), validation)?, &at_first))
            })?)
        } else {
            None
        };
        forms.push((best.1, best.2, start));
    }
    Ok(Found { untuned, forms })
}

/// Counts what MAM trains on the shape of RoBERTa-base; returns the closed form too.
fn roberta() -> Result<(usize, usize)> {
    let config = json!({
        "architectures": ["RobertaModel"], "model_type": "roberta", "vocab_size": 50265,
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 514, "type_vocab_size": 1,
        "layer_norm_eps": 1e-5, "hidden_act": "gelu", "pad_token_id": 1,
    });
    let model = retune_models::build(&Config::new(Path::new("config.json"), config))?;
    let mam = method("unified-view", "prefix = 16\nbottleneck = 16\nreparameterise = 0")?;
    let count = mam.plan(model.spec())?.num_trainable();
    Ok((count, 2 * 294_912 + 12 * (16 + 768)))
}

fn standard_error(values: &[f64]) -> f64 {
    let middle = mean(values);
    let squares = values.iter().map(|value| (value - middle).powi(2)).sum::<f64>();
    (squares / (values.len() as f64 - 1.0) / values.len() as f64).sqrt()
}
