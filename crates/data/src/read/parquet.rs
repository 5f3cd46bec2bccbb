//! Parquet, by the `parquet` crate's row reader.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::record::{Field, Row as Record};
use serde_json::{Map, Number, Value};

use super::Scan;
use crate::error::{Error, Result};

/// An open file, with the place of the last row read: the next one is at hand, any other is reached
/// by going through its row group from the start.
pub(super) struct Groups {
    reader: SerializedFileReader<File>,
    at: Mutex<Option<Place>>,
}

struct Place {
    group: usize,
    next: usize,
    rows: ReaderIter,
}

impl std::fmt::Debug for Groups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Groups")
            .field("groups", &self.reader.num_row_groups())
            .finish_non_exhaustive()
    }
}

/// Reads the file's footer and notes every row.
pub(super) fn open(file: &File, scan: &mut Scan<'_>) -> Result<Groups> {
    let path = scan.path;
    let file = file.try_clone().map_err(Error::io("open", path))?;
    let damaged = |problem: String| {
        Error::file(path, format!("not Parquet: {problem}"), "get the file again")
    };
    let size = file.metadata().map_err(Error::io("read", path))?.len() as usize;
    let reader =
        guarded(|| SerializedFileReader::new(file).map_err(|e| e.to_string())).map_err(damaged)?;
    let metadata = reader.metadata();
    let mut number = 0;
    for group in 0..metadata.num_row_groups() {
        let rows = metadata.row_group(group).num_rows();
        let rows = u32::try_from(rows)
            .map_err(|_| damaged(format!("row group {group} claims {rows} rows")))?;
        // A hostile footer must not make us note rows that cannot be there: even a column of one
        // repeated value has a page header for some thousands of rows.
        if number + rows as usize > (1 << 20) + size.saturating_mul(1 << 10) {
            return Err(damaged(format!("it claims more rows than fit in {size} bytes")));
        }
        for row in 0..rows {
            number += 1;
            scan.good(group as u64, row as usize, number)?;
        }
    }
    Ok(Groups { reader, at: Mutex::new(None) })
}

impl Groups {
    /// Reads one row.
    pub(super) fn read(&self, group: usize, row: usize) -> Result<Map<String, Value>, String> {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken out, so that a reader that failed is not used again.
        let mut place = match at.take() {
            Some(place) if place.group == group && place.next <= row => place,
            _ => Place { group, next: 0, rows: self.rows(group)? },
        };
        let skip = row - place.next;
        let record = guarded(|| match place.rows.nth(skip) {
            Some(record) => record.map_err(|e| e.to_string()),
            None => Err("the row group ends before the row".to_owned()),
        })?;
        place.next = row + 1;
        *at = Some(place);
        fields(record)
    }

    fn rows(&self, group: usize) -> Result<ReaderIter, String> {
        guarded(|| {
            let reader = self.reader.get_row_group(group).map_err(|e| e.to_string())?;
            let schema = self.reader.metadata().file_metadata().schema_descr_ptr();
            TreeBuilder::new().as_iter(schema, &*reader).map_err(|e| e.to_string())
        })
    }
}

/// The crate panics on some damaged files; that must end the row, not the program.
fn guarded<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err("the file is damaged".to_owned()))
}

fn fields(record: Record) -> Result<Map<String, Value>, String> {
    record
        .into_columns()
        .into_iter()
        .map(|(name, field)| {
            let value = value(&field).map_err(|problem| format!("column `{name}`: {problem}"))?;
            Ok((name, value))
        })
        .collect()
}

fn value(field: &Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(b) => Value::Bool(*b),
        Field::Byte(n) => Value::from(*n),
        Field::Short(n) => Value::from(*n),
        Field::Int(n) | Field::Date(n) | Field::TimeMillis(n) => Value::from(*n),
        Field::Long(n)
        | Field::TimeMicros(n)
        | Field::TimestampMillis(n)
        | Field::TimestampMicros(n) => Value::from(*n),
        Field::UByte(n) => Value::from(*n),
        Field::UShort(n) => Value::from(*n),
        Field::UInt(n) => Value::from(*n),
        Field::ULong(n) => Value::from(*n),
        Field::Float16(x) => float(f64::from(f32::from(*x))),
        Field::Float(x) => float(f64::from(*x)),
        Field::Double(x) => float(*x),
        Field::Decimal(_) => Value::String(field.to_string()),
        Field::Str(text) => Value::String(text.clone()),
        Field::Bytes(bytes) => Value::String(super::utf8(bytes.data())?.to_owned()),
        Field::Group(record) => {
            let columns = record.get_column_iter();
            Value::Object(
                columns.map(|(k, v)| Ok((k.clone(), value(v)?))).collect::<Result<_, String>>()?,
            )
        }
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(value).collect::<Result<_, String>>()?)
        }
        Field::MapInternal(map) => Value::Object(
            map.entries()
                .iter()
                .map(|(k, v)| {
                    let key = match value(k)? {
                        Value::String(key) => key,
                        other => other.to_string(),
                    };
                    Ok((key, value(v)?))
                })
                .collect::<Result<_, String>>()?,
        ),
    })
}

fn float(x: f64) -> Value {
    Number::from_f64(x).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::{ReadOptions, RowFile};

    /// Two row groups of `text` and optional `label`; the second label is missing.
    fn write(path: &Path) {
        let schema = "message rows { required binary text (UTF8); optional int64 label; }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let file = fs::File::create(path).unwrap();
        let properties = Arc::new(WriterProperties::builder().build());
        let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
        for (texts, labels, present) in
            [(vec!["a", "bé"], vec![1], vec![1, 0]), (vec!["c"], vec![3], vec![1])]
        {
            let mut group = writer.next_row_group().unwrap();
            let texts: Vec<ByteArray> = texts.into_iter().map(ByteArray::from).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
            column.close().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int64Type>().write_batch(&labels, Some(&present), None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    #[test]
    fn rows_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        write(&path);
        let file = RowFile::open(&path, &ReadOptions::default()).unwrap();
        assert_eq!(file.len(), 3);
        let row = |index: usize| serde_json::Value::Object(file.read(index).unwrap().fields);
        for index in [2, 1, 0, 1, 2, 0, 0] {
            let expected = [
                json!({"text": "a", "label": 1}),
                json!({"text": "bé", "label": null}),
                json!({"text": "c", "label": 3}),
            ];
            assert_eq!(row(index), expected[index], "{index}");
        }
        assert_eq!(file.read(2).unwrap().line, 3);
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(cut in 0usize..2000, at in 0usize..2000, byte: u8) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.parquet");
            write(&path);
            let mut bytes = fs::read(&path).unwrap();
            if cut < bytes.len() {
                bytes.truncate(cut);
            } else {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            fs::write(&path, bytes).unwrap();
            if let Ok(file) = RowFile::open(&path, &ReadOptions::default()) {
                for index in 0..file.len().min(10) {
                    let _ = file.read(index);
                }
            }
        }
    }
}
