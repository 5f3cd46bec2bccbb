//! R-AMT: weights are switched off, none is changed; gradients that disagree with the base's
//! predictions are dropped.

use std::sync::Arc;

use retune_core::change::{Changes, Scope, WeightChange};
use retune_core::kernels::linear;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::method::{
    Card, Method, MethodPlan, PlannedParameter, Promises, Reference, StepView,
};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, Role, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, options};
use serde_json::Value;
use tensor::{Tensor, TensorData};

use crate::adapter::PREFIX;
use crate::registry::{self, Plugin};
use crate::sparse;

options! {
    /// Learns which weights to switch off.
    pub struct RAmtOptions("r-amt", validate = RAmtOptions::check) {
        /// Targeted modules; empty means the projections of attention.
        targets: Vec<String> = Vec::new();
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new();
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Score each weight begins with.
        start: f64 = 1e-2, in -10.0..=10.0;
        /// A weight is on while its score is above this.
        threshold: f64 = 5e-3, in -10.0..=10.0;
        /// How strongly gradients that disagree with the base's predictions are dropped; 0 keeps them.
        drop: f64 = 0.3, in 0.0..=1.0;
        /// Weight of the length of each matrix of scores.
        norm_weight: f64 = 1e-4, in 0.0..=1.0;
        /// Temperature at which predictions are compared with the base's.
        temperature: f64 = 1.0, in 0.01..=100.0;
        /// Whether the head of a classifier trains beside; a new one has to.
        train_head: bool = true;
    }
}

impl RAmtOptions {
    fn check(&self, reader: &mut retune_options::Reader<'_>) {
        if self.threshold >= self.start {
            reader.error(
                "threshold",
                "every weight would be off at the start",
                "keep it below `start`",
            );
        }
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "r-amt",
    summary: "Switches single attention weights off; every weight that stays is the base's.",
    source: "Zheng, Wu, Bao, Yan and others, Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models, 2023, arXiv 2307.15049",
    usual_learning_rates: (3e-5, 5e-4),
    options: registry::specs::<RAmtOptions>,
};

/// Regularised attention mask tuning.
#[derive(Debug, Clone, Default)]
pub struct RAmt {
    /// Threshold and regularisation.
    pub options: RAmtOptions,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(RAmt { options: RAmtOptions::read(reader) }),
    adapter: Some(("R_AMT", |config| {
        Ok(Box::new(RAmt { options: sparse::saved_options(config)? }))
    })),
};

fn score_name(weight: &WeightSpec) -> String {
    format!("{PREFIX}{}.mask_scores", weight.module())
}

/// `W ⊙ 1[m > t]`, with the gradient of `W ⊙ m`.
#[derive(Debug)]
struct Mask {
    scores: ParameterId,
    threshold: f64,
}

impl WeightChange for Mask {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.scores]
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let scores = scope.tensor::<2>(self.scores, base.dims());
        let on = scores.clone().inner().greater_elem(self.threshold).float();
        let masked = base.clone() * on;
        if !scope.trains() {
            return masked;
        }
        // The second term is exactly zero, so that surviving weights keep their bits.
        let straight = base * scores;
        masked + (straight.clone() - straight.detach())
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let data = TensorData::new(base.to_f32(), [base.rows(), base.columns()]);
        let weight = Tensor::<2>::from_data(data, scope.parameters().device());
        Some(linear(x.clone(), self.materialize(weight, scope), bias.cloned()))
    }
}

/// Returns the probability that a gradient `a` of the task survives beside `b`, that of staying
/// with the base: 1 where they agree, less the more `b` outweighs an opposite `a`.
fn keep_probability(a: f32, b: f32) -> f32 {
    let sign = if a == 0.0 { 0.0 } else { a.signum() };
    0.5 * (sign * (a + b) / (a.abs() + b.abs() + 1e-8) + 1.0)
}

impl RAmt {
    fn heads<'a>(
        &self,
        spec: &'a ModelSpec,
        chosen: &[&WeightSpec],
    ) -> Result<Vec<(String, &'a WeightSpec)>> {
        if self.options.train_head { sparse::heads(spec, chosen) } else { Ok(Vec::new()) }
    }

    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<&'a WeightSpec>> {
        let o = &self.options;
        let names =
            if o.targets.is_empty() { vec!["all-linear".to_owned()] } else { o.targets.clone() };
        let targets = Targets { names, exclude: o.exclude.clone(), layers: o.layers.clone() };
        let mut chosen = targets.select(spec, Among::Linears, "method.r-amt.targets")?;
        if o.targets.is_empty() {
            chosen.retain(|weight| {
                use Role::{AttentionOutput, Key, Query, QueryKeyValue, Value};
                matches!(weight.role, Query | Key | Value | QueryKeyValue | AttentionOutput)
            });
        }
        if chosen.is_empty() {
            return Err(Error::NoTarget {
                target: "attention".to_owned(),
                kind: "linear layer",
                nearest: "none".to_owned(),
                help: "name the modules in `targets`".to_owned(),
            });
        }
        Ok(chosen)
    }
}

impl Method for RAmt {
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
        Promises { exact_gradients: false, ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &["", "targets = [\"all-linear\"]\ndrop = 1.0\nnorm_weight = 0.0", "drop = 0.0"]
    }

