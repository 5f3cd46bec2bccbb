//! How alike the layers of a model are: pooled hidden states and their linear CKA.

use std::collections::BTreeMap;

use crate::{Error, Result};
use retune_core::batch::Batch;
use retune_core::kernels::Spans;
use retune_core::model::Tuned;
use retune_core::parameters::{Parameters, to_vec};
use retune_core::pass::Pass;
use retune_core::site::Site;
use retune_core::{change::Changes, change::Mode};

/// How the states of a document become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The mean, each token weighed by its position counted from 1.
    WeightedMean,
    /// The mean.
    Mean,
    /// The largest of each channel.
    Max,
    /// The last token's.
    Last,
}

/// What each block of an untuned model puts out, one vector per document: `[layer][document][width]`.
pub type LayerOutputs = Vec<Vec<Vec<f64>>>;

/// Reads the outputs of all blocks, pooled per document.
///
/// # Errors
/// Those of the model.
pub fn layer_outputs<'b>(
    tuned: &Tuned<'_>,
    batches: impl IntoIterator<Item = &'b Batch>,
    pooling: Pooling,
) -> Result<LayerOutputs> {
    let mut outputs = vec![Vec::new(); tuned.model.spec().num_layers];
    let nothing = (Changes::default(), Parameters::new(tuned.weights.device()));
    for batch in batches {
        let mut seen: BTreeMap<usize, (usize, Vec<f32>)> = BTreeMap::new();
        let pass = Pass::new(tuned.weights, &nothing.0, &nothing.1, batch, Mode::Evaluate)?;
        let spans = pass.spans().clone();
        let mut pass = pass.with_listener(Box::new(|site, states| {
            if let Site::LayerOutput(layer) = site {
                seen.insert(layer, (states.dims()[1], to_vec(states.clone().inner())));
            }
            states
        }));
        tuned.model.forward(&mut pass)?;
        drop(pass);
        for (layer, (width, states)) in seen {
            outputs[layer].extend(pool(&states, width, &spans, pooling));
        }
    }
    Ok(outputs)
}

/// Pools states `[tokens, width]` document by document.
fn pool(states: &[f32], width: usize, spans: &Spans, pooling: Pooling) -> Vec<Vec<f64>> {
    let pool = |span: std::ops::Range<usize>| {
        let rows = states[span.start * width..span.end * width].chunks_exact(width.max(1));
        let count = rows.len();
        let weigh = |weight: &dyn Fn(usize) -> f64| {
            let mut sum = vec![0.0; width];
            for (place, row) in rows.clone().enumerate() {
                let weight = weight(place);
                sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * f64::from(*x));
            }
            sum
        };
        match pooling {
            Pooling::WeightedMean => {
                let total = (count * (count + 1) / 2) as f64;
                weigh(&|place| (place + 1) as f64 / total)
            }
            Pooling::Mean => weigh(&|_| 1.0 / count as f64),
            Pooling::Last => weigh(&|place| f64::from(u8::from(place + 1 == count))),
            Pooling::Max => {
                let least = vec![f64::NEG_INFINITY; width];
                rows.fold(least, |most, row| {
                    most.iter().zip(row).map(|(most, x)| most.max(f64::from(*x))).collect()
                })
            }
        }
    };
    spans.iter().filter(|span| !span.is_empty()).map(pool).collect()
}

/// Computes the linear CKA of every pair of layers, `[layer][layer]`.
///
/// `|XᵀY|² / (|XᵀX| |YᵀY|)` of centred columns, by the documents' products with each other, which
/// are fewer than the channels' as a rule; 0 where a layer puts out the same for every document.
///
/// # Source
/// Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network Representations Revisited"
/// (2019), <https://arxiv.org/abs/1905.00414>.
///
/// # Errors
/// [`Error::Input`] for fewer than two documents, or layers that saw different numbers of them.
pub fn linear_cka(outputs: &[Vec<Vec<f64>>]) -> Result<Vec<Vec<f64>>> {
    let count = outputs.first().map_or(0, Vec::len);
    if count < 2 || outputs.iter().any(|layer| layer.len() != count) {
        return Err(Error::Input {
            what: "layers cannot be compared".to_owned(),
            expected: "at least 2 documents, the same for every layer".to_owned(),
            found: format!("{count} documents"),
            help: "give more rows".to_owned(),
        });
    }
    let grams: Vec<Vec<f64>> = outputs.iter().map(|layer| gram(layer)).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norms: Vec<f64> = grams.iter().map(|gram| dot(gram, gram).sqrt()).collect();
    let cka = |i: usize, j: usize| {
        let scale = norms[i] * norms[j];
        if scale > 0.0 { dot(&grams[i], &grams[j]) / scale } else { 0.0 }
    };
    let layers = 0..outputs.len();
    Ok(layers.clone().map(|i| layers.clone().map(|j| cka(i.min(j), i.max(j))).collect()).collect())
}

