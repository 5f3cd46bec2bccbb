//! The blocked product: which part of the output is computed when, and by which thread.

use std::ops::Range;

use rayon::prelude::*;

use super::Arithmetic;
use super::cpu::Kernel;
use super::operand::{Start, Term};
use super::pack::{self, Block};
use super::scratch::{self, Scratch};
use super::shared::Output;
use super::tile::{LANES, Panels, Run, Tile, TileOutput, TileStart, portable::Portable};
#[cfg(target_arch = "x86_64")]
use super::tile::{
    amx::Amx, amx_split::AmxSplit, avx2::Avx2, avx512::Avx512, avx512_bf16::Avx512Bf16,
};
use crate::work;

/// Products below which a second thread costs more than it brings.
const ALONE: usize = 1 << 20;

/// Computes `out = start + Σ left · rightᵀ` with this machine's best kernel.
///
/// # Shapes
/// - `out`: `[rows, columns]`; every term's left factor has `rows` outputs, its right `columns`
pub(crate) fn multiply(
    arithmetic: Arithmetic,
    rows: usize,
    columns: usize,
    terms: &[Term],
    start: Start,
    out: &mut [f32],
) {
    for term in terms {
        work::note(rows, columns, term.length);
    }
    multiply_with(Kernel::choose(arithmetic), rows, columns, terms, start, out);
}

