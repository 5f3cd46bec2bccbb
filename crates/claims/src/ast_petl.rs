//! PETL of audio transformers: adapters beside the feed-forward network, and which residual suits.

use std::fmt::Write;

use retune_core::batch::Document;
use retune_core::random::Seed;

use crate::audio::{Clips, FRAMES, KINDS, MELS, MOTIONS};
use crate::contest::{Arm, Reached, Results, Rows};
use crate::encoder::{Encoder, Sizes};
use crate::lab::{Lab, Pace};
use crate::mlp::Inputs;
use crate::{Claim, Clock, Proof, Prove, Result, side_by_side};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 12,
    name: "PETL of audio spectrogram transformers",
    source: "Cappellazzo, Falavigna, Brutti and Ravanelli, Parameter-Efficient Transfer Learning of \
             Audio Spectrogram Transformers, 2023, arXiv 2312.03694",
    claims: "At equal trained weights a parallel adapter beats deep prompts, BitFit and the linear \
             probe, few-shot too; a parallel adapter does without a residual and a sequential one \
             needs it.",
    run: "One-second clips of 12 classes (tones, chirps up and down, noise bands, clicks, swelling and \
          swinging tones, slow or fast, chords) at random pitch, loudness and noise, 30 frames of 64 \
          log-mel bins; a transformer of 4 layers and width 64, a token per frame, pretrained on 800 \
          clips to tell 8 kinds of modulation (12 passes); tuned to tell direction and rate (5 \
          classes) with 480 clips (20 passes of batches of 16), and with 4 and 16 clips of each class \
          (40 steps). New head, read from the mean of all tokens, in every method. Rates are the study's \
          (prompts 1e-2, the others 5e-3; full tuning 1e-3); probe and BitFit take the better of two \
          on 120 clips. Measured on 400; five seeds.",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 5;
const PASSES: usize = 20;
const CLEAN: usize = 804;
const TRAIN: usize = 480;
const VALIDATION: usize = 120;
const TEST: usize = 400;

const PARALLEL: &str = "parallel adapter";

const ARMS: [Arm; 9] = [
    Arm {
        name: "linear probe",
        method: "full",
        options: "targets = ['head']",
        rates: &[5e-3, 2e-2],
    },
    Arm { name: "BitFit", method: "bitfit", options: "", rates: &[5e-3, 2e-2] },
    Arm {
        name: "deep prompts",
        method: "autopeft",
        options: "parallel = { size = 0 }\nprompt = { tokens = 32 }",
        rates: &[1e-2],
    },
    Arm {
        name: "LoRA",
        method: "lora",
        options: "rank = 8\nalpha = 8\ntargets = ['q_proj', 'v_proj']",
        rates: &[5e-3],
    },
    Arm {
        name: PARALLEL,
        method: "autopeft",
        options: "parallel = { size = 16, activation = 'gelu' }",
        rates: &[5e-3],
    },
    Arm {
        name: "parallel adapter with residual",
        method: "autopeft",
        options: "parallel = { size = 16, activation = 'gelu', residual = 'on' }",
        rates: &[5e-3],
    },
    Arm {
        name: "sequential adapter",
        method: "autopeft",
        options: "parallel = { size = 0 }\nserial = { size = 16, activation = 'gelu' }",
        rates: &[5e-3],
    },
    Arm {
        name: "sequential adapter without residual",
        method: "autopeft",
        options: "parallel = { size = 0 }\nserial = { size = 16, activation = 'gelu', residual = 'off', \
                  start = 'bert' }",
        rates: &[5e-3],
    },
    Arm { name: "full", method: "full", options: "", rates: &[1e-3] },
];

/// Clips of each class to tune on, where they are few.
const SHOTS: [usize; 2] = [16, 4];

