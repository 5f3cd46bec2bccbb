//! Working memory of a thread, kept between calls and aligned to cache lines.

use std::cell::RefCell;

use bytemuck::{Pod, Zeroable};

const LINE: usize = 16;

/// One cache line of numbers.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

thread_local! {
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Lends one slice of each length, each on a cache line of its own, holding whatever was left.
///
/// Must not be called again inside `work` on the same thread; kernels run no parallel work there.
pub(crate) fn with<const N: usize, R>(
    lengths: [usize; N],
    work: impl FnOnce([&mut [f32]; N]) -> R,
) -> R {
    SCRATCH.with_borrow_mut(|lines| {
        let needed = lengths.iter().map(|length| length.div_ceil(LINE)).sum();
        if lines.len() < needed {
            lines.resize(needed, Line::zeroed());
        }
        let mut rest: &mut [f32] = bytemuck::cast_slice_mut(lines);
        let parts = lengths.map(|length| {
            let (part, after) =
                std::mem::take(&mut rest).split_at_mut(length.next_multiple_of(LINE));
            rest = after;
            &mut part[..length]
        });
        work(parts)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_as_long_as_asked() {
        with([3, 0, 17], |parts| {
            assert_eq!(parts.each_ref().map(|part| part.len()), [3, 0, 17]);
            for part in parts {
                assert_eq!(part.as_ptr() as usize % 64, 0);
                part.fill(1.0);
            }
        });
    }
}
