//! Memory of tensors, kept when a tensor is dropped and lent to the next of about its size.
//!
//! A step makes and drops gigabytes of activations. From the system each of them would come as
//! fresh pages, which cost more than the element-wise operations that fill them; from the
//! allocator's own lists they would have to be zeroed first. What is kept here has been written
//! before, so it can be lent as it is.

use std::mem::{MaybeUninit, take};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use burn_backend::{Bytes, DType, Shape};
use burn_flex::{FlexTensor, Layout};
use burn_std::{AccessError, AccessPolicy, AllocationController, AllocationProperty};

/// Numbers from which on memory is kept; smaller pieces are the allocator's business.
const LEAST: usize = 1 << 12;
/// A kept piece may be longer than what is asked for by one part in so many.
const SLACK: usize = 4;

/// Gives the length of a new piece: an eighth more than asked for, so that a step of a few tokens more
/// finds it long enough. What is not used is never touched, so it takes no memory.
fn with_headroom(count: usize) -> usize {
    count + count / 8
}

/// What is kept, and how much is lent.
struct Kept {
    /// Oldest first.
    free: Vec<Vec<f32>>,
    free_len: usize,
    lent_len: usize,
    /// The most ever lent at once.
    most_lent: usize,
}

static KEPT: Mutex<Kept> =
    Mutex::new(Kept { free: Vec::new(), free_len: 0, lent_len: 0, most_lent: 0 });

impl Kept {
    /// Takes the shortest free piece that holds `count` numbers without much waste.
    fn fitting(&mut self, count: usize) -> Option<Vec<f32>> {
        let fits = |piece: &Vec<f32>| {
            piece.capacity() >= count && piece.capacity() - count <= count / SLACK
        };
        let candidates = self.free.iter().enumerate().filter(|(_, piece)| fits(piece));
        let (place, _) = candidates.min_by_key(|(_, piece)| piece.capacity())?;
        let piece = self.free.remove(place);
        self.free_len -= piece.capacity();
        Some(piece)
    }

    fn lend(&mut self, length: usize) {
        self.lent_len += length;
        self.most_lent = self.most_lent.max(self.lent_len);
    }

    /// Gives up the oldest pieces until no more is held than was once needed at a time.
    fn shrink(&mut self) -> Vec<Vec<f32>> {
        let mut dropped = 0;
        while self.free_len + self.lent_len > self.most_lent && dropped < self.free.len() {
            self.free_len -= self.free[dropped].capacity();
            dropped += 1;
        }
        self.free.drain(..dropped).collect()
    }
}

