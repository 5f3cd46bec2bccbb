//! Products of dense row-major matrices.

use super::operand::{Operand, Start, Term};
use super::{Arithmetic, blocked, dot, narrow, outer};

/// Computes `out = a · b`.
///
/// # Shapes
/// - `a`: `[m, k]`
/// - `b`: `[k, n]`
/// - `out`: `[m, n]`, overwritten
/// # Panics
/// If a slice does not have its shape.
/// # Examples
/// ```
/// use retune_kernels::matrix::{Arithmetic, product};
/// let mut out = [0.0; 2];
/// product(Arithmetic::F32, [1, 2, 2], &[1.0, 2.0], &[3.0, 4.0, 5.0, 6.0], &mut out);
/// assert_eq!(out, [13.0, 16.0]);
/// ```
pub fn product(
    arithmetic: Arithmetic,
    [m, k, n]: [usize; 3],
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
) {
    check([m, k, n], a, b);
    if narrow::suits(m, n) {
        return narrow::multiply([m, k, n], (a, k), (b, [n, 1]), out);
    }
    if n <= dot::NARROW && m > n {
        let turned: Vec<f32> = (0..n).flat_map(|j| b.iter().skip(j).step_by(n).copied()).collect();
        let right = Operand::rows(&turned, k);
        let term = Term { left: Operand::rows(a, k), right, length: k };
        return dot::multiply(m, n, &[term], Start::Zero, out);
    }
    let term = Term { left: Operand::rows(a, k), right: Operand::columns(b, n), length: k };
    blocked::multiply(arithmetic, m, n, &[term], Start::Zero, out);
}

/// Computes `out = a · bᵀ`, plus one number per column where a bias is given.
///
/// # Shapes
/// - `a`: `[m, k]`
/// - `b`: `[n, k]`
/// - `bias`: `[n]`
/// - `out`: `[m, n]`, overwritten
/// # Panics
/// If a slice does not have its shape.
pub fn product_nt(
    arithmetic: Arithmetic,
    [m, k, n]: [usize; 3],
    a: &[f32],
    b: &[f32],
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    check([m, k, n], a, b);
    if bias.is_none() && narrow::suits(m, n) {
        return narrow::multiply([m, k, n], (a, k), (b, [1, k]), out);
    }
    let start = bias.map_or(Start::Zero, Start::Bias);
    let term = [Term { left: Operand::rows(a, k), right: Operand::rows(b, k), length: k }];
    if dot::suits(&term, m, n) {
        dot::multiply(m, n, &term, start, out);
    } else {
        blocked::multiply(arithmetic, m, n, &term, start, out);
    }
}

/// Computes `out = aᵀ · b`, the gradient of a weight from its input and its output's gradient.
///
/// # Shapes
/// - `a`: `[k, m]`
/// - `b`: `[k, n]`
/// - `out`: `[m, n]`, overwritten
/// # Panics
/// If a slice does not have its shape.
pub fn product_tn(
    arithmetic: Arithmetic,
    [m, k, n]: [usize; 3],
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
) {
    check([m, k, n], a, b);
    assert_eq!(out.len(), m * n, "the output of a {m} x {k} x {n} product");
    if m <= outer::NARROW && m <= n {
        return outer::multiply([m, k, n], a, b, false, out);
    }
    if n <= outer::NARROW {
        return outer::multiply([n, k, m], b, a, true, out);
    }
    let term = Term { left: Operand::columns(a, m), right: Operand::columns(b, n), length: k };
    blocked::multiply(arithmetic, m, n, &[term], Start::Zero, out);
}

fn check([m, k, n]: [usize; 3], a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), m * k, "the first factor of a {m} x {k} x {n} product");
    assert_eq!(b.len(), k * n, "the second factor of a {m} x {k} x {n} product");
}
