//! Likelihoods of models worked out by hand.

#![expect(clippy::unwrap_used, reason = "a test fails where a helper of it cannot go on")]

mod models;

use models::{attention, bigram};
use retune_core::batch::{Batch, Document};
use retune_core::model::Output;
use retune_core::pass::logit_rows;
use retune_evaluate::likelihood::{Budget, Request, log_likelihoods};
use retune_evaluate::perplexity::{self, Perplexity};

fn request(context: &[u32], continuation: &[u32]) -> Request {
    Request { context: context.to_vec(), continuation: continuation.to_vec(), task: None }
}

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() < 1e-6
}

/// Compares sums over tokens that other products computed in another order: the project promises
/// that a token's loss packed and unpacked differs by less than 1e-5.
fn as_promised(found: f64, expected: f64, num_tokens: usize) -> bool {
    (found - expected).abs() < 1e-5 * num_tokens as f64
}

/// After 0: 1 with 1/2, 2 with 1/4, 0 with 1/4. After 1: 2 with 3/4. After 2: 0 with 5/8.
fn table() -> Vec<Vec<f64>> {
    vec![vec![0.25, 0.5, 0.25], vec![0.125, 0.125, 0.75], vec![0.625, 0.25, 0.125]]
}

#[test]
fn a_continuation_has_the_product_of_its_probabilities() {
    let model = bigram(&table(), 16);
    let requests = [
        request(&[2, 0], &[1, 2, 0]),
        request(&[1], &[0]),
        request(&[0, 0], &[1, 1]),
        request(&[2], &[0]),
    ];
    let found = log_likelihoods(&model.tuned(), &requests, &Budget::default()).unwrap();
    let expected: [&[f64]; 4] = [&[0.5, 0.75, 0.625], &[0.125], &[0.5, 0.125], &[0.625]];
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.tokens.len(), expected.len());
        for (token, probability) in found.tokens.iter().zip(expected) {
            assert!(close(*token, probability.ln()), "{token} {probability}");
        }
        assert!(close(found.sum, expected.iter().product::<f64>().ln()));
        assert_eq!(found.num_cut, 0);
    }
    let greedy: Vec<bool> = found.iter().map(|likelihood| likelihood.is_greedy).collect();
    assert_eq!(greedy, [true, false, false, true]);
}

/// Scores one request by all logits of its whole sequence, the slow and obvious way.
fn slow(model: &models::Tiny, request: &Request) -> f64 {
    let tokens = [&request.context[..], &request.continuation].concat();
    let learn = vec![true; tokens.len()];
    let batch =
        Batch::new(&[Document { tokens: tokens.clone(), learn, ..Document::default() }]).unwrap();
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let logits = model
        .tuned()
        .evaluate(&batch, None, |pass, output| {
            let Output::States(states) = output else { unreachable!() };
            Ok(logit_rows(pass.logits(&states, &rows)?))
        })
        .unwrap();
    (request.context.len()..tokens.len())
        .map(|t| {
            let row: Vec<f64> = logits[t - 1].iter().map(|logit| f64::from(*logit)).collect();
            row[tokens[t] as usize] - row.iter().map(|logit| logit.exp()).sum::<f64>().ln()
        })
        .sum()
}

/// Requests of many lengths over a vocabulary of 23, some of which share their input.
fn many() -> Vec<Request> {
    let mut requests: Vec<Request> = (0..10_u32)
        .map(|i| {
            let context: Vec<u32> = (0..=(i * 3 % 7)).map(|t| (t * 5 + i) % 23).collect();
            let continuation: Vec<u32> = (0..=(i % 4)).map(|t| (t * 11 + i * 2) % 23).collect();
            request(&context, &continuation)
        })
        .collect();
    // Four letters after one question; then the same tokens, split elsewhere.
    requests.extend((0..4).map(|letter| request(&[4, 5, 6], &[letter])));
    requests.push(request(&[4], &[5, 6, 3]));
    requests
}

#[test]
fn batches_and_shared_inputs_change_nothing() {
    let model = attention(23, 32);
    let requests = many();
    let expected: Vec<f64> = requests.iter().map(|request| slow(&model, request)).collect();
    for budget in [
        Budget::default(),
        Budget { batch_tokens: 1, ..Budget::default() },
        Budget { batch_tokens: 20, logits: 50, ..Budget::default() },
        Budget { logits: 0, ..Budget::default() },
    ] {
        let found = log_likelihoods(&model.tuned(), &requests, &budget).unwrap();
        for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let num_tokens = requests[place].continuation.len();
            assert_eq!(found.tokens.len(), num_tokens);
            assert!(as_promised(found.sum, *expected, num_tokens), "{place}: {found:?} {expected}");
        }
    }
}

