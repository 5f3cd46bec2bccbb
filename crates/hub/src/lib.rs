//! Finds a model by name: folder, cache, registry package, Hugging Face hub.
