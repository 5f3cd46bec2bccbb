//! PNG and JPEG files.

use std::io::Cursor;
use std::path::Path;

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::Picture;
use crate::error::{Error, Result};

/// The longest side that is read.
pub const MAX_SIDE: usize = 1 << 15;

/// The most pixels that are read: a small file may claim to hold a huge picture.
pub const MAX_PIXELS: usize = 1 << 26;

/// The largest file that is read, in bytes.
const MAX_BYTES: u64 = 256 << 20;

/// Reads a PNG or JPEG file; transparency is dropped, 16 bits become 8.
///
/// # Errors
/// [`Error::Io`] if it cannot be read; [`Error::File`] if it is of another kind, damaged or too large.
pub fn read(path: &Path) -> Result<Picture> {
    let bytes = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
    if bytes > MAX_BYTES {
        return Err(Error::file(
            path,
            format!("the picture has {bytes} bytes, expected at most {MAX_BYTES}"),
            "make it smaller",
        ));
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    decode(&bytes).map_err(|error| match error {
        Error::Example { problem, hint } => Error::file(path, problem, hint),
        other => other,
    })
}

/// Decodes the bytes of a PNG or JPEG file, as [`read`].
///
/// # Errors
/// [`Error::Example`] if they are of another kind, damaged, or hold too large a picture.
pub fn decode(bytes: &[u8]) -> Result<Picture> {
    match bytes {
        [0x89, b'P', b'N', b'G', ..] => png(bytes),
        [0xff, 0xd8, ..] => jpeg(bytes),
        _ => Err(Error::example(
            "this is no picture retune can read: it begins neither as PNG nor as JPEG",
            "convert it to PNG or JPEG",
        )),
    }
}

fn damaged(kind: &str, what: impl std::fmt::Display) -> Error {
    Error::example(format!("the {kind} picture is damaged: {what}"), "get the file again")
}

fn check_size(width: usize, height: usize) -> Result<()> {
    let fits = |side: usize| (1..=MAX_SIDE).contains(&side);
    if fits(width) && fits(height) && width * height <= MAX_PIXELS {
        return Ok(());
    }
    Err(Error::example(
        format!(
            "the picture claims to be {width} × {height} pixels; expected sides of 1 to \
             {MAX_SIDE} and at most {MAX_PIXELS} pixels"
        ),
        "make it smaller",
    ))
}

fn png(bytes: &[u8]) -> Result<Picture> {
    let wrong = |error: png::DecodingError| damaged("PNG", error);
    let limits = png::Limits { bytes: 8 * MAX_PIXELS };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
    let mut reader = decoder.read_info().map_err(wrong)?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    check_size(width, height)?;
    let size = reader.output_buffer_size().ok_or_else(|| damaged("PNG", "it is too large"))?;
    let mut values = vec![0; size];
    let info = reader.next_frame(&mut values).map_err(wrong)?;
    values.truncate(info.buffer_size());
    let (stored, channels) = match info.color_type {
        png::ColorType::Grayscale => (1, 1),
        png::ColorType::GrayscaleAlpha => (2, 1),
        png::ColorType::Rgb => (3, 3),
        png::ColorType::Rgba => (4, 3),
        png::ColorType::Indexed => return Err(damaged("PNG", "it has no palette")),
    };
    if stored != channels {
        values = values.chunks_exact(stored).flat_map(|p| p[..channels].to_vec()).collect();
    }
    Ok(Picture { width, height, channels, values })
}

fn jpeg(bytes: &[u8]) -> Result<Picture> {
    let wrong = |error: zune_jpeg::errors::DecodeErrors| damaged("JPEG", error);
    let options = DecoderOptions::default()
        .set_max_width(MAX_SIDE)
        .set_max_height(MAX_SIDE)
        .set_strict_mode(true);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(wrong)?;
    let (width, height) =
        decoder.dimensions().ok_or_else(|| damaged("JPEG", "it has no dimensions"))?;
    check_size(width, height)?;
    let grey = decoder.input_colorspace() == Some(ColorSpace::Luma);
    let (wanted, channels) = if grey { (ColorSpace::Luma, 1) } else { (ColorSpace::RGB, 3) };
    decoder.set_options(options.jpeg_set_out_colorspace(wanted));
    let values = decoder.decode().map_err(wrong)?;
    if values.len() != width * height * channels {
        let found = values.len();
        return Err(damaged("JPEG", format!("{found} numbers for {width} × {height} pixels")));
    }
    Ok(Picture { width, height, channels, values })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(color: png::ColorType, depth: png::BitDepth, side: u32, data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut encoder = png::Encoder::new(&mut out, side, side);
        encoder.set_color(color);
        encoder.set_depth(depth);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(data).unwrap();
        writer.finish().unwrap();
        out
    }

    #[test]
    fn png_keeps_its_numbers() {
        let (rgb, eight) = (png::ColorType::Rgb, png::BitDepth::Eight);
        let values: Vec<u8> = (0..12).collect();
        let found = decode(&encoded(rgb, eight, 2, &values)).unwrap();
        assert_eq!(found, Picture { width: 2, height: 2, channels: 3, values });
        // Transparency goes, 16 bits keep their upper half.
        let rgba = encoded(png::ColorType::Rgba, eight, 1, &[9, 8, 7, 100]);
        assert_eq!(decode(&rgba).unwrap().values, [9, 8, 7]);
        let deep = encoded(png::ColorType::Grayscale, png::BitDepth::Sixteen, 1, &[200, 13]);
        assert_eq!(decode(&deep).unwrap().values, [200]);
        // One bit a pixel, four of them: black, white, white, black.
        let bits = encoded(png::ColorType::Grayscale, png::BitDepth::One, 2, &[0x40, 0x80]);
        assert_eq!(decode(&bits).unwrap().values, [0, 255, 255, 0]);
    }

    /// Two JPEG files of 8 × 8 pixels made by Pillow 13.0.0, in hexadecimal: a grey slope of
    /// 20 + 12 · column + 16 · row, and one colour.
    const SLOPE: &str = "ffd8ffe000104a46494600010100000100010000ffdb00430002010101010102010101020202020204030202\
        02020504040304060506060605060606070908060709070606080b08090a0a0a0a0a06080b0c0b0a0c090a0a\
        0affc0000b080008000801011100ffc40014000100000000000000000000000000000006ffc4001a10000007\
        0000000000000000000000000000080925344352ffda0008010100003f002e49136e23066a1fffd9";
    const COLOUR: &str = "ffd8ffe000104a46494600010100000100010000ffdb00430002010101010102010101020202020204030202\
        02020504040304060506060605060606070908060709070606080b08090a0a0a0a0a06080b0c0b0a0c090a0a\
        0affdb004301020202020202050303050a0706070a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a\
        0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0affc000110800080008030111000211010311\
        01ffc40014000100000000000000000000000000000008ffc400141001000000000000000000000000000000\
        00ffc4001501010100000000000000000000000000000309ffc4001411010000000000000000000000000000\
        0000ffda000c03010002110311003f002f91501fffd9";

    fn bytes(hex: &str) -> Vec<u8> {
        let byte = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(byte).collect()
    }

    #[test]
    fn jpeg_is_near_what_was_saved() {
        let slope = decode(&bytes(SLOPE)).unwrap();
        assert_eq!((slope.width, slope.height, slope.channels), (8, 8, 1));
        for (place, value) in slope.values.iter().enumerate() {
            let saved = 20 + 12 * (place % 8) as i32 + 16 * (place / 8) as i32;
            assert!((i32::from(*value) - saved).abs() <= 3, "{place}: {value}, saved {saved}");
        }
        let colour = decode(&bytes(COLOUR)).unwrap();
        assert_eq!((colour.width, colour.height, colour.channels), (8, 8, 3));
        for pixel in colour.values.chunks(3) {
            let near = pixel.iter().zip([200, 30, 90]).all(|(v, s)| (i32::from(*v) - s).abs() <= 3);
            assert!(near, "{pixel:?}");
        }
        let whole = bytes(SLOPE);
        for length in [2, whole.len() / 2, whole.len() - 20] {
            assert!(decode(&whole[..length]).is_err(), "{length} of {} bytes", whole.len());
        }
    }

    #[test]
    fn what_is_no_whole_picture_is_refused() {
        let whole = encoded(png::ColorType::Rgb, png::BitDepth::Eight, 2, &[7; 12]);
        for length in 0..whole.len() - 12 {
            assert!(decode(&whole[..length]).is_err(), "{length} of {} bytes", whole.len());
        }
        let error = decode(b"GIF89a").unwrap_err().to_string();
        assert!(error.contains("neither as PNG nor as JPEG"), "{error}");
        assert!(decode(&[0xff, 0xd8, 0xff, 0xe0, 0, 3]).is_err());
    }

    #[test]
    fn a_picture_that_claims_to_be_huge_is_refused_before_memory_is_taken() {
        let mut bomb = encoded(png::ColorType::Grayscale, png::BitDepth::Eight, 1, &[0]);
        // Width and height of the header, and its checksum.
        bomb[16..24].copy_from_slice(&[0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
        let crc = bomb[12..29].iter().fold(u32::MAX, |mut crc, byte| {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0xedb8_8320 * (crc & 1));
            }
            crc
        });
        bomb[29..33].copy_from_slice(&(!crc).to_be_bytes());
        let error = decode(&bomb).unwrap_err().to_string();
        assert!(error.contains("65535 × 65535"), "{error}");
    }
}
