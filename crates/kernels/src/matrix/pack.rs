//! Copies parts of the factors into the order the tiles read them in.

use std::ops::Range;

use super::operand::{Operand, Term};
use super::scratch::Buffer;
use super::tile::{LANES, Tile, portable};

/// A part of one term's reduction, and the unit it starts at in a packed block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) term: usize,
    pub(crate) range: Range<usize>,
    pub(crate) unit: usize,
}

/// What is packed and multiplied at a time: pieces side by side.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Block {
    pub(crate) pieces: Vec<Piece>,
    /// Units the pieces take.
    pub(crate) used: usize,
    /// Units with the filling at the end.
    pub(crate) units: usize,
}

/// Cuts the reductions of all terms into blocks, short terms joined to their neighbour's end.
pub(crate) fn blocks<T: Tile>(terms: &[Term]) -> Vec<Block> {
    let width = if T::PAIRS { 2 } else { 1 };
    let mut blocks: Vec<Block> = Vec::new();
    for (index, term) in terms.iter().enumerate() {
        let granule = term.left.length_granule().max(term.right.length_granule());
        // Pairs never span two pieces, so pieces begin at even numbers.
        let granule = if granule.is_multiple_of(width) { granule } else { width * granule };
        let parts = term.length.div_ceil(T::BLOCK * width).max(1);
        let part = term.length.div_ceil(parts).next_multiple_of(granule);
        let mut from = 0;
        while from < term.length {
            let range = from..term.length.min(from + part);
            from = range.end;
            let units = range.len().div_ceil(width);
            match blocks.last_mut() {
                Some(block) if block.used + units <= capacity::<T>() => {
                    block.pieces.push(Piece { term: index, range, unit: block.used });
                    block.used += units;
                }
                _ => blocks.push(Block {
                    pieces: vec![Piece { term: index, range, unit: 0 }],
                    used: units,
                    units: 0,
                }),
            }
        }
    }
    for block in &mut blocks {
        block.units = block.used.next_multiple_of(T::UNIT_GRANULE);
        assert!(block.units <= T::DEPTH, "a block fits a packed tile");
    }
    blocks
}

fn capacity<T: Tile>() -> usize {
    T::DEPTH / T::UNIT_GRANULE * T::UNIT_GRANULE
}

/// Packs rows of the left factors: row `r` of the tile starts at unit `r * DEPTH`.
///
/// # Safety
/// The processor has the tile's instruction set.
pub(crate) unsafe fn left<T: Tile>(
    terms: &[Term],
    block: &Block,
    rows: Range<usize>,
    packed: &mut [u32],
) {
    for piece in &block.pieces {
        let k = piece.range.clone();
        for (row, packed) in rows.clone().zip(packed.chunks_exact_mut(T::DEPTH)) {
            let packed = &mut packed[piece.unit..];
            match terms[piece.term].left {
                Operand::Rows { values, stride } => {
                    let values = &values[row * stride..][k.clone()];
                    if T::PAIRS {
                        // SAFETY: as the caller promises.
                        unsafe { T::join(values, packed) }
                    } else {
                        packed[..values.len()].copy_from_slice(bytemuck::cast_slice(values));
                    }
                }
                Operand::Columns { values, stride } => {
                    let column = values[k.start * stride + row..].iter().step_by(stride);
                    let column = column.take(k.len()).copied();
                    if T::PAIRS {
                        gather_pairs(column, packed);
                    } else {
                        for (packed, value) in packed.iter_mut().zip(column) {
                            *packed = value.to_bits();
                        }
                    }
                }
                Operand::Frozen(_) | Operand::FrozenTransposed(_) => {
                    unreachable!("frozen matrices are right factors")
                }
            }
        }
    }
    for packed in packed.chunks_exact_mut(T::DEPTH).take(rows.len()) {
        packed[block.used..block.units].fill(0);
    }
}

fn gather_pairs(mut column: impl Iterator<Item = f32>, packed: &mut [u32]) {
    for packed in packed {
        let Some(low) = column.next() else { break };
        *packed = portable::round(low) | portable::round(column.next().unwrap_or(0.0)) << 16;
    }
}

/// Packs columns of the output from the right factors into panels of [`LANES`]; the last panel is
/// filled up with zeros.
///
/// # Safety
/// The processor has the tile's instruction set.
pub(crate) unsafe fn right<T: Tile>(
    terms: &[Term],
    block: &Block,
    lanes: Range<usize>,
    packed: &mut [u32],
    rows: &mut Buffer,
) {
    let panel = block.units * LANES;
    let packed = &mut packed[..lanes.len().div_ceil(LANES) * panel];
    for piece in &block.pieces {
        match terms[piece.term].right {
            right @ (Operand::Rows { .. } | Operand::Frozen(_)) => {
                let panels = packed.chunks_exact_mut(panel);
                for (panel, start) in panels.zip(lanes.clone().step_by(LANES)) {
                    let lanes = start..lanes.end.min(start + LANES);
                    // SAFETY: as the caller promises.
                    unsafe { panel_of_rows::<T>(right, piece, lanes, panel, rows) }
                }
            }
            right @ (Operand::Columns { .. } | Operand::FrozenTransposed(_)) => {
                // SAFETY: as the caller promises.
                unsafe { panels_of_columns::<T>(right, piece, lanes.clone(), packed, panel, rows) }
            }
        }
    }
    for packed in packed.chunks_exact_mut(panel) {
        packed[block.used * LANES..].fill(0);
    }
}

