//! Malformed GGUF files, one case per rule of the format.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may panic as tests do")]

use proptest::prelude::*;
use retune_files::ggml::{BlockType, GgmlError};
use retune_files::gguf::{GgufFile, GgufSpec, Metadata, Problem, gguf_bytes};

/// A file put together from raw parts, so that each can be wrong.
#[derive(Clone)]
struct Raw {
    version: u32,
    tensors: u64,
    keys: u64,
    entries: Vec<u8>,
    infos: Vec<u8>,
    data: Vec<u8>,
}

fn text(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key.as_bytes())[..], &kind.to_le_bytes(), value].concat()
}

fn array(kind: u32, n: u64, values: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &n.to_le_bytes(), values].concat()
}

/// Dimensions as stored: fastest first.
fn info(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut out = text(name.as_bytes());
    out.extend((dims.len() as u32).to_le_bytes());
    out.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
    out.extend(kind.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

impl Raw {
    /// Two tensors of two F32 each in 64 bytes of data, and one key.
    fn good() -> Self {
        Self {
            version: 3,
            tensors: 2,
            keys: 1,
            entries: entry("k", 4, &7u32.to_le_bytes()),
            infos: [info("a", &[2], 0, 0), info("b", &[2, 1], 0, 32)].concat(),
            data: vec![0; 64],
        }
    }

    fn with_entries(entries: &[Vec<u8>]) -> Self {
        Self { keys: entries.len() as u64, entries: entries.concat(), ..Self::good() }
    }

    fn with_infos(infos: &[Vec<u8>]) -> Self {
        Self { tensors: infos.len() as u64, infos: infos.concat(), ..Self::good() }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::from(b"GGUF");
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensors.to_le_bytes());
        out.extend(self.keys.to_le_bytes());
        out.extend(&self.entries);
        out.extend(&self.infos);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }

    fn problem(&self) -> Problem {
        problem(self.bytes())
    }
}

fn problem(bytes: Vec<u8>) -> Problem {
    match GgufFile::from_bytes("evil", bytes) {
        Err(error) => error.problem,
        Ok(file) => panic!("accepted: {:?}", file.tensors().collect::<Vec<_>>()),
    }
}

#[test]
fn the_file_all_cases_start_from_is_accepted() {
    let file = GgufFile::from_bytes("good", Raw::good().bytes()).unwrap();
    assert_eq!(file.tensor("b").unwrap().shape, [1, 2]);
    assert_eq!(file.metadata().u64("k").unwrap(), 7);
}

#[test]
fn empty_file() {
    assert!(matches!(problem(Vec::new()), Problem::NotGguf { got } if got.is_empty()));
}

#[test]
fn other_magic() {
    let problem = problem(b"\x80PK\x03 and more".to_vec());
    assert_eq!(
        problem.to_string(),
        "begins with \\x80PK\\x03, expected \"GGUF\"; it is not a GGUF file"
    );
}

#[test]
fn version_1_and_4() {
    for version in [0, 1, 4] {
        let raw = Raw { version, ..Raw::good() };
        assert!(matches!(raw.problem(), Problem::Version { got } if got == version));
    }
}

#[test]
fn big_endian() {
    let raw = Raw { version: 3u32.swap_bytes(), ..Raw::good() };
    assert!(matches!(raw.problem(), Problem::BigEndian));
}

#[test]
fn cut_anywhere() {
    let bytes = Raw::good().bytes();
    // The last tensor ends 8 bytes into the second 32 of the data; padding behind it may miss.
    let needed = bytes.len() - 24;
    for cut in 0..needed {
        problem(bytes[..cut].to_vec());
    }
    assert!(GgufFile::from_bytes("good", bytes[..needed].to_vec()).is_ok());
}

#[test]
fn cut_short_says_where() {
    let bytes = Raw::good().bytes();
    let error = GgufFile::from_bytes("evil", bytes[..30].to_vec()).unwrap_err();
    assert!(error.to_string().starts_with("evil: announces 2 tensors at byte 8, the rest"));
    let raw = Raw { tensors: 0, infos: Vec::new(), data: Vec::new(), ..Raw::good() };
    let bytes = raw.bytes()[..40].to_vec();
    assert_eq!(
        problem(bytes).to_string(),
        "ends in the value of key 'k': 4 bytes wanted at byte 37, 3 left; it is cut short: copy or \
         download it again"
    );
}

#[test]
fn counts_beyond_the_file_allocate_nothing() {
    for count in [1 << 20, u64::MAX / 2, u64::MAX] {
        let raw = Raw { tensors: count, ..Raw::good() };
        assert!(matches!(raw.problem(), Problem::Count { claimed, .. } if claimed == count));
        let raw = Raw { keys: count, ..Raw::good() };
        assert!(matches!(raw.problem(), Problem::Count { claimed, .. } if claimed == count));
        for kind in [0, 4, 8, 9, 12] {
            let raw = Raw::with_entries(&[entry("k", 9, &array(kind, count, &[0; 40]))]);
            assert!(matches!(raw.problem(), Problem::Count { claimed, .. } if claimed == count));
        }
    }
}

#[test]
fn text_longer_than_the_file() {
    for length in [1 << 30, u64::MAX] {
        let key = [&length.to_le_bytes()[..], b"k"].concat();
        let raw = Raw::with_entries(&[key]);
        assert!(matches!(raw.problem(), Problem::CutShort { wanted, .. } if wanted == length));
        let raw = Raw::with_entries(&[entry("k", 8, &length.to_le_bytes())]);
        assert!(matches!(raw.problem(), Problem::CutShort { wanted, .. } if wanted == length));
        let raw = Raw::with_infos(&[[&length.to_le_bytes()[..], &[0; 40]].concat()]);
        assert!(matches!(raw.problem(), Problem::CutShort { wanted, .. } if wanted == length));
    }
}

#[test]
fn text_that_is_not_utf_8() {
    let what = |raw: Raw| match raw.problem() {
        Problem::NotUtf8 { what } => what,
        other => panic!("{other}"),
    };
    let bad = text(&[0xff, 0xfe]);
    assert_eq!(what(Raw::with_entries(&[[&bad[..], &[0; 8]].concat()])), "a key");
    assert_eq!(what(Raw::with_entries(&[entry("k", 8, &bad)])), "the value of key 'k'");
    let texts = array(8, 2, &[text(b"ok"), bad.clone()].concat());
    assert_eq!(what(Raw::with_entries(&[entry("k", 9, &texts)])), "text 1 of key 'k'");
    assert_eq!(what(Raw::with_infos(&[[&bad[..], &[0; 40]].concat()])), "a tensor's name");
}

#[test]
fn key_of_65536_bytes() {
    let raw = Raw::with_entries(&[entry(&"k".repeat(65_536), 0, &[0])]);
    assert!(matches!(raw.problem(), Problem::LongKey { got: 65_536 }));
}

#[test]
fn key_twice() {
    let raw = Raw::with_entries(&[entry("k", 0, &[1]), entry("k", 0, &[2])]);
    assert!(matches!(raw.problem(), Problem::DuplicateKey { key } if key == "k"));
}

#[test]
fn value_type_unknown() {
    for kind in [13, 255, u32::MAX] {
        let raw = Raw::with_entries(&[entry("k", kind, &[0; 8])]);
        assert!(matches!(raw.problem(), Problem::ValueType { got, .. } if got == kind));
        let raw = Raw::with_entries(&[entry("k", 9, &array(kind, 1, &[0; 8]))]);
        assert!(matches!(raw.problem(), Problem::ValueType { got, .. } if got == kind));
    }
}

#[test]
fn boolean_of_two() {
    let raw = Raw::with_entries(&[entry("k", 7, &[2])]);
    assert!(matches!(raw.problem(), Problem::Boolean { got: 2, .. }));
    let raw = Raw::with_entries(&[entry("k", 9, &array(7, 2, &[1, 255]))]);
    assert!(matches!(raw.problem(), Problem::Boolean { got: 255, .. }));
}

#[test]
fn arrays_nested_without_end() {
    let nested = |depth: usize| {
        let mut value = array(0, 0, &[]);
        for _ in 1..depth {
            value = array(9, 1, &value);
        }
        Raw::with_entries(&[entry("k", 9, &value)])
    };
    assert!(GgufFile::from_bytes("good", nested(8).bytes()).is_ok());
    assert!(matches!(nested(9).problem(), Problem::Depth { .. }));
    assert!(matches!(nested(1_000).problem(), Problem::Depth { .. }));
}

#[test]
fn alignment_of_zero_24_another_type_or_gigabytes() {
    for value in [0u32, 24, 1 << 31] {
        let raw = Raw::with_entries(&[entry("general.alignment", 4, &value.to_le_bytes())]);
        assert!(matches!(raw.problem(), Problem::Alignment { .. }), "{value}");
    }
    let raw = Raw::with_entries(&[entry("general.alignment", 10, &32u64.to_le_bytes())]);
    assert!(
        raw.problem().to_string().starts_with("has general.alignment 32 (u64), expected a power")
    );
}

#[test]
fn tensor_twice() {
    let raw = Raw::with_infos(&[info("a", &[2], 0, 0), info("a", &[2], 0, 32)]);
    assert!(matches!(raw.problem(), Problem::DuplicateTensor { tensor } if tensor == "a"));
}

#[test]
fn tensor_of_five_or_four_billion_dimensions() {
    let raw = Raw::with_infos(&[info("a", &[1; 5], 0, 0)]);
    assert!(matches!(raw.problem(), Problem::Rank { got: 5, .. }));
    let raw = Raw::with_infos(&[[&text(b"a")[..], &[0xff; 4], &[0; 20]].concat()]);
    assert!(matches!(raw.problem(), Problem::Rank { got: u32::MAX, .. }));
}

#[test]
fn tensor_type_unknown() {
    for (kind, message) in [
        (4, "tensor 'a': GGML type 4 is not supported; "),
        (10, "tensor 'a': GGML type 10 (Q2_K) is not supported; "),
        (u32::MAX, "tensor 'a': GGML type 4294967295 is not supported; "),
    ] {
        let text = Raw::with_infos(&[info("a", &[256], kind, 0)]).problem().to_string();
        assert!(text.starts_with(message), "{text}");
    }
}

#[test]
fn rows_that_do_not_divide_into_blocks() {
    // 64 values in all, but rows of 2.
    let raw = Raw::with_infos(&[info("a", &[2, 32], 8, 0)]);
    assert!(matches!(
        raw.problem(),
        Problem::Blocks { source: GgmlError::PartialBlock { kind: BlockType::Q8_0, len: 2 }, .. }
    ));
}

#[test]
fn shape_whose_product_overflows() {
    for dims in [&[1 << 62, 4][..], &[1 << 32, 1 << 32], &[1 << 40, 1 << 40, 0], &[0, 1 << 63, 2]] {
        let raw = Raw::with_infos(&[info("a", dims, 0, 0)]);
        let problem = raw.problem();
        assert!(
            matches!(
                problem,
                Problem::Shape { .. } | Problem::Blocks { source: GgmlError::TooLarge { .. }, .. }
            ),
            "{dims:?}: {problem}"
        );
    }
}

#[test]
fn offset_beside_the_alignment() {
    let raw = Raw::with_infos(&[info("a", &[2], 0, 8)]);
    assert!(matches!(raw.problem(), Problem::Misaligned { got: 8, alignment: 32, .. }));
}

#[test]
fn offset_behind_the_file() {
    let raw = Raw::with_infos(&[info("a", &[2], 0, 64)]);
    assert_eq!(
        raw.problem().to_string(),
        "puts tensor 'a' at bytes 64 to 72 of the data, which has 64; it is cut short: copy or \
         download it again"
    );
    let raw = Raw::with_infos(&[info("a", &[9], 0, u64::MAX - 31)]);
    assert!(matches!(raw.problem(), Problem::OutOfFile { end: u64::MAX, .. }));
}

#[test]
fn tensor_larger_than_the_file() {
    let raw = Raw::with_infos(&[info("a", &[17], 0, 0)]);
    assert!(matches!(raw.problem(), Problem::OutOfFile { end: 68, available: 64, .. }));
    let raw = Raw::with_infos(&[info("a", &[1 << 40], 0, 0)]);
    assert!(matches!(raw.problem(), Problem::OutOfFile { .. }));
}

#[test]
fn tensors_that_overlap() {
    let raw = Raw::with_infos(&[info("b", &[2], 0, 32), info("a", &[9], 0, 0)]);
    assert_eq!(
        raw.problem().to_string(),
        "lets tensor 'b' at offset 32 overlap 'a', which ends at 36"
    );
    let raw = Raw::with_infos(&[info("a", &[2], 0, 0), info("b", &[2], 0, 0)]);
    assert!(matches!(raw.problem(), Problem::Overlap { .. }));
}

#[test]
fn empty_tensors_overlap_nothing() {
    let raw = Raw::with_infos(&[
        info("a", &[16], 0, 0),
        info("b", &[0], 0, 32),
        info("c", &[2, 0], 0, 0),
    ]);
    let file = GgufFile::from_bytes("good", raw.bytes()).unwrap();
    assert!(file.tensor("b").unwrap().is_empty());
}

#[test]
fn file_without_tensors_may_end_with_its_keys() {
    let raw = Raw { tensors: 0, infos: Vec::new(), data: Vec::new(), ..Raw::good() };
    let bytes = raw.bytes();
    assert!(GgufFile::from_bytes("good", bytes[..41].to_vec()).is_ok());
}

#[test]
fn folder_in_place_of_a_file() {
    let home = tempfile::tempdir().unwrap();
    assert!(matches!(GgufFile::open(home.path()).unwrap_err().problem, Problem::Io(_)));
    assert!(matches!(GgufFile::open(home.path().join("no")).unwrap_err().problem, Problem::Io(_)));
}

/// Reads everything an accepted file offers.
fn use_all(bytes: Vec<u8>) {
    if let Ok(file) = GgufFile::from_bytes("any", bytes) {
        for tensor in file.tensors() {
            assert_eq!(tensor.to_f32().len(), tensor.shape.iter().product::<usize>());
        }
        for (key, _) in file.metadata().iter() {
            let _ = (file.metadata().u64(key), file.metadata().i64s(key), file.metadata().str(key));
        }
    }
}

/// A file with every kind of value and several block types.
fn rich() -> Vec<u8> {
    let mut metadata = Metadata::default();
    metadata.insert("general.architecture", "llama");
    metadata.insert("general.alignment", 32u32);
    metadata.insert("b", true);
    metadata.insert("tokens", vec!["a".to_owned(), "bc".to_owned()]);
    metadata.insert("scores", vec![0.5f32, 1.0]);
    let tensor = |name: &str, kind: BlockType| {
        (GgufSpec::new(name, kind, [2, kind.block_len()]), vec![1u8; 2 * kind.block_bytes()])
    };
    let kinds = [BlockType::F32, BlockType::Q4_1, BlockType::Q6_K];
    gguf_bytes(&metadata, &kinds.map(|kind| tensor(kind.name(), kind))).unwrap()
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        use_all([&b"GGUF\x03\0\0\0"[..], &bytes].concat());
    }

    #[test]
    fn damage_is_survived(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = rich();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        use_all(bytes.clone());
        bytes.truncate(cut.index(bytes.len()));
        use_all(bytes);
    }
}
