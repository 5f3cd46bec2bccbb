//! `cargo xtask new method NAME`: the skeleton of a tuning method, and its line in the registry.

use std::path::Path;

use crate::{Outcome, read};

/// A method that compiles and keeps what every method must keep; the conformance crate's tests
/// include this very file.
const TEMPLATE: &str = include_str!("../templates/method.rs");

/// Writes the method's file and its two lines.
pub(crate) fn run(root: &Path, name: &str) -> Outcome {
    check(name)?;
    let source = root.join("crates/methods/src");
    let module = name.replace('-', "_");
    let path = source.join(format!("{module}.rs"));
    if path.exists() {
        return Err(format!("{} exists; choose another name", path.display()));
    }
    let (library, registry) = (source.join("lib.rs"), source.join("registry.rs"));
    let new_library = with_module(&read(&library)?, &module)?;
    let new_registry = with_plugin(&read(&registry)?, &module)?;
    for (path, text) in [(path, skeleton(name)), (library, new_library), (registry, new_registry)] {
        std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("wrote {}", path.display());
    }
    println!(
        "next: say what it changes, then `cargo nextest run -p retune-conformance` and `cargo \
         xtask gen`"
    );
    Ok(())
}

/// A name is the paper's, in small letters with hyphens.
fn check(name: &str) -> Outcome {
    let parts: Vec<&str> = name.split('-').collect();
    let fits = |part: &&str| {
        !part.is_empty() && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
    };
    if parts.iter().all(fits) && name.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Ok(());
    }
    Err(format!(
        "`{name}` is no method's name; expected small letters, digits and hyphens, such as `half-tuning`"
    ))
}

/// The template under another name.
fn skeleton(name: &str) -> String {
    let parts: Vec<String> = name
        .split('-')
        .map(|part| {
            let (first, rest) = part.split_at(1);
            format!("{}{rest}", first.to_ascii_uppercase())
        })
        .collect();
    TEMPLATE
        .replace("my-method", name)
        .replace("my_method", &name.replace('-', "_"))
        .replace("MyMethod", &parts.concat())
        .replace("My method", &parts.join(" "))
}

/// Puts `pub mod NAME;` at its place in the alphabet.
fn with_module(text: &str, module: &str) -> Result<String, String> {
    let line = format!("pub mod {module};");
    let mut lines: Vec<&str> = text.lines().collect();
    let modules = |l: &&str| l.starts_with("pub mod ");
    let last = lines.iter().rposition(&modules).ok_or("lib.rs has no `pub mod` line")?;
    let place = lines.iter().position(|l| modules(l) && **l > *line).unwrap_or(last + 1);
    lines.insert(place, &line);
    Ok(lines.join("\n") + "\n")
}

/// Puts the method at the end of the list.
fn with_plugin(text: &str, module: &str) -> Result<String, String> {
    let start = text.find("pub const METHODS").ok_or("registry.rs has no METHODS")?;
    let end = start + text[start..].find("];").ok_or("the list METHODS has no end")?;
    let list = text[start..end].trim_end();
    let (comma, space) = match (list.ends_with(','), text[start..end].contains('\n')) {
        (true, _) => ("", "\n    "),
        (false, true) => (",", "\n    "),
        (false, false) => (",", " "),
    };
    let tail = if space == " " { "" } else { ",\n" };
    // The whole path: the imports above the list are the maintainers' to keep in order.
    let entry = format!("{comma}{space}crate::{module}::PLUGIN{tail}");
    Ok(format!("{}{list}{entry}{}", &text[..start], &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_a_recipe() {
        assert!(check("half-tuning").is_ok() && check("ia3").is_ok());
        for wrong in ["", "HalfTuning", "half_tuning", "-half", "half--tuning", "3d", "ü"] {
            assert!(check(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_skeleton_has_one_name_everywhere() {
        let text = skeleton("half-tuning");
        for expected in
            ["struct HalfTuning ", "HalfTuningOptions(\"half-tuning\")", "//! Half Tuning"]
        {
            assert!(text.contains(expected), "{expected}");
        }
        for left in ["my_method", "my-method", "MyMethod", "My method"] {
            assert!(!text.contains(left), "{left}");
        }
    }

    #[test]
    fn lines_find_their_place() {
        let library = "//! Methods.\n\npub mod full;\npub mod lora;\n";
        let found = with_module(library, "half_tuning").unwrap();
        assert_eq!(found, "//! Methods.\n\npub mod full;\npub mod half_tuning;\npub mod lora;\n");
        let found = with_module(library, "ssf").unwrap();
        assert!(found.ends_with("pub mod lora;\npub mod ssf;\n"));
        let one = "a\npub const METHODS: &[Plugin] = &[lora::PLUGIN, full::PLUGIN];\nb\n";
        assert_eq!(
            with_plugin(one, "ssf").unwrap(),
            "a\npub const METHODS: &[Plugin] = &[lora::PLUGIN, full::PLUGIN, crate::ssf::PLUGIN];\nb\n"
        );
        let many = "pub const METHODS: &[Plugin] = &[\n    lora::PLUGIN,\n    full::PLUGIN,\n];\n";
        assert_eq!(
            with_plugin(many, "ssf").unwrap(),
            "pub const METHODS: &[Plugin] = &[\n    lora::PLUGIN,\n    full::PLUGIN,\n    crate::ssf::PLUGIN,\n];\n"
        );
        assert!(with_plugin("nothing", "ssf").is_err());
    }
}
