//! Reading a text piece by piece gives the logits of reading it whole.

#![expect(clippy::unwrap_used, reason = "a test fails where a helper of it cannot go on")]

mod models;

use models::attention;
use retune_core::batch::Batch;
use retune_core::kernels::Spans;
use retune_core::model::Output;
use retune_core::pass::{KeyValueCache, logit_rows};

/// Reads `parts[i]` of each document after `starts[i]` tokens, and returns all logits.
fn read(
    model: &models::Tiny,
    parts: &[&[u32]],
    starts: &[usize],
    cache: Option<&mut KeyValueCache>,
) -> Vec<Vec<f32>> {
    let tokens = parts.concat();
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let batch = Batch {
        spans: Spans::from_lengths(parts.iter().map(|part| part.len())),
        positions: parts.iter().zip(starts).flat_map(|(p, s)| *s..s + p.len()).collect(),
        token_types: None,
        targets: vec![None; tokens.len()],
        classes: vec![None; parts.len()],
        rows: (0..parts.len()).collect(),
        tokens,
    };
    model
        .tuned()
        .evaluate(&batch, cache, |pass, output| {
            let Output::States(states) = output else { unreachable!() };
            Ok(logit_rows(pass.logits(&states, &rows)?))
        })
        .unwrap()
}

fn assert_close(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (t, (found, expected)) in found.iter().zip(expected).enumerate() {
        for (id, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found - expected).abs() < 1e-5, "{what} [{t}, {id}]: {found} {expected}");
        }
    }
}

#[test]
fn pieces_give_the_logits_of_the_whole() {
    let model = attention(23, 40);
    let texts: Vec<Vec<u32>> =
        (0..3_u32).map(|i| (0..18 + 3 * i).map(|t| (t * (7 + i) + i) % 23).collect()).collect();
    let whole: Vec<Vec<Vec<f32>>> = texts.iter().map(|t| read(&model, &[t], &[0], None)).collect();
    let mut cache = KeyValueCache::default();
    // Three documents of different lengths, then single tokens and pieces longer than the window;
    // the second ends first, and the last two go on in the other order.
    let first = read(
        &model,
        &[&texts[0][..4], &texts[1][..9], &texts[2][..1]],
        &[0, 0, 0],
        Some(&mut cache),
    );
    assert_close(&first[..4], &whole[0][..4], "text 0, first");
    assert_close(&first[4..13], &whole[1][..9], "text 1, first");
    assert_close(&first[13..], &whole[2][..1], "text 2, first");
    cache.select(&[2, 0]);
    let mut done = [1, 4];
    for lengths in [[1, 1], [1, 7], [8, 1], [2, 3]] {
        let parts =
            [&texts[2][done[0]..done[0] + lengths[0]], &texts[0][done[1]..done[1] + lengths[1]]];
        let found = read(&model, &parts, &done, Some(&mut cache));
        assert_close(&found[..lengths[0]], &whole[2][done[0]..done[0] + lengths[0]], "text 2");
        assert_close(&found[lengths[0]..], &whole[0][done[1]..done[1] + lengths[1]], "text 0");
        done = [done[0] + lengths[0], done[1] + lengths[1]];
    }
    // A new document joins two that go on.
    let parts = [&texts[2][done[0]..], &texts[0][done[1]..], &texts[1][..]];
    let found = read(&model, &parts, &[done[0], done[1], 0], Some(&mut cache));
    let rest = texts[2].len() - done[0];
    assert_close(&found[..rest], &whole[2][done[0]..], "text 2, rest");
    assert_close(&found[found.len() - texts[1].len()..], &whole[1], "text 1, anew");
}
