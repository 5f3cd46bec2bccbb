//! Repositories of the Hugging Face hub, kept in the cache its other tools share.
//!
//! A snapshot counts as cached when its branch has a commit and that commit's folder a whole
//! model. Both are arranged so that a killed download leaves neither: weights come last, and the
//! branch's commit is written after them.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::cache::Claim;
use crate::digest::{combine, file_sha256, is_sha256};
use crate::layout::{INDEX, ModelFiles, SINGLE, model_in, shard_names};
use crate::name::has_extension;
use crate::network::{Fetch, Unavailable};
use crate::{Attempt, HubEnvironment, HubError, HubEvent, HubObserver, RepositoryName};

/// How long the hub may take to answer at all.
const FIRST_ANSWER: Duration = Duration::from_secs(20);
/// How long a running download may stand still.
const SILENCE: Duration = Duration::from_mins(1);

/// Files next to the weights that a model or its tokenizer is read from.
const SMALL_FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
];
/// At least one of these is in a whole snapshot.
const TOKENIZERS: &[&str] =
    &["tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"];

/// A whole model in the hub cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// The commit's folder, or the `.gguf` file in it.
    pub(crate) path: PathBuf,
    pub(crate) is_gguf: bool,
    pub(crate) commit: String,
    /// Joint hash of the weights where the cache's blobs are named by it.
    pub(crate) sha256: Option<String>,
}

/// What came of asking for a repository.
pub(crate) enum RepositoryOutcome {
    Ready(Snapshot),
    Unavailable(Vec<Attempt>),
}

/// The folder of a repository in the hub cache.
pub(crate) fn cache_folder(name: &RepositoryName, environment: &HubEnvironment) -> PathBuf {
    environment.hf_cache.join(repo(name, &name.revision).folder_name())
}

/// Looks for a whole model in the hub cache; the error says what is missing.
pub(crate) fn cached(
    name: &RepositoryName,
    environment: &HubEnvironment,
) -> Result<Snapshot, String> {
    let folder = cache_folder(name, environment);
    if !folder.is_dir() {
        return Err("not there".to_owned());
    }
    let commit = if is_commit(&name.revision) {
        name.revision.clone()
    } else {
        let commit = std::fs::read_to_string(folder.join("refs").join(&name.revision))
            .map_err(|_| format!("no whole download of the revision `{}`", name.revision))?;
        let commit = commit.trim().to_owned();
        if !is_commit(&commit) {
            return Err(format!("refs/{} holds no commit", name.revision));
        }
        commit
    };
    snapshot(&folder.join("snapshots").join(&commit), name, commit)
}

fn snapshot(folder: &Path, name: &RepositoryName, commit: String) -> Result<Snapshot, String> {
    if let Some(file) = &name.file {
        let path = folder.join(file);
        if !path.is_file() {
            return Err(format!("{file} is not in the snapshot {commit}"));
        }
        let sha256 = blob_sha256(&path);
        return Ok(Snapshot { path, is_gguf: true, commit, sha256 });
    }
    if !folder.is_dir() {
        return Err(format!("the snapshot {commit} is not there"));
    }
    match model_in(folder).map_err(|missing| format!("incomplete: {}", missing.problem))? {
        ModelFiles::Gguf(file) => {
            let path = folder.join(file);
            let sha256 = blob_sha256(&path);
            Ok(Snapshot { path, is_gguf: true, commit, sha256 })
        }
        ModelFiles::Safetensors(names) => {
            if !TOKENIZERS.iter().any(|name| folder.join(name).is_file()) {
                return Err(format!("incomplete: none of {} is there", TOKENIZERS.join(", ")));
            }
            let hashes: Option<Vec<_>> = names
                .into_iter()
                .map(|name| blob_sha256(&folder.join(&name)).map(|hash| (name, hash)))
                .collect();
            Ok(Snapshot {
                path: folder.to_owned(),
                is_gguf: false,
                commit,
                sha256: hashes.map(combine),
            })
        }
    }
}

