//! Small pictures of digits, drawn from a seed: 8 x 8 pixels, moved, noisy and of uneven ink.

use retune_core::random::Seed;

/// Pixels of a picture.
pub(crate) const PIXELS: usize = 64;

/// Classes.
pub(crate) const DIGITS: usize = 10;

/// Deviation of the noise: a tuned perceptron then finds about 19 of 20 digits, as it does on the
/// scans of handwriting these pictures stand in for.
const NOISE: f64 = 0.15;

/// The usual 5 x 7 letters of a dot-matrix display, one row per byte, the left pixel highest.
const FONT: [[u8; 7]; DIGITS] = [
    [0x0e, 0x11, 0x13, 0x15, 0x19, 0x11, 0x0e],
    [0x04, 0x0c, 0x04, 0x04, 0x04, 0x04, 0x0e],
    [0x0e, 0x11, 0x01, 0x02, 0x04, 0x08, 0x1f],
    [0x1f, 0x02, 0x04, 0x02, 0x01, 0x11, 0x0e],
    [0x02, 0x06, 0x0a, 0x12, 0x1f, 0x02, 0x02],
    [0x1f, 0x10, 0x1e, 0x01, 0x01, 0x11, 0x0e],
    [0x06, 0x08, 0x10, 0x1e, 0x11, 0x11, 0x0e],
    [0x1f, 0x01, 0x02, 0x04, 0x08, 0x08, 0x08],
    [0x0e, 0x11, 0x11, 0x0e, 0x11, 0x11, 0x0e],
    [0x0e, 0x11, 0x11, 0x0f, 0x01, 0x02, 0x0c],
];

/// Pictures and their digits.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pictures {
    /// `[count, PIXELS]`, about 0 to 1.
    pub(crate) pixels: Vec<f32>,
    /// `[count]`.
    pub(crate) digits: Vec<u32>,
}

impl Pictures {
    /// Draws `count` pictures; each is one of ten digits at one of six places.
    pub(crate) fn draw(count: usize, seed: Seed) -> Self {
        let mut found = Self::default();
        for index in 0..count {
            let mut random = seed.stream("glyph", &[index as u64]);
            let digit = random.below(DIGITS);
            let (right, down) = (random.below(3), random.below(2));
            let ink = 0.5 + 0.5 * random.uniform();
            for pixel in 0..PIXELS {
                let (row, column) = (pixel / 8, pixel % 8);
                let inked = row
                    .checked_sub(down)
                    .and_then(|row| FONT[digit].get(row))
                    .zip(column.checked_sub(right).filter(|column| *column < 5))
                    .is_some_and(|(row, column)| row >> (4 - column) & 1 == 1);
                let value = if inked { ink } else { 0.0 } + NOISE * random.normal();
                found.pixels.push(value as f32);
            }
            found.digits.push(digit as u32);
        }
        found
    }

    /// Sees the pictures through a camera with a gain `exp(N(0, gain²))` and an offset
    /// `N(0, offset²)` of its own for each pixel.
    pub(crate) fn through_camera(mut self, gain: f64, offset: f64, seed: Seed) -> Self {
        let mut random = seed.stream("camera", &[]);
        let camera: Vec<(f64, f64)> = (0..PIXELS)
            .map(|_| ((gain * random.normal()).exp(), offset * random.normal()))
            .collect();
        for (place, value) in self.pixels.iter_mut().enumerate() {
            let (gain, offset) = camera[place % PIXELS];
            *value = (f64::from(*value) * gain + offset) as f32;
        }
        self
    }

    /// Puts other pictures behind these.
    pub(crate) fn extend(&mut self, others: Self) {
        self.pixels.extend(others.pixels);
        self.digits.extend(others.digits);
    }

    /// Returns how many there are.
    pub(crate) fn len(&self) -> usize {
        self.digits.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_depend_on_seed_and_place_only() {
        let (few, many) = (Pictures::draw(5, Seed(1)), Pictures::draw(50, Seed(1)));
        assert_eq!(few.pixels[..], many.pixels[..5 * PIXELS]);
        assert_ne!(few.pixels, Pictures::draw(5, Seed(2)).pixels);
        assert!(many.digits.iter().all(|digit| *digit < 10) && many.len() == 50);
    }

    #[test]
    fn a_camera_is_the_same_for_every_picture() {
        let clean = Pictures::draw(2, Seed(1));
        let seen = clean.clone().through_camera(0.5, 0.4, Seed(3));
        // Two pictures fix gain and offset of a pixel; both must give back the second picture.
        let again = clean.clone().through_camera(0.5, 0.4, Seed(3));
        assert_eq!(seen.pixels, again.pixels);
        let zero = Pictures { pixels: vec![0.0; PIXELS], digits: vec![0] };
        let one = Pictures { pixels: vec![1.0; PIXELS], digits: vec![0] };
        let offset = zero.through_camera(0.5, 0.4, Seed(3)).pixels;
        let top = one.through_camera(0.5, 0.4, Seed(3)).pixels;
        for (place, (value, seen)) in clean.pixels.iter().zip(&seen.pixels).enumerate() {
            let pixel = place % PIXELS;
            let expected = value * (top[pixel] - offset[pixel]) + offset[pixel];
            assert!((seen - expected).abs() < 1e-5, "{seen} {expected}");
        }
    }
}
