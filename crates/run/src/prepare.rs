//! Everything before step 1: the model found and opened, rows prepared, the plan made.

use crate::adapters::{merge_under, read_adapters};
use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::measure::{MEASURED_TOKENS, Measure, answers_seen};
use crate::open::{Located, Opened};
use crate::plan::{PassTokens, Plan};
use crate::recipe::{EvaluationKind, Recipe};
use crate::rows::{Rows, Splits, Subset, TrainBatches};
use retune_core::names::nearest_list;
use retune_core::random::Seed;
use retune_core::spec::Head;
use retune_data::labels::Labels;
use retune_data::template::Date;
use retune_data::tokenizer::Tokenizer;
use retune_evaluate::generate::Generation;
use retune_models::Task;

/// A run that stands before step 1.
#[derive(Debug)]
pub struct Prepared {
    /// The recipe.
    pub recipe: Recipe,
    /// How the model was found.
    pub located: Located,
    /// Its tokenizer; nothing for models that read no text.
    pub tokenizer: Option<Tokenizer>,
    /// Its weights.
    pub opened: Opened,
    /// The rows.
    pub splits: Splits,
    /// Training batches, by step.
    pub batches: TrainBatches,
    /// All that was decided.
    pub plan: Plan,
    /// Answers a choice is made from.
    pub choices: Vec<String>,
}

/// The longest row where neither recipe nor model says otherwise.
const USUAL_MAX_LENGTH: usize = 2048;

impl Prepared {
    /// Finds, opens, reads and decides.
    ///
    /// # Errors
    /// Whatever of these fails first.
    pub fn make(recipe: Recipe, environment: &mut Environment<'_>) -> Result<Self> {
        let located = Located::find(&recipe.model, environment)?;
        let seed = Seed(recipe.seed);
        // The spec's limit is needed before the task is known; it does not depend on it.
        let checkpoint = retune_models::open(&located.path)?;
        let spec = checkpoint.model.spec();
        let tokenizer = if spec.vocabulary > 0 { Some(located.tokenizer()?) } else { None };
        let limit = spec.max_positions;
        let limit = limit.saturating_sub(recipe.method.num_positions()).max(1);
        let max_length = recipe.data.max_length.unwrap_or(USUAL_MAX_LENGTH).min(limit);
        let rows = Rows {
            options: &recipe.data,
            spec,
            model: &located.path,
            tokenizer: tokenizer.as_ref(),
            max_length,
            date: Date::from_unix((environment.clock)() as i64),
            seed,
        };
        let splits = rows.splits()?;
        let task = match splits.train.dataset.labels() {
            // A tower of texts reads the classes' names instead.
            Some(Labels::Classes(names)) if spec.head != Head::Pairs => {
                Task::Classify { labels: names.clone() }
            }
            _ => Task::AsSaved,
        };
        let opened = Opened::open(&located, &task, seed, &recipe.compute, tokenizer.as_ref())?;
        let opened = merge_under(opened, &read_adapters(&recipe.adapters)?, false)?;
        let train = &recipe.train;
        let mut batches = TrainBatches::new(
            splits.train.clone(),
            seed,
            &recipe.data,
            max_length,
            train.batch_size,
            train.accumulation,
        )?;
        let steps_per_epoch = batches.steps_per_epoch();
        let tokens = pass_tokens(&recipe, &splits, batches.most_tokens());
        let plan =
            Plan::make(&recipe, &located, &opened, &splits, steps_per_epoch, max_length, tokens)?;
        let choices = match recipe.evaluate.kind {
            EvaluationKind::Choice if recipe.evaluate.choices.is_empty() => {
                answers_seen(&splits.train)?
            }
            _ => recipe.evaluate.choices.clone(),
        };
        let prepared = Self { recipe, located, tokenizer, opened, splits, batches, plan, choices };
        prepared.check_choices()?;
        Ok(prepared)
    }

    /// Refuses a choice that no row could get right.
    fn check_choices(&self) -> Result<()> {
        if self.recipe.evaluate.kind != EvaluationKind::Choice {
            return Ok(());
        }
        let wrong = |what: String, expected: &str, found: String, help: &str| {
            let (expected, help) = (expected.to_owned(), help.to_owned());
            Err(Error::Plan { what, expected, found, help })
        };
        if self.choices.len() < 2 || self.choices.iter().any(String::is_empty) {
            return wrong(
                "[evaluate] kind = \"choice\": there is nothing to choose from".to_owned(),
                "2 to 64 different answers in the training rows, or a list `choices`",
                format!("{} choices", self.choices.len()),
                "list the answers with `choices = [\"…\", \"…\"]`, or measure by generate or loss",
            );
        }
        let (rows, _) = self.measured();
        for (number, question) in self.measure(rows).questions()?.iter().enumerate() {
            if !self.choices.contains(&question.reference) {
                return wrong(
                    format!("[evaluate] question {} cannot be got right", number + 1),
                    "every right answer among the choices",
                    format!(
                        "`{}`; nearest: {}",
                        question.reference,
                        nearest_list(&question.reference, self.choices.iter().map(String::as_str))
                    ),
                    "add it to `choices`, or mend the row",
                );
            }
        }
        Ok(())
    }

    /// Reads another file of rows as the recipe's own are read.
    ///
    /// # Errors
    /// With file and line of the first row that cannot be used.
    pub fn other_rows(&self, path: &std::path::Path, date: Date) -> Result<Subset> {
        let rows = Rows {
            options: &self.recipe.data,
            spec: self.opened.checkpoint.model.spec(),
            model: &self.located.path,
            tokenizer: self.tokenizer.as_ref(),
            max_length: self.plan.max_length,
            date,
            seed: Seed(self.recipe.seed),
        };
        rows.other(path, &self.splits.train.dataset)
    }

    /// Returns the rows that are measured before and after: those of the test file, else the
    /// validation rows, else the training rows.
    pub fn measured(&self) -> (&Subset, bool) {
        measured(&self.splits)
    }

    /// Returns what measures the model on `rows`.
    pub fn measure<'a>(&'a self, rows: &'a Subset) -> Measure<'a> {
        Measure {
            options: &self.recipe.evaluate,
            rows,
            choices: self.choices.clone(),
            seed: Seed(self.recipe.seed),
        }
    }
}

fn measured(splits: &Splits) -> (&Subset, bool) {
    match (&splits.test, &splits.validation) {
        (Some(test), _) => (test, true),
        (None, Some(validation)) => (validation, true),
        (None, None) => (&splits.train, false),
    }
}

/// Returns the tokens of the largest passes, from the lengths of the rows.
fn pass_tokens(recipe: &Recipe, splits: &Splits, training: u64) -> PassTokens {
    let rows = measured(splits).0;
    let mut lengths: Vec<u64> = rows.lengths().take(recipe.evaluate.rows).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let validation = lengths.iter().sum::<u64>().min(longest.max(MEASURED_TOKENS as u64));
    let answers = match recipe.evaluate.kind {
        EvaluationKind::Generate => lengths.len(),
        _ => recipe.evaluate.examples.min(lengths.len()),
    };
    let answers = answers.min(Generation::default().max_parallel);
    // At worst the longest; a row holds its answer too.
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    let prompts = lengths[..answers].iter().sum();
    let longest = splits.train.lengths().max().unwrap_or(0);
    PassTokens { training, longest, validation, prompts, answers: answers as u64 }
}
