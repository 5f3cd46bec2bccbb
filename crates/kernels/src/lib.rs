//! Fused tensor operations with a slow reference each, and packed frozen weights.
//!
//! Tokens of all documents of a batch lie one after another: activations are `[tokens, width]` and
//! no operation knows padding. Every operation has two forms: a composition of tensor operations
//! that works on every device and in every float type, and a fast path for `f32` on the CPU with
//! its own backward. The public function picks; tests hold the one against the other.

#![allow(unsafe_code, reason = "instructions of one processor, and outputs several tasks write")]
#![expect(
    clippy::inline_always,
    reason = "a body takes on the instruction set of its caller only where it is inlined"
)]

pub mod activation;
pub mod adamw;
mod add;
pub mod attention;
mod buffer;
#[cfg(test)]
mod check;
mod disjoint;
pub mod dropout;
pub mod embed;
mod fastfood;
pub mod gated;
pub mod head;
pub mod layer_norm;
mod linear;
pub mod matrix;
mod parallel;
mod recompute;
pub mod rms_norm;
pub mod rotary;
mod scratch;
mod simd;
mod spans;
mod sparse;
mod squared_norm;
mod table;
pub mod tape;
mod tile;
mod turn;
pub mod work;

pub use activation::{Activation, activate};
pub use adamw::{AdamwStep, adamw};
pub use add::add;
pub use attention::{AttentionOptions, KeyValues, attention, attention_over_cache};
pub use dropout::dropout;
pub use embed::embed;
pub use fastfood::{Fastfood, fastfood, fastfood_reference};
pub use gated::gated;
pub use head::{HeadOptions, token_losses};
pub use layer_norm::layer_norm;
pub use linear::{
    linear, linear_frozen, linear_frozen_reference, linear_in, linear_low_rank,
    linear_low_rank_reference, linear_reference, matmul, matmul_nt,
};
pub use parallel::{each, in_pool};
pub use rms_norm::rms_norm;
pub use rotary::{Rotation, rotary};
pub use spans::{Spans, SpansError};
pub use sparse::{
    GradientTap, SparseEntries, add_sparse, add_sparse_reference, linear_sparse,
    linear_sparse_reference,
};
pub use squared_norm::squared_norm;
pub use table::Table;
