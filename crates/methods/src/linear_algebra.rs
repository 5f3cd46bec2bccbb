//! Matrices that methods are made of: skew-symmetric ones, their Cayley transforms, inverses.

use retune_core::parameters::to_vec;
use retune_eigen::add_scaled;
use tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};

/// Returns the identity.
pub fn identity(n: usize, device: &Device) -> Tensor<2> {
    Tensor::eye(n, device)
}

/// Returns skew-symmetric matrices `[n, b, b]` from their strict upper triangles `[n, b(b-1)/2]`,
/// row by row.
pub fn skew(triangles: Tensor<2>, b: usize) -> Tensor<3> {
    let n = triangles.dims()[0];
    let device = triangles.device();
    if b < 2 {
        return Tensor::zeros([n, b, b], &device);
    }
    let place = |row: usize, column: usize| row * (2 * b - row - 1) / 2 + column - row - 1;
    let mut places = Vec::with_capacity(b * b);
    let mut signs = Vec::with_capacity(b * b);
    for row in 0..b {
        for column in 0..b {
            let (sign, at) = match row.cmp(&column) {
                std::cmp::Ordering::Less => (1.0, place(row, column)),
                std::cmp::Ordering::Greater => (-1.0, place(column, row)),
                std::cmp::Ordering::Equal => (0.0, 0),
            };
            places.push(at as i32);
            signs.push(sign);
        }
    }
    let index = Tensor::<1, Int>::from_data(TensorData::new(places, [b * b]), &device);
    let signs = Tensor::<2>::from_data(TensorData::new(signs, [1, b * b]), &device);
    (triangles.select(1, index) * signs).reshape([n, b, b])
}

/// Returns (I − Q)(I + Q)⁻¹ of matrices `[n, b, b]`.
pub fn cayley(q: Tensor<3>) -> Tensor<3> {
    let [_, b, _] = q.dims();
    let identity: Tensor<3> = identity(b, &q.device()).unsqueeze();
    (identity.clone() - q.clone()).matmul(inverse(identity + q))
}

/// Returns I + 2Q + 2Q² + … + Qᵏ of matrices `[n, b, b]`, the series of (I + Q)(I − Q)⁻¹ with its
/// last term once, as PEFT sums `terms` of them.
///
/// PEFT's sum of three terms goes as far as that of four, and that of two ends with 2Q.
pub fn cayley_series(q: Tensor<3>, terms: usize) -> Tensor<3> {
    let [n, b, _] = q.dims();
    let mut sum: Tensor<3> = identity(b, &q.device()).unsqueeze();
    sum = sum.repeat_dim(0, n);
    let highest = if terms > 2 { 3.max(terms - 1) } else { terms.saturating_sub(1) };
    let mut power = q.clone();
    for term in 1..=highest {
        let factor = if term == highest && terms > 2 { 1.0 } else { 2.0 };
        sum = sum + power.clone().mul_scalar(factor);
        power = power.matmul(q.clone());
    }
    sum
}

/// Returns the inverses of matrices `[n, b, b]`.
///
/// A matrix that has none gives values that are not finite.
pub fn inverse(a: Tensor<3>) -> Tensor<3> {
    let [n, b, _] = a.dims();
    let device = a.device();
    let mut values = to_vec(a.clone().inner());
    for matrix in values.chunks_exact_mut((b * b).max(1)) {
        let wide: Vec<f64> = matrix.iter().map(|value| f64::from(*value)).collect();
        let inverse = invert(&wide, b);
        matrix.iter_mut().zip(inverse).for_each(|(value, i)| *value = i as f32);
    }
    // With X = A⁻¹ a constant, 2X − XAX has the value X and the derivative −X dA X, which is that of
    // the inverse.
    let x = Tensor::<3>::from_data(TensorData::new(values, [n, b, b]), &device.inner());
    x.clone().mul_scalar(2.0) - x.clone().matmul(a).matmul(x)
}

/// Returns a matrix of zeros with `values` added at flat `places`, which are below its size.
pub fn scatter(values: Tensor<1>, places: &[i32], shape: [usize; 2]) -> Tensor<2> {
    let device = values.device().inner();
    let index =
        Tensor::<1, Int>::from_data(TensorData::new(places.to_vec(), [places.len()]), &device);
    let zeros = Tensor::<1>::zeros([shape[0] * shape[1]], &device);
    zeros.select_assign(0, index, values, IndexingUpdateOp::Add).reshape(shape)
}

