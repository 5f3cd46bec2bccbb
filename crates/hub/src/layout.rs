//! Which files make a folder a model.

use std::collections::BTreeSet;
use std::path::Path;

use crate::HubError;
use crate::name::has_extension;

/// Name of the list of shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// Name of weights that are in one file.
pub(crate) const SINGLE: &str = "model.safetensors";

/// The weight files of a model folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ModelFiles {
    /// `model.safetensors` or the shards its index names, sorted.
    Safetensors(Vec<String>),
    /// The folder's one `.gguf` file.
    Gguf(String),
}

/// Why a folder is not a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Missing {
    pub(crate) problem: String,
    pub(crate) advice: String,
}

impl Missing {
    fn new(problem: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { problem: problem.into(), advice: advice.into() }
    }

    pub(crate) fn at(self, path: &Path) -> HubError {
        HubError::NotAModel { path: path.to_owned(), problem: self.problem, advice: self.advice }
    }
}

/// Looks for a model's files in `folder`.
pub(crate) fn model_in(folder: &Path) -> Result<ModelFiles, Missing> {
    let has = |name: &str| folder.join(name).is_file();
    if has("adapter_config.json") && !has("config.json") {
        return Err(Missing::new(
            "the folder holds an adapter (adapter_config.json), not a model",
            "name the adapter's base as the model and give this folder as the adapter",
        ));
    }
    let names = file_names(folder)?;
    if has("config.json") {
        if let Some(shards) = safetensors_in(folder)? {
            return Ok(ModelFiles::Safetensors(shards));
        }
        if names.iter().any(|name| has_extension(name, "bin") || has_extension(name, "pth")) {
            return Err(Missing::new(
                "its weights are a Python pickle, which can run code when opened",
                "convert them to model.safetensors, or take a revision that has them",
            ));
        }
    }
    let mut ggufs = names.iter().filter(|name| has_extension(name, "gguf"));
    match (ggufs.next(), ggufs.next()) {
        (Some(only), None) => Ok(ModelFiles::Gguf(only.clone())),
        (Some(first), Some(second)) => Err(Missing::new(
            format!("the folder holds several .gguf files ({first}, {second}, …)"),
            "name the file",
        )),
        (None, _) if has("config.json") => Err(Missing::new(
            format!("config.json is there, but neither {SINGLE} nor {INDEX} nor a .gguf file"),
            "complete the download, or name another folder",
        )),
        (None, _) => Err(Missing::new(
            "the folder has neither config.json with model.safetensors nor a .gguf file",
            "name the folder that holds config.json",
        )),
    }
}

/// The weight files next to `config.json`; `None` where there are none of this format.
fn safetensors_in(folder: &Path) -> Result<Option<Vec<String>>, Missing> {
    if folder.join(INDEX).is_file() {
        let text = std::fs::read_to_string(folder.join(INDEX)).map_err(|error| {
            Missing::new(format!("{INDEX} cannot be read: {error}"), "download it again")
        })?;
        let shards = shard_names(&text)
            .map_err(|problem| Missing::new(problem, format!("download {INDEX} again")))?;
        if let Some(missing) = shards.iter().find(|name| !folder.join(name).is_file()) {
            return Err(Missing::new(
                format!("the shard {missing} that {INDEX} names is missing"),
                "complete the download",
            ));
        }
        return Ok(Some(shards));
    }
    Ok(folder.join(SINGLE).is_file().then(|| vec![SINGLE.to_owned()]))
}

/// The shard file names of an index, sorted, each a plain file name.
pub(crate) fn shard_names(index: &str) -> Result<Vec<String>, String> {
    let value: serde_json::Value =
        serde_json::from_str(index).map_err(|error| format!("{INDEX} is not JSON: {error}"))?;
    let map = value
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| format!("{INDEX} has no object `weight_map`"))?;
    let mut names = BTreeSet::new();
    for (tensor, name) in map {
        let name = name.as_str().filter(|name| {
            has_extension(name, "safetensors") && !name.contains(['/', '\\', '\0', ':'])
        });
        let Some(name) = name else {
            return Err(format!(
                "{INDEX} gives `{tensor}` a file that is no plain .safetensors file name"
            ));
        };
        names.insert(name.to_owned());
    }
    if names.is_empty() {
        return Err(format!("{INDEX} names no shard"));
    }
    Ok(names.into_iter().collect())
}

fn file_names(folder: &Path) -> Result<Vec<String>, Missing> {
    let unreadable = |error: std::io::Error| {
        Missing::new(format!("the folder cannot be read: {error}"), "check its permissions")
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        if entry.path().is_file()
            && let Ok(name) = entry.file_name().into_string()
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    fn problem(files: &[(&str, &str)]) -> String {
        model_in(folder(files).path()).unwrap_err().problem
    }

    const TWO_SHARDS: &str =
        r#"{"weight_map": {"b": "model-2.safetensors", "a": "model-1.safetensors"}}"#;

    #[test]
    fn the_three_layouts_are_found() {
        let single = folder(&[("config.json", "{}"), ("model.safetensors", ""), ("x.gguf", "")]);
        assert_eq!(
            model_in(single.path()).unwrap(),
            ModelFiles::Safetensors(vec!["model.safetensors".into()])
        );
        let sharded = folder(&[
            ("config.json", "{}"),
            (INDEX, TWO_SHARDS),
            ("model-1.safetensors", ""),
            ("model-2.safetensors", ""),
        ]);
        assert_eq!(
            model_in(sharded.path()).unwrap(),
            ModelFiles::Safetensors(vec![
                "model-1.safetensors".into(),
                "model-2.safetensors".into()
            ])
        );
        let gguf = folder(&[("x.gguf", "")]);
        assert_eq!(model_in(gguf.path()).unwrap(), ModelFiles::Gguf("x.gguf".into()));
    }

    #[test]
    fn what_is_missing_is_said() {
        assert!(problem(&[]).contains("neither config.json"));
        assert!(problem(&[("config.json", "{}")]).contains("nor a .gguf"));
        assert!(problem(&[("a.gguf", ""), ("b.gguf", "")]).contains("a.gguf, b.gguf"));
        assert!(problem(&[("adapter_config.json", "{}")]).contains("adapter"));
        assert!(problem(&[("config.json", "{}"), ("pytorch_model.bin", "")]).contains("pickle"));
        assert!(
            problem(&[("config.json", "{}"), (INDEX, TWO_SHARDS), ("model-1.safetensors", "")])
                .contains("model-2.safetensors")
        );
    }

    #[test]
    fn hostile_indexes_are_refused() {
        for index in [
            "",
            "[]",
            r#"{"weight_map": {}}"#,
            r#"{"weight_map": {"a": 3}}"#,
            r#"{"weight_map": {"a": "../../etc/model.safetensors"}}"#,
            r#"{"weight_map": {"a": "/etc/model.safetensors"}}"#,
            r#"{"weight_map": {"a": "C:model.safetensors"}}"#,
            r#"{"weight_map": {"a": "model.bin"}}"#,
        ] {
            assert!(shard_names(index).is_err(), "{index}");
        }
    }
}
