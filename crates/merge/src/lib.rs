//! What happens to weights after training: merging, compressing, comparing.
//!
//! Everything streams: memory holds a few tensors, whatever the size of the model.

pub mod card;
pub mod combine;
pub mod compeft;
pub mod diff;
mod error;
pub mod extract;
pub mod layers;
mod lora;
pub mod methods;
mod model;
pub mod pairs;
pub mod plan;
mod resolve;
mod run;
pub mod setting;
pub mod source;
pub mod spectrum;
pub mod update;
mod vocabulary;
pub mod writer;

pub use error::{Error, Result};
pub use run::{Locate, Merged, Options, Progress, Watch, merge};
