//! Recipes: TOML with every mistake shown at once, and options defined once.
