//! The streamed writer and the reader: what is whole, what is kept, what is refused.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests do")]

use std::fs;
use std::path::Path;

use retune_files::Dtype;
use retune_files::safetensors::TensorSpec;
use retune_merge::Error;
use retune_merge::source::Source;
use retune_merge::writer::{Existing, ModelWriter};

fn specs() -> Vec<TensorSpec> {
    vec![
        TensorSpec::new("a", Dtype::F32, [4]),
        TensorSpec::new("b\nc", Dtype::BF16, [2, 2]),
        TensorSpec::new("ids", Dtype::I32, [1]),
    ]
}

fn open(target: &Path, max_shard_bytes: u64, identity: &str) -> ModelWriter {
    ModelWriter::open(target, &specs(), max_shard_bytes, identity, Existing::Keep).unwrap()
}

fn write(writer: &ModelWriter, name: &str) {
    let mut tensor = writer.tensor(name).unwrap();
    match name {
        "a" => {
            tensor.push(&[1.0, 2.0]).unwrap();
            tensor.push(&[3.0, 4.0]).unwrap();
        }
        "ids" => tensor.push_bytes(&7i32.to_le_bytes()).unwrap(),
        _ => tensor.push(&[0.5, -0.5, 1.5, -1.5]).unwrap(),
    }
    tensor.finish().unwrap();
}

fn write_all(writer: &ModelWriter) {
    for name in ["a", "b\nc", "ids"] {
        write(writer, name);
    }
}

fn names(folder: &Path) -> Vec<String> {
    let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| name(e.unwrap())).collect();
    names.sort();
    names
}

fn check(target: &Path) {
    let source = Source::open(target).unwrap();
    assert_eq!(source.specs().collect::<Vec<_>>(), specs());
    assert_eq!(source.read_f32("a").unwrap(), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(source.read_f32("b\nc").unwrap(), [0.5, -0.5, 1.5, -1.5]);
    assert_eq!(source.tensor("ids").unwrap().to_i64().unwrap(), [7]);
}

#[test]
fn a_model_appears_when_every_tensor_is_there() {
    let home = tempfile::tempdir().unwrap();
    for max_shard_bytes in [1, u64::MAX] {
        let target = home.path().join(max_shard_bytes.to_string());
        let writer = open(&target, max_shard_bytes, "x");
        writer.file("config.json", b"{\"model_type\": \"llama\"}").unwrap();
        for name in ["ids", "b\nc", "a"] {
            assert!(!target.exists());
            write(&writer, name);
        }
        writer.publish().unwrap();
        check(&target);
        let config = Source::open(&target).unwrap().config().unwrap().unwrap();
        assert_eq!(config["model_type"], "llama");
        let sharded = names(&target).iter().any(|name| name == "model.safetensors.index.json");
        assert_eq!(sharded, max_shard_bytes == 1);
        assert!(!target.join("journal").exists());
    }
    assert_eq!(names(home.path()).len(), 2, "nothing hidden is left");
}

#[test]
fn work_goes_on_where_it_stopped() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("merged");
    let writer = open(&target, u64::MAX, "x");
    write(&writer, "a");
    write(&writer, "ids");
    let mut half = writer.tensor("b\nc").unwrap();
    half.push(&[0.5]).unwrap();
    drop(half);
    let message = writer.interrupted(Source::open(Path::new("/no")).unwrap_err()).to_string();
    assert!(message.contains("2 of 3 tensors are kept in"), "{message}");
    drop(writer);
    assert!(!target.exists());

    let writer = open(&target, u64::MAX, "x");
    assert_eq!(writer.resumed().iter().collect::<Vec<_>>(), ["a", "ids"]);
    write(&writer, "b\nc");
    writer.publish().unwrap();
    check(&target);
}

#[test]
fn torn_tensors_and_torn_lines_are_written_again() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("merged");
    let writer = open(&target, u64::MAX, "x");
    write_all(&writer);
    drop(writer);
    let hidden = home.path().join(".merged.merging");
    // `a` lies first, being the widest type of the lowest name: the power failed before its bytes
    // reached the disk.
    let weights = hidden.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let journal = fs::read_to_string(hidden.join("journal")).unwrap();
    fs::write(hidden.join("journal"), &journal[..journal.len() - 1]).unwrap();

    let writer = open(&target, u64::MAX, "x");
    assert_eq!(writer.resumed().iter().collect::<Vec<_>>(), ["b\nc"]);
    let message = ModelWriter::publish(writer).unwrap_err().to_string();
    assert!(message.contains("not written"), "{message}");
    let writer = open(&target, u64::MAX, "x");
    write(&writer, "a");
    write(&writer, "ids");
    writer.publish().unwrap();
    check(&target);
}

#[test]
fn other_work_starts_anew() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("merged");
    let writer = open(&target, 1, "x");
    write(&writer, "a");
    writer.file("tokenizer.json", b"{}").unwrap();
    drop(writer);
    for other in ["y", "x2"] {
        let writer = open(&target, u64::MAX, other);
        assert!(writer.resumed().is_empty());
        drop(writer);
        let found = names(&home.path().join(".merged.merging"));
        assert_eq!(found, ["journal", "model.safetensors"], "{other}");
    }
    fs::write(home.path().join(".merged.merging/journal"), [0xff, 0xfe]).unwrap();
    assert!(open(&target, u64::MAX, "y").resumed().is_empty());
}

#[test]
fn what_stands_there_is_kept_unless_it_is_to_be_replaced() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("merged");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("mine"), "mine").unwrap();
    let keep = ModelWriter::open(&target, &specs(), u64::MAX, "x", Existing::Keep);
    assert!(keep.unwrap_err().to_string().contains("--force"));
    assert_eq!(names(home.path()), ["merged"]);
    let writer = ModelWriter::open(&target, &specs(), u64::MAX, "x", Existing::Replace).unwrap();
    write_all(&writer);
    assert!(target.join("mine").exists());
    writer.publish().unwrap();
    check(&target);
    assert_eq!(names(home.path()), ["merged"]);

    let file = home.path().join("file");
    fs::write(&file, "mine").unwrap();
    let error = ModelWriter::open(&file, &specs(), u64::MAX, "x", Existing::Replace).unwrap_err();
    assert!(matches!(error, Error::Content { .. }), "{error}");
}

#[test]
fn two_writers_never_share_a_folder() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("merged");
    let first = open(&target, u64::MAX, "x");
    let second = ModelWriter::open(&target, &specs(), u64::MAX, "y", Existing::Keep);
    assert!(second.unwrap_err().to_string().contains("another process"));
    write(&first, "a");
    drop(first);
    assert_eq!(open(&target, u64::MAX, "x").resumed().len(), 1);
}

#[test]
fn wrong_values_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let writer = open(&home.path().join("merged"), u64::MAX, "x");
    assert!(writer.tensor("z").is_err());
    let mut tensor = writer.tensor("a").unwrap();
    assert!(tensor.push(&[0.0; 5]).is_err(), "too many");
    tensor.push(&[0.0; 3]).unwrap();
    assert!(tensor.finish().is_err(), "too few");
    assert!(writer.tensor("ids").unwrap().push(&[1.0]).is_err(), "an integer type");
    let overflow = writer.tensor("b\nc").unwrap().push(&[f32::MAX]).unwrap_err();
    assert!(overflow.to_string().contains("beyond the range of BF16"), "{overflow}");
}
