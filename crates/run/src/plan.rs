//! The plan: everything decided before step 1, so that it can be read, hashed and repeated.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::open::Opened;
use crate::recipe::{ArithmeticName, Recipe};
use crate::rows::Splits;
use retune_core::kernels::matrix::Arithmetic;
use retune_core::method::MethodPlan;
use retune_core::spec::{Head, ModelSpec, WeightSpec};
use retune_data::statistics::Statistics;

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

/// What a run is expected to take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Bytes of the frozen base.
    pub weight_bytes: u64,
    /// Bytes of trained values, their gradients and the optimiser's state.
    pub training_bytes: u64,
    /// Bytes of activations of the largest pass.
    pub activation_bytes: u64,
    /// Bytes in all, with what the program itself takes.
    pub total_bytes: u64,
    /// Floating-point operations of one step.
    pub flops_per_step: f64,
    /// Layers are run again in the backward pass, to fit the memory allowed.
    pub recompute: bool,
}

/// Bytes the program takes before it holds a model: code, tokenizer, buffers.
const PROGRAM_BYTES: u64 = 60 << 20;

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
    ) -> Result<Self> {
        let spec = opened.checkpoint.model.spec();
        let method = recipe.method.plan(spec)?;
        let card = recipe.method.card();
        let (low, high) = card.usual_learning_rates;
        let learning_rate = recipe.train.learning_rate.unwrap_or((low * high).sqrt());
        let num_steps = match recipe.train.steps {
            Some(steps) => steps,
            None => ((recipe.train.epochs * steps_per_epoch as f64).ceil() as u64).max(1),
        };
        // Stages that do not fit the run, or each other, are refused here.
        recipe.method.stages(num_steps)?;
        let statistics = splits.train.dataset.statistics().clone();
        let mut forecast = forecast(recipe, spec, &method, &statistics, opened);
        if let Some(allowed) = recipe.compute.memory {
            forecast = fit(recipe, spec, &method, &statistics, opened, forecast, allowed.0)?;
        }
        let mut warnings = warnings(recipe, splits, &statistics, learning_rate, (low, high));
        warnings.extend(method.notes.iter().cloned());
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
                understood: splits.train.dataset.shaper().statement().to_owned(),
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
        for row in 0..splits.train.len() {
            let document = splits.train.document(row)?;
            let bytes: Vec<u8> = document
                .tokens
                .iter()
                .zip(&document.learn)
                .flat_map(|(id, learn)| (id << 1 | u32::from(*learn)).to_le_bytes())
                .collect();
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(&bytes);
            hasher.update(format!("{:?}", document.class));
        }
        Ok(format!("{:x}", hasher.finalize()))
    }
}

/// Tokens of the largest pass a run will make.
fn tokens_per_pass(recipe: &Recipe, statistics: &Statistics) -> u64 {
    let rows = recipe.train.batch_size as u64;
    let mean = statistics.tokens / statistics.rows.max(1) as u64;
    // A pass of several rows rarely has the longest row several times.
    let row = if recipe.data.packing || rows == 1 {
        statistics.longest as u64
    } else {
        mean + (statistics.longest as u64 - mean.min(statistics.longest as u64)) / rows
    };
    rows * row.max(1)
}

fn forecast(
    recipe: &Recipe,
    spec: &ModelSpec,
    method: &MethodPlan,
    statistics: &Statistics,
    opened: &Opened,
) -> Forecast {
    let packing = opened.weights.packing();
    let trains: std::collections::BTreeSet<&str> = method
        .parameters
        .iter()
        .filter(|p| p.trains && spec.weight(&p.place).is_some_and(|w| w.shape == p.shape))
        .map(|p| p.place.as_str())
        .collect();
    let bytes_per_value = match packing.form {
        retune_core::kernels::matrix::Form::F32 => 4.0,
        retune_core::kernels::matrix::Form::Bf16 => 2.0,
        retune_core::kernels::matrix::Form::Blocks(_) => 1.0,
    };
    let weight_bytes: f64 = spec
        .weights
        .iter()
        .filter(|weight| !trains.contains(weight.name.as_str()))
        .map(|weight| {
            let stored = opened.weights.source().stored_bytes(&weight.name);
            match (packing.keep_blocks, stored) {
                (true, Some(bytes)) if weight.shape.len() > 1 => bytes as f64,
                _ => weight.count() as f64 * bytes_per_value,
            }
        })
        .sum();
    let trainable = method.num_trainable() as u64;
    let training_bytes = trainable * (8 + recipe.train.optimizer().state_bytes_per_value() as u64);
    let tokens = tokens_per_pass(recipe, statistics);
    let recompute = recipe.train.recompute;
    let activation_bytes = activation_bytes(spec, method, tokens, recompute);
    let linear: f64 = spec.linears().map(|weight| weight.count() as f64).sum();
    let head = match &spec.head {
        Head::Language { weight, .. } if spec.weight(weight).is_some_and(|w| !w.is_linear()) => {
            (spec.vocabulary * spec.width) as f64
        }
        _ => 0.0,
    };
    // Forward and the input's gradient; a weight's own gradient where the weight trains.
    let trained = spec.linears().filter(|weight| trains.contains(weight.name.as_str()));
    let trained: f64 = trained.map(|weight| weight.count() as f64).sum();
    let passes = 2.0 + trained / linear.max(1.0);
    let passes = passes + if recompute { 1.0 } else { 0.0 };
    let step_tokens = tokens as f64 * recipe.train.accumulation as f64;
    Forecast {
        weight_bytes: weight_bytes as u64,
        training_bytes,
        activation_bytes,
        total_bytes: PROGRAM_BYTES + weight_bytes as u64 + training_bytes + activation_bytes,
        flops_per_step: 2.0 * passes * (linear + head) * step_tokens,
        recompute,
    }
}

