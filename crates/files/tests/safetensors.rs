//! safetensors against files of the reference writer.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may panic as tests do")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use retune_files::ggml::BlockType;
use retune_files::safetensors::{
    CheckpointLayout, Problem, Safetensors, SafetensorsFile, SafetensorsWriter, ShardedWriter,
    TensorSpec, safetensors_bytes, write_safetensors,
};
use retune_files::{Dtype, SaveError, TensorProblem};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.safetensors"))
}

/// The packs made by PEFT, transformers and mergekit, shared by all crates.
fn packs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/golden")
}

fn all_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all_below(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "safetensors") {
            found.push(path);
        }
    }
}

fn none() -> BTreeMap<String, String> {
    BTreeMap::new()
}

fn contents(file: &SafetensorsFile) -> Vec<(TensorSpec, Vec<u8>)> {
    let spec =
        |t: &retune_files::safetensors::TensorView| TensorSpec::new(t.name, t.dtype, t.shape);
    file.tensors().map(|t| (spec(&t), t.bytes.to_vec())).collect()
}

#[test]
fn writing_a_file_of_the_reference_writer_again_gives_its_bytes() {
    let mut paths = vec![golden("dtypes"), golden("ggml")];
    all_below(&packs(), &mut paths);
    assert!(paths.len() > 100, "only {} files found", paths.len());
    let home = tempfile::tempdir().unwrap();
    let again = home.path().join("again");
    for path in paths {
        let original = fs::read(&path).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        assert!(!file.is_empty(), "{}", path.display());
        let bytes = safetensors_bytes(&contents(&file), file.metadata()).unwrap();
        assert!(bytes == original, "{} in memory", path.display());
        write_safetensors(&again, &contents(&file), file.metadata()).unwrap();
        assert!(fs::read(&again).unwrap() == original, "{} on disk", path.display());
    }
}

#[test]
fn every_dtype_decodes_to_its_numbers() {
    let file = SafetensorsFile::open(golden("dtypes")).unwrap();
    assert_eq!(file.metadata()["made by"], "safetensors \"0.8.0\"");
    let f32 = |name: &str| file.tensor(name).unwrap().to_f32().unwrap();
    assert_eq!(f32("x.bool"), [0.0, 1.0, 1.0]);
    assert_eq!(f32("x.uint8"), [0.0, 127.0, 255.0]);
    assert_eq!(f32("x.int8"), [0.0, 127.0, -128.0]);
    assert_eq!(f32("x.float8_e5m2"), [1.0, -1.25, 57344.0]);
    assert_eq!(f32("x.float8_e4m3fn"), [1.0, -1.125, 448.0]);
    assert_eq!(f32("x.int16"), [0.0, 32767.0, -32768.0]);
    assert_eq!(f32("x.uint16"), [0.0, 1.0, 65535.0]);
    assert_eq!(f32("x.float16"), [0.5, -2.0, 65504.0]);
    assert_eq!(f32("x.bfloat16"), [1.0, -3.140625, 0.0]);
    assert_eq!(f32("x.int32"), [0.0, 2147483648.0, -2147483648.0]);
    assert_eq!(f32("x.uint32"), [0.0, 1.0, 4294967296.0]);
    assert_eq!(f32("x.float32"), [0.1, -2.5, 3.4e38]);
    assert_eq!(f32("x.float64"), [0.1, -2.5, 1e30]);
    assert_eq!(f32("x.int64"), [0.0, 4611686018427387904.0, -9223372036854775808.0]);
    assert_eq!(f32("x.uint64"), [0.0, 1.0, 9223372036854775808.0]);
    assert_eq!(f32("scalar"), [1.5]);
    assert!(f32("empty").is_empty());
    assert_eq!(f32("quoted \"ü\"\n"), [7.0]);

    let i64 = |name: &str| file.tensor(name).unwrap().to_i64().unwrap();
    assert_eq!(i64("x.bool"), [0, 1, 1]);
    assert_eq!(i64("x.uint8"), [0, 127, 255]);
    assert_eq!(i64("x.int8"), [0, 127, -128]);
    assert_eq!(i64("x.int16"), [0, 32767, -32768]);
    assert_eq!(i64("x.uint16"), [0, 1, 65535]);
    assert_eq!(i64("x.int32"), [0, 2147483647, -2147483648]);
    assert_eq!(i64("x.uint32"), [0, 1, 4294967295]);
    assert_eq!(i64("x.int64"), [0, 1 << 62, i64::MIN]);
    assert_eq!(i64("x.uint64"), [0, 1, i64::MAX]);
    for float in ["x.float8_e5m2", "x.float8_e4m3fn", "x.float16", "x.bfloat16", "x.float32"] {
        let error = file.tensor(float).unwrap().to_i64().unwrap_err();
        assert!(matches!(error.problem, Problem::WrongDtype { .. }), "{error}");
    }
    assert!(file.tensor("scalar").unwrap().shape.is_empty());
    assert_eq!(file.tensor("empty").unwrap().shape, [0, 4]);
    assert_eq!(file.len(), 18);
}

