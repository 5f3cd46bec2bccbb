//! Copies parts of the factors into the order the tiles read them in.

use std::ops::Range;

use half::bf16;

use super::operand::{Operand, Term};
use super::scratch::Buffer;
use super::tile::{LANES, Run, Tile};

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

impl Block {
    /// Cache lines between the parts of a packed right panel, and between its panels: odd, so that
    /// those written and read at the same time lie in different sets of the cache.
    pub(crate) fn stride(&self) -> usize {
        self.units | 1
    }
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
        let most = T::BLOCK * width / granule * granule;
        let part = term.length.div_ceil(parts).next_multiple_of(granule).min(most);
        let mut from = 0;
        while from < term.length {
            let range = from..term.length.min(from + part);
            from = range.end;
            let units = units::<T>(range.len());
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
        assert!(block.units <= part::<T>(), "a block fits a packed tile");
    }
    blocks
}

/// The most units a block can have.
fn capacity<T: Tile>() -> usize {
    part::<T>() / T::UNIT_GRANULE * T::UNIT_GRANULE
}

/// Units between the parts of a packed left row.
const fn part<T: Tile>() -> usize {
    T::DEPTH / T::PARTS
}

/// Units a run of numbers becomes.
const fn units<T: Tile>(numbers: usize) -> usize {
    if T::PAIRS { numbers.div_ceil(2) } else { numbers }
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
    scratch: &mut Buffer,
) {
    for piece in &block.pieces {
        // SAFETY: as the caller promises.
        unsafe {
            match terms[piece.term].left {
                Operand::Rows { values, stride } => {
                    for (row, packed) in rows.clone().zip(packed.chunks_exact_mut(T::DEPTH)) {
                        let values = &values[row * stride..][piece.range.clone()];
                        left_row::<T>(values, &mut packed[piece.unit..]);
                    }
                }
                Operand::Columns { values, stride } => {
                    left_columns::<T>(values, stride, piece, rows.clone(), packed, scratch);
                }
                Operand::Frozen(_) | Operand::FrozenTransposed(_) => {
                    unreachable!("frozen matrices are right factors")
                }
            }
        }
    }
    for packed in packed.chunks_exact_mut(T::DEPTH).take(rows.len()) {
        for packed in packed.chunks_exact_mut(part::<T>()) {
            packed[block.used..block.units].fill(0);
        }
    }
}

/// Numbers between units of columns that [`columns`] copies.
const UNIT: usize = 8;
/// Lines that are read for one tile after the other.
const LINES: usize = 32;
/// Tiles whose columns are copied together: six columns are less than a cache line, which would be
/// fetched again for the next tile.
pub(crate) const TOGETHER: usize = 8;

/// Copies left factors that lie as columns, for a few tiles one below the other, a unit of each tile
/// after the other.
pub(crate) fn columns<T: Tile>(
    terms: &[Term],
    block: &Block,
    tiles: &[Range<usize>],
    packed: &mut Buffer,
) {
    const { assert!(!T::DIRECT || (!T::PAIRS && T::PARTS == 1 && T::ROWS <= UNIT)) };
    for piece in &block.pieces {
        let Operand::Columns { values, stride } = terms[piece.term].left else { continue };
        let packed = packed.at_least(tiles.len() * block.units * UNIT);
        let packed: &mut [f32] = bytemuck::cast_slice_mut(packed);
        let packed = packed.as_chunks_mut::<UNIT>().0;
        for start in piece.range.clone().step_by(LINES) {
            let lines = start..piece.range.end.min(start + LINES);
            let unit = piece.unit + start - piece.range.start;
            for (tile, packed) in tiles.iter().zip(packed.chunks_exact_mut(block.units)) {
                for (k, packed) in lines.clone().zip(&mut packed[unit..]) {
                    let values = &values[k * stride + tile.start..];
                    // Arrays, so that a copy is an instruction or two and not a call.
                    match values.first_chunk::<UNIT>() {
                        Some(values) => *packed = *values,
                        None => packed[..tile.len()].copy_from_slice(&values[..tile.len()]),
                    }
                }
            }
        }
    }
}

/// Finds rows of the left factors where they lie, or where [`columns`] copied them for the tile at
/// this place of those that were copied together.
///
/// The runs read the factors and `packed`, which must outlive them unchanged.
pub(crate) fn runs(
    terms: &[Term],
    block: &Block,
    rows: Range<usize>,
    (place, packed): (usize, &mut Buffer),
    runs: &mut Vec<Run>,
) {
    let packed: &[f32] = bytemuck::cast_slice(packed.at_least(0));
    runs.clear();
    for piece in &block.pieces {
        let units = piece.range.len();
        runs.push(match terms[piece.term].left {
            Operand::Rows { values, stride } => {
                let part = &values[rows.start * stride + piece.range.start
                    ..(rows.end - 1) * stride + piece.range.end];
                Run { first: part.as_ptr(), row: stride, unit: 1, units }
            }
            Operand::Columns { .. } => {
                let at = (place * block.units + piece.unit) * UNIT;
                Run { first: packed[at..][..units * UNIT].as_ptr(), row: 1, unit: UNIT, units }
            }
            Operand::Frozen(_) | Operand::FrozenTransposed(_) => {
                unreachable!("frozen matrices are right factors")
            }
        });
    }
}

