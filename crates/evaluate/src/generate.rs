//! Continues prompts, several at once, with a key-value cache.

use std::ops::ControlFlow;

use crate::pack::{Piece, language_model, lay};
use crate::sampling::Sampling;
use crate::{Error, Result};
use retune_core::model::{Output, Tuned};
use retune_core::pass::{KeyValueCache, logit_rows};
use retune_core::random::{Random, Seed};

/// What is to be continued.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Token ids, as the model is to read them: BOS and template included.
    pub tokens: Vec<u32>,
    /// This prompt's own stream, so that its neighbours in a batch do not change its draws.
    pub random: Random,
    /// The task it belongs to, where the model tells tasks apart; all prompts say it, or none.
    pub task: Option<usize>,
}

impl Prompt {
    /// Makes the prompt with the stream `number` of `seed`.
    pub fn new(tokens: Vec<u32>, seed: Seed, number: u64) -> Self {
        Self { tokens, random: seed.stream("generate", &[number]), task: None }
    }

    /// Says which task the prompt belongs to.
    #[must_use]
    pub fn of_task(self, task: Option<usize>) -> Self {
        Self { task, ..self }
    }
}

/// Says how prompts are continued.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// How each token is chosen.
    pub sampling: Sampling,
    /// Tokens that end the answer: end of text, end of turn.
    pub end_tokens: Vec<u32>,
    /// Tokens generated at most.
    pub max_new_tokens: usize,
    /// Prompts continued at once at most; bounds the memory of the cache.
    pub max_parallel: usize,
    /// Prompt tokens read at once at most, or one longer prompt; bounds the memory of a pass.
    pub max_read_tokens: usize,
}

