//! What differs between two models or two adapters, tensor by tensor and layer by layer.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rayon::prelude::*;
use retune_files::safetensors::Safetensors;
use serde::Serialize;

use crate::pairs::LoraAdapter;
use crate::spectrum::{MAX_SIDE, effective_rank, rank_of_energy, singular_values};
use crate::{Error, Result};

/// Share of the energy whose rank is reported.
pub const ENERGY: f64 = 0.99;

/// How a tensor changed from the first side to the second.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorDiff {
    /// Its name; for LoRA pairs the module's weight, whose changes are compared.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The block it belongs to, by the first number in its name.
    pub layer: Option<usize>,
    /// Sums over its entries.
    #[serde(flatten)]
    pub sums: Sums,
    /// Effective rank of the difference (Roy and Vetterli, 2007): of matrices that differ.
    pub effective_rank: Option<f64>,
    /// Least rank that holds 99 % of the difference's energy.
    pub rank_99: Option<usize>,
    /// Whether ranks were left out because the matrix is too large.
    pub rank_skipped: bool,
}

/// Sums over entries, from which everything else follows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// Entries.
    pub count: u64,
    /// Entries that are the same on both sides.
    pub unchanged: u64,
    /// `Σ (b - a)²`
    pub difference: f64,
    /// `Σ a²`
    pub first: f64,
    /// `Σ b²`
    pub second: f64,
    /// `Σ a b`
    pub product: f64,
    /// Largest `|b - a|`.
    pub largest: f64,
    /// Entries that are not finite on a side; the sums leave them out.
    pub not_finite: u64,
}

impl Sums {
    fn of(a: &[f32], b: &[f32]) -> Self {
        let mut sums = Self { count: a.len() as u64, ..Self::default() };
        for (a, b) in a.iter().zip(b) {
            sums.unchanged += u64::from(a == b);
            let (a, b) = (f64::from(*a), f64::from(*b));
            if !(a.is_finite() && b.is_finite()) {
                sums.not_finite += 1;
                continue;
            }
            sums.difference += (b - a) * (b - a);
            sums.first += a * a;
            sums.second += b * b;
            sums.product += a * b;
            sums.largest = sums.largest.max((b - a).abs());
        }
        sums
    }

    fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.unchanged += other.unchanged;
        self.difference += other.difference;
        self.first += other.first;
        self.second += other.second;
        self.product += other.product;
        self.largest = self.largest.max(other.largest);
        self.not_finite += other.not_finite;
    }

    /// Returns the Frobenius norm of the difference.
    pub fn norm(&self) -> f64 {
        self.difference.sqrt()
    }

    /// Returns the norm of the difference over that of the first side; `None` where that is zero.
    pub fn relative(&self) -> Option<f64> {
        (self.first > 0.0).then(|| self.norm() / self.first.sqrt())
    }

    /// Returns the share of entries that are the same on both sides.
    pub fn sparsity(&self) -> f64 {
        if self.count == 0 { 1.0 } else { self.unchanged as f64 / self.count as f64 }
    }

    /// Returns the cosine between both sides; `None` where one is zero.
    pub fn cosine(&self) -> Option<f64> {
        let norms = (self.first * self.second).sqrt();
        (norms > 0.0).then(|| (self.product / norms).clamp(-1.0, 1.0))
    }
}

impl Serialize for Sums {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("count", &self.count)?;
        map.serialize_entry("norm", &self.norm())?;
        map.serialize_entry("relative", &self.relative())?;
        map.serialize_entry("sparsity", &self.sparsity())?;
        map.serialize_entry("cosine", &self.cosine())?;
        map.serialize_entry("largest", &self.largest)?;
        map.serialize_entry("not_finite", &self.not_finite)?;
        map.end()
    }
}

/// All tensors of a block together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerDiff {
    /// The block's number; `None` for what belongs to no block.
    pub layer: Option<usize>,
    /// Tensors.
    pub num_tensors: usize,
    /// Sums over their entries.
    #[serde(flatten)]
    pub sums: Sums,
}

