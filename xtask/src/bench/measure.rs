//! Starts a program and notes from outside when it reports steps and how much memory it took.

#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// What one run of a program took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Measured {
    /// Over all steps but the first.
    pub(crate) tokens_per_second: f64,
    /// Most resident memory until the last step.
    pub(crate) peak_bytes: f64,
    /// From starting the program to the end of its first step.
    pub(crate) first_step_s: f64,
    /// What the program expected to take; NaN where it does not say.
    pub(crate) forecast_bytes: f64,
    /// Operations of a step by the program's own count; NaN where it does not say.
    pub(crate) flops_per_step: f64,
}

/// A step's end, in seconds since the program was started, and the tokens read in it.
#[derive(Debug, Clone, Copy)]
struct StepEnd {
    at: f64,
    tokens: f64,
}

/// How often a file is looked at: often against a step, seldom against a core.
const PAUSE: Duration = Duration::from_millis(2);

/// Runs a program that appends events to `runs/*/events.jsonl`.
pub(crate) fn by_events(
    command: &mut Command,
    runs: &Path,
    steps: usize,
) -> Result<Measured, String> {
    let started = Instant::now();
    let mut child = start(command, Stdio::null())?;
    let mut ends = Vec::new();
    let mut log: Option<(PathBuf, usize)> = None;
    let mut peak = 0.0_f64;
    while ends.len() < steps {
        let over = child.try_wait().map_err(|error| error.to_string())?.is_some();
        if log.is_none() {
            log = only_folder(runs).map(|folder| (folder.join("events.jsonl"), 0));
        }
        if let Some((path, read)) = &mut log {
            let text = fs::read_to_string(&*path).unwrap_or_default();
            while let Some(length) = text[*read..].find('\n') {
                let event: Value =
                    serde_json::from_str(&text[*read..*read + length]).unwrap_or_default();
                *read += length + 1;
                if event["event"] == "step_done" {
                    let at = started.elapsed().as_secs_f64();
                    ends.push(StepEnd { at, tokens: event["num_tokens"].as_f64().unwrap_or(0.0) });
                }
            }
        }
        peak = peak.max(peak_bytes(&child));
        if over && ends.len() < steps {
            return Err(failed(command, child));
        }
        thread::sleep(PAUSE);
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    if !status.success() {
        return Err(failed(command, child));
    }
    let plan = log.and_then(|(path, _)| fs::read(path.with_file_name("plan.json")).ok());
    let plan: Value = plan.and_then(|plan| serde_json::from_slice(&plan).ok()).unwrap_or_default();
    let forecast = |name: &str| plan["forecast"][name].as_f64().unwrap_or(f64::NAN);
    let (forecast_bytes, flops_per_step) = (forecast("total_bytes"), forecast("flops_per_step"));
    Ok(Measured { forecast_bytes, flops_per_step, ..measured(&ends, peak)? })
}

/// Runs a program that prints `step N tokens M`.
pub(crate) fn by_lines(command: &mut Command) -> Result<Measured, String> {
    let started = Instant::now();
    let mut child = start(command, Stdio::piped())?;
    let stdout = child.stdout.take().ok_or("no output to read")?;
    let (sender, lines) = mpsc::channel();
    let reader = thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let at = started.elapsed().as_secs_f64();
            if let ["step", _, "tokens", tokens] = line.split(' ').collect::<Vec<_>>()[..]
                && let Ok(tokens) = tokens.parse()
            {
                let _ = sender.send(StepEnd { at, tokens });
            }
        }
    });
    let mut ends = Vec::new();
    let mut peak = 0.0_f64;
    loop {
        ends.extend(lines.try_iter());
        peak = peak.max(peak_bytes(&child));
        if child.try_wait().map_err(|error| error.to_string())?.is_some() {
            break;
        }
        thread::sleep(10 * PAUSE);
    }
    let _ = reader.join();
    ends.extend(lines.try_iter());
    let status = child.wait().map_err(|error| error.to_string())?;
    if !status.success() {
        return Err(failed(command, child));
    }
    measured(&ends, peak)
}

fn start(command: &mut Command, stdout: Stdio) -> Result<Child, String> {
    command
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{command:?}: {error}"))
}

fn failed(command: &Command, mut child: Child) -> String {
    let mut text = String::new();
    if let Some(stderr) = &mut child.stderr {
        let _ = stderr.read_to_string(&mut text);
    }
    format!("{command:?} ended before its last step:\n{text}")
}

fn measured(ends: &[StepEnd], peak_bytes: f64) -> Result<Measured, String> {
    let [first, rest @ ..] = ends else { return Err("the program reported no step".to_owned()) };
    let Some(last) = rest.last() else { return Err("one step gives no speed".to_owned()) };
    let tokens: f64 = rest.iter().map(|end| end.tokens).sum();
    Ok(Measured {
        tokens_per_second: tokens / (last.at - first.at),
        peak_bytes,
        first_step_s: first.at,
        forecast_bytes: f64::NAN,
        flops_per_step: f64::NAN,
    })
}

/// Reads the most memory a running program had so far, where Linux tells; else 0.
fn peak_bytes(child: &Child) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    kibibytes.map_or(0.0, |kibibytes| kibibytes * 1024.0)
}

fn only_folder(runs: &Path) -> Option<PathBuf> {
    fs::read_dir(runs).ok()?.flatten().map(|entry| entry.path()).find(|path| path.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_counts_for_the_start_only() {
        let end = |at, tokens| StepEnd { at, tokens };
        let found = measured(&[end(3.0, 100.0), end(4.0, 100.0), end(7.0, 500.0)], 5.0).unwrap();
        assert_eq!((found.first_step_s, found.tokens_per_second), (3.0, 150.0));
        assert_eq!(found.peak_bytes, 5.0);
        assert!(measured(&[end(1.0, 1.0)], 0.0).is_err());
    }

    #[test]
    fn printed_steps_are_read() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo step 1 tokens 8; sleep 0.1; echo noise; echo step 2 tokens 8"]);
        let found = by_lines(&mut command).unwrap();
        assert!((20.0..90.0).contains(&found.tokens_per_second), "{found:?}");
        let problem = by_lines(Command::new("sh").args(["-c", "echo why >&2; exit 3"]));
        assert!(problem.unwrap_err().contains("why"));
    }
}
