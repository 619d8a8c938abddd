//! Sizes, rates and durations as people write them, both ways.
//!
//! `k`, `M`, `G`, `T` alone and with `iB` are powers of 1024 (as `truncate` and `qemu-img` have
//! it); with `B` they are powers of 1000, and so are bits (`Mbit`).

use std::time::Duration;

/// Digits after the point that are looked at.
const MAX_FRACTION_DIGITS: usize = 9;

/// A size in bytes: `4096`, `4k`, `64KiB`, `20GiB`, `1.5T`, `10MB`.
///
/// # Errors
/// The text is no size, or one above 2^64.
pub fn parse_size(text: &str) -> Result<u64, String> {
    scaled(text.trim(), false)
        .ok_or_else(|| format!("{text:?} is no size; write it like 4k, 64KiB, 20GiB or 10MB"))
}

/// A rate in bytes per second; `none` is no limit: `40MB/s`, `10MiB/s`, `200Mbit/s`.
///
/// # Errors
/// The text is no rate, or the rate is zero.
pub fn parse_rate(text: &str) -> Result<Option<u64>, String> {
    let trimmed = text.trim();
    if trimmed == "none" {
        return Ok(None);
    }
    let amount = trimmed.strip_suffix("/s").unwrap_or(trimmed);
    match scaled(amount, true) {
        Some(0) => Err("a rate of 0 would copy nothing; use pause, or none for no limit".into()),
        Some(rate) => Ok(Some(rate)),
        None => Err(format!(
            "{text:?} is no rate; write it like 40MB/s, 10MiB/s, 200Mbit/s or none"
        )),
    }
}

/// A duration: `30s`, `500ms`, `2m`, `1h`; a bare number is seconds.
///
/// # Errors
/// The text is no duration, or one of more than 2^64 milliseconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (digits, unit) = split(text.trim());
    let unit_ms: u64 = match unit {
        "ms" => 1,
        "s" | "" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    match multiply(digits, unit_ms) {
        Some(ms) if unit_ms > 0 => Ok(Duration::from_millis(ms)),
        _ => Err(format!(
            "{text:?} is no duration; write it like 30s, 500ms, 2m or 1h"
        )),
    }
}

fn scaled(text: &str, bits_too: bool) -> Option<u64> {
    let (digits, unit) = split(text);
    if bits_too && let Some(prefix) = unit.strip_suffix("bit") {
        let bits = multiply(digits, power(prefix, 1000)?)?;
        return Some(bits / 8);
    }
    let factor = if let Some(prefix) = unit.strip_suffix("iB") {
        if prefix.is_empty() {
            return None;
        }
        power(prefix, 1024)?
    } else if let Some(prefix) = unit.strip_suffix('B') {
        power(prefix, 1000)?
    } else {
        power(unit, 1024)?
    };
    multiply(digits, factor)
}

fn split(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    text.split_at(end)
}

fn power(prefix: &str, base: u64) -> Option<u64> {
    let exponent = match prefix {
        "" => 0,
        "k" | "K" => 1,
        "M" | "m" => 2,
        "G" | "g" => 3,
        "T" | "t" => 4,
        "P" => 5,
        _ => return None,
    };
    Some(base.pow(exponent))
}

/// `digits`, maybe with a point, times `factor`, cut to a whole number.
fn multiply(digits: &str, factor: u64) -> Option<u64> {
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let all_digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) || fraction.len() > MAX_FRACTION_DIGITS {
        return None;
    }
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let value = whole.parse::<u64>().ok()?;
    let part = fraction.parse::<u64>().ok()?;
    let total = u128::from(value).checked_mul(scale)? + u128::from(part);
    u64::try_from(total.checked_mul(u128::from(factor))? / scale).ok()
}

/// A size for people: `20.0 GiB`.
pub fn show_size(bytes: u64) -> String {
    show(bytes, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// A rate for people: `41.2 MB/s`.
pub fn show_rate(bytes_per_s: u64) -> String {
    show(
        bytes_per_s,
        1000,
        ["B/s", "kB/s", "MB/s", "GB/s", "TB/s", "PB/s"],
    )
}

fn show(amount: u64, base: u64, units: [&str; 6]) -> String {
    let mut scale = 1_u64;
    let mut unit = 0;
    while unit + 1 < units.len() && amount / scale >= base {
        scale = scale.saturating_mul(base);
        unit += 1;
    }
    if unit == 0 {
        return format!("{amount} {}", units[0]);
    }
    let tenths = u128::from(amount) * 10 / u128::from(scale);
    format!("{}.{} {}", tenths / 10, tenths % 10, units[unit])
}

/// A span of time for people: `3.2 s`, `4 min 5 s`, `2 h 10 min`.
pub fn show_seconds(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4k", 4096),
            ("4K", 4096),
            ("64KiB", 65536),
            ("10MB", 10_000_000),
            ("1.5G", 3 << 29),
            ("20GiB", 20 << 30),
            ("16T", 16 << 40),
            (" 7B ", 7),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "k",
            "-1",
            "1e3",
            "4 k",
            "1.",
            ".5",
            "1.2.3",
            "iB",
            "5iB",
            "4kb",
            "99999999P",
            "18446744073709551616",
            "1.0000000000001k",
            "4Mbit",
            "none",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates() {
        for (text, rate) in [
            ("40MB/s", Some(40_000_000)),
            ("10MiB/s", Some(10 << 20)),
            ("200Mbit/s", Some(25_000_000)),
            ("1Gbit", Some(125_000_000)),
            ("1000", Some(1000)),
            ("none", None),
        ] {
            assert_eq!(parse_rate(text), Ok(rate), "{text}");
        }
        for text in ["", "0", "0MB/s", "7bit/s", "fast", "10MB/min", "/s"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in [
            ("30s", 30_000),
            ("30", 30_000),
            ("500ms", 500),
            ("1.5s", 1500),
            ("2m", 120_000),
            ("1h", 3_600_000),
            ("0", 0),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(ms)),
                "{text}"
            );
        }
        for text in ["", "s", "-1s", "1 d", "1d", "99999999999999999999h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn shown_for_people() {
        assert_eq!(show_size(0), "0 B");
        assert_eq!(show_size(1023), "1023 B");
        assert_eq!(show_size(20 << 30), "20.0 GiB");
        assert_eq!(show_size((1 << 30) - 1), "1023.9 MiB");
        assert_eq!(show_size(u64::MAX), "16383.9 PiB");
        assert_eq!(show_rate(41_250_000), "41.2 MB/s");
        assert_eq!(show_seconds(59), "59 s");
        assert_eq!(show_seconds(245), "4 min 5 s");
        assert_eq!(show_seconds(7800), "2 h 10 min");
    }
}
