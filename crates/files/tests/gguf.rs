//! GGUF: what is written is read back, and bytes laid out by hand.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may panic as tests do")]

use std::fs;

use proptest::prelude::*;
use retune_files::ggml::BlockType;
use retune_files::gguf::{
    Array, GgufFile, GgufSpec, GgufWriter, Metadata, Problem, Value, gguf_bytes,
};
use retune_files::{SaveError, TensorProblem};

fn all_values() -> Metadata {
    let mut metadata = Metadata::default();
    metadata.insert("general.architecture", "llama");
    metadata.insert("u8", 255u8);
    metadata.insert("i8", -128i8);
    metadata.insert("u16", 65535u16);
    metadata.insert("i16", -32768i16);
    metadata.insert("u32", u32::MAX);
    metadata.insert("i32", i32::MIN);
    metadata.insert("f32", 1e-5f32);
    metadata.insert("bool", true);
    metadata.insert("u64", u64::MAX);
    metadata.insert("i64", i64::MIN);
    metadata.insert("f64", 0.1f64);
    metadata.insert("u8s", vec![1u8, 2]);
    metadata.insert("i8s", vec![-1i8]);
    metadata.insert("u16s", vec![1u16, 2]);
    metadata.insert("i16s", vec![-1i16, 2]);
    metadata.insert("u32s", vec![1u32, 2]);
    metadata.insert("i32s", vec![-1i32, 2, 3]);
    metadata.insert("f32s", vec![0.5f32, -0.0]);
    metadata.insert("bools", vec![true, false]);
    metadata.insert("strings", vec!["a".to_owned(), String::new(), "ü".to_owned()]);
    metadata.insert("u64s", vec![u64::MAX]);
    metadata.insert("i64s", Vec::<i64>::new());
    metadata.insert("f64s", vec![0.1f64]);
    let nested = Array::Array(vec![Array::U8(vec![1]), Array::String(vec!["x".to_owned()])]);
    metadata.insert("arrays", Value::Array(nested));
    metadata
}

