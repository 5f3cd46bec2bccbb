//! How much memory a run takes, and what makes it take less.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::open::Opened;
use crate::recipe::{Recipe, WeightsName};
use retune_core::method::{MethodPlan, Working};
use retune_core::spec::{Head, ModelSpec, Role, WeightSpec};
use retune_evaluate::generate::Generation;

/// What a run is expected to take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Bytes of the frozen base.
    pub weight_bytes: u64,
    /// Bytes of trained values, their gradients and the optimiser's state.
    pub training_bytes: u64,
    /// Bytes of activations of the largest pass.
    pub activation_bytes: u64,
    /// Bytes of the largest pass and the key-value cache while the model is measured.
    #[serde(default)]
    pub evaluation_bytes: u64,
    /// Bytes in all, with what the program itself takes.
    pub total_bytes: u64,
    /// Floating-point operations of one step.
    pub flops_per_step: f64,
    /// Layers are run again in the backward pass, to fit the memory allowed.
    pub recompute: bool,
}

/// Tokens of the longest passes of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassTokens {
    /// Of the largest micro-batch of the first epoch.
    pub training: u64,
    /// Of the longest training row.
    pub longest: u64,
    /// Of the largest batch whose loss is measured.
    pub validation: u64,
    /// Of the prompts that are answered at once, the longest ones.
    pub prompts: u64,
    /// How many these are.
    pub answers: u64,
}

/// Bytes the program takes before it holds a model: code, tokenizer, buffers.
const PROGRAM_BYTES: u64 = 60 << 20;
/// Rows of logits that are in memory for each answer: the tensor, its copy, and the sampler's.
const LOGIT_ROWS: u64 = 3;

/// Settings that decide how much memory a run takes.
#[derive(Debug, Clone, Copy)]
struct Choice {
    rows: u64,
    /// Longest row, where it is shorter than the data's longest.
    max_length: Option<u64>,
    recompute: bool,
    weights: WeightsName,
}

/// Everything a forecast is made of.
pub(crate) struct Forecaster<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) method: &'a MethodPlan,
    pub(crate) working: Working,
    pub(crate) opened: &'a Opened,
    pub(crate) tokens: PassTokens,
    /// Tokens of a document on average: the keys of its last query.
    pub(crate) keys: f64,
}

