//! Instruction sets chosen at run time, and functions the compiler turns into vector code.
//!
//! A kernel is one generic body, written so that its inner loops run over a constant number of
//! lanes; [`versions`] compiles it once per instruction set and picks at run time.

use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction set a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Level {
    /// Whatever every processor of this architecture has.
    Portable = 1,
    /// 8 lanes with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 16 lanes with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

static LEVEL: AtomicU8 = AtomicU8::new(0);

/// Gives the best level this processor has.
pub(crate) fn level() -> Level {
    match LEVEL.load(Ordering::Relaxed) {
        0 => {
            let best = best();
            LEVEL.store(best as u8, Ordering::Relaxed);
            best
        }
        #[cfg(target_arch = "x86_64")]
        level if level == Level::Avx512 as u8 => Level::Avx512,
        #[cfg(target_arch = "x86_64")]
        level if level == Level::Avx2 as u8 => Level::Avx2,
        _ => Level::Portable,
    }
}

fn best() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq");
        if avx2 && avx512 {
            return Level::Avx512;
        }
        if avx2 {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// Runs a test once per level this processor has.
#[cfg(test)]
pub(crate) fn at_every_level(mut test: impl FnMut(Level)) {
    let best = best();
    let levels = [
        Level::Portable,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512,
    ];
    for level in levels.into_iter().filter(|level| *level <= best) {
        LEVEL.store(level as u8, Ordering::Relaxed);
        test(level);
    }
    LEVEL.store(best as u8, Ordering::Relaxed);
}

/// The most lanes [`versions`] asks for; a multiple of all others.
pub(crate) const MAX_LANES: usize = 32;

/// Compiles a generic body `fn body<const LANES: usize, const FMA: bool>(…)` per level.
///
/// `LANES` is how many numbers an inner loop should handle at once: two vectors. The body and what
/// it calls must be inlined to get the instructions, so it borrows scratch from its caller rather
/// than through a closure.
macro_rules! versions {
    ($($(#[$meta:meta])* $visible:vis fn $name:ident(
        $($argument:ident: $type:ty),* $(,)?
    ) $(-> $result:ty)? = $body:path;)*) => {$(
        $(#[$meta])*
        $visible fn $name($($argument: $type),*) $(-> $result)? {
            use $body as body;
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn avx512($($argument: $type),*) $(-> $result)? {
                    body::<32, true>($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    body::<16, true>($($argument),*)
                }
                match $crate::simd::level() {
                    $crate::simd::Level::Avx512 => {
                        // SAFETY: this level is only chosen where the features were detected.
                        return unsafe { avx512($($argument),*) };
                    }
                    $crate::simd::Level::Avx2 => {
                        // SAFETY: this level is only chosen where the features were detected.
                        return unsafe { avx2($($argument),*) };
                    }
                    $crate::simd::Level::Portable => {}
                }
            }
            // NEON is part of every 64-bit Arm and has 32 registers and fused multiply-add.
            #[cfg(target_arch = "aarch64")]
            return body::<16, true>($($argument),*);
            #[cfg(not(target_arch = "aarch64"))]
            body::<8, false>($($argument),*)
        }
    )*};
}
pub(crate) use versions;

/// Computes `a · b + c`, fused where that is one instruction.
#[inline(always)]
pub(crate) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn polynomial<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[0];
    for coefficient in &coefficients[1..] {
        sum = fma::<FMA>(sum, x, *coefficient);
    }
    sum
}

/// Takes the larger; the second where one is not a number. One instruction, unlike [`f32::max`].
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Takes the smaller; the second where one is not a number.
#[inline(always)]
pub(crate) fn smaller(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// Computes `eˣ` to about 1e-7 relative; 0 below -87, at most about 1e38.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    // Adding 1.5 · 2²³ leaves the nearest whole number in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with few enough bits to make its products exact.
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -0.000_212_194_44;
    let held = smaller(88.0, x);
    let shifted = fma::<FMA>(held, std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let rest = fma::<FMA>(whole, -LOW, fma::<FMA>(whole, -HIGH, held));
    // A Chebyshev fit over ±(ln 2)/2, error 2e-9.
    let power = polynomial::<FMA, 7>(
        rest,
        [0.001_394_110_8, 0.008_375_126, 0.041_666_35, 0.166_664_15, 0.5, 1.0, 1.0],
    );
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { power * scale }
}

/// Computes `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// Computes the hyperbolic tangent to about 2e-7 relative.
#[inline(always)]
pub(crate) fn tanh<const FMA: bool>(x: f32) -> f32 {
    let far = 1.0 - 2.0 / (exp::<FMA>(2.0 * x) + 1.0);
    // Near 0 the difference above loses its digits; a Chebyshev fit over |x| < 0.6, error 3e-9.
    let square = x * x;
    let near = x * polynomial::<FMA, 6>(
        square,
        [-0.005_849_644, 0.020_751_35, -0.053_767_983, 0.133_316_8, -0.333_332_84, 1.0],
    );
    if square < 0.36 { near } else { far }
}

/// Computes the normal distribution's share below `x` and its density at `x`.
#[inline(always)]
pub(crate) fn normal<const FMA: bool>(x: f32) -> (f32, f32) {
    let z = smaller(x.abs() * std::f32::consts::FRAC_1_SQRT_2, 6.0);
    let t = 2.0 / (2.0 + z);
    // ln(erfc(z) / t) + z² over 0 ≤ z ≤ 14, a Chebyshev fit in t of error 2e-8.
    let logarithm = polynomial::<FMA, 10>(
        t,
        [
            0.081_933_85,
            -0.325_365_84,
            0.285_740_32,
            0.517_964_2,
            -1.139_573_7,
            0.599_879_4,
            -0.184_116_75,
            0.436_383_6,
            0.992_251_34,
            -1.265_096_4,
        ],
    );
    let half_tail = 0.5 * t * exp::<FMA>(fma::<FMA>(-z, z, logarithm));
    let below = if x < 0.0 { half_tail } else { 1.0 - half_tail };
    // 1 / √(2π)
    let density = 0.398_942_3 * exp::<FMA>(-z * z);
    (below, density)
}

/// Computes `Σ a · b`; both are equally long.
#[inline(always)]
pub(crate) fn dot<const LANES: usize, const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] = fma::<FMA>(a[lane], b[lane], sums[lane]);
        }
    }
    let rest = a_rest.iter().zip(b_rest).fold(0.0, |sum, (a, b)| fma::<FMA>(*a, *b, sum));
    self::sum(sums) + rest
}

