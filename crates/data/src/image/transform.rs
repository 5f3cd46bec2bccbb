//! From a picture to a model's numbers, as `preprocessor_config.json` says, and augmentation.

use std::path::Path;

use serde_json::Value;

use super::Picture;
use super::resize::{Filter, resize};
use crate::error::{Error, Result};

/// The name of the file beside a model's weights.
pub const FILE: &str = "preprocessor_config.json";

/// How a picture is brought to the model's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fit {
    /// It has that size already.
    Exact,
    /// Both sides are stretched.
    Stretch([usize; 2]),
    /// The shorter side is brought to this many pixels, the longer in proportion.
    ShortestEdge(usize),
}

/// Brings pictures to a model's size and numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Transform {
    channels: usize,
    size: [usize; 2],
    fit: Fit,
    filter: Filter,
    crop: Option<[usize; 2]>,
    scale: f64,
    mean: Vec<f64>,
    deviation: Vec<f64>,
}

/// What is done to training pictures anew each epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Augment {
    /// Pixels of black put around the picture before a window of its own size is cut out at random.
    pub crop_padding: usize,
    /// Whether every second picture is mirrored, left to right.
    pub flip: bool,
}

impl Augment {
    /// Returns whether pictures stay as they are.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Crops and mirrors a picture as the 64 random bits `draw` say.
    #[must_use]
    pub fn apply(&self, picture: &Picture, draw: u64) -> Picture {
        let places = 2 * self.crop_padding as u64 + 1;
        // The lowest bit mirrors; 31 and 32 others choose the place of the window.
        let place = |bits: u64| (bits % places) as isize - self.crop_padding as isize;
        let corner = [place((draw >> 1) & 0x7fff_ffff), place(draw >> 32)];
        let picture = match self.crop_padding {
            0 => picture.clone(),
            _ => picture.window(corner, [picture.height, picture.width]),
        };
        if self.flip && draw & 1 == 1 { picture.flipped() } else { picture }
    }
}

