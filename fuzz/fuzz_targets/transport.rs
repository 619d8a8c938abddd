//! See `hikkoshi_fuzz::transport`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hikkoshi_fuzz::transport::run(data));
