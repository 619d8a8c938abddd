//! A whole move on this machine.
use crate::cli::Demo;
use crate::failure::Failure;
pub fn run(_: &Demo) -> Result<(), Failure> { Err(Failure::failed("not built yet")) }
