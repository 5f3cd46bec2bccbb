//! The next step's batches, made while this step computes.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use retune_core::batch::Batch;
use retune_train::training::BatchSource;
use retune_train::{Error, Result};

/// Makes one step's batches ahead, on a thread of its own.
///
/// Rows of a file too large for memory are read and tokenised when they are needed; with this no
/// step waits for them. Batches depend on the step's number alone, so they are the same either way.
#[derive(Debug)]
pub struct Prefetched<S> {
    source: Arc<Mutex<S>>,
    num_steps: u64,
    ahead: Option<(u64, JoinHandle<Result<Vec<Batch>>>)>,
}

impl<S: BatchSource + Send + 'static> Prefetched<S> {
    /// Wraps a source; steps from `num_steps` on are never made ahead.
    pub fn new(source: S, num_steps: u64) -> Self {
        Self { source: Arc::new(Mutex::new(source)), num_steps, ahead: None }
    }

    fn make(source: &Mutex<S>, step: u64) -> Result<Vec<Batch>> {
        // A source that panicked has no state that another step could trip over.
        source.lock().unwrap_or_else(PoisonError::into_inner).micro_batches(step)
    }
}

impl<S: BatchSource + Send + 'static> BatchSource for Prefetched<S> {
    fn micro_batches(&mut self, step: u64) -> Result<Vec<Batch>> {
        let batches = match self.ahead.take() {
            Some((made, thread)) if made == step => thread.join().unwrap_or_else(|_| {
                Err(Error::Data("the thread that prepares batches panicked".into()))
            }),
            _ => Self::make(&self.source, step),
        }?;
        let next = step + 1;
        if next < self.num_steps {
            let source = Arc::clone(&self.source);
            let name = "batches".to_owned();
            // Without a thread the batches are made when they are asked for.
            let thread =
                std::thread::Builder::new().name(name).spawn(move || Self::make(&source, next));
            self.ahead = thread.ok().map(|thread| (next, thread));
        }
        Ok(batches)
    }

    fn epoch(&self, steps: u64) -> f64 {
        self.source.lock().unwrap_or_else(PoisonError::into_inner).epoch(steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::batch::Document;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Tells which steps it was asked for, and fails at step 3.
    struct Told(Sender<u64>);

    impl BatchSource for Told {
        fn micro_batches(&mut self, step: u64) -> Result<Vec<Batch>> {
            self.0.send(step).unwrap();
            if step == 3 {
                return Err(Error::Data("line 9 is broken".into()));
            }
            let tokens = vec![step as u32; 2];
            let document = Document { tokens, learn: vec![false, true], ..Document::default() };
            Ok(vec![Batch::new(&[document])?])
        }

        fn epoch(&self, steps: u64) -> f64 {
            steps as f64
        }
    }

    fn prefetched(num_steps: u64) -> (Prefetched<Told>, Receiver<u64>) {
        let (told, asked) = channel();
        (Prefetched::new(Told(told), num_steps), asked)
    }

    #[test]
    fn the_next_step_is_made_before_it_is_asked_for() {
        let (mut source, asked) = prefetched(10);
        source.micro_batches(0).unwrap();
        assert_eq!((asked.recv().unwrap(), asked.recv().unwrap()), (0, 1));
        assert_eq!(source.micro_batches(1).unwrap()[0].tokens, [1, 1]);
        assert_eq!(asked.recv().unwrap(), 2);
    }

    #[test]
    fn another_step_than_the_next_is_right_too() {
        let (mut source, _asked) = prefetched(10);
        source.micro_batches(0).unwrap();
        assert_eq!(source.micro_batches(7).unwrap()[0].tokens, [7, 7]);
        assert_eq!(source.micro_batches(8).unwrap()[0].tokens, [8, 8]);
    }

    #[test]
    fn nothing_is_made_behind_the_last_step() {
        let (mut source, asked) = prefetched(1);
        source.micro_batches(0).unwrap();
        drop(source);
        assert_eq!(asked.iter().collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn an_error_comes_with_its_own_step() {
        let (mut source, _asked) = prefetched(10);
        source.micro_batches(2).unwrap();
        assert!(source.micro_batches(3).unwrap_err().to_string().contains("line 9"));
    }
}
