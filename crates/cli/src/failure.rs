//! Failures and exit codes: 1 failed, 2 wrong use.

use std::process::ExitCode;

use retune_options::{Report, Style};
use serde_json::json;

/// Why a command ended early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The recipe has mistakes.
    Recipe(Report),
    /// The arguments do not fit together.
    Usage(String),
    /// Something failed.
    Failed(String),
}

impl Failure {
    /// Prints the failure and returns the exit code.
    pub(crate) fn report(self, json: bool) -> ExitCode {
        let code = match &self {
            Self::Recipe(_) | Self::Usage(_) => 2,
            Self::Failed(_) => 1,
        };
        if json {
            let value = match &self {
                Self::Recipe(report) => json!({"error": "recipe", "mistakes": report.to_json()}),
                Self::Usage(message) => json!({"error": "usage", "message": message}),
                Self::Failed(message) => json!({"error": "failed", "message": message}),
            };
            println!("{value}");
        } else {
            match &self {
                Self::Recipe(report) => eprint!("{}", report.render(style())),
                Self::Usage(message) | Self::Failed(message) => eprintln!("error: {message}"),
            }
        }
        ExitCode::from(code)
    }
}

fn style() -> Style {
    use std::io::IsTerminal;
    let plain = std::env::var_os("NO_COLOR").is_some() || !std::io::stderr().is_terminal();
    if plain { Style::Plain } else { Style::Coloured }
}

impl From<retune_run::Error> for Failure {
    fn from(error: retune_run::Error) -> Self {
        match error {
            retune_run::Error::Recipe(report) => Self::Recipe(report),
            other => Self::Failed(other.to_string()),
        }
    }
}

impl From<retune_merge::Error> for Failure {
    fn from(error: retune_merge::Error) -> Self {
        match error {
            retune_merge::Error::Plan(report) => Self::Recipe(report),
            other => Self::Failed(other.to_string()),
        }
    }
}

macro_rules! failed {
    ($($error:ty),* $(,)?) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::Failed(error.to_string())
            }
        }
    )*};
}

failed!(
    retune_core::Error,
    retune_data::Error,
    retune_hub::HubError,
    retune_train::Error,
    retune_files::atomic::WriteError,
    retune_files::SaveError,
    retune_files::safetensors::SafetensorsError,
);
