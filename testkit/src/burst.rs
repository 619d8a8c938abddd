//! Bursts: a run of TCP segments that the kernel hands over, and takes, as one large packet.
//!
//! Owns what is known of their layout: how many packets a burst will be on a wire, how many bytes
//! those have, and how to take some of them out, which is what losing one packet of a burst means.
//! Called by the link for every packet; must not touch what it does not understand.

use crate::tun::HEADER_BYTES;
use std::ops::Range;

// `struct virtio_net_hdr` of linux/virtio_net.h: flags, gso_type, hdr_len (2), gso_size (2), ...
const FLAGS: usize = 0;
const NEEDS_CHECKSUM: u8 = 1;
const GSO_TYPE: usize = 1;
const GSO_SIZE: usize = 4;
/// Segments of TCP over IPv4; the highest bit says that congestion marks are in use.
const GSO_TCP_V4: u8 = 1;
const GSO_ECN: u8 = 0x80;

// IPv4 and TCP headers, from the start of each.
const IP_LENGTH: usize = 2;
const IP_ID: usize = 4;
const IP_PROTOCOL: usize = 9;
const IP_CHECKSUM: usize = 10;
const IP_ADDRESSES: Range<usize> = 12..20;
const IP_MIN_BYTES: usize = 20;
const TCP: u8 = 6;
const TCP_SEQUENCE: usize = 4;
const TCP_DATA_OFFSET: usize = 12;
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const TCP_MIN_BYTES: usize = 20;
const TCP_FIN_AND_PUSH: u8 = 0x09;
const TCP_CWR: u8 = 0x80;

/// How a packet from a TUN device is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Burst {
    /// Packets that it will be on a wire.
    pub segments: usize,
    /// IP bytes that those have, each with its headers.
    pub wire_bytes: u64,
    /// Payload of each packet but the last; zero if it is one packet anyway.
    segment_bytes: usize,
    ip_header_bytes: usize,
    headers_bytes: usize,
}

impl Burst {
    /// What `packet`, with the device's header, is.
    pub fn of(packet: &[u8]) -> Self {
        Self::segmented(packet).unwrap_or_else(|| Self {
            segments: 1,
            wire_bytes: length(packet.len().saturating_sub(HEADER_BYTES)),
            segment_bytes: 0,
            ip_header_bytes: 0,
            headers_bytes: 0,
        })
    }

    fn segmented(packet: &[u8]) -> Option<Self> {
        let segment_bytes = usize::from(native(packet, GSO_SIZE)?);
        if packet[GSO_TYPE] & !GSO_ECN != GSO_TCP_V4
            || packet[FLAGS] & NEEDS_CHECKSUM == 0
            || segment_bytes == 0
        {
            return None;
        }
        let ip = packet.get(HEADER_BYTES..)?;
        let ip_header_bytes = usize::from(ip.first()? & 0x0f) * 4;
        let tcp = ip.get(ip_header_bytes..)?;
        let tcp_header_bytes = usize::from(tcp.get(TCP_DATA_OFFSET)? >> 4) * 4;
        let headers_bytes = ip_header_bytes + tcp_header_bytes;
        let payload_bytes = ip.len().checked_sub(headers_bytes)?;
        if ip_header_bytes < IP_MIN_BYTES
            || tcp_header_bytes < TCP_MIN_BYTES
            || ip[IP_PROTOCOL] != TCP
        {
            return None;
        }
        let segments = payload_bytes.div_ceil(segment_bytes).max(1);
        Some(Self {
            segments,
            wire_bytes: length(payload_bytes + segments * headers_bytes),
            segment_bytes,
            ip_header_bytes,
            headers_bytes,
        })
    }

