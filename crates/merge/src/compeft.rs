//! ComPEFT: an update as the signs of its largest entries and one scale.
//!
//! Source: Yadav, Choshen, Raffel and Bansal, *ComPEFT: Compression for Communicating Parameter
//! Efficient Updates via Sparsification and Quantization*, 2023, arXiv 2311.13171. The change is
//! seen as one vector: the `density` largest entries by magnitude keep their sign, all others
//! become zero, and every kept entry gets the size `alpha · σ`, σ being the standard deviation of
//! the whole vector before the cut.

use std::collections::BTreeMap;

use retune_files::compeft::CompeftWriter;

use crate::update::Update;
use crate::{Error, Result};

/// Scales worth trying, in standard deviations: the paper's grid.
pub const ALPHAS: [f64; 9] = [0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0];

/// How much is kept, and how large it becomes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Share of entries that keep their sign, above 0 and at most 1.
    pub density: f64,
    /// Size of a kept entry, in standard deviations of the update.
    pub alpha: f64,
}

impl Settings {
    fn check(self) -> Result<()> {
        let wrong = |what: &str, expected: &str, found: f64| {
            Err(Error::Setting {
                setting: what.to_owned(),
                expected: expected.to_owned(),
                found: found.to_string(),
            })
        };
        if !(self.density > 0.0 && self.density <= 1.0) {
            return wrong("density", "a share above 0 and at most 1, such as 0.1", self.density);
        }
        if !(self.alpha > 0.0 && self.alpha.is_finite()) {
            return wrong("alpha", "a number above 0, such as 1 or 4", self.alpha);
        }
        Ok(())
    }
}

/// Which entries are kept: those above the threshold, and as many at it as are still wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Selection {
    /// Entries of the whole update.
    pub num_entries: u64,
    /// Entries kept. Fewer than asked for where the others are zero.
    pub num_kept: u64,
    /// Standard deviation of all entries, with `n - 1` and the mean removed.
    pub deviation: f64,
    /// The least magnitude kept.
    pub threshold: f32,
    /// Entries at the threshold that are kept, the first ones.
    ties: u64,
}

/// Finds the largest entries of an update, without holding more than one of its tensors.
///
/// Magnitudes are counted by the upper half of their bits, then, for the half the threshold falls
/// into, by the lower: two passes give the threshold exactly.
///
/// # Errors
/// [`Error`] if the settings are impossible, a value is not finite, or nothing was changed.
pub fn select(update: &Update, density: f64) -> Result<Selection> {
    Settings { density, alpha: 1.0 }.check()?;
    let mut upper = vec![0u64; 1 << 15];
    let mut spread = Spread::default();
    for part in update.parts().iter().filter(|part| part.is_change) {
        let values = update.change(part)?;
        for value in &values {
            upper[(magnitude(*value) >> 16) as usize] += 1;
        }
        spread.add(&values);
    }
    let num_entries = spread.count;
    let wanted = (num_entries as f64 * density).floor() as u64;
    let nothing = |found: String| Error::Content {
        path: update.path().to_path_buf(),
        what: "there is nothing to compress".to_owned(),
        expected: "an update with entries of different size".to_owned(),
        found,
        help: "check that this is the tuned adapter or model, and raise the density".to_owned(),
    };
    if wanted == 0 {
        return Err(nothing(format!(
            "{num_entries} entries, of which a density of {density} keeps none"
        )));
    }
    let deviation = spread.deviation();
    // The scale must be a number of the file's type.
    if (deviation as f32) < f32::MIN_POSITIVE {
        return Err(nothing(format!("{num_entries} entries, all the same")));
    }
    let (bin, above) = find(&upper, wanted);
    let mut lower = vec![0u64; 1 << 16];
    for part in update.parts().iter().filter(|part| part.is_change) {
        for value in update.change(part)? {
            let bits = magnitude(value);
            if bits >> 16 == bin as u32 {
                lower[(bits & 0xffff) as usize] += 1;
            }
        }
    }
    let (place, above_in_bin) = find(&lower, wanted - above);
    let threshold = f32::from_bits((bin as u32) << 16 | place as u32);
    let greater = above + above_in_bin;
    let ties = if threshold == 0.0 { 0 } else { wanted - greater };
    Ok(Selection { num_entries, num_kept: greater + ties, deviation, threshold, ties })
}

