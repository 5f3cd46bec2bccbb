//! The identity of a base: a hash over what its files hold.

use rayon::prelude::*;
use retune_files::FileSlice;
use sha2::{Digest, Sha256};

/// One tensor as its file has it.
#[derive(Debug, Clone)]
pub(crate) struct Part<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: &'a [usize],
    pub(crate) kind: &'static str,
    pub(crate) bytes: &'a [u8],
    /// The same bytes where they can be read without touching the mapped pages, which would count
    /// as memory of the process from then on.
    pub(crate) file: Option<FileSlice>,
}

/// Hashes names, shapes, types and bytes of all tensors, as 64 hexadecimal digits.
///
/// The order of tensors in the files, their shards and padding do not count, nor what the
/// checkpoint is opened for.
///
/// # Cost
/// One pass over the mapped weights, on all threads; about a second per gigabyte and core where
/// the processor has SHA instructions.
pub(crate) fn fingerprint(mut parts: Vec<Part<'_>>) -> String {
    parts.sort_by_key(|part| part.name);
    let digests: Vec<[u8; 32]> = parts.par_iter().map(digest).collect();
    let mut all = Sha256::new();
    for digest in digests {
        all.update(digest);
    }
    format!("{:x}", all.finalize())
}

fn digest(part: &Part<'_>) -> [u8; 32] {
    let mut hash = Sha256::new();
    // Lengths go first, so that no two tensors run together.
    for text in [part.name, part.kind] {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hash.update((part.shape.len() as u64).to_le_bytes());
    part.shape.iter().for_each(|side| hash.update((*side as u64).to_le_bytes()));
    match &part.file {
        Some(file) => update_by_reading(&mut hash, file),
        None => hash.update(part.bytes),
    }
    hash.finalize().into()
}

fn update_by_reading(hash: &mut Sha256, file: &FileSlice) {
    const PIECE: usize = 1 << 18;
    let length = file.len();
    let mut piece = vec![0; PIECE.min(length)];
    for start in (0..length).step_by(PIECE) {
        let end = length.min(start + PIECE);
        let piece = &mut piece[..end - start];
        match file.read_at(start, piece) {
            Ok(()) => hash.update(piece),
            // The map may still have what a read could not give.
            Err(_) => hash.update(&file[start..end]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_files::FileBytes;

    const A: Part<'_> =
        Part { name: "a", shape: &[2], kind: "F32", bytes: &[1, 2, 3, 4, 5, 6, 7, 8], file: None };
    const B: Part<'_> = Part { name: "b", shape: &[1], kind: "F32", bytes: &[0; 4], file: None };

    #[test]
    fn every_part_counts_and_order_does_not() {
        let base = fingerprint(vec![A, B]);
        assert_eq!(base.len(), 64);
        assert_eq!(base, fingerprint(vec![B, A]));
        for other in [
            vec![A],
            vec![A, Part { name: "c", ..B }],
            vec![Part { shape: &[1, 2], ..A }, B],
            vec![A, Part { kind: "I32", ..B }],
            vec![A, Part { bytes: &[0, 0, 0, 1], ..B }],
        ] {
            assert_ne!(base, fingerprint(other));
        }
    }

    #[test]
    fn reading_a_file_gives_the_hash_of_its_bytes() {
        let bytes: Vec<u8> = (0..600_000_u32).map(|x| (x % 251) as u8).collect();
        let file = FileBytes::from(bytes.clone()).slice(3..599_990);
        let part =
            |file| Part { name: "a", shape: &[1], kind: "U8", bytes: &bytes[3..599_990], file };
        assert!(file.is_some());
        assert_eq!(fingerprint(vec![part(None)]), fingerprint(vec![part(file)]));
    }
}
