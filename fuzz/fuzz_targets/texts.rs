//! [`sepal_fuzz::texts::texts`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sepal_fuzz::texts::texts(data));
