//! Scores whole documents.

use crate::generate::no_states;
use crate::likelihood::{Budget, Request};
use crate::pack::{Piece, language_model, lay, within};
use crate::{Error, Result};
use retune_core::model::{Output, Tuned};
use retune_core::parameters::to_vec;

/// Summed log-likelihood of texts, and over how many tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// Log-probability of all predicted tokens, in nats.
    pub log_likelihood: f64,
    /// Predicted tokens.
    pub num_tokens: usize,
}

impl Perplexity {
    /// Returns the mean loss per token, in nats; NaN without tokens.
    pub fn loss(&self) -> f64 {
        -self.log_likelihood / self.num_tokens as f64
    }

    /// Returns the perplexity per token: every token weighs the same, whatever its document.
    pub fn per_token(&self) -> f64 {
        self.loss().exp()
    }

    /// Returns the perplexity per unit of which the texts have `count`: words or bytes. Unlike that
    /// per token, it can be compared between models with different vocabularies.
    pub fn per(&self, count: usize) -> f64 {
        (-self.log_likelihood / count as f64).exp()
    }

    /// Returns the bits needed per byte of texts with `num_bytes` bytes.
    pub fn bits_per_byte(&self, num_bytes: usize) -> f64 {
        -self.log_likelihood / num_bytes as f64 / std::f64::consts::LN_2
    }

    /// Adds the texts of another.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            log_likelihood: self.log_likelihood + other.log_likelihood,
            num_tokens: self.num_tokens + other.num_tokens,
        }
    }
}

/// Cuts a document into windows that predict each of its tokens once.
///
/// The first window predicts as many tokens as the model reads, the first of them after `prefix`.
/// Every later one predicts at most `longest - overlap + 1` more, with as much context as then
/// fits: with an `overlap` of 1 full windows share no token but the one they begin with, which is
/// fastest and what lm-evaluation-harness does; a larger one gives the first tokens of a window
/// more to go by. Without a prefix the document's own first token is context and not predicted.
///
/// # Errors
/// [`Error::Setting`] unless `overlap` is in `1..=longest`.
///
/// ```
/// use retune_evaluate::perplexity::windows;
/// let cut = windows(&[1, 2, 3, 4, 5], Some(0), 2, 1)?;
/// let list: Vec<_> = cut.iter().map(|w| (&w.context[..], &w.continuation[..])).collect();
/// // Each reads 2 tokens: all but its last. The last window has room for more context.
/// assert_eq!(list, [(&[0][..], &[1, 2][..]), (&[2], &[3, 4]), (&[3, 4], &[5])]);
/// # Ok::<(), retune_evaluate::Error>(())
/// ```
pub fn windows(
    document: &[u32],
    prefix: Option<u32>,
    longest: usize,
    overlap: usize,
) -> Result<Vec<Request>> {
    if !(1..=longest).contains(&overlap) {
        return Err(Error::Setting {
            setting: "overlap".to_owned(),
            what: "windows cannot overlap this much".to_owned(),
            expected: format!("1 to {longest}, the tokens of a window"),
            found: overlap.to_string(),
            help: "1 makes windows disjoint".to_owned(),
        });
    }
    let text: Vec<u32> = prefix.into_iter().chain(document.iter().copied()).collect();
    let mut list = Vec::new();
    // `text[..done]` is context or predicted; token `done` is the next to predict.
    let mut done = 1;
    while done < text.len() {
        let most = if done == 1 { longest } else { longest - overlap + 1 };
        let end = text.len().min(done + most);
        // All tokens but the last are read: `longest` of them.
        let start = (end - 1).saturating_sub(longest);
        list.push(Request {
            context: text[start..done].to_vec(),
            continuation: text[done..end].to_vec(),
            task: None,
        });
        done = end;
    }
    Ok(list)
}

