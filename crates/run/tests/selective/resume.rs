//! A killed run ends with the bits of an uninterrupted one, wherever the method was.

use crate::common::{Source, adamw, bits, entries, folder, method, open, trained, walk};
use retune_core::event::Event;
use retune_train::checkpoint;
use retune_train::training::Training;

/// Method, options, steps of the run.
const RUNS: &[(&str, &str, u64)] = &[
    ("hft", "redraw_every = 3", 8),
    // Windows are steps 1 to 2, 4 to 6, 8 to 10: step 4 and 8 are saved in the middle of one.
    ("spiel", "density = 0.05\nreselect_every = 4\naccumulate = 2", 10),
    ("spiel", "density = 0.05\nreselect_every = 4\naccumulate = 2\nvariant = \"sm3\"", 10),
    // Half-way is after step 3, between two checkpoints, and after step 4, at one.
    ("sara", "fraction = 0.1\nlow_rank_min_dim = 4", 6),
    ("sara", "fraction = 0.1\nlow_rank_min_dim = 4", 8),
    ("lt-sft", "density = 0.05\nfull_l1 = 0.1", 6),
    ("lt-sft", "density = 0.05\nselection = \"random\"", 6),
    ("id3", "budget = 50\nexponent = 1.0", 7),
    ("child-tuning", "fisher_steps = 3\nshare = 0.2", 6),
    ("child-tuning", "mode = \"free\"", 4),
    ("diff-pruning", "density = 0.05\ngate_start = 0.0", 6),
    ("r-amt", "drop = 1.0", 5),
    ("id3", "budget = 50\nover = \"lora\"\nrank = 2", 7),
];

#[test]
fn a_killed_run_ends_with_the_bits_of_an_uninterrupted_one() {
    let (model, weights) = open();
    for (name, options, steps) in RUNS {
        let (_first, whole) = folder();
        let straight = trained(
            (&*model, &weights),
            method(name, options),
            adamw(),
            walk(&whole, *steps, 1e-2),
        );
        for killed in 1..*steps {
            let what = format!("{name} {options:?} killed at {killed}");
            let (_second, cut) = folder();
            let new = || {
                let walk = walk(&cut, *steps, 1e-2);
                Training::new(&*model, &weights, method(name, options), adamw(), walk).unwrap()
            };
            let mut source = Source { fails_at: Some(killed), split: false };
            new().walk(&mut source, None, &mut Vec::<Event>::new()).unwrap_err();
            let mut second = new();
            if killed >= 2 {
                assert_eq!(second.resume().unwrap().0, killed / 2 * 2, "{what}");
            }
            second.walk(&mut Source::default(), None, &mut Vec::<Event>::new()).unwrap();
            assert_eq!(entries(&straight.parameters), entries(&second.parameters), "{what}");
            assert!(bits(&straight.parameters) == bits(&second.parameters), "{what}");
            let file = |root: &std::path::Path, name: &str| {
                std::fs::read(checkpoint::folder(root, *steps).join(name)).ok()
            };
            for part in ["optimizer.safetensors", "entries.safetensors", "state.json"] {
                assert!(file(&whole, part) == file(&cut, part), "{what}: {part}");
            }
        }
    }
}
