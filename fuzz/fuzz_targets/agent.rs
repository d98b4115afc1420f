//! [`sepal_fuzz::agent::agent`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sepal_fuzz::agent::agent(data));
