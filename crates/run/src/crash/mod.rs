//! CRaSh and offsite tuning: tune a model one does not hold, through a stand-in made without
//! training.
//!
//! Neighbouring blocks are clustered by how alike their outputs are, one of each cluster is kept,
//! and in place of each removed one the nearest that was kept runs again. A few of the kept blocks
//! are trained on the stand-in and put back into the whole model.
//!
//! Source: Zhang et al., CRaSh: Clustering, Removing, and Sharing Enhance Fine-tuning without Full
//! Large Language Model, 2023, arXiv 2310.15477; Xiao, Lin and Han, Offsite-Tuning: Transfer Learning
//! without Full Model, 2023, arXiv 2302.04870.
//!
//! [`blocks`] chooses, [`emulator`] makes what is given away, [`layers`] takes the trained blocks out
//! and puts them back, [`interpolate`] walks from one model to another.

pub mod blocks;
pub mod emulator;
pub mod interpolate;
pub mod layers;
