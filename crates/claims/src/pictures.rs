//! Handwritten digits as scanned, 8 x 8 pixels, and as seen through changes a proof makes.

use std::sync::Arc;

use retune_core::random::Seed;

/// Pixels of a picture.
pub(crate) const PIXELS: usize = 64;

/// Pixels of a row of it.
pub(crate) const SIDE: usize = 8;

/// Classes.
pub(crate) const DIGITS: usize = 10;

/// One picture a line: the digit, a space, a letter of base 17 per pixel.
const FILE: &str = include_str!("../../../datasets/digits/digits.txt");

/// Pictures and their digits.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Pictures {
    /// `[count, PIXELS]`, rows from the top, 0 to 1 as scanned.
    pub(crate) pixels: Vec<f32>,
    /// `[count]`.
    pub(crate) digits: Vec<u32>,
}

impl Pictures {
    /// Reads all 1797 digits, in an order drawn from a seed: any part of them is a random one.
    pub(crate) fn digits(seed: Seed) -> Self {
        let mut lines: Vec<&str> = FILE.lines().collect();
        seed.stream("digits", &[]).shuffle(&mut lines);
        let mut found = Self::default();
        for line in lines {
            let mut values = line.chars().filter_map(|letter| letter.to_digit(17));
            found.digits.extend(values.next());
            found.pixels.extend(values.map(|ink| ink as f32 / 16.0));
        }
        found
    }

    /// Returns how many there are.
    pub(crate) fn len(&self) -> usize {
        self.digits.len()
    }

    /// Puts other pictures behind these.
    #[must_use]
    pub(crate) fn and(mut self, others: Self) -> Self {
        self.pixels.extend(others.pixels);
        self.digits.extend(others.digits);
        self
    }

    /// Takes each pixel from another place of the same picture.
    fn taken(&self, from: impl Fn(usize) -> usize) -> Self {
        let pictures = self.pixels.chunks_exact(PIXELS);
        let pixels = pictures.flat_map(|picture| (0..PIXELS).map(|place| picture[from(place)]));
        Self { pixels: pixels.collect(), digits: self.digits.clone() }
    }

    /// Turns left and right about.
    pub(crate) fn mirrored(&self) -> Self {
        self.taken(|place| place / SIDE * SIDE + (SIDE - 1 - place % SIDE))
    }

    /// Turns by 90 degrees, against the clock.
    pub(crate) fn rotated(&self) -> Self {
        self.taken(|place| place % SIDE * SIDE + (SIDE - 1 - place / SIDE))
    }

    /// Puts `count` pixels, drawn from a seed, in each other's places, the same in every picture.
    pub(crate) fn with_moved(&self, count: usize, seed: Seed) -> Self {
        let mut random = seed.stream("moved pixels", &[]);
        let places = random.choose(PIXELS, count);
        let mut order: Vec<usize> = (0..PIXELS).collect();
        let mut from = places.clone();
        random.shuffle(&mut from);
        places.into_iter().zip(from).for_each(|(to, from)| order[to] = from);
        self.taken(|place| order[place])
    }

    /// Gives the digits other names, drawn from a seed, the same for every picture.
    pub(crate) fn renamed(&self, seed: Seed) -> Self {
        let mut names: Vec<u32> = (0..DIGITS as u32).collect();
        seed.stream("names", &[]).shuffle(&mut names);
        let digits = self.digits.iter().map(|digit| names[*digit as usize]).collect();
        Self { pixels: self.pixels.clone(), digits }
    }

    /// Sees the pictures through a camera with a gain `exp(N(0, gain²))` and an offset
    /// `N(0, offset²)` of its own for each pixel.
    pub(crate) fn through_camera(&self, gain: f64, offset: f64, seed: Seed) -> Self {
        let mut random = seed.stream("camera", &[]);
        let camera: Vec<(f64, f64)> = (0..PIXELS)
            .map(|_| ((gain * random.normal()).exp(), offset * random.normal()))
            .collect();
        let see = |(place, value): (usize, &f32)| {
            let (gain, offset) = camera[place % PIXELS];
            (f64::from(*value) * gain + offset) as f32
        };
        let pixels = self.pixels.iter().enumerate().map(see).collect();
        Self { pixels, digits: self.digits.clone() }
    }

