//! Answers as texts.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::Regex;

// Both patterns are constants, compiled by every test of this file.
#[expect(clippy::unwrap_used, reason = "a constant pattern that the tests compile")]
static ARTICLES: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\b(?:a|an|the)\b").unwrap());
#[expect(clippy::unwrap_used, reason = "a constant pattern that the tests compile")]
static NUMBERS: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"-?[$0-9.,]{2,}|-?[0-9]+").unwrap());

/// Says whether the answer is one of the references, byte for byte.
///
/// ```
/// use retune_evaluate::metrics::exact_match;
/// assert!(exact_match("Paris", &["Lyon", "Paris"]));
/// assert!(!exact_match("paris", &["Paris"]));
/// ```
pub fn exact_match(answer: &str, references: &[impl AsRef<str>]) -> bool {
    references.iter().any(|reference| reference.as_ref() == answer)
}

/// Rewrites an answer as the evaluation of SQuAD does: lower case, without ASCII punctuation,
/// without the words "a", "an" and "the", words one space apart.
///
/// # Source
/// Rajpurkar et al., <https://arxiv.org/abs/1606.05250>, and its official evaluation.
///
/// ```
/// use retune_evaluate::metrics::normalize;
/// assert_eq!(normalize(" The  Eiffel-Tower!"), "eiffeltower");
/// ```
pub fn normalize(answer: &str) -> String {
    let plain: String =
        answer.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let bare = ARTICLES.replace_all(&plain, " ");
    bare.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Says whether the answer equals one of the references once both are [`normalize`]d.
pub fn same_words(answer: &str, references: &[impl AsRef<str>]) -> bool {
    let answer = normalize(answer);
    references.iter().any(|reference| normalize(reference.as_ref()) == answer)
}

/// Computes the harmonic mean of precision and recall over the words of the [`normalize`]d texts,
/// against the reference where it is highest; 0 without references.
///
/// A word counts as often as it stands in both. Where a side has no words left, the score is 1 if
/// the other has none either, else 0, as in SQuAD 2.0.
///
/// ```
/// use retune_evaluate::metrics::word_f1;
/// // 2 words in common, of 3 answered and 2 asked for: 2 · (2/3 · 1) / (2/3 + 1) = 0.8.
/// assert!((word_f1("in the old Paris", &["old Paris"]) - 0.8).abs() < 1e-12);
/// ```
pub fn word_f1(answer: &str, references: &[impl AsRef<str>]) -> f64 {
    let answer = normalize(answer);
    references
        .iter()
        .map(|reference| words_in_common(&answer, &normalize(reference.as_ref())))
        .fold(0.0, f64::max)
}

fn words_in_common(answer: &str, reference: &str) -> f64 {
    if answer.is_empty() || reference.is_empty() {
        return f64::from(u8::from(answer == reference));
    }
    let mut left: BTreeMap<&str, usize> = BTreeMap::new();
    let mut asked = 0_usize;
    for word in reference.split(' ') {
        *left.entry(word).or_default() += 1;
        asked += 1;
    }
    let (mut answered, mut common) = (0_usize, 0_usize);
    for word in answer.split(' ') {
        answered += 1;
        if let Some(count) = left.get_mut(word)
            && *count > 0
        {
            *count -= 1;
            common += 1;
        }
    }
    // 2PR / (P + R) with P = common / answered and R = common / asked.
    2.0 * common as f64 / (answered + asked) as f64
}

/// Finds the last number of a text, without currency signs, thousands commas and a final stop.
///
/// This is how answers of GSM8K are read out of worked solutions (Cobbe et al.,
/// <https://arxiv.org/abs/2110.14168>), with the pattern of lm-evaluation-harness'
/// `flexible-extract`. A run of marks without a digit is no number here.
///
/// ```
/// use retune_evaluate::metrics::last_number;
/// assert_eq!(last_number("3 + 4 = 7, so $1,007.").as_deref(), Some("1007"));
/// assert_eq!(last_number("none"), None);
/// ```
pub fn last_number(text: &str) -> Option<String> {
    NUMBERS
        .find_iter(text)
        .map(|found| {
            let bare: String = found.as_str().chars().filter(|c| !matches!(c, ',' | '$')).collect();
            bare.trim_end_matches('.').to_owned()
        })
        .filter(|number| number.contains(|c: char| c.is_ascii_digit()))
        .last()
}

/// Says whether the last numbers of both texts are there and spelled alike.
///
/// The reference may be a whole solution: GSM8K's ends with `#### 18`.
pub fn same_last_number(answer: &str, reference: &str) -> bool {
    matches!((last_number(answer), last_number(reference)), (Some(a), Some(b)) if a == b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalizing_follows_squad() {
        // lower → punctuation off → articles off → spaces one apart, in this order: the hyphen is
        // gone before words are told apart, "a" inside "anthem" stays.
        assert_eq!(normalize("The U.S. national\tanthem, a song"), "us national anthem song");
        assert_eq!(normalize("An apple a day"), "apple day");
        assert_eq!(normalize("the"), "");
        assert_eq!(normalize("\"Theodor\" "), "theodor");
        // Only ASCII punctuation is taken off; other marks stay, and part words.
        assert_eq!(normalize("«the» É"), "« » é");
    }

    #[test]
    fn words_are_counted_as_often_as_both_have_them() {
        // answer {x, x, y}, reference {x, y, y, z}: common = 1 + 1 = 2; 2·2 / (3 + 4).
        assert!((word_f1("x x y", &["x y y z"]) - 4.0 / 7.0).abs() < 1e-15);
        assert_eq!(word_f1("x", &["y"]), 0.0);
        assert_eq!(word_f1("The X!", &["x"]), 1.0);
        // The best reference counts.
        assert_eq!(word_f1("x y", &["z", "y x"]), 1.0);
    }

    #[test]
    fn an_answer_without_words_meets_only_its_like() {
        assert_eq!(word_f1("the", &[""]), 1.0);
        assert_eq!(word_f1("the", &["x"]), 0.0);
        assert_eq!(word_f1("x", &["an"]), 0.0);
        assert_eq!(word_f1("x", &[] as &[&str]), 0.0);
        assert!(same_words("", &["a"]) && !same_words("", &["x"]));
    }

    #[test]
    fn numbers_are_read_as_gsm8k_wants() {
        let solution = "She sold 48/2 = <<48/2=24>>24 clips.\n#### 72";
        assert_eq!(last_number(solution).as_deref(), Some("72"));
        assert_eq!(last_number("The answer is -5.").as_deref(), Some("-5"));
        assert_eq!(last_number("$12,345.67").as_deref(), Some("12345.67"));
        // A single digit needs no second character; dots alone are no number.
        assert_eq!(last_number("7 ...").as_deref(), Some("7"));
        assert!(same_last_number("so she has 1,000 left", "#### 1000"));
        assert!(!same_last_number("no idea", "#### 3") && !same_last_number("3", "three"));
    }
}