/// # Safety
/// The processor has the tile's instruction set.
unsafe fn left_row<T: Tile>(values: &[f32], packed: &mut [u32]) {
    if T::PAIRS {
        // SAFETY: as the caller promises.
        unsafe { T::join(values, packed, part::<T>()) }
    } else {
        packed[..values.len()].copy_from_slice(bytemuck::cast_slice(values));
    }
}

/// Packs columns of a `[length, rows]` factor as rows, sixteen of the reduction at a time.
///
/// # Safety
/// The processor has the tile's instruction set.
unsafe fn left_columns<T: Tile>(
    values: &[f32],
    stride: usize,
    piece: &Piece,
    rows: Range<usize>,
    packed: &mut [u32],
    scratch: &mut Buffer,
) {
    let height = rows.len();
    let turned = &mut scratch.at_least(height * LANES)[..height * LANES];
    for start in piece.range.clone().step_by(LANES) {
        let width = LANES.min(piece.range.end - start);
        let first = &values[start * stride..][rows.clone()];
        let mut columns = [first.as_ptr().cast::<u32>(); LANES];
        for (k, column) in columns.iter_mut().enumerate().take(width) {
            *column = values[(start + k) * stride..][rows.clone()].as_ptr().cast();
        }
        // SAFETY: every pointer leads to a slice of `height` numbers, and `turned` holds sixteen
        // times as many; the caller promises the instructions.
        unsafe { T::transpose(&columns, height, turned.as_mut_ptr()) }
        let at = piece.unit + units::<T>(start - piece.range.start);
        let turned = turned.as_chunks::<LANES>().0.iter();
        for (row, packed) in turned.zip(packed.chunks_exact_mut(T::DEPTH)) {
            // SAFETY: as the caller promises.
            unsafe { left_row::<T>(bytemuck::cast_slice(&row[..width]), &mut packed[at..]) }
        }
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
    scratch: &mut Buffer,
) {
    let panel = T::PARTS * block.stride() * LANES;
    let packed = &mut packed[..lanes.len().div_ceil(LANES) * panel];
    for piece in &block.pieces {
        match terms[piece.term].right {
            right @ (Operand::Rows { .. } | Operand::Frozen(_)) => {
                let panels = packed.chunks_exact_mut(panel);
                for (panel, start) in panels.zip(lanes.clone().step_by(LANES)) {
                    let lanes = start..lanes.end.min(start + LANES);
                    // SAFETY: as the caller promises.
                    unsafe { panel_of_rows::<T>(right, piece, lanes, panel, scratch) }
                }
            }
            right @ (Operand::Columns { .. } | Operand::FrozenTransposed(_)) => {
                // SAFETY: as the caller promises.
                unsafe {
                    panels_of_columns::<T>(right, piece, lanes.clone(), packed, block, scratch);
                }
            }
        }
    }
    for packed in packed.chunks_exact_mut(block.stride() * LANES) {
        packed[block.used * LANES..block.units * LANES].fill(0);
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
    let units = units::<T>(k.len());
    if let Some(rows) = pairs_of_rows::<T>(right, &k, &lanes) {
        let panel = &mut panel[piece.unit * LANES..][..units * LANES];
        // SAFETY: every pointer leads to `units` pairs of a row, and the panel was cut to sixteen
        // times as many; the caller promises the instructions.
        unsafe { T::transpose(&rows, units, panel.as_mut_ptr()) }
        return;
    }
    // Numbers, units they become, and a row of zeros for lanes that do not exist.
    let scratch = scratch.at_least(k.len() + units + units * T::PARTS * LANES);
    let (numbers, scratch) = scratch.split_at_mut(k.len());
    let numbers: &mut [f32] = bytemuck::cast_slice_mut(numbers);
    let (zeros, joined) = scratch.split_at_mut(units);
    zeros.fill(0);
    // Lanes that do not exist stay at the zeros in every part.
    let mut steps = [0; LANES];
    let mut rows = [zeros.as_ptr(); LANES];
    let joined = joined.chunks_exact_mut(units * T::PARTS);
    for (index, (lane, joined)) in lanes.zip(joined).enumerate() {
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
                    rows[index] = row.as_ptr().cast();
                    continue;
                }
            },
            Operand::Columns { .. } | Operand::FrozenTransposed(_) => {
                unreachable!("columns have a way of their own")
            }
        };
        if T::PAIRS {
            // SAFETY: as the caller promises.
            unsafe { T::join(values, joined, units) }
            (rows[index], steps[index]) = (joined.as_ptr(), units);
        } else {
            rows[index] = values.as_ptr().cast();
        }
    }
    let part = panel.len() / T::PARTS;
    for panel in panel.chunks_exact_mut(part) {
        let panel = &mut panel[piece.unit * LANES..][..units * LANES];
        // SAFETY: every pointer leads to `units` units: a row of zeros, a part of a row of
        // `joined`, or `k.len()` numbers where a unit is a number. The panel was cut to sixteen
        // times as many.
        unsafe { T::transpose(&rows, units, panel.as_mut_ptr()) }
        for (row, step) in rows.iter_mut().zip(steps) {
            *row = row.wrapping_add(step);
        }
    }
}

