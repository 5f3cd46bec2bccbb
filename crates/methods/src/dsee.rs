//! DSEE: a low-rank and a sparse change together, over a base that is pruned half-way.

use std::sync::Arc;

use retune_core::change::{Changes, Scope, WeightChange};
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::kernels::{add_sparse, linear, matmul};
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter, Promises, StepView};
use retune_core::parameters::{ParameterId, Parameters, to_vec};
use retune_core::random::{Random, Seed};
use retune_core::spec::{ModelSpec, Role, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Choice, Options, Table, choice, options};
use serde_json::Value;
use tensor::{Tensor, TensorData};

use crate::adapter::PREFIX;
use crate::linear_algebra::orthonormal;
use crate::registry::{self, Plugin};
use crate::sparse::{self, Meaning, SparseChange};

choice! {
    /// Where the free entries lie.
    pub enum Places {
        /// The largest entries beside a low-rank part of the weight.
        Decomposed = "decomposed",
        /// Anywhere.
        Random = "random",
        /// The largest entries of the weight.
        Magnitude = "magnitude",
    }
}

choice! {
    /// What is pruned off the base half-way.
    pub enum Prune {
        /// Nothing.
        Nothing = "nothing",
        /// Single weights.
        Weights = "weights",
        /// Whole attention heads.
        Heads = "heads",
    }
}

choice! {
    /// What is pruned first.
    pub enum Score {
        /// Where the tuned change is smallest.
        Update = "update",
        /// Where the weight is smallest.
        Weight = "weight",
        /// Anything.
        Random = "random",
    }
}

