//! What a run needs to know of the outside world, handed in by the program.

use retune_hub::{Fetch, HubEnvironment, HubObserver};

/// Clock, folders and machine. Libraries read none of these themselves.
pub struct Environment<'a> {
    /// Where models are found.
    pub hub: HubEnvironment,
    /// How they are downloaded.
    pub fetch: &'a dyn Fetch,
    /// Seconds since 1970, as a fraction.
    pub clock: &'a dyn Fn() -> f64,
    /// Peak resident memory of this process so far, in bytes, where the system tells.
    pub peak_bytes: &'a dyn Fn() -> Option<u64>,
    /// What the machine is, for the report.
    pub machine: crate::artefacts::report::Machine,
    /// Hears of downloads.
    pub downloads: &'a mut dyn HubObserver,
}

impl std::fmt::Debug for Environment<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Environment").field("hub", &self.hub).finish_non_exhaustive()
    }
}
