//! Model cards: the README.md beside what a run leaves behind.

use std::fmt::Write;

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

/// Writes the card of a model that was merged from a base and an adapter.
pub fn merged_card(base: &str, adapter: &str) -> String {
    format!(
        "---\nlibrary_name: transformers\nbase_model: {base}\ntags:\n- retune\n---\n\n\
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
        let _ = writeln!(text, "base_model: {base}");
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