impl Transform {
    /// Reads `preprocessor_config.json` of a model's folder for images of `size` (height, width).
    ///
    /// Without the file, pictures are stretched bilinearly and their numbers brought to -1 to 1.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be used, or gives pictures of another size.
    pub fn of_folder(folder: &Path, channels: usize, size: [usize; 2]) -> Result<Self> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Self::read(&path, &Value::Object(serde_json::Map::new()), channels, size);
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let value: Value = serde_json::from_str(&text).map_err(|error| {
            Error::file(&path, format!("it is not JSON: {error}"), "get the file again")
        })?;
        Self::read(&path, &value, channels, size)
    }

    /// Reads the content of a `preprocessor_config.json`.
    ///
    /// # Errors
    /// As [`Transform::of_folder`].
    pub fn read(path: &Path, value: &Value, channels: usize, size: [usize; 2]) -> Result<Self> {
        let file = Keys { path, value };
        let fit = match (file.switch("do_resize", true)?, value.get("size")) {
            (false, _) => Fit::Exact,
            (true, None | Some(Value::Null)) => Fit::Stretch(size),
            (true, Some(Value::Object(map))) if map.contains_key("shortest_edge") => {
                let edge = map.get("shortest_edge").and_then(Value::as_u64);
                let edge = edge.filter(|edge| (1..=1 << 15).contains(edge));
                Fit::ShortestEdge(edge.ok_or_else(|| file.wrong("size"))? as usize)
            }
            (true, Some(_)) => Fit::Stretch(file.size("size")?),
        };
        let filter = match value.get("resample") {
            None | Some(Value::Null) => Filter::Bilinear,
            Some(number) => {
                number.as_u64().and_then(Filter::of_number).ok_or_else(|| file.wrong("resample"))?
            }
        };
        let crop = match (file.switch("do_center_crop", false)?, fit) {
            (false, _) => None,
            (true, _) if value.get("crop_size").is_some() => Some(file.size("crop_size")?),
            (true, _) => Some(size),
        };
        let scale = if file.switch("do_rescale", true)? {
            file.number("rescale_factor", 1.0 / 255.0)?
        } else {
            1.0
        };
        let (mean, deviation) = if file.switch("do_normalize", true)? {
            (file.numbers("image_mean", channels)?, file.numbers("image_std", channels)?)
        } else {
            (vec![0.0; channels], vec![1.0; channels])
        };
        if deviation.iter().any(|deviation| *deviation <= 0.0) {
            return Err(file.wrong("image_std"));
        }
        let gives = crop.or(match fit {
            Fit::Stretch(size) => Some(size),
            Fit::ShortestEdge(edge) if edge == size[0] && edge == size[1] => None,
            Fit::ShortestEdge(edge) => Some([edge; 2]),
            Fit::Exact => None,
        });
        if gives.is_some_and(|gives| gives != size) {
            let [height, width] = gives.unwrap_or(size);
            return Err(Error::file(
                path,
                format!(
                    "it gives pictures of {height} × {width} pixels; the model reads {} × {}",
                    size[0], size[1]
                ),
                "set `size` and `crop_size` to the model's `image_size`",
            ));
        }
        Ok(Self { channels, size, fit, filter, crop, scale, mean, deviation })
    }

    /// Brings a picture to the model's size and number of channels.
    ///
    /// # Errors
    /// [`Error::Example`] if that cannot be.
    pub fn fit(&self, picture: Picture) -> Result<Picture> {
        let found = picture.channels;
        let picture = picture.with_channels(self.channels).ok_or_else(|| {
            Error::example(
                format!("the picture has {found} numbers a pixel, the model {}", self.channels),
                "give pictures in grey or colour",
            )
        })?;
        let (height, width) = (picture.height, picture.width);
        let picture = match self.fit {
            Fit::Exact => picture,
            Fit::Stretch(size) => resize(&picture, size, self.filter),
            Fit::ShortestEdge(edge) => {
                let (short, long) = (height.min(width), height.max(width));
                let other = edge * long / short;
                let size = if height <= width { [edge, other] } else { [other, edge] };
                resize(&picture, size, self.filter)
            }
        };
        let picture = match self.crop {
            Some([tall, wide]) => {
                let middle = |has: usize, wanted: usize| (has as isize - wanted as isize) / 2;
                let corner = [middle(picture.height, tall), middle(picture.width, wide)];
                picture.window(corner, [tall, wide])
            }
            None => picture,
        };
        if [picture.height, picture.width] == self.size {
            return Ok(picture);
        }
        Err(Error::example(
            format!(
                "the picture has {} × {} pixels, the model reads {} × {}",
                picture.height, picture.width, self.size[0], self.size[1]
            ),
            format!("let `{FILE}` beside the model resize it"),
        ))
    }

    /// Turns a picture of the model's size into its numbers, `[channels, height, width]`.
    pub fn numbers(&self, picture: &Picture) -> Vec<f32> {
        let mut out = Vec::with_capacity(picture.values.len());
        for channel in 0..self.channels {
            let (mean, deviation) = (self.mean[channel], self.deviation[channel]);
            let of_channel = picture.values.iter().skip(channel).step_by(self.channels);
            out.extend(
                of_channel
                    .map(|value| ((f64::from(*value) * self.scale - mean) / deviation) as f32),
            );
        }
        out
    }
}

/// The keys of a `preprocessor_config.json`.
struct Keys<'a> {
    path: &'a Path,
    value: &'a Value,
}

