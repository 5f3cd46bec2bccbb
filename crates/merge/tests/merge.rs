//! Whole merges: what is refused, what is resumed, what lies in the folder.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests do")]

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use retune_files::Dtype;
use retune_files::safetensors::{TensorSpec, write_safetensors};
use retune_merge::plan::Plan;
use retune_merge::source::Source;
use retune_merge::writer::Existing;
use retune_merge::{Error, Merged, Options, Result, merge};
use serde_json::{Value, json};

fn pack() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/mergekit")
}

/// Names are folders of `models`, or of the golden pack.
fn run_in(
    models: &Path,
    file: &str,
    text: &str,
    target: &Path,
    options: Options,
) -> Result<Merged> {
    let (plan, _) = Plan::parse(file, text.as_bytes())?;
    let locate = &mut |name: &str| {
        let own = models.join(name);
        Ok(if own.exists() { own } else { pack().join(name) })
    };
    merge(&plan, target, options, locate, &|_| ControlFlow::Continue(()))
}

fn run(text: &str, target: &Path) -> Result<Merged> {
    let models = target.parent().unwrap_or(Path::new("."));
    run_in(models, "plan.yml", text, target, Options::default())
}

fn mistakes(text: &str) -> String {
    Plan::parse("plan.yml", text.as_bytes()).unwrap_err().to_string()
}

fn golden(name: &str) -> String {
    fs::read_to_string(pack().join(format!("{name}.yml"))).unwrap()
}

fn all(folder: &Path) -> BTreeMap<String, Vec<f32>> {
    let source = Source::open(folder).unwrap();
    source.specs().map(|spec| (spec.name.clone(), source.read_f32(&spec.name).unwrap())).collect()
}

type Tensors<'a> = [(&'a str, &'a [usize], Vec<f32>)];

/// Writes a model folder, or an adapter's weights.
fn write(folder: &Path, file: &str, config: &Value, dtype: Dtype, tensors: &Tensors<'_>) {
    fs::create_dir_all(folder).unwrap();
    let config_file =
        if file.starts_with("adapter") { "adapter_config.json" } else { "config.json" };
    fs::write(folder.join(config_file), config.to_string()).unwrap();
    let tensors: Vec<(TensorSpec, Vec<u8>)> = tensors
        .iter()
        .map(|(name, shape, values)| {
            (TensorSpec::new(*name, dtype, *shape), dtype.encode(values).unwrap())
        })
        .collect();
    write_safetensors(&folder.join(file), &tensors, &BTreeMap::new()).unwrap();
}

fn llama() -> Value {
    json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1})
}

const ONE: &str = "model.safetensors";

#[test]
fn all_mistakes_are_told_at_once() {
    let text = mistakes(
        "merge_method: breadcrumbs\nmodels:\n- model: ./a\n  parameters:\n    wieght: 1\n    \
         density: 1.5\n    gamma: [0.1, x]\n- model: ./a+b+c\n- model: ./a\nparameters:\n  lambda:\n  \
         - filter: mlp\n    valeu: 1\n  normalize: 2\ntokenizer_source: base\ntokenizer: {source: union}\n\
         compat: peft\nparameterz: 1\n",
    );
    for part in [
        "plan.yml:5:5",
        "unknown key `wieght`",
        "did you mean `weight`?",
        "density` must be from 0 to 1",
        "gamma` must be a number",
        "`./a+b+c` names no model",
        "unknown key `valeu`",
        "did you mean `value`?",
        "normalize` must be true or false",
        "say the same",
        "`peft` is not known",
        "unknown key `parameterz`",
        "needs `base_model`",
    ] {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
}

#[test]
fn the_form_of_a_plan_is_checked() {
    for (text, part) in [
        ("merge_method: linear\n", "lists no models"),
        ("models:\n- model: a\n", "needs the key `merge_method`"),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}, {model: c}]\n",
            "takes 1 model besides the base, found 2",
        ),
        ("merge_method: model_stock\nbase_model: a\nmodels: [{model: b}]\n", "at least 2 models"),
        ("merge_method: linear\nmodels: [{model: a}, {model: a}]\n", "listed twice"),
        ("merge_method: passthrough\nslices: [{sources: [{model: a}]}]\n", "needs `layer_range`"),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 1]}]}]\n",
            "no range of layers",
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 2]}]}]\n",
            "[1, 2] layers",
        ),
        (
            "merge_method: linear\nmodules: {default: {models: [{model: a}], slices: []}}\n",
            "cannot stand together",
        ),
        ("merge_method: [linear]\nmodels: [{model: a}]\n", "must be a string"),
    ] {
        let message = mistakes(text);
        assert!(message.contains(part), "{text:?} gives:\n{message}");
    }
    let text = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n\
                parameters: {t: 1e-1, density: 0.5, int8_mask: true}\n";
    let (_, warnings) = Plan::parse("plan.yml", text.as_bytes()).unwrap();
    let warnings = warnings.to_string();
    assert!(warnings.contains("`density` has no effect in `slerp`"), "{warnings}");
}

