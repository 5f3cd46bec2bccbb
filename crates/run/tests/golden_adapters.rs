//! Adapters written by the PEFT library: they load, give PEFT's logits and merge to PEFT's weights.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::model::{Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::random::Seed;
use retune_core::weights::{Packing, Weights};
use retune_files::safetensors::SafetensorsFile;
use retune_methods::adapter::Adapter;
use retune_run::export::merged;
use tensor::Device;

fn pack() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/golden/peft")
}

fn base_weights() -> Weights {
    let checkpoint = retune_models::open(&pack().join("base")).unwrap();
    let spec = Arc::clone(checkpoint.model.spec());
    Weights::new(checkpoint.source, spec, Packing::default(), &Device::flex()).unwrap()
}

fn check(case: &str) {
    check_within(case, 1e-6);
}

fn check_within(case: &str, merged_tolerance: f32) {
    let checkpoint = retune_models::open(&pack().join("base")).unwrap();
    let weights = Weights::new(
        Arc::clone(&checkpoint.source),
        Arc::clone(checkpoint.model.spec()),
        Packing::default(),
        &Device::flex(),
    )
    .unwrap();
    let folder = pack().join(case);
    let adapter = Adapter::read(&folder).unwrap();
    let method = adapter.method().unwrap();
    let mut parameters = Parameters::new(&Device::flex());
    let changes = method.attach(&weights, &mut parameters, Seed(0)).unwrap();
    adapter.fill(&folder, &mut parameters).unwrap();
    let tuned = Tuned {
        model: &*checkpoint.model,
        weights: &weights,
        changes: &changes,
        parameters: &parameters,
    };

    let want = SafetensorsFile::open(folder.join("expected.safetensors")).unwrap();
    let ids = want.tensor("input_ids").unwrap();
    let width = ids.shape[1];
    let documents: Vec<Document> = ids
        .to_i64()
        .unwrap()
        .chunks(width)
        .map(|row| Document {
            tokens: row.iter().map(|id| *id as u32).collect(),
            learn: vec![false; width],
            ..Document::default()
        })
        .collect();
    let batch = Batch::new(&documents).unwrap();
    let found = tuned
        .evaluate(&batch, None, |pass, output| {
            let Output::States(states) = output else { panic!("a language model") };
            let rows: Vec<usize> = (0..batch.num_tokens()).collect();
            Ok(to_vec(pass.logits(&states, &rows)?.inner()))
        })
        .unwrap();
    let expected = want.tensor("logits").unwrap().to_f32().unwrap();
    compare(&format!("{case} logits"), &found, &expected, 1e-5);

    let mut num_merged = 0;
    for view in want.tensors().filter(|view| view.name.starts_with("merged.")) {
        let name = view.name.strip_prefix("merged.").unwrap();
        let spec = checkpoint.model.spec();
        let found = merged(&tuned, spec.weight(name).unwrap()).unwrap();
        compare(&format!("{case} {name}"), &found, &view.to_f32().unwrap(), merged_tolerance);
        num_merged += 1;
    }
    // PEFT refuses to merge a bias into a layer that has none, and so does retune.
    let merges = changes.unmergeable().is_none();
    assert_eq!(num_merged > 0, merges, "{case}: {num_merged} weights were merged");

    // What was loaded is written again with the same keys, shapes and values.
    let collected = Adapter::collect(&*method, checkpoint.model.spec(), &parameters, None).unwrap();
    assert_eq!(collected.config, adapter.config);
    let repeated = |name: &str| {
        name.ends_with(".base_layer.weight")
            || (name.contains(".layers.")
                && name.contains("randlora_")
                && name.ends_with(['A', 'B']))
    };
    let expected: Vec<_> = adapter.tensors.iter().filter(|(name, _)| !repeated(name)).collect();
    assert_eq!(collected.tensors.iter().collect::<Vec<_>>(), expected, "{case}");
    assert_eq!(collected.integers, adapter.integers, "{case}");
}

fn compare(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance, "{what}[{index}]: {f}, expected {e}");
    }
}

#[test]
fn lora() {
    check("lora");
}

#[test]
fn dora() {
    check("lora_dora");
}

#[test]
fn rslora() {
    check("lora_rslora");
}

#[test]
fn rank_and_alpha_patterns() {
    check("lora_pattern");
}

#[test]
fn embedding() {
    check("lora_emb");
}

#[test]
fn head_saved_whole() {
    check("lora_lmhead_mts");
}

#[test]
fn adalora() {
    check("adalora");
}

#[test]
fn beft() {
    check("beft");
}

#[test]
fn hra() {
    check("hra");
}

#[test]
fn ia3() {
    check("ia3");
}

#[test]
fn ln_tuning() {
    check("ln_tuning");
}

#[test]
fn loha() {
    check("loha");
}

#[test]
fn lokr() {
    check("lokr");
}

#[test]
fn road() {
    check("road");
}

#[test]
fn boft() {
    check("boft");
}

#[test]
fn deft() {
    check("deft");
}

#[test]
fn fourierft() {
    check("fourierft");
}

#[test]
fn glora() {
    check("glora");
}

#[test]
fn oft() {
    check("oft");
}

#[test]
fn peanut() {
    check("peanut");
}

#[test]
fn shira() {
    check("shira");
}

#[test]
fn trainable_tokens() {
    check("trainable_tokens");
}

#[test]
fn vblora() {
    check("vblora");
}

#[test]
fn vera() {
    check("vera");
}

#[test]
fn randlora() {
    // Its weights reach 10.8, those of the others 1.1.
    check_within("randlora", 1e-5);
}

/// What PEFT draws from a seed is drawn again, to the last bit but two.
fn check_made_again(case: &str, tensors: &[&str]) {
    let (weights, adapter) = (base_weights(), Adapter::read(&pack().join(case)).unwrap());
    let mut parameters = Parameters::new(&Device::flex());
    adapter.method().unwrap().attach(&weights, &mut parameters, Seed(0)).unwrap();
    for name in tensors {
        let found = parameters.values(parameters.find(name).unwrap());
        compare(name, &found, &adapter.tensors[*name].1, 2.4e-7);
    }
}

#[test]
fn projections_of_vera_are_made_again() {
    check_made_again("vera", &["base_model.vera_A", "base_model.vera_B"]);
}

#[test]
fn bases_of_randlora_are_made_again() {
    check_made_again("randlora", &["base_model.randlora_A", "base_model.randlora_B"]);
}

#[test]
fn a_missing_tensor_is_named() {
    let checkpoint = retune_models::open(&pack().join("base")).unwrap();
    let weights = Weights::new(
        Arc::clone(&checkpoint.source),
        Arc::clone(checkpoint.model.spec()),
        Packing::default(),
        &Device::flex(),
    )
    .unwrap();
    let folder = pack().join("lora");
    let mut adapter = Adapter::read(&folder).unwrap();
    let lost = adapter.tensors.keys().next().unwrap().clone();
    let moved = adapter.tensors.remove(&lost).unwrap();
    adapter.tensors.insert(lost.replace("layers.0", "layers.9"), moved);
    let mut parameters = Parameters::new(&Device::flex());
    adapter.method().unwrap().attach(&weights, &mut parameters, Seed(0)).unwrap();
    let error = adapter.fill(&folder, &mut parameters).unwrap_err().to_string();
    assert!(error.contains(&lost) && error.contains("belongs to nothing"), "{error}");
}
