//! BOFT: the inputs of each chosen weight are rotated by a product of butterfly factors.

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
use tensor::Int;
use tensor::{Tensor, TensorData};

use crate::checks;
use crate::frame::{self, Built, Context, Facts, Formula, Held, Slot, Target, View, WeightMethod};
use crate::linear_algebra::{cayley, rotate_blocks};
use crate::registry::{self, Plugin};

options! {
    /// Rotates each targeted weight's inputs by butterfly factors and scales its outputs.
    pub struct BoftOptions("boft") {
        /// Width of a block; 0 where `block_num` says how many there are.
        block_size: usize = 4, in 0..=4096;
        /// Number of blocks; 0 where `block_size` says how wide they are.
        block_num: usize = 0, in 0..=65536;
        /// Number of butterfly factors; each doubles how far a rotation reaches.
        n_butterfly_factor: usize = 1, in 1..=16;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<BoftOptions>();

impl WeightMethod for BoftOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "boft",
            summary: "Trains butterfly-factorised rotations of each targeted weight's inputs and scales of its outputs.",
            source: "Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, 2023, arXiv 2311.06243",
            usual_learning_rates: (1e-5, 1e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "BOFT",
        keys: &[
            ("block_size", "boft_block_size"),
            ("block_num", "boft_block_num"),
            ("n_butterfly_factor", "boft_n_butterfly_factor"),
        ],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("boft_dropout", "0.0"),
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
            "block_size = 2\nn_butterfly_factor = 3",
            "block_size = 0\nblock_num = 2",
        ],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let (size, count) = self.blocks(target)?;
        Ok(vec![
            Slot::zeros("boft_R", [self.n_butterfly_factor, count, size, size]),
            Slot::constant("boft_s", [target.rows, 1], 1.0),
        ])
    }

    fn working(&self, targets: &[Target]) -> Working {
        // Each target's input in its own order.
        let inputs: usize = targets.iter().map(|target| target.columns).sum();
        Working { values_per_token: inputs as u64, ..Working::default() }
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let (size, count) = self.blocks(target)?;
        let factors = self.n_butterfly_factor;
        let order = |factor: usize| match factors {
            1 => (0..target.columns).collect(),
            _ => butterfly(target.columns, count >> factor, size / 2),
        };
        Ok(Built::new(Boft { orders: (0..factors).map(order).collect() }))
    }
}

impl BoftOptions {
    /// Returns width and number of the blocks.
    fn blocks(&self, target: &Target) -> Result<(usize, usize)> {
        let wrong = |what: String, expected: String, found: String| Error::Setting {
            setting: "method.boft.block_size".to_owned(),
            what,
            expected,
            found,
            help: "change `block_size`, `block_num` or `n_butterfly_factor`".to_owned(),
        };
        let (size, count) = match (self.block_size, self.block_num) {
            (0, count) if count > 0 => {
                checks::divides("boft.block_num", target, count, target.columns)?;
                (target.columns / count, count)
            }
            (size, 0) if size > 0 => {
                checks::divides("boft.block_size", target, size, target.columns)?;
                (size, target.columns / size)
            }
            (size, count) => {
                return Err(wrong(
                    "either the width or the number of blocks counts".to_owned(),
                    "one of `block_size` and `block_num` above 0, the other 0".to_owned(),
                    format!("block_size = {size}, block_num = {count}"),
                ));
            }
        };
        let reach = 1 << (self.n_butterfly_factor - 1);
        if self.n_butterfly_factor > 1
            && (!size.is_multiple_of(2) || !count.is_multiple_of(2) || !count.is_multiple_of(reach))
        {
            return Err(wrong(
                format!("{} cannot have {} factors", target.module, self.n_butterfly_factor),
                format!("an even width, and a number of blocks that {reach} and 2 divide"),
                format!("{count} blocks of width {size}"),
            ));
        }
        Ok((size, count))
    }
}

/// Returns the order a butterfly factor takes inputs in: within each of `groups` groups, the runs of
/// `run` inputs at even places come first.
fn butterfly(width: usize, groups: usize, run: usize) -> Vec<usize> {
    let group = width / groups.max(1);
    let runs = group / run.max(1);
    let order = (0..runs).step_by(2).chain((1..runs).step_by(2));
    let inside: Vec<usize> = order.flat_map(|at| at * run..(at + 1) * run).collect();
    (0..groups).flat_map(|at| inside.iter().map(move |i| at * group + i)).collect()
}

#[derive(Debug)]
struct Boft {
    /// For each factor, from which input each place of its blocks is taken.
    orders: Vec<Vec<usize>>,
}

impl Boft {
    /// Returns the blocks of each factor, `[count, size, size]`.
    fn factors(tensors: &View<'_>) -> Vec<Tensor<3>> {
        let r = tensors.get::<4>(0);
        let [factors, count, size, _] = r.dims();
        let r: Tensor<3> = r.reshape([factors * count, size, size]);
        let q = (r.clone() - r.swap_dims(1, 2)).mul_scalar(0.5);
        cayley(q).chunk(factors, 0)
    }

    /// Computes `x · P · B · Pᵀ`, where B is block-diagonal.
    fn turn(x: Tensor<2>, order: &[usize], blocks: Tensor<3>) -> Tensor<2> {
        let mut inverse = vec![0; order.len()];
        order.iter().enumerate().for_each(|(place, from)| inverse[*from] = place);
        let device = x.device().inner();
        let pick = |x: Tensor<2>, places: &[usize]| {
            let places: Vec<i32> = places.iter().map(|place| *place as i32).collect();
            let count = places.len();
            let index = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device);
            x.select(1, index)
        };
        pick(rotate_blocks(pick(x, &inverse), blocks), order)
    }
}

impl Formula for Boft {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        // (M·Wᵀ)ᵀ = W·Mᵀ with M = Mₙ⋯M₁.
        let factors = Self::factors(tensors).into_iter().zip(&self.orders);
        let turned = factors.fold(base, |weight, (blocks, order)| {
            Self::turn(weight, order, blocks.swap_dims(1, 2))
        });
        turned * tensors.get::<2>(1)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        held: &Held,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let view = held.view(scope);
        let factors = Self::factors(&view).into_iter().zip(&self.orders).rev();
        let x = factors.fold(x.clone(), |x, (blocks, order)| Self::turn(x, order, blocks));
        let y = linear_frozen(x, base, None) * view.get::<2>(1).transpose();
        Some(match bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_by_hand() {
        assert_eq!(butterfly(8, 2, 2), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(butterfly(8, 1, 2), [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(butterfly(8, 1, 1), [0, 2, 4, 6, 1, 3, 5, 7]);
    }
}
