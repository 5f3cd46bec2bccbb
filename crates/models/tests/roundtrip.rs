//! What is exported is read back: Hugging Face folders and GGUF.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as the tests do")]

use std::path::Path;
use std::sync::Arc;

use retune_core::model::Model;
use retune_core::random::Seed;
use retune_core::spec::ModelSpec;
use retune_core::weights::{Packing, WeightSource, Weights};
use retune_files::Dtype;
use retune_files::ggml::BlockType;
use retune_files::gguf::{GgufFile, Metadata};
use retune_models::config::Config;
use retune_models::export::write_folder;
use retune_models::gguf::{AdapterPair, GgufTokenizer, write_adapter, write_model};
use retune_models::{build, open};
use retune_testkit::golden::{Tensors, assert_close, folder};
use retune_testkit::run;
use retune_testkit::tiny::{MemorySource, configs};
use serde_json::{Value, json};
use tensor::Device;

fn weights(spec: &Arc<ModelSpec>, source: MemorySource) -> Weights {
    Weights::new(Arc::new(source), Arc::clone(spec), Packing::default(), &Device::flex()).unwrap()
}

fn outputs(model: &dyn Model, source: Arc<dyn WeightSource>, packing: Packing) -> Vec<f32> {
    run::outputs(model, &source, &tokens(), packing).unwrap()
}

fn tokens() -> retune_core::batch::Batch {
    let rows = Tensors::open("families/llama3_rope/expected.safetensors").rows();
    let mut batch = rows.batch();
    batch.tokens.iter_mut().for_each(|token| *token %= 32);
    batch
}

#[test]
fn a_folder_in_f32_is_the_same_model() {
    let place = tempfile::tempdir().unwrap();
    for (index, (name, value)) in configs().into_iter().enumerate() {
        let model = build(&Config::new(Path::new("config.json"), value)).unwrap();
        let source = MemorySource::random(model.spec(), Seed(5));
        let before = outputs(&*model, Arc::new(source.clone()), Packing::default());
        let weights = weights(model.spec(), source);
        // Shards so small that there are several.
        let target = place.path().join(index.to_string());
        write_folder(&target, model.spec(), Dtype::F32, 8_000, &[], |weight| {
            weights.values(&weight.name)
        })
        .unwrap();
        assert!(target.join("model.safetensors.index.json").exists());
        let read = open(&target).unwrap();
        assert_eq!(read.config.text("dtype").unwrap(), Some("float32"));
        assert_eq!(outputs(&*read.model, read.source, Packing::default()), before, "{name}");
    }
}

#[test]
fn a_folder_in_bf16_is_rounded() {
    let place = tempfile::tempdir().unwrap();
    let (_, value) = configs().swap_remove(0);
    let model = build(&Config::new(Path::new("config.json"), value)).unwrap();
    let weights = weights(model.spec(), MemorySource::random(model.spec(), Seed(5)));
    let target = place.path().join("bf16");
    let others = [("README.md".to_owned(), b"card".to_vec())];
    write_folder(&target, model.spec(), Dtype::BF16, u64::MAX, &others, |weight| {
        weights.values(&weight.name)
    })
    .unwrap();
    assert_eq!(std::fs::read(target.join("README.md")).unwrap(), b"card");
    let read = open(&target).unwrap();
    assert_eq!(read.config.text("dtype").unwrap(), Some("bfloat16"));
    let name = "model.layers.0.mlp.gate_proj.weight";
    let retune_core::weights::Stored::Values(found) = read.source.read(name).unwrap() else {
        unreachable!("a folder has plain values")
    };
    for (found, exact) in found.iter().zip(weights.values(name).unwrap()) {
        assert!((found - exact).abs() <= exact.abs() / 256.0, "{found} {exact}");
    }
    // A folder that is there already stays whole until the new one is, and is then replaced.
    let fails = write_folder(&target, model.spec(), Dtype::F32, u64::MAX, &[], |_| Ok(Vec::new()));
    assert!(fails.is_err() && target.join("README.md").exists());
    write_folder(&target, model.spec(), Dtype::F32, u64::MAX, &[], |weight| {
        weights.values(&weight.name)
    })
    .unwrap();
    assert!(!target.join("README.md").exists());
    assert_eq!(open(&target).unwrap().config.text("dtype").unwrap(), Some("float32"));
}

