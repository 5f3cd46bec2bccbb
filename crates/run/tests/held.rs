//! What is held at once while sparse methods look for entries: counted by the allocator.
//!
//! One test only: the count is the whole program's.

#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use retune_core::batch::{Batch, Document};
use retune_core::event::{Event, Observer};
use retune_core::method::ParameterState;
use retune_core::random::Seed;
use retune_core::spec::WeightSpec;
use retune_methods::registry;
use retune_models::config::Config;
use retune_options::Document as Toml;
use retune_testkit::open::weights;
use retune_testkit::tiny::{MemorySource, configs};
use retune_train::optimizer::AdamW;
use retune_train::schedule::{Schedule, Shape};
use retune_train::training::{BatchSource, Training, Walk};
use serde_json::json;

/// Bytes in use, and the most since [`Held::on_event`] looked last.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is handed to the system's allocator; only sizes are noted beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer came from `alloc` above, and so from the system, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes a step took on top of what was in use before it.
#[derive(Debug, Default)]
struct Held {
    before: usize,
    most: usize,
}

impl Observer for Held {
    fn on_event(&mut self, event: &Event) {
        if let Event::StepDone { step, .. } = event {
            // The first step makes what stays: packed weights, the optimiser's state.
            if *step > 1 {
                self.most = self.most.max(PEAK.load(Ordering::Relaxed) - self.before);
            }
            self.before = LIVE.load(Ordering::Relaxed);
            PEAK.store(self.before, Ordering::Relaxed);
        }
    }
}

struct Few;

impl BatchSource for Few {
    fn micro_batches(&mut self, step: u64) -> retune_train::Result<Vec<Batch>> {
        let tokens = (0..5).map(|place| ((step + place) % 32) as u32).collect();
        let learn = vec![false, true, true, true, true];
        Ok(vec![Batch::new(&[Document { tokens, learn, ..Document::default() }])?])
    }

    fn epoch(&self, steps: u64) -> f64 {
        steps as f64
    }
}

const NUM_STEPS: u64 = 6;

#[test]
fn sparse_methods_never_hold_the_gradient_of_the_whole_model() {
    let mut config = configs().into_iter().find(|(name, _)| *name == "llama").unwrap().1;
    for (key, value) in [("hidden_size", 256), ("intermediate_size", 512), ("head_dim", 64)] {
        config[key] = json!(value);
    }
    config["num_hidden_layers"] = json!(4);
    let model = retune_models::build(&Config::new(Path::new("config.json"), config)).unwrap();
    let source = Arc::new(MemorySource::random(model.spec(), Seed(1)));
    let spec = Arc::clone(model.spec());
    let weights = weights(source, &spec);
    let targeted: Vec<&WeightSpec> = spec.linears().filter(|w| w.layer.is_some()).collect();
    let dense: usize = targeted.iter().map(|weight| 4 * weight.count()).sum();
    let largest = targeted.iter().map(|weight| 4 * weight.count()).max().unwrap();
    assert!(dense > 15 * largest, "one weight must be little of all: {largest} of {dense}");

    let run = |name: &str, options: &str| {
        let plugin = registry::find(name).unwrap();
        let method = Toml::parse("test.toml", options).unwrap().read(plugin.read).unwrap().0;
        let folder = tempfile::tempdir().unwrap();
        let walk = Walk {
            num_steps: NUM_STEPS,
            schedule: Schedule {
                shape: Shape::Constant,
                peak: 1e-3,
                floor_frac: 0.0,
                warmup_steps: 0,
                decay_frac: 0.0,
                num_steps: NUM_STEPS,
            },
            clip: 1.0,
            evaluate_every: 0,
            save_every: 0,
            keep_last: 1,
            patience: 0,
            seed: Seed(7),
            recompute: false,
            plan: "plan".to_owned(),
            checkpoints: folder.path().to_path_buf(),
        };
        let adamw = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
        let mut training = Training::new(&*model, &weights, method, Box::new(adamw), walk).unwrap();
        let mut held = Held::default();
        training.walk(&mut Few, None, &mut held).unwrap();
        let state: usize = training.optimizer_state().iter().map(ParameterState::bytes).sum();
        (held.most, state, training.parameters.num_trainable())
    };

    // The measure sees a dense gradient where there is one.
    let (full, state, trained) = run("full", "");
    assert!(full >= dense, "full tuning held {full} bytes, its gradient alone is {dense}");
    assert_eq!(state, 8 * trained);
    for (name, options, most, state_bytes) in [
        // Entries are looked for in steps 1 to 3, 5 to 7, …: two moments and an age of each.
        ("spiel", "num_tunable = 1600\nreselect_every = 4\naccumulate = 3", 1600, 12),
        // Moved by the method itself.
        (
            "spiel",
            "num_tunable = 1600\nreselect_every = 4\naccumulate = 3\nvariant = \"sm3\"",
            1600,
            0,
        ),
        // Entries come in at every step.
        ("id3", "budget = 160", 160, 12),
    ] {
        let (held, state, trained) = run(name, options);
        assert!(trained <= most && 10 * trained >= 9 * most, "{name}: {trained} values train");
        assert_eq!(state, state_bytes * trained, "{name}: bytes of the optimiser's state");
        assert!(
            held < dense / 3,
            "{name} held {held} bytes in a step, {dense} would be the whole gradient"
        );
    }
}
