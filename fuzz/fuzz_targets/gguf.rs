//! Any bytes are read as GGUF or refused, and what is read can be written and read again.
//!
//! `cargo +nightly fuzz run gguf`
#![no_main]

use libfuzzer_sys::fuzz_target;
use retune_files::gguf::{GgufFile, GgufSpec, gguf_bytes};

/// The writer refuses names that llama.cpp could not keep.
const MAX_NAME_BYTES: usize = 63;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = GgufFile::from_bytes("fuzz", bytes.to_vec()) else { return };
    let mut tensors = Vec::new();
    for tensor in file.tensors() {
        assert_eq!(tensor.to_f32().len(), tensor.shape.iter().product::<usize>());
        tensors.push((GgufSpec::new(tensor.name, tensor.kind, tensor.shape), tensor.bytes));
    }
    tensors.retain(|(spec, _)| spec.name.len() <= MAX_NAME_BYTES);
    let written = gguf_bytes(file.metadata(), &tensors).expect("what was read can be written");
    let again =
        GgufFile::from_bytes("again", written.clone()).expect("what was written can be read");
    for (spec, bytes) in &tensors {
        let tensor = again.tensor(&spec.name).expect("every tensor is kept");
        assert_eq!((tensor.shape, tensor.bytes), (&spec.shape[..], *bytes));
    }
    // Compared as bytes: NaN among the values is not equal to itself.
    let twice = gguf_bytes(again.metadata(), &tensors).expect("what was written can be written");
    assert_eq!(twice, written);
});
