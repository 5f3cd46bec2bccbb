//! AdaLoRA: a low-rank change in the form of a singular value decomposition.

use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use serde_json::{Map, Value, json};

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, View, WeightMethod,
};
use crate::peft_config;
use crate::registry::{self, Plugin};

options! {
    /// Adds B·diag(E)·A to each targeted weight.
    pub struct AdaloraOptions("adalora") {
        /// Rank of each change.
        rank: usize = 12, in 1..=65536;
        /// The change is scaled by alpha / rank.
        alpha: f64 = 8.0, in 0.0..=1e6;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<AdaloraOptions>();

/// Returns how many ranks of a module a pruned adapter kept; its list says so one by one.
fn kept(config: Option<&Value>, module: &str) -> Option<usize> {
    let pattern = config?.get("rank_pattern")?.as_object()?;
    let alive = |mask: &Value| match mask {
        Value::Array(mask) => mask.iter().filter(|kept| **kept == Value::Bool(true)).count(),
        number => number.as_u64().unwrap_or_default() as usize,
    };
    let matches = |key: &str| {
        let key =
            key.strip_prefix("base_model.model.").or(key.strip_prefix("model.")).unwrap_or(key);
        let key = key.strip_suffix(".lora_E").unwrap_or(key);
        module == key || module.strip_prefix("model.") == Some(key)
    };
    pattern.iter().find(|(key, _)| matches(key)).map(|(_, mask)| alive(mask))
}

impl WeightMethod for AdaloraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "adalora",
            summary: "Trains a low-rank change in the form of a singular value decomposition beside each targeted weight.",
            source: "Zhang et al., Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, arXiv 2303.10512",
            usual_learning_rates: (2e-4, 5e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "ADALORA",
        keys: &[("rank", "init_r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")],
        fixed: &[
            ("bias", "\"none\""),
            ("use_dora", "false"),
            ("lora_bias", "false"),
            ("trainable_token_indices", "null"),
        ],
        written: &[
            ("tinit", "0"),
            ("tfinal", "0"),
            ("deltaT", "1"),
            ("beta1", "0.85"),
            ("beta2", "0.85"),
            ("orth_reg_weight", "0.5"),
            ("total_step", "1"),
            ("rank_pattern", "null"),
            ("use_rslora", "false"),
            ("init_lora_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["rank = 3", "rank = 2\ndropout = 0.1"],
    };

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let [rows, columns] = target.shape();
        let rank = kept(context.original, &target.module).unwrap_or(self.rank);
        checks::rank("adalora", rank, target)?;
        Ok(vec![
            Slot::normal("lora_A", [rank, columns], 0.02),
            Slot::normal("lora_B", [rows, rank], 0.02),
            Slot::zeros("lora_E", [rank, 1]),
        ])
    }

    fn build(
        &self,
        target: &Target,
        context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let rank = kept(context.original, &target.module).unwrap_or(self.rank);
        let alpha = if self.alpha > 0.0 { self.alpha } else { self.rank as f64 };
        // PEFT keeps the divisor away from zero because pruning may leave no rank at all.
        let scale = alpha / (rank as f64 + 1e-5);
        Ok(Built::added(Adalora { scale, dropout: self.dropout }))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, _targets: &[Target]) {
        config.insert("r".to_owned(), json!(self.rank));
        config.insert("target_r".to_owned(), json!(self.rank));
    }

    fn read_config(&mut self, config: &Value) -> Result<()> {
        match config.get("rank_pattern") {
            None | Some(Value::Null | Value::Object(_)) => Ok(()),
            Some(_) => Err(peft_config::error("rank_pattern", config, "a table of lists")),
        }
    }
}

#[derive(Debug)]
struct Adalora {
    scale: f64,
    dropout: f64,
}

impl Addition for Adalora {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let a = tensors.get::<2>(0) * tensors.get::<2>(2);
        Delta::LowRank { a, b: tensors.get(1), scale: self.scale }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}
