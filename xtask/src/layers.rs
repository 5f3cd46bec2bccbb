//! `cargo xtask layers`: which crate may depend on which.
//!
//! Arrows point down. Siblings never see each other, so that methods and models add instead of
//! multiplying. A dev-dependency follows the same rule; `testkit` is one for everybody.

use std::collections::BTreeMap;
use std::path::Path;

use toml::{Table, Value};

use crate::{Outcome, read};

/// What sits directly on `core`: architectures, methods and the other parts that never see each
/// other.
const ON_CORE: Allowed = Allowed::These(&["core", "kernels", "files", "options"]);

/// Each folder of `crates/` and the crates of the workspace it may depend on.
const RULES: &[(&str, Allowed)] = &[
    ("files", Allowed::These(&[])),
    ("options", Allowed::These(&[])),
    ("hub", Allowed::These(&["files"])),
    ("data", Allowed::These(&["files"])),
    ("unify", Allowed::These(&[])),
    ("eigen", Allowed::These(&[])),
    ("kernels", Allowed::These(&["files", "unify"])),
    ("core", Allowed::These(&["kernels", "files", "options"])),
    ("models", ON_CORE),
    ("methods", Allowed::These(&["core", "kernels", "files", "options", "eigen"])),
    ("train", ON_CORE),
    ("merge", Allowed::These(&["files", "options", "eigen"])),
    ("inspect", ON_CORE),
    ("search", ON_CORE),
    ("evaluate", ON_CORE),
    ("testkit", Allowed::These(&["core", "kernels", "files"])),
    (
        "conformance",
        Allowed::These(&[
            "core", "kernels", "files", "options", "models", "methods", "train", "testkit",
        ]),
    ),
    ("run", Allowed::AllBut(&["cli", "web", "claims", "testkit", "conformance"])),
    ("claims", Allowed::AllBut(&["cli", "web", "testkit", "conformance"])),
    ("web", Allowed::AllBut(&["cli", "testkit", "conformance"])),
    ("cli", Allowed::AllBut(&["testkit", "conformance"])),
];

/// A dev-dependency of every crate.
const FOR_TESTS: &str = "testkit";

#[derive(Clone, Copy)]
enum Allowed {
    These(&'static [&'static str]),
    AllBut(&'static [&'static str]),
}

impl Allowed {
    fn allows(self, target: &str) -> bool {
        match self {
            Self::These(targets) => targets.contains(&target),
            Self::AllBut(targets) => !targets.contains(&target),
        }
    }

    fn describe(self) -> String {
        match self {
            Self::These([]) => "no crate of the workspace".to_owned(),
            Self::These(targets) => targets.join(", "),
            Self::AllBut(targets) => format!("every crate but {}", targets.join(", ")),
        }
    }
}

/// Name of the package in `crates/FOLDER`.
fn package_name(folder: &str) -> String {
    if folder == "cli" { "retune".to_owned() } else { format!("retune-{folder}") }
}

pub(crate) fn run(root: &Path) -> Outcome {
    let workspace = parse(&root.join("Cargo.toml"))?;
    let mut manifests = BTreeMap::new();
    let crates = root.join("crates");
    let entries =
        std::fs::read_dir(&crates).map_err(|error| format!("{}: {error}", crates.display()))?;
    for entry in entries {
        let path = entry.map_err(|error| format!("{}: {error}", crates.display()))?.path();
        let manifest = path.join("Cargo.toml");
        if let (true, Some(folder)) = (manifest.is_file(), path.file_name()) {
            manifests.insert(folder.to_string_lossy().into_owned(), parse(&manifest)?);
        }
    }
    let problems = problems(&workspace, &manifests);
    if problems.is_empty() {
        println!("{} crates keep to the layers", manifests.len());
        return Ok(());
    }
    Err(format!(
        "{}\n  what to do: move the code down, or pass it in from `run`",
        problems.join("\n")
    ))
}

fn parse(path: &Path) -> Result<Table, String> {
    read(path)?.parse().map_err(|error| format!("{}: {error}", path.display()))
}

