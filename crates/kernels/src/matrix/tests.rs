//! Every kernel of this machine against sums in `f64`, in every form and direction.

use std::sync::Arc;

use half::bf16;
use retune_files::ggml::BlockType;

use super::cpu::Kernel;
use super::operand::{Operand, Start, Term};
use super::*;
use crate::check::Numbers;

/// Sizes around the edges of tiles, panels, pairs and blocks.
const SIZES: [usize; 16] = [1, 2, 3, 7, 13, 15, 16, 17, 31, 33, 47, 64, 65, 97, 130, 700];

fn normal(numbers: &mut Numbers, count: usize) -> Vec<f32> {
    (0..count).map(|_| numbers.normal() as f32).collect()
}

fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|j| (0..rows).map(move |i| values[i * columns + j])).collect()
}

/// `start + a · bᵀ` in `f64` for `a` of `[m, k]` and `b` of `[n, k]`.
fn expected(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], start: &[f64]) -> Vec<f64> {
    let mut out = start.to_vec();
    for i in 0..m {
        for j in 0..n {
            let row = a[i * k..][..k].iter().zip(&b[j * k..][..k]);
            out[i * n + j] += row.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        }
    }
    out
}

/// Fails unless every element is within `tolerance` of the expected, both over `√k`.
#[track_caller]
fn close(what: &str, got: &[f32], want: &[f64], k: usize, tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want).abs();
        assert!(
            error <= tolerance * (k as f64).sqrt().max(1.0),
            "{what}[{index}]: got {got}, expected {want}"
        );
    }
}

/// Numbers as a kernel sees them.
fn seen(kernel: Kernel, values: &[f32]) -> Vec<f32> {
    let round = |x: &f32| if kernel.rounds_to_bf16() { bf16::from_f32(*x).to_f32() } else { *x };
    values.iter().map(round).collect()
}

#[test]
fn every_kernel_multiplies_two_terms_of_every_shape() {
    let mut numbers = Numbers(1);
    for kernel in Kernel::available() {
        for case in 0..200 {
            let m = numbers.pick(&SIZES);
            let n = numbers.pick(&SIZES);
            let (k, r) = (numbers.pick(&SIZES), numbers.pick(&[0, 1, 3, 8, 17]));
            let what = format!("{kernel:?}, case {case}: {m}x{n}x{k}+{r}");
            let a = seen(kernel, &normal(&mut numbers, m * k));
            let b = seen(kernel, &normal(&mut numbers, n * k));
            let u = seen(kernel, &normal(&mut numbers, m * r));
            let v = seen(kernel, &normal(&mut numbers, n * r));
            let bias = normal(&mut numbers, n);
            let before = normal(&mut numbers, m * n);
            let (at, bt) = (transposed(&a, m, k), transposed(&b, n, k));
            let left = if case % 2 == 0 { Operand::rows(&a, k) } else { Operand::columns(&at, m) };
            let right = if case % 3 == 0 { Operand::columns(&bt, n) } else { Operand::rows(&b, k) };
            let terms = [
                Term { left, right, length: k },
                Term { left: Operand::rows(&u, r), right: Operand::rows(&v, r), length: r },
            ];
            let (start, from) = match case % 5 {
                0 => (Start::Output, before.iter().map(|x| f64::from(*x)).collect()),
                1 => (Start::Zero, vec![0.0; m * n]),
                _ => (Start::Bias(&bias), (0..m * n).map(|i| f64::from(bias[i % n])).collect()),
            };
            let want = expected(m, n, k, &a, &b, &from);
            let want = expected(m, n, r, &u, &v, &want);
            let mut got = before.clone();
            blocked::multiply_with(kernel, m, n, &terms, start, &mut got);
            close(&what, &got, &want, k + r, 1e-5);
        }
    }
}

/// All forms a matrix can take, with whether its rows must be whole blocks of so many.
fn forms() -> Vec<(Form, usize)> {
    let blocks = [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1, BlockType::F16];
    let blocks = blocks.map(|kind| (Form::Blocks(kind), kind.block_len()));
    [(Form::F32, 1), (Form::Bf16, 1)].into_iter().chain(blocks).collect()
}

