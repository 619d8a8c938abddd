//! See `hikkoshi_fuzz::nbd_server`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hikkoshi_fuzz::nbd_server::run(data));
