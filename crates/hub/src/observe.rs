//! What the search for a model reports while it waits for networks and disks.

/// Something that happened while a model was looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum HubEvent<'a> {
    /// A place that may take long to answer is being asked.
    Asking {
        /// The place, as [`Attempt::place`](crate::Attempt::place) names it.
        place: &'a str,
    },
    /// Another process downloads the same model; this one waits for it.
    Waiting {
        /// The model's file or folder both want.
        what: &'a str,
    },
    /// Bytes arrived.
    Downloading {
        /// The file or package.
        what: &'a str,
        /// Bytes on this machine so far.
        bytes: u64,
        /// Bytes expected, where known.
        total_bytes: Option<u64>,
    },
    /// A hash is being compared.
    Checking {
        /// The file.
        what: &'a str,
    },
    /// A file is being taken out of a package.
    Unpacking {
        /// The file.
        what: &'a str,
    },
}

/// Receives [`HubEvent`]s; any `FnMut(&HubEvent)` is one, and `()` ignores them.
pub trait HubObserver {
    /// Takes one event.
    fn event(&mut self, event: &HubEvent<'_>);
}

impl HubObserver for () {
    fn event(&mut self, _event: &HubEvent<'_>) {}
}

impl<F: FnMut(&HubEvent<'_>)> HubObserver for F {
    fn event(&mut self, event: &HubEvent<'_>) {
        self(event);
    }
}
