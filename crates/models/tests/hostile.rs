//! Configurations and files that lie: an error each, never a panic.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use retune_core::weights::{Packing, Weights};
use retune_models::config::Config;
use retune_models::{Task, build, build_for, open};
use retune_testkit::golden::folder;
use retune_testkit::tiny::{MemorySource, configs};
use serde_json::{Value, json};
use tensor::Device;

fn config(value: Value) -> Config {
    Config::new(Path::new("config.json"), value)
}

/// Values a damaged or hostile configuration may hold under any key.
fn hostile() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!(0)),
        Just(json!(-1)),
        Just(json!(3)),
        Just(json!(0.5)),
        Just(json!(1e300)),
        Just(json!(1e-300)),
        Just(json!(u64::MAX)),
        Just(json!(1_u64 << 40)),
        Just(json!(1 << 20)),
        Just(json!(true)),
        Just(json!("")),
        Just(json!("llama3")),
        Just(json!([])),
        Just(json!([1, "sliding_attention", null])),
        Just(json!({})),
        Just(json!({"rope_type": "yarn", "factor": 0.0})),
        Just(json!({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0})),
        Just(json!({"rope_type": "llama3", "factor": 1e-300, "high_freq_factor": 1})),
        Just(json!({"full_attention": 7, "sliding_attention": {"rope_type": "linear"}})),
        Just(json!({"0": 1, "1": "b"})),
        any::<i64>().prop_map(|number| json!(number)),
        any::<f64>().prop_map(|number| json!(number)),
    ]
}

/// Every key any family reads.
const KEYS: &[&str] = &[
    "_sliding_window_pattern",
    "activation_function",
    "add_cross_attention",
    "architectures",
    "attention_bias",
    "attn_logit_softcapping",
    "classifier_dropout",
    "embd_pdrop",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_dropout_prob",
    "hidden_size",
    "id2label",
    "initializer_range",
    "intermediate_size",
    "is_decoder",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_labels",
    "partial_rotary_factor",
    "position_embedding_type",
    "query_pre_attn_scalar",
    "resid_pdrop",
    "rms_norm_eps",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "sliding_window",
    "sliding_window_pattern",
    "tie_word_embeddings",
    "type_vocab_size",
    "use_bidirectional_attention",
    "use_sliding_window",
    "vocab_size",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn no_configuration_panics(
        family in 0..configs().len(),
        changes in prop::collection::vec((prop::sample::select(KEYS), hostile()), 1..4),
        task in 0..3,
    ) {
        let (_, mut value) = configs().swap_remove(family);
        for (key, hostile) in changes {
            value.as_object_mut().unwrap().insert(key.to_owned(), hostile);
        }
        let task = match task {
            0 => Task::AsSaved,
            1 => Task::Embed,
            _ => Task::Classify { labels: vec!["a".into(), "b".into()] },
        };
        if let Ok(model) = build_for(&config(value), &task) {
            // What was accepted must be consistent enough to count.
            let spec = model.spec();
            prop_assert!(spec.count() > 0);
            prop_assert!(spec.num_heads.is_multiple_of(spec.num_key_heads));
        }
    }
}

#[test]
fn an_impossible_number_names_its_key_and_value() {
    for (key, value) in [
        ("num_hidden_layers", json!(0)),
        ("hidden_size", json!("big")),
        ("vocab_size", json!(-3)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(5)),
        ("rms_norm_eps", json!(-1.0)),
        ("rope_theta", json!(0)),
        ("hidden_act", json!("sigmoid")),
        ("intermediate_size", json!(1_u64 << 41)),
        ("num_hidden_layers", json!(1_000_000)),
    ] {
        let (_, mut llama) = configs().swap_remove(0);
        llama[key] = value.clone();
        let error = build(&config(llama)).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains(&value.to_string()), "{key}: {error}");
    }
}

#[test]
fn an_unknown_architecture_lists_the_known_ones() {
    let error = build(&config(json!({"model_type": "mamba"}))).unwrap_err().to_string();
    assert!(error.contains("mamba") && error.contains("gemma3_text"), "{error}");
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let (_, value) = configs().swap_remove(0);
    let model = build(&config(value)).unwrap();
    let seed = retune_core::random::Seed(1);
    let whole = MemorySource::random(model.spec(), seed);
    let join = |source: MemorySource| {
        let spec = Arc::clone(model.spec());
        Weights::new(Arc::new(source), spec, Packing::default(), &Device::flex())
    };
    assert!(join(whole.clone()).is_ok());
    let name = "model.layers.1.mlp.up_proj.weight";
    let mut missing = whole.clone();
    missing.remove(name);
    assert!(join(missing).unwrap_err().to_string().contains(name));
    // A vocabulary other than the configuration's.
    let mut grown = whole;
    grown.insert("model.embed_tokens.weight", &[40, 16], vec![0.0; 640]);
    let error = join(grown).unwrap_err().to_string();
    assert!(error.contains("[40, 16]") && error.contains("[32, 16]"), "{error}");
}

#[test]
fn a_bias_the_configuration_denies_is_refused() {
    let base = folder("families/llama3_rope");
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(base.join("model.safetensors"), copy.path().join("model.safetensors")).unwrap();
    let text = std::fs::read_to_string(base.join("config.json")).unwrap();
    let text = text.replace("\"attention_bias\": true", "\"attention_bias\": false");
    std::fs::write(copy.path().join("config.json"), text).unwrap();
    let error = open(copy.path()).unwrap_err().to_string();
    assert!(error.contains("k_proj.bias") && error.contains("attention_bias"), "{error}");
}

#[test]
fn packed_weights_of_other_libraries_are_refused() {
    let base = folder("training/llama/base");
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(base.join("model.safetensors"), copy.path().join("model.safetensors")).unwrap();
    let text = std::fs::read_to_string(base.join("config.json")).unwrap();
    let text = text.replacen('{', "{\"quantization_config\": {\"quant_method\": \"gptq\"},", 1);
    std::fs::write(copy.path().join("config.json"), text).unwrap();
    let error = open(copy.path()).unwrap_err().to_string();
    assert!(error.contains("quantised") && error.contains("GGUF"), "{error}");
}

#[test]
fn what_is_no_checkpoint_says_so() {
    let empty = tempfile::tempdir().unwrap();
    let error = open(empty.path()).unwrap_err().to_string();
    assert!(error.contains("config.json"), "{error}");
    for text in ["", "[]", "{", "\"llama\""] {
        std::fs::write(empty.path().join("config.json"), text).unwrap();
        assert!(open(empty.path()).is_err(), "{text}");
    }
    let (_, llama) = configs().swap_remove(0);
    std::fs::write(empty.path().join("config.json"), llama.to_string()).unwrap();
    let error = open(empty.path()).unwrap_err().to_string();
    assert!(error.contains("safetensors"), "{error}");
    let error = open(&empty.path().join("nowhere.gguf")).unwrap_err().to_string();
    assert!(error.contains("nowhere.gguf"), "{error}");
    assert!(open(&empty.path().join("config.json")).is_err());
}
