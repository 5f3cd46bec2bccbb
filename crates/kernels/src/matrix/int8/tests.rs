//! Both forms against sums in `f64` over the rounded input, and rounding itself.

use std::sync::Arc;

use retune_files::ggml::BlockType;

use super::rounded::{GROUP, Rounded};
use super::*;
use crate::check::Numbers;
use crate::matrix::tests::random_blocks;
use crate::matrix::{Arithmetic, PackedMatrix};

const KINDS: [BlockType; 8] = [
    BlockType::Q8_0,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q4_K,
    BlockType::Q5_K,
    BlockType::Q6_K,
];

/// The portable form and, where there is one, that of AVX2.
fn kernels() -> Vec<Kernel> {
    let plain = Kernel::plain();
    if plain == Kernel::Portable { vec![plain] } else { vec![Kernel::Portable, plain] }
}

fn normal(numbers: &mut Numbers, count: usize) -> Vec<f32> {
    (0..count).map(|_| numbers.normal() as f32).collect()
}

/// The numbers a rounded row stands for.
fn seen(x: &[f32], columns: usize) -> Vec<f64> {
    let rounded = Rounded::new(x, columns);
    let rows = (0..x.len() / columns).map(|row| rounded.row(row));
    rows.flatten()
        .flat_map(|group| group.integers.map(|x| f64::from(x) * f64::from(group.scale)))
        .collect()
}

#[test]
fn groups_are_what_the_blocks_stand_for() {
    let mut numbers = Numbers(1);
    for kind in KINDS {
        let bytes = random_blocks(&mut numbers, kind, 50);
        let mut wanted = vec![0.0; 50 * kind.block_len()];
        kind.dequantize((*bytes).as_ref(), &mut wanted).unwrap();
        let blocks = (*bytes).as_ref().chunks_exact(kind.block_bytes());
        for (block, wanted) in blocks.zip(wanted.chunks_exact(kind.block_len())) {
            for (index, wanted) in wanted.chunks_exact(GROUP).enumerate() {
                let group = plain::group(kind, block, index);
                for (j, wanted) in wanted.iter().enumerate() {
                    let scaled = group.scales[j / 16] * f32::from(group.integers[j]);
                    // Scales are powers of two times small integers here: nothing rounds.
                    assert_eq!(scaled + group.minimum, *wanted, "{kind}, group {index}, {j}");
                }
            }
        }
    }
}

/// An error of `f32`'s rounding for each of a group's terms, of which an accumulator adds a few
/// dozen: relative to the sum of magnitudes, not to a result in which they cancel.
const TOLERANCE: f64 = 16.0 * f32::EPSILON as f64;

#[test]
fn products_are_those_of_the_rounded_input() {
    let mut numbers = Numbers(2);
    for case in 0..200 {
        let kind = KINDS[case % KINDS.len()];
        let n = numbers.pick(&[1, 2, 3, 4, 5, 7, 9]);
        let rows = numbers.pick(&[1, 3, 31, 33, 70]);
        let columns = numbers.between(1, 9) * kind.block_len();
        let bytes = random_blocks(&mut numbers, kind, rows * columns / kind.block_len());
        let blocks = Blocks { kind, bytes: (*bytes).as_ref(), columns };
        let mut dense = vec![0.0; rows * columns];
        kind.dequantize(blocks.bytes, &mut dense).unwrap();
        let x = normal(&mut numbers, n * columns);
        let seen = seen(&x, columns);
        let (bias, before) = (normal(&mut numbers, rows), normal(&mut numbers, n * rows));
        let start = [Start::Zero, Start::Bias(&bias), Start::Output][case % 3];
        for kernel in kernels() {
            let mut got = before.clone();
            multiply_with(kernel, blocks, rows, &x, n, start, &mut got);
            for (place, got) in got.iter().enumerate() {
                let (i, j) = (place / rows, place % rows);
                let from = [0.0, bias[j], before[place]][case % 3];
                let (mut want, mut size) = (f64::from(from), f64::from(from.abs()));
                let row = blocks.row(j).chunks_exact(kind.block_bytes());
                let groups = row.flat_map(|block| {
                    (0..kind.block_len() / GROUP).map(|index| plain::group(kind, block, index))
                });
                for (index, group) in groups.enumerate() {
                    let part = index * GROUP..(index + 1) * GROUP;
                    let x = &seen[i * columns..][part.clone()];
                    for (j, (w, x)) in dense[j * columns..][part].iter().zip(x).enumerate() {
                        want += f64::from(*w) * x;
                        let integer = group.scales[j / 16] * f32::from(group.integers[j]);
                        size += f64::from(integer.abs() + group.minimum.abs()) * x.abs();
                    }
                }
                assert!(
                    (f64::from(*got) - want).abs() <= TOLERANCE * size,
                    "{kernel:?}, {kind}, {n}x{rows}x{columns}[{place}]: got {got}, expected {want}"
                );
            }
        }
    }
}

