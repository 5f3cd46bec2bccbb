//! Singular value decompositions in double precision.

use retune_eigen::{add_scaled, dot, symmetric};

use crate::linear_algebra::{product, transposed};

/// W = U·diag(s)·Vᵀ with `k` = min(rows, columns), s falling.
#[derive(Debug, Clone, PartialEq)]
pub struct Svd {
    /// `[rows, k]`.
    pub u: Vec<f64>,
    /// `[k]`.
    pub s: Vec<f64>,
    /// `[k, columns]`.
    pub vt: Vec<f64>,
    /// min(rows, columns).
    pub k: usize,
}

impl Svd {
    /// Decomposes a matrix `[rows, columns]`.
    ///
    /// The sign of a pair of vectors is not determined by the matrix: here the entry of the right
    /// vector that is largest in size is positive, the first of equals.
    pub fn new(w: &[f32], rows: usize, columns: usize) -> Self {
        let wide: Vec<f64> = w.iter().map(|value| f64::from(*value)).collect();
        Self::of(&wide, rows, columns)
    }

    /// Approximates the `count` leading directions of a matrix `[rows, columns]` by subspace
    /// iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061).
    ///
    /// # Shapes
    /// - `start`: `[min(rows, columns), count]`, where the iteration begins
    pub fn leading(
        w: &[f64],
        [rows, columns]: [usize; 2],
        start: &[f64],
        count: usize,
        rounds: usize,
    ) -> Self {
        if rows < columns {
            let turned = transposed(w, rows, columns);
            let other = Self::leading(&turned, [columns, rows], start, count, rounds);
            let (u, vt) =
                (transposed(&other.vt, count, rows), transposed(&other.u, columns, count));
            return Self { u, vt, ..other };
        }
        let turned = transposed(w, rows, columns);
        let mut basis = orthonormal(product(w, start, columns, count), count);
        for _ in 0..rounds {
            let inputs = orthonormal(product(&turned, &basis, rows, count), count);
            basis = orthonormal(product(w, &inputs, columns, count), count);
        }
        let small = product(&transposed(&basis, rows, count), w, rows, columns);
        let inner = Self::of(&small, count, columns);
        Self { u: product(&basis, &inner.u, count, count), ..inner }
    }

    fn of(wide: &[f64], rows: usize, columns: usize) -> Self {
        // The eigenvectors of the smaller Gram matrix are one side, W times them the other.
        let mut svd = if rows >= columns {
            let (u, s, vt) = tall(wide, rows, columns);
            Self { u: transposed(&u, columns, rows), s, vt, k: columns }
        } else {
            let (v, s, ut) = tall(&transposed(wide, rows, columns), columns, rows);
            Self { u: transposed(&ut, rows, rows), s, vt: v, k: rows }
        };
        for i in 0..svd.k {
            let row = &svd.vt[i * columns..(i + 1) * columns];
            let largest =
                row.iter().fold(0.0_f64, |top, v| if v.abs() > top.abs() { *v } else { top });
            if largest < 0.0 {
                svd.vt[i * columns..(i + 1) * columns].iter_mut().for_each(|v| *v = -*v);
                (0..rows).for_each(|row| svd.u[row * svd.k + i] = -svd.u[row * svd.k + i]);
            }
        }
        svd
    }

    /// Returns columns `from..to` of U as `[rows, to - from]`.
    pub fn left(&self, from: usize, to: usize) -> Vec<f32> {
        self.u.chunks_exact(self.k).flat_map(|row| &row[from..to]).map(|v| *v as f32).collect()
    }

    /// Returns rows `from..to` of Vᵀ as `[to - from, columns]`.
    pub fn right(&self, from: usize, to: usize) -> Vec<f32> {
        let columns = self.vt.len() / self.k.max(1);
        self.vt[from * columns..to * columns].iter().map(|v| *v as f32).collect()
    }
}

/// Returns an orthonormal basis of the columns of `a`, `[rows, count]`.
fn orthonormal(a: Vec<f64>, count: usize) -> Vec<f64> {
    let rows = a.len() / count.max(1);
    let mut columns = transposed(&a, rows, count);
    for at in 0..count {
        let (known, rest) = columns.split_at_mut(at * rows);
        let column = &mut rest[..rows];
        // Twice is enough for orthogonality to the last bits (Kahan).
        for _ in 0..2 {
            for other in known.chunks_exact(rows.max(1)) {
                add_scaled(column, -dot(column, other), other);
            }
        }
        let length = dot(column, column).sqrt();
        for v in column {
            *v = if length > 0.0 { *v / length } else { 0.0 };
        }
    }
    transposed(&columns, count, rows)
}

