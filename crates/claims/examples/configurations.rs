//! Writes `fixtures/configurations.txt`, the table that claim 3 searches, to standard output.

use std::io::Write;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    std::io::stdout().write_all(retune_claims::configurations()?.as_bytes())?;
    Ok(())
}
