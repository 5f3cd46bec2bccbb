//! Sparse changes of weights: a few entries, each with a number; shared by the methods that choose
//! which entries train.

use std::sync::{Arc, Mutex, PoisonError};

use retune_core::change::{Changes, Scope, WeightChange};
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::kernels::{SparseEntries, add_sparse, linear_frozen, linear_sparse};
use retune_core::method::PlannedParameter;
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Random;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use serde_json::{Map, Value, json};
use tensor::{Int, Tensor, TensorData};

use crate::adapter::{PREFIX, peft_config};
use crate::replacement;

/// What the numbers of a sparse change are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// They are added to the base's entries.
    Difference,
    /// They stand in for the base's entries, so that weight decay acts on the weight itself.
    Value,
}

/// A sparse change of one weight. Which entries it holds is the parameter's business, so that they
/// may change while a run is under way.
#[derive(Debug)]
pub struct SparseChange {
    values: ParameterId,
    /// Entries that are changed and train no more.
    frozen: Option<ParameterId>,
    meaning: Meaning,
    known: Mutex<Option<Known>>,
}

/// What follows from the entries alone, kept until they change.
#[derive(Debug, Clone)]
struct Known {
    of: [Arc<[u32]>; 2],
    /// The entries of both lists, ascending.
    indices: Arc<[u32]>,
    /// Where each of them stands in the two lists laid end to end; nothing where that is the order.
    order: Option<Tensor<1, Int>>,
    /// The base at the entries.
    base: Option<Tensor<1>>,
}

impl SparseChange {
    /// Makes the change whose numbers and entries are those of a sparse parameter.
    pub fn new(values: ParameterId, meaning: Meaning) -> Self {
        Self { values, frozen: None, meaning, known: Mutex::new(None) }
    }

    /// Adds a second list of entries, no entry of which is in the first.
    #[must_use]
    pub fn with_frozen(mut self, frozen: ParameterId) -> Self {
        self.frozen = Some(frozen);
        self
    }

