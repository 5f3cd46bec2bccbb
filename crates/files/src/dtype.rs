//! Number types of safetensors tensors and the way from and to `f32`.

use crate::numbers;

/// The type of a safetensors tensor's numbers, in the order the format's own writer sorts by.
#[expect(non_camel_case_types, reason = "the names the format stores")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dtype {
    /// One byte; 0 is false.
    BOOL,
    /// Unsigned byte.
    U8,
    /// Signed byte.
    I8,
    /// 8-bit float, 2 bits of mantissa, with infinities.
    F8_E5M2,
    /// 8-bit float, 3 bits of mantissa, largest value 448, no infinities.
    F8_E4M3,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 16-bit integer.
    U16,
    /// IEEE half.
    F16,
    /// The upper half of an `f32`.
    BF16,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
}

use Dtype::{BF16, BOOL, F8_E4M3, F8_E5M2, F16, F32, F64, I8, I16, I32, I64, U8, U16, U32, U64};

impl Dtype {
    /// All types, smallest first.
    pub const ALL: [Self; 15] =
        [BOOL, U8, I8, F8_E5M2, F8_E4M3, I16, U16, F16, BF16, I32, U32, F32, F64, I64, U64];

    /// Returns the name the format stores, such as `BF16`.
    pub const fn name(self) -> &'static str {
        match self {
            BOOL => "BOOL",
            U8 => "U8",
            I8 => "I8",
            F8_E5M2 => "F8_E5M2",
            F8_E4M3 => "F8_E4M3",
            I16 => "I16",
            U16 => "U16",
            F16 => "F16",
            BF16 => "BF16",
            I32 => "I32",
            U32 => "U32",
            F32 => "F32",
            F64 => "F64",
            I64 => "I64",
            U64 => "U64",
        }
    }

    /// Finds the type a stored name stands for.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Returns the bytes one number takes.
    pub const fn size(self) -> usize {
        match self {
            BOOL | U8 | I8 | F8_E5M2 | F8_E4M3 => 1,
            I16 | U16 | F16 | BF16 => 2,
            I32 | U32 | F32 => 4,
            F64 | I64 | U64 => 8,
        }
    }

    /// Tells whether the numbers are floats.
    pub const fn is_float(self) -> bool {
        matches!(self, F8_E5M2 | F8_E4M3 | F16 | BF16 | F32 | F64)
    }

    /// Decodes numbers into `f32`. Integers beyond 24 bits and `F64` round to nearest; booleans
    /// become 0 and 1.
    ///
    /// # Errors
    /// The index of the first finite `F64` beyond the range of `f32`.
    pub(crate) fn decode(self, bytes: &[u8]) -> Result<Vec<f32>, usize> {
        let mut out = vec![0.0; bytes.len() / self.size()];
        self.decode_into(bytes, &mut out)?;
        Ok(out)
    }

    /// Decodes numbers into `f32`, as many as fit `out`.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub(crate) fn decode_into(self, bytes: &[u8], out: &mut [f32]) -> Result<(), usize> {
        match self {
            F32 => numbers::f32_from_le(bytes, out),
            F16 => numbers::f16_to_f32(bytes, out),
            BF16 => numbers::bf16_to_f32(bytes, out),
            F8_E4M3 => numbers::f8_e4m3_to_f32(bytes, out),
            F8_E5M2 => numbers::f8_e5m2_to_f32(bytes, out),
            F64 => {
                for (i, (y, b)) in out.iter_mut().zip(bytes.as_chunks().0).enumerate() {
                    let wide = f64::from_le_bytes(*b);
                    *y = wide as f32;
                    if y.is_infinite() && wide.is_finite() {
                        return Err(i);
                    }
                }
            }
            BOOL => fill(out, bytes, |[b]: [u8; 1]| f32::from(u8::from(b != 0))),
            U8 => fill(out, bytes, |b| f32::from(u8::from_le_bytes(b))),
            I8 => fill(out, bytes, |b| f32::from(i8::from_le_bytes(b))),
            U16 => fill(out, bytes, |b| f32::from(u16::from_le_bytes(b))),
            I16 => fill(out, bytes, |b| f32::from(i16::from_le_bytes(b))),
            U32 => fill(out, bytes, |b| u32::from_le_bytes(b) as f32),
            I32 => fill(out, bytes, |b| i32::from_le_bytes(b) as f32),
            U64 => fill(out, bytes, |b| u64::from_le_bytes(b) as f32),
            I64 => fill(out, bytes, |b| i64::from_le_bytes(b) as f32),
        }
        Ok(())
    }

    /// Decodes integers and booleans; `None` for float types.
    ///
    /// # Errors
    /// The index of the first `U64` beyond the range of `i64`.
    pub(crate) fn decode_i64(self, bytes: &[u8]) -> Option<Result<Vec<i64>, usize>> {
        let mut out = vec![0; bytes.len() / self.size()];
        match self {
            BOOL => fill(&mut out, bytes, |[b]: [u8; 1]| i64::from(b != 0)),
            U8 => fill(&mut out, bytes, |b| i64::from(u8::from_le_bytes(b))),
            I8 => fill(&mut out, bytes, |b| i64::from(i8::from_le_bytes(b))),
            U16 => fill(&mut out, bytes, |b| i64::from(u16::from_le_bytes(b))),
            I16 => fill(&mut out, bytes, |b| i64::from(i16::from_le_bytes(b))),
            U32 => fill(&mut out, bytes, |b| i64::from(u32::from_le_bytes(b))),
            I32 => fill(&mut out, bytes, |b| i64::from(i32::from_le_bytes(b))),
            I64 => fill(&mut out, bytes, i64::from_le_bytes),
            U64 => {
                for (i, (y, b)) in out.iter_mut().zip(bytes.as_chunks().0).enumerate() {
                    match i64::try_from(u64::from_le_bytes(*b)) {
                        Ok(value) => *y = value,
                        Err(_) => return Some(Err(i)),
                    }
                }
            }
            F8_E5M2 | F8_E4M3 | F16 | BF16 | F32 | F64 => return None,
        }
        Some(Ok(out))
    }

    /// Encodes `f32` values as a float type, rounding to nearest, ties to even.
    ///
    /// # Errors
    /// [`EncodeError`] for an integer type, or a finite value beyond the type's range.
    /// # Examples
    /// ```
    /// # use retune_files::Dtype;
    /// assert_eq!(Dtype::BF16.encode(&[1.0, -2.0])?, [0x80, 0x3f, 0x00, 0xc0]);
    /// assert!(Dtype::F16.encode(&[70000.0]).is_err());
    /// # Ok::<(), retune_files::EncodeError>(())
    /// ```
    pub fn encode(self, values: &[f32]) -> Result<Vec<u8>, EncodeError> {
        let mut out = Vec::new();
        self.encode_behind(values, &mut out)?;
        Ok(out)
    }

    /// Encodes as [`Self::encode`] behind what a buffer holds.
    ///
    /// # Errors
    /// As [`Self::encode`]; the buffer's content is then of no use.
    pub fn encode_behind(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        out.resize(start + values.len() * self.size(), 0);
        let out = &mut out[start..];
        match self {
            F32 => {
                numbers::f32_to_le(values, out);
                Ok(())
            }
            F16 => numbers::f32_to_f16(values, out),
            BF16 => numbers::f32_to_bf16(values, out),
            F8_E4M3 => numbers::f32_to_f8_e4m3(values, out),
            F8_E5M2 => numbers::f32_to_f8_e5m2(values, out),
            F64 => {
                for (b, v) in out.as_chunks_mut().0.iter_mut().zip(values) {
                    *b = f64::from(*v).to_le_bytes();
                }
                Ok(())
            }
            BOOL | U8 | I8 | I16 | U16 | I32 | U32 | I64 | U64 => {
                return Err(EncodeError::NotAFloat { dtype: self });
            }
        }
        .map_err(|index| EncodeError::OutOfRange {
            dtype: self,
            index,
            value: values[index],
        })
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Why values cannot be stored as a type.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// The type holds integers.
    #[error("{dtype} holds integers; write floats as F32, F16, BF16, F64, F8_E4M3 or F8_E5M2")]
    NotAFloat {
        /// The type asked for.
        dtype: Dtype,
    },
    /// A finite value would become an infinity or NaN.
    #[error(
        "value {value} at index {index} is beyond the range of {dtype}; write BF16 or F32, \
         or look for a diverged weight"
    )]
    OutOfRange {
        /// The type asked for.
        dtype: Dtype,
        /// Index of the value.
        index: usize,
        /// The value itself.
        value: f32,
    },
}

fn fill<T, const N: usize>(out: &mut [T], bytes: &[u8], value: impl Fn([u8; N]) -> T) {
    for (y, b) in out.iter_mut().zip(bytes.as_chunks().0) {
        *y = value(*b);
    }
}
