//! What the search needs to know of the machine, handed in by the program.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::HubError;

/// Where models are kept on this machine and how the hub is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct HubEnvironment {
    /// Relative names are looked up here.
    pub folder: PathBuf,
    /// `~/…` stands for this folder.
    pub home: Option<PathBuf>,
    /// retune's own cache.
    pub cache: PathBuf,
    /// The hub cache Hugging Face tools share.
    pub hf_cache: PathBuf,
    /// Base address of the hub.
    pub hf_endpoint: String,
    /// Access token for gated and private repositories.
    pub hf_token: Option<String>,
    /// Whether the hub must not be asked.
    pub hf_offline: bool,
}

impl HubEnvironment {
    /// Reads the environment through `variable`, which a program passes as `std::env::var_os`.
    ///
    /// | variable | decides |
    /// |---|---|
    /// | `RETUNE_CACHE`, else `XDG_CACHE_HOME/retune`, else `~/.cache/retune` | retune's cache |
    /// | `HF_HUB_CACHE`, else `HF_HOME/hub`, else `XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub` | the hub's cache |
    /// | `HF_ENDPOINT` | the hub's address |
    /// | `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else `HF_HOME/token` | the access token |
    /// | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` set to 1, on, yes or true | the hub is not asked |
    ///
    /// # Errors
    /// [`HubError::NoCacheFolder`] if none of the variables names a place for the cache.
    pub fn from_variables(
        folder: impl Into<PathBuf>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, HubError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| set(name).map(PathBuf::from);
        let text = |name: &str| {
            set(name)
                .map(|value| value.to_string_lossy().trim().to_owned())
                .filter(|v| !v.is_empty())
        };
        let on = |name: &str| {
            text(name).is_some_and(|value| {
                matches!(value.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true")
            })
        };

        let home = path("HOME").or_else(|| path("USERPROFILE"));
        let caches =
            path("XDG_CACHE_HOME").or_else(|| home.as_ref().map(|home| home.join(".cache")));
        let cache = path("RETUNE_CACHE")
            .or_else(|| caches.as_ref().map(|caches| caches.join("retune")))
            .ok_or(HubError::NoCacheFolder)?;
        let hf_home = path("HF_HOME")
            .or_else(|| caches.as_ref().map(|caches| caches.join("huggingface")))
            .unwrap_or_else(|| cache.join("huggingface"));
        let hf_cache = path("HF_HUB_CACHE").unwrap_or_else(|| hf_home.join("hub"));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token"));
        let folder = folder.into();
        let absolute = |path: PathBuf| if path.is_absolute() { path } else { folder.join(path) };
        Ok(Self {
            cache: absolute(cache),
            hf_cache: absolute(hf_cache),
            hf_endpoint: text("HF_ENDPOINT").map_or_else(
                || DEFAULT_ENDPOINT.to_owned(),
                |e| e.trim_end_matches('/').to_owned(),
            ),
            hf_token: text("HF_TOKEN").or_else(|| read_token(&absolute(token_file))),
            hf_offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
            home,
            folder,
        })
    }

    /// The file or folder a name stands for, were it a path.
    pub(crate) fn local_path(&self, name: &str) -> PathBuf {
        match (name.strip_prefix("~/"), &self.home) {
            (Some(rest), Some(home)) => home.join(rest),
            _ => self.folder.join(name),
        }
    }
}

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

fn read_token(file: &Path) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    Some(text.trim().to_owned()).filter(|token| !token.is_empty())
}

impl std::fmt::Debug for HubEnvironment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubEnvironment")
            .field("folder", &self.folder)
            .field("home", &self.home)
            .field("cache", &self.cache)
            .field("hf_cache", &self.hf_cache)
            .field("hf_endpoint", &self.hf_endpoint)
            .field("hf_token", &self.hf_token.as_ref().map(|_| "(set)"))
            .field("hf_offline", &self.hf_offline)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(pairs: &[(&str, &str)]) -> Result<HubEnvironment, HubError> {
        let pairs: Vec<_> =
            pairs.iter().map(|(k, v)| ((*k).to_owned(), OsString::from(v))).collect();
        HubEnvironment::from_variables("/here", move |name| {
            pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
        })
    }

    #[test]
    fn home_alone_gives_the_usual_places() {
        let environment = from(&[("HOME", "/home/p")]).unwrap();
        assert_eq!(environment.cache, Path::new("/home/p/.cache/retune"));
        assert_eq!(environment.hf_cache, Path::new("/home/p/.cache/huggingface/hub"));
        assert_eq!(environment.hf_endpoint, "https://huggingface.co");
        assert!(!environment.hf_offline);
        assert_eq!(environment.hf_token, None);
    }

    #[test]
    fn every_variable_is_honoured() {
        let environment = from(&[
            ("HOME", "/home/p"),
            ("XDG_CACHE_HOME", "/xdg"),
            ("RETUNE_CACHE", "models"),
            ("HF_HOME", "/hf"),
            ("HF_ENDPOINT", "http://mirror:8080/"),
            ("HF_TOKEN", " hf_secret\n"),
            ("HF_HUB_OFFLINE", "Yes"),
        ])
        .unwrap();
        assert_eq!(environment.cache, Path::new("/here/models"));
        assert_eq!(environment.hf_cache, Path::new("/hf/hub"));
        assert_eq!(environment.hf_endpoint, "http://mirror:8080");
        assert_eq!(environment.hf_token.as_deref(), Some("hf_secret"));
        assert!(environment.hf_offline);
        assert!(!format!("{environment:?}").contains("hf_secret"));
    }

    #[test]
    fn empty_and_false_values_count_as_unset() {
        let environment = from(&[
            ("HOME", "/h"),
            ("RETUNE_CACHE", ""),
            ("HF_HUB_OFFLINE", "0"),
            ("HF_TOKEN", " "),
        ])
        .unwrap();
        assert_eq!(environment.cache, Path::new("/h/.cache/retune"));
        assert!(!environment.hf_offline);
        assert_eq!(environment.hf_token, None);
    }

    #[test]
    fn no_place_for_a_cache_is_an_error() {
        assert!(matches!(from(&[]), Err(HubError::NoCacheFolder)));
    }

    #[test]
    fn the_token_file_is_read() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        let home = folder.path().to_str().unwrap();
        let environment = from(&[("HOME", "/h"), ("HF_HOME", home)]).unwrap();
        assert_eq!(environment.hf_token.as_deref(), Some("hf_file"));
    }

    #[test]
    fn a_tilde_is_the_home_folder() {
        let environment = from(&[("HOME", "/home/p")]).unwrap();
        assert_eq!(environment.local_path("~/m"), Path::new("/home/p/m"));
        assert_eq!(environment.local_path("m"), Path::new("/here/m"));
        assert_eq!(environment.local_path("/m"), Path::new("/m"));
    }
}
