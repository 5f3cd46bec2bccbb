//! Recipe to plan to run folder to report.
//!
//! [`recipe`] is what a person wrote, [`plan`] what it means, [`prepare`] everything before step 1,
//! [`execute`] the walk itself, [`folder`] what is left behind.

pub mod adapters;
pub mod artefacts;
mod builtin;
pub mod card;
pub mod compare;
pub mod compose;
pub mod compress;
pub mod crash;
pub mod environment;
mod error;
pub mod execute;
pub mod export;
pub mod extract;
pub mod folder;
mod forecast;
pub mod graft;
pub mod half_reset;
pub mod images;
pub mod init;
pub mod intrinsic_dimension;
pub mod measure;
mod merged;
pub mod open;
pub mod plan;
pub mod prefetch;
pub mod prepare;
pub mod recipe;
pub mod rows;
pub mod ship;
pub mod structured;

pub use error::{Error, Result};
