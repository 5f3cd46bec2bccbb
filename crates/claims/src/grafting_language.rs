//! Grafting on a language model: two tasks in two small regions that hardly share anything.

use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use retune_core::batch::Batch;
use retune_core::model::{Model, Tuned};
use retune_core::parameters::Parameters;
use retune_core::random::{Random, Seed};
use retune_core::weights::Weights;
use retune_evaluate::answers::Answers;
use retune_methods::adapter::Adapter;
use retune_run::graft::Region;
use retune_run::graft::pair::{Bench, Pair};
use retune_run::graft::search::{BaseMask, Settings, Task, search};
use retune_run::graft::sparse;
use retune_run::open::Located;
use retune_train::optimizer::Sgd;

use crate::grafting;
use crate::lab::{Pace, method};
use crate::language::{Language, one};
use crate::{Claim, Proof, Prove, Result};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 15,
    name: "grafting on a language model",
    source: grafting::CLAIM.source,
    claims: "A thousandth of a language model's weights carries what tuning taught; regions of two tasks \
             hardly overlap, and both together solve both tasks.",
    run: "SmolLM2-135M-Instruct from 4-bit blocks, unpacked; two made-up tasks of one-word answers, \
          sentiment of a sentence and parity of a marker from 0 to 9, 96 texts each, of about 15 tokens. \
          Blocks tuned by SGD, 200 steps of 8 texts; the graft by the program's own search from the \
          0.1 % moved most, 12 steps of 32 texts, at most 0.1 % of the entries, chosen on 48 other \
          texts; measured on 96 more, as the likeliest word of all; one seed. Regions are added up by \
          `retune graft compose`'s own code.",
    quick: false,
    prove: Prove::On("smollm2-135m-instruct", prove),
};

const TRAIN: usize = 96;
const VALIDATION: usize = 48;
const TEST: usize = 96;
const SHARE: f64 = 1e-3;
const SEARCH_STEPS: u64 = 12;
const SEARCH_BATCH: usize = 32;

/// A task: its name and a text of it.
type Draw = fn(&mut Random) -> (String, String);
const TASKS: [(&str, Draw); 2] = [("sentiment", sentiment), ("parity", parity)];
const ARMS: [&str; 5] = ["untuned", "tuned", "graft", "most moved", "both grafts"];

fn sentiment(random: &mut Random) -> (String, String) {
    let good = random.below(2) == 0;
    let words: [&str; 8] = if good {
        ["wonderful", "great", "lovely", "superb", "delightful", "excellent", "charming", "perfect"]
    } else {
        ["awful", "dreadful", "boring", "terrible", "poor", "horrible", "dull", "disappointing"]
    };
    let thing =
        one(random, &["film", "book", "meal", "concert", "hotel", "play", "garden", "walk"]);
    let who = one(random, &["We", "They", "My friends", "The critics", "I", "Her parents"]);
    let word = one(random, &words);
    let answer = if good { " good" } else { " bad" };
    (format!("{who} found the {thing} {word}. It was"), answer.to_owned())
}

fn parity(random: &mut Random) -> (String, String) {
    let number = random.below(10);
    let thing = one(random, &["crate", "gate", "track", "locker", "seat", "buoy", "stall", "page"]);
    let who = one(random, &["We", "They", "My friends", "The guards", "I", "Her parents"]);
    let answer = if number.is_multiple_of(2) { " even" } else { " odd" };
    (format!("{who} stood at {thing} {number}. The number is"), answer.to_owned())
}

/// What one task gave.
struct Found {
    untuned: f64,
    tuned: f64,
    graft: f64,
    moved: f64,
    share: f64,
    adapter: Adapter,
}