    fn reference(&self) -> Option<Reference> {
        (self.options.drop > 0.0).then_some(Reference { temperature: self.options.temperature })
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let chosen = self.chosen(spec)?;
        let planned = |weight: &&WeightSpec| PlannedParameter {
            name: score_name(weight),
            shape: weight.shape.clone(),
            place: weight.name.clone(),
            trains: true,
        };
        let mut parameters: Vec<PlannedParameter> = chosen.iter().map(planned).collect();
        parameters.extend(sparse::plan_heads(&self.heads(spec, &chosen)?));
        let gap = self.options.start - self.options.threshold;
        let notes = vec![format!("a weight is off once its score has moved by {gap:e}")];
        Ok(MethodPlan { parameters, notes })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        _seed: Seed,
    ) -> Result<Changes> {
        let spec = weights.spec().clone();
        let chosen = self.chosen(&spec)?;
        let mut changes = Changes::default();
        for weight in &chosen {
            let values = vec![self.options.start as f32; weight.count()];
            let scores = parameters.add(score_name(weight), &weight.shape, values);
            parameters.get_mut(scores).decays = false;
            let threshold = self.options.threshold;
            changes.change_weight(&weight.name, Mask { scores, threshold });
        }
        let heads = self.heads(&spec, &chosen)?;
        sparse::attach_heads(&heads, weights, parameters, &mut changes)?;
        Ok(changes)
    }

    fn on_gradients(&mut self, step: &mut StepView<'_>) -> Result<()> {
        let o = &self.options;
        let ids: Vec<ParameterId> = step
            .parameters
            .iter()
            .filter(|(_, p)| p.name.ends_with(".mask_scores"))
            .map(|(id, _)| id)
            .collect();
        for id in ids {
            let Some(gradient) = step.gradients[id.index()].as_mut() else { continue };
            if o.norm_weight > 0.0 {
                let scores = step.parameters.values(id);
                let length = scores.iter().map(|m| f64::from(*m).powi(2)).sum::<f64>().sqrt();
                let weight = (o.norm_weight / length.max(1e-12)) as f32;
                gradient.iter_mut().zip(&scores).for_each(|(g, m)| *g += weight * m);
            }
            let Some(Some(reference)) = step.reference_gradients.get(id.index()) else { continue };
            let mut random = step.seed.stream("r-amt", &[step.step, id.index() as u64]);
            let drop = o.drop as f32;
            for (a, b) in gradient.iter_mut().zip(reference) {
                let kept = f64::from(keep_probability(*a, *b)) > random.uniform();
                *a *= if kept { 1.0 } else { 1.0 - drop };
            }
        }
        Ok(())
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        Some(sparse::config("R_AMT", &self.options.write(), spec).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::step::StepParts;
    use tensor::Device;

    #[test]
    fn gradients_that_agree_survive() {
        for a in [0.5_f32, -2.0] {
            assert!((keep_probability(a, a) - 1.0).abs() < 1e-6);
            assert!((keep_probability(a, -a) - 0.5).abs() < 1e-6);
            assert!((keep_probability(a, -2.0 * a) - 1.0 / 3.0).abs() < 1e-6);
        }
    }

    #[test]
    fn on_average_a_gradient_is_kept_by_its_probability() {
        const COUNT: usize = 40_000;
        let options = RAmtOptions { drop: 0.3, norm_weight: 0.0, ..RAmtOptions::default() };
        let mut method = RAmt { options };
        let mut parameters = Parameters::new(&Device::flex());
        parameters.add("x.mask_scores", &[COUNT], vec![0.01; COUNT]);
        let mut parts = StepParts::new(&parameters);
        parts.gradients = vec![Some(vec![1.0; COUNT])];
        parts.reference_gradients = vec![Some(vec![-2.0; COUNT])];
        method.on_gradients(&mut parts.view(1, 2, &mut parameters)).unwrap();
        let used = parts.gradients[0].as_ref().unwrap();
        let mean: f32 = used.iter().sum::<f32>() / COUNT as f32;
        assert!((mean - (0.7 + 0.3 / 3.0)).abs() < 0.005, "{mean}");
        assert!(used.iter().all(|g| *g == 1.0 || (*g - 0.7).abs() < 1e-6));
    }

    #[test]
    fn survivors_keep_their_bits_and_the_gradient_goes_straight_through() {
        let mut parameters = Parameters::new(&Device::flex());
        let scores = parameters.add("m", &[1, 3], vec![0.01, 0.005, 0.02]);
        let mask = Mask { scores, threshold: 0.005 };
        let base = Tensor::<2>::from_floats([[0.1, -7.7, 3.3]], &Device::flex());
        let mode = retune_core::change::Mode::Train { seed: Seed(0), pass: 0 };
        let scope = Scope::new(&parameters, mode);
        let masked = mask.materialize(base, &scope);
        let found = retune_core::parameters::to_vec(masked.clone().inner());
        assert_eq!(found, [0.1, 0.0, 3.3]);
        let upstream = Tensor::<2>::from_floats([[1.0, 10.0, 100.0]], &Device::flex());
        let mut gradients = (masked * upstream).sum().backward();
        let found = parameters.take_gradient(scores, &mut gradients).unwrap();
        assert!((found[1] + 77.0).abs() < 1e-4 && (found[2] - 330.0).abs() < 1e-3, "{found:?}");
    }
}