impl Keys<'_> {
    fn wrong(&self, key: &str) -> Error {
        let expected = match key {
            "resample" => "1 (Lanczos), 2 (bilinear) or 3 (bicubic)",
            "size" | "crop_size" => "a side, or height and width, or shortest_edge",
            "image_mean" | "image_std" => "one number above zero for each channel of the model",
            _ => "true or false, or a number",
        };
        let found = self.value.get(key).map_or_else(|| "nothing".to_owned(), Value::to_string);
        Error::file(
            self.path,
            format!("`{key}` cannot be used: expected {expected}, found {found}"),
            "correct the file, or take it away to have pictures stretched to the model's size",
        )
    }

    fn switch(&self, key: &str, default: bool) -> Result<bool> {
        match self.value.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key)),
        }
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.value.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => {
                value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| self.wrong(key))
            }
        }
    }

    /// Reads a side, or a height and a width.
    fn size(&self, key: &str) -> Result<[usize; 2]> {
        let side = |value: Option<&Value>| {
            let side = value.and_then(Value::as_u64).filter(|side| (1..=1 << 15).contains(side));
            side.map(|side| side as usize)
        };
        let found = match self.value.get(key) {
            Some(Value::Object(map)) => side(map.get("height")).zip(side(map.get("width"))),
            value => side(value).map(|side| (side, side)),
        };
        found.map(|(height, width)| [height, width]).ok_or_else(|| self.wrong(key))
    }

    /// Reads one number per channel, 0.5 where absent; one alone counts for all.
    fn numbers(&self, key: &str, channels: usize) -> Result<Vec<f64>> {
        let list = match self.value.get(key) {
            None | Some(Value::Null) => return Ok(vec![0.5; channels]),
            Some(Value::Array(list)) => list.iter().map(Value::as_f64).collect(),
            Some(value) => value.as_f64().map(|number| vec![number; channels]),
        };
        let fits = |list: &Vec<f64>| list.len() == channels && list.iter().all(|n| n.is_finite());
        list.filter(fits).ok_or_else(|| self.wrong(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn transform(value: Value, channels: usize, size: [usize; 2]) -> Result<Transform> {
        Transform::read(Path::new(FILE), &value, channels, size)
    }

    fn grey(width: usize, height: usize, values: &[u8]) -> Picture {
        Picture { width, height, channels: 1, values: values.to_vec() }
    }

    #[test]
    fn numbers_are_scaled_and_normalised_channel_by_channel() {
        let file = json!({"do_resize": false, "image_mean": [0.0, 0.5, 1.0], "image_std": [1.0, 0.5, 2.0]});
        let transform = transform(file, 3, [1, 2]).unwrap();
        let values = vec![0, 0, 0, 255, 255, 255];
        let picture = Picture { width: 2, height: 1, channels: 3, values };
        assert_eq!(transform.numbers(&picture), [0.0, 1.0, -1.0, 1.0, -0.5, 0.0]);
    }

    #[test]
    fn the_shortest_edge_is_resized_and_the_middle_cut_out() {
        let file = json!({"size": {"shortest_edge": 2}, "do_center_crop": true,
            "crop_size": {"height": 2, "width": 2}, "resample": 2});
        let transform = transform(file, 1, [2, 2]).unwrap();
        // Four by two becomes itself: the shorter edge has 2 pixels already.
        let picture = grey(4, 2, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(transform.fit(picture).unwrap().values, [2, 3, 6, 7]);
    }

    #[test]
    fn a_file_for_another_size_or_with_a_wrong_key_is_refused() {
        let of = |value| transform(value, 1, [4, 4]).unwrap_err().to_string();
        assert!(of(json!({"size": {"height": 8, "width": 8}})).contains("8 × 8"));
        assert!(of(json!({"size": {"height": 4}})).contains("`size`"));
        assert!(of(json!({"resample": 9})).contains("`resample`"));
        assert!(of(json!({"image_mean": [0.1, 0.2]})).contains("`image_mean`"));
        assert!(of(json!({"image_std": [0.0]})).contains("`image_std`"));
        assert!(of(json!({"do_resize": "yes"})).contains("`do_resize`"));
        let exact = transform(json!({"do_resize": false}), 1, [4, 4]).unwrap();
        assert!(exact.fit(grey(2, 2, &[0; 4])).is_err());
    }

    #[test]
    fn augmentation_is_a_function_of_its_draw() {
        let augment = Augment { crop_padding: 1, flip: true };
        let picture = grey(2, 2, &[1, 2, 3, 4]);
        // Bits 32 and up choose the column, bits 1 to 31 the row: 0 is one pixel up or left.
        assert_eq!(augment.apply(&picture, 0).values, [0, 0, 0, 1]);
        let (right, down, flip) = (2_u64 << 32, 2_u64 << 1, 1);
        assert_eq!(augment.apply(&picture, right | down).values, [4, 0, 0, 0]);
        let middle = (1_u64 << 32) | (1 << 1);
        assert_eq!(augment.apply(&picture, middle), picture);
        assert_eq!(augment.apply(&picture, middle | flip).values, [2, 1, 4, 3]);
        assert_eq!(Augment::default().apply(&picture, u64::MAX), picture);
    }
}
