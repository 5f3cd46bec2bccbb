//! What is trained, here and there.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::measure::{Measured, by_events, by_lines};
use crate::output;

/// Which program trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Retune,
    Peer,
}

/// The base of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Model {
    /// A language model as a folder of 32-bit floats.
    Folder,
    /// The same as a file of 4-bit blocks.
    Blocks,
    /// A text encoder as a folder.
    Encoder,
}

/// Where rows come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rows {
    /// Texts cut to the same length.
    Even,
    /// Texts with a label.
    Labelled,
    /// Conversations of mixed length: packed here, padded there.
    Chats,
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Case<'a> {
    pub(crate) name: &'static str,
    method: &'a str,
    arithmetic: &'static str,
    weights: &'static str,
    model: Model,
    rows: Rows,
    batch: usize,
    tokens: usize,
    /// Number type of the peer's weights and arithmetic.
    peer_dtype: &'static str,
    /// Times the peer's tokens a second.
    pub(crate) speed_goal: Option<f64>,
    /// Of the peer's peak memory.
    pub(crate) memory_goal: Option<f64>,
}

/// What most cases share.
const LORA: Case<'static> = Case {
    name: "lora-f32",
    method: "lora",
    arithmetic: "f32",
    weights: "f32",
    model: Model::Folder,
    rows: Rows::Even,
    batch: 4,
    tokens: 256,
    peer_dtype: "f32",
    speed_goal: Some(1.5),
    memory_goal: Some(0.45),
};

/// Returns every case.
pub(crate) fn all() -> &'static [Case<'static>] {
    const {
        &[
            LORA,
            Case {
                name: "lora-bf16",
                arithmetic: "bf16",
                weights: "bf16",
                peer_dtype: "bf16",
                speed_goal: Some(1.7),
                memory_goal: None,
                ..LORA
            },
            Case {
                name: "lora-bf16-f32",
                arithmetic: "bf16",
                weights: "bf16",
                speed_goal: Some(2.5),
                memory_goal: None,
                ..LORA
            },
            Case {
                name: "lora-4bit",
                arithmetic: "bf16",
                weights: "stored",
                model: Model::Blocks,
                speed_goal: Some(2.2),
                memory_goal: None,
                ..LORA
            },
            Case {
                name: "full-f32",
                method: "full",
                speed_goal: Some(1.4),
                memory_goal: None,
                ..LORA
            },
            Case {
                name: "full-bf16",
                method: "full",
                arithmetic: "bf16",
                peer_dtype: "bf16",
                speed_goal: None,
                memory_goal: None,
                ..LORA
            },
            Case {
                name: "classifier",
                method: "full",
                model: Model::Encoder,
                rows: Rows::Labelled,
                batch: 32,
                tokens: 64,
                speed_goal: Some(1.5),
                memory_goal: None,
                ..LORA
            },
            Case {
                name: "chats",
                rows: Rows::Chats,
                batch: 8,
                tokens: 1024,
                speed_goal: Some(4.0),
                memory_goal: None,
                ..LORA
            },
        ]
    }
}

/// Models and rows, made once.
#[derive(Debug)]
pub(crate) struct Inputs {
    folder: PathBuf,
    chats: Option<PathBuf>,
}

impl Inputs {
    /// Writes the models as folders both sides read, and rows, into `folder`.
    pub(crate) fn make(
        program: &Path,
        folder: &Path,
        chats: Option<&Path>,
        cases: &[&Case<'_>],
    ) -> Result<Self, String> {
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let encoder = |case: &&Case<'_>| case.model == Model::Encoder;
        for (name, model, needed) in [
            ("language", LANGUAGE, !cases.iter().all(encoder)),
            ("encoder", ENCODER, cases.iter().any(encoder)),
        ] {
            let path = folder.join(name);
            if !needed || path.join("config.json").exists() {
                continue;
            }
            let mut export = Command::new(program);
            export.args(["export", "--format", "hf", "--force", "--model", model, "--output"]);
            output(export.arg(&path))?;
        }
        for (name, labelled) in [("even.jsonl", false), ("labelled.jsonl", true)] {
            let path = folder.join(name);
            fs::write(&path, texts(labelled)).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        let chats = chats.map(std::path::absolute).transpose();
        let chats = chats.map_err(|error| error.to_string())?;
        Ok(Self { folder: folder.to_owned(), chats })
    }
}

const LANGUAGE: &str = "smollm2-135m-instruct";
const ENCODER: &str = "all-minilm-l6-v2";

/// Makes rows of some three hundred everyday words each, as JSON lines.
fn texts(labelled: bool) -> String {
    const WORDS: [&str; 16] = [
        "water", "house", "under", "the", "green", "river", "and", "people", "walked", "slowly",
        "because", "winter", "was", "near", "a", "mountain",
    ];
    let mut state = 1_u64;
    let mut text = String::new();
    for row in 0..256 {
        let words: Vec<&str> = (0..300)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                WORDS[(state >> 60) as usize]
            })
            .collect();
        let label = if labelled { format!(", \"label\": \"{}\"", row % 2) } else { String::new() };
        let _ = writeln!(text, "{{\"text\": \"{}\"{label}}}", words.join(" "));
    }
    text
}

impl<'a> Case<'a> {
    /// Makes the case of any method with its defaults.
    pub(crate) fn of_method(method: &'a str) -> Self {
        Case { method, ..LORA }
    }

