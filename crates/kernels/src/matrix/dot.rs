//! Products for few rows, where packing would cost more than multiplying.

use rayon::prelude::*;

use super::blocked;
use super::operand::{Operand, Start, Term};

/// Rows up to which the factors are read where they lie.
const FEW: usize = 4;

/// Tells whether a product of `rows` rows is computed here.
pub(crate) fn suits(terms: &[Term], rows: usize) -> bool {
    let readable = |term: &Term| {
        matches!(term.left, Operand::Rows { .. })
            && matches!(term.right, Operand::Rows { .. } | Operand::Frozen(_))
    };
    rows <= FEW && terms.iter().all(readable)
}

/// Computes `out = start + Σ left · rightᵀ` as dot products of rows.
pub(crate) fn multiply(rows: usize, columns: usize, terms: &[Term], start: Start, out: &mut [f32]) {
    blocked::check(rows, columns, terms, start, out);
    let longest = terms.iter().map(|term| term.length).max().unwrap_or(0);
    let column = |column: usize, scratch: &mut Vec<f32>| -> [f32; FEW] {
        let mut sums = [0.0; FEW];
        for term in terms {
            let right: &[f32] = match term.right {
                Operand::Rows { values, stride } => &values[column * stride..][..term.length],
                Operand::Frozen(matrix) => match matrix.as_f32() {
                    Some(values) => &values[column * term.length..][..term.length],
                    None => {
                        scratch.resize(longest, 0.0);
                        matrix.decode(column, 0..term.length, &mut scratch[..term.length]);
                        &scratch[..term.length]
                    }
                },
                _ => unreachable!("asked for by `suits`"),
            };
            let Operand::Rows { values, stride } = term.left else {
                unreachable!("asked for by `suits`")
            };
            for (row, sum) in sums.iter_mut().enumerate().take(rows) {
                *sum += dot(&values[row * stride..][..term.length], right);
            }
        }
        sums
    };
    let mut sums = vec![[0.0; FEW]; columns];
    sums.par_iter_mut()
        .with_min_len(64)
        .enumerate()
        .for_each_init(Vec::new, |scratch, (index, sums)| *sums = column(index, scratch));
    for (row, out) in out.chunks_exact_mut(columns.max(1)).enumerate() {
        for (column, (out, sums)) in out.iter_mut().zip(&sums).enumerate() {
            let from = match start {
                Start::Zero => 0.0,
                Start::Bias(bias) => bias[column],
                Start::Output => *out,
            };
            *out = from + sums[row];
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 16];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}
