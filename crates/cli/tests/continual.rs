//! Sequences of runs, and half of a model put back, as a person meets them.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use common::retune;
use common::said::{json, refused, text};
use retune_files::safetensors::SafetensorsFile;
use serde_json::Value;

/// Writes a task of two words, and runs its recipe from a model.
fn tuned(folder: &Path, name: &str, model: &str, words: [&str; 2], method: &str) {
    let row = |i: usize| {
        let (word, kind) = (words[i % 2], ["animal", "object"][i % 2]);
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{word} number {i}\"}}, \
             {{\"role\": \"assistant\", \"content\": \"{kind}\"}}]}}\n"
        )
    };
    let rows: String = (0..16).map(row).collect();
    std::fs::write(folder.join(format!("{name}.jsonl")), rows).unwrap();
    let recipe = format!(
        "model = \"{model}\"\n[data]\ntrain = \"{name}.jsonl\"\nvalidation_fraction = 0.25\n\
         {method}\n[train]\nsteps = 3\nbatch_size = 4\nlearning_rate = 3e-3\n\
         [evaluate]\nkind = \"choice\"\n"
    );
    std::fs::write(folder.join(format!("{name}.toml")), recipe).unwrap();
    let out = retune(folder, &["run", &format!("{name}.toml")]);
    assert!(out.status.success(), "{}", text(&out.stderr));
}

fn open(folder: &Path, model: &str) -> SafetensorsFile {
    SafetensorsFile::open(folder.join(model).join("model.safetensors")).unwrap()
}

fn values(model: &SafetensorsFile, name: &str) -> Vec<f32> {
    model.tensor(name).unwrap().to_f32().unwrap()
}

/// Names the tensors whose every value two models have in common.
fn unmoved(folder: &Path, before: &str, after: &str) -> BTreeSet<String> {
    let (before, after) = (open(folder, before), open(folder, after));
    let same = before.names().filter(|name| values(&before, name) == values(&after, name));
    same.map(str::to_owned).collect()
}

fn count(names: &BTreeSet<String>, end: &str) -> usize {
    names.iter().filter(|name| name.contains(end)).count()
}

fn names(found: &Value) -> BTreeSet<String> {
    serde_json::from_value(found["reset"]["weights"].clone()).unwrap()
}

/// Where the program keeps the model inside it.
const BASE: &str = "cache/builtin/tiny-0.1.0";
const FIRST: &str = "runs/first-1/model";
const SECOND: &str = "runs/second-1/model";

#[test]
fn a_second_task_goes_on_from_the_first_with_another_half() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path();
    tuned(folder, "first", "builtin:tiny", ["whale", "harpoon"], "[method.hft]\nseed = 3");
    tuned(folder, "second", FIRST, ["mouse", "kettle"], "[method.hft]\nseed = 3\nstage = 1");

    let halves = [unmoved(folder, BASE, FIRST), unmoved(folder, FIRST, SECOND)];
    for half in &halves {
        // Of each of 4 layers: 2 of 4 matrices of attention, 2 or 1 of 3 of the network, 1 of 2 norms.
        assert_eq!((count(half, "_proj"), count(half, "norm"), half.len()), (14, 4, 18));
    }
    assert_ne!(halves[0], halves[1]);

    // The half that went untrained is the one that half-reset would put back, so that it changes
    // nothing.
    for ((stage, half), [base, model]) in
        ["0", "1"].into_iter().zip(&halves).zip([[BASE, FIRST], [FIRST, SECOND]])
    {
        let output = format!("reset-{stage}");
        let reset = ["half-reset", model, "--base", base, "--seed", "3", "--stage", stage];
        let found = json(folder, &[&reset[..], &["--output", &output]].concat());
        assert_eq!(names(&found), *half);
        assert_eq!(unmoved(folder, model, &output).len(), open(folder, model).tensors().count());
    }

    // What the second task did to the first one is measured by the first one's recipe.
    let loss = |model: &str| {
        let found = json(folder, &["eval", "first.toml", "--set", &format!("model={model}")]);
        assert_eq!(found["measurement"]["num_rows"], 4);
        found["measurement"]["metrics"]["loss"]["value"].as_f64().unwrap()
    };
    let report = std::fs::read_to_string(folder.join("runs/first-1/report.json")).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    let reported = report["metrics"].as_array().unwrap().iter().find(|m| m["name"] == "loss");
    assert_eq!(reported.unwrap()["after"]["value"], loss(FIRST), "{report}");
    assert_ne!(loss(SECOND), loss(FIRST));
}

#[test]
fn half_of_a_change_goes_back() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path();
    tuned(folder, "first", "builtin:tiny", ["whale", "harpoon"], "[method.full]");
    let reset = ["half-reset", FIRST, "--base", "builtin:tiny", "--output"];
    let found = json(folder, &[&reset[..], &["half"]].concat());

    let back = names(&found);
    let (base, tuned, half) = (open(folder, BASE), open(folder, FIRST), open(folder, "half"));
    let (mut all, mut of_back) = (0, 0);
    for name in half.names() {
        let went_back = back.contains(name);
        let (from, other) = if went_back { (&base, &tuned) } else { (&tuned, &base) };
        let found = values(&half, name);
        assert!(found == values(from, name) && found != values(other, name), "{name}");
        all += found.len();
        of_back += if went_back { found.len() } else { 0 };
    }
    assert_eq!((count(&back, "_proj"), count(&back, "norm"), back.len()), (14, 4, 18));
    let share = found["reset"]["share"].as_f64().unwrap();
    assert!((share - of_back as f64 / all as f64).abs() < 1e-12, "{share}");
    let again = json(folder, &[&reset[..], &["again", "--stage", "1"]].concat());
    assert_ne!(names(&again), back);

    refused(folder, &[&reset[..], &["half"]].concat(), "exists already");
    refused(folder, &[&reset[..], &["x", "--level", "row"]].concat(), "category");
    refused(folder, &[&reset[..], &["x", "--ratio", "1"]].concat(), "use `full`");
    let config = std::fs::read_to_string(folder.join(BASE).join("config.json")).unwrap();
    std::fs::create_dir(folder.join("wide")).unwrap();
    let wide = config.replace("\"intermediate_size\": 320", "\"intermediate_size\": 384");
    assert_ne!(wide, config);
    std::fs::write(folder.join("wide/config.json"), wide).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(folder.join(BASE).join(file), folder.join("wide").join(file)).unwrap();
    }
    json(folder, &["init", "wide", "--output", "other"]);
    let other = ["half-reset", FIRST, "--base", "other", "--output", "x"];
    // Every weight that differs is named.
    refused(folder, &other, "`model.layers.3.mlp.up_proj.weight` of shape [384, 128]");
    refused(folder, &other, "`model.layers.0.mlp.down_proj.weight` of shape [128, 320]");
    assert!(!folder.join("x").exists());
}