/// Every arrow that points up or sideways, and every crate the table does not know.
fn problems(workspace: &Table, manifests: &BTreeMap<String, Table>) -> Vec<String> {
    let mut problems = Vec::new();
    for (folder, manifest) in manifests {
        let Some((_, allowed)) = RULES.iter().find(|(name, _)| name == folder) else {
            problems.push(format!("crates/{folder} is not in the table of xtask/src/layers.rs"));
            continue;
        };
        let name = manifest.get("package").and_then(|package| package.get("name"));
        if name.and_then(Value::as_str) != Some(&package_name(folder)) {
            problems.push(format!("crates/{folder} must be called {}", package_name(folder)));
        }
        for (section, package) in dependencies(workspace, manifest) {
            let Some(target) = RULES.iter().find(|(name, _)| package_name(name) == package) else {
                continue;
            };
            let is_test_arrow = section == "dev-dependencies" && target.0 == FOR_TESTS;
            if target.0 != folder && !is_test_arrow && !allowed.allows(target.0) {
                problems.push(format!(
                    "crates/{folder} has {package} in [{section}]; it may depend on {}",
                    allowed.describe()
                ));
            }
        }
    }
    problems
}

/// Every dependency as (section, package), renames undone, of every target.
fn dependencies(workspace: &Table, manifest: &Table) -> Vec<(String, String)> {
    const SECTIONS: &[&str] = &["dependencies", "dev-dependencies", "build-dependencies"];
    let mut tables = vec![manifest];
    if let Some(targets) = manifest.get("target").and_then(Value::as_table) {
        tables.extend(targets.values().filter_map(Value::as_table));
    }
    let mut found = Vec::new();
    for table in tables {
        for section in SECTIONS {
            let Some(listed) = table.get(*section).and_then(Value::as_table) else { continue };
            for (key, value) in listed {
                let inherited = value.get("workspace").and_then(Value::as_bool) == Some(true);
                let value = if inherited {
                    workspace
                        .get("workspace")
                        .and_then(|workspace| workspace.get("dependencies")?.get(key))
                        .unwrap_or(value)
                } else {
                    value
                };
                let package = value.get("package").and_then(Value::as_str).unwrap_or(key);
                found.push(((*section).to_owned(), package.to_owned()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(folder: &str, dependencies: &str) -> Vec<String> {
        let workspace =
            "[workspace.dependencies]\nbase = { package = \"retune-core\", version = \"1\" }";
        let manifest = format!("[package]\nname = \"{}\"\n{dependencies}", package_name(folder));
        let manifests = BTreeMap::from([(folder.to_owned(), manifest.parse().unwrap())]);
        problems(&workspace.parse().unwrap(), &manifests)
    }

    #[test]
    fn arrows_down_pass() {
        assert!(
            found("methods", "[dependencies]\nretune-core.workspace = true\nserde = \"1\"")
                .is_empty()
        );
        assert!(
            found("run", "[dependencies]\nretune-models = { path = \"../models\" }").is_empty()
        );
        assert!(found("kernels", "[dev-dependencies]\nretune-testkit.workspace = true").is_empty());
        assert!(found("cli", "[dependencies]\nretune-files.workspace = true").is_empty());
    }

    #[test]
    fn arrows_up_and_sideways_fail() {
        for (folder, dependencies) in [
            ("methods", "[dependencies]\nretune-models.workspace = true"),
            ("methods", "[dev-dependencies]\nretune-models.workspace = true"),
            ("files", "[dependencies]\nretune-options = { path = \"../options\" }"),
            ("core", "[build-dependencies]\nretune-run = \"1\""),
            ("kernels", "[target.'cfg(unix)'.dependencies]\nretune-core.workspace = true"),
            ("hub", "[dependencies]\nbase.workspace = true"),
            ("hub", "[dependencies]\nbase = { package = \"retune-core\", path = \"../core\" }"),
            ("train", "[dependencies]\nretune-testkit.workspace = true"),
            ("run", "[dependencies]\nretune = { path = \"../cli\" }"),
        ] {
            let found = found(folder, dependencies);
            assert_eq!(found.len(), 1, "{folder}: {dependencies}: {found:?}");
        }
    }

    #[test]
    fn an_unknown_or_misnamed_crate_fails() {
        let manifests = |folder: &str, name: &str| {
            let manifest = format!("[package]\nname = \"{name}\"").parse().unwrap();
            BTreeMap::from([(folder.to_owned(), manifest)])
        };
        let of = |manifests| problems(&Table::new(), &manifests);
        assert!(of(manifests("extras", "retune-extras"))[0].contains("not in the table"));
        assert!(of(manifests("core", "core"))[0].contains("must be called retune-core"));
        assert!(of(manifests("cli", "retune")).is_empty());
    }
}
