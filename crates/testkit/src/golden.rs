//! Golden packs: numbers other programs computed, kept beside the programs that made them.

use std::path::{Path, PathBuf};

use retune_core::batch::{Batch, Document};
use retune_files::safetensors::SafetensorsFile;

/// Returns a folder of the packs, e.g. `training/llama`.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// The tensors of one golden file.
#[derive(Debug)]
pub struct Tensors(SafetensorsFile);

impl Tensors {
    /// Opens a file of the packs, e.g. `training/llama/batch.safetensors`.
    ///
    /// # Panics
    /// If it cannot be read.
    pub fn open(name: &str) -> Self {
        Self::at(&folder(name))
    }

    /// Opens a file anywhere.
    ///
    /// # Panics
    /// If it cannot be read.
    #[expect(clippy::panic, reason = "a golden file that cannot be read fails the test")]
    pub fn at(path: &Path) -> Self {
        Self(SafetensorsFile::open(path).unwrap_or_else(|error| panic!("{error}")))
    }

    /// Returns whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some()
    }

    /// Lists the names, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.0.names().collect();
        names.sort_unstable();
        names
    }

    /// Returns a tensor's shape.
    ///
    /// # Panics
    /// If there is no such tensor.
    #[expect(clippy::panic, reason = "a missing golden tensor fails the test")]
    pub fn shape(&self, name: &str) -> &[usize] {
        self.0.tensor(name).unwrap_or_else(|error| panic!("{error}")).shape
    }

    /// Reads a tensor's values as `f32`.
    ///
    /// # Panics
    /// If there is no such tensor.
    #[expect(clippy::panic, reason = "a missing golden tensor fails the test")]
    pub fn floats(&self, name: &str) -> Vec<f32> {
        let values = self.0.tensor(name).and_then(|tensor| tensor.to_f32());
        values.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Reads a tensor of whole numbers.
    ///
    /// # Panics
    /// If there is no such tensor or it holds floats.
    #[expect(clippy::panic, reason = "a missing golden tensor fails the test")]
    pub fn integers(&self, name: &str) -> Vec<i64> {
        let values = self.0.tensor(name).and_then(|tensor| tensor.to_i64());
        values.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Reads the padded rows of a batch.
    ///
    /// # Panics
    /// If there is no `input_ids` of two dimensions.
    pub fn rows(&self) -> Rows {
        let [count, length] = self.shape("input_ids") else {
            unreachable!("input_ids are [rows, length]")
        };
        let (count, length) = (*count, *length);
        let read = |name: &str| self.has(name).then(|| self.integers(name));
        Rows {
            count,
            length,
            ids: self.integers("input_ids"),
            mask: read("attention_mask").unwrap_or_else(|| vec![1; count * length]),
            token_types: read("token_type_ids"),
            labels: read("labels"),
        }
    }
}

/// A batch as other programs have it: rows of one length, padded on the right.
#[derive(Debug, Clone)]
pub struct Rows {
    /// Number of rows.
    pub count: usize,
    /// Their length with padding.
    pub length: usize,
    /// Token ids, `[rows, length]`.
    pub ids: Vec<i64>,
    /// 1 at tokens, 0 at padding, `[rows, length]`.
    pub mask: Vec<i64>,
    /// Token types, `[rows, length]`.
    pub token_types: Option<Vec<i64>>,
    /// Labels: `[rows, length]` with -100 for none, or a class per row.
    pub labels: Option<Vec<i64>>,
}

impl Rows {
    /// Returns the number of tokens of each row.
    pub fn lengths(&self) -> Vec<usize> {
        let kept = |row: &[i64]| row.iter().filter(|kept| **kept == 1).count();
        self.mask.chunks(self.length).map(kept).collect()
    }

    /// Returns the rows as documents without padding.
    pub fn documents(&self) -> Vec<Document> {
        let per_token = self.labels.as_ref().filter(|labels| labels.len() == self.ids.len());
        let document = |(row, length): (usize, usize)| {
            let span = row * self.length..row * self.length + length;
            let unsigned =
                |values: &[i64]| values[span.clone()].iter().map(|v| *v as u32).collect();
            Document {
                pixels: Vec::new(),
                tokens: unsigned(&self.ids),
                learn: match per_token {
                    Some(labels) => labels[span.clone()].iter().map(|label| *label >= 0).collect(),
                    None => vec![false; length],
                },
                token_types: self.token_types.as_deref().map(unsigned),
                class: match (&self.labels, per_token) {
                    (Some(labels), None) => u32::try_from(labels[row]).ok(),
                    _ => None,
                },
                task: None,
                row,
            }
        };
        self.lengths().into_iter().enumerate().map(document).collect()
    }

    /// Lays the rows end to end.
    ///
    /// # Panics
    /// If a row is all padding.
    #[expect(clippy::panic, reason = "a golden row that cannot be laid out fails the test")]
    pub fn batch(&self) -> Batch {
        Batch::new(&self.documents()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Drops the padding of values `[rows, length, width]`, giving `[tokens, width]`.
    pub fn unpadded(&self, values: &[f32]) -> Vec<f32> {
        let width = values.len() / (self.count * self.length);
        let rows = values.chunks(self.length * width).zip(self.lengths());
        rows.flat_map(|(row, length)| row[..length * width].iter().copied()).collect()
    }
}

/// Checks every element of `found` against `expected`.
///
/// # Panics
/// With tensor, index and both values of the worst element, if one differs by more than
/// `tolerance`, is not finite, or the lengths differ.
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: number of elements");
    let gap = |i: usize| {
        let gap = (found[i] - expected[i]).abs();
        if gap.is_nan() { f32::INFINITY } else { gap }
    };
    let worst = (0..found.len()).max_by(|a, b| gap(*a).total_cmp(&gap(*b)));
    if let Some(worst) = worst {
        let beyond = (0..found.len()).filter(|i| gap(*i) > tolerance).count();
        assert!(
            beyond == 0,
            "{what}[{worst}]: found {}, expected {}, they differ by {:.2e}; \
             {beyond} of {} elements differ by more than {tolerance:.0e}",
            found[worst],
            expected[worst],
            gap(worst),
            found.len(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_values_pass() {
        assert_close("x", &[1.0, 2.0], &[1.0, 2.00001], 2e-5);
    }

    #[test]
    #[should_panic(expected = "x[1]: found 2, expected 2.5")]
    fn the_worst_element_is_named() {
        assert_close("x", &[1.0, 2.0, 3.1], &[1.0, 2.5, 3.0], 1e-2);
    }

    #[test]
    #[should_panic(expected = "x[0]")]
    fn a_nan_is_never_close() {
        assert_close("x", &[f32::NAN], &[f32::NAN], 1.0);
    }

    #[test]
    fn rows_lose_their_padding() {
        let rows = Rows {
            count: 2,
            length: 3,
            ids: vec![5, 6, 7, 8, 0, 0],
            mask: vec![1, 1, 1, 1, 0, 0],
            token_types: None,
            labels: Some(vec![-100, 6, 7, -100, -100, -100]),
        };
        let batch = rows.batch();
        assert_eq!(batch.tokens, [5, 6, 7, 8]);
        assert_eq!(batch.targets, [Some(6), Some(7), None, None]);
        let values: Vec<f32> = (0..12u8).map(f32::from).collect();
        assert_eq!(rows.unpadded(&values), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    }
}
