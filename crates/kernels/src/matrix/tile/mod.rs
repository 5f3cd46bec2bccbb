//! The innermost loops: one tile of the output, per instruction set.
//!
//! A *unit* is 32 bits: one `f32`, or two neighbouring bf16 of the reduction. A packed left tile is
//! row-major `[rows][PARTS][DEPTH / PARTS]` units, packed right panels are
//! `[panel][PARTS][unit][16 outputs]`; there is more than one part where an `f32` is split.

use half::bf16;

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod amx_split;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512_bf16;
pub(crate) mod portable;

/// Outputs that lie side by side in a packed right panel.
pub(crate) const LANES: usize = 16;

/// Packed right panels, from some unit on.
#[derive(Clone, Copy)]
pub(crate) struct Panels {
    pub(crate) first: *const u32,
    /// From one part of a panel to the next, or to the next panel's first.
    pub(crate) part: usize,
}

/// Some units of a left factor's rows, read where they lie.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    pub(crate) first: *const f32,
    /// Numbers between rows, and between units; one of the two is 1.
    pub(crate) row: usize,
    pub(crate) unit: usize,
    pub(crate) units: usize,
}

/// What a tile starts from.
#[derive(Clone, Copy)]
pub(crate) enum TileStart {
    Zero,
    /// Points at one number per column of the tile.
    Bias(*const f32),
    Output,
}

/// The output part a tile writes.
#[derive(Clone, Copy)]
pub(crate) struct TileOutput {
    pub(crate) values: *mut f32,
    /// Numbers between rows.
    pub(crate) stride: usize,
    /// Rows, at most [`Tile::ROWS`].
    pub(crate) rows: usize,
    /// Whole panels of columns, at most [`Tile::PANELS`].
    pub(crate) panels: usize,
    pub(crate) start: TileStart,
}

impl TileOutput {
    /// The part of sixteen rows and one panel at a place.
    ///
    /// # Safety
    /// The place lies inside.
    #[cfg(target_arch = "x86_64")]
    unsafe fn sixteen(self, row: usize, panel: usize) -> Self {
        // SAFETY: as the caller promises.
        unsafe {
            let start = match self.start {
                TileStart::Bias(bias) => TileStart::Bias(bias.add(panel * LANES)),
                start => start,
            };
            let values = self.values.add(row * 16 * self.stride + panel * LANES);
            Self { values, rows: 16, panels: 1, start, ..self }
        }
    }
}

/// An instruction set's way to pack and to multiply.
pub(crate) trait Tile {
    /// Most rows of a tile.
    const ROWS: usize;
    /// Output rows are written in multiples of this.
    const ROW_GRANULE: usize = 1;
    /// Most panels of a tile.
    const PANELS: usize;
    /// Parts a number is split into.
    const PARTS: usize = 1;
    /// Units between rows of a packed left tile: the most units a block can have, times the parts.
    const DEPTH: usize;
    /// Units a block is cut to where the reduction is long.
    const BLOCK: usize;
    /// Units multiplied at a time for a row of tiles; a multiple of [`Self::UNIT_GRANULE`].
    const STEP: usize = usize::MAX;
    /// Blocks are filled up with zero units to a multiple of this.
    const UNIT_GRANULE: usize = 1;
    /// Columns of the output that share one packed right part.
    const CHUNK: usize = 256;
    /// Whether a unit is a pair of bf16.
    const PAIRS: bool;
    /// Whether the left factor is read where it lies, by [`Self::tile_of_runs`]; of single numbers
    /// in one part only.
    const DIRECT: bool = false;

    /// Runs a task with whatever state the instructions need.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn session(work: impl FnOnce()) {
        work();
    }

    /// Computes one tile of `left · rightᵀ`.
    ///
    /// # Safety
    /// The processor has the instruction set; `left` holds `rows` rows `DEPTH` apart with `units`
    /// units each; `right` holds `panels` panels of `units` units; `output` describes memory this
    /// thread alone may write; the call is inside [`Self::session`].
    unsafe fn tile(left: *const u32, right: Panels, units: usize, output: TileOutput);

    /// Computes one tile of `left · rightᵀ`, the left factor being runs one after another.
    ///
    /// # Safety
    /// As [`Self::tile`], every run holding the output's rows and all runs together the panels'
    /// units.
    unsafe fn tile_of_runs(_: &[Run], _: Panels, _: TileOutput) {
        unreachable!("this tile reads packed factors")
    }

    /// Turns sixteen rows into a panel: `panel[unit * 16 + row] = rows[row][unit]`.
    ///
    /// # Safety
    /// The processor has the instruction set; every pointer, of any alignment, can be read for
    /// `units` units, and `panel` written for sixteen times as many.
    unsafe fn transpose(rows: &[*const u32; LANES], units: usize, panel: *mut u32) {
        // SAFETY: as the caller promises.
        unsafe { portable::transpose(rows, units, panel) }
    }

    /// Joins neighbours: `(values[2u], values[2u + 1])` is unit `u`; an odd end is joined with zero.
    ///
    /// Part `p` starts at `units[p * part]`. Only for tiles of pairs.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn join(values: &[f32], units: &mut [u32], part: usize);

    /// Joins what lies one above the other in two rows; no second row is zero.
    ///
    /// Part `p` starts at `units[p * part]`. Only for tiles of pairs.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn join_rows(first: &[f32], second: Option<&[f32]>, units: &mut [u32], part: usize);

    /// Does [`Self::join_rows`] with numbers that are bf16 already; an empty second row is zero.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn pair_rows(first: &[bf16], second: &[bf16], units: &mut [u32]) {
        portable::pair_rows(first, second, units);
    }
}

/// For tiles of single numbers, which join nothing.
macro_rules! no_pairs {
    () => {
        unsafe fn join(_: &[f32], _: &mut [u32], _: usize) {
            unreachable!("units are single numbers")
        }

        unsafe fn join_rows(_: &[f32], _: Option<&[f32]>, _: &mut [u32], _: usize) {
            unreachable!("units are single numbers")
        }
    };
}
use no_pairs;
