//! Folders of AdapterHub's library: they load and give what its equations give over transformers' BERT.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::sync::Arc;

use retune_core::model::{Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::random::Seed;
use retune_core::weights::{Packing, Weights};
use retune_methods::adapter::Adapter;
use retune_testkit::golden::{Tensors, assert_close, folder};
use tensor::Device;

fn check(case: &str) {
    let checkpoint = retune_models::open(&folder("training/bert/base")).unwrap();
    let (source, spec) = (Arc::clone(&checkpoint.source), checkpoint.model.spec());
    let device = Device::flex();
    let weights = Weights::new(source, Arc::clone(spec), Packing::default(), &device).unwrap();
    let path = folder(&format!("adapterhub/{case}"));
    let adapter = Adapter::read(&path).unwrap();
    let method = adapter.method().unwrap();
    let mut parameters = Parameters::new(&device);
    let changes = method.attach(&weights, &mut parameters, Seed(0)).unwrap();
    adapter.fill(&path, &mut parameters).unwrap();
    let model = &*checkpoint.model;
    let tuned = Tuned { model, weights: &weights, changes: &changes, parameters: &parameters };
    let want = Tensors::open(&format!("adapterhub/{case}/expected.safetensors"));
    let found = tuned
        .evaluate(&want.rows().batch(), None, |_, output| {
            let Output::Classes(rows) = output else { panic!("a classifier") };
            Ok(to_vec(rows.inner()))
        })
        .unwrap();
    assert_close(case, &found, &want.floats("logits"), 1e-5);
}

#[test]
fn behind_the_norm_of_the_sum() {
    check("seq_bn");
}

#[test]
fn after_attention_and_feed_forward() {
    check("double_seq_bn");
}

#[test]
fn beside_the_feed_forward() {
    check("par_bn");
}

#[test]
fn kronecker_products_with_shared_factors() {
    check("compacter");
}

#[test]
fn pickles_and_foreign_tensors_are_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let from = folder("adapterhub/seq_bn");
    let copy = |name: &str, to: &Path| std::fs::copy(from.join(name), to).unwrap();
    copy("adapter_config.json", &home.path().join("adapter_config.json"));
    std::fs::write(home.path().join("pytorch_adapter.bin"), b"\x80\x02}q\x00.").unwrap();
    let error = Adapter::read(home.path()).unwrap_err().to_string();
    assert!(error.contains("pickle") && error.contains("adapter.safetensors"), "{error}");
    // What PEFT would call a tensor of LoRA is no bottleneck.
    let lora = folder("peft/lora/adapter_model.safetensors");
    std::fs::copy(lora, home.path().join("adapter.safetensors")).unwrap();
    let error = Adapter::read(home.path()).unwrap_err().to_string();
    assert!(error.contains("lora_A") && error.contains("bottleneck"), "{error}");
}
