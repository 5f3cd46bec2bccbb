//! Scores continuations of contexts.

use std::collections::BTreeMap;

use crate::generate::no_states;
use crate::pack::{Piece, language_model, lay, within};
use crate::sampling::likeliest;
use crate::{Error, Result};
use retune_core::model::{Output, Tuned};
use retune_core::pass::logit_rows;

/// What is to be scored: `continuation` after `context`, both as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What is given; at least one token.
    pub context: Vec<u32>,
    /// What is scored; at least one token.
    pub continuation: Vec<u32>,
    /// The task it belongs to, where the model tells tasks apart; all requests say it, or none.
    pub task: Option<usize>,
}

/// Tokens that are read, and their task.
type Input = (Vec<u32>, Option<usize>);

/// How likely a continuation is.
#[derive(Debug, Clone, PartialEq)]
pub struct Likelihood {
    /// Log-probability of the whole continuation, in nats.
    pub sum: f64,
    /// Log-probability of each of its tokens given all before.
    pub tokens: Vec<f64>,
    /// Whether each of its tokens is the model's first choice.
    pub is_greedy: bool,
    /// How many tokens at the left of the context were cut for want of positions.
    pub num_cut: usize,
}

/// How much goes through the model at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Tokens in one pass at most, or one longer sequence.
    pub batch_tokens: usize,
    /// Numbers of logits held at once at most, or one row of the vocabulary.
    pub logits: usize,
    /// Tokens of one sequence at most; by default the positions of the model.
    pub sequence_tokens: Option<usize>,
}

impl Default for Budget {
    fn default() -> Self {
        Self { batch_tokens: 2048, logits: 1 << 23, sequence_tokens: None }
    }
}

impl Budget {
    /// Returns the longest sequence the model is to read.
    pub(crate) fn longest(&self, max_positions: usize) -> usize {
        self.sequence_tokens.unwrap_or(max_positions).clamp(1, max_positions.max(1))
    }
}

/// Splits a context and a continuation into tokens as lm-evaluation-harness does.
///
/// Both are encoded together and split where the context's own encoding ends, so that tokens are
/// those of the running text. White space at the context's end goes to the continuation first,
/// because most vocabularies join it with the word that follows. An empty context is stood in for
/// by `prefix`, the token texts begin with; a continuation that begins with it itself gives it
/// away.
///
/// # Errors
/// [`Error::Input`] if nothing is left for the continuation.
///
/// ```
/// use retune_evaluate::likelihood::encode_pair;
/// let letters = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
/// let request = encode_pair("a ", "b", 0, letters)?;
/// assert_eq!((request.context, request.continuation), (vec![97], vec![32, 98]));
/// # Ok::<(), retune_evaluate::Error>(())
/// ```
pub fn encode_pair(
    context: &str,
    continuation: &str,
    prefix: u32,
    encode: impl Fn(&str) -> Vec<u32>,
) -> Result<Request> {
    let bare = context.trim_end();
    let (context_tokens, continuation_tokens) = if context.is_empty() {
        let mut tokens = encode(continuation);
        if tokens.first() == Some(&prefix) {
            tokens.remove(0);
        }
        (vec![prefix], tokens)
    } else {
        let mut whole = encode(&format!("{context}{continuation}"));
        let mut context_tokens = encode(bare);
        let continuation_tokens = whole.split_off(context_tokens.len().min(whole.len()));
        if context_tokens.is_empty() {
            context_tokens.push(prefix);
        }
        (context_tokens, continuation_tokens)
    };
    if continuation_tokens.is_empty() {
        return Err(empty(&format!("continuation {continuation:?} of context {context:?}")));
    }
    Ok(Request { context: context_tokens, continuation: continuation_tokens, task: None })
}

fn empty(what: &str) -> Error {
    Error::Input {
        what: format!("{what} cannot be scored"),
        expected: "at least one token of context and one of continuation".to_owned(),
        found: "none".to_owned(),
        help: "leave empty answers out; begin an empty context with the model's BOS token"
            .to_owned(),
    }
}

