//! Golomb codes of sparse signs: where a vector is not zero, and which entries are negative.
//!
//! The gaps between the places of the rarer kind (non-zeros, or zeros once more than half of the
//! entries are not zero) follow a geometric law, for which the code of Golomb (1966) with the
//! modulus of Gallager and van Voorhis (1975) is the best prefix code. With the signs, it takes at
//! most 1 % more than the entropy where up to 30 % or just half of the entries are not zero, and 3 %
//! at its worst, near 38 %.
//!
//! | stream | bits, lowest of each byte first |
//! |---|---|
//! | gaps | per place: `gap / m` zeros and a one, then `gap % m` in truncated binary |
//! | signs | one bit per non-zero entry, in order; 1 is negative |
//!
//! A gap counts the entries of the other kind since the place before. Truncated binary takes
//! `k = ceil(log2 m)` bits, of which the first `k - 1` come as a number `x`, lowest bit first; where
//! `x < 2^k - m` the remainder is `x` and the last bit is left out, else the last bit `b` follows
//! and the remainder is `2x + b - (2^k - m)`. Each stream is filled up to a byte with zeros.

/// Largest modulus; it keeps every remainder within 32 bits.
const MAX_MODULUS: u32 = 1 << 31;

/// How the signs of one tensor are coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coding {
    /// Entries, zero or not.
    pub len: usize,
    /// Entries that are not zero.
    pub num_nonzero: usize,
    /// The modulus of the gaps' code.
    pub modulus: u32,
    /// Bytes of the stream of gaps.
    pub gap_bytes: usize,
}

/// Why a stream cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The modulus is outside of its range.
    #[error("its modulus is {0}, it must be from 1 to {MAX_MODULUS}")]
    Modulus(u32),
    /// More entries are said to be non-zero than there are.
    #[error("{0} of {1} entries are said not to be zero")]
    Count(usize, usize),
    /// The stream has another length than its coding says.
    #[error("its streams take {expected} bytes, got {got}")]
    Length {
        /// Bytes by the coding.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// The gaps end before the last place.
    #[error("the gaps end after {found} of {expected} places")]
    Truncated {
        /// Places decoded.
        found: usize,
        /// Places announced.
        expected: usize,
    },
    /// A place lies beyond the last entry.
    #[error("place {0} lies beyond the last entry")]
    Beyond(usize),
    /// Bits follow the last code.
    #[error("bits follow the last code; the stream was not written by this code or is damaged")]
    Trailing,
}

impl Coding {
    /// Returns the bytes of both streams.
    pub fn num_bytes(&self) -> usize {
        self.gap_bytes.saturating_add(self.num_nonzero.div_ceil(8))
    }

    /// Tells whether the gaps lead from zero to zero, because those are the rarer kind.
    fn codes_zeros(&self) -> bool {
        self.num_nonzero > self.len / 2
    }

    fn num_places(&self) -> usize {
        if self.codes_zeros() { self.len - self.num_nonzero } else { self.num_nonzero }
    }

    /// Checks what can be checked without the streams.
    ///
    /// # Errors
    /// [`StreamError`] for an impossible modulus or count.
    pub fn check(&self) -> Result<(), StreamError> {
        if !(1..=MAX_MODULUS).contains(&self.modulus) {
            return Err(StreamError::Modulus(self.modulus));
        }
        if self.num_nonzero > self.len {
            return Err(StreamError::Count(self.num_nonzero, self.len));
        }
        Ok(())
    }
}

/// Returns the fewest bits any code of independent signs can take: `len` entries of which
/// `num_nonzero` are not zero, either sign equally likely.
///
/// # Examples
/// ```
/// # use retune_files::golomb::entropy_bits;
/// // Half of the entries are zero (1 bit each), the others have a sign (1 bit more).
/// assert_eq!(entropy_bits(8, 4), 12.0);
/// assert_eq!(entropy_bits(8, 0), 0.0);
/// ```
pub fn entropy_bits(len: u64, num_nonzero: u64) -> f64 {
    let (len, ones) = (len as f64, num_nonzero as f64);
    let part = |count: f64| if count > 0.0 { -count * (count / len).log2() } else { 0.0 };
    part(ones) + part(len - ones) + ones
}