#[test]
fn numbers_beyond_the_wanted_type_are_errors() {
    let specs = [TensorSpec::new("u", Dtype::U64, [2]), TensorSpec::new("d", Dtype::F64, [2])];
    let u = [1u64.to_le_bytes(), (1u64 << 63).to_le_bytes()].concat();
    let d = [f64::INFINITY.to_le_bytes(), 1e39f64.to_le_bytes()].concat();
    let [spec_u, spec_d] = specs;
    let bytes = safetensors_bytes(&[(spec_u, u), (spec_d, d)], &none()).unwrap();
    let file = SafetensorsFile::from_bytes("m", bytes).unwrap();
    let message = |e: retune_files::safetensors::SafetensorsError| e.to_string();
    assert_eq!(
        message(file.tensor("u").unwrap().to_i64().unwrap_err()),
        "m: tensor 'u', index 1: the U64 value is beyond the range of i64"
    );
    assert_eq!(
        message(file.tensor("d").unwrap().to_f32().unwrap_err()),
        "m: tensor 'd', index 1: the F64 value is beyond the range of f32"
    );
}

#[test]
fn the_ecosystems_adapter_reads_as_written() {
    // The first numbers of two tensors, printed by the pack's own verify.py loader.
    let file = SafetensorsFile::open(packs().join("peft/lora/adapter_model.safetensors")).unwrap();
    assert_eq!(file.metadata()["format"], "pt");
    let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let tensor = file.tensor(name).unwrap();
    assert_eq!((tensor.dtype, tensor.shape), (Dtype::F32, &[4, 64][..]));
    assert_eq!(tensor.to_f32().unwrap()[..3], [0.136_811_4, -0.072_504_53, 0.030_924_609]);
    // The header is padded, so a mapped file is aligned and can be used in place.
    assert_eq!(tensor.as_f32().unwrap(), tensor.to_f32().unwrap());
    assert_eq!(tensor.share()[..], *tensor.bytes);
    assert!(
        SafetensorsFile::open(golden("dtypes"))
            .unwrap()
            .tensor("x.int8")
            .unwrap()
            .as_f32()
            .is_none()
    );
}