impl Default for Generation {
    fn default() -> Self {
        Self {
            sampling: Sampling::greedy(),
            end_tokens: Vec::new(),
            max_new_tokens: 64,
            max_parallel: 16,
            max_read_tokens: 4096,
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The model chose this end token; it is not part of the answer.
    EndToken(u32),
    /// The answer has `max_new_tokens` tokens.
    Length,
    /// Prompt and answer fill all positions the model has.
    Context,
    /// The caller wanted no more.
    Caller,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the prompt and without the end token.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub stop: Stop,
}

/// Called after each new token with the prompt's place and the answer so far, its last token being
/// the new one. Streams text, and ends the answer at a stop string with [`ControlFlow::Break`];
/// the last token stays part of the answer then.
pub type Watch<'a> = dyn FnMut(usize, &[u32]) -> ControlFlow<()> + 'a;

/// Lets every answer run until it ends by itself.
pub fn unwatched(_place: usize, _answer: &[u32]) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Continues all prompts; answers are in the prompts' order.
///
/// Up to `max_parallel` prompts go through the model together, whatever their lengths. One that is
/// done leaves at once, and the next is read in the same pass that continues the others. What a
/// prompt's answer is does not depend on its neighbours, as far as the kernels give a row of a
/// batch the bits it has alone.
///
/// # Errors
/// If a prompt is empty, too long or has unknown tokens, a setting is impossible, or the model
/// does not predict next tokens; those of the model.
/// # Cost
/// Each token of prompt and answer is read once, and one row of logits computed for each new token.
pub fn generate(
    tuned: &Tuned<'_>,
    prompts: Vec<Prompt>,
    options: &Generation,
    watch: &mut Watch<'_>,
) -> Result<Vec<Generated>> {
    let max_positions = check(tuned, options)?;
    for (place, prompt) in prompts.iter().enumerate() {
        check_prompt(&prompt.tokens, place, max_positions)?;
    }
    let mut answers: Vec<Option<Generated>> = prompts.iter().map(|_| None).collect();
    let mut waiting = prompts.into_iter().enumerate().peekable();
    let mut decoder =
        Decoder { tuned, options, max_positions, cache: &mut KeyValueCache::default() };
    let mut running: Vec<Sequence> = Vec::new();
    loop {
        let mut to_read = 0;
        while running.len() < options.max_parallel.max(1) {
            let fits = |(_, prompt): &(usize, Prompt)| {
                to_read == 0 || to_read + prompt.tokens.len() <= options.max_read_tokens
            };
            let Some((place, prompt)) = waiting.next_if(fits) else { break };
            let sequence = Sequence::new(place, prompt);
            if let Some(stop) = decoder.full(&sequence) {
                answers[place] = Some(sequence.end(stop));
                continue;
            }
            to_read += sequence.tokens.len();
            running.push(sequence);
        }
        if running.is_empty() {
            return Ok(answers.into_iter().flatten().collect());
        }
        for (place, answer) in decoder.step(&mut running, watch)? {
            answers[place] = Some(answer);
        }
    }
}

/// A dialogue whose earlier turns need not be read again.
///
/// Each prompt is the whole dialogue so far. Where it begins with all that was read and answered
/// before, only the rest is read; otherwise everything is, and the answer is the same.
#[derive(Debug, Default)]
pub struct Dialogue {
    cache: KeyValueCache,
    read: Vec<u32>,
}

impl Dialogue {
    /// Continues `prompt`. The model must be the one of the turns before, unchanged.
    ///
    /// # Errors
    /// As [`generate`].
    pub fn reply(
        &mut self,
        tuned: &Tuned<'_>,
        prompt: Prompt,
        options: &Generation,
        watch: &mut Watch<'_>,
    ) -> Result<Generated> {
        let max_positions = check(tuned, options)?;
        check_prompt(&prompt.tokens, 0, max_positions)?;
        let mut sequence = Sequence::new(0, prompt);
        // At least one token must be left, whose logits say how to go on.
        if self.read.len() < sequence.tokens.len() && sequence.tokens.starts_with(&self.read) {
            sequence.num_read = self.read.len();
        } else {
            self.forget();
        }
        let mut decoder = Decoder { tuned, options, max_positions, cache: &mut self.cache };
        if let Some(stop) = decoder.full(&sequence) {
            return Ok(sequence.end(stop));
        }
        let mut running = vec![sequence];
        loop {
            match decoder.advance(&mut running, watch) {
                Ok(stops) => {
                    if let Some(stop) = stops[0] {
                        let sequence = running.remove(0);
                        self.read = sequence.tokens[..sequence.num_read].to_vec();
                        return Ok(sequence.end(stop));
                    }
                }
                Err(error) => {
                    // Some layers may have read what others have not.
                    self.forget();
                    return Err(error);
                }
            }
        }
    }

    /// Forgets all turns.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

/// One prompt on its way.
struct Sequence {
    place: usize,
    /// Prompt and answer.
    tokens: Vec<u32>,
    num_prompt: usize,
    /// How many of `tokens` the cache holds.
    num_read: usize,
    /// Distinct ids of `tokens`, ascending.
    seen: Vec<u32>,
    random: Random,
    task: Option<usize>,
}

impl Sequence {
    fn new(place: usize, prompt: Prompt) -> Self {
        let mut seen = prompt.tokens.clone();
        seen.sort_unstable();
        seen.dedup();
        let num_prompt = prompt.tokens.len();
        let Prompt { tokens, random, task } = prompt;
        Self { place, tokens, num_prompt, num_read: 0, seen, random, task }
    }

    fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if let Err(at) = self.seen.binary_search(&token) {
            self.seen.insert(at, token);
        }
    }

    fn answer(&self) -> &[u32] {
        &self.tokens[self.num_prompt..]
    }

    fn end(mut self, stop: Stop) -> Generated {
        Generated { tokens: self.tokens.split_off(self.num_prompt), stop }
    }
}

struct Decoder<'a> {
    tuned: &'a Tuned<'a>,
    options: &'a Generation,
    max_positions: usize,
    cache: &'a mut KeyValueCache,
}

impl Decoder<'_> {
    /// Gives each sequence one token, and takes those that ended out of `running` and the cache.
    fn step(
        &mut self,
        running: &mut Vec<Sequence>,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<(usize, Generated)>> {
        let stops = self.advance(running, watch)?;
        let stay: Vec<usize> = (0..stops.len()).filter(|at| stops[*at].is_none()).collect();
        if stay.len() == stops.len() {
            return Ok(Vec::new());
        }
        self.cache.select(&stay);
        let mut ended = Vec::new();
        let all = std::mem::take(running);
        for (sequence, stop) in all.into_iter().zip(stops) {
            match stop {
                Some(stop) => ended.push((sequence.place, sequence.end(stop))),
                None => running.push(sequence),
            }
        }
        Ok(ended)
    }

    /// Gives each sequence one token, and says which ended.
    fn advance(
        &mut self,
        running: &mut [Sequence],
        watch: &mut Watch<'_>,
    ) -> Result<Vec<Option<Stop>>> {
        let pieces: Vec<Piece<'_>> = running
            .iter()
            .map(|s| {
                let (tokens, start) = (&s.tokens[s.num_read..], s.num_read);
                Piece { tokens, start, row: s.place, task: s.task }
            })
            .collect();
        let batch = lay(&pieces);
        let last: Vec<usize> = batch.spans.iter().map(|span| span.end - 1).collect();
        let logits =
            self.tuned.evaluate(&batch, Some(self.cache), |pass, output| match output {
                Output::States(states) => Ok(logit_rows(pass.logits(&states, &last)?)),
                Output::Classes(_) | Output::Embeddings(_) | Output::Pairs(_) => Err(no_states()),
            })?;
        let mut stops = Vec::with_capacity(running.len());
        for (sequence, mut logits) in running.iter_mut().zip(logits) {
            sequence.num_read = sequence.tokens.len();
            let sampling = &self.options.sampling;
            let token = sampling.choose(&mut logits, &sequence.seen, &mut sequence.random)?;
            if self.options.end_tokens.contains(&token) {
                stops.push(Some(Stop::EndToken(token)));
                continue;
            }
            sequence.push(token);
            let stop = match watch(sequence.place, sequence.answer()) {
                ControlFlow::Break(()) => Some(Stop::Caller),
                ControlFlow::Continue(()) => self.full(sequence),
            };
            stops.push(stop);
        }
        Ok(stops)
    }

    /// Says whether there is no room for another token.
    fn full(&self, sequence: &Sequence) -> Option<Stop> {
        if sequence.answer().len() >= self.options.max_new_tokens {
            return Some(Stop::Length);
        }
        (sequence.tokens.len() >= self.max_positions).then_some(Stop::Context)
    }
}

/// Checks what does not depend on the prompt, and returns the longest sequence.
fn check(tuned: &Tuned<'_>, options: &Generation) -> Result<usize> {
    options.sampling.check()?;
    let (vocabulary, max_positions) = language_model(tuned)?;
    if let Some(token) = options.end_tokens.iter().find(|token| **token as usize >= vocabulary) {
        return Err(Error::Setting {
            setting: "end_tokens".to_owned(),
            what: "the model can never choose this token".to_owned(),
            expected: format!("ids below {vocabulary}"),
            found: token.to_string(),
            help: "the tokenizer belongs to another model; use the one beside the weights"
                .to_owned(),
        });
    }
    Ok(max_positions)
}

fn check_prompt(tokens: &[u32], place: usize, max_positions: usize) -> Result<()> {
    if (1..=max_positions).contains(&tokens.len()) {
        return Ok(());
    }
    Err(Error::Input {
        what: format!("prompt {place} cannot be continued"),
        expected: format!("1 to {max_positions} tokens, the positions of the model"),
        found: format!("{} tokens", tokens.len()),
        help: "begin an empty prompt with the model's BOS token; shorten a long one".to_owned(),
    })
}

pub(crate) fn no_states() -> Error {
    Error::Unsupported {
        what: "predicting tokens with a model that puts out no states".to_owned(),
        help: "use a causal language model".to_owned(),
    }
}
