//! Documents packed into one batch never see each other: each token's loss is that of its document
//! alone.

#![expect(clippy::unwrap_used, reason = "a test fails where a helper of it cannot go on")]

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::Changes;
use retune_core::model::{Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::random::Seed;
use retune_core::spec::Head;
use retune_core::weights::{Packing, Weights};
use retune_models::config::Config;
use retune_testkit::golden::assert_close;
use retune_testkit::tiny::{MemorySource, configs};
use tensor::Device;

fn document(number: u32) -> Document {
    let length = 3 + 9 * number;
    let tokens: Vec<u32> = (0..length).map(|t| (t * (5 + number) + number) % 32).collect();
    let learn = (0..length).map(|t| t > 0).collect();
    Document { tokens, learn, row: number as usize, ..Document::default() }
}

fn losses(tuned: &Tuned<'_>, documents: &[Document]) -> Vec<f32> {
    let batch = Batch::new(documents).unwrap();
    tuned
        .evaluate(&batch, None, |pass, output| {
            let Output::States(states) = output else { unreachable!("a language model") };
            Ok(to_vec(pass.token_losses(states)?.inner()))
        })
        .unwrap()
}

#[test]
fn packed_documents_have_the_losses_of_each_alone() {
    let mut checked = 0;
    for (name, config) in configs() {
        let config = Config::new(Path::new("config.json"), config);
        let model = retune_models::build(&config).unwrap();
        let spec = Arc::clone(model.spec());
        if !matches!(spec.head, Head::Language { .. }) {
            continue;
        }
        let device = Device::flex();
        let source = Arc::new(MemorySource::random(&spec, Seed(5)));
        let weights = Weights::new(source, spec, Packing::default(), &device).unwrap();
        let (changes, parameters) = (Changes::default(), Parameters::new(&device));
        let tuned =
            Tuned { model: &*model, weights: &weights, changes: &changes, parameters: &parameters };
        let documents: Vec<Document> = (0..4).map(document).collect();
        let alone: Vec<f32> = documents
            .iter()
            .flat_map(|document| losses(&tuned, std::slice::from_ref(document)))
            .collect();
        assert!(alone.iter().filter(|loss| **loss > 0.1).count() > 50, "{name}: nothing learned");
        assert_close(name, &losses(&tuned, &documents), &alone, 1e-5);
        checked += 1;
    }
    assert_eq!(checked, 8);
}