/// Returns the highest bin that, with all above it, holds `wanted` entries, and the count above it.
fn find(bins: &[u64], wanted: u64) -> (usize, u64) {
    let mut above = 0;
    for (bin, count) in bins.iter().enumerate().rev() {
        if above + count >= wanted {
            return (bin, above);
        }
        above += count;
    }
    (0, above)
}

/// The bits of a magnitude; they are in the order of the numbers.
fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

/// Count, mean and squared distance from the mean, gathered tensor by tensor (Chan, Golub and
/// LeVeque, 1979).
#[derive(Debug, Default)]
struct Spread {
    count: u64,
    mean: f64,
    squares: f64,
}

impl Spread {
    fn add(&mut self, values: &[f32]) {
        if values.is_empty() {
            return;
        }
        let count = values.len() as f64;
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
        let squares = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>();
        let before = self.count as f64;
        let gap = mean - self.mean;
        let total = before + count;
        self.mean += gap * count / total;
        self.squares += squares + gap * gap * before * count / total;
        self.count += values.len() as u64;
    }

    fn deviation(&self) -> f64 {
        if self.count < 2 { 0.0 } else { (self.squares / (self.count - 1) as f64).sqrt() }
    }
}

/// Turns tensors into signs, in the order of the update.
#[derive(Debug)]
pub struct Signer {
    threshold: u32,
    ties: u64,
}

impl Signer {
    /// Starts at the first tensor.
    pub fn new(selection: &Selection) -> Self {
        Self { threshold: magnitude(selection.threshold), ties: selection.ties }
    }

    /// Returns the signs of the next tensor: 1, -1, or 0 where it is not kept.
    pub fn signs(&mut self, values: &[f32]) -> Vec<i8> {
        let mut sign = |value: f32| {
            let bits = magnitude(value);
            let kept = bits > self.threshold || (bits == self.threshold && self.ties > 0);
            if !kept {
                return 0;
            }
            self.ties -= u64::from(bits == self.threshold);
            if value < 0.0 { -1 } else { 1 }
        };
        values.iter().map(|value| sign(*value)).collect()
    }
}

/// Compresses an update and returns the bytes of its file.
///
/// The metadata is stored beside what a reader needs: `start`, `density`, `alpha`, and
/// `adapter_config` where it is an adapter.
///
/// # Errors
/// Those of [`select`], and of reading.
pub fn compress(
    update: &Update,
    settings: Settings,
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, Selection)> {
    settings.check()?;
    let selection = select(update, settings.density)?;
    let mut metadata = metadata.clone();
    metadata.insert("start".to_owned(), update.start().name().to_owned());
    metadata.insert("density".to_owned(), settings.density.to_string());
    metadata.insert("alpha".to_owned(), settings.alpha.to_string());
    if let Some(config) = update.config() {
        metadata.insert("adapter_config".to_owned(), config.to_owned());
    }
    let scale = (settings.alpha * selection.deviation) as f32;
    let mut writer = CompeftWriter::new(scale, metadata);
    let mut signer = Signer::new(&selection);
    for part in update.parts() {
        if part.is_change {
            let signs = signer.signs(&update.change(part)?);
            writer.signs(&part.name, &part.shape, &signs)?;
        } else {
            let kept = update.kept(part)?;
            writer.raw(&part.name, kept.dtype, kept.shape, kept.bytes)?;
        }
    }
    Ok((writer.finish()?, selection))
}

#[cfg(test)]
mod tests {
    use retune_files::compeft::CompeftFile;
    use std::path::Path;

    use super::*;
    use crate::update::write_tensors;

