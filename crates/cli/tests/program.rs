//! The program as a person meets it: exit codes, messages, a run on the model inside the program.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::path::Path;
use std::process::Output;

use common::retune;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn text_of(out: &Output) -> String {
    text(&out.stderr)
}

/// Writes rows and a recipe for the built-in model.
fn recipe(folder: &Path, extra: &str) {
    let row = |i: usize| {
        let (word, kind) = [("whale", "animal"), ("harpoon", "object")][i % 2];
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{word} number {i}\"}}, \
             {{\"role\": \"assistant\", \"content\": \"{kind}\"}}]}}\n"
        )
    };
    let rows: String = (0..24).map(row).collect();
    std::fs::write(folder.join("rows.jsonl"), rows).unwrap();
    let text = format!(
        "model = \"builtin:tiny\"\n[data]\ntrain = \"rows.jsonl\"\nvalidation_fraction = 0.25\n\
         [method.lora]\nrank = 4\n[train]\nsteps = 6\nbatch_size = 2\nsave_every = 2\n\
         learning_rate = 1e-3\n{extra}\n[evaluate]\nkind = \"choice\"\nmax_new_tokens = 4\n"
    );
    std::fs::write(folder.join("small.toml"), text).unwrap();
}

#[test]
fn a_run_leaves_everything_it_promises() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "");
    let out = retune(folder.path(), &["run", "small.toml"]);
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    let shown = text(&out.stdout);
    assert!(shown.contains("acc_norm") && shown.contains("run folder"), "{shown}");
    let run = folder.path().join("runs/small-1");
    for file in [
        "recipe.toml",
        "plan.toml",
        "plan.json",
        "events.jsonl",
        "report.md",
        "report.json",
        "plots/loss.svg",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "checkpoints/step-00000006/state.json",
    ] {
        assert!(run.join(file).is_file(), "{file} is missing");
    }
    assert_eq!(std::fs::read_dir(run.join("tensorboard")).unwrap().count(), 1);

    // The adapter is used, merged and exported by the program itself.
    let adapter = run.join("adapter").display().to_string();
    let model = ["--model", "builtin:tiny", "--adapter", adapter.as_str()];
    let out = retune(
        folder.path(),
        &[&["generate"], &model[..], &["--prompt", "whale", "--max-new-tokens", "4"]].concat(),
    );
    assert!(out.status.success(), "{}", text(&out.stderr));
    let out =
        retune(folder.path(), &[&["merge-adapter"], &model[..], &["--output", "merged"]].concat());
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(folder.path().join("merged/model.safetensors").is_file());
    let out = retune(
        folder.path(),
        &[&["export"], &model[..], &["--format", "gguf-q8_0", "--output", "out.gguf"]].concat(),
    );
    assert!(out.status.success(), "{}", text(&out.stderr));
    let out = retune(
        folder.path(),
        &["generate", "--model", "out.gguf", "--prompt", "whale", "--max-new-tokens", "4"],
    );
    assert!(out.status.success(), "{}", text(&out.stderr));

    // The adapter is refused on another base, unless forced.
    let out = retune(
        folder.path(),
        &["generate", "--model", "merged", "--adapter", &adapter, "--prompt", "whale"],
    );
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("another base"), "{}", text(&out.stderr));
}

#[test]
fn a_recipe_with_mistakes_shows_them_all_and_exits_with_2() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "stepz = 3\nbatch_size = \"two\"");
    let out = retune(folder.path(), &["run", "small.toml"]);
    assert_eq!(out.status.code(), Some(2));
    let shown = text(&out.stderr);
    assert!(shown.contains("stepz") || shown.contains("batch_size"), "{shown}");

    recipe(folder.path(), "stepz = 3\nbeta1 = 7.0");
    let out = retune(folder.path(), &["run", "small.toml"]);
    let shown = text(&out.stderr);
    assert!(shown.contains("stepz") && shown.contains("steps"), "{shown}");
    assert!(shown.contains("beta1"), "{shown}");
    assert!(!folder.path().join("runs").exists(), "nothing was begun");
}

