//! The identity of a base: a hash over what its weights are, whatever files they lie in.

use rayon::prelude::*;
use retune_core::Result;
use retune_core::weights::{Stored, WeightSource};
use sha2::{Digest, Sha256};

/// Hashes names, shapes and values of all tensors, as 64 hexadecimal digits.
///
/// Values are hashed as they are read: plain ones as little-endian `f32`, so that a checkpoint
/// and its copy in a wider type have one identity; quantised blocks as they lie.
///
/// # Cost
/// One pass over the weights with one tensor per thread in memory; about a second per gigabyte
/// and core where the processor has SHA instructions.
///
/// # Errors
/// If a tensor cannot be read.
pub fn fingerprint(source: &dyn WeightSource) -> Result<String> {
    let names = source.names();
    let tensors: Vec<[u8; 32]> =
        names.par_iter().map(|name| tensor(source, name)).collect::<Result<_>>()?;
    let mut all = Sha256::new();
    for digest in tensors {
        all.update(digest);
    }
    Ok(all.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn tensor(source: &dyn WeightSource, name: &str) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name);
    let shape = source.shape(name).unwrap_or_default();
    hash.update((shape.len() as u64).to_le_bytes());
    shape.iter().for_each(|side| hash.update((*side as u64).to_le_bytes()));
    match source.read(name)? {
        Stored::Values(values) => {
            hash.update(*b"f32 ");
            if cfg!(target_endian = "little") {
                hash.update(bytemuck::cast_slice::<f32, u8>(&values));
            } else {
                values.iter().for_each(|value| hash.update(value.to_le_bytes()));
            }
        }
        Stored::Blocks(kind, bytes) => {
            hash.update(kind.name());
            hash.update((*bytes).as_ref());
        }
    }
    Ok(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[derive(Debug)]
    struct Memory(BTreeMap<&'static str, (Vec<usize>, Vec<f32>)>);

    impl WeightSource for Memory {
        fn names(&self) -> Vec<String> {
            self.0.keys().map(|name| (*name).to_owned()).collect()
        }
        fn shape(&self, name: &str) -> Option<Vec<usize>> {
            self.0.get(name).map(|(shape, _)| shape.clone())
        }
        fn read(&self, name: &str) -> Result<Stored> {
            Ok(Stored::Values(self.0[name].1.clone()))
        }
    }

    fn of(tensors: &[(&'static str, &[usize], &[f32])]) -> String {
        let tensors = tensors.iter().map(|(n, s, v)| (*n, (s.to_vec(), v.to_vec()))).collect();
        fingerprint(&Memory(tensors)).unwrap()
    }

    #[test]
    fn every_part_counts() {
        let base = of(&[("a", &[2], &[1.0, 2.0]), ("b", &[1], &[3.0])]);
        assert_eq!(base.len(), 64);
        assert_eq!(base, of(&[("b", &[1], &[3.0]), ("a", &[2], &[1.0, 2.0])]));
        for other in [
            of(&[("a", &[2], &[1.0, 2.0]), ("c", &[1], &[3.0])]),
            of(&[("a", &[1, 2], &[1.0, 2.0]), ("b", &[1], &[3.0])]),
            of(&[("a", &[2], &[1.0, -2.0]), ("b", &[1], &[3.0])]),
            of(&[("a", &[2], &[1.0, 2.0])]),
        ] {
            assert_ne!(base, other);
        }
    }
}
