//! The run folder: what it holds and how it is made.
//!
//! | file | what |
//! |---|---|
//! | `recipe.toml` | the recipe as written |
//! | `plan.toml`, `plan.json` | the recipe with every default filled in, and what was decided |
//! | `events.jsonl` | one event a line |
//! | `tensorboard/` | the same curves for TensorBoard |
//! | `checkpoints/step-00000050/` | parameters, optimiser state, place |
//! | `adapter/` or `model/` | the result |
//! | `report.md`, `report.json`, `plots/*.svg` | what was measured |

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use retune_core::event::{Event, Observer};

/// A run's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Makes `runs/name-1`, or with the next number that is free.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn create(runs: &Path, name: &str) -> Result<Self> {
        std::fs::create_dir_all(runs).map_err(|error| Error::io(runs, "create", error))?;
        for number in 1_u32.. {
            let path = runs.join(format!("{name}-{number}"));
            // Making the folder is the lock: of two runs started at once each gets its own.
            match std::fs::create_dir(&path) {
                Ok(()) => {
                    for part in ["checkpoints", "plots", "tensorboard"] {
                        let part = path.join(part);
                        std::fs::create_dir(&part).map_err(|e| Error::io(&part, "create", e))?;
                    }
                    return Ok(Self { path });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io(&path, "create", error)),
            }
        }
        unreachable!("there are more numbers than folders")
    }

    /// Opens the folder of an earlier run.
    ///
    /// # Errors
    /// If it is no run folder.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.join("plan.json").is_file() {
            return Err(Error::Run {
                path: path.to_path_buf(),
                what: "this is no run folder".to_owned(),
                expected: "a folder `retune run` made, with plan.json".to_owned(),
                found: if path.exists() { "another folder" } else { "nothing" }.to_owned(),
                help: "give the path `retune run` printed, such as runs/name-1".to_owned(),
            });
        }
        Ok(Self { path: path.to_path_buf() })
    }

    /// Returns the folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of a file inside.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a file inside, atomically.
    ///
    /// # Errors
    /// If the disk is full or the folder read-only.
    pub fn write(&self, name: &str, content: &str) -> Result<()> {
        Ok(retune_files::atomic::write_file(&self.file(name), content.as_bytes())?)
    }

    /// Reads a file inside.
    ///
    /// # Errors
    /// If it is absent or unreadable.
    pub fn read(&self, name: &str) -> Result<String> {
        let path = self.file(name);
        std::fs::read_to_string(&path).map_err(|error| Error::io(&path, "read", error))
    }
}

/// Appends every event to `events.jsonl`.
#[derive(Debug)]
pub struct EventLog {
    file: File,
    /// The first failure of writing; a full disk must not stop the training.
    pub failed: Option<std::io::Error>,
}

impl EventLog {
    /// Opens the log, keeping the events of the first `steps` steps only.
    ///
    /// After a kill there may be events of steps that were lost with it; the resumed run makes
    /// them again, and the log then reads as if nothing had happened.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(folder: &RunFolder, steps: u64) -> Result<Self> {
        let path = folder.file("events.jsonl");
        let fail = |error| Error::io(&path, "write", error);
        if path.exists() {
            let reader = BufReader::new(File::open(&path).map_err(fail)?);
            let mut kept = String::new();
            for line in reader.lines() {
                let Ok(line) = line else { break };
                // A line cut in half by the kill is not JSON.
                let Ok(value) = serde_json::from_str::<serde_json::Value>(&line) else { break };
                let step = value.get("step").and_then(serde_json::Value::as_u64).unwrap_or(0);
                let finished = value.get("event").is_some_and(|event| event == "finished");
                if step > steps || finished {
                    continue;
                }
                kept.push_str(&line);
                kept.push('\n');
            }
            retune_files::atomic::write_file(&path, kept.as_bytes())?;
        }
        let file = File::options().create(true).append(true).open(&path).map_err(fail)?;
        Ok(Self { file, failed: None })
    }
}

impl Observer for EventLog {
    fn on_event(&mut self, event: &Event) {
        if matches!(event, Event::Progress { .. }) || self.failed.is_some() {
            return;
        }
        let mut line = serde_json::to_string(event)
            .unwrap_or_else(|error| unreachable!("an event is always JSON: {error}"));
        line.push('\n');
        if let Err(error) = self.file.write_all(line.as_bytes()) {
            self.failed = Some(error);
        }
    }
}

/// Reads the events of a run, in order.
///
/// # Errors
/// If the file cannot be read.
pub fn read_events(folder: &RunFolder) -> Result<Vec<serde_json::Value>> {
    let text = folder.read("events.jsonl")?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_numbered_and_never_shared() {
        let runs = tempfile::tempdir().unwrap();
        let first = RunFolder::create(runs.path(), "people").unwrap();
        let second = RunFolder::create(runs.path(), "people").unwrap();
        assert!(first.path().ends_with("people-1") && second.path().ends_with("people-2"));
        assert!(RunFolder::open(first.path()).is_err(), "no plan yet");
        first.write("plan.json", "{}").unwrap();
        assert_eq!(RunFolder::open(first.path()).unwrap(), first);
    }

    #[test]
    fn a_resumed_log_forgets_what_the_kill_lost() {
        let runs = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(runs.path(), "run").unwrap();
        let done = |step| Event::Saved { step, path: PathBuf::from("x") };
        let mut log = EventLog::open(&folder, 0).unwrap();
        for step in 1..=5 {
            log.on_event(&done(step));
        }
        log.file.write_all(b"{\"event\":\"step_do").unwrap();
        drop(log);
        let mut log = EventLog::open(&folder, 3).unwrap();
        log.on_event(&done(4));
        let steps: Vec<u64> = read_events(&folder)
            .unwrap()
            .iter()
            .map(|event| event["step"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, [1, 2, 3, 4]);
    }
}
