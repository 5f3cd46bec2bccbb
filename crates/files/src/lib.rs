//! Checkpoint files of the ecosystem: safetensors and GGUF, read by mmap, written atomically.
