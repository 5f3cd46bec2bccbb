//! Block types against values worked out by hand.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests do")]

use proptest::prelude::*;
use retune_files::ggml::{BlockType, GgmlError};

const ONE: [u8; 2] = [0x00, 0x3c];
const HALF: [u8; 2] = [0x00, 0x38];
const MINUS_TWO: [u8; 2] = [0x00, 0xc0];

fn dequantize(kind: BlockType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; bytes.len() / kind.block_bytes() * kind.block_len()];
    kind.dequantize(bytes, &mut out).unwrap();
    out
}

fn quantize(kind: BlockType, values: &[f32]) -> Result<Vec<u8>, GgmlError> {
    let mut out = vec![0xaa; kind.bytes_for(values.len()).unwrap()];
    kind.quantize(values, &mut out).map(|()| out)
}

/// Byte j holds value j in the low nibble and value j + 16 in the high one: 0x10, 0x21, … 0xff, 0x0f.
fn nibbles() -> Vec<u8> {
    (0..16u8).map(|j| j | ((j + 1) % 16) << 4).collect()
}

fn integers(nibble_values: impl Fn(i32) -> f32) -> Vec<f32> {
    (0..16).chain((1..16).chain([0])).map(nibble_values).collect()
}

#[test]
fn plain_types_decode() {
    assert_eq!(dequantize(BlockType::F32, &[0, 0, 0xc0, 0x3f, 0, 0, 0, 0x80]), [1.5, -0.0]);
    assert_eq!(dequantize(BlockType::F16, &[0x00, 0x3c, 0x01, 0x00]), [1.0, 5.9604645e-8]);
    assert_eq!(dequantize(BlockType::BF16, &[0x80, 0x3f, 0x49, 0xc0]), [1.0, -3.140625]);
    assert_eq!(dequantize(BlockType::F64, &(-0.1f64).to_le_bytes()), [-0.1]);
    assert_eq!(dequantize(BlockType::I8, &[0xff, 0x7f]), [-1.0, 127.0]);
    assert_eq!(dequantize(BlockType::I16, &[0x00, 0x80]), [-32768.0]);
    assert_eq!(dequantize(BlockType::I32, &[0xfe, 0xff, 0xff, 0xff]), [-2.0]);
    assert_eq!(dequantize(BlockType::I64, &[0, 0, 0, 0, 1, 0, 0, 0]), [4294967296.0]);
}

#[test]
fn q4_0_is_scale_times_nibble_minus_eight() {
    let block = [&HALF[..], &nibbles()].concat();
    assert_eq!(dequantize(BlockType::Q4_0, &block), integers(|q| (q - 8) as f32 * 0.5));
}

#[test]
fn q4_1_is_scale_times_nibble_plus_minimum() {
    let block = [&HALF[..], &MINUS_TWO, &nibbles()].concat();
    assert_eq!(dequantize(BlockType::Q4_1, &block), integers(|q| q as f32 * 0.5 - 2.0));
}

#[test]
fn q5_takes_its_fifth_bits_in_value_order() {
    // Fifth bits of the values 0, 15 and 31.
    let fifths = 0x8000_8001u32.to_le_bytes();
    let mut expected: Vec<i32> = (0..16).chain(1..16).chain([0]).collect();
    for at in [0, 15, 31] {
        expected[at] += 16;
    }
    let block = [&HALF[..], &fifths, &nibbles()].concat();
    let q5_0: Vec<f32> = expected.iter().map(|q| (q - 16) as f32 * 0.5).collect();
    assert_eq!(dequantize(BlockType::Q5_0, &block), q5_0);
    let block = [&HALF[..], &MINUS_TWO, &fifths, &nibbles()].concat();
    let q5_1: Vec<f32> = expected.iter().map(|q| *q as f32 * 0.5 - 2.0).collect();
    assert_eq!(dequantize(BlockType::Q5_1, &block), q5_1);
}

#[test]
fn q8_0_is_scale_times_signed_byte() {
    let quants: Vec<u8> = (0..32).map(|i| (i * 8 - 128) as i8 as u8).collect();
    let expected: Vec<f32> = (0..32).map(|i| (i * 8 - 128) as f32 * 0.5).collect();
    assert_eq!(dequantize(BlockType::Q8_0, &[&HALF[..], &quants].concat()), expected);
}

/// Scales 1, 2, 3, 4, 33, 34, 35, 36 and minima 5, 6, 7, 8, 49, 50, 51, 52 of the eight groups,
/// packed by hand: 33 = 0b10_0001 and 49 = 0b11_0001 give their low nibbles to bytes 8.. and their
/// top two bits to bytes 0.. (scales) and 4.. (minima).
const SCALES: [f32; 8] = [1.0, 2.0, 3.0, 4.0, 33.0, 34.0, 35.0, 36.0];
const MINIMA: [f32; 8] = [5.0, 6.0, 7.0, 8.0, 49.0, 50.0, 51.0, 52.0];
const PACKED: [u8; 12] = [0x81, 0x82, 0x83, 0x84, 0xc5, 0xc6, 0xc7, 0xc8, 0x11, 0x22, 0x33, 0x44];

