//! Models that read images, as a person meets them: from a configuration to a merged model.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::path::{Path, PathBuf};

use common::retune;
use retune_files::safetensors::SafetensorsFile;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Runs the program, which must succeed, and returns what it printed.
fn done(folder: &Path, arguments: &[&str]) -> String {
    let out = retune(folder, arguments);
    let shown = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{arguments:?}\n{shown}{}", String::from_utf8_lossy(&out.stderr));
    shown
}

fn refused(folder: &Path, arguments: &[&str], part: &str) {
    let out = retune(folder, arguments);
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && message.contains(part), "{arguments:?}\n{message}");
}

/// Draws a base and writes a recipe on the digits for it.
fn prepare(folder: &Path, base: &str, rest: &str) {
    let config = root().join("recipes/bases").join(base);
    done(folder, &["init", config.to_str().unwrap(), "--output", base, "--seed", "3"]);
    let digits = root().join("datasets/digits");
    let text = format!(
        "model = \"{base}\"\n[data]\ntrain = '{}'\ntest = '{}'\nlimit = 120\n{rest}",
        digits.join("train-images-idx3-ubyte.gz").display(),
        digits.join("test-images-idx3-ubyte.gz").display()
    );
    std::fs::write(folder.join("digits.toml"), text).unwrap();
}

fn report(folder: &Path) -> Value {
    let path = folder.join("runs/digits-1/report.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn metric(report: &Value, name: &str, when: &str) -> f64 {
    let metrics = report["metrics"].as_array().unwrap();
    let found = metrics.iter().find(|metric| metric["name"] == name).unwrap();
    found[when]["value"].as_f64().unwrap()
}

fn logits(folder: &Path, model: &[&str]) -> Vec<f32> {
    let _ = std::fs::remove_file(folder.join("out.safetensors"));
    let files = ["--input-ids", "in.safetensors", "--output", "out.safetensors"];
    done(folder, &[&["logits"], model, &files].concat());
    let file = SafetensorsFile::open(folder.join("out.safetensors")).unwrap();
    file.tensor("logits").unwrap().to_f32().unwrap()
}

fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let apart = |(a, b): (&f32, &f32)| (a - b).abs() > 1e-4 || !a.is_finite();
    let place = found.iter().zip(expected).position(apart);
    assert_eq!(place, None, "{found:?}\n{expected:?}");
}

#[test]
fn a_classifier_learns_digits_and_its_adapter_merges() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path();
    let rest = "crop_padding = 1\n[method.lora]\nrank = 4\ntargets = ['all-linear']\n[train]\n\
                steps = 60\nbatch_size = 16\nlearning_rate = 5e-3\nsave_every = 0\n[evaluate]\n\
                rows = 100\n";
    prepare(folder, "vit-8", rest);
    let doctor = done(folder, &["doctor", "digits.toml", "--rows", "1"]);
    for part in ["IDX of 1347 pictures", "8 × 8 pixels", "picture 1, class `0`: 16 patches of 4"] {
        assert!(doctor.contains(part), "{doctor}");
    }
    done(folder, &["plan", "digits.toml"]);
    done(folder, &["run", "digits.toml"]);
    let report = report(folder);
    let (before, after) = (metric(&report, "loss", "before"), metric(&report, "loss", "after"));
    assert!(after < before, "{before} to {after}");

    // The same measure again, then the merged model's, which needs nothing beside it.
    let eval = |arguments: &[&str]| -> Value {
        serde_json::from_str(&done(folder, &[&["eval", "--json"], arguments].concat())).unwrap()
    };
    let adapter = "runs/digits-1/adapter";
    let found = eval(&["digits.toml", "--adapter", adapter]);
    let accuracy = &found["measurement"]["metrics"]["accuracy"]["value"];
    assert_eq!(accuracy.as_f64(), Some(metric(&report, "accuracy", "after")));
    let model = ["--model", "vit-8", "--adapter", adapter];
    done(folder, &[&["merge-adapter"], &model[..], &["--output", "merged"]].concat());
    assert!(folder.join("merged/preprocessor_config.json").is_file());

    let pixels: Vec<f32> = (0..128_u8).map(|i| f32::from(i % 13) / 6.0 - 1.0).collect();
    write_inputs(folder, &[2, 1, 8, 8], &pixels, None);
    let tuned = logits(folder, &model);
    assert_eq!(tuned.len(), 20);
    assert_close(&logits(folder, &["--model", "merged"]), &tuned);
}

