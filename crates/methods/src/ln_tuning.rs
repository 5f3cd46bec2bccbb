//! LN tuning: the gains of norms train, and nothing else.

use retune_core::Error;
use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::spec::{Kind, ModelSpec};
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use tensor::Tensor;

use crate::frame::{
    self, Built, Context, Facts, Formula, Slot, Target, Values, View, WeightMethod,
};
use crate::registry::{self, Plugin};

options! {
    /// Trains the norms.
    pub struct LnTuningOptions("ln_tuning") {}
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<LnTuningOptions>();

impl WeightMethod for LnTuningOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "ln_tuning",
            summary: "Trains the gains and biases of the model's norms.",
            source: "Zhao et al., Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, 2023, arXiv 2312.11420",
            usual_learning_rates: (1e-4, 5e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "LN_TUNING",
        keys: &[],
        fixed: &[],
        written: &[("exclude_modules", "null")],
        among: Among::Modules,
        targets: &[],
        examples: &[""],
    };

    fn default_targets(&self, spec: &ModelSpec) -> Vec<String> {
        let norms = spec.weights.iter().filter(|weight| weight.kind == Kind::Norm);
        norms.map(|weight| weight.module().to_owned()).collect()
    }

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        if target.kind != Kind::Norm {
            return Err(Error::Setting {
                setting: "method.ln_tuning.targets".to_owned(),
                what: format!("{} is not a norm", target.module),
                expected: "modules that normalise".to_owned(),
                found: target.module.clone(),
                help: "leave `targets` out to train every norm".to_owned(),
            });
        }
        let mut slots = vec![Slot::computed("ln_tuning_layers.weight", [target.rows])];
        if target.has_bias {
            slots.push(Slot::computed("ln_tuning_layers.bias", [target.rows]));
        }
        Ok(slots)
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let gain = Values::Floats(weights.values(&target.name)?);
        if !target.has_bias {
            return Ok(Built::new(Whole(0)).computed(vec![gain]));
        }
        let bias = Values::Floats(weights.values(&target.bias())?);
        Ok(Built::new(Whole(0)).with_bias(Whole(1)).computed(vec![gain, bias]))
    }
}

/// The trained vector in the place of the base's.
#[derive(Debug)]
struct Whole(usize);

impl Formula for Whole {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        tensors.get::<1>(self.0).reshape(base.dims())
    }

    fn replaces_base(&self) -> bool {
        true
    }
}
