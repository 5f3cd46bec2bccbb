//! `graft` and `crash` as a person meets them.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::path::Path;

use common::retune;
use common::said::{json, refused};
use serde_json::Value;

/// Writes rows and a recipe of the model inside the program.
fn recipe(folder: &Path, name: &str, model: &str, method: &str) -> String {
    let row = |i: usize| {
        let (word, kind) = [("whale", "animal"), ("harpoon", "object")][i % 2];
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{word} number {i}\"}}, \
             {{\"role\": \"assistant\", \"content\": \"{kind}\"}}]}}\n"
        )
    };
    std::fs::write(folder.join("rows.jsonl"), (0..16).map(row).collect::<String>()).unwrap();
    std::fs::write(folder.join("other.jsonl"), (16..24).map(row).collect::<String>()).unwrap();
    let file = format!("{name}.toml");
    let text = format!(
        "model = \"{model}\"\n[data]\ntrain = \"rows.jsonl\"\nvalidation_fraction = 0.25\n\
         {method}\n[train]\nsteps = 2\nbatch_size = 4\nlearning_rate = 3e-3\n[evaluate]\nbefore = false\n"
    );
    std::fs::write(folder.join(&file), text).unwrap();
    file
}

#[test]
fn a_graft_is_found_compared_added_and_used() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path();
    let full = recipe(folder, "full", "builtin:tiny", "[method.full]");
    assert!(retune(folder, &["run", &full]).status.success());
    let tuned = "runs/full-1/model";
    let find = ["graft", "find", &full, "--tuned", tuned, "--steps", "1", "--output"];
    let with = |more: &[&'static str]| [&find[..], more].concat();
    // Every mask has more entries than may stay, that of the start too.
    let few = ["one", "--sparsity", "0.01", "--budget", "500", "--ood", "other.jsonl"];
    let found = json(folder, &with(&few));
    let report = &found["report"];
    assert_eq!(report["num_grafted"], 500);
    let arms = report["arms"].as_array().unwrap();
    let counts: Vec<u64> = arms.iter().map(|a| a["num_entries"].as_u64().unwrap()).collect();
    assert_eq!(counts, [0, report["num_entries"].as_u64().unwrap(), 500, 500, 500]);
    assert_eq!(arms[1]["held_out"]["agreement"], 1.0);
    for arm in arms {
        for rows in ["held_out", "elsewhere"] {
            let error = arm[rows]["calibration_error"].as_f64().unwrap();
            assert!((0.0..=1.0).contains(&error));
        }
    }
    for file in ["adapter_config.json", "README.md", "graft.json", "graft.svg"] {
        assert!(folder.join("one").join(file).is_file(), "{file}");
    }
    let card = std::fs::read_to_string(folder.join("one/README.md")).unwrap();
    assert!(card.starts_with("---\n") && card.contains("base_model: builtin:tiny"), "{card}");
    // Nothing is left of the finished search.
    assert!(!folder.join(".one.grafting").exists());

    json(folder, &with(&["random", "--start", "random", "--sparsity", "0.01"]));
    let overlap = json(folder, &["graft", "overlap", "one", "random", "--svg", "overlap.svg"]);
    assert_eq!(overlap["overlaps"]["shares"][0][0], 1.0);
    assert!(folder.join("overlap.svg").is_file());
    let sum = json(folder, &["graft", "compose", "one", "random", "--output", "sum"]);
    let counts = &overlap["overlaps"]["counts"];
    let all = counts[0].as_u64().unwrap() + counts[1].as_u64().unwrap();
    assert_eq!(sum["entries"].as_u64().unwrap() + sum["in_several"].as_u64().unwrap(), all);
    // A graft is measured and merged like any adapter.
    json(folder, &["eval", &full, "--adapter", "sum"]);
    json(
        folder,
        &["merge-adapter", "--model", "builtin:tiny", "--adapter", "one", "--output", "merged"],
    );
    let differs = json(folder, &["diff", "--no-ranks", "cache/builtin/tiny-0.1.0", "merged"]);
    assert!(differs["total"]["norm"].as_f64().unwrap() > 0.0);

    refused(folder, &with(&["one"]), "exists already");
    refused(folder, &with(&["none", "--budget", "0"]), "at least 1 entry");
    let base = ["graft", "find", &full, "--tuned", "builtin:tiny", "--output", "none"];
    refused(folder, &base, "nothing to graft");
    refused(folder, &["graft", "overlap", "one", "merged"], "adapter_config.json");
    assert!(!folder.join("none").exists());
}