#[test]
fn bytes_are_laid_out_as_the_specification_says() {
    let mut metadata = Metadata::default();
    metadata.insert("a", 7u32);
    metadata.insert("t", vec!["xy".to_owned()]);
    let bytes = gguf_bytes(
        &metadata,
        &[
            (GgufSpec::new("m", BlockType::F32, [2, 3]), [1u8; 24]),
            (GgufSpec::new("n", BlockType::F16, [12]), [2u8; 24]),
        ],
    )
    .unwrap();
    let mut expected: Vec<u8> = Vec::new();
    expected.extend(b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
    expected.extend(b"\x01\0\0\0\0\0\0\0a\x04\0\0\0\x07\0\0\0");
    expected.extend(b"\x01\0\0\0\0\0\0\0t\x09\0\0\0\x08\0\0\0\x01\0\0\0\0\0\0\0");
    expected.extend(b"\x02\0\0\0\0\0\0\0xy");
    // [2, 3] is stored fastest dimension first: 3, 2. F32 is 0, F16 is 1.
    expected.extend(b"\x01\0\0\0\0\0\0\0m\x02\0\0\0\x03\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
    expected.extend(b"\0\0\0\0\0\0\0\0\0\0\0\0");
    expected.extend(b"\x01\0\0\0\0\0\0\0n\x01\0\0\0\x0c\0\0\0\0\0\0\0");
    expected.extend(b"\x01\0\0\0\x20\0\0\0\0\0\0\0");
    expected.resize(expected.len().next_multiple_of(32), 0);
    for byte in [1, 2] {
        expected.extend([byte; 24]);
        expected.extend([0; 8]);
    }
    assert_eq!(bytes, expected);

    let file = GgufFile::from_bytes("memory", bytes).unwrap();
    assert_eq!(file.tensor("m").unwrap().shape, [2, 3]);
    assert_eq!(file.tensor("n").unwrap().bytes, [2; 24]);
    assert_eq!(file.tensor("n").unwrap().share()[..], [2; 24]);
}

#[test]
fn version_2_is_read_too() {
    let mut bytes = gguf_bytes::<&[u8]>(&all_values(), &[]).unwrap();
    bytes[4] = 2;
    assert_eq!(GgufFile::from_bytes("v2", bytes).unwrap().metadata().len(), all_values().len());
}

#[test]
fn every_value_type_survives() {
    let bytes = gguf_bytes::<&[u8]>(&all_values(), &[]).unwrap();
    let file = GgufFile::from_bytes("memory", bytes.clone()).unwrap();
    let pairs = |metadata: &Metadata| {
        metadata.iter().map(|(k, v)| (k.to_owned(), v.clone())).collect::<Vec<_>>()
    };
    assert_eq!(pairs(file.metadata()), pairs(&all_values()));
    assert_eq!(gguf_bytes::<&[u8]>(file.metadata(), &[]).unwrap(), bytes);
}

#[test]
fn getters_take_any_width_and_name_the_key() {
    let m = all_values();
    assert_eq!(m.u64("u8").unwrap(), 255);
    assert_eq!(m.u64("u64").unwrap(), u64::MAX);
    assert_eq!(m.usize("u32").unwrap(), 4294967295);
    assert_eq!(m.i64("i64").unwrap(), i64::MIN);
    assert_eq!(m.i64("i8").unwrap(), -128);
    assert_eq!(m.f32("f32").unwrap(), 1e-5);
    assert_eq!(m.f32("f64").unwrap(), 0.1);
    assert!(m.bool("bool").unwrap());
    assert_eq!(m.str("general.architecture").unwrap(), "llama");
    assert_eq!(m.strings("strings").unwrap(), ["a", "", "ü"]);
    assert_eq!(m.f32s("f32s").unwrap(), [0.5, -0.0]);
    assert_eq!(m.i64s("i32s").unwrap(), [-1, 2, 3]);
    assert_eq!(m.i64s("u8s").unwrap(), [1, 2]);
    assert_eq!(m.optional("bool", Metadata::bool).unwrap(), Some(true));
    assert_eq!(m.optional("none", Metadata::str).unwrap(), None);
    assert!(matches!(
        m.optional("bool", Metadata::u64).unwrap_err().problem,
        Problem::WrongType { .. }
    ));

    let bytes = gguf_bytes::<&[u8]>(&m, &[]).unwrap();
    let file = GgufFile::from_bytes("x.gguf", bytes).unwrap();
    let m = file.metadata();
    let text = |e: retune_files::gguf::GgufError| e.to_string();
    assert_eq!(
        text(m.u64("i8").unwrap_err()),
        "x.gguf: gives key 'i8' the value -128 (i8), expected an integer of 0 or more"
    );
    assert_eq!(
        text(m.i64("u64").unwrap_err()),
        "x.gguf: gives key 'u64' the value 18446744073709551615 (u64), expected an integer"
    );
    assert_eq!(
        text(m.str("f32s").unwrap_err()),
        "x.gguf: gives key 'f32s' the value an array of 2 f32, expected a text"
    );
    assert_eq!(
        text(m.str("general.architectur").unwrap_err()),
        "x.gguf: has no key 'general.architectur'; near names: general.architecture"
    );
    assert!(m.i64s("u64s").is_err() && m.i64s("f32s").is_err() && m.u64("f32").is_err());
    assert_eq!(text(file.tensor("m").unwrap_err()), "x.gguf: has no tensor 'm'");
}

#[test]
fn tensors_are_written_in_any_order_and_type() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("x.gguf");
    let mut metadata = Metadata::default();
    metadata.insert("general.alignment", 64u32);
    let specs = [
        GgufSpec::new("q", BlockType::Q8_0, [2, 32]),
        GgufSpec::new("f", BlockType::F32, [3]),
        GgufSpec::new("one", BlockType::F16, []),
        GgufSpec::new("none", BlockType::Q4_0, [0, 32]),
    ];
    let values: Vec<f32> = (0..64).map(|i| (i % 32) as f32 - 15.0).collect();
    let mut writer = GgufWriter::create(&path, &metadata, &specs).unwrap();
    writer.write_f32("none", &[]).unwrap();
    writer.write_f32("one", &[0.5]).unwrap();
    writer.write("f", &[0, 0, 0x80, 0x3f, 0, 0, 0, 0x40, 0, 0, 0x40, 0x40]).unwrap();
    writer.write_f32("q", &values).unwrap();
    assert!(!path.exists());
    writer.finish().unwrap();

    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["q", "f", "one", "none"]);
    assert_eq!(file.tensor("f").unwrap().to_f32(), [1.0, 2.0, 3.0]);
    assert_eq!(file.tensor("one").unwrap().to_f32(), [0.5]);
    assert!(file.tensor("none").unwrap().to_f32().is_empty());
    let q = file.tensor("q").unwrap();
    assert_eq!((q.len(), q.shape), (64, &[2, 32][..]));
    // Steps are 16 / 127 wide.
    for (y, v) in q.to_f32().iter().zip(&values) {
        assert!((y - v).abs() < 0.07, "{v} became {y}");
    }
    let bytes = fs::read(&path).unwrap();
    let tensors: Vec<_> = specs
        .into_iter()
        .map(|spec| {
            let bytes = file.tensor(&spec.name).unwrap().bytes;
            (spec, bytes)
        })
        .collect();
    assert_eq!(gguf_bytes(&metadata, &tensors).unwrap(), bytes);
    assert_eq!(bytes.len() % 64, 0);
}

