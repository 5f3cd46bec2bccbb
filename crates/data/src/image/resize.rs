//! Resampling, in the fixed-point arithmetic of the Pillow library.

use super::Picture;

/// How a pixel is made from those around its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// A triangle, 1 wide on each side.
    Bilinear,
    /// Keys' cubic with a = -1/2, 2 wide.
    Bicubic,
    /// A windowed sinc, 3 wide.
    Lanczos,
}

impl Filter {
    /// Returns the filter a `preprocessor_config.json` means by `resample`.
    pub fn of_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Lanczos),
            2 => Some(Self::Bilinear),
            3 => Some(Self::Bicubic),
            _ => None,
        }
    }

    fn reach(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        if x >= self.reach() {
            return 0.0;
        }
        match self {
            Self::Bilinear => 1.0 - x,
            Self::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Self::Bicubic => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            Self::Lanczos => sinc(x) * sinc(x / 3.0),
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * std::f64::consts::PI;
    x.sin() / x
}

/// Bits behind the point of a weight.
const BITS: u32 = 22;

/// Where one output pixel reads, and with which weights.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// Works out the taps of every output place: the filter is as much wider as the picture shrinks.
fn taps(inputs: usize, outputs: usize, filter: Filter) -> Vec<Taps> {
    let scale = inputs as f64 / outputs as f64;
    let stretch = scale.max(1.0);
    let reach = filter.reach() * stretch;
    let of_output = |place: usize| {
        let centre = (place as f64 + 0.5) * scale;
        let first = ((centre - reach + 0.5) as isize).max(0) as usize;
        let last = ((centre + reach + 0.5) as usize).min(inputs);
        let at = |input: usize| filter.weight((input as f64 - centre + 0.5) / stretch);
        let weights: Vec<f64> = (first..last).map(at).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: &f64| {
            let weight = if sum == 0.0 { *weight } else { weight / sum };
            (weight * f64::from(1 << BITS) + 0.5_f64.copysign(weight)) as i32
        };
        Taps { first, weights: weights.iter().map(fixed).collect() }
    };
    (0..outputs).map(of_output).collect()
}

fn sum(taps: &Taps, value: impl Fn(usize) -> u8) -> u8 {
    let start = 1_i64 << (BITS - 1);
    let products = taps.weights.iter().enumerate();
    let total = products.fold(start, |total, (place, weight)| {
        total + i64::from(*weight) * i64::from(value(taps.first + place))
    });
    (total >> BITS).clamp(0, 255) as u8
}

/// Brings a picture to `height` and `width`, first along its rows, then along its columns.
pub fn resize(picture: &Picture, [height, width]: [usize; 2], filter: Filter) -> Picture {
    let channels = picture.channels;
    let mut now = picture.clone();
    if now.width != width {
        let taps = taps(now.width, width, filter);
        let mut values = Vec::with_capacity(now.height * width * channels);
        for row in now.values.chunks_exact(now.width * channels) {
            for taps in &taps {
                let of_channel = |c| sum(taps, |column| row[column * channels + c]);
                values.extend((0..channels).map(of_channel));
            }
        }
        now = Picture { width, values, ..now };
    }
    if now.height != height {
        let row = width * channels;
        let taps = taps(now.height, height, filter);
        let of_row = |taps: &Taps| -> Vec<u8> {
            (0..row).map(|place| sum(taps, |line| now.values[line * row + place])).collect()
        };
        let values = taps.iter().flat_map(of_row).collect();
        now = Picture { height, values, ..now };
    }
    now
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers without an order a filter could hide behind.
    fn noise(width: usize, height: usize, channels: usize) -> Picture {
        let value = |i: usize| ((i * 7919 + i * i * 31 + 13) % 256) as u8;
        let values = (0..width * height * channels).map(value).collect();
        Picture { width, height, channels, values }
    }

    #[test]
    fn halving_by_triangles_worked_out_by_hand() {
        // Four pixels to two: the triangle is 2 wide on each side of place 1, so that the first
        // three pixels weigh 3/4, 3/4 and 1/4 of 7/4 in all.
        let picture = Picture { width: 4, height: 1, channels: 1, values: vec![70, 140, 210, 0] };
        let found = resize(&picture, [1, 2], Filter::Bilinear);
        // (3 · 70 + 3 · 140 + 210) / 7 = 120; (140 + 3 · 210 + 0) / 7 = 110.
        assert_eq!(found.values, [120, 110]);
    }

    #[test]
    fn the_same_size_is_the_same_picture() {
        let picture = noise(5, 4, 3);
        assert_eq!(resize(&picture, [4, 5], Filter::Bicubic), picture);
    }

    /// Made by Pillow 13.0.0: `Image.frombytes(…).resize((width, height), filter)` of [`noise`].
    #[test]
    fn every_number_is_pillows() {
        type Case<'a> = (usize, usize, usize, [usize; 2], u64, &'a [u8]);
        let cases: &[Case<'_>] = &[
            (7, 5, 1, [4, 3], 2, &[51, 170, 140, 122, 155, 141, 103, 112, 74, 105, 108, 170]),
            (7, 5, 1, [4, 3], 3, &[38, 179, 141, 128, 160, 147, 105, 110, 59, 99, 105, 183]),
            (
                4,
                3,
                3,
                [5, 6],
                3,
                &[
                    0, 6, 88, 134, 96, 146, 237, 184, 177, 31, 140, 75, 24, 131, 162, 75, 133, 255,
                    71, 74, 148, 135, 152, 186, 166, 217, 188, 31, 147, 60, 17, 107, 131, 43, 91,
                    227, 184, 161, 218, 133, 215, 238, 65, 244, 211, 29, 149, 58, 16, 80, 87, 14,
                    46, 156, 103, 75, 104, 112, 95, 180, 97, 114, 241, 21, 105, 184, 68, 125, 105,
                    132, 146, 52, 37, 7, 20, 98, 7, 135, 130, 25, 255, 16, 75, 255, 103, 159, 122,
                    213, 218, 0,
                ],
            ),
            (
                9,
                8,
                1,
                [4, 4],
                1,
                &[68, 188, 135, 129, 110, 75, 148, 104, 98, 138, 156, 101, 137, 101, 126, 153],
            ),
        ];
        for (width, height, channels, size, filter, expected) in cases {
            let picture = noise(*width, *height, *channels);
            let found = resize(&picture, *size, Filter::of_number(*filter).unwrap());
            assert_eq!(found.values, *expected, "{width} × {height} to {size:?} by {filter}");
        }
    }
}
