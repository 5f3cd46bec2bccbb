//! What a person sees who slipped.

use crate::common::{Everything, LoraOptions, read};
use insta::assert_snapshot;
use retune_options::{Document, Options, Style};

fn mistakes<T: Options>(text: &str) -> String {
    read::<T>(text).err().unwrap_or_default()
}

#[test]
fn many_mistakes_are_shown_at_once() {
    assert_snapshot!(mistakes::<Everything>(
        r#"flag = "yes"
seed = -1
offset = 9223372036854775808
small = 1e39
schedule = "cosin"
betas = [0.9, 1.5, "x"]
warmup = 3.0
memory = "4 gigs"
limit = "90"
frozen = "layers.(0"
folder = ""
mix = { people = 0.5, trees = 2 }
learning_rat = 1e-4

[lora]
rank = 5000
alpa = 16
lora_alpha = 32
dropout = 1.0
targets = 3
rank_pattern = { "q_proj" = 0, "*" = 4 }
steps = 3

[[more]]
rank = 128
"#
    ));
}

#[test]
fn unknown_key_names_the_nearest() {
    assert_snapshot!(mistakes::<LoraOptions>("alpa = 16\n"));
}

#[test]
fn key_of_another_table_is_sent_there() {
    assert_snapshot!(mistakes::<Everything>("model = \"m\"\nrank = 4\n[lora]\nseed = 3\n"));
}

#[test]
fn integer_option_takes_neither_quotes_nor_point() {
    assert_snapshot!(mistakes::<LoraOptions>("rank = \"8\"\n"));
    assert_snapshot!(mistakes::<LoraOptions>("rank = 8.0\n"));
}

#[test]
fn table_where_a_value_is_meant_and_the_reverse() {
    assert_snapshot!(mistakes::<Everything>("model = \"m\"\nlora = 8\n[flag]\nx = 1\n"));
}

#[test]
fn every_syntax_error_is_shown() {
    assert_snapshot!(mistakes::<LoraOptions>("rank = \nalpha = 16\nname = all\nalpha = 17\n[x\n"));
}

#[test]
fn duplicate_tables_are_mistakes() {
    assert_snapshot!(mistakes::<Everything>("[lora]\nrank = 1\n[lora]\nrank = 2\n"));
}

#[test]
fn bytes_that_are_not_utf8_are_shown_by_place() {
    let report = Document::parse_bytes("recipe.toml", b"rank = 8\nname = \"caf\xe9\"\n");
    assert_snapshot!(report.unwrap_err());
}

#[test]
fn caret_stands_under_wide_characters_and_tabs() {
    assert_snapshot!(mistakes::<LoraOptions>("\tname = \"日本\"; rank = 1\n\"日本\" = 3\n"));
    assert_snapshot!(mistakes::<LoraOptions>("name = \"日本\"\n\t\"日本é\" = 3 # é\n"));
}

#[test]
fn missing_key_in_a_table_points_at_its_header() {
    let document = Document::parse("recipe.toml", "[everything]\nflag = true\n").unwrap();
    let report = document.read(|reader| reader.optional::<Everything>("everything")).unwrap_err();
    assert_snapshot!(report);
}

#[test]
fn variants_need_a_table_each() {
    let variant = |text: &str| {
        let document = Document::parse("recipe.toml", text).unwrap();
        let read = document.read(|reader| {
            let tables = reader.variants("method", &["lora", "half-tuning"]);
            let read = |(name, mut inner)| (name, LoraOptions::read(&mut inner).rank);
            tables.into_iter().map(read).collect::<Vec<_>>()
        });
        read.map(|(value, _)| value).map_err(|report| report.to_string())
    };
    let found = variant("[method.lora]\nrank = 4\n").unwrap();
    assert_eq!(found, [("lora".to_owned(), 4)]);
    // The order is the recipe's.
    let two = "[method.half-tuning]\nrank = 2\n[method.lora]\nrank = 4\n";
    assert_eq!(variant(two).unwrap(), [("half-tuning".to_owned(), 2), ("lora".to_owned(), 4)]);
    assert_snapshot!(variant("").unwrap_err());
    assert_snapshot!(variant("[method]\n").unwrap_err());
    assert_snapshot!(variant("method = \"lora\"\n").unwrap_err());
    assert_snapshot!(variant("[method.lorra]\nrank = 4\n").unwrap_err());
}

#[test]
fn assignments_are_laid_over_and_reported_by_origin() {
    let mut document = Document::parse("recipe.toml", "[lora]\nrank = 4\nalpha = 2\n").unwrap();
    document.set("--set", "lora.rank=6").unwrap();
    document.set("--set", "lora.name = base-run").unwrap();
    let (lora, _) = document.read(|reader| reader.required::<LoraOptions>("lora")).unwrap();
    assert_eq!((lora.rank, lora.alpha, lora.name.as_deref()), (6, 2.0, Some("base-run")));

    assert_snapshot!(document.set("--set", "lora.rank").unwrap_err());
    assert_snapshot!(document.set("--set", "lora.rank=[1").unwrap_err());
    document.set("--set", "lora.rank=many").unwrap();
    document.set("--set", "lora.alpa=3").unwrap();
    let report = document.read(|reader| reader.required::<LoraOptions>("lora")).unwrap_err();
    assert_snapshot!(report);
}

#[test]
fn json_report_has_the_same_places() {
    let document = Document::parse("recipe.toml", "alpha = 16\nrank = 5000\n").unwrap();
    let report = document.read(LoraOptions::read).unwrap_err();
    assert_eq!(
        report.to_json(),
        serde_json::json!([{
            "severity": "error",
            "message": "`rank` must be 1 to 4096",
            "label": "found the integer `5000`",
            "help": null,
            "file": "recipe.toml",
            "line": 2,
            "column": 8,
            "start": 18,
            "end": 22,
        }])
    );
}

#[test]
fn colours_only_when_asked_for() {
    let document = Document::parse("recipe.toml", "alpa = 16\n").unwrap();
    let report = document.read(LoraOptions::read).unwrap_err();
    assert!(!report.render(Style::Plain).contains('\u{1b}'));
    assert!(report.render(Style::Coloured).contains('\u{1b}'));
}

#[test]
fn warnings_do_not_refuse_the_recipe() {
    let document = Document::parse("recipe.toml", "rank = 8\n").unwrap();
    let (lora, report) = document
        .read(|reader| {
            reader.warn("rank", "this rank is small", "raise it");
            LoraOptions::read(reader)
        })
        .unwrap();
    assert_eq!(lora.rank, 8);
    assert_snapshot!(report);
}
