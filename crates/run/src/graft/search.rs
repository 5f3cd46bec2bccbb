//! The optimisation of the mask: scores through a sigmoid, by plain gradient descent.
//!
//! The paper writes the soft mask as `γ + (1 - 2γ) σ(S - c)` with γ the base mask. With
//! `T = (1 - 2γ)(S - c)` that is `σ(T)`, a step of gradient descent on S is one on T, and rounding
//! at one half asks for the sign: one score per entry is all there is.

use std::ops::ControlFlow;

use retune_core::batch::Batch;
use retune_core::model::Tuned;
use retune_core::random::Seed;
use retune_methods::sparse::largest;
use retune_train::backprop::Backprop;

use super::Region;
use super::pair::{Bench, Pair};
use super::state::{Best, Keep, State};
use crate::error::{Error, Result};

/// Where the mask starts.
#[derive(Debug, Clone, PartialEq)]
pub enum BaseMask {
    /// The entries that moved most, a share of all.
    Movement(f64),
    /// Random ones, a share of all; a control.
    Random(f64),
    /// None.
    Empty,
    /// An earlier graft's.
    Given(Region),
}

/// How a mask is optimised.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where it starts.
    pub base: BaseMask,
    /// How firmly: scores start this far from the border.
    pub bias: f64,
    /// The learning rate; by default such that [`Settings::flips`] of the entries change sides in
    /// the first step.
    pub learning_rate: Option<f64>,
    /// The share of entries that change sides in the first step, where there is no rate.
    pub flips: f64,
    /// Steps of gradient descent.
    pub num_steps: u64,
    /// The most entries a mask may have, those of the highest scores; each step is judged by what
    /// this leaves of it.
    pub budget: Option<usize>,
    /// Where the first scores are drawn from.
    pub seed: Seed,
    /// Runs each layer again in the backward pass instead of keeping its activations.
    pub recompute: bool,
}

impl Default for Settings {
    /// The official code's settings, with a rate of our own: its 10⁷ suits one model and task.
    fn default() -> Self {
        Self {
            base: BaseMask::Movement(1e-5),
            bias: 10.0,
            learning_rate: None,
            flips: 1e-3,
            num_steps: 100,
            budget: None,
            seed: Seed(0),
            recompute: false,
        }
    }
}

/// One step of a search.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Step {
    /// Steps done.
    pub step: u64,
    /// Mean loss of the soft mask before the step.
    pub loss: f64,
    /// Entries of the rounded mask behind it, cut to the budget.
    pub num_entries: usize,
    /// What the judge says of these.
    pub score: f64,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The best rounded mask, cut to the budget.
    pub region: Region,
    /// The step it is of; 0 where no step was better than the base mask.
    pub step: u64,
    /// What the judge said of it.
    pub score: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// All steps.
    pub steps: Vec<Step>,
}

/// What a search is given beside its settings.
pub struct Task<'t> {
    /// Returns the batches whose mean loss a step descends.
    pub batches: &'t mut dyn FnMut(u64) -> Result<Vec<Batch>>,
    /// Says how good a model is; higher is better.
    pub judge: &'t mut dyn FnMut(&Tuned<'_>) -> Result<f64>,
    /// Is told of every step; a break ends the search there.
    pub watch: &'t mut dyn FnMut(Step) -> ControlFlow<()>,
}

impl std::fmt::Debug for Task<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Task")
    }
}

