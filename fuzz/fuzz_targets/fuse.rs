//! [`sepal_fuzz::fuse::fuse`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sepal_fuzz::fuse::fuse(data));
