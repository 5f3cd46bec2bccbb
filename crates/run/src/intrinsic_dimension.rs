//! The intrinsic dimension of a task: the fewest random directions that reach a share of what tuning the
//! whole model reaches (d90 at a share of 0.9).
//!
//! Dimensions are doubled until one reaches the share; then the factor between it and the largest that
//! does not is halved, until it is as small as asked for. The program carries each run out in a process
//! of its own, as a comparison's; here is everything else.

use std::fmt::Write;

use serde::Serialize;

use crate::artefacts::plot::Scale;
use crate::artefacts::scatter::{Panel, Point, Scatter};
use crate::compare::{Arm, ArmResult, usual_metric};
use crate::error::{Error, Result};

/// What is searched, and how closely.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Question {
    /// Share of full tuning's score to reach.
    pub share: f64,
    /// The first dimension tried.
    pub from: usize,
    /// The last dimension tried.
    pub to: usize,
    /// How far apart, as a factor, the answer and the largest dimension below it may be.
    pub precision: f64,
    /// Whether directions move all weights alike (DID); else each weight has a scale too (SAID).
    pub direct: bool,
}

impl Question {
    /// Checks that there is something to search.
    ///
    /// # Errors
    /// [`Error::Plan`] for the first number that leaves nothing.
    pub fn check(&self) -> Result<()> {
        let wrong = |what: &str, expected: &str, found: String| {
            Err(Error::Plan {
                what: what.to_owned(),
                expected: expected.to_owned(),
                found,
                help: "the defaults search d90 between 10 and 10000".to_owned(),
            })
        };
        if !(self.share > 0.0 && self.share <= 1.0) {
            let expected = "a number above 0 and at most 1";
            return wrong("--share is no share of a score", expected, self.share.to_string());
        }
        if self.from == 0 || self.from > self.to {
            let found = format!("--from {} --to {}", self.from, self.to);
            return wrong("no dimension lies in the range", "1 <= from <= to", found);
        }
        if !(self.precision > 1.0 && self.precision.is_finite()) {
            let expected = "a factor above 1";
            return wrong("--precision is no factor", expected, self.precision.to_string());
        }
        Ok(())
    }
}

/// What a run of the search trains: all weights, or so many directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Trained {
    /// All weights.
    Full,
    /// So many values in all.
    Dimension(usize),
}

/// One number of directions (or the whole model) at one learning rate.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    /// What trains.
    pub trained: Trained,
    /// The learning rate; the recipe's own where absent.
    pub rate: Option<f64>,
}

impl Trial {
    /// Returns the run of one seed, and what it changes in the recipe.
    pub fn arm(&self, seed: u64, direct: bool) -> (Arm, Vec<String>) {
        let mut settings = Vec::new();
        let mut variant = String::new();
        let method = match self.trained {
            Trained::Full => "full",
            Trained::Dimension(dimension) => {
                settings.push(format!("method.said.dimension={dimension}"));
                settings.push(format!("method.said.structure_aware={}", !direct));
                variant = format!("d{dimension}");
                "said"
            }
        };
        if let Some(rate) = self.rate {
            settings.push(format!("train.learning_rate={rate}"));
            let join = if variant.is_empty() { "" } else { "-" };
            let _ = write!(variant, "{join}rate{rate}");
        }
        let variant = Some(variant).filter(|variant| !variant.is_empty());
        (Arm { method: method.to_owned(), variant, seed }, settings)
    }
}

/// All seeds of one trial.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tried {
    /// What trained.
    pub trained: Trained,
    /// The learning rate; the recipe's own where absent.
    pub rate: Option<f64>,
    /// Mean score of the seeds; nothing where none finished.
    pub score: Option<f64>,
    /// Values that trained: heads of classes train beside the directions.
    pub num_trained: u64,
    /// Mean seconds of training.
    pub train_s: f64,
    /// The first error, if a seed failed.
    pub error: Option<String>,
}

