//! retune's own cache: one folder per unpacked package, published whole.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use retune_files::atomic::{AtomicFolder, recover};

use crate::catalogue::Package;
use crate::{HubError, HubEvent, HubObserver};

/// The folder a package's files are kept in.
pub(crate) fn package_folder(cache: &Path, package: &Package) -> PathBuf {
    cache.join("models").join(format!("{}-{}", package.name, package.version))
}

/// Says why `folder` does not hold all of `package`; `None` when it does.
///
/// Compares presence and size. Folders appear by a rename after every hash was compared, so a
/// difference means that someone changed the folder since.
pub(crate) fn incomplete(folder: &Path, package: &Package) -> Option<String> {
    if !folder.exists() {
        return Some("not there".to_owned());
    }
    package.files.iter().find_map(|file| match std::fs::metadata(folder.join(file.name)) {
        Ok(found) if found.is_file() && found.len() == file.bytes => None,
        Ok(found) => Some(format!(
            "ignored: {} has {} bytes, expected {}",
            file.name,
            found.len(),
            file.bytes
        )),
        Err(_) => Some(format!("ignored: {} is missing", file.name)),
    })
}

/// Holds the right to fill one place of the cache; other processes wait until it is dropped.
///
/// The operating system releases it when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Claim {
    target: PathBuf,
    _lock: File,
}

impl Claim {
    /// Waits for the right to fill `target` and clears what a killed process left beside it.
    pub(crate) fn take(target: &Path, observer: &mut dyn HubObserver) -> Result<Self, HubError> {
        let parent = target.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).map_err(HubError::io("create the folder", parent))?;
        let mut name = std::ffi::OsString::from(".");
        name.push(target.file_name().unwrap_or_default());
        name.push(".lock");
        let lock_path = target.with_file_name(name);
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(HubError::io("write", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                observer.event(&HubEvent::Waiting { what: &target.display().to_string() });
                lock.lock().map_err(HubError::io("lock", &lock_path))?;
            }
            Err(TryLockError::Error(error)) => {
                return Err(HubError::io("lock", &lock_path)(error));
            }
        }
        // The pip of a killed process may still be writing there; then a later call clears it.
        let _ = recover(target);
        Ok(Self { target: target.to_owned(), _lock: lock })
    }

    /// A folder to fill, which then stands at the target in one step.
    pub(crate) fn folder(&self) -> Result<AtomicFolder, HubError> {
        Ok(AtomicFolder::create(&self.target)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_clears_what_a_killed_process_left() {
        let cache = tempfile::tempdir().unwrap();
        let target = cache.path().join("models/m-1");
        let leftover = cache.path().join("models/.m-1.4711-0.partial/half");
        std::fs::create_dir_all(leftover.parent().unwrap()).unwrap();
        std::fs::write(&leftover, "half").unwrap();

        let claim = Claim::take(&target, &mut ()).unwrap();
        assert!(!leftover.exists());
        let folder = claim.folder().unwrap();
        std::fs::write(folder.path().join("w"), "whole").unwrap();
        assert!(!target.exists());
        folder.replace().unwrap();
        assert_eq!(std::fs::read_to_string(target.join("w")).unwrap(), "whole");
    }

    #[test]
    fn a_second_claim_waits_for_the_first() {
        let cache = tempfile::tempdir().unwrap();
        let target = cache.path().join("m-1");
        let first = Claim::take(&target, &mut ()).unwrap();
        let (waiting, waits) = std::sync::mpsc::channel();
        let (done, is_done) = std::sync::mpsc::channel();
        let thread = std::thread::spawn({
            let target = target.clone();
            move || {
                let mut observer = |event: &HubEvent<'_>| {
                    assert!(matches!(event, HubEvent::Waiting { .. }));
                    waiting.send(()).unwrap();
                };
                let claim = Claim::take(&target, &mut observer).unwrap();
                done.send(()).unwrap();
                drop(claim);
            }
        });
        waits.recv().unwrap();
        assert!(is_done.try_recv().is_err());
        drop(first);
        is_done.recv().unwrap();
        thread.join().unwrap();
    }
}
