//! The outside world, behind one trait so that tests can stand in for it.

use std::path::{Path, PathBuf};

use crate::catalogue::Package;
use crate::{Attempt, HubEnvironment, HubObserver, RepositoryName, package, repository};

/// No way to get something worked; each way with its reason, in the order tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable {
    /// The ways.
    pub attempts: Vec<Attempt>,
}

/// Downloads packages and repositories.
pub trait Fetch {
    /// Downloads the archive of `package` somewhere into `folder` and returns its path.
    ///
    /// The caller compares its hash.
    ///
    /// # Errors
    /// [`Unavailable`] with every way that was tried.
    fn package(
        &self,
        package: &Package,
        folder: &Path,
        observer: &mut dyn HubObserver,
    ) -> Result<PathBuf, Unavailable>;

    /// Downloads a repository's model files into the hub cache and returns the snapshot's folder.
    ///
    /// # Errors
    /// [`Unavailable`] with every way that was tried.
    fn repository(
        &self,
        name: &RepositoryName,
        environment: &HubEnvironment,
        observer: &mut dyn HubObserver,
    ) -> Result<PathBuf, Unavailable>;
}

/// The real network: the machine's pip and the Hugging Face hub.
#[derive(Debug, Clone, Copy, Default)]
pub struct Network;

impl Fetch for Network {
    fn package(
        &self,
        package: &Package,
        folder: &Path,
        observer: &mut dyn HubObserver,
    ) -> Result<PathBuf, Unavailable> {
        package::pip_download(package, folder, observer)
    }

    fn repository(
        &self,
        name: &RepositoryName,
        environment: &HubEnvironment,
        observer: &mut dyn HubObserver,
    ) -> Result<PathBuf, Unavailable> {
        repository::download(name, environment, observer)
    }
}

/// No network: what is not on this machine is not to be had.
#[derive(Debug, Clone, Copy, Default)]
pub struct Offline;

impl Offline {
    fn refuse() -> Unavailable {
        let reason = "nothing is downloaded for this".to_owned();
        Unavailable { attempts: vec![Attempt { place: "the network".to_owned(), reason }] }
    }
}

impl Fetch for Offline {
    fn package(
        &self,
        _package: &Package,
        _folder: &Path,
        _observer: &mut dyn HubObserver,
    ) -> Result<PathBuf, Unavailable> {
        Err(Self::refuse())
    }

    fn repository(
        &self,
        _name: &RepositoryName,
        _environment: &HubEnvironment,
        _observer: &mut dyn HubObserver,
    ) -> Result<PathBuf, Unavailable> {
        Err(Self::refuse())
    }
}