#[test]
fn q4_k_has_a_scale_and_minimum_per_group_of_32() {
    // Low nibbles 3, high nibbles 10: even groups hold 3, odd groups 10.
    let block = [&HALF[..], &ONE, &PACKED, &[0xa3; 128]].concat();
    let out = dequantize(BlockType::Q4_K, &block);
    for (i, y) in out.iter().enumerate() {
        let q = if i / 32 % 2 == 0 { 3.0 } else { 10.0 };
        assert_eq!(*y, 0.5 * SCALES[i / 32] * q - MINIMA[i / 32], "value {i}");
    }
}

#[test]
fn q4_k_nibbles_follow_in_order() {
    let mut quants = [0u8; 128];
    quants[0] = 0x21; // values 0 and 32
    quants[31] = 0x43; // values 31 and 63
    quants[96] = 0x65; // values 192 and 224
    let mut scales = [0u8; 12];
    scales[..4].fill(1); // scale 1 for groups 0..4
    scales[8..].fill(1); // scale 1 for groups 4..8
    let out = dequantize(BlockType::Q4_K, &[&ONE[..], &ONE, &scales, &quants].concat());
    let found: Vec<(usize, f32)> = out.into_iter().enumerate().filter(|(_, y)| *y != 0.0).collect();
    let expected = [(0, 1.0), (31, 3.0), (32, 2.0), (63, 4.0), (192, 5.0), (224, 6.0)];
    assert_eq!(found, expected);
}

#[test]
fn q5_k_takes_one_fifth_bit_per_group() {
    // Bit g of fifth byte l belongs to value 32·g + l. Byte 0: group 0 and 7; byte 31: group 2.
    let mut fifths = [0u8; 32];
    fifths[0] = 0b1000_0001;
    fifths[31] = 0b0000_0100;
    let block = [&HALF[..], &ONE, &PACKED, &fifths, &[0xa3; 128]].concat();
    let out = dequantize(BlockType::Q5_K, &block);
    for (i, y) in out.iter().enumerate() {
        let low = if i / 32 % 2 == 0 { 3.0 } else { 10.0 };
        let q = if [0, 7 * 32, 2 * 32 + 31].contains(&i) { low + 16.0 } else { low };
        assert_eq!(*y, 0.5 * SCALES[i / 32] * q - MINIMA[i / 32], "value {i}");
    }
}

#[test]
fn q6_k_has_a_signed_scale_per_16_values() {
    // Low nibbles: 5 in rows 0 and 1, 9 in rows 2 and 3; bit pairs of rows 0..4: 0, 1, 2, 3.
    let scales: Vec<u8> = (1..=16).map(|s: i8| if s % 2 == 0 { -s } else { s } as u8).collect();
    let block = [&[0x95; 128][..], &[0b1110_0100; 64], &scales, &HALF].concat();
    let out = dequantize(BlockType::Q6_K, &block);
    // q = nibble + 16·pair - 32
    let quants = [-27.0, -11.0, 9.0, 25.0];
    for (i, y) in out.iter().enumerate() {
        let scale = (i / 16 + 1) as f32 * if (i / 16) % 2 == 0 { 1.0 } else { -1.0 };
        assert_eq!(*y, 0.5 * scale * quants[i / 32 % 4], "value {i}");
    }
}

#[test]
fn q6_k_nibbles_follow_in_order() {
    // All pairs 2, so an untouched value is 0 + 32 - 32 = 0.
    let mut low = [0u8; 128];
    low[0] = 0x21; // values 0 and 64
    low[33] = 0x43; // values 33 and 97
    low[127] = 0x65; // second half: values 128 + 63 and 128 + 127
    let block = [&low[..], &[0b1010_1010; 64], &[1; 16], &ONE].concat();
    let out = dequantize(BlockType::Q6_K, &block);
    let found: Vec<(usize, f32)> = out.into_iter().enumerate().filter(|(_, y)| *y != 0.0).collect();
    assert_eq!(found, [(0, 1.0), (33, 3.0), (64, 2.0), (97, 4.0), (191, 5.0), (255, 6.0)]);
}

#[test]
fn q8_0_rounds_halves_away_from_zero() {
    // Furthest value 127, so the scale is 1 and values are the integers themselves.
    let mut values = [0.0; 32];
    values[..5].copy_from_slice(&[127.0, -2.5, 2.5, 0.4, -126.6]);
    let block = quantize(BlockType::Q8_0, &values).unwrap();
    assert_eq!(block[..2], ONE);
    assert_eq!(block[2..7], [127, -3i8 as u8, 3, 0, -127i8 as u8]);
    assert!(block[7..].iter().all(|q| *q == 0));
}

#[test]
fn q4_0_spends_its_extra_step_on_the_side_of_the_furthest_value() {
    // Furthest value -4: scale -4 / -8 = 0.5; +4 would need step 16 and saturates at 15 = 3.5.
    let mut values = [0.0; 32];
    values[..4].copy_from_slice(&[-4.0, 3.9, 0.5, -0.5]);
    values[16] = 1.0;
    let block = quantize(BlockType::Q4_0, &values).unwrap();
    assert_eq!(block[..2], HALF);
    assert_eq!(block[2..6], [0xa0, 0x8f, 0x89, 0x87]);
    // Furthest value +4: the scale turns negative.
    values[0] = 4.0;
    let block = quantize(BlockType::Q4_0, &values).unwrap();
    assert_eq!(block[..2], [0x00, 0xb8]);
    assert_eq!(dequantize(BlockType::Q4_0, &block)[0], 4.0);
}

