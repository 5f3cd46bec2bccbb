//! The training loop: objectives, optimisers, schedules, checkpoints.
