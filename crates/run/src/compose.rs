//! Composition: what several adapters do to the weights, added up.
//!
//! Source: task arithmetic, Ilharco et al., 2023, arXiv 2212.04089; for sparse changes Ansell et al.,
//! *Composable Sparse Fine-Tuning*, 2022, arXiv 2110.07560, where every weight is 1. The kind of
//! adapter does not matter, as long as it changes weights: LoRA, sparse and full changes mix.

use std::path::{Path, PathBuf};

use retune_core::change::Changes;
use retune_core::model::Tuned;
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_files::Dtype;
use retune_methods::adapter::Adapter;

use crate::adapters::both_replace;
use crate::card::{Derived, Outputs, derived_card, with_origins};
use crate::error::{Error, Result};
use crate::export::{Beside, merged, write_weights};
use crate::open::{Opened, check_base};

/// Changes of the weights, and what they are multiplied by.
struct Part {
    changes: Changes,
    parameters: Parameters,
    weight: f64,
}

/// Writes `base + Σ weight · (what the adapter makes of the base - base)` as a Hugging Face folder.
///
/// One weight is held at a time, beside the adapters.
///
/// # Errors
/// If an adapter does not fit the base, changes states rather than weights, or the disk is full.
pub fn write_composed(
    opened: &Opened,
    base: &str,
    adapters: &[(PathBuf, f64)],
    beside: &Beside,
    force: bool,
    output: &Path,
) -> Result<()> {
    let model = opened.checkpoint.model.as_ref();
    let weights = &opened.weights;
    let mut parts = Vec::new();
    for (path, weight) in adapters {
        let adapter = Adapter::read(path)?;
        check_base(path, &adapter, opened, force)?;
        let mut parameters = Parameters::new(weights.device());
        let changes = adapter.method()?.attach(weights, &mut parameters, Seed(0))?;
        adapter.fill(path, &mut parameters)?;
        parts.push(Part { changes, parameters, weight: *weight });
    }
    let tuned: Vec<(Tuned<'_>, f64)> = parts
        .iter()
        .map(|part| {
            let (changes, parameters) = (&part.changes, &part.parameters);
            (Tuned { model, weights, changes, parameters }, part.weight)
        })
        .collect();
    for (place, (later, _)) in tuned.iter().enumerate() {
        for (before, (earlier, _)) in tuned[..place].iter().enumerate() {
            if let Some(name) = both_replace(earlier, later)? {
                return Err(Error::Plan {
                    what: format!("two adapters have a `{name}` of their own"),
                    expected: "one head: differences add up, heads of two tasks do not".to_owned(),
                    found: format!(
                        "{} and {}",
                        adapters[before].0.display(),
                        adapters[place].0.display()
                    ),
                    help: "combine one task with adapters that have no head, such as languages"
                        .to_owned(),
                });
            }
        }
    }
    let facts: Vec<(String, String)> = adapters
        .iter()
        .map(|(path, weight)| (format!("`{}`", path.display()), weight.to_string()))
        .collect();
    let facts: Vec<(&str, String)> =
        facts.iter().map(|(name, weight)| (name.as_str(), weight.clone())).collect();
    let card = derived_card(&Derived {
        library: "transformers",
        base: Some(base),
        tag: "task-arithmetic",
        title: &output.file_name().map_or_else(String::new, |n| n.to_string_lossy().into()),
        summary: "A base with the changes of several adapters added, each times its weight (Ilharco \
                  et al., 2023, arXiv 2212.04089).",
        facts: &facts,
    });
    let paths: Vec<PathBuf> = adapters.iter().map(|(path, _)| path.clone()).collect();
    let card = with_origins(&card, &paths, Outputs::Moved);
    let all: Vec<&Tuned<'_>> = tuned.iter().map(|(tuned, _)| tuned).collect();
    write_weights(&all, model.spec(), beside, Dtype::F32, &card, output, |weight| {
        let base = weights.values(&weight.name)?;
        let mut sum = base.clone();
        for (tuned, factor) in &tuned {
            if tuned.changes.of_weight(&weight.name).is_empty() {
                continue;
            }
            let factor = *factor as f32;
            for ((sum, tuned), base) in sum.iter_mut().zip(merged(tuned, weight)?).zip(&base) {
                *sum += factor * (tuned - base);
            }
        }
        Ok(sum)
    })
}
