//! The page of claims, section by section.

use std::fmt::Write;

use crate::{CLAIMS, Claim, Proof};

const HEAD: &str = "# Claims\n\n\
What the papers claim, tried at a small scale on retune itself. `retune claims` runs every proof \
again and writes this page; a number after it runs one. What does not hold is left standing as \
such.\n";

/// Returns the page with one claim's section written anew; other sections of `old` stay.
pub fn page(old: &str, claim: &Claim, proof: &Proof) -> String {
    let mut out = HEAD.to_owned();
    let mut bodies = String::new();
    let mut rows = String::new();
    for known in CLAIMS {
        let title = title(known);
        let body = if title == self::title(claim) {
            Some(section(known, proof))
        } else {
            kept(old, &title)
        };
        let Some(body) = body else { continue };
        let verdict = if body.contains("\n**Does not hold.**") { "does not hold" } else { "holds" };
        let _ = writeln!(rows, "| {:02} | {} | {verdict} |", known.number, known.name);
        bodies.push('\n');
        bodies.push_str(&body);
    }
    let _ = write!(out, "\n| | claim | |\n|---|---|---|\n{rows}{bodies}");
    out
}

fn title(claim: &Claim) -> String {
    format!("## {:02} {}\n", claim.number, claim.name)
}

/// Finds a section of an earlier page.
fn kept(old: &str, title: &str) -> Option<String> {
    let start = old.find(title)?;
    let rest = &old[start + title.len()..];
    let end = rest.find("\n## ").map_or(rest.len(), |end| end + 1);
    Some(format!("{title}{}", rest[..end].trim_end().to_owned() + "\n"))
}

fn section(claim: &Claim, proof: &Proof) -> String {
    let mut out = title(claim);
    let verdict = if proof.holds() { "Holds." } else { "Does not hold." };
    let _ = write!(
        out,
        "\n**{verdict}** {}\n\nThe paper: {}\n\nWhat was run: {}\n\n{}\nWhat must appear:\n\n",
        claim.source,
        claim.claims,
        claim.run,
        proof.figures.trim_end().to_owned() + "\n"
    );
    for assertion in &proof.assertions {
        let sign = if assertion.holds { "yes" } else { "**no**" };
        let _ = writeln!(out, "- {sign}: {}: {}", assertion.says, assertion.found);
    }
    for note in &proof.notes {
        let _ = write!(out, "\n{note}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Assertion;

    fn proof(holds: bool) -> Proof {
        let assertion = Assertion { says: "a".into(), found: "b".into(), holds };
        Proof { figures: "| x |\n".into(), assertions: vec![assertion], notes: vec!["n".into()] }
    }

    #[test]
    fn a_section_is_replaced_and_the_others_stay() {
        let (first, second) = (&CLAIMS[0], &CLAIMS[1]);
        let one = page("", first, &proof(true));
        assert!(one.contains("**Holds.**") && !one.contains(&title(second)));
        let two = page(&one, second, &proof(false));
        let row = format!("| {:02} | {} | does not hold |", second.number, second.name);
        assert!(two.contains(&row) && two.contains("- yes: a: b"), "{two}");
        let again = page(&two, second, &proof(true));
        assert!(!again.contains("does not hold |"), "{again}");
        assert_eq!(page(&again, first, &proof(true)), again);
    }
}
