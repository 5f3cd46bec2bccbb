//! ComPEFT files: the bytes, hostile files, and that what is written is what is read.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may panic as tests do")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use retune_files::Dtype;
use retune_files::compeft::{CompeftError, CompeftFile, CompeftProblem, CompeftWriter, Content};
use sha2::{Digest, Sha256};

fn sample() -> Vec<u8> {
    let metadata = BTreeMap::from([("start".to_owned(), "zero".to_owned())]);
    let mut writer = CompeftWriter::new(0.25, metadata);
    writer.raw("m.bias", Dtype::F16, &[2], &[0, 0x3c, 0, 0xc0]).unwrap();
    writer.signs("m.a", &[2, 4], &[0, 0, 1, 0, -1, 0, 0, 0]).unwrap();
    writer.signs("m.empty", &[0, 3], &[]).unwrap();
    writer.finish().unwrap()
}

/// Puts a file of version 1 together from a header in clear and streams.
fn file(header: &str, streams: &[u8]) -> Vec<u8> {
    let packed = miniz_oxide::deflate::compress_to_vec_zlib(header.as_bytes(), 1);
    let mut out = b"COMPEFT\x01".to_vec();
    out.extend((packed.len() as u32).to_le_bytes());
    out.extend((header.len() as u32).to_le_bytes());
    let content = [packed.as_slice(), streams].concat();
    out.extend(Sha256::digest(&content));
    out.extend(content);
    out
}

fn refused(bytes: Vec<u8>) -> CompeftError {
    match CompeftFile::from_bytes("evil", bytes) {
        Err(error) => error,
        Ok(file) => panic!("accepted: {:?}", file.tensors().collect::<Vec<_>>()),
    }
}

fn message_of(bytes: Vec<u8>) -> String {
    refused(bytes).to_string()
}

fn message(header: &str, streams: &[u8]) -> String {
    message_of(file(header, streams))
}

#[test]
fn what_is_written_is_read() {
    let file = CompeftFile::from_bytes("memory", sample()).unwrap();
    assert_eq!(file.scale(), 0.25);
    assert_eq!(file.metadata()["start"], "zero");
    assert_eq!(file.names().collect::<Vec<_>>(), ["m.a", "m.bias", "m.empty"]);
    let a = file.tensor("m.a").unwrap();
    assert_eq!(a.shape, [2, 4]);
    assert_eq!(a.to_f32().unwrap(), [0.0, 0.0, 0.25, 0.0, -0.25, 0.0, 0.0, 0.0]);
    let mut start = vec![1.0; 8];
    a.add_to(&mut start).unwrap();
    assert_eq!(start, [1.0, 1.0, 1.25, 1.0, 0.75, 1.0, 1.0, 1.0]);
    let mut start = vec![0.0; 8];
    a.add_scaled(2.0, &mut start).unwrap();
    assert_eq!(start[4], -2.0);
    assert_eq!(file.tensor("m.bias").unwrap().to_f32().unwrap(), [1.0, -2.0]);
    assert!(file.tensor("m.empty").unwrap().is_empty());
    let error = file.tensor("m.bia").unwrap_err().to_string();
    assert_eq!(error, "memory: has no tensor 'm.bia'; near names: m.bias");
}

/// The whole file, byte by byte but for the packed header, whose bytes are the packer's choice.
#[test]
fn the_layout_is_the_documented_one() {
    let bytes = sample();
    let unpacked = [
        &0.25f32.to_le_bytes()[..],
        &[1, 5],
        b"start",
        &[4],
        b"zero",
        // m.a [2, 4], two signs in one byte of gaps; m.bias and m.empty share `m.` with the last.
        &[3, 0, 3, b'm', b'.', b'a', 2, 2, 4, 0, 2, 2, 1],
        &[2, 4, b'b', b'i', b'a', b's', 1, 2, 1, 3, b'F', b'1', b'6'],
        &[2, 5, b'e', b'm', b'p', b't', b'y', 2, 0, 3, 0, 0, 1, 0],
    ]
    .concat();
    assert_eq!(bytes[..8], *b"COMPEFT\x02");
    assert_eq!(bytes[8..24], Sha256::digest(&bytes[24..])[..16]);
    let packed = usize::from(bytes[24]);
    assert_eq!(usize::from(bytes[25]), unpacked.len());
    let header = miniz_oxide::inflate::decompress_to_vec(&bytes[26..26 + packed]).unwrap();
    assert_eq!(header, unpacked);
    assert_eq!(bytes[26 + packed..], [0b11010, 0b10, 0, 0x3c, 0, 0xc0]);
}

