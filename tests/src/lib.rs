//! End-to-end tests of Sepal.