/// A tensor of which the two sides have different shapes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Misshapen {
    /// Its name.
    pub name: String,
    /// Its shape on the first side.
    pub first: Vec<usize>,
    /// Its shape on the second side.
    pub second: Vec<usize>,
}

/// The whole comparison.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Diff {
    /// Tensors both sides have, in the order of blocks and names.
    pub tensors: Vec<TensorDiff>,
    /// The same by block; what belongs to no block comes last.
    pub layers: Vec<LayerDiff>,
    /// Tensors only the first side has.
    pub missing: Vec<String>,
    /// Tensors only the second side has.
    pub surplus: Vec<String>,
    /// Tensors that cannot be compared.
    pub misshapen: Vec<Misshapen>,
}

impl Diff {
    /// Returns the sums over everything.
    pub fn total(&self) -> Sums {
        let mut total = Sums::default();
        self.tensors.iter().for_each(|tensor| total.add(&tensor.sums));
        total
    }
}

/// One side: tensors by name, read one at a time.
#[derive(Debug)]
pub enum Side {
    /// A model, or an adapter whose tensors are compared one by one.
    Tensors(Safetensors),
    /// Pairs are compared by their products: their factors may differ and mean the same.
    Lora(LoraAdapter),
}

impl Side {
    /// Opens a model folder, a safetensors file or an adapter.
    ///
    /// # Errors
    /// [`Error`] if it is none of these, or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::Content {
                path: path.to_path_buf(),
                what: "there is nothing to compare".to_owned(),
                expected: "a model folder, a safetensors file or an adapter".to_owned(),
                found: "nothing".to_owned(),
                help: "check the path".to_owned(),
            });
        }
        let config = path.join("adapter_config.json");
        let packed = path.is_file() && path.extension().is_some_and(|end| end == "compeft");
        let is_lora = packed
            || std::fs::read_to_string(&config).is_ok_and(|text| {
                let config: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
                config["peft_type"] == "LORA" && config["use_dora"] != true
            });
        if is_lora {
            return Ok(Self::Lora(LoraAdapter::open(path)?));
        }
        let weights = if config.exists() {
            path.join("adapter_model.safetensors")
        } else {
            path.to_path_buf()
        };
        Ok(Self::Tensors(Safetensors::open(weights)?))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Tensors(files) => files.path(),
            Self::Lora(adapter) => &adapter.path,
        }
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        match self {
            Self::Tensors(files) => {
                files.tensors().map(|t| (t.name.to_owned(), t.shape.to_vec())).collect()
            }
            Self::Lora(adapter) => {
                let pairs = adapter.pairs.iter();
                let pairs = pairs.map(|(m, p)| (weight_of(m), vec![p.outputs, p.inputs]));
                let others = adapter.others.iter().map(|(name, (s, _))| (name.clone(), s.clone()));
                pairs.chain(others).collect()
            }
        }
    }

    fn read(&self, name: &str) -> Result<Vec<f32>> {
        match self {
            Self::Tensors(files) => Ok(files.tensor(name)?.to_f32()?),
            Self::Lora(adapter) => {
                let pair = name.strip_suffix(CHANGE).and_then(|module| adapter.pairs.get(module));
                let other = || adapter.others.get(name).map(|(_, values)| values.clone());
                Ok(pair.map(crate::pairs::Pair::delta).or_else(other).unwrap_or_default())
            }
        }
    }
}

/// What the change of a module is listed as.
const CHANGE: &str = ".weight (change)";

fn weight_of(module: &str) -> String {
    format!("{module}{CHANGE}")
}

/// Returns the first number between points: `model.layers.12.mlp` belongs to block 12.
fn layer_of(name: &str) -> Option<usize> {
    name.split('.').find_map(|part| part.parse().ok())
}