/// Returns the best modulus where `num_places` of `len` entries are coded.
///
/// The least `m` with `(1 - p)^m + (1 - p)^(m + 1) <= 1`.
pub fn best_modulus(len: usize, num_places: usize) -> u32 {
    if num_places == 0 || len == 0 {
        return 1;
    }
    let p = num_places as f64 / len as f64;
    if p >= 1.0 {
        return 1;
    }
    let modulus = (-(2.0 - p).ln() / (-p).ln_1p()).ceil();
    modulus.clamp(1.0, f64::from(MAX_MODULUS)) as u32
}

/// Encodes signs: any negative number is a minus, any positive one a plus.
///
/// # Examples
/// ```
/// # use retune_files::golomb::{decode, encode};
/// let (coding, bytes) = encode(&[0, 0, 1, 0, -1, 0, 0, 0]);
/// let mut found = Vec::new();
/// decode(&coding, &bytes, |place, negative| found.push((place, negative)))?;
/// assert_eq!(found, [(2, false), (4, true)]);
/// # Ok::<(), retune_files::golomb::StreamError>(())
/// ```
pub fn encode(signs: &[i8]) -> (Coding, Vec<u8>) {
    let len = signs.len();
    let num_nonzero = signs.iter().filter(|sign| **sign != 0).count();
    let mut coding = Coding { len, num_nonzero, modulus: 1, gap_bytes: 0 };
    coding.modulus = best_modulus(len, coding.num_places());
    let code = Code::new(coding.modulus);
    let zeros = coding.codes_zeros();
    let mut gaps = BitWriter::default();
    let mut minus = BitWriter::default();
    let mut next = 0;
    for (place, sign) in signs.iter().enumerate() {
        if (*sign == 0) == zeros {
            code.write((place - next) as u64, &mut gaps);
            next = place + 1;
        }
        if *sign != 0 {
            minus.put(u64::from(*sign < 0), 1);
        }
    }
    let mut bytes = gaps.finish();
    coding.gap_bytes = bytes.len();
    bytes.extend(minus.finish());
    (coding, bytes)
}

/// Decodes signs, giving the place and the sign of every entry that is not zero, in order.
///
/// # Errors
/// [`StreamError`] if the bytes are not what [`encode`] makes for such a coding. Places given
/// before the error was found lie inside all the same.
pub fn decode(
    coding: &Coding,
    bytes: &[u8],
    mut visit: impl FnMut(usize, bool),
) -> Result<(), StreamError> {
    coding.check()?;
    let expected = coding.num_bytes();
    if bytes.len() != expected {
        return Err(StreamError::Length { expected, got: bytes.len() });
    }
    let (gaps, minus) = bytes.split_at(coding.gap_bytes);
    let (mut gaps, mut minus) = (BitReader::new(gaps), SignReader::new(minus));
    let code = Code::new(coding.modulus);
    let (zeros, num_places) = (coding.codes_zeros(), coding.num_places());
    let mut next = 0;
    for found in 0..num_places {
        let left = coding.len - next;
        let gap = match code.read(&mut gaps, left as u64) {
            Gap::Of(gap) if (gap as usize) < left => gap as usize,
            Gap::End => return Err(StreamError::Truncated { found, expected: num_places }),
            Gap::Of(_) | Gap::TooLong => return Err(StreamError::Beyond(coding.len)),
        };
        let place = next + gap;
        if zeros {
            for between in next..place {
                visit(between, minus.next());
            }
        } else {
            visit(place, minus.next());
        }
        next = place + 1;
    }
    if zeros {
        for rest in next..coding.len {
            visit(rest, minus.next());
        }
    }
    if gaps.is_at_end() && minus.is_at_end() { Ok(()) } else { Err(StreamError::Trailing) }
}

/// One gap as it was read.
enum Gap {
    Of(u64),
    End,
    TooLong,
}

/// The code of one modulus.
#[derive(Clone, Copy)]
struct Code {
    modulus: u64,
    /// Bits every remainder has: `ceil(log2 m) - 1`, or 0.
    bits: u32,
    /// Remainders below this one have no further bit.
    short: u64,
}

impl Code {
    fn new(modulus: u32) -> Self {
        let modulus = u64::from(modulus.max(1));
        let width = 64 - (modulus - 1).leading_zeros();
        Self { modulus, bits: width.saturating_sub(1), short: (1 << width) - modulus }
    }

