//! Model cards: the README.md beside what a run leaves behind.

use std::fmt::Write;

use serde_json::Value;

use crate::artefacts::report::{Metric, RunReport};
use crate::prepare::Prepared;
use retune_core::method::Card;

/// Writes the card of an adapter, with the hub's front matter.
pub fn adapter_card(prepared: &Prepared, method: &Card) -> String {
    card(prepared, "peft", method)
}

/// Writes the card of a tuned model, with the hub's front matter.
pub fn model_card(prepared: &Prepared) -> String {
    card(prepared, "transformers", &prepared.recipe.method.card())
}

/// Adds what was measured to a card: the hub's `metrics` and `model-index`, and a table.
pub fn with_results(card: &str, report: &RunReport) -> String {
    let measured: Vec<(&Metric, f64)> = report
        .metrics
        .iter()
        .filter_map(|metric| Some((metric, metric.after?.value)))
        .filter(|(_, value)| value.is_finite())
        .collect();
    let Some((head, body)) = card.strip_prefix("---\n").and_then(|card| card.split_once("\n---\n"))
    else {
        return card.to_owned();
    };
    if measured.is_empty() {
        return card.to_owned();
    }
    // JSON's strings are YAML's.
    let quoted = |text: &str| Value::from(text).to_string();
    let data = std::path::Path::new(&report.data.source).file_stem();
    let data = quoted(&data.map_or_else(String::new, |name| name.to_string_lossy().into()));
    let names: Vec<String> =
        measured.iter().map(|(metric, _)| format!("- {}\n", metric.name)).collect();
    let values: Vec<String> = measured
        .iter()
        .map(|(metric, value)| format!("    - type: {}\n      value: {value}\n", metric.name))
        .collect();
    let is_classifier = report.metrics.iter().any(|metric| metric.name == "accuracy");
    let task = if is_classifier { "text-classification" } else { "text-generation" };
    let mut text = format!(
        "---\n{head}\nmetrics:\n{}model-index:\n- name: {}\n  results:\n  - task:\n      type: \
         {task}\n    dataset:\n      name: {data}\n      type: {data}\n    metrics:\n{}---\n{body}",
        names.concat(),
        quoted(&report.name),
        values.concat(),
    );
    let held = if measured.iter().all(|(metric, _)| metric.held_out) {
        "held-out rows"
    } else {
        "training rows"
    };
    let shown = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |v| format!("{v:.4}"));
    // Errors of writing into a String do not happen.
    let _ = writeln!(text, "\n| on {held} | before | after |\n|---|---|---|");
    for (metric, value) in &measured {
        let before = shown(metric.before.map(|before| before.value));
        let _ = writeln!(text, "| {} | {before} | {} |", metric.name, shown(Some(*value)));
    }
    text
}

/// Finds the licence of a model that has a name.
fn licence_of(base: &str) -> Option<String> {
    let known = retune_hub::catalogue().iter().find(|entry| entry.name == base)?;
    Some(known.licence.to_lowercase())
}

/// Writes the line of front matter that says the licence, where it is known.
fn licence_line(base: &str) -> String {
    licence_of(base).map_or_else(String::new, |licence| format!("license: {licence}\n"))
}

/// Writes the card of a model that was merged from a base and an adapter.
pub fn merged_card(base: &str, adapter: &str) -> String {
    let licence = licence_line(base);
    format!(
        "---\nlibrary_name: transformers\nbase_model: {base}\n{licence}tags:\n- retune\n---\n\n\
         `{base}` with the adapter `{adapter}` merged in by retune {}.\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// What a card says of weights that were computed from other weights.
#[derive(Debug, Clone, Copy)]
pub struct Derived<'a> {
    /// The library that reads them.
    pub library: &'a str,
    /// The model they belong to, where it is known.
    pub base: Option<&'a str>,
    /// What was done, as a tag of the hub.
    pub tag: &'a str,
    /// The heading.
    pub title: &'a str,
    /// One sentence on how they were made, with the source.
    pub summary: &'a str,
    /// Names and values of the table.
    pub facts: &'a [(&'a str, String)],
}