#[test]
fn q4_1_spans_minimum_to_maximum() {
    let mut values = [-2.0; 32];
    values[1] = 5.5; // range 7.5, scale 0.5
    values[2] = 0.1; // 4.2 steps up
    values[17] = 0.3; // 4.6 steps up
    let block = quantize(BlockType::Q4_1, &values).unwrap();
    assert_eq!(block[..4], [HALF, MINUS_TWO].concat());
    assert_eq!(block[4..7], [0x00, 0x5f, 0x04]);
    assert!(block[7..].iter().all(|q| *q == 0));
}

#[test]
fn blocks_of_zeros_stay_zero() {
    for kind in [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1] {
        let block = quantize(kind, &[0.0; 32]).unwrap();
        assert_eq!(dequantize(kind, &block), [0.0; 32], "{kind}");
    }
}

#[test]
fn values_that_would_ruin_a_model_are_refused() {
    for kind in [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
            let mut values = [1.0; 64];
            values[40] = value;
            match quantize(kind, &values) {
                Err(GgmlError::NotRepresentable { index: 40, .. }) => {}
                other => panic!("{kind} {value}: {other:?}"),
            }
        }
    }
    let refused = quantize(BlockType::F16, &[1.0, 65520.0]);
    assert!(matches!(refused, Err(GgmlError::NotRepresentable { index: 1, .. })));
    assert!(quantize(BlockType::F16, &[65519.0]).is_ok());
    let refused = quantize(BlockType::BF16, &[f32::MAX]);
    assert!(matches!(refused, Err(GgmlError::NotRepresentable { index: 0, .. })));
}

#[test]
fn lengths_are_checked_before_any_byte_is_read() {
    assert_eq!(
        BlockType::Q4_0.bytes_for(33),
        Err(GgmlError::PartialBlock { kind: BlockType::Q4_0, len: 33 })
    );
    assert!(matches!(BlockType::F64.bytes_for(usize::MAX), Err(GgmlError::TooLarge { .. })));
    let error = BlockType::Q8_0.dequantize(&[0; 33], &mut [0.0; 32]).unwrap_err();
    assert_eq!(error.to_string(), "Q8_0: 32 values need 34 bytes, got 33");
    assert!(matches!(
        BlockType::Q6_K.quantize(&[0.0; 256], &mut [0; 210]),
        Err(GgmlError::NotWritable { kind: BlockType::Q6_K })
    ));
}

#[test]
fn type_numbers_are_ggufs() {
    for kind in BlockType::ALL {
        assert_eq!(BlockType::from_id(kind.id()), Ok(kind));
    }
    let error = BlockType::from_id(10).unwrap_err().to_string();
    assert!(error.starts_with("GGML type 10 (Q2_K) is not supported; expected one of F32, "));
    assert!(BlockType::from_id(4).unwrap_err().to_string().starts_with("GGML type 4 is not"));
    assert!(BlockType::ALL.is_sorted_by_key(|kind| kind.id()));
}

proptest! {
    /// A quantised value is off by at most half a step (Q4_0's saturated side: one step), plus what
    /// rounding scale and minimum to f16 costs.
    #[test]
    fn quantising_stays_within_a_step(values in prop::array::uniform32(-100.0f32..100.0)) {
        let far = values.iter().fold(0.0f32, |far, v| far.max(v.abs()));
        let range = values.iter().copied().fold(f32::MIN, f32::max)
            - values.iter().copied().fold(f32::MAX, f32::min);
        for (kind, step) in [
            (BlockType::Q8_0, far / 254.0),
            (BlockType::Q4_0, far / 8.0),
            (BlockType::Q4_1, range / 30.0),
        ] {
            let block = quantize(kind, &values).unwrap();
            for (v, y) in values.iter().zip(dequantize(kind, &block)) {
                prop_assert!((v - y).abs() <= step + 2e-3 * far, "{kind}: {v} became {y}");
            }
        }
    }

    /// Any bytes decode without a panic.
    #[test]
    fn any_block_decodes(bytes in prop::collection::vec(any::<u8>(), 34 * 210)) {
        for kind in BlockType::ALL {
            let whole = bytes.len() / kind.block_bytes() * kind.block_bytes();
            dequantize(kind, &bytes[..whole]);
        }
    }

    /// Decoding does not depend on where a block lies.
    #[test]
    fn blocks_are_independent(bytes in prop::collection::vec(any::<u8>(), 2 * 210)) {
        for kind in BlockType::ALL {
            let both = dequantize(kind, &bytes[..2 * kind.block_bytes()]);
            let second = dequantize(kind, &bytes[kind.block_bytes()..2 * kind.block_bytes()]);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&both[kind.block_len()..]), bits(&second));
        }
    }
}