/// Bytes of the activations that wait for the backward pass.
///
/// Per block and token: what both norms read, queries, keys, values and output of attention, and
/// both halves of the gate; what linear layers read behind them is computed again. With
/// recomputation, one width per block and one block in full.
fn activation_bytes(spec: &ModelSpec, method: &MethodPlan, tokens: u64, recompute: bool) -> u64 {
    let heads = (spec.num_heads * spec.head_width) as u64;
    let keys = (spec.num_key_heads * spec.head_width) as u64;
    let width = spec.width as u64;
    let inner = spec.inner_width as u64;
    let block = 2 * width + 2 * heads + 2 * keys + 2 * inner;
    let layers = spec.num_layers as u64;
    let scaled = scaled_outputs(spec, method);
    let kept = if recompute {
        layers * width + block + scaled.div_ceil(layers.max(1))
    } else {
        layers * block + scaled
    };
    4 * tokens * (kept + 6 * width)
}

/// Counts the outputs a token has in linear layers of which each is multiplied by a number that
/// trains: the gradient of that number needs the output as it was before.
fn scaled_outputs(spec: &ModelSpec, method: &MethodPlan) -> u64 {
    let is_scaled = |weight: &&WeightSpec| {
        let [rows, columns] = weight.matrix();
        columns > 1
            && method.parameters.iter().any(|planned| {
                planned.trains
                    && planned.place == weight.name
                    && planned.shape.iter().product::<usize>() == rows
            })
    };
    spec.linears().filter(is_scaled).map(|weight| weight.matrix()[0] as u64).sum()
}

/// Switches recomputation on where that is what it takes, or refuses.
fn fit(
    recipe: &Recipe,
    spec: &ModelSpec,
    method: &MethodPlan,
    statistics: &Statistics,
    opened: &Opened,
    forecast: Forecast,
    allowed: u64,
) -> Result<Forecast> {
    if forecast.total_bytes <= allowed {
        return Ok(forecast);
    }
    let tokens = tokens_per_pass(recipe, statistics);
    let smaller = activation_bytes(spec, method, tokens, true);
    let with = Forecast {
        activation_bytes: smaller,
        total_bytes: forecast.total_bytes - forecast.activation_bytes + smaller,
        recompute: true,
        flops_per_step: forecast.flops_per_step * 1.4,
        ..forecast
    };
    if with.total_bytes <= allowed {
        return Ok(with);
    }
    let fixed = with.total_bytes - with.activation_bytes;
    let mut help = Vec::new();
    for rows in (1..recipe.train.batch_size).rev() {
        let part = smaller * rows as u64 / recipe.train.batch_size as u64;
        if fixed + part <= allowed {
            help.push(format!("`train.batch_size = {rows}` with `train.accumulation` raised"));
            break;
        }
    }
    let weights = opened.weights.packing();
    if weights.form == retune_core::kernels::matrix::Form::F32 && !weights.keep_blocks {
        help.push("`compute.weights = \"bf16\"` or \"stored\"".to_owned());
    }
    if method.num_trainable() * 10 > spec.count() {
        help.push("a method that trains less, such as `[method.lora]`".to_owned());
    }
    help.push(format!("`compute.memory = \"{}\"`", mebibytes(with.total_bytes)));
    Err(Error::Plan {
        what: "the run does not fit the memory allowed".to_owned(),
        expected: format!("at most {}", mebibytes(allowed)),
        found: format!(
            "{} even with recomputed layers: weights {}, training {}, activations {}",
            mebibytes(with.total_bytes),
            mebibytes(with.weight_bytes),
            mebibytes(with.training_bytes),
            mebibytes(with.activation_bytes)
        ),
        help: help.join(", or "),
    })
}

/// Says what is used where the processor lacks the arithmetic a recipe asks for.
fn arithmetic_note(asked: ArithmeticName, native: bool) -> Option<String> {
    (asked == ArithmeticName::Bf16 && !native).then(|| {
        "this processor has no fast bf16 products (AVX512-BF16 or AMX): `compute.arithmetic = \
         \"bf16\"` is computed in f32, which is more exact and no slower here"
            .to_owned()
    })
}

/// Writes a number of bytes as MiB, rounded up.
pub fn mebibytes(bytes: u64) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
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