    fn known(&self, scope: &Scope<'_>) -> Known {
        let parameters = scope.parameters();
        let first = parameters.indices(self.values);
        let second = match self.frozen {
            Some(frozen) => parameters.indices(frozen),
            None => Arc::from(Vec::new()),
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.as_ref()
            && Arc::ptr_eq(&known.of[0], &first)
            && (second.is_empty() && known.of[1].is_empty() || Arc::ptr_eq(&known.of[1], &second))
        {
            return known.clone();
        }
        let mut new = Known {
            of: [Arc::clone(&first), Arc::clone(&second)],
            indices: first,
            order: None,
            base: None,
        };
        if !second.is_empty() {
            let both = new.of.iter().flat_map(|list| list.iter().copied());
            let mut order: Vec<(u32, i64)> = both.zip(0..).collect();
            order.sort_unstable();
            let (indices, order): (Vec<u32>, Vec<i64>) = order.into_iter().unzip();
            let count = order.len();
            new.indices = indices.into();
            let order = TensorData::new(order, [count]);
            new.order = Some(Tensor::from_data(order, parameters.device()));
        }
        *known = Some(new.clone());
        new
    }

    /// Returns the numbers as they stand in the parameters, one per entry.
    fn numbers(&self, known: &Known, scope: &Scope<'_>) -> Tensor<1> {
        let first = scope.tensor::<1>(self.values, [known.of[0].len()]);
        match (&known.order, self.frozen) {
            (Some(order), Some(frozen)) => {
                let second = scope.tensor::<1>(frozen, [known.of[1].len()]);
                if known.of[0].is_empty() {
                    return second.select(0, order.clone());
                }
                Tensor::cat(vec![first, second], 0).select(0, order.clone())
            }
            _ => first,
        }
    }

    fn entries(&self, known: &Known, scope: &Scope<'_>) -> SparseEntries {
        let indices = Arc::clone(&known.indices);
        SparseEntries { indices, ..scope.parameters().entries(self.values) }
    }

    fn base_at(&self, known: &Known, base: &PackedMatrix, scope: &Scope<'_>) -> Tensor<1> {
        if let Some(values) = &known.base {
            return values.clone();
        }
        let values = entries_of(base, &known.indices);
        let count = values.len();
        let device = scope.parameters().device();
        let values = Tensor::<1>::from_data(TensorData::new(values, [count]), device);
        let with_base = Known { base: Some(values.clone()), ..known.clone() };
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(with_base);
        values
    }
}

/// Reads single entries of a packed matrix.
pub fn entries_of(base: &PackedMatrix, indices: &[u32]) -> Vec<f32> {
    let columns = base.columns();
    let mut row = vec![0.0; columns];
    let mut known = usize::MAX;
    let read = |index: &u32| {
        let index = *index as usize;
        if index / columns != known {
            known = index / columns;
            base.row_into(known, &mut row);
        }
        row[index % columns]
    };
    indices.iter().map(read).collect()
}

impl WeightChange for SparseChange {
    fn parameters(&self) -> Vec<ParameterId> {
        [Some(self.values), self.frozen].into_iter().flatten().collect()
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let known = self.known(scope);
        let entries = self.entries(&known, scope);
        if known.indices.is_empty() && !is_watched(&entries, scope) {
            return base;
        }
        let mut changes = self.numbers(&known, scope);
        if self.meaning == Meaning::Value && !known.indices.is_empty() {
            let count = known.indices.len();
            let places: Vec<i64> = known.indices.iter().copied().map(i64::from).collect();
            let places = Tensor::<1, Int>::from_data(
                TensorData::new(places, [count]),
                scope.parameters().device(),
            );
            let [rows, columns] = base.dims();
            let flat: Tensor<1> = base.clone().reshape([rows * columns]);
            changes = changes - flat.select(0, places);
        }
        add_sparse(base, changes, &entries)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let known = self.known(scope);
        let entries = self.entries(&known, scope);
        if known.indices.is_empty() && !is_watched(&entries, scope) {
            return Some(linear_frozen(x.clone(), base, bias.cloned()));
        }
        let mut changes = self.numbers(&known, scope);
        if self.meaning == Meaning::Value && !known.indices.is_empty() {
            changes = changes - self.base_at(&known, base, scope);
        }
        Some(linear_sparse(x.clone(), base, bias.cloned(), changes, &entries))
    }
}

/// Returns whether a tap waits for the weight's gradient, so that the change must not be skipped.
fn is_watched(entries: &SparseEntries, scope: &Scope<'_>) -> bool {
    scope.trains() && entries.tap.as_ref().is_some_and(|tap| tap.is_open())
}

/// Returns the weights that train whole beside sparse changes: a new head of a classifier, which is
/// useless where it stays as it was drawn.
///
/// # Errors
/// If a name matches nothing; there is none a person wrote.
pub fn heads<'a>(
    spec: &'a ModelSpec,
    changed: &[&WeightSpec],
) -> Result<Vec<(String, &'a WeightSpec)>> {
    let is_changed = |module: &str| changed.iter().any(|weight| weight.module() == module);
    replacement::saved_modules(spec, &[], &is_changed, "the classifier's head")
}

/// Attaches what [`heads`] lists.
///
/// # Errors
/// If a weight cannot be read.
pub fn attach_heads(
    heads: &[(String, &WeightSpec)],
    weights: &Weights,
    parameters: &mut Parameters,
    changes: &mut Changes,
) -> Result<()> {
    for (name, weight) in heads {
        replacement::attach(name, weight, weights, parameters, changes)?;
    }
    Ok(())
}

/// Plans what [`heads`] lists.
pub fn plan_heads(heads: &[(String, &WeightSpec)]) -> Vec<PlannedParameter> {
    heads.iter().map(|(name, weight)| replacement::plan(name.clone(), weight)).collect()
}

/// Returns the name of a weight's sparse change in an adapter file, after PEFT's SHiRA.
pub fn name(weight: &WeightSpec) -> String {
    let place = weight.name.strip_suffix(".weight").unwrap_or(&weight.name);
    format!("{PREFIX}{place}.shira_weight")
}

/// Adds a sparse parameter for `weight` and attaches its change.
pub fn attach(
    weight: &WeightSpec,
    indices: Vec<u32>,
    values: Vec<f32>,
    meaning: Meaning,
    parameters: &mut Parameters,
    changes: &mut Changes,
) -> ParameterId {
    let id = parameters.add_sparse(name(weight), weight.matrix(), indices, values);
    changes.change_weight(&weight.name, SparseChange::new(id, meaning));
    id
}

/// Returns what an `adapter_config.json` of a method with sparse changes says: the method and its
/// options, as PEFT has no word for them.
pub fn config(kind: &str, options: &retune_options::Table, spec: &ModelSpec) -> Map<String, Value> {
    let mut config = peft_config(kind, spec);
    config.insert("retune_options".to_owned(), json!(retune_options::to_toml(options)));
    config
}

