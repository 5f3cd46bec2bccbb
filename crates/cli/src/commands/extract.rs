//! `extract`: a LoRA out of a full tune.

use std::path::PathBuf;

use clap::Args;
use retune_core::random::Seed;
use retune_models::Task;
use retune_run::card::{Derived, derived_card};
use retune_run::extract::{Extraction, extract_adapter};
use retune_run::open::{Located, Opened};
use retune_run::recipe::ComputeOptions;
use serde_json::json;

use super::compress::check_free;
use super::session::with_environment;
use crate::failure::Failure;
use crate::table::{number, table};

/// What `extract` is told.
#[derive(Debug, Args)]
pub(crate) struct ExtractArguments {
    /// The tuned model: a catalogue name, hf:org/name or a folder.
    tuned: String,
    /// The model it was tuned from.
    #[arg(long)]
    base: String,
    /// Rank of the adapter.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65536))]
    rank: u32,
    /// Saves other changed weights (norms, embeddings, biases) whole.
    #[arg(long)]
    keep_rest: bool,
    /// The adapter folder to write.
    #[arg(long)]
    output: PathBuf,
    /// Overwrites the output.
    #[arg(long)]
    force: bool,
}

/// Left-out weights that are named.
const SHOWN: usize = 6;

/// Extracts an adapter.
pub(crate) fn extract(arguments: &ExtractArguments, json: bool) -> Result<(), Failure> {
    check_free(&arguments.output, arguments.force)?;
    let rank = arguments.rank as usize;
    let found = with_environment(json, |environment| {
        let mut open = |name: &str| -> Result<Opened, Failure> {
            let located = Located::find(name, environment)?;
            let compute = ComputeOptions::default();
            Ok(Opened::open(&located, &Task::AsSaved, Seed(0), &compute, None)?)
        };
        let (tuned, base) = (open(&arguments.tuned)?, open(&arguments.base)?);
        Ok(extract_adapter(&tuned, &base, &arguments.base, rank, arguments.keep_rest)?)
    })?;
    let total = found.total();
    let facts = [
        ("tuned model", format!("`{}`", arguments.tuned)),
        ("rank", rank.to_string()),
        ("energy of the change kept", format!("{:.2} %", 100.0 * total.share())),
    ];
    let card = derived_card(&Derived {
        library: "peft",
        base: Some(&arguments.base),
        tag: "lora",
        title: &arguments
            .output
            .file_name()
            .map_or_else(String::new, |n| n.to_string_lossy().into()),
        summary: "A LoRA extracted from a full tune: of each layer's change the best approximation \
                  of the rank (Eckart and Young, 1936).",
        facts: &facts,
    });
    found.adapter.write(&arguments.output, &card)?;
    show(&found, arguments, json);
    Ok(())
}

fn show(found: &Extraction, arguments: &ExtractArguments, json: bool) {
    let total = found.total();
    if json {
        let shares: Vec<_> = found
            .shares
            .iter()
            .map(|s| json!({"layer": s.layer, "energy": s.energy, "kept": s.share()}))
            .collect();
        let value = json!({"output": arguments.output, "layers": shares, "kept": total.share(),
            "energy": total.energy, "left_out": found.left_out});
        println!("{value}");
        return;
    }
    let mut shown = table(&["block", "norm of the change", "energy kept"]);
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    for share in &found.shares {
        let name = share.layer.map_or_else(|| "–".to_owned(), |layer| layer.to_string());
        shown.add_row([name, number(share.energy.sqrt()), percent(share.share())]);
    }
    shown.add_row(["all".to_owned(), number(total.energy.sqrt()), percent(total.share())]);
    println!("{shown}");
    if !found.left_out.is_empty() {
        let some = found.left_out.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
        println!(
            "{} changed weights are not in the adapter (--keep-rest saves them whole): {some}{}",
            found.left_out.len(),
            if found.left_out.len() > SHOWN { ", …" } else { "" }
        );
    }
    println!("written: {}", arguments.output.display());
}
