//! `cargo xtask check`: what continuous integration checks, cheapest first.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::{Outcome, cargo, generated, layers};

/// One step; the first that fails ends the check.
struct Step {
    name: &'static str,
    /// Left out by `--quick`.
    slow: bool,
    run: fn(&Path) -> Outcome,
}

const STEPS: &[Step] = &[
    Step { name: "format", slow: false, run: format },
    Step { name: "layers", slow: false, run: layers::run },
    Step { name: "deny", slow: false, run: deny },
    Step { name: "clippy", slow: false, run: clippy },
    // Builds the program, which the tests after it need too.
    Step { name: "generated", slow: false, run: generated::check },
    Step { name: "tests", slow: false, run: tests },
    Step { name: "doc-tests", slow: true, run: doc_tests },
    Step { name: "docs", slow: true, run: docs },
];

/// The cargo-deny that is installed where none is.
const DENY: &str = "cargo install --locked cargo-deny@0.20.2";

/// What to leave out.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    quick: bool,
    skip: Vec<String>,
}

impl Options {
    pub(crate) fn parse(arguments: &[&str]) -> Result<Self, String> {
        let mut options = Self::default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match *argument {
                "--quick" => options.quick = true,
                "--skip" => {
                    let names: Vec<_> = STEPS.iter().map(|step| step.name).collect();
                    match rest.next() {
                        Some(name) if names.contains(name) => {
                            options.skip.push((*name).to_owned());
                        }
                        other => {
                            return Err(format!(
                                "--skip takes one of {}, not `{}`",
                                names.join(", "),
                                other.unwrap_or(&"")
                            ));
                        }
                    }
                }
                other => return Err(format!("check knows no `{other}`")),
            }
        }
        Ok(options)
    }

    fn leaves_out(&self, step: &Step) -> Option<&'static str> {
        if self.skip.iter().any(|name| name == step.name) {
            return Some("--skip");
        }
        if self.quick && step.slow {
            return Some("--quick");
        }
        (self.quick && step.name == "deny" && !has_deny()).then_some("cargo-deny is not installed")
    }
}

pub(crate) fn run(root: &Path, options: &Options) -> Outcome {
    let mut times = Vec::new();
    for step in STEPS {
        if let Some(reason) = options.leaves_out(step) {
            println!("==> {}: left out ({reason})", step.name);
            continue;
        }
        println!("==> {}", step.name);
        let (outcome, time) = timed(|| (step.run)(root));
        let verdict = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("<== {}: {verdict} in {:.1} s", step.name, time.as_secs_f64());
        outcome.map_err(|problem| format!("{}: {problem}", step.name))?;
        times.push((step.name, time));
    }
    println!("all checks passed:");
    for (name, time) in times {
        println!("  {name:<10} {:>7.1} s", time.as_secs_f64());
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "a program that says how long each step took")]
fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = work();
    (result, start.elapsed())
}

fn format(root: &Path) -> Outcome {
    shown(cargo(&["fmt", "--all", "--check"]), root, "run `cargo fmt --all`")
}

fn clippy(root: &Path) -> Outcome {
    let arguments = &["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    shown(cargo(arguments), root, "mend what clippy names")
}

fn tests(root: &Path) -> Outcome {
    shown(
        cargo(&["nextest", "run", "--workspace", "--locked"]),
        root,
        "mend the tests; if nextest is missing: cargo install --locked cargo-nextest",
    )
}

fn doc_tests(root: &Path) -> Outcome {
    shown(
        cargo(&["test", "--doc", "--workspace", "--locked"]),
        root,
        "mend the examples in the documentation",
    )
}

fn docs(root: &Path) -> Outcome {
    let mut command = cargo(&["doc", "--workspace", "--no-deps", "--locked"]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    shown(command, root, "mend the links and comments rustdoc names")
}

fn deny(root: &Path) -> Outcome {
    if !has_deny() {
        return Err(format!("cargo-deny is not installed; run `{DENY}`, or check with --quick"));
    }
    shown(
        cargo(&["deny", "--locked", "check", "bans", "licenses", "sources"]),
        root,
        "replace the dependency, or say in deny.toml why it is right",
    )
}

fn has_deny() -> bool {
    cargo(&["deny", "--version"]).output().is_ok_and(|output| output.status.success())
}

/// Runs a command whose output a person should see.
fn shown(mut command: Command, root: &Path, advice: &str) -> Outcome {
    command.current_dir(root).stdin(std::process::Stdio::null());
    let status = command.status().map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{status}; {advice}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        let options = Options::parse(&["--quick", "--skip", "tests"]).unwrap();
        assert_eq!(options, Options { quick: true, skip: vec!["tests".into()] });
        assert!(Options::parse(&["--skip", "nothing"]).unwrap_err().contains("doc-tests"));
        assert!(Options::parse(&["--skip"]).is_err());
        assert!(Options::parse(&["--fast"]).is_err());
    }

    #[test]
    fn only_what_was_asked_is_left_out() {
        let left_out = |options: &Options| -> Vec<&str> {
            STEPS.iter().filter(|s| options.leaves_out(s).is_some()).map(|s| s.name).collect()
        };
        assert_eq!(left_out(&Options::default()), [""; 0]);
        let skip = Options { skip: vec!["tests".into()], quick: false };
        assert_eq!(left_out(&skip), ["tests"]);
        let quick = Options { quick: true, skip: Vec::new() };
        assert!(left_out(&quick).ends_with(&["doc-tests", "docs"]));
    }

    #[test]
    fn a_failing_command_fails() {
        let folder = tempfile::tempdir().unwrap();
        let problem = shown(cargo(&["no-such-command"]), folder.path(), "do this").unwrap_err();
        assert!(problem.ends_with("do this"), "{problem}");
    }
}
