//! The plan: everything decided before step 1, so that it can be read, hashed and repeated.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::forecast::Forecaster;
pub use crate::forecast::{Forecast, PassTokens, mebibytes};
use crate::open::Opened;
use crate::recipe::{ArithmeticName, Recipe};
use crate::rows::Splits;
use retune_core::kernels::matrix::Arithmetic;
use retune_data::statistics::Statistics;
use retune_methods::sparse::refuse_blocks;

/// Everything decided before step 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// SHA-256 over all that decides the bits of the result.
    pub hash: String,
    /// The version of retune that made the plan.
    pub version: String,
    /// The recipe with every default filled in.
    pub recipe: String,
    /// The base model.
    pub model: PlannedModel,
    /// The method's name.
    pub method: String,
    /// Values that will train.
    pub num_trainable: usize,
    /// Bytes of the adapter file, or of the trained weights.
    pub trained_bytes: usize,
    /// What the data holds.
    pub data: PlannedData,
    /// Optimiser steps.
    pub num_steps: u64,
    /// Steps of one pass over the data.
    pub steps_per_epoch: u64,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Longest row in tokens.
    pub max_length: usize,
    /// What the run is expected to take.
    pub forecast: Forecast,
    /// What a person should know before step 1.
    pub warnings: Vec<String>,
}

/// The base model of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedModel {
    /// The name the recipe uses.
    pub name: String,
    /// Where the files came from.
    pub source: String,
    /// Commit or package version.
    pub revision: Option<String>,
    /// SHA-256 that stands for the weights.
    pub fingerprint: String,
    /// SHA-256 of each adapter merged in before training.
    #[serde(default)]
    pub adapters: Vec<String>,
    /// The class in the Hugging Face library.
    pub class: String,
    /// Number of values.
    pub num_parameters: usize,
    /// Licence of the weights, where known.
    pub licence: Option<String>,
    /// Weights drawn anew because the checkpoint has none.
    pub fresh: Vec<String>,
}

/// What the data of a plan holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedData {
    /// What the rows were understood to be.
    pub understood: String,
    /// Rows that are learned.
    pub num_train: usize,
    /// Rows the run is steered by.
    pub num_validation: usize,
    /// Rows that are only measured.
    pub num_test: usize,
    /// Counts of the training file.
    pub statistics: Statistics,
}

impl Plan {
    /// Decides everything that is left open.
    ///
    /// # Errors
    /// If the method does not fit the model, or the memory allowed cannot hold the run.
    pub fn make(
        recipe: &Recipe,
        located: &crate::open::Located,
        opened: &Opened,
        splits: &Splits,
        steps_per_epoch: u64,
        max_length: usize,
        tokens: PassTokens,
    ) -> Result<Self> {
        let spec = opened.checkpoint.model.spec();
        check_tasks(recipe, splits)?;
        let method = recipe.method.plan(spec)?;
        let card = recipe.method.card();
        if !recipe.method.promises().quantized_base {
            refuse_blocks(&opened.weights, card.name)?;
        }
        let (low, high) = card.usual_learning_rates;
        let learning_rate = recipe.train.learning_rate.unwrap_or((low * high).sqrt());
        let num_steps = match recipe.train.steps {
            Some(steps) => steps,
            None => ((recipe.train.epochs * steps_per_epoch as f64).ceil() as u64).max(1),
        };
        // Stages that do not fit the run, or each other, are refused here.
        recipe.method.stages(num_steps)?;
        let statistics = splits.train.dataset.statistics().clone();
        let forecast = {
            let keys = statistics.tokens as f64 / statistics.rows.max(1) as f64;
            let working = recipe.method.working(opened.checkpoint.model.spec());
            Forecaster { recipe, method: &method, working, opened, tokens, keys }.fitted()?
        };
        let mut warnings = warnings(recipe, splits, &statistics, learning_rate, (low, high));
        warnings.extend(method.notes.iter().cloned());
        if recipe.data.task.is_none() && recipe.method.promises().num_tasks > Some(1) {
            let note = "the method learns several tasks, but all rows are of one: name the field \
                        that holds a row's task in `data.task`";
            warnings.push(note.to_owned());
        }
        warnings.extend(arithmetic_note(recipe.compute.arithmetic, Arithmetic::Bf16.is_native()));
        if forecast.recompute && !recipe.train.recompute {
            warnings.push(
                "layers are run again in the backward pass, to fit the memory allowed: a step \
                 takes about a third longer"
                    .to_owned(),
            );
        }
        let identity = &located.found.identity;
        let mut plan = Self {
            hash: String::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            recipe: recipe.resolved.clone(),
            model: PlannedModel {
                name: identity.name.clone(),
                source: identity.source.to_string(),
                revision: identity.revision.clone(),
                fingerprint: opened.fingerprint.clone(),
                adapters: opened.under.iter().map(|under| under.fingerprint.clone()).collect(),
                class: spec.class.clone(),
                num_parameters: spec.count(),
                licence: located.found.licence.clone(),
                fresh: opened.checkpoint.fresh.clone(),
            },
            method: recipe.method_name.clone(),
            num_trainable: method.num_trainable(),
            trained_bytes: method.num_trainable() * 4,
            data: PlannedData {
                understood: splits.train.dataset.statement(),
                num_train: splits.train.len(),
                num_validation: splits.validation.as_ref().map_or(0, crate::rows::Subset::len),
                num_test: splits.test.as_ref().map_or(0, crate::rows::Subset::len),
                statistics,
            },
            num_steps,
            steps_per_epoch,
            learning_rate,
            max_length,
            forecast,
            warnings,
        };
        plan.hash = plan.compute_hash(recipe, splits)?;
        Ok(plan)
    }

