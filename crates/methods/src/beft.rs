//! BEFT: a bias per output, and nothing else.

use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::spec::{ModelSpec, Role};
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::options;
use tensor::Tensor;

use crate::frame::{self, Built, Context, Facts, Formula, Slot, Target, View, WeightMethod};
use crate::registry::{self, Plugin};

options! {
    /// Adds a bias to the output of each targeted layer.
    pub struct BeftOptions("beft") {}
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<BeftOptions>();

impl WeightMethod for BeftOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "beft",
            summary: "Trains a bias on the output of each targeted layer.",
            source: "BEFT: Bias-Efficient Fine-Tuning of Language Models, 2025, arXiv 2509.15974",
            usual_learning_rates: (1e-4, 1e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "BEFT",
        keys: &[],
        fixed: &[],
        written: &[("init_weights", "true")],
        among: Among::Linears,
        targets: &[],
        examples: &[""],
    };

    fn default_targets(&self, spec: &ModelSpec) -> Vec<String> {
        let roles = [Role::Value, Role::QueryKeyValue];
        let linears = spec.linears().filter(|weight| roles.contains(&weight.role));
        linears.map(|weight| weight.module().to_owned()).collect()
    }

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        if target.role == Role::Head && !target.has_bias {
            return Err(Error::Setting {
                setting: "method.beft.targets".to_owned(),
                what: "the output head has no bias".to_owned(),
                expected: "layers inside the blocks".to_owned(),
                found: target.module.clone(),
                help: "leave it out with `exclude`".to_owned(),
            });
        }
        Ok(vec![Slot::zeros("beft_bias", [1, target.rows])])
    }

    fn build(
        &self,
        _target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        Ok(Built { weight: None, bias: Some(Box::new(Beft)), computed: Vec::new() })
    }
}

#[derive(Debug)]
struct Beft;

impl Formula for Beft {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        base + tensors.get::<2>(0).transpose()
    }
}
