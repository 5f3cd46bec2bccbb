//! What maintainers run: `cargo xtask COMMAND`.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool")]

mod bench;
mod check;
mod generated;
mod hooks;
mod layers;
mod new_method;
mod sanitize;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const USAGE: &str = "\
usage: cargo xtask COMMAND

  check [--quick] [--skip STEP]...  everything continuous integration checks, cheapest first
                                    --quick leaves out what takes minutes, and tools not installed
  layers                            which crate may depend on which
  gen [--check]                     write generated files, or fail where one is stale
  new method NAME                   the skeleton of a tuning method and its line in the registry
  hooks                             write .git/hooks/pre-commit (format and layers)
  sanitize [--address | --miri]     tests of unsafe code under the address sanitiser and Miri
  bench [--kernels] [--steps]       speed and memory of a release build
        [--peer PYTHON]             the same steps in PyTorch + PEFT, taking turns
        [--lengths]                 texts of 128 to 2,048 tokens instead of the usual cases
        [--chats FILE]              JSONL of `messages`, for the case `chats`; else made from a seed
        [--only CASE]... [--rounds N] [--num-steps N] [--json]
        [--methods all|NAME,NAME]   what a step of each method costs, beside one of LoRA
        [--program FILE]            a program that is built already
        [--into FILE]               adds the rows to a file, so that pieces make one table
";

/// A command's end: nothing, or what went wrong and what to do.
type Outcome = Result<(), String>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments.as_slice() {
        ["check", options @ ..] => match check::Options::parse(options) {
            Ok(options) => root().and_then(|root| check::run(&root, &options)),
            Err(problem) => return wrong_use(&problem),
        },
        ["layers"] => root().and_then(|root| layers::run(&root)),
        ["gen"] => root().and_then(|root| generated::write(&root)),
        ["gen", "--check"] => root().and_then(|root| generated::check(&root)),
        ["new", "method", name] => root().and_then(|root| new_method::run(&root, name)),
        ["hooks"] => root().and_then(|root| hooks::run(&root)),
        ["sanitize", options @ ..] => match sanitize::Tool::parse(options) {
            Ok(tools) => root().and_then(|root| sanitize::run(&root, &tools)),
            Err(problem) => return wrong_use(&problem),
        },
        ["bench", options @ ..] => match bench::Options::parse(options) {
            Ok(options) => root().and_then(|root| bench::run(&root, &options)),
            Err(problem) => return wrong_use(&problem),
        },
        ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        [] => return wrong_use("no command"),
        other => return wrong_use(&format!("cannot do `{}`", other.join(" "))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("error: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn wrong_use(problem: &str) -> ExitCode {
    eprintln!("error: {problem}\n\n{USAGE}");
    ExitCode::from(2)
}

/// The workspace of the current folder.
fn root() -> Result<PathBuf, String> {
    let manifest =
        output(&mut cargo(&["locate-project", "--workspace", "--message-format=plain"]))?;
    Path::new(manifest.trim())
        .parent()
        .map(Path::to_owned)
        .ok_or_else(|| format!("`{}` is no manifest's path", manifest.trim()))
}

fn cargo(arguments: &[&str]) -> Command {
    // Set by the cargo that runs this, so that a `cargo +toolchain` stays with its toolchain.
    #[expect(clippy::disallowed_methods, reason = "a program, not a library")]
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(arguments);
    command
}

/// Runs a command and returns what it prints.
fn output(command: &mut Command) -> Result<String, String> {
    let name = format!("{command:?}");
    let output = command.output().map_err(|error| format!("{name}: {error}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{name}: {}\n{}", output.status, stderr.trim_end()));
    }
    String::from_utf8(output.stdout).map_err(|error| format!("{name}: {error}"))
}

/// Reads a file, naming it in the error.
fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}
