//! Any bytes are read as safetensors or refused, and what is read can be written and read again.
//!
//! `cargo +nightly fuzz run safetensors`
#![no_main]

use libfuzzer_sys::fuzz_target;
use retune_files::safetensors::{SafetensorsFile, TensorSpec, safetensors_bytes};

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = SafetensorsFile::from_bytes("fuzz", bytes.to_vec()) else { return };
    let mut tensors = Vec::new();
    for tensor in file.tensors() {
        let _ = (tensor.to_f32(), tensor.to_i64(), tensor.as_f32(), tensor.share());
        tensors.push((TensorSpec::new(tensor.name, tensor.dtype, tensor.shape), tensor.bytes));
    }
    let written =
        safetensors_bytes(&tensors, file.metadata()).expect("what was read can be written");
    let again =
        SafetensorsFile::from_bytes("again", written).expect("what was written can be read");
    assert_eq!(again.metadata(), file.metadata());
    assert_eq!(again.len(), tensors.len());
    for (spec, bytes) in tensors {
        assert_eq!(again.tensor(&spec.name).expect("every tensor is kept").bytes, bytes);
    }
});
