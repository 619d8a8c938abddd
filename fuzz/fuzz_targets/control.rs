//! See `hikkoshi_fuzz::control`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hikkoshi_fuzz::control::run(data));
