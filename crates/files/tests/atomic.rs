//! Files and folders that appear whole or not at all.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests do")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use retune_files::atomic::{AtomicFile, AtomicFolder, Cause, Preserved, recover, write_file};

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_file_replaces_the_old_one_on_commit_only() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x");
    write_file(&path, b"old").unwrap();
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    file.commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(names(home.path()), ["x"]);
}

#[test]
fn a_file_given_up_leaves_no_trace() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x");
    write_file(&path, b"old").unwrap();
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(b"new").unwrap();
    drop(file);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(home.path()), ["x"]);
}

#[test]
fn two_writers_of_one_target_do_not_mix() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x");
    let mut first = AtomicFile::create(&path).unwrap();
    let mut second = AtomicFile::create(&path).unwrap();
    first.write_all(b"first").unwrap();
    second.write_all(b"second").unwrap();
    first.commit().unwrap();
    second.commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"second");
    assert_eq!(names(home.path()), ["x"]);
}

#[test]
fn a_missing_folder_is_named_with_what_is_there() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("no/such/x");
    let error = write_file(&path, b"new").unwrap_err();
    assert_eq!((error.cause, error.preserved), (Cause::FolderMissing, Preserved::Nothing));
    assert_eq!(error.path, path);
    let message = error.to_string();
    assert!(message.contains("nothing was published there; create the folder first"), "{message}");
    assert!(write_file(Path::new("/"), b"").is_err());
}

#[cfg(target_os = "linux")]
#[test]
fn a_place_that_refuses_writing_is_an_error_of_its_own() {
    let error = write_file(Path::new("/sys/x"), b"new").unwrap_err();
    assert!(matches!(error.cause, Cause::PermissionDenied | Cause::ReadOnly), "{error}");
}

fn folder_with(target: &Path, name: &str) -> AtomicFolder {
    let folder = AtomicFolder::create(target).unwrap();
    fs::create_dir(folder.path().join("inner")).unwrap();
    fs::write(folder.path().join("inner").join(name), name).unwrap();
    folder
}

#[test]
fn a_folder_appears_whole_on_commit() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("step-1");
    let folder = folder_with(&target, "a");
    assert!(!target.exists());
    folder.commit().unwrap();
    assert_eq!(fs::read(target.join("inner/a")).unwrap(), b"a");
    assert_eq!(names(home.path()), ["step-1"]);
}

#[test]
fn commit_keeps_a_folder_that_is_there_and_replace_does_not() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("step-1");
    folder_with(&target, "a").commit().unwrap();
    let error = folder_with(&target, "b").commit().unwrap_err();
    assert_eq!((error.cause, error.preserved), (Cause::TargetExists, Preserved::Previous));
    assert_eq!(names(&target.join("inner")), ["a"]);
    folder_with(&target, "b").replace().unwrap();
    assert_eq!(names(&target.join("inner")), ["b"]);
    assert_eq!(names(home.path()), ["step-1"]);
}

#[test]
fn a_folder_given_up_leaves_no_trace() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("step-1");
    drop(folder_with(&target, "a"));
    assert!(names(home.path()).is_empty());
}

#[test]
fn a_resumable_folder_is_kept_until_it_is_published() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("merged");
    let folder = AtomicFolder::resume(&target, "merging").unwrap();
    write_file(&folder.path().join("a"), b"a").unwrap();
    drop(folder);
    assert_eq!(names(home.path()), [".merged.merging"]);
    assert_eq!(recover(&target).unwrap().removed, [] as [PathBuf; 0]);
    let folder = AtomicFolder::resume(&target, "merging").unwrap();
    assert_eq!(names(folder.path()), ["a"]);
    folder.commit().unwrap();
    assert_eq!((names(home.path()), names(&target)), (vec!["merged".into()], vec!["a".into()]));
    // A folder in the way is kept, and so is the work.
    let folder = AtomicFolder::resume(&target, "merging").unwrap();
    write_file(&folder.path().join("b"), b"b").unwrap();
    assert_eq!(folder.commit().unwrap_err().cause, Cause::TargetExists);
    assert_eq!(names(&home.path().join(".merged.merging")), ["b"]);
    AtomicFolder::resume(&target, "merging").unwrap().replace().unwrap();
    assert_eq!((names(home.path()), names(&target)), (vec!["merged".into()], vec!["b".into()]));
}

/// What `kill -9` leaves: the value is never dropped.
fn crash(folder: AtomicFolder) -> PathBuf {
    let path = folder.path().to_path_buf();
    std::mem::forget(folder);
    path
}

#[test]
fn recovery_removes_unfinished_work_and_nothing_else() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("step-1");
    folder_with(&target, "a").commit().unwrap();
    write_file(&home.path().join(".step-1.notes"), b"mine").unwrap();
    let other = crash(folder_with(&home.path().join("step-2"), "b"));
    let partial = crash(folder_with(&target, "c"));
    let recovered = recover(&target).unwrap();
    assert_eq!(recovered.removed, [partial]);
    assert!(!recovered.restored);
    assert!(other.exists() && target.join("inner/a").exists());
    assert!(home.path().join(".step-1.notes").exists());
}

#[test]
fn recovery_puts_back_a_folder_that_was_moved_aside() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("step-1");
    folder_with(&target, "a").commit().unwrap();
    let partial = crash(folder_with(&target, "b"));
    // A crash between the two renames.
    fs::rename(&target, home.path().join(".step-1.7-0.previous")).unwrap();
    let recovered = recover(&target).unwrap();
    assert!(recovered.restored);
    assert_eq!(recovered.removed, [partial]);
    assert_eq!(fs::read(target.join("inner/a")).unwrap(), b"a");
}
