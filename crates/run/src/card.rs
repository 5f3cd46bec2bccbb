//! Model cards: the README.md beside what a run leaves behind.

mod beside;
mod origin;

use std::fmt::Write;
use std::path::{Path, PathBuf};

pub use beside::{card_path, check_card_free, write_card};
pub use origin::{Outputs, with_origins};

use retune_merge::card::{front_matter, licence_of};
use serde_json::Value;

use crate::artefacts::report::{DataSummary, Measured, Metric, RunReport};
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
    let Some((head, body)) = front_matter(card) else { return card.to_owned() };
    if measured.is_empty() {
        return card.to_owned();
    }
    let data = Path::new(&report.data.source).file_stem();
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

/// As [`with_results`], of a model that was measured once, after it was made.
pub fn with_measured(card: &str, name: &str, data: &str, found: &[(&str, f64)]) -> String {
    let metric = |(name, value): &(&str, f64)| Metric {
        name: (*name).to_owned(),
        after: Some(Measured { value: *value, std_error: None }),
        held_out: true,
        ..Metric::default()
    };
    let report = RunReport {
        name: name.to_owned(),
        data: DataSummary { source: data.to_owned(), ..DataSummary::default() },
        metrics: found.iter().map(metric).collect(),
        ..RunReport::default()
    };
    with_results(card, &report)
}

/// Writes a text as a string of JSON, which is one of YAML too.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// Finds a model of the catalogue by its name here or on the hub.
fn known(base: &str) -> Option<retune_hub::CatalogueEntry> {
    let is_it = |entry: &retune_hub::CatalogueEntry| {
        entry.name == base || entry.repository.is_some_and(|repository| repository == base)
    };
    retune_hub::catalogue().iter().find(|entry| is_it(entry)).cloned()
}

/// Writes the lines of front matter that say what a model was made from, by its name on the hub
/// where it has one, and under which licence, where that is known.
fn base_lines(base: &str, licence: Option<&str>) -> String {
    let hub = base.strip_prefix("hf:").map(|name| name.split('@').next().unwrap_or(name));
    let entry = known(hub.unwrap_or(base));
    let name = entry.as_ref().and_then(|entry| entry.repository).or(hub).unwrap_or(base);
    let plain = |c: char| c.is_alphanumeric() || "-_./:".contains(c);
    let name = if name.chars().all(plain) { name.to_owned() } else { quoted(name) };
    let licence = licence.or(entry.as_ref().map(|entry| entry.licence)).map(str::to_lowercase);
    let licence = licence.or_else(|| licence_of(Path::new(base)));
    let licence = licence.map_or_else(String::new, |licence| format!("license: {licence}\n"));
    format!("base_model: {name}\n{licence}")
}

/// Writes the card of a model that was merged from a base and adapters.
pub fn merged_card(base: &str, adapters: &[PathBuf], title: &str) -> String {
    let card = derived_card(&Derived {
        library: "transformers",
        base: Some(base),
        tag: "merged",
        title,
        summary: "A model with adapters merged in, one after the other.",
        facts: &[("base", format!("`{base}`")), ("adapters", listed(adapters))],
    });
    with_origins(&card, adapters, Outputs::Same)
}

/// Lists adapters in the order they are applied.
pub fn listed(adapters: &[PathBuf]) -> String {
    if adapters.is_empty() {
        return "none".to_owned();
    }
    let names: Vec<String> = adapters.iter().map(|path| format!("`{}`", path.display())).collect();
    names.join(", then ")
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
    if let Some(base) = derived.base {
        text.push_str(&base_lines(base, None));
    }
    // Errors of writing into a String do not happen.
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
    let base = base_lines(&plan.model.name, plan.model.licence.as_deref());
    let mut text = format!("---\nlibrary_name: {library}\n{base}");
    // Errors of writing into a String do not happen.
    let mut line = |content: &str| {
        let _ = writeln!(text, "{content}");
    };
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
    }

    #[test]
    fn bases_have_their_name_on_the_hub_and_their_licence() {
        let front = |base: &str| {
            merged_card(base, &[], "title").lines().take(4).collect::<Vec<_>>().join(" ")
        };
        let smol = "base_model: HuggingFaceTB/SmolLM2-135M-Instruct license: apache-2.0";
        assert!(
            front("smollm2-135m-instruct").ends_with(smol),
            "{}",
            front("smollm2-135m-instruct")
        );
        assert!(
            front("hf:HuggingFaceTB/SmolLM2-135M-Instruct@main")
                .ends_with("SmolLM2-135M-Instruct license: apache-2.0")
        );
        assert!(front("hf:org/name@abc").ends_with("base_model: org/name tags:"));
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("a: b");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("README.md"), "---\nlicense: mit\n---\n").unwrap();
        let found = front(&folder.display().to_string());
        assert!(found.contains("a: b\"") && found.ends_with("license: mit"), "{found}");
    }
}