#[test]
fn a_model_is_tuned_through_an_emulator_that_does_not_hold_it() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path();
    let owner = recipe(folder, "owner", "builtin:tiny", "[method.lora]");
    let emulate = ["crash", "emulate", &owner, "--output"];
    let with = |more: &[&'static str]| [&emulate[..], more].concat();
    let made = json(folder, &with(&["stand-in", "--clusters", "3", "--trainable", "2"]));
    let kept: Vec<u64> = serde_json::from_value(made["choice"]["blocks"]["kept"].clone()).unwrap();
    assert_eq!(kept.len(), 3);
    assert!(made["choice"]["similarity"].as_array().unwrap().len() == 4);
    for file in ["config.json", "model.safetensors", "similarity.svg", "README.md", "crash.json"] {
        assert!(folder.join("stand-in").join(file).is_file(), "{file}");
    }
    holds_nothing_of_removed_blocks(folder, "stand-in", &kept);

    // The data's owner tunes the blocks that train, and nothing else.
    let trainable = made["emulator"]["trainable"].to_string();
    let lora = recipe(folder, "lora", "stand-in", &format!("[method.lora]\nlayers = {trainable}"));
    assert!(retune(folder, &["run", &lora]).status.success());
    let adapter = "runs/lora-1/adapter";
    let collect = ["crash", "collect", "stand-in", "--adapter", adapter, "--output", "blocks"];
    let collected = json(folder, &collect);
    assert_eq!(collected["moved"]["blocks"].as_array().unwrap().len(), 2);
    let plug = ["crash", "plug-in", "--model", "builtin:tiny", "--layers"];
    let plugged = json(folder, &[&plug[..], &["blocks", "--output", "tuned"]].concat());
    assert_eq!(plugged["moved"], collected["moved"]);
    for card in ["blocks/README.md", "tuned/README.md"] {
        let card = std::fs::read_to_string(folder.join(card)).unwrap();
        for part in ["base_model: builtin:tiny\n", "- lora\n", "- crash\n", "| data |"] {
            assert!(card.contains(part), "no {part:?} in\n{card}");
        }
    }
    for card in ["blocks/README.md", "tuned/README.md"] {
        let card = std::fs::read_to_string(folder.join(card)).unwrap();
        for part in ["base_model: builtin:tiny\n", "- lora\n", "- crash\n", "| data |"] {
            assert!(card.contains(part), "no {part:?} in\n{card}");
        }
    }
    let differs = json(folder, &["diff", "--no-ranks", "cache/builtin/tiny-0.1.0", "tuned"]);
    let trained: Vec<u64> =
        serde_json::from_value(made["choice"]["blocks"]["trainable"].clone()).unwrap();
    for layer in differs["layers"].as_array().unwrap() {
        let changed = layer["norm"].as_f64().unwrap() > 0.0;
        let is_trained = layer["layer"].as_u64().is_some_and(|layer| trained.contains(&layer));
        assert_eq!(changed, is_trained, "{layer}");
    }
    let line = json(
        folder,
        &[
            "crash",
            "interpolate",
            &owner,
            "--from",
            "builtin:tiny",
            "--to",
            "tuned",
            "--points",
            "2",
        ],
    );
    let points = line["points"].as_array().unwrap();
    let end = json(folder, &["eval", &owner, "--set", "model=\"tuned\""]);
    let loss = end["measurement"]["metrics"]["loss"]["value"].as_f64().unwrap();
    assert!((points[1]["loss"].as_f64().unwrap() - loss).abs() < 1e-5, "{line} {loss}");

    // Corners of a plane are the three models, and its first row is the line between two.
    let ends = ["--from", "builtin:tiny", "--to", "tuned", "--third", "builtin:tiny"];
    let walk = ["crash", "interpolate", &owner, "--points", "2", "--svg", "plane.svg"];
    let plane = json(folder, &[&walk[..], &ends[..]].concat());
    let loss = |third: usize, second: usize| plane["rows"][third][second]["loss"].as_f64();
    assert_eq!(loss(0, 0), points[0]["loss"].as_f64(), "{plane}");
    assert_eq!(loss(0, 1), points[1]["loss"].as_f64(), "{plane}");
    assert_eq!(loss(1, 0), loss(0, 0), "{plane}");
    assert_eq!(plane["rows"][1][1]["shares"], serde_json::json!([1.0, 1.0]));
    let drawn = std::fs::read_to_string(folder.join("plane.svg")).unwrap();
    assert!(drawn.contains("three models"));

    // A whole tune of the same blocks comes back too.
    let full = recipe(
        folder,
        "full",
        "stand-in",
        &format!(
            "[method.full]\ntargets = ['model\\.layers\\.({})\\..*']",
            trainable.trim_matches(['[', ']']).replace(',', "|")
        ),
    );
    assert!(retune(folder, &["run", &full]).status.success());
    json(folder, &["crash", "collect", "runs/full-1/model", "--output", "whole"]);
    json(folder, &[&plug[..], &["whole", "--output", "tuned-whole"]].concat());

    refused(folder, &with(&["stand-in", "--clusters", "3"]), "exists already");
    refused(folder, &with(&["no", "--clusters", "5", "--trainable", "2"]), "1 to 4");
    refused(folder, &with(&["no", "--clusters", "2", "--trainable", "3"]), "2 to 2");
    refused(folder, &with(&["no", "--train", "0,1", "--frozen", "1,2"]), "1 twice");
    refused(folder, &with(&["no", "--samples", "1"]), "at least 2 documents");
    // Blocks trained beside others are not taken back.
    let all = recipe(folder, "all", "stand-in", "[method.lora]");
    assert!(retune(folder, &["run", &all]).status.success());
    let wrong =
        ["crash", "collect", "stand-in", "--adapter", "runs/all-1/adapter", "--output", "no"];
    refused(folder, &wrong, "frozen weights were trained");
    // Nor put into a model they do not belong to.
    let other = ["crash", "plug-in", "--model", "tuned", "--layers", "blocks", "--output", "no"];
    refused(folder, &other, "belong to another model");
    let stand_in =
        ["crash", "plug-in", "--model", "stand-in", "--layers", "blocks", "--output", "no"];
    refused(folder, &stand_in, "belong to another model");
    refused(folder, &[&plug[..], &["stand-in", "--output", "no"]].concat(), "layers.safetensors");
    assert!(!folder.join("no").exists());
}