#[test]
fn models_that_do_not_fit_are_all_named() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("out");
    let layer = "model.layers.0.mlp.up_proj.weight";
    let embedding = "model.embed_tokens.weight";
    let model = |name: &str, config: &Value, tensors: &Tensors<'_>| {
        write(&home.path().join(name), ONE, config, Dtype::F32, tensors);
    };
    model("one", &llama(), &[(layer, &[2, 2], vec![0.0; 4]), (embedding, &[3, 2], vec![0.0; 6])]);
    model("wide", &llama(), &[(layer, &[2, 3], vec![0.0; 6]), (embedding, &[3, 2], vec![0.0; 6])]);
    model("words", &llama(), &[(layer, &[2, 2], vec![0.0; 4]), (embedding, &[4, 2], vec![0.0; 8])]);
    model("less", &llama(), &[(layer, &[2, 2], vec![0.0; 4])]);
    let gpt2 = json!({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]});
    model("other", &gpt2, &[(layer, &[2, 2], vec![0.0; 4]), (embedding, &[3, 2], vec![0.0; 6])]);
    let quantized = json!({"model_type": "llama", "quantization_config": {"quant_method": "x"}});
    model("packed", &quantized, &[(layer, &[2, 2], vec![0.0; 4])]);
    let with = |other: &str, weights: [f64; 2]| {
        let text = format!(
            "merge_method: linear\nmodels:\n- {{model: one, parameters: {{weight: {}}}}}\n\
             - {{model: {other}, parameters: {{weight: {}}}}}\n",
            weights[0], weights[1]
        );
        run(&text, &target).unwrap_err().to_string()
    };
    for (other, weights, parts) in [
        ("wide", [1.0, 1.0], vec![layer, "[2, 2] in one, [2, 3] in wide"]),
        (
            "words",
            [1.0, 1.0],
            vec![embedding, "[3, 2] in one, [4, 2] in words", "tokenizer: {source: base}"],
        ),
        ("less", [1.0, 1.0], vec!["is in one, not in less"]),
        ("other", [1.0, 1.0], vec!["LlamaForCausalLM", "GPT2LMHeadModel"]),
        ("packed", [1.0, 1.0], vec!["quantised"]),
        ("nowhere", [1.0, 1.0], vec!["nowhere", "check the path"]),
        ("words", [1.0, -1.0], vec!["do not fit"]),
    ] {
        let message = with(other, weights);
        for part in parts {
            assert!(message.contains(part), "{other}: no {part:?} in:\n{message}");
        }
    }
    let message = run(
        "merge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}, {model: ./a}]\n",
        &target,
    )
    .unwrap_err();
    assert!(matches!(message, Error::Misfit { .. }), "{message}");
    assert!(!target.exists());
    assert!(!home.path().join(".out.merging").exists(), "nothing is begun that cannot be done");
}

