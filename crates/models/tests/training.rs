//! What a pass that learns does otherwise.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as the tests do")]

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::{Changes, Mode};
use retune_core::model::Output;
use retune_core::parameters::{Parameters, to_vec};
use retune_core::pass::Pass;
use retune_core::random::Seed;
use retune_core::weights::{Packing, Weights};
use retune_models::build;
use retune_models::config::Config;
use retune_testkit::tiny::{MemorySource, configs};
use serde_json::{Value, json};
use tensor::Device;

fn run(config: &Value, mode: Mode) -> Vec<f32> {
    let model = build(&Config::new(Path::new("config.json"), config.clone())).unwrap();
    let source = Arc::new(MemorySource::random(model.spec(), Seed(2)));
    let device = Device::flex();
    let spec = Arc::clone(model.spec());
    let weights = Weights::new(source, spec, Packing::default(), &device).unwrap();
    let document =
        Document { tokens: vec![3, 1, 4, 1, 5], learn: vec![false; 5], ..Document::default() };
    let batch = Batch::new(&[document]).unwrap();
    let (changes, parameters) = (Changes::default(), Parameters::new(&device));
    let mut pass = Pass::new(&weights, &changes, &parameters, &batch, mode).unwrap();
    match model.forward(&mut pass).unwrap() {
        Output::States(rows) | Output::Classes(rows) | Output::Embeddings(rows) => {
            to_vec(rows.inner())
        }
        Output::Pairs(pairs) => to_vec(pairs.similarities().inner()),
    }
}

/// Every rate of every family that has one, alone: it acts while learning and only then, and
/// draws the same numbers for the same pass.
#[test]
fn dropout_acts_while_learning() {
    for (family, key) in [
        ("gpt2", "embd_pdrop"),
        ("gpt2", "resid_pdrop"),
        ("bert", "hidden_dropout_prob"),
        ("bert classes", "classifier_dropout"),
    ] {
        let (_, plain) = configs().into_iter().find(|(name, _)| *name == family).unwrap();
        let mut config = plain.clone();
        config[key] = json!(0.5);
        let train = |pass| Mode::Train { seed: Seed(1), pass };
        let before = run(&plain, Mode::Evaluate);
        assert_eq!(run(&config, Mode::Evaluate), before, "{family} {key}");
        let learning = run(&config, train(0));
        assert_ne!(learning, before, "{family} {key}");
        assert_eq!(run(&config, train(0)), learning, "{family} {key}");
        assert_ne!(run(&config, train(1)), learning, "{family} {key}");
        assert_eq!(run(&plain, train(0)), before, "{family} with no rate");
    }
}