/// Adds up in an order that depends on the number of lanes alone.
#[inline(always)]
pub(crate) fn sum<const LANES: usize>(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
}

/// Transposes a block of 8 by 8: within 64 bits, within 128, whole.
#[inline]
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
pub(crate) fn transpose_8(a: &[std::arch::x86_64::__m256; 8]) -> [std::arch::x86_64::__m256; 8] {
    use std::arch::x86_64::{
        _mm256_permute2f128_ps, _mm256_shuffle_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };
    let mut b = *a;
    for i in (0..8).step_by(2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    let mut c = b;
    for g in (0..8).step_by(4) {
        c[g] = _mm256_shuffle_ps::<0x44>(b[g], b[g + 2]);
        c[g + 1] = _mm256_shuffle_ps::<0xee>(b[g], b[g + 2]);
        c[g + 2] = _mm256_shuffle_ps::<0x44>(b[g + 1], b[g + 3]);
        c[g + 3] = _mm256_shuffle_ps::<0xee>(b[g + 1], b[g + 3]);
    }
    let mut d = c;
    for j in 0..4 {
        d[j] = _mm256_permute2f128_ps::<0x20>(c[j], c[4 + j]);
        d[4 + j] = _mm256_permute2f128_ps::<0x31>(c[j], c[4 + j]);
    }
    d
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error of `got` against `want` over a grid, relative to `size(want)`.
    fn error(
        range: std::ops::Range<f64>,
        got: impl Fn(f32) -> f32,
        want: impl Fn(f64) -> f64,
        size: impl Fn(f64) -> f64,
    ) -> f64 {
        let at = |i: u32| (range.start + (range.end - range.start) * f64::from(i) / 1e5) as f32;
        (0..=100_000)
            .map(|i| {
                let want = want(f64::from(at(i)));
                (f64::from(got(at(i))) - want).abs() / size(want)
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn exponential_is_close() {
        assert!(error(-80.0..80.0, exp::<true>, f64::exp, |x| x) < 1.5e-7);
        assert!(error(-80.0..80.0, exp::<false>, f64::exp, |x| x) < 1.5e-7);
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(0.0), 1.0);
        assert!(exp::<true>(1e9).is_finite());
        assert!(exp::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn tangent_and_sigmoid_are_close() {
        assert!(error(-20.0..20.0, tanh::<true>, f64::tanh, f64::abs) < 3e-7);
        let want = |x: f64| 1.0 / (1.0 + (-x).exp());
        assert!(error(-80.0..80.0, sigmoid::<true>, want, |_| 1.0) < 1e-7);
        assert_eq!(
            [tanh::<true>(0.0), tanh::<true>(200.0), tanh::<true>(-200.0)],
            [0.0, 1.0, -1.0]
        );
    }

    #[test]
    fn normal_distribution_is_close() {
        // Shares below, to ten digits.
        for (x, want) in [
            (0.0, 0.5),
            (0.5, 0.691_462_461_3),
            (-1.0, 0.158_655_253_9),
            (2.0, 0.977_249_868_1),
            (-3.0, 0.001_349_898_031_6),
            (-5.0, 2.866_515_719e-7),
        ] {
            let (below, density) = normal::<true>(x);
            assert!((f64::from(below) - want).abs() < 1e-7, "{x}: {below}");
            let want = (-0.5 * f64::from(x * x)).exp() / std::f64::consts::TAU.sqrt();
            assert!((f64::from(density) - want).abs() < 1e-7, "{x}: {density}");
        }
        assert_eq!(normal::<true>(100.0).0, 1.0);
        assert!(normal::<true>(-100.0).0 < 1e-12);
    }
}
