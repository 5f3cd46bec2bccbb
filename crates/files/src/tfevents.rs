//! TensorBoard event files: scalars and texts over steps.
//!
//! A file is a run of TFRecords, each a length and a protobuf message with their CRC32C. Messages
//! are TensorFlow's `Event`; scalars use its `simple_value`, which every TensorBoard reads. Source:
//! `event.proto`, `summary.proto` and `record_writer.h` of
//! <https://github.com/tensorflow/tensorflow>.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::atomic::WriteError;

/// Who writes an event file, and when it was started: the parts of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writer<'a> {
    /// Seconds since 1970 when the run, or its resumption, began.
    pub unix_seconds: u64,
    /// The machine's name.
    pub host: &'a str,
    /// The process's number.
    pub process: u32,
    /// Counts files started by one process within a second.
    pub count: u32,
}

impl Writer<'_> {
    /// Returns the file name TensorBoard looks for. Characters of the host's name other than ASCII
    /// letters, digits, `-` and `.` become `_`.
    pub fn file_name(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-.".contains(c) { c } else { '_' };
        let host: String = self.host.chars().map(plain).collect();
        let Self { unix_seconds, process, count, .. } = self;
        format!("events.out.tfevents.{unix_seconds:010}.{host}.{process}.{count}")
    }
}

/// Appends events to one file; each is in the file when its call returns.
///
/// A crash can cost the last event only; TensorBoard skips a record that is cut short. A resumed
/// run starts a file of its own beside the old one.
/// # Examples
/// ```
/// # use retune_files::tfevents::{EventFile, Writer};
/// # let folder = tempfile::tempdir()?;
/// let writer = Writer { unix_seconds: 1_700_000_000, host: "box", process: 7, count: 0 };
/// let mut events = EventFile::create(folder.path(), writer)?;
/// events.scalar(1_700_000_000.5, 1, "train/loss", 2.25)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Starts a file in a folder that exists.
    ///
    /// # Errors
    /// [`WriteError`], also if a file of that name exists.
    pub fn create(folder: &Path, writer: Writer) -> Result<Self, WriteError> {
        let path = folder.join(writer.file_name());
        let opened = OpenOptions::new().append(true).create_new(true).open(&path);
        let file = opened.map_err(|e| WriteError::appending(&path, e))?;
        let mut events = Self { path, file };
        let mut first = Message::default();
        first.double(1, writer.unix_seconds as f64);
        first.bytes(3, b"brain.Event:2");
        events.append(&first)?;
        Ok(events)
    }

    /// Returns the file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds one number; `wall_time` is in seconds since 1970.
    ///
    /// # Errors
    /// [`WriteError`] if the system refuses; events written before stay.
    pub fn scalar(
        &mut self,
        wall_time: f64,
        step: u64,
        tag: &str,
        value: f32,
    ) -> Result<(), WriteError> {
        let mut summary_value = Message::default();
        summary_value.bytes(1, tag.as_bytes());
        summary_value.float(2, value);
        self.event(wall_time, step, &summary_value)
    }

    /// Adds one text, which TensorBoard shows as Markdown; `wall_time` is in seconds since 1970.
    ///
    /// # Errors
    /// [`WriteError`] if the system refuses; events written before stay.
    pub fn text(
        &mut self,
        wall_time: f64,
        step: u64,
        tag: &str,
        text: &str,
    ) -> Result<(), WriteError> {
        let mut plugin = Message::default();
        plugin.bytes(1, b"text");
        let mut metadata = Message::default();
        metadata.bytes(1, &plugin.0);
        metadata.varint(4, DATA_CLASS_TENSOR);
        let mut dimension = Message::default();
        dimension.varint(1, 1);
        let mut shape = Message::default();
        shape.bytes(2, &dimension.0);
        let mut tensor = Message::default();
        tensor.varint(1, DT_STRING);
        tensor.bytes(2, &shape.0);
        tensor.bytes(8, text.as_bytes());
        let mut summary_value = Message::default();
        summary_value.bytes(1, tag.as_bytes());
        summary_value.bytes(8, &tensor.0);
        summary_value.bytes(9, &metadata.0);
        self.event(wall_time, step, &summary_value)
    }

    fn event(&mut self, wall_time: f64, step: u64, value: &Message) -> Result<(), WriteError> {
        let mut summary = Message::default();
        summary.bytes(1, &value.0);
        let mut event = Message::default();
        event.double(1, wall_time);
        event.varint(2, step);
        event.bytes(5, &summary.0);
        self.append(&event)
    }

    fn append(&mut self, message: &Message) -> Result<(), WriteError> {
        let record = record(&message.0);
        self.file.write_all(&record).map_err(|e| WriteError::appending(&self.path, e))
    }
}

