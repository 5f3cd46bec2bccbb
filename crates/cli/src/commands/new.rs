//! `new`: a commented recipe.

use std::path::Path;

use retune_core::names::nearest_list;
use retune_methods::registry;
use retune_options::{Options, commented_toml};
use retune_run::recipe::{ComputeOptions, DataOptions, EvaluateOptions};
use retune_train::settings::TrainOptions;
use serde_json::json;

use crate::failure::Failure;

/// Writes a recipe with every setting, its default and its range.
pub(crate) fn new(path: &Path, method: &str, force: bool, json: bool) -> Result<(), Failure> {
    let plugin = registry::find(method).ok_or_else(|| {
        Failure::Usage(format!(
            "there is no method `{method}`\n  nearest names: {}\n  help: `retune methods` lists all",
            nearest_list(method, registry::names())
        ))
    })?;
    if path.exists() && !force {
        return Err(Failure::Usage(format!(
            "{}: the file exists\n  help: choose another name, or --force",
            path.display()
        )));
    }
    let text = recipe(plugin);
    retune_files::atomic::write_file(path, text.as_bytes())?;
    if json {
        println!("{}", json!({"recipe": path}));
    } else {
        println!("written: {}\nnext: retune doctor {}", path.display(), path.display());
    }
    Ok(())
}

fn recipe(plugin: &registry::Plugin) -> String {
    let mut text = String::from(
        "# A recipe for `retune run`. Lines with one `#` show defaults: take the `#` away to change one.\n\n\
         # A catalogue name (`retune models`), hf:org/name, a folder or a .gguf file.\n\
         model = \"smollm2-135m-instruct\"\n# seed = 42\n\n",
    );
    let table = format!("method.{}", plugin.card.name);
    for (name, specs) in [
        ("data", DataOptions::specs().to_vec()),
        (table.as_str(), (plugin.card.options)()),
        ("train", TrainOptions::specs().to_vec()),
        ("evaluate", EvaluateOptions::specs().to_vec()),
        ("compute", ComputeOptions::specs().to_vec()),
    ] {
        text.push_str(&commented_toml(name, &specs));
        text.push('\n');
    }
    text
}