/// The hash a large file's blob is named by; a snapshot's files are links to blobs.
fn blob_sha256(path: &Path) -> Option<String> {
    let blob = std::fs::canonicalize(path).ok()?;
    let name = blob.file_name()?.to_str()?;
    is_sha256(name).then(|| name.to_owned())
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn repo(name: &RepositoryName, revision: &str) -> Repo {
    Repo::with_revision(name.id.clone(), RepoType::Model, revision.to_owned())
}

/// Brings a repository's model into the hub cache, unless another process does so first.
pub(crate) fn obtain(
    name: &RepositoryName,
    environment: &HubEnvironment,
    fetch: &dyn Fetch,
    observer: &mut dyn HubObserver,
) -> Result<RepositoryOutcome, HubError> {
    let lock = environment.cache.join("hub").join(repo(name, "main").folder_name());
    let _claim = Claim::take(&lock, observer)?;
    if let Ok(snapshot) = cached(name, environment) {
        return Ok(RepositoryOutcome::Ready(snapshot));
    }
    match fetch.repository(name, environment, observer) {
        Ok(folder) => {
            let commit = folder
                .file_name()
                .map(|commit| commit.to_string_lossy().into_owned())
                .unwrap_or_default();
            Ok(match snapshot(&folder, name, commit) {
                Ok(snapshot) => RepositoryOutcome::Ready(snapshot),
                Err(reason) => {
                    RepositoryOutcome::Unavailable(vec![Attempt::new(name.to_string(), reason)])
                }
            })
        }
        Err(unavailable) => Ok(RepositoryOutcome::Unavailable(unavailable.attempts)),
    }
}

/// What the downloading thread tells the waiting one.
enum Message {
    Begin { file: String, total_bytes: u64 },
    Bytes(u64),
    Done(Result<PathBuf, String>),
}

/// Downloads the model files of `name` and returns the snapshot's folder.
///
/// The work is done by a thread of its own because the hub's client has no time limits: when it
/// stays silent for too long, the thread is left behind and the place counts as unreachable.
pub(crate) fn download(
    name: &RepositoryName,
    environment: &HubEnvironment,
    observer: &mut dyn HubObserver,
) -> Result<PathBuf, Unavailable> {
    let place = format!("{name} at {}", environment.hf_endpoint);
    let refuse = |reason: String| Unavailable { attempts: vec![Attempt::new(&place, reason)] };
    let endpoint = &environment.hf_endpoint;
    if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
        return Err(refuse("HF_ENDPOINT must begin with https:// or http://".to_owned()));
    }
    let (sender, receiver) = channel();
    let (thread_name, thread_environment) = (name.clone(), environment.clone());
    std::thread::spawn(move || {
        let result = download_all(&thread_name, &thread_environment, &sender);
        // The receiver is gone when it has lost patience; nobody is left to tell.
        let _ = sender.send(Message::Done(result));
    });
    follow(&receiver, observer).map_err(refuse)
}

fn follow(receiver: &Receiver<Message>, observer: &mut dyn HubObserver) -> Result<PathBuf, String> {
    let mut patience = FIRST_ANSWER;
    let (mut what, mut bytes, mut total_bytes) = (String::new(), 0, 0);
    loop {
        match receiver.recv_timeout(patience) {
            Ok(Message::Done(result)) => return result,
            Ok(Message::Begin { file, total_bytes: total }) => {
                (what, bytes, total_bytes) = (file, 0, total);
            }
            Ok(Message::Bytes(count)) => bytes += count,
            Err(RecvTimeoutError::Timeout) => {
                return Err(format!("no answer for {} s", patience.as_secs()));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err("the hub's client failed on an answer it could not read".to_owned());
            }
        }
        patience = SILENCE;
        observer.event(&HubEvent::Downloading {
            what: &what,
            bytes,
            total_bytes: Some(total_bytes),
        });
    }
}

/// Passes the client's progress on.
struct Progress<'a>(&'a Sender<Message>);

impl hf_hub::api::Progress for Progress<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        let begin = Message::Begin { file: filename.to_owned(), total_bytes: size as u64 };
        let _ = self.0.send(begin);
    }

    fn update(&mut self, size: usize) {
        let _ = self.0.send(Message::Bytes(size as u64));
    }

    fn finish(&mut self) {}
}

