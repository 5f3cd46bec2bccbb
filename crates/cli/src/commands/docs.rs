//! `docs`: every page and file that is made from the program's own definitions.

use std::fmt::Write;
use std::path::Path;

use clap::CommandFactory;
use retune_hub::catalogue;
use retune_methods::registry::{METHODS, Plugin};
use retune_options::{Document, markdown_table};

use crate::args::Arguments;
use crate::failure::Failure;
use crate::table::grouped;

/// Writes all generated files below `folder`.
pub(crate) fn docs(folder: &Path) -> Result<(), Failure> {
    for (path, text) in files() {
        let path = folder.join(path);
        let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        made.and_then(|()| std::fs::write(&path, text)).map_err(|error| {
            Failure::Failed(format!("{}: cannot be written: {error}", path.display()))
        })?;
    }
    Ok(())
}

const MADE: &str = "<!-- Made by `cargo xtask gen`; change the definition, not this file. -->\n\n";

fn files() -> Vec<(String, String)> {
    let mut files = vec![
        ("docs/methods/README.md".to_owned(), index()),
        ("docs/models.md".to_owned(), models()),
        ("docs/recipe.schema.json".to_owned(), schema()),
    ];
    for plugin in METHODS {
        files.push((format!("docs/methods/{}.md", plugin.card.name), method(plugin)));
    }
    let mut command = Arguments::command();
    command.build();
    files.extend(help_pages(&command));
    files
}

fn index() -> String {
    let mut out = format!("{MADE}# Tuning methods\n\n");
    out.push_str("A recipe chooses one by the name of its table, e.g. `[method.lora]`.\n\n");
    out.push_str("| method | what it does | starts at the base | quantised base | files |\n");
    out.push_str("|---|---|---|---|---|\n");
    for plugin in METHODS {
        let card = plugin.card;
        let (starts, quantised) = match usual(plugin).map(|method| method.promises()) {
            Some(promises) => (yes(promises.starts_at_base), yes(promises.quantized_base)),
            None => ("", ""),
        };
        let files = if plugin.adapter.is_some() { "adapter" } else { "whole model" };
        let _ = writeln!(
            out,
            "| [{0}]({0}.md) | {1} | {starts} | {quantised} | {files} |",
            card.name,
            cell(card.summary)
        );
    }
    out
}

fn yes(holds: bool) -> &'static str {
    if holds { "yes" } else { "no" }
}

/// Keeps a text inside one cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// Makes the method with all its defaults, where it needs no setting.
fn usual(plugin: &Plugin) -> Option<Box<dyn retune_core::method::Method>> {
    let document = Document::parse("defaults", "").ok()?;
    document.read(|reader| (plugin.read)(reader)).ok().map(|(method, _)| method)
}

fn method(plugin: &Plugin) -> String {
    let card = plugin.card;
    let mut out =
        format!("{MADE}# {}\n\n{}\n\nSource: {}.\n\n", card.name, card.summary, card.source);
    let (low, high) = card.usual_learning_rates;
    let _ = writeln!(
        out,
        "Learning rates between {low:e} and {high:e} usually train well; without a setting the run \
         takes {:.1e}.\n",
        (low * high).sqrt()
    );
    let _ = writeln!(out, "## In a recipe\n\n```toml\n[method.{}]\n```\n", card.name);
    out.push_str("## Options\n\n");
    let specs = (card.options)();
    if specs.is_empty() {
        out.push_str("None.\n");
    } else {
        out.push_str(&markdown_table(&specs));
    }
    if let Some(promises) = usual(plugin).map(|method| method.promises()) {
        out.push_str("\n## What holds\n\nFor the defaults, checked on every tiny model:\n\n");
        let mut item = |text: &str| {
            let _ = writeln!(out, "- {text}");
        };
        item(if promises.starts_at_base {
            "Before the first step the model computes what its base computes."
        } else {
            "Before the first step the model differs from its base."
        });
        item(if promises.quantized_base {
            "The base may stay in quantised blocks."
        } else {
            "A base in quantised blocks is refused."
        });
        if let Some(refusal) = promises.refuses {
            item(&format!("Models {} are refused.", refusal.models));
        }
    }
    out.push_str("\n## Files\n\n");
    match plugin.adapter {
        Some((kind, _)) => {
            let _ = writeln!(
                out,
                "`adapter/adapter_config.json` of PEFT's type `{kind}` and \
                 `adapter/adapter_model.safetensors`, both read and written."
            );
        }
        None => out.push_str("`model/`: the whole tuned model as a Hugging Face folder.\n"),
    }
    out
}

fn models() -> String {
    let mut out = format!("{MADE}# Models\n\n## By name\n\n");
    out.push_str("| name | values | licence | about |\n|---|---|---|---|\n");
    for entry in catalogue() {
        let _ = writeln!(
            out,
            "| `{}` | {} | {} | {} |",
            entry.name,
            grouped(entry.num_parameters),
            entry.licence,
            cell(entry.about)
        );
    }
    out.push_str(
        "| `builtin:tiny` | | CC0-1.0 | a tiny model inside the program, for trying out |\n",
    );
    out.push_str(
        "\n## By folder or file\n\nAny Hugging Face folder or `hf:org/name` of these types:\n\n",
    );
    for kind in retune_models::model_types() {
        let _ = writeln!(out, "- `{kind}`");
    }
    out.push_str("\nGGUF files of llama, qwen and gemma models.\n");
    out
}

fn schema() -> String {
    let schema = retune_run::recipe::schema();
    let mut text = serde_json::to_string_pretty(&schema).unwrap_or_default();
    text.push('\n');
    text
}

/// Returns the help of each command as a page, the program's own first.
fn help_pages(command: &clap::Command) -> Vec<(String, String)> {
    let mut index = format!("{MADE}# Commands\n\n");
    if let Some(about) = command.get_about() {
        let _ = writeln!(index, "{about}\n");
    }
    index.push_str("| command | what it does |\n|---|---|\n");
    let mut pages = Vec::new();
    let shown = |c: &&clap::Command| !c.is_hide_set() && c.get_name() != "help";
    for sub in command.get_subcommands().filter(shown) {
        let name = sub.get_name();
        let about = sub.get_about().map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(index, "| [{name}]({name}.md) | {} |", cell(&about));
        // A width of its own: the page must not depend on the terminal it is made in.
        let help = sub.clone().term_width(96).render_long_help().to_string();
        let lines: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
        let text = format!("{MADE}# retune {name}\n\n```text\n{}\n```\n", lines.join("\n"));
        pages.push((format!("docs/commands/{name}.md"), text));
    }
    pages.insert(0, ("docs/commands/README.md".to_owned(), index));
    pages
}
