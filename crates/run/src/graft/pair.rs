//! A tuned model beside its base, and the model that lies between them.

use retune_core::change::Changes;
use retune_core::model::{Model, Tuned};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::{Head, ModelSpec, Role, WeightSpec};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_methods::replacement;
use retune_methods::sparse::{largest, random_entries, split};

use super::Region;

/// Differences of names and shapes that are listed at most.
const SHOWN: usize = 3;

/// A tuned model beside its base.
///
/// Embeddings and output head are no part of a graft, as they stay frozen in the paper's tuning; the
/// head of a classifier, which the base does not have, is taken over whole.
#[derive(Debug)]
pub struct Pair<'a> {
    model: &'a dyn Model,
    base: &'a Weights,
    tuned: &'a Weights,
    weights: Vec<&'a WeightSpec>,
    heads: Vec<&'a WeightSpec>,
}

impl<'a> Pair<'a> {
    /// Joins a base with the model tuned from it.
    ///
    /// # Errors
    /// [`Error::Input`] if a weight is missing on one side or has another shape, or if no weight
    /// that could be grafted differs, or a difference is not finite.
    pub fn new(model: &'a dyn Model, base: &'a Weights, tuned: &'a Weights) -> Result<Self> {
        let spec = base.spec();
        check_alike(spec, tuned.spec())?;
        let kept =
            |role| matches!(role, Role::Embedding | Role::Position | Role::TokenType | Role::Head);
        let (left_out, weights) = spec.weights.iter().partition::<Vec<_>, _>(|w| kept(w.role));
        let mut pair = Self { model, base, tuned, weights: Vec::new(), heads: Vec::new() };
        for weight in left_out {
            let is_head = weight.role == Role::Head && matches!(spec.head, Head::Classes { .. });
            if is_head && pair.delta(weight)?.iter().any(|value| *value != 0.0) {
                pair.heads.push(weight);
            }
        }
        for weight in weights {
            let delta = pair.delta(weight)?;
            if let Some(place) = delta.iter().position(|value| !value.is_finite()) {
                return Err(Error::Input {
                    what: format!("`{}` cannot be grafted", weight.name),
                    expected: "finite numbers".to_owned(),
                    found: format!("a change of {} at index {place}", delta[place]),
                    help: "use a checkpoint from before the training diverged".to_owned(),
                });
            }
            // What tuning left alone needs no score.
            if delta.iter().any(|value| *value != 0.0) {
                pair.weights.push(weight);
            }
        }
        if !pair.weights.is_empty() {
            return Ok(pair);
        }
        Err(Error::Input {
            what: "there is nothing to graft: the tuned model equals its base".to_owned(),
            expected: "a weight other than embeddings and head that tuning moved".to_owned(),
            found: "no difference".to_owned(),
            help: "check that the tuned model is not the base itself".to_owned(),
        })
    }

    /// Returns the weights a graft may hold entries of, those that tuning moved, in the order of the
    /// forward pass.
    pub fn weights(&self) -> &[&'a WeightSpec] {
        &self.weights
    }

    /// Returns the weights taken over whole: a classifier's new head.
    pub fn heads(&self) -> &[&'a WeightSpec] {
        &self.heads
    }

    /// Returns the base.
    pub fn base(&self) -> &'a Weights {
        self.base
    }

    /// Returns the tuned model's weights.
    pub fn tuned(&self) -> &'a Weights {
        self.tuned
    }

    /// Returns how many entries a graft could have at most.
    pub fn num_entries(&self) -> usize {
        self.weights.iter().map(|weight| weight.count()).sum()
    }

    /// Names the weights that tuning moved although they are no part of grafts.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn left_behind(&self) -> Result<Vec<String>> {
        let mut moved = Vec::new();
        let known = |weight: &WeightSpec| {
            self.weights.iter().chain(&self.heads).any(|known| known.name == weight.name)
        };
        for weight in self.base.spec().weights.iter().filter(|weight| !known(weight)) {
            if self.base.values(&weight.name)? != self.tuned.values(&weight.name)? {
                moved.push(weight.name.clone());
            }
        }
        Ok(moved)
    }

    /// Computes what tuning changed in one weight, in its logical shape.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn delta(&self, weight: &WeightSpec) -> Result<Vec<f32>> {
        let base = self.base.values(&weight.name)?;
        let mut delta = self.tuned.values(&weight.name)?;
        delta.iter_mut().zip(base).for_each(|(tuned, base)| *tuned -= base);
        Ok(delta)
    }

    /// Finds the `count` entries that moved most, over all weights together; ties go to the earlier
    /// weight and place.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn most_moved(&self, count: usize) -> Result<Region> {
        let found = largest(count.min(self.num_entries()), self.weights.len(), |place| {
            Ok(self.delta(self.weights[place])?.into_iter().map(f32::abs).collect())
        })?;
        Ok(self.region(found))
    }

    /// Draws `count` entries, each as likely as any other.
    pub fn random(&self, count: usize, seed: Seed) -> Region {
        let total = self.num_entries();
        let counts: Vec<usize> = self.weights.iter().map(|weight| weight.count()).collect();
        let mut random = seed.stream("graft", &[]);
        self.region(split(&random_entries(total, count.min(total), &mut random), &counts))
    }

    /// Names lists of entries, one per weight.
    pub(super) fn region(&self, lists: Vec<Vec<u32>>) -> Region {
        let names = self.weights.iter().map(|weight| weight.name.clone());
        Region(names.zip(lists).filter(|(_, list)| !list.is_empty()).collect())
    }
}

