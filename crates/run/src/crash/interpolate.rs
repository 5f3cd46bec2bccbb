//! The straight line between two models and the plane through three: whether a barrier of loss lies
//! between them.

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::Batch;
use retune_core::change::Changes;
use retune_core::model::{Model, Tuned};
use retune_core::parameters::Parameters;
use retune_core::weights::{Packing, Stored, WeightSource, Weights};
use retune_evaluate::validation::{Validation, validate};
use serde::Serialize;

use crate::artefacts::heatmap::HeatMap;
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

/// One point of a plane.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PlanePoint {
    /// Shares of the second and of the third model; the first has the rest, which may be negative.
    pub shares: [f64; 2],
    /// Mean loss of the labels.
    pub loss: f64,
    /// Share of right classes, for classifiers.
    pub accuracy: Option<f64>,
}

/// The losses over the plane through three models.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plane {
    /// The points; the share of the second model grows within rows, that of the third from row to
    /// row.
    pub rows: Vec<Vec<PlanePoint>>,
}

impl Plane {
    /// Draws the losses; the first model is the upper left corner, the second the upper right one,
    /// the third the lower left one.
    pub fn plot(&self) -> HeatMap {
        let share = |share: f64| format!("{share:.2}");
        let first = self.rows.first().map(Vec::as_slice).unwrap_or_default();
        HeatMap {
            title: "loss on the plane through three models".to_owned(),
            value_label: "loss (nats per label)".to_owned(),
            column_label: "share of the second; downwards of the third".to_owned(),
            rows: self.rows.iter().filter_map(|row| Some(share(row.first()?.shares[1]))).collect(),
            columns: first.iter().map(|point| share(point.shares[0])).collect(),
            values: self
                .rows
                .iter()
                .map(|row| row.iter().map(|point| Some(point.loss)).collect())
                .collect(),
        }
    }
}

/// Weights of several models, each with a share.
#[derive(Debug)]
struct Mixed {
    models: Vec<Arc<Weights>>,
    shares: Vec<f32>,
}

impl WeightSource for Mixed {
    fn names(&self) -> Vec<String> {
        self.models[0].source().names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.models[0].source().shape(name)
    }

    fn read(&self, name: &str) -> retune_core::Result<Stored> {
        let first = &self.models[0];
        let mut values = first.values(name)?;
        // Products with all shares, so that a corner is the model itself.
        for value in &mut values {
            *value *= self.shares[0];
        }
        for (model, share) in self.models.iter().zip(&self.shares).skip(1) {
            for (value, other) in values.iter_mut().zip(model.values(name)?) {
                *value += share * other;
            }
        }
        let weight = first.describe(name)?;
        if weight.kind == (retune_core::spec::Kind::Linear { transposed: true }) {
            let [rows, columns] = weight.matrix();
            values = retune_core::weights::transpose(&values, rows, columns);
        }
        Ok(Stored::Values(values))
    }
}

/// Models of one shape, to be mixed and measured.
struct Mixer<'a> {
    model: &'a dyn Model,
    models: Vec<Arc<Weights>>,
    batches: &'a [Batch],
}

impl<'a> Mixer<'a> {
    /// Refuses models of other shapes than the first's.
    fn new(
        model: &'a dyn Model,
        ends: &[&Weights],
        batches: &'a [Batch],
        paths: &[&Path],
    ) -> Result<Self> {
        let shapes = |weights: &Weights| -> Vec<(String, Vec<usize>)> {
            weights.spec().weights.iter().map(|w| (w.name.clone(), w.shape.clone())).collect()
        };
        let first = shapes(ends[0]);
        for (end, path) in ends.iter().zip(paths) {
            let other = shapes(end);
            if first == other {
                continue;
            }
            let differs = first.iter().zip(&other).find(|(a, b)| a != b);
            return Err(Error::Run {
                path: path.to_path_buf(),
                what: "the models are not of one shape".to_owned(),
                expected: format!("{} weights as in the first", first.len()),
                found: differs.map_or_else(
                    || format!("{} weights", other.len()),
                    |((a, x), (b, y))| format!("`{b}` {y:?} in place of `{a}` {x:?}"),
                ),
                help: "give models tuned from one base".to_owned(),
            });
        }
        let again = |weights: &&Weights| -> Result<Arc<Weights>> {
            let (source, spec) = (Arc::clone(weights.source()), Arc::clone(weights.spec()));
            Ok(Arc::new(Weights::new(source, spec, Packing::default(), weights.device())?))
        };
        Ok(Self { model, models: ends.iter().map(again).collect::<Result<_>>()?, batches })
    }

    /// Measures the model in which each has its share.
    fn measure(&self, shares: &[f64]) -> Result<Validation> {
        let shares = shares.iter().map(|share| *share as f32).collect();
        let mixed = Mixed { models: self.models.clone(), shares };
        let (spec, device) = (Arc::clone(self.models[0].spec()), self.models[0].device());
        let here = Weights::new(Arc::new(mixed), spec, Packing::default(), device)?;
        let (changes, parameters) = (Changes::default(), Parameters::new(here.device()));
        let model = self.model;
        let tuned = Tuned { model, weights: &here, changes: &changes, parameters: &parameters };
        Ok(validate(&tuned, self.batches)?)
    }
}

/// Refuses a walk of fewer than two points.
fn check_count(num_points: usize) -> Result<()> {
    if num_points < 2 {
        return Err(Error::Plan {
            what: "there is no line".to_owned(),
            expected: "at least 2 points".to_owned(),
            found: num_points.to_string(),
            help: "the paper takes 25".to_owned(),
        });
    }
    Ok(())
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
    check_count(num_points)?;
    let mixer = Mixer::new(model, &ends, batches, &[path, path])?;
    let mut points = Vec::with_capacity(num_points);
    for number in 0..num_points {
        let place = number as f64 / (num_points - 1) as f64;
        let found = mixer.measure(&[1.0 - place, place])?;
        points.push(Point { place, loss: found.loss, accuracy: found.accuracy });
    }
    Ok(Line { points })
}

/// Measures models on the plane through three, `num_points` times `num_points` of them: all shares
/// of the second and of the third from 0 to 1. `paths` name the models in errors.
///
/// # Errors
/// As [`line()`].
///
/// # Cost
/// One validation per point, with all models and the one between in memory.
pub fn plane(
    model: &dyn Model,
    corners: [&Weights; 3],
    batches: &[Batch],
    num_points: usize,
    paths: [&Path; 3],
) -> Result<Plane> {
    check_count(num_points)?;
    let mixer = Mixer::new(model, &corners, batches, &paths)?;
    let share = |number: usize| number as f64 / (num_points - 1) as f64;
    let point = |second: f64, third: f64| -> Result<PlanePoint> {
        let found = mixer.measure(&[1.0 - second - third, second, third])?;
        Ok(PlanePoint { shares: [second, third], loss: found.loss, accuracy: found.accuracy })
    };
    let row = |third: usize| (0..num_points).map(|n| point(share(n), share(third))).collect();
    Ok(Plane { rows: (0..num_points).map(row).collect::<Result<_>>()? })
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
