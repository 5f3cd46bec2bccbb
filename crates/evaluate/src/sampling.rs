//! From logits to the next token.

use crate::{Error, Result};
use retune_core::random::Random;

/// Says how the next token is chosen.
///
/// The steps come in the order other tools have them too, so that settings can be carried over:
/// repetition penalty, temperature, `top_k`, `top_p`, `min_p`; each looks at what the one before
/// left.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the likeliest token and draws nothing.
    pub temperature: f64,
    /// Keeps this many of the likeliest tokens; of equally likely ones those with lower ids.
    pub top_k: Option<usize>,
    /// Keeps the likeliest tokens until together they have this probability, a fraction; 1 keeps
    /// all (Holtzman et al., <https://arxiv.org/abs/1904.09751>).
    pub top_p: f64,
    /// Keeps tokens at least this fraction as likely as the likeliest; 0 keeps all (Nguyen et al.,
    /// <https://arxiv.org/abs/2407.01082>).
    pub min_p: f64,
    /// Logits of tokens seen before, the prompt's too, are divided by this where positive and
    /// multiplied where negative; 1 changes nothing (Keskar et al.,
    /// <https://arxiv.org/abs/1909.05858>).
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self::greedy()
    }
}

impl Sampling {
    /// Always takes the likeliest token; of equally likely ones the lowest id.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }

    /// Draws each token as likely as the model finds it at this temperature.
    pub fn at_temperature(temperature: f64) -> Self {
        Self { temperature, ..Self::greedy() }
    }

    /// Checks that every number is one that means something.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first that is not.
    pub fn check(&self) -> Result<()> {
        let fraction = |value: f64| (0.0..=1.0).contains(&value);
        let wrong = |setting: &str, expected: &str, found: f64, help: &str| {
            Err(Error::Setting {
                setting: setting.to_owned(),
                what: "tokens cannot be chosen with this value".to_owned(),
                expected: expected.to_owned(),
                found: found.to_string(),
                help: help.to_owned(),
            })
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let help = "0 takes the likeliest token, 1 follows the model, more is wilder";
            return wrong("temperature", "0 or more", self.temperature, help);
        }
        if self.top_k == Some(0) {
            return wrong("top_k", "1 or more", 0.0, "leave it out to keep all tokens");
        }
        if !(fraction(self.top_p) && self.top_p > 0.0) {
            let help = "a fraction, not a percentage; 1 keeps all tokens";
            return wrong("top_p", "above 0, at most 1", self.top_p, help);
        }
        if !fraction(self.min_p) {
            let help = "a fraction, not a percentage; 0 keeps all tokens";
            return wrong("min_p", "0 to 1", self.min_p, help);
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            let help = "1 changes nothing, 1.1 is a usual value";
            return wrong("repetition_penalty", "above 0", self.repetition_penalty, help);
        }
        Ok(())
    }

    /// Chooses the next token.
    ///
    /// Draws one number from `random`, or none where the likeliest token is taken.
    ///
    /// # Shapes
    /// - `logits`: `[vocabulary]`; overwritten
    /// - `seen`: ids that the repetition penalty is for, each once
    ///
    /// # Errors
    /// [`Error::Input`] if a logit is NaN or infinitely large, or none is finite: the model is
    /// broken then, and whatever came out would only hide it.
    ///
    /// # Cost
    /// One walk over the vocabulary; `top_p` sorts what `top_k` left of it.
    pub fn choose(&self, logits: &mut [f32], seen: &[u32], random: &mut Random) -> Result<u32> {
        self.penalize(logits, seen);
        let (best, highest) = likeliest(logits)?;
        if self.temperature == 0.0 {
            return Ok(best);
        }
        // Weights are relative to the likeliest token, whose own is 1: nothing overflows.
        let weight =
            |logit: f32| ((f64::from(logit) - f64::from(highest)) / self.temperature).exp();
        let mut kept: Vec<(u32, f64)> =
            (0..).zip(logits.iter()).map(|(id, logit)| (id, weight(*logit))).collect();
        let likelier = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if let Some(k) = self.top_k
            && k < kept.len()
        {
            kept.select_nth_unstable_by(k - 1, likelier);
            kept.truncate(k);
        }
        if self.top_p < 1.0 {
            kept.sort_unstable_by(likelier);
            let wanted = self.top_p * kept.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut before = 0.0;
            let end = kept.iter().position(|(_, weight)| {
                let reached = before >= wanted;
                before += weight;
                reached
            });
            kept.truncate(end.unwrap_or(kept.len()).max(1));
        }
        kept.retain(|(_, weight)| *weight >= self.min_p);
        // One order whatever was selected how, so that a draw means the same token everywhere.
        kept.sort_unstable_by_key(|(id, _)| *id);
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let mut left = random.uniform() * total;
        for (id, weight) in &kept {
            left -= weight;
            if left < 0.0 {
                return Ok(*id);
            }
        }
        // Rounding may leave a crumb of the last weight.
        Ok(kept.iter().rev().find(|(_, weight)| *weight > 0.0).map_or(best, |(id, _)| *id))
    }

