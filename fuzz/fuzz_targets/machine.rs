//! [`sepal_fuzz::machine::machine`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sepal_fuzz::machine::machine(data));
