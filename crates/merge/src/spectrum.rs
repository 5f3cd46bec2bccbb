//! Singular values and vectors of a change, from the eigenvalues of its Gram matrix.
//!
//! For a change `Δ` the Gram matrix `ΔΔᵀ` (or `ΔᵀΔ`, whichever is smaller) is made and solved in
//! 64 bits. Its eigenvalues are the squared singular values, the shares of the change's energy,
//! and that is what is asked for here: a singular value below 1e-8 of the largest is noise. The
//! solver is Householder's reduction to three diagonals and the QL iteration with implicit shifts
//! (Golub and Van Loan, *Matrix Computations*, chapter 8). One thread, no randomness: the same bits
//! everywhere.

/// Largest smaller side for which the Gram matrix is made; beyond, it takes minutes a matrix.
pub const MAX_SIDE: usize = 2048;

/// Eigenvalues in falling order, and their vectors as rows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Eigen {
    pub(crate) values: Vec<f64>,
    /// `[n, n]`, one vector a row; empty where only values were asked for.
    pub(crate) vectors: Vec<f64>,
}

/// A matrix as a product of thin factors.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// `[rows, rank]`: left singular vectors times the singular values.
    pub left: Vec<f32>,
    /// `[rank, columns]`: right singular vectors.
    pub right: Vec<f32>,
    /// The singular values, falling; those after `rank` too.
    pub singular: Vec<f64>,
}

impl Factors {
    /// Returns the share of the squared entries that the factors keep; 1 for a matrix of zeros.
    pub fn kept(&self, rank: usize) -> f64 {
        let energy: Vec<f64> = self.singular.iter().map(|s| s * s).collect();
        let all: f64 = energy.iter().sum();
        if all == 0.0 { 1.0 } else { energy.iter().take(rank).sum::<f64>() / all }
    }
}

/// Computes the best approximation of a rank (Eckart and Young).
///
/// Where `rank` exceeds what the matrix has, the factors are filled up with zeros.
///
/// # Shapes
/// - `matrix`: `[rows, columns]`, row-major
/// # Cost
/// `rows · columns · min(rows, columns)` and `9 · min(rows, columns)³`.
pub fn truncate(matrix: &[f32], rows: usize, columns: usize, rank: usize) -> Factors {
    let wide = rows <= columns;
    let side = rows.min(columns);
    let eigen = eigen(gram(matrix, rows, columns), side, true);
    let singular: Vec<f64> = eigen.values.iter().map(|v| v.max(0.0).sqrt()).collect();
    let floor = singular.first().copied().unwrap_or(0.0) * 1e-8;
    let mut left = vec![0.0f32; rows * rank];
    let mut right = vec![0.0f32; rank * columns];
    for (place, sigma) in singular.iter().take(rank).enumerate() {
        if *sigma <= floor {
            break;
        }
        let vector = &eigen.vectors[place * side..(place + 1) * side];
        if wide {
            // Δ = Σ u (uᵀΔ): the row uᵀΔ is σ vᵀ.
            let mut row = vec![0.0f64; columns];
            for (u, line) in vector.iter().zip(matrix.chunks_exact(columns)) {
                add_scaled(&mut row, *u, line);
            }
            for (r, value) in right[place * columns..].iter_mut().zip(&row) {
                *r = (value / sigma) as f32;
            }
            for (line, u) in left.chunks_exact_mut(rank).zip(vector) {
                line[place] = (u * sigma) as f32;
            }
        } else {
            for (line, out) in matrix.chunks_exact(columns).zip(left.chunks_exact_mut(rank)) {
                let dot: f64 = line.iter().zip(vector).map(|(x, v)| f64::from(*x) * v).sum();
                out[place] = dot as f32;
            }
            for (r, value) in right[place * columns..].iter_mut().zip(vector) {
                *r = *value as f32;
            }
        }
    }
    Factors { left, right, singular }
}

/// Computes the singular values in falling order.
///
/// # Shapes
/// - `matrix`: `[rows, columns]`, row-major
pub fn singular_values(matrix: &[f32], rows: usize, columns: usize) -> Vec<f64> {
    let side = rows.min(columns);
    let eigen = eigen(gram(matrix, rows, columns), side, false);
    eigen.values.iter().map(|value| value.max(0.0).sqrt()).collect()
}

/// Returns the effective rank of Roy and Vetterli (2007): the exponential of the entropy of the
/// singular values' shares. `None` where all are zero.
///
/// # Examples
/// ```
/// # use retune_merge::spectrum::effective_rank;
/// assert_eq!(effective_rank(&[2.0, 2.0, 2.0, 0.0]).map(|r| r.round()), Some(3.0));
/// assert_eq!(effective_rank(&[0.0]), None);
/// ```
pub fn effective_rank(singular: &[f64]) -> Option<f64> {
    let sum: f64 = singular.iter().sum();
    let shares = singular.iter().map(|s| s / sum).filter(|share| *share > 0.0);
    (sum > 0.0).then(|| shares.map(|share| -share * share.ln()).sum::<f64>().exp())
}

/// Returns the least rank that holds a share of the energy, such as 0.99; 0 where there is none.
pub fn rank_of_energy(singular: &[f64], share: f64) -> usize {
    let all: f64 = singular.iter().map(|s| s * s).sum();
    let mut sum = 0.0;
    if all == 0.0 {
        return 0;
    }
    for (place, s) in singular.iter().enumerate() {
        sum += s * s;
        if sum >= share * all {
            return place + 1;
        }
    }
    singular.len()
}

