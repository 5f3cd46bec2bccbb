//! JSON text as Python's `json.dumps(x, ensure_ascii=False)` writes it: what templates were
//! written against, so that a tool's schema gives the same tokens here and there.

use std::fmt::Write as _;

use serde_json::Value;

/// The arguments of the `tojson` filter that chat templates use.
#[derive(Debug, Default, Clone)]
pub(super) struct JsonStyle {
    pub(super) indent: Option<usize>,
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
    /// Between items, and between key and value; Python's defaults if absent.
    pub(super) separators: Option<(String, String)>,
}

/// Writes a value as Python's `json.dumps` does.
pub(super) fn dumps(value: &Value, style: &JsonStyle) -> String {
    let (item, key) = style.separators.clone().unwrap_or_else(|| {
        // Python drops the blank after the comma when it breaks lines.
        ((if style.indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned())
    });
    let mut out = String::new();
    write_value(&mut out, value, style, &item, &key, 0);
    out
}

fn write_value(
    out: &mut String,
    value: &Value,
    style: &JsonStyle,
    item: &str,
    colon: &str,
    depth: usize,
) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) => out.push_str(&number(n)),
        Value::String(s) => string(out, s, style.ensure_ascii),
        Value::Array(items) => {
            out.push('[');
            for (i, each) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(item);
                }
                new_line(out, style, depth + 1);
                write_value(out, each, style, item, colon, depth + 1);
            }
            if !items.is_empty() {
                new_line(out, style, depth);
            }
            out.push(']');
        }
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            if style.sort_keys {
                entries.sort_by_key(|(name, _)| *name);
            }
            out.push('{');
            for (i, (name, each)) in entries.iter().enumerate() {
                if i > 0 {
                    out.push_str(item);
                }
                new_line(out, style, depth + 1);
                string(out, name, style.ensure_ascii);
                out.push_str(colon);
                write_value(out, each, style, item, colon, depth + 1);
            }
            if !entries.is_empty() {
                new_line(out, style, depth);
            }
            out.push('}');
        }
    }
}

fn new_line(out: &mut String, style: &JsonStyle, depth: usize) {
    if let Some(indent) = style.indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', indent * depth));
    }
}

fn number(n: &serde_json::Number) -> String {
    match n.as_f64() {
        Some(x) if n.is_f64() => python_float(x),
        _ => n.to_string(),
    }
}

/// Formats a float as Python's `repr` does: shortest digits, exponents as `1e-05`.
pub(super) fn python_float(x: f64) -> String {
    let text = format!("{x:?}");
    let Some((digits, exponent)) = text.split_once('e') else { return text };
    let (sign, magnitude) = match exponent.strip_prefix('-') {
        Some(magnitude) => ('-', magnitude),
        None => ('+', exponent),
    };
    let digits = digits.strip_suffix(".0").unwrap_or(digits);
    format!("{digits}e{sign}{magnitude:0>2}")
}

fn string(out: &mut String, s: &str, ensure_ascii: bool) {
    out.push('"');
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && c > '~') => {
                let mut units = [0u16; 2];
                for unit in c.encode_utf16(&mut units) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plain(value: &Value) -> String {
        dumps(value, &JsonStyle::default())
    }

    /// Expected strings are what CPython 3.11's `json.dumps(x, ensure_ascii=False)` gives.
    #[test]
    fn writes_as_python_does() {
        assert_eq!(
            plain(&json!({"b": [1, 2.0, null, true], "a": "é<\"\n\u{1}\u{7f}"})),
            "{\"b\": [1, 2.0, null, true], \"a\": \"é<\\\"\\n\\u0001\u{7f}\"}"
        );
        assert_eq!(plain(&json!([[], {}])), "[[], {}]");
        assert_eq!(
            plain(&json!([1e16, 1e-5, 0.0001, 1.5e300])),
            "[1e+16, 1e-05, 0.0001, 1.5e+300]"
        );
    }

    #[test]
    fn indents_as_python_does() {
        let style = JsonStyle { indent: Some(2), ..JsonStyle::default() };
        assert_eq!(
            dumps(&json!({"a": [1, {}], "b": []}), &style),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}"
        );
    }

    #[test]
    fn honours_the_other_arguments() {
        let style = JsonStyle {
            ensure_ascii: true,
            sort_keys: true,
            separators: Some((",".into(), ":".into())),
            indent: None,
        };
        assert_eq!(
            dumps(&json!({"b": "é😀", "a": 1}), &style),
            r#"{"a":1,"b":"\u00e9\ud83d\ude00"}"#
        );
    }
}
