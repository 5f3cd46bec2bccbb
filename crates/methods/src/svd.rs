//! Singular value decompositions and symmetric eigenvectors, in double precision.

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
    let (_, vectors) = symmetric(gram, n);
    // Eigenvalues rise; singular values fall.
    let vt: Vec<f64> = vectors.chunks_exact(n.max(1)).rev().flatten().copied().collect();
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

fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Four sums at once let the processor work on vectors.
    let mut sums = [0.0_f64; 4];
    let (a4, b4) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest: f64 = a4.remainder().iter().zip(b4.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a4.zip(b4) {
        for lane in 0..4 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f64>() + rest
}

fn transposed(a: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| a[r * columns + c])).collect()
}

/// Returns eigenvalues, rising, and eigenvectors as rows, of a symmetric matrix `[n, n]`.
///
/// Householder's reduction to three diagonals, then QL steps with Wilkinson's shift.
pub fn symmetric(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut q: Vec<f64> = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let mut off = vec![0.0; n];
    for k in 0..n.saturating_sub(2) {
        // Reflects column k below the diagonal onto its first entry, on both sides.
        let mut v: Vec<f64> =
            (0..n).map(|row| if row > k { a[row * n + k] } else { 0.0 }).collect();
        let length = dot(&v, &v).sqrt();
        if length == 0.0 {
            continue;
        }
        let head = -length.copysign(v[k + 1]);
        v[k + 1] -= head;
        let scale = 2.0 / dot(&v, &v);
        let p: Vec<f64> =
            a.chunks_exact(n).map(|row| scale * dot(&row[k + 1..], &v[k + 1..])).collect();
        let half = 0.5 * scale * dot(&v, &p);
        let w: Vec<f64> = p.iter().zip(&v).map(|(p, v)| p - half * v).collect();
        for row in 0..n {
            let (vr, wr) = (v[row], w[row]);
            let own = &mut a[row * n..(row + 1) * n];
            own.iter_mut().zip(v.iter().zip(&w)).for_each(|(x, (vc, wc))| *x -= vr * wc + wr * vc);
        }
        // The rows of q become those of the product of all reflections.
        let mut along = vec![0.0; n];
        for (row, factor) in q.chunks_exact(n).zip(&v) {
            along.iter_mut().zip(row).for_each(|(sum, x)| *sum += factor * x);
        }
        for (row, factor) in q.chunks_exact_mut(n).zip(&v) {
            row.iter_mut().zip(&along).for_each(|(x, sum)| *x -= scale * factor * sum);
        }
    }
    let mut diagonal: Vec<f64> = (0..n).map(|i| a[i * n + i]).collect();
    for i in 1..n {
        off[i - 1] = a[i * n + i - 1];
    }
    implicit_ql(&mut diagonal, &mut off, &mut q, n);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|x, y| diagonal[*x].total_cmp(&diagonal[*y]));
    let vectors = order.iter().flat_map(|i| &q[i * n..(i + 1) * n]).copied().collect();
    (order.iter().map(|i| diagonal[*i]).collect(), vectors)
}

/// Makes three diagonals one; each rotation turns two rows of `q`.
fn implicit_ql(d: &mut [f64], e: &mut [f64], q: &mut [f64], n: usize) {
    for l in 0..n {
        for _ in 0..50 {
            let negligible =
                |m: &usize| e[*m].abs() <= f64::EPSILON * (d[*m].abs() + d[*m + 1].abs());
            let m = (l..n - 1).find(negligible).unwrap_or(n - 1);
            if m == l {
                break;
            }
            let mut g = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let mut r = g.hypot(1.0);
            g = d[m] - d[l] + e[l] / (g + r.copysign(g));
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut broke = false;
            for i in (l..m).rev() {
                let (f, b) = (s * e[i], c * e[i]);
                r = f.hypot(g);
                e[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    broke = true;
                    break;
                }
                (s, c) = (f / r, g / r);
                g = d[i + 1] - p;
                r = (d[i] - g) * s + 2.0 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
                let (upper, lower) = q[i * n..(i + 2) * n].split_at_mut(n);
                for (x, y) in upper.iter_mut().zip(lower) {
                    (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                }
            }
            if !broke {
                d[l] -= p;
                e[l] = g;
                e[m] = 0.0;
            }
        }
    }
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
    fn eigenvectors_by_hand() {
        let (values, vectors) = symmetric(vec![2.0, 1.0, 1.0, 2.0], 2);
        close(&values, &[1.0, 3.0], 1e-14);
        let half = 0.5_f64.sqrt();
        let signs = [vectors[0].signum(), vectors[2].signum()];
        close(
            &vectors,
            &[half * signs[0], -half * signs[0], half * signs[1], half * signs[1]],
            1e-14,
        );
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