/// Computes the likelihood of each document, in windows where it is longer than the model reads.
///
/// Logits never exist outside the kernel that turns them into losses. See [`windows`] for
/// `prefix` and `overlap`.
///
/// # Errors
/// As [`windows`]; those of the model.
pub fn documents(
    tuned: &Tuned<'_>,
    documents: &[Vec<u32>],
    prefix: Option<u32>,
    overlap: usize,
    budget: &Budget,
) -> Result<Vec<Perplexity>> {
    let (_, max_positions) = language_model(tuned)?;
    let longest = budget.longest(max_positions);
    let mut parts: Vec<(usize, usize, Vec<u32>)> = Vec::new();
    for (row, document) in documents.iter().enumerate() {
        for window in windows(document, prefix, longest, overlap)? {
            let predicted = window.continuation.len();
            parts.push((row, predicted, [window.context, window.continuation].concat()));
        }
    }
    let mut results = vec![Perplexity::default(); documents.len()];
    let lengths: Vec<usize> = parts.iter().map(|(_, _, tokens)| tokens.len() - 1).collect();
    for run in within(&lengths, budget.batch_tokens) {
        let parts = &parts[run];
        let pieces: Vec<Piece<'_>> = parts
            .iter()
            .map(|(row, _, tokens)| Piece {
                tokens: &tokens[..tokens.len() - 1],
                start: 0,
                row: *row,
                task: None,
            })
            .collect();
        let mut batch = lay(&pieces);
        let mut rows = Vec::with_capacity(parts.len());
        for ((_, predicted, tokens), span) in parts.iter().zip(batch.spans.iter()) {
            let first = span.end - predicted;
            let wanted = &tokens[tokens.len() - predicted..];
            for (target, token) in batch.targets[first..span.end].iter_mut().zip(wanted) {
                *target = Some(*token);
            }
            rows.push(first..span.end);
        }
        check_targets(&batch, tuned)?;
        let losses = tuned.evaluate(&batch, None, |pass, output| match output {
            Output::States(states) => Ok(to_vec(pass.token_losses(states)?.inner())),
            Output::Classes(_) | Output::Embeddings(_) | Output::Pairs(_) => Err(no_states()),
        })?;
        for ((row, predicted, _), range) in parts.iter().zip(rows) {
            let sum: f64 = losses[range].iter().map(|loss| f64::from(*loss)).sum();
            let result = &mut results[*row];
            *result = result.and(Perplexity { log_likelihood: -sum, num_tokens: *predicted });
        }
    }
    Ok(results)
}

/// A window's last token is predicted but not read, so that reading does not check it.
fn check_targets(batch: &retune_core::batch::Batch, tuned: &Tuned<'_>) -> Result<()> {
    let vocabulary = tuned.model.spec().vocabulary;
    match batch.targets.iter().flatten().find(|token| **token as usize >= vocabulary) {
        None => Ok(()),
        Some(token) => Err(Error::Input {
            what: "a document has a token the model does not know".to_owned(),
            expected: format!("ids below {vocabulary}"),
            found: token.to_string(),
            help: "the tokenizer belongs to another model; use the one beside the weights"
                .to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(document: &[u32], prefix: Option<u32>, longest: usize, overlap: usize) -> Vec<Request> {
        windows(document, prefix, longest, overlap).unwrap()
    }

    fn window(context: &[u32], continuation: &[u32]) -> Request {
        Request { context: context.to_vec(), continuation: continuation.to_vec(), task: None }
    }

    #[test]
    fn later_windows_take_context_along() {
        // Windows read 4 tokens; with an overlap of 3 each later one predicts 2.
        let found = cut(&[1, 2, 3, 4, 5, 6, 7], Some(0), 4, 3);
        let expected = [
            window(&[0], &[1, 2, 3, 4]),
            window(&[2, 3, 4], &[5, 6]),
            // One token is left: it gets all the context that fits.
            window(&[3, 4, 5, 6], &[7]),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn without_a_prefix_the_first_token_is_given() {
        assert_eq!(cut(&[1, 2, 3], None, 8, 1), [window(&[1], &[2, 3])]);
        assert_eq!(cut(&[1], None, 8, 1), []);
        assert_eq!(cut(&[], Some(0), 8, 1), []);
    }

    #[test]
    fn an_impossible_overlap_is_named() {
        for overlap in [0, 5] {
            let error = windows(&[1], Some(0), 4, overlap).unwrap_err().to_string();
            assert!(error.contains("1 to 4"), "{error}");
        }
    }

    #[test]
    fn units_are_those_of_their_names() {
        // 8 tokens of probability 1/2 each over 2 words and 4 bytes: 8 bits in all.
        let texts = Perplexity { log_likelihood: -8.0 * 2_f64.ln(), num_tokens: 8 };
        assert!((texts.per_token() - 2.0).abs() < 1e-12);
        assert!((texts.per(2) - 16.0).abs() < 1e-12);
        assert!((texts.bits_per_byte(4) - 2.0).abs() < 1e-12);
        assert!(Perplexity::default().loss().is_nan());
    }

    proptest! {
        /// Every token is predicted once, in order, after the tokens before it.
        #[test]
        fn windows_cover_a_document_once(
            length in 0_u32..60,
            longest in 1_usize..20,
            overlap in 1_usize..20,
        ) {
            prop_assume!(overlap <= longest);
            let document: Vec<u32> = (1..=length).collect();
            let list = cut(&document, Some(0), longest, overlap);
            let predicted: Vec<u32> =
                list.iter().flat_map(|w| w.continuation.iter().copied()).collect();
            prop_assert_eq!(predicted, document);
            for w in list {
                let read = w.context.len() + w.continuation.len() - 1;
                prop_assert!(read <= longest && !w.context.is_empty());
                let tokens = [w.context, w.continuation].concat();
                prop_assert!(tokens.windows(2).all(|pair| pair[0] + 1 == pair[1]));
            }
        }
    }
}
