//! Which instructions this machine has, found out once at run time.

use std::sync::OnceLock;

use super::Arithmetic;
#[cfg(target_arch = "x86_64")]
use super::tile::amx;

/// The innermost loop to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Whatever the compiler makes of plain loops (NEON on AArch64).
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with dot products of bf16 pairs.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// AMX tiles of bf16.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AMX tiles, with every `f32` split into three bf16.
    #[cfg(target_arch = "x86_64")]
    AmxSplit,
}

impl Kernel {
    /// Picks the fastest kernel of this machine for an arithmetic.
    pub(crate) fn choose(arithmetic: Arithmetic) -> Self {
        static BEST: OnceLock<[Kernel; 2]> = OnceLock::new();
        let [single, half] = BEST.get_or_init(|| {
            let available = Self::available();
            let single = available.iter().rfind(|kernel| !kernel.rounds_to_bf16());
            let single = single.copied().unwrap_or(Self::Portable);
            let half = available.iter().rfind(|kernel| kernel.rounds_to_bf16() && kernel.pays());
            [single, half.copied().unwrap_or(single)]
        });
        match arithmetic {
            Arithmetic::F32 | Arithmetic::Int8 => *single,
            Arithmetic::Bf16 => *half,
        }
    }

    /// Picks the best instructions for loops over plain `f32`.
    pub(crate) fn plain() -> Self {
        static BEST: OnceLock<Kernel> = OnceLock::new();
        *BEST.get_or_init(|| {
            let available = Self::available();
            let plain = available.iter().rfind(|kernel| kernel.is_plain());
            plain.copied().unwrap_or(Self::Portable)
        })
    }

    /// Lists what this machine can run, slowest first.
    pub(crate) fn available() -> Vec<Self> {
        let mut kernels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
            kernels.extend(avx2.then_some(Self::Avx2));
            kernels.extend(avx512.then_some(Self::Avx512));
            kernels.extend(bf16.then_some(Self::Avx512Bf16));
            if bf16 && amx::is_available() {
                kernels.extend([Self::AmxSplit, Self::Amx]);
            }
        }
        kernels
    }

    /// Tells whether numbers are multiplied as they are.
    fn is_plain(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::Avx512 => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 | Self::Amx | Self::AmxSplit => false,
        }
    }

    /// Tells whether factors are rounded to bf16.
    pub(crate) fn rounds_to_bf16(self) -> bool {
        match self {
            Self::Portable => false,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::Avx512 | Self::AmxSplit => false,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 | Self::Amx => true,
        }
    }

    /// Tells whether this bf16 kernel beats `f32` on processors that have it.
    ///
    /// Intel's processors with AMX run the AVX-512 dot product of bf16 pairs at a quarter of the
    /// rate of `f32` multiply-adds (measured: half the products per second), so there it is AMX or
    /// nothing; AMD's run it at the full rate.
    fn pays(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => !amx::is_in_processor(),
            _ => true,
        }
    }
}