#[test]
fn a_product_worked_out_by_hand() {
    // Scale 0.5, integers 0 to 31 whose sum is 496; the ones are rounded to 127 · (1/127).
    let mut block = vec![0x00, 0x38];
    block.extend(0..32_u8);
    let blocks = Blocks { kind: BlockType::Q8_0, bytes: &block, columns: 32 };
    for kernel in kernels() {
        let mut out = [0.0];
        multiply_with(kernel, blocks, 1, &[1.0; 32], 1, Start::Bias(&[2.0]), &mut out);
        assert!((out[0] - 250.0).abs() < 1e-4, "{kernel:?}: {}", out[0]);
        // No rows on either side: nothing to do.
        let none = Blocks { bytes: &[], ..blocks };
        multiply_with(kernel, none, 0, &[1.0; 32], 1, Start::Zero, &mut []);
        multiply_with(kernel, blocks, 1, &[], 0, Start::Zero, &mut []);
    }
}

/// The largest integers of every type, with inputs of one sign: sixteen bits must hold the pairs.
#[test]
fn no_sum_overflows() {
    for kind in KINDS {
        for byte in [0x00, 0x80, 0xff] {
            let mut bytes = vec![byte; kind.block_bytes()];
            let scales: &[usize] = match kind {
                BlockType::Q6_K => &[208],
                BlockType::Q8_0 | BlockType::Q4_0 | BlockType::Q5_0 => &[0],
                _ => &[0, 2],
            };
            for at in scales {
                bytes[*at..*at + 2].copy_from_slice(&0x3c00_u16.to_le_bytes());
            }
            let columns = kind.block_len();
            let mut dense = vec![0.0; columns];
            kind.dequantize(&bytes, &mut dense).unwrap();
            for sign in [1.0, -1.0] {
                let x = vec![sign * 127.0; columns];
                let want: f64 = dense.iter().map(|w| f64::from(*w) * f64::from(x[0])).sum();
                let size: f64 = dense.iter().map(|w| f64::from(w.abs()) * 127.0).sum();
                for kernel in kernels() {
                    let blocks = Blocks { kind, bytes: &bytes, columns };
                    let mut out = [0.0];
                    multiply_with(kernel, blocks, 1, &x, 1, Start::Zero, &mut out);
                    let error = (f64::from(out[0]) - want).abs();
                    // Scale and minimum of a block of 0xff cancel by a factor of 63.
                    let what = format!("{kernel:?}, {kind}, {byte:#x}");
                    assert!(error <= 64.0 * TOLERANCE * (size + 1.0), "{what}: {} {want}", out[0]);
                }
            }
        }
    }
}

#[test]
fn numbers_are_rounded_to_the_nearest_step() {
    let mut numbers = Numbers(3);
    let x = normal(&mut numbers, 64 * GROUP);
    let found = seen(&x, GROUP);
    for (group, found) in x.chunks(GROUP).zip(found.chunks(GROUP)) {
        let largest = group.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        for (x, found) in group.iter().zip(found) {
            let error = (f64::from(*x) - found).abs();
            assert!(error <= f64::from(largest) / 254.0 * 1.0001, "{x} became {found}");
        }
    }
    // Ties go to the even neighbour: 127 sets a step of 1.
    let mut group = [0.0; GROUP];
    group[..6].copy_from_slice(&[127.0, -127.0, 0.5, 1.5, -2.5, -0.4]);
    let rounded = Rounded::new(&group, GROUP);
    let found = rounded.row(0)[0];
    assert_eq!(found.integers[..6], [127, -127, 0, 2, -2, 0]);
    assert_eq!((found.scale, found.sum), (1.0, 0.0));
}

