//! Packed sets of pictures: IDX (MNIST and its like, plain or gzipped) and CIFAR's binary files.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use super::Picture;
use crate::error::{Error, Result};

/// The most bytes a packed file may unpack to.
const MAX_BYTES: u64 = 4 << 30;

/// The side of CIFAR's pictures.
const CIFAR_SIDE: usize = 32;

/// Pictures of one size with their classes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    width: usize,
    height: usize,
    channels: usize,
    /// All numbers, picture by picture, `[height, width, channels]` each.
    values: Vec<u8>,
    /// The class of each picture.
    pub labels: Vec<u32>,
    /// What the file is.
    pub kind: &'static str,
}

impl Packed {
    /// Returns the number of pictures.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Returns whether there is no picture.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Returns one picture.
    ///
    /// # Panics
    /// If `index` is not below [`Packed::len`].
    pub fn picture(&self, index: usize) -> Picture {
        let size = self.width * self.height * self.channels;
        let values = self.values[index * size..(index + 1) * size].to_vec();
        Picture { width: self.width, height: self.height, channels: self.channels, values }
    }

    /// Reads a packed file; the classes of an IDX file lie in a second file beside it, named as
    /// `labels` and `idx1` where the first is named `images` and `idx3`.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::File`] if a file is missing, damaged or of another kind.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = unpacked(path)?;
        if bytes.starts_with(&[0, 0]) && bytes.len() >= 4 && (1..=4).contains(&bytes[3]) {
            return idx(path, &bytes);
        }
        cifar(path, &bytes)
    }

    /// Adds the pictures of another file.
    ///
    /// # Errors
    /// [`Error::File`] if they are of another size.
    pub fn append(&mut self, path: &Path, other: Self) -> Result<()> {
        let size = |packed: &Self| [packed.height, packed.width, packed.channels];
        if size(self) != size(&other) {
            return Err(Error::file(
                path,
                format!(
                    "its pictures have the size {:?}, those of the files before it {:?}",
                    size(&other),
                    size(self)
                ),
                "give files of one set",
            ));
        }
        self.values.extend(other.values);
        self.labels.extend(other.labels);
        Ok(())
    }
}

/// Reads a file whole, through gzip where it begins so.
fn unpacked(path: &Path) -> Result<Vec<u8>> {
    let read = |source: &mut dyn Read| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        source
            .take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| Error::file(path, format!("it cannot be read: {error}"), AGAIN))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(Error::file(
                path,
                format!("it unpacks to more than {MAX_BYTES} bytes"),
                "split it into several files",
            ));
        }
        Ok(bytes)
    };
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let bytes = read(&mut file)?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        read(&mut MultiGzDecoder::new(&bytes[..]))
    } else {
        Ok(bytes)
    }
}

const AGAIN: &str = "get the file again: it is damaged";

/// The numbers of an IDX file of bytes, and its sizes.
fn idx_parts<'a>(
    path: &Path,
    bytes: &'a [u8],
    dimensions: &[u8],
) -> Result<(Vec<usize>, &'a [u8])> {
    let wrong = |problem: String| Error::file(path, problem, AGAIN);
    let (kind, rank) = match bytes {
        [0, 0, kind, rank, ..] => (*kind, *rank),
        _ => return Err(wrong("it does not begin as an IDX file does".to_owned())),
    };
    if kind != 8 || !dimensions.contains(&rank) {
        return Err(wrong(format!(
            "it holds numbers of type {kind:#x} in {rank} dimensions; expected bytes (0x8) in \
             {dimensions:?}"
        )));
    }
    let start = 4 + 4 * usize::from(rank);
    let header = bytes.get(4..start).ok_or_else(|| wrong("its header is cut off".to_owned()))?;
    let sizes: Vec<usize> = header
        .chunks_exact(4)
        .map(|size| u32::from_be_bytes([size[0], size[1], size[2], size[3]]) as usize)
        .collect();
    let count = sizes.iter().try_fold(1_usize, |count, size| count.checked_mul(*size));
    let values = &bytes[start..];
    if count != Some(values.len()) || values.is_empty() {
        return Err(wrong(format!("{} numbers do not make up {sizes:?}", values.len())));
    }
    Ok((sizes, values))
}

/// Returns the name of the file with the classes of a file of pictures.
fn labels_of(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let labels = name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1");
    if labels == name {
        return None;
    }
    let plain = labels.strip_suffix(".gz").unwrap_or(&labels);
    let names = [labels.clone(), plain.to_owned(), format!("{plain}.gz")];
    names.into_iter().map(|name| path.with_file_name(name)).find(|path| path.exists())
}

