#![expect(clippy::format_collect, reason = "rows of small test files")]

use std::fs;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn write(name: &str, content: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    (folder, path)
}

fn open(name: &str, content: impl AsRef<[u8]>) -> Result<RowFile, String> {
    let (folder, path) = write(name, content);
    let opened = RowFile::open(&path, &ReadOptions::default());
    let place = folder.path().display().to_string();
    opened.map_err(|e| e.to_string().replace(&format!("{place}/"), ""))
}

fn skipping(name: &str, content: impl AsRef<[u8]>) -> RowFile {
    let (_folder, path) = write(name, content);
    RowFile::open(&path, &ReadOptions { skip_broken: true, ..ReadOptions::default() }).unwrap()
}

fn rows(file: &RowFile) -> Vec<(usize, Value)> {
    file.rows().map(|row| row.map(|r| (r.line, Value::Object(r.fields))).unwrap()).collect()
}

#[test]
fn jsonl_with_bom_blank_lines_and_no_last_line_feed() {
    let file = open("a.jsonl", "\u{feff}{\"a\":1}\r\n\n  \n{\"a\": \"é\"}\n {\"a\":[3]}").unwrap();
    assert_eq!(rows(&file), [(1, json!({"a": 1})), (4, json!({"a": "é"})), (5, json!({"a": [3]}))]);
    // Any order.
    assert_eq!(file.read(2).unwrap().line, 5);
    assert_eq!(file.read(0).unwrap().fields["a"], 1);
}

#[test]
fn json_arrays_keep_line_numbers() {
    let text = "\u{feff} [\n{\"a\": \"],{\\\"\\\\\"},\n\n  {\"a\":\n {\"b\": [1, 2]}} ]\n";
    let file = open("a.json", text).unwrap();
    assert_eq!(rows(&file), [(2, json!({"a": "],{\"\\"})), (4, json!({"a": {"b": [1, 2]}}))]);
}

#[test]
fn csv_with_quotes_line_feeds_crlf_and_bom() {
    let text = "\u{feff}\"text\",label\r\n\"a \"\"b\"\",\r\nc\",1\r\n\r\n5\" pipe,0\r\n";
    let file = open("a.csv", text).unwrap();
    assert_eq!(
        rows(&file),
        [
            (2, json!({"text": "a \"b\",\r\nc", "label": "1"})),
            (5, json!({"text": "5\" pipe", "label": "0"})),
        ]
    );
    let file = open("a.tsv", "x\ty\n1,2\t3\n").unwrap();
    assert_eq!(rows(&file), [(2, json!({"x": "1,2", "y": "3"}))]);
}

#[test]
fn broken_rows_are_errors_with_their_line() {
    let messages: Vec<String> = [
        ("a.jsonl", b"{\"a\":1}\n{\"a\":\n".as_slice()),
        ("b.jsonl", b"{\"a\":1}\n[1]\n"),
        ("c.jsonl", b"{\"a\":1}\n{\"a\":\"\xff\"}\n"),
        ("d.json", b"[{\"a\":1},\n 7]"),
        ("e.json", b"[{\"a\":1},\n {\"a\":2}"),
        ("f.json", b"{\"a\":1}"),
        ("g.json", b"[{\"a\":1}]\n{}"),
        ("h.csv", b"a,b\n1,2\n3\n"),
        ("i.csv", b"a,a\n1,2\n"),
        ("j.jsonl", b""),
        ("k.jsonl", b"\n \n"),
        ("l.json", b"[]"),
        ("m.csv", b"a,b\n"),
        ("n.txt", b"x"),
        ("o.json", b"7"),
    ]
    .into_iter()
    .map(|(name, content)| open(name, content).map(|f| f.len()).unwrap_err())
    .collect();
    insta::assert_snapshot!(messages.join("\n"));
}

#[test]
fn missing_files_and_folders_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let missing = RowFile::open(&folder.path().join("no.jsonl"), &ReadOptions::default());
    let error = missing.unwrap_err().to_string();
    assert!(error.contains("cannot open") && !error.contains("README"), "{error}");
    fs::write(folder.path().join("README.md"), "where it comes from").unwrap();
    let missing = RowFile::open(&folder.path().join("no.jsonl"), &ReadOptions::default());
    assert!(missing.unwrap_err().to_string().contains("README.md may say where it comes from"));
    fs::create_dir(folder.path().join("d.jsonl")).unwrap();
    let dir = RowFile::open(&folder.path().join("d.jsonl"), &ReadOptions::default());
    assert!(dir.unwrap_err().to_string().contains("this is a folder"));
}

