//! Where LoRA's factors begin other than at random: at the weight's own strongest directions.

use retune_core::kernels::{matmul, matmul_nt};
use retune_core::parameters::to_vec;
use retune_core::random::Random;
use retune_core::{Error, Result};
use tensor::{Tensor, TensorData};

use crate::linear_algebra::orthonormal;
use crate::svd::Svd;

/// Directions beyond the rank, so that those asked for come out exact.
const MORE: usize = 8;

/// Rounds of the subspace iteration.
const ROUNDS: usize = 12;

/// The first and the second factor, `[rank, columns]` and `[rows, rank]`.
pub type Factors = (Vec<f32>, Vec<f32>);

fn check((a, b): Factors, module: &str) -> Result<Factors> {
    if a.iter().chain(&b).all(|value| value.is_finite()) {
        return Ok((a, b));
    }
    Err(Error::Setting {
        setting: "method.lora.init".to_owned(),
        what: format!("{module} has fewer directions than the rank"),
        expected: "a weight of at least that rank".to_owned(),
        found: "a weight of zeros or of lower rank".to_owned(),
        help: "lower `rank`, or leave this module out with `exclude`".to_owned(),
    })
}

/// Returns factors whose product, times `scale`, is the best approximation of the weight of that
/// rank: `A = √(S / scale) Vᵀ`, `B = U √(S / scale)` (PiSSA; Meng, Wang and Zhang, arXiv 2404.02948).
///
/// By subspace iteration (Halko et al., arXiv 0909.4061).
///
/// # Errors
/// If the weight is of lower rank.
pub fn principal(
    weight: Tensor<2>,
    rank: usize,
    scale: f64,
    random: &mut Random,
    module: &str,
) -> Result<Factors> {
    let [rows, columns] = weight.dims();
    let count = (rank + MORE).min(rows.min(columns));
    let mut start = vec![0.0; columns * count];
    random.fill_normal(&mut start, 1.0);
    let start = TensorData::new(start, [columns, count]);
    let mut q = orthonormal(Tensor::<2>::from_data(start, &weight.device()));
    let turned = weight.clone().transpose();
    for _ in 0..ROUNDS {
        let y = orthonormal(matmul(weight.clone(), q));
        q = orthonormal(matmul(turned.clone(), y));
    }
    let image = matmul(weight, q.clone());
    let gram = to_vec(matmul_nt(image.clone().transpose(), image.clone().transpose()));
    let (values, vectors) = eigen(&gram, count);
    let (image, q) = (to_vec(image), to_vec(q));
    let mut a = vec![0.0; rank * columns];
    let mut b = vec![0.0; rows * rank];
    for place in 0..rank {
        let size = values[place].max(0.0).sqrt();
        // U is the image over the singular value.
        let (of_a, of_b) = ((size / scale).sqrt(), (size / scale).sqrt() / size);
        let along = |from: &[f32], row: usize| -> f64 {
            let row = &from[row * count..][..count];
            row.iter().zip(&vectors[place]).map(|(x, e)| f64::from(*x) * e).sum()
        };
        for column in 0..columns {
            a[place * columns + column] = (along(&q, column) * of_a) as f32;
        }
        for row in 0..rows {
            b[row * rank + place] = (along(&image, row) * of_b) as f32;
        }
    }
    check((a, b), module)
}

/// Returns the first rows of R and columns of Q of the weight's QR decomposition (OLoRA;
/// Büyükakyüz, arXiv 2406.01775).
///
/// # Errors
/// If the weight's first columns are not independent.
pub fn orthonormal_start(weight: Tensor<2>, rank: usize, module: &str) -> Result<Factors> {
    let first = weight.clone().narrow(1, 0, rank);
    let b = orthonormal(first);
    let a = matmul(b.clone().transpose(), weight);
    check((to_vec(a), to_vec(b)), module)
}