#[test]
fn weights_must_be_there_and_not_cancel_out() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("out");
    let error = |text: &str| run(text, &target).unwrap_err().to_string();
    let text = "merge_method: linear\nmodels: [{model: ./a}, {model: ./b}]\nparameters: {weight: WEIGHT}\n";
    let message = error(&text.replace("WEIGHT", "0"));
    assert!(message.contains("sum to zero"), "{message}");
    let message = error(&text.replace("WEIGHT", "[{filter: mlp, value: 1}]"));
    assert!(message.contains("needs the parameter `weight` of ./a"), "{message}");
    assert!(message.lines().count() < 12, "a line per tensor helps nobody:\n{message}");
    let message = error(
        "merge_method: della\nbase_model: ./base\nmodels: [{model: ./a, parameters: {weight: 1, density: 0.9}}]\n",
    );
    assert!(message.contains("density 0.9 ± epsilon 0.15"), "{message}");
    let message = error(
        "merge_method: passthrough\nslices: [{sources: [{model: ./a, layer_range: [1, 3]}]}]\n",
    );
    assert!(message.contains("it has 2 layers"), "{message}");
    let message = error(
        "merge_method: ties\nbase_model: ./base\nslices: [{sources: [{model: ./a, layer_range: [0, 2], parameters: {weight: 1}}]}]\n",
    );
    assert!(message.contains("list the base among its sources"), "{message}");
}

#[test]
fn a_model_is_never_written_into_another() {
    let home = tempfile::tempdir().unwrap();
    let layer = [("model.layers.0.w", &[1][..], vec![1.0])];
    write(&home.path().join("models/one"), ONE, &llama(), Dtype::F32, &layer);
    let text = "merge_method: passthrough\nmodels: [{model: models/one}]\n";
    for target in ["models/one/out", "models/one", "models", "models/one/../one/out"] {
        let options = Options { existing: Existing::Replace, ..Options::default() };
        let target = home.path().join(target);
        let error = run_in(home.path(), "plan.yml", text, &target, options).unwrap_err();
        assert!(error.to_string().contains("in or around the model"), "{error}");
    }
    assert_eq!(all(&home.path().join("models/one")).len(), 1);
}

#[test]
fn a_missing_shard_is_named() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("out");
    let options = Options { max_shard_bytes: 20_000, ..Options::default() };
    let text = golden("linear");
    run_in(home.path(), "plan.yml", &text, &target, options).unwrap();
    let shards: Vec<_> = fs::read_dir(&target)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("model-0"))
        .collect();
    assert!(shards.len() > 2, "{shards:?}");
    run("merge_method: passthrough\nmodels: [{model: out}]\n", &home.path().join("copy")).unwrap();
    assert_eq!(all(&home.path().join("copy")), all(&target));
    fs::remove_file(target.join(&shards[1])).unwrap();
    let error = run("merge_method: passthrough\nmodels: [{model: out}]\n", &home.path().join("no"));
    let message = error.unwrap_err().to_string();
    assert!(message.contains(&shards[1]) && message.contains("download"), "{message}");
}

#[test]
fn an_interrupted_merge_goes_on_and_ends_with_the_same_bytes() {
    let home = tempfile::tempdir().unwrap();
    let text = golden("ties").replace("merge_method: ties", "merge_method: dare_ties");
    let whole = home.path().join("whole");
    run(&text, &whole).unwrap();
    let target = home.path().join("out");
    let (plan, _) = Plan::parse("plan.yml", text.as_bytes()).unwrap();
    let locate = &mut |name: &str| Ok(pack().join(name));
    let count = AtomicUsize::new(0);
    let stop = |_| match count.fetch_add(1, Ordering::Relaxed) {
        0..6 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    };
    let error = merge(&plan, &target, Options::default(), locate, &stop).unwrap_err();
    assert!(matches!(error, Error::Interrupted { done: 7..21, total: 21, .. }), "{error}");
    assert!(error.to_string().contains("repeat the command"), "{error}");
    assert!(!target.exists());
    // Another plan must not take this work for its own.
    let other = run(&text.replace("0.4", "0.5"), &home.path().join("other")).unwrap();
    assert_eq!(other.num_resumed, 0);
    let merged =
        merge(&plan, &target, Options::default(), locate, &|_| ControlFlow::Continue(())).unwrap();
    assert!((7..21).contains(&merged.num_resumed), "{merged:?}");
    for file in [ONE, "config.json"] {
        assert_eq!(fs::read(target.join(file)).unwrap(), fs::read(whole.join(file)).unwrap());
    }
    assert!(!home.path().join(".out.merging").exists());
}