/// Looks for the bytes of every matrix of the removed blocks in every file of a folder.
fn holds_nothing_of_removed_blocks(folder: &Path, package: &str, kept: &[u64]) {
    let whole = std::fs::read(folder.join("cache/builtin/tiny-0.1.0/model.safetensors")).unwrap();
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let head: Value = serde_json::from_slice(&whole[8..8 + length]).unwrap();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder.join(package)).unwrap() {
        files.push(std::fs::read(entry.unwrap().path()).unwrap());
    }
    let mut looked_at = 0;
    for (name, tensor) in head.as_object().unwrap() {
        let Some(rest) = name.strip_prefix("model.layers.") else { continue };
        let layer: u64 = rest.split('.').next().unwrap().parse().unwrap();
        let at = |i: usize| 8 + length + tensor["data_offsets"][i].as_u64().unwrap() as usize;
        let bytes = &whole[at(0)..at(1)];
        // A part is enough: nobody finds 64 bytes of random weights by chance. Norms may be equal.
        let part = &bytes[..bytes.len().min(64)];
        if tensor["shape"].as_array().unwrap().len() < 2 {
            continue;
        }
        let is_there =
            files.iter().any(|file| file.windows(part.len()).any(|window| window == part));
        assert_eq!(is_there, kept.contains(&layer), "{name}");
        looked_at += 1;
    }
    assert!(looked_at >= 4 * 7, "{looked_at}");
}
