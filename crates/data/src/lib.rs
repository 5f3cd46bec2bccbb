//! Datasets: readers, chat templates, loss masks, packing, splits.
