//! Answers of models worked out by hand, alone and in company.

#![expect(clippy::unwrap_used, reason = "a test fails where a helper of it cannot go on")]

use std::ops::ControlFlow;

mod models;

use models::{attention, average, bigram};
use retune_core::random::Seed;
use retune_evaluate::generate::{
    Dialogue, Generated, Generation, Prompt, Stop, generate, unwatched,
};
use retune_evaluate::sampling::Sampling;

/// 0 → 1 → 2 → 3 → 4 → 4 …, each with probability 0.6, the rest spread evenly.
fn chain() -> Vec<Vec<f64>> {
    (0..5).map(|i| (0..5).map(|j| if j == (i + 1).min(4) { 0.6 } else { 0.1 }).collect()).collect()
}

fn prompts(tokens: &[&[u32]]) -> Vec<Prompt> {
    (0..).zip(tokens).map(|(i, tokens)| Prompt::new(tokens.to_vec(), Seed(3), i)).collect()
}

fn answer(tokens: &[u32], stop: Stop) -> Generated {
    Generated { tokens: tokens.to_vec(), stop }
}

#[test]
fn greedy_follows_the_chain_and_says_why_it_ends() {
    let model = bigram(&chain(), 6);
    let options = Generation { end_tokens: vec![3], max_new_tokens: 3, ..Generation::default() };
    let inputs = prompts(&[&[0], &[2, 2, 4], &[1, 1, 1, 4, 4], &[4, 4, 4, 4, 4, 0], &[2]]);
    let found = generate(&model.tuned(), inputs, &options, &mut unwatched).unwrap();
    let expected = [
        answer(&[1, 2], Stop::EndToken(3)),
        answer(&[4, 4, 4], Stop::Length),
        // Six positions in all.
        answer(&[4], Stop::Context),
        answer(&[], Stop::Context),
        answer(&[], Stop::EndToken(3)),
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_watcher_sees_each_token_and_may_end_its_answer() {
    let model = bigram(&chain(), 64);
    let options = Generation { max_new_tokens: 4, ..Generation::default() };
    let mut seen = Vec::new();
    let found = generate(&model.tuned(), prompts(&[&[0], &[2]]), &options, &mut |place, tokens| {
        seen.push((place, tokens.to_vec()));
        // A stop string "2 3" for the first prompt.
        if place == 0 && tokens.ends_with(&[2, 3]) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    let expected = [answer(&[1, 2, 3], Stop::Caller), answer(&[3, 4, 4, 4], Stop::Length)];
    assert_eq!(found, expected);
    let mine: Vec<&[u32]> =
        seen.iter().filter(|(place, _)| *place == 0).map(|(_, tokens)| &tokens[..]).collect();
    assert_eq!(mine, [&[1][..], &[1, 2], &[1, 2, 3]]);
    assert_eq!(seen.len(), 7);
}

/// The mean of one-hot tokens times a head of whole numbers, in plain arithmetic.
fn continue_average(n: usize, head: &[f32], prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let logit = |id: usize| -> f32 {
            tokens.iter().map(|token| head[id * n + *token as usize]).sum::<f32>()
        };
        let mut best = 0;
        for id in 1..n {
            if logit(id) > logit(best) {
                best = id;
            }
        }
        tokens.push(best as u32);
    }
    tokens.split_off(prompt.len())
}

#[test]
fn the_cache_holds_all_that_was_read() {
    // Whole numbers that give every sum its own value, so that rounding decides nothing.
    let n = 7;
    let head: Vec<f32> = (0..n * n).map(|i| ((i * 37 + i * i * 11) % 101) as f32).collect();
    let model = average(n, head.clone(), 64);
    let inputs: [&[u32]; 5] = [&[3], &[0, 1, 2, 3, 4, 5, 6], &[6, 6], &[2, 5, 1], &[4]];
    let options = Generation { max_new_tokens: 12, max_parallel: 3, ..Generation::default() };
    let found = generate(&model.tuned(), prompts(&inputs), &options, &mut unwatched).unwrap();
    for (input, found) in inputs.iter().zip(found) {
        assert_eq!(found.tokens, continue_average(n, &head, input, 12), "prompt {input:?}");
    }
}

/// Prompts of many lengths over a vocabulary of 23.
fn many() -> Vec<Vec<u32>> {
    (0..9_u32).map(|i| (0..=(i * 5 % 13)).map(|t| (t * 7 + i * 3) % 23).collect()).collect()
}

/// Answers of a random attention model to [`many`] prompts.
fn answers(sampling: Sampling, max_parallel: usize, max_read_tokens: usize) -> Vec<Generated> {
    let model = attention(23, 30);
    // Two end tokens, so that answers end at different times.
    let options = Generation {
        sampling,
        end_tokens: vec![5, 9],
        max_new_tokens: 20,
        max_parallel,
        max_read_tokens,
    };
    let inputs = (0..).zip(many()).map(|(i, tokens)| Prompt::new(tokens, Seed(8), i)).collect();
    generate(&model.tuned(), inputs, &options, &mut unwatched).unwrap()
}

#[test]
fn neighbours_change_no_answer() {
    let sampled = Sampling {
        top_k: Some(12),
        top_p: 0.95,
        repetition_penalty: 1.2,
        ..Sampling::at_temperature(0.9)
    };
    for sampling in [Sampling::greedy(), sampled] {
        let alone = answers(sampling, 1, 4096);
        let lengths: Vec<usize> = alone.iter().map(|answer| answer.tokens.len()).collect();
        assert!(lengths.iter().any(|n| *n > 3) && lengths.iter().any(|n| *n < 20), "{lengths:?}");
        for (max_parallel, max_read_tokens) in [(2, 4096), (4, 8), (16, 4096), (16, 1)] {
            let found = answers(sampling, max_parallel, max_read_tokens);
            assert_eq!(found, alone, "{max_parallel} at once, {max_read_tokens} tokens read");
        }
    }
}

#[test]
fn the_seed_and_only_the_seed_changes_a_draw() {
    let model = bigram(&vec![vec![0.2; 5]; 5], 64);
    let options = Generation {
        sampling: Sampling::at_temperature(1.0),
        max_new_tokens: 30,
        ..Generation::default()
    };
    let draw = |seed, number| {
        let prompt = Prompt::new(vec![0], Seed(seed), number);
        generate(&model.tuned(), vec![prompt], &options, &mut unwatched).unwrap()
    };
    assert_eq!(draw(1, 0), draw(1, 0));
    assert_ne!(draw(1, 0), draw(2, 0));
    assert_ne!(draw(1, 0), draw(1, 1));
}

#[test]
fn a_dialogue_answers_as_if_all_were_read_anew() {
    let model = attention(23, 60);
    let options = Generation { max_new_tokens: 6, end_tokens: vec![5], ..Generation::default() };
    let fresh = |tokens: &[u32]| {
        generate(&model.tuned(), prompts(&[tokens]), &options, &mut unwatched).unwrap().remove(0)
    };
    let mut dialogue = Dialogue::default();
    let mut text = vec![1, 2, 3];
    for turn in 0..4_u32 {
        let prompt = Prompt::new(text.clone(), Seed(3), 0);
        let found = dialogue.reply(&model.tuned(), prompt, &options, &mut unwatched).unwrap();
        assert_eq!(found, fresh(&text), "turn {turn}");
        text.extend(&found.tokens);
        text.extend([7, turn, 8]);
    }
    // Another beginning, the same dialogue again, and one that is nothing new.
    for text in [&[9, 9][..], &text, &text, &text[..4]] {
        let prompt = Prompt::new(text.to_vec(), Seed(3), 0);
        let found = dialogue.reply(&model.tuned(), prompt, &options, &mut unwatched).unwrap();
        assert_eq!(found, fresh(text), "{text:?}");
    }
}

#[test]
fn a_dialogue_reads_only_what_is_new() {
    // Only the token before counts, so every answer of three tokens is known.
    let model = bigram(&chain(), 64);
    let options = Generation { max_new_tokens: 3, ..Generation::default() };
    let mut dialogue = Dialogue::default();
    let mut reply = |text: &[u32]| {
        let prompt = Prompt::new(text.to_vec(), Seed(0), 0);
        dialogue.reply(&model.tuned(), prompt, &options, &mut unwatched).unwrap().tokens
    };
    assert_eq!(reply(&[0, 0, 0, 0]), [1, 2, 3]);
    // Four of the prompt, two of the answer: its last token tells nothing yet.
    assert_eq!(model.take_num_read(), 6);
    assert_eq!(reply(&[0, 0, 0, 0, 1, 2, 3, 0, 1]), [2, 3, 4]);
    // The answer's last token, two of the question, two of the new answer.
    assert_eq!(model.take_num_read(), 5);
    // A change near the start makes all twelve be read again, however long the rest is.
    assert_eq!(reply(&[0, 0, 0, 1, 1, 2, 3, 0, 1, 2, 3, 0]), [1, 2, 3]);
    assert_eq!(model.take_num_read(), 14);
    // Exactly what was read leaves no token to go on from: all fourteen again.
    assert_eq!(reply(&[0, 0, 0, 1, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]), [3, 4, 4]);
    assert_eq!(model.take_num_read(), 16);
}

#[test]
fn the_penalty_sees_prompt_and_answer() {
    let model = bigram(&chain(), 64);
    let sampling = Sampling { repetition_penalty: 10.0, ..Sampling::greedy() };
    let options = Generation { sampling, max_new_tokens: 7, ..Generation::default() };
    let found = generate(&model.tuned(), prompts(&[&[3]]), &options, &mut unwatched).unwrap();
    // ln 0.6 = -0.5 and ln 0.1 = -2.3; seen tokens have -5.1 and -23. After 4, which 4 would
    // follow, the first unseen one is best; after 2 all are seen, and the chain goes on. That a
    // token was seen twice does not count twice.
    assert_eq!(found[0].tokens, [4, 0, 1, 2, 3, 4, 4]);
}

#[test]
fn each_token_is_read_once() {
    let model = bigram(&chain(), 64);
    let options = Generation { max_new_tokens: 4, max_parallel: 2, ..Generation::default() };
    let inputs = prompts(&[&[0, 1, 0], &[2; 7], &[4]]);
    generate(&model.tuned(), inputs, &options, &mut unwatched).unwrap();
    assert_eq!(model.take_num_read(), (3 + 3) + (7 + 3) + (1 + 3));
}

#[test]
fn what_cannot_be_continued_is_said() {
    let model = bigram(&chain(), 4);
    let message = |inputs: &[&[u32]], options: &Generation| {
        generate(&model.tuned(), prompts(inputs), options, &mut unwatched).unwrap_err().to_string()
    };
    let plain = Generation::default();
    let error = message(&[&[0], &[]], &plain);
    assert!(error.contains("prompt 1") && error.contains("0 tokens"), "{error}");
    let error = message(&[&[0; 5]], &plain);
    assert!(error.contains("1 to 4 tokens") && error.contains("5 tokens"), "{error}");
    let error = message(&[&[0], &[7]], &plain);
    assert!(error.contains("row 1") && error.contains("below 5"), "{error}");
    let error = message(&[&[0]], &Generation { end_tokens: vec![5], ..plain.clone() });
    assert!(error.starts_with("end_tokens") && error.contains("below 5"), "{error}");
    let sampling = Sampling { top_p: 2.0, ..Sampling::greedy() };
    let error = message(&[&[0]], &Generation { sampling, ..plain.clone() });
    assert!(error.starts_with("top_p"), "{error}");

    let classifier = models::mean_of_rows(&[vec![0.0, 1.0]], true);
    let found = generate(&classifier.tuned(), prompts(&[&[0]]), &plain, &mut unwatched);
    assert!(found.unwrap_err().to_string().contains("TinyModel"));

    let broken = bigram(&vec![vec![f64::NAN; 5]; 5], 4);
    let found = generate(&broken.tuned(), prompts(&[&[0]]), &plain, &mut unwatched);
    assert!(found.unwrap_err().to_string().contains("NaN"));
}

#[test]
fn nothing_to_do_is_done_at_once() {
    let model = bigram(&chain(), 4);
    let options = Generation { max_new_tokens: 0, ..Generation::default() };
    let found = generate(&model.tuned(), prompts(&[&[0], &[1]]), &options, &mut unwatched);
    assert_eq!(found.unwrap(), [answer(&[], Stop::Length), answer(&[], Stop::Length)]);
    let found = generate(&model.tuned(), Vec::new(), &Generation::default(), &mut unwatched);
    assert_eq!(found.unwrap(), []);
}
