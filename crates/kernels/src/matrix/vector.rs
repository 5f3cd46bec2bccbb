//! Sixteen numbers at a time, for loops that are too varied to write per instruction set.
//!
//! A loop is written once over [`Vector`] and compiled once for each instruction set by
//! [`vectorized!`], inside a function that has the instructions.

#![expect(
    clippy::inline_always,
    reason = "must end up inside a function that has the instructions"
)]

use half::f16;

/// Sixteen `f32`.
///
/// # Safety
/// All functions need the processor to have the vector's instruction set, and pointers to lead to
/// sixteen values (of no particular alignment).
pub(crate) trait Vector: Copy {
    /// Rows and vectors of sums that fit the registers, with a row of vectors to spare.
    const SUMS: (usize, usize);

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Computes `self * factor + sum`, in one rounding where the processor can.
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn multiply(self, factor: Self) -> Self;
    /// Adds up the sixteen, in a fixed order.
    unsafe fn sum(self) -> f32;
    unsafe fn from_i8(from: *const u8) -> Self;
    unsafe fn from_bf16(from: *const u16) -> Self;
    /// Reads sixteen bytes as the numbers in their low and in their high halves.
    unsafe fn from_nibbles(from: *const u8) -> [Self; 2];
    /// Computes `number · factor + sum`, in one rounding where the processor can, of the numbers
    /// in the low and in the high halves of sixteen bytes.
    #[inline(always)]
    unsafe fn decode_nibbles(from: *const u8, factor: Self, sum: Self) -> [Self; 2] {
        // SAFETY: as the caller promises.
        unsafe { Self::from_nibbles(from).map(|number| number.multiply_add(factor, sum)) }
    }
    /// Asks for the cache line of an address, which may lie anywhere.
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    /// Reads `count` IEEE halves, `stride` bytes from each to the next; the rest is zeros.
    ///
    /// Two bytes behind each half may be read with it.
    unsafe fn halves(from: *const u8, stride: usize, count: usize) -> Self;
}

