//! Chains of words: each word leads to the next by one of four maps, which the first token names.

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::Document;
use retune_core::random::Seed;
use retune_models::config::Config;
use serde_json::json;

use crate::Result;
use crate::lab::{Lab, Pace};

/// Width of the model that follows chains.
pub(crate) const WIDTH: usize = 64;

const MODES: usize = 4;
const WORDS: usize = 48;
const LENGTH: usize = 24;

/// Sequences the base learns from, to tune on, to choose rates on, and to measure.
const PARTS: [usize; 4] = [2000, 1000, 100, 300];

/// A causal model, and chains of maps that are new to it.
pub(crate) struct Ground {
    /// The model with all chains.
    pub(crate) lab: Lab,
    /// Rows to tune on.
    pub(crate) train: Vec<usize>,
    /// Rows that choose rates.
    pub(crate) validation: Vec<usize>,
    /// Rows to measure on.
    pub(crate) test: Vec<usize>,
}

/// Draws a llama of width 64 and chains; it has learned nothing.
///
/// # Errors
/// If the model cannot be built.
pub(crate) fn drawn(num_layers: usize, seed: Seed) -> Result<Ground> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": MODES + WORDS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": false,
    });
    let model = retune_models::build(&Config::new(Path::new("config.json"), config))?;
    let [known, train, validation, test] = PARTS;
    let documents =
        chains(known, Seed(seed.0 + 1000)).chain(chains(train + validation + test, seed)).collect();
    let part = |from: usize, count: usize| (from..from + count).collect();
    Ok(Ground {
        lab: Lab::of(Arc::from(model), documents, seed),
        train: part(known, train),
        validation: part(known + train, validation),
        test: part(known + train + validation, test),
    })
}

/// Pretrains a llama of width 64 on 2000 chains of other maps, 500 steps of 32.
///
/// # Errors
/// Those of training.
pub(crate) fn tuned_later(num_layers: usize, seed: Seed) -> Result<Ground> {
    let mut ground = drawn(num_layers, seed)?;
    let known: Vec<usize> = (0..PARTS[0]).collect();
    ground.lab.pretrain(&known, Pace::steps(500, 32, 3e-3), seed)?;
    Ok(ground)
}

/// Makes chains of one set of maps; nine words of ten follow, the others are any.
fn chains(count: usize, seed: Seed) -> impl Iterator<Item = Document> {
    let maps: Vec<Vec<usize>> = (0..MODES)
        .map(|mode| {
            let mut map: Vec<usize> = (0..WORDS).collect();
            seed.stream("map", &[mode as u64]).shuffle(&mut map);
            map
        })
        .collect();
    (0..count).map(move |row| {
        let mut random = seed.stream("chain", &[row as u64]);
        let mode = random.below(MODES);
        let mut word = random.below(WORDS);
        let mut tokens = vec![mode as u32];
        while tokens.len() < LENGTH {
            tokens.push((MODES + word) as u32);
            let follows = random.uniform() < 0.9;
            word = if follows { maps[mode][word] } else { random.below(WORDS) };
        }
        // The first word follows from nothing.
        let learn = (0..LENGTH).map(|place| place > 1).collect();
        Document { tokens, learn, row, ..Document::default() }
    })
}
