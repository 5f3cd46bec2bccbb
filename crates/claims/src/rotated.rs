//! The ground of several proofs: a picture transformer that knows upright digits, and rotated ones.

use retune_core::random::Seed;

use crate::Result;
use crate::contest::Rows;
use crate::encoder::{Encoder, Sizes};
use crate::lab::{Lab, Pace};
use crate::mlp::Inputs;
use crate::pictures::{DIGITS, Pictures, SIDE};

/// Width of the transformer.
pub(crate) const WIDTH: usize = 32;

/// Rotated pictures to tune on.
pub(crate) const TRAIN: usize = 500;

/// Pictures the base learns from.
const UPRIGHT: usize = 900;

/// Rotated pictures that choose rates; the rest of 1797 is measured.
const VALIDATION: usize = 150;

/// Builds the transformer, its rows tokens, 8 a picture.
pub(crate) fn model(pictures: &Pictures, num_layers: usize) -> Encoder {
    let rows = Inputs::new(pictures.table(), SIDE);
    Encoder::of_rows(rows, SIDE, Sizes::of(WIDTH, num_layers).with_biases(), DIGITS)
}

/// Pretrains the transformer on upright digits, 30 passes.
///
/// # Errors
/// Those of training.
pub(crate) fn rotated(num_layers: usize, seed: Seed) -> Result<(Lab, Rows)> {
    let upright = Pictures::digits(seed);
    let count = upright.len();
    let turned = upright.rotated();
    let pictures = upright.and(turned);
    let mut lab = Lab::of_pictures(model(&pictures, num_layers), &pictures, seed);
    let known: Vec<usize> = (0..UPRIGHT).collect();
    lab.pretrain(&known, Pace::passes(30, UPRIGHT, 32, 2e-3), seed)?;
    let part = |from: usize, to: usize| (count + from..count + to).collect();
    let validation = UPRIGHT + TRAIN + VALIDATION;
    let rows = Rows {
        train: part(UPRIGHT, UPRIGHT + TRAIN),
        validation: part(UPRIGHT + TRAIN, validation),
        test: part(validation, count),
    };
    Ok((lab, rows))
}