/// Returns a first factor of normal numbers with deviation 1 / rank and a second of zeros.
pub fn gaussian([rows, columns]: [usize; 2], rank: usize, random: &mut Random) -> Factors {
    let mut a = vec![0.0; rank * columns];
    random.fill_normal(&mut a, 1.0 / rank as f64);
    (a, vec![0.0; rows * rank])
}

/// Returns factors of random numbers whose product is zero: the rows of an orthogonal matrix,
/// `[rank, rank]`, span the first's columns and the second's rows in turn, each a tenth as long as
/// normal numbers are. The rank is even.
pub fn orthogonal([rows, columns]: [usize; 2], rank: usize, random: &mut Random) -> Factors {
    let mut square = vec![0.0; rank * rank];
    random.fill_normal(&mut square, 1.0);
    let data = TensorData::new(square, [rank, rank]);
    let basis = to_vec(orthonormal(Tensor::<2>::from_data(data, &tensor::Device::flex())));
    let mut draw = |count: usize| {
        let mut values = vec![0.0; count * rank / 2];
        random.fill_normal(&mut values, 0.1);
        values
    };
    let (of_a, of_b) = (draw(columns), draw(rows));
    // Row 2k of the basis belongs to the first factor, row 2k + 1 to the second.
    let along = |values: &[f32], side: usize, row: usize, place: usize| -> f32 {
        let term = |k: usize| values[row * rank / 2 + k] * basis[(2 * k + side) * rank + place];
        (0..rank / 2).map(term).sum()
    };
    let a = (0..rank * columns).map(|i| along(&of_a, 0, i % columns, i / columns)).collect();
    let b = (0..rows * rank).map(|i| along(&of_b, 1, i / rank, i % rank)).collect();
    (a, b)
}

/// Returns a first factor of zeros and the weight's left singular vectors of the smallest values
/// (MiCA, arXiv 2604.01694).
pub fn minor(weight: &[f32], [rows, columns]: [usize; 2], rank: usize) -> Factors {
    let svd = Svd::new(weight, rows, columns);
    (vec![0.0; rank * columns], svd.left(svd.k - rank, svd.k))
}

