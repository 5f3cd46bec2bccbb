//! Recipe to plan to run folder to report.

pub mod artefacts;