options! {
    /// Trains a low-rank and a sparse change, and prunes the base by them.
    pub struct DseeOptions("dsee") {
        /// Rank of the low-rank part.
        rank: usize = 16, in 1..=65536;
        /// Both parts are scaled by alpha / rank.
        alpha: f64 = 32.0, in 0.0..=1e6;
        /// Free entries per weight; 0 leaves plain LoRA.
        entries: usize = 64, in 0..=1_000_000_000;
        /// Where they lie.
        places: Places = Places::Decomposed;
        /// Targeted modules; empty means queries and values.
        targets: Vec<String> = Vec::new();
        /// What is pruned off the base.
        prune: Prune = Prune::Nothing;
        /// Share of the weights that is pruned.
        prune_share: f64 = 0.2, in 0.0..=0.95;
        /// Heads per layer that are pruned.
        prune_heads: usize = 1, in 1..=65536;
        /// What is pruned first.
        score: Score = Score::Update;
        /// Where in the run pruning happens, as a fraction; the rest of it mends.
        prune_at: f64 = 0.5, in 0.01..=0.99;
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "dsee",
    summary: "Trains a low-rank and a sparse change together, prunes weights or heads by them, and trains on.",
    source: "Chen, Chen, Chen, Awadallah, Wang and Cheng, DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models, 2021, arXiv 2111.00160",
    usual_learning_rates: (1e-4, 1e-3),
    options: registry::specs::<DseeOptions>,
};

/// Dually sparsity-embedded efficient tuning.
#[derive(Debug, Clone, Default)]
pub struct Dsee {
    /// Parts, places and pruning.
    pub options: DseeOptions,
    /// Read from a file: its entries need not be found again.
    loaded: bool,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(Dsee { options: DseeOptions::read(reader), loaded: false }),
    adapter: Some(("DSEE", |config| {
        Ok(Box::new(Dsee { options: sparse::saved_options(config)?, loaded: true }))
    })),
};

fn names(weight: &WeightSpec) -> [String; 2] {
    ["lora_A.weight", "lora_B.weight"].map(|part| format!("{PREFIX}{}.{part}", weight.module()))
}

fn pruned_name(weight: &WeightSpec) -> String {
    sparse::name(weight).replace(".shira_weight", ".pruned.shira_weight")
}

/// `W ⊙ S1 + s (B A + S2)`, or `(W + s (B A + S2)) ⊙ S1` where whole heads go.
#[derive(Debug)]
struct Dual {
    a: ParameterId,
    b: ParameterId,
    entries: Option<ParameterId>,
    pruned: Option<(ParameterId, SparseChange)>,
    /// The update loses the pruned entries too.
    prunes_update: bool,
    rank: usize,
    scale: f64,
}

impl WeightChange for Dual {
    fn parameters(&self) -> Vec<ParameterId> {
        let pruned = self.pruned.as_ref().map(|(id, _)| *id);
        [Some(self.a), Some(self.b), self.entries, pruned].into_iter().flatten().collect()
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        let [rows, columns] = base.dims();
        let prune = |weight: Tensor<2>, here: bool| match &self.pruned {
            Some((_, pruned)) if here => pruned.materialize(weight, scope),
            _ => weight,
        };
        let base = prune(base, !self.prunes_update);
        let a: Tensor<2> = scope.tensor(self.a, [self.rank, columns]);
        let b: Tensor<2> = scope.tensor(self.b, [rows, self.rank]);
        let changed = base + matmul(b, a).mul_scalar(self.scale);
        let Some(id) = self.entries else { return prune(changed, self.prunes_update) };
        let count = scope.parameters().get(id).count();
        let values = scope.tensor::<1>(id, [count]).mul_scalar(self.scale);
        let changed = add_sparse(changed, values, &scope.parameters().entries(id));
        prune(changed, self.prunes_update)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let data = TensorData::new(base.to_f32(), [base.rows(), base.columns()]);
        let weight = Tensor::<2>::from_data(data, scope.parameters().device());
        Some(linear(x.clone(), self.materialize(weight, scope), bias.cloned()))
    }
}

/// Returns the `count` largest entries of what is left of a weight beside its first direction, small
/// ones cut to zero: GreBsmo's decomposition with one round, which is right for ranks up to 5.
///
/// More rounds let the low-rank part swallow the very entries that are looked for.
fn decomposed(weight: Tensor<2>, count: usize, random: &mut Random) -> Result<Vec<u32>> {
    let [rows, columns] = weight.dims();
    let mut start = vec![0.0; columns];
    random.fill_normal(&mut start, 1.0);
    let device = weight.device();
    let mut v = Tensor::<2>::from_data(TensorData::new(start, [1, columns]), &device);
    let mut rest = weight.clone();
    let values = to_vec(weight.clone());
    let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>();
    let cut = 0.25 * (variance / values.len() as f64).sqrt();
    // Drawn towards the weight's own direction first: beside a random start, entries of that direction
    // are cut out as spikes, and what is cut out in the first round comes back in no other.
    let towards = matmul(weight.clone().transpose(), matmul(weight.clone(), v.transpose()));
    v = orthonormal(towards).transpose();
    for _ in 0..2 {
        let u = orthonormal(matmul(rest.clone(), v.transpose()));
        v = matmul(u.clone().transpose(), rest.clone());
        let left = to_vec(weight.clone() - matmul(u, v.clone()));
        let spikes: Vec<f32> =
            left.into_iter().map(|x| if f64::from(x.abs()) < cut { 0.0 } else { x }).collect();
        let spikes = Tensor::<2>::from_data(TensorData::new(spikes, [rows, columns]), &device);
        rest = weight.clone() - spikes;
    }
    let spikes = to_vec(weight - rest);
    let scores = || spikes.iter().map(|x| x.abs()).collect();
    Ok(sparse::largest(count, 1, |_| Ok(scores()))?.pop().unwrap_or_default())
}

impl Dsee {
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<&'a WeightSpec>> {
        let o = &self.options;
        let given = !o.targets.is_empty();
        let names = if given { o.targets.clone() } else { vec!["all-linear".to_owned()] };
        let targets = Targets { names, ..Targets::default() };
        let mut chosen = targets.select(spec, Among::Linears, "method.dsee.targets")?;
        chosen.retain(|weight| {
            given || matches!(weight.role, Role::Query | Role::Value | Role::QueryKeyValue)
        });
        for weight in &chosen {
            let [rows, columns] = weight.matrix();
            let refuse = |setting: &str, most: usize, found: usize| {
                Err(Error::Setting {
                    setting: format!("method.dsee.{setting}"),
                    what: format!("too many for {}", weight.module()),
                    expected: format!("at most {most} for a {rows} x {columns} weight"),
                    found: found.to_string(),
                    help: format!("lower `{setting}`"),
                })
            };
            if o.rank > rows.min(columns) {
                return refuse("rank", rows.min(columns), o.rank);
            }
            if o.entries > weight.count() {
                return refuse("entries", weight.count(), o.entries);
            }
        }
        if o.prune == Prune::Heads {
            if o.prune_heads >= spec.num_heads {
                return Err(Error::Setting {
                    setting: "method.dsee.prune_heads".to_owned(),
                    what: "no head would be left".to_owned(),
                    expected: format!("1 to {}", spec.num_heads.saturating_sub(1)),
                    found: o.prune_heads.to_string(),
                    help: "prune fewer".to_owned(),
                });
            }
            let (group, groups) = (group_size(spec), spec.num_key_heads.max(1));
            if !o.prune_heads.is_multiple_of(group) && !o.prune_heads.is_multiple_of(groups) {
                // Another number could not be cut out: all groups must stay alike.
                let fits = |n: &usize| n.is_multiple_of(group) || n.is_multiple_of(groups);
                let below = (1..o.prune_heads).rev().find(fits);
                let above = (o.prune_heads + 1..spec.num_heads).find(fits);
                let nearest: Vec<String> =
                    below.into_iter().chain(above).map(|n| n.to_string()).collect();
                return Err(Error::Setting {
                    setting: "method.dsee.prune_heads".to_owned(),
                    what: format!("{group} query heads share each of {groups} key heads"),
                    expected: format!(
                        "whole groups (a multiple of {group}) or as many of each group (a \
                         multiple of {groups})"
                    ),
                    found: o.prune_heads.to_string(),
                    help: format!("nearest: {}", nearest.join(" or ")),
                });
            }
            let fused = spec.weights.iter().any(|weight| weight.role == Role::QueryKeyValue);
            if fused || spec.towers.len() > 1 {
                return Err(Error::Unsupported {
                    what: "pruning heads whose queries, keys and values are one matrix, or whose \
                           number differs from block to block"
                        .to_owned(),
                    help: "set `prune` to \"weights\"".to_owned(),
                });
            }
        }
        Ok(chosen)
    }

    /// Returns the weights that lose entries when the base is pruned.
    fn pruned<'a>(&self, spec: &'a ModelSpec) -> Vec<&'a WeightSpec> {
        let inside = |weight: &&WeightSpec| weight.is_linear() && weight.layer.is_some();
        let whole_groups = self.options.prune_heads.is_multiple_of(group_size(spec));
        let of_heads = |weight: &&WeightSpec| match weight.role {
            Role::Query | Role::AttentionOutput => true,
            // Keys and values go with the last head that reads them.
            Role::Key | Role::Value => whole_groups,
            _ => false,
        };
        let linears = spec.weights.iter().filter(inside);
        match self.options.prune {
            Prune::Nothing => Vec::new(),
            Prune::Weights => linears.collect(),
            Prune::Heads => linears.filter(of_heads).collect(),
        }
    }

    fn scale(&self) -> f64 {
        self.options.alpha / self.options.rank as f64
    }

    /// Returns the tuned change of a weight without its scale; nothing where it has none.
    fn update(parameters: &Parameters, weight: &WeightSpec) -> Option<Vec<f32>> {
        let [a, b] = names(weight).map(|name| parameters.find(&name));
        let (a, b) = (a?, b?);
        let [rows, columns] = weight.matrix();
        let rank = parameters.get(a).count() / columns.max(1);
        let product =
            matmul(parameters.constant(b, [rows, rank]), parameters.constant(a, [rank, columns]));
        let mut update = to_vec(product);
        if let Some(id) = parameters.find(&sparse::name(weight)) {
            for (index, value) in parameters.indices(id).iter().zip(parameters.values(id)) {
                update[*index as usize] += value;
            }
        }
        Some(update)
    }

    fn random_scores(view: &StepView<'_>, weight: &WeightSpec) -> Vec<f32> {
        let mut random = view.seed.stream(&format!("dsee {}", weight.name), &[]);
        (0..weight.count()).map(|_| random.uniform() as f32).collect()
    }

    /// Returns how much each entry matters.
    fn scores(
        &self,
        view: &StepView<'_>,
        weights: &Weights,
        weight: &WeightSpec,
    ) -> Result<Vec<f32>> {
        let update = Self::update(view.parameters, weight);
        let scores = match (self.options.score, update) {
            (Score::Random, _) => Self::random_scores(view, weight),
            (Score::Update, Some(update)) => update,
            _ => weights.values(&weight.name)?,
        };
        Ok(scores.into_iter().map(f32::abs).collect())
    }

    fn prune_weights(&self, view: &mut StepView<'_>, weights: &Weights) -> Result<()> {
        // The weights that are tuned and the others are each ranked among themselves.
        let tuned: Vec<String> =
            self.chosen(view.spec)?.iter().map(|weight| weight.name.clone()).collect();
        for of_tuned in [true, false] {
            let mut group = self.pruned(view.spec);
            group.retain(|weight| tuned.contains(&weight.name) == of_tuned);
            let total: usize = group.iter().map(|weight| weight.count()).sum();
            let wanted = (self.options.prune_share * total as f64).round() as usize;
            let masks = sparse::largest(wanted, group.len(), |place| {
                let scores = self.scores(view, weights, group[place])?;
                Ok(scores.into_iter().map(sparse::smallness).collect())
            })?;
            for (weight, mask) in group.into_iter().zip(masks) {
                set_pruned(view.parameters, weight, mask)?;
            }
        }
        Ok(())
    }

    fn prune_heads(&self, view: &mut StepView<'_>, weights: &Weights) -> Result<()> {
        let spec = view.spec;
        let width = spec.head_width;
        let all = self.pruned(spec);
        for layer in 0..spec.num_layers {
            let mut scores = vec![0.0_f64; spec.num_heads];
            for role in [Role::Query, Role::Value] {
                let found = spec.linears().find(|w| w.layer == Some(layer) && w.role == role);
                let Some(weight) = found else { continue };
                let [rows, columns] = weight.matrix();
                let values = self.scores(view, weights, weight)?;
                // Values that several heads share count for each of them.
                let shared = spec.num_heads * width / rows.max(1);
                for (head, score) in scores.iter_mut().enumerate() {
                    let start = head / shared.max(1) * width * columns;
                    let own = &values[start..start + width * columns];
                    *score += own.iter().map(|x| f64::from(*x)).sum::<f64>();
                }
            }
            let gone = self.gone(&scores, spec);
            for weight in all.iter().filter(|weight| weight.layer == Some(layer)) {
                let columns = weight.matrix()[1];
                let is_gone = |index: &u32| {
                    let (row, column) = (*index as usize / columns, *index as usize % columns);
                    let head = match weight.role {
                        Role::AttentionOutput => column / width,
                        Role::Query => row / width,
                        _ => row / width * group_size(spec),
                    };
                    gone.contains(&head)
                };
                let mask = (0..weight.count() as u32).filter(is_gone).collect();
                set_pruned(view.parameters, weight, mask)?;
            }
        }
        Ok(())
    }

    /// Chooses the heads of one layer that go: the lowest whole groups that share a key, or the
    /// lowest of each group, so that what stays can be cut out.
    fn gone(&self, scores: &[f64], spec: &ModelSpec) -> Vec<usize> {
        let size = group_size(spec);
        let lowest = |mut order: Vec<usize>, score: &dyn Fn(usize) -> f64, count: usize| {
            order.sort_by(|a, b| score(*a).total_cmp(&score(*b)).then(a.cmp(b)));
            order.truncate(count);
            order
        };
        let count = self.options.prune_heads;
        let groups = (0..spec.num_heads / size).collect::<Vec<_>>();
        if count.is_multiple_of(size) {
            let sum = |group: usize| scores[group * size..(group + 1) * size].iter().sum();
            let gone = lowest(groups, &sum, count / size);
            return gone.into_iter().flat_map(|g| g * size..(g + 1) * size).collect();
        }
        let each = count / groups.len().max(1);
        let of_group =
            |g: usize| lowest((g * size..(g + 1) * size).collect(), &|h| scores[h], each);
        groups.into_iter().flat_map(of_group).collect()
    }

    /// Returns the share of the layers' products that pruning saves, by formula.
    fn saved(&self, spec: &ModelSpec) -> f64 {
        let linears = spec.weights.iter().filter(|w| w.is_linear() && w.layer.is_some());
        let all: usize = linears.map(WeightSpec::count).sum();
        let pruned: usize = self.pruned(spec).iter().map(|weight| weight.count()).sum();
        let share = match self.options.prune {
            Prune::Nothing => 0.0,
            Prune::Weights => self.options.prune_share,
            Prune::Heads => self.options.prune_heads as f64 / spec.num_heads.max(1) as f64,
        };
        share * pruned as f64 / all.max(1) as f64
    }
}

