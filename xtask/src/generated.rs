//! `cargo xtask gen`: files that are made from the code and committed.
//!
//! A file joins by an entry in [`GENERATORS`].

use std::path::Path;

use crate::{Outcome, read};

/// One committed file and how it is made.
pub(crate) struct Generator {
    /// Path from the workspace's root.
    path: &'static str,
    /// Makes the file's text.
    make: fn(root: &Path) -> Result<String, String>,
}

/// Every generated file.
pub(crate) const GENERATORS: &[Generator] = &[];

/// Writes every generated file.
pub(crate) fn write(root: &Path, generators: &[Generator]) -> Outcome {
    for generator in generators {
        let text = make(root, generator)?;
        let path = root.join(generator.path);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("wrote {}", generator.path);
    }
    println!("{} generated files", generators.len());
    Ok(())
}

/// Fails where a committed file differs from what is made now.
pub(crate) fn check(root: &Path, generators: &[Generator]) -> Outcome {
    let mut stale = Vec::new();
    for generator in generators {
        let made = make(root, generator)?;
        let committed = read(&root.join(generator.path)).ok();
        if let Some(difference) = difference(committed.as_deref(), &made) {
            stale.push(format!("{}: {difference}", generator.path));
        }
    }
    if stale.is_empty() {
        println!("{} generated files are fresh", generators.len());
        return Ok(());
    }
    Err(format!("{}\n  what to do: run `cargo xtask gen` and commit", stale.join("\n")))
}

fn make(root: &Path, generator: &Generator) -> Result<String, String> {
    (generator.make)(root).map_err(|problem| format!("{}: {problem}", generator.path))
}

/// The first difference, in words.
fn difference(committed: Option<&str>, made: &str) -> Option<String> {
    let Some(committed) = committed else { return Some("missing".to_owned()) };
    if committed == made {
        return None;
    }
    let same = committed.lines().zip(made.lines()).take_while(|(old, new)| old == new).count();
    let line = |text: &str| text.lines().nth(same).unwrap_or("(the end)").to_owned();
    Some(format!("line {} is `{}`, now made is `{}`", same + 1, line(committed), line(made)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &[Generator] = &[
        Generator { path: "docs/a.md", make: |_| Ok("one\ntwo\n".to_owned()) },
        Generator { path: "b.txt", make: |_| Ok("b".to_owned()) },
    ];

    #[test]
    fn written_files_are_fresh_and_changed_ones_stale() {
        let root = tempfile::tempdir().unwrap();
        let problem = check(root.path(), TWO).unwrap_err();
        assert!(problem.contains("docs/a.md: missing") && problem.contains("b.txt: missing"));
        write(root.path(), TWO).unwrap();
        check(root.path(), TWO).unwrap();
        std::fs::write(root.path().join("docs/a.md"), "one\n2\n").unwrap();
        let problem = check(root.path(), TWO).unwrap_err();
        assert!(problem.contains("docs/a.md: line 2 is `2`, now made is `two`"), "{problem}");
        assert!(!problem.contains("b.txt"), "{problem}");
    }

    #[test]
    fn a_generator_that_fails_is_named() {
        let failing = [Generator { path: "c", make: |_| Err("no source".to_owned()) }];
        assert_eq!(check(Path::new("."), &failing).unwrap_err(), "c: no source");
    }
}
