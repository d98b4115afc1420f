//! [`sepal_fuzz::devices::mem`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sepal_fuzz::devices::mem(data));