    /// Names what runs: cases with the same subject share a measurement.
    pub(crate) fn subject(&self, side: Side) -> String {
        match side {
            Side::Retune => format!(
                "retune {} {} {} {:?} {:?}",
                self.method, self.arithmetic, self.weights, self.model, self.rows
            ),
            Side::Peer => {
                let model = if self.model == Model::Encoder { "Encoder" } else { "Folder" };
                format!("PyTorch {} {} {model} {:?}", self.method, self.peer_dtype, self.rows)
            }
        }
    }

    /// Tells whether its inputs are there.
    pub(crate) fn is_possible(&self, inputs: &Inputs) -> bool {
        self.rows != Rows::Chats || inputs.chats.is_some()
    }

    /// Runs the case here.
    pub(crate) fn run(
        &self,
        program: &Path,
        inputs: &Inputs,
        steps: usize,
    ) -> Result<Measured, String> {
        let work = inputs.folder.join("work");
        let _ = fs::remove_dir_all(&work);
        let path = work.join("bench.toml");
        fs::create_dir_all(&work)
            .and_then(|()| fs::write(&path, self.recipe(inputs, &work, steps)))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let mut command = Command::new(program);
        let measured = by_events(command.arg("run").arg(&path), &work.join("runs"), steps);
        let _ = fs::remove_dir_all(&work);
        measured
    }

    fn recipe(&self, inputs: &Inputs, work: &Path, steps: usize) -> String {
        let language = inputs.folder.join("language").display().to_string();
        let model = match self.model {
            Model::Folder => language,
            Model::Blocks => LANGUAGE.to_owned(),
            Model::Encoder => inputs.folder.join("encoder").display().to_string(),
        };
        let rows = match self.rows {
            Rows::Even => inputs.folder.join("even.jsonl"),
            Rows::Labelled => inputs.folder.join("labelled.jsonl"),
            Rows::Chats => inputs.chats.clone().unwrap_or_default(),
        };
        let data = match self.rows {
            Rows::Even => "loss_on = \"all\"",
            Rows::Labelled => "",
            Rows::Chats => "loss_on = \"assistant\"\npacking = true",
        };
        // Packed rows are full, so fewer of them hold as many conversations as a padded batch.
        let batch = if self.rows == Rows::Chats { self.batch.div_ceil(4) } else { self.batch };
        let method = if self.method == "lora" { "rank = 8\nalpha = 16" } else { "" };
        let (rows, runs) = (rows.display().to_string(), work.join("runs").display().to_string());
        format!(
            "model = {model:?}\nname = \"bench\"\nruns = {runs:?}\n\n\
             [data]\ntrain = {rows:?}\nvalidation_fraction = 0.0\nmax_length = {}\n{data}\n\n\
             [method.{}]\n{method}\n\n\
             [train]\nsteps = {steps}\nbatch_size = {batch}\nlearning_rate = 1e-4\nsave_every = 0\n\n\
             [evaluate]\nkind = \"loss\"\nrows = 1\nbefore = false\n\n\
             [compute]\narithmetic = {:?}\nweights = {:?}\n",
            self.tokens, self.method, self.arithmetic, self.weights
        )
    }

    /// Runs the case in PyTorch + PEFT.
    pub(crate) fn run_peer(
        &self,
        python: &Path,
        root: &Path,
        inputs: &Inputs,
        steps: usize,
    ) -> Result<Measured, String> {
        let (model, task) = match self.model {
            Model::Encoder => ("encoder", "classes"),
            Model::Folder | Model::Blocks => ("language", "language"),
        };
        let mut command = Command::new(python);
        command
            .arg(root.join("tests").join("interop").join("bench_step.py"))
            .args(["--method", self.method, "--task", task, "--dtype", self.peer_dtype])
            .args(["--rows", &self.batch.to_string(), "--tokens", &self.tokens.to_string()])
            .args(["--steps", &steps.to_string(), "--model"])
            .arg(inputs.folder.join(model));
        if let (Rows::Chats, Some(chats)) = (self.rows, &inputs.chats) {
            command.arg("--chats").arg(chats);
        }
        by_lines(&mut command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_with_one_peer_share_it() {
        let subjects = |side| -> std::collections::BTreeSet<String> {
            all().iter().map(|case| case.subject(side)).collect()
        };
        // lora-f32, lora-bf16-f32 and lora-4bit are held against the same run there, and the two
        // bf16 cases are one run here.
        assert_eq!(subjects(Side::Retune).len(), all().len() - 1);
        assert_eq!(subjects(Side::Peer).len(), all().len() - 2);
    }

    #[test]
    fn recipes_say_what_the_case_is() {
        let inputs = Inputs { folder: "f".into(), chats: None };
        let case = all().iter().find(|case| case.name == "lora-4bit").unwrap();
        let recipe = case.recipe(&inputs, Path::new("w"), 5);
        for line in ["steps = 5", "[method.lora]", "weights = \"stored\"", "batch_size = 4"] {
            assert!(recipe.contains(line), "{line} in {recipe}");
        }
    }

    #[test]
    fn rows_are_json_lines() {
        for line in texts(true).lines() {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(row["text"].as_str().unwrap().split(' ').count() == 300);
            assert!(row["label"].is_string());
        }
    }
}
