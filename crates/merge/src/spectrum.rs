//! Singular values and vectors of a change, from the eigenvalues of its Gram matrix.
//!
//! For a change `Δ` the Gram matrix `ΔΔᵀ` (or `ΔᵀΔ`, whichever is smaller) is made and solved in
//! 64 bits. Its eigenvalues are the squared singular values, the shares of the change's energy,
//! and that is what is asked for here: a singular value below 1e-8 of the largest is noise.

use retune_eigen::{add_scaled as add_to, dot, symmetric};

/// Largest smaller side for which the Gram matrix is made; beyond, it takes minutes a matrix.
pub const MAX_SIDE: usize = 2048;

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
    let eigen = symmetric(gram(matrix, rows, columns), side, true);
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
    let eigen = symmetric(gram(matrix, rows, columns), side, false);
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
                add_to(&mut out[i * side..=i * side + i], *x, &line[..=i]);
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
