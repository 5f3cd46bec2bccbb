//! Memory that is allowed: recomputed layers where it takes them, a refusal that says what would
//! fit, and settings that do.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::path::Path;
use std::process::Output;

use common::retune;
use retune_core::kernels::matrix::Arithmetic;
use serde_json::Value;

fn plan(folder: &Path, settings: &[String]) -> Output {
    let settings = settings.iter().flat_map(|setting| ["--set", setting.as_str()]);
    let arguments: Vec<&str> =
        ["--json", "plan", "large.toml"].into_iter().chain(settings).collect();
    retune(folder, &arguments)
}

fn accepted(folder: &Path, settings: &[String]) -> Value {
    let out = plan(folder, settings);
    assert!(out.status.success(), "{settings:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Returns what a refusal says.
fn refused(out: &Output) -> String {
    let shown = String::from_utf8_lossy(&out.stdout);
    assert!(!out.status.success(), "{shown}");
    let said: Value = serde_json::from_str(&shown).unwrap();
    said["message"].as_str().unwrap().to_owned()
}

fn total(plan: &Value) -> u64 {
    plan["forecast"]["total_bytes"].as_u64().unwrap()
}

fn allowing(bytes: u64) -> String {
    format!("compute.memory=\"{}MiB\"", bytes >> 20)
}

/// Writes rows of long answers: most of a step's memory is activations.
fn recipe(folder: &Path, method: &str) {
    let answer = "the whale and the harpoon ".repeat(30);
    let row = |i: usize| format!("{{\"prompt\": \"tell {i}\", \"completion\": \"{answer}{i}\"}}\n");
    std::fs::write(folder.join("rows.jsonl"), (0..40).map(row).collect::<String>()).unwrap();
    let text = format!(
        "model = \"builtin:tiny\"\n[data]\ntrain = \"rows.jsonl\"\n[method.{method}]\n\
         [train]\nsteps = 2\nbatch_size = 32\n[evaluate]\nrows = 2\nexamples = 0\n"
    );
    std::fs::write(folder.join("large.toml"), text).unwrap();
}

#[test]
fn layers_are_recomputed_where_that_is_what_it_takes_and_the_plan_says_so() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "lora");
    let free = accepted(folder.path(), &[]);
    let recomputed = accepted(folder.path(), &["train.recompute=true".to_owned()]);
    assert_eq!(free["forecast"]["recompute"], false);
    assert!(total(&recomputed) + (8 << 20) < total(&free), "{free} {recomputed}");

    let enough = accepted(folder.path(), &[allowing(total(&free) + (1 << 20))]);
    assert_eq!(enough["forecast"], free["forecast"]);
    let tight = accepted(folder.path(), &[allowing(total(&free) - (1 << 20))]);
    assert_eq!(tight["forecast"]["recompute"], true);
    assert_eq!(total(&tight), total(&recomputed));
    let says = |plan: &Value| plan["warnings"].to_string().contains("layers are run again");
    assert!(says(&tight) && !says(&enough) && !says(&recomputed), "only what was not asked for");
}

#[test]
fn what_cannot_fit_is_refused_with_settings_that_do() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "lora");
    let recomputed = total(&accepted(folder.path(), &["train.recompute=true".to_owned()]));
    for short in [2, 12] {
        let allowed = allowing(recomputed - (short << 20));
        let out = plan(folder.path(), std::slice::from_ref(&allowed));
        let said = refused(&out);
        let forecast = format!("{}MiB even with recomputed layers", recomputed.div_ceil(1 << 20));
        assert!(said.contains(&forecast), "{said}");
        let settings = said.rsplit("help:").next().unwrap().split(", or ");
        let mut tried = 0;
        for setting in settings {
            let single = setting.split('`').skip(1).step_by(2);
            let mut chosen: Vec<String> = single
                .filter(|text| text.contains(" = "))
                .map(|text| text.replacen(" = ", "=", 1))
                .collect();
            if chosen.is_empty() {
                continue;
            }
            if !chosen.iter().any(|text| text.starts_with("compute.memory")) {
                chosen.push(allowed.clone());
            }
            accepted(folder.path(), &chosen);
            tried += 1;
        }
        assert!(tried >= 2 && said.contains("train.batch_size = "), "{said}");
    }
}

#[test]
fn a_model_that_fits_in_no_way_is_told_the_memory_it_takes() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "full");
    let out = plan(folder.path(), &["compute.memory=\"8MiB\"".to_owned()]);
    let said = refused(&out);
    assert!(said.contains("does not fit"), "{said}");
    assert!(!said.contains("train.batch_size"), "one row does not fit either: {said}");
    assert!(said.contains("[method.lora]") && said.contains("compute.memory = "), "{said}");
}

#[test]
fn measuring_counts_where_it_takes_more_than_training() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "lora");
    let small = [
        "train.batch_size=1",
        "data.max_length=16",
        "data.validation_fraction=0.5",
        "evaluate.rows=16",
    ]
    .map(str::to_owned);
    let asked = |more: &str| [&small[..], &[more.to_owned()]].concat();
    let few = accepted(folder.path(), &asked("evaluate.examples=1"));
    let many = accepted(folder.path(), &asked("evaluate.examples=16"));
    let evaluation = |plan: &Value| plan["forecast"]["evaluation_bytes"].as_u64().unwrap();
    assert!(evaluation(&many) > evaluation(&few), "{few} {many}");
    assert_eq!(
        total(&many) - total(&few),
        evaluation(&many)
            - many["forecast"]["activation_bytes"].as_u64().unwrap().max(evaluation(&few))
    );
}

#[test]
fn an_arithmetic_the_processor_lacks_gets_a_line() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "lora");
    let plan = accepted(folder.path(), &["compute.arithmetic=\"bf16\"".to_owned()]);
    let said = plan["warnings"].to_string().contains("is computed in f32");
    assert_eq!(said, !Arithmetic::Bf16.is_native(), "{plan}");
}

#[test]
fn a_method_that_writes_into_weights_is_refused_over_blocks_before_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let stored = ["compute.weights=\"stored\"".to_owned()];
    for method in ["id3", "sara", "hft"] {
        recipe(folder.path(), method);
        accepted(folder.path(), &[]);
        let said = refused(&plan(folder.path(), &stored));
        assert!(said.contains("quantised blocks") && said.contains("compute.weights"), "{said}");
    }
    for method in ["lora", "spiel"] {
        recipe(folder.path(), method);
        accepted(folder.path(), &stored);
    }
}
