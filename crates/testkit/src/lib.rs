//! Tiny models, golden loader and conformance suites shared by the tests.