/// Optimises a mask, and returns the best of the rounded ones.
///
/// With `keep`, every step is written down, and an interrupted search of the same work goes on where
/// it stopped with the same numbers.
///
/// # Errors
/// If settings are impossible, files or batches cannot be read, or the gradient is not finite.
///
/// # Cost
/// Memory of the model, of one value per entry, of the gradient and of the scores; per step a
/// forward and backward pass over the batches, and what the judge does.
pub fn search(
    pair: &Pair<'_>,
    settings: &Settings,
    keep: Option<&Keep>,
    task: Task<'_>,
) -> Result<Found> {
    check(pair, settings)?;
    let known = keep.map(|keep| keep.read(pair)).transpose()?.flatten();
    let mut state = match known {
        Some(state) => state,
        None => State::new(start(pair, settings)?),
    };
    let mut bench = Bench::new(pair)?;
    let mut judged = |bench: &mut Bench<'_>, region: &Region| {
        bench.graft(region)?;
        (task.judge)(&bench.tuned())
    };
    if state.best.is_none() && settings.base != BaseMask::Empty {
        let region = rounded(pair, &state.scores, settings.budget)?;
        state.best = Some(Best { score: judged(&mut bench, &region)?, step: 0, region });
    }
    let learner = Backprop { seed: settings.seed, recompute: settings.recompute };
    while state.step < settings.num_steps {
        bench.mix(|weight, entry| sigmoid(state.scores[weight][entry]))?;
        let batches = (task.batches)(state.step)?;
        let done = learner.step(&bench.tuned(), &batches, state.step)?;
        let mut slopes = Vec::with_capacity(pair.weights().len());
        let mut gradients = done.gradients;
        for (weight, scores) in state.scores.iter().enumerate() {
            let gradient = gradients[bench.ids()[weight].index()].take();
            slopes.push(slope(pair, weight, gradient, scores)?);
        }
        let rate = match (state.learning_rate, settings.learning_rate) {
            (Some(rate), _) | (None, Some(rate)) => rate,
            (None, None) => usual_rate(settings.flips, &state.scores, &slopes)?,
        };
        state.learning_rate = Some(rate);
        for (scores, slopes) in state.scores.iter_mut().zip(&slopes) {
            for (score, slope) in scores.iter_mut().zip(slopes) {
                *score = (f64::from(*score) - rate * f64::from(*slope)) as f32;
            }
        }
        state.step += 1;
        let region = rounded(pair, &state.scores, settings.budget)?;
        let score = judged(&mut bench, &region)?;
        let step = Step { step: state.step, loss: done.loss, num_entries: region.len(), score };
        state.note(step, region);
        if let Some(keep) = keep {
            keep.write(pair, &state)?;
        }
        if (task.watch)(step).is_break() {
            break;
        }
    }
    let Best { region, step, score } = state.best.unwrap_or_default();
    let learning_rate = state.learning_rate.unwrap_or(0.0);
    Ok(Found { region, step, score, learning_rate, steps: state.steps })
}

fn check(pair: &Pair<'_>, settings: &Settings) -> Result<()> {
    let wrong = |setting: &str, expected: &str, found: String| {
        Err(Error::Core(retune_core::Error::Setting {
            setting: setting.to_owned(),
            what: "no mask can be optimised with this value".to_owned(),
            expected: expected.to_owned(),
            found,
            help: "see `retune graft find --help`".to_owned(),
        }))
    };
    if let BaseMask::Movement(share) | BaseMask::Random(share) = settings.base
        && !(0.0..=1.0).contains(&share)
    {
        return wrong("sparsity", "a share from 0 to 1", share.to_string());
    }
    if let BaseMask::Given(region) = &settings.base {
        for (name, entries) in &region.0 {
            let weight = pair.weights().iter().find(|weight| weight.name == *name);
            let inside = |weight: &&&retune_core::spec::WeightSpec| {
                entries.iter().all(|entry| (*entry as usize) < weight.count())
            };
            if weight.as_ref().is_none_or(|x| !inside(x)) {
                return wrong("from", "an earlier graft of this model", format!("`{name}`"));
            }
        }
    }
    if !(settings.bias > 1.0 && settings.bias <= 80.0) {
        return wrong("bias", "a number above 1 and up to 80", settings.bias.to_string());
    }
    if settings.num_steps == 0 {
        return wrong("steps", "at least 1", "0".to_owned());
    }
    if settings.budget == Some(0) {
        return wrong("budget", "at least 1 entry", "0".to_owned());
    }
    match settings.learning_rate {
        Some(rate) if !(rate.is_finite() && rate > 0.0) => {
            wrong("learning-rate", "a number above 0", rate.to_string())
        }
        None if !(settings.flips > 0.0 && settings.flips <= 1.0) => {
            wrong("flips", "a share above 0 and up to 1", settings.flips.to_string())
        }
        _ => Ok(()),
    }
}

/// Draws the first scores: `S` from `[0, 1)`, so that every mask starts at its base.
fn start(pair: &Pair<'_>, settings: &Settings) -> Result<Vec<Vec<f32>>> {
    let count = |share: f64| (share * pair.num_entries() as f64).floor() as usize;
    let base = match &settings.base {
        BaseMask::Movement(share) => pair.most_moved(count(*share))?,
        BaseMask::Random(share) => pair.random(count(*share), settings.seed),
        BaseMask::Empty => Region::default(),
        BaseMask::Given(region) => region.clone(),
    };
    let scores = |weight: &&retune_core::spec::WeightSpec| {
        let mut random = settings.seed.stream(&format!("graft scores {}", weight.name), &[]);
        let mut scores: Vec<f32> =
            (0..weight.count()).map(|_| (random.uniform() - settings.bias) as f32).collect();
        for entry in base.of(&weight.name) {
            scores[*entry as usize] = -scores[*entry as usize];
        }
        scores
    };
    Ok(pair.weights().iter().map(scores).collect())
}

fn sigmoid(score: f32) -> f32 {
    1.0 / (1.0 + (-score).exp())
}