fn download_all(
    name: &RepositoryName,
    environment: &HubEnvironment,
    sender: &Sender<Message>,
) -> Result<PathBuf, String> {
    let cache = Cache::new(environment.hf_cache.clone());
    let api = ApiBuilder::from_cache(cache.clone())
        .with_endpoint(environment.hf_endpoint.clone())
        .with_token(environment.hf_token.clone())
        .with_progress(false)
        .build()
        .map_err(|error| error.to_string())?;
    let info = api.repo(repo(name, &name.revision)).info().map_err(|error| explain(&error))?;
    if !is_commit(&info.sha) {
        return Err(format!("the hub names `{}` as the commit of {name}", info.sha));
    }
    let files: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    // Every file from one commit, whatever happens to the branch meanwhile.
    let pinned = repo(name, &info.sha);
    let snapshot = cache.repo(pinned.clone()).pointer_path(&info.sha);
    let source = Source { api: api.repo(pinned), snapshot: &snapshot, sender };

    if let Some(file) = &name.file {
        source.get(file)?;
    } else {
        for file in SMALL_FILES.iter().filter(|file| files.iter().any(|have| have == *file)) {
            source.get(file)?;
        }
        for file in weight_files(&files, |index| {
            let path = source.get(index)?;
            std::fs::read_to_string(&path).map_err(|error| format!("{index}: {error}"))
        })? {
            source.get(&file)?;
        }
    }
    if name.revision != info.sha {
        cache
            .repo(repo(name, &name.revision))
            .create_ref(&info.sha)
            .map_err(|error| format!("cannot write refs/{}: {error}", name.revision))?;
    }
    Ok(snapshot)
}

/// Chooses the weight files among a repository's `files`.
fn weight_files(
    files: &[String],
    read_index: impl FnOnce(&str) -> Result<String, String>,
) -> Result<Vec<String>, String> {
    let has = |name: &str| files.iter().any(|file| file == name);
    if has(INDEX) {
        return shard_names(&read_index(INDEX)?);
    }
    if has(SINGLE) {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let ggufs: Vec<&String> = files.iter().filter(|file| has_extension(file, "gguf")).collect();
    match ggufs.as_slice() {
        [only] => Ok(vec![(*only).clone()]),
        [] => Err("the repository has no safetensors and no GGUF weights".to_owned()),
        several => Err(format!(
            "the repository holds {} .gguf files; name one, such as hf:ORG/NAME/{}",
            several.len(),
            several[0]
        )),
    }
}

/// One commit of a repository, read into its snapshot folder.
struct Source<'a> {
    api: ApiRepo,
    snapshot: &'a Path,
    sender: &'a Sender<Message>,
}

impl Source<'_> {
    fn get(&self, file: &str) -> Result<PathBuf, String> {
        let path = self.snapshot.join(file);
        if path.is_file() {
            return Ok(path);
        }
        let path = self
            .api
            .download_with_progress(file, Progress(self.sender))
            .map_err(|error| format!("{file}: {}", explain(&error)))?;
        if let Some(expected) = blob_sha256(&path) {
            let got = file_sha256(&path).map_err(|error| error.to_string())?;
            if got != expected {
                for path in [std::fs::canonicalize(&path).ok(), Some(path)].into_iter().flatten() {
                    let _ = std::fs::remove_file(path);
                }
                return Err(format!(
                    "{file} came with sha256 {got}, expected {expected}; it was removed"
                ));
            }
        }
        Ok(path)
    }
}

fn explain(error: &ApiError) -> String {
    let text = error.to_string();
    let hint = if text.contains("status: 401") || text.contains("status: 403") {
        ": it does not exist, or is private or gated (accept its terms on its page, then set HF_TOKEN)"
    } else if text.contains("status: 404") {
        ": no such repository, revision or file"
    } else {
        ""
    };
    format!("{text}{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(files: &[&str]) -> Result<Vec<String>, String> {
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        weight_files(&files, |_| Ok(r#"{"weight_map": {"a": "s.safetensors"}}"#.to_owned()))
    }

    #[test]
    fn weights_are_chosen_once() {
        assert_eq!(chosen(&["model.safetensors", "x.gguf"]).unwrap(), ["model.safetensors"]);
        assert_eq!(chosen(&[INDEX, "model.safetensors"]).unwrap(), ["s.safetensors"]);
        assert_eq!(chosen(&["only.gguf", "README.md"]).unwrap(), ["only.gguf"]);
        assert!(chosen(&["a.gguf", "b.gguf"]).unwrap_err().contains("hf:ORG/NAME/a.gguf"));
        assert!(chosen(&["pytorch_model.bin"]).unwrap_err().contains("no safetensors"));
    }
}
