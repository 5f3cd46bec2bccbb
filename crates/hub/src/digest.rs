//! SHA-256 of files.

use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::layout::{ModelFiles, model_in};
use crate::{HubError, HubEvent, HubObserver};

/// Computes the SHA-256 of a file, in lower-case hex.
///
/// # Errors
/// [`HubError::Io`] if the file cannot be read.
///
/// # Cost
/// Reads the whole file once, with 1 MiB of memory.
pub fn file_sha256(path: &Path) -> Result<String, HubError> {
    let mut file = std::fs::File::open(path).map_err(HubError::io("open", path))?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).map_err(HubError::io("read", path))?;
        if count == 0 {
            return Ok(hex(&digest.finalize()));
        }
        digest.update(&buffer[..count]);
    }
}

/// Computes one SHA-256 that stands for a model's weights, whatever their folder is called.
///
/// For a single weight file it is that file's own hash, so that a copy of a catalogue model has
/// the hash its catalogue entry pins. For shards it is the hash of one line `HASH  NAME` per
/// shard, in order of name.
///
/// # Errors
/// [`HubError::NotAModel`] if a folder holds no weights; [`HubError::Io`] if a file cannot be read.
///
/// # Cost
/// Reads every weight file once.
pub fn weights_sha256(path: &Path, observer: &mut dyn HubObserver) -> Result<String, HubError> {
    if !path.is_dir() {
        observer.event(&HubEvent::Checking { what: &path.display().to_string() });
        return file_sha256(path);
    }
    let names = match model_in(path).map_err(|missing| missing.at(path))? {
        ModelFiles::Safetensors(names) => names,
        ModelFiles::Gguf(name) => vec![name],
    };
    let mut hashes = Vec::with_capacity(names.len());
    for name in names {
        observer.event(&HubEvent::Checking { what: &name });
        let hash = file_sha256(&path.join(&name))?;
        hashes.push((name, hash));
    }
    Ok(combine(hashes))
}

/// Joins the hashes of a model's weight files into one, as [`weights_sha256`] describes.
pub(crate) fn combine(mut hashes: Vec<(String, String)>) -> String {
    if hashes.len() == 1
        && let Some((_, hash)) = hashes.pop()
    {
        return hash;
    }
    hashes.sort();
    let mut digest = Sha256::new();
    for (name, hash) in hashes {
        digest.update(format!("{hash}  {name}\n"));
    }
    hex(&digest.finalize())
}

/// Whether `text` is a SHA-256 in lower-case hex.
pub(crate) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    // sha256sum of the three bytes "abc": FIPS 180-2, appendix B.1.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn the_standard_vector_holds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(file_sha256(&path).unwrap(), ABC);
    }

    #[test]
    fn one_file_keeps_its_hash_and_shards_are_joined_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("config.json", "{}");
        write("model.safetensors", "abc");
        assert_eq!(weights_sha256(folder.path(), &mut ()).unwrap(), ABC);

        // printf 'HASH  a\nHASH  b\n' | sha256sum, HASH the vector above
        let joined = combine(vec![("b".into(), ABC.into()), ("a".into(), ABC.into())]);
        assert_eq!(joined, combine(vec![("a".into(), ABC.into()), ("b".into(), ABC.into())]));
        assert_eq!(joined, "6e0534855d1d183250459e82c311fb77578cf75019787625a10154399462260d");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = file_sha256(Path::new("/nowhere/x")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/x"), "{error}");
    }
}