#[test]
fn threads_do_not_change_a_bit() {
    let home = tempfile::tempdir().unwrap();
    for method in ["dare_ties", "della", "breadcrumbs", "task_arithmetic"] {
        let text = golden("ties").replace("merge_method: ties", &format!("merge_method: {method}"));
        let text = text.replace("density: 0.4", "density: 0.6");
        let bytes = [1, 2, 3].map(|threads| {
            let target = home.path().join(format!("{method}-{threads}"));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(&text, &target)).unwrap();
            fs::read(target.join(ONE)).unwrap()
        });
        assert!(bytes[0] == bytes[1] && bytes[0] == bytes[2], "{method}");
    }
}

#[test]
fn a_recipe_says_the_same_in_toml() {
    let home = tempfile::tempdir().unwrap();
    let text = "[merge]\nmerge_method = \"slerp\"\nbase_model = \"./a\"\n\n\
                [[merge.slices]]\nsources = [{ model = \"./a\", layer_range = [0, 2] }, \
                { model = \"./b\", layer_range = [0, 2] }]\n\n[merge.parameters]\n\
                t = [{ filter = \"self_attn\", value = [0, 1] }, { filter = \"mlp\", value = [1, 0] }, \
                { value = 0.5 }]\n";
    let (toml, yaml) = (home.path().join("toml"), home.path().join("yaml"));
    run_in(home.path(), "merge.toml", text, &toml, Options::default()).unwrap();
    run(&golden("slerp_gradient"), &yaml).unwrap();
    assert_eq!(fs::read(toml.join(ONE)).unwrap(), fs::read(yaml.join(ONE)).unwrap());
    let error = Plan::parse("merge.toml", b"model = \"x\"\n").unwrap_err();
    assert!(error.to_string().contains("no table `[merge]`"), "{error}");
}

#[test]
fn copies_are_exact_and_types_as_asked() {
    let home = tempfile::tempdir().unwrap();
    let values = vec![1.5, f32::NEG_INFINITY, -0.0, f32::NAN];
    let tensors: &Tensors<'_> = &[("model.layers.0.w", &[4], values)];
    write(&home.path().join("odd"), ONE, &llama(), Dtype::BF16, tensors);
    let copy = home.path().join("copy");
    run("merge_method: passthrough\nmodels: [{model: odd}]\n", &copy).unwrap();
    let bytes = |folder: &Path| {
        Source::open(folder).unwrap().tensor("model.layers.0.w").unwrap().bytes.to_vec()
    };
    assert_eq!(bytes(&copy), bytes(&home.path().join("odd")));

    let text = golden("linear");
    for (name, keys, dtype) in [
        ("bf16", "dtype: bfloat16\n", Dtype::BF16),
        ("f16", "dtype: float32\nout_dtype: float16\n", Dtype::F16),
    ] {
        let target = home.path().join(name);
        run(&format!("{text}{keys}"), &target).unwrap();
        let source = Source::open(&target).unwrap();
        assert!(source.specs().all(|spec| spec.dtype == dtype), "{name}");
        let config = source.config().unwrap().unwrap();
        let long = if dtype == Dtype::BF16 { "bfloat16" } else { "float16" };
        assert_eq!(config["dtype"], long);
    }
}

