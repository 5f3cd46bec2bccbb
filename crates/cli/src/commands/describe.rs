//! `methods` and `models`.

use retune_core::names::nearest_list;
use retune_hub::catalogue;
use retune_methods::registry;
use retune_options::markdown_table;
use serde_json::json;

use crate::failure::Failure;
use crate::table::{grouped, table};

/// Lists the methods, or shows one.
pub(crate) fn methods(name: Option<&str>, json: bool) -> Result<(), Failure> {
    if let Some(name) = name {
        let plugin = registry::find(name).ok_or_else(|| {
            Failure::Usage(format!(
                "there is no method `{name}`\n  nearest names: {}\n  help: `retune methods` lists all",
                nearest_list(name, registry::names())
            ))
        })?;
        let card = plugin.card;
        if json {
            let schema = retune_options::schema(&(card.options)());
            println!(
                "{}",
                json!({"name": card.name, "summary": card.summary, "source": card.source, "options": schema})
            );
            return Ok(());
        }
        println!("{}\n\n{}\n\n{}\n", card.name, card.summary, card.source);
        let (low, high) = card.usual_learning_rates;
        println!("usual learning rates: {low:e} to {high:e}\n");
        println!("{}", markdown_table(&(card.options)()));
        return Ok(());
    }
    if json {
        let list: Vec<_> = registry::METHODS
            .iter()
            .map(|p| json!({"name": p.card.name, "summary": p.card.summary, "source": p.card.source}))
            .collect();
        println!("{}", json!(list));
        return Ok(());
    }
    let mut rows = table(&["method", "what it does"]);
    for plugin in registry::METHODS {
        rows.add_row([plugin.card.name, plugin.card.summary]);
    }
    println!("{rows}");
    Ok(())
}

/// Lists the models that have a name.
pub(crate) fn models(json: bool) {
    if json {
        println!(
            "{}",
            json!({
                "catalogue": serde_json::to_value(catalogue()).unwrap_or_default(),
                "architectures": retune_models::model_types().collect::<Vec<_>>(),
            })
        );
        return;
    }
    let mut rows = table(&["name", "values", "licence", "about"]);
    for entry in catalogue() {
        rows.add_row([
            entry.name.to_owned(),
            grouped(entry.num_parameters),
            entry.licence.to_owned(),
            entry.about.to_owned(),
        ]);
    }
    rows.add_row([
        "builtin:tiny",
        "",
        "CC0-1.0",
        "a tiny model inside the program, for trying out",
    ]);
    println!("{rows}");
    let types: Vec<&str> = retune_models::model_types().collect();
    println!("also: any Hugging Face folder or hf:org/name of type {}", types.join(", "));
    println!("also: any GGUF file of a llama, qwen or gemma model");
}
