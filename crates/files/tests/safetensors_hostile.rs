//! Malformed safetensors files and folders, one case per rule of the format.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may panic as tests do")]

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use retune_files::Dtype;
use retune_files::safetensors::{
    Problem, Safetensors, SafetensorsError, SafetensorsFile, TensorSpec, safetensors_bytes,
};

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn refused(bytes: Vec<u8>) -> SafetensorsError {
    match SafetensorsFile::from_bytes("evil", bytes) {
        Err(error) => error,
        Ok(file) => panic!("accepted: {:?}", file.tensors().collect::<Vec<_>>()),
    }
}

/// Refuses a header over eight bytes of data and returns the message.
fn message(header: &str) -> String {
    refused(file(header, &[0; 8])).to_string()
}

const GOOD: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

#[test]
fn the_file_all_cases_start_from_is_accepted() {
    assert!(SafetensorsFile::from_bytes("good", file(GOOD, &[0; 8])).is_ok());
    assert!(SafetensorsFile::from_bytes("good", file("{}", &[])).is_ok());
    assert!(SafetensorsFile::from_bytes("good", file(&format!("{GOOD}  \n"), &[0; 8])).is_ok());
}

#[test]
fn empty_file() {
    let error = refused(Vec::new());
    assert_eq!(
        error.to_string(),
        "evil: has 0 bytes, a safetensors file has at least 8; copy or download it again"
    );
}

#[test]
fn seven_bytes() {
    assert!(matches!(refused(vec![1; 7]).problem, Problem::TooShort { got: 7 }));
}

#[test]
fn header_longer_than_the_file() {
    let mut bytes = file(GOOD, &[0; 8]);
    bytes[..8].copy_from_slice(&200u64.to_le_bytes());
    let problem = refused(bytes).problem;
    let available = GOOD.len() as u64 + 8;
    assert!(
        matches!(problem, Problem::HeaderTooLong { claimed: 200, available: a } if a == available)
    );
}

#[test]
fn header_length_of_all_ones_allocates_nothing() {
    let problem = refused(vec![0xff; 64]).problem;
    assert!(matches!(problem, Problem::HeaderTooLong { claimed: u64::MAX, .. }));
}

#[test]
fn header_beyond_the_formats_limit() {
    // A sparse file: nothing of its 100 MB is stored.
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x");
    fs::write(&path, 100_000_001u64.to_le_bytes()).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100_000_100).unwrap();
    let problem = SafetensorsFile::open(&path).unwrap_err().problem;
    assert!(matches!(problem, Problem::HeaderTooLong { available: 100_000_000, .. }));
}

#[test]
fn header_of_no_bytes() {
    assert!(message("").contains("does not begin with '{'"));
}

#[test]
fn header_that_begins_with_spaces() {
    assert!(message(&format!(" {GOOD}")).contains("does not begin with '{'"));
}

#[test]
fn header_that_is_not_utf_8() {
    let mut bytes = file(GOOD, &[0; 8]);
    bytes[10] = 0xff;
    assert!(matches!(refused(bytes).problem, Problem::Header { .. }));
}

#[test]
fn header_cut_in_the_middle() {
    assert!(message(&GOOD[..30]).contains("bad header: tensor 'a': EOF"));
}

#[test]
fn header_followed_by_more_json() {
    assert!(message(&format!("{GOOD}{{}}")).contains("bad header: trailing characters"));
}