/// Computes a product with a kernel out of [`Kernel::available`].
pub(crate) fn multiply_with(
    kernel: Kernel,
    rows: usize,
    columns: usize,
    terms: &[Term],
    start: Start,
    out: &mut [f32],
) {
    // SAFETY: a kernel is only chosen where the processor has its instructions.
    unsafe {
        match kernel {
            Kernel::Portable => run::<Portable>(rows, columns, terms, start, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => run::<Avx2>(rows, columns, terms, start, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => run::<Avx512>(rows, columns, terms, start, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Bf16 => run::<Avx512Bf16>(rows, columns, terms, start, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::Amx => run::<Amx>(rows, columns, terms, start, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::AmxSplit => run::<AmxSplit>(rows, columns, terms, start, out),
        }
    }
}

/// Panics unless the factors and the output have their shapes.
pub(crate) fn check(rows: usize, columns: usize, terms: &[Term], start: Start, out: &[f32]) {
    assert_eq!(out.len(), rows * columns, "the output of a product is not [{rows}, {columns}]");
    if let Start::Bias(bias) = start {
        assert_eq!(bias.len(), columns, "the bias does not have one number per output");
    }
    for term in terms {
        term.left.check(rows, term.length);
        term.right.check(columns, term.length);
    }
}

/// Writes what an output without any product is.
fn write_start(columns: usize, start: Start, out: &mut [f32]) {
    match start {
        Start::Zero => out.fill(0.0),
        Start::Bias(bias) => {
            out.chunks_exact_mut(columns).for_each(|row| row.copy_from_slice(bias));
        }
        Start::Output => {}
    }
}

/// # Safety
/// The processor has the tile's instruction set.
unsafe fn run<T: Tile>(rows: usize, columns: usize, terms: &[Term], start: Start, out: &mut [f32]) {
    check(rows, columns, terms, start, out);
    if out.is_empty() {
        return;
    }
    let blocks = pack::blocks::<T>(terms);
    if blocks.is_empty() {
        return write_start(columns, start, out);
    }
    let work = rows * columns * terms.iter().map(|term| term.length).sum::<usize>();
    let threads = if work < ALONE { 1 } else { rayon::current_num_threads() };
    let (rows_each, columns_each) = parts::<T>(rows, columns, terms, threads);
    let product = Product { rows, columns, terms, blocks: &blocks, start, out: Output::new(out) };
    let across = columns.div_ceil(columns_each);
    let task = |index: usize| {
        let (row, column) = (index / across * rows_each, index % across * columns_each);
        let rows = row..rows.min(row + rows_each);
        let columns = column..columns.min(column + columns_each);
        // SAFETY: the caller promises the instructions; the parts of two tasks share no output.
        scratch::with(|scratch| unsafe {
            T::session(|| product.part::<T>(rows, columns, scratch));
        });
    };
    let tasks = across * rows.div_ceil(rows_each);
    if threads == 1 || tasks == 1 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// Divides the output into parts of `(rows, columns)`, at least two for each thread.
///
/// The left factor is packed once for every part across, the right one for every part down, so of
/// the divisions into enough parts the one is taken that packs least.
fn parts<T: Tile>(rows: usize, columns: usize, terms: &[Term], threads: usize) -> (usize, usize) {
    let granule = terms.iter().map(|term| term.right.output_granule()).max().unwrap_or(1);
    let granule = granule.next_multiple_of(LANES * T::PANELS);
    let wanted = if threads == 1 { 1 } else { 2 * threads };
    let least_across = columns.div_ceil(T::CHUNK).max(1);
    let most_across = columns.div_ceil(granule);
    let most_down = rows.div_ceil(2 * T::ROWS);
    let right = terms.iter().map(|term| term.right.packing_cost()).max().unwrap_or(1);
    let packed = |down: usize, across: usize| across * rows + down * columns * right;
    let best = (1..=most_down.min(wanted))
        .map(|down| (down, wanted.div_ceil(down).max(least_across).min(most_across)))
        // Enough parts first, then little packing.
        .min_by_key(|(down, across)| {
            (wanted.saturating_sub(down * across), packed(*down, *across))
        });
    let (down, across) = best.unwrap_or((1, least_across));
    let each = |length: usize, parts: usize, granule: usize| {
        length.div_ceil(parts).next_multiple_of(granule)
    };
    (each(rows, down, T::ROWS), each(columns, across, granule))
}

/// Cuts rows into tiles of about equal height: a last tile of one row would cost as much as a full
/// one.
fn tiles<T: Tile>(rows: Range<usize>) -> Vec<Range<usize>> {
    let count = rows.len().div_ceil(T::ROWS);
    let mut row = rows.start;
    (0..count)
        .map(|tile| {
            let height = (rows.end - row).div_ceil(count - tile);
            let height = height.next_multiple_of(T::ROW_GRANULE).min(rows.end - row);
            row += height;
            row - height..row
        })
        .collect()
}

struct Product<'a> {
    rows: usize,
    columns: usize,
    terms: &'a [Term<'a>],
    blocks: &'a [Block],
    start: Start<'a>,
    out: Output<'a>,
}

/// A run of units that a row of tiles is multiplied over.
struct Step<'a> {
    left: Left<'a>,
    right: &'a [u32],
    units: usize,
    /// Cache lines from one packed right part to the next.
    stride: usize,
    start: Start<'a>,
}

/// The left factor of a row of tiles.
#[derive(Clone, Copy)]
enum Left<'a> {
    Packed(&'a [u32]),
    Runs(&'a [Run]),
}

impl Left<'_> {
    /// # Safety
    /// As [`Tile::tile`] or [`Tile::tile_of_runs`].
    unsafe fn multiply<T: Tile>(self, right: Panels, units: usize, output: TileOutput) {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Self::Packed(left) => T::tile(left.as_ptr(), right, units, output),
                Self::Runs(runs) => T::tile_of_runs(runs, right, output),
            }
        }
    }
}

impl Product<'_> {
    /// Computes a part of the output.
    ///
    /// # Safety
    /// The processor has the tile's instruction set; this thread alone writes the part; the call
    /// is inside [`Tile::session`].
    unsafe fn part<T: Tile>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        scratch: &mut Scratch,
    ) {
        debug_assert!(rows.end <= self.rows && columns.end <= self.columns);
        let panels = columns.len().div_ceil(LANES);
        let tiles = tiles::<T>(rows);
        let mut runs = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let right = scratch.right.at_least(panels * T::PARTS * block.stride() * LANES);
            // SAFETY: as the caller promises.
            unsafe {
                pack::right::<T>(self.terms, block, columns.clone(), right, &mut scratch.rows);
            }
            let start = if index == 0 { self.start } else { Start::Output };
            for (index, rows) in tiles.iter().enumerate() {
                let (row, height) = (rows.start, rows.len());
                let edge = scratch.edge.at_least(T::ROWS * T::PANELS * LANES);
                let step = |left, unit, units| Step {
                    left,
                    right: &right[unit * LANES..],
                    units,
                    stride: block.stride(),
                    start: if unit == 0 { start } else { Start::Output },
                };
                if T::DIRECT {
                    let place = index % pack::TOGETHER;
                    if place == 0 {
                        let together = &tiles[index..tiles.len().min(index + pack::TOGETHER)];
                        pack::columns::<T>(self.terms, block, together, &mut scratch.left);
                    }
                    let packed = (place, &mut scratch.left);
                    pack::runs(self.terms, block, rows.clone(), packed, &mut runs);
                    let step = step(Left::Runs(&runs), 0, block.units);
                    // SAFETY: as the caller promises; the runs lead into the factors and the
                    // scratch, neither of which changes meanwhile.
                    unsafe { self.row_of_tiles::<T>(&step, (row, height), &columns, edge) }
                } else {
                    let left = scratch.left.at_least(T::ROWS * T::DEPTH);
                    // SAFETY: as the caller promises; both factors are packed for this block.
                    unsafe {
                        pack::left::<T>(self.terms, block, rows.clone(), left, &mut scratch.rows);
                        for unit in (0..block.units).step_by(T::STEP) {
                            let units = T::STEP.min(block.units - unit);
                            let step = step(Left::Packed(&left[unit..]), unit, units);
                            self.row_of_tiles::<T>(&step, (row, height), &columns, edge);
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`Self::part`]; the step's factors are packed.
    unsafe fn row_of_tiles<T: Tile>(
        &self,
        step: &Step,
        (row, height): (usize, usize),
        columns: &Range<usize>,
        edge: &mut [u32],
    ) {
        let (left, units, start) = (step.left, step.units, step.start);
        let part = step.stride * LANES;
        let width = T::PANELS * LANES;
        for (index, column) in columns.clone().step_by(width).enumerate() {
            let first = step.right[index * T::PANELS * T::PARTS * part..].as_ptr();
            let right = Panels { first, part };
            let have = width.min(columns.end - column);
            // SAFETY: row and column lie in the output.
            let values = unsafe { self.out.at(row * self.columns + column) };
            let tile_start = match start {
                Start::Zero => TileStart::Zero,
                Start::Bias(bias) => TileStart::Bias(bias[column..].as_ptr()),
                Start::Output => TileStart::Output,
            };
            let whole = have.is_multiple_of(LANES) && height.is_multiple_of(T::ROW_GRANULE);
            if whole {
                let output = TileOutput {
                    values,
                    stride: self.columns,
                    rows: height,
                    panels: have / LANES,
                    start: tile_start,
                };
                // SAFETY: the tile lies inside this task's part of the output.
                unsafe { left.multiply::<T>(right, units, output) }
                continue;
            }
            let edge: &mut [f32] = bytemuck::cast_slice_mut(edge);
            for (r, edge) in edge.chunks_exact_mut(width).take(height).enumerate() {
                // SAFETY: the row's `have` numbers lie inside this task's part of the output.
                let out = unsafe { std::slice::from_raw_parts(values.add(r * self.columns), have) };
                match start {
                    Start::Zero => edge.fill(0.0),
                    Start::Bias(bias) => edge[..have].copy_from_slice(&bias[column..][..have]),
                    Start::Output => edge[..have].copy_from_slice(out),
                }
            }
            let output = TileOutput {
                values: edge.as_mut_ptr(),
                stride: width,
                rows: height.next_multiple_of(T::ROW_GRANULE),
                panels: have.div_ceil(LANES),
                start: TileStart::Output,
            };
            // SAFETY: the edge buffer holds a whole tile.
            unsafe { left.multiply::<T>(right, units, output) }
            for (r, edge) in edge.chunks_exact(width).take(height).enumerate() {
                // SAFETY: as above, and this thread alone writes there.
                let out =
                    unsafe { std::slice::from_raw_parts_mut(values.add(r * self.columns), have) };
                out.copy_from_slice(&edge[..have]);
            }
        }
    }
}
