//! The `retune` program: reads arguments, shows progress, prints. Nothing else prints.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this is the program that talks to people"
)]
#![expect(clippy::disallowed_methods, reason = "the program reads clock and environment for all")]

mod args;
mod commands;
mod environment;
mod failure;
mod memory;
mod progress;
mod table;

use std::process::ExitCode;

use args::Arguments;
use clap::Parser;

fn main() -> ExitCode {
    memory::keep();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way too, and are no failures.
            let code = u8::from(error.use_stderr()) * 2;
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let json = arguments.json;
    match commands::dispatch(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(json),
    }
}
