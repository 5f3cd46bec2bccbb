//! Files and folders that appear whole or not at all.
//!
//! Content is written beside its target under a hidden name, flushed to the disk, and renamed. A
//! reader therefore sees the old content or the new, never a part, also after a power cut; and a
//! full disk costs the new content only.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Why something could not be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// No space left, or a quota is used up.
    DiskFull,
    /// The file system is mounted read-only.
    ReadOnly,
    /// The user may not write there.
    PermissionDenied,
    /// The folder that should hold the target does not exist.
    FolderMissing,
    /// Something of that name exists and was not to be replaced.
    TargetExists,
    /// Any other error of the system.
    Other,
}

impl Cause {
    fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => Self::DiskFull,
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly,
            io::ErrorKind::PermissionDenied => Self::PermissionDenied,
            io::ErrorKind::NotFound => Self::FolderMissing,
            io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => Self::TargetExists,
            _ => Self::Other,
        }
    }

    const fn hint(self) -> &'static str {
        match self {
            Self::DiskFull => "free some space or choose another disk, then try again",
            Self::ReadOnly => "choose a folder on a writable file system",
            Self::PermissionDenied => "choose a folder you may write to, or change its permissions",
            Self::FolderMissing => "create the folder first",
            Self::TargetExists => "remove it or choose another name",
            Self::Other => "see the system's message",
        }
    }
}

/// What a reader finds at the target after a failed write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preserved {
    /// What was there before, unchanged.
    Previous,
    /// Nothing: there was nothing before, and nothing was published.
    Nothing,
    /// The new content, whole, but perhaps lost if the power fails now.
    Published,
    /// Nothing; the previous folder stands beside it under a hidden name, and [`recover`] puts it
    /// back.
    Aside,
}

impl std::fmt::Display for Preserved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Previous => "what was there before is unchanged",
            Self::Nothing => "nothing was published there",
            Self::Published => "the new content is in place, but may be lost if the power fails",
            Self::Aside => "what was there before is kept beside it under a hidden name",
        })
    }
}

/// A write that failed: where, why, and what is still there.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}; {preserved}; {}", path.display(), cause.hint())]
pub struct WriteError {
    /// The target, as the caller named it.
    pub path: PathBuf,
    /// What was being done.
    pub action: &'static str,
    /// Why it failed.
    pub cause: Cause,
    /// What a reader finds at `path` now.
    pub preserved: Preserved,
    /// The system's error.
    pub source: io::Error,
}

/// A target and the hidden sibling its content is written to first.
#[derive(Debug)]
struct Staged {
    target: PathBuf,
    temp: PathBuf,
    before: Preserved,
    published: bool,
    /// Whether unfinished content stays for a later run.
    kept: bool,
}

impl Staged {
    /// Creates the sibling with `create`, under the first free name.
    fn new<T>(
        target: &Path,
        create: impl Fn(&Path) -> io::Result<T>,
    ) -> Result<(Self, T), WriteError> {
        let exists = fs::symlink_metadata(target).is_ok();
        let before = if exists { Preserved::Previous } else { Preserved::Nothing };
        let mut staged = Self {
            target: target.to_path_buf(),
            temp: PathBuf::new(),
            before,
            published: true,
            kept: false,
        };
        loop {
            staged.temp = sibling(target, PARTIAL).map_err(|e| staged.error("write", e))?;
            match create(&staged.temp) {
                Ok(made) => {
                    staged.published = false;
                    return Ok((staged, made));
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(staged.error("write", e)),
            }
        }
    }

    fn error(&self, action: &'static str, source: io::Error) -> WriteError {
        let cause = Cause::of(&source);
        WriteError { path: self.target.clone(), action, cause, preserved: self.before, source }
    }

    /// Marks the content as published and flushes the folder that holds its name.
    fn published(&mut self) -> Result<(), WriteError> {
        self.published = true;
        self.before = Preserved::Published;
        sync_folder(parent(&self.target)).map_err(|e| self.error("flush the folder of", e))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.published && !self.kept {
            // Nothing more can be done if this fails; `recover` removes it later.
            let _ = remove(&self.temp);
        }
    }
}

/// A file being written that replaces its target in one step on [`AtomicFile::commit`].
///
/// Dropped without a commit, it leaves the target as it was.
/// # Examples
/// ```
/// # use std::io::Write;
/// # use retune_files::atomic::AtomicFile;
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("report.md");
/// let mut file = AtomicFile::create(&path)?;
/// file.write_all(b"# Report\n")?;
/// assert!(!path.exists());
/// file.commit()?;
/// assert_eq!(std::fs::read(&path)?, b"# Report\n");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    staged: Staged,
}

