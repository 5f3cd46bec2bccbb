//! Rows to train on, the same on every machine.

use std::fmt::Write as _;

use serde_json::json;

/// Conversations of the case `chats`.
pub(super) const NUM_CHATS: usize = 500;

/// Everyday words of one token each in most vocabularies.
const WORDS: [&str; 16] = [
    "water", "house", "under", "the", "green", "river", "and", "people", "walked", "slowly",
    "because", "winter", "was", "near", "a", "mountain",
];

/// A linear congruence: only the spread of its numbers matters.
struct Random(u64);

impl Random {
    /// Draws from `[0, 1)`.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn words(&mut self, count: usize) -> String {
        let word = |_| WORDS[(self.uniform() * WORDS.len() as f64) as usize];
        (0..count).map(word).collect::<Vec<_>>().join(" ")
    }

    /// Draws from the standard normal distribution (Box and Muller).
    fn normal(&mut self) -> f64 {
        let (radius, angle) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }
}

/// Makes rows of `words` everyday words each, as JSON lines.
pub(super) fn texts(words: usize, labelled: bool) -> String {
    let mut random = Random(1);
    let mut text = String::new();
    for row in 0..256 {
        let label = if labelled { format!(", \"label\": \"{}\"", row % 2) } else { String::new() };
        let _ = writeln!(text, "{{\"text\": \"{}\"{label}}}", random.words(words));
    }
    text
}

/// Makes conversations as JSON lines of `messages`, with the lengths people's have.
///
/// Words of a conversation are log-normal, with a median of 140 and a spread of 1.0 on the natural
/// scale, cut to 12 to 900; one to three exchanges, of whose words the user's are a quarter.
/// (Public collections of assistants' conversations have medians of 100 to 200 words and spreads
/// of 0.9 to 1.2.)
pub(super) fn chats() -> String {
    let mut random = Random(1);
    let mut text = String::new();
    for _ in 0..NUM_CHATS {
        let words = (140.0 * random.normal().exp()).clamp(12.0, 900.0);
        let exchanges = 1 + (3.0 * random.uniform()) as usize;
        let each = words / exchanges as f64;
        let mut messages = Vec::new();
        for _ in 0..exchanges {
            let (asked, answered) = ((0.25 * each).ceil(), (0.75 * each).ceil());
            messages.push(json!({ "role": "user", "content": random.words(asked as usize) }));
            let answer = random.words(answered as usize);
            messages.push(json!({ "role": "assistant", "content": answer }));
        }
        let _ = writeln!(text, "{}", json!({ "messages": messages }));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn texts_are_json_lines() {
        for line in texts(300, true).lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            assert_eq!(row["text"].as_str().unwrap().split(' ').count(), 300);
            assert!(row["label"].is_string());
        }
    }

    #[test]
    fn chats_are_of_mixed_length() {
        let text = chats();
        let mut lengths = Vec::new();
        for line in text.lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            let messages = row["messages"].as_array().unwrap();
            assert!(messages.len().is_multiple_of(2) && messages.len() <= 6);
            assert_eq!(messages.last().unwrap()["role"], "assistant");
            let words = |m: &Value| m["content"].as_str().unwrap().split(' ').count();
            lengths.push(messages.iter().map(words).sum::<usize>());
        }
        lengths.sort_unstable();
        assert_eq!(lengths.len(), NUM_CHATS);
        assert!((120..160).contains(&lengths[250]), "{}", lengths[250]);
        assert!(lengths[50] < 60 && lengths[450] > 350, "{} {}", lengths[50], lengths[450]);
        assert_eq!(text, chats());
    }
}
