//! What a step costs, in multiply-adds: counted, not timed, so that it can be checked anywhere.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::kernels::work::{Work, counted};
use retune_core::method::Method;
use retune_core::model::{Model, Tuned};
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::spec::{Role, WeightSpec};
use retune_core::weights::Weights;
use retune_methods::full::Full;
use retune_methods::lora::{Lora, LoraOptions};
use retune_testkit::golden;
use retune_testkit::open::weights;
use retune_train::backprop::Backprop;

const RANK: u64 = 4;

fn open() -> (Box<dyn Model>, Weights) {
    let base = golden::folder("training/llama/base");
    let checkpoint = retune_models::open(&base).unwrap();
    let weights = weights(Arc::clone(&checkpoint.source), checkpoint.model.spec());
    (checkpoint.model, weights)
}

/// A document of which the last `labels` tokens are learned.
fn document(tokens: usize, labels: usize) -> Document {
    let mut random = Seed(tokens as u64).stream("document", &[]);
    Document {
        tokens: (0..tokens).map(|_| random.below(128) as u32).collect(),
        learn: (0..tokens).map(|t| t >= tokens - labels).collect(),
        ..Document::default()
    }
}

fn step(method: &dyn Method, documents: &[Document], recompute: bool) -> Work {
    let (model, weights) = open();
    let mut parameters = Parameters::new(weights.device());
    let changes = method.attach(&weights, &mut parameters, Seed(3)).unwrap();
    let tuned =
        Tuned { model: &*model, weights: &weights, changes: &changes, parameters: &parameters };
    let batch = Batch::new(documents).unwrap();
    let learner = Backprop { seed: Seed(3), recompute };
    counted(|| learner.step(&tuned, &[batch], 0).unwrap()).1
}

fn lora(layers: Vec<usize>) -> Lora {
    Lora {
        options: LoraOptions { rank: RANK as usize, layers, ..LoraOptions::default() },
        ..Lora::default()
    }
}

/// The least a step of LoRA from layer `lowest` upward can cost.
fn expected(tokens: u64, labels: u64, lowest: usize, recompute: bool) -> u64 {
    let (model, _) = open();
    let spec = model.spec();
    let of = |weight: &WeightSpec| -> u64 {
        let [outputs, inputs] = weight.matrix().map(|side| side as u64);
        let (product, factors) = (tokens * outputs * inputs, tokens * RANK * (outputs + inputs));
        match weight.layer {
            // The head: logits, and the gradient of what it reads, of rows with labels only.
            None => 2 * labels * outputs * inputs,
            Some(layer) if layer < lowest => product,
            Some(layer) => {
                let forward = product + factors;
                // What reads the embedding, or a layer without changes, hands no gradient on,
                // unless the layer is run on its own.
                let first = matches!(weight.role, Role::Query | Role::Key | Role::Value);
                let hands_on = layer > lowest || !first || recompute;
                // Gradients of both factors and of what stands between them.
                let change = factors + tokens * RANK * outputs;
                let back = change + if hands_on { product + tokens * RANK * inputs } else { 0 };
                forward * if recompute { 2 } else { 1 } + back
            }
        }
    };
    spec.linears().map(of).sum()
}

#[test]
fn frozen_weights_get_no_gradient_and_backward_ends_at_the_lowest_change() {
    for (tokens, labels) in [(24, 24), (40, 8), (40, 1)] {
        for (layers, lowest) in [(vec![], 0), (vec![1], 1)] {
            for recompute in [false, true] {
                // The first token is predicted by none.
                let rows = labels.min(tokens - 1) as u64;
                let found = step(&lora(layers.clone()), &[document(tokens, labels)], recompute);
                let wanted = expected(tokens as u64, rows, lowest, recompute);
                assert_eq!(
                    found.products, wanted,
                    "{tokens} tokens, {labels} labels, layers {layers:?}, recompute {recompute}"
                );
            }
        }
    }
}

#[test]
fn full_tuning_computes_each_weights_gradient_once() {
    let (model, _) = open();
    let weights: u64 = model.spec().linears().map(|weight| weight.count() as u64).sum();
    let head: u64 = 128 * 64;
    let found = step(&Full::default(), &[document(24, 23)], false);
    // Forward and both gradients; the head's are made of the logits of the way forward.
    assert_eq!(found.products, 3 * 24 * (weights - head) + 3 * 23 * head);
}

#[test]
fn work_grows_linearly_in_tokens_apart_from_attention() {
    let of = |tokens: usize| step(&lora(vec![]), &[document(tokens, tokens / 2)], false);
    let [short, middle, long] = [16, 32, 64].map(of);
    assert_eq!(middle.products, 2 * short.products);
    assert_eq!(long.products, 4 * short.products);
    // A token sees itself and those before it: n (n + 1) / 2 pairs.
    assert_eq!(long.attention * (16 * 17), short.attention * (64 * 65));
}

#[test]
fn documents_of_a_batch_do_not_pay_for_each_other() {
    let lengths = [30, 3, 11];
    let documents = lengths.map(|tokens| document(tokens, tokens / 3));
    let together = step(&lora(vec![]), &documents, false);
    let alone = documents.map(|document| step(&lora(vec![]), &[document], false));
    assert_eq!(together.products, alone.iter().map(|work| work.products).sum::<u64>());
    assert_eq!(together.attention, alone.iter().map(|work| work.attention).sum::<u64>());
}
