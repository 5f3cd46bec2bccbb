//! Every element of every golden output, family by family.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as the tests do")]

use std::path::Path;
use std::sync::Arc;

use retune_core::weights::{Packing, WeightSource};
use retune_models::config::Config;
use retune_models::{FolderSource, build, open, read_config};
use retune_testkit::golden::{Rows, Tensors, assert_close, folder};
use retune_testkit::run::outputs;
use serde_json::json;

/// Between other correct ways and the stored numbers there are up to 4e-6.
const TOLERANCE: f32 = 2e-5;

fn check(base: &Path, rows: &Rows, expected: &Tensors, what: &str) {
    let checkpoint = open(base).unwrap();
    // A sentence embedding leaves the pooler out; nothing else may be left over.
    let left = checkpoint.unused.iter().find(|name| !name.starts_with("pooler."));
    assert_eq!(left, None, "{what}");
    let packing = Packing::default();
    let found = outputs(&*checkpoint.model, &checkpoint.source, &rows.batch(), packing).unwrap();
    compare(&found, rows, expected, what);
}

fn compare(found: &[f32], rows: &Rows, expected: &Tensors, what: &str) {
    let name = if expected.has("logits") { "logits" } else { "embeddings" };
    let values = expected.floats(name);
    let values = match expected.shape(name) {
        [_, _, _] => rows.unpadded(&values),
        _ => values,
    };
    assert_close(&format!("{what} {name}"), found, &values, TOLERANCE);
}

#[test]
fn training_pack() {
    for case in ["llama", "qwen2", "gemma3", "bert"] {
        let rows = Tensors::open(&format!("training/{case}/batch.safetensors")).rows();
        let expected = Tensors::open(&format!("training/{case}/full/expected.safetensors"));
        check(&folder(&format!("training/{case}/base")), &rows, &expected, case);
    }
}

#[test]
fn base_of_the_peft_pack() {
    let expected = Tensors::open("peft/base/expected.safetensors");
    check(&folder("peft/base"), &expected.rows(), &expected, "peft base");
}

#[test]
fn families_pack() {
    let mut cases: Vec<_> = std::fs::read_dir(folder("families"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir() && !path.ends_with("t5") && !path.ends_with("t5_gated"))
        .collect();
    cases.sort();
    assert_eq!(cases.len(), 11, "{cases:?}");
    for case in cases {
        let expected = Tensors::at(&case.join("expected.safetensors"));
        check(&case, &expected.rows(), &expected, &case.display().to_string());
    }
}

/// Before transformers 5, Gemma 3 spelled layer kinds and rope bases otherwise.
#[test]
fn older_spelling_of_gemma3() {
    let base = folder("training/gemma3/base");
    let mut value = read_config(&base).unwrap().value().clone();
    let map = value.as_object_mut().unwrap();
    for key in ["layer_types", "rope_parameters", "_sliding_window_pattern"] {
        map.shift_remove(key).unwrap();
    }
    // Of the four layers the third sees everything: a pattern of 3.
    for (key, old) in [
        ("sliding_window_pattern", json!(3)),
        ("rope_theta", json!(1e6)),
        ("rope_local_base_freq", json!(1e4)),
    ] {
        map.insert(key.to_owned(), old);
    }
    let model = build(&Config::new(Path::new("config.json"), value)).unwrap();
    let source: Arc<dyn WeightSource> = Arc::new(FolderSource::open(&base, model.spec()).unwrap());
    let rows = Tensors::open("training/gemma3/batch.safetensors").rows();
    let expected = Tensors::open("training/gemma3/full/expected.safetensors");
    let found = outputs(&*model, &source, &rows.batch(), Packing::default()).unwrap();
    compare(&found, &rows, &expected, "gemma3, older spelling");
}
