//! The walk over the steps: batches in, events out, checkpoints on disk.

use std::path::PathBuf;
use std::sync::Arc;

use crate::backprop::{Backprop, Demands, FlatGradients, StepResult, global_norm, row_list};
use crate::checkpoint::{self, OptimizerState, State};
use crate::error::{Error, Result};
use crate::optimizer::{MemoryOf, Optimizer, Step};
use crate::schedule::Schedule;
use retune_core::batch::Batch;
use retune_core::change::Changes;
use retune_core::event::{Event, Observer};
use retune_core::method::{Method, ParameterState, StepView};
use retune_core::model::{Model, Tuned};
use retune_core::parameters::{Parameter, Parameters};
use retune_core::random::Seed;
use retune_core::weights::Weights;

/// Gives the micro-batches of a step.
///
/// They depend on the step's number only, never on what was asked before: that is why resuming
/// needs no walk through the data.
pub trait BatchSource {
    /// Returns the micro-batches of step `step`, counted from 0.
    ///
    /// # Errors
    /// If the data cannot be read.
    fn micro_batches(&mut self, step: u64) -> Result<Vec<Batch>>;

    /// Returns how many passes over the data the first `steps` steps make.
    fn epoch(&self, steps: u64) -> f64;
}

/// Measures the tuned model on held-out rows during training.
pub trait Validation {
    /// Returns metric names and values; `loss` must be among them.
    ///
    /// # Errors
    /// Those of the model.
    fn measure(&mut self, tuned: &Tuned<'_>) -> Result<std::collections::BTreeMap<String, f64>>;
}

/// How a run walks: everything that is decided before step 1.
#[derive(Debug)]
pub struct Walk {
    /// Steps of the whole run.
    pub num_steps: u64,
    /// Learning rates.
    pub schedule: Schedule,
    /// The gradient's norm is cut to this; 0 switches clipping off.
    pub clip: f64,
    /// Steps between evaluations; 0 means at the end only.
    pub evaluate_every: u64,
    /// Steps between checkpoints; 0 means at the end only.
    pub save_every: u64,
    /// How many of the newest checkpoints stay.
    pub keep_last: usize,
    /// Evaluations without a better loss before the run stops; 0 never stops early.
    pub patience: u64,
    /// The run's seed.
    pub seed: Seed,
    /// Runs layers again in the backward pass.
    pub recompute: bool,
    /// Hash of the plan, so that a checkpoint finds its own run only.
    pub plan: String,
    /// Where checkpoints go.
    pub checkpoints: PathBuf,
}

/// A model in training.
#[derive(Debug)]
pub struct Training<'a> {
    model: &'a dyn Model,
    weights: &'a Weights,
    method: Box<dyn Method>,
    changes: Changes,
    /// Everything that trains.
    pub parameters: Parameters,
    optimizer: Box<dyn Optimizer>,
    optimizer_state: OptimizerState,
    walk: Walk,
    /// Last step and schedule of each stage.
    stages: Vec<(u64, Schedule)>,
    state: State,
}

impl<'a> Training<'a> {
    /// Attaches the method and stands before step 1.
    ///
    /// # Errors
    /// Those of attaching the method.
    pub fn new(
        model: &'a dyn Model,
        weights: &'a Weights,
        method: Box<dyn Method>,
        optimizer: Box<dyn Optimizer>,
        walk: Walk,
    ) -> Result<Self> {
        let mut parameters = Parameters::new(weights.device());
        let changes = method.attach(weights, &mut parameters, walk.seed)?;
        let optimizer_state = fresh_state(&parameters, optimizer.as_ref());
        let stages = walk.schedule.split(&method.stages(walk.num_steps)?);
        let state = State {
            format: 1,
            plan: walk.plan.clone(),
            step: 0,
            best: None,
            evaluations_without_better: 0,
            hashes: std::collections::BTreeMap::default(),
            parameters: std::collections::BTreeMap::default(),
            method: serde_json::Value::Null,
        };
        Ok(Self {
            model,
            weights,
            method,
            changes,
            parameters,
            optimizer,
            optimizer_state,
            walk,
            stages,
            state,
        })
    }

    /// Goes back to the newest whole checkpoint; returns the step and which ones were passed over.
    ///
    /// # Errors
    /// If no checkpoint can be used, or it belongs to another plan.
    pub fn resume(&mut self) -> Result<(u64, Vec<String>)> {
        let names = self.optimizer.state_names();
        let (state, optimizer, refused) = checkpoint::load_newest(
            &self.walk.checkpoints,
            &self.walk.plan,
            &mut self.parameters,
            names,
        )?;
        self.method.load_state(&state.method)?;
        self.optimizer_state = optimizer;
        self.state = state;
        Ok((self.state.step, refused))
    }

