//! AutoPEFT's space: serial and parallel adapters and prefixes, on or off in every layer.

use std::fmt::Write;

use retune_core::model::Model;
use retune_core::random::Seed;

use crate::contest::Rows;
use crate::encoder::{Encoder, Sizes};
use crate::lab::{Lab, Pace, method};
use crate::pictures::Pictures;
use crate::rotated::{TRAIN, rotated};
use crate::{Claim, Clock, Proof, Result};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 3,
    name: "AutoPEFT's space",
    source: "Zhou, Wan, Vulić and Korhonen, AutoPEFT: Automatic Configuration Search for \
             Parameter-Efficient Fine-Tuning, 2023, arXiv 2301.12132",
    claims: "Which modules stand in which layers, and how large they are, is a space worth searching: \
             a guided search finds better fronts of quality against size than a random one.",
    run: "The space alone: serial adapters, parallel adapters and prefixes of sizes 0, 1, 4 and 16 in \
          any of 3 layers, 441 configurations; each was tuned once for 4 passes over 500 rotated \
          digits from a transformer of 3 layers and width 32 that knew upright ones, and its accuracy \
          on 397 others is kept in a table. This proof counts every configuration's parameters, tries \
          what is invalid, and tunes 8 configurations again. The search is not part of it.",
    quick: true,
    prove,
};

/// Every configuration with what it trains and the accuracy it reached: a line of the layers it is
/// on in, its three sizes, the count and the accuracy.
const TABLE: &str = include_str!("../fixtures/configurations.txt");

const LAYERS: usize = 3;
const WIDTH: usize = 32;
const SIZES: [usize; 4] = [0, 1, 4, 16];
const SEED: Seed = Seed(30);

/// A point of the space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Configuration {
    layers: [bool; LAYERS],
    serial: usize,
    parallel: usize,
    prefix: usize,
}

impl Configuration {
    /// Lists the valid points, in the order of the table.
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for bits in 1..1_u32 << LAYERS {
            let layers = std::array::from_fn(|layer| bits >> layer & 1 == 1);
            for serial in SIZES {
                for parallel in SIZES {
                    for prefix in SIZES {
                        if serial + parallel + prefix > 0 {
                            all.push(Self { layers, serial, parallel, prefix });
                        }
                    }
                }
            }
        }
        all
    }

    fn options(&self) -> String {
        let on: Vec<usize> = (0..LAYERS).filter(|layer| self.layers[*layer]).collect();
        format!(
            "layers = {on:?}\nserial = {{ size = {}, start = 'bert' }}\nparallel = {{ size = {}, \
             scale = 4.0 }}\nprefix = {{ tokens = {} }}",
            self.serial, self.parallel, self.prefix
        )
    }

    /// Counts what it trains by the closed form; the head is not counted.
    fn count(&self) -> usize {
        let bottleneck = |size: usize| if size > 0 { 2 * WIDTH * size + size + WIDTH } else { 0 };
        let on = self.layers.iter().filter(|on| **on).count();
        on * (bottleneck(self.serial) + bottleneck(self.parallel) + 2 * WIDTH * self.prefix)
    }

    fn line(&self, accuracy: f64) -> String {
        let layers: String = self.layers.map(|on| if on { '1' } else { '0' }).iter().collect();
        let Self { serial, parallel, prefix, .. } = self;
        format!("{layers} {serial} {parallel} {prefix} {} {accuracy:.4}", self.count())
    }

    fn train(&self, lab: &Lab, rows: &Rows) -> Result<f64> {
        let pace = Pace::passes(4, TRAIN, 32, 5e-3);
        lab.train(method("autopeft", &self.options())?, &rows.train, pace, SEED, |training| {
            lab.accuracy_of(&training.tuned(), &rows.test)
        })
    }
}

fn ground() -> Result<(Lab, Rows)> {
    let (lab, rows) = rotated(LAYERS, SEED)?;
    let test = [rows.validation.clone(), rows.test.clone()].concat();
    Ok((lab, Rows { test, ..rows }))
}

