//! The grammar of `hikkoshi migrate`, from the binary.

#[path = "../../../crates/hikkoshi/src/migrate/args.rs"]
pub mod args;
#[path = "../../../crates/hikkoshi/src/migrate/qmp.rs"]
pub mod qmp;