/// TensorFlow's number for tensors of strings.
const DT_STRING: u64 = 7;
/// TensorBoard's number for data that are tensors.
const DATA_CLASS_TENSOR: u64 = 2;

/// A protobuf message being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }
}

/// Frames one message: length, its checksum, message, its checksum.
fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(message.len() + 16);
    record.extend(length);
    record.extend(masked(crc32c(&length)).to_le_bytes());
    record.extend(message);
    record.extend(masked(crc32c(message)).to_le_bytes());
    record
}

/// Hides a checksum as the format asks, so that checksums of data with checksums stay strong.
const fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Computes CRC-32C (Castagnoli), reflected, a byte at a time.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| CRC_TABLE[usize::from(crc as u8 ^ byte)] ^ crc >> 8;
    !bytes.iter().fold(!0, step)
}

static CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            // The polynomial 0x1edc6f41 with its bits reversed.
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of the CRC's definition and examples of RFC 3720, appendix B.4.
    #[test]
    fn checksums_are_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
    }

    #[test]
    fn the_mask_rotates_and_adds() {
        // 0x0001_8000 rotated right by 15 is 3.
        assert_eq!(masked(0x0001_8000), 0xa282_eadb);
    }

    #[test]
    fn varints_are_seven_bits_a_byte() {
        let mut message = Message::default();
        message.varint(2, 300);
        assert_eq!(message.0, [0x10, 0xac, 0x02]);
    }

    #[test]
    fn names_hold_no_separators() {
        let writer = Writer { unix_seconds: 12, host: "a/b ü.local", process: 3, count: 4 };
        assert_eq!(writer.file_name(), "events.out.tfevents.0000000012.a_b__.local.3.4");
    }

    fn create(folder: &Path) -> EventFile {
        let writer = Writer { unix_seconds: 2, host: "h", process: 1, count: 0 };
        EventFile::create(folder, writer).unwrap()
    }

    /// Takes the framing off, checking both checksums.
    fn messages(mut file: &[u8]) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        while !file.is_empty() {
            let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
            assert_eq!(crc(8), masked(crc32c(&file[..8])));
            let message = &file[12..12 + length];
            assert_eq!(crc(12 + length), masked(crc32c(message)));
            messages.push(message.to_vec());
            file = &file[16 + length..];
        }
        messages
    }

    #[test]
    fn events_are_the_bytes_of_the_schema() {
        let home = tempfile::tempdir().unwrap();
        let mut events = create(home.path());
        events.scalar(2.0, 5, "loss", 1.5).unwrap();
        events.text(2.0, 0, "t", "hi").unwrap();
        let messages = messages(&std::fs::read(events.path()).unwrap());
        let two = [0x09, 0, 0, 0, 0, 0, 0, 0, 0x40];
        assert_eq!(messages[0], [&two[..], b"\x1a\x0dbrain.Event:2"].concat());
        let scalar = b"\x10\x05\x2a\x0d\x0a\x0b\x0a\x04loss\x15\x00\x00\xc0\x3f";
        assert_eq!(messages[1], [&two[..], scalar].concat());
        // tag; tensor {dtype 7, shape {dim {size 1}}, "hi"}; metadata {plugin {"text"}, class 2}
        let value = b"\x0a\x01t\x42\x0c\x08\x07\x12\x04\x12\x02\x08\x01\x42\x02hi\x4a\x0a\x0a\x06\x0a\x04text\x20\x02";
        let mut text = vec![0x10, 0, 0x2a, value.len() as u8 + 2, 0x0a, value.len() as u8];
        text.extend(value);
        assert_eq!(messages[2], [&two[..], &text].concat());
        assert_eq!(messages.len(), 3);
    }

    #[test]
    fn an_existing_file_is_kept() {
        let home = tempfile::tempdir().unwrap();
        let events = create(home.path());
        let before = std::fs::read(events.path()).unwrap();
        let writer = Writer { unix_seconds: 2, host: "h", process: 1, count: 0 };
        let error = EventFile::create(home.path(), writer).unwrap_err();
        assert_eq!(error.cause, crate::atomic::Cause::TargetExists);
        assert_eq!(std::fs::read(events.path()).unwrap(), before);
        assert!(EventFile::create(&home.path().join("no"), writer).is_err());
    }
}
