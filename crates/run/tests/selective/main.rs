//! Methods that choose which entries train, walked through the real training loop.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod children;
mod common;
mod halves;
mod masks;
mod rates;
mod resume;
mod spiel;
