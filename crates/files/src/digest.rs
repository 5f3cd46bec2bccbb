//! Checksums of files.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

const STEP_BYTES: usize = 1 << 20;

/// Computes the SHA-256 of a file as 64 lower-case hexadecimal digits, reading a megabyte at a time.
///
/// # Errors
/// The system's error if the file cannot be read.
/// # Examples
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("x");
/// std::fs::write(&path, "abc")?;
/// assert!(retune_files::sha256_file(&path)?.starts_with("ba7816bf"));
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn sha256_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut step = vec![0; STEP_BYTES];
    loop {
        match file.read(&mut step) {
            Ok(0) => return Ok(hex(hash)),
            Ok(n) => hash.update(&step[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Computes the SHA-256 of bytes as 64 lower-case hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    hex(Sha256::new_with_prefix(bytes))
}

fn hex(hash: Sha256) -> String {
    format!("{:x}", hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of FIPS 180-2, and the empty text.
    #[test]
    fn known_texts_have_known_digests() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256(b""), empty);
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(b"abc"), abc);
        // A million times "a", less than a step; and more than one step.
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a");
        std::fs::write(&path, vec![b'a'; 1_000_000]).unwrap();
        let million = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
        assert_eq!(sha256_file(&path).unwrap(), million);
        let large = vec![7; 3 * STEP_BYTES + 5];
        std::fs::write(&path, &large).unwrap();
        assert_eq!(sha256_file(&path).unwrap(), sha256(&large));
        assert!(sha256_file(&home.path().join("no")).is_err());
    }
}
