//! Images and texts of a safetensors file, for `logits`.

use std::path::Path;

use retune_core::batch::{Batch, Document, IMAGE};
use retune_core::model::{Output, Tuned};
use retune_core::pass::logit_rows;
use retune_core::spec::ImageSpec;
use retune_files::safetensors::SafetensorsFile;

use crate::failure::Failure;

/// Images in one pass.
const CHUNK: usize = 16;

fn wrong(path: &Path, name: &str, expected: &str, found: &str) -> Failure {
    Failure::Failed(format!(
        "{}: tensor `{name}` cannot be used\n  expected: {expected}\n  found: {found}\n  help: pixel_values [B, C, H, W] as floats; for models that compare images with texts also input_ids [T, L] and, where needed, attention_mask of the same shape",
        path.display()
    ))
}

/// Computes the class logits or vector of each image of a file, or its similarity with each of the
/// file's texts.
///
/// # Errors
/// If the file lacks a tensor or one has another shape; those of the model.
pub(crate) fn rows(tuned: &Tuned<'_>, input: &Path) -> Result<Vec<Vec<f32>>, Failure> {
    let spec = tuned.model.spec();
    let Some(image) = spec.image() else { return Ok(Vec::new()) };
    let file = SafetensorsFile::open(input)?;
    let images = images(&file, input, image)?;
    let texts = if spec.vocabulary > 0 { texts(&file, input)? } else { Vec::new() };
    let mut rows = Vec::new();
    for images in images.chunks(CHUNK) {
        let batch = Batch::new(&[images, &texts[..]].concat())?;
        rows.extend(tuned.evaluate(&batch, None, |_, output| {
            Ok(match output {
                Output::Classes(rows) | Output::Embeddings(rows) | Output::States(rows) => {
                    logit_rows(rows)
                }
                Output::Pairs(pairs) => logit_rows(pairs.similarities()),
            })
        })?);
    }
    Ok(rows)
}

fn images(
    file: &SafetensorsFile,
    path: &Path,
    image: &ImageSpec,
) -> Result<Vec<Document>, Failure> {
    let view = file.tensor("pixel_values")?;
    let [height, width] = image.size;
    let wanted = [image.channels, height, width];
    if view.shape.len() != 4 || view.shape[1..] != wanted {
        let expected = format!("shape [B, {}, {height}, {width}]", image.channels);
        return Err(wrong(path, "pixel_values", &expected, &format!("{:?}", view.shape)));
    }
    let tokens = vec![IMAGE; image.num_tokens()];
    let document = |(row, pixels): (usize, &[f32])| Document {
        learn: vec![false; tokens.len()],
        tokens: tokens.clone(),
        pixels: image.patches(pixels),
        row,
        ..Document::default()
    };
    Ok(view.to_f32()?.chunks_exact(image.num_values()).enumerate().map(document).collect())
}

fn texts(file: &SafetensorsFile, path: &Path) -> Result<Vec<Document>, Failure> {
    let ids = file.tensor("input_ids")?;
    let [_, length] = *ids.shape else {
        return Err(wrong(path, "input_ids", "shape [T, L]", &format!("{:?}", ids.shape)));
    };
    let mask = match file.get("attention_mask") {
        None => None,
        Some(view) if view.shape == ids.shape => Some(view.to_i64()?),
        Some(view) => {
            let expected = format!("shape {:?}", ids.shape);
            return Err(wrong(path, "attention_mask", &expected, &format!("{:?}", view.shape)));
        }
    };
    let kept = |place: usize| mask.as_ref().is_none_or(|mask| mask[place] != 0);
    let ids = ids.to_i64()?;
    let mut documents = Vec::new();
    for row in 0..ids.len() / length.max(1) {
        let tokens = (row * length..(row + 1) * length)
            .filter(|place| kept(*place))
            .map(|place| {
                u32::try_from(ids[place])
                    .map_err(|_| wrong(path, "input_ids", "ids from 0", &ids[place].to_string()))
            })
            .collect::<Result<Vec<u32>, _>>()?;
        documents.push(Document {
            learn: vec![false; tokens.len()],
            tokens,
            row,
            ..Document::default()
        });
    }
    Ok(documents)
}
