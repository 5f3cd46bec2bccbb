//! Several methods and several adapters at once, as a person meets them.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Output;

use common::retune;
use retune_files::safetensors::SafetensorsFile;

fn shown(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// Runs a command that must succeed and returns what it shows.
fn done(folder: &Path, arguments: &[&str]) -> String {
    let out = retune(folder, arguments);
    assert!(out.status.success(), "{arguments:?}\n{}", shown(&out));
    shown(&out)
}

/// Runs a command that must fail and returns what it shows.
fn refused(folder: &Path, arguments: &[&str]) -> String {
    let out = retune(folder, arguments);
    assert!(!out.status.success(), "{arguments:?} succeeded\n{}", shown(&out));
    shown(&out)
}

/// Writes rows and a recipe of the built-in model named `name`.
fn recipe(folder: &Path, name: &str, head: &str, methods: &str) -> String {
    let row = |i: usize| {
        let (word, kind) = [("whale", "animal"), ("harpoon", "object")][(i + name.len()) % 2];
        format!("{{\"prompt\": \"{word} number {i}\", \"completion\": \" {kind}\"}}\n")
    };
    std::fs::write(folder.join("rows.jsonl"), (0..12).map(row).collect::<String>()).unwrap();
    let text = format!(
        "model = \"builtin:tiny\"\n{head}\n[data]\ntrain = \"rows.jsonl\"\n{methods}\n\
         [train]\nsteps = 4\nbatch_size = 2\nlearning_rate = 1e-3\n\
         [evaluate]\nrows = 3\nbefore = false\n"
    );
    let file = format!("{name}.toml");
    std::fs::write(folder.join(&file), text).unwrap();
    file
}

/// Computes logits of a few tokens with the program itself.
fn logits(folder: &Path, model: &str, adapters: &[&str]) -> Vec<f32> {
    use retune_files::Dtype;
    use retune_files::safetensors::{SafetensorsWriter, TensorSpec};
    let ids = folder.join("ids.safetensors");
    let spec = [TensorSpec::new("input_ids", Dtype::I64, vec![1, 6])];
    let mut writer = SafetensorsWriter::create(&ids, &spec, &BTreeMap::new()).unwrap();
    let bytes: Vec<u8> = [5_i64, 9, 2, 40, 7, 7].iter().flat_map(|id| id.to_le_bytes()).collect();
    writer.write("input_ids", &bytes).unwrap();
    writer.finish().unwrap();
    let adapters = adapters.iter().flat_map(|adapter| ["--adapter", adapter]);
    let arguments: Vec<&str> =
        ["logits", "--model", model, "--input-ids", "ids.safetensors", "--output", "out.st"]
            .into_iter()
            .chain(adapters)
            .collect();
    let _ = std::fs::remove_file(folder.join("out.st"));
    done(folder, &arguments);
    let file = SafetensorsFile::open(folder.join("out.st")).unwrap();
    file.tensor("logits").unwrap().to_f32().unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn stacked_methods_leave_an_adapter_each_and_are_used_together() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let methods = "[method.lora]\nrank = 4\n[method.ia3]\n[method.prompt-tuning]";
    let file = recipe(folder, "three", "", methods);
    // Three methods, the last of which learns at its own rate.
    let plan = done(folder, &["plan", &file]);
    assert!(plan.contains("prompt-tuning learns at"), "{plan}");
    let run = done(folder, &["run", &file]);
    assert!(run.contains("run folder"), "{run}");
    let run = folder.join("runs/three-1");
    for adapter in ["1-lora", "2-ia3", "3-prompt-tuning"] {
        for file in ["adapter_config.json", "adapter_model.safetensors", "README.md"] {
            assert!(run.join("adapter").join(adapter).join(file).is_file(), "{adapter}/{file}");
        }
    }
    let report = std::fs::read_to_string(run.join("report.md")).unwrap();
    assert!(report.contains("lora + ia3 + prompt-tuning"), "{report}");
    // The folder of all stands for each in its order.
    let whole = "runs/three-1/adapter";
    let parts = ["1-lora", "2-ia3", "3-prompt-tuning"].map(|part| format!("{whole}/{part}"));
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let together = logits(folder, "builtin:tiny", &[whole]);
    assert_eq!(together, logits(folder, "builtin:tiny", &parts));
    assert!(largest_difference(&together, &logits(folder, "builtin:tiny", &parts[..2])) > 1e-4);
    let eval = done(folder, &["eval", &file, "--adapter", whole]);
    assert!(eval.contains("loss"), "{eval}");

    // What changes weights merges; a prompt does not.
    let merge = ["merge-adapter", "--model", "builtin:tiny", "--output", "merged"];
    let why = refused(folder, &[&merge[..], &["--adapter", whole]].concat());
    assert!(why.contains("virtual tokens"), "{why}");
    done(folder, &[&merge[..], &["--adapter", parts[0], "--adapter", parts[1]]].concat());
    let merged = logits(folder, "merged", &[]);
    let beside = logits(folder, "builtin:tiny", &parts[..2]);
    assert!(largest_difference(&merged, &beside) < 1e-4);
}

#[test]
fn methods_that_fight_are_refused_before_the_first_step() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let file = recipe(folder, "fight", "", "[method.lora]\nrank = 4\n[method.full]");
    let why = refused(folder, &["run", &file]);
    assert!(why.contains("lora and full fight over"), "{why}");
    assert!(why.contains("found: lora, full") && why.contains("help:"), "{why}");
    let file = recipe(folder, "stages", "", "[method.lora]\nrank = 4\n[method.lt-sft]");
    let why = refused(folder, &["run", &file]);
    assert!(why.contains("lt-sft trains in 2 stages"), "{why}");
}