    fn write(self, gap: u64, out: &mut BitWriter) {
        let (mut quotient, remainder) = (gap / self.modulus, gap % self.modulus);
        while quotient >= 32 {
            out.put(0, 32);
            quotient -= 32;
        }
        out.put(1 << quotient, quotient as u32 + 1);
        if self.modulus == 1 {
            return;
        }
        if remainder < self.short {
            out.put(remainder, self.bits);
        } else {
            let shifted = remainder + self.short;
            out.put(shifted >> 1, self.bits);
            out.put(shifted & 1, 1);
        }
    }

    /// Reads a gap; gives up once it is longer than `limit`.
    #[inline]
    fn read(self, bits: &mut BitReader<'_>, limit: u64) -> Gap {
        let mut quotient = 0u64;
        loop {
            let zeros = bits.peek().trailing_zeros();
            if zeros < BitReader::SURE {
                quotient += u64::from(zeros);
                bits.at += zeros as usize + 1;
                break;
            }
            quotient += u64::from(BitReader::SURE);
            bits.at += BitReader::SURE as usize;
            if bits.is_past_end() {
                return Gap::End;
            }
            if quotient > limit {
                return Gap::TooLong;
            }
        }
        let mut remainder = 0;
        if self.modulus > 1 {
            let window = bits.peek();
            let first = window & ((1 << self.bits) - 1);
            let long = first >= self.short;
            let last = (window >> self.bits) & 1;
            remainder = if long { 2 * first + last - self.short } else { first };
            bits.at += self.bits as usize + usize::from(long);
        }
        if bits.is_past_end() {
            return Gap::End;
        }
        // Both factors are below 2^58 and 2^32 only in hostile files, hence the check.
        match quotient.checked_mul(self.modulus).and_then(|whole| whole.checked_add(remainder)) {
            Some(gap) => Gap::Of(gap),
            None => Gap::TooLong,
        }
    }
}

#[derive(Default)]
struct BitWriter {
    bytes: Vec<u8>,
    held: u64,
    num_held: u32,
}

impl BitWriter {
    /// Appends the lowest `count` bits of a value that has no others; at most 33.
    fn put(&mut self, value: u64, count: u32) {
        self.held |= value << self.num_held;
        self.num_held += count;
        if self.num_held >= 32 {
            self.bytes.extend_from_slice(&(self.held as u32).to_le_bytes());
            self.held >>= 32;
            self.num_held -= 32;
        }
    }

    fn finish(mut self) -> Vec<u8> {
        // After a `put` of 33 bits on 31 held ones, 32 remain: a word, not a tail.
        let tail = self.held.to_le_bytes();
        self.bytes.extend_from_slice(&tail[..self.num_held.div_ceil(8) as usize]);
        self.bytes
    }
}

struct BitReader<'a> {
    bytes: &'a [u8],
    /// The next bit.
    at: usize,
}

impl<'a> BitReader<'a> {
    /// Bits a look ahead always shows.
    const SURE: u32 = 57;

    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Looks at the next bits; zeros follow the end.
    #[inline]
    fn peek(&self) -> u64 {
        let byte = self.at >> 3;
        let word = match self.bytes.get(byte..).and_then(|rest| rest.first_chunk::<8>()) {
            Some(word) => u64::from_le_bytes(*word),
            None => self.peek_tail(byte),
        };
        word >> (self.at & 7)
    }

    #[cold]
    fn peek_tail(&self, byte: usize) -> u64 {
        let rest = self.bytes.get(byte..).unwrap_or_default();
        let mut word = [0; 8];
        word[..rest.len()].copy_from_slice(rest);
        u64::from_le_bytes(word)
    }

    fn is_past_end(&self) -> bool {
        self.at > 8 * self.bytes.len()
    }

    /// Tells whether only the zeros that fill the last byte are left.
    fn is_at_end(&self) -> bool {
        self.at.div_ceil(8) == self.bytes.len() && self.peek() == 0
    }
}

/// The stream of signs: whole words, one bit taken at a time.
struct SignReader<'a> {
    bits: BitReader<'a>,
    word: u64,
    left: u32,
}

