//! SAID and DID: a whole network tuned along a few random directions.

use std::sync::Arc;

use retune_core::change::{Changes, Scope, WeightChange};
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::kernels::{Fastfood, fastfood, linear};
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter, Working};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::{Kind, ModelSpec, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, options};
use serde_json::Value;
use tensor::{Tensor, TensorData};

use crate::registry::{self, Plugin};
use crate::sparse;

options! {
    /// Trains all targeted weights along a few random directions.
    pub struct SaidOptions("said") {
        /// Values that train in all.
        dimension: usize = 1000, in 1..=10_000_000, also "intrinsic_dim";
        /// Gives each weight a scale of its own, paid for out of the dimension; without it this is DID.
        structure_aware: bool = true;
        /// Targeted modules: suffixes, one regular expression, or all-linear.
        targets: Vec<String> = vec!["all-linear".to_owned()];
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new();
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Moves the biases of targeted modules too.
        biases: bool = false;
        /// Seed of the directions; they are made again from it wherever the result is used.
        seed: u64 = 0;
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "said",
    summary: "Trains every targeted weight along a few random directions shared by all of them.",
    source: "Aghajanyan, Zettlemoyer and Gupta, Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning, 2020, arXiv 2012.13255",
    usual_learning_rates: (1e-3, 1e-1),
    options: registry::specs::<SaidOptions>,
};

/// Structure-aware intrinsic dimension, and the direct one without its scales.
#[derive(Debug, Clone, Default)]
pub struct Said {
    /// Dimension and targets.
    pub options: SaidOptions,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(Said { options: SaidOptions::read(reader) }),
    adapter: Some(("SAID", |config| {
        Ok(Box::new(Said { options: sparse::saved_options(config)? }))
    })),
};

const DIRECTIONS: &str = "base_model.model.said_directions";
const SCALES: &str = "base_model.model.said_scales";

/// `W + λ · P v` of one weight.
#[derive(Debug)]
struct Along {
    directions: ParameterId,
    /// The list of scales, and this weight's place in it.
    scale: Option<(ParameterId, usize)>,
    map: Arc<Fastfood>,
}

impl WeightChange for Along {
    fn parameters(&self) -> Vec<ParameterId> {
        [Some(self.directions), self.scale.map(|(id, _)| id)].into_iter().flatten().collect()
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let shape = base.dims();
        let count = scope.parameters().get(self.directions).count();
        let mut directions = scope.tensor::<1>(self.directions, [count]);
        if let Some((scales, place)) = self.scale {
            let all = scope.parameters().get(scales).count();
            // Before the map: what it makes of them, as large as the weight, need not be kept then.
            directions = directions * scope.tensor::<1>(scales, [all]).narrow(0, place, 1);
        }
        base + fastfood(directions, &self.map).reshape(shape)
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

impl Said {
    /// Returns the weights, the number of shared directions and that of scales.
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<(Vec<&'a WeightSpec>, usize, usize)> {
        let o = &self.options;
        let targets = Targets {
            names: o.targets.clone(),
            exclude: o.exclude.clone(),
            layers: o.layers.clone(),
        };
        let mut chosen = targets.select(spec, Among::Linears, "method.said.targets")?;
        if o.biases {
            let of_chosen = |bias: &&WeightSpec| {
                bias.kind == Kind::Bias && chosen.iter().any(|w| w.module() == bias.module())
            };
            let biases: Vec<&WeightSpec> = spec.weights.iter().filter(of_chosen).collect();
            chosen.extend(biases);
        }
        let targeted = chosen.iter().map(|weight| weight.count()).sum();
        sparse::check_budget("method.said.dimension", o.dimension, targeted)?;
        let scales = if o.structure_aware { chosen.len() } else { 0 };
        if o.dimension <= scales {
            return Err(Error::Setting {
                setting: "method.said.dimension".to_owned(),
                what: "the scales alone take all of the dimension".to_owned(),
                expected: format!("more than {scales}, one scale per targeted weight"),
                found: o.dimension.to_string(),
                help: "raise it, or set `structure_aware` to false".to_owned(),
            });
        }
        Ok((chosen, o.dimension - scales, scales))
    }
}

impl Method for Said {
    fn options(&self) -> Table {
        self.options.write()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        CARD
    }

    fn examples(&self) -> &'static [&'static str] {
        &["dimension = 60", "dimension = 20\nstructure_aware = false\nbiases = true"]
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let (chosen, directions, scales) = self.chosen(spec)?;
        let planned = |name: &str, count: usize| PlannedParameter {
            name: name.to_owned(),
            shape: vec![count],
            place: "all targets".to_owned(),
            trains: true,
        };
        let mut parameters = vec![planned(DIRECTIONS, directions)];
        if scales > 0 {
            parameters.push(planned(SCALES, scales));
        }
        parameters.extend(sparse::plan_heads(&sparse::heads(spec, &chosen)?));
        let held: usize = chosen.iter().map(|weight| 8 * weight.count().next_power_of_two()).sum();
        let notes = vec![format!("the directions take {} MiB while they are in use", held >> 20)];
        Ok(MethodPlan { parameters, notes })
    }

    fn working(&self, spec: &ModelSpec) -> Working {
        let (chosen, ..) = self.chosen(spec).unwrap_or_default();
        // The map, and the changed weight.
        let bytes =
            |weight: &&WeightSpec| 8 * weight.count().next_power_of_two() + 4 * weight.count();
        let bytes: usize = chosen.iter().map(bytes).sum();
        Working { bytes: bytes as u64, ..Working::default() }
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        _seed: Seed,
    ) -> Result<Changes> {
        let spec = weights.spec().clone();
        let (chosen, count, scales) = self.chosen(&spec)?;
        let mut changes = Changes::default();
        let directions = parameters.add(DIRECTIONS, &[count], vec![0.0; count]);
        let scales = (scales > 0).then(|| parameters.add(SCALES, &[scales], vec![1.0; scales]));
        for id in [Some(directions), scales].into_iter().flatten() {
            parameters.get_mut(id).decays = false;
        }
        for (place, weight) in chosen.iter().enumerate() {
            // By name, so that a file holds whatever else is targeted.
            let mut random = Seed(self.options.seed).stream(&weight.name, &[]);
            let map = Arc::new(Fastfood::new(count, weight.count(), || random.bits()));
            let scale = scales.map(|id| (id, place));
            changes.change_weight(&weight.name, Along { directions, scale, map });
        }
        let heads = sparse::heads(&spec, &chosen)?;
        sparse::attach_heads(&heads, weights, parameters, &mut changes)?;
        Ok(changes)
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        Some(sparse::config("SAID", &self.options.write(), spec).into())
    }
}