/// Reads the options [`config`] wrote.
///
/// # Errors
/// If the file lacks them, or they are not valid.
pub fn saved_options<O: retune_options::Options>(config: &Value) -> Result<O> {
    let wrong = |found: String| Error::Setting {
        setting: "adapter_config.json: retune_options".to_owned(),
        what: "cannot be used".to_owned(),
        expected: format!("the options of `{}` as TOML", O::NAME),
        found,
        help: "the file is damaged, or of another version".to_owned(),
    };
    let text = config
        .get("retune_options")
        .and_then(Value::as_str)
        .ok_or_else(|| wrong("nothing".to_owned()))?;
    let document = retune_options::Document::parse("adapter_config.json", text)
        .map_err(|report| wrong(report.to_string()))?;
    let (options, _) = document.read(O::read).map_err(|report| wrong(report.to_string()))?;
    Ok(options)
}

/// Draws `wanted` of `count` places, ascending.
///
/// # Panics
/// If there are fewer: the plan has checked that.
pub fn random_entries(count: usize, wanted: usize, random: &mut Random) -> Vec<u32> {
    assert!(wanted <= count, "{wanted} of {count} entries");
    // Floyd's way needs one draw per place; of more than half, those left out are drawn.
    let few = wanted.min(count - wanted);
    let mut marks = vec![0_u64; count.div_ceil(64)];
    for top in count - few..count {
        let place = random.below(top + 1);
        let taken = marks[place / 64] >> (place % 64) & 1 == 1;
        let place = if taken { top } else { place };
        marks[place / 64] |= 1 << (place % 64);
    }
    let drawn = few == wanted;
    (0..count as u32)
        .filter(|place| (marks[*place as usize / 64] >> (place % 64) & 1 == 1) == drawn)
        .collect()
}

/// Splits ascending places of several lists laid end to end into places of each.
pub fn split(places: &[u32], counts: &[usize]) -> Vec<Vec<u32>> {
    let (mut start, mut rest) = (0, places);
    let of = |count: &usize| {
        let end = start + count;
        let here = rest.partition_point(|place| (*place as usize) < end);
        let list = rest[..here].iter().map(|place| place - start as u32).collect();
        rest = &rest[here..];
        start = end;
        list
    };
    counts.iter().map(of).collect()
}

/// Finds the `wanted` entries with the largest scores over several weights together.
///
/// `scores` gives those of one weight, none negative; it is called several times, and no two
/// weights' scores are held at once. Ties go to the earlier weight and place; what is not a number
/// is never chosen. Per weight, the indices ascend.
///
/// # Errors
/// Those of `scores`.
pub fn largest(
    wanted: usize,
    num_weights: usize,
    mut scores: impl FnMut(usize) -> Result<Vec<f32>>,
) -> Result<Vec<Vec<u32>>> {
    let mut chosen = vec![Vec::new(); num_weights];
    if wanted == 0 {
        return Ok(chosen);
    }
    // The bits of floats that are not negative are in their order: a radix search for the
    // `wanted`-th largest, by the upper and then the lower half.
    let bits = |score: f32| (!score.is_nan()).then(|| score.abs().to_bits());
    let mut left = wanted;
    let mut upper = None;
    let mut threshold = 0;
    for _ in 0..2 {
        let mut histogram = vec![0_usize; 1 << 16];
        for weight in 0..num_weights {
            for key in scores(weight)?.into_iter().filter_map(bits) {
                match upper {
                    None => histogram[(key >> 16) as usize] += 1,
                    Some(upper) if key >> 16 == upper => histogram[(key & 0xffff) as usize] += 1,
                    Some(_) => {}
                }
            }
        }
        let mut bin = 0;
        for (place, count) in histogram.iter().enumerate().rev() {
            bin = place;
            if *count >= left {
                break;
            }
            left -= count;
        }
        match upper {
            None => upper = Some(bin as u32),
            Some(upper) => threshold = upper << 16 | bin as u32,
        }
    }
    for (weight, chosen) in chosen.iter_mut().enumerate() {
        for (place, key) in scores(weight)?.into_iter().map(bits).enumerate() {
            let Some(key) = key else { continue };
            if key == threshold && left > 0 {
                left -= 1;
                chosen.push(place as u32);
            } else if key > threshold {
                chosen.push(place as u32);
            }
        }
    }
    Ok(chosen)
}

