//! Losses, classes and vectors of models worked out by hand.

#![expect(clippy::unwrap_used, reason = "a test fails where a helper of it cannot go on")]

mod models;

use models::{bigram, mean_of_rows};
use retune_core::batch::{Batch, Document};
use retune_evaluate::validation::{classify, embed, validate};

fn text(tokens: &[u32], learn: &[u8]) -> Document {
    Document {
        tokens: tokens.to_vec(),
        learn: learn.iter().map(|l| *l == 1).collect(),
        ..Document::default()
    }
}

fn labelled(tokens: &[u32], class: Option<u32>, row: usize) -> Document {
    let learn = vec![false; tokens.len()];
    Document { tokens: tokens.to_vec(), learn, class, row, ..Document::default() }
}

fn batch(documents: &[Document]) -> Batch {
    Batch::new(documents).unwrap()
}

#[test]
fn every_learned_token_weighs_the_same() {
    let model = bigram(&[vec![0.25, 0.75], vec![0.5, 0.5]], 8);
    // Learned: 0 → 1 twice and 1 → 0 in the first batch, 0 → 0 in the second; the last has none.
    let batches = [
        batch(&[text(&[0, 1, 0, 1], &[1, 1, 1, 1])]),
        batch(&[text(&[1, 0, 0], &[0, 0, 1])]),
        batch(&[text(&[1, 1], &[0, 0])]),
    ];
    let found = validate(&model.tuned(), &batches).unwrap();
    let expected = -(0.75_f64.ln() * 2.0 + 0.5_f64.ln() + 0.25_f64.ln()) / 4.0;
    assert!((found.loss - expected).abs() < 1e-6, "{} {expected}", found.loss);
    assert!((found.perplexity() - expected.exp()).abs() < 1e-6);
    assert_eq!((found.num_labels, found.accuracy), (4, None));
    let error = validate(&model.tuned(), &batches[2..]).unwrap_err().to_string();
    assert!(error.contains("no label"), "{error}");
}

/// Logits of three tokens for two classes.
fn classifier() -> models::Tiny {
    mean_of_rows(&[vec![2.0, 0.0], vec![0.0, 2.0], vec![0.0, 0.0]], true)
}

#[test]
fn classes_are_those_of_the_highest_logit() {
    let model = classifier();
    // Means: (2, 0); (1, 1), where the first of equals wins; (0, 1).
    let first = batch(&[labelled(&[0], Some(0), 7), labelled(&[0, 1], Some(1), 8)]);
    let second = batch(&[labelled(&[1, 2], Some(1), 3), labelled(&[2], None, 4)]);
    let batches = [first, second];
    let found = classify(&model.tuned(), &batches).unwrap();
    let answers: Vec<(usize, u32, Option<u32>)> =
        found.iter().map(|answer| (answer.row, answer.class, answer.label)).collect();
    assert_eq!(answers, [(7, 0, Some(0)), (8, 0, Some(1)), (3, 1, Some(1)), (4, 0, None)]);
    let log_probabilities = &found[2].log_probabilities;
    let normaliser = (1.0 + 1_f64.exp()).ln();
    assert!((log_probabilities[0] + normaliser).abs() < 1e-6);
    assert!((log_probabilities[1] - (1.0 - normaliser)).abs() < 1e-6);

    let measured = validate(&model.tuned(), &batches).unwrap();
    let losses = [(1.0 + (-2_f64).exp()).ln(), 2_f64.ln(), normaliser - 1.0];
    assert!((measured.loss - losses.iter().sum::<f64>() / 3.0).abs() < 1e-6);
    assert_eq!(measured.num_labels, 3);
    assert!((measured.accuracy.unwrap() - 2.0 / 3.0).abs() < 1e-12);
}

#[test]
fn a_class_the_model_lacks_is_named() {
    let batches = [batch(&[labelled(&[0], Some(2), 12)])];
    let error = validate(&classifier().tuned(), &batches).unwrap_err().to_string();
    assert!(error.contains("row 12") && error.contains("below 2"), "{error}");
}

#[test]
fn vectors_come_with_their_rows() {
    let model = mean_of_rows(&[vec![1.0, 0.0, 4.0], vec![3.0, 2.0, 0.0]], false);
    let batches = [
        batch(&[labelled(&[0, 1], None, 5)]),
        batch(&[labelled(&[1], None, 2), labelled(&[0], None, 1)]),
    ];
    let found = embed(&model.tuned(), &batches).unwrap();
    let expected = [(5, vec![2.0, 1.0, 2.0]), (2, vec![3.0, 2.0, 0.0]), (1, vec![1.0, 0.0, 4.0])];
    assert_eq!(found, expected);
}

#[test]
fn a_measure_that_does_not_fit_the_head_is_refused() {
    let batches = [batch(&[labelled(&[0], Some(0), 0)])];
    let language = bigram(&[vec![0.5, 0.5], vec![0.5, 0.5]], 8);
    let vectors = mean_of_rows(&[vec![1.0, 0.0]], false);
    for error in [
        classify(&language.tuned(), &batches).unwrap_err(),
        embed(&language.tuned(), &batches).unwrap_err(),
        classify(&vectors.tuned(), &batches).unwrap_err(),
        validate(&vectors.tuned(), &batches).unwrap_err(),
        embed(&classifier().tuned(), &batches).unwrap_err(),
    ] {
        assert!(error.to_string().contains("is not supported"), "{error}");
    }
}