#[test]
fn files_of_version_1_are_read() {
    let text = r#"{"scale":0.25,"metadata":{"start":"zero"},"tensors":[{"name":"m.a","shape":[2,4],"signs":[2,2,1]},{"name":"m.bias","shape":[2],"raw":"F16"},{"name":"m.empty","shape":[0,3],"signs":[0,1,0]}]}"#;
    let old = file(text, &[0b11010, 0b10, 0, 0x3c, 0, 0xc0]);
    let (old, new) = (
        CompeftFile::from_bytes("old", old).unwrap(),
        CompeftFile::from_bytes("new", sample()).unwrap(),
    );
    assert_eq!((old.scale(), old.metadata()), (new.scale(), new.metadata()));
    assert!(old.names().eq(new.names()));
    for (old, new) in old.tensors().zip(new.tensors()) {
        assert_eq!((old.shape, old.content, old.bytes), (new.shape, new.content, new.bytes));
    }
    for place in 8..40 {
        let mut damaged = file(text, &[0b11010, 0b10, 0, 0x3c, 0, 0xc0]);
        damaged[place] ^= 0x10;
        refused(damaged);
    }
}

#[test]
fn sizes_add_up() {
    let bytes = sample();
    let sizes = CompeftFile::from_bytes("memory", bytes.clone()).unwrap().sizes();
    assert_eq!(sizes.file_bytes, bytes.len() as u64);
    assert_eq!((sizes.coded_bytes, sizes.raw_bytes, sizes.f16_bytes), (2, 4, 20));
    assert_eq!((sizes.num_entries, sizes.num_nonzero), (8, 2));
    // H(1/4) = 0.8112781 bits, eight times; two signs; 16 bits of scale.
    let bits = 8.0 * 0.811278124459 + 2.0 + 16.0;
    assert!((sizes.entropy_bytes - bits / 8.0).abs() < 1e-9, "{}", sizes.entropy_bytes);
}

#[test]
fn writers_are_told_their_mistakes() {
    let mut writer = CompeftWriter::new(1.0, BTreeMap::new());
    assert!(writer.signs("a", &[3], &[1, 0]).is_err());
    assert!(writer.raw("a", Dtype::F32, &[1], &[0; 3]).is_err());
    writer.signs("a", &[2], &[1, 0]).unwrap();
    assert!(writer.signs("a", &[2], &[1, 0]).unwrap_err().to_string().contains("second time"));
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(CompeftWriter::new(scale, BTreeMap::new()).finish().is_err(), "{scale}");
    }
    let mut sparse = CompeftWriter::new(1.0, BTreeMap::new());
    sparse.signs("a", &[1 << 24], &vec![0; 1 << 24]).unwrap();
    assert!(matches!(sparse.finish().unwrap_err().problem, CompeftProblem::TooSparse { .. }));
}

#[test]
fn damage_is_refused() {
    let good = sample();
    assert!(matches!(refused(Vec::new()).problem, CompeftProblem::Magic { .. }));
    assert!(matches!(refused(b"{\"a\": 12}".to_vec()).problem, CompeftProblem::Magic { .. }));
    let mut newer = good.clone();
    newer[7] = 9;
    assert!(matches!(refused(newer).problem, CompeftProblem::Version(9)));
    for end in 8..good.len() {
        refused(good[..end].to_vec());
    }
    for place in 8..good.len() {
        let mut flipped = good.clone();
        flipped[place] ^= 0x10;
        refused(flipped);
    }
    let mut longer = good.clone();
    longer.push(0);
    assert!(matches!(refused(longer).problem, CompeftProblem::Checksum));
}

