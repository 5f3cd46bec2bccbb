//! The ground of several proofs: a picture transformer that knows upright digits, and rotated ones.

use retune_core::random::Seed;

use crate::Result;
use crate::contest::Rows;
use crate::encoder::{Encoder, Sizes};
use crate::lab::{Lab, Pace};
use crate::pictures::Pictures;

/// Passes over the rotated digits.
pub(crate) const PASSES: usize = 15;

/// Pictures the base learns from.
const CLEAN: usize = 900;

/// Rotated pictures to tune on.
pub(crate) const TRAIN: usize = 500;

/// Rotated pictures that choose rates; the rest of 1797 is measured.
const VALIDATION: usize = 150;

/// Pretrains a transformer of width 32 on upright digits, 30 passes; its rows tokens, 8 a picture.
///
/// # Errors
/// Those of training.
pub(crate) fn rotated(num_layers: usize, seed: Seed) -> Result<(Lab, Rows)> {
    let upright = Pictures::digits(seed);
    let count = upright.len();
    let turned = upright.rotated();
    let pictures = upright.and(turned);
    let model = Encoder::of_pictures(pictures.table(), Sizes::of(32, num_layers).with_biases());
    let mut lab = Lab::of_pictures(model, &pictures, seed);
    let clean: Vec<usize> = (0..CLEAN).collect();
    lab.pretrain(&clean, Pace::passes(30, CLEAN, 32, 2e-3), seed)?;
    let part = |from: usize, to: usize| (count + from..count + to).collect();
    let validation = CLEAN + TRAIN + VALIDATION;
    let rows = Rows {
        train: part(CLEAN, CLEAN + TRAIN),
        validation: part(CLEAN + TRAIN, validation),
        test: part(validation, count),
    };
    Ok((lab, rows))
}

/// Gives the pace of a tuning on the rotated digits.
pub(crate) fn pace() -> Pace {
    Pace::passes(PASSES, TRAIN, 32, 0.0)
}
