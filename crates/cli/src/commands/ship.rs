//! `ship`: an adapter of a quantised base, in five ways.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use retune_files::ggml::BlockType;
use retune_run::prepare::Prepared;
use retune_run::ship::{Shift, Shipping, Way};
use serde_json::json;

use super::compress::check_free;
use super::run::read_recipe;
use super::session::with_environment;
use crate::args::RecipeArguments;
use crate::failure::Failure;
use crate::table::{grouped, number, table};

/// What `ship` is told.
#[derive(Debug, Args)]
pub(crate) struct ShipArguments {
    /// The recipe, for the base and the held-out rows that are measured on.
    #[command(flatten)]
    recipe: RecipeArguments,
    /// The adapter folder or compressed file.
    #[arg(long)]
    adapter: PathBuf,
    /// How the base is quantised.
    #[arg(long, value_enum, default_value = "q4_0")]
    quantise: Quantise,
    /// Labelled positions that are measured at most.
    #[arg(long, default_value_t = 256)]
    positions: usize,
    /// Writes the model of this way.
    #[arg(long, value_enum, requires = "output")]
    way: Option<WayName>,
    /// The folder (or GGUF file, where the way is quantised) to write.
    #[arg(long, requires = "way")]
    output: Option<PathBuf>,
    /// Overwrites the output, and takes an adapter of another base.
    #[arg(long)]
    force: bool,
}

/// Block types that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Quantise {
    #[value(name = "q4_0")]
    Q40,
    #[value(name = "q4_1")]
    Q41,
    #[value(name = "q8_0")]
    Q80,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WayName {
    /// Merged into the unquantised base.
    Merged,
    /// The same, then quantised.
    MergedQuantised,
    /// Merged into the base after quantising and dequantising it.
    DequantisedMerged,
    /// The same, quantised again.
    DequantisedMergedQuantised,
}

/// Measures the ways, and writes one.
pub(crate) fn ship(arguments: &ShipArguments, json: bool) -> Result<(), Failure> {
    if let Some(output) = &arguments.output {
        check_free(output, arguments.force)?;
    }
    let (recipe, _) = read_recipe(&arguments.recipe, json)?;
    let prepared = with_environment(json, |environment| Ok(Prepared::make(recipe, environment)?))?;
    let kind = match arguments.quantise {
        Quantise::Q40 => BlockType::Q4_0,
        Quantise::Q41 => BlockType::Q4_1,
        Quantise::Q80 => BlockType::Q8_0,
    };
    let shipping = Shipping::open(&prepared.opened, &arguments.adapter, kind, arguments.force)?;
    let (rows, held_out) = prepared.measured();
    let batches = rows.batches(prepared.recipe.evaluate.rows, 2048)?;
    let shifts = shipping.measure(&batches, arguments.positions)?;
    if let (Some(way), Some(output)) = (arguments.way, &arguments.output) {
        let way = match way {
            WayName::Merged => Way::Merged,
            WayName::MergedQuantised => Way::MergedQuantised,
            WayName::DequantisedMerged => Way::DequantisedMerged,
            WayName::DequantisedMergedQuantised => Way::DequantisedMergedQuantised,
        };
        shipping.write(way, &shifts, &prepared, output)?;
    }
    if json {
        let value = json!({"quantised": kind.name(), "held_out": held_out, "ways": shifts,
            "output": arguments.output});
        println!("{value}");
        return Ok(());
    }
    show(&shifts, held_out);
    if let Some(output) = &arguments.output {
        println!("written: {}", output.display());
    }
    Ok(())
}

fn show(shifts: &[Shift], held_out: bool) {
    let mut shown = table(&["way", "divergence", "largest", "same answer", "loss", "bytes"]);
    for shift in shifts {
        shown.add_row([
            shift.way.name().to_owned(),
            number(shift.divergence),
            number(shift.largest),
            format!("{:.1} %", 100.0 * shift.agreement),
            number(shift.loss),
            grouped(shift.bytes),
        ]);
    }
    println!("{shown}");
    let rows = if held_out { "held-out rows" } else { "training rows, for want of held-out ones" };
    println!("divergence from the attached adapter in nats a position, on {rows}");
}