#[test]
fn an_adapter_is_added_to_its_base() {
    let home = tempfile::tempdir().unwrap();
    let (q, e, n) = ("model.layers.0.q.weight", "model.embed_tokens.weight", "model.norm.weight");
    let tensors: &Tensors<'_> = &[
        (q, &[2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        (e, &[3, 2], vec![0.0; 6]),
        (n, &[2], vec![1.0, 1.0]),
    ];
    write(&home.path().join("base"), ONE, &llama(), Dtype::F32, tensors);
    // B·A = [[1], [2]]·[[1, 0, -1]], scaled by 4/1; the embedding takes (B·A)ᵀ.
    let adapter: &Tensors<'_> = &[
        ("base_model.model.model.layers.0.q.lora_A.weight", &[1, 3], vec![1.0, 0.0, -1.0]),
        ("base_model.model.model.layers.0.q.lora_B.weight", &[2, 1], vec![1.0, 2.0]),
        ("base_model.model.model.embed_tokens.lora_embedding_A", &[1, 3], vec![1.0, 2.0, 3.0]),
        ("base_model.model.model.embed_tokens.lora_embedding_B", &[2, 1], vec![1.0, -1.0]),
        ("base_model.model.model.norm.weight", &[2], vec![7.0, 8.0]),
    ];
    let config =
        json!({"peft_type": "LORA", "r": 1, "lora_alpha": 4, "alpha_pattern": {"embed_tokens": 2}});
    write(&home.path().join("tuned"), "adapter_model.safetensors", &config, Dtype::F32, adapter);
    let target = home.path().join("out");
    run("merge_method: passthrough\nmodels: [{model: base+tuned}]\n", &target).unwrap();
    let found = all(&target);
    assert_eq!(found[q], [5.0, 2.0, -1.0, 12.0, 5.0, -2.0]);
    assert_eq!(found[e], [2.0, -2.0, 4.0, -4.0, 6.0, -6.0]);
    assert_eq!(found[n], [7.0, 8.0]);

    let config = json!({"peft_type": "LORA", "lora_alpha": 4, "use_dora": true});
    write(&home.path().join("dora"), "adapter_model.safetensors", &config, Dtype::F32, adapter);
    let error =
        run("merge_method: passthrough\nmodels: [{model: base+dora}]\n", &home.path().join("x"));
    assert!(error.unwrap_err().to_string().contains("DoRA"));
    write(&home.path().join("small"), ONE, &llama(), Dtype::F32, &tensors[1..]);
    let error =
        run("merge_method: passthrough\nmodels: [{model: small+tuned}]\n", &home.path().join("x"));
    assert!(error.unwrap_err().to_string().contains("changes 'model.layers.0.q.weight'"));
}

fn tokenizer(folder: &Path, words: &[&str], added: &[&str]) {
    let vocabulary: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(i, word)| ((*word).to_owned(), i.into())).collect();
    let added: Vec<Value> = added
        .iter()
        .enumerate()
        .map(|(i, text)| json!({"id": words.len() + i, "content": text, "special": true}))
        .collect();
    let json = json!({"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": added});
    fs::write(folder.join("tokenizer.json"), json.to_string()).unwrap();
}

