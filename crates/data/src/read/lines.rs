//! JSONL: one JSON object per line.

use std::fs::File;
use std::io::{BufRead, BufReader};

use super::{Scan, object};
use crate::error::{Error, Result};

/// UTF-8's byte order mark, which Windows editors put first.
pub(super) const BOM: &[u8] = b"\xef\xbb\xbf";

/// Goes through the lines. Blank lines are no rows.
pub(super) fn scan(file: &File, scan: &mut Scan<'_>) -> Result<()> {
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut offset = 0u64;
    let mut line = 0;
    let mut text = Vec::new();
    loop {
        text.clear();
        let (read, complete) = read_line(&mut reader, &mut text, scan.max_row_bytes)
            .map_err(Error::io("read", scan.path))?;
        if read == 0 {
            return Ok(());
        }
        line += 1;
        let start = if line == 1 && text.starts_with(BOM) { BOM.len() } else { 0 };
        let row = text[start..].trim_ascii();
        if !complete {
            let problem = scan.too_long();
            scan.broken(line, problem)?;
        } else if !row.is_empty() {
            match object(row) {
                Ok(_) => scan.good(offset + start as u64, text.len() - start, line)?,
                Err(problem) => scan.broken(line, problem)?,
            }
        }
        offset += read;
    }
}

/// Reads to the end of a line but keeps no more than `limit` bytes of it. Returns the bytes passed
/// and whether all were kept (the line feed is not).
fn read_line(
    reader: &mut impl BufRead,
    text: &mut Vec<u8>,
    limit: usize,
) -> std::io::Result<(u64, bool)> {
    let (mut passed, mut complete) = (0u64, true);
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok((passed, complete));
        }
        let end = buffer.iter().position(|&b| b == b'\n');
        let piece = &buffer[..end.unwrap_or(buffer.len())];
        if text.len() + piece.len() <= limit {
            text.extend_from_slice(piece);
        } else {
            complete = false;
        }
        let used = piece.len() + usize::from(end.is_some());
        passed += used as u64;
        reader.consume(used);
        if end.is_some() {
            return Ok((passed, complete));
        }
    }
}