/// Widths that hold whole blocks of 32 values.
fn wide(kind: &str, class: &str, extra: Value) -> Config {
    let mut value = json!({
        "architectures": [class], "model_type": kind, "vocab_size": 32, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    });
    value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    Config::new(Path::new("config.json"), value)
}

fn gguf_cases() -> Vec<(&'static str, Config)> {
    let llama3 = json!({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0,
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}});
    let gemma3 = json!({"sliding_window": 5, "query_pre_attn_scalar": 16,
        "tie_word_embeddings": true,
        "rope_parameters": {"full_attention": {"rope_theta": 1e5},
            "sliding_attention": {"rope_theta": 500.0}}});
    let gemma2 = json!({"sliding_window": 5, "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        "tie_word_embeddings": true});
    let bias = json!({"attention_bias": true, "tie_word_embeddings": true});
    let linear = json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0,
        "rope_theta": 5000.0}});
    vec![
        ("llama", wide("llama", "LlamaForCausalLM", json!({}))),
        ("llama with biases", wide("llama", "LlamaForCausalLM", bias)),
        ("llama 3", wide("llama", "LlamaForCausalLM", llama3)),
        ("linear", wide("llama", "LlamaForCausalLM", linear)),
        ("qwen2", wide("qwen2", "Qwen2ForCausalLM", json!({}))),
        ("qwen3", wide("qwen3", "Qwen3ForCausalLM", json!({}))),
        ("gemma2", wide("gemma2", "Gemma2ForCausalLM", gemma2)),
        ("gemma3", wide("gemma3_text", "Gemma3ForCausalLM", gemma3)),
    ]
}

#[test]
fn a_gguf_in_f32_is_the_same_model() {
    let place = tempfile::tempdir().unwrap();
    for (index, (name, config)) in gguf_cases().into_iter().enumerate() {
        let model = build(&config).unwrap();
        let source = MemorySource::random(model.spec(), Seed(6));
        let before = outputs(&*model, Arc::new(source.clone()), Packing::default());
        let weights = weights(model.spec(), source);
        let path = place.path().join(format!("{index}.gguf"));
        let metadata = Metadata::default();
        write_model(&path, model.spec(), BlockType::F32, name, &metadata, |weight| {
            weights.values(&weight.name)
        })
        .unwrap();
        let read = open(&path).unwrap();
        assert!(read.unused.is_empty(), "{name}: {:?}", read.unused);
        let after = outputs(&*read.model, read.source, Packing::default());
        // Gemma's norms lose a last bit when 1 is added and taken away again.
        assert_close(name, &after, &before, 5e-6);
    }
}

