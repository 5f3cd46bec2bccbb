//! Contests: methods side by side on the same rows, each with the rate that suits it.

use std::fmt::Write;

use retune_core::random::Seed;

use crate::lab::{Lab, Pace, method};
use crate::{Result, each, mean};

/// One contestant.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arm {
    /// What people call it.
    pub(crate) name: &'static str,
    /// The method's name in the registry.
    pub(crate) method: &'static str,
    /// Its options, as TOML.
    pub(crate) options: &'static str,
    /// The rates it may choose from.
    pub(crate) rates: &'static [f64],
}

/// Which rows serve what.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    /// Rows to tune on.
    pub(crate) train: Vec<usize>,
    /// Rows that choose the rate.
    pub(crate) validation: Vec<usize>,
    /// Rows to measure on.
    pub(crate) test: Vec<usize>,
}

/// What an arm reached.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Reached {
    /// Share of the test rows that are right.
    pub(crate) accuracy: f64,
    /// The rate chosen.
    pub(crate) rate: f64,
    /// Values that trained.
    pub(crate) num_trained: usize,
}

impl Arm {
    /// Tunes with each rate; the validation rows choose, the first of equals.
    ///
    /// # Errors
    /// Those of the method and of training.
    pub(crate) fn reach(&self, lab: &Lab, rows: &Rows, pace: Pace, seed: Seed) -> Result<Reached> {
        let mut best = (f64::NEG_INFINITY, None);
        for rate in self.rates {
            let found = self.reach_at(lab, rows, Pace { rate: *rate, ..pace }, seed)?;
            if found.0 > best.0 {
                best = (found.0, Some(found.1));
            }
        }
        Ok(best.1.unwrap_or_else(|| unreachable!("{} has rates", self.name)))
    }

    /// Tunes with the rate of `pace`; returns the share of the validation rows that are right too.
    ///
    /// # Errors
    /// As [`Arm::reach`].
    pub(crate) fn reach_at(
        &self,
        lab: &Lab,
        rows: &Rows,
        pace: Pace,
        seed: Seed,
    ) -> Result<(f64, Reached)> {
        lab.train(method(self.method, self.options)?, &rows.train, pace, seed, |training| {
            let tuned = training.tuned();
            let reached = Reached {
                accuracy: lab.accuracy_of(&tuned, &rows.test)?,
                rate: pace.rate,
                num_trained: training.parameters.num_trainable(),
            };
            Ok((lab.accuracy_of(&tuned, &rows.validation)?, reached))
        })
    }
}

/// What every arm reached, on every seed.
#[derive(Debug)]
pub(crate) struct Results {
    names: Vec<&'static str>,
    /// By arm, then by seed.
    reached: Vec<Vec<Reached>>,
}

impl Results {
    /// Sorts what the seeds found by arm.
    pub(crate) fn new(arms: &[Arm], by_seed: Vec<Vec<Reached>>) -> Self {
        let names = arms.iter().map(|arm| arm.name).collect();
        let of_arm = |arm: usize| by_seed.iter().map(|found| found[arm]).collect();
        Self { names, reached: (0..arms.len()).map(of_arm).collect() }
    }

    /// Returns the accuracies of an arm, by seed.
    pub(crate) fn of(&self, name: &str) -> Vec<f64> {
        self.arm(name).iter().map(|reached| reached.accuracy).collect()
    }

    fn arm(&self, name: &str) -> &[Reached] {
        let arm = self.names.iter().position(|known| *known == name);
        &self.reached[arm.unwrap_or_else(|| unreachable!("no arm is called {name}"))]
    }

    /// Returns an arm's mean accuracy.
    pub(crate) fn mean(&self, name: &str) -> f64 {
        mean(&self.of(name))
    }

    /// Returns how many values of an arm train.
    pub(crate) fn num_trained(&self, name: &str) -> usize {
        self.arm(name).first().map_or(0, |reached| reached.num_trained)
    }

    /// Writes a table.
    pub(crate) fn table(&self) -> String {
        let mut out = "| | values that train | accuracy, mean | each seed | rates chosen |\n\
                       |---|---|---|---|---|\n"
            .to_owned();
        for (name, reached) in self.names.iter().zip(&self.reached) {
            let rates: Vec<String> = reached.iter().map(|r| format!("{:e}", r.rate)).collect();
            let _ = writeln!(
                out,
                "| {name} | {} | {:.3} | {} | {} |",
                reached.first().map_or(0, |r| r.num_trained),
                self.mean(name),
                each(&self.of(name)),
                rates.join(", ")
            );
        }
        out
    }
}
