//! The task's metric and some answers, before and after.

use std::collections::BTreeMap;

use crate::artefacts::report::Measured;
use crate::error::Result;
use crate::recipe::{EvaluateOptions, EvaluationKind};
use crate::rows::Subset;
use retune_core::model::Tuned;
use retune_core::random::Seed;
use retune_core::spec::Head;
use retune_data::shape::Example;
use retune_evaluate::choice::rank;
use retune_evaluate::generate::{Generation, Prompt, generate};
use retune_evaluate::likelihood::{Budget, Request, log_likelihoods};
use retune_evaluate::metrics::{exact_match, mean, same_words, standard_error, word_f1};
use retune_evaluate::validation::validate;

/// Tokens of a batch whose loss is measured at most, or of one longer row.
pub(crate) const MEASURED_TOKENS: usize = 2048;

/// A question with the answer it should get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The prompt as the model reads it.
    pub tokens: Vec<u32>,
    /// The prompt as a person reads it.
    pub shown: String,
    /// The right answer.
    pub reference: String,
    /// The row's task, where the data says it.
    pub task: Option<usize>,
}

/// What one measurement found.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Measurement {
    /// Metric names and values.
    pub metrics: BTreeMap<String, Measured>,
    /// Rows measured.
    pub num_rows: usize,
    /// The answers to the first questions, in order.
    pub answers: Vec<String>,
}

/// Everything a measurement needs beside the model.
#[derive(Debug)]
pub struct Measure<'a> {
    /// The `[evaluate]` table.
    pub options: &'a EvaluateOptions,
    /// The rows measured.
    pub rows: &'a Subset,
    /// Answers to choose from.
    pub choices: Vec<String>,
    /// The run's seed.
    pub seed: Seed,
}

/// Returns the distinct answers of training rows, if they are few enough to choose from.
///
/// # Errors
/// If a row cannot be read again.
pub fn answers_seen(train: &Subset) -> Result<Vec<String>> {
    let mut seen = std::collections::BTreeSet::new();
    let Some(dataset) = train.dataset.texts() else { return Ok(Vec::new()) };
    for row in &train.rows {
        if let Some(answer) = dataset.example(*row)?.0.answer() {
            seen.insert(answer.trim().to_owned());
        }
        if seen.len() > 64 {
            return Ok(Vec::new());
        }
    }
    Ok(seen.into_iter().collect())
}

/// Returns what the last answer answers, as a person reads it.
fn asked(example: &Example) -> String {
    match example {
        Example::Chat(chat) => {
            let mut messages = chat.conversation.messages.iter().rev();
            let asked = messages.find(|message| message["role"] == "user");
            asked.and_then(|message| message["content"].as_str()).unwrap_or_default().to_owned()
        }
        Example::Completion { prompt, .. } => prompt.clone(),
        _ => String::new(),
    }
}

