//! `diff`: what changed between two models or two adapters.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use retune_merge::diff::{Diff, Side, Sums, TensorDiff, diff as compare};
use retune_methods::adapter::PREFIX;
use retune_methods::compressed::is_compressed;
use retune_run::artefacts::heatmap::{HeatMap, svg};
use serde_json::json;

use super::combine::lora;
use crate::failure::Failure;
use crate::table::{grouped, number, table};

/// What `diff` is told.
#[derive(Debug, Args)]
pub(crate) struct DiffArguments {
    /// The first model (folder or safetensors file) or adapter.
    first: PathBuf,
    /// The second, of the same kind.
    second: PathBuf,
    /// Writes a heat map of the relative change, kinds of tensor by block.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Shows every tensor; else those that changed most.
    #[arg(long)]
    all: bool,
    /// Leaves out the ranks, which take most of the time.
    #[arg(long)]
    no_ranks: bool,
}

/// Tensors shown without `--all`.
const SHOWN: usize = 12;

/// Compares two models or two adapters.
pub(crate) fn diff(arguments: &DiffArguments, json: bool) -> Result<(), Failure> {
    let (first, second) = (side(&arguments.first)?, side(&arguments.second)?);
    let found = compare(&first, &second, !arguments.no_ranks)?;
    if let Some(path) = &arguments.svg {
        let name = |path: &Path| path.display().to_string();
        let title = format!("{} → {}", name(&arguments.first), name(&arguments.second));
        retune_files::atomic::write_file(path, svg(&heat_map(&found, title)).as_bytes())?;
    }
    if json {
        let value = json!({"total": found.total(), "layers": found.layers,
            "tensors": found.tensors, "missing": found.missing, "surplus": found.surplus,
            "misshapen": found.misshapen});
        println!("{value}");
        return Ok(());
    }
    show(&found, arguments);
    Ok(())
}

/// Opens one side; compressed adapters are decoded.
fn side(path: &Path) -> Result<Side, Failure> {
    if is_compressed(path) { Ok(Side::Lora(lora(path)?)) } else { Ok(Side::open(path)?) }
}

fn optional(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), number)
}

fn sums(sums: &Sums) -> [String; 4] {
    [
        number(sums.norm()),
        optional(sums.relative()),
        number(sums.sparsity()),
        optional(sums.cosine()),
    ]
}

/// Leaves out what PEFT puts before every path.
fn shown(name: &str) -> &str {
    name.strip_prefix(PREFIX).unwrap_or(name)
}

fn show(found: &Diff, arguments: &DiffArguments) {
    let mut layers = table(&["block", "tensors", "norm", "relative", "unchanged", "cosine"]);
    let row = |name: String, count: usize, found: &Sums| {
        let [norm, relative, unchanged, cosine] = sums(found);
        [name, count.to_string(), norm, relative, unchanged, cosine]
    };
    for layer in &found.layers {
        let name = layer.layer.map_or_else(|| "–".to_owned(), |layer| layer.to_string());
        layers.add_row(row(name, layer.num_tensors, &layer.sums));
    }
    layers.add_row(row("all".to_owned(), found.tensors.len(), &found.total()));
    println!("{layers}");

    let mut ordered: Vec<&TensorDiff> = found.tensors.iter().collect();
    if !arguments.all {
        let size = |tensor: &TensorDiff| tensor.sums.relative().unwrap_or(f64::INFINITY);
        ordered.retain(|tensor| tensor.sums.difference > 0.0 || tensor.sums.not_finite > 0);
        ordered.sort_by(|a, b| size(b).total_cmp(&size(a)));
        ordered.truncate(SHOWN);
    }
    let mut tensors = table(&[
        "tensor",
        "norm",
        "relative",
        "unchanged",
        "cosine",
        "effective rank",
        "rank of 99 %",
    ]);
    for tensor in &ordered {
        let [norm, relative, unchanged, cosine] = sums(&tensor.sums);
        let rank = tensor.rank_99.map_or_else(
            || if tensor.rank_skipped { "too large" } else { "–" }.to_owned(),
            |rank| rank.to_string(),
        );
        let name = shown(&tensor.name).to_owned();
        let effective = optional(tensor.effective_rank);
        tensors.add_row([name, norm, relative, unchanged, cosine, effective, rank]);
    }
    if ordered.is_empty() {
        println!("no tensor differs");
    } else {
        println!("{tensors}");
        if ordered.len() < found.tensors.len() {
            println!(
                "the {} of {} tensors that changed most; --all shows every one",
                ordered.len(),
                found.tensors.len()
            );
        }
    }
    let bad = found.total().not_finite;
    if bad > 0 {
        println!("{} entries are not finite and were left out", grouped(bad));
    }
    for (what, names) in
        [("only in the first", &found.missing), ("only in the second", &found.surplus)]
    {
        list(what, names.iter().map(|name| shown(name).to_owned()));
    }
    list(
        "of different shapes",
        found.misshapen.iter().map(|m| format!("{} {:?} {:?}", shown(&m.name), m.first, m.second)),
    );
}

fn list(what: &str, names: impl ExactSizeIterator<Item = String>) {
    let count = names.len();
    if count == 0 {
        return;
    }
    let some: Vec<String> = names.take(SHOWN).collect();
    let more = if count > SHOWN { format!(" and {} more", count - SHOWN) } else { String::new() };
    println!("{what}: {}{more}", some.join(", "));
}

/// Lays the relative changes out by kind of tensor and block.
fn heat_map(found: &Diff, title: String) -> HeatMap {
    let layers: Vec<Option<usize>> = found.layers.iter().map(|layer| layer.layer).collect();
    let mut kinds: BTreeMap<String, Vec<Option<f64>>> = BTreeMap::new();
    for tensor in &found.tensors {
        let name = shown(&tensor.name);
        // The part after the block's number is what the blocks have in common.
        let kind = match tensor.layer {
            Some(layer) => {
                let number = format!(".{layer}.");
                name.split_once(&number).map_or(name, |(_, kind)| kind)
            }
            None => name,
        };
        let row = kinds.entry(kind.to_owned()).or_insert_with(|| vec![None; layers.len()]);
        if let Some(column) = layers.iter().position(|layer| *layer == tensor.layer) {
            row[column] = Some(tensor.sums.relative().unwrap_or_else(|| tensor.sums.norm()));
        }
    }
    let column = |layer: &Option<usize>| layer.map_or_else(|| "–".to_owned(), |l| l.to_string());
    let (rows, values) = kinds.into_iter().unzip();
    HeatMap {
        title,
        value_label: "norm of the change, relative to the first".to_owned(),
        column_label: "block".to_owned(),
        rows,
        columns: layers.iter().map(column).collect(),
        values,
    }
}