/// Returns how many query heads share one key head.
fn group_size(spec: &ModelSpec) -> usize {
    (spec.num_heads / spec.num_key_heads.max(1)).max(1)
}

/// Sets the entries of `mask` to zero from now on.
fn set_pruned(parameters: &mut Parameters, weight: &WeightSpec, mask: Vec<u32>) -> Result<()> {
    let Some(id) = parameters.find(&pruned_name(weight)) else { return Ok(()) };
    let zeros = vec![0.0; mask.len()];
    parameters.set_entries(id, mask, zeros)
}

impl Method for Dsee {
    fn options(&self) -> Table {
        self.options.write()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        CARD
    }

    fn promises(&self) -> Promises {
        let quantized_base = self.options.prune == Prune::Nothing;
        Promises { quantized_base, ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &[
            "rank = 2\nentries = 7",
            "rank = 2\nentries = 5\nplaces = \"random\"\nprune = \"weights\"",
            "rank = 1\nentries = 0",
        ]
    }

    fn stages(&self, num_steps: u64) -> Result<Vec<u64>> {
        if self.options.prune == Prune::Nothing || num_steps < 2 {
            return Ok(vec![num_steps]);
        }
        let first = self.prune_step(num_steps);
        Ok(vec![first, num_steps - first])
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let chosen = self.chosen(spec)?;
        let rank = self.options.rank;
        let mut parameters = Vec::new();
        let mut add = |weight: &WeightSpec, name: String, shape: Vec<usize>, trains| {
            let place = weight.name.clone();
            parameters.push(PlannedParameter { name, shape, place, trains });
        };
        let pruned = self.pruned(spec);
        for weight in &spec.weights {
            if chosen.iter().any(|known| known.name == weight.name) {
                let [a, b] = names(weight);
                let [rows, columns] = weight.matrix();
                add(weight, a, vec![rank, columns], true);
                add(weight, b, vec![rows, rank], true);
                if self.options.entries > 0 {
                    add(weight, sparse::name(weight), vec![self.options.entries], true);
                }
            }
            if pruned.iter().any(|known| known.name == weight.name) {
                add(weight, pruned_name(weight), vec![0], false);
            }
        }
        parameters.extend(sparse::plan_heads(&sparse::heads(spec, &chosen)?));
        let mut notes = Vec::new();
        if self.options.prune != Prune::Nothing {
            notes.push(format!(
                "pruning {} saves {:.1} % of the layers' products where the zeros are skipped",
                self.options.prune.name(),
                100.0 * self.saved(spec)
            ));
        }
        Ok(MethodPlan { parameters, notes })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        let o = &self.options;
        if o.prune != Prune::Nothing {
            sparse::refuse_blocks(weights, "dsee with pruning")?;
        }
        let spec = weights.spec().clone();
        let chosen = self.chosen(&spec)?;
        let pruned = self.pruned(&spec);
        let mut changes = Changes::default();
        for (number, weight) in spec.weights.iter().enumerate() {
            let is_tuned = chosen.iter().any(|known| known.name == weight.name);
            let is_pruned = pruned.iter().any(|known| known.name == weight.name);
            let [rows, columns] = weight.matrix();
            let mut random = seed.stream("dsee", &[number as u64]);
            let mut parts = None;
            if is_tuned {
                let mut first = vec![0.0; o.rank * columns];
                random.fill_normal(&mut first, 0.02);
                let [a, b] = names(weight);
                let a = parameters.add(a, &[o.rank, columns], first);
                let b = parameters.add(b, &[rows, o.rank], vec![0.0; rows * o.rank]);
                let mut entries = None;
                if o.entries > 0 {
                    let places = if self.loaded {
                        Vec::new()
                    } else {
                        self.places(weights, weight, &mut random)?
                    };
                    let zeros = vec![0.0; places.len()];
                    let name = sparse::name(weight);
                    entries = Some(parameters.add_sparse(name, [rows, columns], places, zeros));
                }
                parts = Some((a, b, entries));
            }
            let mut off = None;
            if is_pruned {
                let name = pruned_name(weight);
                let id = parameters.add_sparse(name, [rows, columns], Vec::new(), Vec::new());
                parameters.set_trains(id, false);
                off = Some((id, SparseChange::new(id, Meaning::Value)));
            }
            match (parts, off) {
                (Some((a, b, entries)), pruned) => {
                    let (rank, scale) = (o.rank, self.scale());
                    let prunes_update = o.prune == Prune::Heads;
                    let change = Dual { a, b, entries, pruned, prunes_update, rank, scale };
                    changes.change_weight(&weight.name, change);
                }
                (None, Some((_, change))) => changes.change_weight(&weight.name, change),
                (None, None) => {}
            }
        }
        let heads = sparse::heads(&spec, &chosen)?;
        sparse::attach_heads(&heads, weights, parameters, &mut changes)?;
        Ok(changes)
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        let Some(weights) = step.weights else { return Ok(()) };
        if step.step != self.prune_step(step.num_steps) {
            return Ok(());
        }
        match self.options.prune {
            Prune::Nothing => Ok(()),
            Prune::Weights => self.prune_weights(step, weights),
            Prune::Heads => self.prune_heads(step, weights),
        }
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        Some(sparse::config("DSEE", &self.options.write(), spec).into())
    }
}

impl Dsee {
    fn prune_step(&self, num_steps: u64) -> u64 {
        let step = (self.options.prune_at * num_steps as f64).round() as u64;
        step.clamp(1, num_steps.saturating_sub(1).max(1))
    }

