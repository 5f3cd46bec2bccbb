//! Loss masks: which tokens of a row are learned.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::tokenizer::{Encoded, Tokenizer};

/// Which tokens the loss counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossOn {
    /// What the assistant says, in every turn.
    #[default]
    Assistant,
    /// The last answer only.
    Completion,
    /// Everything.
    All,
}

/// A sequence with its mask, and what had to be done to make it right.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Masked {
    pub(crate) ids: Vec<u32>,
    pub(crate) learn: Vec<bool>,
    /// A second beginning-of-sequence token was removed.
    pub(crate) double_bos: bool,
    /// The end token was put behind the last learned turn, because nothing else ended it.
    pub(crate) appended_end: bool,
    /// Learned turns that no end token follows.
    pub(crate) missing_ends: usize,
    /// A learned token starts in text that is given: text and answer melt into one token.
    pub(crate) straddles: bool,
}

/// Builds the mask of a sequence whose learned text is given as byte ranges, in order.
///
/// A token that overlaps a range is learned. Each range is made to end with its end token: blank
/// tokens behind an end token are not learned, an end token right behind the range is, and where
/// there is none at the end of the sequence, the tokenizer's is appended.
pub(crate) fn mask(encoded: Encoded, ranges: &[Range<usize>], tokenizer: &Tokenizer) -> Masked {
    let Encoded { ids, bytes, .. } = encoded;
    let mut out = Masked { learn: vec![false; ids.len()], ids, ..Masked::default() };
    for range in ranges {
        // Tokens added around the text have empty ranges.
        let inside = |b: &Range<usize>| b.start < range.end && b.end > range.start && !b.is_empty();
        let start = bytes.iter().position(inside).unwrap_or_else(|| {
            let before = |b: &Range<usize>| b.end <= range.start && b.start < range.end.max(1);
            bytes.iter().rposition(before).map_or(0, |at| at + 1)
        });
        let stop = bytes.iter().rposition(inside).map_or(start, |last| last + 1);
        let melted = start < stop && bytes[start].start < range.start;
        out.straddles |= melted && !is_end(tokenizer, out.ids[start]);
        let stop = end_of_turn(&mut out, tokenizer, start, stop);
        out.learn[start..stop].fill(true);
    }
    remove_double_bos(&mut out, tokenizer);
    // Nothing comes before the first token to predict it from.
    if let Some(first) = out.learn.first_mut() {
        *first = false;
    }
    out
}

/// Finds where to stop learning a turn whose text stands at `start..stop`.
fn end_of_turn(out: &mut Masked, tokenizer: &Tokenizer, start: usize, stop: usize) -> usize {
    let blank = |id: u32| tokenizer.token_text(id).trim().is_empty();
    let ids = &out.ids;
    // Inside: templates put a line feed behind the end token, which nobody will ever generate.
    let ending = (start..stop).rev().find(|&at| !blank(ids[at]));
    if let Some(at) = ending.filter(|&at| is_end(tokenizer, ids[at])) {
        return at + 1;
    }
    // Right behind: generation marks often leave the end token out.
    let behind = (stop..ids.len()).find(|&at| !blank(ids[at]));
    if let Some(at) = behind.filter(|&at| is_end(tokenizer, ids[at])) {
        return at + 1;
    }
    match tokenizer.special().eos {
        Some(eos) if stop == ids.len() => {
            out.ids.push(eos);
            out.learn.push(true);
            out.appended_end = true;
            stop + 1
        }
        _ => {
            out.missing_ends += 1;
            stop
        }
    }
}

/// Special tokens end turns, whatever a format calls them; the one that begins a sequence does not,
/// unless it is the end token too.
fn is_end(tokenizer: &Tokenizer, id: u32) -> bool {
    let special = tokenizer.special();
    special.eos == Some(id) || (tokenizer.is_special(id) && special.bos != Some(id))
}

