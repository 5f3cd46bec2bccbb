//! Eigenvalues and eigenvectors of symmetric matrices in 64 bits.
//!
//! Householder's reduction to three diagonals and the QL iteration with implicit shifts (Golub and
//! Van Loan, *Matrix Computations*, chapter 8). One thread, no randomness: the same bits everywhere.
//! A crate of its own, without dependencies, because methods and merges both need it and never see
//! each other; the library at hand shares Burn's own dependencies and would build Burn twice.

/// Eigenvalues in falling order, and their vectors as rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Eigen {
    /// Falling.
    pub values: Vec<f64>,
    /// `[n, n]`, one vector a row; empty where only values were asked for.
    pub vectors: Vec<f64>,
}

/// Computes the dot product: eight sums at once, for the processor's vector units; always in this order.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0; 8];
    for (x, y) in a8.iter().zip(b8) {
        for lane in 0..8 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum();
    sums.iter().sum::<f64>() + rest
}

/// Adds `factor` times `values` to `out`.
pub fn add_scaled(out: &mut [f64], factor: f64, values: &[f64]) {
    for (y, x) in out.iter_mut().zip(values) {
        *y += factor * x;
    }
}

/// Solves a symmetric matrix.
///
/// # Shapes
/// - `matrix`: `[n, n]`
/// # Cost
/// About `9 n³` operations with vectors, `4/3 n³` without.
pub fn symmetric(mut matrix: Vec<f64>, n: usize, with_vectors: bool) -> Eigen {
    let mut diagonal = vec![0.0; n];
    let mut beside = vec![0.0; n];
    let reflectors = reduce(&mut matrix, n, &mut diagonal, &mut beside);
    let mut vectors = Vec::new();
    if with_vectors {
        vectors = vec![0.0; n * n];
        for i in 0..n {
            vectors[i * n + i] = 1.0;
        }
    }
    iterate(&mut diagonal, &mut beside, &mut vectors, n);
    // Rows of `vectors` are those of the reduced matrix; the reflections lead back.
    for (start, v) in reflectors.iter().rev() {
        for row in vectors.chunks_exact_mut(n.max(1)) {
            let tail = &mut row[*start..];
            let factor = -2.0 * dot(tail, v);
            add_scaled(tail, factor, v);
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
    let values = order.iter().map(|place| diagonal[*place]).collect();
    if with_vectors {
        vectors = order.iter().flat_map(|p| vectors[p * n..(p + 1) * n].to_vec()).collect();
    }
    Eigen { values, vectors }
}

/// Reduces to three diagonals by reflections `I - 2vvᵀ`, each with where it starts.
fn reduce(
    a: &mut [f64],
    n: usize,
    diagonal: &mut [f64],
    beside: &mut [f64],
) -> Vec<(usize, Vec<f64>)> {
    let mut reflectors = Vec::new();
    for k in 0..n.saturating_sub(2) {
        let start = k + 1;
        // The column below the diagonal; the matrix is symmetric, so its row serves.
        let mut v: Vec<f64> = a[k * n + start..(k + 1) * n].to_vec();
        let length = dot(&v, &v).sqrt();
        let target = -length.copysign(v[0]);
        beside[k] = target;
        if length == 0.0 || dot(&v[1..], &v[1..]) == 0.0 {
            beside[k] = v[0];
            continue;
        }
        v[0] -= target;
        let norm = dot(&v, &v).sqrt();
        for x in &mut v {
            *x /= norm;
        }
        // A - 2v wᵀ - 2w vᵀ with w = Av - (vᵀAv) v, on the rest.
        let mut w: Vec<f64> = (start..n).map(|i| dot(&a[i * n + start..(i + 1) * n], &v)).collect();
        let inner = dot(&v, &w);
        add_scaled(&mut w, -inner, &v);
        for (offset, i) in (start..n).enumerate() {
            let row = &mut a[i * n + start..(i + 1) * n];
            add_scaled(row, -2.0 * v[offset], &w);
            add_scaled(row, -2.0 * w[offset], &v);
        }
        reflectors.push((start, v));
    }
    for k in 0..n {
        diagonal[k] = a[k * n + k];
    }
    if n >= 2 {
        beside[n - 2] = a[(n - 2) * n + n - 1];
    }
    reflectors
}

/// Most iterations for one eigenvalue; two are usual.
const MAX_ITERATIONS: usize = 60;

/// QL with implicit shifts; turns the rows of `vectors`, if any, along.
fn iterate(d: &mut [f64], e: &mut [f64], vectors: &mut [f64], n: usize) {
    for l in 0..n {
        for _ in 0..MAX_ITERATIONS {
            let is_small =
                |m: &usize| e[*m].abs() <= f64::EPSILON * (d[*m].abs() + d[*m + 1].abs());
            let m = (l..n - 1).find(is_small).unwrap_or(n - 1);
            if m == l {
                break;
            }
            let half = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let mut g = d[m] - d[l] + e[l] / (half + half.hypot(1.0).copysign(half));
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut cut = false;
            for i in (l..m).rev() {
                let (f, b) = (s * e[i], c * e[i]);
                let r = f.hypot(g);
                e[i + 1] = r;
                if r == 0.0 {
                    // The matrix falls apart here; start over on the part that is left.
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    cut = true;
                    break;
                }
                (s, c) = (f / r, g / r);
                g = d[i + 1] - p;
                let t = (d[i] - g) * s + 2.0 * c * b;
                p = s * t;
                d[i + 1] = g + p;
                g = c * t - b;
                if !vectors.is_empty() {
                    let (head, tail) = vectors.split_at_mut((i + 1) * n);
                    for (x, y) in head[i * n..].iter_mut().zip(&mut tail[..n]) {
                        let above = *y;
                        *y = s * *x + c * above;
                        *x = c * *x - s * above;
                    }
                }
            }
            if !cut {
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

    fn random(count: usize, mut state: u64) -> Vec<f32> {
        let mut draw = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        (0..count).map(|_| draw()).collect()
    }

    #[test]
    fn eigenvalues_worked_out_by_hand() {
        // [[2, 1], [1, 2]]: 3 along (1, 1), 1 along (1, -1).
        let found = symmetric(vec![2.0, 1.0, 1.0, 2.0], 2, true);
        assert!((found.values[0] - 3.0).abs() < 1e-15 && (found.values[1] - 1.0).abs() < 1e-15);
        assert!((found.vectors[0] - found.vectors[1]).abs() < 1e-15);
        // The second difference of five points: 2 - 2 cos(kπ/6).
        let mut matrix = vec![0.0; 25];
        for i in 0..5 {
            matrix[i * 5 + i] = 2.0;
            if i > 0 {
                matrix[i * 5 + i - 1] = -1.0;
                matrix[(i - 1) * 5 + i] = -1.0;
            }
        }
        let found = symmetric(matrix, 5, false).values;
        for (k, value) in found.iter().rev().enumerate() {
            let expected = 2.0 - 2.0 * ((k + 1) as f64 * std::f64::consts::PI / 6.0).cos();
            assert!((value - expected).abs() < 1e-14, "{k}: {value}, expected {expected}");
        }
        assert!(symmetric(Vec::new(), 0, true).values.is_empty());
        assert_eq!(symmetric(vec![7.0], 1, true), Eigen { values: vec![7.0], vectors: vec![1.0] });
        assert_eq!(symmetric(vec![0.0; 16], 4, false).values, [0.0; 4]);
    }

    /// `A v = λ v` and orthonormal vectors, on a matrix with repeated eigenvalues too.
    #[test]
    fn vectors_belong_to_their_values() {
        for (n, low_rank) in [(3, false), (40, false), (40, true)] {
            let inner = if low_rank { 5 } else { n + 3 };
            let half = random(n * inner, 3);
            let matrix: Vec<f64> = (0..n * n)
                .map(|place| {
                    let (i, j) = (place / n, place % n);
                    (0..inner)
                        .map(|k| f64::from(half[i * inner + k]) * f64::from(half[j * inner + k]))
                        .sum()
                })
                .collect();
            let found = symmetric(matrix.clone(), n, true);
            assert!(found.values.is_sorted_by(|a, b| a >= b));
            for (value, v) in found.values.iter().zip(found.vectors.chunks(n)) {
                for (row, x) in matrix.chunks(n).zip(v) {
                    assert!((dot(row, v) - value * x).abs() < 1e-12, "n {n}, value {value}");
                }
                for (place, other) in found.vectors.chunks(n).enumerate() {
                    let expected = f64::from(u8::from(std::ptr::eq(other, v)));
                    assert!((dot(v, other) - expected).abs() < 1e-12, "n {n}, vector {place}");
                }
            }
        }
    }
}