#[test]
fn header_that_is_an_array() {
    assert!(message(r#"["a"]"#).contains("does not begin with '{'"));
}

#[test]
fn header_nested_without_end() {
    let deep = format!(r#"{{"a":{}"#, "[".repeat(100_000));
    assert!(matches!(refused(file(&deep, &[])).problem, Problem::Header { .. }));
}

#[test]
fn tensor_twice() {
    let header = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
    assert_eq!(
        message(header),
        "evil: names 'a' twice in its header; write it again with unique names"
    );
}

#[test]
fn tensor_twice_by_an_escape() {
    let header = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"\u0061":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
    assert!(message(header).contains("names 'a' twice"));
}

#[test]
fn metadata_twice() {
    let header = r#"{"__metadata__":{"a":"b"},"__metadata__":{"a":"c"}}"#;
    assert!(message(header).contains("names '__metadata__' twice"));
}

#[test]
fn metadata_key_twice() {
    assert!(message(r#"{"__metadata__":{"k":"b","k":"c"}}"#).contains("names 'k' twice"));
}

#[test]
fn metadata_that_is_not_text() {
    assert!(message(r#"{"__metadata__":{"k":1}}"#).contains("expected a string"));
}

#[test]
fn tensor_without_a_field() {
    let header = r#"{"a":{"dtype":"F32","shape":[2]}}"#;
    assert!(message(header).contains("tensor 'a': missing field `data_offsets`"));
}

#[test]
fn tensor_with_a_field_twice() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,8]}}"#;
    assert!(message(header).contains("duplicate field `shape`"));
}

#[test]
fn tensor_with_an_unknown_field() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"strides":[1],"data_offsets":[0,8]}}"#;
    assert!(message(header).contains("unknown field `strides`"));
}

#[test]
fn dtype_unknown() {
    let header = r#"{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,8]}}"#;
    assert!(message(header).contains("tensor 'a' has dtype F4, expected one of BOOL, U8, I8, "));
}

#[test]
fn shape_with_a_negative_or_broken_number() {
    for shape in ["[-2]", "[2.5]", "[1e3]", "[\"2\"]", "[null]", "2", "[18446744073709551616]"] {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,8]}}}}"#);
        let problem = refused(file(&header, &[0; 8])).problem;
        assert!(matches!(problem, Problem::Header { .. }), "{shape}: {problem}");
    }
}

#[test]
fn shape_whose_product_overflows() {
    // 2^62 numbers of 4 bytes wrap around to nothing.
    for shape in ["4611686018427387904", "4294967296,4294967296", "18446744073709551615,0,2"] {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,0]}}}}"#);
        let problem = refused(file(&header, &[])).problem;
        assert!(matches!(problem, Problem::ShapeOverflow { .. }), "{shape}: {problem}");
    }
}

#[test]
fn shape_and_offsets_disagree() {
    let header = r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#;
    assert_eq!(
        message(header),
        "evil: tensor 'a' of shape [3] and dtype F32 takes 12 bytes, its offsets 0..8 do not span \
         that; the file is damaged"
    );
}

#[test]
fn dtype_and_offsets_disagree() {
    let header = r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,8]}}"#;
    assert!(message(header).contains("takes 4 bytes"));
}

#[test]
fn offsets_reversed() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#;
    assert!(matches!(refused(file(header, &[0; 8])).problem, Problem::WrongSpan { .. }));
}

#[test]
fn offsets_at_the_end_of_the_number_range() {
    let (begin, end) = (u64::MAX - 8, u64::MAX);
    let header = format!(r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[{begin},{end}]}}}}"#);
    assert!(matches!(refused(file(&header, &[0; 8])).problem, Problem::CutShort { .. }));
}

#[test]
fn offsets_of_three_numbers() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}"#;
    assert!(matches!(refused(file(header, &[0; 8])).problem, Problem::Header { .. }));
}

#[test]
fn file_cut_short() {
    let error = refused(file(GOOD, &[0; 7]));
    assert_eq!(
        error.to_string(),
        "evil: tensor 'a' ends at byte 8 of the data, which has 7; the file is cut short: copy or \
         download it again"
    );
}

#[test]
fn bytes_behind_the_last_tensor() {
    let problem = refused(file(GOOD, &[0; 9])).problem;
    assert!(matches!(problem, Problem::TrailingBytes { expected: 8, got: 9 }));
}

#[test]
fn bytes_without_a_tensor() {
    let problem = refused(file("{}", &[0; 1])).problem;
    assert!(matches!(problem, Problem::TrailingBytes { expected: 0, got: 1 }));
}