fn remove_double_bos(out: &mut Masked, tokenizer: &Tokenizer) {
    while let (Some(bos), [first, second, ..]) = (tokenizer.special().bos, out.ids.as_slice())
        && *first == bos
        && *second == bos
    {
        out.ids.remove(0);
        out.learn.remove(0);
        out.double_bos = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{byte_level, byte_level_with_bos};

    /// Encodes a text in which `«` and `»` mark what is learned, and shows the tokens, learned ones
    /// in brackets.
    fn shown(tokenizer: &Tokenizer, marked: &str, add_special: bool) -> (String, Masked) {
        let (mut text, mut ranges, mut open) = (String::new(), Vec::new(), 0);
        for c in marked.chars() {
            match c {
                '«' => open = text.len(),
                '»' => ranges.push(open..text.len()),
                c => text.push(c),
            }
        }
        let masked = mask(tokenizer.encode(&text, add_special).unwrap(), &ranges, tokenizer);
        let tokens = masked.ids.iter().zip(&masked.learn).map(|(&id, &learn)| {
            let text = tokenizer.token_text(id).replace('\n', "⏎");
            if learn { format!("[{text}]") } else { text }
        });
        (tokens.collect::<Vec<_>>().join("·"), masked)
    }

    #[test]
    fn only_the_answer_is_learned() {
        let (tokens, masked) = shown(
            &byte_level(),
            "<|im_start|>u\nhe<|im_end|>\n<|im_start|>a\n«hello w<|im_end|>»\n",
            false,
        );
        assert_eq!(
            tokens,
            "<|im_start|>·u·⏎·he·<|im_end|>·⏎·<|im_start|>·a·⏎·[hello]·[ w]·[<|im_end|>]·⏎"
        );
        assert_eq!(masked.missing_ends, 0);
        assert!(!masked.straddles && !masked.appended_end && !masked.double_bos);
    }

    // users-want 2.1.2
    #[test]
    fn the_end_token_is_learned_whether_the_span_holds_it_or_not() {
        let expected = "a·⏎·[he]·[<|im_end|>]·⏎·b";
        for marked in ["a\n«he<|im_end|>\n»b", "a\n«he<|im_end|>»\nb", "a\n«he»<|im_end|>\nb"]
        {
            assert_eq!(shown(&byte_level(), marked, false).0, expected, "{marked}");
        }
        // White space between answer and end token is learned with it.
        assert_eq!(shown(&byte_level(), "«he»\n<|im_end|>b", false).0, "he·[⏎]·[<|im_end|>]·b");
    }

    #[test]
    fn the_end_token_is_appended_where_nothing_ends_the_last_turn() {
        let (tokens, masked) = shown(&byte_level(), "a«he»", false);
        assert_eq!(tokens, "a·[he]·[<|im_end|>]");
        assert!(masked.appended_end);
        let (tokens, masked) = shown(&byte_level(), "a«he»b", false);
        assert_eq!(tokens, "a·[he]·b");
        assert_eq!((masked.appended_end, masked.missing_ends), (false, 1));
    }

    // users-want 2.1.3
    #[test]
    fn one_bos() {
        let (tokens, masked) = shown(&byte_level_with_bos(), "<s>«he<|im_end|>»", true);
        assert_eq!(tokens, "<s>·[he]·[<|im_end|>]");
        assert!(masked.double_bos);
        let (tokens, masked) = shown(&byte_level_with_bos(), "«he<|im_end|>»", true);
        assert_eq!(tokens, "<s>·[he]·[<|im_end|>]");
        assert!(!masked.double_bos);
    }

    #[test]
    fn a_token_across_the_border_is_learned_and_reported() {
        // " w" is one token, the blank is in the prompt.
        let (tokens, masked) = shown(&byte_level(), "a «w<|im_end|>»", false);
        assert_eq!(tokens, "a·[ w]·[<|im_end|>]");
        assert!(masked.straddles);
    }

    #[test]
    fn characters_of_several_tokens_are_learned_whole() {
        let (tokens, _) = shown(&byte_level(), "é«é<|im_end|>»", false);
        assert_eq!(tokens, "\u{fffd}·\u{fffd}·[\u{fffd}]·[\u{fffd}]·[<|im_end|>]");
    }

    #[test]
    fn the_first_token_is_never_learned() {
        assert_eq!(shown(&byte_level(), "«he<|im_end|>»", false).0, "he·[<|im_end|>]");
    }

    #[test]
    fn an_empty_answer_still_learns_to_stop() {
        for (marked, expected) in [
            ("a«»", "a·[<|im_end|>]"),
            ("a«»<|im_end|>b", "a·[<|im_end|>]·b"),
            ("a«<|im_end|>»", "a·[<|im_end|>]"),
            ("<s>«»", "<s>·[<|im_end|>]"),
        ] {
            assert_eq!(shown(&byte_level(), marked, false).0, expected, "{marked}");
        }
        let (tokens, masked) = shown(&byte_level(), "a«»b", false);
        assert_eq!((tokens.as_str(), masked.missing_ends), ("a·b", 1));
    }
}