impl AtomicFile {
    /// Starts a file that will stand at `target`.
    ///
    /// # Errors
    /// [`WriteError`] if a file cannot be created in the target's folder.
    pub fn create(target: &Path) -> Result<Self, WriteError> {
        let create = |temp: &Path| OpenOptions::new().write(true).create_new(true).open(temp);
        let (staged, file) = Staged::new(target, create)?;
        Ok(Self { file, staged })
    }

    /// Makes the file `bytes` long, filling with zeros.
    ///
    /// # Errors
    /// The system's error; [`Self::error`] says what is preserved.
    pub fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    /// Turns an error of writing into one that says what is preserved.
    pub fn error(&self, source: io::Error) -> WriteError {
        self.staged.error("write", source)
    }

    /// Flushes the content to the disk and puts it in the target's place.
    ///
    /// # Errors
    /// [`WriteError`]; the target is as before, unless `preserved` says otherwise.
    pub fn commit(self) -> Result<(), WriteError> {
        let Self { file, mut staged } = self;
        file.sync_all().map_err(|e| staged.error("flush", e))?;
        // Windows refuses to rename an open file.
        drop(file);
        fs::rename(&staged.temp, &staged.target).map_err(|e| staged.error("publish", e))?;
        staged.published()
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Writes a whole file in one step.
///
/// # Errors
/// [`WriteError`]; the target is as before, unless `preserved` says otherwise.
pub fn write_file(target: &Path, content: &[u8]) -> Result<(), WriteError> {
    let mut file = AtomicFile::create(target)?;
    file.write_all(content).map_err(|e| file.error(e))?;
    file.commit()
}

/// A folder being filled that appears under its target's name in one step.
///
/// Dropped without a commit, it leaves the target as it was.
#[derive(Debug)]
pub struct AtomicFolder {
    staged: Staged,
}

impl AtomicFolder {
    /// Starts a folder that will stand at `target`; fill [`Self::path`].
    ///
    /// # Errors
    /// [`WriteError`] if no folder can be created beside the target.
    pub fn create(target: &Path) -> Result<Self, WriteError> {
        let (staged, ()) = Staged::new(target, |temp| fs::create_dir(temp))?;
        Ok(Self { staged })
    }

    /// Starts or goes on with a folder that will stand at `target` and is kept when dropped.
    ///
    /// It has the hidden name `.<name>.<label>` beside the target, the same on every run, so that
    /// long work survives an interruption. Whoever fills it must tell finished content from
    /// unfinished, and keep two processes out of one folder.
    ///
    /// # Errors
    /// [`WriteError`] if no folder can be made beside the target.
    pub fn resume(target: &Path, label: &str) -> Result<Self, WriteError> {
        let exists = fs::symlink_metadata(target).is_ok();
        let mut staged = Staged {
            target: target.to_path_buf(),
            temp: PathBuf::new(),
            before: if exists { Preserved::Previous } else { Preserved::Nothing },
            published: true,
            kept: true,
        };
        staged.temp = hidden(target, label).map_err(|e| staged.error("write", e))?;
        match fs::create_dir(&staged.temp) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(staged.error("write", e)),
            _ => {
                staged.published = false;
                Ok(Self { staged })
            }
        }
    }

    /// Returns the hidden folder to write the content into.
    pub fn path(&self) -> &Path {
        &self.staged.temp
    }

    /// Turns an error of writing into one that says what is preserved.
    pub fn error(&self, source: io::Error) -> WriteError {
        self.staged.error("write", source)
    }

    /// Flushes everything and publishes the folder under a name that is still free.
    ///
    /// # Errors
    /// [`WriteError`], with [`Cause::TargetExists`] if the name is taken.
    pub fn commit(mut self) -> Result<(), WriteError> {
        self.sync()?;
        if fs::symlink_metadata(&self.staged.target).is_ok() {
            self.staged.before = Preserved::Previous;
            let taken = io::Error::from(io::ErrorKind::AlreadyExists);
            return Err(self.staged.error("publish", taken));
        }
        self.rename()
    }

    /// Flushes everything and publishes the folder in place of what has that name, if anything.
    ///
    /// On Linux and Apple systems the two change places in one step. Elsewhere, and on file systems
    /// that cannot, the old one is first moved aside: a crash between the two renames leaves
    /// neither under the name, and [`recover`] puts the old one back.
    ///
    /// # Errors
    /// [`WriteError`]; `preserved` says what stands at the target.
    pub fn replace(mut self) -> Result<(), WriteError> {
        self.sync()?;
        if fs::symlink_metadata(&self.staged.target).is_err() {
            return self.rename();
        }
        match exchange(&self.staged.temp, &self.staged.target) {
            Ok(()) => {
                self.staged.published()?;
                remove(&self.staged.temp).map_err(|e| self.staged.error("remove the old", e))
            }
            Err(e) if cannot_exchange(&e) => self.replace_by_two_renames(),
            Err(e) => Err(self.staged.error("publish", e)),
        }
    }

    fn replace_by_two_renames(mut self) -> Result<(), WriteError> {
        let aside = sibling(&self.staged.target, PREVIOUS)
            .and_then(|aside| fs::rename(&self.staged.target, &aside).map(|()| aside))
            .map_err(|e| self.staged.error("move aside the old", e))?;
        if let Err(e) = fs::rename(&self.staged.temp, &self.staged.target) {
            if fs::rename(&aside, &self.staged.target).is_err() {
                self.staged.before = Preserved::Aside;
            }
            return Err(self.staged.error("publish", e));
        }
        self.staged.published()?;
        remove(&aside).map_err(|e| self.staged.error("remove the old", e))
    }

    fn sync(&self) -> Result<(), WriteError> {
        sync_tree(&self.staged.temp).map_err(|e| self.staged.error("flush", e))
    }

    fn rename(mut self) -> Result<(), WriteError> {
        fs::rename(&self.staged.temp, &self.staged.target)
            .map_err(|e| self.staged.error("publish", e))?;
        self.staged.published()
    }
}

/// What [`recover`] found beside a target and mended.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Unfinished content that was removed.
    pub removed: Vec<PathBuf>,
    /// The previous folder, put back under the target's name.
    pub restored: bool,
}

