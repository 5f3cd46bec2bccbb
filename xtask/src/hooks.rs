//! `cargo xtask hooks`: the commit hook.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Outcome, output};

/// First lines of a hook written here; any other hook is left alone.
const MARK: &str = "#!/bin/sh\n# Written by `cargo xtask hooks`.\n";
const HOOK: &str = "set -e\ncargo fmt --all --check\ncargo xtask layers\n";

pub(crate) fn run(root: &Path) -> Outcome {
    let mut git = Command::new("git");
    git.current_dir(root).args(["rev-parse", "--git-path", "hooks"]);
    // The path is relative to the folder git ran in, or absolute in a linked worktree.
    let folder = root.join(output(&mut git)?.trim());
    let path = write(&folder)?;
    println!("wrote {}", path.display());
    Ok(())
}

fn write(folder: &Path) -> Result<PathBuf, String> {
    let path = folder.join("pre-commit");
    let named = |error: std::io::Error| format!("{}: {error}", path.display());
    if std::fs::read_to_string(&path).is_ok_and(|text| !text.starts_with(MARK)) {
        return Err(format!(
            "{} is a hook of your own; add `cargo fmt --all --check && cargo xtask layers` to it",
            path.display()
        ));
    }
    std::fs::create_dir_all(folder).map_err(named)?;
    std::fs::write(&path, format!("{MARK}{HOOK}")).map_err(named)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).map_err(named)?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_written_again_but_never_over_another() {
        let folder = tempfile::tempdir().unwrap();
        let hooks = folder.path().join("hooks");
        let path = write(&hooks).unwrap();
        write(&hooks).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().contains("cargo xtask layers"));
        std::fs::write(&path, "#!/bin/sh\nmine\n").unwrap();
        assert!(write(&hooks).unwrap_err().contains("of your own"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "#!/bin/sh\nmine\n");
    }
}
