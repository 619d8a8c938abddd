//! Placeholder entry point, replaced by its owner.
fn main() {}
