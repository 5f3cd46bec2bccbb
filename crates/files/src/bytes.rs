//! The bytes of a file, mapped or held, shared without copying.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

/// The whole content of a file: mapped into memory, or a buffer. Cloning shares it.
#[derive(Clone, Debug)]
pub struct FileBytes(Arc<Backing>);

#[derive(Debug)]
enum Backing {
    Mapped { map: Mmap, file: File },
    Held(Vec<u8>),
}

impl FileBytes {
    /// Maps a file. Its pages are read when they are touched, and the kernel may drop them again.
    ///
    /// The file must not be cut short while it is mapped: reading past the new end stops the
    /// process (`SIGBUS`). retune itself never writes a file in place, see [`crate::atomic`].
    ///
    /// # Errors
    /// The system's error; [`io::ErrorKind::InvalidInput`] for a folder, pipe or device, which
    /// cannot be mapped and might block for ever.
    pub fn map(path: &Path) -> io::Result<Self> {
        if !std::fs::metadata(path)?.is_file() {
            let message = "not a regular file; give the path of the file itself";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Self::from(Vec::new()));
        }
        // SAFETY: the map is read-only. Another program changing the file meanwhile could change
        // the bytes seen here; no reader of this crate relies on reading the same bytes twice for
        // its memory safety: lengths and offsets are copied out, checked against the length of
        // the map and used as copied.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self(Arc::new(Backing::Mapped { map, file })))
    }

    /// Shares a part of the bytes, keeping the whole alive. `None` if `range` lies outside.
    pub fn slice(&self, range: Range<usize>) -> Option<FileSlice> {
        self.get(range.clone())?;
        Some(FileSlice { bytes: self.clone(), range })
    }

    /// Copies the bytes from `start` on into `out`, by a read of the file instead of the map.
    ///
    /// Pages of a map that were touched count as memory of the process; a pass over a whole model
    /// that is read this way counts `out` only.
    ///
    /// # Errors
    /// The system's error; [`io::ErrorKind::UnexpectedEof`] beyond the end.
    pub fn read_at(&self, start: usize, out: &mut [u8]) -> io::Result<()> {
        let end = start.checked_add(out.len());
        let inside = end.and_then(|end| self.get(start..end));
        let inside = inside.ok_or(io::ErrorKind::UnexpectedEof)?;
        match &*self.0 {
            Backing::Mapped { file, .. } => read_exact_at(file, out, start as u64),
            Backing::Held(_) => {
                out.copy_from_slice(inside);
                Ok(())
            }
        }
    }
}

/// Reads from a place of a file without moving a cursor others might share.
///
/// # Errors
/// The system's error; [`io::ErrorKind::UnexpectedEof`] beyond the end.
#[cfg(unix)]
pub fn read_exact_at(file: &File, out: &mut [u8], start: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, start)
}

/// Writes to a place of a file without moving a cursor others might share.
///
/// # Errors
/// The system's error.
#[cfg(unix)]
pub fn write_all_at(file: &File, bytes: &[u8], start: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, start)
}

/// Reads from a place of a file; every call names its place, so a moved cursor harms nobody.
///
/// # Errors
/// The system's error; [`io::ErrorKind::UnexpectedEof`] beyond the end.
#[cfg(windows)]
pub fn read_exact_at(file: &File, mut out: &mut [u8], mut start: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !out.is_empty() {
        match file.seek_read(out, start) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                out = &mut out[n..];
                start += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes to a place of a file; every call names its place, so a moved cursor harms nobody.
///
/// # Errors
/// The system's error.
#[cfg(windows)]
pub fn write_all_at(file: &File, mut bytes: &[u8], mut start: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_write(bytes, start) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                bytes = &bytes[n..];
                start += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Has the system begin to write what waits of a file to the disk, so that little is left to wait
/// for when the file is flushed.
///
/// On Linux nothing is waited for and nothing is promised: unlike a flush it makes the file system
/// commit nothing, which would wait for what other programs write too. What is on the disk already
/// leaves the cache.
///
/// # Errors
/// The system's error.
pub fn start_writing(file: &File) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    return Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?);
    #[cfg(not(target_os = "linux"))]
    file.sync_data()
}

impl From<Vec<u8>> for FileBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Backing::Held(bytes)))
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &*self.0 {
            Backing::Mapped { map, .. } => map,
            Backing::Held(bytes) => bytes,
        }
    }
}

/// A part of a [`FileBytes`], for owners that outlive the reader: frozen weights of a model.
#[derive(Clone, Debug)]
pub struct FileSlice {
    bytes: FileBytes,
    range: Range<usize>,
}

impl FileSlice {
    /// Shares a range that is known to lie inside.
    pub(crate) fn new(bytes: &FileBytes, range: Range<usize>) -> Self {
        debug_assert!(bytes.get(range.clone()).is_some());
        Self { bytes: bytes.clone(), range }
    }

    /// Copies a part's bytes from `start` on into `out`, as [`FileBytes::read_at`].
    ///
    /// # Errors
    /// The system's error; [`io::ErrorKind::UnexpectedEof`] beyond the part's end.
    pub fn read_at(&self, start: usize, out: &mut [u8]) -> io::Result<()> {
        if start.checked_add(out.len()).is_none_or(|end| end > self.range.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes.read_at(self.range.start + start, out)
    }
}

impl AsRef<[u8]> for FileSlice {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Deref for FileSlice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_file_outlives_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, [1, 2, 3, 4]).unwrap();
        let bytes = FileBytes::map(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let part = bytes.slice(1..3).unwrap();
        assert_eq!(bytes[..], [1, 2, 3, 4]);
        let mut read = [0; 2];
        bytes.read_at(2, &mut read).unwrap();
        assert_eq!(read, [3, 4]);
        drop(bytes);
        assert_eq!(part[..], [2, 3]);
        part.read_at(1, &mut read[..1]).unwrap();
        assert_eq!(read, [3, 4]);
        assert!(part.read_at(1, &mut read).is_err(), "beyond the part, inside the file");
    }

    #[test]
    fn reads_beyond_the_end_are_refused() {
        let bytes = FileBytes::from(vec![1, 2, 3, 4]);
        let mut read = [0; 2];
        bytes.read_at(1, &mut read).unwrap();
        assert_eq!(read, [2, 3]);
        for start in [3, 4, usize::MAX] {
            let error = bytes.read_at(start, &mut read).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{start}");
        }
    }

    #[test]
    fn what_is_being_written_stays_readable() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let file = File::create(&path).unwrap();
        for part in 0..4 {
            write_all_at(&file, &[part; 5000], u64::from(part) * 5000).unwrap();
            start_writing(&file).unwrap();
        }
        let expected: Vec<u8> = (0..4).flat_map(|part| [part; 5000]).collect();
        assert_eq!(std::fs::read(&path).unwrap(), expected);
    }

    #[test]
    fn parts_outside_are_refused() {
        let bytes = FileBytes::from(vec![0; 4]);
        assert!(bytes.slice(4..4).is_some());
        assert!(bytes.slice(3..5).is_none());
        #[expect(clippy::reversed_empty_ranges, reason = "the reversed range is the case tested")]
        let reversed = 3..2;
        assert!(bytes.slice(reversed).is_none());
    }

    #[test]
    fn an_empty_file_is_empty_and_a_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("x"), []).unwrap();
        assert!(FileBytes::map(&folder.path().join("x")).unwrap().is_empty());
        let error = FileBytes::map(folder.path()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