impl Measure<'_> {
    /// Returns the questions of the rows measured.
    ///
    /// # Errors
    /// If the template refuses a conversation.
    pub fn questions(&self) -> Result<Vec<Question>> {
        let mut questions = Vec::new();
        let Some(dataset) = self.rows.dataset.texts() else { return Ok(questions) };
        for row in self.rows.rows.iter().take(self.options.rows) {
            let example = dataset.example(*row)?.0;
            let preparer = dataset.preparer();
            let Some(question) = preparer.question(&example)? else { continue };
            questions.push(Question {
                tokens: question.prompt,
                shown: asked(&example),
                reference: question.answer.trim().to_owned(),
                task: dataset.task(*row)?.map(|task| task as usize),
            });
        }
        Ok(questions)
    }

    /// Measures the model as it stands.
    ///
    /// # Errors
    /// Those of the data and the model.
    pub fn run(&self, tuned: &Tuned<'_>) -> Result<Measurement> {
        let mut out =
            Measurement { num_rows: self.rows.len().min(self.options.rows), ..Default::default() };
        let batches = self.rows.batches(self.options.rows, MEASURED_TOKENS)?;
        let validation = validate(tuned, &batches)?;
        let mut put = |name: &str, value: f64, std_error: Option<f64>| {
            out.metrics.insert(name.to_owned(), Measured { value, std_error });
        };
        put("loss", validation.loss, None);
        if matches!(tuned.model.spec().head, Head::Language { .. }) {
            put("perplexity", validation.perplexity(), None);
        }
        if let Some(accuracy) = validation.accuracy {
            put("accuracy", accuracy, None);
        }
        if !matches!(tuned.model.spec().head, Head::Language { .. }) {
            return Ok(out);
        }
        let questions = self.questions()?;
        let wanted = match self.options.kind {
            EvaluationKind::Generate => questions.len(),
            _ => self.options.examples.min(questions.len()),
        };
        if self.options.kind == EvaluationKind::Choice && !questions.is_empty() {
            for (name, right) in self.choose(tuned, &questions)? {
                put(name, mean(&right).unwrap_or(f64::NAN), standard_error(&right));
            }
        }
        if wanted == 0 {
            return Ok(out);
        }
        let answers = self.answer(tuned, &questions[..wanted])?;
        if self.options.kind == EvaluationKind::Generate {
            let score = |judge: &dyn Fn(&str, &str) -> f64| -> Vec<f64> {
                answers.iter().zip(&questions).map(|(a, q)| judge(a, &q.reference)).collect()
            };
            let truth = |right: bool| f64::from(u8::from(right));
            for (name, values) in [
                ("exact_match", score(&|a, r| truth(exact_match(a, &[r])))),
                ("same_words", score(&|a, r| truth(same_words(a, &[r])))),
                ("f1", score(&|a, r| word_f1(a, &[r]))),
            ] {
                put(name, mean(&values).unwrap_or(f64::NAN), standard_error(&values));
            }
        }
        out.answers = answers.into_iter().take(self.options.examples).collect();
        Ok(out)
    }

    fn answer(&self, tuned: &Tuned<'_>, questions: &[Question]) -> Result<Vec<String>> {
        let Some(dataset) = self.rows.dataset.texts() else { return Ok(Vec::new()) };
        let preparer = dataset.preparer();
        let prompts = questions
            .iter()
            .enumerate()
            .map(|(number, q)| {
                Prompt::new(q.tokens.clone(), self.seed, number as u64).of_task(q.task)
            })
            .collect();
        let options = Generation {
            end_tokens: preparer.end_tokens(),
            max_new_tokens: self.options.max_new_tokens,
            ..Generation::default()
        };
        let generated =
            generate(tuned, prompts, &options, &mut retune_evaluate::generate::unwatched)?;
        generated
            .into_iter()
            .map(|answer| Ok(preparer.tokenizer().decode(&answer.tokens, true)?.trim().to_owned()))
            .collect()
    }

    /// Scores every choice after every question, as lm-evaluation-harness does: 1 where the
    /// likeliest choice is the right one (`acc`), and where the likeliest per character is
    /// (`acc_norm`).
    fn choose(
        &self,
        tuned: &Tuned<'_>,
        questions: &[Question],
    ) -> Result<[(&'static str, Vec<f64>); 2]> {
        let Some(dataset) = self.rows.dataset.texts() else {
            return Ok([("acc", Vec::new()), ("acc_norm", Vec::new())]);
        };
        let tokenizer = dataset.preparer().tokenizer();
        let choices: Vec<Vec<u32>> = self
            .choices
            .iter()
            .map(|choice| Ok(tokenizer.encode(choice, false)?.ids))
            .collect::<Result<_>>()?;
        let requests: Vec<Request> = questions
            .iter()
            .flat_map(|q| {
                choices.iter().map(|choice| Request {
                    context: q.tokens.clone(),
                    continuation: choice.clone(),
                    task: q.task,
                })
            })
            .collect();
        let scores = log_likelihoods(tuned, &requests, &Budget::default())?;
        let (mut acc, mut acc_norm) = (Vec::new(), Vec::new());
        for (question, scores) in questions.iter().zip(scores.chunks(choices.len().max(1))) {
            let sums: Vec<f64> = scores.iter().map(|score| score.sum).collect();
            let ranking = rank(&sums, &self.choices)?;
            let right =
                |place: usize| f64::from(u8::from(self.choices[place] == question.reference));
            acc.push(right(ranking.raw));
            acc_norm.push(right(ranking.per_character));
        }
        Ok([("acc", acc), ("acc_norm", acc_norm)])
    }
}