/// Turns sizes around: the smallest value has the largest score.
pub fn smallness(value: f32) -> f32 {
    // The bits of floats that are not negative are in their order.
    f32::from_bits(f32::MAX.to_bits() - value.abs().min(f32::MAX).to_bits())
}

/// Shares `budget` out among weights in proportion to their size, each share rounded down.
pub fn shares(budget: usize, weights: &[&WeightSpec]) -> Vec<usize> {
    let total: usize = weights.iter().map(|weight| weight.count()).sum();
    weights
        .iter()
        .map(|weight| (budget as u128 * weight.count() as u128 / total.max(1) as u128) as usize)
        .collect()
}

/// Checks that a budget fits what is targeted.
///
/// # Errors
/// [`Error::Setting`] if it is 0 or above the number of targeted values.
pub fn check_budget(setting: &str, budget: usize, targeted: usize) -> Result<()> {
    if (1..=targeted).contains(&budget) {
        return Ok(());
    }
    Err(Error::Setting {
        setting: setting.to_owned(),
        what: "the budget does not fit the targeted weights".to_owned(),
        expected: format!("1 to {targeted} values"),
        found: budget.to_string(),
        help: "change the budget, or target more modules".to_owned(),
    })
}

/// Checks that places over all targeted weights together fit the numbers they are drawn as.
///
/// # Errors
/// [`Error::Unsupported`] for more than 2³² values.
pub fn check_places(method: &str, targeted: usize) -> Result<()> {
    if u32::try_from(targeted).is_ok() {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("`{method}` drawing single entries of {targeted} values"),
        help: "target fewer modules or layers".to_owned(),
    })
}

/// Refuses weights that are quantised where a method must write into them.
///
/// # Errors
/// [`Error::Unsupported`] naming the form the base is kept in.
pub fn refuse_blocks(weights: &Weights, method: &str) -> Result<()> {
    if weights.packing().keep_blocks {
        return Err(Error::Unsupported {
            what: format!("`{method}` on weights that stay in quantised blocks"),
            help: "set `compute.weights` to \"f32\" or \"bf16\", or use spiel, which trains differences beside such weights".to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::random::Seed;

    #[test]
    fn the_largest_are_exact_over_all_weights_with_ties() {
        let mut random = Seed(8).stream("largest", &[]);
        let weights: Vec<Vec<f32>> = [300, 1, 50, 700]
            .iter()
            .map(|count| (0..*count).map(|_| (random.below(90) as f32).sqrt()).collect())
            .collect();
        for wanted in [0, 1, 17, 500, 1051] {
            let found = largest(wanted, 4, |w| Ok(weights[w].clone())).unwrap();
            let mut all: Vec<(usize, u32)> = (0..4)
                .flat_map(|w| (0..weights[w].len() as u32).map(move |place| (w, place)))
                .collect();
            let score = |(w, place): &(usize, u32)| weights[*w][*place as usize];
            all.sort_by(|a, b| score(b).total_cmp(&score(a)).then(a.cmp(b)));
            let mut expected = vec![Vec::<u32>::new(); 4];
            for (w, place) in &all[..wanted] {
                expected[*w].push(*place);
            }
            for list in &mut expected {
                list.sort_unstable();
            }
            assert_eq!(found, expected, "{wanted}");
        }
        let with_nan = largest(1, 1, |_| Ok(vec![f32::NAN, 0.5])).unwrap();
        assert_eq!(with_nan, [vec![1]]);
    }

    #[test]
    fn the_smallest_have_the_largest_scores() {
        let scores = [0.0, 1e-30, -0.5, 2.0, -1e30].map(smallness);
        assert!(scores.is_sorted_by(|a, b| a > b) && scores.iter().all(|s| *s >= 0.0));
    }

    #[test]
    fn random_places_are_distinct_and_evenly_spread() {
        let mut counts = [0_u32; 20];
        for round in 0..4000 {
            let mut random = Seed(round).stream("entries", &[]);
            for wanted in [3, 17] {
                let places = random_entries(20, wanted, &mut random);
                assert!(places.len() == wanted && places.is_sorted_by(|a, b| a < b));
                for place in places {
                    counts[place as usize] += 1;
                }
            }
        }
        // Each place is expected 4000 times, with a deviation of 32.
        assert!(counts.iter().all(|count| (3800..4200).contains(count)), "{counts:?}");
        assert_eq!(random_entries(5, 5, &mut Seed(1).stream("all", &[])), [0, 1, 2, 3, 4]);
    }
}