#[test]
fn a_choice_no_answer_could_win_is_refused_before_step_1() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "");
    let file = folder.path().join("small.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    for (choices, said) in
        [("[\"animals\", \"object\"]", "nearest: animals"), ("[\"animal\"]", "1 choices")]
    {
        std::fs::write(&file, format!("{text}choices = {choices}\n")).unwrap();
        let out = retune(folder.path(), &["run", "small.toml"]);
        assert_eq!(out.status.code(), Some(1));
        assert!(text_of(&out).contains(said), "{}", text_of(&out));
        assert!(!folder.path().join("runs").exists(), "nothing was begun");
    }
}

#[test]
fn rows_say_their_task_to_a_method_that_tells_tasks_apart() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "");
    let rows = std::fs::read_to_string(folder.path().join("rows.jsonl")).unwrap();
    let with_tasks = |count: usize, first: usize| {
        let row = |(i, row): (usize, &str)| {
            format!("{}, \"of\": {}}}\n", row.trim_end_matches('}'), (i + first) % count)
        };
        let rows: String = rows.lines().enumerate().map(row).collect();
        std::fs::write(folder.path().join("rows.jsonl"), rows).unwrap();
    };
    let file = folder.path().join("small.toml");
    let plain = std::fs::read_to_string(&file).unwrap();
    let named = plain.replace("[method.lora]", "task = \"of\"\n[method.lora]");
    let poly = named.replace("[method.lora]\nrank = 4", "[method.poly]\nrank = 2\ntasks = 2");

    with_tasks(2, 0);
    std::fs::write(&file, &named).unwrap();
    let out = retune(folder.path(), &["run", "small.toml"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text_of(&out).contains("data.task") && text_of(&out).contains("poly"), "{out:?}");
    std::fs::write(&file, &poly).unwrap();
    let out = retune(folder.path(), &["run", "small.toml"]);
    assert!(out.status.success(), "{}", text_of(&out));

    // The same texts in other tasks are another plan, which a checkpoint does not fit.
    let hash = || {
        let out = retune(folder.path(), &["--json", "plan", "small.toml"]);
        let plan: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        plan["hash"].as_str().unwrap().to_owned()
    };
    let planned = hash();
    with_tasks(2, 1);
    assert_ne!(hash(), planned);

    with_tasks(3, 0);
    let out = retune(folder.path(), &["run", "small.toml"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text_of(&out).contains("task"), "{}", text_of(&out));
    let silent = poly.replace("task = \"of\"\n", "");
    std::fs::write(&file, silent).unwrap();
    let out = retune(folder.path(), &["plan", "small.toml"]);
    assert!(text(&out.stdout).contains("all rows are of one"), "{}", text(&out.stdout));
}

#[test]
fn wrong_use_is_2_and_a_missing_model_says_what_was_tried() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(retune(folder.path(), &["runn"]).status.code(), Some(2));
    assert_eq!(retune(folder.path(), &["methods", "lorra"]).status.code(), Some(2));
    let out = retune(folder.path(), &["generate", "--model", "no/such/folder", "--prompt", "x"]);
    assert_eq!(out.status.code(), Some(1));
    let shown = text(&out.stderr);
    assert!(shown.contains("no/such/folder"), "{shown}");
}

