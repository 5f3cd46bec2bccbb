//! What every tuning method must keep, on every kind of model.
//!
//! A method is covered by its line in the registry: the tests of this crate run every [`Check`]
//! over every method, each of its [examples](retune_core::method::Method::examples) and every
//! [`Subject`]. What a method may differ in, it says in its
//! [`Promises`](retune_core::method::Promises).
//!
//! ```sh
//! cargo nextest run -p retune-conformance
//! ```

pub mod case;
pub mod checks;
pub mod pairs;
pub mod subject;
pub mod suite;

pub use case::{Case, Failed};
pub use subject::{Subject, subjects};
pub use suite::{CHECKS, Check, Failure, check_all};
