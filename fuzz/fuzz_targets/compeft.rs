//! Any bytes are read as ComPEFT or refused, and what is read can be written and read again.
//!
//! `cargo +nightly fuzz run compeft`
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use retune_files::compeft::{CompeftFile, CompeftWriter, Content};
use retune_files::golomb::{Coding, decode};

/// Most entries decoded; beyond, a run tests the allocator.
const MAX_ENTRIES: usize = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    // The checksum keeps a fuzzer out of the streams, so they are also decoded by themselves.
    if let Some((head, stream)) = bytes.split_first_chunk::<8>() {
        let [a, b, c, d, e, f, g, h] = head.map(usize::from);
        let coding = Coding {
            len: a | b << 8,
            num_nonzero: c | d << 8,
            modulus: (e | f << 8) as u32,
            gap_bytes: g | h << 8,
        };
        let _ = decode(&coding, stream, |place, _| assert!(place < coding.len));
    }
    let Ok(file) = CompeftFile::from_bytes("fuzz", bytes.to_vec()) else { return };
    let mut writer = CompeftWriter::new(file.scale(), BTreeMap::new());
    for tensor in file.tensors() {
        match tensor.content {
            Content::Raw(dtype) => {
                writer.raw(tensor.name, dtype, tensor.shape, tensor.bytes).expect("it was read");
            }
            Content::Signs(coding) if coding.len <= MAX_ENTRIES => {
                let mut signs = vec![0; coding.len];
                let put = |place: usize, minus| signs[place] = if minus { -1 } else { 1 };
                if decode(&coding, tensor.bytes, put).is_err() {
                    return;
                }
                writer.signs(tensor.name, tensor.shape, &signs).expect("it was read");
            }
            Content::Signs(_) => return,
        }
    }
    if let Ok(written) = writer.finish() {
        let again = CompeftFile::from_bytes("again", written).expect("what was written is read");
        assert_eq!(again.names().collect::<Vec<_>>(), file.names().collect::<Vec<_>>());
    }
});
