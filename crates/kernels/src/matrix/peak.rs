//! Multiplications without memory: what a product's speed is held against.

#![expect(
    clippy::inline_always,
    reason = "must end up inside a function that has the instructions"
)]

use std::hint::black_box;

use super::Arithmetic;
use super::cpu::Kernel;
#[cfg(target_arch = "x86_64")]
use super::tile::{amx, avx512_bf16};
use super::vector::{Vector, vectorized};

/// Does independent multiply-adds in registers on every thread, and returns how many floating-point
/// operations that were (two a multiply-add).
///
/// The time it takes, which the caller measures, gives the machine's peak: for
/// [`Arithmetic::F32`] that of `f32` multiply-adds, for [`Arithmetic::Bf16`] that of the bf16
/// instruction products use, if any.
pub fn multiply_in_registers(arithmetic: Arithmetic, rounds: usize) -> u64 {
    let each = rayon::broadcast(|_| on_this_thread(arithmetic, rounds));
    each.into_iter().sum()
}

fn on_this_thread(arithmetic: Arithmetic, rounds: usize) -> u64 {
    let kernel = match arithmetic {
        Arithmetic::F32 | Arithmetic::Int8 => Kernel::plain(),
        Arithmetic::Bf16 => Kernel::choose(arithmetic),
    };
    match kernel {
        #[cfg(target_arch = "x86_64")]
        Kernel::Amx => {
            // SAFETY: the kernel is only chosen where the process may use AMX.
            unsafe { amx::spin(rounds) }
            amx::SPIN * rounds as u64
        }
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512Bf16 => {
            // SAFETY: the kernel is only chosen where the processor has the instructions.
            black_box(unsafe { avx512_bf16::spin(rounds, black_box(1e-3)) });
            avx512_bf16::SPIN * rounds as u64
        }
        _ => {
            let mut done = 0;
            spin(rounds, black_box(1e-3), &mut done);
            done
        }
    }
}

vectorized!(spin => multiply_vectors(rounds: usize, value: f32, done: &mut u64));

/// # Safety
/// The processor has the vector's instructions.
#[inline(always)]
unsafe fn multiply_vectors<V: Vector>(rounds: usize, value: f32, done: &mut u64) {
    let (height, width) = V::SUMS;
    // SAFETY: as the caller promises.
    unsafe {
        if height * width >= 16 {
            sums::<V, 16>(rounds, value);
            *done = 16 * 2 * 16 * rounds as u64;
        } else {
            sums::<V, 4>(rounds, value);
            *done = 4 * 2 * 16 * rounds as u64;
        }
    }
}

/// # Safety
/// The processor has the vector's instructions.
#[inline(always)]
unsafe fn sums<V: Vector, const N: usize>(rounds: usize, value: f32) {
    // SAFETY: as the caller promises.
    unsafe {
        let factor = V::splat(value);
        let mut sums = [factor; N];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = sum.multiply_add(factor, factor);
            }
        }
        for sum in sums {
            black_box(sum.sum());
        }
    }
}
