//! Coefficients of the way along a great circle.

/// Returns the coefficients of two vectors at `t` of the way, from their angle's cosine; `None`
/// where they point the same or opposite ways and a circle through both is not determined.
pub(crate) fn along_circle(t: f64, cosine: f64, smallest_sine: f64) -> Option<[f64; 2]> {
    let angle = cosine.clamp(-1.0, 1.0).acos();
    let sine = angle.sin();
    (sine.abs() >= smallest_sine)
        .then(|| [((1.0 - t) * angle).sin() / sine, (t * angle).sin() / sine])
}
