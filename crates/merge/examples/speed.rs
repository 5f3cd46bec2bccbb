//! Measures merging against copying.
//!
//! `speed make FOLDER [bf16|f32]` writes three random models of SmolLM2-135M's shapes,
//! `speed merge PLAN OUTPUT` merges and prints seconds and peak memory. Copying is `cp` and `sync`.
#![expect(clippy::print_stdout, reason = "a program that reports to people")]
#![expect(clippy::disallowed_methods, reason = "measuring time is what it is for")]

use std::error::Error;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use retune_files::Dtype;
use retune_files::safetensors::{SafetensorsWriter, TensorSpec};
use retune_merge::plan::Plan;
use retune_merge::writer::Existing;
use retune_merge::{Options, merge};

const CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "DTYPE",
  "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "hidden_act": "silu",
  "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
  "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "tie_word_embeddings": true,
  "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.04, "rope_theta": 100000.0
}
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["make", folder] => make(Path::new(folder), Dtype::BF16),
        ["make", folder, "f32"] => make(Path::new(folder), Dtype::F32),
        ["merge", plan, output] => run(plan, Path::new(output)),
        _ => Err("give `make FOLDER [f32]` or `merge PLAN OUTPUT`".into()),
    }
}

fn specs(dtype: Dtype) -> Vec<TensorSpec> {
    let mut specs = vec![
        TensorSpec::new("model.embed_tokens.weight", dtype, [49152, 576]),
        TensorSpec::new("model.norm.weight", dtype, [576]),
    ];
    for layer in 0..30 {
        for (name, shape) in [
            ("input_layernorm", vec![576]),
            ("post_attention_layernorm", vec![576]),
            ("self_attn.q_proj", vec![576, 576]),
            ("self_attn.k_proj", vec![192, 576]),
            ("self_attn.v_proj", vec![192, 576]),
            ("self_attn.o_proj", vec![576, 576]),
            ("mlp.gate_proj", vec![1536, 576]),
            ("mlp.up_proj", vec![1536, 576]),
            ("mlp.down_proj", vec![576, 1536]),
        ] {
            specs.push(TensorSpec::new(
                format!("model.layers.{layer}.{name}.weight"),
                dtype,
                shape,
            ));
        }
    }
    specs
}

fn make(folder: &Path, dtype: Dtype) -> Result<(), Box<dyn Error>> {
    let mut state = 1_u64;
    let mut draw = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    for model in ["a", "b", "c"] {
        let folder = folder.join(model);
        std::fs::create_dir_all(&folder)?;
        let name = if dtype == Dtype::F32 { "float32" } else { "bfloat16" };
        std::fs::write(folder.join("config.json"), CONFIG.replace("DTYPE", name))?;
        let specs = specs(dtype);
        let path = folder.join("model.safetensors");
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let mut writer = SafetensorsWriter::create(&path, &specs, &metadata)?;
        for spec in &specs {
            let n = spec.shape.iter().product();
            let values: Vec<f32> = (0..n).map(|_| draw() * 0.1).collect();
            writer.write_f32(&spec.name, &values)?;
        }
        writer.finish()?;
    }
    Ok(())
}

fn run(plan: &str, output: &Path) -> Result<(), Box<dyn Error>> {
    let (plan, _) = Plan::parse(plan, &std::fs::read(plan)?)?;
    let options = Options { existing: Existing::Replace, ..Options::default() };
    let started = Instant::now();
    let locate = &mut |name: &str| Ok(PathBuf::from(name));
    let merged = merge(&plan, output, options, locate, &|_| ControlFlow::Continue(()))?;
    let seconds = started.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or("VmHWM: unknown");
    println!(
        "{} {} tensors, {} MB in {seconds:.3} s, {}",
        plan.method.name,
        merged.num_tensors,
        merged.total_bytes / 1_000_000,
        peak.split_whitespace().collect::<Vec<_>>().join(" ")
    );
    Ok(())
}