#[test]
fn gap_before_the_first_tensor() {
    let header = r#"{"a":{"dtype":"U8","shape":[7],"data_offsets":[1,8]}}"#;
    assert!(message(header).contains("tensor 'a' begins at byte 1 of the data, expected 0"));
}

#[test]
fn gap_between_tensors() {
    let header = r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
    let problem = refused(file(header, &[0; 8])).problem;
    assert!(matches!(problem, Problem::NotContiguous { expected: 3, got: 4, .. }));
}

#[test]
fn tensors_that_overlap() {
    let header = r#"{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
    let problem = refused(file(header, &[0; 8])).problem;
    assert!(matches!(problem, Problem::NotContiguous { expected: 5, got: 4, .. }));
}

#[test]
fn tensors_that_share_their_bytes() {
    let header = r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#;
    let problem = refused(file(header, &[0; 8])).problem;
    assert!(matches!(problem, Problem::NotContiguous { expected: 8, got: 0, .. }));
}

#[test]
fn empty_tensor_inside_another() {
    let header = r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}"#;
    assert!(matches!(refused(file(header, &[0; 8])).problem, Problem::NotContiguous { .. }));
}

#[test]
fn empty_tensors_between_others_are_allowed() {
    let header = r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[0,3],"data_offsets":[8,8]},"c":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
    let file = SafetensorsFile::from_bytes("good", file(header, &[0; 8])).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b", "c"]);
}

#[test]
fn file_that_is_missing_a_folder_or_a_device() {
    let home = tempfile::tempdir().unwrap();
    for path in [home.path().join("no"), home.path().to_path_buf(), Path::new("/dev/zero").into()] {
        let error = SafetensorsFile::open(&path).unwrap_err();
        assert!(matches!(error.problem, Problem::Io(_)), "{error}");
        assert_eq!(error.file, path);
    }
}

// Folders with an index.

fn shard(tensors: &[(&str, u8)]) -> Vec<u8> {
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, value)| (TensorSpec::new(*name, Dtype::U8, [1]), vec![*value]))
        .collect();
    safetensors_bytes(&tensors, &std::collections::BTreeMap::new()).unwrap()
}