#[test]
fn vocabularies_are_brought_together() {
    let home = tempfile::tempdir().unwrap();
    let e = "model.embed_tokens.weight";
    let model = |name: &str, rows: &[f32], words: &[&str], added: &[&str]| {
        let tensors: &Tensors<'_> = &[(e, &[rows.len(), 1], rows.to_vec())];
        write(&home.path().join(name), ONE, &llama(), Dtype::F32, tensors);
        tokenizer(&home.path().join(name), words, added);
    };
    model("one", &[1.0, 2.0, 3.0], &["a", "b"], &["<s>"]);
    model("two", &[10.0, 20.0, 30.0, 40.0], &["b", "c", "a"], &["<x>"]);
    model("three", &[100.0, 200.0], &["c", "d"], &[]);
    let merge = |extra: &str, name: &str| {
        let text = format!(
            "merge_method: linear\nmodels: [{{model: one}}, {{model: two}}, {{model: three}}]\n\
             parameters: {{weight: 1}}\n{extra}\n"
        );
        let target = home.path().join(name);
        run(&text, &target).map(|_| (all(&target)[e].clone(), target))
    };
    // a: 1 and 30, the third takes the mean of both; b likewise; <s> is the first model's alone.
    // c: 20 and 100, mean 60; <x> and d have one holder.
    let (rows, target) = merge("tokenizer_source: union", "union").unwrap();
    assert_eq!(rows, [15.5, 6.0, 3.0, 60.0, 40.0, 200.0]);
    let json: Value =
        serde_json::from_slice(&fs::read(target.join("tokenizer.json")).unwrap()).unwrap();
    let added: Vec<_> = json["added_tokens"].as_array().unwrap().iter().collect();
    let ids: Vec<_> = added.iter().map(|token| (&token["content"], &token["id"])).collect();
    assert_eq!(json!(ids), json!([["<s>", 2], ["c", 3], ["<x>", 4], ["d", 5]]));
    assert_eq!(added[2]["special"], true, "as its own tokenizer has it");
    let config = Source::open(&target).unwrap().config().unwrap().unwrap();
    assert_eq!(config["vocab_size"], 6);

    let (rows, _) = merge("tokenizer: {source: two}", "two-words").unwrap();
    assert_eq!(rows, [6.0, 60.0, 15.5, 40.0]);
    // With a base, its embeddings stand in: b of model one is 2, so (2 + 10 + 2) / 3.
    let (rows, _) = merge("tokenizer: {source: base}\nbase_model: one", "base").unwrap();
    for (x, y) in rows.iter().zip([32.0 / 3.0, 14.0 / 3.0, 3.0]) {
        assert!((x - y).abs() < 1e-6, "{rows:?}");
    }
    let (rows, _) = merge("tokenizer: {source: base, pad_to_multiple_of: 4}", "padded").unwrap();
    assert_eq!(rows.len(), 4);
    assert!((rows[3] - rows[..3].iter().sum::<f32>() / 3.0).abs() < 1e-5, "{rows:?}");
    let tokens = "tokenizer:\n  source: base\n  tokens:\n    b: {source: {kind: zero}, force: true}\n    \
                  <s>: {source: {kind: model_token, model: two, token: c}, force: true}\n    \
                  new: {source: {kind: model_token, model: three, token_id: 1}}";
    let (rows, _) = merge(tokens, "tokens").unwrap();
    assert_eq!(rows, [15.5, 0.0, 20.0, 200.0]);
    let error =
        merge("tokenizer:\n  source: base\n  tokens: {b: {source: three, force: true}}", "x");
    assert!(error.unwrap_err().to_string().contains("token `b` from three"));
}

#[test]
fn the_folder_has_what_goes_with_a_model() {
    let home = tempfile::tempdir().unwrap();
    for name in ["one", "two"] {
        let folder = home.path().join(name);
        write(&folder, ONE, &llama(), Dtype::F32, &[("model.layers.0.w", &[1], vec![1.0])]);
        tokenizer(&folder, &["a"], &[]);
        fs::write(folder.join("generation_config.json"), "{}").unwrap();
        fs::write(folder.join("chat_template.jinja"), "{{ messages }}").unwrap();
        fs::write(folder.join("README.md"), "---\nlicense: apache-2.0\n---\n# x\n").unwrap();
        let config = json!({"chat_template": "old", "x": 1}).to_string();
        fs::write(folder.join("tokenizer_config.json"), config).unwrap();
    }
    let text = "merge_method: linear\nmodels: [{model: one}, {model: two}]\n\
                parameters: {weight: 1}\nchat_template: auto # ```\n";
    let target = home.path().join("My Merge");
    run(text, &target).unwrap();
    let read = |name: &str| fs::read_to_string(target.join(name)).unwrap();
    assert_eq!(read("chat_template.jinja"), "{{ messages }}");
    assert_eq!(
        serde_json::from_str::<Value>(&read("tokenizer_config.json")).unwrap(),
        json!({"x": 1})
    );
    assert_eq!(read("generation_config.json"), "{}");
    let card = read("README.md");
    assert!(
        card.starts_with("---\nlibrary_name: transformers\nlicense: apache-2.0\ntags:\n- merge\n"),
        "{card}"
    );
    for part in [
        "# My Merge",
        "[Linear](https://arxiv.org/abs/2203.05482)",
        "| `one` |",
        "````yaml\nmerge_method: linear",
    ] {
        assert!(card.contains(part), "no {part:?} in:\n{card}");
    }
    let error = run(&text.replace("auto # ```", "alpaka"), &home.path().join("x"));
    assert!(error.unwrap_err().to_string().contains("`alpaka` is not known"));
}