#[test]
fn quantised_rows_are_those_of_their_values() {
    let place = tempfile::tempdir().unwrap();
    let config = wide("llama", "LlamaForCausalLM", json!({"tie_word_embeddings": true}));
    let model = build(&config).unwrap();
    let weights = weights(model.spec(), MemorySource::random(model.spec(), Seed(6)));
    let tokenizer = GgufTokenizer {
        model: "gpt2".into(),
        tokens: (0..32).map(|i| format!("t{i}")).collect(),
        eos: Some(3),
        ..GgufTokenizer::default()
    };
    let mut metadata = Metadata::default();
    tokenizer.write(&mut metadata);
    let path = place.path().join("q8.gguf");
    write_model(&path, model.spec(), BlockType::Q8_0, "tiny", &metadata, |weight| {
        weights.values(&weight.name)
    })
    .unwrap();
    let read = open(&path).unwrap();
    assert_eq!(read.tokenizer().unwrap().unwrap(), tokenizer);
    assert_eq!(read.config.value()["eos_token_id"], json!(3));
    let file = GgufFile::open(&path).unwrap();
    let kind = |name: &str| file.tensor(name).unwrap().kind;
    assert_eq!(kind("blk.0.attn_q.weight"), BlockType::Q8_0);
    assert_eq!(kind("blk.0.attn_norm.weight"), BlockType::F32);
    // Blocks kept as they lie and values decoded from them give the same model.
    let spec = Arc::clone(read.model.spec());
    let decoded = Weights::new(read.source.clone(), spec, Packing::default(), &Device::flex());
    let decoded = decoded.unwrap();
    for weight in &read.model.spec().weights {
        let (found, exact) =
            (decoded.values(&weight.name).unwrap(), weights.values(&weight.name).unwrap());
        let largest = exact.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        assert_close(&weight.name, &found, &exact, largest / 200.0);
    }
    let kept = Packing { keep_blocks: true, ..Packing::default() };
    let blocks = outputs(&*read.model, read.source.clone(), kept);
    let plain = outputs(&*read.model, read.source, Packing::default());
    assert_close("blocks against values", &blocks, &plain, 2e-4);
}

#[test]
fn an_adapter_has_the_rows_of_its_weights() {
    let place = tempfile::tempdir().unwrap();
    let model = build(&wide("llama", "LlamaForCausalLM", json!({}))).unwrap();
    let b: Vec<f32> = (0..64_u8).flat_map(|row| [f32::from(row), -f32::from(row)]).collect();
    let pair = |weight: &str, scale: f64| AdapterPair {
        weight: weight.to_owned(),
        rank: 2,
        scale,
        a: vec![0.5; 2 * 64],
        b: b.clone(),
    };
    let pairs = [
        pair("model.layers.0.self_attn.q_proj.weight", 4.0),
        pair("model.layers.0.self_attn.o_proj.weight", 2.0),
    ];
    let path = place.path().join("adapter.gguf");
    write_adapter(&path, model.spec(), BlockType::F32, "tiny", &pairs).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.metadata().str("general.type").unwrap(), "adapter");
    assert_eq!(file.metadata().f32("adapter.lora.alpha").unwrap(), 8.0);
    let q = file.tensor("blk.0.attn_q.weight.lora_b").unwrap();
    assert_eq!(q.shape, [64, 2]);
    // Stored row 2i + j of a head of 16 is the class's row 8j + i.
    let q = q.to_f32();
    assert_eq!([q[0], q[2], q[4], q[6]], [0.0, 8.0, 1.0, 9.0]);
    assert_eq!([q[32], q[34]], [16.0, 24.0]);
    // Half the scale under one alpha for all: half the values.
    let o = file.tensor("blk.0.attn_output.weight.lora_b").unwrap().to_f32();
    assert_eq!([o[2], o[4]], [0.5, 1.0]);
    assert!(open(&path).unwrap_err().to_string().contains("adapter"));
}

#[test]
fn what_gguf_cannot_hold_is_said() {
    let place = tempfile::tempdir().unwrap();
    for name in ["gpt2", "bert", "llama classes"] {
        let (_, value) = configs().into_iter().find(|(family, _)| *family == name).unwrap();
        let model = build(&Config::new(Path::new("config.json"), value)).unwrap();
        let path = place.path().join("x.gguf");
        let error =
            write_model(&path, model.spec(), BlockType::F16, name, &Metadata::default(), |_| {
                Ok(Vec::new())
            })
            .unwrap_err();
        assert!(error.to_string().contains(&model.spec().class), "{error}");
        assert!(!path.exists());
    }
}

#[test]
fn the_fingerprint_is_of_the_files() {
    let base = folder("training/llama/base");
    let one = open(&base).unwrap().fingerprint();
    assert_eq!(one, open(&base).unwrap().fingerprint());
    assert_ne!(one, open(&folder("training/qwen2/base")).unwrap().fingerprint());
}