/// Compares two models, or two adapters.
///
/// Ranks are computed where `with_ranks` asks for them and the smaller side of a matrix is at most
/// [`MAX_SIDE`]. One tensor per thread is held at a time.
///
/// # Errors
/// [`Error`] if a side cannot be read, or nothing has the same name on both sides.
pub fn diff(first: &Side, second: &Side, with_ranks: bool) -> Result<Diff> {
    let (a_shapes, b_shapes) = (first.shapes(), second.shapes());
    let names: BTreeSet<&String> = a_shapes.keys().chain(b_shapes.keys()).collect();
    let mut found = Diff::default();
    let mut common = Vec::new();
    for name in names {
        match (a_shapes.get(name), b_shapes.get(name)) {
            (Some(_), None) => found.missing.push(name.clone()),
            (None, _) => found.surplus.push(name.clone()),
            (Some(x), Some(y)) if x == y => common.push((layer_of(name), name.as_str(), x)),
            (Some(x), Some(y)) => found.misshapen.push(Misshapen {
                name: name.clone(),
                first: x.clone(),
                second: y.clone(),
            }),
        }
    }
    if common.is_empty() && found.misshapen.is_empty() {
        let some = |names: &[String]| names.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
        return Err(Error::Content {
            path: second.path().to_path_buf(),
            what: "nothing has the same name on both sides".to_owned(),
            expected: some(&found.missing),
            found: some(&found.surplus),
            help: "compare two models of one family, or two adapters".to_owned(),
        });
    }
    // What belongs to no block comes last.
    common.sort_by_key(|(layer, name, _)| (layer.is_none(), *layer, *name));
    found.tensors = common
        .par_iter()
        .map(|(layer, name, shape)| compare(first, second, *layer, name, shape, with_ranks))
        .collect::<Result<_>>()?;
    for tensor in &found.tensors {
        match found.layers.last_mut() {
            Some(last) if last.layer == tensor.layer => {
                last.num_tensors += 1;
                last.sums.add(&tensor.sums);
            }
            _ => found.layers.push(LayerDiff {
                layer: tensor.layer,
                num_tensors: 1,
                sums: tensor.sums,
            }),
        }
    }
    Ok(found)
}