#[test]
fn a_task_is_learned_on_a_language_and_both_are_added_and_taken_off() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let sparse = "[method.lt-sft]\ndensity = 0.05";
    done(folder, &["run", &recipe(folder, "language", "", sparse)]);
    done(folder, &["run", &recipe(folder, "other-language", "", sparse)]);
    let head = "adapters = [\"runs/language-1/adapter\"]";
    let task_recipe = recipe(folder, "task", head, sparse);
    done(folder, &["run", &task_recipe]);
    let [language, other, task] =
        ["language", "other-language", "task"].map(|name| format!("runs/{name}-1/adapter"));

    // The task's change is known by the base, and says what lay under it.
    let config = std::fs::read_to_string(folder.join(&task).join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let under = config["retune_trained_on"][0]["name"].as_str().unwrap();
    assert!(under.ends_with("language-1/adapter"), "{config}");
    let alone =
        ["generate", "--model", "builtin:tiny", "--prompt", "whale", "--max-new-tokens", "2"];
    let use_with = |adapters: &[&str]| {
        let adapters = adapters.iter().flat_map(|adapter| ["--adapter", adapter]);
        done(folder, &alone.into_iter().chain(adapters).collect::<Vec<_>>())
    };
    assert!(use_with(&[&task]).contains("was trained on top of"));
    assert!(!use_with(&[&language, &task]).contains("warning"));
    // As the run left it: the same recipe, measured with its own adapter.
    done(folder, &["eval", &task_recipe, "--adapter", &task]);

    // Zero-shot transfer: another language in place of the one it was trained on.
    let added = logits(folder, "builtin:tiny", &[&other, &task]);
    let turned = logits(folder, "builtin:tiny", &[&task, &other]);
    assert!(largest_difference(&added, &turned) < 1e-5, "the order matters not");
    done(folder, &["combine", &other, &task, "--base", "builtin:tiny", "--output", "transferred"]);
    assert!(largest_difference(&logits(folder, "transferred", &[]), &added) < 1e-4);

    // Taken off again, the base is back.
    let base = logits(folder, "builtin:tiny", &[]);
    assert!(largest_difference(&added, &base) > 1e-4);
    let off = ["combine", &other, &task, "--weights=-1,-1", "--base", "transferred"];
    let why = refused(folder, &[&off[..], &["--output", "back"]].concat());
    assert!(why.contains("another base"), "{why}");
    done(folder, &[&off[..], &["--output", "back", "--force"]].concat());
    assert!(largest_difference(&logits(folder, "back", &[]), &base) < 1e-5);

    // What changes states cannot lie under what trains.
    done(folder, &["run", &recipe(folder, "prompt", "", "[method.prompt-tuning]")]);
    let head = "adapters = [\"runs/prompt-1/adapter\"]";
    let why = refused(folder, &["run", &recipe(folder, "on-prompt", head, sparse)]);
    assert!(why.contains("virtual tokens"), "{why}");
}