    fn places(
        &self,
        weights: &Weights,
        weight: &WeightSpec,
        random: &mut Random,
    ) -> Result<Vec<u32>> {
        let count = self.options.entries;
        match self.options.places {
            Places::Random => Ok(sparse::random_entries(weight.count(), count, random)),
            Places::Decomposed => decomposed(weights.dense(&weight.name)?, count, random),
            Places::Magnitude => {
                let sizes = sparse::largest(count, 1, |_| {
                    Ok(weights.values(&weight.name)?.into_iter().map(f32::abs).collect())
                })?;
                Ok(sizes.into_iter().next().unwrap_or_default())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::Device;

    /// Plants 16 spikes of 0.5 in noise of 0.04 beside a direction; returns how many are found.
    fn planted(deviation: f64, seed: u64) -> usize {
        let n = 64;
        let mut random = Seed(seed).stream("planted", &[]);
        let (mut u, mut v, mut noise) = (vec![0.0; n], vec![0.0; n], vec![0.0; n * n]);
        random.fill_normal(&mut u, deviation);
        random.fill_normal(&mut v, deviation);
        random.fill_normal(&mut noise, 0.04);
        let spikes = sparse::random_entries(n * n, 16, &mut random);
        let mut values: Vec<f32> = (0..n * n).map(|i| u[i / n] * v[i % n] + noise[i]).collect();
        for spike in &spikes {
            values[*spike as usize] += 0.5;
        }
        let weight = Tensor::<2>::from_data(TensorData::new(values, [n, n]), &Device::flex());
        let found = decomposed(weight, 16, &mut random).unwrap();
        assert_eq!(found.len(), 16);
        found.iter().filter(|place| spikes.contains(place)).count()
    }

    #[test]
    fn planted_spikes_are_found_beside_small_and_large_directions() {
        for deviation in [0.0, 0.1, 0.2, 0.5, 1.0] {
            for seed in 0..10 {
                let hits = planted(deviation, seed);
                assert!(hits >= 15, "{hits} of 16 with factors of {deviation}, seed {seed}");
            }
        }
    }
}
