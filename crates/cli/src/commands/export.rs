//! `merge-adapter` and `export`.

use std::path::Path;

use retune_files::Dtype;
use retune_files::ggml::BlockType;
use retune_run::card::merged_card;
use retune_run::export::{write_gguf, write_gguf_adapter, write_merged};
use serde_json::json;

use super::session::Session;
use crate::failure::Failure;

/// Merges an adapter into its base and writes a Hugging Face folder.
pub(crate) fn merge_adapter(
    model: &str,
    adapter: &Path,
    output: &Path,
    dtype: &str,
    force: bool,
    json: bool,
) -> Result<(), Failure> {
    let session = Session::open(model, Some(adapter), force, json)?;
    // A folder without a tokenizer can still be merged.
    let tokenizer = session.tokenizer().ok();
    let dtype = match dtype {
        "bf16" => Dtype::BF16,
        "f16" => Dtype::F16,
        _ => Dtype::F32,
    };
    let card = merged_card(model, &adapter.display().to_string());
    write_merged(&session.tuned(), tokenizer.as_ref(), dtype, &card, output)?;
    done(output, json);
    Ok(())
}

/// Writes a model or an adapter in another tool's format.
pub(crate) fn export(
    model: &str,
    adapter: Option<&Path>,
    format: &str,
    output: &Path,
    force: bool,
    json: bool,
) -> Result<(), Failure> {
    let session = Session::open(model, adapter, force, json)?;
    let name = output.file_stem().map_or_else(|| model.to_owned(), |s| s.to_string_lossy().into());
    let checkpoint = &session.opened.checkpoint;
    match format {
        "gguf-lora" => {
            let adapter = session.adapter.as_ref().ok_or_else(|| {
                Failure::Usage(
                    "--format gguf-lora writes an adapter; give one with --adapter".into(),
                )
            })?;
            write_gguf_adapter(adapter, checkpoint.model.spec(), &name, output)?;
        }
        "hf" => {
            // A folder without a tokenizer can still be merged.
            let tokenizer = session.tokenizer().ok();
            let adapter = adapter.map_or_else(|| "none".to_owned(), |a| a.display().to_string());
            let card = merged_card(model, &adapter);
            write_merged(&session.tuned(), tokenizer.as_ref(), Dtype::F32, &card, output)?;
        }
        format => {
            let kind = match format {
                "gguf-q8_0" => BlockType::Q8_0,
                "gguf-f32" => BlockType::F32,
                _ => BlockType::F16,
            };
            let tokenizer = session.tokenizer()?;
            write_gguf(&session.tuned(), checkpoint, &tokenizer, kind, &name, output)?;
        }
    }
    done(output, json);
    Ok(())
}

fn done(output: &Path, json: bool) {
    if json {
        println!("{}", json!({"output": output}));
    } else {
        println!("written: {}", output.display());
    }
}
