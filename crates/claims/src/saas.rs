//! A Gaussian process for which an input matters little until the data say otherwise (SAAS; Eriksson
//! and Jankowiak, 2021, arXiv 2103.00349).
//!
//! Its settings are drawn by slice sampling (Neal, 2003), one logarithm after the other, rather than
//! by the paper's Hamiltonian sampler: the priors are the same.

use retune_core::random::Random;
use retune_eigen::dot;

/// Scale of the half-Cauchy prior of the factor on all inverse squared length-scales.
const SHRINKAGE: f64 = 0.1;

/// Settings kept of those drawn, and the draws between two of them.
const MODELS: usize = 8;
const THINNING: usize = 2;

/// Draws before the first that is kept.
const WARM_UP: usize = 16;

/// A Gaussian process with drawn settings.
#[derive(Debug)]
pub(crate) struct Surrogate {
    inputs: Vec<Vec<f64>>,
    values: Vec<f64>,
    models: Vec<Setting>,
}

/// Logarithms of the shrinkage τ, of each input's ρ, of the variance and of the noise's variance.
#[derive(Debug, Clone, PartialEq)]
struct Setting(Vec<f64>);

impl Setting {
    fn new(num_inputs: usize) -> Self {
        let mut logs = vec![0.0; num_inputs + 3];
        logs[0] = SHRINKAGE.ln();
        logs[num_inputs + 2] = (1e-2_f64).ln();
        Self(logs)
    }

    fn num_inputs(&self) -> usize {
        self.0.len() - 3
    }

    /// Returns the inverse squared length-scale of an input.
    fn inverse_square(&self, input: usize) -> f64 {
        (self.0[0] + self.0[1 + input]).exp()
    }

    fn variance(&self) -> f64 {
        self.0[1 + self.num_inputs()].exp()
    }

    fn noise(&self) -> f64 {
        self.0[2 + self.num_inputs()].exp()
    }

    /// Computes Matérn's covariance with five halves.
    fn covariance(&self, inverse_squares: &[f64], a: &[f64], b: &[f64]) -> f64 {
        let parts = a.iter().zip(b).zip(inverse_squares);
        let square: f64 = parts.map(|((a, b), inverse)| inverse * (a - b) * (a - b)).sum();
        let far = (5.0 * square).sqrt();
        self.variance() * (1.0 + far + far * far / 3.0) * (-far).exp()
    }

    fn inverse_squares(&self) -> Vec<f64> {
        (0..self.num_inputs()).map(|input| self.inverse_square(input)).collect()
    }

    /// Computes the covariances of `rows` with `columns`, `[rows, columns]`.
    fn covariances(&self, rows: &[Vec<f64>], columns: &[Vec<f64>]) -> Vec<f64> {
        let squares = self.inverse_squares();
        let of = |row: &Vec<f64>| {
            let row = row.clone();
            let (this, squares) = (self, &squares);
            columns.iter().map(move |column| this.covariance(squares, &row, column))
        };
        rows.iter().flat_map(of).collect()
    }

    /// Computes the logarithm of the prior, of these logarithms, but for a constant.
    fn log_prior(&self) -> f64 {
        let half_cauchy = |log: f64, scale: f64| log - (1.0 + (log.exp() / scale).powi(2)).ln();
        let gamma = |log: f64, shape: f64, rate: f64| shape * log - rate * log.exp();
        let inputs = self.0[1..=self.num_inputs()].iter();
        half_cauchy(self.0[0], SHRINKAGE)
            + inputs.map(|log| half_cauchy(*log, 1.0)).sum::<f64>()
            + gamma(self.variance().ln(), 2.0, 0.15)
            + gamma(self.noise().ln(), 0.9, 10.0)
    }

    /// Factors the covariance of observations.
    fn factor(&self, inputs: &[Vec<f64>]) -> Option<Vec<f64>> {
        let count = inputs.len();
        let mut matrix = self.covariances(inputs, inputs);
        for place in 0..count {
            matrix[place * count + place] += self.noise() + 1e-6;
        }
        cholesky(matrix, count)
    }

