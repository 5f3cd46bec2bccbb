//! `cargo xtask sanitize`: the tests of the crates with `unsafe` code under the address sanitiser
//! and under Miri, as far as the installed toolchains allow.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Outcome, cargo, output};

/// Crates that hold `unsafe` code.
const CRATES: [&str; 2] = ["retune-kernels", "retune-files"];

/// Tests Miri runs: those of the `unsafe` code that is no instruction of one processor. It
/// interprets, so a test that multiplies real matrices would take hours.
const INTERPRETED: [&str; 5] = [
    "buffer::",
    "disjoint::",
    "recompute::",
    "matrix::int8::tests::a_product_worked_out_by_hand",
    "matrix::tests::dense_products_transpose_what_they_say",
];

/// What to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    Address,
    Miri,
}

impl Tool {
    pub(crate) fn parse(arguments: &[&str]) -> Result<Vec<Self>, String> {
        match arguments {
            [] => Ok(vec![Self::Address, Self::Miri]),
            ["--address"] => Ok(vec![Self::Address]),
            ["--miri"] => Ok(vec![Self::Miri]),
            other => Err(format!("sanitize knows no `{}`", other.join(" "))),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Address => "address sanitiser",
            Self::Miri => "Miri",
        }
    }
}

/// Runs the tools; one that is not installed is named, and fails only where it was asked for alone.
pub(crate) fn run(root: &Path, tools: &[Tool]) -> Outcome {
    let mut missing = Vec::new();
    for tool in tools {
        println!("==> {}", tool.name());
        let found = match tool {
            Tool::Address => address(root),
            Tool::Miri => miri(root),
        }?;
        match found {
            Found::Passed => println!("<== {}: ok", tool.name()),
            Found::Missing(why) => {
                println!("<== {}: NOT RUN: {why}", tool.name());
                missing.push(format!("{}: {why}", tool.name()));
            }
        }
    }
    // A check that ran nothing must not look like one that passed.
    if missing.len() == tools.len() { Err(missing.join("\n")) } else { Ok(()) }
}

enum Found {
    Passed,
    /// What is missing, and how to get it.
    Missing(String),
}

/// Runs all tests of the crates with every access to memory checked.
fn address(root: &Path) -> Result<Found, String> {
    let version = output(Command::new("rustc").arg("-vV"))?;
    let host = host(&version)?;
    let sysroot = PathBuf::from(output(Command::new("rustc").args(["--print", "sysroot"]))?.trim());
    let libraries = sysroot.join("lib/rustlib").join(host).join("lib");
    if !has_runtime(&libraries) {
        return Ok(Found::Missing(format!(
            "this toolchain has no `librustc-*_rt.asan.a` for {host}; on Linux (x86-64, AArch64) \
             and macOS the toolchains of rustup have it"
        )));
    }
    // A process a test: some choose the instruction set of the whole process.
    let mut command = cargo(&["nextest", "run", "--locked", "--target", host]);
    for name in CRATES {
        command.args(["-p", name]);
    }
    command.args(["--lib", "--tests", "--no-fail-fast"]);
    command
        // Some tests forget a folder half-written, as a kill would; leaks are no unsafety.
        .env("ASAN_OPTIONS", "detect_leaks=0")
        // The sanitiser is a nightly option; nothing else here needs a nightly compiler.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-Zsanitizer=address")
        .env("CARGO_TARGET_DIR", target(root)?.join("sanitize"))
        // Dependencies need not be fast here, and are built anew for the sanitiser.
        .args(["--config", "profile.dev.package.\"*\".opt-level=1"]);
    passed(command, root, "mend what the sanitiser names; its report says where")
}

/// Runs a few tests in an interpreter that knows every rule of `unsafe` code.
fn miri(root: &Path) -> Result<Found, String> {
    // Miri comes with nightly toolchains only.
    let mut version = Command::new("cargo");
    version.args(["+nightly", "miri", "--version"]).current_dir(root);
    if !version.output().is_ok_and(|output| output.status.success()) {
        return Ok(Found::Missing(
            "no Miri; run `rustup toolchain install nightly --component miri,rust-src`".to_owned(),
        ));
    }
    let mut command = Command::new("cargo");
    command.args(["+nightly", "miri", "test", "--locked", "-p", "retune-kernels", "--lib", "--"]);
    command
        .args(INTERPRETED)
        // Set by the cargo that runs this, and of another toolchain.
        .env_remove("CARGO")
        .env_remove("RUSTUP_TOOLCHAIN")
        .env("CARGO_TARGET_DIR", target(root)?.join("miri"))
        // Kept memory and the thread pool's queues live as long as the program.
        .env("MIRIFLAGS", "-Zmiri-ignore-leaks -Zmiri-disable-isolation -Zmiri-tree-borrows");
    passed(command, root, "mend what Miri names; its report says which rule was broken")
}

fn passed(mut command: Command, root: &Path, advice: &str) -> Result<Found, String> {
    command.current_dir(root).stdin(std::process::Stdio::null());
    let status = command.status().map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() { Ok(Found::Passed) } else { Err(format!("{status}; {advice}")) }
}

/// The folder builds go to; what is built for a sanitiser must not mix with the rest.
fn target(root: &Path) -> Result<PathBuf, String> {
    let metadata =
        output(cargo(&["metadata", "--no-deps", "--format-version=1"]).current_dir(root))?;
    let key = "\"target_directory\":\"";
    let path = metadata.split(key).nth(1).and_then(|rest| rest.split('"').next());
    path.map(PathBuf::from).ok_or_else(|| "cargo metadata names no target folder".to_owned())
}

/// The machine `rustc -vV` compiles for.
fn host(version: &str) -> Result<&str, String> {
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.ok_or_else(|| format!("rustc names no host in `{}`", version.trim()))
}

fn has_runtime(libraries: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(libraries) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().contains("_rt.asan."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        assert_eq!(Tool::parse(&[]).unwrap(), [Tool::Address, Tool::Miri]);
        assert_eq!(Tool::parse(&["--miri"]).unwrap(), [Tool::Miri]);
        assert!(Tool::parse(&["--memory"]).unwrap_err().contains("--memory"));
    }

    #[test]
    fn the_host_is_found_or_missed_aloud() {
        let version = "rustc 1.95.0\nbinary: rustc\nhost: aarch64-apple-darwin\nrelease: 1.95.0\n";
        assert_eq!(host(version).unwrap(), "aarch64-apple-darwin");
        assert!(host("rustc 1.95.0").unwrap_err().contains("no host"));
    }

    #[test]
    fn a_toolchain_without_the_runtime_is_one() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!has_runtime(folder.path()) && !has_runtime(&folder.path().join("none")));
        std::fs::write(folder.path().join("librustc-stable_rt.asan.a"), "").unwrap();
        assert!(has_runtime(folder.path()));
    }
}
