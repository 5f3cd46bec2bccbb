//! Singular value decompositions in double precision.

use retune_eigen::{dot, symmetric};

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
        // The eigenvectors of the smaller Gram matrix are one side, W times them the other.
        let mut svd = if rows >= columns {
            let (u, s, vt) = tall(&wide, rows, columns);
            Self { u: transposed(&u, columns, rows), s, vt, k: columns }
        } else {
            let (v, s, ut) = tall(&transposed(&wide, rows, columns), columns, rows);
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

fn transposed(a: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| a[r * columns + c])).collect()
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
