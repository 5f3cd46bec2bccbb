//! SaRA: the smallest weights are put to use; everything else stays.

use retune_core::change::Changes;
use retune_core::kernels::{matmul, matmul_nt};
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter, Promises, Seat, StepView};
use retune_core::parameters::{ParameterId, Parameters, to_vec};
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, above, options};
use serde_json::Value;
use tensor::{Tensor, TensorData};

use crate::registry::{self, Plugin};
use crate::sparse::{self, Meaning, SparseChange};

options! {
    /// Trains the weights of smallest size.
    pub struct SaraOptions("sara") {
        /// Trained weights as a share of those targeted.
        fraction: f64 = 0.1, in 0.0..=1.0;
        /// Trains what is smaller than this; given it, `fraction` is ignored.
        threshold: Option<f64> = None, in above(0.0);
        /// Targeted modules: suffixes, one regular expression, or all-linear.
        targets: Vec<String> = vec!["all-linear".to_owned()];
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new();
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Weight of the nuclear norm of one trained matrix per step, which keeps them of low rank.
        rank_weight: f64 = 5e-4, in 0.0..=1e3, also "lambda_rank";
        /// Matrices with a side of at most this are left out of that penalty.
        low_rank_min_dim: usize = 64, in 0..=1_000_000;
        /// Where in the run weights that have grown are frozen, as a fraction; 0 switches it off.
        switch: f64 = 0.5, in 0.0..=0.99, also "progressive_iter";
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "sara",
    summary: "Trains the weights of smallest size; those that have grown half-way are frozen again.",
    source: "Hu, Zhang, Yi, Huang, Wang and Ma, SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation, 2024, arXiv 2409.06633",
    usual_learning_rates: (1e-4, 1e-3),
    options: registry::specs::<SaraOptions>,
};

/// SaRA.
#[derive(Debug, Clone, Default)]
pub struct Sara {
    /// Threshold, targets and switch.
    pub options: SaraOptions,
    /// Read from a file: its entries need not be found again.
    loaded: bool,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(Sara { options: SaraOptions::read(reader), loaded: false }),
    adapter: Some(("SARA", |config| {
        Ok(Box::new(Sara { options: sparse::saved_options(config)?, loaded: true }))
    })),
};

const THRESHOLD: &str = "sara.threshold";

fn frozen_name(weight: &WeightSpec) -> String {
    sparse::name(weight).replace(".shira_weight", ".frozen.shira_weight")
}

impl Sara {
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<&'a WeightSpec>> {
        let o = &self.options;
        let targets = Targets {
            names: o.targets.clone(),
            exclude: o.exclude.clone(),
            layers: o.layers.clone(),
        };
        targets.select(spec, Among::Linears, "method.sara.targets")
    }

    fn budget(&self, chosen: &[&WeightSpec]) -> Result<usize> {
        let targeted: usize = chosen.iter().map(|weight| weight.count()).sum();
        if self.options.threshold.is_some() {
            return Ok(targeted);
        }
        let budget = (self.options.fraction * targeted as f64).round() as usize;
        sparse::check_budget("method.sara.fraction", budget, targeted)?;
        Ok(budget)
    }

    /// Returns the entries that train, per weight, and the size they stay below.
    fn masks(&self, chosen: &[&WeightSpec], weights: &Weights) -> Result<(Vec<Vec<u32>>, f32)> {
        let values = |place: usize| weights.values(&chosen[place].name);
        if let Some(threshold) = self.options.threshold {
            let threshold = threshold as f32;
            let mut masks = Vec::with_capacity(chosen.len());
            let mut smallest = f32::INFINITY;
            for place in 0..chosen.len() {
                let values = values(place)?;
                smallest = values.iter().fold(smallest, |least, v| least.min(v.abs()));
                let small = (0..).zip(&values).filter(|(_, v)| v.abs() < threshold);
                masks.push(small.map(|(index, _)| index).collect::<Vec<u32>>());
            }
            if masks.iter().all(Vec::is_empty) {
                return Err(Error::Setting {
                    setting: "method.sara.threshold".to_owned(),
                    what: "no targeted weight is that small".to_owned(),
                    expected: format!("more than {smallest:e}, the smallest weight"),
                    found: threshold.to_string(),
                    help: "raise it, or give a `fraction`".to_owned(),
                });
            }
            return Ok((masks, threshold));
        }
        let masks = sparse::largest(self.budget(chosen)?, chosen.len(), |place| {
            Ok(values(place)?.into_iter().map(sparse::smallness).collect())
        })?;
        let mut largest = 0.0_f32;
        for (place, mask) in masks.iter().enumerate() {
            let values = values(place)?;
            largest = mask.iter().fold(largest, |most, i| most.max(values[*i as usize].abs()));
        }
        // Still small is what is not larger than the largest of them was.
        Ok((masks, f32::from_bits(largest.to_bits() + 1)))
    }

    /// Freezes what has grown, and starts the optimiser anew for the rest.
    fn switch(view: &mut StepView<'_>) -> Result<()> {
        let Some(threshold) = view.parameters.find(THRESHOLD) else { return Ok(()) };
        let threshold = view.parameters.values(threshold)[0];
        let pairs: Vec<(ParameterId, ParameterId)> = pairs(view.parameters);
        let small = |v: &f32| v.abs() < threshold;
        // Where all have grown there is nothing to switch to.
        if !pairs.iter().any(|(id, _)| view.parameters.values(*id).iter().any(small)) {
            return Ok(());
        }
        for (trained, frozen) in pairs {
            let indices = view.parameters.indices(trained);
            let values = view.parameters.values(trained);
            let grown: Vec<usize> =
                (0..values.len()).filter(|place| !small(&values[*place])).collect();
            let seats = (0..values.len())
                .filter(|place| small(&values[*place]))
                .map(|place| (indices[place], Seat::Kept(place)))
                .collect();
            view.reseat(trained, seats)?;
            view.reset_state(trained);
            view.parameters.set_entries(
                frozen,
                grown.iter().map(|place| indices[*place]).collect(),
                grown.iter().map(|place| values[*place]).collect(),
            )?;
        }
        Ok(())
    }

    /// Adds the gradient of the nuclear norm of one matrix, drawn anew in each step.
    fn penalise_rank(&self, view: &mut StepView<'_>) {
        let wide = |id: &ParameterId| {
            let matrix = view.parameters.support(*id).map_or([0, 0], |support| support.matrix);
            matrix.into_iter().min() > Some(self.options.low_rank_min_dim)
        };
        let candidates: Vec<ParameterId> =
            pairs(view.parameters).into_iter().map(|(id, _)| id).filter(wide).collect();
        if candidates.is_empty() {
            return;
        }
        let drawn = view.seed.stream("sara", &[view.step]).below(candidates.len());
        let id = candidates[drawn];
        let Some(support) = view.parameters.support(id).cloned() else { return };
        let values = view.parameters.values(id);
        let [rows, columns] = support.matrix;
        let mut whole = vec![0.0; rows * columns];
        for (index, value) in support.indices.iter().zip(&values) {
            whole[*index as usize] = *value;
        }
        let matrix = Tensor::<2>::from_data(
            TensorData::new(whole, [rows, columns]),
            view.parameters.device(),
        );
        let Some(polar) = polar_factor(matrix) else { return };
        let polar = to_vec(polar);
        let weight = self.options.rank_weight as f32;
        let gradient =
            view.gradients[id.index()].get_or_insert_with(|| vec![0.0; support.indices.len()]);
        for (g, index) in gradient.iter_mut().zip(support.indices.iter()) {
            *g += weight * polar[*index as usize];
        }
    }
}