/// Multiplies runs of columns of `x`, `[rows, n·b]`, by the blocks `[n, b, b]`; one block is for all.
pub fn rotate_blocks(x: Tensor<2>, blocks: Tensor<3>) -> Tensor<2> {
    let ([rows, columns], [count, b, _]) = (x.dims(), blocks.dims());
    if count == 1 {
        return x
            .reshape([rows * columns / b, b])
            .matmul(blocks.squeeze_dim(0))
            .reshape([rows, columns]);
    }
    let x: Tensor<3> = x.reshape([rows, count, b]);
    x.swap_dims(0, 1).matmul(blocks).swap_dims(0, 1).reshape([rows, columns])
}

/// Returns an orthonormal basis of the columns of `p`, `[rows, n]`, the one that Householder's QR
/// decomposition as LAPACK has it gives.
pub fn orthonormal(p: Tensor<2>) -> Tensor<2> {
    let [rows, count] = p.dims();
    let signs = diagonal_signs(&to_vec(p.clone().inner()), rows, count);
    let mut basis: Vec<Tensor<2>> = Vec::new();
    for (column, sign) in p.chunk(count, 1).into_iter().zip(signs) {
        // Twice is enough for orthogonality to the last bits (Kahan).
        let rest = (0..2).fold(column, |rest, _| {
            basis.iter().fold(rest, |rest, known| {
                let along = known.clone().transpose().matmul(rest.clone());
                rest - known.clone().matmul(along)
            })
        });
        let length = rest.clone().powi_scalar(2).sum_dim(0).sqrt();
        basis.push((rest / length).mul_scalar(sign));
    }
    Tensor::cat(basis, 1)
}

/// Returns the signs of the diagonal of R in Householder's QR decomposition.
fn diagonal_signs(p: &[f32], rows: usize, count: usize) -> Vec<f64> {
    let mut a: Vec<f64> = p.iter().map(|value| f64::from(*value)).collect();
    let mut signs = Vec::with_capacity(count);
    for k in 0..count {
        let length = (k..rows).map(|row| a[row * count + k].powi(2)).sum::<f64>().sqrt();
        let below = (k + 1..rows).any(|row| a[row * count + k] != 0.0);
        let head = a[k * count + k];
        // A column that is zero below the diagonal is not reflected.
        let beta = if below { -length.copysign(head) } else { head };
        signs.push(1.0_f64.copysign(beta));
        if !below {
            continue;
        }
        let mut v: Vec<f64> = (k..rows).map(|row| a[row * count + k]).collect();
        v[0] -= beta;
        let square: f64 = v.iter().map(|x| x * x).sum();
        for column in k..count {
            let along: f64 =
                v.iter().enumerate().map(|(i, x)| x * a[(k + i) * count + column]).sum();
            for (i, x) in v.iter().enumerate() {
                a[(k + i) * count + column] -= 2.0 * along / square * x;
            }
        }
    }
    signs
}

/// Inverts one matrix `[n, n]` by Gauss and Jordan's elimination with pivots.
///
/// A matrix that has no inverse gives values that are not finite.
pub fn invert(matrix: &[f64], n: usize) -> Vec<f64> {
    let width = 2 * n;
    let mut rows = vec![0.0_f64; n * width];
    for row in 0..n {
        rows[row * width..row * width + n].copy_from_slice(&matrix[row * n..(row + 1) * n]);
        rows[row * width + n + row] = 1.0;
    }
    for column in 0..n {
        let size = |row: &usize| rows[row * width + column].abs();
        let pivot = (column..n).max_by(|a, b| size(a).total_cmp(&size(b))).unwrap_or(column);
        for at in 0..width {
            rows.swap(pivot * width + at, column * width + at);
        }
        let scale = 1.0 / rows[column * width + column];
        rows[column * width..(column + 1) * width].iter_mut().for_each(|value| *value *= scale);
        let pivot: Vec<f64> = rows[column * width..(column + 1) * width].to_vec();
        for row in (0..n).filter(|row| *row != column) {
            let factor = rows[row * width + column];
            let own = &mut rows[row * width..(row + 1) * width];
            own.iter_mut().zip(&pivot).for_each(|(value, p)| *value -= factor * p);
        }
    }
    rows.chunks_exact(width.max(1)).flat_map(|row| row[n..].to_vec()).collect()
}

/// Multiplies `[rows, inner]` by `[inner, columns]`.
pub fn product(a: &[f64], b: &[f64], inner: usize, columns: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(a.len() / inner.max(1) * columns);
    for row in a.chunks_exact(inner.max(1)) {
        let mut sum = vec![0.0; columns];
        for (factor, values) in row.iter().zip(b.chunks_exact(columns.max(1))) {
            add_scaled(&mut sum, *factor, values);
        }
        out.extend(sum);
    }
    out
}

