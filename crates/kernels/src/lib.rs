//! Fused tensor operations with a slow reference each, and packed frozen weights.
//!
//! Tokens of all documents of a batch lie one after another: activations are `[tokens, width]` and
//! no operation knows padding. Every operation has two forms: a composition of tensor operations
//! that works on every device and in every float type, and a fast path for `f32` on the CPU with
//! its own backward. The public function picks; tests hold the one against the other.

pub mod tape;
