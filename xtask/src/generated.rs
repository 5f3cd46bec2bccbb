//! `cargo xtask gen`: files that are made from the program's definitions and committed.
//!
//! The program makes them (`retune docs FOLDER`), so that nothing here knows methods or models.

use std::collections::BTreeMap;
use std::path::Path;

use crate::{Outcome, cargo, output, read};

/// Folders in which every file is a generated one, so that pages of what is gone are noticed.
const WHOLE: &[&str] = &["docs/methods", "docs/commands"];

/// The text of each file by its path from the workspace's root.
type Files = BTreeMap<String, String>;

/// Writes every generated file, and removes those of what is gone.
pub(crate) fn write(root: &Path) -> Outcome {
    let made = make(root)?;
    for path in surplus(root, &made)? {
        remove(&root.join(&path))?;
        println!("removed {path}");
    }
    let mut num_written = 0;
    for (path, text) in &made {
        let target = root.join(path);
        if read(&target).is_ok_and(|old| old == *text) {
            continue;
        }
        if let Some(folder) = target.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        std::fs::write(&target, text).map_err(|error| format!("{}: {error}", target.display()))?;
        println!("wrote {path}");
        num_written += 1;
    }
    println!("{} generated files, {num_written} of them changed", made.len());
    Ok(())
}

/// Fails where a committed file differs from what is made now.
pub(crate) fn check(root: &Path) -> Outcome {
    let made = make(root)?;
    let stale = stale(root, &made)?;
    if stale.is_empty() {
        println!("{} generated files are fresh", made.len());
        return Ok(());
    }
    Err(format!("{}\n  what to do: run `cargo xtask gen` and commit", stale.join("\n")))
}

/// Lets the program write its files into a folder of their own, and reads them.
fn make(root: &Path) -> Result<Files, String> {
    let folder = std::env::temp_dir().join(format!("retune-docs-{}", std::process::id()));
    let place = folder.display().to_string();
    let made = output(
        cargo(&["run", "--quiet", "--locked", "--package", "retune", "--", "docs", &place])
            .current_dir(root),
    );
    let files = made.and_then(|_| {
        let mut files = Files::new();
        collect(&folder, &folder, &mut files)?;
        Ok(files)
    });
    // What the program wrote is read by now, or of no use.
    let _ = std::fs::remove_dir_all(&folder);
    files
}

fn collect(root: &Path, folder: &Path, files: &mut Files) -> Outcome {
    for path in entries(folder)? {
        if path.is_dir() {
            collect(root, &path, files)?;
        } else {
            files.insert(below(root, &path), read(&path)?);
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<std::path::PathBuf>, String> {
    let problem = |error: std::io::Error| format!("{}: {error}", folder.display());
    let entries = std::fs::read_dir(folder).map_err(problem)?;
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(problem)).collect()
}

/// Writes a path from `root` on, with `/` on every system.
fn below(root: &Path, path: &Path) -> String {
    let parts = path.strip_prefix(root).unwrap_or(path).components();
    parts.map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
}

fn remove(path: &Path) -> Outcome {
    std::fs::remove_file(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Files in generated folders that nothing makes any more.
fn surplus(root: &Path, made: &Files) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    for folder in WHOLE.iter().map(|folder| root.join(folder)).filter(|folder| folder.is_dir()) {
        let paths = entries(&folder)?.into_iter().map(|path| below(root, &path));
        found.extend(paths.filter(|path| !made.contains_key(path)));
    }
    found.sort();
    Ok(found)
}

fn stale(root: &Path, made: &Files) -> Result<Vec<String>, String> {
    let mut stale = Vec::new();
    for (path, text) in made {
        let committed = read(&root.join(path)).ok();
        if let Some(difference) = difference(committed.as_deref(), text) {
            stale.push(format!("{path}: {difference}"));
        }
    }
    stale.extend(surplus(root, made)?.iter().map(|path| format!("{path}: nothing makes it")));
    Ok(stale)
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

    #[test]
    fn stale_missing_and_surplus_files_are_named() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("docs/methods/lora.md", "one\ntwo\n");
        put("docs/methods/gone.md", "old");
        put("docs/performance.md", "written by a person");
        let mut made = Files::new();
        made.insert("docs/methods/lora.md".to_owned(), "one\n2\n".to_owned());
        made.insert("docs/models.md".to_owned(), "m".to_owned());
        assert_eq!(
            stale(root.path(), &made).unwrap(),
            [
                "docs/methods/lora.md: line 2 is `two`, now made is `2`",
                "docs/models.md: missing",
                "docs/methods/gone.md: nothing makes it",
            ]
        );
        put("docs/methods/lora.md", "one\n2\n");
        put("docs/models.md", "m");
        remove(&root.path().join("docs/methods/gone.md")).unwrap();
        assert_eq!(stale(root.path(), &made).unwrap(), [""; 0]);
    }

    #[test]
    fn files_are_collected_by_their_path() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("docs/methods")).unwrap();
        std::fs::write(root.path().join("docs/methods/a.md"), "a").unwrap();
        let mut files = Files::new();
        collect(root.path(), root.path(), &mut files).unwrap();
        assert_eq!(files, Files::from([("docs/methods/a.md".to_owned(), "a".to_owned())]));
    }
}