fn problem(specs: &[GgufSpec]) -> TensorProblem {
    let home = tempfile::tempdir().unwrap();
    match GgufWriter::create(&home.path().join("x"), &Metadata::default(), specs) {
        Err(SaveError::Tensor { problem, .. }) => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_writer_refuses_what_does_not_fit_the_format() {
    let spec = |name: &str, shape: &[usize]| GgufSpec::new(name, BlockType::Q4_0, shape);
    assert_eq!(problem(&[spec("a", &[32]), spec("a", &[64])]), TensorProblem::Duplicate);
    assert!(matches!(problem(&[spec(&"n".repeat(64), &[32])]), TensorProblem::Name(_)));
    assert!(matches!(problem(&[spec("a", &[32, 31])]), TensorProblem::Quantize(_)));
    assert!(matches!(problem(&[spec("a", &[1, 1, 1, 1, 32])]), TensorProblem::Shape { .. }));
    let huge = usize::MAX / 64 * 32;
    assert!(matches!(problem(&[spec("a", &[4, huge])]), TensorProblem::Shape { .. }));
    assert!(matches!(
        problem(&[spec("a", &[huge]), spec("b", &[huge])]),
        TensorProblem::Shape { .. }
    ));

    let home = tempfile::tempdir().unwrap();
    let mut metadata = Metadata::default();
    for alignment in [Value::U32(24), Value::U32(0), Value::U64(32), Value::U32(1 << 21)] {
        metadata.insert("general.alignment", alignment);
        let writer = GgufWriter::create(&home.path().join("x"), &metadata, &[]);
        assert!(matches!(writer, Err(SaveError::Unfit { .. })));
    }
    let mut deep = Array::U8(Vec::new());
    for _ in 0..8 {
        deep = Array::Array(vec![deep]);
    }
    let mut metadata = Metadata::default();
    metadata.insert("deep", Value::Array(deep));
    let writer = GgufWriter::create(&home.path().join("x"), &metadata, &[]);
    assert!(matches!(writer, Err(SaveError::Unfit { .. })));

    let specs = [spec("a", &[32])];
    let mut writer =
        GgufWriter::create(&home.path().join("x"), &Metadata::default(), &specs).unwrap();
    for bad in [
        writer.write("a", &[0; 17]),
        writer.write("b", &[]),
        writer.write_f32("a", &[f32::NAN; 32]),
        writer.write_f32("a", &[0.0; 31]),
        writer.write_f32("a", &[0.0; 64]),
        writer.finish(),
    ] {
        assert!(matches!(bad, Err(SaveError::Tensor { .. })), "{bad:?}");
    }
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}

fn any_array() -> impl Strategy<Value = Array> {
    use prop::collection::vec;
    let leaf = prop_oneof![
        vec(any::<u8>(), 0..4).prop_map(Array::U8),
        vec(any::<i16>(), 0..4).prop_map(Array::I16),
        vec(any::<u32>(), 0..4).prop_map(Array::U32),
        vec(-1e9f32..1e9, 0..4).prop_map(Array::F32),
        vec(any::<bool>(), 0..4).prop_map(Array::Bool),
        vec(any::<String>(), 0..4).prop_map(Array::String),
        vec(any::<i64>(), 0..4).prop_map(Array::I64),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| vec(inner, 0..3).prop_map(Array::Array))
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<bool>().prop_map(Value::Bool),
        any::<String>().prop_map(Value::String),
        (-1e300f64..1e300).prop_map(Value::F64),
        any_array().prop_map(Value::Array),
    ]
}

proptest! {
    /// Whatever is written is read back, and the same again.
    #[test]
    fn files_survive_a_round_trip(
        entries in prop::collection::btree_map("[a-z.]{0,9}", any_value(), 0..6),
        tensors in prop::collection::btree_map(
            "[a-zü.]{0,9}",
            (0usize..16, prop::collection::vec(0usize..3, 0..4), any::<u8>()),
            0..5,
        ),
    ) {
        let mut metadata = Metadata::default();
        for (key, value) in entries {
            metadata.insert(key, value);
        }
        let tensors: Vec<(GgufSpec, Vec<u8>)> = tensors
            .into_iter()
            .map(|(name, (kind, mut shape, byte))| {
                let kind = BlockType::ALL[kind];
                shape.push(kind.block_len());
                let numbers = shape.iter().product::<usize>();
                let bytes = vec![byte; numbers / kind.block_len() * kind.block_bytes()];
                (GgufSpec { name, kind, shape }, bytes)
            })
            .collect();
        let bytes = gguf_bytes(&metadata, &tensors).unwrap();
        let file = GgufFile::from_bytes("memory", bytes.clone()).unwrap();
        let back: Vec<_> = file
            .tensors()
            .map(|t| (GgufSpec::new(t.name, t.kind, t.shape), t.bytes.to_vec()))
            .collect();
        prop_assert_eq!(&back, &tensors);
        prop_assert!(file.metadata().iter().eq(metadata.iter()));
        prop_assert_eq!(gguf_bytes(file.metadata(), &back).unwrap(), bytes);
    }
}