    fn adapter(folder: &Path, kind: &str, tensors: &[(&str, &[usize], Vec<f32>)]) -> Update {
        let config = format!("{{\"peft_type\": \"{kind}\"}}");
        std::fs::write(folder.join("adapter_config.json"), config).unwrap();
        write_tensors(&folder.join("adapter_model.safetensors"), tensors);
        Update::adapter(folder).unwrap()
    }

    fn settings(density: f64, alpha: f64) -> Settings {
        Settings { density, alpha }
    }

    #[test]
    fn ten_entries_worked_out_by_hand() {
        let folder = tempfile::tempdir().unwrap();
        let update = adapter(
            folder.path(),
            "LORA",
            &[
                ("m.lora_A.weight", &[2, 3], vec![1.0, -2.0, 3.0, -4.0, 0.0, 2.0]),
                ("m.lora_B.weight", &[4, 1], vec![-3.0, 2.0, 1.0, 0.0]),
                ("m.bias", &[1], vec![9.0]),
            ],
        );
        // Largest five: 4, 3, 3, and two of the three with magnitude 2, the first ones.
        let (bytes, selection) = compress(&update, settings(0.5, 2.0), &BTreeMap::new()).unwrap();
        let file = CompeftFile::from_bytes("memory", bytes).unwrap();
        // The ten sum to 0 and their squares to 48: σ² = 48 / 9.
        let deviation = (48.0f64 / 9.0).sqrt();
        assert!((selection.deviation - deviation).abs() < 1e-12);
        assert_eq!((selection.num_entries, selection.num_kept), (10, 5));
        assert_eq!(selection.threshold, 2.0);
        let s = (2.0 * deviation) as f32;
        assert_eq!(file.scale(), s);
        let found = |name| file.tensor(name).unwrap().to_f32().unwrap();
        assert_eq!(found("m.lora_A.weight"), [0.0, -s, s, -s, 0.0, s]);
        assert_eq!(found("m.lora_B.weight"), [-s, 0.0, 0.0, 0.0]);
        // What is no change is kept as it is.
        assert_eq!(found("m.bias"), [9.0]);
        assert_eq!(file.metadata()["start"], "zero");
        assert_eq!(file.metadata()["adapter_config"], "{\"peft_type\": \"LORA\"}");
    }

    /// The rule in three lines, on the whole vector.
    #[test]
    fn selection_is_that_of_sorting() {
        let folder = tempfile::tempdir().unwrap();
        let mut state = 1u64;
        let mut draw = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Few distinct values, so that there are ties, and values close to one another.
            let x = (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5;
            if state & 1 == 0 { (x * 32.0).round() / 32.0 } else { x }
        };
        let tensors: Vec<Vec<f32>> =
            [300, 1, 64].iter().map(|n| (0..*n).map(|_| draw()).collect()).collect();
        let update = adapter(
            folder.path(),
            "LORA",
            &[
                ("a.lora_A.weight", &[30, 10], tensors[0].clone()),
                ("b.lora_A.weight", &[1], tensors[1].clone()),
                ("b.lora_B.weight", &[8, 8], tensors[2].clone()),
            ],
        );
        let flat = tensors.concat();
        for density in [0.003, 0.05, 0.3, 0.5, 0.8, 1.0] {
            let mut order: Vec<usize> = (0..flat.len()).collect();
            order.sort_by(|a, b| flat[*b].abs().total_cmp(&flat[*a].abs()));
            let n = (flat.len() as f64 * density).floor() as usize;
            let mut expected = vec![0i8; flat.len()];
            for place in &order[..n] {
                expected[*place] =
                    if flat[*place] == 0.0 { 0 } else { flat[*place].signum() as i8 };
            }
            let selection = select(&update, density).unwrap();
            let mut signer = Signer::new(&selection);
            let found: Vec<i8> = tensors.iter().flat_map(|t| signer.signs(t)).collect();
            assert_eq!(found, expected, "density {density}");
            let kept = expected.iter().filter(|sign| **sign != 0).count();
            assert_eq!(selection.num_kept, kept as u64);
        }
    }