fn prove(_clock: Clock) -> Result<Proof> {
    let found = side_by_side(NUM_SEEDS, |number| one_seed(Seed(1200 + number)))?;
    let mut proof = Proof::default();
    let of = |place: usize| {
        let by_seed = found.iter().map(|found| found[place].clone()).collect();
        Results::new(&ARMS, by_seed)
    };
    let _ = writeln!(proof.figures, "All {TRAIN} clips:\n\n{}", of(0).table());
    for (place, count) in SHOTS.iter().enumerate() {
        let table = of(place + 1).table();
        let _ = writeln!(proof.figures, "{count} clips of each class:\n\n{table}");
    }
    let all = of(0);
    let mean = |name: &str| all.mean(name);
    for (name, least) in [("deep prompts", 0.01), ("BitFit", 0.05), ("linear probe", 0.05)] {
        let gain = mean(PARALLEL) - mean(name);
        proof.assert(
            format!("the parallel adapter is above {name} by at least {least}, on the mean"),
            format!("{gain:+.3}"),
            gain >= least,
        );
    }
    for (rule, against) in [
        (PARALLEL, "parallel adapter with residual"),
        ("sequential adapter", "sequential adapter without residual"),
    ] {
        let gain = mean(rule) - mean(against);
        proof.assert(
            format!("the {rule} is above the {against}, on the mean"),
            format!("{gain:+.3}"),
            gain > 0.0,
        );
    }
    let gained = mean("full") - mean("linear probe");
    if gained < 0.05 {
        proof.notes.push(format!(
            "Full tuning itself is only {gained:+.3} above the linear probe: what is asked is hardly \
             learned beyond the kind of sound, which alone gives 0.667, so that this says little about \
             adapters."
        ));
    }
    proof.notes.push(format!(
        "The parallel adapter differs from LoRA by {:+.3}, with 16 clips of each class by {:+.3}, with \
         4 by {:+.3}; this is reported, not asserted.",
        mean(PARALLEL) - mean("LoRA"),
        of(1).mean(PARALLEL) - of(1).mean("LoRA"),
        of(2).mean(PARALLEL) - of(2).mean("LoRA"),
    ));
    Ok(proof)
}

/// Returns what each arm reached, for each number of shots.
fn one_seed(seed: Seed) -> Result<Vec<Vec<Reached>>> {
    let clips = Clips::make(CLEAN + TRAIN + VALIDATION + TEST, seed);
    let lab = |labels: &[u32], classes: usize| {
        let inputs = Inputs::new(clips.frames.clone().into(), MELS);
        let model = Encoder::of_rows(inputs, FRAMES, Sizes::of(64, 4).with_biases(), classes);
        let document = |(row, label): (usize, &u32)| Document {
            tokens: (0..FRAMES).map(|frame| (row * FRAMES + frame) as u32).collect(),
            learn: vec![false; FRAMES],
            class: Some(*label),
            row,
            ..Document::default()
        };
        Lab::new(model, labels.iter().enumerate().map(document).collect(), seed)
    };
    let mut upstream = lab(&clips.kinds, KINDS);
    let clean: Vec<usize> = (0..CLEAN).collect();
    upstream.pretrain(&clean, Pace::passes(12, CLEAN, 16, 2e-3), seed)?;
    let mut lab = lab(&clips.motions, MOTIONS);
    let body = upstream.values().iter().filter(|(name, _)| !name.starts_with("head."));
    lab.set(body.map(|(name, values)| (name.clone(), values.clone())).collect());
    let part = |from: usize, count: usize| (from..from + count).collect::<Vec<usize>>();
    let rows = Rows {
        train: part(CLEAN, TRAIN),
        validation: part(CLEAN + TRAIN, VALIDATION),
        test: part(CLEAN + TRAIN + VALIDATION, TEST),
    };
    let pace = Pace::passes(PASSES, TRAIN, 16, 0.0).cosine();
    let reach = |arm: &Arm| arm.reach(&lab, &rows, pace, seed);
    let all = ARMS.iter().map(reach).collect::<Result<Vec<Reached>>>()?;
    let mut found = vec![all.clone()];
    for count in SHOTS {
        let few = Rows { train: first_of_each(&rows.train, &clips, count), ..rows.clone() };
        let again = |(arm, reached): (&Arm, &Reached)| {
            let pace = Pace::steps(40, 16, reached.rate).cosine();
            Ok(arm.reach_at(&lab, &few, pace, seed)?.1)
        };
        found.push(ARMS.iter().zip(&all).map(again).collect::<Result<Vec<Reached>>>()?);
    }
    Ok(found)
}

/// Takes the first `count` rows of each direction or rate.
fn first_of_each(rows: &[usize], clips: &Clips, count: usize) -> Vec<usize> {
    let mut taken = [0; MOTIONS];
    let wanted = |row: &usize| {
        let taken = &mut taken[clips.motions[*row] as usize];
        *taken += 1;
        *taken <= count
    };
    rows.iter().copied().filter(wanted).collect()
}
