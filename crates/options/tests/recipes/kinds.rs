//! Every kind of option: read, default, written, read again.

use crate::common::{Everything, LoraOptions, Schedule, read};
use retune_options::{
    Bytes, Document, OneOrMany, OptionValue, Options, Pattern, Patterns, Portion, commented_toml,
    markdown_table, schema, to_toml,
};
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

#[test]
fn missing_keys_take_their_defaults() {
    let all: Everything = read("model = \"m\"\n").unwrap();
    assert_eq!(all, Everything { model: "m".to_owned(), ..Everything::default() });
    assert_eq!(all.betas, [0.9, 0.999]);
    assert_eq!(all.schedule, Schedule::Linear);
    assert_eq!(all.lora.rank, 8);
    assert_eq!(all.limit, None);
}

#[test]
fn every_kind_is_read() {
    let all: Everything = read(
        r#"
        model = "hf:org/name"
        flag = false
        seed = 18446744073709551615
        offset = -9_000
        small = 3
        folder = "out/put"
        schedule = "constant"
        betas = [0, 0.5]
        warmup = 100
        memory = "1.5GB"
        limit = "1h 30min"
        mix = { people = 0.25, "trees.x" = 1 }
        frozen = '''embed|norm'''
        [lora]
        rank = 0x10
        targets = ["q_proj", "v_proj"]
        [lora.rank_pattern]
        "q_proj$" = 4
        'layers\.[0-3]\.' = 2
        [[more]]
        targets = "k_proj"
        [[more]]
        rank = 1
        "#,
    )
    .unwrap();
    let expected = Everything {
        model: "hf:org/name".to_owned(),
        flag: false,
        seed: u64::MAX,
        offset: -9000,
        small: 3.0,
        folder: PathBuf::from("out/put"),
        schedule: Schedule::Constant,
        betas: vec![0.0, 0.5],
        warmup: Portion::Count(100),
        memory: Bytes(1_500_000_000),
        limit: Some(Duration::from_mins(90)),
        mix: BTreeMap::from([("people".to_owned(), 0.25), ("trees.x".to_owned(), 1.0)]),
        frozen: Some(Pattern::new("embed|norm").unwrap()),
        lora: LoraOptions {
            rank: 16,
            targets: OneOrMany(vec!["q_proj".to_owned(), "v_proj".to_owned()]),
            rank_pattern: Patterns(vec![
                (Pattern::new("q_proj$").unwrap(), 4),
                (Pattern::new(r"layers\.[0-3]\.").unwrap(), 2),
            ]),
            ..LoraOptions::default()
        },
        more: vec![
            LoraOptions { targets: OneOrMany(vec!["k_proj".to_owned()]), ..Default::default() },
            LoraOptions { rank: 1, ..Default::default() },
        ],
    };
    assert_eq!(all, expected);
    assert_eq!(all.lora.rank_pattern.find("model.layers.2.self_attn.q_proj"), Some(&4));
    assert_eq!(all.lora.rank_pattern.find("model.layers.2.mlp"), Some(&2));
    assert_eq!(all.lora.rank_pattern.find("model.layers.7.mlp"), None);

    let plan = to_toml(&all.write());
    assert_eq!(read::<Everything>(&plan).unwrap(), all, "{plan}");
    insta::assert_snapshot!(plan);
}

#[test]
fn defaults_written_and_read_are_the_defaults() {
    let all = Everything { model: "m".to_owned(), ..Default::default() };
    assert_eq!(read::<Everything>(&to_toml(&all.write())).unwrap(), all);
}

#[test]
fn sizes_and_durations_are_written_in_their_largest_whole_unit() {
    let bytes = |bytes| Bytes(bytes).to_string();
    assert_eq!(bytes(0), "0B");
    assert_eq!(bytes(4 << 30), "4GiB");
    assert_eq!(bytes(1536), "1536B");
    assert_eq!(bytes(3000), "3kB");
    assert_eq!(bytes(u64::MAX), "18446744073709551615B");
    assert_eq!(Bytes::parse("18446744073709551615"), Some(Bytes(u64::MAX)));
    for wrong in ["", "GiB", "-1", "4GiB 2MiB", "99999999TiB", "1.2.3", "4 4"] {
        assert_eq!(Bytes::parse(wrong), None, "{wrong}");
    }
    let item = |duration: Duration| duration.to_item().unwrap();
    assert_eq!(item(Duration::ZERO), "0s".into());
    assert_eq!(item(Duration::from_millis(90_061_001)), "1d 1h 1min 1s 1ms".into());
}

#[test]
fn warmup_fraction_is_below_one() {
    let warmup = |text: &str| read::<Everything>(&format!("model = \"m\"\nwarmup = {text}\n"));
    assert_eq!(warmup("0").unwrap().warmup, Portion::Count(0));
    assert_eq!(warmup("0.0").unwrap().warmup, Portion::Fraction(0.0));
    assert!(warmup("1.0").unwrap_err().contains("is ambiguous"));
    assert!(warmup("-1").unwrap_err().contains("must be an integer or fraction below 1"));
}

#[test]
fn schema_says_what_the_reader_accepts() {
    let schema = schema(LoraOptions::specs());
    let rank = &schema["properties"]["rank"];
    assert_eq!((&rank["minimum"], &rank["maximum"]), (&1.into(), &4096.into()));
    assert_eq!(rank["default"], 8);
    assert_eq!(schema["properties"]["alpha"]["exclusiveMinimum"], 0.0);
    let everything = retune_options::schema(Everything::specs());
    assert_eq!(everything["required"], serde_json::json!(["model"]));
    insta::assert_snapshot!(serde_json::to_string_pretty(&everything).unwrap());
}

#[test]
fn documentation_follows_from_the_declaration() {
    insta::assert_snapshot!(markdown_table(Everything::specs()));
    assert_eq!(LoraOptions::ABOUT, "Low-rank update of chosen weights.");
    assert_eq!(LoraOptions::NAME, "lora");
}

#[test]
fn commented_recipe_reads_as_the_defaults_with_and_without_its_comments() {
    let text = commented_toml("", Everything::specs());
    insta::assert_snapshot!(text);
    let document = Document::parse("new.toml", &text).unwrap();
    let (all, _) = document.read(Everything::read).unwrap();
    assert_eq!(all, Everything { model: all.model.clone(), ..Default::default() });

    let commented = commented_toml("lora", LoraOptions::specs());
    let live: String = commented
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest) if rest.contains(" = ") => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let document = Document::parse("new.toml", &live).unwrap();
    let (lora, _) = document.read(|reader| reader.required::<LoraOptions>("lora")).unwrap();
    assert_eq!(lora, LoraOptions { name: lora.name.clone(), ..Default::default() });
    assert!(lora.name.is_some(), "the optional key was live too");
}
