//! [`sepal_fuzz::boot::boot`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sepal_fuzz::boot::boot(data));
