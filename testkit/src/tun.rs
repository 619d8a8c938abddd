//! A TUN device: a network interface whose packets this process reads and writes.
//!
//! Owns the two ioctls that make one; the only `unsafe` of the link emulator is here.

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{IntegerSetter, Setter, ioctl, opcode};
use std::os::fd::OwnedFd;

/// Bytes of the header before each packet (`struct virtio_net_hdr`): how the kernel wants the
/// packet cut and which checksum is still to be filled in. The other device gets it unchanged.
pub(crate) const HEADER_BYTES: usize = 10;

/// `TUNSETIFF` of linux/if_tun.h.
const TUNSETIFF: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 202);
/// `TUNSETOFFLOAD` of linux/if_tun.h.
const TUNSETOFFLOAD: rustix::ioctl::Opcode = opcode::write::<u32>(b'T', 208);
const IFF_TUN: u16 = 0x0001;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
/// Checksums left to the receiver, and TCP segments of IPv4 left uncut.
const TUN_F_CSUM_AND_TSO4: usize = 0x01 | 0x02;

/// `struct ifreq` of linux/if.h, as far as `TUNSETIFF` reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    padding: [u8; 22],
}

/// Makes a TUN device of this name (at most 15 bytes) in the caller's network namespace. It is
/// gone when the descriptor is closed. Reads and writes do not block.
pub(crate) fn open(name: &str) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty()).context("open /dev/net/tun")?;
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: IFF_TUN | IFF_NO_PI | IFF_VNET_HDR,
        padding: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads (and writes back) one `struct ifreq`, 40 bytes, which this is; the
    // setter passes a pointer to it that is valid for the call.
    unsafe { ioctl(&fd, Setter::<TUNSETIFF, InterfaceRequest>::new(request)) }
        .with_context(|| format!("make the TUN device {name}"))?;
    // SAFETY: TUNSETOFFLOAD takes its flags as a plain integer and no pointer.
    unsafe {
        ioctl(
            &fd,
            IntegerSetter::<TUNSETOFFLOAD>::new_usize(TUN_F_CSUM_AND_TSO4),
        )
    }
    .context("switch on the TUN device's offloads")?;
    Ok(fd)
}
