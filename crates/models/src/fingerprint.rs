//! The identity of a base: a hash over what its files hold.

use rayon::prelude::*;
use sha2::{Digest, Sha256};

/// One tensor as its file has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: &'a [usize],
    pub(crate) kind: &'static str,
    pub(crate) bytes: &'a [u8],
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
    hash.update(part.bytes);
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Part<'_> =
        Part { name: "a", shape: &[2], kind: "F32", bytes: &[1, 2, 3, 4, 5, 6, 7, 8] };
    const B: Part<'_> = Part { name: "b", shape: &[1], kind: "F32", bytes: &[0; 4] };

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
}
