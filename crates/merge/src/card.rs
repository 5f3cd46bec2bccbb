//! Cards: the README.md beside a model, with the hub's front matter.

use std::fmt::Write;
use std::path::Path;

use crate::model::Model;
use crate::plan::Plan;

/// Writes the card.
pub(crate) fn card(plan: &Plan, models: &[Model], name: &str) -> String {
    let mut text = "---\n".to_owned();
    // Errors of writing into a String do not happen.
    let mut line = |content: &str| {
        let _ = writeln!(text, "{content}");
    };
    let hub: Vec<&str> = models
        .iter()
        .flat_map(|model| [Some(model.name.path.as_str()), model.name.lora.as_deref()])
        .flatten()
        .filter_map(hub_name)
        .collect();
    if !hub.is_empty() {
        line("base_model:");
        for name in &hub {
            line(&format!("- {name}"));
        }
    }
    line("library_name: transformers");
    if let Some(licence) = licence(models) {
        line(&format!("license: {licence}"));
    }
    line("tags:");
    line("- merge");
    line("- mergekit");
    line("- retune");
    line("---");
    line("");
    line(&format!("# {name}"));
    line("");
    let method = plan.method;
    let base = match &plan.base {
        Some(base) => format!(", with `{base}` as the base"),
        None => String::new(),
    };
    line(&format!(
        "Merged with retune {} by [{}]({}): {}{base}.",
        env!("CARGO_PKG_VERSION"),
        method.title,
        method.source,
        method.about
    ));
    line("");
    line("| model |");
    line("|---|");
    for model in models {
        line(&format!("| `{}` |", model.name));
    }
    line("");
    line("The plan:");
    line("");
    // Longer than any run of backticks inside, so that the plan cannot end its block.
    let fence = "`".repeat(longest_run(&plan.text).max(2) + 1);
    line(&format!("{fence}yaml"));
    line(plan.text.trim_end());
    line(&fence);
    text
}

/// Returns the name of a model on the hub, if that is what it looks like.
fn hub_name(path: &str) -> Option<&str> {
    let path = path.strip_prefix("hf:").unwrap_or(path);
    let path = path.split_once('@').map_or(path, |(path, _)| path);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let (owner, name) = path.split_once('/')?;
    let fits = |part: &str| !part.is_empty() && part.chars().all(plain) && !part.starts_with('.');
    (fits(owner) && fits(name) && !Path::new(path).exists()).then_some(path)
}

/// Returns the licence all models state, if they agree.
fn licence(models: &[Model]) -> Option<String> {
    let mut licences = models.iter().map(|model| licence_of(model.source.folder()));
    let first = licences.next()??;
    licences.all(|other| other.as_ref() == Some(&first)).then_some(first)
}

/// Returns the licence the card in a model's or adapter's folder states.
pub fn licence_of(folder: &Path) -> Option<String> {
    let text = std::fs::read_to_string(folder.join("README.md")).ok()?;
    licence_in(front_matter(&text)?.0)
}

/// Returns the licence front matter states: one plain word.
pub fn licence_in(front: &str) -> Option<String> {
    let licence = front.lines().find_map(|line| line.strip_prefix("license:"))?.trim();
    let plain = licence.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
    (plain && !licence.is_empty()).then(|| licence.to_owned())
}

/// Splits a card into its front matter, without the lines that enclose it, and what follows.
pub fn front_matter(card: &str) -> Option<(&str, &str)> {
    card.strip_prefix("---\n")?.split_once("\n---\n")
}

fn longest_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}