#[test]
fn help_completions_man_page_and_a_new_recipe() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in
        [&["--help"][..], &["completions", "bash"], &["man"], &["methods"], &["models"]]
    {
        let out = retune(folder.path(), arguments);
        assert!(out.status.success() && !out.stdout.is_empty(), "{arguments:?}");
    }
    let out = retune(folder.path(), &["new", "mine.toml"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(retune(folder.path(), &["new", "mine.toml"]).status.code(), Some(2), "kept");
}

#[test]
fn a_kill_loses_at_most_the_steps_since_the_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "");
    let whole = retune(folder.path(), &["run", "small.toml"]);
    assert!(whole.status.success());
    let run = folder.path().join("runs/small-1");
    let adapter =
        |run: &Path| std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
    let expected = adapter(&run);
    // As a kill after step 5 leaves it: checkpoints of steps 2 and 4, no result.
    std::fs::remove_dir_all(run.join("checkpoints/step-00000006")).unwrap();
    std::fs::remove_dir_all(run.join("adapter")).unwrap();
    for file in ["report.md", "report.json"] {
        std::fs::remove_file(run.join(file)).unwrap();
    }
    let out = retune(folder.path(), &["resume", "runs/small-1"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(adapter(&run), expected);
    assert!(run.join("report.md").is_file());
}

/// Puts a word-level tokenizer beside the golden T5.
fn t5(folder: &Path) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/golden/families/t5");
    std::fs::create_dir(folder.join("t5")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(file), folder.join("t5").join(file)).unwrap();
    }
    let words = ["<pad>", "</s>", "<unk>", "whale", "harpoon", "ship", "animal", "object"];
    let vocabulary: serde_json::Map<String, serde_json::Value> =
        words.iter().enumerate().map(|(id, word)| ((*word).to_owned(), id.into())).collect();
    let special = |id: usize| {
        serde_json::json!({"id": id, "content": words[id], "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0), special(1), special(2)],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    });
    let config = serde_json::json!({"eos_token": "</s>", "pad_token": "<pad>"});
    std::fs::write(folder.join("t5/tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("t5/tokenizer_config.json"), config.to_string()).unwrap();
}

#[test]
fn an_encoder_decoder_learns_and_answers() {
    let folder = tempfile::tempdir().unwrap();
    t5(folder.path());
    let row = |i: usize| {
        let (prompt, completion) =
            [("whale", "animal"), ("harpoon", "object"), ("ship ship", "object")][i % 3];
        format!("{{\"prompt\": \"{prompt}\", \"completion\": \"{completion}\"}}\n")
    };
    let rows: String = (0..24).map(row).collect();
    std::fs::write(folder.path().join("rows.jsonl"), rows).unwrap();
    let recipe = "model = \"t5\"\n[data]\ntrain = \"rows.jsonl\"\ntest = \"rows.jsonl\"\nvalidation_fraction = 0.0\n[method.lora]\nrank = 8\n\
                [train]\nsteps = 60\nbatch_size = 6\nlearning_rate = 2e-2\n\
                [evaluate]\nkind = \"generate\"\nmax_new_tokens = 3\n";
    std::fs::write(folder.path().join("t5.toml"), recipe).unwrap();
    let out = retune(folder.path(), &["run", "t5.toml"]);
    assert!(out.status.success(), "{}", text_of(&out));
    let report = std::fs::read_to_string(folder.path().join("runs/t5-1/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let metrics = report["metrics"].as_array().unwrap();
    let exact = metrics.iter().find(|metric| metric["name"] == "exact_match").unwrap();
    assert_eq!(exact["after"]["value"], 1.0, "{report}");

    let adapter = folder.path().join("runs/t5-1/adapter").display().to_string();
    let out = retune(
        folder.path(),
        &["generate", "--model", "t5", "--adapter", &adapter, "--prompt", "whale"],
    );
    assert!(out.status.success(), "{}", text_of(&out));
    assert_eq!(text(&out.stdout).trim(), "animal");
}

#[test]
fn the_fewest_directions_that_do_are_searched() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "");
    let search = |extra: &[&str]| {
        let common = ["intrinsic-dimension", "small.toml", "--rates", "0.05", "--from", "40"];
        retune(folder.path(), &[&common, extra].concat())
    };
    let out = search(&["--share", "0.01", "--to", "100"]);
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    let found = folder.path().join("runs/small-intrinsic-dimension");
    let report = std::fs::read_to_string(found.join("report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let tried = |place: usize| &report["trials"][place];
    assert_eq!(tried(0)["trained"], "full");
    assert_eq!(tried(1)["trained"]["dimension"], 40);
    assert_eq!(tried(1)["num_trained"], 40);
    assert!(report["full"].as_f64().unwrap() > 0.0, "{report}");
    let page = std::fs::read_to_string(found.join("report.md")).unwrap();
    assert!(page.contains("| full |") && page.contains("| 40 | 0.05 |"), "{page}");
    let picture = std::fs::read_to_string(found.join("intrinsic-dimension.svg")).unwrap();
    assert!(picture.contains(">full tuning<"));
    assert!(text(&out.stdout).contains("share of full"), "{}", text(&out.stdout));

    // What is finished is kept.
    let kept = found.join("said-d40-rate0.05-seed42-1/report.json");
    let before = std::fs::metadata(&kept).unwrap().modified().unwrap();
    assert!(search(&["--share", "0.01", "--to", "100"]).status.success());
    assert_eq!(std::fs::metadata(&kept).unwrap().modified().unwrap(), before);

    let wrong = search(&["--share", "2"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(text(&wrong.stderr).contains("--share"), "{}", text(&wrong.stderr));
    let by_loss = search(&["--metric", "loss"]);
    assert!(text(&by_loss.stderr).contains("less of it is better"), "{}", text(&by_loss.stderr));
}

#[test]
fn methods_are_compared_and_one_that_fails_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    recipe(folder.path(), "");
    let path = folder.path().join("small.toml");
    let written = std::fs::read_to_string(&path).unwrap();
    let broken = "[method.full]\ntargets = [\"no_such_module\"]\n";
    std::fs::write(&path, written.replace("[train]", &format!("{broken}[train]"))).unwrap();
    let compare = || {
        retune(
            folder.path(),
            &[
                "compare",
                "small.toml",
                "--methods",
                "full,lora",
                "--seeds",
                "2",
                "--metric",
                "loss",
            ],
        )
    };
    let out = compare();
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    let shown = text(&out.stdout);
    assert!(shown.contains("failed") && shown.contains("lora"), "{shown}");
    let compared = folder.path().join("runs/small-compare");
    let report = std::fs::read_to_string(compared.join("report.md")).unwrap();
    assert!(report.contains("no_such_module") && report.contains("| lora |"), "{report}");
    let read = || -> serde_json::Value {
        let text = std::fs::read_to_string(compared.join("report.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let first = read();
    assert_eq!(first["rows"][0]["method"], "lora");
    assert_eq!(first["rows"][0]["num_finished"], 2);
    assert!(first["rows"][0]["peak_bytes"].as_u64().unwrap() > 1 << 20);
    assert!(std::fs::read_to_string(compared.join("compare.svg")).unwrap().contains(">lora<"));

    // One run is cut after its checkpoints; called again, it goes on and the other is kept.
    let cut = compared.join("lora-seed43-1");
    std::fs::remove_file(cut.join("report.json")).unwrap();
    let kept = compared.join("lora-seed42-1/report.json");
    let before = std::fs::metadata(&kept).unwrap().modified().unwrap();
    let again = compare();
    assert!(text(&again.stderr).contains("goes on with"), "{}", text(&again.stderr));
    assert_eq!(std::fs::metadata(&kept).unwrap().modified().unwrap(), before);
    assert!(!compared.join("lora-seed43-2").exists() && cut.join("report.json").exists());
    assert_eq!(read()["rows"][0]["mean"], first["rows"][0]["mean"]);

    let wrong = retune(folder.path(), &["compare", "small.toml", "--methods", "lorra"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(text(&wrong.stderr).contains("lora"), "{}", text(&wrong.stderr));
}
