#![expect(clippy::format_collect, reason = "rows of small test files")]

use std::fs;

use super::*;
use crate::fixtures::byte_level;
use crate::labels::Label;
use crate::prepare::PrepareOptions;
use crate::read::ReadOptions;
use crate::template::{CHATML, ChatTemplate, TemplateSettings};

fn prepare(content: &str, max_tokens: usize, keep: Keep) -> Result<Dataset, String> {
    prepare_shaped(content, &ShapeOptions::default(), max_tokens, keep)
}

fn prepare_shaped(
    content: &str,
    shape: &ShapeOptions,
    max_tokens: usize,
    keep: Keep,
) -> Result<Dataset, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.jsonl");
    fs::write(&path, content).unwrap();
    let tokenizer = byte_level();
    let template = ChatTemplate::compile(CHATML, TemplateSettings::of(&tokenizer, None)).unwrap();
    let options = PrepareOptions { max_tokens, ..PrepareOptions::default() };
    let preparer = Preparer::new(tokenizer, Some(template), options).unwrap();
    RowFile::open(&path, &ReadOptions::default())
        .and_then(|file| Dataset::prepare(file, shape, preparer, None, keep))
        .map_err(|e| e.to_string().replace(&format!("{}/", folder.path().display()), ""))
}

const ROWS: &str = "{\"prompt\": \"1\", \"completion\": \"hello\"}\n\
                    {\"prompt\": \"2\", \"completion\": \"he\"}\n\n\
                    {\"prompt\": \"3\", \"completion\": \"12\"}\n";

#[test]
fn rows_in_memory_and_on_disk_are_the_same() {
    let memory = prepare(ROWS, 64, Keep::InMemory).unwrap();
    let disk = prepare(ROWS, 64, Keep::OnDisk).unwrap();
    assert_eq!((memory.len(), disk.len()), (3, 3));
    assert_eq!(memory.lengths(), disk.lengths());
    assert_eq!(memory.statistics(), disk.statistics());
    for index in [2, 0, 1] {
        assert_eq!(memory.row(index).unwrap(), disk.row(index).unwrap());
        assert_eq!(memory.example(index).unwrap(), disk.example(index).unwrap());
    }
    assert_eq!(memory.row(2).unwrap().source_line, 4);
    assert_eq!(memory.example(2).unwrap().1, 4);
}

#[test]
fn a_row_has_the_task_its_field_says() {
    let shape = ShapeOptions { task: Some("of".to_owned()), ..ShapeOptions::default() };
    let rows = "{\"text\": \"a\", \"of\": 1}\n{\"text\": \"a\", \"of\": \"0\"}\n";
    for keep in [Keep::InMemory, Keep::OnDisk] {
        let data = prepare_shaped(rows, &shape, 64, keep).unwrap();
        assert_eq!([0, 1].map(|row| data.row(row).unwrap().task), [Some(1), Some(0)]);
        assert_eq!([0, 1].map(|row| data.task(row).unwrap()), [Some(1), Some(0)]);
        // The same words teach another thing in another task.
        assert_ne!(data.contents[0], data.contents[1]);
    }
    for (broken, problem) in [
        ("{\"text\": \"b\"}\n", "the field `of` is missing, which holds the row's task"),
        ("{\"text\": \"b\", \"of\": -1}\n", "the task in the field `of` is -1"),
        ("{\"text\": \"b\", \"of\": \"x\"}\n", "the task in the field `of` is \"x\""),
    ] {
        let rows = format!("{rows}{broken}");
        let error = prepare_shaped(&rows, &shape, 64, Keep::InMemory).unwrap_err();
        assert!(error.starts_with(&format!("d.jsonl, line 3: {problem}")), "{error}");
        assert!(error.contains("counted from 0"), "{error}");
    }
}

// users-want 2.1.1
#[test]
fn no_label_left_in_any_row_is_refused() {
    let error = prepare(ROWS, 12, Keep::InMemory).unwrap_err();
    assert_eq!(
        error,
        "d.jsonl: no token is left to learn: in 3 of 3 rows the loss mask is empty; the answers \
         stand behind the cut: raise max_tokens"
    );
    let rows = "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}\n";
    let error = prepare(rows, 64, Keep::InMemory).unwrap_err();
    assert!(error.contains("check that rows have an assistant's answer"), "{error}");
}

#[test]
fn a_template_that_raises_names_the_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.jsonl");
    fs::write(
        &path,
        "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}\n\
         {\"messages\": [{\"role\": \"alien\", \"content\": \"x\"}]}\n",
    )
    .unwrap();
    let source = "{% for m in messages %}{% if m.role == 'alien' %}\
                  {{ raise_exception('no aliens') }}{% endif %}{{ m.content }}{% endfor %}";
    let template = ChatTemplate::compile(source, TemplateSettings::default()).unwrap();
    let options = PrepareOptions { loss_on: crate::mask::LossOn::All, ..Default::default() };
    let preparer = Preparer::new(byte_level(), Some(template), options).unwrap();
    let file = RowFile::open(&path, &ReadOptions::default()).unwrap();
    let error = Dataset::prepare(file, &ShapeOptions::default(), preparer, None, Keep::InMemory);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("d.jsonl, line 2: the chat template refused"), "{error}");
    assert!(error.contains("no aliens"), "{error}");
}

#[test]
fn labels_are_collected_over_the_whole_file() {
    let rows = "{\"text\": \"a\", \"label\": \"pos\"}\n{\"text\": \"b\", \"label\": \"neg\"}\n";
    let data = prepare(rows, 64, Keep::OnDisk).unwrap();
    assert_eq!(data.labels(), Some(&Labels::Classes(vec!["neg".into(), "pos".into()])));
    assert_eq!(data.row(0).unwrap().label, Some(Label::Class(1)));
}

#[test]
fn a_row_that_breaks_the_shape_later_is_named() {
    let mut rows: String = (0..150).map(|i| format!("{{\"text\": \"{i}\"}}\n")).collect();
    rows.push_str("{\"txt\": \"a\"}\n");
    let error = prepare(&rows, 64, Keep::InMemory).unwrap_err();
    assert!(error.starts_with("d.jsonl, line 151: the field `text` is missing"), "{error}");
}

#[test]
fn the_split_keeps_equal_rows_together() {
    let rows: String = (0..40).map(|i| format!("{{\"text\": \"{}\"}}\n", i % 20)).collect();
    let data = prepare(&rows, 64, Keep::InMemory).unwrap();
    let split = data.split(Held::Rows(10), 1).unwrap();
    assert_eq!((split.train.len(), split.validation.len()), (30, 10));
    for &row in &split.validation {
        assert!(split.validation.contains(&((row + 20) % 40)), "{split:?}");
    }
}

#[test]
fn many_rows_keep_their_order_over_chunks_and_threads() {
    let rows: String = (0..3000).map(|i| format!("{{\"text\": \"{i}\"}}\n")).collect();
    let data = prepare(&rows, 64, Keep::InMemory).unwrap();
    for row in [0, 1023, 1024, 2999] {
        assert_eq!(data.row(row).unwrap().source_line, row + 1);
    }
    assert_eq!(data.statistics().rows, 3000);
    assert_eq!((data.statistics().longest, data.statistics().longest_line), (5, 1001));
}
