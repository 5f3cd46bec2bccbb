//! What happens to weights after training: merging, compressing, comparing.
//!
//! Everything streams: memory holds a few tensors, whatever the size of the model.
