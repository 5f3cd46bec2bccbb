//! What the tests of the program share.

use std::path::Path;
use std::process::{Command, Output};

/// Runs the program in a folder, where its cache lies too; it asks no hub and shows no colours.
pub(crate) fn retune(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_retune"))
        .args(arguments)
        .current_dir(folder)
        .env("RETUNE_CACHE", folder.join("cache"))
        .env("HF_HUB_OFFLINE", "1")
        .env("NO_COLOR", "1")
        .output()
        .unwrap()
}

/// What the program said, and how tests read it.
#[allow(
    dead_code,
    reason = "each file of tests is a program of its own, and not all of them need each"
)]
pub(crate) mod said {
    use std::path::Path;

    use serde_json::Value;

    use super::retune;

    /// Returns output as text.
    pub(crate) fn text(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// Runs the program with `--json` and reads its answer.
    pub(crate) fn json(folder: &Path, arguments: &[&str]) -> Value {
        let out = retune(folder, &[arguments, &["--json"]].concat());
        assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// Runs the program, which must refuse and say `what`.
    pub(crate) fn refused(folder: &Path, arguments: &[&str], what: &str) {
        let out = retune(folder, arguments);
        assert!(!out.status.success());
        assert!(text(&out.stderr).contains(what), "{}", text(&out.stderr));
    }
}