fn compare(
    a: &Side,
    b: &Side,
    layer: Option<usize>,
    name: &str,
    shape: &[usize],
    with_ranks: bool,
) -> Result<TensorDiff> {
    let (a, mut b) = (a.read(name)?, b.read(name)?);
    let sums = Sums::of(&a, &b);
    let mut out = TensorDiff {
        name: name.to_owned(),
        shape: shape.to_vec(),
        layer,
        sums,
        effective_rank: None,
        rank_99: None,
        rank_skipped: false,
    };
    if let [rows, columns] = *shape
        && with_ranks
        && sums.difference > 0.0
        && sums.not_finite == 0
    {
        if rows.min(columns) > MAX_SIDE {
            out.rank_skipped = true;
        } else {
            b.iter_mut().zip(&a).for_each(|(b, a)| *b -= a);
            let singular = singular_values(&b, rows, columns);
            out.effective_rank = effective_rank(&singular);
            out.rank_99 = Some(rank_of_energy(&singular, ENERGY));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diff(first: &Path, second: &Path, with_ranks: bool) -> Result<Diff> {
        super::diff(&Side::open(first)?, &Side::open(second)?, with_ranks)
    }

    use crate::update::write_tensors;

    #[test]
    fn differences_worked_out_by_hand() {
        let home = tempfile::tempdir().unwrap();
        let (a, b) = (home.path().join("a.safetensors"), home.path().join("b.safetensors"));
        write_tensors(
            &a,
            &[
                ("layers.0.w", &[2, 2], vec![3.0, 0.0, 0.0, 4.0]),
                ("layers.0.b", &[2], vec![1.0, 1.0]),
                ("layers.10.w", &[1, 2], vec![1.0, 2.0]),
                ("norm", &[1], vec![0.0]),
                ("only_a", &[1], vec![0.0]),
                ("shape", &[2], vec![0.0, 0.0]),
            ],
        );
        write_tensors(
            &b,
            &[
                ("layers.0.w", &[2, 2], vec![3.0, 2.0, 0.0, 4.0]),
                ("layers.0.b", &[2], vec![1.0, -1.0]),
                ("layers.10.w", &[1, 2], vec![1.0, 2.0]),
                ("norm", &[1], vec![5.0]),
                ("only_b", &[1], vec![0.0]),
                ("shape", &[1, 2], vec![0.0, 0.0]),
            ],
        );
        let found = diff(&a, &b, true).unwrap();
        assert_eq!(
            (&found.missing[..], &found.surplus[..]),
            (&["only_a".to_owned()][..], &["only_b".to_owned()][..])
        );
        assert_eq!(found.misshapen[0].first, [2]);
        let names: Vec<&str> = found.tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["layers.0.b", "layers.0.w", "layers.10.w", "norm"]);
        let w = &found.tensors[1];
        assert_eq!((w.sums.norm(), w.sums.relative(), w.sums.sparsity()), (2.0, Some(0.4), 0.75));
        // a·b = 9 + 16, |a| = 5, |b|² = 9 + 4 + 16.
        assert!((w.sums.cosine().unwrap() - 25.0 / (5.0 * 29f64.sqrt())).abs() < 1e-12);
        assert!((w.effective_rank.unwrap() - 1.0).abs() < 1e-6);
        assert_eq!((w.rank_99, w.sums.largest), (Some(1), 2.0));
        assert_eq!(found.tensors[0].sums.cosine(), Some(0.0));
        assert_eq!(found.tensors[0].rank_99, None, "a vector has no rank");
        assert_eq!((found.tensors[2].sums.norm(), found.tensors[2].rank_99), (0.0, None));
        assert_eq!(found.tensors[3].sums.relative(), None, "the first side is zero");
        let layers: Vec<_> = found.layers.iter().map(|l| (l.layer, l.num_tensors)).collect();
        assert_eq!(layers, [(Some(0), 2), (Some(10), 1), (None, 1)]);
        assert_eq!(found.layers[0].sums.norm(), 8f64.sqrt());
        assert_eq!(found.total().count, 9);
    }

    #[test]
    fn adapters_are_compared_by_what_they_do() {
        let home = tempfile::tempdir().unwrap();
        let write = |name: &str, alpha: u32, a: Vec<f32>, b: Vec<f32>| {
            let folder = home.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            let config = format!("{{\"peft_type\":\"LORA\",\"lora_alpha\":{alpha}}}");
            std::fs::write(folder.join("adapter_config.json"), config).unwrap();
            let rank = a.len() / 2;
            write_tensors(
                &folder.join("adapter_model.safetensors"),
                &[("l.1.q.lora_A.weight", &[rank, 2], a), ("l.1.q.lora_B.weight", &[2, rank], b)],
            );
            folder
        };
        // The same change from other factors and another rank: 1·[2;4][1 3] = [1;2][2 6].
        let one = write("one", 1, vec![1.0, 3.0], vec![2.0, 4.0]);
        let two = write("two", 2, vec![2.0, 6.0, 0.0, 0.0], vec![1.0, 9.0, 2.0, 9.0]);
        let found = diff(&one, &two, true).unwrap();
        assert_eq!(found.tensors.len(), 1);
        assert_eq!((found.tensors[0].layer, found.tensors[0].sums.norm()), (Some(1), 0.0));
        assert_eq!(found.tensors[0].sums.cosine(), Some(1.0));
    }

    #[test]
    fn strangers_and_damage_are_refused() {
        let home = tempfile::tempdir().unwrap();
        let (a, b) = (home.path().join("a"), home.path().join("b"));
        write_tensors(&a, &[("x", &[1], vec![1.0])]);
        write_tensors(&b, &[("y", &[1], vec![1.0])]);
        assert!(diff(&a, &b, true).unwrap_err().to_string().contains("same name"));
        assert!(
            diff(&a, &home.path().join("c"), true).unwrap_err().to_string().contains("nothing")
        );
        write_tensors(&b, &[("x", &[1], vec![f32::NAN])]);
        let found = diff(&a, &b, true).unwrap();
        assert_eq!((found.tensors[0].sums.not_finite, found.tensors[0].sums.difference), (1, 0.0));
    }
}
