//! A picture in memory.

/// A picture of 8-bit numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Numbers per pixel: 1 grey, 3 red, green, blue.
    pub channels: usize,
    /// The numbers, `[height, width, channels]`.
    pub values: Vec<u8>,
}

impl Picture {
    /// Turns grey into colour or colour into grey; nothing where the numbers per pixel are others.
    ///
    /// Grey is ITU-R 601's luma in the fixed-point arithmetic of the Pillow library.
    pub fn with_channels(self, channels: usize) -> Option<Self> {
        let values = match (self.channels, channels) {
            (found, wanted) if found == wanted => return Some(self),
            (1, 3) => self.values.iter().flat_map(|grey| [*grey; 3]).collect(),
            (3, 1) => self.values.chunks_exact(3).map(luma).collect(),
            _ => return None,
        };
        Some(Self { channels, values, ..self })
    }

    /// Returns the number at a place; 0 outside of the picture.
    fn at(&self, row: isize, column: isize, channel: usize) -> u8 {
        let inside = |place: isize, size: usize| usize::try_from(place).ok().filter(|p| *p < size);
        match (inside(row, self.height), inside(column, self.width)) {
            (Some(row), Some(column)) => {
                self.values[(row * self.width + column) * self.channels + channel]
            }
            _ => 0,
        }
    }

    /// Cuts a window out; what of it lies outside of the picture is 0.
    #[must_use]
    pub fn window(&self, [top, left]: [isize; 2], [height, width]: [usize; 2]) -> Self {
        let mut values = Vec::with_capacity(height * width * self.channels);
        for row in 0..height as isize {
            for column in 0..width as isize {
                values.extend((0..self.channels).map(|c| self.at(top + row, left + column, c)));
            }
        }
        Self { width, height, channels: self.channels, values }
    }

    /// Mirrors the picture, left to right.
    #[must_use]
    pub fn flipped(&self) -> Self {
        let row = self.width * self.channels;
        let mirrored = |row: &[u8]| -> Vec<u8> {
            row.chunks_exact(self.channels).rev().flatten().copied().collect()
        };
        let values = self.values.chunks_exact(row.max(1)).flat_map(mirrored).collect();
        Self { values, ..self.clone() }
    }
}

fn luma(pixel: &[u8]) -> u8 {
    let [red, green, blue] = [0, 1, 2].map(|channel| u32::from(pixel[channel]));
    ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grey() -> Picture {
        Picture { width: 3, height: 2, channels: 1, values: vec![1, 2, 3, 4, 5, 6] }
    }

    #[test]
    fn a_window_beyond_the_border_is_black_there() {
        assert_eq!(grey().window([-1, 1], [2, 3]).values, [0, 0, 0, 2, 3, 0]);
        assert_eq!(grey().window([0, 0], [2, 3]), grey());
    }

    #[test]
    fn mirrored_twice_is_the_same() {
        assert_eq!(grey().flipped().values, [3, 2, 1, 6, 5, 4]);
        let colour = grey().with_channels(3).unwrap();
        assert_eq!(colour.flipped().values[..6], [3, 3, 3, 2, 2, 2]);
        assert_eq!(colour.flipped().flipped(), colour);
    }

    #[test]
    fn grey_is_the_luma_of_colour() {
        // 255 · 0.299 = 76.2, 255 · 0.587 = 149.7, 255 · 0.114 = 29.1.
        let values = vec![255, 0, 0, 0, 255, 0, 0, 0, 255];
        let colour = Picture { width: 3, height: 1, channels: 3, values };
        assert_eq!(colour.with_channels(1).unwrap().values, [76, 150, 29]);
        assert_eq!(grey().with_channels(4), None);
    }
}
