//! Reports of several runs: three files in a folder, and what is said of them.

use std::path::Path;

use retune_run::artefacts::scatter::{Scatter, svg};
use serde::Serialize;

use crate::failure::Failure;

/// Writes `report.json`, `report.md` and a picture named `picture`.
pub(super) fn write(
    folder: &Path,
    report: &impl Serialize,
    markdown: &str,
    (picture, chart): (&str, &Scatter),
) -> Result<(), Failure> {
    let json = serde_json::to_string_pretty(report)
        .map_err(|error| Failure::Failed(format!("the report cannot be written: {error}")))?;
    for (name, text) in
        [("report.json", json.as_str()), ("report.md", markdown), (picture, &svg(chart))]
    {
        retune_files::atomic::write_file(&folder.join(name), text.as_bytes())?;
    }
    Ok(())
}

/// Prints a report and where it lies for machines.
pub(super) fn print_json(folder: &Path, report: &impl Serialize) {
    let report = serde_json::to_value(report).unwrap_or_default();
    println!("{}", serde_json::json!({"folder": folder, "report": report}));
}