/// Computes the log-probabilities of many continuations; results are in the requests' order.
///
/// A sequence too long for the model loses tokens from the left of its context, as in
/// lm-evaluation-harness. Requests that share all tokens but the last, such as the letters of
/// multiple choice, go through the model once. Longest sequences come first, so that a lack of
/// memory shows at once.
///
/// # Errors
/// If a request has an empty side or a continuation longer than the model reads; those of the
/// model.
/// # Cost
/// One row of logits for each token of the continuations; at most `budget.logits` numbers at once.
pub fn log_likelihoods(
    tuned: &Tuned<'_>,
    requests: &[Request],
    budget: &Budget,
) -> Result<Vec<Likelihood>> {
    let (vocabulary, max_positions) = language_model(tuned)?;
    let longest = budget.longest(max_positions);
    let mut inputs: BTreeMap<Input, Vec<usize>> = BTreeMap::new();
    let mut results = Vec::with_capacity(requests.len());
    for (place, request) in requests.iter().enumerate() {
        let (input, num_cut) = input_of(request, place, longest)?;
        if let Some(token) =
            request.continuation.iter().find(|token| **token as usize >= vocabulary)
        {
            return Err(Error::Input {
                what: format!("request {place} asks for a token the model does not know"),
                expected: format!("ids below {vocabulary}"),
                found: token.to_string(),
                help: "the tokenizer belongs to another model; use the one beside the weights"
                    .to_owned(),
            });
        }
        inputs.entry((input, request.task)).or_default().push(place);
        let count = request.continuation.len();
        results.push(Likelihood { sum: 0.0, tokens: vec![0.0; count], is_greedy: true, num_cut });
    }
    let mut jobs: Vec<(Input, Vec<usize>)> = inputs.into_iter().collect();
    jobs.sort_by_key(|((tokens, _), _)| std::cmp::Reverse(tokens.len()));
    let lengths: Vec<usize> = jobs.iter().map(|((tokens, _), _)| tokens.len()).collect();
    let rows_at_once = (budget.logits / vocabulary.max(1)).max(1);
    for run in within(&lengths, budget.batch_tokens) {
        score(tuned, requests, &jobs[run], rows_at_once, &mut results)?;
    }
    for result in &mut results {
        result.sum = result.tokens.iter().sum();
    }
    Ok(results)
}

/// Returns all tokens but the last, cut from the left to `longest`, and how many were cut.
fn input_of(request: &Request, place: usize, longest: usize) -> Result<(Vec<u32>, usize)> {
    let Request { context, continuation, .. } = request;
    if context.is_empty() || continuation.is_empty() {
        return Err(empty(&format!("request {place}")));
    }
    if continuation.len() > longest {
        return Err(Error::Input {
            what: format!("the continuation of request {place} is longer than the model can read"),
            expected: format!("at most {longest} tokens"),
            found: format!("{} tokens", continuation.len()),
            help: "score long texts as documents, by perplexity".to_owned(),
        });
    }
    let length = context.len() + continuation.len() - 1;
    let num_cut = length.saturating_sub(longest);
    let mut input = context[num_cut..].to_vec();
    input.extend(&continuation[..continuation.len() - 1]);
    Ok((input, num_cut))
}

