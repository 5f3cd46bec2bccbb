//! Progress on the terminal: a bar with loss, tokens per second and time left.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use retune_core::event::{Event, Observer};
use retune_hub::{HubEvent, HubObserver};

use crate::environment::clock;
use crate::table::grouped;

/// Shows a run on the terminal; on a pipe, a line now and then.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
    terminal: bool,
    started: f64,
    tokens: u64,
    smoothed: Option<f64>,
    shown: f64,
}

impl Progress {
    /// Makes the display; `quiet` shows nothing.
    pub(crate) fn new(quiet: bool) -> Self {
        Self {
            bar: None,
            quiet,
            terminal: std::io::stderr().is_terminal(),
            started: clock(),
            tokens: 0,
            smoothed: None,
            shown: 0.0,
        }
    }

    fn line(&self, text: &str) {
        if self.quiet {
            return;
        }
        match &self.bar {
            Some(bar) if self.terminal => bar.println(text),
            _ => eprintln!("{text}"),
        }
    }
}

impl Observer for Progress {
    fn on_event(&mut self, event: &Event) {
        if self.quiet {
            return;
        }
        match event {
            Event::Started { step, num_steps, num_trainable, num_parameters } => {
                let share = 100.0 * *num_trainable as f64 / (*num_parameters).max(1) as f64;
                self.line(&format!(
                    "training {} of {} values ({share:.2} %), {num_steps} steps",
                    grouped(*num_trainable as u64),
                    grouped(*num_parameters as u64),
                ));
                self.started = clock();
                self.tokens = 0;
                if self.terminal {
                    let bar = ProgressBar::new(*num_steps);
                    let style = "{bar:30} {pos}/{len} {msg} · {eta} left";
                    if let Ok(style) = ProgressStyle::with_template(style) {
                        bar.set_style(style);
                    }
                    bar.set_position(*step);
                    bar.reset_eta();
                    self.bar = Some(bar);
                }
            }
            Event::StepDone { step, loss, num_tokens, .. } => {
                self.tokens += num_tokens;
                let smoothed = self.smoothed.map_or(*loss, |old| 0.9 * old + 0.1 * loss);
                self.smoothed = Some(smoothed);
                let now = clock();
                let speed = self.tokens as f64 / (now - self.started).max(1e-6);
                let message = format!("loss {smoothed:.4} · {speed:.0} tokens/s");
                match &self.bar {
                    Some(bar) => {
                        bar.set_position(*step);
                        bar.set_message(message);
                    }
                    None if now - self.shown > 10.0 => {
                        self.shown = now;
                        self.line(&format!("step {step}: {message}"));
                    }
                    None => {}
                }
            }
            Event::Evaluated { step, metrics, .. } => {
                let values: Vec<String> =
                    metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
                self.line(&format!("step {step}: validation {}", values.join(", ")));
            }
            Event::Warned { message } => self.line(&format!("warning: {message}")),
            Event::Progress { stage, .. } => self.line(&format!("{stage} …")),
            Event::Finished { .. } => {
                if let Some(bar) = self.bar.take() {
                    bar.finish();
                }
            }
            _ => {}
        }
    }
}

/// Shows downloads on the terminal.
#[derive(Debug)]
pub(crate) struct Downloads {
    bar: Option<ProgressBar>,
    quiet: bool,
}

impl Downloads {
    /// Makes the display; `quiet` shows nothing.
    pub(crate) fn new(quiet: bool) -> Self {
        Self { bar: None, quiet }
    }
}

impl HubObserver for Downloads {
    fn event(&mut self, event: &HubEvent<'_>) {
        if self.quiet {
            return;
        }
        match event {
            HubEvent::Asking { place } => eprintln!("looking for the model: {place}"),
            HubEvent::Waiting { what } => eprintln!("waiting for another process: {what}"),
            HubEvent::Downloading { what, bytes, total_bytes } => {
                let bar = self.bar.get_or_insert_with(|| {
                    let bar = ProgressBar::new(total_bytes.unwrap_or(0));
                    let style = "{msg} {bar:30} {bytes}/{total_bytes} · {eta} left";
                    if let Ok(style) = ProgressStyle::with_template(style) {
                        bar.set_style(style);
                    }
                    bar.set_message((*what).to_owned());
                    bar
                });
                bar.set_position(*bytes);
            }
            HubEvent::Checking { what } => eprintln!("checking {what}"),
            HubEvent::Unpacking { what } => {
                if let Some(bar) = self.bar.take() {
                    bar.finish_and_clear();
                }
                eprintln!("unpacking {what}");
            }
            _ => {}
        }
    }
}
