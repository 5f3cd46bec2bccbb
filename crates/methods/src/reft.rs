//! LoReFT: a low-rank subspace of the states is edited at chosen places of the text.

use retune_core::change::{Changes, Scope, SiteView, StateChange};
use retune_core::kernels::linear;
use retune_core::method::{Card, Promises, StepView};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::site::Site;
use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use retune_options::{choice, options};
use tensor::{Tensor, TensorData};

use crate::adapter::PREFIX;
use crate::registry;
use crate::state::{Form, Made, Slot, Start, StateMethod, kaiming, layers};

choice! {
    /// Which tokens are edited.
    pub enum Positions {
        /// All of them.
        All = "all",
        /// The first ones of each text.
        First = "first",
    }
}

options! {
    /// Trains an edit of a low-rank subspace of what leaves chosen blocks.
    pub struct Reft("reft") {
        /// Rank of the subspace.
        rank: usize = 4, in 1..=65536;
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Which tokens are edited.
        positions: Positions = Positions::All;
        /// How many of them, where only the first are.
        count: usize = 4, in 1..=1048576;
        /// Probability of dropping an edit's number while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
        /// Modules of the model that train whole and are saved beside.
        modules_to_save: Vec<String> = Vec::new();
    }
}

crate::state_plugin!(Reft);

const ROTATION: &str = "rotate_layer";

fn name(layer: usize, part: &str) -> String {
    format!("{PREFIX}reft.layers.{layer}.{part}")
}

impl StateMethod for Reft {
    const CARD: Card = Card {
        name: "reft",
        summary: "Trains an edit of a low-rank subspace of the states between blocks (LoReFT).",
        source: "Wu et al., ReFT: Representation Finetuning for Language Models, 2024, arXiv 2404.03592",
        usual_learning_rates: (2e-4, 9e-3),
        options: registry::specs::<Self>,
    };
    const PEFT_TYPE: &'static str = "REFT";

    fn promises(&self) -> Promises {
        Promises { starts_at_base: false, ..Promises::default() }
    }

    fn examples() -> &'static [&'static str] {
        &["rank = 3", "rank = 2\nlayers = [1]\npositions = 'first'\ncount = 3"]
    }

    fn slots(&self, spec: &ModelSpec, _form: Form) -> Result<Vec<Slot>> {
        let width = spec.width;
        if self.rank > width {
            return Err(Error::Setting {
                setting: "method.reft.rank".to_owned(),
                what: "the subspace is wider than the states".to_owned(),
                expected: format!("at most {width}"),
                found: self.rank.to_string(),
                help: "lower `rank`".to_owned(),
            });
        }
        let mut slots = Vec::new();
        for layer in layers(spec, &self.layers, "method.reft.layers")? {
            let place = Site::LayerOutput(layer).to_string();
            let slot = |part: &str, shape: &[usize], start| {
                Slot::new(name(layer, part), shape, &place, start)
            };
            slots.extend([
                slot(ROTATION, &[self.rank, width], Start::Normal((width as f64).powf(-0.5))),
                slot("learned_source.weight", &[self.rank, width], kaiming(width)),
                slot("learned_source.bias", &[self.rank], kaiming(width)),
            ]);
        }
        Ok(slots)
    }

    fn build(&self, spec: &ModelSpec, _form: Form, made: &Made<'_>) -> Result<Changes> {
        let mut changes = Changes::default();
        for layer in layers(spec, &self.layers, "method.reft.layers")? {
            let id = |part: &str| made.id(&name(layer, part));
            changes.change_state(
                Site::LayerOutput(layer),
                Edit {
                    rotation: id(ROTATION),
                    weight: id("learned_source.weight"),
                    bias: id("learned_source.bias"),
                    options: self.clone(),
                    width: spec.width,
                },
            );
        }
        Ok(changes)
    }

    fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    fn on_step(&self, step: &mut StepView<'_>) {
        // Only directions count; rows of length 1 keep the meaning of a learning rate.
        orthonormalise_all(step.parameters);
    }
}

