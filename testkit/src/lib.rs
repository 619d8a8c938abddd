//! Oracle disks, link emulation and the QEMU harness for tests and benches.
//!
//! Everything here drives real programs: network namespaces are sites, TUN devices with an
//! emulator in between are the link, QEMU runs the guest, and the servers are `hikkoshi` itself
//! or its peers. All of it is removed again when its value is dropped. A missing tool is an error
//! that names the Debian package, never a skipped test. Needs Linux and root.

mod burst;
pub mod cache;
pub mod client;
pub mod console;
pub mod crash;
pub mod cut;
pub mod daemon;
pub mod deaf;
pub mod faults;
pub mod group;
pub mod guest;
pub mod link;
pub mod moving;
pub mod nbd;
pub mod netns;
pub mod offline;
pub mod oracle;
pub mod packages;
#[path = "../guest/pattern.rs"]
#[allow(clippy::cast_possible_truncation, clippy::should_implement_trait)]
pub mod pattern;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod rows;
pub mod server;
mod tun;
pub mod writelog;