/// Decomposes `a`, `[rows, n]` with `rows` ≥ `n`; returns Uᵀ `[n, rows]`, s and Vᵀ `[n, n]`.
fn tall(a: &[f64], rows: usize, n: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let mut gram = vec![0.0; n * n];
    for row in a.chunks_exact(n.max(1)) {
        for (i, x) in row.iter().enumerate() {
            for (sum, y) in gram[i * n..(i + 1) * n].iter_mut().zip(row) {
                *sum += x * y;
            }
        }
    }
    let vt = symmetric(gram, n, true).vectors;
    let mut ut = vec![0.0; n * rows];
    for (place, row) in a.chunks_exact(n.max(1)).enumerate() {
        for i in 0..n {
            ut[i * rows + place] = dot(row, &vt[i * n..(i + 1) * n]);
        }
    }
    let mut s = Vec::with_capacity(n);
    for vector in ut.chunks_exact_mut(rows.max(1)) {
        // The length of W·v is exact where the root of a tiny eigenvalue is not.
        let length = dot(vector, vector).sqrt();
        for v in vector.iter_mut() {
            *v = if length > 0.0 { *v / length } else { 0.0 };
        }
        s.push(length);
    }
    (ut, s, vt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::random::Seed;

    fn close(found: &[f64], expected: &[f64], tolerance: f64) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= tolerance, "{found:?}, expected {expected:?}");
        }
    }

    #[test]
    fn a_decomposition_by_hand() {
        // diag(3, 2) with its outputs exchanged and one sign.
        let svd = Svd::new(&[0.0, -2.0, 3.0, 0.0], 2, 2);
        close(&svd.s, &[3.0, 2.0], 1e-12);
        close(&svd.vt, &[1.0, 0.0, 0.0, 1.0], 1e-12);
        close(&svd.u, &[0.0, -1.0, 1.0, 0.0], 1e-12);
    }

    #[test]
    fn leading_directions_are_those_of_the_whole_decomposition() {
        for (rows, columns) in [(12, 7), (7, 12)] {
            let mut w = vec![0.0; rows * columns];
            Seed(4).stream("svd", &[rows as u64]).fill_normal(&mut w, 1.0);
            let wide: Vec<f64> = w.iter().map(|value| f64::from(*value)).collect();
            let mut start = vec![0.0; 7 * 3];
            Seed(5).stream("start", &[]).fill_normal(&mut start, 1.0);
            let start: Vec<f64> = start.iter().map(|value| f64::from(*value)).collect();
            let some = Svd::leading(&wide, [rows, columns], &start, 3, 200);
            let whole = Svd::new(&w, rows, columns);
            close(&some.s, &whole.s[..3], 1e-9);
            close(
                &some.vt.iter().map(|v| v.abs()).collect::<Vec<_>>(),
                &whole.vt[..3 * columns].iter().map(|v| v.abs()).collect::<Vec<_>>(),
                1e-6,
            );
            for row in 0..rows {
                for at in 0..3 {
                    let (found, expected) = (some.u[row * 3 + at], whole.u[row * 7 + at]);
                    assert!((found.abs() - expected.abs()).abs() < 1e-6, "{found} {expected}");
                }
            }
        }
    }

    #[test]
    fn factors_are_orthonormal_and_give_the_matrix_back() {
        for (rows, columns) in [(17, 9), (9, 17), (40, 40), (1, 5), (5, 1)] {
            let mut w = vec![0.0; rows * columns];
            Seed(1).stream("svd", &[rows as u64]).fill_normal(&mut w, 1.0);
            let svd = Svd::new(&w, rows, columns);
            let k = rows.min(columns);
            for i in 0..k {
                assert!(i == 0 || svd.s[i] <= svd.s[i - 1]);
                for j in 0..k {
                    let expected = if i == j { 1.0 } else { 0.0 };
                    let v =
                        dot(&svd.vt[i * columns..][..columns], &svd.vt[j * columns..][..columns]);
                    let u: f64 = (0..rows).map(|r| svd.u[r * k + i] * svd.u[r * k + j]).sum();
                    assert!((v - expected).abs() < 1e-10 && (u - expected).abs() < 1e-8, "{u} {v}");
                }
            }
            for r in 0..rows {
                for c in 0..columns {
                    let entry = |i| svd.u[r * k + i] * svd.s[i] * svd.vt[i * columns + c];
                    let found: f64 = (0..k).map(entry).sum();
                    assert!((found - f64::from(w[r * columns + c])).abs() < 1e-10);
                }
            }
        }
    }
}