fn write_inputs(folder: &Path, shape: &[usize], pixels: &[f32], ids: Option<(&[usize], &[i64])>) {
    use retune_files::Dtype;
    use retune_files::safetensors::{SafetensorsWriter, TensorSpec};
    let mut specs = Vec::new();
    if let Some((shape, _)) = ids {
        specs.push(TensorSpec::new("input_ids", Dtype::I64, shape.to_vec()));
    }
    specs.push(TensorSpec::new("pixel_values", Dtype::F32, shape.to_vec()));
    let path = folder.join("in.safetensors");
    let metadata = std::collections::BTreeMap::new();
    let mut writer = SafetensorsWriter::create(&path, &specs, &metadata).unwrap();
    if let Some((_, ids)) = ids {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        writer.write("input_ids", &bytes).unwrap();
    }
    writer.write_f32("pixel_values", pixels).unwrap();
    writer.finish().unwrap();
}

#[test]
fn two_towers_learn_pairs_and_are_measured_against_prompts() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path();
    let rest = "prompt = 'a photo of a {label}.'\ncaptions = ['a photo of a {label}.', 'this is a \
                {label}']\n[method.ssf]\n[train]\nsteps = 6\nbatch_size = 8\nlearning_rate = 1e-2\n\
                save_every = 3\n[evaluate]\nrows = 40\n";
    prepare(folder, "clip-28", rest);
    let doctor = done(folder, &["doctor", "digits.toml", "--rows", "1"]);
    for part in ["one of 2 captions", "beside a text of"] {
        assert!(doctor.contains(part), "{doctor}");
    }
    done(folder, &["run", "digits.toml"]);
    let found = report(folder);
    assert!(metric(&found, "accuracy", "after") >= 0.0);
    let model = ["--model", "clip-28", "--adapter", "runs/digits-1/adapter"];
    done(folder, &[&["merge-adapter"], &model[..], &["--output", "merged"]].concat());
    for file in ["preprocessor_config.json", "tokenizer.json"] {
        assert!(folder.join("merged").join(file).is_file(), "{file}");
    }
    let pixels: Vec<f32> = (0..2 * 784_u32).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
    let ids = [70, 4, 71, 70, 5, 71, 70, 6, 71];
    write_inputs(folder, &[2, 1, 28, 28], &pixels, Some((&[3, 3], &ids)));
    let tuned = logits(folder, &model);
    assert_eq!(tuned.len(), 6);
    assert_close(&logits(folder, &["--model", "merged"]), &tuned);
    // Without captions the prompts themselves are learned, which needs other settings: another plan.
    refused(
        folder,
        &["run", "digits.toml", "--set", "data.captions=['a digit']"],
        "the class has no place",
    );
}

#[test]
fn what_does_not_fit_is_said_before_the_first_step() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path();
    prepare(folder, "vit-8", "[method.prompt-tuning]\n[train]\nsteps = 1\n");
    refused(folder, &["plan", "digits.toml"], "models that read images");
    let lora = ["plan", "digits.toml", "--set", "method.lora.rank=4"];
    refused(folder, &lora, "method");
    std::fs::write(folder.join("rows.jsonl"), "{\"image\": \"a.png\", \"text\": \"a\"}\n").unwrap();
    refused(folder, &["plan", "digits.toml", "--set", "data.train='rows.jsonl'"], "a.png");
}
