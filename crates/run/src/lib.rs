//! Recipe to plan to run folder to report.