/// Returns eigenvalues, largest first, and eigenvectors of a symmetric matrix (Jacobi's rotations).
fn eigen(matrix: &[f32], n: usize) -> (Vec<f64>, Vec<Vec<f64>>) {
    let mut a: Vec<f64> = matrix.iter().map(|value| f64::from(*value)).collect();
    let mut v = vec![0.0; n * n];
    (0..n).for_each(|i| v[i * n + i] = 1.0);
    for _ in 0..60 {
        let off: f64 = (0..n)
            .flat_map(|i| (0..i).map(move |j| (i, j)))
            .map(|(i, j)| a[i * n + j].powi(2))
            .sum();
        let all: f64 = a.iter().map(|x| x * x).sum();
        if off <= 1e-26 * all {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                if a[p * n + q] == 0.0 {
                    continue;
                }
                let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * a[p * n + q]);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = (t * t + 1.0).sqrt().recip();
                let s = t * c;
                for k in 0..n {
                    let (x, y) = (a[k * n + p], a[k * n + q]);
                    (a[k * n + p], a[k * n + q]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..n {
                    let (x, y) = (a[p * n + k], a[q * n + k]);
                    (a[p * n + k], a[q * n + k]) = (c * x - s * y, s * x + c * y);
                    let (x, y) = (v[k * n + p], v[k * n + q]);
                    (v[k * n + p], v[k * n + q]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|i, j| a[j * n + j].total_cmp(&a[i * n + i]));
    let vector = |i: &usize| (0..n).map(|k| v[k * n + i]).collect();
    (order.iter().map(|i| a[i * n + i]).collect(), order.iter().map(vector).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::random::Seed;
    use tensor::Device;

    fn product((a, b): &Factors, rows: usize, columns: usize) -> Vec<f32> {
        let rank = a.len() / columns;
        (0..rows * columns)
            .map(|i| {
                (0..rank).map(|k| b[i / columns * rank + k] * a[k * columns + i % columns]).sum()
            })
            .collect()
    }

    #[test]
    fn the_principal_factors_of_a_known_weight() {
        // Diagonal 5, 3, 1: of rank 2 the best is 5, 3, 0; times the scale of 2.
        let device = Device::flex();
        let weight = Tensor::<2>::from_floats(
            [[5.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]],
            &device,
        );
        let mut random = Seed(1).stream("principal", &[]);
        let factors = principal(weight, 2, 2.0, &mut random, "x").unwrap();
        let expected = [2.5, 0.0, 0.0, 0.0, 0.0, 1.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        for (found, expected) in product(&factors, 3, 4).iter().zip(expected) {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
        // Both factors carry the same share: rows of A are as long as columns of B.
        let length = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>();
        assert!((length(&factors.0) - length(&factors.1)).abs() < 1e-4);
        let zeros = Tensor::<2>::zeros([3, 4], &device);
        assert!(principal(zeros, 1, 1.0, &mut random, "x").is_err());
    }

    #[test]
    fn the_orthonormal_start_gives_the_first_columns_back() {
        let mut values = vec![0.0; 20];
        Seed(2).stream("weight", &[]).fill_normal(&mut values, 1.0);
        let data = TensorData::new(values.clone(), [5, 4]);
        let weight = Tensor::<2>::from_data(data, &Device::flex());
        let factors = orthonormal_start(weight, 2, "x").unwrap();
        let found = product(&factors, 5, 4);
        for row in 0..5 {
            for column in 0..2 {
                assert!((found[row * 4 + column] - values[row * 4 + column]).abs() < 1e-5);
            }
        }
        let b = &factors.1;
        let dot = |i: usize, j: usize| (0..5).map(|r| b[r * 2 + i] * b[r * 2 + j]).sum::<f32>();
        assert!((dot(0, 0) - 1.0).abs() < 1e-5 && dot(0, 1).abs() < 1e-5);
    }

    #[test]
    fn an_orthogonal_start_has_a_product_of_zero() {
        let mut random = Seed(6).stream("orthogonal", &[]);
        let factors = orthogonal([5, 7], 4, &mut random);
        assert!(factors.0.iter().chain(&factors.1).any(|value| value.abs() > 0.01));
        for value in product(&factors, 5, 7) {
            assert!(value.abs() < 1e-7, "{value}");
        }
    }

    #[test]
    fn a_gaussian_start_deviates_by_one_over_the_rank() {
        let (a, b) = gaussian([3, 4000], 4, &mut Seed(7).stream("gaussian", &[]));
        let square = a.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / a.len() as f64;
        assert!((square.sqrt() - 0.25).abs() < 0.01, "{square}");
        assert_eq!(b, vec![0.0; 12]);
    }

    #[test]
    fn the_minor_directions_of_a_known_weight() {
        // Outputs 2, 0 and 1 carry 5, 3 and 1.
        let weight = [0.0, 3.0, 0.0, 0.0, 0.0, 1.0, 5.0, 0.0, 0.0];
        let (a, b) = minor(&weight, [3, 3], 1);
        assert_eq!(a, [0.0; 3]);
        for (found, expected) in b.iter().zip([0.0, 1.0, 0.0]) {
            assert!((found - expected).abs() < 1e-6, "{b:?}");
        }
    }

    #[test]
    fn eigenvectors_of_a_matrix_by_hand() {
        // 2 1; 1 2 has 3 along (1, 1) and 1 along (1, -1).
        let (values, vectors) = eigen(&[2.0, 1.0, 1.0, 2.0], 2);
        assert!((values[0] - 3.0).abs() < 1e-12 && (values[1] - 1.0).abs() < 1e-12);
        assert!((vectors[0][0] - vectors[0][1]).abs() < 1e-12);
    }
}