/// Mends what a crash left beside `target`: removes unfinished content, and puts back a folder that
/// was moved aside when nothing stands in its place.
///
/// Only for a target that no other process is writing, or its work in progress is removed too.
///
/// # Errors
/// [`WriteError`] if the folder cannot be read or changed.
pub fn recover(target: &Path) -> Result<Recovered, WriteError> {
    let exists = || fs::symlink_metadata(target).is_ok();
    let error = |e: io::Error| {
        let preserved = if exists() { Preserved::Previous } else { Preserved::Nothing };
        let cause = Cause::of(&e);
        let path = target.to_path_buf();
        WriteError { path, action: "clean up beside", cause, preserved, source: e }
    };
    let mut leftovers = Vec::new();
    for entry in fs::read_dir(parent(target)).map_err(error)? {
        let name = entry.map_err(error)?.file_name();
        if let Some(ending) = ending_of_sibling(target, &name) {
            leftovers.push((ending, parent(target).join(name)));
        }
    }
    leftovers.sort();
    let mut recovered = Recovered::default();
    for (ending, path) in leftovers {
        if ending == PREVIOUS && !exists() {
            fs::rename(&path, target).map_err(error)?;
            recovered.restored = true;
        } else {
            remove(&path).map_err(error)?;
            recovered.removed.push(path);
        }
    }
    sync_folder(parent(target)).map_err(error)?;
    Ok(recovered)
}

