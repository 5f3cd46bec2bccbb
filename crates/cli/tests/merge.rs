//! `retune merge` as a person meets it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::process::{Command, Output};

/// Runs the program where the golden models lie.
fn retune(arguments: &[&str], cache: &Path) -> Output {
    let pack = Path::new(env!("CARGO_MANIFEST_DIR")).join("../merge/tests/golden/mergekit");
    Command::new(env!("CARGO_BIN_EXE_retune"))
        .args(arguments)
        .current_dir(pack)
        .env("RETUNE_CACHE", cache)
        .env("HF_HUB_OFFLINE", "1")
        .env("NO_COLOR", "1")
        .output()
        .unwrap()
}

#[test]
fn a_plan_becomes_a_folder() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("merged");
    let target = target.to_str().unwrap();
    let out = retune(&["merge", "ties.yml", target], home.path());
    let shown = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(0), "{shown}{}", String::from_utf8_lossy(&out.stderr));
    assert!(shown.contains("21 tensors") && shown.contains(target), "{shown}");

    let again = retune(&["merge", "ties.yml", target], home.path());
    let message = String::from_utf8(again.stderr).unwrap();
    assert_eq!(again.status.code(), Some(1));
    assert!(message.contains("the target exists") && message.contains("--force"), "{message}");

    let forced = retune(&["merge", "ties.yml", target, "--force", "--json"], home.path());
    let json: serde_json::Value = serde_json::from_slice(&forced.stdout).unwrap();
    assert_eq!((&json["num_tensors"], &json["num_resumed"]), (&21.into(), &0.into()));
    assert!(json["warnings"].as_array().unwrap().is_empty());
}

#[test]
fn all_mistakes_of_a_plan_are_shown_with_their_lines() {
    let home = tempfile::tempdir().unwrap();
    let plan = home.path().join("plan.yml");
    let text = "merge_method: tise\nbase_model: ./base\nmodels:\n- model: ./a\n  weigth: 1\n\
                slices: []\ndtype: float31\n";
    std::fs::write(&plan, text).unwrap();
    let target = home.path().join("out");
    let arguments = ["merge", plan.to_str().unwrap(), target.to_str().unwrap()];
    let out = retune(&arguments, home.path());
    let message = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(2), "{message}");
    for part in [
        "plan.yml:1:",
        "did you mean `ties`?",
        "plan.yml:5:",
        "unknown key `weigth`",
        "plan.yml:6:",
        "`models` and `slices` cannot stand together",
        "plan.yml:7:",
        "`float31` is no number type",
    ] {
        assert!(message.contains(part), "no {part:?} in:\n{message}");
    }
    assert!(!target.exists());
    let json = retune(&[&arguments[..], &["--json"]].concat(), home.path());
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(json["mistakes"].as_array().unwrap().len() >= 4, "{json}");
}

#[test]
fn a_model_that_is_nowhere_is_named() {
    let home = tempfile::tempdir().unwrap();
    let plan = home.path().join("plan.yml");
    let text = "merge_method: passthrough\nmodels:\n- model: ./nowhere\n";
    std::fs::write(&plan, text).unwrap();
    let target = home.path().join("out");
    let arguments = ["merge", plan.to_str().unwrap(), target.to_str().unwrap()];
    let out = retune(&arguments, home.path());
    let message = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{message}");
    assert!(message.contains("nowhere"), "{message}");
    let missing = retune(&["merge", "no.yml", "out"], home.path());
    assert_eq!(missing.status.code(), Some(2));
}
