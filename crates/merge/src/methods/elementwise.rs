//! Sums over vectors in an order that does not depend on threads.

/// Partial sums kept side by side, so that they fill a vector register; their number is part of
/// the result's bits.
const LANES: usize = 8;

/// Adds `coefficient · x` to `sum`.
pub(crate) fn add_scaled(sum: &mut [f32], coefficient: f32, x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += coefficient * x);
}

/// Multiplies in place.
pub(crate) fn scale(x: &mut [f32], factor: f32) {
    for x in x {
        *x *= factor;
    }
}

/// Sums `x · y` in double precision.
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f64 {
    let mut sums = [0.0; LANES];
    let (xs, x_rest) = x.as_chunks::<LANES>();
    let (ys, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in xs.iter().zip(ys) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += f64::from(*x) * f64::from(*y);
        }
    }
    let rest: f64 = x_rest.iter().zip(y_rest).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    sums.iter().sum::<f64>() + rest
}

/// Sums absolute values in double precision.
pub(crate) fn sum_of_magnitudes(x: &[f32]) -> f64 {
    let mut sums = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += f64::from(x.abs()));
    }
    sums.iter().sum::<f64>() + rest.iter().map(|x| f64::from(x.abs())).sum::<f64>()
}

/// Replaces `sum` by the combination of all inputs.
pub(crate) fn combine(sum: &mut Vec<f32>, coefficients: &[f64], inputs: &[Vec<f32>]) {
    sum.clear();
    sum.resize(inputs.first().map_or(0, Vec::len), 0.0);
    for (coefficient, input) in coefficients.iter().zip(inputs) {
        add_scaled(sum, *coefficient as f32, input);
    }
}
