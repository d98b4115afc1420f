//! [`sepal_fuzz::pods::oci_spec`] under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sepal_fuzz::pods::oci_spec(data));