#[test]
fn frozen_products_are_those_of_the_numbers_they_stand_for() {
    let mut numbers = Numbers(2);
    for (form, block) in forms() {
        for case in 0..60 {
            let n = numbers.pick(&[1, 2, 3, 4, 5, 17, 33, 70]);
            let rows = numbers.pick(&[1, 3, 16, 33, 96, 577]);
            let columns = numbers.pick(&[1, 3, 5, 17, 33, 40]) * block;
            let r = numbers.pick(&[1, 4, 8, 9]);
            let what = format!("{form:?}, case {case}: {n}x{rows}x{columns}+{r}");
            let values = normal(&mut numbers, rows * columns);
            let matrix = PackedMatrix::from_f32(rows, columns, values, form).unwrap();
            let matrix =
                if case % 3 == 0 { matrix.with_arithmetic(Arithmetic::Bf16) } else { matrix };
            let dense = matrix.to_f32();
            let tolerance = if case % 3 == 0 { 3e-2 } else { 1e-5 };

            let (x, dy) = (normal(&mut numbers, n * columns), normal(&mut numbers, n * rows));
            let bias = normal(&mut numbers, rows);
            let from: Vec<f64> = (0..n * rows).map(|i| f64::from(bias[i % rows])).collect();
            let want = expected(n, rows, columns, &x, &dense, &from);
            let mut got = vec![f32::NAN; n * rows];
            matrix.multiply(&x, n, &mut got, Some(&bias));
            close(&what, &got, &want, columns, tolerance);

            let (u, b) = (normal(&mut numbers, n * r), normal(&mut numbers, rows * r));
            let want = expected(n, rows, r, &u, &b, &want);
            matrix.multiply_low_rank(&x, (&u, &b, r), n, &mut got, Some(&bias));
            close(&what, &got, &want, columns + r, tolerance);

            let turned = transposed(&dense, rows, columns);
            let want = expected(n, columns, rows, &dy, &turned, &vec![0.0; n * columns]);
            let mut got = vec![f32::NAN; n * columns];
            matrix.multiply_transposed(&dy, n, &mut got);
            close(&what, &got, &want, rows, tolerance);

            let a = normal(&mut numbers, r * columns);
            let want = expected(n, columns, r, &u, &transposed(&a, r, columns), &want);
            matrix.multiply_transposed_low_rank(&dy, (&u, &a, r), n, &mut got);
            close(&what, &got, &want, rows + r, tolerance);

            let mut row = vec![0.0; columns];
            matrix.row_into(rows - 1, &mut row);
            assert_eq!(row, dense[(rows - 1) * columns..], "{what}");
        }
    }
}

/// Random blocks whose scales are the half 2⁻⁸.
pub(super) fn random_blocks(numbers: &mut Numbers, kind: BlockType, count: usize) -> SharedBytes {
    let scales: &[usize] = match kind {
        BlockType::Q6_K => &[208],
        BlockType::Q5_0 => &[0],
        _ => &[0, 2],
    };
    let mut bytes: Vec<u8> =
        (0..count * kind.block_bytes()).map(|_| numbers.next() as u8).collect();
    for block in bytes.chunks_exact_mut(kind.block_bytes()) {
        for scale in scales {
            block[*scale..][..2].copy_from_slice(&0x1c00_u16.to_le_bytes());
        }
    }
    Arc::new(bytes)
}

#[test]
fn blocks_that_are_only_read_multiply_too() {
    let mut numbers = Numbers(4);
    for kind in
        [BlockType::Q5_0, BlockType::Q5_1, BlockType::Q4_K, BlockType::Q5_K, BlockType::Q6_K]
    {
        // 3328 divides into blocks of the reduction only where their border is a block's.
        for (rows, columns) in [(5, 256), (40, 768), (17, 3328)] {
            let count = rows * columns / kind.block_len();
            let bytes = random_blocks(&mut numbers, kind, count);
            let matrix = PackedMatrix::from_blocks(rows, columns, kind, bytes).unwrap();
            let dense = matrix.to_f32();
            let size = dense.iter().fold(0.0_f32, |size, x| size.max(x.abs()));
            for n in [1, 3, 20] {
                let what = format!("{kind}: {n}x{rows}x{columns}");
                let (x, dy) = (normal(&mut numbers, n * columns), normal(&mut numbers, n * rows));
                let want = expected(n, rows, columns, &x, &dense, &vec![0.0; n * rows]);
                let mut got = vec![f32::NAN; n * rows];
                matrix.multiply(&x, n, &mut got, None);
                close(&what, &got, &want, columns, 1e-5 * f64::from(size));
                let turned = transposed(&dense, rows, columns);
                let want = expected(n, columns, rows, &dy, &turned, &vec![0.0; n * columns]);
                let mut got = vec![f32::NAN; n * columns];
                matrix.multiply_transposed(&dy, n, &mut got);
                close(&what, &got, &want, rows, 1e-5 * f64::from(size));
            }
        }
    }
}

