//! Sentences of a made-up language, and an encoder that learned to fill their gaps.

use retune_core::batch::Document;
use retune_core::random::{Random, Seed};

use crate::Result;
use crate::encoder::{Encoder, Sizes};
use crate::lab::{Held, Lab, Pace, Values};

/// Words of the language.
pub(crate) const WORDS: usize = 64;

/// The word that stands for a gap.
const GAP: u32 = WORDS as u32;

/// A word without meaning, for what is put before a text.
pub(crate) const FILLER: u32 = WORDS as u32 + 1;

/// Two words that are no part of sentences, for tasks.
const KEYS: [u32; 2] = [WORDS as u32 + 2, WORDS as u32 + 3];

/// All of them.
pub(crate) const VOCABULARY: usize = WORDS + 4;

/// Draws a sentence: after each word one of four may follow, and once in ten any.
pub(crate) fn sentence(length: usize, random: &mut Random) -> Vec<u32> {
    let mut word = random.below(WORDS);
    let mut found = vec![word as u32];
    while found.len() < length {
        let any = random.below(10) == 0;
        word =
            if any { random.below(WORDS) } else { (word * 5 + 7 + 13 * random.below(4)) % WORDS };
        found.push(word as u32);
    }
    found
}

/// Draws a sentence with both key words in it, and says which comes first.
pub(crate) fn keyed(length: usize, random: &mut Random) -> (Vec<u32>, u32) {
    let mut words = sentence(length, random);
    let places = random.choose(length, 2);
    words[places[0]] = KEYS[0];
    words[places[1]] = KEYS[1];
    (words, u32::from(places[0] > places[1]))
}

/// Makes a document of words with a class.
pub(crate) fn document(words: Vec<u32>, class: u32, row: usize) -> Document {
    let learn = vec![false; words.len()];
    Document { tokens: words, learn, class: Some(class), row, ..Document::default() }
}

/// Makes an encoder's weights, drawn as PyTorch draws them, by masked modelling of `count` texts, its
/// head left out; a sixth of each text is gaps.
///
/// `length` is the longest text its positions are for.
///
/// # Errors
/// Those of training.
pub(crate) fn pretrained(
    sizes: Sizes,
    length: usize,
    count: usize,
    pace: Pace,
    seed: Seed,
    draw: impl Fn(&mut Random) -> Vec<u32>,
) -> Result<Values> {
    let mut documents = Vec::new();
    let mut targets = Vec::new();
    for row in 0..count {
        let mut random = seed.stream("sentence", &[row as u64]);
        let mut words = draw(&mut random);
        let length = words.len();
        let mut wanted = vec![None; length];
        for place in random.choose(length, length / 6) {
            wanted[place] = Some(words[place]);
            words[place] = GAP;
        }
        documents.push(document(words, 0, row));
        targets.push(wanted);
    }
    let model = Encoder::new(VOCABULARY, length, sizes, None);
    let mut lab = Lab::new(model, documents, seed).with_targets(targets);
    lab.set(Held::draw_as_pytorch(lab.model.spec(), seed));
    let rows: Vec<usize> = (0..count).collect();
    lab.pretrain(&rows, pace, seed)?;
    let mut values = lab.values().clone();
    values.remove("head.weight");
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nine_of_ten_words_follow_the_rule() {
        let mut random = Seed(1).stream("test", &[]);
        let mut right = 0;
        for _ in 0..500 {
            let words = sentence(12, &mut random);
            assert_eq!(words.len(), 12);
            let follows = |pair: &[u32]| {
                (0..4).any(|turn| (pair[0] * 5 + 7 + 13 * turn) % WORDS as u32 == pair[1])
            };
            right += words.windows(2).filter(|pair| follows(pair)).count();
        }
        let share = f64::from(right as u32) / (500.0 * 11.0);
        // Any word is one of the four in one of sixteen cases.
        assert!((share - (0.9 + 0.1 / 16.0)).abs() < 0.02, "{share}");
    }
}