/// One pass: which token of which request each needed row of logits scores.
fn score(
    tuned: &Tuned<'_>,
    requests: &[Request],
    jobs: &[(Input, Vec<usize>)],
    rows_at_once: usize,
    results: &mut [Likelihood],
) -> Result<()> {
    let pieces: Vec<Piece<'_>> = jobs
        .iter()
        .map(|((tokens, task), places)| Piece { tokens, start: 0, row: places[0], task: *task })
        .collect();
    let batch = lay(&pieces);
    let mut wanted: BTreeMap<usize, Vec<(usize, usize)>> = BTreeMap::new();
    for ((_, places), span) in jobs.iter().zip(batch.spans.iter()) {
        for place in places {
            let count = requests[*place].continuation.len();
            for index in 0..count {
                wanted.entry(span.end - count + index).or_default().push((*place, index));
            }
        }
    }
    let rows: Vec<usize> = wanted.keys().copied().collect();
    tuned.evaluate(&batch, None, |pass, output| {
        let Output::States(states) = output else { return Err(no_states()) };
        for chunk in rows.chunks(rows_at_once) {
            for (row, logits) in chunk.iter().zip(logit_rows(pass.logits(&states, chunk)?)) {
                let (best, highest) = likeliest(&logits)?;
                let normaliser = log_sum(&logits, highest);
                for (place, index) in &wanted[row] {
                    let token = requests[*place].continuation[*index];
                    let result = &mut results[*place];
                    result.tokens[*index] = f64::from(logits[token as usize]) - normaliser;
                    result.is_greedy &= token == best;
                }
            }
        }
        Ok(())
    })
}

/// Computes `ln Σ exp(logit)` in f64.
pub(crate) fn log_sum(logits: &[f32], highest: f32) -> f64 {
    let highest = f64::from(highest);
    highest + logits.iter().map(|logit| (f64::from(*logit) - highest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words with the space before them, as byte-level vocabularies have them: "b" is 2, " b" 12,
    /// a lone space 9.
    fn encode(text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut space = false;
        for letter in text.chars() {
            if letter == ' ' {
                if space {
                    ids.push(9);
                }
                space = true;
            } else {
                ids.push(letter as u32 - 'a' as u32 + 1 + if space { 10 } else { 0 });
                space = false;
            }
        }
        if space {
            ids.push(9);
        }
        ids
    }

    fn pair(context: &str, continuation: &str) -> (Vec<u32>, Vec<u32>) {
        let request = encode_pair(context, continuation, 99, encode).unwrap();
        (request.context, request.continuation)
    }

    #[test]
    fn white_space_goes_with_the_word_that_follows() {
        assert_eq!(pair("a", " b"), (vec![1], vec![12]));
        assert_eq!(pair("a ", "b"), (vec![1], vec![12]));
        assert_eq!(pair("a", "b"), (vec![1], vec![2]));
        assert_eq!(pair("a  ", "b"), (vec![1], vec![9, 12]));
    }

    #[test]
    fn an_empty_context_is_the_prefix() {
        assert_eq!(pair("", "b"), (vec![99], vec![2]));
        let begins = |text: &str| [vec![99], encode(text)].concat();
        let request = encode_pair("", "b", 99, begins).unwrap();
        assert_eq!((request.context, request.continuation), (vec![99], vec![2]));
        // White space alone leaves no context either.
        assert_eq!(pair(" ", "b"), (vec![99], vec![12]));
    }

    #[test]
    fn a_continuation_without_tokens_is_refused() {
        let error = encode_pair("a", "", 99, encode).unwrap_err().to_string();
        assert!(error.contains("continuation \"\" of context \"a\""), "{error}");
    }

    #[test]
    fn contexts_are_cut_from_the_left() {
        let request = Request { context: vec![1, 2, 3, 4], continuation: vec![5, 6], task: None };
        assert_eq!(input_of(&request, 0, 5).unwrap(), (vec![1, 2, 3, 4, 5], 0));
        assert_eq!(input_of(&request, 0, 3).unwrap(), (vec![3, 4, 5], 2));
        // One token of context stays even where the continuation takes all positions.
        assert_eq!(input_of(&request, 0, 2).unwrap(), (vec![4, 5], 3));
        let error = input_of(&request, 7, 1).unwrap_err().to_string();
        assert!(error.contains("request 7") && error.contains("at most 1"), "{error}");
    }

    #[test]
    fn log_sums_do_not_overflow() {
        assert!((log_sum(&[1000.0, 1000.0], 1000.0) - (1000.0 + 2_f64.ln())).abs() < 1e-12);
        assert_eq!(log_sum(&[f32::NEG_INFINITY, 3.0], 3.0), 3.0);
    }
}
