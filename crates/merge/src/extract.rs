//! A LoRA out of a full tune: the best low-rank approximation of each weight's change.
//!
//! Source: Eckart and Young, 1936; as done by mergekit's `extract_lora` and `kohya-ss/sd-scripts`.

use crate::spectrum::{Factors, MAX_SIDE, truncate};

/// The factors of one weight's change, and what they leave out.
#[derive(Debug, Clone, PartialEq)]
pub struct Extracted {
    /// `[rank, inputs]`
    pub a: Vec<f32>,
    /// `[outputs, rank]`
    pub b: Vec<f32>,
    /// Share of the change's energy (squared entries) the factors keep.
    pub kept: f64,
    /// Energy of the change.
    pub energy: f64,
}

/// Factors the change of a weight; `None` where its smaller side exceeds [`MAX_SIDE`].
///
/// The singular values are shared evenly: each factor gets their roots, so that both have entries
/// of like size, as training has them.
///
/// # Shapes
/// - `delta`: `[outputs, inputs]`, tuned less base
/// # Examples
/// ```
/// # use retune_merge::extract::extract;
/// let found = extract(&[0.0, 4.0, 0.0, 0.0], 2, 2, 1).unwrap();
/// assert_eq!((found.kept, found.energy), (1.0, 16.0));
/// assert_eq!(found.b[0] * found.a[1], 4.0);
/// ```
pub fn extract(delta: &[f32], outputs: usize, inputs: usize, rank: usize) -> Option<Extracted> {
    if outputs.min(inputs) > MAX_SIDE {
        return None;
    }
    let factors: Factors = truncate(delta, outputs, inputs, rank);
    let (kept, energy) = (factors.kept(rank), factors.singular.iter().map(|s| s * s).sum());
    let Factors { left: mut b, right: mut a, singular } = factors;
    for (place, sigma) in singular.iter().take(rank).enumerate() {
        let root = sigma.sqrt() as f32;
        if root == 0.0 {
            continue;
        }
        for row in b.chunks_exact_mut(rank) {
            row[place] /= root;
        }
        for x in &mut a[place * inputs..(place + 1) * inputs] {
            *x *= root;
        }
    }
    Some(Extracted { a, b, kept, energy })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change that is a LoRA comes back as that LoRA, up to the choice of factors.
    #[test]
    fn a_low_rank_change_is_kept_whole() {
        let (outputs, inputs, rank) = (9, 7, 2);
        let a: Vec<f32> = (0..rank * inputs).map(|i| ((i * 7 % 5) as f32 - 2.0) / 3.0).collect();
        let b: Vec<f32> = (0..outputs * rank).map(|i| ((i * 5 % 7) as f32 - 3.0) / 4.0).collect();
        let product = |b: &[f32], a: &[f32], rank: usize| -> Vec<f32> {
            (0..outputs * inputs)
                .map(|place| {
                    let (i, j) = (place / inputs, place % inputs);
                    (0..rank).map(|k| b[i * rank + k] * a[k * inputs + j]).sum()
                })
                .collect()
        };
        let delta = product(&b, &a, rank);
        let found = extract(&delta, outputs, inputs, rank).unwrap();
        assert!((found.kept - 1.0).abs() < 1e-9);
        for (found, expected) in product(&found.b, &found.a, rank).iter().zip(&delta) {
            assert!((found - expected).abs() < 1e-6);
        }
        // Both factors have the same norm, and rank 1 keeps less.
        let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>();
        assert!((norm(&found.a) / norm(&found.b) - 1.0).abs() < 1e-4);
        assert!(extract(&delta, outputs, inputs, 1).unwrap().kept < 0.999);
        // More rank than there is stays zero, and nothing changed is all kept.
        let wide = extract(&delta, outputs, inputs, 5).unwrap();
        assert!(wide.a[2 * inputs..].iter().all(|x| x.abs() < 1e-3));
        let none = extract(&[0.0; 6], 2, 3, 1).unwrap();
        assert_eq!((none.kept, none.energy, norm(&none.a)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn huge_matrices_are_left_out() {
        assert!(extract(&[], MAX_SIDE + 1, MAX_SIDE + 1, 1).is_none());
    }
}