const PARTIAL: &str = "partial";
const PREVIOUS: &str = "previous";

/// Names the next hidden sibling: `.<name>.<process>-<count>.<ending>`.
///
/// The process number keeps two programs apart, the count two writers of one program.
fn sibling(target: &Path, ending: &str) -> io::Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    hidden(target, &format!("{}-{count}.{ending}", std::process::id()))
}

/// Names a hidden sibling: `.<name>.<ending>`.
fn hidden(target: &Path, ending: &str) -> io::Result<PathBuf> {
    let name = target.file_name().ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "the path does not end in a name")
    })?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".");
    hidden.push(ending);
    Ok(parent(target).join(hidden))
}

/// Tells whether `name` is a hidden sibling of `target`, and of which kind.
fn ending_of_sibling(target: &Path, name: &OsStr) -> Option<&'static str> {
    let own = target.file_name()?.as_encoded_bytes();
    let rest = name.as_encoded_bytes().strip_prefix(b".")?.strip_prefix(own)?.strip_prefix(b".")?;
    let (numbers, ending) = std::str::from_utf8(rest).ok()?.split_once('.')?;
    let (process, count) = numbers.split_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let known = [PARTIAL, PREVIOUS].into_iter().find(|known| *known == ending)?;
    (digits(process) && digits(count)).then_some(known)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
}

fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            // Windows flushes only through a handle that may write.
            OpenOptions::new().read(true).write(cfg!(windows)).open(entry.path())?.sync_all()?;
        }
    }
    sync_folder(folder)
}

#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Other systems offer no handle through which a folder could be flushed.
#[cfg(not(unix))]
#[expect(clippy::unnecessary_wraps, reason = "the signature is shared with Unix")]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(any(target_os = "linux", target_vendor = "apple"))]
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// File systems without an exchange answer `EINVAL`; kernels without it `ENOSYS`.
fn cannot_exchange(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fallback_replaces_too() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("checkpoint");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("old"), "old").unwrap();
        let folder = AtomicFolder::create(&target).unwrap();
        fs::write(folder.path().join("new"), "new").unwrap();
        folder.replace_by_two_renames().unwrap();
        assert!(target.join("new").exists() && !target.join("old").exists());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_own_siblings_are_recognised() {
        let target = Path::new("/runs/step-3");
        let of = |name: &str| ending_of_sibling(target, OsStr::new(name));
        assert_eq!(of(".step-3.12-0.partial"), Some(PARTIAL));
        assert_eq!(of(".step-3.12-0.previous"), Some(PREVIOUS));
        for other in [
            "step-3",
            ".step-3",
            ".step-3.partial",
            ".step-3.12.partial",
            ".step-3.12-x.partial",
            ".step-3.12-0.txt",
            ".step-33.12-0.partial",
            ".step-3.x.12-0.partial",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn the_systems_errors_are_told_apart() {
        let cause = |number| Cause::of(&io::Error::from_raw_os_error(number));
        // Linux and macOS agree on these numbers.
        #[cfg(unix)]
        assert_eq!(
            [28, 27, 30, 13, 2, 17].map(cause),
            [
                Cause::DiskFull,
                Cause::DiskFull,
                Cause::ReadOnly,
                Cause::PermissionDenied,
                Cause::FolderMissing,
                Cause::TargetExists
            ]
        );
    }
}
