//! GLoRA: scales and shifts of weights and biases, each a low-rank product, a vector or a number.

use std::sync::Arc;

use retune_core::Result;
use retune_core::kernels::linear_frozen;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::method::{Card, Working};
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::{choice, options};
use tensor::Tensor;

use crate::checks;
use crate::frame::{self, Built, Context, Facts, Formula, Slot, Target, View, WeightMethod};
use crate::registry::{self, Plugin};

choice! {
    /// The form of a scale or shift of a weight.
    pub enum WeightForm {
        /// A low-rank product.
        Lora = "lora",
        /// A number per output.
        Vector = "vector",
        /// One number.
        Constant = "constant",
        /// Nothing.
        None = "none",
    }
}

choice! {
    /// The form of the vector a weight is multiplied with for the bias.
    pub enum PromptForm {
        /// A low-rank product.
        Lora = "lora",
        /// A number per input.
        Vector = "vector",
        /// Nothing.
        None = "none",
    }
}

choice! {
    /// The form of a scale or shift of a bias.
    pub enum BiasForm {
        /// One number.
        Constant = "constant",
        /// A number per output.
        Vector = "vector",
        /// Nothing.
        None = "none",
    }
}

options! {
    /// Computes W + W∘A + B and b + b∘D + E + W·C.
    pub struct GloraOptions("glora") {
        /// Rank of the low-rank parts.
        rank: usize = 8, in 1..=65536;
        /// The form of the weight's scale A and shift B.
        weight_form: WeightForm = WeightForm::Lora;
        /// The form of C, which feeds the weight into the bias; only where a layer has one.
        prompt_form: PromptForm = PromptForm::Lora;
        /// The form of the bias's scale D and shift E; only where a layer has one.
        bias_form: BiasForm = BiasForm::Constant;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<GloraOptions>();

impl WeightMethod for GloraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "glora",
            summary: "Trains scales and shifts of each targeted weight and its bias.",
            source: "Chavan et al., One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, 2023, arXiv 2306.07967",
            usual_learning_rates: (1e-4, 5e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "GLORA",
        keys: &[
            ("rank", "r"),
            ("weight_form", "config_A_B"),
            ("prompt_form", "config_C"),
            ("bias_form", "config_D_E"),
        ],
        fixed: &[("bias", "\"none\"")],
        written: &[("init_weights", "true")],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 2",
            "weight_form = \"vector\"\nprompt_form = \"vector\"\nbias_form = \"vector\"",
            "weight_form = \"constant\"\nprompt_form = \"none\"\nbias_form = \"none\"",
        ],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let (rank, [rows, columns]) = (self.rank, target.shape());
        if self.weight_form == WeightForm::Lora {
            checks::rank("glora", rank, target)?;
        }
        let mut slots = Vec::new();
        for part in ["glora_A", "glora_B"] {
            match self.weight_form {
                WeightForm::Lora => {
                    slots.push(Slot::zeros(format!("{part}.Xd"), [rows, rank]));
                    slots.push(Slot::kaiming(format!("{part}.Xu"), [rank, columns]));
                }
                WeightForm::Vector => slots.push(Slot::zeros(format!("{part}.X"), [rows, 1])),
                WeightForm::Constant => slots.push(Slot::zeros(format!("{part}.X"), [1])),
                WeightForm::None => {
                    slots.push(Slot::zeros(format!("{part}.zeros"), [rows, columns]).buffer());
                }
            }
        }
        match self.prompt_form {
            PromptForm::Lora if target.has_bias => {
                slots.push(Slot::zeros("glora_C.Xd", [columns, rank]));
                slots.push(Slot::kaiming("glora_C.Xu", [rank, 1]));
            }
            PromptForm::Vector if target.has_bias => {
                slots.push(Slot::zeros("glora_C.X", [columns, 1]));
            }
            _ => slots.push(Slot::zeros("glora_C.zeros", [columns, 1]).buffer()),
        }
        for part in ["glora_D", "glora_E"] {
            slots.push(match self.bias_form {
                BiasForm::Vector if target.has_bias => Slot::zeros(format!("{part}.X"), [rows]),
                BiasForm::Constant if target.has_bias => Slot::zeros(format!("{part}.X"), [1]),
                _ => Slot::zeros(format!("{part}.zeros"), [rows]).buffer(),
            });
        }
        Ok(slots)
    }

    fn working(&self, targets: &[Target]) -> Working {
        // The changed weight.
        frame::kept_matrices(1, targets)
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let built = Built::new(GloraWeight { form: self.weight_form });
        if !target.has_bias {
            return Ok(built);
        }
        let first = if self.weight_form == WeightForm::Lora { 4 } else { 2 };
        let base = weights.matrix(&target.name)?;
        Ok(built.with_bias(GloraBias {
            first,
            is_split: self.prompt_form == PromptForm::Lora,
            base,
        }))
    }
}

#[derive(Debug)]
struct GloraWeight {
    form: WeightForm,
}

impl Formula for GloraWeight {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let part = |which: usize| match self.form {
            WeightForm::Lora => tensors.get::<2>(2 * which).matmul(tensors.get::<2>(2 * which + 1)),
            WeightForm::Constant => tensors.get::<1>(which).unsqueeze(),
            WeightForm::Vector | WeightForm::None => tensors.get::<2>(which),
        };
        base * part(0).add_scalar(1.0) + part(1)
    }
}

#[derive(Debug)]
struct GloraBias {
    /// The place of C's first tensor.
    first: usize,
    is_split: bool,
    base: Arc<PackedMatrix>,
}

impl Formula for GloraBias {
    fn weight(&self, bias: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let c = tensors.get::<2>(self.first);
        let (c, next) = if self.is_split {
            (c.matmul(tensors.get::<2>(self.first + 1)), self.first + 2)
        } else {
            (c, self.first + 1)
        };
        let (d, e) = (tensors.get::<1>(next), tensors.get::<1>(next + 1));
        let prompted = linear_frozen(c.transpose(), &self.base, None).transpose();
        let column = |x: Tensor<1>| x.unsqueeze_dim::<2>(1);
        bias * column(d).add_scalar(1.0) + column(e) + prompted
    }
}
