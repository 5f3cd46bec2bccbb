//! OFT: the inputs of each chosen weight are rotated in blocks.

use std::sync::Arc;

use retune_core::change::Scope;
use retune_core::kernels::linear_frozen;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::method::{Card, Working};
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::options;
use tensor::Tensor;

use crate::checks;
use crate::frame::{self, Built, Context, Facts, Formula, Held, Slot, Target, View, WeightMethod};
use crate::linear_algebra::{cayley, cayley_series, rotate_blocks, skew};
use crate::registry::{self, Plugin};

options! {
    /// Rotates blocks of each targeted weight's inputs.
    pub struct OftOptions("oft") {
        /// Width of a block; 0 where `blocks` says how many there are.
        block_size: usize = 32, in 0..=4096;
        /// Number of blocks; 0 where `block_size` says how wide they are.
        blocks: usize = 0, in 0..=65536;
        /// Uses one rotation for all blocks of a weight.
        block_share: bool = false;
        /// Approximates the rotation by a short series; else it is exact.
        use_cayley_neumann: bool = true;
        /// Terms of the series.
        num_cayley_neumann_terms: usize = 5, in 1..=32;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<OftOptions>();

impl WeightMethod for OftOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "oft",
            summary: "Trains orthogonal rotations of blocks of each targeted weight's inputs.",
            source: "Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023, arXiv 2306.07280",
            usual_learning_rates: (1e-5, 1e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "OFT",
        keys: &[
            ("block_size", "oft_block_size"),
            ("blocks", "r"),
            ("block_share", "block_share"),
            ("use_cayley_neumann", "use_cayley_neumann"),
            ("num_cayley_neumann_terms", "num_cayley_neumann_terms"),
        ],
        fixed: &[("bias", "\"none\""), ("coft", "false")],
        written: &[
            ("eps", "6e-05"),
            ("module_dropout", "0.0"),
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "block_size = 4",
            "block_size = 0\nblocks = 2\nblock_share = true\nuse_cayley_neumann = false",
            "block_size = 8\nnum_cayley_neumann_terms = 2",
        ],
    };

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let size = self.size(target, context)?;
        let count = if self.block_share { 1 } else { target.columns / size };
        Ok(vec![Slot::zeros("oft_R.weight", [count, size * (size - 1) / 2])])
    }

    fn working(&self, targets: &[Target]) -> Working {
        // Inputs in blocks, which the gradient of a rotation needs.
        Working { values_per_token: frame::distinct_inputs(targets), ..Working::default() }
    }

    fn build(
        &self,
        target: &Target,
        context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let terms = self.use_cayley_neumann.then_some(self.num_cayley_neumann_terms);
        Ok(Built::new(Oft { size: self.size(target, context)?, terms }))
    }
}

impl OftOptions {
    fn size(&self, target: &Target, context: &Context<'_>) -> Result<usize> {
        // PEFT takes the nearest divisor; a recipe is told which ones there are.
        let adjusts = context.original.is_some();
        let columns = target.columns;
        let wrong = |found: String| Error::Setting {
            setting: "method.oft.block_size".to_owned(),
            what: "either the width or the number of blocks counts".to_owned(),
            expected: "one of `block_size` and `blocks` above 0, the other 0".to_owned(),
            found,
            help: "set `blocks = 0`, or `block_size = 0`".to_owned(),
        };
        let size = match (self.block_size, self.blocks) {
            (0, blocks) if blocks > 0 && adjusts => columns / nearest_divisor(columns, blocks),
            (size, 0) if size > 0 && adjusts => nearest_divisor(columns, size),
            (0, blocks) if blocks > 0 => {
                checks::divides("oft.blocks", target, blocks, target.columns)?;
                target.columns / blocks
            }
            (size, 0) if size > 0 => {
                checks::divides("oft.block_size", target, size, target.columns)?;
                size
            }
            (size, blocks) => {
                return Err(wrong(format!("block_size = {size}, blocks = {blocks}")));
            }
        };
        if size < 2 {
            return Err(Error::Setting {
                setting: "method.oft.block_size".to_owned(),
                what: format!("blocks of {} have nothing to rotate", target.module),
                expected: "blocks of at least 2 inputs".to_owned(),
                found: size.to_string(),
                help: "raise `block_size`, or lower `blocks`".to_owned(),
            });
        }
        Ok(size)
    }
}

/// Returns the divisor of `width` nearest to `wanted`, the lower of two.
fn nearest_divisor(width: usize, wanted: usize) -> usize {
    let divides = |number: &usize| width.is_multiple_of(*number);
    let below = (1..=wanted.min(width)).rev().find(divides).unwrap_or(1);
    let above = (wanted..=width).find(divides).unwrap_or(width);
    if wanted >= width || wanted - below > above - wanted { above } else { below }
}

#[derive(Debug)]
struct Oft {
    size: usize,
    /// Terms of the series, or nothing where the rotation is exact.
    terms: Option<usize>,
}

impl Oft {
    /// Returns the rotations, `[blocks or 1, size, size]`.
    fn rotations(&self, tensors: &View<'_>) -> Tensor<3> {
        let q = skew(tensors.get::<2>(0), self.size);
        match self.terms {
            Some(terms) => cayley_series(q, terms),
            None => cayley(q),
        }
    }
}

impl Formula for Oft {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let rotations = self.rotations(tensors).swap_dims(1, 2);
        rotate_blocks(base, rotations)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        held: &Held,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let x = rotate_blocks(x.clone(), self.rotations(&held.view(scope)));
        Some(linear_frozen(x, base, bias.cloned()))
    }
}
