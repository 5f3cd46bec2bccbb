//! `retune merge` as a person meets it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use retune_files::Dtype;
use retune_files::safetensors::{TensorSpec, write_safetensors};

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
fn a_gguf_file_is_told_from_a_damaged_one() {
    let home = tempfile::tempdir().unwrap();
    let (plan, model) = (home.path().join("plan.yml"), home.path().join("model.gguf"));
    std::fs::write(&model, b"GGUF").unwrap();
    let text = format!("merge_method: passthrough\nmodels:\n- model: {}\n", model.display());
    std::fs::write(&plan, text).unwrap();
    let target = home.path().join("out");
    let out = retune(&["merge", plan.to_str().unwrap(), target.to_str().unwrap()], home.path());
    let message = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{message}");
    let way = format!("retune export --model {} --format hf", model.display());
    assert!(message.contains("found a GGUF file") && message.contains(&way), "{message}");
    assert!(!target.exists());
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

/// Writes a model of many matrices, so that merging two of them takes a while.
fn large(folder: &Path, value: impl Fn(usize) -> f32) {
    std::fs::create_dir(folder).unwrap();
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}"#;
    std::fs::write(folder.join("config.json"), config).unwrap();
    let values: Vec<f32> = (0..1 << 15).map(value).collect();
    let bytes = Dtype::F32.encode(&values).unwrap();
    let tensors: Vec<(TensorSpec, &[u8])> = (0..24)
        .map(|i| {
            (TensorSpec::new(format!("model.layers.{i}.w"), Dtype::F32, [64, 512]), &bytes[..])
        })
        .collect();
    write_safetensors(&folder.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
}

/// Two large models and a plan that changes every value.
fn plan(home: &Path) -> String {
    large(&home.join("one"), |i| (i as f32 * 0.37).sin());
    large(&home.join("two"), |i| (i as f32 * 0.11).cos());
    let plan = home.join("plan.yml");
    let (one, two) = (home.join("one"), home.join("two"));
    let text = format!(
        "merge_method: ties\nbase_model: {}\nmodels:\n- model: {}\n  parameters: {{weight: 1, \
         density: 0.5}}\n",
        one.display(),
        two.display()
    );
    std::fs::write(&plan, text).unwrap();
    plan.display().to_string()
}

#[test]
fn after_a_kill_the_same_command_goes_on() {
    let home = tempfile::tempdir().unwrap();
    let plan = plan(home.path());
    let whole = home.path().join("whole");
    let out = retune(&["merge", &plan, whole.to_str().unwrap()], home.path());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let expected = std::fs::read(whole.join("model.safetensors")).unwrap();
    // A machine may be so busy that the program is through before it is looked at.
    for attempt in 0..50 {
        let target = home.path().join(format!("out{attempt}"));
        let journal = home.path().join(format!(".out{attempt}.merging/journal"));
        let arguments = ["merge", &plan, target.to_str().unwrap(), "--threads", "1"];
        let mut child = Command::new(env!("CARGO_BIN_EXE_retune"))
            .args(arguments)
            .env("RETUNE_CACHE", home.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The first line is the identity of the work.
        let finished = || std::fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
        while finished() < 3 && child.try_wait().unwrap().is_none() {}
        child.kill().unwrap();
        child.wait().unwrap();
        if target.exists() {
            continue;
        }
        let again = retune(&[&arguments[..], &["--json"]].concat(), home.path());
        let shown: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
        assert!(shown["num_resumed"].as_u64().unwrap() >= 2, "{shown}");
        assert!(std::fs::read(target.join("model.safetensors")).unwrap() == expected);
        return;
    }
    unreachable!("fifty merges were through before they could be killed");
}

/// A limit on the size of files stands for a disk that is full; the shell lets the signal it comes
/// with pass, as a full disk sends none.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_that_looks_whole() {
    let home = tempfile::tempdir().unwrap();
    let plan = plan(home.path());
    let target = home.path().join("out");
    let script = "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\"";
    let out = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_retune"), "merge", &plan])
        .arg(&target)
        .env("RETUNE_CACHE", home.path())
        .output()
        .unwrap();
    let message = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{message}");
    assert!(message.contains("free some space") && message.contains("out"), "{message}");
    assert!(!target.exists());
    let again = retune(&["merge", &plan, target.to_str().unwrap()], home.path());
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
}
