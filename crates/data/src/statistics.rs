//! What a data set holds, counted: for `doctor`, reports and warnings.

use serde::{Deserialize, Serialize};

/// Counts over a prepared data set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Rows that can be trained on.
    pub rows: usize,
    /// Rows left out because they cannot be read.
    pub rows_broken: usize,
    /// Rows left out because no token of them would be learned.
    pub rows_without_learned_token: usize,
    /// Rows left out because they are too long.
    pub rows_too_long: usize,
    /// Rows whose end was cut off.
    pub rows_cut: usize,
    /// Rows whose cut took tokens to be learned.
    pub rows_cut_learned: usize,
    /// Tokens of all rows kept.
    pub tokens: u64,
    /// Learned tokens of all rows kept.
    pub learned_tokens: u64,
    /// Tokens cut off.
    pub tokens_cut: u64,
    /// Learned tokens cut off.
    pub learned_tokens_cut: u64,
    /// Tokens of the longest row kept.
    pub longest: usize,
    /// The line of the longest row kept.
    pub longest_line: usize,
    /// Tokens of the longest row before cutting, left-out rows included.
    pub longest_uncut: usize,
    /// Rows whose second beginning-of-sequence token was removed.
    pub double_bos: usize,
    /// Rows that got the end token because nothing ended them.
    pub appended_end: usize,
    /// Learned turns that no end token follows.
    pub turns_without_end: usize,
    /// Rows in which the last given character and the first learned one share a token.
    pub melted_borders: usize,
    /// Rows by length: entry `i` counts rows of `2^i` to `2^(i+1) - 1` tokens.
    pub lengths: Vec<usize>,
}

impl Statistics {
    /// Counts a row that was kept.
    pub(crate) fn count_kept(&mut self, tokens: usize, learned: usize, line: usize) {
        self.rows += 1;
        self.tokens += tokens as u64;
        self.learned_tokens += learned as u64;
        if tokens > self.longest {
            (self.longest, self.longest_line) = (tokens, line);
        }
        let bucket = tokens.max(1).ilog2() as usize;
        if self.lengths.len() <= bucket {
            self.lengths.resize(bucket + 1, 0);
        }
        self.lengths[bucket] += 1;
    }

    /// Adds the counts of further rows.
    pub(crate) fn absorb(&mut self, other: &Self) {
        self.rows += other.rows;
        self.rows_broken += other.rows_broken;
        self.rows_without_learned_token += other.rows_without_learned_token;
        self.rows_too_long += other.rows_too_long;
        self.rows_cut += other.rows_cut;
        self.rows_cut_learned += other.rows_cut_learned;
        self.tokens += other.tokens;
        self.learned_tokens += other.learned_tokens;
        self.tokens_cut += other.tokens_cut;
        self.learned_tokens_cut += other.learned_tokens_cut;
        if other.longest > self.longest {
            (self.longest, self.longest_line) = (other.longest, other.longest_line);
        }
        self.longest_uncut = self.longest_uncut.max(other.longest_uncut);
        self.double_bos += other.double_bos;
        self.appended_end += other.appended_end;
        self.turns_without_end += other.turns_without_end;
        self.melted_borders += other.melted_borders;
        if self.lengths.len() < other.lengths.len() {
            self.lengths.resize(other.lengths.len(), 0);
        }
        for (mine, theirs) in self.lengths.iter_mut().zip(&other.lengths) {
            *mine += theirs;
        }
    }

    /// The fraction of tokens that are learned, 0 to 1.
    pub fn learned_frac(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.learned_tokens as f64 / self.tokens as f64 }
    }

    /// What a person should know before training, most serious first.
    pub fn warnings(&self) -> Vec<String> {
        let mut out = Vec::new();
        let mut say = |count: usize, text: String| {
            if count > 0 {
                out.push(text);
            }
        };
        let rows = |n: usize| if n == 1 { "1 row".to_owned() } else { format!("{n} rows") };
        say(
            self.rows_without_learned_token,
            format!(
                "{} left out: no token of them would be learned",
                rows(self.rows_without_learned_token)
            ),
        );
        say(self.rows_broken, format!("{} skipped: they cannot be read", rows(self.rows_broken)));
        say(
            self.turns_without_end,
            format!(
                "{} learned turns have no end token behind them: the model may not learn to stop",
                self.turns_without_end
            ),
        );
        say(
            self.rows_too_long,
            format!(
                "{} left out: too long (the longest has {} tokens)",
                rows(self.rows_too_long),
                self.longest_uncut
            ),
        );
        say(
            self.rows_cut,
            format!(
                "{} cut: {} tokens lost, {} of them to be learned (the longest row has {} tokens)",
                rows(self.rows_cut),
                self.tokens_cut,
                self.learned_tokens_cut,
                self.longest_uncut
            ),
        );
        say(
            self.double_bos,
            format!(
                "{} began with two beginning-of-sequence tokens: one was removed",
                rows(self.double_bos)
            ),
        );
        say(
            self.melted_borders,
            format!(
                "in {} prompt and answer share a token: when the model is used, the prompt's end \
                 will be tokenised otherwise (does the prompt end with a blank?)",
                rows(self.melted_borders)
            ),
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_fall_into_powers_of_two() {
        let mut statistics = Statistics::default();
        for (tokens, line) in [(1, 1), (2, 2), (3, 3), (4, 4), (9, 5), (9, 6)] {
            let mut one = Statistics::default();
            one.count_kept(tokens, 1, line);
            statistics.absorb(&one);
        }
        assert_eq!(statistics.lengths, [1, 2, 1, 2]);
        assert_eq!((statistics.longest, statistics.longest_line), (9, 5));
        assert_eq!((statistics.rows, statistics.tokens), (6, 28));
        assert!((statistics.learned_frac() - 6.0 / 28.0).abs() < 1e-12);
        assert!(statistics.warnings().is_empty());
    }
}
