//! What a run leaves behind for people and for other tools.
//!
//! Everything here takes plain numbers and text; no tensor, model or clock is involved.

pub mod heatmap;
pub mod plot;
pub mod report;
pub mod scatter;
pub mod tensorboard;
