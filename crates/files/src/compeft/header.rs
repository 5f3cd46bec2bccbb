//! The header of a ComPEFT file as bytes: numbers in groups of seven bits, the lowest first, and
//! names without what they share with the one before.

use super::{RawHeader, RawTensor};

/// How a tensor's stream is to be read.
const SIGNS: u8 = 0;
const RAW: u8 = 1;

/// Appends a number in groups of seven bits; the highest bit of a byte says that another follows.
pub(super) fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_number(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

/// Writes a header, whose scale is a 32-bit number.
pub(super) fn encode(header: &RawHeader) -> Vec<u8> {
    let mut out = (header.scale as f32).to_le_bytes().to_vec();
    put_number(&mut out, header.metadata.len() as u64);
    for (key, value) in &header.metadata {
        put_text(&mut out, key);
        put_text(&mut out, value);
    }
    put_number(&mut out, header.tensors.len() as u64);
    let mut last = "";
    for tensor in &header.tensors {
        let shared = shared_start(last, &tensor.name);
        put_number(&mut out, shared as u64);
        put_text(&mut out, &tensor.name[shared..]);
        put_number(&mut out, tensor.shape.len() as u64);
        for side in &tensor.shape {
            put_number(&mut out, *side as u64);
        }
        if let Some((num_nonzero, modulus, gap_bytes)) = tensor.signs {
            out.push(SIGNS);
            for number in [num_nonzero as u64, u64::from(modulus), gap_bytes as u64] {
                put_number(&mut out, number);
            }
        }
        if let Some(dtype) = &tensor.raw {
            out.push(RAW);
            put_text(&mut out, dtype);
        }
        last = &tensor.name;
    }
    out
}

/// Returns the bytes that two names begin with, whole characters only.
fn shared_start(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    same.map(|(a, _)| a.len_utf8()).sum()
}

/// Reads a header.
///
/// # Errors
/// Which rule it breaks.
pub(super) fn decode(bytes: &[u8]) -> Result<RawHeader, String> {
    let mut reader = Reader { bytes, at: 0 };
    let scale = reader.take(4)?;
    let scale = f64::from(f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]));
    let mut metadata = std::collections::BTreeMap::new();
    for _ in 0..reader.number()? {
        let (key, value) = (reader.text()?.to_owned(), reader.text()?.to_owned());
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("its metadata has {key:?} twice"));
        }
    }
    let mut tensors: Vec<RawTensor> = Vec::new();
    for _ in 0..reader.number()? {
        let last = tensors.last().map_or("", |tensor| tensor.name.as_str());
        let shared = reader.size()?;
        let start = last
            .get(..shared)
            .ok_or_else(|| format!("a name shares {shared} bytes with {last:?} before it"))?;
        let name = format!("{start}{}", reader.text()?);
        // No vector is made for a count before its numbers were read.
        let rank = reader.number()?;
        let shape = (0..rank).map(|_| reader.size()).collect::<Result<_, String>>()?;
        let (mut signs, mut raw) = (None, None);
        match reader.take(1)?[0] {
            SIGNS => {
                let (num_nonzero, modulus) = (reader.size()?, reader.number()?);
                let modulus =
                    u32::try_from(modulus).map_err(|_| format!("a modulus is {modulus}"))?;
                signs = Some((num_nonzero, modulus, reader.size()?));
            }
            RAW => raw = Some(reader.text()?.to_owned()),
            other => return Err(format!("tensor '{name}' is of the kind {other}, known: 0 and 1")),
        }
        tensors.push(RawTensor { name, shape, signs, raw });
    }
    if reader.at < bytes.len() {
        return Err(format!("{} bytes follow its last tensor", bytes.len() - reader.at));
    }
    Ok(RawHeader { scale, metadata, tensors })
}

/// Bytes, and how far they were read.
pub(super) struct Reader<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(count);
        let found = end.and_then(|end| self.bytes.get(self.at..end));
        let found = found.ok_or_else(|| format!("it ends {count} bytes after byte {}", self.at))?;
        self.at += count;
        Ok(found)
    }

    /// Reads a number of at most 64 bits.
    pub(super) fn number(&mut self) -> Result<u64, String> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            let group = u64::from(byte & 0x7f);
            if group << shift >> shift != group {
                break;
            }
            number |= group << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(format!("a number that ends at byte {} has more than 64 bits", self.at))
    }

    fn size(&mut self) -> Result<usize, String> {
        let number = self.number()?;
        usize::try_from(number).map_err(|_| format!("{number} is more than this machine counts to"))
    }

    fn text(&mut self) -> Result<&'a str, String> {
        let length = self.size()?;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes)
            .map_err(|_| format!("a text before byte {} is no UTF-8", self.at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_are_those_worked_out_by_hand() {
        let tensor = |name: &str, shape: &[usize]| RawTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            signs: Some((2, 3, 300)),
            raw: None,
        };
        let raw = RawTensor { signs: None, raw: Some("F16".to_owned()), ..tensor("m.b", &[]) };
        let header = RawHeader {
            scale: 0.5,
            metadata: [("k".to_owned(), "v".to_owned())].into(),
            tensors: vec![tensor("m.a", &[128, 1]), raw],
        };
        let expected = [
            &0.5f32.to_le_bytes()[..],
            &[1, 1, b'k', 1, b'v', 2],
            &[0, 3, b'm', b'.', b'a', 2, 0x80, 1, 1, 0, 2, 3, 0xac, 2],
            &[2, 1, b'b', 0, 1, 3, b'F', b'1', b'6'],
        ]
        .concat();
        let found = encode(&header);
        assert_eq!(found, expected);
        assert_eq!(encode(&decode(&found).unwrap()), expected);
        for end in 0..found.len() {
            decode(&found[..end]).unwrap_err();
        }
    }

    #[test]
    fn what_breaks_a_rule_is_refused() {
        let refused = |tail: &[u8]| decode(&[&[0; 4], tail].concat()).unwrap_err();
        assert!(refused(&[0, 0, 7]).contains("1 bytes follow"));
        assert!(refused(&[2, 1, b'k', 0, 1, b'k', 0, 0]).contains("twice"));
        assert!(refused(&[1, 1, 0xff, 0, 0]).contains("UTF-8"));
        assert!(refused(&[0, 1, 1, 1, b'a', 0, 1, 0]).contains("shares 1 bytes"));
        assert!(refused(&[0, 1, 0, 1, b'a', 0, 9]).contains("kind 9"));
        let long = [&[0, 1, 0, 1, b'a', 0, 0, 1][..], &[0xff; 9], &[2, 0]].concat();
        assert!(refused(&long).contains("64 bits"));
        assert!(refused(&[0, 1, 0, 1, b'a', 0xff, 0xff, 0xff, 0xff, 15, 1]).contains("ends"));
        // Half of a character, shared with the name before.
        let split = [0, 2, 0, 2, 0xc3, 0xa9, 0, 1, 2, b'U', b'8', 1, 1, b'x', 0, 1, 2, b'U', b'8'];
        assert!(refused(&split).contains("shares 1 bytes"));
    }

    proptest! {
        #[test]
        fn numbers_survive(number: u64) {
            let mut bytes = Vec::new();
            put_number(&mut bytes, number);
            prop_assert_eq!(Reader { bytes: &bytes, at: 0 }.number(), Ok(number));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = decode(&bytes);
        }
    }
}