    fn penalize(&self, logits: &mut [f32], seen: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let penalty = self.repetition_penalty as f32;
        for id in seen {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }
}

/// Finds the first of the highest logits.
pub(crate) fn likeliest(logits: &[f32]) -> Result<(u32, f32)> {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, logit) in (0_u32..).zip(logits) {
        if logit.is_nan() || *logit == f32::INFINITY {
            return Err(not_finite(format!("{logit} for token {id}")));
        }
        if *logit > best.1 {
            best = (id, *logit);
        }
    }
    if best.1 == f32::NEG_INFINITY {
        return Err(not_finite(format!("no finite number among {}", logits.len())));
    }
    Ok(best)
}

fn not_finite(found: String) -> Error {
    Error::Input {
        what: "the model's logits are no numbers to choose by".to_owned(),
        expected: "finite logits".to_owned(),
        found,
        help: "training may have diverged: use an earlier checkpoint, or a lower learning rate"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use retune_core::random::Seed;

    use super::*;

    /// Draws often and counts the tokens.
    fn counts(sampling: Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut random = Seed(5).stream("test", &[]);
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            let mut logits = logits.to_vec();
            counts[sampling.choose(&mut logits, &[], &mut random).unwrap() as usize] += 1;
        }
        counts
    }

    /// Logits of the probabilities 0.5, 0.25, 0.125, 0.125, out of order.
    fn halves() -> [f32; 4] {
        [0.125_f32.ln(), 0.5_f32.ln(), 0.125_f32.ln(), 0.25_f32.ln()]
    }

    #[test]
    fn greedy_takes_the_first_of_the_highest_and_draws_nothing() {
        let mut random = Seed(1).stream("test", &[]);
        let before = random.clone().bits();
        let found = Sampling::greedy().choose(&mut [0.0, 3.0, -1.0, 3.0], &[], &mut random);
        assert_eq!(found.unwrap(), 1);
        assert_eq!(random.bits(), before);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let found = counts(Sampling::at_temperature(1.0), &halves(), 8000);
        // Standard deviation of a count is at most √(8000 · 0.25) = 45; four of them.
        for (found, expected) in found.iter().zip([1000_i64, 4000, 1000, 2000]) {
            assert!((*found as i64 - expected).abs() < 180, "{found} {expected}");
        }
    }

    #[test]
    fn temperature_bends_the_probabilities() {
        // Squared and normalised: 1/64, 16/64, 1/64, 4/64 of 22/64.
        let found = counts(Sampling::at_temperature(0.5), &halves(), 8000);
        for (found, share) in found.iter().zip([1.0, 16.0, 1.0, 4.0]) {
            assert!((*found as f64 - 8000.0 * share / 22.0).abs() < 180.0, "{found} {share}");
        }
    }

    #[test]
    fn top_k_keeps_lower_ids_of_equals() {
        let sampling = Sampling { top_k: Some(3), ..Sampling::at_temperature(1.0) };
        let found = counts(sampling, &halves(), 4000);
        assert_eq!(found[2], 0);
        // 1/8 of the 7/8 that are left.
        assert!((found[0] as f64 - 4000.0 / 7.0).abs() < 100.0, "{found:?}");
    }

    #[test]
    fn top_p_keeps_the_token_that_reaches_it() {
        let top_p = |top_p| Sampling { top_p, ..Sampling::at_temperature(1.0) };
        assert_eq!(counts(top_p(0.4), &halves(), 200)[1], 200);
        let found = counts(top_p(0.6), &halves(), 2000);
        assert_eq!((found[0], found[2]), (0, 0));
        assert!(found[3] > 500, "{found:?}");
        // The likeliest token stays however small the fraction.
        assert_eq!(counts(top_p(1e-300), &halves(), 50)[1], 50);
    }

    #[test]
    fn min_p_is_relative_to_the_likeliest() {
        let sampling = Sampling { min_p: 0.3, ..Sampling::at_temperature(1.0) };
        let found = counts(sampling, &halves(), 2000);
        // 0.125 / 0.5 is below 0.3, 0.25 / 0.5 is not.
        assert_eq!((found[0], found[2]), (0, 0));
        assert!(found[3] > 500, "{found:?}");
    }

    #[test]
    fn a_seen_token_is_penalized_on_either_side_of_zero() {
        let mut random = Seed(1).stream("test", &[]);
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        let mut logits = [4.0, 3.0, -1.0];
        assert_eq!(sampling.choose(&mut logits, &[0, 2], &mut random).unwrap(), 1);
        assert_eq!(logits, [2.0, 3.0, -2.0]);
    }

    #[test]
    fn broken_logits_are_an_error() {
        let mut random = Seed(1).stream("test", &[]);
        for logits in [[0.0, f32::NAN], [f32::INFINITY, 0.0], [f32::NEG_INFINITY; 2]] {
            let error = Sampling::greedy().choose(&mut logits.clone(), &[], &mut random);
            assert!(error.unwrap_err().to_string().contains("finite logits"));
        }
        // A token that is ruled out is fine.
        let mut logits = [f32::NEG_INFINITY, 0.0];
        let sampling = Sampling::at_temperature(1.0);
        assert_eq!(sampling.choose(&mut logits, &[], &mut random).unwrap(), 1);
    }

    #[test]
    fn settings_that_mean_nothing_are_named() {
        let greedy = Sampling::greedy();
        for (sampling, name) in [
            (Sampling { temperature: -1.0, ..greedy }, "temperature"),
            (Sampling { temperature: f64::NAN, ..greedy }, "temperature"),
            (Sampling { top_k: Some(0), ..greedy }, "top_k"),
            (Sampling { top_p: 0.0, ..greedy }, "top_p"),
            (Sampling { top_p: 90.0, ..greedy }, "top_p"),
            (Sampling { min_p: f64::NAN, ..greedy }, "min_p"),
            (Sampling { repetition_penalty: 0.0, ..greedy }, "repetition_penalty"),
        ] {
            let error = sampling.check().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}: ")), "{error}");
        }
        assert!(Sampling::default().check().is_ok());
    }

    proptest! {
        /// No filter takes the likeliest token away, and what is drawn passes every filter.
        #[test]
        fn a_drawn_token_passes_the_filters(
            logits in prop::collection::vec(-30.0_f32..30.0, 1..40),
            temperature in 0.05_f64..4.0,
            top_k in 1_usize..50,
            top_p in 0.01_f64..=1.0,
            min_p in 0.0_f64..=1.0,
            seed: u64,
        ) {
            let sampling = Sampling {
                temperature, top_k: Some(top_k), top_p, min_p, repetition_penalty: 1.0,
            };
            let mut random = Seed(seed).stream("test", &[]);
            let drawn = sampling.choose(&mut logits.clone(), &[], &mut random).unwrap() as usize;
            let above = logits.iter().filter(|logit| **logit > logits[drawn]).count();
            prop_assert!(above < top_k);
            let highest = logits.iter().copied().fold(f32::MIN, f32::max);
            let relative = (f64::from(logits[drawn] - highest) / temperature).exp();
            prop_assert!(relative >= min_p * (1.0 - 1e-5));
        }
    }
}
