//! Lets tasks write columns of the same rows at once.

use std::marker::PhantomData;

/// A matrix `[rows, stride]` of which several tasks each write a part of their own.
pub(crate) struct Columns<'a> {
    base: *mut f32,
    length: usize,
    stride: usize,
    lent: PhantomData<&'a mut [f32]>,
}

// SAFETY: all access goes through `part`, whose callers hold disjoint parts.
unsafe impl Sync for Columns<'_> {}
// SAFETY: as above; the pointer belongs to a slice that is lent mutably for `'a`.
unsafe impl Send for Columns<'_> {}

impl<'a> Columns<'a> {
    pub(crate) fn new(values: &'a mut [f32], stride: usize) -> Self {
        let length = values.len();
        Self { base: values.as_mut_ptr(), length, stride, lent: PhantomData }
    }

    /// Gives `width` numbers of `row` from `column` on.
    ///
    /// # Safety
    /// No two parts that overlap may be alive at once, on any thread.
    #[expect(clippy::mut_from_ref, reason = "disjoint parts are the purpose of this type")]
    pub(crate) unsafe fn part(&self, row: usize, column: usize, width: usize) -> &mut [f32] {
        let start = row * self.stride + column;
        assert!(column + width <= self.stride && start + width <= self.length);
        // SAFETY: inside the lent slice by the assertion, and alone by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), width) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_written_side_by_side() {
        let mut values = vec![0.0; 6];
        let columns = Columns::new(&mut values, 3);
        for row in 0..2 {
            // SAFETY: columns 0..1 and 1..3 do not overlap.
            let (left, right) = unsafe { (columns.part(row, 0, 1), columns.part(row, 1, 2)) };
            left.fill(1.0);
            right.fill(2.0);
        }
        assert_eq!(values, [1.0, 2.0, 2.0, 1.0, 2.0, 2.0]);
    }
}
