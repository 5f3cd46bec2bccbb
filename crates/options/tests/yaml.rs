//! YAML as a second front of the same tree.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests do")]

use proptest::prelude::*;
use retune_options::{Document, Item, Table, Value};

fn table(text: &str) -> Table {
    Document::parse_yaml("plan.yml", text).unwrap().root().clone()
}

fn errors(text: &str) -> String {
    Document::parse_yaml("plan.yml", text).unwrap_err().to_string()
}

fn value(text: &str) -> Value {
    table(&format!("k: {text}")).get("k").unwrap().item.value.clone()
}

#[test]
fn scalars_have_the_types_of_the_core_schema() {
    for (text, expected) in [
        ("3", Value::Integer(3)),
        ("-0", Value::Integer(0)),
        ("0x1f", Value::Integer(31)),
        ("0o17", Value::Integer(15)),
        ("1.5", Value::Float(1.5)),
        ("-.5", Value::Float(-0.5)),
        ("1e-4", Value::Float(1e-4)),
        ("-.inf", Value::Float(f64::NEG_INFINITY)),
        ("true", Value::Bool(true)),
        ("off", Value::Bool(false)),
        ("./a", Value::from("./a")),
        ("1.2.3", Value::from("1.2.3")),
        ("-", Value::from("-")),
        (".", Value::from(".")),
        ("e5", Value::from("e5")),
        ("0x-1", Value::from("0x-1")),
        ("\"3\"", Value::from("3")),
        ("'true'", Value::from("true")),
        ("!!str 3", Value::from("3")),
        ("|\n  two\n  lines\n", Value::from("two\nlines\n")),
        ("[0, 1.0]", Value::List(vec![Item::from(0_i128), Item::from(1.0)])),
    ] {
        let text = if text == "-" { "\"-\"" } else { text };
        assert_eq!(value(text), expected, "{text}");
    }
}

#[test]
fn lists_tables_and_aliases_nest() {
    let root = table(
        "models:\n- model: ./a # the first\n  parameters: &p {weight: 0.5, density: 1}\n\
         - model: ./b\n  parameters:\n    <<: *p\n    weight: 2\nempty:\n",
    );
    let Value::List(models) = &root.get("models").unwrap().item.value else { unreachable!() };
    let json: Vec<_> = models.iter().map(|model| model.value.to_json()).collect();
    assert_eq!(
        json[0],
        serde_json::json!({"model": "./a", "parameters": {"weight": 0.5, "density": 1}})
    );
    assert_eq!(
        json[1],
        serde_json::json!({"model": "./b", "parameters": {"weight": 2, "density": 1}})
    );
    assert!(root.get("empty").is_none(), "a key without a value is not written");
}

#[test]
fn places_are_bytes_also_behind_wide_characters() {
    let text = "naïve: ü\nb: 7\n";
    let root = table(text);
    let span = root.get("b").unwrap().item.span.unwrap();
    assert_eq!(&text[span.start..span.end], "7");
    let span = root.get("naïve").unwrap().key_span.unwrap();
    assert_eq!(&text[span.start..span.end], "naïve");
}

#[test]
fn mistakes_have_their_line() {
    for (text, part) in [
        ("a: 1\nb: 2\na: 3\n", "plan.yml:3:1"),
        ("a: [1,\n", "this is not YAML"),
        ("a: b: c\n", "this is not YAML"),
        ("- 1\n", "must hold keys and values"),
        ("a: 1\n---\nb: 2\n", "more than one document"),
        ("a:\n- 1\n-\n", "empty value"),
        ("[a, b]: 1\n", "a key must be a word"),
        ("a: !custom 1\n", "is not known"),
        ("<<: 1\n", "alias of a table"),
    ] {
        let message = errors(text);
        assert!(message.contains(part), "{text:?} gives {message}");
    }
    let both = errors("a: 1\na: 2\nb: 1\nb: 2\n");
    assert!(both.contains("`a` is set twice") && both.contains("`b` is set twice"), "{both}");
}

#[test]
fn a_few_lines_never_become_billions_of_values() {
    let line = |i: usize| match i {
        0 => "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned(),
        _ => format!("a{i}: &a{i} [{}]\n", format!("*a{}, ", i - 1).repeat(10)),
    };
    let text: String = (0..20).map(line).collect();
    assert!(errors(&text).contains("too many values"));
    assert!(errors(&format!("a: {}", "[".repeat(200))).contains("nested too deep"));
}

fn yaml_values() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(serde_json::Value::from),
        any::<i32>().prop_map(serde_json::Value::from),
        (-1e6..1e6_f64).prop_map(serde_json::Value::from),
        ".{0,12}".prop_map(serde_json::Value::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(serde_json::Value::from),
            prop::collection::btree_map("[a-z]{1,6}", inner, 0..4)
                .prop_map(|map| map.into_iter().collect::<serde_json::Map<_, _>>().into()),
        ]
    })
}

proptest! {
    /// JSON is YAML, so every JSON value reads as itself.
    #[test]
    fn json_reads_as_itself(value in yaml_values()) {
        let text = serde_json::json!({"k": value}).to_string();
        let root = table(&text);
        prop_assert_eq!(root.get("k").unwrap().item.value.to_json(), value);
    }

    #[test]
    fn nothing_panics(text in "[-a: \\[\\]{}&*!|>'\"#%@`,?~<\n\t0-9.é]{0,60}") {
        let _ = Document::parse_yaml("plan.yml", &text);
    }
}
