//! TensorBoard's event files: records of protocol buffers, each with two checksums.
//!
//! A record is its length (u64, little endian), the masked CRC-32C of those eight bytes, the data,
//! and the masked CRC-32C of the data. The data is one `Event` message. Only the few fields that
//! scalars and texts need are written.

use std::io::{self, Write};

/// Returns the name TensorBoard expects of an event file.
///
/// `unix_seconds` is when the run started; `index` counts the files of one process.
pub fn file_name(unix_seconds: u64, host: &str, process: u32, index: u32) -> String {
    format!("events.out.tfevents.{unix_seconds}.{host}.{process}.{index}")
}

/// Writes events one by one; each call is one whole record, so a reader may follow along.
#[derive(Debug)]
pub struct EventWriter<W: Write> {
    out: W,
}

impl<W: Write> EventWriter<W> {
    /// Starts a file with the record that names the format's version.
    ///
    /// `wall_time` is in seconds since 1970, as in every call below.
    ///
    /// # Errors
    /// Whatever `out` reports.
    pub fn new(out: W, wall_time: f64) -> io::Result<Self> {
        let mut writer = Self { out };
        writer.event(wall_time, None, 3, b"brain.Event:2")?;
        Ok(writer)
    }

    /// Continues a file that has its version record already.
    pub fn append(out: W) -> Self {
        Self { out }
    }

    /// Writes one point of the curve `tag`. A value that is no number is written as it is.
    ///
    /// # Errors
    /// Whatever the output reports.
    pub fn scalar(&mut self, wall_time: f64, step: u64, tag: &str, value: f32) -> io::Result<()> {
        let mut inner = Vec::new();
        bytes_field(&mut inner, 1, tag.as_bytes());
        key(&mut inner, 2, WIRE_32);
        inner.extend(value.to_le_bytes());
        bytes_field(&mut inner, 9, &metadata("scalars", DATA_CLASS_SCALAR));
        self.summary(wall_time, step, &inner)
    }

    /// Writes a text, shown as Markdown, under `tag`.
    ///
    /// # Errors
    /// Whatever the output reports.
    pub fn text(&mut self, wall_time: f64, step: u64, tag: &str, text: &str) -> io::Result<()> {
        // TensorProto { dtype: DT_STRING, tensor_shape: [1], string_val: [text] }
        let mut tensor = vec![];
        varint_field(&mut tensor, 1, DT_STRING);
        bytes_field(&mut tensor, 2, &[0x12, 0x02, 0x08, 0x01]);
        bytes_field(&mut tensor, 8, text.as_bytes());

        let mut inner = Vec::new();
        bytes_field(&mut inner, 1, tag.as_bytes());
        bytes_field(&mut inner, 8, &tensor);
        bytes_field(&mut inner, 9, &metadata("text", DATA_CLASS_TENSOR));
        self.summary(wall_time, step, &inner)
    }

    /// Hands buffered records on to the file.
    ///
    /// # Errors
    /// Whatever the output reports.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    fn summary(&mut self, wall_time: f64, step: u64, value: &[u8]) -> io::Result<()> {
        let mut summary = Vec::new();
        bytes_field(&mut summary, 1, value);
        self.event(wall_time, Some(step), 5, &summary)
    }

    fn event(&mut self, time: f64, step: Option<u64>, field: u32, data: &[u8]) -> io::Result<()> {
        let mut event = Vec::with_capacity(data.len() + 32);
        key(&mut event, 1, WIRE_64);
        event.extend(time.to_le_bytes());
        if let Some(step) = step {
            varint_field(&mut event, 2, step);
        }
        bytes_field(&mut event, field, data);

        let length = (event.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(event.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(&event);
        record.extend(masked_crc(&event).to_le_bytes());
        self.out.write_all(&record)
    }
}

const WIRE_VARINT: u32 = 0;
const WIRE_64: u32 = 1;
const WIRE_BYTES: u32 = 2;
const WIRE_32: u32 = 5;
const DT_STRING: u64 = 7;
const DATA_CLASS_SCALAR: u64 = 1;
const DATA_CLASS_TENSOR: u64 = 2;

/// `SummaryMetadata { plugin_data: { plugin_name }, data_class }`
fn metadata(plugin: &str, data_class: u64) -> Vec<u8> {
    let mut plugin_data = Vec::new();
    bytes_field(&mut plugin_data, 1, plugin.as_bytes());
    let mut metadata = Vec::new();
    bytes_field(&mut metadata, 1, &plugin_data);
    varint_field(&mut metadata, 4, data_class);
    metadata
}

fn key(out: &mut Vec<u8>, field: u32, wire: u32) {
    varint(out, u64::from(field << 3 | wire));
}

fn varint_field(out: &mut Vec<u8>, field: u32, value: u64) {
    key(out, field, WIRE_VARINT);
    varint(out, value);
}

fn bytes_field(out: &mut Vec<u8>, field: u32, bytes: &[u8]) {
    key(out, field, WIRE_BYTES);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The checksum as records carry it: rotated and shifted, so that data which itself holds
/// checksums does not weaken it.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32 with the Castagnoli polynomial (RFC 3720, appendix B.4), byte by byte.
fn crc32c(data: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8);
    !data.iter().fold(u32::MAX, step)
}

static TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_agrees_with_the_vectors_of_rfc_3720() {
        assert_eq!(crc32c(&[0x00; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let up: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&up), 0x46dd_794e);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn first_record_is_the_version() {
        let mut file = Vec::new();
        EventWriter::new(&mut file, 1.0).unwrap();
        // Every event file begins with these twelve bytes: 24, and the checksum of that 24.
        assert_eq!(file[..12], [24, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22]);
        assert_eq!(file[12..21], [0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f]);
        assert_eq!(&file[21..36], b"\x1a\x0dbrain.Event:2");
        assert_eq!(file.len(), 40);
    }

    #[test]
    fn scalar_record_is_this_message() {
        let mut file = Vec::new();
        let mut writer = EventWriter::append(&mut file);
        writer.scalar(2.0, 300, "loss", 1.5).unwrap();
        let expected: &[u8] = &[
            0x09, 0, 0, 0, 0, 0, 0, 0, 0x40, // wall_time = 2.0
            0x10, 0xac, 0x02, // step = 300
            0x2a, 28, 0x0a, 26, // summary, value
            0x0a, 4, b'l', b'o', b's', b's', // tag
            0x15, 0, 0, 0xc0, 0x3f, // simple_value = 1.5
            0x4a, 13, 0x0a, 9, 0x0a, 7, b's', b'c', b'a', b'l', b'a', b'r', b's', 0x20, 1,
        ];
        assert_eq!(file[..8], (expected.len() as u64).to_le_bytes());
        assert_eq!(&file[12..file.len() - 4], expected);
        assert_eq!(file[file.len() - 4..], masked_crc(expected).to_le_bytes());
    }

    #[test]
    fn names_sort_by_time() {
        assert_eq!(file_name(1700000000, "box", 7, 0), "events.out.tfevents.1700000000.box.7.0");
    }
}
