//! LocFT-BF: facts are edited by plain tuning of one place, over all edits again and again.

use retune_core::change::Changes;
use retune_core::method::{Card, Method, MethodPlan, Promises, StepView};
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, Role, WeightSpec};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, choice, options};
use serde_json::Value;

use crate::adapter::PREFIX;
use crate::registry::{self, Plugin};
use crate::sparse;

choice! {
    /// Which part of the layer is edited.
    pub enum Place {
        /// The narrowing projection of the feed-forward network.
        Down = "down",
        /// The widening projection, and the gate where there is one.
        Up = "up",
        /// The output projection of attention.
        AttentionOutput = "attention-output",
        /// Everything in the layer.
        Layer = "layer",
    }
}

options! {
    /// Trains one matrix or one layer on many edits, breadth first.
    pub struct LocftOptions("locft-bf") {
        /// The edited layer, counted from 0; by default two thirds of the way up.
        layer: Option<usize> = None, in 0..=1_000_000;
        /// Which part of it is edited.
        place: Place = Place::Down;
        /// A batch whose loss is below this moves nothing.
        skip_below: f64 = 0.01, in 0.0..=1e3;
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "locft-bf",
    summary: "Edits facts by tuning one matrix on all edits in mini-batches, epoch after epoch.",
    source: "Fine-tuning Done Right in Model Editing, 2025, arXiv 2509.22072",
    usual_learning_rates: (5e-5, 2e-3),
    options: registry::specs::<LocftOptions>,
};

/// Localised breadth-first fine-tuning.
#[derive(Debug, Clone, Default)]
pub struct Locft {
    /// Where, and when to stop.
    pub options: LocftOptions,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(Locft { options: LocftOptions::read(reader) }),
    adapter: Some(("LOCFT_BF", |config| {
        Ok(Box::new(Locft { options: sparse::saved_options(config)? }))
    })),
};

impl Locft {
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<(String, &'a WeightSpec)>> {
        let layer = self.options.layer.unwrap_or(spec.num_layers * 2 / 3);
        if layer >= spec.num_layers {
            return Err(Error::Setting {
                setting: "method.locft-bf.layer".to_owned(),
                what: "no such layer".to_owned(),
                expected: format!("0 to {}", spec.num_layers.saturating_sub(1)),
                found: layer.to_string(),
                help: "layers are counted from 0".to_owned(),
            });
        }
        let is_meant = |weight: &&WeightSpec| {
            weight.layer == Some(layer)
                && match self.options.place {
                    Place::Down => weight.is_linear() && weight.role == Role::Down,
                    Place::Up => weight.is_linear() && matches!(weight.role, Role::Up | Role::Gate),
                    Place::AttentionOutput => {
                        weight.is_linear() && weight.role == Role::AttentionOutput
                    }
                    Place::Layer => true,
                }
        };
        let mut chosen: Vec<(String, &WeightSpec)> = spec
            .weights
            .iter()
            .filter(is_meant)
            .map(|weight| (format!("{PREFIX}{}", weight.name), weight))
            .collect();
        if chosen.is_empty() {
            return Err(Error::NoTarget {
                target: format!("{:?}", self.options.place),
                kind: "weight of the layer",
                nearest: "layer".to_owned(),
                help: "set `place` to \"layer\"".to_owned(),
            });
        }
        chosen.extend(sparse::heads(spec, &[])?);
        Ok(chosen)
    }
}

impl Method for Locft {
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
        // The one matrix is held as plain numbers whatever form the base has.
        Promises::default()
    }

    fn examples(&self) -> &'static [&'static str] {
        &["", "place = \"up\"\nlayer = 0", "place = \"attention-output\"", "place = \"layer\""]
    }

    fn weighs_rows_alike(&self) -> bool {
        true
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let chosen = self.chosen(spec)?;
        let places: Vec<&str> = chosen.iter().map(|(_, weight)| weight.name.as_str()).collect();
        let notes = vec![format!("edited: {}", places.join(", "))];
        Ok(MethodPlan { parameters: sparse::plan_heads(&chosen), notes })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        _seed: Seed,
    ) -> Result<Changes> {
        let spec = weights.spec().clone();
        let mut changes = Changes::default();
        sparse::attach_heads(&self.chosen(&spec)?, weights, parameters, &mut changes)?;
        let ids: Vec<_> = parameters.iter().map(|(id, _)| id).collect();
        for id in ids {
            parameters.get_mut(id).decays = false;
        }
        Ok(changes)
    }

    fn on_gradients(&mut self, step: &mut StepView<'_>) -> Result<()> {
        if step.loss < self.options.skip_below {
            step.gradients.iter_mut().for_each(|gradient| *gradient = None);
        }
        Ok(())
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        Some(sparse::config("LOCFT_BF", &self.options.write(), spec).into())
    }
}