/// A folder with the given index, `1` holding a and `2` holding b and c.
fn open_folder(weight_map: &str) -> Result<Safetensors, SafetensorsError> {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("model");
    fs::create_dir(&folder).unwrap();
    fs::write(home.path().join("outside"), shard(&[("a", 1)])).unwrap();
    fs::write(folder.join("1"), shard(&[("a", 1)])).unwrap();
    fs::write(folder.join("2"), shard(&[("b", 2), ("c", 3)])).unwrap();
    fs::write(folder.join("3"), shard(&[("a", 4)])).unwrap();
    let index = format!(r#"{{"metadata":{{"total_size":3}},"weight_map":{weight_map}}}"#);
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    Safetensors::open(&folder)
}

fn index_problem(weight_map: &str) -> Problem {
    open_folder(weight_map).unwrap_err().problem
}

#[test]
fn index_that_is_right() {
    let weights = open_folder(r#"{"a":"1","b":"2","c":"2"}"#).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(weights.get("b").unwrap().bytes, [2]);
    let error = weights.tensor("d").unwrap_err();
    assert!(error.file.ends_with("model.safetensors.index.json"), "{error}");
    assert!(matches!(error.problem, Problem::Missing { .. }));
}

#[test]
fn index_that_leaves_out_a_tensor_of_a_shard() {
    let weights = open_folder(r#"{"a":"1","b":"2"}"#).unwrap();
    assert_eq!(weights.get("c").unwrap().bytes, [3]);
}

#[test]
fn index_decides_between_two_shards_with_one_tensor() {
    let weights = open_folder(r#"{"a":"3","b":"2","c":"2"}"#).unwrap();
    assert_eq!(weights.get("a").unwrap().bytes, [4]);
}

#[test]
fn index_with_a_shard_that_is_missing() {
    let error = open_folder(r#"{"a":"1","b":"4","c":"4"}"#).unwrap_err();
    assert!(error.to_string().ends_with(
        "index.json: names shard '4' for 2 tensors (the first is 'b'), but there is no such file; \
         download the missing shard"
    ));
}

#[test]
fn index_with_a_tensor_its_shard_lacks() {
    let problem = index_problem(r#"{"a":"1","b":"1","c":"2"}"#);
    let expected = "maps tensor 'b' to '1', which does not hold it; index and shards belong to \
                    different checkpoints: download all of them again";
    assert_eq!(problem.to_string(), expected);
}

#[test]
fn index_that_leaves_its_folder() {
    let absolute = if cfg!(windows) { "C:/outside" } else { "/outside" };
    for shard in
        ["../outside", absolute, "x/../../outside", "..\\\\outside", ".", "./1", "", "\\u0000"]
    {
        let problem = index_problem(&format!(r#"{{"a":"{shard}"}}"#));
        assert!(matches!(problem, Problem::EscapesFolder { .. }), "{shard}: {problem}");
    }
}

#[test]
fn index_that_names_a_tensor_twice() {
    let problem = index_problem(r#"{"a":"1","a":"3"}"#);
    assert!(matches!(problem, Problem::DuplicateName { name } if name == "a"));
}

#[test]
fn index_of_another_form() {
    for map in ["[]", r#"{"a":1}"#, "{", r#"null,"weight_map":{}"#] {
        assert!(matches!(index_problem(map), Problem::Index { .. }), "{map}");
    }
}

#[test]
fn tensor_in_two_shards_and_not_in_the_index() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("1"), shard(&[("a", 1), ("x", 1)])).unwrap();
    fs::write(home.path().join("2"), shard(&[("b", 2), ("x", 2)])).unwrap();
    let index = home.path().join("model.safetensors.index.json");
    fs::write(&index, r#"{"weight_map":{"a":"1","b":"2"}}"#).unwrap();
    let problem = Safetensors::open(&index).unwrap_err().problem;
    assert!(
        matches!(&problem, Problem::InTwoShards { tensor, first, second }
            if (tensor.as_str(), first.as_str(), second.as_str()) == ("x", "1", "2")),
        "{problem}"
    );
}

#[test]
fn folder_without_weights() {
    let home = tempfile::tempdir().unwrap();
    assert!(matches!(Safetensors::open(home.path()).unwrap_err().problem, Problem::NoWeights));
}

#[test]
fn damaged_shard_is_named_itself() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("1"), [0; 3]).unwrap();
    let index = home.path().join("model.safetensors.index.json");
    fs::write(&index, r#"{"weight_map":{"a":"1"}}"#).unwrap();
    let error = Safetensors::open(&index).unwrap_err();
    assert_eq!(error.file, home.path().join("1"));
    assert!(matches!(error.problem, Problem::TooShort { got: 3 }));
}

/// Reads everything an accepted file offers.
fn use_all(bytes: Vec<u8>) {
    if let Ok(file) = SafetensorsFile::from_bytes("any", bytes) {
        for tensor in file.tensors() {
            assert_eq!(tensor.len(), tensor.shape.iter().product::<usize>());
            let _ = (tensor.to_f32(), tensor.to_i64(), tensor.as_f32(), tensor.share());
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        use_all(bytes);
    }

    #[test]
    fn any_header_text_is_read_or_refused(header in r#"[\{\}\[\]":,0-9a-cF-I_ \\]{0,60}"#) {
        use_all(file(&header, &[0; 8]));
    }

    /// A damaged byte is refused or read, and a file cut short always refused.
    #[test]
    fn damage_is_survived(at in any::<prop::sample::Index>(), bit in 0u32..8) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/dtypes.safetensors");
        let mut bytes = fs::read(path).unwrap();
        let at = at.index(bytes.len());
        prop_assert!(SafetensorsFile::from_bytes("cut", bytes[..at].to_vec()).is_err());
        bytes[at] ^= 1 << bit;
        use_all(bytes);
    }
}
