//! `merge-adapter` and `export`.

use std::path::{Path, PathBuf};

use retune_files::Dtype;
use retune_files::ggml::BlockType;
use retune_run::card::{
    Derived, Outputs, check_card_free, derived_card, listed, merged_card, with_origins, write_card,
};
use retune_run::export::{Beside, write_gguf, write_gguf_adapter, write_merged};
use retune_run::structured::{Cut, write_structured};
use serde_json::json;

use super::compress::check_free;
use super::session::Session;
use crate::failure::Failure;
use crate::table::grouped;

/// Merges adapters into their base and writes a Hugging Face folder.
pub(crate) fn merge_adapter(
    model: &str,
    adapters: &[PathBuf],
    output: &Path,
    dtype: &str,
    force: bool,
    json: bool,
) -> Result<(), Failure> {
    check_free(output, force)?;
    let session = Session::open(model, adapters, force, json)?;
    // A folder without a tokenizer can still be merged.
    let tokenizer = session.tokenizer().ok();
    let dtype = match dtype {
        "bf16" => Dtype::BF16,
        "f16" => Dtype::F16,
        _ => Dtype::F32,
    };
    let card = merged_card(model, adapters, &title(output));
    let beside = Beside::of(&session.opened.checkpoint.path, tokenizer.as_ref())?;
    write_merged(&session.tuned(), &beside, dtype, &card, output)?;
    done(output, json);
    Ok(())
}

/// Writes a model or an adapter in another tool's format.
pub(crate) fn export(
    model: &str,
    adapters: &[PathBuf],
    format: &str,
    output: &Path,
    force: bool,
    json: bool,
) -> Result<(), Failure> {
    check_free(output, force)?;
    if format.starts_with("gguf") {
        check_card_free(output)?;
    }
    let session = Session::open(model, adapters, force, json)?;
    let name = output.file_stem().map_or_else(|| model.to_owned(), |s| s.to_string_lossy().into());
    let checkpoint = &session.opened.checkpoint;
    match format {
        "gguf-lora" => {
            let [(_, adapter)] = session.adapters.as_slice() else {
                return Err(Failure::Usage(format!(
                    "--format gguf-lora writes one adapter; give one with --adapter\n  found: {}",
                    session.adapters.len()
                )));
            };
            write_gguf_adapter(adapter, checkpoint.model.spec(), &name, output)?;
            write_card(output, &gguf_card(model, adapters, "F32", output))?;
        }
        "hf" => {
            // A folder without a tokenizer can still be merged.
            let tokenizer = session.tokenizer().ok();
            let card = merged_card(model, adapters, &title(output));
            let beside = Beside::of(&session.opened.checkpoint.path, tokenizer.as_ref())?;
            write_merged(&session.tuned(), &beside, Dtype::F32, &card, output)?;
        }
        "hf-pruned" => {
            let tokenizer = session.tokenizer().ok();
            let card = |cut: &Cut| pruned_card(model, adapters, output, cut);
            let (tuned, dtype) = (session.tuned(), Dtype::F32);
            let beside = Beside::of(&session.opened.checkpoint.path, tokenizer.as_ref())?;
            let cut = write_structured(&tuned, &beside, dtype, &card, output)?;
            if json {
                println!("{}", json!({"output": output, "cut": cut}));
                return Ok(());
            }
            for (what, value) in facts(&cut) {
                println!("{what}: {value}");
            }
        }
        format => {
            let kind = match format {
                "gguf-q8_0" => BlockType::Q8_0,
                "gguf-f32" => BlockType::F32,
                _ => BlockType::F16,
            };
            let tokenizer = session.tokenizer()?;
            write_gguf(&session.tuned(), checkpoint, &tokenizer, kind, &name, output)?;
            write_card(output, &gguf_card(model, adapters, kind.name(), output))?;
        }
    }
    done(output, json);
    Ok(())
}

/// Says what was cut and what that saves, for the card and the terminal.
fn facts(cut: &Cut) -> Vec<(&'static str, String)> {
    let change = |[before, after]: [u64; 2]| {
        let saved = 100.0 * (1.0 - after as f64 / before.max(1) as f64);
        format!("{} to {} ({saved:.1} % less)", grouped(before), grouped(after))
    };
    let small = |[before, after]: [usize; 2]| change([before as u64, after as u64]);
    let mut facts = vec![
        ("query heads a layer", small(cut.heads)),
        ("key heads a layer", small(cut.key_heads)),
        ("inner width", small(cut.inner_width)),
        ("values", small(cut.num_values)),
        ("floating-point operations of the products a token", change(cut.flops_per_token)),
        ("of these with entries that are not zero", grouped(cut.nonzero_flops_per_token)),
    ];
    if cut.dead_heads_left > 0 {
        facts.push((
            "heads that put out nothing but stay",
            format!("{}: layers have different numbers of them", cut.dead_heads_left),
        ));
    }
    facts
}

fn pruned_card(model: &str, adapters: &[PathBuf], output: &Path, cut: &Cut) -> String {
    let mut rows = facts(cut);
    rows.insert(0, ("adapters", listed(adapters)));
    let card = derived_card(&Derived {
        library: "transformers",
        base: Some(model),
        tag: "pruned",
        title: &title(output),
        summary: "A model without the heads and inner neurons that put out nothing.",
        facts: &rows,
    });
    with_origins(&card, adapters, Outputs::Same)
}

fn gguf_card(model: &str, adapters: &[PathBuf], numbers: &str, output: &Path) -> String {
    let card = derived_card(&Derived {
        library: "gguf",
        base: Some(model),
        tag: "gguf",
        title: &title(output),
        summary: "One file for llama.cpp and its relatives.",
        facts: &[
            ("base", format!("`{model}`")),
            ("adapters", listed(adapters)),
            ("matrices", numbers.to_owned()),
        ],
    });
    // F16 and F32 are within the rounding of what was measured; blocks of 8 bits are not.
    let outputs = if numbers.starts_with('F') { Outputs::Same } else { Outputs::Moved };
    with_origins(&card, adapters, outputs)
}

fn title(output: &Path) -> String {
    output.file_name().map_or_else(String::new, |name| name.to_string_lossy().into())
}

fn done(output: &Path, json: bool) {
    if json {
        println!("{}", json!({"output": output}));
    } else {
        println!("written: {}", output.display());
    }
}
