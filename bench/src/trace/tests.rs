//! The recorded files are what they should be, and what is damaged or nonsense is refused.

use super::*;

fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(u8::try_from(number & 0x7f).unwrap() | 0x80);
        number >>= 7;
    }
    out.push(u8::try_from(number).unwrap());
}

/// A file of `count` entries with `numbers` in them.
fn file(magic: &[u8; 8], disk_bytes: u64, count: u32, entries: &[(Option<u8>, &[u64])]) -> Vec<u8> {
    let mut out = magic.to_vec();
    out.extend(disk_bytes.to_le_bytes());
    out.extend(count.to_le_bytes());
    for (kind, numbers) in entries {
        out.extend(kind);
        numbers.iter().for_each(|&number| varint(number, &mut out));
    }
    let sum = crc32c::crc32c(&out);
    out.extend(sum.to_le_bytes());
    out
}

/// The recordings, as `bench wan` uses them.
fn recorded() -> Vec<(&'static str, Trace)> {
    let read = |bytes| Trace::decode(bytes).unwrap();
    vec![
        ("boot-1", read(include_bytes!("../../traces/boot-1.trace"))),
        ("boot-2", read(include_bytes!("../../traces/boot-2.trace"))),
        (
            "compile-1",
            read(include_bytes!("../../traces/compile-1.trace")),
        ),
        (
            "compile-2",
            read(include_bytes!("../../traces/compile-2.trace")),
        ),
    ]
}

#[test]
fn requests_come_back_as_they_were() {
    let bytes = file(
        TRACE_MAGIC,
        1 << 20,
        3,
        &[
            (Some(0), &[16, 8, 0, 1000]), // 8 sectors on, from the start
            (Some(1), &[31, 300, 1, 5]),  // 16 sectors back, after the first
            (Some(2), &[0, 0, 2, 0]),     // a flush, after the first
        ],
    );
    let trace = Trace::decode(&bytes).unwrap();
    let kinds: Vec<Kind> = trace.requests.iter().map(|r| r.kind).collect();
    assert_eq!(kinds, [Kind::Read, Kind::Write, Kind::Flush]);
    assert_eq!(trace.requests[0].offset, 8 * 512);
    assert_eq!(trace.requests[1].offset, 0);
    assert_eq!(trace.requests[1].length, 300 * 512);
    assert_eq!(trace.requests[1].after, Some(0));
    assert_eq!(trace.requests[2].after, Some(0));
    assert_eq!(trace.think_us(), 1005);
}

#[test]
fn nonsense_and_damage_are_refused() {
    let good = file(TRACE_MAGIC, 1 << 20, 1, &[(Some(0), &[16, 8, 0, 0])]);
    assert!(Trace::decode(&good).is_ok());
    for index in 0..good.len() {
        let mut bad = good.clone();
        bad[index] ^= 1;
        assert!(Trace::decode(&bad).is_err(), "byte {index} changed");
        assert!(Trace::decode(&good[..index]).is_err(), "cut at {index}");
    }
    for (count, kind, numbers) in [
        (1, 5, &[0, 8, 0, 0][..]),         // a kind that does not exist
        (1, 0, &[1, 8, 0, 0]),             // before the disk
        (1, 0, &[0, 2049, 0, 0]),          // beyond the disk
        (1, 0, &[0, 8, 1, 0]),             // follows nothing
        (2, 0, &[0, 8, 0, 0]),             // fewer than promised
        (0, 0, &[0, 8, 0, 0]),             // more than promised
        (1, 0, &[1 << 62, 1 << 62, 0, 0]), // far away
    ] {
        let bad = file(TRACE_MAGIC, 1 << 20, count, &[(Some(kind), numbers)]);
        assert!(Trace::decode(&bad).is_err(), "{numbers:?}");
    }
    assert!(DiskMap::decode(&good).is_err());
    assert!(DiskMap::decode(&file(MAP_MAGIC, 1 << 20, 1, &[(None, &[1, 256])])).is_err());
    let map = DiskMap::decode(&file(MAP_MAGIC, 1 << 20, 1, &[(None, &[1, 255])])).unwrap();
    assert_eq!(map.extents, [(4096, 255 * 4096)]);
}

#[test]
fn the_recordings_are_whole_and_lie_where_the_disk_has_data() {
    let map = DiskMap::decode(include_bytes!("../../traces/disk.map")).unwrap();
    let data: u64 = map.extents.iter().map(|(_, length)| length).sum();
    for (name, trace) in recorded() {
        assert_eq!(trace.disk_bytes, map.disk_bytes, "{name}");
        assert!(
            trace.requests.len() > 500,
            "{name}: {}",
            trace.requests.len()
        );
        let reads = trace.requests.iter().filter(|r| r.kind == Kind::Read);
        let bytes: u64 = reads.map(|request| u64::from(request.length)).sum();
        assert!(
            (10 << 20..data).contains(&bytes),
            "{name}: {bytes} bytes read"
        );
        assert!(
            trace.requests.iter().any(|r| r.kind == Kind::Write),
            "{name}"
        );
        assert!(
            trace.requests.iter().any(|r| r.kind == Kind::Flush),
            "{name}"
        );
        let reads = trace.requests.iter().filter(|r| r.kind == Kind::Read);
        let inside = |r: &&Request| {
            map.extents
                .iter()
                .any(|&(start, length)| (start..start + length).contains(&r.offset))
        };
        let (all, hit) = (reads.clone().count(), reads.filter(inside).count());
        assert!(
            hit * 10 > all * 9,
            "{name}: {hit} of {all} reads have data under them"
        );
    }
}

#[test]
fn a_made_disk_has_holes_and_compressible_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let map = DiskMap {
        disk_bytes: 16 << 20,
        extents: vec![(1 << 20, 2 << 20)],
    };
    map.fill(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 16 << 20);
    assert!(bytes[..1 << 20].iter().all(|&byte| byte == 0));
    assert!(bytes[3 << 20..].iter().all(|&byte| byte == 0));
    let data = &bytes[1 << 20..3 << 20];
    let blank = data
        .chunks(1024)
        .filter(|c| c.iter().all(|&b| b == 0x20))
        .count();
    assert!(blank > 0 && blank < data.len() / 1024);
    assert!(data.chunks(4096).all(|block| block[0] != 0));
}
