//! `half-reset`: a random half of a tuned model goes back to its base.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser};
use retune_core::random::Seed;
use retune_methods::hft::{Hft, HftOptions, Level};
use retune_models::Task;
use retune_options::Choice;
use retune_run::export::Beside;
use retune_run::half_reset::half_reset as write;
use retune_run::open::{Located, Opened};
use retune_run::recipe::ComputeOptions;
use serde_json::json;

use super::compress::check_free;
use super::session::with_environment;
use crate::failure::Failure;

/// What `half-reset` is told.
#[derive(Debug, Args)]
pub(crate) struct HalfResetArguments {
    /// The tuned model: a catalogue name, hf:org/name or a folder.
    tuned: String,
    /// The model it was tuned from.
    #[arg(long)]
    base: String,
    /// Share of the modules that stays tuned.
    #[arg(long, default_value_t = 0.5)]
    ratio: f64,
    /// Among what the share is drawn.
    #[arg(long, default_value = "category", value_parser = levels())]
    level: String,
    /// Seed of the draw.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The run of a sequence whose half is drawn.
    #[arg(long, default_value_t = 0)]
    stage: u64,
    /// The folder to write.
    #[arg(long)]
    output: PathBuf,
    /// Overwrites the output.
    #[arg(long)]
    force: bool,
}

/// Weights that are named.
const SHOWN: usize = 6;

fn levels() -> PossibleValuesParser {
    Level::ALL
        .iter()
        .map(|(_, spec)| PossibleValue::new(spec.name).help(spec.help))
        .collect::<Vec<_>>()
        .into()
}

/// Puts half of a tuned model back.
pub(crate) fn half_reset(arguments: &HalfResetArguments, json: bool) -> Result<(), Failure> {
    check_free(&arguments.output, arguments.force)?;
    let level = Level::ALL.iter().find(|(_, spec)| spec.name == arguments.level);
    let options = HftOptions {
        ratio: arguments.ratio,
        level: level.map_or(Level::Category, |(level, _)| *level),
        seed: arguments.seed,
        stage: arguments.stage,
        ..HftOptions::default()
    };
    let half = Hft { options };
    let found = with_environment(json, |environment| {
        let mut open = |name: &str| -> Result<(Located, Opened), Failure> {
            let located = Located::find(name, environment)?;
            let compute = ComputeOptions::default();
            let opened = Opened::open(&located, &Task::AsSaved, Seed(0), &compute, None)?;
            Ok((located, opened))
        };
        let ((located, tuned), (_, base)) = (open(&arguments.tuned)?, open(&arguments.base)?);
        // A folder without a tokenizer can still be changed.
        let tokenizer = located.tokenizer().ok();
        let beside = Beside::of(&located.path, tokenizer.as_ref())?;
        let base = (&base, arguments.base.as_str());
        Ok(write(&tuned, base, &half, &beside, &arguments.output)?)
    })?;
    if json {
        println!("{}", json!({"output": arguments.output, "reset": found}));
        return Ok(());
    }
    let some = found.weights.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    println!(
        "{} weights, {:.2} % of all values, are the base's again: {some}{}",
        found.weights.len(),
        100.0 * found.share,
        if found.weights.len() > SHOWN { ", …" } else { "" }
    );
    println!("written: {}", arguments.output.display());
    Ok(())
}
