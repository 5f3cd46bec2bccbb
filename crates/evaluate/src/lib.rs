//! Using and measuring a tuned model: generation, likelihood, metrics.
//!
//! Token ids go in and token ids or numbers come out: texts, templates and tokenizers are the
//! caller's. Only the logits that are asked for are ever computed, never those of a whole batch.
//!
//! - [`generate`](mod@generate) continues prompts with a key-value cache, as [`sampling`] says;
//! - [`likelihood`] scores continuations, [`choice`] ranks them, [`perplexity`] scores documents;
//! - [`validation`] measures loss, classes and vectors over batches;
//! - [`answers`] asks for each label and measures how sure the model is, [`similarity`] how alike its
//!   layers are;
//! - [`metrics`] compares answers with references, and says how far a mean can be trusted.

pub mod answers;
pub mod choice;
pub mod generate;
pub mod likelihood;
pub mod metrics;
mod pack;
pub mod perplexity;
pub mod sampling;
pub mod similarity;
pub mod validation;

pub use retune_core::{Error, Result};
