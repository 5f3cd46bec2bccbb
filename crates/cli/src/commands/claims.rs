//! `claims`: runs the small-scale proofs and writes their page.

use std::path::Path;

use retune_claims::{CLAIMS, Claim, Prove, page};
use retune_hub::Offline;
use retune_run::open::Located;
use serde_json::json;

use crate::commands::session::with_environment;
use crate::environment::clock;
use crate::failure::Failure;

/// Runs the proofs asked for, one after another, and writes the page after each.
pub(crate) fn claims(
    numbers: &[u32],
    quick: bool,
    output: &Path,
    json: bool,
) -> Result<(), Failure> {
    let known = || CLAIMS.iter().map(|claim| claim.number.to_string()).collect::<Vec<_>>();
    if let Some(wrong) = numbers.iter().find(|n| !CLAIMS.iter().any(|claim| claim.number == **n)) {
        return Err(Failure::Usage(format!(
            "there is no proof {wrong}\n  expected: one of {}",
            known().join(", ")
        )));
    }
    let asked = |claim: &&Claim| {
        (numbers.is_empty() || numbers.contains(&claim.number)) && (!quick || claim.quick)
    };
    let chosen: Vec<&Claim> = CLAIMS.iter().filter(asked).collect();
    let mut broken = Vec::new();
    for claim in chosen {
        let started = clock();
        if !json {
            eprintln!("{:02} {} …", claim.number, claim.name);
        }
        let found = match claim.prove {
            Prove::Alone(prove) => prove(clock),
            Prove::On(model, prove) => match at_hand(model)? {
                Ok(located) => prove(&located),
                Err(why) => {
                    left_out(claim, model, &why, json);
                    continue;
                }
            },
        };
        match found {
            Ok(proof) => {
                let took = clock() - started;
                if json {
                    let said: Vec<_> = proof
                        .assertions
                        .iter()
                        .map(|a| json!({"says": a.says, "found": a.found, "holds": a.holds}))
                        .collect();
                    println!(
                        "{}",
                        json!({"claim": claim.number, "name": claim.name, "holds": proof.holds(),
                            "seconds": took, "assertions": said})
                    );
                } else {
                    let verdict = if proof.holds() { "holds" } else { "does not hold" };
                    println!("{:02} {}: {verdict} ({took:.0} s)", claim.number, claim.name);
                    for assertion in &proof.assertions {
                        let sign = if assertion.holds { "+" } else { "-" };
                        println!("  {sign} {}: {}", assertion.says, assertion.found);
                    }
                }
                let old = std::fs::read_to_string(output).unwrap_or_default();
                if let Some(folder) = output.parent().filter(|f| !f.as_os_str().is_empty()) {
                    std::fs::create_dir_all(folder).map_err(|error| {
                        Failure::Failed(format!("{}: cannot be made: {error}", folder.display()))
                    })?;
                }
                let text = page(&old, claim, &proof);
                retune_files::atomic::write_file(output, text.as_bytes())?;
            }
            Err(error) => {
                let what =
                    format!("{:02} {}: the proof cannot run: {error}", claim.number, claim.name);
                if !json {
                    eprintln!("{what}");
                }
                broken.push(what);
            }
        }
    }
    if broken.is_empty() {
        return Ok(());
    }
    Err(Failure::Failed(broken.join("\n")))
}

/// Finds a model without fetching it; the inner error says why it is not at hand.
fn at_hand(model: &str) -> Result<Result<Located, String>, Failure> {
    with_environment(true, |environment| {
        environment.fetch = &Offline;
        Ok(Located::find(model, environment).map_err(|error| error.to_string()))
    })
}

/// Says that a proof was not run.
fn left_out(claim: &Claim, model: &str, why: &str, json: bool) {
    if json {
        println!(
            "{}",
            json!({"claim": claim.number, "name": claim.name, "left_out": true, "needs": model})
        );
        return;
    }
    let reason = why.lines().next().unwrap_or_default();
    println!("{:02} {}: left out, it needs the model `{model}`", claim.number, claim.name);
    println!("  {reason}");
    println!("  every other command that names the model fetches it");
}
