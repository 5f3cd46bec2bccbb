//! JSON: one array of objects, walked through without holding it in memory.

use std::fs::File;
use std::io::{BufReader, Bytes, Read};

use super::{Scan, lines::BOM, object};
use crate::error::{Error, Result};

/// A file's bytes with their position.
struct Cursor<'a> {
    bytes: Bytes<BufReader<&'a File>>,
    offset: u64,
    line: usize,
}

impl Cursor<'_> {
    fn next(&mut self) -> std::io::Result<Option<u8>> {
        let byte = self.bytes.next().transpose()?;
        if let Some(b) = byte {
            self.offset += 1;
            self.line += usize::from(b == b'\n');
        }
        Ok(byte)
    }

    fn next_visible(&mut self) -> std::io::Result<Option<u8>> {
        loop {
            match self.next()? {
                Some(b' ' | b'\t' | b'\r' | b'\n') => {}
                other => return Ok(other),
            }
        }
    }
}

/// Goes through the array's elements. A broken element ends the file's usable part unless its end
/// can be found by its brackets.
pub(super) fn scan(file: &File, scan: &mut Scan<'_>) -> Result<()> {
    let path = scan.path;
    let io = Error::io("read", path);
    let mut cursor =
        Cursor { bytes: BufReader::with_capacity(1 << 20, file).bytes(), offset: 0, line: 1 };
    walk(&mut cursor, scan).map_err(io)?
}

fn walk(cursor: &mut Cursor<'_>, scan: &mut Scan<'_>) -> std::io::Result<Result<()>> {
    let mut first = cursor.next_visible()?;
    if first == Some(BOM[0]) {
        cursor.next()?;
        cursor.next()?;
        first = cursor.next_visible()?;
    }
    let path = scan.path;
    match first {
        None => return Ok(Ok(())),
        Some(b'[') => {}
        Some(b'{') => {
            return Ok(Err(Error::file(
                path,
                "expected a JSON array of objects, got one object",
                "put the rows into one array, or name the file .jsonl if each line is an object",
            )));
        }
        Some(_) => {
            return Ok(Err(Error::file(
                path,
                "expected a JSON array of objects",
                "check that this is the right file",
            )));
        }
    }
    let unfinished = |line| {
        Err(Error::row(path, line, "the array is not closed", "get the whole file: it is cut off"))
    };
    let mut row = Vec::new();
    let mut next = cursor.next_visible()?;
    if next == Some(b']') {
        return trailing(cursor, scan);
    }
    loop {
        let Some(first) = next else { return Ok(unfinished(cursor.line)) };
        let (offset, line) = (cursor.offset - 1, cursor.line);
        row.clear();
        let (end, complete) = element(cursor, first, &mut row, scan.max_row_bytes)?;
        let result = if complete {
            let bytes = row.trim_ascii_end();
            match object(bytes) {
                Ok(_) => scan.good(offset, bytes.len(), line),
                Err(problem) => scan.broken(line, problem),
            }
        } else {
            let problem = scan.too_long();
            scan.broken(line, problem)
        };
        if result.is_err() {
            return Ok(result);
        }
        match end {
            Some(b',') => next = cursor.next_visible()?,
            Some(_) => return trailing(cursor, scan),
            None => return Ok(unfinished(cursor.line)),
        }
    }
}

/// Reads one element and the comma or bracket behind it; keeps at most `limit` bytes.
fn element(
    cursor: &mut Cursor<'_>,
    first: u8,
    row: &mut Vec<u8>,
    limit: usize,
) -> std::io::Result<(Option<u8>, bool)> {
    let (mut depth, mut in_string, mut escaped, mut complete) = (0usize, false, false, true);
    let mut byte = Some(first);
    while let Some(b) = byte {
        if in_string {
            (escaped, in_string) = (b == b'\\' && !escaped, escaped || b != b'"');
        } else {
            match b {
                b'"' => in_string = true,
                b'{' | b'[' => depth += 1,
                b',' | b']' | b'}' if depth == 0 => return Ok((Some(b), complete)),
                b'}' | b']' => depth -= 1,
                _ => {}
            }
        }
        if row.len() < limit {
            row.push(b);
        } else {
            complete = false;
        }
        byte = cursor.next()?;
    }
    Ok((None, complete))
}

/// Checks that nothing follows the array.
fn trailing(cursor: &mut Cursor<'_>, scan: &Scan<'_>) -> std::io::Result<Result<()>> {
    Ok(match cursor.next_visible()? {
        None => Ok(()),
        Some(_) => Err(Error::row(
            scan.path,
            cursor.line,
            "text after the end of the array",
            "keep one array in the file, or name it .jsonl if each line is an object",
        )),
    })
}