/// Finds sixteen rows of bf16 numbers that lie in memory as the pairs a tile multiplies.
#[expect(clippy::cast_ptr_alignment, reason = "a transpose reads rows of any alignment")]
fn pairs_of_rows<T: Tile>(
    right: Operand,
    k: &Range<usize>,
    lanes: &Range<usize>,
) -> Option<[*const u32; LANES]> {
    let Operand::Frozen(matrix) = right else { return None };
    let values = matrix.as_bf16()?;
    if !T::PAIRS || T::PARTS > 1 || lanes.len() < LANES || !k.len().is_multiple_of(2) {
        return None;
    }
    let mut rows = [std::ptr::null(); LANES];
    for (row, lane) in rows.iter_mut().zip(lanes.clone()) {
        *row = values[lane * matrix.columns()..][k.clone()].as_ptr().cast::<u32>();
    }
    // Big-endian machines would read the pairs the wrong way round.
    cfg!(target_endian = "little").then_some(rows)
}

/// # Safety
/// The processor has the tile's instruction set.
unsafe fn panels_of_columns<T: Tile>(
    right: Operand,
    piece: &Piece,
    lanes: Range<usize>,
    packed: &mut [u32],
    block: &Block,
    scratch: &mut Buffer,
) {
    let width = lanes.len();
    let full = width.next_multiple_of(LANES);
    let scratch = scratch.at_least(2 * width + T::PARTS * full);
    let (joined, scratch) = scratch.split_at_mut(T::PARTS * full);
    joined.fill(0);
    let scratch: &mut [f32] = bytemuck::cast_slice_mut(scratch);
    let (first, second) = scratch.split_at_mut(width);
    let part = block.stride() * LANES;
    let step = if T::PAIRS { 2 } else { 1 };
    for (unit, k) in piece.range.clone().step_by(step).enumerate() {
        let at = (piece.unit + unit) * LANES;
        if T::PAIRS
            && T::PARTS == 1
            && let Some([low, high]) = bf16_rows(right, k..piece.range.end, &lanes)
        {
            // SAFETY: as the caller promises.
            unsafe { T::pair_rows(low, high, &mut joined[..full]) }
            deal(&joined[..full], &mut packed[at..], part);
            continue;
        }
        let low = row(right, k, lanes.clone(), first);
        if T::PAIRS {
            let high = (k + 1 < piece.range.end)
                .then(|| row(right, k + 1, lanes.clone(), &mut second[..width]));
            // SAFETY: as the caller promises.
            unsafe { T::join_rows(low, high, joined, full) }
            for (index, units) in joined.chunks_exact(full).enumerate() {
                deal(units, &mut packed[index * part + at..], T::PARTS * part);
            }
        } else {
            deal(bytemuck::cast_slice(low), &mut packed[at..], part);
        }
    }
}

/// Finds row `k.start` of a bf16 factor and the one below; an empty one where `k` ends.
fn bf16_rows<'a>(
    right: Operand<'a>,
    k: Range<usize>,
    lanes: &Range<usize>,
) -> Option<[&'a [bf16]; 2]> {
    let Operand::FrozenTransposed(matrix) = right else { return None };
    let values = matrix.as_bf16()?;
    let row = |k: usize| &values[k * matrix.columns()..][lanes.clone()];
    Some([row(k.start), if k.len() > 1 { row(k.start + 1) } else { &[] }])
}

/// Gives each panel its sixteen units, the last one filled up with zeros.
fn deal(units: &[u32], packed: &mut [u32], panel: usize) {
    let (whole, rest) = units.as_chunks::<LANES>();
    for (from, packed) in whole.iter().zip(packed.chunks_mut(panel)) {
        packed[..LANES].copy_from_slice(from);
    }
    if !rest.is_empty() {
        let packed = &mut packed[whole.len() * panel..][..LANES];
        packed[..rest.len()].copy_from_slice(rest);
        packed[rest.len()..].fill(0);
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