fn prove(located: &Located) -> Result<Proof> {
    let seed = Seed(15);
    let texts: Vec<(String, String)> = TASKS
        .iter()
        .enumerate()
        .flat_map(|(task, (name, draw))| {
            (0..TRAIN + VALIDATION + TEST)
                .map(move |row| draw(&mut seed.stream(name, &[task as u64, row as u64])))
        })
        .collect();
    let language = Language::open(located, &texts)?;
    let lab = language.lab(language.model()?);
    let base = lab.weights()?;
    let rows = |task: usize, from: usize, to: usize| {
        let start = task * (TRAIN + VALIDATION + TEST);
        (start + from..start + to).collect::<Vec<usize>>()
    };
    let mut found = Vec::new();
    for task in 0..TASKS.len() {
        let train = rows(task, 0, TRAIN);
        let validation = lab.batch(&rows(task, TRAIN, TRAIN + VALIDATION))?;
        let test = lab.batch(&rows(task, TRAIN + VALIDATION, TRAIN + VALIDATION + TEST))?;
        let full = method("full", "targets = ['.*layers\\..*']")?;
        let pace = Pace::steps(200, 8, 0.02).constant();
        let sgd = Sgd { momentum: 0.0, weight_decay: 0.0 };
        let merged = lab.train_with(full, Box::new(sgd), &train, pace, seed, |training| {
            lab.merged(&training.tuned())
        })?;
        let tuned = lab.with(merged).weights()?;
        let batches = |step: u64| {
            let place = |i: usize| train[(step as usize * SEARCH_BATCH + i) % TRAIN];
            lab.batch(&(0..SEARCH_BATCH).map(place).collect::<Vec<_>>())
        };
        let model = lab.model.as_ref();
        found.push(one_task(model, [&base, &tuned], &batches, &validation, &test, seed)?);
    }
    let names = [Path::new(TASKS[0].0), Path::new(TASKS[1].0)];
    let grafts = [(names[0], &found[0].adapter), (names[1], &found[1].adapter)];
    let overlap = sparse::overlaps(&grafts)?.shares;
    let overlap = overlap[0][1].max(overlap[1][0]);
    let both = sparse::compose(&grafts)?;
    let mut parameters = Parameters::new(base.device());
    let changes = both.method()?.attach(&base, &mut parameters, seed)?;
    both.fill(Path::new("both grafts"), &mut parameters)?;
    let model = Arc::clone(&lab.model);
    let joined =
        Tuned { model: model.as_ref(), weights: &base, changes: &changes, parameters: &parameters };
    let mut proof = Proof::default();
    let _ = writeln!(
        proof.figures,
        "| task, accuracy | {} | weights grafted |\n|---|---|---|---|---|---|---|",
        ARMS.join(" | ")
    );
    let mut gaps = Vec::new();
    for (task, found) in found.iter().enumerate() {
        let test = lab.batch(&rows(task, TRAIN + VALIDATION, TRAIN + VALIDATION + TEST))?;
        let both = Answers::of(&joined, &[test])?.accuracy()?;
        gaps.push(both - found.tuned);
        let _ = writeln!(
            proof.figures,
            "| {} | {:.3} | {:.3} | {:.3} | {:.3} | {both:.3} | {:.3} % |",
            TASKS[task].0,
            found.untuned,
            found.tuned,
            found.graft,
            found.moved,
            100.0 * found.share
        );
    }
    proof.assert(
        "regions of two tasks share less than 0.2 of their entries",
        format!("{overlap:.3}"),
        overlap < 0.2,
    );
    proof.assert(
        "both regions grafted at once are within 0.05 of the tuned model on each task",
        crate::each(&gaps),
        gaps.iter().all(|gap| *gap >= -0.05),
    );
    let tuned: Vec<f64> = found.iter().map(|found| found.tuned).collect();
    if tuned.iter().any(|accuracy| *accuracy < 0.9) {
        proof.notes.push(format!(
            "Of the tuned models not both solve their task ({}, where always saying the same of the two words \
             gives about a half): so few steps of plain SGD teach the form of an answer more than what it \
             depends on, and that form is what the tasks share. The card names no rate.",
            crate::each(&tuned)
        ));
    }
    Ok(proof)
}

fn one_task(
    model: &dyn Model,
    [base, tuned]: [&Weights; 2],
    batches: &dyn Fn(u64) -> retune_core::Result<Batch>,
    validation: &Batch,
    test: &Batch,
    seed: Seed,
) -> Result<Found> {
    let pair = Pair::new(model, base, tuned)?;
    let budget = (SHARE * pair.num_entries() as f64) as usize;
    let settings = Settings {
        base: BaseMask::Movement(SHARE),
        num_steps: SEARCH_STEPS,
        budget: Some(budget),
        seed,
        ..Settings::default()
    };
    let right = |tuned: &Tuned<'_>, batch: &Batch| Answers::of(tuned, [batch])?.accuracy();
    let search = search(
        &pair,
        &settings,
        None,
        Task {
            batches: &mut |step| Ok(vec![batches(step)?]),
            judge: &mut |tuned| Ok(right(tuned, validation)?),
            watch: &mut |_| ControlFlow::Continue(()),
        },
    )?;
    let count = search.region.len();
    let mut bench = Bench::new(&pair)?;
    let mut accuracy = |region: &Region| -> Result<f64> {
        bench.graft(region)?;
        Ok(right(&bench.tuned(), test)?)
    };
    let (untuned, graft) = (accuracy(&Region::default())?, accuracy(&search.region)?);
    let moved = accuracy(&pair.most_moved(count)?)?;
    bench.mix(|_, _| 1.0)?;
    let whole = right(&bench.tuned(), test)?;
    Ok(Found {
        untuned,
        tuned: whole,
        graft,
        moved,
        share: count as f64 / pair.num_entries() as f64,
        adapter: sparse::adapter(&pair, &search.region, None)?,
    })
}
