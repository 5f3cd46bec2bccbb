//! Repositories fetched by the real client from a hub that runs inside the test.

#![expect(clippy::unwrap_used, reason = "a test may fail anywhere")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use retune_hub::{HubEnvironment, HubError, Kind, Network, find};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one repository, `org/model`, whose files it serves.
struct Hub {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

#[derive(Clone)]
struct Files {
    contents: BTreeMap<String, Vec<u8>>,
    /// The token without which it answers 401.
    token: Option<String>,
    /// Etag instead of the hash of the bytes.
    wrong_etag: bool,
}

impl Hub {
    fn start(files: Files) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &files, &log);
            }
        });
        Self { endpoint, requests }
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

fn answer(mut stream: TcpStream, files: &Files, log: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let headers: BTreeMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_owned())))
        .collect();
    log.lock().unwrap().push(path.clone());

    let expected = files.token.as_ref().map(|token| format!("Bearer {token}"));
    let (status, extra, body) =
        if expected.is_some() && headers.get("authorization") != expected.as_ref() {
            ("401 Unauthorized", String::new(), Vec::new())
        } else if path == "/api/models/org/model/revision/main" {
            let siblings: Vec<_> =
                files.contents.keys().map(|name| format!(r#"{{"rfilename":"{name}"}}"#)).collect();
            let body = format!(r#"{{"siblings":[{}],"sha":"{COMMIT}"}}"#, siblings.join(","));
            ("200 OK", String::new(), body.into_bytes())
        } else {
            let name = path.strip_prefix(&format!("/org/model/resolve/{COMMIT}/"));
            match name.and_then(|name| files.contents.get(name)) {
                Some(bytes) => part(bytes, headers.get("range"), files.wrong_etag),
                None => ("404 Not Found", String::new(), Vec::new()),
            }
        };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{extra}\r\n",
        body.len()
    );
    // The client may have gone; then nobody reads the answer.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
}

fn part(bytes: &[u8], range: Option<&String>, wrong_etag: bool) -> (&'static str, String, Vec<u8>) {
    let range = range.and_then(|range| range.strip_prefix("bytes=")).unwrap_or("0-");
    let (from, to) = range.split_once('-').unwrap();
    let from: usize = from.parse().unwrap();
    let to = to.parse().map_or(bytes.len(), |to: usize| to + 1).min(bytes.len());
    let etag = if wrong_etag { "0".repeat(64) } else { sha256(bytes) };
    let extra = format!(
        "Content-Range: bytes {from}-{}/{}\r\nETag: \"{etag}\"\r\nx-repo-commit: {COMMIT}\r\n",
        to.saturating_sub(1),
        bytes.len()
    );
    ("206 Partial Content", extra, bytes[from..to].to_vec())
}

fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

fn files(names: &[(&str, &[u8])]) -> Files {
    let contents = names.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
    Files { contents, token: None, wrong_etag: false }
}

fn environment(root: &Path, hub: &Hub) -> HubEnvironment {
    HubEnvironment {
        folder: root.to_owned(),
        home: None,
        cache: root.join("cache"),
        hf_cache: root.join("hf"),
        hf_endpoint: hub.endpoint.clone(),
        hf_token: None,
        hf_offline: false,
    }
}

const MODEL: &[(&str, &[u8])] = &[
    (".gitattributes", b"*"),
    ("README.md", b"# model"),
    ("config.json", b"{\"a\": 1}"),
    ("model.safetensors", b"weights"),
    ("onnx/model.onnx", b"other weights"),
    ("pytorch_model.bin", b"pickle"),
    ("tokenizer.json", b"{}"),
];

#[test]
fn a_repository_is_downloaded_once_and_only_what_a_model_needs() {
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::start(files(MODEL));
    let mut environment = environment(root.path(), &hub);
    let found = find("hf:org/model", &environment, &Network, &mut ()).unwrap();

    assert_eq!(found.kind(), Kind::Folder);
    assert_eq!(found.identity.revision.as_deref(), Some(COMMIT));
    assert_eq!(found.identity.sha256, Some(sha256(b"weights")));
    let folder = found.path().unwrap();
    assert!(folder.ends_with(format!("models--org--model/snapshots/{COMMIT}")));
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), b"weights");
    assert!(hub.requests().iter().all(|path| !path.contains("onnx") && !path.contains("pickle")));

    environment.hf_offline = true;
    let again = find("hf:org/model", &environment, &Network, &mut ()).unwrap();
    assert_eq!(again.path(), found.path());
    assert_eq!(hub.requests(), [""; 0]);
}

#[test]
fn shards_come_by_their_index() {
    let root = tempfile::tempdir().unwrap();
    let index = br#"{"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}"#;
    let hub = Hub::start(files(&[
        ("config.json", b"{}"),
        ("tokenizer.json", b"{}"),
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", b"one"),
        ("model-2.safetensors", b"two"),
    ]));
    let found = find("hf:org/model", &environment(root.path(), &hub), &Network, &mut ()).unwrap();
    let lines = format!(
        "{}  model-1.safetensors\n{}  model-2.safetensors\n",
        sha256(b"one"),
        sha256(b"two")
    );
    assert_eq!(found.identity.sha256, Some(sha256(lines.as_bytes())));
}

#[test]
fn one_gguf_file_is_taken_by_name() {
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::start(files(&[("a-q4.gguf", b"GGUF a"), ("b-q8.gguf", b"GGUF b")]));
    let environment = environment(root.path(), &hub);
    let error = find("hf:org/model", &environment, &Network, &mut ()).unwrap_err().to_string();
    assert!(error.contains("hf:ORG/NAME/a-q4.gguf"), "{error}");
    let found = find("hf:org/model/b-q8.gguf", &environment, &Network, &mut ()).unwrap();
    assert_eq!(found.kind(), Kind::Gguf);
    assert_eq!(std::fs::read(found.path().unwrap()).unwrap(), b"GGUF b");
}

#[test]
fn a_gated_repository_needs_the_token() {
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::start(Files { token: Some("hf_secret".into()), ..files(MODEL) });
    let mut environment = environment(root.path(), &hub);
    let error = find("hf:org/model", &environment, &Network, &mut ()).unwrap_err().to_string();
    assert!(error.contains("401") && error.contains("HF_TOKEN"), "{error}");
    environment.hf_token = Some("hf_secret".into());
    find("hf:org/model", &environment, &Network, &mut ()).unwrap();
}

#[test]
fn damaged_weights_are_refused_and_removed() {
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::start(Files { wrong_etag: true, ..files(MODEL) });
    let environment = environment(root.path(), &hub);
    let error = find("hf:org/model", &environment, &Network, &mut ()).unwrap_err();
    assert!(matches!(error, HubError::NotFound { .. }));
    assert!(error.to_string().contains("expected 00000000"), "{error}");
    let snapshot = environment.hf_cache.join("models--org--model/snapshots").join(COMMIT);
    assert!(!snapshot.join("config.json").exists());
}

#[test]
fn a_missing_repository_says_so() {
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::start(files(MODEL));
    let environment = environment(root.path(), &hub);
    let error = find("hf:org/none", &environment, &Network, &mut ()).unwrap_err().to_string();
    assert!(error.contains("404") && error.contains("no such repository"), "{error}");
}