fn idx(path: &Path, bytes: &[u8]) -> Result<Packed> {
    let (sizes, values) = idx_parts(path, bytes, &[3, 4])?;
    let labels_path = labels_of(path).ok_or_else(|| {
        Error::file(
            path,
            "the file with its classes is not beside it",
            "name the two as in `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`",
        )
    })?;
    let bytes = unpacked(&labels_path)?;
    let (_, labels) = idx_parts(&labels_path, &bytes, &[1])?;
    if labels.len() != sizes[0] {
        return Err(Error::file(
            &labels_path,
            format!("it has {} classes for {} pictures", labels.len(), sizes[0]),
            AGAIN,
        ));
    }
    Ok(Packed {
        width: sizes[2],
        height: sizes[1],
        channels: sizes.get(3).copied().unwrap_or(1),
        values: values.to_vec(),
        labels: labels.iter().map(|label| u32::from(*label)).collect(),
        kind: "IDX",
    })
}

/// Reads CIFAR-10's records (class, then red, green and blue) or CIFAR-100's (coarse and fine class
/// before them; the fine one counts).
fn cifar(path: &Path, bytes: &[u8]) -> Result<Packed> {
    let plane = CIFAR_SIDE * CIFAR_SIDE;
    let records = |before: usize| before + 3 * plane;
    let (before, kind) = match bytes.len() {
        0 => return Err(Error::file(path, "it is empty", AGAIN)),
        size if size.is_multiple_of(records(1)) => (1, "CIFAR-10 binary"),
        size if size.is_multiple_of(records(2)) => (2, "CIFAR-100 binary"),
        size => {
            return Err(Error::file(
                path,
                format!(
                    "{size} bytes are neither an IDX file nor records of CIFAR-10 (3073 bytes) or \
                     CIFAR-100 (3074)"
                ),
                "give an IDX or CIFAR file, a folder of pictures, or rows with an `image` field",
            ));
        }
    };
    let mut values = Vec::with_capacity(bytes.len());
    let mut labels = Vec::new();
    for record in bytes.chunks_exact(records(before)) {
        labels.push(u32::from(record[before - 1]));
        let planes = &record[before..];
        values.extend((0..plane).flat_map(|i| [0, 1, 2].map(|c| planes[c * plane + i])));
    }
    Ok(Packed { width: CIFAR_SIDE, height: CIFAR_SIDE, channels: 3, values, labels, kind })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn idx_file(rank: u8, sizes: &[u32], values: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, rank];
        bytes.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
        bytes.extend(values);
        bytes
    }

    fn gzipped(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn idx_files_are_read_plain_and_gzipped() {
        let folder = tempfile::tempdir().unwrap();
        let images = folder.path().join("t10k-images-idx3-ubyte.gz");
        let pictures = idx_file(3, &[2, 2, 1], &[1, 2, 3, 4]);
        std::fs::write(&images, gzipped(&pictures)).unwrap();
        let error = Packed::read(&images).unwrap_err().to_string();
        assert!(error.contains("not beside it"), "{error}");
        let labels = folder.path().join("t10k-labels-idx1-ubyte");
        std::fs::write(&labels, idx_file(1, &[2], &[7, 9])).unwrap();
        let packed = Packed::read(&images).unwrap();
        assert_eq!((packed.labels.as_slice(), packed.kind), (&[7, 9][..], "IDX"));
        let second = Picture { width: 1, height: 2, channels: 1, values: vec![3, 4] };
        assert_eq!(packed.picture(1), second);

        std::fs::write(&labels, idx_file(1, &[1], &[7])).unwrap();
        assert!(Packed::read(&images).unwrap_err().to_string().contains("1 classes for 2"));
        // One number too few, sizes that overflow, floats, a gzip file that is cut off.
        for broken in [
            idx_file(3, &[2, 2, 1], &[1, 2, 3]),
            idx_file(3, &[u32::MAX, u32::MAX, u32::MAX], &[1]),
            [&[0, 0, 0x0d, 3][..], &[0; 12]].concat(),
            gzipped(&pictures)[..20].to_vec(),
        ] {
            std::fs::write(&images, broken).unwrap();
            let error = Packed::read(&images).unwrap_err().to_string();
            assert!(error.contains("t10k-images"), "{error}");
        }
    }

    #[test]
    fn cifar_planes_become_pixels() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test.bin");
        let mut record = vec![4_u8];
        for value in [10, 20, 30] {
            record.extend([value; 1024]);
        }
        record[1] = 11;
        std::fs::write(&path, record.repeat(2)).unwrap();
        let packed = Packed::read(&path).unwrap();
        assert_eq!(packed.labels, [4, 4]);
        let picture = packed.picture(1);
        assert_eq!(picture.values[..6], [11, 20, 30, 10, 20, 30]);
        assert_eq!((picture.width, picture.height, picture.channels), (32, 32, 3));
        let fine: Vec<u8> = [&[3][..], &record].concat();
        std::fs::write(&path, fine).unwrap();
        assert_eq!(Packed::read(&path).unwrap().labels, [4]);
        std::fs::write(&path, &record[..99]).unwrap();
        assert!(Packed::read(&path).unwrap_err().to_string().contains("99 bytes"));
    }
}
