//! PSOFT: the leading singular directions of each chosen weight are rotated and scaled.

use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use serde_json::{Map, Value, json};
use tensor::Tensor;

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, Values, View, WeightMethod,
};
use crate::linear_algebra::{cayley, cayley_series, identity, skew};
use crate::registry::{self, Plugin};
use crate::svd::Svd;

options! {
    /// Adds U·S·(R − I)·Vᵀ, with R a rotation between two trained scales.
    pub struct PsoftOptions("psoft") {
        /// Leading directions that are rotated.
        rank: usize = 32, in 1..=4096;
        /// Only rotates; else R is any matrix.
        orthogonal: bool = true;
        /// Scales the inputs of the rotation.
        scale_inputs: bool = true;
        /// Scales the outputs of the rotation.
        scale_outputs: bool = true;
        /// Approximates the rotation by a short series; else it is exact.
        use_cayley_neumann: bool = false;
        /// Terms of the series.
        num_cayley_neumann_terms: usize = 5, in 1..=32;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<PsoftOptions>();

impl WeightMethod for PsoftOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "psoft",
            summary: "Trains a rotation and scales of each targeted weight's leading singular directions.",
            source: "PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, 2025, arXiv 2505.11235",
            usual_learning_rates: (1e-4, 5e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "PSOFT",
        keys: &[
            ("rank", "r"),
            ("orthogonal", "psoft_orth"),
            ("scale_inputs", "psoft_mag_a"),
            ("scale_outputs", "psoft_mag_b"),
            ("use_cayley_neumann", "use_cayley_neumann"),
            ("num_cayley_neumann_terms", "num_cayley_neumann_terms"),
            ("dropout", "psoft_dropout"),
        ],
        fixed: &[("cayley_neumann_eps", "null"), ("psoft_svd", "\"full\"")],
        written: &[
            ("ab_svd_init", "\"psoft_init\""),
            ("psoft_svd_lowrank_niter", "10"),
            ("random_seed", "0"),
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 4",
            "rank = 3\nuse_cayley_neumann = true\nscale_inputs = false",
            "rank = 3\northogonal = false\nscale_outputs = false",
        ],
    };

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let (rank, [rows, columns]) = (checks::rank("psoft", self.rank, target)?, target.shape());
        let mut slots = vec![if self.orthogonal {
            Slot::zeros("psoft_R.weight", [rank * (rank - 1) / 2])
        } else {
            Slot::computed("psoft_R.weight", [rank, rank])
        }];
        if self.scale_inputs {
            slots.push(Slot::constant("psoft_R.vector_a", [rank], 1.0));
        }
        if self.scale_outputs {
            slots.push(Slot::constant("psoft_R.vector_b", [rank], 1.0));
        }
        let kept = |slot: Slot| slot.buffer().saved_if(context.is_complete);
        slots.push(kept(Slot::computed("psoft_A", [rank, columns])));
        slots.push(kept(Slot::computed("psoft_B", [rows, rank])));
        Ok(slots)
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let ([rows, columns], rank) = (target.shape(), self.rank);
        let svd = Svd::new(&weights.values(&target.name)?, rows, columns);
        let scaled = svd
            .u
            .chunks_exact(svd.k)
            .flat_map(|row| row[..rank].iter().zip(&svd.s).map(|(u, s)| (u * s) as f32))
            .collect();
        let mut computed = Vec::new();
        if !self.orthogonal {
            let unit = |i: usize| if i.is_multiple_of(rank + 1) { 1.0 } else { 0.0 };
            computed.push(Values::Floats((0..rank * rank).map(unit).collect()));
        }
        computed.push(Values::Floats(svd.right(0, rank)));
        computed.push(Values::Floats(scaled));
        let terms = self.use_cayley_neumann.then_some(self.num_cayley_neumann_terms);
        let psoft = Psoft {
            rank,
            orthogonal: self.orthogonal,
            scales: [self.scale_inputs, self.scale_outputs],
            terms,
            dropout: self.dropout,
        };
        Ok(Built::added(psoft).computed(computed))
    }

    fn notes(&self, context: &Context<'_>) -> Vec<String> {
        if context.is_complete {
            return Vec::new();
        }
        vec![
            "PEFT's PSOFT files do not hold the singular vectors; their signs, which another \
             decomposition chooses otherwise, decide what the adapter does"
                .to_owned(),
        ]
    }

    fn finish_config(&self, config: &mut Map<String, Value>, _targets: &[Target]) {
        config.insert("psoft_alpha".to_owned(), json!(self.rank));
    }
}

#[derive(Debug)]
struct Psoft {
    rank: usize,
    orthogonal: bool,
    /// Whether inputs and outputs are scaled.
    scales: [bool; 2],
    terms: Option<usize>,
    dropout: f64,
}

impl Psoft {
    /// Returns R, `[rank, rank]`.
    fn rotation(&self, tensors: &View<'_>) -> Tensor<2> {
        let mut next = 1;
        let mut r = if self.orthogonal {
            let q = skew(tensors.get::<1>(0).unsqueeze_dim::<2>(0), self.rank);
            let r = match self.terms {
                Some(terms) => cayley_series(q, terms),
                // (I + Q)(I − Q)⁻¹ is the transform of −Q.
                None => cayley(q.neg()),
            };
            r.squeeze_dim::<2>(0)
        } else {
            tensors.get::<2>(0)
        };
        if self.scales[0] {
            r = r * tensors.get::<1>(next).unsqueeze_dim::<2>(0);
            next += 1;
        }
        if self.scales[1] {
            r = r * tensors.get::<1>(next).unsqueeze_dim::<2>(1);
        }
        r
    }
}

impl Addition for Psoft {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let r = self.rotation(tensors);
        let first = tensors.len() - 2;
        let turned = r - identity(self.rank, tensors.scope().parameters().device());
        let a = turned.matmul(tensors.get::<2>(first));
        Delta::LowRank { a, b: tensors.get(first + 1), scale: 1.0 }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}