/// Returns the trained and the frozen entries of each weight.
fn pairs(parameters: &Parameters) -> Vec<(ParameterId, ParameterId)> {
    let sparse: Vec<ParameterId> = parameters
        .iter()
        .map(|(id, _)| id)
        .filter(|id| parameters.support(*id).is_some())
        .collect();
    sparse.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
}

/// Factors of `x`, `x³` and `x⁵` in a step that makes small singular values 3.4 times as large and
/// keeps those near 1 between 0.6 and 1.3.
const FIFTH_ORDER: [f64; 3] = [3.4445, -4.7750, 2.0315];

/// Returns `A · Bᵀ` of a matrix `A · diag(s) · Bᵀ`, a subgradient of its nuclear norm; nothing for a
/// matrix of zeros.
///
/// By Newton and Schulz's iteration, which needs products only. Steps of the fifth order come first:
/// they bring small singular values near 1 fastest, though never to it; those of the third order do
/// the rest. Singular values below 1e-5 of the matrix's length come out too small, as is right for
/// those that are zero.
fn polar_factor(matrix: Tensor<2>) -> Option<Tensor<2>> {
    let length = to_vec(matrix.clone().powi_scalar(2).sum().sqrt())[0];
    if length == 0.0 || !length.is_finite() {
        return None;
    }
    let [rows, columns] = matrix.dims();
    let tall = rows > columns;
    let mut x = if tall { matrix.transpose() } else { matrix }.div_scalar(length);
    for _ in 0..10 {
        let gram = matmul_nt(x.clone(), x.clone());
        let [first, third, fifth] = FIFTH_ORDER;
        let factor = gram.clone().mul_scalar(third) + matmul(gram.clone(), gram).mul_scalar(fifth);
        x = x.clone().mul_scalar(first) + matmul(factor, x);
    }
    for _ in 0..5 {
        let gram = matmul_nt(x.clone(), x.clone());
        x = x.clone().mul_scalar(1.5) - matmul(gram, x).mul_scalar(0.5);
    }
    Some(if tall { x.transpose() } else { x })
}

