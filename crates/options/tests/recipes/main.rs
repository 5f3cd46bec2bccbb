//! Recipes as a person writes them: every kind of option, every mistake, hostile texts.

mod common;
mod hostile;
mod kinds;
mod mistakes;
