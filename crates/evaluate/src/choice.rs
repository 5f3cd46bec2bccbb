//! Ranks the answers of a multiple choice by their likelihood.

use crate::{Error, Result};

/// Which of several choices the likelihoods favour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranking {
    /// The likeliest choice: `acc`.
    pub raw: usize,
    /// The likeliest per character of its text: `acc_norm`.
    pub per_character: usize,
    /// The likeliest per UTF-8 byte of its text: `acc_bytes`.
    pub per_byte: usize,
}

/// Ranks choices as lm-evaluation-harness does, by log-likelihood and per length.
///
/// `acc_norm` there divides by the number of characters, `acc_bytes` by that of bytes; for ASCII
/// they are the same. Of equals the first wins. `texts` are the choices as the task lists them,
/// without the space that parts them from the question.
///
/// # Errors
/// [`Error::Input`] if there is not one non-empty text per likelihood, or one is NaN.
///
/// ```
/// use retune_evaluate::choice::rank;
/// let ranking = rank(&[-2.0, -3.0], &["no", "maybe"])?;
/// // -2 > -3, but -3 / 5 > -2 / 2.
/// assert_eq!((ranking.raw, ranking.per_character), (0, 1));
/// # Ok::<(), retune_evaluate::Error>(())
/// ```
pub fn rank(log_likelihoods: &[f64], texts: &[impl AsRef<str>]) -> Result<Ranking> {
    let wrong = |expected: &str, found: String| {
        Err(Error::Input {
            what: "choices cannot be ranked".to_owned(),
            expected: expected.to_owned(),
            found,
            help: "score every choice, and leave empty ones out".to_owned(),
        })
    };
    if log_likelihoods.is_empty() || log_likelihoods.len() != texts.len() {
        let found = format!("{} likelihoods, {} texts", log_likelihoods.len(), texts.len());
        return wrong("one text for each likelihood, and at least one", found);
    }
    if let Some(place) = texts.iter().position(|text| text.as_ref().is_empty()) {
        return wrong("texts with a length", format!("choice {place} is empty"));
    }
    if let Some(place) = log_likelihoods.iter().position(|value| value.is_nan()) {
        return wrong("likelihoods that are numbers", format!("NaN for choice {place}"));
    }
    let best = |length: fn(&str) -> usize| {
        let mut best = (0, f64::NEG_INFINITY);
        for (place, (value, text)) in log_likelihoods.iter().zip(texts).enumerate() {
            let score = value / length(text.as_ref()) as f64;
            if score > best.1 {
                best = (place, score);
            }
        }
        best.0
    };
    Ok(Ranking {
        raw: best(|_| 1),
        per_character: best(|text| text.chars().count()),
        per_byte: best(str::len),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_not_bytes() {
        // Per character: -4/2, -4.5/2, -6/5 (third). Per byte "éé" has 4, "abcde" 5: -1, -1.2.
        let ranking = rank(&[-4.0, -4.5, -6.0], &["éé", "xy", "abcde"]).unwrap();
        assert_eq!(ranking, Ranking { raw: 0, per_character: 2, per_byte: 0 });
    }

    #[test]
    fn the_first_of_equals_wins() {
        let ranking = rank(&[-3.0, -1.0, -1.0], &["aaa", "b", "c"]).unwrap();
        assert_eq!(ranking, Ranking { raw: 1, per_character: 0, per_byte: 0 });
    }

    #[test]
    fn a_choice_ruled_out_never_wins_unless_all_are() {
        let ranking = rank(&[f64::NEG_INFINITY, -9.0], &["a", "b"]).unwrap();
        assert_eq!(ranking.raw, 1);
        assert_eq!(rank(&[f64::NEG_INFINITY; 2], &["a", "b"]).unwrap().raw, 0);
    }

    #[test]
    fn what_cannot_be_ranked_is_said() {
        let message = |values: &[f64], texts: &[&str]| rank(values, texts).unwrap_err().to_string();
        assert!(message(&[-1.0], &["a", "b"]).contains("1 likelihoods, 2 texts"));
        assert!(message(&[-1.0, -2.0], &["a", ""]).contains("choice 1 is empty"));
        assert!(message(&[f64::NAN], &["a"]).contains("NaN for choice 0"));
    }
}