/// The blocks and values of gguf-py, see `golden/ggml.py`.
#[test]
fn block_types_agree_with_gguf_py() {
    let file = SafetensorsFile::open(golden("ggml")).unwrap();
    let mut compared = 0;
    for kind in BlockType::ALL {
        if let Some(blocks) = file.get(&format!("{kind}.bytes")) {
            let expected = file.tensor(&format!("{kind}.values")).unwrap().to_f32().unwrap();
            let mut values = vec![f32::NAN; expected.len()];
            kind.dequantize(blocks.bytes, &mut values).unwrap();
            for (i, (y, e)) in values.iter().zip(&expected).enumerate() {
                assert!(y.to_bits() == e.to_bits(), "{kind} value {i}: {y}, expected {e}");
            }
            compared += 1;
        }
        if let Some(expected) = file.get(&format!("{kind}.quantized")) {
            let input = file.tensor(&format!("{kind}.input")).unwrap().to_f32().unwrap();
            let mut bytes = vec![0xaa; expected.bytes.len()];
            kind.quantize(&input, &mut bytes).unwrap();
            for (i, (y, e)) in bytes.iter().zip(expected.bytes).enumerate() {
                assert_eq!(y, e, "{kind} byte {i}");
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 8 + 5);
}

fn specs() -> Vec<TensorSpec> {
    vec![
        TensorSpec::new("b", Dtype::F32, [2, 2]),
        TensorSpec::new("a", Dtype::F16, [4]),
        TensorSpec::new("c", Dtype::U8, [5]),
    ]
}

#[test]
fn the_order_of_writing_does_not_change_the_bytes() {
    let home = tempfile::tempdir().unwrap();
    let write = |name: &str, order: [&str; 3], specs: &[TensorSpec]| {
        let path = home.path().join(name);
        let mut writer = SafetensorsWriter::create(&path, specs, &none()).unwrap();
        for name in order {
            match name {
                "c" => writer.write("c", &[1, 2, 3, 4, 5]).unwrap(),
                name => writer.write_f32(name, &[1.0, -2.0, 0.5, 4.0]).unwrap(),
            }
        }
        assert!(!path.exists());
        writer.finish().unwrap();
        fs::read(path).unwrap()
    };
    let mut reversed = specs();
    reversed.reverse();
    let first = write("x", ["a", "b", "c"], &specs());
    assert_eq!(first, write("y", ["c", "b", "a"], &reversed));
    // Widest type first, then by name; data of 16 + 8 + 5 bytes begins at a multiple of 8.
    let header = r#"{"b":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"a":{"dtype":"F16","shape":[4],"data_offsets":[16,24]},"c":{"dtype":"U8","shape":[5],"data_offsets":[24,29]}}"#;
    let length = u64::from_le_bytes(first[..8].try_into().unwrap()) as usize;
    assert_eq!(length % 8, 0);
    assert_eq!(std::str::from_utf8(&first[8..8 + length]).unwrap().trim_end_matches(' '), header);
    assert_eq!(first.len(), 8 + length + 29);
}

#[test]
fn a_layout_says_where_the_writer_puts_every_byte() {
    let home = tempfile::tempdir().unwrap();
    for max_shard_bytes in [1, 20, u64::MAX] {
        let folder = home.path().join(max_shard_bytes.to_string());
        fs::create_dir(&folder).unwrap();
        let layout = CheckpointLayout::new(&folder, &specs(), &none(), max_shard_bytes).unwrap();
        sharded(&folder, max_shard_bytes);
        assert_eq!(layout.index.is_some(), layout.files.len() > 1);
        if let Some(index) = layout.index {
            let path = folder.join(CheckpointLayout::INDEX_FILE);
            assert_eq!(fs::read_to_string(path).unwrap(), index);
        }
        let weights = Safetensors::open(&folder).unwrap();
        assert_eq!(weights.files().len(), layout.files.len());
        for file in layout.files {
            let bytes = fs::read(folder.join(&file.name)).unwrap();
            assert_eq!(bytes[..file.head.len()], file.head[..]);
            assert_eq!(bytes.len() as u64, file.length);
            for (spec, span) in file.tensors {
                let tensor = weights.tensor(&spec.name).unwrap();
                assert_eq!(tensor.bytes, &bytes[span.start as usize..span.end as usize]);
                assert_eq!((tensor.dtype, tensor.shape), (spec.dtype, &spec.shape[..]));
            }
        }
    }
}

#[test]
fn parts_of_a_tensor_are_read_without_the_map() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x");
    for dtype in Dtype::ALL.into_iter().filter(|dtype| dtype.is_float()) {
        let values: Vec<f32> = (0..7).map(|i| i as f32 - 2.0).collect();
        let spec = TensorSpec::new("w", dtype, [7]);
        write_safetensors(&path, &[(spec, dtype.encode(&values).unwrap())], &none()).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        let tensor = file.tensor("w").unwrap();
        let (mut out, mut scratch) = ([0.0; 3], vec![9; 100]);
        for start in 0..=4 {
            tensor.read_f32(start, &mut out, &mut scratch).unwrap();
            assert_eq!(out, values[start..start + 3], "{dtype} from {start}");
        }
        for start in [5, 7, usize::MAX] {
            let error = tensor.read_f32(start, &mut out, &mut scratch).unwrap_err();
            assert!(matches!(error.problem, Problem::Io(_)), "{error}");
        }
    }
}

fn problem<T>(result: Result<T, SaveError>) -> TensorProblem {
    match result {
        Err(SaveError::Tensor { problem, .. }) => problem,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn a_writer_refuses_what_does_not_fit_and_publishes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x");
    let create = |specs: &[TensorSpec]| SafetensorsWriter::create(&path, specs, &none());
    let twice = [TensorSpec::new("a", Dtype::F32, [1]), TensorSpec::new("a", Dtype::U8, [1])];
    assert_eq!(problem(create(&twice)), TensorProblem::Duplicate);
    let reserved = [TensorSpec::new("__metadata__", Dtype::F32, [1])];
    assert!(matches!(problem(create(&reserved)), TensorProblem::Name(_)));
    for shape in [vec![usize::MAX, 2], vec![usize::MAX, usize::MAX, 0]] {
        let huge = [TensorSpec::new("a", Dtype::F32, shape)];
        assert!(matches!(problem(create(&huge)), TensorProblem::Shape { .. }));
    }
    let sum = ["a", "b"].map(|name| TensorSpec::new(name, Dtype::U8, [usize::MAX - 1]));
    assert!(matches!(problem(create(&sum)), TensorProblem::Shape { .. }));

    let mut writer = create(&specs()).unwrap();
    assert_eq!(
        problem(writer.write("b", &[0; 15])),
        TensorProblem::WrongLength { expected: 16, got: 15 }
    );
    assert!(matches!(problem(writer.write("d", &[])), TensorProblem::Unknown { .. }));
    assert!(matches!(problem(writer.write_f32("c", &[0.0; 5])), TensorProblem::Encode(_)));
    assert!(matches!(problem(writer.write_f32("a", &[1e6; 4])), TensorProblem::Encode(_)));
    writer.write("b", &[0; 16]).unwrap();
    assert_eq!(problem(writer.write("b", &[0; 16])), TensorProblem::Twice);
    assert_eq!(problem(writer.finish()), TensorProblem::Unwritten { others: 1 });
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}

fn sharded(folder: &Path, max_shard_bytes: u64) {
    let mut writer = ShardedWriter::create(folder, &specs(), &none(), max_shard_bytes).unwrap();
    writer.write("c", &[1, 2, 3, 4, 5]).unwrap();
    writer.write_f32("a", &[1.0, 2.0, 3.0, 4.0]).unwrap();
    writer.write_f32("b", &[5.0, 6.0, 7.0, 8.0]).unwrap();
    writer.finish().unwrap();
}

fn check_specs(weights: &Safetensors) {
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(weights.tensor("a").unwrap().to_f32().unwrap(), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(weights.tensor("b").unwrap().to_f32().unwrap(), [5.0, 6.0, 7.0, 8.0]);
    assert_eq!(weights.tensor("c").unwrap().to_i64().unwrap(), [1, 2, 3, 4, 5]);
}

#[test]
fn shards_are_filled_in_order_and_indexed() {
    let home = tempfile::tempdir().unwrap();
    // a takes 8 bytes, b 16, c 5: a alone, then b and c.
    sharded(home.path(), 21);
    let index = fs::read_to_string(home.path().join("model.safetensors.index.json")).unwrap();
    let expected = r#"{
  "metadata": {
    "total_parameters": 13,
    "total_size": 29
  },
  "weight_map": {
    "a": "model-00001-of-00002.safetensors",
    "b": "model-00002-of-00002.safetensors",
    "c": "model-00002-of-00002.safetensors"
  }
}
"#;
    assert_eq!(index, expected);
    check_specs(&Safetensors::open(home.path()).unwrap());
    check_specs(&Safetensors::open(home.path().join("model.safetensors.index.json")).unwrap());
    let shard =
        SafetensorsFile::open(home.path().join("model-00001-of-00002.safetensors")).unwrap();
    assert_eq!(shard.names().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn a_tensor_above_the_limit_gets_its_own_shard_and_one_shard_no_index() {
    let home = tempfile::tempdir().unwrap();
    sharded(home.path(), 1);
    assert_eq!(Safetensors::open(home.path()).unwrap().files().len(), 3);
    let home = tempfile::tempdir().unwrap();
    sharded(home.path(), 29);
    let names: Vec<_> =
        fs::read_dir(home.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["model.safetensors"]);
    check_specs(&Safetensors::open(home.path()).unwrap());
}

#[test]
fn unwritten_tensors_keep_every_shard_back() {
    let home = tempfile::tempdir().unwrap();
    let mut writer = ShardedWriter::create(home.path(), &specs(), &none(), 8).unwrap();
    writer.write_f32("a", &[0.0; 4]).unwrap();
    assert!(matches!(problem(writer.write("x", &[])), TensorProblem::Unknown { .. }));
    assert_eq!(problem(writer.finish()), TensorProblem::Unwritten { others: 0 });
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}

proptest! {
    /// Whatever is written is read back, and the same again.
    #[test]
    fn files_survive_a_round_trip(
        tensors in prop::collection::btree_map(
            any::<String>().prop_filter("reserved", |name| name != "__metadata__"),
            (0usize..15, prop::collection::vec(0usize..4, 0..4), any::<u8>()),
            0..6,
        ),
        metadata in prop::collection::btree_map(any::<String>(), any::<String>(), 0..3),
    ) {
        let tensors: Vec<(TensorSpec, Vec<u8>)> = tensors
            .into_iter()
            .map(|(name, (dtype, shape, byte))| {
                let dtype = Dtype::ALL[dtype];
                let bytes = vec![byte; shape.iter().product::<usize>() * dtype.size()];
                (TensorSpec { name, dtype, shape }, bytes)
            })
            .collect();
        let bytes = safetensors_bytes(&tensors, &metadata).unwrap();
        let file = SafetensorsFile::from_bytes("memory", bytes.clone()).unwrap();
        prop_assert_eq!(&contents(&file), &tensors);
        prop_assert_eq!(file.metadata(), &metadata);
        prop_assert_eq!(safetensors_bytes(&contents(&file), file.metadata()).unwrap(), bytes);
    }

    /// Narrowing and widening again changes a value by at most half a step of the type.
    #[test]
    fn encoding_is_within_half_a_step(values in prop::collection::vec(-400.0f32..400.0, 1..20)) {
        for (dtype, step) in [
            (Dtype::F64, 0.0), (Dtype::F32, 0.0), (Dtype::F16, 1.0 / 2048.0),
            (Dtype::BF16, 1.0 / 256.0), (Dtype::F8_E4M3, 1.0 / 16.0), (Dtype::F8_E5M2, 1.0 / 8.0),
        ] {
            let spec = TensorSpec::new("x", dtype, [values.len()]);
            let bytes = dtype.encode(&values).unwrap();
            let file = safetensors_bytes(&[(spec, bytes)], &BTreeMap::new()).unwrap();
            let file = SafetensorsFile::from_bytes("memory", file).unwrap();
            let back = file.tensor("x").unwrap().to_f32().unwrap();
            for (v, y) in values.iter().zip(back) {
                prop_assert!((v - y).abs() <= step * v.abs().max(1.0 / 64.0), "{dtype}: {v} became {y}");
            }
        }
    }
}
