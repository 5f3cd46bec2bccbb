//! Prefix tuning is a gated adapter of each attention head.

use std::fmt::Write;

use retune_core::parameters::to_vec;
use retune_core::random::Seed;
use retune_kernels::{AttentionOptions, Spans, attention};
use tensor::{Device, Tensor, TensorData};

use crate::Proof;

const HEADS: usize = 4;
const WIDTH: usize = 8;
const TOKENS: usize = 24;

/// What must hold, in f32.
const TOLERANCE: f64 = 1e-6;

/// Compares both sides.
pub(crate) fn prove() -> Proof {
    let mut proof = Proof::default();
    proof.figures.push_str("| prefix | largest difference, each seed |\n|---|---|\n");
    let mut worst = 0.0_f64;
    for length in [1, 5, 20] {
        let gaps: Vec<f64> = (0..3).map(|seed| gap(length, Seed(seed))).collect();
        worst = gaps.iter().fold(worst, |worst, gap| worst.max(*gap));
        let shown: Vec<String> = gaps.iter().map(|gap| format!("{gap:.1e}")).collect();
        let _ = writeln!(proof.figures, "| {length} | {} |", shown.join(", "));
    }
    let says = format!("both sides agree within {TOLERANCE:e} in f32");
    proof.assert(says, format!("largest difference {worst:.1e}"), worst <= TOLERANCE);
    proof
}

/// Returns the largest difference between the two sides.
fn gap(length: usize, seed: Seed) -> f64 {
    let draw = |purpose: &str, rows: usize, deviation: f64| {
        let mut values = vec![0.0_f32; rows * HEADS * WIDTH];
        seed.stream(purpose, &[]).fill_normal(&mut values, deviation);
        values
    };
    let q = draw("queries", TOKENS, 1.0);
    let (keys, values) = (draw("keys", TOKENS, 1.0), draw("values", TOKENS, 0.5));
    let (prefix_keys, prefix_values) =
        (draw("prefix keys", length, 1.0), draw("prefix values", length, 0.5));
    let device = Device::flex();
    let tensor = |values: Vec<f32>| {
        let rows = values.len() / (HEADS * WIDTH);
        Tensor::<2>::from_data(TensorData::new(values, [rows, HEADS * WIDTH]), &device)
    };
    let behind = |first: &[f32], rest: &[f32]| tensor([first, rest].concat());
    let options =
        AttentionOptions { prefix: length, ..AttentionOptions::causal(HEADS, HEADS, WIDTH) };
    let found = to_vec(attention(
        tensor(q.clone()),
        behind(&prefix_keys, &keys),
        behind(&prefix_values, &values),
        &Spans::from_lengths([TOKENS]),
        &Spans::from_lengths([TOKENS + length]),
        &options,
    ));
    let mut worst = 0.0_f64;
    for token in 0..TOKENS {
        for head in 0..HEADS {
            let text = Weighted::of(&q, &keys, &values, token, head, token + 1);
            let prefix = Weighted::of(&q, &prefix_keys, &prefix_values, token, head, length);
            let gate = prefix.sum / (prefix.sum + text.sum);
            for place in 0..WIDTH {
                let expected = (1.0 - gate) * text.mean[place] + gate * prefix.mean[place];
                let value = found[(token * HEADS + head) * WIDTH + place];
                worst = worst.max((f64::from(value) - expected).abs());
            }
        }
    }
    worst
}

/// One query's attention over some keys.
struct Weighted {
    /// Sum of the exponentials of the scores.
    sum: f64,
    /// Values weighted by their share of that sum.
    mean: [f64; WIDTH],
}

impl Weighted {
    fn of(q: &[f32], k: &[f32], v: &[f32], token: usize, head: usize, seen: usize) -> Self {
        let at = |list: &[f32], row: usize, place: usize| {
            f64::from(list[(row * HEADS + head) * WIDTH + place])
        };
        let (mut sum, mut mean) = (0.0, [0.0; WIDTH]);
        for row in 0..seen {
            let score: f64 = (0..WIDTH).map(|place| at(q, token, place) * at(k, row, place)).sum();
            let weight = (score / (WIDTH as f64).sqrt()).exp();
            sum += weight;
            for (place, mean) in mean.iter_mut().enumerate() {
                *mean += weight * at(v, row, place);
            }
        }
        Self { sum, mean: mean.map(|value| value / sum) }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn both_sides_agree() {
        assert!(super::prove().holds());
    }
}
