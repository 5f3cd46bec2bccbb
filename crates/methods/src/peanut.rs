//! PEANuT: a small network over each chosen weight computes its change.

use retune_core::Result;
use retune_core::method::{Card, Promises};
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::{choice, options};
use tensor::Tensor;
use tensor::activation;

use crate::frame::{self, Built, Context, Facts, Formula, Slot, Target, View, WeightMethod};
use crate::registry::{self, Plugin};

choice! {
    /// An activation.
    pub enum Activation {
        /// max(x, 0).
        Relu = "relu",
        /// x·Φ(x).
        Gelu = "gelu",
        /// x·σ(x).
        Silu = "silu",
        /// The hyperbolic tangent.
        Tanh = "tanh",
        /// The logistic function.
        Sigmoid = "sigmoid",
    }
}

options! {
    /// Adds the output of a small network whose input is the weight itself.
    pub struct PeanutOptions("peanut") {
        /// Width of the network.
        rank: usize = 32, in 1..=65536;
        /// Hidden layers on each side of the network's middle.
        depth: usize = 0, in 0..=64;
        /// The network's activation.
        activation: Activation = Activation::Relu;
        /// Factor on the network's output.
        scaling: f64 = 1.0, in 0.0..=1e6;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<PeanutOptions>();

impl WeightMethod for PeanutOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "peanut",
            summary: "Trains a small network that computes each targeted weight's change from the weight.",
            source: "Zhong et al., PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers, 2024, arXiv 2410.01870",
            usual_learning_rates: (1e-4, 5e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "PEANUT",
        keys: &[
            ("rank", "r"),
            ("depth", "depth"),
            ("activation", "act_fn"),
            ("scaling", "scaling"),
        ],
        fixed: &[],
        written: &[
            ("init_weights", "true"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["rank = 4", "rank = 3\ndepth = 2\nactivation = \"silu\""],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let (rank, rows) = (self.rank, target.rows);
        let mut slots = vec![Slot::kaiming("peanut_A.weight", [rank, rows])];
        for side in ["peanut_encoders", "peanut_decoders"] {
            for layer in 0..self.depth {
                slots.push(Slot::kaiming(format!("{side}.{layer}.weight"), [rank, rank]));
            }
        }
        slots.push(Slot::zeros("peanut_B.weight", [rows, rank]));
        Ok(slots)
    }

    fn build(
        &self,
        _target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let activation = self.activation;
        Ok(Built::new(Peanut { depth: self.depth, activation, scaling: self.scaling }))
    }

    fn promises(&self) -> Promises {
        // The kink of relu lies among the weights, which are spread around zero.
        let is_smooth = self.activation != Activation::Relu;
        Promises { exact_gradients: is_smooth, ..Promises::default() }
    }
}

#[derive(Debug)]
struct Peanut {
    depth: usize,
    activation: Activation,
    scaling: f64,
}

impl Peanut {
    fn activate(&self, x: Tensor<2>) -> Tensor<2> {
        match self.activation {
            Activation::Relu => activation::relu(x),
            Activation::Gelu => activation::gelu(x),
            Activation::Silu => activation::silu(x),
            Activation::Tanh => activation::tanh(x),
            Activation::Sigmoid => activation::sigmoid(x),
        }
    }
}

impl Formula for Peanut {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let layer = |x: Tensor<2>, place: usize| x.matmul(tensors.get::<2>(place).transpose());
        let mut x = self.activate(layer(base.clone().transpose(), 0));
        let mut residuals = Vec::new();
        for encoder in 1..=self.depth {
            residuals.push(x.clone());
            x = self.activate(layer(x, encoder));
        }
        for (decoder, residual) in residuals.into_iter().rev().enumerate() {
            x = self.activate(layer(x, 1 + self.depth + decoder)) + residual;
        }
        base + layer(x, 1 + 2 * self.depth).transpose().mul_scalar(self.scaling)
    }
}
