//! `{% generation %}` blocks, which plain Jinja does not know.
//!
//! They become filter blocks: a block tag keeps the white-space rules of the original, and the
//! filter decides whether marks are written around what the block printed.

use std::fmt::Write as _;

/// Filters that generation blocks become; not names a template would use.
pub(super) const PLAIN_FILTER: &str = "retune_generation";
pub(super) const MARK_FILTER: &str = "retune_generation_marks";

/// Unicode noncharacters: never valid in text that is exchanged, so data does not hold them.
pub(super) const OPEN: char = '\u{FDD0}';
pub(super) const CLOSE: char = '\u{FDD1}';

/// Replaces generation tags by filter blocks; says whether there were any.
pub(super) fn rewrite(source: &str, filter: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len() + 64);
    let mut found = false;
    let mut rest = source;
    while let Some(at) = rest.find("{%").into_iter().chain(rest.find("{#")).min() {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let close = if rest.starts_with("{#") { "#}" } else { "%}" };
        let Some(end) = rest[2..].find(close) else { break };
        let (tag, after) = rest.split_at(end + 4);
        if close == "#}" {
            out.push_str(tag);
        } else {
            let inside = &tag[2..tag.len() - 2];
            let (left, inside) = control(inside, true);
            let (right, inside) = control(inside, false);
            match inside.trim() {
                "generation" => {
                    found = true;
                    let _ = write!(out, "{{%{left} filter {filter} {right}%}}");
                }
                "endgeneration" => {
                    let _ = write!(out, "{{%{left} endfilter {right}%}}");
                }
                _ => out.push_str(tag),
            }
        }
        rest = after;
    }
    out.push_str(rest);
    (out, found)
}

/// Splits a white-space control sign (`-` or `+`) off one end of a tag's inside.
fn control(inside: &str, left: bool) -> (&str, &str) {
    let signs = ['-', '+'];
    if left && inside.starts_with(signs) {
        inside.split_at(1)
    } else if !left && inside.ends_with(signs) {
        let (inside, sign) = inside.split_at(inside.len() - 1);
        (sign, inside)
    } else {
        ("", inside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewrites_tags_and_keeps_their_whitespace_signs() {
        let (text, found) = rewrite("a{%- generation -%}b{% endgeneration +%}c{% if x %}", "f");
        assert_eq!(text, "a{%- filter f -%}b{% endfilter +%}c{% if x %}");
        assert!(found);
    }

    #[test]
    fn leaves_comments_and_other_templates_alone() {
        let source = "{%}}{#}{# {% generation %} #}{% set x = 'generation' %}{{ x }}{% broken";
        assert_eq!(rewrite(source, "f"), (source.to_owned(), false));
    }
}