    /// Computes the logarithm of prior times likelihood, but for a constant.
    fn log_density(&self, inputs: &[Vec<f64>], values: &[f64]) -> f64 {
        let count = inputs.len();
        let Some(factor) = self.factor(inputs) else { return f64::NEG_INFINITY };
        let white = solve(&factor, count, values);
        let logs: f64 = (0..count).map(|place| factor[place * count + place].ln()).sum();
        self.log_prior() - 0.5 * dot(&white, &white) - logs
    }
}

impl Surrogate {
    /// Draws settings for values at inputs; `last` continues where an earlier one stopped.
    pub(crate) fn fit(
        inputs: Vec<Vec<f64>>,
        values: Vec<f64>,
        last: Option<&Self>,
        random: &mut Random,
    ) -> Self {
        let before = last.and_then(|last| last.models.last().cloned());
        let mut setting = before.unwrap_or_else(|| Setting::new(inputs[0].len()));
        let mut models = Vec::new();
        for draw in 0..WARM_UP + MODELS * THINNING {
            for place in 0..setting.0.len() {
                slice(&mut setting, place, &inputs, &values, random);
            }
            if draw >= WARM_UP && (draw - WARM_UP) % THINNING == THINNING - 1 {
                models.push(setting.clone());
            }
        }
        Self { inputs, values, models }
    }

    /// Returns the length-scale of each input, the geometric mean over settings.
    pub(crate) fn length_scales(&self) -> Vec<f64> {
        let of = |input: usize| {
            let logs = self.models.iter().map(|model| -0.5 * model.inverse_square(input).ln());
            (logs.sum::<f64>() / self.models.len() as f64).exp()
        };
        (0..self.inputs[0].len()).map(of).collect()
    }

    /// Draws values at all of `points` together, `draws` times for each setting.
    pub(crate) fn paths(
        &self,
        points: &[Vec<f64>],
        draws: usize,
        random: &mut Random,
    ) -> Vec<Vec<f64>> {
        let (seen, count) = (self.inputs.len(), points.len());
        let mut paths = Vec::new();
        for model in &self.models {
            let Some(factor) = model.factor(&self.inputs) else { continue };
            let white = solve(&factor, seen, &self.values);
            let across = model.covariances(points, &self.inputs);
            let across: Vec<Vec<f64>> =
                across.chunks_exact(seen).map(|row| solve(&factor, seen, row)).collect();
            let mut left = model.covariances(points, points);
            for row in 0..count {
                for column in 0..count {
                    left[row * count + column] -= dot(&across[row], &across[column]);
                }
            }
            let Some(left) = jittered(&left, count, model.variance()) else { continue };
            for _ in 0..draws {
                let normal: Vec<f64> = (0..count).map(|_| random.normal()).collect();
                let path = |row: usize| {
                    let drawn = dot(&left[row * count..=row * count + row], &normal[..=row]);
                    dot(&across[row], &white) + drawn
                };
                paths.push((0..count).map(path).collect());
            }
        }
        paths
    }
}

/// Draws one logarithm anew, the others as they are (Neal, 2003: stepping out, shrinkage).
fn slice(
    setting: &mut Setting,
    place: usize,
    inputs: &[Vec<f64>],
    values: &[f64],
    random: &mut Random,
) {
    let first = setting.0[place];
    let mut density = |at: f64| {
        setting.0[place] = at;
        // Far beyond what any prior holds for possible, numbers would overflow.
        if at.abs() > 30.0 { f64::NEG_INFINITY } else { setting.log_density(inputs, values) }
    };
    let level = density(first) + random.uniform().max(f64::MIN_POSITIVE).ln();
    let width = 2.0;
    let mut low = first - width * random.uniform();
    let mut high = low + width;
    for _ in 0..8 {
        if density(low) <= level {
            break;
        }
        low -= width;
    }
    for _ in 0..8 {
        if density(high) <= level {
            break;
        }
        high += width;
    }
    for _ in 0..64 {
        let next = low + (high - low) * random.uniform();
        if density(next) > level {
            return;
        }
        if next < first {
            low = next;
        } else {
            high = next;
        }
    }
    setting.0[place] = first;
}