    /// Hashes what decides the bits of the result: not names, folders, rhythms of saving, threads.
    fn compute_hash(&self, recipe: &Recipe, splits: &Splits) -> Result<String> {
        let mut hasher = Sha256::new();
        let mut take = |text: &str| {
            hasher.update(text.as_bytes());
            hasher.update([0]);
        };
        take(&self.version);
        take(&self.model.fingerprint);
        for adapter in &self.model.adapters {
            take(adapter);
        }
        take(&recipe.method_name);
        take(&retune_options::to_toml(&recipe.method.options()));
        take(&recipe.seed.to_string());
        let t = &recipe.train;
        take(&format!(
            "{:?} {:?} {} {} {} {} {} {:?} {} {} {} {} {} {}",
            t.schedule,
            t.warmup,
            t.floor,
            t.decay,
            t.batch_size,
            t.accumulation,
            self.learning_rate,
            t.optimizer,
            t.beta1,
            t.beta2,
            t.epsilon,
            t.weight_decay,
            t.momentum,
            t.clip
        ));
        take(&format!("{} {:?}", self.num_steps, recipe.compute.arithmetic));
        take(&format!("{:?} {}", recipe.compute.weights, self.forecast.recompute));
        if let Some(images) = splits.train.dataset.images() {
            hasher.update(images.settings());
            for row in &splits.train.rows {
                hasher.update(images.fingerprint(*row).to_le_bytes());
            }
            return Ok(format!("{:x}", hasher.finalize()));
        }
        for row in 0..splits.train.len() {
            let document = splits.train.document(row, None)?;
            let bytes: Vec<u8> = document
                .tokens
                .iter()
                .zip(&document.learn)
                .flat_map(|(id, learn)| (id << 1 | u32::from(*learn)).to_le_bytes())
                .collect();
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(&bytes);
            hasher.update(format!("{:?} {:?}", document.class, document.task));
        }
        Ok(format!("{:x}", hasher.finalize()))
    }
}

/// Says what is used where the processor lacks the arithmetic a recipe asks for.
fn arithmetic_note(asked: ArithmeticName, native: bool) -> Option<String> {
    (asked == ArithmeticName::Bf16 && !native).then(|| {
        "this processor has no fast bf16 products (AVX512-BF16 or AMX): `compute.arithmetic = \
         \"bf16\"` is computed in f32, which is more exact and no slower here"
            .to_owned()
    })
}

/// Refuses tasks of rows where nothing would tell them apart.
fn check_tasks(recipe: &Recipe, splits: &Splits) -> Result<()> {
    let Some(column) = &recipe.data.task else { return Ok(()) };
    let refused = |expected: &str, help: &str| {
        Err(retune_core::Error::Setting {
            setting: "data.task".to_owned(),
            what: format!("nothing would tell the tasks in `{column}` apart"),
            expected: expected.to_owned(),
            found: recipe.method_name.clone(),
            help: help.to_owned(),
        }
        .into())
    };
    if recipe.method.promises().num_tasks.is_none() {
        return refused(
            "a method that learns several tasks",
            "use poly or multitask-prompt-tuning, or leave `data.task` out",
        );
    }
    if splits.train.dataset.texts().is_none() {
        return refused("rows of texts: pictures have no fields", "leave `data.task` out");
    }
    Ok(())
}

/// Says what a person should know before step 1: the classic mistakes.
fn warnings(
    recipe: &Recipe,
    splits: &Splits,
    statistics: &Statistics,
    learning_rate: f64,
    (low, high): (f64, f64),
) -> Vec<String> {
    let mut list = Vec::new();
    let mut add = |count: usize, text: String| {
        if count > 0 {
            list.push(text);
        }
    };
    let s = statistics;
    add(s.rows_broken, format!("{} broken rows are skipped", s.rows_broken));
    add(
        s.rows_without_learned_token,
        format!(
            "{} rows are left out: no token of them would be learned",
            s.rows_without_learned_token
        ),
    );
    add(s.rows_too_long, format!("{} rows are left out: longer than max_length", s.rows_too_long));
    add(
        s.rows_cut,
        format!(
            "{} rows are cut ({} tokens lost, {} of them learned); the longest has {} tokens",
            s.rows_cut, s.tokens_cut, s.learned_tokens_cut, s.longest_uncut
        ),
    );
    add(s.double_bos, format!("{} rows had two begin tokens; one was removed", s.double_bos));
    add(
        s.turns_without_end,
        format!(
            "{} learned turns have no end token: the model may not learn to stop",
            s.turns_without_end
        ),
    );
    add(
        usize::from(!(low..=high).contains(&learning_rate)),
        format!(
            "learning rate {learning_rate:e} is outside the usual {low:e} to {high:e} of {}",
            recipe.method_name
        ),
    );
    add(
        usize::from(splits.validation.is_none() && splits.test.is_none()),
        "no rows are held out: nothing will show whether the model learned or memorised".to_owned(),
    );
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_arithmetic_the_processor_lacks_gets_a_line() {
        assert_eq!(arithmetic_note(ArithmeticName::F32, false), None);
        assert_eq!(arithmetic_note(ArithmeticName::Bf16, true), None);
        let note = arithmetic_note(ArithmeticName::Bf16, false).unwrap();
        assert!(note.contains("bf16") && note.contains("f32"), "{note}");
    }
}
