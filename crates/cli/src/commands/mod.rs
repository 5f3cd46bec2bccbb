//! One file per command.

mod chat;
mod claims;
pub(crate) mod combine;
mod compare;
pub(crate) mod compress;
pub(crate) mod crash;
mod describe;
pub(crate) mod diff;
mod docs;
mod doctor;
mod eval;
mod export;
pub(crate) mod extract;
mod generate;
pub(crate) mod graft;
pub(crate) mod half_reset;
mod init;
mod intrinsic_dimension;
mod logits;
mod merge;
mod new;
mod pixels;
mod report;
mod run;
mod session;
pub(crate) mod ship;

use clap::CommandFactory;

use crate::args::{Arguments, Command};
use crate::failure::Failure;

/// Carries one command out.
pub(crate) fn dispatch(arguments: Arguments) -> Result<(), Failure> {
    let json = arguments.json;
    match arguments.command {
        Command::Run(recipe) => run::run(&recipe, json),
        Command::Plan(recipe) => run::plan(&recipe, json),
        Command::Compare { recipe, methods, seeds, metric } => {
            compare::compare(&recipe, &methods, seeds, metric.as_deref(), json)
        }
        Command::IntrinsicDimension { recipe, probe } => {
            intrinsic_dimension::intrinsic_dimension(&recipe, &probe, json)
        }
        Command::Claims { numbers, quick, output } => {
            claims::claims(&numbers, quick, &output, json)
        }
        Command::Docs { folder } => docs::docs(&folder),
        Command::Resume { run: path } => run::resume(&path, json),
        Command::Eval { recipe, adapters, force } => eval::eval(&recipe, &adapters, force, json),
        Command::Chat(model) => chat::chat(&model, json),
        Command::Generate { model, prompt, raw } => generate::generate(&model, &prompt, raw, json),
        Command::Logits { model, adapters, input_ids, output, force } => {
            logits::logits(&model, &adapters, &input_ids, &output, force, json)
        }
        Command::Merge(arguments) => merge::run(&arguments, json),
        Command::MergeAdapter { model, adapters, output, dtype, force } => {
            export::merge_adapter(&model, &adapters, &output, &dtype, force, json)
        }
        Command::Export { model, adapters, format, output, force } => {
            export::export(&model, &adapters, &format, &output, force, json)
        }
        Command::Compress(arguments) => compress::compress(&arguments, json),
        Command::Decompress(arguments) => compress::decompress(&arguments, json),
        Command::Combine(arguments) => combine::combine(&arguments, json),
        Command::Extract(arguments) => extract::extract(&arguments, json),
        Command::HalfReset(arguments) => half_reset::half_reset(&arguments, json),
        Command::Crash(command) => crash::run(&command, json),
        Command::Graft(command) => graft::run(&command, json),
        Command::Ship(arguments) => ship::ship(&arguments, json),
        Command::Diff(arguments) => diff::diff(&arguments, json),
        Command::Doctor { recipe, rows } => doctor::doctor(&recipe, rows, json),
        Command::Methods { name } => describe::methods(name.as_deref(), json),
        Command::Models => {
            describe::models(json);
            Ok(())
        }
        Command::Init { config, output, seed } => init::init(&config, seed, &output, json),
        Command::New { path, method, force } => new::new(&path, &method, force, json),
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Arguments::command(),
                "retune",
                &mut std::io::stdout(),
            );
            Ok(())
        }
        Command::Man => clap_mangen::Man::new(Arguments::command())
            .render(&mut std::io::stdout())
            .map_err(|error| Failure::Failed(format!("the page cannot be printed: {error}"))),
    }
}