    #[test]
    fn gains_start_from_one_and_models_from_their_base() {
        let folder = tempfile::tempdir().unwrap();
        let ia3 = adapter(folder.path(), "IA3", &[("k.ia3_l", &[4, 1], vec![1.0, 1.5, 0.25, 1.0])]);
        assert_eq!(ia3.change(&ia3.parts()[0]).unwrap(), [0.0, 0.5, -0.75, 0.0]);
        let (bytes, _) = compress(&ia3, settings(0.5, 1.0), &BTreeMap::new()).unwrap();
        let file = CompeftFile::from_bytes("memory", bytes).unwrap();
        assert_eq!(file.metadata()["start"], "one");
        let mut gains = vec![1.0; 4];
        file.tensor("k.ia3_l").unwrap().add_to(&mut gains).unwrap();
        let s = file.scale();
        assert_eq!(gains, [1.0, 1.0 + s, 1.0 - s, 1.0]);

        let (base, tuned) = (folder.path().join("base"), folder.path().join("tuned"));
        write_tensors(&base, &[("w", &[4], vec![1.0, 2.0, 3.0, 4.0])]);
        write_tensors(&tuned, &[("w", &[4], vec![1.0, 1.0, 3.25, 4.0]), ("head", &[1], vec![7.0])]);
        let full = Update::full(&tuned, &base).unwrap();
        let (bytes, _) = compress(&full, settings(0.25, 1.0), &BTreeMap::new()).unwrap();
        let file = CompeftFile::from_bytes("memory", bytes).unwrap();
        assert_eq!(file.tensor("w").unwrap().to_f32().unwrap(), [0.0, -file.scale(), 0.0, 0.0]);
        // A head the base has not is kept whole.
        assert_eq!(file.tensor("head").unwrap().to_f32().unwrap(), [7.0]);
    }

    #[test]
    fn bad_input_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let tensors = |values: Vec<f32>| [("m.lora_A.weight", &[2usize, 2] as &[usize], values)];
        let good = adapter(at, "LORA", &tensors(vec![1.0, 2.0, 3.0, 4.0]));
        for density in [0.0, -0.1, 1.1, f64::NAN] {
            let error = compress(&good, settings(density, 1.0), &BTreeMap::new()).unwrap_err();
            assert!(error.to_string().starts_with("density"), "{error}");
        }
        assert!(compress(&good, settings(0.5, 0.0), &BTreeMap::new()).is_err());
        let error = select(&good, 0.2).unwrap_err().to_string();
        assert!(error.contains("keeps none"), "{error}");
        let zero = adapter(at, "LORA", &tensors(vec![0.0; 4]));
        assert!(select(&zero, 0.5).unwrap_err().to_string().contains("all the same"));
        let nan = adapter(at, "LORA", &tensors(vec![0.0, 1.0, f32::NAN, 1.0]));
        let error = select(&nan, 0.5).unwrap_err().to_string();
        assert!(error.contains("m.lora_A.weight") && error.contains("index 2"), "{error}");

        std::fs::write(at.join("adapter_config.json"), "{\"peft_type\": \"OFT\"}").unwrap();
        let error = Update::adapter(at).unwrap_err().to_string();
        assert!(error.contains("OFT") && error.contains("LORA, IA3"), "{error}");
        std::fs::write(at.join("adapter_config.json"), "{").unwrap();
        assert!(Update::adapter(at).is_err());
        assert!(Update::adapter(&at.join("nowhere")).is_err());
        let error = Update::adapter(&at.join("a.compeft")).unwrap_err().to_string();
        assert!(error.contains("compressed already"), "{error}");

        let (a, b) = (at.join("a"), at.join("b"));
        write_tensors(&a, &[("w", &[2], vec![1.0, 2.0])]);
        write_tensors(&b, &[("w", &[1, 2], vec![1.0, 2.0])]);
        assert!(Update::full(&a, &b).unwrap_err().to_string().contains("another shape"));
        write_tensors(&b, &[("w", &[2], vec![1.0, 2.0]), ("v", &[1], vec![0.0])]);
        let error = Update::full(&a, &b).unwrap_err().to_string();
        assert!(error.contains("no `v`"), "{error}");
    }
}