#[test]
fn the_letters_of_one_question_are_read_once() {
    let model = bigram(&table(), 16);
    let requests: Vec<Request> = (0..3).map(|letter| request(&[0, 1, 2, 1], &[letter])).collect();
    let found = log_likelihoods(&model.tuned(), &requests, &Budget::default()).unwrap();
    assert_eq!(model.take_num_read(), 4);
    for (found, probability) in found.iter().zip([0.125_f64, 0.125, 0.75]) {
        assert!(close(found.sum, probability.ln()));
    }
}

#[test]
fn contexts_lose_their_left_end() {
    let model = attention(23, 32);
    let long = request(&[1, 2, 3, 4, 5, 6, 7, 8], &[9, 10]);
    let budget = Budget { sequence_tokens: Some(6), ..Budget::default() };
    let found = log_likelihoods(&model.tuned(), &[long], &budget).unwrap().remove(0);
    // Six tokens are read: 4 to 8, and 9.
    assert_eq!(found.num_cut, 3);
    let expected = slow(&model, &request(&[4, 5, 6, 7, 8], &[9, 10]));
    assert!(as_promised(found.sum, expected, 2), "{found:?} {expected}");
}

#[test]
fn what_cannot_be_scored_is_said() {
    let model = bigram(&table(), 4);
    let message = |list: &[Request]| {
        log_likelihoods(&model.tuned(), list, &Budget::default()).unwrap_err().to_string()
    };
    let good = request(&[0], &[1]);
    let error = message(&[good.clone(), request(&[], &[1])]);
    assert!(error.contains("request 1"), "{error}");
    assert!(message(&[request(&[1], &[])]).contains("request 0"));
    let error = message(&[good.clone(), request(&[0], &[3])]);
    assert!(error.contains("request 1") && error.contains("below 3"), "{error}");
    let error = message(&[request(&[0], &[1; 5])]);
    assert!(error.contains("at most 4") && error.contains("5 tokens"), "{error}");
    let error = message(&[good, request(&[9], &[1])]);
    assert!(error.contains("row 1") && error.contains("below 3"), "{error}");
    let encoder = models::mean_of_rows(&[vec![0.0, 1.0]], false);
    assert!(log_likelihoods(&encoder.tuned(), &[], &Budget::default()).is_err());
}

#[test]
fn the_perplexity_of_a_bigram_is_exact() {
    let model = bigram(&table(), 3);
    // 0 → 1 → 2 → 0 → 2 and 2 → 2: 1/2, 3/4, 5/8, 1/4; 1/8. Windows of 3 lose nothing here, for
    // only the token before counts.
    let texts = [vec![1, 2, 0, 2], vec![], vec![2, 2]];
    let budget = Budget { batch_tokens: 5, ..Budget::default() };
    let found = perplexity::documents(&model.tuned(), &texts, Some(0), 1, &budget).unwrap();
    let first = (0.5 * 0.75 * 0.625 * 0.25_f64).ln();
    let last = (0.25 * 0.125_f64).ln();
    assert!(close(found[0].log_likelihood, first) && found[0].num_tokens == 4);
    assert_eq!(found[1], Perplexity::default());
    assert!(close(found[2].log_likelihood, last) && found[2].num_tokens == 2);
    let all = found.into_iter().fold(Perplexity::default(), Perplexity::and);
    assert!(close(all.per_token(), (-(first + last) / 6.0).exp()));

    let found = perplexity::documents(&model.tuned(), &texts, None, 1, &budget).unwrap();
    assert!(close(found[0].log_likelihood, first - 0.5_f64.ln()) && found[0].num_tokens == 3);
}

#[test]
fn an_overlap_gives_later_windows_their_context() {
    let model = attention(23, 32);
    let text: Vec<u32> = (0..20).map(|t| (t * 9 + 4) % 23).collect();
    let score = |overlap, longest| {
        let budget = Budget { sequence_tokens: longest, ..Budget::default() };
        let list = [text.clone()];
        perplexity::documents(&model.tuned(), &list, Some(1), overlap, &budget).unwrap()[0]
    };
    let expected = |overlap| -> f64 {
        let cut = perplexity::windows(&text, Some(1), 8, overlap).unwrap();
        cut.iter().map(|window| slow(&model, window)).sum()
    };
    let (disjoint, overlapping) = (score(1, Some(8)), score(6, Some(8)));
    assert!(as_promised(disjoint.log_likelihood, expected(1), 20));
    assert!(as_promised(overlapping.log_likelihood, expected(6), 20));
    assert!((disjoint.log_likelihood - overlapping.log_likelihood).abs() > 0.01);
    assert_eq!((disjoint.num_tokens, overlapping.num_tokens), (20, 20));
    let whole = slow(&model, &request(&[1], &text));
    assert!(as_promised(score(1, None).log_likelihood, whole, 20));
}

#[test]
fn an_unknown_last_token_is_found() {
    let model = bigram(&table(), 8);
    let texts = [vec![0, 1, 3]];
    let found =
        perplexity::documents(&model.tuned(), &texts, Some(0), 1, &Budget::default()).unwrap_err();
    assert!(found.to_string().contains("below 3"), "{found}");
}