/// Transposes a matrix `[rows, columns]`.
pub fn transposed(a: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| a[r * columns + c])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32], shape: [usize; 3]) -> Tensor<3> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::flex())
    }

    fn close(found: Tensor<3>, expected: &[f32]) {
        let found = to_vec(found);
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-6, "{found:?}, expected {expected:?}");
        }
    }

    #[test]
    fn a_skew_matrix_by_hand() {
        let triangles = Tensor::<2>::from_data([[1.0, 2.0, 3.0]], &Device::flex());
        close(skew(triangles, 3), &[0.0, 1.0, 2.0, -1.0, 0.0, 3.0, -2.0, -3.0, 0.0]);
    }

    #[test]
    fn inverses_by_hand_with_a_zero_on_the_diagonal() {
        let a = tensor(&[0.0, 2.0, 4.0, 0.0, 4.0, 7.0, 2.0, 6.0], [2, 2, 2]);
        close(inverse(a), &[0.0, 0.25, 0.5, 0.0, 0.6, -0.7, -0.2, 0.4]);
    }

    #[test]
    fn the_cayley_transform_of_a_plane_is_a_rotation() {
        // q = tan(θ/2): (I − Q)(I + Q)⁻¹ turns by −2·atan(0.5), cos = 0.6, sin = 0.8.
        let q = tensor(&[0.0, 0.5, -0.5, 0.0], [1, 2, 2]);
        close(cayley(q), &[0.6, -0.8, 0.8, 0.6]);
    }

    #[test]
    fn blocks_rotate_runs_of_columns() {
        let device = Device::flex();
        let x = Tensor::<2>::from_data([[1.0, 2.0, 3.0, 4.0]], &device);
        let blocks = tensor(&[0.0, 1.0, -1.0, 0.0, 2.0, 0.0, 0.0, 3.0], [2, 2, 2]);
        assert_eq!(to_vec(rotate_blocks(x.clone(), blocks.clone())), [-2.0, 1.0, 6.0, 12.0]);
        let shared = blocks.narrow(0, 0, 1);
        assert_eq!(to_vec(rotate_blocks(x, shared)), [-2.0, 1.0, -4.0, 3.0]);
    }

    #[test]
    fn values_at_one_place_add_up() {
        let values = Tensor::<1>::from_data([1.0, 2.0, 4.0], &Device::flex());
        assert_eq!(to_vec(scatter(values, &[1, 3, 1], [2, 2])), [0.0, 5.0, 0.0, 2.0]);
    }

    #[test]
    fn an_orthonormal_basis_by_hand() {
        // The first reflection maps (3, 4) to (−5, 0), so both diagonal entries of R are negative
        // or positive as the heads were: −5, and 2 stays (nothing is below it).
        let p = Tensor::<2>::from_data([[3.0, 1.0], [4.0, 3.0]], &Device::flex());
        let q = to_vec(orthonormal(p));
        let expected = [-0.6, -0.8, -0.8, 0.6];
        for (f, e) in q.iter().zip(expected) {
            assert!((f - e).abs() < 1e-6, "{q:?}");
        }
    }

    #[test]
    fn series_by_hand() {
        // Of one number q = 0.5, which a skew matrix cannot be but a series can.
        let sum = |terms| to_vec(cayley_series(tensor(&[0.5], [1, 1, 1]), terms))[0];
        assert_eq!([1, 2, 3, 4, 5].map(sum), [1.0, 2.0, 2.625, 2.625, 2.8125]);
    }

    #[test]
    fn the_gradient_of_the_inverse_is_that_of_finite_differences() {
        let device = Device::flex().autodiff();
        let values = [2.0, 1.0, -0.5, 3.0];
        let make = |values: [f32; 4]| {
            Tensor::<3>::from_data(TensorData::new(values.to_vec(), [1, 2, 2]), &device)
        };
        let weights = tensor(&[1.0, -2.0, 0.5, 3.0], [1, 2, 2]);
        let loss = |a: Tensor<3>| (inverse(a) * weights.clone()).sum();
        let a = make(values).require_grad();
        let mut gradients = loss(a.clone()).backward();
        let gradient = to_vec(a.grad_remove(&mut gradients).unwrap());
        for place in 0..4 {
            let at = |step: f32| {
                let mut moved = values;
                moved[place] += step;
                to_vec(loss(make(moved)).inner())[0]
            };
            let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((slope - gradient[place]).abs() < 1e-3, "{slope} and {gradient:?}");
        }
    }
}
