//! [`sepal_fuzz::net::net`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sepal_fuzz::net::net(data));
