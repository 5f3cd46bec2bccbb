//! Small matrix products in registers, the inner loop of attention and the output head.

use crate::simd::fma;

/// Where the left operand's element `(row, step)` lies.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) row_stride: usize,
    pub(crate) step_stride: usize,
}

/// Computes `C = A · B` or `C += A · B` for `LANES` columns.
///
/// - `left`: `[rows, steps]` at any strides
/// - `right`: row `s` of `[steps, LANES]` begins at `s · right_stride`
/// - `out`: row `r` of `[rows, LANES]` begins at `r · out_stride`
#[inline(always)]
pub(crate) fn multiply<const LANES: usize, const FMA: bool, const ADD: bool>(
    rows: usize,
    steps: usize,
    left: Left<'_>,
    right: &[f32],
    right_stride: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    if rows == 0 {
        return;
    }
    if steps > 0 {
        assert!((rows - 1) * left.row_stride + (steps - 1) * left.step_stride < left.values.len());
        assert!((steps - 1) * right_stride + LANES <= right.len());
    }
    assert!((rows - 1) * out_stride + LANES <= out.len());
    let mut row = 0;
    // As many rows as leave registers for the right operand: 16 of 32, 12 of 16, 8 of 16.
    let block = match LANES {
        32 => 8,
        16 => 6,
        8 if FMA => 12,
        _ => 4,
    };
    while row + block <= rows {
        // SAFETY: rows `row..row + block`, all steps and lanes lie inside by the assertions above.
        unsafe {
            if LANES == 32 {
                block_of::<8, LANES, FMA, ADD>(
                    row,
                    steps,
                    left,
                    right,
                    right_stride,
                    out,
                    out_stride,
                );
            } else if LANES == 16 {
                block_of::<6, LANES, FMA, ADD>(
                    row,
                    steps,
                    left,
                    right,
                    right_stride,
                    out,
                    out_stride,
                );
            } else if LANES == 8 && FMA {
                block_of::<12, LANES, FMA, ADD>(
                    row,
                    steps,
                    left,
                    right,
                    right_stride,
                    out,
                    out_stride,
                );
            } else {
                block_of::<4, LANES, FMA, ADD>(
                    row,
                    steps,
                    left,
                    right,
                    right_stride,
                    out,
                    out_stride,
                );
            }
        }
        row += block;
    }
    while row + 2 <= rows {
        // SAFETY: as above.
        unsafe {
            block_of::<2, LANES, FMA, ADD>(row, steps, left, right, right_stride, out, out_stride);
        }
        row += 2;
    }
    if row < rows {
        // SAFETY: as above.
        unsafe {
            block_of::<1, LANES, FMA, ADD>(row, steps, left, right, right_stride, out, out_stride);
        }
    }
}

/// Computes `ROWS` rows at once, their sums in registers.
///
/// # Safety
/// Rows `row..row + ROWS` over all `steps` and `LANES` must lie inside the three slices.
#[inline(always)]
unsafe fn block_of<const ROWS: usize, const LANES: usize, const FMA: bool, const ADD: bool>(
    row: usize,
    steps: usize,
    left: Left<'_>,
    right: &[f32],
    right_stride: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let mut sums = [[0.0f32; LANES]; ROWS];
    // SAFETY: the caller keeps every index below inside its slice.
    unsafe {
        let left_row = left.values.as_ptr().add(row * left.row_stride);
        for step in 0..steps {
            let right = &*right.as_ptr().add(step * right_stride).cast::<[f32; LANES]>();
            let left_step = left_row.add(step * left.step_stride);
            for (index, sums) in sums.iter_mut().enumerate() {
                let a = *left_step.add(index * left.row_stride);
                for (sum, b) in sums.iter_mut().zip(right) {
                    *sum = fma::<FMA>(a, *b, *sum);
                }
            }
        }
        for (index, sums) in sums.iter().enumerate() {
            let out = &mut *out.as_mut_ptr().add((row + index) * out_stride).cast::<[f32; LANES]>();
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = if ADD { *out + sum } else { *sum };
            }
        }
    }
}