impl Forecaster<'_> {
    /// Forecasts the run, with recomputed layers where that is what it takes to fit.
    ///
    /// # Errors
    /// [`Error::Plan`] if it does not fit the memory allowed, with settings that would.
    pub(crate) fn fitted(&self) -> Result<Forecast> {
        let asked = self.asked();
        let forecast = self.of(asked);
        let Some(allowed) = self.recipe.compute.memory.map(|bytes| bytes.0) else {
            return Ok(forecast);
        };
        if forecast.total_bytes <= allowed {
            return Ok(forecast);
        }
        let recomputed = self.of(Choice { recompute: true, ..asked });
        if recomputed.total_bytes <= allowed {
            return Ok(recomputed);
        }
        let Forecast { weight_bytes, training_bytes, activation_bytes, evaluation_bytes, .. } =
            recomputed;
        Err(Error::Plan {
            what: "the run does not fit the memory allowed".to_owned(),
            expected: format!("at most {}", mebibytes(allowed)),
            found: format!(
                "{} even with recomputed layers: weights {}, training {}, activations {}, \
                 measuring {}",
                mebibytes(recomputed.total_bytes),
                mebibytes(weight_bytes),
                mebibytes(training_bytes),
                mebibytes(activation_bytes),
                mebibytes(evaluation_bytes)
            ),
            help: self.help(allowed, recomputed.total_bytes),
        })
    }

    fn asked(&self) -> Choice {
        Choice {
            rows: self.recipe.train.batch_size as u64,
            max_length: None,
            recompute: self.recipe.train.recompute,
            weights: self.recipe.compute.weights,
        }
    }

    fn spec(&self) -> &ModelSpec {
        self.opened.checkpoint.model.spec()
    }

    fn of(&self, choice: Choice) -> Forecast {
        let spec = self.spec();
        let weight_bytes = self.weight_bytes(choice.weights);
        let state = self.recipe.train.optimizer().state_bytes_per_value() as u64;
        let training_bytes = self.method.num_trainable() as u64 * (8 + state) + self.working.bytes;
        let tokens = self.training_tokens(choice);
        let activation_bytes = activation_bytes(spec, self.method, tokens, choice.recompute)
            + 4 * tokens * self.working.values_per_token;
        let evaluation_bytes = self.evaluation_bytes(choice);
        // Measuring happens before and after the steps, in the memory their activations leave.
        let passing = activation_bytes.max(evaluation_bytes);
        Forecast {
            weight_bytes,
            training_bytes,
            activation_bytes,
            evaluation_bytes,
            total_bytes: PROGRAM_BYTES + weight_bytes + training_bytes + passing,
            flops_per_step: self.flops(tokens, choice.recompute),
            recompute: choice.recompute,
        }
    }

    /// Weights a method replaces whole: they count as training, not as base.
    fn replaced(&self) -> BTreeSet<&str> {
        let spec = self.spec();
        let whole = self.method.parameters.iter().filter(|p| {
            p.trains && spec.weight(&p.place).is_some_and(|weight| weight.shape == p.shape)
        });
        whole.map(|p| p.place.as_str()).collect()
    }

    fn weight_bytes(&self, weights: WeightsName) -> u64 {
        let replaced = self.replaced();
        let frozen = self.spec().weights.iter().filter(|w| !replaced.contains(w.name.as_str()));
        let bytes = frozen.map(|weight| {
            let stored = self.opened.weights.source().stored_bytes(&weight.name);
            let matrix = weight.shape.len() > 1;
            match (weights, stored) {
                (WeightsName::Stored, Some(bytes)) if matrix => bytes,
                (WeightsName::Bf16, _) if matrix => 2 * weight.count() as u64,
                _ => 4 * weight.count() as u64,
            }
        });
        bytes.sum()
    }

    /// Tokens of the largest training pass.
    fn training_tokens(&self, choice: Choice) -> u64 {
        let asked = self.recipe.train.batch_size.max(1) as u64;
        let part = (self.tokens.training * choice.rows).div_ceil(asked);
        // A single row may be the longest one.
        let least = self.tokens.longest.min(self.tokens.training);
        let tokens = part.max(least);
        choice.max_length.map_or(tokens, |length| tokens.min(length * choice.rows)).max(1)
    }

    /// Bytes of the passes that measure: nothing waits for a backward pass, so of the widest place
    /// of a block only what is alive there, beside the cache and the logits of all answers.
    fn evaluation_bytes(&self, choice: Choice) -> u64 {
        let (spec, evaluate) = (self.spec(), &self.recipe.evaluate);
        let keys = (spec.num_key_heads * spec.head_width) as u64;
        let heads = (spec.num_heads * spec.head_width) as u64;
        let (width, inner) = (spec.width as u64, spec.inner_width as u64);
        let alive = 4 * (3 * width + (3 * inner).max(2 * heads + 2 * keys));
        let answers = match spec.head {
            Head::Language { .. } => self.tokens.answers,
            _ => 0,
        };
        let cut = |tokens: u64, rows: u64| {
            choice.max_length.map_or(tokens, |length| tokens.min(length * rows))
        };
        let prompts = if answers == 0 { 0 } else { cut(self.tokens.prompts, answers) };
        let read = prompts.min(Generation::default().max_read_tokens as u64);
        let pass = self.tokens.validation.max(read) * alive;
        let kept = prompts + answers * evaluate.max_new_tokens as u64;
        // A growing cache has half as much room again as it holds, on average.
        let cache = kept * 2 * keys * 4 * spec.num_layers as u64 * 3 / 2;
        pass + cache + LOGIT_ROWS * answers * 4 * spec.vocabulary as u64
    }

    fn flops(&self, tokens: u64, recompute: bool) -> f64 {
        let (spec, replaced) = (self.spec(), self.replaced());
        let linear: f64 = spec.linears().map(|weight| weight.count() as f64).sum();
        let head = match &spec.head {
            Head::Language { weight, .. }
                if spec.weight(weight).is_some_and(|w| !w.is_linear()) =>
            {
                (spec.vocabulary * spec.width) as f64
            }
            _ => 0.0,
        };
        // Forward and the input's gradient; a weight's own gradient where the weight trains.
        let trained = spec.linears().filter(|weight| replaced.contains(weight.name.as_str()));
        let trained: f64 = trained.map(|weight| weight.count() as f64).sum();
        let passes = 2.0 + trained / linear.max(1.0) + f64::from(u8::from(recompute));
        let step_tokens = tokens as f64 * self.recipe.train.accumulation as f64;
        step_tokens * (2.0 * passes * (linear + head) + self.attention_flops())
    }

    /// Operations of attention per token, both ways: each query against the keys of its own document.
    ///
    /// Two products forward and four backward, two operations a number; of causal attention one half.
    fn attention_flops(&self) -> f64 {
        let spec = self.spec();
        let keys = if spec.causal { self.keys / 2.0 } else { self.keys };
        12.0 * keys * (spec.num_layers * spec.num_heads * spec.head_width) as f64
    }

    /// Lists the nearest settings that fit: each alone where that is enough, else all together.
    fn help(&self, allowed: u64, needed: u64) -> String {
        let asked = Choice { recompute: true, ..self.asked() };
        let fits = |choice: Choice| self.of(choice).total_bytes <= allowed;
        let rows = |choice: Choice| {
            (1..asked.rows).rev().find(|rows| fits(Choice { rows: *rows, ..choice }))
        };
        let length = |choice: Choice| {
            let fitting = |length: u64| fits(Choice { max_length: Some(length), ..choice });
            // Halves: what is cut off is lost, so exactness to the token would promise too much.
            let halves = std::iter::successors(Some(self.tokens.longest / 2), |l| Some(l / 2));
            halves.take_while(|length| *length >= 16).find(|length| fitting(*length))
        };
        let smallest = self.smaller_weights();
        let mut help = Vec::new();
        help.extend(rows(asked).map(rows_setting));
        help.extend(length(asked).map(|length| format!("`data.max_length = {length}`")));
        if let Some(weights) = smallest
            && fits(Choice { weights, ..asked })
        {
            help.push(weights_setting(weights));
        }
        if help.is_empty() {
            let least = Choice { rows: 1, weights: smallest.unwrap_or(asked.weights), ..asked };
            let together: Vec<String> = [
                (asked.rows > 1).then(|| rows_setting(1)),
                smallest.map(weights_setting),
                if fits(least) {
                    None
                } else {
                    length(least).map(|l| format!("`data.max_length = {l}`"))
                },
            ]
            .into_iter()
            .flatten()
            .collect();
            let shortest = Choice { max_length: length(least), ..least };
            if !together.is_empty() && fits(shortest) {
                help.push(together.join(" together with "));
            }
        }
        if self.method.num_trainable() * 10 > self.spec().count() {
            help.push("a method that trains less, such as `[method.lora]`".to_owned());
        }
        help.push(format!("`compute.memory = \"{}\"`", mebibytes(needed)));
        help.join(", or ")
    }

    /// The form of frozen weights that takes less memory than the one asked for, if there is one.
    fn smaller_weights(&self) -> Option<WeightsName> {
        let asked = self.weight_bytes(self.recipe.compute.weights);
        let forms = [WeightsName::Stored, WeightsName::Bf16];
        let smallest = forms.into_iter().min_by_key(|weights| self.weight_bytes(*weights))?;
        (self.weight_bytes(smallest) < asked).then_some(smallest)
    }
}

