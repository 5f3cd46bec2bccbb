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