#[test]
fn headers_that_break_a_rule_are_refused() {
    let good = r#"{"scale":1.0,"tensors":[{"name":"a","shape":[8],"signs":[2,2,1]}]}"#;
    assert!(CompeftFile::from_bytes("good", file(good, &[0b11010, 0b10])).is_ok());
    let with = |tensors: &str| format!(r#"{{"scale":1.0,"tensors":[{tensors}]}}"#);
    assert!(message(good, &[0b11010]).contains("expected"), "a stream cut short");
    assert!(message(good, &[0b11010, 0b10, 0]).contains("the whole file"), "bytes after the last");
    assert!(message("{", &[]).contains("cannot be read"));
    assert!(message(r#"{"scale":0.1,"tensors":[]}"#, &[]).contains("no 32-bit number"));
    assert!(message(&with(r#"{"name":"a","shape":[8]}"#), &[]).contains("either"));
    assert!(message(&with(r#"{"name":"a","shape":[8],"raw":"F5"}"#), &[]).contains("F5"));
    assert!(message(&with(r#"{"name":"a","shape":[2],"signs":[3,1,0]}"#), &[]).contains("3 of 2"));
    assert!(message(&with(r#"{"name":"a","shape":[2],"signs":[1,0,0]}"#), &[]).contains("modulus"));
    let twice = r#"{"name":"a","shape":[0],"raw":"U8"},{"name":"a","shape":[0],"raw":"U8"}"#;
    assert!(message(&with(twice), &[]).contains("twice"));
    let huge = r#"{"name":"a","shape":[4294967296,4294967296],"raw":"U8"}"#;
    assert!(message(&with(huge), &[]).contains("overflows"));
    // Terabytes of zeros in a hundred bytes.
    let bomb = r#"{"name":"a","shape":[1000000000000],"signs":[0,1,0]}"#;
    assert!(message(&with(bomb), &[]).contains("at most"));
    let gaps = r#"{"name":"a","shape":[8],"signs":[2,2,18446744073709551615]}"#;
    assert!(!message(&with(gaps), &[]).is_empty());
}

#[test]
fn a_header_longer_than_it_says_is_refused() {
    let text = r#"{"scale":1.0,"tensors":[]}"#;
    for wrong in [text.len() - 1, text.len() + 1, usize::MAX] {
        let mut bytes = file(text, &[]);
        bytes[12..16].copy_from_slice(&(wrong as u32).to_le_bytes());
        assert!(matches!(refused(bytes).problem, CompeftProblem::Header(_)));
    }
}

#[test]
fn lengths_and_headers_that_break_a_rule_are_refused() {
    let with = |content: &[u8]| {
        let checksum = Sha256::digest(content);
        message_of([b"COMPEFT\x02", &checksum[..16], content].concat())
    };
    let packed = |header: &[u8]| {
        let packed = miniz_oxide::deflate::compress_to_vec(header, 1);
        with(&[&[packed.len() as u8, header.len() as u8][..], &packed].concat())
    };
    assert!(with(&[5, 5]).contains("expected 31 bytes, got 26"));
    assert!(with(&[0xff, 0xff, 0xff, 0xff, 0x7f, 0]).contains("it takes 34359738367 bytes"));
    assert!(with(&[1, 0xff, 0xff, 0xff, 0xff, 0x0f, 0]).contains("are read"));
    assert!(with(&[0xff; 12]).contains("64 bits"));
    assert!(packed(&[0, 0, 0, 0, 0]).contains("it ends"));
    assert!(packed(&[0, 0, 0x80, 0x3f, 0, 0, 9]).contains("1 bytes follow"));
}

#[test]
fn streams_that_do_not_decode_are_found_when_read() {
    let header = r#"{"scale":1.0,"tensors":[{"name":"a","shape":[8],"signs":[2,2,1]}]}"#;
    let file = CompeftFile::from_bytes("evil", file(header, &[0, 0])).unwrap();
    let error = file.tensor("a").unwrap().to_f32().unwrap_err();
    assert!(matches!(error.problem, CompeftProblem::Stream { .. }), "{error}");
}

proptest! {
    /// Bit for bit: signs, scale, raw numbers, metadata.
    #[test]
    fn files_survive(
        tensors in proptest::collection::btree_map(
            "[a-z.]{0,12}",
            proptest::collection::vec(-1i8..=1, 0..200),
            0..6,
        ),
        raw in proptest::collection::vec(any::<u8>(), 0..40),
        scale in 1e-6f32..1e3,
        note in ".{0,20}",
    ) {
        let metadata = BTreeMap::from([("note".to_owned(), note.clone())]);
        let mut writer = CompeftWriter::new(scale, metadata);
        for (name, signs) in &tensors {
            writer.signs(name, &[signs.len()], signs).unwrap();
        }
        writer.raw("~raw", Dtype::U8, &[raw.len()], &raw).unwrap();
        let bytes = writer.finish().unwrap();
        let file = CompeftFile::from_bytes("memory", bytes).unwrap();
        prop_assert_eq!(file.scale().to_bits(), scale.to_bits());
        prop_assert_eq!(&file.metadata()["note"], &note);
        prop_assert_eq!(file.names().count(), tensors.len() + 1);
        for (name, signs) in &tensors {
            let found = file.tensor(name).unwrap().to_f32().unwrap();
            let expected: Vec<f32> = signs.iter().map(|s| f32::from(*s) * scale).collect();
            prop_assert_eq!(found, expected);
        }
        let kept = file.tensor("~raw").unwrap();
        prop_assert_eq!(kept.content, Content::Raw(Dtype::U8));
        prop_assert_eq!(kept.bytes, &raw[..]);
    }

    #[test]
    fn any_header_and_streams_are_read_or_refused(
        header in r#"\{"scale":1\.0,"tensors":\[\{"name":"a","shape":\[[0-9]{1,3}\],"signs":\[[0-9]{1,2},[0-9],[0-9]\]\}\]\}"#,
        streams in proptest::collection::vec(any::<u8>(), 0..24),
    ) {
        if let Ok(file) = CompeftFile::from_bytes("any", file(&header, &streams)) {
            let _ = file.tensor("a").unwrap().to_f32();
        }
    }
}
