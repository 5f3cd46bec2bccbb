//! The straight line between two models: whether a barrier of loss lies on it.

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::Batch;
use retune_core::change::Changes;
use retune_core::model::{Model, Tuned};
use retune_core::parameters::Parameters;
use retune_core::weights::{Packing, Stored, WeightSource, Weights};
use retune_evaluate::validation::validate;
use serde::Serialize;

use crate::artefacts::plot::{Plot, Scale, Series};
use crate::error::{Error, Result};

/// One point of a line.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Point {
    /// From 0, the first model, to 1, the second.
    pub place: f64,
    /// Mean loss of the labels.
    pub loss: f64,
    /// Share of right classes, for classifiers.
    pub accuracy: Option<f64>,
}

/// The losses along a line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// The points, by place.
    pub points: Vec<Point>,
}

impl Line {
    /// Computes how far the largest loss of the line lies above the larger of its ends, as a share
    /// of that: 0 where there is no barrier.
    pub fn barrier(&self) -> f64 {
        let loss = |point: Option<&Point>| point.map_or(f64::NAN, |point| point.loss);
        let ends = loss(self.points.first()).max(loss(self.points.last()));
        let most = self.points.iter().map(|point| point.loss).fold(ends, f64::max);
        most / ends - 1.0
    }

    /// Draws the losses.
    pub fn plot(&self) -> Plot {
        Plot {
            title: "loss on the line between two models".to_owned(),
            x_label: "share of the second model".to_owned(),
            y_label: "loss (nats per label)".to_owned(),
            scale: Scale::Linear,
            series: vec![Series {
                name: "held-out rows".to_owned(),
                points: self.points.iter().map(|point| (point.place, point.loss)).collect(),
                smooth: false,
            }],
        }
    }
}

/// Weights between two models.
#[derive(Debug)]
struct Between {
    ends: [Arc<dyn WeightSource>; 2],
    weights: [Arc<Weights>; 2],
    place: f64,
}

impl WeightSource for Between {
    fn names(&self) -> Vec<String> {
        self.ends[0].names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.ends[0].shape(name)
    }

    fn read(&self, name: &str) -> retune_core::Result<Stored> {
        let [first, second] = &self.weights;
        let mut values = first.values(name)?;
        let place = self.place as f32;
        for (value, other) in values.iter_mut().zip(second.values(name)?) {
            // Written so that both ends are the models themselves.
            *value = (1.0 - place) * *value + place * other;
        }
        let weight = first.describe(name)?;
        if weight.kind == (retune_core::spec::Kind::Linear { transposed: true }) {
            let [rows, columns] = weight.matrix();
            values = retune_core::weights::transpose(&values, rows, columns);
        }
        Ok(Stored::Values(values))
    }
}

/// Measures `num_points` models, evenly spread on the straight line from one to another.
///
/// # Errors
/// [`Error::Plan`] for fewer than two points; [`Error::Run`] if the models are not of one shape;
/// those of the models.
///
/// # Cost
/// One validation per point, with both models and the one between in memory.
pub fn line(
    model: &dyn Model,
    ends: [&Weights; 2],
    batches: &[Batch],
    num_points: usize,
    path: &Path,
) -> Result<Line> {
    if num_points < 2 {
        return Err(Error::Plan {
            what: "there is no line".to_owned(),
            expected: "at least 2 points".to_owned(),
            found: num_points.to_string(),
            help: "the paper takes 25".to_owned(),
        });
    }
    let shapes = |weights: &Weights| -> Vec<(String, Vec<usize>)> {
        weights.spec().weights.iter().map(|w| (w.name.clone(), w.shape.clone())).collect()
    };
    let (first, second) = (shapes(ends[0]), shapes(ends[1]));
    if first != second {
        let differs = first.iter().zip(&second).find(|(a, b)| a != b);
        return Err(Error::Run {
            path: path.to_path_buf(),
            what: "the two models are not of one shape".to_owned(),
            expected: format!("{} weights as in the first", first.len()),
            found: differs.map_or_else(
                || format!("{} weights", second.len()),
                |((a, x), (b, y))| format!("`{b}` {y:?} in place of `{a}` {x:?}"),
            ),
            help: "give two models tuned from one base".to_owned(),
        });
    }
    let again = |weights: &Weights| -> Result<Arc<Weights>> {
        let (source, spec) = (Arc::clone(weights.source()), Arc::clone(weights.spec()));
        Ok(Arc::new(Weights::new(source, spec, Packing::default(), weights.device())?))
    };
    let weights = [again(ends[0])?, again(ends[1])?];
    let mut points = Vec::with_capacity(num_points);
    for number in 0..num_points {
        let place = number as f64 / (num_points - 1) as f64;
        let between = Between {
            ends: ends.map(|end| Arc::clone(end.source())),
            weights: weights.clone(),
            place,
        };
        let spec = Arc::clone(ends[0].spec());
        let here = Weights::new(Arc::new(between), spec, Packing::default(), ends[0].device())?;
        let (changes, parameters) = (Changes::default(), Parameters::new(here.device()));
        let tuned = Tuned { model, weights: &here, changes: &changes, parameters: &parameters };
        let found = validate(&tuned, batches)?;
        points.push(Point { place, loss: found.loss, accuracy: found.accuracy });
    }
    Ok(Line { points })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_is_what_stands_above_both_ends() {
        let line = |losses: &[f64]| Line {
            points: losses
                .iter()
                .map(|loss| Point { place: 0.0, loss: *loss, accuracy: None })
                .collect(),
        };
        assert!((line(&[1.0, 3.0, 2.0]).barrier() - 0.5).abs() < 1e-12);
        assert_eq!(line(&[1.0, 0.2, 2.0]).barrier(), 0.0);
    }
}