#[test]
fn stacks_renumber_layers_and_their_kinds() {
    let home = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "gemma3_text", "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]
    });
    let tensors: &Tensors<'_> = &[
        ("model.embed_tokens.weight", &[1], vec![0.5]),
        ("model.layers.0.w", &[1], vec![0.0]),
        ("model.layers.1.w", &[1], vec![1.0]),
        ("model.layers.2.w", &[1], vec![2.0]),
        ("model.norm.weight", &[1], vec![9.0]),
    ];
    write(&home.path().join("three"), ONE, &config, Dtype::F32, tensors);
    let text = "merge_method: passthrough\nslices:\n- sources: [{model: three, layer_range: [0, 3]}]\n\
                - sources: [{model: three, layer_range: [1, 3], parameters: {scale: [3, 4]}}]\n";
    let target = home.path().join("five");
    run(text, &target).unwrap();
    let layers: Vec<f32> = all(&target).into_values().map(|values| values[0]).collect();
    // The final norm is the last slice's, and outside of layers a gradient's first value holds.
    assert_eq!(layers, [0.5, 0.0, 1.0, 2.0, 3.0, 8.0, 27.0]);
    let config = Source::open(&target).unwrap().config().unwrap().unwrap();
    assert_eq!(config["num_hidden_layers"], 5);
    assert_eq!(config["layer_types"][4], "full_attention");
    assert_eq!(config["layer_types"][3], "sliding_attention");
}

#[test]
fn breadcrumbs_says_where_it_departs_from_the_reference() {
    let home = tempfile::tempdir().unwrap();
    let text = golden("breadcrumbs").replace("gamma: 0.05", "gamma: 0.01");
    let paper = run(&text, &home.path().join("paper")).unwrap();
    assert!(
        paper.notes[0].contains("5 tensors") && paper.notes[0].contains("compat: mergekit"),
        "{:?}",
        paper.notes
    );
    let compat = run(&format!("{text}compat: mergekit\n"), &home.path().join("compat")).unwrap();
    assert!(compat.notes[0].contains("as in mergekit 0.1.4"), "{:?}", compat.notes);
    let norm = "model.norm.weight";
    let base = all(&pack().join("base"));
    assert_eq!(all(&home.path().join("compat"))[norm], base[norm]);
    assert_ne!(all(&home.path().join("paper"))[norm], base[norm]);
    let large = "model.layers.0.mlp.up_proj.weight";
    assert_eq!(all(&home.path().join("compat"))[large], all(&home.path().join("paper"))[large]);
}

#[test]
fn a_tied_head_is_the_embedding_where_another_model_has_its_own() {
    let home = tempfile::tempdir().unwrap();
    let (e, h) = ("model.embed_tokens.weight", "lm_head.weight");
    let untied: &Tensors<'_> = &[(e, &[2, 1], vec![1.0, 2.0]), (h, &[2, 1], vec![5.0, 6.0])];
    write(&home.path().join("untied"), ONE, &llama(), Dtype::F32, untied);
    let tied: &Tensors<'_> = &[(e, &[2, 1], vec![3.0, 4.0])];
    let mut config = llama();
    config["tie_word_embeddings"] = true.into();
    write(&home.path().join("tied"), ONE, &config, Dtype::F32, tied);
    let text =
        "merge_method: linear\nmodels: [{model: untied}, {model: tied}]\nparameters: {weight: 1}\n";
    let target = home.path().join("out");
    run(text, &target).unwrap();
    assert_eq!(all(&target)[h], [4.0, 5.0]);
    config["tie_word_embeddings"] = false.into();
    write(&home.path().join("tied"), ONE, &config, Dtype::F32, tied);
    let error = run(text, &home.path().join("x")).unwrap_err().to_string();
    assert!(error.contains("is in untied, not in tied"), "{error}");
}
