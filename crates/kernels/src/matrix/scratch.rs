//! Buffers each thread keeps between products, so that a step touches no fresh pages.

use std::cell::RefCell;

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// A growing buffer of 32-bit units that starts at a cache line.
#[derive(Default)]
pub(crate) struct Buffer(Vec<Line>);

impl Buffer {
    /// Gives at least `units` units; their content is whatever was last written.
    pub(crate) fn at_least(&mut self, units: usize) -> &mut [u32] {
        let lines = units.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; 16]));
        }
        let all: &mut [Line] = &mut self.0;
        // SAFETY: a `Line` is sixteen `u32` and nothing else (64 bytes, no padding), and the slice
        // borrows the vector for as long as the result lives.
        unsafe { std::slice::from_raw_parts_mut(all.as_mut_ptr().cast(), all.len() * 16) }
    }
}

/// What one task of a blocked product writes to besides its output.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Packed left tile.
    pub(crate) left: Buffer,
    /// Packed right panels of the task.
    pub(crate) right: Buffer,
    /// Rows on their way from a frozen form to panels.
    pub(crate) rows: Buffer,
    /// An output tile that does not fit the output's edge.
    pub(crate) edge: Buffer,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Lends the thread's scratch; `work` must not ask for it again.
pub(crate) fn with<R>(work: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(work)
}