#[test]
fn what_is_not_finite_stays_visible_and_nothing_makes_it() {
    let block = [0x11; 18];
    let blocks = Blocks { kind: BlockType::Q4_0, bytes: &block, columns: 32 };
    for kernel in kernels() {
        let product = |x: &[f32; GROUP]| {
            let mut out = [0.0];
            multiply_with(kernel, blocks, 1, x, 1, Start::Zero, &mut out);
            out[0]
        };
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; GROUP];
            x[17] = bad;
            assert!(!product(&x).is_finite(), "{kernel:?}: {bad} became {}", product(&x));
        }
        assert_eq!(product(&[0.0; GROUP]), 0.0);
        assert_eq!(product(&[f32::MIN_POSITIVE / 2.0; GROUP]), 0.0);
    }
}

#[test]
fn a_row_has_the_same_bits_beside_others_and_on_any_number_of_threads() {
    let mut numbers = Numbers(4);
    let (rows, columns, n) = (600, 768, 9);
    let pools =
        [1, 3].map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
    for kind in KINDS {
        let bytes = random_blocks(&mut numbers, kind, rows * columns / kind.block_len());
        let matrix = PackedMatrix::from_blocks(rows, columns, kind, Arc::clone(&bytes)).unwrap();
        let matrix = matrix.with_arithmetic(Arithmetic::Int8);
        let x = normal(&mut numbers, n * columns);
        let mut together = vec![0.0; n * rows];
        pools[1].install(|| matrix.multiply(&x, n, &mut together, None));
        for (row, together) in together.chunks(rows).enumerate() {
            let mut alone = vec![0.0; rows];
            let x = &x[row * columns..][..columns];
            pools[0].install(|| matrix.multiply(x, 1, &mut alone, None));
            assert!(alone == together, "{kind}, row {row}");
        }
    }
}

#[test]
fn a_low_rank_change_is_added_exactly() {
    let mut numbers = Numbers(5);
    let (rows, columns, r) = (40, 96, 3);
    let bytes = random_blocks(&mut numbers, BlockType::Q4_1, rows * columns / 32);
    let matrix = PackedMatrix::from_blocks(rows, columns, BlockType::Q4_1, bytes).unwrap();
    let matrix = matrix.with_arithmetic(Arithmetic::Int8);
    for n in [1, 7] {
        let x = normal(&mut numbers, n * columns);
        let (u, b) = (normal(&mut numbers, n * r), normal(&mut numbers, rows * r));
        let bias = normal(&mut numbers, rows);
        let mut base = vec![0.0; n * rows];
        matrix.multiply(&x, n, &mut base, Some(&bias));
        let mut got = vec![0.0; n * rows];
        matrix.multiply_low_rank(&x, (&u, &b, r), n, &mut got, Some(&bias));
        for (place, (got, base)) in got.iter().zip(base).enumerate() {
            let (i, j) = (place / rows, place % rows);
            let change: f32 = (0..r).map(|k| u[i * r + k] * b[j * r + k]).sum();
            assert!((got - base - change).abs() < 1e-5, "{n} rows, {place}: {got} {base} {change}");
        }
    }
}

/// What the rounding costs: random signs make a result's error a part of its own size.
#[test]
fn rounding_moves_results_by_less_than_a_hundredth_of_their_size() {
    let mut numbers = Numbers(6);
    let (rows, columns, n) = (64, 768, 4);
    for kind in [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1] {
        let values = normal(&mut numbers, rows * columns);
        let form = crate::matrix::Form::Blocks(kind);
        let exact = PackedMatrix::from_f32(rows, columns, values, form).unwrap();
        let rounded = exact.clone().with_arithmetic(Arithmetic::Int8);
        let x = normal(&mut numbers, n * columns);
        let [mut want, mut got] = [(); 2].map(|()| vec![0.0; n * rows]);
        exact.multiply(&x, n, &mut want, None);
        rounded.multiply(&x, n, &mut got, None);
        let squares = |values: &[f32]| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let errors: Vec<f32> = want.iter().zip(&got).map(|(want, got)| want - got).collect();
        let relative = (squares(&errors) / squares(&want)).sqrt();
        // Uniform errors of up to 1/254 of a largest of about 2.4 standard deviations.
        assert!((1e-3..1e-2).contains(&relative), "{kind}: {relative}");
    }
}
