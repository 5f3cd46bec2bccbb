//! QLoRA's NormalFloat with 4 bits: 16 quantiles of the normal distribution, a scale for each block.
//!
//! Source: Dettmers, Pagnoni, Holtzman and Zettlemoyer, 2023, arXiv 2305.14314.

/// Values that share a scale.
pub const BLOCK: usize = 64;

/// The quantiles, of the paper's appendix E.
const QUANTILES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Rounds values to the quantiles, those of each block scaled by its largest.
///
/// The scale is kept as it is: QLoRA's second quantisation, that of the scales, is not done.
pub fn round(values: &mut [f32]) {
    values.chunks_mut(BLOCK).for_each(round_block);
}

fn round_block(block: &mut [f32]) {
    let scale = block.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    if scale == 0.0 {
        return;
    }
    for value in block {
        let share = *value / scale;
        let place = QUANTILES.partition_point(|q| *q < share).min(QUANTILES.len() - 1);
        let below = QUANTILES[place.saturating_sub(1)];
        let near = if share - below < QUANTILES[place] - share { below } else { QUANTILES[place] };
        *value = near * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_become_the_nearest_quantiles_by_hand() {
        let mut block = [4.0, -2.0, 0.2, 0.1, 1.5, -3.99];
        round(&mut block);
        // Shares 1, -0.5, 0.05, 0.025, 0.375, -0.9975.
        let expected = [1.0, -0.525_073_05, 0.079_580_3, 0.0, 0.337_915_24, -1.0].map(|q| 4.0 * q);
        assert_eq!(block, expected);
    }

    #[test]
    fn blocks_have_their_own_scales() {
        let mut values = [0.0; BLOCK + 1];
        (values[0], values[1], values[BLOCK]) = (8.0, 0.3, 0.3);
        round(&mut values);
        // 0.0375 of the scale is nearer to 0 than to 0.0796.
        assert_eq!((values[0], values[1], values[BLOCK]), (8.0, 0.0, 0.3));
    }
}