    /// Returns the tuned model as it stands.
    pub fn tuned(&self) -> Tuned<'_> {
        Tuned {
            model: self.model,
            weights: self.weights,
            changes: &self.changes,
            parameters: &self.parameters,
        }
    }

    /// Returns the method.
    pub fn method(&self) -> &dyn Method {
        self.method.as_ref()
    }

    /// Returns what the optimiser remembers, per parameter.
    pub fn optimizer_state(&self) -> &[ParameterState] {
        &self.optimizer_state
    }

    /// Returns the steps done.
    pub fn step_number(&self) -> u64 {
        self.state.step
    }

    /// Returns the best validation loss so far and its step.
    pub fn best(&self) -> Option<(f64, u64)> {
        self.state.best
    }

    /// Walks to the end of the run.
    ///
    /// # Errors
    /// Those of the data, the model and the disk; [`Error::NotFinite`] if the loss stops being a
    /// number. What was saved before stays.
    pub fn walk(
        &mut self,
        batches: &mut dyn BatchSource,
        mut validation: Option<&mut dyn Validation>,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        observer.on_event(&Event::Started {
            step: self.state.step,
            num_steps: self.walk.num_steps,
            num_trainable: self.parameters.num_trainable(),
            num_parameters: self.model.spec().count(),
        });
        let mut reason = "steps";
        while self.state.step < self.walk.num_steps {
            self.one_step(batches, observer)?;
            let step = self.state.step;
            let last = step == self.walk.num_steps;
            let due = |every: u64| last || (every > 0 && step.is_multiple_of(every));
            let mut stop = false;
            if due(self.walk.evaluate_every)
                && let Some(validation) = validation.as_deref_mut()
            {
                stop = self.validate(validation, observer)?;
            }
            if stop {
                reason = "early_stopping";
            }
            if due(self.walk.save_every) || stop {
                self.save(observer)?;
            }
            if stop {
                break;
            }
        }
        observer.on_event(&Event::Finished { step: self.state.step, reason: reason.to_owned() });
        Ok(())
    }

    fn one_step(
        &mut self,
        batches: &mut dyn BatchSource,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let step = self.state.step;
        let micro_batches = batches.micro_batches(step)?;
        let learner = Backprop { seed: self.walk.seed, recompute: self.walk.recompute };
        let demands = Demands {
            reference: self.method.reference(),
            rows_alike: self.method.weighs_rows_alike(),
        };
        let rate = self.rate(step);
        let spec = Arc::clone(self.model.spec());
        let nothing = FlatGradients::new();
        let mut view = StepView {
            spec: &spec,
            weights: Some(self.weights),
            step: step + 1,
            num_steps: self.walk.num_steps,
            loss: f64::NAN,
            learning_rate: rate,
            gradient_scale: 1.0,
            parameters: &mut self.parameters,
            gradients: &mut FlatGradients::new(),
            reference_gradients: &nothing,
            states: &mut self.optimizer_state,
            optimizer: &MemoryOf(self.optimizer.as_ref()),
            seed: self.walk.seed,
        };
        self.method.before_step(&mut view)?;
        let tuned = self.tuned();
        let mut result = retune_core::kernels::in_pool(|| {
            learner.step_with(&tuned, &micro_batches, step, &demands)
        })?;
        if !result.loss.is_finite() {
            return Err(self.not_finite("loss", result.loss, &micro_batches));
        }
        let mut view = StepView {
            spec: &spec,
            weights: Some(self.weights),
            step: step + 1,
            num_steps: self.walk.num_steps,
            loss: result.loss,
            learning_rate: rate,
            gradient_scale: 1.0,
            parameters: &mut self.parameters,
            gradients: &mut result.gradients,
            reference_gradients: &result.reference_gradients,
            states: &mut self.optimizer_state,
            optimizer: &MemoryOf(self.optimizer.as_ref()),
            seed: self.walk.seed,
        };
        self.method.on_gradients(&mut view)?;
        let norm = retune_core::kernels::in_pool(|| global_norm(view.gradients));
        if !norm.is_finite() {
            return Err(self.not_finite("gradient norm", norm, &micro_batches));
        }
        // The same factor as in PyTorch's clip_grad_norm_, whose numbers the golden pack has.
        let factor =
            if self.walk.clip > 0.0 { (self.walk.clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.apply(&mut result, factor, rate);
        self.state.step += 1;
        let mut view = StepView {
            spec: &spec,
            weights: Some(self.weights),
            step: self.state.step,
            num_steps: self.walk.num_steps,
            loss: result.loss,
            learning_rate: rate,
            gradient_scale: factor,
            parameters: &mut self.parameters,
            gradients: &mut result.gradients,
            reference_gradients: &result.reference_gradients,
            states: &mut self.optimizer_state,
            optimizer: &MemoryOf(self.optimizer.as_ref()),
            seed: self.walk.seed,
        };
        self.method.on_step(&mut view)?;
        observer.on_event(&Event::StepDone {
            step: self.state.step,
            loss: result.loss,
            learning_rate: rate,
            gradient_norm: norm,
            num_tokens: result.num_tokens,
            num_learned_tokens: result.num_labels,
            epoch: batches.epoch(self.state.step),
        });
        Ok(())
    }

    /// Returns the learning rate of a step, counted from 0: each stage has the schedule anew.
    fn rate(&self, step: u64) -> f64 {
        let mut start = 0;
        for (end, schedule) in &self.stages {
            if step < *end {
                return schedule.rate(step - start);
            }
            start = *end;
        }
        self.walk.schedule.rate(step)
    }

    /// Moves all parameters by their gradients, many at a time: most are small.
    fn apply(&mut self, result: &mut StepResult, factor: f64, rate: f64) {
        let optimizer = self.optimizer.as_ref();
        let mut changes = Vec::new();
        let parameters = self.parameters.iter().zip(&mut result.gradients);
        for (((id, parameter), slot), state) in parameters.zip(&mut self.optimizer_state) {
            if parameter.moved_by_method {
                continue;
            }
            let Some(gradient) = slot.take() else { continue };
            let ParameterState { lists, ages, since } = state;
            let step = Step {
                learning_rate: rate * parameter.rate_factor,
                decays: parameter.decays,
                number: self.state.step + 1 - *since,
                gradient_scale: factor,
            };
            let change = move |values: &mut [f32]| match ages {
                None => optimizer.step(step, values, &gradient, lists),
                Some(ages) => {
                    for age in ages.iter_mut() {
                        *age += 1.0;
                    }
                    optimizer.step_aged(step, ages, values, &gradient, lists);
                }
            };
            changes.push((id, change));
        }
        retune_core::kernels::in_pool(|| self.parameters.update_each(changes));
    }

    fn not_finite(&self, what: &'static str, value: f64, batches: &[Batch]) -> Error {
        let newest = checkpoint::list(&self.walk.checkpoints)
            .ok()
            .and_then(|steps| steps.first().copied())
            .map(|step| checkpoint::folder(&self.walk.checkpoints, step));
        Error::NotFinite {
            step: self.state.step + 1,
            what,
            value,
            rows: row_list(batches),
            checkpoint: newest.map_or_else(|| "none".to_owned(), |path| path.display().to_string()),
        }
    }

    /// Measures, remembers the best, and says whether to stop.
    fn validate(
        &mut self,
        validation: &mut dyn Validation,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        let metrics = validation.measure(&self.tuned())?;
        let loss = metrics.get("loss").copied().unwrap_or(f64::NAN);
        observer.on_event(&Event::Evaluated {
            step: self.state.step,
            split: "validation".to_owned(),
            metrics,
        });
        // A loss that is not a number is never the best, not even as the first.
        if !loss.is_nan() && self.state.best.is_none_or(|(best, _)| loss < best) {
            self.state.best = Some((loss, self.state.step));
            self.state.evaluations_without_better = 0;
            // The best so far is saved at once, whatever the rhythm of checkpoints.
            self.save(observer)?;
            return Ok(false);
        }
        self.state.evaluations_without_better += 1;
        Ok(self.walk.patience > 0 && self.state.evaluations_without_better >= self.walk.patience)
    }

    /// Saves, unless this step is saved already, and removes what is neither best nor among the last.
    fn save(&self, observer: &mut dyn Observer) -> Result<()> {
        let root = &self.walk.checkpoints;
        let state = State { method: self.method.save_state(), ..self.state.clone() };
        let path = checkpoint::save(
            root,
            state,
            &self.parameters,
            self.optimizer.state_names(),
            &self.optimizer_state,
        )?;
        observer.on_event(&Event::Saved { step: self.state.step, path });
        let best = self.state.best.map(|(_, step)| step);
        checkpoint::tidy(root, self.walk.keep_last, best)
    }

    /// Goes back to the values with the best validation loss, if they are not the present ones.
    ///
    /// # Errors
    /// If that checkpoint cannot be read.
    pub fn take_best(&mut self) -> Result<Option<u64>> {
        let Some((_, step)) = self.state.best.filter(|(_, step)| *step != self.state.step) else {
            return Ok(None);
        };
        let path = checkpoint::folder(&self.walk.checkpoints, step);
        checkpoint::load_values(&path, &mut self.parameters)?;
        Ok(Some(step))
    }
}

/// Returns the optimiser's lists, all zero; what it does not move has none.
fn fresh_state(parameters: &Parameters, optimizer: &dyn Optimizer) -> OptimizerState {
    let lists = optimizer.state_names().len();
    let of = |p: &Parameter| {
        if p.trains && !p.moved_by_method {
            ParameterState::fresh(p.count(), lists, p.counts_ages, 0)
        } else {
            ParameterState::default()
        }
    };
    parameters.iter().map(|(_, p)| of(p)).collect()
}