fn kept<R>(work: impl FnOnce(&mut Kept) -> R) -> R {
    work(&mut KEPT.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Numbers that go back where they came from when they are dropped.
#[derive(Debug, Default)]
pub(crate) struct Buffer(Vec<f32>);

impl Buffer {
    /// Lends `count` numbers, holding whatever was left in them: all must be written.
    pub(crate) fn dirty(count: usize) -> Self {
        if count < LEAST {
            return Self(vec![0.0; count]);
        }
        if let Some(mut piece) = kept(|kept| {
            let piece = kept.fitting(count);
            kept.lend(piece.as_ref().map_or_else(|| with_headroom(count), Vec::capacity));
            piece
        }) {
            piece.resize(count, 0.0);
            return Self(piece);
        }
        // Given back to the system outside of the lock.
        drop(kept(Kept::shrink));
        let mut piece = vec![0.0; with_headroom(count)];
        piece.truncate(count);
        Self(piece)
    }

    /// Lends `count` zeros.
    pub(crate) fn zeros(count: usize) -> Self {
        let mut buffer = Self::dirty(count);
        buffer.fill(0.0);
        buffer
    }

    /// Makes a tensor of the numbers, in row-major order.
    pub(crate) fn into_tensor(self, shape: impl Into<Shape>) -> FlexTensor {
        let shape = shape.into();
        assert_eq!(self.len(), shape.num_elements(), "numbers of a tensor of shape {shape:?}");
        let bytes = if self.0.capacity() < LEAST {
            Bytes::from_elems(self.into_vec())
        } else {
            let length = size_of_val(&self[..]);
            // SAFETY: the buffer holds exactly `length` bytes, all of them numbers.
            unsafe { Bytes::from_controller(Box::new(self), length) }
        };
        FlexTensor::new(bytes, Layout::contiguous(shape), DType::F32)
    }

    /// Takes the numbers out for good.
    pub(crate) fn into_vec(mut self) -> Vec<f32> {
        let values = take(&mut self.0);
        if values.capacity() >= LEAST {
            kept(|kept| kept.lent_len -= values.capacity());
        }
        values
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let values = take(&mut self.0);
        let length = values.capacity();
        if length >= LEAST {
            kept(|kept| {
                kept.lent_len -= length;
                kept.free_len += length;
                kept.free.push(values);
            });
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

impl AllocationController for Buffer {
    fn alloc_align(&self) -> usize {
        align_of::<f32>()
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(
        &mut self,
        _: AccessPolicy,
    ) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.0);
        // SAFETY: a byte that may be uninitialised has a byte's size; the caller promises to write
        // initialised bytes only, so the numbers stay numbers.
        Ok(unsafe { &mut *(std::ptr::from_mut(bytes) as *mut [MaybeUninit<u8>]) })
    }

    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        let bytes: &[u8] = bytemuck::cast_slice(&self.0);
        // SAFETY: every byte is initialised, and a byte that may be has the same size.
        Ok(unsafe { &*(std::ptr::from_ref(bytes) as *const [MaybeUninit<u8>]) })
    }

    fn capacity(&self) -> usize {
        // What a vector made of the detached memory must be given to free it.
        self.0.capacity() * size_of::<f32>()
    }

    fn try_detach(&mut self) -> Option<NonNull<u8>> {
        // A vector of the global allocator, with the alignment and the capacity stated above.
        let values = take(self).into_vec().leak();
        NonNull::new(values.as_mut_ptr().cast())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tests use the same list, so sizes here are ones nobody else has. Miri needs minutes for
    /// each ten thousand numbers.
    const COUNT: usize = if cfg!(miri) { 5_001 } else { 70_001 };

    #[test]
    fn memory_comes_back() {
        let mut buffer = Buffer::dirty(COUNT);
        buffer.fill(3.0);
        let place = buffer.as_ptr();
        drop(buffer.into_tensor([COUNT]));
        let again = Buffer::dirty(COUNT);
        assert_eq!((again.as_ptr(), again.len(), again[COUNT - 1]), (place, COUNT, 3.0));
        drop(again);
        assert!(Buffer::zeros(COUNT).iter().all(|x| *x == 0.0));
        let shorter = Buffer::dirty(COUNT - 100);
        assert_eq!((shorter.as_ptr(), shorter.len()), (place, COUNT - 100));
        drop(shorter);
        let longer = Buffer::dirty(COUNT);
        assert_eq!((longer.as_ptr(), longer.len()), (place, COUNT));
    }

    #[test]
    fn nearly_equal_counts_share_their_memory() {
        let count = COUNT + 4_999;
        let place = Buffer::dirty(count).as_ptr();
        for near in [count + count / 8, count - count / 10] {
            assert_eq!(Buffer::dirty(near).as_ptr(), place, "{near}");
        }
    }

    #[test]
    fn tensors_give_their_numbers_out_without_a_copy() {
        let count = 3 * COUNT;
        let mut buffer = Buffer::dirty(count);
        for (index, x) in buffer.iter_mut().enumerate() {
            *x = index as f32;
        }
        let place = buffer.as_ptr();
        let tensor = buffer.into_tensor([3, COUNT]);
        let copy = tensor.to_contiguous();
        let values: Vec<f32> = tensor.into_data().try_into_vec().unwrap();
        let copied: Vec<f32> = copy.into_data().try_into_vec().unwrap();
        assert!(values == copied && values[count - 1] == (count - 1) as f32);
        // One of the two took the memory over.
        assert!(values.as_ptr() == place || copied.as_ptr() == place);
    }

    #[test]
    fn no_more_is_held_than_was_once_needed() {
        let mut kept = Kept { free: Vec::new(), free_len: 0, lent_len: 0, most_lent: 0 };
        kept.lend(100);
        kept.lend(50);
        kept.lent_len -= 100;
        kept.free.push(Vec::with_capacity(100));
        kept.free_len += 100;
        assert!(kept.fitting(101).is_none(), "too short");
        assert!(kept.fitting(50).is_none(), "too much waste");
        kept.lend(60);
        assert_eq!(kept.shrink().len(), 1, "210 would be held, 150 were needed");
        assert_eq!((kept.free_len, kept.lent_len, kept.most_lent), (0, 110, 150));
    }
}
