//! Matrices as trains of small tensors (Oseledets 2011).

use tensor::Tensor;

/// How a matrix is cut into cores: entry (i, j) is a product of one slice of each core, chosen by the
/// digits of i and then of j.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorTrain {
    /// Shape of each core: rank to the left, digits, rank to the right.
    pub cores: Vec<[usize; 3]>,
    /// Rows and columns of the matrix.
    pub shape: [usize; 2],
}

impl TensorTrain {
    /// Cuts a matrix into digits of at most `most` where its sides have such divisors, joined by
    /// ranks of at most `rank`.
    pub fn new(shape: [usize; 2], rank: usize, most: usize) -> Self {
        let digits = [digits(shape[0], most), digits(shape[1], most)].concat();
        let count: usize = digits.iter().product();
        let (mut cores, mut left, mut seen) = (Vec::with_capacity(digits.len()), 1, 1);
        for digit in digits {
            seen *= digit;
            // No rank is above what the sides of the cut can have.
            let right = rank.min(seen).min(count / seen);
            cores.push([left, digit, right]);
            left = right;
        }
        Self { cores, shape }
    }

    /// Returns the deviation of normal entries of the cores that gives entries of the matrix
    /// `deviation`.
    pub fn deviation(&self, deviation: f64) -> f64 {
        let paths: f64 = self.cores.iter().map(|[_, _, right]| *right as f64).product();
        (deviation * deviation / paths).powf(0.5 / self.cores.len() as f64)
    }

    /// Multiplies the cores out, in their order.
    ///
    /// # Shapes
    /// - returns: `[rows, columns]`
    pub fn matrix(&self, core: impl Fn(usize) -> Tensor<3>) -> Tensor<2> {
        let [_, digit, right] = self.cores[0];
        let mut product: Tensor<2> = core(0).reshape([digit, right]);
        for (place, [left, digit, right]) in self.cores.iter().copied().enumerate().skip(1) {
            let rows = product.dims()[0];
            let next: Tensor<2> = core(place).reshape([left, digit * right]);
            product = product.matmul(next).reshape([rows * digit, right]);
        }
        product.reshape(self.shape)
    }
}

/// Returns divisors whose product is `side`, each at most `most` where its primes allow.
fn digits(side: usize, most: usize) -> Vec<usize> {
    let (mut rest, mut primes, mut prime) = (side.max(1), Vec::new(), 2);
    while rest > 1 {
        if prime * prime > rest {
            prime = rest;
        }
        if rest.is_multiple_of(prime) {
            rest /= prime;
            primes.push(prime);
        } else {
            prime += 1;
        }
    }
    let mut digits: Vec<usize> = Vec::new();
    for prime in primes.into_iter().rev() {
        match digits.last_mut() {
            Some(last) if *last * prime <= most => *last *= prime,
            _ => digits.push(prime),
        }
    }
    if digits.is_empty() { vec![1] } else { digits }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::parameters::to_vec;
    use tensor::{Device, TensorData};

    #[test]
    fn sides_are_cut_into_small_divisors() {
        assert_eq!(digits(576, 8), [3, 6, 8, 4]);
        assert_eq!(digits(13, 8), [13]);
        assert_eq!(digits(1, 8), [1]);
        for side in 1..200 {
            assert_eq!(digits(side, 8).iter().product::<usize>(), side);
        }
    }

    #[test]
    fn a_matrix_by_hand() {
        // Rows 2, columns 2·2: M[i, (j, k)] = a[i] · B[j] · c[k] with ranks of 2 and 2.
        let train = TensorTrain::new([2, 4], 2, 2);
        assert_eq!(train.cores, [[1, 2, 2], [2, 2, 2], [2, 2, 1]]);
        let values: [&[f32]; 3] = [
            &[1.0, 0.0, 0.0, 2.0],
            &[1.0, 1.0, 0.0, 1.0, 3.0, 0.0, 0.0, 1.0],
            &[1.0, 2.0, 10.0, 20.0],
        ];
        let core = |place: usize| {
            let data = TensorData::new(values[place].to_vec(), train.cores[place]);
            Tensor::<3>::from_data(data, &Device::flex())
        };
        // Row 0 takes the first row of each slice of B: j = 0: (1, 1), j = 1: (0, 1); row 1 twice the
        // second: (6, 0) and (0, 2). Column k adds the first times c[0, k] and the second times c[1, k].
        let found = to_vec(train.matrix(core));
        assert_eq!(found, [11.0, 22.0, 10.0, 20.0, 6.0, 12.0, 20.0, 40.0]);
    }

    #[test]
    fn entries_have_the_deviation_asked_for() {
        let train = TensorTrain::new([8, 576], 5, 8);
        let paths: f64 = train.cores.iter().map(|core| core[2] as f64).product();
        let of_entry = train.deviation(0.3).powi(2 * train.cores.len() as i32) * paths;
        assert!((of_entry.sqrt() - 0.3).abs() < 1e-12);
    }
}