fn orthonormalise_all(parameters: &mut Parameters) {
    let rotations: Vec<_> = parameters
        .iter()
        .filter(|(_, p)| p.name.ends_with(ROTATION))
        .map(|(id, p)| (id, p.shape[1]))
        .collect();
    for (id, width) in rotations {
        parameters.update(id, |values| orthonormalise(values, width));
    }
}

/// Makes rows orthonormal by Gram and Schmidt, each against those before it, twice for accuracy.
fn orthonormalise(values: &mut [f32], width: usize) {
    let rows = values.len() / width;
    for row in 0..rows {
        for _ in 0..2 {
            let (before, own) = values.split_at_mut(row * width);
            let own = &mut own[..width];
            for other in before.chunks_exact(width) {
                let along: f64 =
                    own.iter().zip(other).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                own.iter_mut().zip(other).for_each(|(a, b)| *a -= (along * f64::from(*b)) as f32);
            }
            let length = own.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            if length > 1e-30 {
                for value in own {
                    *value = (f64::from(*value) / length) as f32;
                }
            }
        }
    }
}

/// `h + Rᵀ (W h + b - R h)` with orthonormal rows of `R`.
#[derive(Debug)]
struct Edit {
    rotation: ParameterId,
    weight: ParameterId,
    bias: ParameterId,
    options: Reft,
    width: usize,
}

impl Edit {
    /// Returns orthonormal rows that span what the parameter's rows span.
    ///
    /// # Shapes
    /// - returns: `[rank, width]`
    fn rows(&self, scope: &Scope<'_>) -> Tensor<2> {
        let free: Tensor<2> = scope.tensor(self.rotation, [self.options.rank, self.width]);
        let mut rows: Vec<Tensor<2>> = Vec::new();
        for place in 0..self.options.rank {
            let mut row = free.clone().narrow(0, place, 1);
            // Twice is enough (Kahan), whatever the rows are.
            for _ in 0..2 {
                if !rows.is_empty() {
                    let before = Tensor::cat(rows.clone(), 0);
                    let along = row.clone().matmul(before.clone().transpose());
                    row = row - along.matmul(before);
                }
                let length = row.clone().powi_scalar(2).sum_dim(1).sqrt().clamp_min(1e-12);
                row = row / length;
            }
            rows.push(row);
        }
        Tensor::cat(rows, 0)
    }

    /// Returns 1 at tokens that are edited, or nothing where all are.
    fn mask(&self, at: &SiteView<'_>, scope: &Scope<'_>) -> Option<Tensor<2>> {
        if self.options.positions == Positions::All {
            return None;
        }
        let mark = |row: usize| f32::from(u8::from(at.place(row) < self.options.count));
        let marks: Vec<f32> = (0..at.spans.tokens()).map(mark).collect();
        let count = marks.len();
        let data = TensorData::new(marks, [count, 1]);
        Some(Tensor::from_data(data, scope.parameters().device()))
    }
}

impl StateChange for Edit {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.rotation, self.weight, self.bias]
    }

    fn reads_documents(&self) -> bool {
        self.options.positions == Positions::First
    }

    fn apply(&self, h: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let rows = self.rows(scope);
        let weight = scope.tensor(self.weight, [self.options.rank, self.width]);
        let bias = scope.tensor(self.bias, [self.options.rank]);
        let source = linear(h.clone(), weight, Some(bias));
        let change = source - linear(h.clone(), rows.clone(), None);
        let change = scope.dropout(change.matmul(rows), self.options.dropout);
        match self.mask(at, scope) {
            Some(mask) => h + change * mask,
            None => h + change,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_orthonormal_and_span_the_same() {
        let mut values = vec![3.0, 4.0, 0.0, 1.0, 2.0, 2.0];
        orthonormalise(&mut values, 3);
        let expected = [0.6, 0.8, 0.0];
        assert!(values[..3].iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6));
        // (1, 2, 2) less 2.2 (0.6, 0.8, 0) is (-0.32, 0.24, 2), of length √4.16.
        let length = 4.16_f32.sqrt();
        let expected = [-0.32 / length, 0.24 / length, 2.0 / length];
        assert!(values[3..].iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{values:?}");
    }
}