/// Computes the loss's slope along the scores of one weight: `dL/dθ · Δ · σ(T) (1 - σ(T))`.
fn slope(
    pair: &Pair<'_>,
    weight: usize,
    gradient: Option<Vec<f32>>,
    scores: &[f32],
) -> Result<Vec<f32>> {
    let weight = pair.weights()[weight];
    let Some(mut slope) = gradient else { return Ok(vec![0.0; scores.len()]) };
    let delta = pair.delta(weight)?;
    for ((slope, delta), score) in slope.iter_mut().zip(delta).zip(scores) {
        let soft = sigmoid(score.abs());
        // Of 1 - σ nothing would be left for large scores; σ of the negative keeps its digits.
        *slope *= delta * soft * sigmoid(-score.abs());
    }
    if slope.iter().all(|value| value.is_finite()) {
        return Ok(slope);
    }
    Err(Error::Core(retune_core::Error::Input {
        what: format!("the gradient of `{}` is not finite", weight.name),
        expected: "a model whose loss can be computed".to_owned(),
        found: "NaN or infinite".to_owned(),
        help: "look at the data with `retune doctor`, and at both models".to_owned(),
    }))
}

/// Finds the rate at which this share of the entries changes sides in one step.
fn usual_rate(flips: f64, scores: &[Vec<f32>], slopes: &[Vec<f32>]) -> Result<f64> {
    let total: usize = scores.iter().map(Vec::len).sum();
    let wanted = ((flips * total as f64).ceil() as usize).max(1);
    // An entry crosses the border where the rate is above T / slope: the largest quotients first.
    let crossing = |weight: usize| -> Vec<f32> {
        let pairs = slopes[weight].iter().zip(&scores[weight]);
        pairs.map(|(slope, score)| (slope / score).max(0.0)).collect()
    };
    let first = largest(wanted, scores.len(), |weight| Ok(crossing(weight)))?;
    let mut least = f32::INFINITY;
    for (weight, entries) in first.iter().enumerate() {
        let quotients = crossing(weight);
        let positive = entries.iter().map(|entry| quotients[*entry as usize]).filter(|q| *q > 0.0);
        least = positive.fold(least, f32::min);
    }
    if least.is_finite() {
        return Ok(1.0 / f64::from(least) * (1.0 + 1e-6));
    }
    Err(Error::Core(retune_core::Error::Input {
        what: "the mask has nowhere to go: no entry lowers the loss".to_owned(),
        expected: "a task on which the tuned model differs from its base".to_owned(),
        found: "a slope of zero everywhere".to_owned(),
        help: "give the data the model was tuned on".to_owned(),
    }))
}

/// Rounds a mask: the entries of positive scores, or of them as many as may stay, the highest.
fn rounded(pair: &Pair<'_>, scores: &[Vec<f32>], budget: Option<usize>) -> Result<Region> {
    Ok(pair.region(inside(scores, budget)?))
}

fn inside(scores: &[Vec<f32>], budget: Option<usize>) -> Result<Vec<Vec<u32>>> {
    let positive = |scores: &Vec<f32>| -> Vec<u32> {
        let inside = scores.iter().enumerate().filter(|(_, score)| **score > 0.0);
        inside.map(|(entry, _)| entry as u32).collect()
    };
    let entries: Vec<Vec<u32>> = scores.iter().map(positive).collect();
    let total: usize = entries.iter().map(Vec::len).sum();
    let Some(budget) = budget.filter(|budget| *budget < total) else { return Ok(entries) };
    let highest = largest(budget, entries.len(), |weight| {
        Ok(entries[weight].iter().map(|entry| scores[weight][*entry as usize]).collect())
    })?;
    let kept = highest.iter().zip(&entries);
    Ok(kept.map(|(kept, all)| kept.iter().map(|place| all[*place as usize]).collect()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_rate_moves_the_wanted_share_across() {
        // Entry 0 crosses at rate 20, entry 2 at 5, entry 1 moves away, entry 3 does not move.
        let (scores, slopes) =
            (vec![vec![-10.0, -10.0], vec![10.0, -9.0]], vec![vec![-0.5, 0.5], vec![2.0, 0.0]]);
        for (flips, expected) in [(0.25, 5.0), (0.5, 20.0), (1.0, 20.0)] {
            let rate = usual_rate(flips, &scores, &slopes).unwrap();
            assert!((rate / expected - 1.0).abs() < 1e-5, "{rate} {expected}");
        }
        let error = usual_rate(0.5, &scores, &[vec![0.0; 2], vec![0.0; 2]]).unwrap_err();
        assert!(error.to_string().contains("slope of zero"), "{error}");
    }

    #[test]
    fn the_budget_keeps_the_highest_scores() {
        let scores = [vec![-1.0, 0.5, 0.0, 2.0], vec![1.0, -3.0, 0.1]];
        assert_eq!(inside(&scores, Some(2)).unwrap(), [vec![3], vec![0]]);
        assert_eq!(inside(&scores, Some(9)).unwrap(), [vec![1, 3], vec![0, 2]]);
        assert_eq!(inside(&scores, None).unwrap(), [vec![1, 3], vec![0, 2]]);
    }
}
