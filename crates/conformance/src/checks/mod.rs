//! One file per check.

pub mod accumulation;
pub mod fast;
pub mod gradient;
pub mod merge;
pub mod moves;
pub mod options;
pub mod packed;
pub mod plan;
pub mod quantized;
pub mod resume;
pub mod saved;
pub mod stacked;
pub mod start;
pub mod threads;
