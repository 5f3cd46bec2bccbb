//! Tiny models, golden loader and conformance suites shared by the tests.
//!
//! The helpers fail a test by panicking, with what was compared, where, and both values.

pub mod golden;
pub mod open;
pub mod run;
pub mod tiny;