fn add_scaled(out: &mut [f64], factor: f64, values: &[f32]) {
    for (y, x) in out.iter_mut().zip(values) {
        *y += factor * f64::from(*x);
    }
}

/// Makes `M Mᵀ` of the smaller side.
fn gram(matrix: &[f32], rows: usize, columns: usize) -> Vec<f64> {
    let side = rows.min(columns);
    let wide: Vec<f64> = matrix.iter().map(|x| f64::from(*x)).collect();
    let mut out = vec![0.0; side * side];
    if rows <= columns {
        for i in 0..side {
            let a = &wide[i * columns..(i + 1) * columns];
            for j in 0..=i {
                let b = &wide[j * columns..(j + 1) * columns];
                let sum = dot(a, b);
                out[i * side + j] = sum;
                out[j * side + i] = sum;
            }
        }
    } else {
        for line in wide.chunks_exact(columns) {
            for (i, x) in line.iter().enumerate() {
                axpy(&mut out[i * side..=i * side + i], *x, &line[..=i]);
            }
        }
        for i in 0..side {
            for j in 0..i {
                out[j * side + i] = out[i * side + j];
            }
        }
    }
    out
}

/// Eight sums at once, so that the processor's vector units are used; always in this order.
fn dot(a: &[f64], b: &[f64]) -> f64 {
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

fn axpy(out: &mut [f64], factor: f64, values: &[f64]) {
    for (y, x) in out.iter_mut().zip(values) {
        *y += factor * x;
    }
}

/// Solves a symmetric matrix `[n, n]`.
pub(crate) fn eigen(mut matrix: Vec<f64>, n: usize, with_vectors: bool) -> Eigen {
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
            axpy(tail, factor, v);
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
        axpy(&mut w, -inner, &v);
        for (offset, i) in (start..n).enumerate() {
            let row = &mut a[i * n + start..(i + 1) * n];
            axpy(row, -2.0 * v[offset], &w);
            axpy(row, -2.0 * w[offset], &v);
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

    fn product(f: &Factors, rows: usize, columns: usize, rank: usize) -> Vec<f32> {
        let mut out = vec![0.0; rows * columns];
        for i in 0..rows {
            for k in 0..rank {
                for j in 0..columns {
                    out[i * columns + j] += f.left[i * rank + k] * f.right[k * columns + j];
                }
            }
        }
        out
    }

    #[test]
    fn eigenvalues_worked_out_by_hand() {
        // [[2, 1], [1, 2]]: 3 along (1, 1), 1 along (1, -1).
        let found = eigen(vec![2.0, 1.0, 1.0, 2.0], 2, true);
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
        let found = eigen(matrix, 5, false).values;
        for (k, value) in found.iter().rev().enumerate() {
            let expected = 2.0 - 2.0 * ((k + 1) as f64 * std::f64::consts::PI / 6.0).cos();
            assert!((value - expected).abs() < 1e-14, "{k}: {value}, expected {expected}");
        }
        assert!(eigen(Vec::new(), 0, true).values.is_empty());
        assert_eq!(eigen(vec![7.0], 1, true), Eigen { values: vec![7.0], vectors: vec![1.0] });
        assert_eq!(eigen(vec![0.0; 16], 4, false).values, [0.0; 4]);
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
            let found = eigen(matrix.clone(), n, true);
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

    #[test]
    fn full_rank_gives_the_matrix_back() {
        for (rows, columns) in [(7, 19), (19, 7), (8, 8), (1, 5), (5, 1)] {
            let matrix = random(rows * columns, 11);
            let rank = rows.min(columns) + 2;
            let factors = truncate(&matrix, rows, columns, rank);
            assert!((factors.kept(rank) - 1.0).abs() < 1e-12);
            for (found, expected) in product(&factors, rows, columns, rank).iter().zip(&matrix) {
                assert!((found - expected).abs() < 1e-6, "{rows}x{columns}");
            }
            assert_eq!(singular_values(&matrix, rows, columns).len(), rows.min(columns));
        }
    }

    /// Eckart and Young: the squared error is the energy of what was left out.
    #[test]
    fn the_error_is_what_was_left_out() {
        let (rows, columns, rank) = (12, 30, 4);
        let matrix = random(rows * columns, 5);
        let factors = truncate(&matrix, rows, columns, rank);
        let error: f64 = product(&factors, rows, columns, rank)
            .iter()
            .zip(&matrix)
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum();
        let left_out: f64 = factors.singular[rank..].iter().map(|s| s * s).sum();
        assert!((error / left_out - 1.0).abs() < 1e-5, "{error} {left_out}");
        let energy: f64 = matrix.iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!((factors.kept(rank) - (1.0 - left_out / energy)).abs() < 1e-10);
    }

    #[test]
    fn ranks_of_known_spectra() {
        // u vᵀ has rank one; a diagonal of 3, 4 has energies 9 and 16.
        let outer: Vec<f32> = (0..12).map(|p| (p / 4 + 1) as f32 * (p % 4 + 1) as f32).collect();
        let singular = singular_values(&outer, 3, 4);
        assert!((singular[0] - (14.0f64 * 30.0).sqrt()).abs() < 1e-10);
        assert_eq!(rank_of_energy(&singular, 0.99), 1);
        assert!((effective_rank(&singular).unwrap() - 1.0).abs() < 1e-4);
        assert_eq!(rank_of_energy(&[4.0, 3.0], 0.64), 1);
        assert_eq!(rank_of_energy(&[4.0, 3.0], 0.65), 2);
        assert_eq!(rank_of_energy(&[0.0, 0.0], 0.99), 0);
    }
}
