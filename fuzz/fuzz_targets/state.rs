//! See `hikkoshi_fuzz::state`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hikkoshi_fuzz::state::run(data));