/// A search, as far as it has come.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Search {
    /// The recipe's name.
    pub name: String,
    /// What is searched.
    pub question: Question,
    /// The score; more of it is better.
    pub metric: String,
    /// The score of the untuned model, where it was measured.
    pub base: Option<f64>,
    /// Every trial, in the order they were made.
    pub trials: Vec<Tried>,
    /// Best score of full tuning.
    pub full: Option<f64>,
    /// The smallest dimension tried that reaches the share.
    pub reached: Option<usize>,
    /// The dimension at which the share is reached, between the neighbours in its logarithm.
    pub intrinsic_dimension: Option<f64>,
}

impl Search {
    /// Puts trials together.
    ///
    /// # Errors
    /// [`Error::Plan`] if no run measured a score, less of it is better, or full tuning has none.
    pub fn of(
        name: &str,
        question: &Question,
        metric: Option<&str>,
        runs: &[(Trial, Vec<ArmResult>)],
    ) -> Result<Self> {
        let all: Vec<&ArmResult> = runs.iter().flat_map(|(_, results)| results).collect();
        let (metric, lower_is_better) = usual_metric(&all, metric)?;
        if lower_is_better && all.iter().any(|run| run.error.is_none()) {
            return Err(Error::Plan {
                what: format!("`{metric}` has no share to reach: less of it is better"),
                expected: "a score, such as accuracy".to_owned(),
                found: metric,
                help: "give the recipe data that are scored, or name a score with --metric"
                    .to_owned(),
            });
        }
        let mean = |values: Vec<f64>| {
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        let tried = |(trial, results): &(Trial, Vec<ArmResult>)| {
            let done = || results.iter().filter(|run| run.error.is_none());
            Tried {
                trained: trial.trained,
                rate: trial.rate,
                score: mean(done().filter_map(|run| run.metric(&metric)).collect()),
                num_trained: done().map(|run| run.num_trained).max().unwrap_or(0),
                train_s: mean(done().map(|run| run.train_s).collect()).unwrap_or(0.0),
                error: results.iter().find_map(|run| run.error.clone()),
            }
        };
        let mut before = all.iter().flat_map(|run| &run.before);
        let base = before.find(|(name, _)| *name == metric).map(|(_, value)| *value);
        let trials = runs.iter().map(tried).collect();
        let mut search = Self {
            name: name.to_owned(),
            question: question.clone(),
            metric,
            base,
            trials,
            full: None,
            reached: None,
            intrinsic_dimension: None,
        };
        search.full = search.best(Trained::Full);
        if let Some(full) = search.full.filter(|full| *full <= 0.0) {
            return Err(Error::Plan {
                what: "full tuning learned nothing, so there is no share of it to reach".to_owned(),
                expected: format!("a {} above 0", search.metric),
                found: full.to_string(),
                help: "give --full-rates to choose from, or more steps".to_owned(),
            });
        }
        (search.reached, search.intrinsic_dimension) = search.answer();
        Ok(search)
    }

    /// Returns the best score of a dimension, over all rates.
    fn best(&self, trained: Trained) -> Option<f64> {
        let own = self.trials.iter().filter(|trial| trial.trained == trained);
        own.filter_map(|trial| trial.score).max_by(f64::total_cmp)
    }

    /// Lists the dimensions tried, from small to large, with their share of full tuning's score; one
    /// that failed at every rate has none of it.
    fn shares(&self) -> Vec<(usize, f64)> {
        let Some(full) = self.full else { return Vec::new() };
        let dimension = |trial: &Tried| match trial.trained {
            Trained::Full => None,
            Trained::Dimension(dimension) => Some(dimension),
        };
        let mut all: Vec<usize> = self.trials.iter().filter_map(dimension).collect();
        all.sort_unstable();
        all.dedup();
        let share = |d: usize| self.best(Trained::Dimension(d)).map_or(0.0, |score| score / full);
        all.into_iter().map(|d| (d, share(d))).collect()
    }

    /// Returns the smallest dimension that reaches the share, and the largest below it that does not.
    fn bracket(&self) -> [Option<(usize, f64)>; 2] {
        let shares = self.shares();
        let reached = shares.iter().copied().find(|(_, share)| *share >= self.question.share);
        let below = |(d, _): &(usize, f64)| reached.is_none_or(|(smallest, _)| *d < smallest);
        [reached, shares.into_iter().rfind(below)]
    }

    fn answer(&self) -> (Option<usize>, Option<f64>) {
        let [Some((reached, high)), below] = self.bracket() else { return (None, None) };
        let between = below.map(|(dimension, low)| {
            let [from, to] = [dimension, reached].map(|d| (d as f64).ln());
            (from + (self.question.share - low) / (high - low) * (to - from)).exp()
        });
        (Some(reached), Some(between.unwrap_or(reached as f64)))
    }

    /// Returns the dimension to try next; nothing when the search is over.
    pub fn next_dimension(&self) -> Option<usize> {
        let Question { from, to, precision, .. } = self.question;
        match self.bracket() {
            [None, None] => Some(from),
            [None, Some((largest, _))] => (largest < to).then(|| largest.saturating_mul(2).min(to)),
            [Some(_), None] => None,
            [Some((reached, _)), Some((below, _))] => {
                let middle = ((below as f64) * (reached as f64)).sqrt().round() as usize;
                let apart = reached as f64 / below as f64 > precision;
                (apart && middle > below && middle < reached).then_some(middle)
            }
        }
    }

    /// Returns how many numbers of directions are tried from here on at most.
    pub fn most_left(&self) -> usize {
        let Question { from, to, precision, .. } = self.question;
        let steps = |factor: f64, step: f64| (factor.ln() / step.ln()).max(1.0).log2().ceil();
        // Each halves the factor, as a logarithm; rounding to a whole number costs one more at most.
        let narrowing = |factor: f64| steps(factor, precision) + 1.0;
        let doubling = |from: usize| (to as f64 / from as f64).log2().max(0.0).ceil();
        let most = match self.bracket() {
            [None, None] => 1.0 + doubling(from) + narrowing(2.0),
            [None, Some((largest, _))] if largest >= to => 0.0,
            [None, Some((largest, _))] => doubling(largest) + narrowing(2.0),
            [Some(_), None] => 0.0,
            [Some(_), Some(_)] if self.next_dimension().is_none() => 0.0,
            [Some((reached, _)), Some((below, _))] => narrowing(reached as f64 / below as f64),
        };
        most as usize
    }

    /// Says in one sentence what was found.
    pub fn verdict(&self) -> String {
        let percent = 100.0 * self.question.share;
        let Some(full) = self.full else {
            return "full tuning did not finish, so there is nothing to reach".to_owned();
        };
        let goal = self.question.share * full;
        let of = format!("{percent} % of full tuning's {} ({goal:.4} of {full:.4})", self.metric);
        match (self.reached, self.intrinsic_dimension) {
            (Some(reached), Some(_)) if reached == self.question.from => {
                format!(
                    "d{percent} is at most {reached}, the first dimension tried, for {of}; a smaller \
                     --from searches below it"
                )
            }
            (Some(reached), Some(found)) => format!(
                "d{percent} = {found:.0}: {reached} directions reach {of}, the next fewer tried do not"
            ),
            _ => format!("up to {} directions do not reach {of}", self.question.to),
        }
    }

    /// Draws the score against the values that train.
    pub fn chart(&self) -> Scatter {
        let best = |trained: Trained| {
            let own = self.trials.iter().filter(|trial| trial.trained == trained);
            own.max_by(|a, b| a.score.unwrap_or(f64::MIN).total_cmp(&b.score.unwrap_or(f64::MIN)))
        };
        let dimensions = self.shares().into_iter().map(|(dimension, _)| {
            (format!("{dimension}"), Trained::Dimension(dimension), dimension as f64)
        });
        let whole = best(Trained::Full).map_or(0, |trial| trial.num_trained) as f64;
        let points = dimensions.chain([("full tuning".to_owned(), Trained::Full, whole)]);
        let points = points.filter_map(|(name, trained, x)| {
            Some(Point { name, x, y: best(trained)?.score?, spread: 0.0 })
        });
        Scatter {
            title: format!("{}: {} by number of directions", self.name, self.metric),
            y_label: format!("{} at the best rate (higher is better)", self.metric),
            panels: vec![Panel {
                x_label: "directions; weights for full tuning".to_owned(),
                scale: Scale::Log,
                points: points.collect(),
            }],
        }
    }

    /// Returns the cells of the table, a row for each trial.
    pub fn cells(&self) -> Vec<Vec<String>> {
        let row = |trial: &Tried| {
            let what = match trial.trained {
                Trained::Full => "full".to_owned(),
                Trained::Dimension(dimension) => dimension.to_string(),
            };
            let rate = trial.rate.map_or_else(|| "recipe's".to_owned(), |rate| rate.to_string());
            let dash = "–".to_owned();
            let Some(score) = trial.score else {
                return vec![what, rate, "failed".to_owned(), dash.clone(), dash.clone(), dash];
            };
            let share = self.full.map_or(dash, |full| format!("{:.3}", score / full));
            let (count, time) = (trial.num_trained.to_string(), format!("{:.1} s", trial.train_s));
            vec![what, rate, format!("{score:.4}"), share, count, time]
        };
        self.trials.iter().map(row).collect()
    }

    /// Names the columns of [`Search::cells`].
    pub fn columns(&self) -> [&str; 6] {
        ["directions", "rate", &self.metric, "share of full", "values that train", "training"]
    }

    /// Writes the table and what goes with it as a page.
    pub fn to_markdown(&self) -> String {
        let mut out = format!("# {}: intrinsic dimension\n\n{}.\n\n", self.name, self.verdict());
        let kind = if self.question.direct { "DID" } else { "SAID" };
        let _ = writeln!(
            out,
            "Directions are those of {kind}; the rate of a dimension is the one with the best score, on \
             the rows that are shown here.\n"
        );
        if let Some(base) = self.base {
            let _ = writeln!(out, "The base, untuned: {base:.4}.\n");
        }
        let _ = writeln!(out, "| {} |\n|---|---|---|---|---|---|", self.columns().join(" | "));
        for row in self.cells() {
            let _ = writeln!(out, "| {} |", row.join(" | "));
        }
        out.push_str("\n![score by number of directions](intrinsic-dimension.svg)\n");
        for trial in self.trials.iter().filter(|trial| trial.error.is_some()) {
            let error = trial.error.as_deref().unwrap_or_default();
            let what = match trial.trained {
                Trained::Full => "full tuning".to_owned(),
                Trained::Dimension(dimension) => format!("{dimension} directions"),
            };
            let _ = writeln!(out, "\n## Failed: {what}\n\n```text\n{}\n```", error.trim_end());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question() -> Question {
        Question { share: 0.9, from: 10, to: 1000, precision: 1.25, direct: false }
    }

    fn run(trained: Trained, rate: f64, score: Option<f64>) -> (Trial, Vec<ArmResult>) {
        let trial = Trial { trained, rate: Some(rate) };
        let (arm, _) = trial.arm(1, false);
        let failed = ArmResult::failed(arm, "broken".to_owned());
        let result = match score {
            Some(score) => ArmResult {
                error: None,
                metrics: vec![("loss".to_owned(), 1.0), ("accuracy".to_owned(), score)],
                before: vec![("accuracy".to_owned(), 0.1)],
                num_trained: 7,
                ..failed
            },
            None => failed,
        };
        (trial, vec![result])
    }

    /// Follows a search over a curve until it is over; returns the dimensions in their order.
    fn follow(question: &Question, score: impl Fn(usize) -> Option<f64>) -> (Vec<usize>, Search) {
        let mut runs = vec![run(Trained::Full, 0.001, Some(0.8))];
        let (mut order, mut left) = (Vec::new(), Vec::new());
        loop {
            let search = Search::of("digits", question, None, &runs).unwrap();
            left.push(search.most_left());
            let Some(dimension) = search.next_dimension() else {
                // What was said to be left was at every point at least what came.
                let came = (0..left.len()).rev();
                assert!(came.zip(&left).all(|(came, left)| came <= *left), "{left:?}");
                assert_eq!(left.last(), Some(&0), "{left:?}");
                return (order, search);
            };
            order.push(dimension);
            runs.push(run(Trained::Dimension(dimension), 0.1, score(dimension)));
        }
    }

    #[test]
    fn dimensions_are_doubled_and_then_narrowed() {
        // Linear in log d: 0.9 · 0.8 = 0.72 is reached at 100.
        let score = |d: usize| Some(0.72 + 0.1 * (d as f64 / 100.0).ln());
        let (order, search) = follow(&question(), score);
        assert_eq!(order, [10, 20, 40, 80, 160, 113, 95]);
        assert_eq!(search.reached, Some(113));
        assert!((search.intrinsic_dimension.unwrap() - 100.0).abs() < 1e-9);
        assert!(search.verdict().starts_with("d90 = 100: 113 directions"), "{}", search.verdict());
        let page = search.to_markdown();
        assert!(page.contains("| full | 0.001 | 0.8000 | 1.000 | 7 | 0.0 s |"), "{page}");
        assert!(page.contains("The base, untuned: 0.1000"), "{page}");
    }

    #[test]
    fn no_more_are_tried_than_was_said() {
        for (from, to, precision) in
            [(1, 100, 1.01), (3, 5000, 1.1), (10, 10_000, 1.25), (7, 7, 2.0)]
        {
            let question = Question { from, to, precision, ..question() };
            for reached in [1, 2, 9, 11, 100, 777, 4000, 20_000] {
                // `follow` compares.
                let _ = follow(&question, |d| Some(if d >= reached { 0.8 } else { 0.1 }));
            }
        }
    }

    #[test]
    fn a_search_without_an_answer_says_so() {
        let (order, search) = follow(&question(), |_| Some(0.5));
        assert_eq!(order, [10, 20, 40, 80, 160, 320, 640, 1000]);
        assert_eq!((search.reached, search.intrinsic_dimension), (None, None));
        assert!(search.verdict().contains("up to 1000 directions do not reach"));
        let (order, search) = follow(&question(), |_| Some(0.8));
        assert_eq!((order, search.reached), (vec![10], Some(10)));
        assert!(search.verdict().contains("at most 10"), "{}", search.verdict());
    }

    #[test]
    fn a_trial_that_fails_stops_nothing_and_the_best_rate_counts() {
        let (order, search) = follow(&question(), |d| (d >= 40).then_some(0.8));
        assert_eq!(order, [10, 20, 40, 28, 33]);
        assert_eq!(search.reached, Some(40));
        assert!(search.to_markdown().contains("## Failed: 20 directions"));
        let runs = [
            run(Trained::Full, 0.001, Some(0.8)),
            run(Trained::Dimension(10), 0.1, Some(0.2)),
            run(Trained::Dimension(10), 0.3, Some(0.75)),
        ];
        let search = Search::of("digits", &question(), None, &runs).unwrap();
        assert_eq!((search.reached, search.next_dimension()), (Some(10), None));
        let by_loss = Search::of("digits", &question(), Some("loss"), &runs).unwrap_err();
        assert!(by_loss.to_string().contains("less of it is better"), "{by_loss}");
    }

    #[test]
    fn questions_without_an_answer_are_refused() {
        for (wrong, expected) in [
            (Question { share: 1.5, ..question() }, "--share"),
            (Question { from: 0, ..question() }, "--from 0"),
            (Question { from: 20, to: 10, ..question() }, "from <= to"),
            (Question { precision: 1.0, ..question() }, "--precision"),
        ] {
            let error = wrong.check().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(question().check().is_ok());
    }

    #[test]
    fn a_trial_is_a_run_of_its_own() {
        let trial = Trial { trained: Trained::Dimension(80), rate: Some(0.03) };
        let (arm, settings) = trial.arm(5, true);
        assert_eq!(arm.name(), "said-d80-rate0.03-seed5");
        let expected = ["method.said.dimension=80", "method.said.structure_aware=false"];
        assert_eq!(settings[..2], expected);
        assert_eq!(settings[2], "train.learning_rate=0.03");
        let (arm, settings) = Trial { trained: Trained::Full, rate: None }.arm(5, true);
        assert_eq!((arm.name().as_str(), settings.len()), ("full-seed5", 0));
    }
}
