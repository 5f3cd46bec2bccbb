//! Writes the table of configurations that the proof of AutoPEFT's space keeps.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    print!("{}", retune_claims::configurations()?);
    Ok(())
}