#[test]
fn skipped_rows_are_counted_and_named() {
    let file = skipping("a.jsonl", b"{\"a\":1}\nnonsense\n{\"a\":\"\xff\"}\n{\"a\":2}\n");
    assert_eq!(rows(&file), [(1, json!({"a": 1})), (4, json!({"a": 2}))]);
    let lines: Vec<usize> = file.skipped().iter().map(|s| s.line).collect();
    assert_eq!(lines, [2, 3]);
    let file = skipping("a.json", "[{\"a\":1}, 7, nonsense, {\"a\":2}]");
    assert_eq!((file.len(), file.skipped().len()), (2, 2));
    let file = skipping("a.csv", "a,b\n1,2\n3\n4,5\n");
    assert_eq!((file.len(), file.skipped().len()), (2, 1));
}

#[test]
fn a_file_whose_rows_are_all_broken_is_refused_even_when_skipping() {
    let (_folder, path) = write("a.jsonl", "x\ny\n");
    let options = ReadOptions { skip_broken: true, ..ReadOptions::default() };
    let error = RowFile::open(&path, &options).unwrap_err().to_string();
    assert!(error.contains("none of its 2 rows can be read; the first, on line 1"), "{error}");
}

#[test]
fn rows_beyond_the_limit_do_not_fill_memory() {
    let options = ReadOptions { max_row_bytes: 20, skip_broken: true, format: None };
    let long = format!("{{\"a\":1}}\n{{\"a\":\"{}\"}}\n{{\"a\":2}}\n", "x".repeat(100));
    let (_folder, path) = write("a.jsonl", &long);
    let file = RowFile::open(&path, &options).unwrap();
    assert_eq!(rows(&file), [(1, json!({"a": 1})), (3, json!({"a": 2}))]);
    let (_folder, path) = write("a.csv", format!("a\n1\n{}\n2\n", "x".repeat(100)));
    let file = RowFile::open(&path, &options).unwrap();
    assert_eq!(rows(&file), [(2, json!({"a": "1"})), (4, json!({"a": "2"}))]);
    let (_folder, path) = write("a.json", format!("[{{\"a\":1}},[{}]]", "1,".repeat(100)));
    let file = RowFile::open(&path, &options).unwrap();
    assert_eq!((file.len(), file.skipped().len()), (1, 1));
}

proptest! {
    #[test]
    fn readers_never_panic(
        bytes in proptest::collection::vec(
            prop_oneof![Just(b'"'), Just(b'\n'), Just(b','), Just(b'['), Just(b'{'), Just(b'}'),
                        Just(b']'), Just(b'\\'), Just(b':'), Just(b'1'), any::<u8>()],
            0..120,
        ),
        skip_broken: bool,
    ) {
        for name in ["a.jsonl", "a.json", "a.csv", "a.tsv"] {
            let (_folder, path) = write(name, &bytes);
            let options = ReadOptions { skip_broken, max_row_bytes: 50, format: None };
            if let Ok(file) = RowFile::open(&path, &options) {
                for row in file.rows() {
                    row.unwrap();
                }
            }
        }
    }

    #[test]
    fn what_is_written_is_read(
        values in proptest::collection::vec(("\\PC{0,12}|[\",\n\r\t\\\\]{0,6}", any::<i64>()), 1..20)
    ) {
        let expected: Vec<Value> = values.iter().map(|(t, n)| json!({"t": t, "n": n})).collect();
        let lines: String = expected.iter().map(|v| format!("{v}\n")).collect();
        let (_folder, path) = write("a.jsonl", lines);
        let file = RowFile::open(&path, &ReadOptions::default()).unwrap();
        prop_assert_eq!(rows(&file).into_iter().map(|(_, v)| v).collect::<Vec<_>>(), expected.clone());
        let (_folder, path) = write("a.json", serde_json::to_string_pretty(&expected).unwrap());
        let file = RowFile::open(&path, &ReadOptions::default()).unwrap();
        prop_assert_eq!(rows(&file).into_iter().map(|(_, v)| v).collect::<Vec<_>>(), expected);
        let (_folder, path) = write("a.csv", "");
        let mut writer = csv_writer(&path);
        writer.write_record(["t", "n"]).unwrap();
        for (t, n) in &values {
            writer.write_record([t.as_str(), &n.to_string()]).unwrap();
        }
        writer.flush().unwrap();
        let file = RowFile::open(&path, &ReadOptions::default()).unwrap();
        let texts: Vec<_> = rows(&file).into_iter().map(|(_, v)| v["t"].as_str().unwrap().to_owned()).collect();
        prop_assert_eq!(texts, values.iter().map(|(t, _)| t.clone()).collect::<Vec<_>>());
    }
}

fn csv_writer(path: &Path) -> ::csv::Writer<fs::File> {
    ::csv::Writer::from_path(path).unwrap()
}
