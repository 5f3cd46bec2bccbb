//! Half-reset: a random half of a tuned model's matrices goes back to the base's.
//!
//! Source: the pilot study of Hui et al., *HFT: Half Fine-Tuning for Large Language Models*, 2024,
//! arXiv 2404.18466. The half is the one that [`Hft`] with the same options freezes.

use std::path::Path;

use retune_core::change::Changes;
use retune_core::method::Method;
use retune_core::model::Tuned;
use retune_core::parameters::Parameters;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_files::Dtype;
use retune_methods::hft::Hft;
use retune_options::Choice;

use crate::card::{Derived, derived_card};
use crate::error::Result;
use crate::export::{Beside, write_weights};
use crate::extract::check_same;
use crate::open::Opened;

/// Names the weights that half fine-tuning leaves as they are.
///
/// # Errors
/// If the options cannot be met, or weights of a layer belong to no category.
pub fn frozen<'a>(half: &Hft, spec: &'a ModelSpec) -> Result<Vec<&'a WeightSpec>> {
    let plan = half.plan(spec)?;
    let trains = |name: &str| plan.parameters.iter().any(|p| p.trains && p.place == name);
    Ok(spec.weights.iter().filter(|weight| !trains(&weight.name)).collect())
}

/// What went back.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct HalfReset {
    /// Names of the weights that are the base's again.
    pub weights: Vec<String>,
    /// Share of the model's values they have.
    pub share: f64,
}

/// Writes a tuned model as a Hugging Face folder in F32, with the base's values in the half that
/// `half` would have frozen.
///
/// # Errors
/// If the two are not of one architecture and size, [`frozen`] refuses, or the disk is full.
/// # Cost
/// One weight is held at a time.
pub fn half_reset(
    tuned: &Opened,
    (base, base_name): (&Opened, &str),
    half: &Hft,
    beside: &Beside,
    output: &Path,
) -> Result<HalfReset> {
    check_same(tuned, base)?;
    let model = tuned.model();
    let spec = model.spec();
    let back = frozen(half, spec)?;
    let count = back.iter().map(|weight| weight.count()).sum::<usize>();
    let share = count as f64 / spec.count() as f64;
    let weights: Vec<String> = back.iter().map(|weight| weight.name.clone()).collect();
    let facts = [
        ("ratio", half.options.ratio.to_string()),
        ("level", half.options.level.name().to_owned()),
        ("seed", half.options.seed.to_string()),
        ("stage", half.options.stage.to_string()),
        ("values of the base", format!("{:.2} %", 100.0 * share)),
        ("weights of the base", weights.join(", ")),
    ];
    let card = derived_card(&Derived {
        library: "transformers",
        base: Some(base_name),
        tag: "hft",
        title: &output.file_name().map_or_else(String::new, |n| n.to_string_lossy().into()),
        summary: "A tuned model of whose matrices a random half went back to the base's (Hui et al., \
                  2024, arXiv 2404.18466).",
        facts: &facts,
    });
    let (changes, parameters) = (Changes::default(), Parameters::new(tuned.weights.device()));
    let as_is =
        Tuned { model, weights: &tuned.weights, changes: &changes, parameters: &parameters };
    write_weights(&[&as_is], spec, beside, Dtype::F32, &card, output, |weight| {
        let from = if weights.contains(&weight.name) { base } else { tuned };
        from.weights.values(&weight.name)
    })?;
    Ok(HalfReset { weights, share })
}
