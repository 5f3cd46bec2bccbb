//! Conversions in bulk between `f32` and the narrower floats checkpoints are stored in.
//!
//! All byte slices are little endian, as in safetensors and GGUF. Narrowing rounds to nearest, ties
//! to even; a finite value that would become an infinity is refused, since such a weight ruins a
//! model silently.

use half::{bf16, f16, slice::HalfFloatSliceExt};

/// Values converted per step through a buffer on the stack, large enough for vector code.
const STEP: usize = 512;

/// Copies `f32` values out of bytes. Both must hold the same number of values.
pub(crate) fn f32_from_le(bytes: &[u8], out: &mut [f32]) {
    for (b, y) in bytes.as_chunks().0.iter().zip(out) {
        *y = f32::from_le_bytes(*b);
    }
}

/// Copies `f32` values into bytes. Both must hold the same number of values.
pub(crate) fn f32_to_le(values: &[f32], out: &mut [u8]) {
    for (b, v) in out.as_chunks_mut().0.iter_mut().zip(values) {
        *b = v.to_le_bytes();
    }
}

/// Widens IEEE halves.
///
/// # Shapes
/// - `bytes`: `[2n]`, `out`: `[n]`; the shorter of the two decides
pub fn f16_to_f32(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [f16::ZERO; STEP];
    for (bytes, out) in bytes.chunks(2 * STEP).zip(out.chunks_mut(STEP)) {
        let pairs = bytes.as_chunks().0;
        let n = pairs.len().min(out.len());
        for (half, pair) in halves.iter_mut().zip(pairs) {
            *half = f16::from_le_bytes(*pair);
        }
        halves[..n].convert_to_f32_slice(&mut out[..n]);
    }
}

/// Widens brain floats; exact, NaN payloads included.
///
/// # Shapes
/// - `bytes`: `[2n]`, `out`: `[n]`; the shorter of the two decides
pub fn bf16_to_f32(bytes: &[u8], out: &mut [f32]) {
    for (b, y) in bytes.as_chunks().0.iter().zip(out) {
        *y = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
    }
}

/// Narrows to IEEE halves.
///
/// # Shapes
/// - `values`: `[n]`, `out`: `[2n]`; the shorter of the two decides
/// # Errors
/// The index of the first finite value beyond ±65504 (the half's range). NaN and infinities pass.
pub fn f32_to_f16(values: &[f32], out: &mut [u8]) -> Result<(), usize> {
    let mut halves = [f16::ZERO; STEP];
    for (step, (values, out)) in values.chunks(STEP).zip(out.chunks_mut(2 * STEP)).enumerate() {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        for (i, ((half, v), b)) in halves.iter().zip(values).zip(out.as_chunks_mut().0).enumerate()
        {
            if half.is_infinite() && v.is_finite() {
                return Err(step * STEP + i);
            }
            *b = half.to_le_bytes();
        }
    }
    Ok(())
}

/// Narrows to brain floats.
///
/// # Shapes
/// - `values`: `[n]`, `out`: `[2n]`; the shorter of the two decides
/// # Errors
/// The index of the first finite value that rounds to an infinity. NaN and infinities pass.
pub fn f32_to_bf16(values: &[f32], out: &mut [u8]) -> Result<(), usize> {
    for (i, (v, b)) in values.iter().zip(out.as_chunks_mut().0).enumerate() {
        let narrow = bf16::from_f32(*v);
        if narrow.is_infinite() && v.is_finite() {
            return Err(i);
        }
        *b = narrow.to_le_bytes();
    }
    Ok(())
}
