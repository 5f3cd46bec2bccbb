//! Tiles of bf16 pairs with Intel's AMX: sixteen by sixteen outputs and thirty-two products each
//! per instruction.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use half::bf16;

use super::{LANES, Panels, Tile, TileOutput, TileStart, avx512, avx512_bf16};

pub(crate) struct Amx;

/// Odd in cache lines, so the rows of a left tile spread over the sets of the first-level cache.
const DEPTH: usize = 336;

impl Tile for Amx {
    const ROWS: usize = 32;
    const ROW_GRANULE: usize = 16;
    const PANELS: usize = 2;
    const DEPTH: usize = DEPTH;
    const BLOCK: usize = 288;
    const UNIT_GRANULE: usize = 16;
    const CHUNK: usize = 1024;
    const PAIRS: bool = true;

    unsafe fn session(work: impl FnOnce()) {
        // SAFETY: as the caller promises.
        unsafe { session(work) }
    }

    unsafe fn tile(left: *const u32, right: Panels, units: usize, output: TileOutput) {
        // SAFETY: as the caller promises; rows come in sixteens and units too.
        unsafe {
            match (output.rows > 16, output.panels > 1) {
                (false, false) => tile_1x1(left, right, units, output),
                (false, true) => tile_1x2(left, right, units, output),
                (true, false) => tile_2x1(left, right, units, output),
                (true, true) => tile_2x2(left, right, units, output),
            }
        }
    }

    unsafe fn transpose(rows: &[*const u32; LANES], units: usize, panel: *mut u32) {
        // SAFETY: as the caller promises.
        unsafe { avx512::transpose(rows, units, panel) }
    }

    unsafe fn join(values: &[f32], units: &mut [u32], _: usize) {
        // SAFETY: as the caller promises.
        unsafe { avx512_bf16::join(values, units) }
    }

    unsafe fn join_rows(first: &[f32], second: Option<&[f32]>, units: &mut [u32], _: usize) {
        // SAFETY: as the caller promises.
        unsafe { avx512_bf16::join_rows(first, second, units) }
    }

    unsafe fn pair_rows(first: &[bf16], second: &[bf16], units: &mut [u32]) {
        // SAFETY: as the caller promises.
        unsafe { avx512_bf16::pair_rows(first, second, units) }
    }
}

