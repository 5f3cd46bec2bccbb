//! What is trained, here and there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::measure::{Measured, by_events, by_lines};
use super::rows;
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
    /// One of the cases that differ in the length of their texts alone.
    pub(crate) of_lengths: bool,
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
    of_lengths: false,
};

/// What stands behind the name of a method that is measured over 4-bit blocks.
pub(crate) const ON_BLOCKS: &str = "@4bit";

/// Tokens of a step of the cases that differ in length.
const LENGTHS_TOKENS: usize = 2048;

/// As many tokens as the others of its kind, in texts of `tokens`.
const fn of_length(name: &'static str, tokens: usize) -> Case<'static> {
    let batch = LENGTHS_TOKENS / tokens;
    Case { name, batch, tokens, speed_goal: None, memory_goal: None, of_lengths: true, ..LORA }
}

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
            of_length("tokens-128", 128),
            of_length("tokens-256", 256),
            of_length("tokens-512", 512),
            of_length("tokens-1024", 1024),
            of_length("tokens-2048", 2048),
        ]
    }
}

/// Models and rows, made once.
#[derive(Debug)]
pub(crate) struct Inputs {
    folder: PathBuf,
    chats: PathBuf,
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
        let longest = cases.iter().map(|case| case.tokens).max().unwrap_or(0);
        for (name, text) in [
            // Every word is a token at least.
            ("even.jsonl", rows::texts(longest + 44, false)),
            ("labelled.jsonl", rows::texts(300, true)),
            ("chats.jsonl", rows::chats()),
        ] {
            let path = folder.join(name);
            fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        }
        let chats = match chats {
            Some(path) => std::path::absolute(path).map_err(|error| error.to_string())?,
            None => folder.join("chats.jsonl"),
        };
        Ok(Self { folder: folder.to_owned(), chats })
    }
}

const LANGUAGE: &str = "smollm2-135m-instruct";
const ENCODER: &str = "all-minilm-l6-v2";

impl<'a> Case<'a> {
    /// Makes the case of any method with its defaults; behind `@4bit` over a base that stays in its
    /// 4-bit blocks.
    pub(crate) fn of_method(name: &'a str) -> Self {
        match name.strip_suffix(ON_BLOCKS) {
            Some(method) => Case { method, weights: "stored", model: Model::Blocks, ..LORA },
            None => Case { method: name, ..LORA },
        }
    }

    /// Names what runs: cases with the same subject share a measurement.
    pub(crate) fn subject(&self, side: Side) -> String {
        match side {
            Side::Retune => format!(
                "retune {} {} {} {:?} {:?} {}x{}",
                self.method,
                self.arithmetic,
                self.weights,
                self.model,
                self.rows,
                self.batch,
                self.tokens
            ),
            Side::Peer => {
                let model = if self.model == Model::Encoder { "Encoder" } else { "Folder" };
                format!(
                    "PyTorch {} {} {model} {:?} {}x{}",
                    self.method, self.peer_dtype, self.rows, self.batch, self.tokens
                )
            }
        }
    }

    /// Names the arithmetic, as the kernels' bench names the machine's peak for it.
    pub(crate) fn arithmetic(&self) -> &'static str {
        self.arithmetic
    }

    /// Operations a second of a run, by the plan's count; NaN where steps differ in length.
    pub(crate) fn flops(&self, measured: &Measured) -> f64 {
        if self.rows == Rows::Chats {
            return f64::NAN;
        }
        let steps_per_second = measured.tokens_per_second / (self.batch * self.tokens) as f64;
        measured.flops_per_step * steps_per_second
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
            Rows::Chats => inputs.chats.clone(),
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
        if self.rows == Rows::Chats {
            command.arg("--chats").arg(&inputs.chats);
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
        let lengths = all().iter().filter(|case| case.of_lengths);
        assert!(lengths.clone().all(|case| case.batch * case.tokens == LENGTHS_TOKENS));
        assert_eq!(lengths.count(), 5);
    }

    #[test]
    fn recipes_say_what_the_case_is() {
        let inputs = Inputs { folder: "f".into(), chats: "c".into() };
        let case = all().iter().find(|case| case.name == "lora-4bit").unwrap();
        let recipe = case.recipe(&inputs, Path::new("w"), 5);
        for line in ["steps = 5", "[method.lora]", "weights = \"stored\"", "batch_size = 4"] {
            assert!(recipe.contains(line), "{line} in {recipe}");
        }
    }
}
