//! What a run tells its observers. Libraries print nothing: terminal, files and dashboards listen.

use std::path::PathBuf;

use serde::Serialize;

/// Something that happened in a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// Training begins, or goes on after a resume.
    Started {
        /// Steps done before.
        step: u64,
        /// Steps of the whole run.
        num_steps: u64,
        /// Values that train.
        num_trainable: usize,
        /// Values of the model.
        num_parameters: usize,
    },
    /// One optimiser step is done.
    StepDone {
        /// Steps done so far.
        step: u64,
        /// Mean loss per learned token (or document) of this step's batch.
        loss: f64,
        /// Learning rate of this step.
        learning_rate: f64,
        /// Norm of the gradient before clipping.
        gradient_norm: f64,
        /// Tokens read in this step.
        num_tokens: u64,
        /// Of these, learned.
        num_learned_tokens: u64,
        /// Fraction of the data read so far, in epochs.
        epoch: f64,
    },
    /// An evaluation is done.
    Evaluated {
        /// Steps done so far.
        step: u64,
        /// The split's name.
        split: String,
        /// Metric names and values, sorted by name.
        metrics: std::collections::BTreeMap<String, f64>,
    },
    /// A checkpoint lies complete on disk.
    Saved {
        /// Steps done so far.
        step: u64,
        /// The checkpoint's folder.
        path: PathBuf,
    },
    /// Something a person should know.
    Warned {
        /// One sentence.
        message: String,
    },
    /// A stage's progress, for bars.
    Progress {
        /// What is being done.
        stage: String,
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
    },
    /// The run is over.
    Finished {
        /// Steps done.
        step: u64,
        /// Why it ended: `steps`, `early_stopping`, …
        reason: String,
    },
}

/// Listens to a run. Every observer ignores what it does not know.
pub trait Observer {
    /// Takes one event.
    fn on_event(&mut self, event: &Event);
}

/// Ignores everything.
#[derive(Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn on_event(&mut self, _event: &Event) {}
}

impl Observer for Vec<Event> {
    fn on_event(&mut self, event: &Event) {
        self.push(event.clone());
    }
}
