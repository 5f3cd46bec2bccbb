//! Several adapters at once against PEFT's mixed models.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::model::{Output, Tuned};
use retune_core::parameters::to_vec;
use retune_run::adapters::{InForce, attach_adapters, read_adapters};
use retune_run::export::merged;
use retune_run::open::Opened;
use retune_testkit::golden::{Tensors, folder};
use retune_testkit::open::weights;

fn base() -> Opened {
    let checkpoint = retune_models::open(&folder("peft/base")).unwrap();
    let spec = Arc::clone(checkpoint.model.spec());
    let source = Arc::clone(&checkpoint.source);
    let weights = weights(source, &spec);
    let fingerprint = checkpoint.fingerprint();
    Opened { checkpoint, weights, fingerprint, under: Vec::new() }
}

fn close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance, "{what}[{index}]: {f}, expected {e}");
    }
}

#[test]
fn stacked_adapters_give_the_logits_and_weights_of_pefts_mixed_models() {
    let golden = Tensors::open("mixed/expected.safetensors");
    let ids = golden.integers("input_ids");
    let width = golden.shape("input_ids")[1];
    let document = |row: &[i64]| Document {
        tokens: row.iter().map(|id| *id as u32).collect(),
        learn: vec![false; width],
        ..Document::default()
    };
    let documents: Vec<Document> = ids.chunks(width).map(document).collect();
    let batch = Batch::new(&documents).unwrap();
    let opened = base();
    let (mut stacks, mut weights) = (0, 0);
    for name in golden.names() {
        let Some(stack) = name.strip_suffix(".logits") else { continue };
        stacks += 1;
        let folders: Vec<_> =
            stack.split('+').map(|case| folder(&format!("peft/{case}"))).collect();
        let adapters = read_adapters(&folders).unwrap();
        let InForce { changes, parameters, notes } =
            attach_adapters(&adapters, &opened, false).unwrap();
        assert_eq!(notes, Vec::<String>::new());
        let tuned = Tuned {
            model: opened.model(),
            weights: &opened.weights,
            changes: &changes,
            parameters: &parameters,
        };
        let found = tuned
            .evaluate(&batch, None, |pass, output| {
                let Output::States(states) = output else { panic!("a language model") };
                let rows: Vec<usize> = (0..batch.num_tokens()).collect();
                Ok(to_vec(pass.logits(&states, &rows)?.inner()))
            })
            .unwrap();
        close(name, &found, &golden.floats(name), 1e-5);
        let prefix = format!("{stack}.merged.");
        for name in golden.names().into_iter().filter(|name| name.starts_with(&prefix)) {
            weights += 1;
            let weight = tuned.model.spec().weight(&name[prefix.len()..]).unwrap();
            close(name, &merged(&tuned, weight).unwrap(), &golden.floats(name), 1e-6);
        }
    }
    assert_eq!((stacks, weights), (6, 5));
}
