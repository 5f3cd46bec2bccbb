//! The ground of several proofs: a picture transformer that knows upright digits, and rotated ones.

use std::ops::Range;

use retune_core::random::Seed;

use crate::Result;
use crate::contest::Rows;
use crate::encoder::{Encoder, Sizes};
use crate::lab::{Held, Lab, Pace};
use crate::mlp::Inputs;
use crate::pictures::{DIGITS, Pictures, SIDE};

/// Width of the transformer.
pub(crate) const WIDTH: usize = 32;

/// Which digits the base learns upright, and which serve what once they are turned; the rest of 1797
/// is measured.
#[derive(Debug)]
pub(crate) struct Split {
    upright: usize,
    /// To tune on.
    pub(crate) train: Range<usize>,
    /// To choose rates.
    validation: Range<usize>,
    /// Whether weights are drawn as PyTorch draws them.
    as_pytorch: bool,
}

/// Digits to tune on that the base has not seen.
pub(crate) const OTHERS: Split =
    Split { upright: 900, train: 900..1400, validation: 1400..1550, as_pytorch: false };

/// Digits to tune on that the base knows upright.
pub(crate) const SAME: Split =
    Split { upright: 1200, train: 0..1200, validation: 1200..1350, as_pytorch: false };

/// The same, by a base that begins as PyTorch draws it.
pub(crate) const SAME_AS_PYTORCH: Split = Split { as_pytorch: true, ..SAME };

/// Builds the transformer, its rows tokens, 8 a picture.
pub(crate) fn model(pictures: &Pictures, num_layers: usize) -> Encoder {
    let rows = Inputs::new(pictures.table(), SIDE);
    Encoder::of_rows(rows, SIDE, Sizes::of(WIDTH, num_layers).with_biases(), DIGITS)
}

/// Pretrains the transformer on upright digits, 30 passes.
///
/// # Errors
/// Those of training.
pub(crate) fn rotated(num_layers: usize, split: &Split, seed: Seed) -> Result<(Lab, Rows)> {
    let upright = Pictures::digits(seed);
    let count = upright.len();
    let turned = upright.rotated();
    let pictures = upright.and(turned);
    let mut lab = Lab::of_pictures(model(&pictures, num_layers), &pictures, seed);
    if split.as_pytorch {
        lab.set(Held::draw_as_pytorch(lab.model.spec(), seed));
    }
    let known: Vec<usize> = (0..split.upright).collect();
    lab.pretrain(&known, Pace::passes(30, known.len(), 32, 2e-3), seed)?;
    let part = |part: Range<usize>| part.map(|row| count + row).collect();
    let rows = Rows {
        train: part(split.train.clone()),
        validation: part(split.validation.clone()),
        test: part(split.validation.end..count),
    };
    Ok((lab, rows))
}