/// Factors a symmetric matrix as `L Lᵀ`, `[n, n]`; nothing if it is not positive.
fn cholesky(mut matrix: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    for row in 0..n {
        let (above, rest) = matrix.split_at_mut(row * n);
        let own = &mut rest[..n];
        for column in 0..row {
            let other = &above[column * n..column * n + n];
            own[column] = (own[column] - dot(&own[..column], &other[..column])) / other[column];
        }
        let square = own[row] - dot(&own[..row], &own[..row]);
        if !(square > 0.0 && square.is_finite()) {
            return None;
        }
        own[row] = square.sqrt();
    }
    Some(matrix)
}

/// Factors what may be positive but for rounding, with as little on its diagonal as it takes.
fn jittered(matrix: &[f64], n: usize, variance: f64) -> Option<Vec<f64>> {
    (0..6).find_map(|power| {
        let mut matrix = matrix.to_vec();
        let jitter = variance * 1e-8 * 10.0_f64.powi(power);
        (0..n).for_each(|place| matrix[place * n + place] += jitter);
        cholesky(matrix, n)
    })
}

/// Solves `L x = b` for a lower triangle.
fn solve(factor: &[f64], n: usize, right: &[f64]) -> Vec<f64> {
    let mut found = Vec::with_capacity(n);
    for row in 0..n {
        let own = &factor[row * n..row * n + row];
        found.push((right[row] - dot(own, &found)) / factor[row * n + row]);
    }
    found
}

#[cfg(test)]
mod tests {
    use retune_core::random::Seed;

    use super::*;

    #[test]
    fn a_factor_gives_the_matrix_back() {
        let matrix = vec![4.0, 2.0, 0.4, 2.0, 5.0, 1.0, 0.4, 1.0, 3.0];
        let factor = cholesky(matrix.clone(), 3).unwrap();
        for row in 0..3 {
            for column in 0..3 {
                let few = row.min(column);
                let product: f64 =
                    (0..=few).map(|k| factor[row * 3 + k] * factor[column * 3 + k]).sum();
                assert!((product - matrix[row * 3 + column]).abs() < 1e-12);
            }
        }
        let found = solve(&factor, 3, &[2.0, 5.0, 1.0]);
        assert!((factor[3] * found[0] + factor[4] * found[1] - 5.0).abs() < 1e-12);
        assert_eq!(cholesky(vec![1.0, 2.0, 2.0, 1.0], 2), None);
    }

    #[test]
    fn the_density_is_that_of_two_normal_numbers() {
        let mut setting = Setting::new(1);
        setting.0 = vec![0.0, 0.0, 0.0, (0.5_f64).ln()];
        let found = setting.log_density(&[vec![0.0], vec![1.0]], &[0.3, -0.2]);
        // Covariance of Matérn's kernel at distance 1 and length 1.
        let root = 5.0_f64.sqrt();
        let k = (1.0 + root + 5.0 / 3.0) * (-root).exp();
        let own = 1.5 + 1e-6;
        let determinant = own * own - k * k;
        let square = (own * 0.09 + own * 0.04 + 2.0 * k * 0.06) / determinant;
        let expected = setting.log_prior() - 0.5 * square - 0.5 * determinant.ln();
        assert!((found - expected).abs() < 1e-9, "{found} {expected}");
    }

    #[test]
    fn paths_pass_through_what_was_seen_and_irrelevant_inputs_are_long() {
        let mut random = Seed(1).stream("points", &[]);
        let inputs: Vec<Vec<f64>> =
            (0..30).map(|_| (0..3).map(|_| random.uniform()).collect()).collect();
        let values: Vec<f64> = inputs.iter().map(|x| (6.0 * x[0]).sin()).collect();
        let surrogate = Surrogate::fit(inputs.clone(), values.clone(), None, &mut random);
        let lengths = surrogate.length_scales();
        assert!(lengths[1] > 3.0 * lengths[0] && lengths[2] > 3.0 * lengths[0], "{lengths:?}");
        for path in surrogate.paths(&inputs, 2, &mut random) {
            for (drawn, value) in path.iter().zip(&values) {
                assert!((drawn - value).abs() < 0.2, "{drawn} {value}");
            }
        }
    }
}