/// Runs `work` with all tiles at their full size.
///
/// # Safety
/// The processor has AMX and the process may use it.
pub(super) unsafe fn session(work: impl FnOnce()) {
    let shape = Shape::FULL;
    // SAFETY: the caller promises AMX; the configuration is 64 bytes of a valid palette.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shape, options(nostack, readonly)) }
    work();
    // SAFETY: gives the tiles back, which the caller promises exist.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

/// The 64 bytes that give the eight tiles their shapes.
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shape {
    /// All eight tiles at their full sixteen rows of 64 bytes.
    const FULL: Self = Self {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };
}

/// Two panels of zeros for sums that start from nothing.
static ZEROS: [f32; 2 * LANES] = [0.0; 2 * LANES];

/// Where sums start: an address, and bytes between rows (none where all rows start alike).
pub(super) fn start(output: &TileOutput) -> (*const f32, usize) {
    match output.start {
        TileStart::Zero => (ZEROS.as_ptr(), 0),
        TileStart::Bias(bias) => (bias, 0),
        TileStart::Output => (output.values, output.stride * 4),
    }
}

/// Defines one shape of tile; the lists are the instructions that differ between shapes.
macro_rules! tile {
    ($name:ident, start $start:tt, step $step:tt, finish $finish:tt) => {
        /// # Safety
        /// As [`Tile::tile`], inside [`Tile::session`].
        #[inline]
        unsafe fn $name(left: *const u32, right: Panels, units: usize, output: TileOutput) {
            let (from, from_stride) = start(&output);
            // SAFETY: the caller promises the rows, panels and output that are read and written
            // here, and that the tiles are configured; nothing else touches tile registers.
            unsafe {
                tile!(@ $start $step $finish, left, right, units, output, from, from_stride);
            }
        }
    };
    (@ ($($start:literal)*) ($($step:literal)*) ($($finish:literal)*), $left:ident, $right:ident,
     $units:ident, $output:ident, $from:ident, $from_stride:ident) => {
        asm!(
            $($start,)*
            "test {n}, {n}",
            "jz 3f",
            "2:",
            $($step,)*
            "add {a}, 64",
            "add {b}, 1024",
            "add {c}, 1024",
            "dec {n}",
            "jnz 2b",
            "3:",
            $($finish,)*
            from = inout(reg) $from => _,
            from_stride = in(reg) $from_stride,
            from_16 = in(reg) $from_stride * 16,
            a = inout(reg) $left => _,
            a_stride = in(reg) DEPTH * 4,
            b = inout(reg) $right.first => _,
            c = inout(reg) $right.first.wrapping_add($right.part) => _,
            b_stride = in(reg) 64_usize,
            to = inout(reg) $output.values => _,
            to_stride = in(reg) $output.stride * 4,
            n = inout(reg) $units / 16 => _,
            a_16 = const DEPTH * 4 * 16,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

tile!(
    tile_1x1,
    start ("tileloadd tmm0, [{from} + {from_stride}*1] /* {from_16} {a_16} */"),
    step (
        "tileloadd tmm4, [{a} + {a_stride}*1]"
        "tileloadd tmm6, [{b} + {b_stride}*1]"
        "tdpbf16ps tmm0, tmm4, tmm6"
    ),
    finish ("tilestored [{to} + {to_stride}*1], tmm0")
);
tile!(
    tile_1x2,
    start (
        "tileloadd tmm0, [{from} + {from_stride}*1] /* {from_16} {a_16} */"
        "tileloadd tmm1, [{from} + {from_stride}*1 + 64]"
    ),
    step (
        "tileloadd tmm4, [{a} + {a_stride}*1]"
        "tileloadd tmm6, [{b} + {b_stride}*1]"
        "tileloadd tmm7, [{c} + {b_stride}*1]"
        "tdpbf16ps tmm0, tmm4, tmm6"
        "tdpbf16ps tmm1, tmm4, tmm7"
    ),
    finish (
        "tilestored [{to} + {to_stride}*1], tmm0"
        "tilestored [{to} + {to_stride}*1 + 64], tmm1"
    )
);
tile!(
    tile_2x1,
    start (
        "tileloadd tmm0, [{from} + {from_stride}*1]"
        "add {from}, {from_16}"
        "tileloadd tmm2, [{from} + {from_stride}*1]"
    ),
    step (
        "tileloadd tmm4, [{a} + {a_stride}*1]"
        "tileloadd tmm6, [{b} + {b_stride}*1]"
        "tileloadd tmm5, [{a} + {a_stride}*1 + {a_16}]"
        "tdpbf16ps tmm0, tmm4, tmm6"
        "tdpbf16ps tmm2, tmm5, tmm6"
    ),
    finish (
        "tilestored [{to} + {to_stride}*1], tmm0"
        "mov {n}, {to_stride}"
        "shl {n}, 4"
        "add {to}, {n}"
        "tilestored [{to} + {to_stride}*1], tmm2"
    )
);
tile!(
    tile_2x2,
    start (
        "tileloadd tmm0, [{from} + {from_stride}*1]"
        "tileloadd tmm1, [{from} + {from_stride}*1 + 64]"
        "add {from}, {from_16}"
        "tileloadd tmm2, [{from} + {from_stride}*1]"
        "tileloadd tmm3, [{from} + {from_stride}*1 + 64]"
    ),
    step (
        "tileloadd tmm4, [{a} + {a_stride}*1]"
        "tileloadd tmm6, [{b} + {b_stride}*1]"
        "tileloadd tmm7, [{c} + {b_stride}*1]"
        "tdpbf16ps tmm0, tmm4, tmm6"
        "tileloadd tmm5, [{a} + {a_stride}*1 + {a_16}]"
        "tdpbf16ps tmm1, tmm4, tmm7"
        "tdpbf16ps tmm2, tmm5, tmm6"
        "tdpbf16ps tmm3, tmm5, tmm7"
    ),
    finish (
        "tilestored [{to} + {to_stride}*1], tmm0"
        "tilestored [{to} + {to_stride}*1 + 64], tmm1"
        "mov {n}, {to_stride}"
        "shl {n}, 4"
        "add {to}, {n}"
        "tilestored [{to} + {to_stride}*1], tmm2"
        "tilestored [{to} + {to_stride}*1 + 64], tmm3"
    )
);

/// Multiplies tiles in registers, four independent sums at a time.
///
/// # Safety
/// The process may use AMX.
pub(in super::super) unsafe fn spin(rounds: usize) {
    let zeros = [0_u8; 1024];
    // SAFETY: the caller promises AMX; the eight tiles are configured and read zeros only.
    unsafe {
        session(|| {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tileloadd tmm4, [{zeros} + {stride}*1]",
                "tileloadd tmm5, [{zeros} + {stride}*1]",
                "tileloadd tmm6, [{zeros} + {stride}*1]",
                "tileloadd tmm7, [{zeros} + {stride}*1]",
                "test {n}, {n}",
                "jz 3f",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {n}",
                "jnz 2b",
                "3:",
                zeros = in(reg) zeros.as_ptr(),
                stride = in(reg) 64_usize,
                n = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly),
            );
        });
    }
}

/// Operations of one round of [`spin`].
pub(in super::super) const SPIN: u64 = 4 * 2 * 16 * 16 * 32;

/// Tells whether the processor has AMX's tiles and bf16 products, permitted or not.
pub(crate) fn is_in_processor() -> bool {
    // Leaf 7, EDX: bit 22 is AMX-BF16, bit 24 AMX-TILE.
    let needed = 1 << 22 | 1 << 24;
    __cpuid_count(0, 0).eax >= 7 && __cpuid_count(7, 0).edx & needed == needed
}

/// Tells whether this process may use AMX, asking the system for it the first time.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| is_in_processor() && permitted())
}

/// Asks Linux for the tile registers, which a process must do before it first touches them.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let result: i64;
    // SAFETY: this request takes two numbers, touches no memory of ours, and a kernel that does
    // not know it or has no tiles answers with an error.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}
