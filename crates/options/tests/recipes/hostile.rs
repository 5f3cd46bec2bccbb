//! Texts no person writes: nothing may panic or run out of stack.

use crate::common::{Everything, LoraOptions, Schedule, read};
use proptest::prelude::*;
use retune_options::{
    Bytes, Document, OneOrMany, Options, Pattern, Patterns, Portion, Style, Table, to_toml,
};
use std::time::Duration;

fn survive(text: &str) {
    match Document::parse("recipe.toml", text) {
        Ok(document) => {
            if let Err(report) = document.read(Everything::read) {
                render(&report);
            }
        }
        Err(report) => render(&report),
    }
}

fn render(report: &retune_options::Report) {
    assert!(!report.render(Style::Plain).is_empty());
    assert!(!report.render(Style::Coloured).is_empty());
    let json = report.to_json();
    assert_eq!(json.as_array().map(Vec::len), Some(report.diagnostics().len()));
}

#[test]
fn deep_nesting_is_refused_without_running_out_of_stack() {
    let depth = 100_000;
    survive(&format!("a = {}{}", "[".repeat(depth), "]".repeat(depth)));
    survive(&format!("a = {}1{}", "{a = ".repeat(depth), "}".repeat(depth)));
    survive(&format!("{}a = 1", "a.".repeat(depth)));
    survive(&format!("a = {{ {}a = 1 }}", "a . ".repeat(depth)));
    survive(&format!("[{}a]", "\"a\".".repeat(depth)));
    survive(&"[".repeat(depth));
    survive(&"a = [{".repeat(depth));
    let nested = format!("a = {}1{}", "[".repeat(60), "]".repeat(60));
    assert!(Document::parse("recipe.toml", &nested).is_ok());
    assert!(Document::parse("recipe.toml", "a.b.c.d.e.f.g.h = 1.5").is_ok());
}

#[test]
fn a_large_document_is_read_in_linear_time() {
    let text: String = (0..20_000).fold(String::new(), |text, n| text + &format!("key{n} = {n}\n"));
    let report = Document::parse("recipe.toml", &text).unwrap().read(LoraOptions::read);
    assert_eq!(report.unwrap_err().diagnostics().len(), 20_000);
}

/// A pattern that matches `word` itself.
fn regex_of(word: &str) -> String {
    word.escape_unicode().to_string()
}

/// Text that is nearly a recipe: pieces of TOML in any order.
fn pieces() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "[",
        "]",
        "[[",
        "]]",
        "{",
        "}",
        "=",
        " = ",
        ".",
        ",",
        "\n",
        "\r\n",
        "\r",
        "#",
        "\"",
        "'",
        "\"\"\"",
        "'''",
        "\\",
        "\\u12",
        "a",
        "lora",
        "rank",
        "more",
        "model",
        "mix",
        "1",
        "0x",
        "1e9",
        "-",
        "+inf",
        "nan",
        "true",
        "1979-05-27",
        "é",
        "日",
        "\u{feff}",
        "\u{0}",
        "\t",
        " ",
        "_",
        "lora.rank = 3\n",
        "[lora]\n",
        "[[more]]\n",
        "rank_pattern = { x = 1 }\n",
    ]);
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_text_gives_a_recipe_or_a_report(text in any::<String>()) {
        survive(&text);
    }

    #[test]
    fn near_recipes_give_a_recipe_or_a_report(text in pieces()) {
        survive(&text);
    }

    #[test]
    fn any_bytes_give_a_recipe_or_a_report(bytes in any::<Vec<u8>>()) {
        if let Err(report) = Document::parse_bytes("recipe.toml", &bytes) {
            render(&report);
        }
    }

    #[test]
    fn any_assignment_is_laid_over_or_refused(text in pieces()) {
        let mut document = Document::parse("recipe.toml", "[lora]\nrank = 8\n").unwrap();
        if let Err(report) = document.set("--set", &text) {
            render(&report);
        }
        if let Err(report) = document.read(Everything::read) {
            render(&report);
        }
    }

    #[test]
    fn any_options_written_and_read_are_the_same(
        words in prop::collection::vec(any::<String>(), 4),
        (seed, offset, memory, nanos, count) in any::<(u64, i64, u64, u64, u64)>(),
        (flag, fraction, rank) in (any::<bool>(), 0.0..1.0, 1usize..=4096),
        small in -f32::MAX..f32::MAX,
        betas in prop::collection::vec(0.0..1.0, 0..4),
    ) {
        let lora = LoraOptions {
            rank,
            dropout: 0.5,
            alpha: f64::MIN_POSITIVE + fraction,
            targets: OneOrMany(words.clone()),
            rank_pattern: Patterns(vec![(Pattern::new(&regex_of(&words[0])).unwrap(), rank)]),
            name: Some(words[1].clone()),
        };
        let all = Everything {
            model: words[2].clone(),
            flag,
            seed,
            offset,
            small,
            folder: format!("a{}", words[3]).into(),
            schedule: Schedule::Constant,
            betas,
            warmup: if flag { Portion::Count(count) } else { Portion::Fraction(fraction) },
            memory: Bytes(memory),
            limit: flag.then(|| Duration::from_nanos(nanos)),
            mix: words.iter().map(|word| (word.clone(), fraction)).collect(),
            frozen: None,
            more: vec![lora.clone(), LoraOptions::default()],
            lora,
        };
        let written = to_toml(&all.write());
        prop_assert_eq!(read::<Everything>(&written).unwrap(), all, "{}", written);
    }

    #[test]
    fn any_strings_and_numbers_survive_writing(key in any::<String>(), text in any::<String>(), number in any::<f64>(), whole in any::<i64>()) {
        let mut inner = Table::default();
        inner.insert(key.as_str(), text.as_str());
        inner.insert("n", retune_options::Value::Integer(whole.into()));
        let mut table = Table::default();
        table.insert("number", if number.is_nan() { 0.5 } else { number });
        table.insert(key.as_str(), inner.clone());
        table.insert("list", vec![inner.clone().into(), inner.into()]);
        let written = to_toml(&table);
        let read = Document::parse("plan.toml", &written).unwrap();
        prop_assert_eq!(read.root(), &table, "{}", written);
    }
}
