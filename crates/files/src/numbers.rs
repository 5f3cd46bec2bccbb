//! Conversions in bulk between `f32` and the narrower floats checkpoints are stored in.
//!
//! All byte slices are little endian, as in safetensors and GGUF. Narrowing rounds to nearest, ties
//! to even; a finite value that would become an infinity is refused, since such a weight ruins a
//! model silently.

use half::{bf16, f16, slice::HalfFloatSliceExt};

/// Bits of the largest `f32` that does not round to an infinity of brain floats.
const LARGEST_BF16: i32 = 0x7f7f_7fff;

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
    for (step, (values, out)) in values.chunks(STEP).zip(out.chunks_mut(2 * STEP)).enumerate() {
        let out = out.as_chunks_mut().0;
        // Without a branch per value, so that whole vectors are converted at once.
        let is_plain = |v: &f32| (v.to_bits() & 0x7fff_ffff) as i32 <= LARGEST_BF16;
        if values.iter().fold(true, |all, v| all & is_plain(v)) {
            for (v, b) in values.iter().zip(out) {
                let bits = v.to_bits();
                *b = (((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16).to_le_bytes();
            }
            continue;
        }
        for (i, (v, b)) in values.iter().zip(out).enumerate() {
            if v.is_finite() && !is_plain(v) {
                return Err(step * STEP + i);
            }
            *b = bf16::from_f32(*v).to_le_bytes();
        }
    }
    Ok(())
}

/// Widens 8-bit floats with 4 bits of exponent and 3 of mantissa (`F8_E4M3`, "fn": bias 7, no
/// infinities, NaN only as `0x7f` and `0xff`). Exact.
///
/// # Shapes
/// - `bytes`: `[n]`, `out`: `[n]`; the shorter of the two decides
pub fn f8_e4m3_to_f32(bytes: &[u8], out: &mut [f32]) {
    for (b, y) in bytes.iter().zip(out) {
        *y = E4M3[usize::from(*b)];
    }
}

/// Widens 8-bit floats with 5 bits of exponent and 2 of mantissa (`F8_E5M2`: bias 15, infinities
/// and NaN as in IEEE halves). Exact.
///
/// # Shapes
/// - `bytes`: `[n]`, `out`: `[n]`; the shorter of the two decides
pub fn f8_e5m2_to_f32(bytes: &[u8], out: &mut [f32]) {
    for (b, y) in bytes.iter().zip(out) {
        *y = E5M2[usize::from(*b)];
    }
}

/// Narrows to `F8_E4M3`, rounding to nearest, ties to even.
///
/// # Shapes
/// - `values`: `[n]`, `out`: `[n]`; the shorter of the two decides
/// # Errors
/// The index of the first value that is infinite or rounds beyond ±448. NaN passes.
pub fn f32_to_f8_e4m3(values: &[f32], out: &mut [u8]) -> Result<(), usize> {
    narrow_f8(values, out, &E4M3, 0x7e, f32::is_infinite)
}

/// Narrows to `F8_E5M2`, rounding to nearest, ties to even.
///
/// # Shapes
/// - `values`: `[n]`, `out`: `[n]`; the shorter of the two decides
/// # Errors
/// The index of the first finite value that rounds beyond ±57344. NaN and infinities pass.
pub fn f32_to_f8_e5m2(values: &[f32], out: &mut [u8]) -> Result<(), usize> {
    narrow_f8(values, out, &E5M2, 0x7b, |_| false)
}

/// Finds the nearest 8-bit float by its place in the table of positive values.
///
/// `largest` is the code of the largest finite value. Codes grow with their values, so the
/// neighbours of a value are neighbouring codes, and the even one wins a tie.
fn narrow_f8(
    values: &[f32],
    out: &mut [u8],
    table: &[f32; 256],
    largest: u8,
    refuse: impl Fn(f32) -> bool,
) -> Result<(), usize> {
    let finite = &table[..=usize::from(largest)];
    let (top, below_top) = (finite[usize::from(largest)], finite[usize::from(largest) - 1]);
    // The first value that would round up to the step after the largest.
    let limit = top + (top - below_top) / 2.0;
    for (i, (v, b)) in values.iter().zip(out).enumerate() {
        let magnitude = v.abs();
        let sign = if v.is_sign_negative() { 0x80 } else { 0 };
        *b = sign
            | if v.is_nan() {
                0x7f
            } else if refuse(*v) || (v.is_finite() && magnitude >= limit) {
                return Err(i);
            } else if v.is_infinite() {
                0x7c
            } else {
                let above = finite.partition_point(|y| *y < magnitude).min(usize::from(largest));
                let below = above.saturating_sub(1);
                let (up, down) = (finite[above] - magnitude, magnitude - finite[below]);
                let nearest = match up.total_cmp(&down) {
                    std::cmp::Ordering::Less => above,
                    std::cmp::Ordering::Equal if above.is_multiple_of(2) => above,
                    std::cmp::Ordering::Greater | std::cmp::Ordering::Equal => below,
                };
                nearest as u8
            };
    }
    Ok(())
}

static E4M3: [f32; 256] = f8_table(3, 7, false);
static E5M2: [f32; 256] = f8_table(2, 15, true);

/// Lists the values of all 256 codes of an 8-bit float.
const fn f8_table(mantissa_bits: u32, bias: i32, ieee: bool) -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256u32 {
        let mantissa = code & ((1 << mantissa_bits) - 1);
        let exponent = (code & 0x7f) >> mantissa_bits;
        let all_ones = 0x7f >> mantissa_bits;
        let magnitude = if ieee && exponent == all_ones {
            if mantissa == 0 { f32::INFINITY } else { f32::NAN }
        } else if !ieee && code & 0x7f == 0x7f {
            f32::NAN
        } else {
            // A subnormal has the exponent of the smallest normal and no leading one.
            let (whole, power) = if exponent == 0 {
                (mantissa, 1 - bias)
            } else {
                (mantissa | 1 << mantissa_bits, exponent as i32 - bias)
            };
            whole as f32 * power_of_two(power - mantissa_bits as i32)
        };
        table[code as usize] = if code & 0x80 == 0 { magnitude } else { -magnitude };
        code += 1;
    }
    table
}

const fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn f8_values_are_those_of_the_format() {
        let mut y = [0.0; 6];
        f8_e4m3_to_f32(&[0x01, 0x08, 0x38, 0x7e, 0xb9, 0x80], &mut y);
        assert_eq!(y, [0.001953125, 0.015625, 1.0, 448.0, -1.125, -0.0]);
        f8_e5m2_to_f32(&[0x01, 0x04, 0x3c, 0x7b, 0xbd, 0x7c], &mut y);
        assert_eq!(y, [1.5258789e-5, 6.1035156e-5, 1.0, 57344.0, -1.25, f32::INFINITY]);
        f8_e4m3_to_f32(&[0x7f, 0xff], &mut y[..2]);
        assert!(y[0].is_nan() && y[1].is_nan());
    }

    fn e4m3(v: f32) -> Result<u8, usize> {
        let mut out = [0];
        f32_to_f8_e4m3(&[v], &mut out).map(|()| out[0])
    }

    fn e5m2(v: f32) -> Result<u8, usize> {
        let mut out = [0];
        f32_to_f8_e5m2(&[v], &mut out).map(|()| out[0])
    }

    #[test]
    fn f8_rounds_ties_to_even_and_refuses_overflow() {
        // Between 1.0 (0x38) and 1.125 (0x39), and between 0x39 and 1.25 (0x3a).
        assert_eq!(e4m3(1.0625), Ok(0x38));
        assert_eq!(e4m3(1.1875), Ok(0x3a));
        assert_eq!(e4m3(1.0626), Ok(0x39));
        // Half of the smallest subnormal ties to zero; a little more does not.
        assert_eq!(e4m3(0.0009765625), Ok(0x00));
        assert_eq!(e4m3(0.001), Ok(0x01));
        assert_eq!(e4m3(-0.0), Ok(0x80));
        assert_eq!(e4m3(463.9), Ok(0x7e));
        assert_eq!(e4m3(464.0), Err(0));
        assert_eq!(e4m3(f32::INFINITY), Err(0));
        assert_eq!(e4m3(f32::NAN).map(|b| b & 0x7f), Ok(0x7f));
        assert_eq!(e5m2(61439.0), Ok(0x7b));
        assert_eq!(e5m2(61440.0), Err(0));
        assert_eq!(e5m2(f32::NEG_INFINITY), Ok(0xfc));
        assert_eq!(e5m2(1.125), Ok(0x3c));
        assert_eq!(e5m2(1.375), Ok(0x3e));
    }

    #[test]
    fn every_8_and_16_bit_code_survives_both_ways() {
        for code in 0..=255u8 {
            let mut y = [0.0; 2];
            f8_e4m3_to_f32(&[code], &mut y[..1]);
            f8_e5m2_to_f32(&[code], &mut y[1..]);
            if !y[0].is_nan() {
                assert_eq!(e4m3(y[0]), Ok(code));
            }
            if !y[1].is_nan() {
                assert_eq!(e5m2(y[1]), Ok(code));
            }
        }
        let codes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut values = vec![0.0; 1 << 16];
        let mut back = vec![0; 1 << 17];
        f16_to_f32(&codes, &mut values);
        f32_to_f16(&values, &mut back).unwrap();
        let same = |values: &[f32], back: &[u8]| {
            for ((v, b), c) in values.iter().zip(back.chunks(2)).zip(codes.chunks(2)) {
                assert!(v.is_nan() || b == c, "{v}: {b:?} {c:?}");
            }
        };
        same(&values, &back);
        bf16_to_f32(&codes, &mut values);
        f32_to_bf16(&values, &mut back).unwrap();
        same(&values, &back);
    }

    #[test]
    fn overflow_is_found_beyond_the_first_step() {
        let mut values = vec![1.0; 3 * STEP + 7];
        values[2 * STEP + 5] = 65520.0;
        let mut out = vec![0; 2 * values.len()];
        assert_eq!(f32_to_f16(&values, &mut out), Err(2 * STEP + 5));
        values[2 * STEP + 5] = f32::MAX;
        assert_eq!(f32_to_bf16(&values, &mut out), Err(2 * STEP + 5));
    }

    proptest! {
        #[test]
        fn bf16_rounds_as_the_half_crate(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            let mut out = [0; 2];
            let expected = bf16::from_f32(value);
            if value.is_finite() && expected.is_infinite() {
                prop_assert_eq!(f32_to_bf16(&[0.0, value], &mut [0; 4]), Err(1));
            } else {
                f32_to_bf16(&[value], &mut out).unwrap();
                prop_assert_eq!(bf16::from_le_bytes(out).to_bits(), expected.to_bits());
            }
        }

        /// No other code is nearer.
        #[test]
        fn f8_is_the_nearest_value(v in -500.0f32..500.0) {
            if let Ok(code) = e4m3(v) {
                let error = (E4M3[usize::from(code)] - v).abs();
                for y in E4M3.iter().filter(|y| !y.is_nan()) {
                    prop_assert!(error <= (y - v).abs());
                }
            }
        }
    }
}
