//! `compress` and `decompress` as a person meets them.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::path::Path;

use common::retune;
use common::said::{json, refused, text};

/// Reads a card and checks that it says all of `parts`.
fn card(folder: &Path, path: &str, parts: &[&str]) -> String {
    let card = std::fs::read_to_string(folder.join(path)).unwrap();
    assert!(card.starts_with("---\nlibrary_name: "), "{path}: {card}");
    for part in parts {
        assert!(card.contains(part), "{path}: no {part:?} in\n{card}");
    }
    card
}

/// What every card made of the trained adapter takes over from it.
const ORIGIN: [&str; 4] =
    ["base_model: builtin:tiny\n", "\n- lora\n", "\n- retune\n", "rows.jsonl`, 12 rows"];

/// Trains a small adapter of the model inside the program.
fn trained(folder: &Path) {
    let row = |i: usize| {
        let (word, kind) = [("whale", "animal"), ("harpoon", "object")][i % 2];
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{word} number {i}\"}}, \
             {{\"role\": \"assistant\", \"content\": \"{kind}\"}}]}}\n"
        )
    };
    std::fs::write(folder.join("rows.jsonl"), (0..16).map(row).collect::<String>()).unwrap();
    let recipe = "model = \"builtin:tiny\"\n[data]\ntrain = \"rows.jsonl\"\n\
                  validation_fraction = 0.25\n[method.lora]\nrank = 4\n[train]\nsteps = 8\n\
                  batch_size = 4\nlearning_rate = 5e-3\n[evaluate]\nkind = \"choice\"\n";
    std::fs::write(folder.join("small.toml"), recipe).unwrap();
    let out = retune(folder, &["run", "small.toml"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
}

#[test]
fn an_adapter_is_compressed_used_and_written_out_again() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path();
    trained(folder);
    let adapter = "runs/small-1/adapter";
    let found = json(
        folder,
        &[
            "compress",
            adapter,
            "--density",
            "0.2",
            "--search",
            "alpha",
            "--recipe",
            "small.toml",
            "--output",
            "small",
        ],
    );
    let trials = found["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 9);
    let least = trials
        .iter()
        .min_by(|a, b| a["loss"].as_f64().unwrap().total_cmp(&b["loss"].as_f64().unwrap()));
    assert_eq!(found["alpha"], least.unwrap()["alpha"]);
    // The recipe's seed tells what the factors were before training; with another seed they were
    // not, and the change from zero is taken.
    assert_eq!(found["start"], "seeded");
    let recipe = std::fs::read_to_string(folder.join("small.toml")).unwrap();
    std::fs::write(folder.join("other.toml"), format!("seed = 7\n{recipe}")).unwrap();
    let other = ["compress", adapter, "--density", "0.2", "--recipe", "other.toml"];
    let zero = json(folder, &[&other[..], &["--output", "zero.compeft"]].concat());
    assert_eq!(zero["start"], "zero");
    // Nothing dropped and the right size for most: nearly the trained adapter.
    let all = ["compress", adapter, "--density", "1", "--alpha", "1", "--recipe", "small.toml"];
    json(folder, &[&all[..], &["--output", "all.compeft"]].concat());
    let loss = |adapter: &str| {
        let eval = json(folder, &["eval", "small.toml", "--adapter", adapter]);
        eval["measurement"]["metrics"]["loss"]["value"].as_f64().unwrap()
    };
    let base = json(folder, &["eval", "small.toml"]);
    let base = base["measurement"]["metrics"]["loss"]["value"].as_f64().unwrap();
    let (trained_loss, signs, zero) = (loss(adapter), loss("all.compeft"), loss("zero.compeft"));
    assert!(trained_loss < base - 0.2, "{trained_loss}, base {base}");
    assert!(signs < base - 0.5 * (base - trained_loss), "{signs}, trained {trained_loss}");
    assert!(loss("small") < zero - 0.1, "{zero}: compressed with its random start");
    assert!(found["ratio"].as_f64().unwrap() > 8.0, "{found}");
    let bytes = std::fs::metadata(folder.join("small/adapter_model.compeft")).unwrap().len();
    assert_eq!(found["sizes"]["file_bytes"].as_u64(), Some(bytes));

    // Every output has its card: what was searched was measured, what was not is only told.
    let searched = card(folder, "small/README.md", &ORIGIN);
    assert!(searched.contains("model-index:") && searched.contains("- type: loss"), "{searched}");
    let told = card(folder, "zero.compeft.md", &ORIGIN);
    assert!(!told.contains("model-index:") && told.contains("as it was trained"), "{told}");
    std::fs::write(folder.join("mine.compeft.md"), "my notes").unwrap();
    let mine = ["compress", adapter, "--output", "mine.compeft", "--force"];
    refused(folder, &mine, "another text");
    assert!(!folder.join("mine.compeft").exists());

    // What the search measured is what the compressed adapter does.
    let eval = json(folder, &["eval", "small.toml", "--adapter", "small"]);
    let loss = eval["measurement"]["metrics"]["loss"]["value"].as_f64().unwrap();
    assert!((loss - least.unwrap()["loss"].as_f64().unwrap()).abs() < 1e-9, "{eval}");

    let model = ["--model", "builtin:tiny", "--adapter"];
    let out =
        retune(folder, &[&["generate", "--prompt", "whale"], &model[..], &["small"]].concat());
    assert!(out.status.success(), "{}", text(&out.stderr));
    json(folder, &[&["merge-adapter", "--output", "merged"], &model[..], &[adapter]].concat());
    json(folder, &["decompress", "small", "--output", "plain"]);
    card(folder, "plain/README.md", &ORIGIN);
    card(folder, "merged/README.md", &[&ORIGIN[..], &["- merged\n", "model-index:"]].concat());
    let again = json(folder, &["eval", "small.toml", "--adapter", "plain"]);
    assert_eq!(again["measurement"]["metrics"], eval["measurement"]["metrics"]);

    // A whole model, against its base, and used on it.
    let full = ["compress", "merged", "--density", "0.1", "--output", "change.compeft"];
    refused(folder, &full, "--base");
    let found = json(folder, &[&full[..], &["--base", "builtin:tiny"]].concat());
    assert!(found["sizes"]["num_entries"].as_u64().unwrap() > 1_000_000, "{found}");
    json(folder, &["eval", "small.toml", "--adapter", "change.compeft"]);
    card(folder, "change.compeft.md", &ORIGIN);
    refused(folder, &["eval", "small.toml", "--adapter", "missing.compeft"], "missing.compeft");
    let other = ["generate", "--model", "merged", "--prompt", "a", "--adapter", "change.compeft"];
    refused(folder, &other, "another base");

    // What differs between a model and its merged copy is what the adapter targets, at its rank.
    let cache = std::fs::read_dir(folder.join("cache/builtin")).unwrap().next().unwrap().unwrap();
    let base = cache.path().display().to_string();
    let found = json(folder, &["diff", &base, "merged", "--svg", "map.svg"]);
    let tensors = found["tensors"].as_array().unwrap();
    let changed: Vec<_> = tensors.iter().filter(|t| t["norm"].as_f64() > Some(0.0)).collect();
    assert_eq!((tensors.len(), changed.len()), (38, 28), "{found}");
    assert!(changed.iter().all(|t| t["rank_99"].as_u64().unwrap() <= 4), "{found}");
    assert!(std::fs::read_to_string(folder.join("map.svg")).unwrap().contains("q_proj"));
    let out = retune(folder, &["diff", adapter, "small"]);
    assert!(text(&out.stdout).contains("rank of 99 %"), "{}", text(&out.stderr));
    let out = retune(folder, &["diff", "merged", "merged"]);
    assert!(text(&out.stdout).contains("no tensor differs"), "{}", text(&out.stderr));
    refused(folder, &["diff", "merged", adapter], "same name");

    refused(folder, &["compress", adapter, "--output", "small"], "exists already");
    refused(folder, &["compress", "small", "--output", "x"], "compressed already");
    refused(folder, &["compress", adapter, "--density", "2", "--output", "x"], "at most 1");
    refused(folder, &["decompress", "change.compeft", "--output", "x"], "merge-adapter");
    let out = retune(folder, &["compress", adapter, "--search", "alpha", "--output", "x"]);
    assert_eq!(out.status.code(), Some(2), "a search needs a recipe");
}

#[test]
fn adapters_are_combined_and_extracted() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path();
    trained(folder);
    let adapter = "runs/small-1/adapter";
    let loss = |adapter: &str| {
        let eval = json(folder, &["eval", "small.toml", "--adapter", adapter]);
        eval["measurement"]["metrics"]["loss"]["value"].as_f64().unwrap()
    };
    let expected = loss(adapter);
    let close = |what: &str, found: f64| {
        assert!((found - expected).abs() < 1e-4, "{what}: loss {found}, expected {expected}");
    };

    // Halves of the same adapter make the whole one, side by side or factored again.
    let halves = ["combine", adapter, adapter, "--weights", "0.5,0.5", "--output"];
    json(folder, &[&halves[..], &["both"]].concat());
    close("cat", loss("both"));
    let svd = [&halves[..], &["svd", "--type", "svd", "--rank", "4"]].concat();
    let found = json(folder, &svd);
    assert!(found["kept"].as_f64().unwrap() > 0.999_999, "{found}");
    close("svd", loss("svd"));
    for (path, tag) in [("svd", "- lora\n"), ("both", "| `runs/small-1/adapter` | 0.5 |")] {
        card(folder, &format!("{path}/README.md"), &[&ORIGIN[..], &[tag]].concat());
    }
    // Twice it less once it.
    json(folder, &["combine", adapter, adapter, "--weights", "2,-1", "--output", "less"]);
    close("a negative weight", loss("less"));

    // The same on the weights themselves, with a compressed one among them that weighs nothing.
    json(folder, &["compress", adapter, "--density", "0.5", "--output", "small.compeft"]);
    let compose = ["combine", adapter, adapter, "small.compeft", "--weights", "0.25,0.75,0"];
    let composed = [&compose[..], &["--base", "builtin:tiny", "--output", "composed"]].concat();
    json(folder, &composed);
    // Forced, a model takes the place of a model, and of nothing else.
    refused(folder, &composed, "exists already");
    json(folder, &[&composed[..], &["--force"]].concat());
    refused(folder, &[&halves[..], &["runs", "--force"]].concat(), "other files");
    card(folder, "composed/README.md", &[&ORIGIN[..], &["task-arithmetic"]].concat());
    let model = ["--model", "builtin:tiny", "--adapter", adapter];
    json(folder, &[&["merge-adapter", "--output", "merged"], &model[..]].concat());
    let found = json(folder, &["diff", "merged", "composed", "--no-ranks"]);
    assert!(found["total"]["relative"].as_f64().unwrap() < 1e-7, "{}", found["total"]);

    // The adapter comes back out of the merged model.
    let extract = ["extract", "merged", "--base", "builtin:tiny", "--rank"];
    let found = json(folder, &[&extract[..], &["4", "--output", "lora"]].concat());
    assert!(found["kept"].as_f64().unwrap() > 0.999_999, "{found}");
    assert_eq!(found["layers"].as_array().unwrap().len(), 5, "{found}");
    assert_eq!(found["left_out"].as_array().unwrap().len(), 0);
    close("extracted", loss("lora"));
    card(folder, "lora/README.md", &["base_model: builtin:tiny\n", "\n- lora\n", "`merged`"]);
    let text = std::fs::read_to_string(folder.join("lora/adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&config["r"], config["target_modules"].as_array().unwrap().len()), (&4.into(), 7));
    let found = json(folder, &[&extract[..], &["1", "--output", "one"]].concat());
    let kept = found["kept"].as_f64().unwrap();
    assert!(kept > 0.1 && kept < 0.99, "{found}");

    let merged = folder.join("merged").display().to_string();
    let same = ["extract", &merged, "--base", &merged, "--rank", "2", "--output", "x"];
    refused(folder, &same, "nothing to extract");
    refused(folder, &[&halves[..], &["both"]].concat(), "exists already");
    refused(folder, &[&halves[..], &["x", "--type", "ties"]].concat(), "density");
    refused(folder, &[&halves[..], &["x", "--type", "tiez"]].concat(), "ties");
    let inside = format!("{adapter}/x");
    refused(folder, &[&halves[..], &[inside.as_str()]].concat(), "inside");
    refused(folder, &["combine", adapter, "--weights", "1,2", "--output", "x"], "expected one");
    refused(folder, &["combine", "composed", adapter, "--output", "x"], "adapter_config.json");
    assert!(!folder.join("x").exists());
}

#[test]
fn five_ways_to_ship_are_measured() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path();
    trained(folder);
    let adapter = "runs/small-1/adapter";
    let ship = ["ship", "small.toml", "--adapter", adapter];
    let found = json(folder, &ship);
    let ways = found["ways"].as_array().unwrap();
    let value = |way: &str, key: &str| {
        let way = ways.iter().find(|found| found["way"] == way).unwrap();
        way[key].as_f64().unwrap()
    };
    assert_eq!(ways.len(), 5, "{found}");
    assert_eq!(value("attached", "divergence"), 0.0);
    // The same in exact arithmetic; the others are not.
    assert!(value("dequantised-merged", "divergence").abs() < 1e-6, "{found}");
    for way in ["merged", "merged-quantised", "dequantised-merged-quantised"] {
        assert!(value(way, "divergence") > 1e-4, "{way}: {found}");
    }
    let eight = json(folder, &[&ship[..], &["--quantise", "q8_0"]].concat());
    let finer = eight["ways"][2]["divergence"].as_f64().unwrap();
    assert!(finer < value("merged-quantised", "divergence") / 5.0, "{eight}");

    // What is written is what was measured.
    json(folder, &[&ship[..], &["--way", "dequantised-merged", "--output", "out"]].concat());
    let eval = json(folder, &["eval", "small.toml", "--set", "model=out"]);
    let loss = eval["measurement"]["metrics"]["loss"]["value"].as_f64().unwrap();
    assert!((loss - value("attached", "loss")).abs() < 1e-4, "{loss}, {found}");
    // A quantised way is the export of what was merged, to the byte.
    std::fs::create_dir(folder.join("other")).unwrap();
    let eight = [&ship[..], &["--quantise", "q8_0", "--way", "merged-quantised"]].concat();
    json(folder, &[&eight[..], &["--output", "out.gguf"]].concat());
    let model = ["--model", "builtin:tiny", "--adapter", adapter, "--format", "gguf-q8_0"];
    json(folder, &[&["export", "--output", "other/out.gguf"], &model[..]].concat());
    let shipped = ["library_name: gguf", "- type: loss", "same likeliest answer", "| Q8_0 |"];
    card(folder, "out.gguf.md", &[&ORIGIN[..], &shipped].concat());
    card(folder, "out/README.md", &[&ORIGIN[..], &["dequantised-merged"]].concat());
    let exported = card(folder, "other/out.gguf.md", &[&ORIGIN[..], &["| Q8_0 |"]].concat());
    assert!(!exported.contains("model-index:"), "{exported}");
    let model =
        ["export", "--model", "builtin:tiny", "--adapter", adapter, "--output", "lora.gguf"];
    let lora = [&model[..], &["--format", "gguf-lora"]].concat();
    json(folder, &lora);
    card(folder, "lora.gguf.md", &[&ORIGIN[..], &["model-index:"]].concat());
    refused(folder, &lora, "exists already");
    json(folder, &[&lora[..], &["--force"]].concat());
    let bytes = |path: &str| std::fs::read(folder.join(path)).unwrap();
    assert!(bytes("out.gguf") == bytes("other/out.gguf"), "two exports of one model differ");
    // Of a base that is quantised already, what it was before is not known.
    let base = ["ship", "small.toml", "--set", "model=out.gguf", "--force", "--adapter", adapter];
    let found = json(folder, &base);
    assert_eq!(found["ways"].as_array().unwrap().len(), 3, "{found}");
    let merged = [&base[..], &["--way", "merged", "--output", "x"]].concat();
    refused(folder, &merged, "quantised already");
    refused(folder, &ship[..2], "--adapter");
}