/// Refuses two models that are not of one shape, listing the first differences.
fn check_alike(base: &ModelSpec, tuned: &ModelSpec) -> Result<()> {
    let mut wrong = Vec::new();
    if base.vocabulary != tuned.vocabulary {
        wrong.push(format!("vocabularies of {} and {} words", base.vocabulary, tuned.vocabulary));
    }
    for weight in &base.weights {
        match tuned.weight(&weight.name) {
            None => wrong.push(format!("`{}` is missing from the tuned model", weight.name)),
            Some(other) if other.shape != weight.shape => wrong.push(format!(
                "`{}` has shape {:?} in the base, {:?} in the tuned model",
                weight.name, weight.shape, other.shape
            )),
            Some(_) => {}
        }
    }
    let surplus = tuned.weights.iter().filter(|weight| base.weight(&weight.name).is_none());
    wrong.extend(surplus.map(|weight| format!("`{}` is missing from the base", weight.name)));
    if wrong.is_empty() {
        return Ok(());
    }
    let (count, shown) = (wrong.len(), wrong.len().min(SHOWN));
    let mut found = wrong[..shown].join("\n    ");
    if count > shown {
        found = format!("{found}\n    and {} more", count - shown);
    }
    Err(Error::Input {
        what: "the tuned model does not belong to this base".to_owned(),
        expected: "the same weights, of the same shapes, on both sides".to_owned(),
        found,
        help: "give the model it was tuned from; resized embeddings cannot be grafted".to_owned(),
    })
}

/// The model that lies between base and tuned model, with values of its own.
#[derive(Debug)]
pub struct Bench<'a> {
    pair: &'a Pair<'a>,
    changes: Changes,
    parameters: Parameters,
    ids: Vec<ParameterId>,
}

impl<'a> Bench<'a> {
    /// Makes the base, with a classifier's tuned head.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn new(pair: &'a Pair<'a>) -> Result<Self> {
        let (mut changes, mut parameters) =
            (Changes::default(), Parameters::new(pair.base.device()));
        let mut ids = Vec::new();
        for weight in &pair.weights {
            let name = &weight.name;
            ids.push(replacement::attach(name, weight, pair.base, &mut parameters, &mut changes)?);
        }
        for head in &pair.heads {
            let id =
                replacement::attach(&head.name, head, pair.tuned, &mut parameters, &mut changes)?;
            parameters.set_trains(id, false);
        }
        Ok(Self { pair, changes, parameters, ids })
    }

    /// Sets every weight to `base + share · change`; `share` gives those of a weight's entries by
    /// its place.
    ///
    /// It is always computed from the base: adding and taking away again would drift.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn mix(&mut self, mut share: impl FnMut(usize, usize) -> f32) -> Result<()> {
        for (place, weight) in self.pair.weights.iter().enumerate() {
            let mut values = self.pair.base.values(&weight.name)?;
            let delta = self.pair.delta(weight)?;
            for (entry, (value, delta)) in values.iter_mut().zip(delta).enumerate() {
                *value += share(place, entry) * delta;
            }
            self.parameters.set(self.ids[place], values)?;
        }
        Ok(())
    }

    /// Grafts a region.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn graft(&mut self, region: &Region) -> Result<()> {
        for (place, weight) in self.pair.weights.iter().enumerate() {
            let mut values = self.pair.base.values(&weight.name)?;
            let entries = region.of(&weight.name);
            if !entries.is_empty() {
                let delta = self.pair.delta(weight)?;
                for entry in entries {
                    values[*entry as usize] += delta[*entry as usize];
                }
            }
            self.parameters.set(self.ids[place], values)?;
        }
        Ok(())
    }

    /// Returns the model.
    pub fn tuned(&self) -> Tuned<'_> {
        Tuned {
            model: self.pair.model,
            weights: self.pair.base,
            changes: &self.changes,
            parameters: &self.parameters,
        }
    }

    /// Returns the place of each weight's parameter.
    pub(super) fn ids(&self) -> &[ParameterId] {
        &self.ids
    }
}