impl Method for Sara {
    fn options(&self) -> Table {
        self.options.write()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        CARD
    }

    fn promises(&self) -> Promises {
        Promises { quantized_base: false, ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &[
            "fraction = 0.2\nlow_rank_min_dim = 4\nrank_weight = 0.01",
            "threshold = 0.05\nswitch = 0.0",
        ]
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let chosen = self.chosen(spec)?;
        let budget = self.budget(&chosen)?;
        let mut parameters = Vec::new();
        let mut add = |name: String, shape: usize, place: &str, trains| {
            let place = place.to_owned();
            parameters.push(PlannedParameter { name, shape: vec![shape], place, trains });
        };
        add(THRESHOLD.to_owned(), 1, "all targets", false);
        for weight in &chosen {
            add(sparse::name(weight), 0, &weight.name, true);
            add(frozen_name(weight), 0, &weight.name, false);
        }
        parameters.push(PlannedParameter::pool("sara", budget));
        parameters.extend(sparse::plan_heads(&sparse::heads(spec, &chosen)?));
        let mut notes = Vec::new();
        if self.options.threshold.is_some() {
            notes
                .push("how many weights are below the threshold is seen when they are read".into());
        } else if self.options.fraction > 0.5 {
            notes.push(format!("{:.0} % is not sparse", 100.0 * self.options.fraction));
        }
        Ok(MethodPlan { parameters, notes })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        _seed: Seed,
    ) -> Result<Changes> {
        sparse::refuse_blocks(weights, "sara")?;
        let spec = weights.spec().clone();
        let chosen = self.chosen(&spec)?;
        let (masks, threshold) = if self.loaded {
            (vec![Vec::new(); chosen.len()], 0.0)
        } else {
            self.masks(&chosen, weights)?
        };
        let id = parameters.add_buffer(THRESHOLD, &[1], vec![threshold]);
        parameters.get_mut(id).saved = false;
        let mut changes = Changes::default();
        for (weight, mask) in chosen.iter().zip(masks) {
            let values = if mask.is_empty() { Vec::new() } else { weights.values(&weight.name)? };
            let values = mask.iter().map(|index| values[*index as usize]).collect();
            let trained =
                parameters.add_sparse(sparse::name(weight), weight.matrix(), mask, values);
            let frozen =
                parameters.add_sparse(frozen_name(weight), weight.matrix(), Vec::new(), Vec::new());
            parameters.set_trains(frozen, false);
            let change = SparseChange::new(trained, Meaning::Value).with_frozen(frozen);
            changes.change_weight(&weight.name, change);
        }
        let heads = sparse::heads(&spec, &chosen)?;
        sparse::attach_heads(&heads, weights, parameters, &mut changes)?;
        Ok(changes)
    }

    fn on_gradients(&mut self, step: &mut StepView<'_>) -> Result<()> {
        if self.options.rank_weight > 0.0 {
            self.penalise_rank(step);
        }
        Ok(())
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        let at = (self.options.switch * step.num_steps as f64).round() as u64;
        if at > 0 && step.step == at {
            Self::switch(step)?;
        }
        Ok(())
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        Some(sparse::config("SARA", &self.options.write(), spec).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::Device;

    fn polar(values: Vec<f32>, shape: [usize; 2]) -> Vec<f32> {
        let matrix = Tensor::<2>::from_data(TensorData::new(values, shape), &Device::flex());
        to_vec(polar_factor(matrix).unwrap())
    }

    #[test]
    fn the_polar_factor_has_the_signs_of_singular_values() {
        let found = polar(vec![3.0, 0.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0], [3, 3]);
        let expected = [1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0];
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{found:?}");
        let zeros = Tensor::<2>::zeros([2, 3], &Device::flex());
        assert!(polar_factor(zeros).is_none());
    }

    #[test]
    fn it_is_the_slope_of_the_nuclear_norm() {
        // Of a 2 x 2 matrix the nuclear norm is √(‖X‖² + 2 |det X|).
        let norm = |x: &[f64]| {
            let square: f64 = x.iter().map(|v| v * v).sum();
            (square + 2.0 * (x[0] * x[3] - x[1] * x[2]).abs()).sqrt()
        };
        let x = [0.7, -0.2, 0.4, 1.3];
        let found = polar(x.iter().map(|v| *v as f32).collect(), [2, 2]);
        for place in 0..4 {
            let at = |step: f64| {
                let mut moved = x;
                moved[place] += step;
                norm(&moved)
            };
            let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((slope - f64::from(found[place])).abs() < 1e-4, "{slope} {found:?}");
        }
        // A tall matrix is turned.
        let tall = polar(vec![0.0, 5.0, 0.0], [3, 1]);
        assert!((tall[1] - 1.0).abs() < 1e-4 && tall[0] == 0.0);
    }
}
