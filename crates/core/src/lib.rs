//! Weight paths, sites, the forward pass, changes, parameters and the traits methods and models meet in.
