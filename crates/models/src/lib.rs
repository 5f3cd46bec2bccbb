//! Architectures written once against the forward pass, and the readers of their checkpoints.