/// # Safety
/// The processor has the tile's instruction set.
unsafe fn panel_of_rows<T: Tile>(
    right: Operand,
    piece: &Piece,
    lanes: Range<usize>,
    panel: &mut [u32],
    scratch: &mut Buffer,
) {
    let k = piece.range.clone();
    let units = if T::PAIRS { k.len().div_ceil(2) } else { k.len() };
    // Numbers, units they become, and a row of zeros for lanes that do not exist.
    let scratch = scratch.at_least(k.len() + units * (LANES + 1));
    let (numbers, scratch) = scratch.split_at_mut(k.len());
    let numbers: &mut [f32] = bytemuck::cast_slice_mut(numbers);
    let (zeros, joined) = scratch.split_at_mut(units);
    zeros.fill(0);
    let mut rows = [zeros.as_ptr(); LANES];
    let joined = joined.chunks_exact_mut(units);
    for ((lane, pointer), joined) in lanes.zip(&mut rows).zip(joined) {
        let values: &[f32] = match right {
            Operand::Rows { values, stride } => &values[lane * stride..][k.clone()],
            Operand::Frozen(matrix) => match matrix.as_f32() {
                Some(values) => &values[lane * matrix.columns()..][k.clone()],
                None if T::PAIRS => {
                    matrix.decode(lane, k.clone(), numbers);
                    numbers
                }
                None => {
                    let row: &mut [f32] = bytemuck::cast_slice_mut(joined);
                    matrix.decode(lane, k.clone(), row);
                    *pointer = row.as_ptr().cast();
                    continue;
                }
            },
            Operand::Columns { .. } | Operand::FrozenTransposed(_) => {
                unreachable!("columns have a way of their own")
            }
        };
        if T::PAIRS {
            // SAFETY: as the caller promises.
            unsafe { T::join(values, joined) }
            *pointer = joined.as_ptr();
        } else {
            *pointer = values.as_ptr().cast();
        }
    }
    let panel = &mut panel[piece.unit * LANES..][..units * LANES];
    // SAFETY: every pointer leads to `units` units: a row of zeros, a row of `joined`, or `k.len()`
    // numbers where a unit is a number. The panel was cut to sixteen times as many.
    unsafe { T::transpose(&rows, units, panel.as_mut_ptr()) }
}

/// # Safety
/// The processor has the tile's instruction set.
unsafe fn panels_of_columns<T: Tile>(
    right: Operand,
    piece: &Piece,
    lanes: Range<usize>,
    packed: &mut [u32],
    panel: usize,
    scratch: &mut Buffer,
) {
    let width = lanes.len();
    let full = width.next_multiple_of(LANES);
    let scratch = scratch.at_least(2 * width + full);
    let (joined, scratch) = scratch.split_at_mut(full);
    joined.fill(0);
    let scratch: &mut [f32] = bytemuck::cast_slice_mut(scratch);
    let (first, second) = scratch.split_at_mut(width);
    let step = if T::PAIRS { 2 } else { 1 };
    for (unit, k) in piece.range.clone().step_by(step).enumerate() {
        let low = row(right, k, lanes.clone(), first);
        let units: &[u32] = if T::PAIRS {
            let high = (k + 1 < piece.range.end)
                .then(|| row(right, k + 1, lanes.clone(), &mut second[..width]));
            // SAFETY: as the caller promises.
            unsafe { T::join_rows(low, high, joined) }
            joined
        } else {
            bytemuck::cast_slice(low)
        };
        let at = (piece.unit + unit) * LANES;
        let (whole, rest) = units.as_chunks::<LANES>();
        for (from, packed) in whole.iter().zip(packed[at..].chunks_mut(panel)) {
            packed[..LANES].copy_from_slice(from);
        }
        if !rest.is_empty() {
            let packed = &mut packed[whole.len() * panel + at..][..LANES];
            packed[..rest.len()].copy_from_slice(rest);
            packed[rest.len()..].fill(0);
        }
    }
}

/// Reads row `k` of a factor whose outputs lie side by side.
fn row<'a>(right: Operand<'a>, k: usize, lanes: Range<usize>, into: &'a mut [f32]) -> &'a [f32] {
    match right {
        Operand::Columns { values, stride } => &values[k * stride..][lanes],
        Operand::FrozenTransposed(matrix) => match matrix.as_f32() {
            Some(values) => &values[k * matrix.columns()..][lanes],
            None => {
                matrix.decode(k, lanes, into);
                into
            }
        },
        Operand::Rows { .. } | Operand::Frozen(_) => unreachable!("rows have a way of their own"),
    }
}