    /// Gives the pixels as a table that models read.
    pub(crate) fn table(&self) -> Arc<[f32]> {
        self.pixels.clone().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_digits_are_there_in_an_order_of_the_seed() {
        let (one, again) = (Pictures::digits(Seed(1)), Pictures::digits(Seed(1)));
        assert_eq!(one, again);
        assert_eq!((one.len(), one.pixels.len()), (1797, 1797 * PIXELS));
        let other = Pictures::digits(Seed(2));
        assert_ne!(one.digits, other.digits);
        let counts = |pictures: &Pictures| {
            let mut counts = [0; DIGITS];
            pictures.digits.iter().for_each(|digit| counts[*digit as usize] += 1);
            counts
        };
        assert_eq!(counts(&one), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        assert_eq!(counts(&one), counts(&other));
        assert!(one.pixels.iter().all(|pixel| (0.0..=1.0).contains(pixel)));
        // The mean of the collection, worked out from the file with other tools.
        let mean = one.pixels.iter().map(|p| f64::from(*p)).sum::<f64>() / one.pixels.len() as f64;
        assert!((mean * 16.0 - 4.884_164_579_855_314).abs() < 1e-9, "{mean}");
    }

    #[test]
    fn turning_moves_pixels_where_they_belong() {
        let pixels: Vec<f32> = (0..PIXELS as u16).map(f32::from).collect();
        let one = Pictures { pixels, digits: vec![3] };
        let (mirrored, rotated) = (one.mirrored(), one.rotated());
        assert_eq!(mirrored.pixels[..9], [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 15.0]);
        // Against the clock, the right column becomes the top row.
        assert_eq!(rotated.pixels[..9], [7.0, 15.0, 23.0, 31.0, 39.0, 47.0, 55.0, 63.0, 6.0]);
        assert_eq!(mirrored.mirrored(), one);
        assert_eq!(rotated.rotated().rotated().rotated(), one);
    }

    #[test]
    fn new_names_are_the_same_for_every_picture() {
        let all = Pictures::digits(Seed(1));
        let renamed = all.renamed(Seed(7));
        let mut names = [None; DIGITS];
        for (old, new) in all.digits.iter().zip(&renamed.digits) {
            let name = names[*old as usize].get_or_insert(*new);
            assert_eq!(name, new);
        }
        let mut found: Vec<u32> = names.into_iter().flatten().collect();
        found.sort_unstable();
        assert_eq!(found, (0..10).collect::<Vec<u32>>());
    }

    #[test]
    fn a_camera_is_the_same_for_every_picture() {
        let all = Pictures::digits(Seed(1));
        let clean = Pictures {
            pixels: all.pixels[..2 * PIXELS].to_vec(),
            digits: all.digits[..2].to_vec(),
        };
        let seen = clean.through_camera(0.5, 0.4, Seed(3));
        // Two pictures fix gain and offset of a pixel; both must give back the second picture.
        let flat = |ink: f32| Pictures { pixels: vec![ink; PIXELS], digits: vec![0] };
        let offset = flat(0.0).through_camera(0.5, 0.4, Seed(3)).pixels;
        let top = flat(1.0).through_camera(0.5, 0.4, Seed(3)).pixels;
        for (place, (value, seen)) in clean.pixels.iter().zip(&seen.pixels).enumerate() {
            let pixel = place % PIXELS;
            let expected = value * (top[pixel] - offset[pixel]) + offset[pixel];
            assert!((seen - expected).abs() < 1e-5, "{seen} {expected}");
        }
    }
}