/// Tunes every configuration and writes the table that is kept.
///
/// # Errors
/// Those of training.
pub fn table() -> Result<String> {
    let (lab, rows) = ground()?;
    let mut out = String::new();
    for configuration in Configuration::all() {
        let _ = writeln!(out, "{}", configuration.line(configuration.train(&lab, &rows)?));
    }
    Ok(out)
}

fn prove(_clock: Clock) -> Result<Proof> {
    let all = Configuration::all();
    let lines: Vec<&str> = TABLE.lines().collect();
    let mut proof = Proof::default();
    proof.assert(
        "the space has 7 · 63 configurations, and the table one line for each",
        format!("{} and {}", all.len(), lines.len()),
        all.len() == 7 * 63 && lines.len() == all.len(),
    );
    let pictures = Pictures::digits(SEED);
    let model = Encoder::of_pictures(pictures.table(), Sizes::of(WIDTH, LAYERS).with_biases());
    let spec = model.spec();
    let head = spec.weights.iter().filter(|weight| weight.module() == "head");
    let head: usize = head.map(|weight| weight.count()).sum();
    let mut wrong = 0;
    for configuration in &all {
        let plan = method("autopeft", &configuration.options())?.plan(spec)?;
        wrong += usize::from(plan.num_trainable() != configuration.count() + head);
    }
    proof.assert(
        "every configuration trains as many values as the closed form says",
        format!("{wrong} do not"),
        wrong == 0,
    );
    let none = Configuration { layers: [true; LAYERS], serial: 0, parallel: 0, prefix: 0 };
    let refused = [
        none.options(),
        format!("layers = [{LAYERS}]\nserial = {{ size = 1 }}"),
        format!("serial = {{ size = {} }}", WIDTH + 1),
    ]
    .iter()
    .map(|options| Ok(method("autopeft", options)?.plan(spec).is_err()))
    .collect::<Result<Vec<bool>>>()?;
    proof.assert(
        "no module at all, a layer the model lacks and a bottleneck wider than the model are refused",
        format!("{refused:?}"),
        refused.iter().all(|refused| *refused),
    );
    let (lab, rows) = ground()?;
    let mut others = Vec::new();
    for place in SEED.stream("again", &[]).choose(all.len(), 8) {
        let again = all[place].line(all[place].train(&lab, &rows)?);
        if lines.get(place) != Some(&again.as_str()) {
            others.push(again);
        }
    }
    proof.assert(
        "8 configurations tuned again reach what the table says",
        if others.is_empty() { "all".to_owned() } else { format!("not {}", others.join("; ")) },
        others.is_empty(),
    );
    front(&lines, &mut proof);
    proof.notes.push(
        "Guided, evolutionary and random search over this table belong to configuration search and \
         are not part of this proof."
            .to_owned(),
    );
    Ok(proof)
}

/// Shows the configurations that none of the same size or smaller beats.
fn front(lines: &[&str], proof: &mut Proof) {
    let mut points: Vec<(usize, f64, &str)> = lines
        .iter()
        .filter_map(|line| {
            let (rest, accuracy) = line.rsplit_once(' ')?;
            let (configuration, count) = rest.rsplit_once(' ')?;
            Some((count.parse().ok()?, accuracy.parse().ok()?, configuration))
        })
        .collect();
    points.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    proof.figures.push_str(
        "The front of the table:\n\n| layers on | serial | parallel | prefix | values that train | \
         accuracy |\n|---|---|---|---|---|---|\n",
    );
    let mut best = f64::NEG_INFINITY;
    for (count, accuracy, configuration) in points {
        if accuracy > best {
            best = accuracy;
            let cells = configuration.replace(' ', " | ");
            let _ = writeln!(proof.figures, "| {cells} | {count} | {accuracy:.3} |");
        }
    }
}