    /// The packets `range` of `packet`, which this describes, as a burst of their own. `range` must
    /// lie within the burst's segments and must not be empty.
    pub fn cut(&self, packet: &[u8], range: Range<usize>) -> Vec<u8> {
        if range == (0..self.segments) {
            return packet.to_vec();
        }
        let (ip, tcp) = (HEADER_BYTES, HEADER_BYTES + self.ip_header_bytes);
        let payload = &packet[HEADER_BYTES + self.headers_bytes..];
        let skipped = range.start * self.segment_bytes;
        let end = (range.end * self.segment_bytes).min(payload.len());
        let mut part = packet[..HEADER_BYTES + self.headers_bytes].to_vec();
        part.extend_from_slice(&payload[skipped..end]);
        if range.len() == 1 {
            part[GSO_TYPE] = 0;
            part[GSO_SIZE..GSO_SIZE + 2].fill(0);
        }
        // TCP: further along in the stream; what goes with its first or last packet stays there.
        let sequence = u32::from_be_bytes([
            part[tcp + TCP_SEQUENCE],
            part[tcp + TCP_SEQUENCE + 1],
            part[tcp + TCP_SEQUENCE + 2],
            part[tcp + TCP_SEQUENCE + 3],
        ]);
        let sequence = sequence.wrapping_add(u32::try_from(skipped).unwrap_or(0));
        part[tcp + TCP_SEQUENCE..tcp + TCP_SEQUENCE + 4].copy_from_slice(&sequence.to_be_bytes());
        if range.end < self.segments {
            part[tcp + TCP_FLAGS] &= !TCP_FIN_AND_PUSH;
        }
        if range.start > 0 {
            part[tcp + TCP_FLAGS] &= !TCP_CWR;
        }
        // IP: its own length and number.
        let ip_bytes = u16::try_from(part.len() - ip).unwrap_or(u16::MAX);
        put(&mut part, ip + IP_LENGTH, ip_bytes);
        let id = u16::from_be_bytes([part[ip + IP_ID], part[ip + IP_ID + 1]]);
        let id = id.wrapping_add(u16::try_from(range.start).unwrap_or(0));
        put(&mut part, ip + IP_ID, id);
        put(&mut part, ip + IP_CHECKSUM, 0);
        let header = !sum(&part[ip..tcp]);
        put(&mut part, ip + IP_CHECKSUM, header);
        // What the device fills in starts from the sum over the pseudo header.
        let mut pseudo = part[ip..][IP_ADDRESSES].to_vec();
        pseudo.extend([0, TCP]);
        let tcp_bytes = u16::try_from(part.len() - tcp).unwrap_or(u16::MAX);
        pseudo.extend(tcp_bytes.to_be_bytes());
        let pseudo = sum(&pseudo);
        put(&mut part, tcp + TCP_CHECKSUM, pseudo);
        part
    }
}

fn native(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// The Internet's checksum, not complemented.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

fn length(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A burst of `payload` in segments of `segment` bytes, with TCP's time stamps.
    fn burst(payload: &[u8], segment: u16) -> Vec<u8> {
        let mut packet = vec![NEEDS_CHECKSUM, GSO_TCP_V4, 52, 0];
        packet.extend(segment.to_ne_bytes());
        packet.extend([20, 0, 16, 0]);
        let length = u16::try_from(52 + payload.len()).unwrap();
        let mut ip = vec![0x45, 0];
        ip.extend(length.to_be_bytes());
        ip.extend([0xff, 0xff, 0x40, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        packet.extend(ip);
        let mut tcp = vec![0x30, 0x39, 0x20, 0x4b, 0xff, 0xff, 0xff, 0x00, 0, 0, 0, 1];
        tcp.extend([0x80, TCP_CWR | 0x10 | TCP_FIN_AND_PUSH, 1, 0, 0, 0, 0, 0]);
        tcp.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        packet.extend(tcp);
        packet.extend(payload);
        packet
    }

    #[test]
    fn a_burst_is_charged_as_the_packets_it_becomes() {
        let payload: Vec<u8> = (0..=255).cycle().take(3500).collect();
        let found = Burst::of(&burst(&payload, 1448));
        assert_eq!((found.segments, found.wire_bytes), (3, 3500 + 3 * 52));
        let mut plain = burst(&payload[..100], 0);
        plain[GSO_TYPE] = 0;
        let found = Burst::of(&plain);
        assert_eq!((found.segments, found.wire_bytes), (1, 152));
        assert_eq!(Burst::of(&[0; 7]).segments, 1);
    }

    #[test]
    fn parts_are_whole_packets_of_the_same_stream() {
        let payload: Vec<u8> = (0..=255).cycle().take(3500).collect();
        let packet = burst(&payload, 1448);
        let whole = Burst::of(&packet);
        assert_eq!(whole.cut(&packet, 0..3), packet);
        for (range, sequence, gso) in [
            (0..1, 0xffff_ff00_u32, 0),
            (1..2, 0xffff_ff00_u32.wrapping_add(1448), 0),
            (1..3, 0xffff_ff00_u32.wrapping_add(1448), 1448),
            (2..3, 0xffff_ff00_u32.wrapping_add(2896), 0),
        ] {
            let part = whole.cut(&packet, range.clone());
            let end = (range.end * 1448).min(3500);
            assert_eq!(part[62..], payload[range.start * 1448..end], "{range:?}");
            assert_eq!(part[34..38], sequence.to_be_bytes());
            assert_eq!(native(&part, GSO_SIZE), Some(gso));
            assert_eq!(
                usize::from(part[12]) << 8 | usize::from(part[13]),
                part.len() - 10
            );
            // Over the whole header, checksum included, a right sum is all ones.
            assert_eq!(sum(&part[10..30]), 0xffff);
            assert_eq!(
                part[14..16],
                0xffff_u16
                    .wrapping_add(u16::try_from(range.start).unwrap())
                    .to_be_bytes()
            );
            let (first, last) = (range.start == 0, range.end == 3);
            assert_eq!(part[43] & TCP_CWR != 0, first);
            assert_eq!(part[43] & TCP_FIN_AND_PUSH != 0, last);
            if range.len() > 1 {
                assert_eq!(Burst::of(&part).segments, range.len());
            }
        }
    }
}