impl<'a> SignReader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bits: BitReader::new(bytes), word: 0, left: 0 }
    }

    #[inline]
    fn next(&mut self) -> bool {
        if self.left == 0 {
            self.word = self.bits.peek();
            self.bits.at += 56;
            self.left = 56;
        }
        let bit = self.word & 1 == 1;
        self.word >>= 1;
        self.left -= 1;
        bit
    }

    fn is_at_end(&self) -> bool {
        // The length was checked before the first sign, only the filling is left.
        let at = self.bits.at - self.left as usize;
        BitReader { bytes: self.bits.bytes, at }.is_at_end()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn signs(coding: &Coding, bytes: &[u8]) -> Result<Vec<i8>, StreamError> {
        let mut out = vec![0; coding.len];
        decode(coding, bytes, |place, minus| out[place] = if minus { -1 } else { 1 })?;
        Ok(out)
    }

    #[test]
    fn a_stream_worked_out_by_hand() {
        // Two of eight: p = 1/4, m = ceil(ln(7/4) / ln(4/3)) = ceil(1.945) = 2, so k = 1 and no
        // remainder is short. Gaps 2 and 1. 2 = 1·2 + 0: `0 1`, then `0`; 1 = 0·2 + 1: `1`, then
        // `1`. The bits 0 1 0 1 1, lowest first, are 0b11010; the signs + and - are 0b10.
        let (coding, bytes) = encode(&[0, 0, 1, 0, -1, 0, 0, 0]);
        assert_eq!(coding, Coding { len: 8, num_nonzero: 2, modulus: 2, gap_bytes: 1 });
        assert_eq!(bytes, [0b11010, 0b10]);
    }

    #[test]
    fn truncated_binary_of_three() {
        // m = 3: k = 2, one short remainder. 0 -> `0`; 1 -> x = 1, b = 0; 2 -> x = 1, b = 1.
        let code = Code::new(3);
        assert_eq!((code.bits, code.short), (1, 1));
        let mut out = BitWriter::default();
        for gap in [0, 1, 2, 3] {
            code.write(gap, &mut out);
        }
        // `1 0`, `1 1 0`, `1 1 1`, `0 1 0`.
        assert_eq!(out.finish(), [0b1110_1101, 0b010]);
    }

    #[test]
    fn moduli_are_those_of_the_literature() {
        // Gallager and van Voorhis: 1 down to p = 0.382, then 2 down to 0.245, 3 down to 0.181.
        for (places, modulus) in [(500, 1), (383, 1), (381, 2), (246, 2), (244, 3), (182, 3)] {
            assert_eq!(best_modulus(1000, places), modulus, "{places}");
        }
        // p = 0.05: ln(1.95) / -ln(0.95) = 13.02.
        assert_eq!(best_modulus(1000, 50), 14);
        assert_eq!((best_modulus(5, 0), best_modulus(5, 5), best_modulus(0, 0)), (1, 1, 1));
    }

    /// A generator good enough for places, without a dependency.
    fn random_signs(len: usize, density: f64, mut state: u64) -> Vec<i8> {
        let mut draw = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as f64 / (1u64 << 31) as f64
        };
        (0..len)
            .map(|_| {
                if draw() >= density {
                    0
                } else if draw() < 0.5 {
                    -1
                } else {
                    1
                }
            })
            .collect()
    }

    #[test]
    fn streams_are_near_the_entropy() {
        for (density, limit) in [
            (0.001, 0.01),
            (0.01, 0.01),
            (0.05, 0.01),
            (0.1, 0.01),
            (0.2, 0.01),
            (0.3, 0.01),
            (0.5, 0.01),
            (0.7, 0.01),
            (0.9, 0.01),
            (1.0, 1e-9),
            // The worst there is.
            (0.382, 0.031),
            (0.618, 0.027),
        ] {
            let signs = random_signs(400_000, density, 7);
            let (coding, bytes) = encode(&signs);
            let bound = entropy_bits(coding.len as u64, coding.num_nonzero as u64) / 8.0;
            let over = bytes.len() as f64 / bound - 1.0;
            assert!(over < limit && over > -0.01, "density {density}: {:.2} % over", over * 100.0);
        }
    }

    #[test]
    fn all_and_nothing() {
        for signs_in in [vec![], vec![0; 1000], vec![1; 1000], vec![-1; 3], vec![0, -1], vec![1]] {
            let (coding, bytes) = encode(&signs_in);
            assert_eq!(signs(&coding, &bytes), Ok(signs_in));
        }
        // Nothing but signs; nothing at all.
        assert_eq!(encode(&[1; 1000]).1.len(), 125);
        assert!(encode(&[0; 1000]).1.is_empty());
    }

    #[test]
    fn a_gap_longer_than_a_word_is_kept() {
        let mut long = vec![0i8; 100_000];
        long[0] = 1;
        long[1] = 1;
        long[2] = 1;
        long[99_999] = -1;
        // A modulus far too small makes a unary part of thousands of bits.
        let (mut coding, _) = encode(&long);
        coding.modulus = 3;
        let code = Code::new(3);
        let (mut gaps, mut minus) = (BitWriter::default(), BitWriter::default());
        for gap in [0, 0, 0, 99_996] {
            code.write(gap, &mut gaps);
        }
        minus.put(0b1000, 4);
        let mut bytes = gaps.finish();
        coding.gap_bytes = bytes.len();
        bytes.extend(minus.finish());
        assert_eq!(signs(&coding, &bytes), Ok(long));
    }

    #[test]
    fn damage_is_refused() {
        let signs_in = random_signs(1000, 0.1, 3);
        let (coding, bytes) = encode(&signs_in);
        let short = &bytes[..bytes.len() - 1];
        assert!(matches!(signs(&coding, short), Err(StreamError::Length { .. })));
        // The gaps cut short, the length adjusted to it.
        let mut cut = bytes.clone();
        cut.drain(coding.gap_bytes - 3..coding.gap_bytes);
        let cut_coding = Coding { gap_bytes: coding.gap_bytes - 3, ..coding };
        assert!(matches!(signs(&cut_coding, &cut), Err(StreamError::Truncated { .. })));
        let small = Coding { len: 500, ..coding };
        assert!(matches!(signs(&small, &bytes), Err(StreamError::Beyond(500))));
        let count = Coding { len: 5, num_nonzero: 6, ..coding };
        assert_eq!(signs(&count, &bytes), Err(StreamError::Count(6, 5)));
        let modulus = Coding { modulus: 0, ..coding };
        assert_eq!(signs(&modulus, &bytes), Err(StreamError::Modulus(0)));
        let mut filled = bytes.clone();
        filled.push(0);
        let longer = Coding { gap_bytes: coding.gap_bytes + 1, ..coding };
        let mut shifted = bytes[..coding.gap_bytes].to_vec();
        shifted.push(0);
        shifted.extend_from_slice(&bytes[coding.gap_bytes..]);
        assert_eq!(signs(&longer, &shifted), Err(StreamError::Trailing));
        // A bit in the filling of the signs.
        let mut stray = bytes.clone();
        let spare = 8 * (bytes.len() - coding.gap_bytes) - coding.num_nonzero;
        if spare > 0 {
            *stray.last_mut().unwrap() |= 0x80;
            assert_eq!(signs(&coding, &stray), Err(StreamError::Trailing));
        }
    }

    proptest! {
        #[test]
        fn signs_survive(
            density in 0.0f64..=1.0, len in 0usize..3000, seed in any::<u64>(),
        ) {
            let signs_in = random_signs(len, density, seed);
            let (coding, bytes) = encode(&signs_in);
            prop_assert_eq!(bytes.len(), coding.num_bytes());
            prop_assert_eq!(signs(&coding, &bytes), Ok(signs_in));
        }

        /// Any bytes decode or are refused, and what decodes has no other stream.
        #[test]
        fn any_bytes_are_decoded_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
            len in 0usize..400, num_nonzero in 0usize..400, modulus in 0u32..40,
            gap_bytes in 0usize..64,
        ) {
            let coding = Coding { len, num_nonzero, modulus, gap_bytes };
            if let Ok(found) = signs(&coding, &bytes) {
                prop_assert_eq!(found.iter().filter(|s| **s != 0).count(), num_nonzero);
                let (best, again) = encode(&found);
                if best.modulus == modulus {
                    prop_assert_eq!(again, bytes);
                }
            }
        }
    }
}
