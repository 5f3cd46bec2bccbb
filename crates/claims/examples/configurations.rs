//! Writes `fixtures/configurations.txt`, the table that claim 3 searches, to standard output.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    print!("{}", retune_claims::configurations()?);
    Ok(())
}