/// Runs a function generic over [`Vector`] with this machine's best instructions.
///
/// `vectorized!(name(argument: Type, …))` defines `dispatch(argument, …)` around a generic
/// `name::<V>(argument, …)` in scope.
macro_rules! vectorized {
    ($dispatch:ident => $name:ident($($argument:ident: $type:ty),* $(,)?)) => {
        fn $dispatch($($argument: $type),*) {
            use $crate::matrix::cpu::Kernel;
            #[cfg(target_arch = "x86_64")]
            use $crate::matrix::vector::{avx2, avx512};

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            unsafe fn on_avx512($($argument: $type),*) {
                // SAFETY: inside a function that has the instructions.
                unsafe { $name::<avx512::Sixteen>($($argument),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn on_avx2($($argument: $type),*) {
                // SAFETY: inside a function that has the instructions.
                unsafe { $name::<avx2::Sixteen>($($argument),*) }
            }
            // SAFETY: a kernel is only chosen where the processor has its instructions.
            unsafe {
                match Kernel::plain() {
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx512 => on_avx512($($argument),*),
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx2 => on_avx2($($argument),*),
                    _ => $name::<$crate::matrix::vector::Portable>($($argument),*),
                }
            }
        }
    };
}
pub(crate) use vectorized;

/// Reads `count` 16-bit numbers, `stride` bytes from each to the next.
///
/// # Safety
/// They lie in memory, and are at most sixteen.
#[inline(always)]
unsafe fn spread(from: *const u8, stride: usize, count: usize) -> [u16; 16] {
    let mut halves = [0; 16];
    for (index, half) in halves.iter_mut().enumerate().take(count) {
        // SAFETY: as the caller promises.
        *half = u16::from_le(unsafe { from.add(index * stride).cast::<u16>().read_unaligned() });
    }
    halves
}

/// What the compiler makes of arrays.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 16]);

impl Vector for Portable {
    const SUMS: (usize, usize) = (4, 1);

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 16])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as the caller promises.
        Self(unsafe { from.cast::<[f32; 16]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as the caller promises.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
        Self(std::array::from_fn(|i| {
            super::tile::portable::multiply_add(self.0[i], factor.0[i], sum.0[i])
        }))
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    unsafe fn multiply(self, factor: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * factor.0[i]))
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut sums = self.0;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                sums[i] += sums[i + half];
            }
        }
        sums[0]
    }

    #[inline(always)]
    unsafe fn from_i8(from: *const u8) -> Self {
        // SAFETY: as the caller promises.
        let bytes = unsafe { from.cast::<[i8; 16]>().read_unaligned() };
        Self(bytes.map(f32::from))
    }

    #[inline(always)]
    unsafe fn from_bf16(from: *const u16) -> Self {
        // SAFETY: as the caller promises.
        let halves = unsafe { from.cast::<[u16; 16]>().read_unaligned() };
        Self(halves.map(|half| f32::from_bits(u32::from(half) << 16)))
    }

    #[inline(always)]
    unsafe fn from_nibbles(from: *const u8) -> [Self; 2] {
        // SAFETY: as the caller promises.
        let bytes = unsafe { from.cast::<[u8; 16]>().read_unaligned() };
        [Self(bytes.map(|byte| f32::from(byte & 15))), Self(bytes.map(|byte| f32::from(byte >> 4)))]
    }

    #[inline(always)]
    unsafe fn halves(from: *const u8, stride: usize, count: usize) -> Self {
        // SAFETY: as the caller promises.
        Self(unsafe { spread(from, stride, count) }.map(|half| f16::from_bits(half).to_f32()))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512 {
    //! One register of AVX-512.

    #[allow(clippy::wildcard_imports, reason = "intrinsics are many and unmistakable")]
    use std::arch::x86_64::*;

    use super::Vector;

    #[derive(Clone, Copy)]
    pub(crate) struct Sixteen(__m512);

    // SAFETY of every function: the caller promises the instructions and the memory.
    #[expect(clippy::undocumented_unsafe_blocks, reason = "said once above")]
    impl Vector for Sixteen {
        const SUMS: (usize, usize) = (8, 3);

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            Self(unsafe { _mm512_set1_ps(value) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Self(unsafe { _mm512_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, sum.0) })
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            Self(unsafe { _mm512_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn multiply(self, factor: Self) -> Self {
            Self(unsafe { _mm512_mul_ps(self.0, factor.0) })
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self.0) }
        }

        #[inline(always)]
        unsafe fn from_i8(from: *const u8) -> Self {
            unsafe {
                let wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()));
                Self(_mm512_cvtepi32_ps(wide))
            }
        }

        #[inline(always)]
        unsafe fn from_bf16(from: *const u16) -> Self {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }

        #[inline(always)]
        unsafe fn from_nibbles(from: *const u8) -> [Self; 2] {
            unsafe {
                // The permutation looks at the four lowest bits of each place only.
                let numbers = _mm512_setr_ps(
                    0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0,
                    15.0,
                );
                let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
                let low = _mm512_permutexvar_ps(wide, numbers);
                let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(wide), numbers);
                [Self(low), Self(high)]
            }
        }

        #[inline(always)]
        unsafe fn decode_nibbles(from: *const u8, factor: Self, sum: Self) -> [Self; 2] {
            unsafe {
                // All sixteen numbers there can be; the permutation looks at four bits only.
                let numbers = _mm512_setr_ps(
                    0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0,
                    15.0,
                );
                let numbers = _mm512_fmadd_ps(numbers, factor.0, sum.0);
                let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
                let low = _mm512_permutexvar_ps(wide, numbers);
                let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(wide), numbers);
                [Self(low), Self(high)]
            }
        }

        #[inline(always)]
        unsafe fn prefetch(address: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
        }

        #[inline(always)]
        unsafe fn halves(from: *const u8, stride: usize, count: usize) -> Self {
            unsafe {
                let places =
                    _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                let places = _mm512_mullo_epi32(places, _mm512_set1_epi32(stride as i32));
                let mask = if count >= 16 { u16::MAX } else { (1 << count) - 1 };
                let zero = _mm512_setzero_si512();
                let words = _mm512_mask_i32gather_epi32::<1>(zero, mask, places, from.cast());
                Self(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)))
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2 {
    //! Two registers of AVX2.

    #[allow(clippy::wildcard_imports, reason = "intrinsics are many and unmistakable")]
    use std::arch::x86_64::*;

    use super::Vector;

    #[derive(Clone, Copy)]
    pub(crate) struct Sixteen(__m256, __m256);

    // SAFETY of every function: the caller promises the instructions and the memory.
    #[expect(clippy::undocumented_unsafe_blocks, reason = "said once above")]
    impl Vector for Sixteen {
        const SUMS: (usize, usize) = (4, 1);

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            let eight = unsafe { _mm256_set1_ps(value) };
            Self(eight, eight)
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
            unsafe {
                Self(
                    _mm256_fmadd_ps(self.0, factor.0, sum.0),
                    _mm256_fmadd_ps(self.1, factor.1, sum.1),
                )
            }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn multiply(self, factor: Self) -> Self {
            unsafe { Self(_mm256_mul_ps(self.0, factor.0), _mm256_mul_ps(self.1, factor.1)) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let eight = _mm256_add_ps(self.0, self.1);
                let four =
                    _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }

        #[inline(always)]
        unsafe fn from_i8(from: *const u8) -> Self {
            unsafe {
                let bytes = _mm_loadu_si128(from.cast());
                let low = _mm256_cvtepi8_epi32(bytes);
                let high = _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes));
                Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
            }
        }

        #[inline(always)]
        unsafe fn from_bf16(from: *const u16) -> Self {
            unsafe {
                let eight = |from: *const u16| {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                };
                Self(eight(from), eight(from.add(8)))
            }
        }

        #[inline(always)]
        unsafe fn from_nibbles(from: *const u8) -> [Self; 2] {
            unsafe {
                let bytes = _mm_loadu_si128(from.cast());
                let mask = _mm_set1_epi8(15);
                let sixteen = |bytes: __m128i| {
                    let low = _mm256_cvtepu8_epi32(bytes);
                    let high = _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes));
                    Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
                };
                let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask);
                [sixteen(_mm_and_si128(bytes, mask)), sixteen(high)]
            }
        }

        #[inline(always)]
        unsafe fn halves(from: *const u8, stride: usize, count: usize) -> Self {
            unsafe {
                let halves = super::spread(from, stride, count);
                let eight =
                    |at: usize| _mm256_cvtph_ps(_mm_loadu_si128(halves[at..].as_ptr().cast()));
                Self(eight(0), eight(8))
            }
        }
    }
}