/// Writes the card of weights that were computed from other weights, with the hub's front matter.
pub fn derived_card(derived: &Derived<'_>) -> String {
    let mut text = format!("---\nlibrary_name: {}\n", derived.library);
    // Errors of writing into a String do not happen.
    if let Some(base) = derived.base {
        let _ = write!(text, "base_model: {base}\n{}", licence_line(base));
    }
    let _ = writeln!(text, "tags:\n- {}\n- retune\n---\n", derived.tag);
    let _ = writeln!(text, "# {}\n\n{}\n\n| | |\n|---|---|", derived.title, derived.summary);
    for (name, value) in derived.facts {
        let _ = writeln!(text, "| {name} | {value} |");
    }
    let _ = writeln!(text, "| made with | retune {} |", env!("CARGO_PKG_VERSION"));
    text
}

fn card(prepared: &Prepared, library: &str, card: &Card) -> String {
    let plan = &prepared.plan;
    let mut text = format!("---\nlibrary_name: {library}\n");
    // Errors of writing into a String do not happen.
    let mut line = |content: &str| {
        let _ = writeln!(text, "{content}");
    };
    line(&format!("base_model: {}", plan.model.name));
    if let Some(licence) = &plan.model.licence {
        line(&format!("license: {}", licence.to_lowercase()));
    }
    line("tags:");
    line(&format!("- {}", card.name));
    line("- retune");
    line("---");
    line("");
    line(&format!("# {}", prepared.recipe.name));
    line("");
    line(&format!("{} Source: {}.", card.summary, card.source));
    line("");
    line("| | |");
    line("|---|---|");
    line(&format!("| base | `{}` (`{}`) |", plan.model.name, plan.model.fingerprint));
    if !prepared.recipe.method.parts().is_empty() {
        line(&format!("| trained together, in this order | {} |", plan.method));
    }
    for lower in &prepared.opened.under {
        line(&format!("| on top of | `{}` (`{}`) |", lower.name, lower.fingerprint));
    }
    line(&format!("| trained values | {} of {} |", plan.num_trainable, plan.model.num_parameters));
    line(&format!(
        "| data | `{}`, {} rows |",
        prepared.recipe.data.train.display(),
        plan.data.num_train
    ));
    line(&format!("| steps | {} |", plan.num_steps));
    line(&format!("| highest learning rate | {:e} |", plan.learning_rate));
    line(&format!("| seed | {} |", prepared.recipe.seed));
    line(&format!("| made with | retune {} |", plan.version));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artefacts::report::{DataSummary, Measured};

    #[test]
    fn what_was_measured_stands_in_front_matter_and_table() {
        let metric = |name: &str, before: Option<f64>, after: f64| Metric {
            name: name.to_owned(),
            before: before.map(|value| Measured { value, std_error: None }),
            after: Some(Measured { value: after, std_error: None }),
            held_out: true,
            ..Metric::default()
        };
        let report = RunReport {
            name: "a: run".to_owned(),
            data: DataSummary { source: "x/people.jsonl".to_owned(), ..DataSummary::default() },
            metrics: vec![metric("loss", Some(2.0), 1.25), metric("f1", None, f64::NAN)],
            ..RunReport::default()
        };
        let card = "---\nbase_model: b\ntags:\n- retune\n---\n\n# title\n";
        assert_eq!(
            with_results(card, &report),
            "---\nbase_model: b\ntags:\n- retune\nmetrics:\n- loss\nmodel-index:\n- name: \"a: run\"\n  \
             results:\n  - task:\n      type: text-generation\n    dataset:\n      name: \"people\"\n      \
             type: \"people\"\n    metrics:\n    - type: loss\n      value: 1.25\n---\n\n# title\n\n\
             | on held-out rows | before | after |\n|---|---|---|\n| loss | 2.0000 | 1.2500 |\n"
        );
        assert_eq!(with_results(card, &RunReport::default()), card);
        assert_eq!(with_results("no front matter", &report), "no front matter");
        let merged = merged_card("smollm2-135m-instruct", "a");
        assert!(merged.contains("\nlicense: apache-2.0\n"), "{merged}");
    }
}
