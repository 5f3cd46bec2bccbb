//! An input rounded to 8 bits.

/// Numbers that share a scale.
pub(super) const GROUP: usize = 32;
/// The largest magnitude of a rounded number; -128 is not used, so that signs can be turned.
const LARGEST: f32 = 127.0;

/// Thirty-two numbers, each `scale · integer`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct RoundedGroup {
    pub(super) integers: [i8; GROUP],
    pub(super) scale: f32,
    /// The scale times the sum of the integers: what a block's minimum is multiplied with.
    pub(super) sum: f32,
}

/// The rows of an input, each group of 32 numbers rounded to multiples of its own scale.
pub(super) struct Rounded {
    groups: Vec<RoundedGroup>,
    /// Groups in a row.
    width: usize,
}

impl Rounded {
    /// Rounds rows of `columns` numbers, a multiple of 32.
    ///
    /// A group with a number that is not finite gets a scale that makes its products NaN.
    pub(super) fn new(x: &[f32], columns: usize) -> Self {
        debug_assert!(columns.is_multiple_of(GROUP), "rows of blocks are whole groups");
        let groups = x.as_chunks().0.iter().map(round).collect();
        Self { groups, width: columns / GROUP }
    }

    pub(super) fn row(&self, index: usize) -> &[RoundedGroup] {
        &self.groups[index * self.width..][..self.width]
    }
}

fn round(group: &[f32; GROUP]) -> RoundedGroup {
    // As bits: magnitudes are ordered like numbers, and what is not finite is above all of them.
    let largest = group.iter().map(|x| x.to_bits() & !(1 << 31)).max().unwrap_or(0);
    let largest = f32::from_bits(largest);
    // Below this the inverse overflows; such a group is zero beside anything a model computes.
    let inverse = if largest < f32::MIN_POSITIVE * 64.0 { 0.0 } else { LARGEST / largest };
    let integers = group.map(|x| nearest(x * inverse));
    let sum: i32 = integers.iter().map(|integer| i32::from(*integer)).sum();
    let scale = largest / LARGEST;
    RoundedGroup { integers, scale, sum: scale * sum as f32 }
}

/// Rounds a number of at most ±127 to the nearest integer, ties to the even one.
///
/// Adding 1.5 · 2²³ leaves the integer in the lowest bits: the compiler makes vectors of this,
/// which it does not of a checked conversion.
fn nearest(x: f32) -> i8 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT).to_bits() as i8
}