/// Computes the products of all rows with each other, after the columns' means were taken off.
fn gram(rows: &[Vec<f64>]) -> Vec<f64> {
    let (count, width) = (rows.len(), rows.first().map_or(0, Vec::len));
    let mean = |column: usize| rows.iter().map(|row| row[column]).sum::<f64>() / count as f64;
    let means: Vec<f64> = (0..width).map(mean).collect();
    let centred: Vec<Vec<f64>> =
        rows.iter().map(|row| row.iter().zip(&means).map(|(x, mean)| x - mean).collect()).collect();
    let mut gram = vec![0.0; count * count];
    for i in 0..count {
        for j in 0..=i {
            let product: f64 = centred[i].iter().zip(&centred[j]).map(|(a, b)| a * b).sum();
            gram[i * count + j] = product;
            gram[j * count + i] = product;
        }
    }
    gram
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similarity_is_the_quotient_of_the_definition() {
        // Columns centred: X = (-1, 0, 1), Y = (-2, 1, 1) / and twice X shifted.
        let x = vec![vec![1.0], vec![2.0], vec![3.0]];
        let y = vec![vec![-1.0], vec![2.0], vec![2.0]];
        let shifted = vec![vec![12.0], vec![14.0], vec![16.0]];
        let constant = vec![vec![5.0]; 3];
        let found = linear_cka(&[x, y, shifted, constant]).unwrap();
        // XᵀY = 3, XᵀX = 2, YᵀY = 6: 9 / 12.
        assert!((found[0][1] - 0.75).abs() < 1e-12, "{found:?}");
        assert_eq!(found[1][0], found[0][1]);
        assert!((found[0][2] - 1.0).abs() < 1e-12 && (found[0][0] - 1.0).abs() < 1e-12);
        assert_eq!((found[0][3], found[3][3]), (0.0, 0.0));
    }

    #[test]
    fn two_columns_count_together() {
        // Centred X = [(-1, 0), (1, 0), (0, -1), (0, 1)]; Y keeps the first column of it.
        let x = [[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]].map(|row| row.to_vec());
        let y = [[-1.0], [1.0], [0.0], [0.0]].map(|row| row.to_vec());
        // XᵀY = (2, 0), |XᵀX|_F = √8, YᵀY = 2: 4 / (2 √8).
        let found = linear_cka(&[x.to_vec(), y.to_vec()]).unwrap();
        assert!((found[0][1] - 1.0 / 2.0_f64.sqrt()).abs() < 1e-12, "{found:?}");
    }

    #[test]
    fn one_document_is_too_few() {
        assert!(linear_cka(&[vec![vec![1.0]]]).is_err() && linear_cka(&[]).is_err());
    }

    #[test]
    fn each_document_is_pooled_on_its_own() {
        let spans = Spans::from_lengths([3, 1]);
        let states = [1.0, 2.0, 3.0, 4.0, 5.0, -6.0, 7.0, 8.0];
        let found = |pooling| pool(&states, 2, &spans, pooling);
        assert_eq!(found(Pooling::Last), [[5.0, -6.0], [7.0, 8.0]]);
        assert_eq!(found(Pooling::Max), [[5.0, 4.0], [7.0, 8.0]]);
        assert!((found(Pooling::Mean)[0][0] - 3.0).abs() < 1e-12);
        // (1·1 + 2·3 + 3·5) / 6 and (1·2 + 2·4 - 3·6) / 6.
        let weighted = found(Pooling::WeightedMean);
        assert!((weighted[0][0] - 22.0 / 6.0).abs() < 1e-12);
        assert!((weighted[0][1] + 8.0 / 6.0).abs() < 1e-12);
        assert_eq!(weighted[1], [7.0, 8.0]);
    }
}