#[test]
fn split_products_are_as_exact_as_f32() {
    let mut numbers = Numbers(5);
    let (m, n, k) = (64, 96, 1536);
    let (a, b) = (normal(&mut numbers, m * k), normal(&mut numbers, n * k));
    let want = expected(m, n, k, &a, &b, &vec![0.0; m * n]);
    let error = |kernel: Kernel| {
        let (left, right) = (Operand::rows(&a, k), Operand::rows(&b, k));
        let mut got = vec![0.0; m * n];
        let terms = [Term { left, right, length: k }];
        blocked::multiply_with(kernel, m, n, &terms, Start::Zero, &mut got);
        let squares = got.iter().zip(&want).map(|(got, want)| (f64::from(*got) - want).powi(2));
        (squares.sum::<f64>() / want.len() as f64).sqrt()
    };
    let plain = error(Kernel::plain());
    for kernel in Kernel::available() {
        if !kernel.rounds_to_bf16() {
            let error = error(kernel);
            assert!(error <= 3.0 * plain, "{kernel:?} is off by {error}, plain f32 by {plain}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let mut numbers = Numbers(3);
    let (rows, columns, r) = (577, 1536, 8);
    let values = normal(&mut numbers, rows * columns);
    let weights = forms().into_iter().flat_map(|(form, _)| {
        let weight = PackedMatrix::from_f32(rows, columns, values.clone(), form).unwrap();
        [weight.clone(), weight.with_arithmetic(Arithmetic::Bf16)]
    });
    let pools = [1, 2, 5]
        .map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
    for weight in weights {
        for n in [3, 130] {
            let (x, dy) = (normal(&mut numbers, n * columns), normal(&mut numbers, n * rows));
            let (u, b) = (normal(&mut numbers, n * r), normal(&mut numbers, rows * r));
            let a = normal(&mut numbers, r * columns);
            let results = pools.each_ref().map(|pool| {
                pool.install(|| {
                    let mut forward = vec![0.0; n * rows];
                    weight.multiply_low_rank(&x, (&u, &b, r), n, &mut forward, None);
                    let mut back = vec![0.0; n * columns];
                    weight.multiply_transposed_low_rank(&dy, (&u, &a, r), n, &mut back);
                    let mut da = vec![0.0; r * columns];
                    product_tn(Arithmetic::F32, [r, n, columns], &u, &x, &mut da);
                    [forward, back, da].concat()
                })
            });
            let bits = results.map(|result| result.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
            assert!(bits[0] == bits[1] && bits[0] == bits[2], "{weight:?} on {n} rows");
        }
    }
}

#[test]
fn dense_products_transpose_what_they_say() {
    // [1 2; 3 4] · [5 6; 7 8], by hand.
    let (a, b) = ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]);
    let mut out = [0.0; 4];
    product(Arithmetic::F32, [2, 2, 2], &a, &b, &mut out);
    assert_eq!(out, [19.0, 22.0, 43.0, 50.0]);
    product_nt(Arithmetic::F32, [2, 2, 2], &a, &b, Some(&[1.0, -1.0]), &mut out);
    assert_eq!(out, [18.0, 22.0, 40.0, 52.0]);
    product_tn(Arithmetic::F32, [2, 2, 2], &a, &b, &mut out);
    assert_eq!(out, [26.0, 30.0, 38.0, 44.0]);
    product(Arithmetic::F32, [2, 0, 2], &[], &[], &mut out);
    assert_eq!(out, [0.0; 4], "a sum over nothing");
}

#[test]
fn blocks_lie_as_given_and_are_shared() {
    // One row of one Q8_0 block: scale 0.5 (0x3800 as f16), then 0, 1, 2 …
    let mut block = vec![0x00, 0x38];
    block.extend(0..32u8);
    let bytes: SharedBytes = Arc::new(block);
    let matrix = PackedMatrix::from_blocks(1, 32, BlockType::Q8_0, bytes.clone()).unwrap();
    assert_eq!(Arc::strong_count(&bytes), 2);
    assert_eq!((matrix.rows(), matrix.columns(), matrix.bytes()), (1, 32, 34));
    let mut out = [0.0];
    matrix.multiply(&[1.0; 32], 1, &mut out, None);
    assert_eq!(out, [248.0]);
    let mut dx = [0.0; 32];
    matrix.multiply_transposed(&[2.0], 1, &mut dx);
    assert_eq!(dx[31], 31.0);
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let short = PackedMatrix::from_f32(2, 3, vec![0.0; 5], Form::F32).unwrap_err();
    assert_eq!(short.to_string(), "a matrix of 2 x 3 holds 6 numbers, got 5");
    let ragged = PackedMatrix::from_f32(2, 33, vec![0.0; 66], Form::Blocks(BlockType::Q8_0));
    assert!(matches!(ragged, Err(PackedMatrixError::Blocks(_))));
    let bytes: SharedBytes = Arc::new(vec![0u8; 33]);
    let cut = PackedMatrix::from_blocks(1, 32, BlockType::Q8_0, bytes).unwrap_err();
    assert_eq!(cut.to_string(), "1 x 32 numbers in Q8_0 blocks take 34 bytes, got 33");
}
