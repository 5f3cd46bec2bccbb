//! RoAd: the outputs of each chosen layer are rotated in pairs.

use std::sync::Arc;

use retune_core::change::Scope;
use retune_core::kernels::linear_frozen;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{choice, options};
use tensor::Tensor;

use crate::frame::{self, Built, Context, Facts, Formula, Held, Slot, Target, View, WeightMethod};
use crate::registry::{self, Plugin};

choice! {
    /// How many angles and lengths a pair of outputs has.
    pub enum Variant {
        /// One angle and one length.
        Road1 = "road_1",
        /// One of each per output.
        Road2 = "road_2",
        /// Two of each per output.
        Road4 = "road_4",
    }
}

options! {
    /// Rotates and scales pairs of outputs.
    pub struct RoadOptions("road") {
        /// How many angles and lengths a pair has.
        variant: Variant = Variant::Road1;
        /// Outputs per group; output i is paired with i + group_size / 2.
        group_size: usize = 64, in 2..=65536;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<RoadOptions>();

impl WeightMethod for RoadOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "road",
            summary: "Trains a rotation and scaling of pairs of each targeted layer's outputs.",
            source: "Liao and Monz, 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability, 2024, arXiv 2409.00119",
            usual_learning_rates: (1e-3, 1e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "ROAD",
        keys: &[("variant", "variant"), ("group_size", "group_size")],
        fixed: &[],
        written: &[("init_weights", "true")],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "group_size = 8",
            "group_size = 4\nvariant = \"road_2\"",
            "group_size = 2\nvariant = \"road_4\"",
        ],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let group = self.group_size;
        if !group.is_multiple_of(2) || !target.rows.is_multiple_of(group) {
            return Err(Error::Setting {
                setting: "method.road.group_size".to_owned(),
                what: format!("{} outputs of {} cannot be grouped", target.rows, target.module),
                expected: format!("an even divisor of {}", target.rows),
                found: group.to_string(),
                help: "lower `group_size`, or leave this module out with `exclude`".to_owned(),
            });
        }
        let count = match self.variant {
            Variant::Road1 => target.rows / 2,
            Variant::Road2 => target.rows,
            Variant::Road4 => 2 * target.rows,
        };
        Ok(vec![Slot::zeros("road_theta", [count]), Slot::constant("road_alpha", [count], 1.0)])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let road = Road { variant: self.variant, group: self.group_size };
        let built = Built::new(road);
        Ok(if target.has_bias { built.with_bias(road) } else { built })
    }
}

#[derive(Debug, Clone, Copy)]
struct Road {
    variant: Variant,
    group: usize,
}

impl Road {
    /// Returns the factors of an output itself and of its turned partner, `[rows, 1]` each.
    fn factors(self, tensors: &View<'_>) -> (Tensor<2>, Tensor<2>) {
        let (theta, alpha) = (tensors.get::<1>(0), tensors.get::<1>(1));
        let half = self.group / 2;
        // Per group: first half and second half of the outputs, for the first and second factor.
        let part = |x: Tensor<1>, which: usize| -> Tensor<2> {
            let count = x.dims()[0];
            match self.variant {
                Variant::Road1 => {
                    let x: Tensor<3> = x.reshape([count / half, 1, half]);
                    x.repeat_dim(1, 2).reshape([2 * count, 1])
                }
                Variant::Road2 => x.reshape([count, 1]),
                Variant::Road4 => {
                    let x: Tensor<3> = x.reshape([count / (2 * self.group), 2, self.group]);
                    x.narrow(1, which, 1).reshape([count / 2, 1])
                }
            }
        };
        (
            part(alpha.clone(), 0) * part(theta.clone(), 0).cos(),
            part(alpha, 1) * part(theta, 1).sin(),
        )
    }

    /// Rotates the rows of `x`, `[rows, any]`.
    fn rotate(self, x: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let [rows, columns] = x.dims();
        let half = self.group / 2;
        let halves: Tensor<4> = x.clone().reshape([rows / self.group, 2, half, columns]);
        let (first, second) = (halves.clone().narrow(1, 0, 1), halves.narrow(1, 1, 1));
        let turned = Tensor::cat(vec![second.neg(), first], 1).reshape([rows, columns]);
        let (own, partner) = self.factors(tensors);
        x * own + turned * partner
    }
}

impl Formula for Road {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        self.rotate(base, tensors)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        held: &Held,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let y = linear_frozen(x.clone(), base, None).transpose();
        let y = self.rotate(y, &held.view(scope)).transpose();
        // The bias came through its own change and is rotated already.
        Some(match bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        })
    }
}