fn rows_setting(rows: u64) -> String {
    format!("`train.batch_size = {rows}` with `train.accumulation` raised")
}

fn weights_setting(weights: WeightsName) -> String {
    let name = match weights {
        WeightsName::F32 => "f32",
        WeightsName::Bf16 => "bf16",
        WeightsName::Stored => "stored",
    };
    format!("`compute.weights = \"{name}\"`")
}

/// Bytes of the activations that wait for the backward pass.
///
/// Per block and token: what both norms read, queries, keys, values and output of attention, and
/// what the activation of the feed-forward network reads, with its gate where it has one; what
/// linear layers read behind them is computed again. With recomputation, one width per block and
/// one block in full.
fn activation_bytes(spec: &ModelSpec, method: &MethodPlan, tokens: u64, recompute: bool) -> u64 {
    let heads = (spec.num_heads * spec.head_width) as u64;
    let keys = (spec.num_key_heads * spec.head_width) as u64;
    let width = spec.width as u64;
    let inner = spec.inner_width as u64;
    let halves = 1 + u64::from(spec.weights.iter().any(|weight| weight.role == Role::Gate));
    let block = 2 * width + 2 * heads + 2 * keys + halves * inner;
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

/// Writes a number of bytes as MiB, rounded up.
pub fn mebibytes(bytes: u64) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}
