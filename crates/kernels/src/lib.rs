//! Fused tensor operations with a slow reference each, and packed frozen weights.
