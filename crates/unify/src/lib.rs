//! Empty on purpose: see the comment in this crate's `Cargo.toml`.
