//! IA3: one factor per output of keys and values, one per input of the feed-forward network.

use std::cell::OnceCell;
use std::sync::Arc;

use retune_core::Result;
use retune_core::change::Scope;
use retune_core::kernels::linear_frozen;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::spec::{ModelSpec, Role};
use retune_core::targets::{Among, selects};
use retune_core::weights::Weights;
use retune_options::options;
use serde_json::{Map, Value, json};
use tensor::Tensor;

use crate::frame::{self, Built, Context, Facts, Formula, Held, Slot, Target, View, WeightMethod};
use crate::peft_config;
use crate::registry::{self, Plugin};

options! {
    /// Scales activations by learned factors.
    pub struct Ia3Options("ia3") {
        /// Targeted modules whose inputs are scaled instead of their outputs, matched as targets
        /// are; empty means the narrowing projections of feed-forward networks.
        feedforward: Vec<String> = Vec::new();
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<Ia3Options>();

impl Ia3Options {
    fn scales_inputs(&self, target: &Target, context: &Context<'_>) -> Result<bool> {
        if self.feedforward.is_empty() {
            // In a file an empty list means none; in a recipe it means those of the paper.
            return Ok(context.original.is_none() && target.role == Role::Down);
        }
        for name in &self.feedforward {
            if selects(name, &target.module, "method.ia3.feedforward")? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl WeightMethod for Ia3Options {
    const FACTS: Facts = Facts {
        card: Card {
            name: "ia3",
            summary: "Trains factors on the keys, the values and the inner states of feed-forward networks.",
            source: "Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022, arXiv 2205.05638",
            usual_learning_rates: (1e-3, 1e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "IA3",
        keys: &[],
        fixed: &[],
        written: &[
            ("init_ia3_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("exclude_modules", "null"),
        ],
        among: Among::Linears,
        targets: &[],
        examples: &["", "feedforward = [\".*_proj\"]\ntargets = [\"all-linear\"]"],
    };

    fn default_targets(&self, spec: &ModelSpec) -> Vec<String> {
        let roles = [Role::Key, Role::Value, Role::QueryKeyValue, Role::Down];
        let linears = spec.linears().filter(|weight| roles.contains(&weight.role));
        linears.map(|weight| weight.module().to_owned()).collect()
    }

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let shape = if self.scales_inputs(target, context)? {
            [1, target.columns]
        } else {
            [target.rows, 1]
        };
        Ok(vec![Slot::constant("ia3_l", shape, 1.0)])
    }

    fn build(
        &self,
        target: &Target,
        context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        if self.scales_inputs(target, context)? {
            return Ok(Built::new(Inputs));
        }
        let built = Built::new(Outputs);
        Ok(if target.has_bias { built.with_bias(Outputs) } else { built })
    }

    fn finish_config(&self, config: &mut Map<String, Value>, targets: &[Target]) {
        let once = OnceCell::new();
        let context =
            Context { targets, is_complete: true, original: None, once: &once, shared: &[] };
        let inputs = targets.iter().filter(|t| self.scales_inputs(t, &context).unwrap_or(false));
        let modules: Vec<&str> = inputs.map(|target| target.module.as_str()).collect();
        config.insert("feedforward_modules".to_owned(), json!(modules));
    }

    fn read_config(&mut self, config: &Value) -> Result<()> {
        self.feedforward = peft_config::names(config, "feedforward_modules")?;
        Ok(())
    }
}

#[derive(Debug)]
struct Outputs;

impl Formula for Outputs {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        base * tensors.get::<2>(0)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        held: &Held,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let y = linear_frozen(x.clone(), base, None) * held.view(scope).get::<2>(0).transpose();
        // The bias came through its own change and is scaled already.
        Some(match bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        })
    }
}

#[derive(Debug)]
struct Inputs;

impl Formula for Inputs {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        base * tensors.get::<2>(0)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        held: &Held,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let x = x.clone() * held.view(scope).get::<2>(0);
        Some(linear_frozen(x, base, bias.cloned()))
    }
}
