//! DEFT: a subspace of each chosen weight is removed and another injected.

use retune_core::Result;
use retune_core::method::{Card, Promises};
use retune_core::parameters::to_vec;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::{choice, options};
use tensor::activation;
use tensor::{Tensor, TensorData};

use crate::frame::{
    self, Built, Context, Facts, Formula, Slot, Target, Values, View, WeightMethod,
};
use crate::linear_algebra::orthonormal;
use crate::registry::{self, Plugin};

choice! {
    /// How the projector is made of P.
    pub enum Decomposition {
        /// P·relu(P)ᵀ.
        Relu = "relu",
        /// Q·Qᵀ with the orthonormal factor of P.
        Qr = "qr",
    }
}

options! {
    /// Computes W + P·(R − relu(P)ᵀ·W), or the same with an orthonormal P.
    pub struct DeftOptions("deft") {
        /// Width of the subspace.
        rank: usize = 8, in 1..=65536;
        /// How the projector is made of P.
        decomposition: Decomposition = Decomposition::Relu;
        /// Removes the subspace and injects nothing (PaRa).
        para: bool = false;
        /// The injected part is scaled by alpha / rank; by 1 where it is missing.
        alpha: Option<f64>, in 1e-9..=1e6;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<DeftOptions>();

impl WeightMethod for DeftOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "deft",
            summary: "Trains which subspace of each targeted weight is removed, and what is injected in its place.",
            source: "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, NeurIPS 2025",
            usual_learning_rates: (1e-5, 1e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "DEFT",
        keys: &[
            ("rank", "r"),
            ("decomposition", "decomposition_method"),
            ("para", "para"),
            ("alpha", "alpha"),
        ],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("init_scale", "1.0"),
            ("deft_dropout", "0.0"),
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 2",
            "rank = 3\ndecomposition = \"qr\"\nalpha = 6.0",
            "rank = 2\npara = true",
        ],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let rank = self.rank.min(target.rows);
        let mut slots = vec![Slot::computed("deft_P", [target.rows, rank])];
        if !self.para {
            slots.push(Slot::computed("deft_R", [rank, target.columns]));
        }
        Ok(slots)
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        weights: &Weights,
        random: &mut Random,
    ) -> Result<Built> {
        let [rows, columns] = target.shape();
        let rank = self.rank.min(rows);
        let scale = self.alpha.map_or(1.0, |alpha| alpha / rank as f64);
        let deft = Deft { decomposition: self.decomposition, para: self.para, scale };
        let mut p = vec![0.0; rows * rank];
        random.fill_normal(&mut p, 0.02);
        if self.para {
            return Ok(Built::new(deft).computed(vec![Values::Floats(p)]));
        }
        // R begins as what is removed, so that the first step starts from the base.
        let device = weights.device();
        let tensor = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values, shape), device)
        };
        let base = tensor(weights.values(&target.name)?, [rows, columns]);
        let (_, right) = deft.project(tensor(p.clone(), [rows, rank]));
        let removed = right.transpose().matmul(base).div_scalar(scale);
        Ok(Built::new(deft).computed(vec![Values::Floats(p), Values::Floats(to_vec(removed))]))
    }

    fn promises(&self) -> Promises {
        // The kink of relu lies where entries of P begin, near zero.
        let is_smooth = self.decomposition == Decomposition::Qr;
        Promises { starts_at_base: !self.para, exact_gradients: is_smooth, ..Promises::default() }
    }
}

#[derive(Debug)]
struct Deft {
    decomposition: Decomposition,
    para: bool,
    scale: f64,
}

impl Deft {
    /// Returns the two factors of the projector, `[rows, rank]` each.
    fn project(&self, p: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        match self.decomposition {
            Decomposition::Relu => (p.clone(), activation::relu(p)),
            Decomposition::Qr => {
                let q = orthonormal(p);
                (q.clone(), q)
            }
        }
    }
}

impl Formula for Deft {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let (left, right) = self.project(tensors.get(0));
        let removed = right.transpose().matmul(base.clone());
        let change = if self.para {
            removed.neg()
        } else {
            tensors.get::<2>(1).mul_scalar(self.scale) - removed
        };
        base + left.matmul(change)
    }
}
