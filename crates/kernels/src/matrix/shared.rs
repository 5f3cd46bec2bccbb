//! An output that several tasks write at once.

use std::marker::PhantomData;

/// The output's memory, of which every task writes a part of its own.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    values: *mut f32,
    len: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: tasks write disjoint parts, and the slice stays borrowed meanwhile.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    pub(crate) fn new(out: &'a mut [f32]) -> Self {
        Self { values: out.as_mut_ptr(), len: out.len(), borrowed: PhantomData }
    }

    /// Points at an element.
    ///
    /// # Safety
    /// The element exists, and the caller alone touches what it reaches from here.
    pub(crate) unsafe fn at(&self, index: usize) -> *mut f32 {
        debug_assert!(index < self.len);
        // SAFETY: the element exists.
        unsafe { self.values.add(index) }
    }
}
