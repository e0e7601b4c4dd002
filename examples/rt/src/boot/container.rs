//! Several modules in one file, for loaders that pass only one.
//!
//! QEMU gives a PVH program a single module. `cargo xtask` therefore packs the modules into a cpio
//! archive ("newc") whose first entry is called `testudo-modules`; each further entry's name is a
//! module's string and its data the module. The entry `cmdline` replaces the command line, since GRUB's
//! quoting would alter it. An archive that starts otherwise is somebody's initial RAM disk and is left alone.

const MARK: &str = "testudo-modules";
pub(super) const COMMAND_LINE: &str = "cmdline";
const TRAILER: &str = "TRAILER!!!";

const HEADER: usize = 110;
const SIZE_FIELD: usize = 6 + 6 * 8;
const NAME_FIELD: usize = 6 + 11 * 8;

/// The entries of a container, or `None` if the data is not one.
pub(super) fn entries(data: &[u8]) -> Option<Entries<'_>> {
    let mut entries = Entries { rest: data };
    (entries.next()?.0 == MARK).then_some(entries)
}

/// Names and contents, in order, up to the trailer or the first damage.
pub(super) struct Entries<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Entries<'a> {
    type Item = (&'a str, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let header = self.rest.get(..HEADER)?;
        if !header.starts_with(b"070701") {
            return None;
        }
        let size = number(header, SIZE_FIELD)?;
        let name_size = number(header, NAME_FIELD)?;
        let name_end = HEADER.checked_add(name_size)?;
        let name = self.rest.get(HEADER..name_end)?.strip_suffix(b"\0")?;
        let name = core::str::from_utf8(name).ok()?;
        let start = name_end.checked_next_multiple_of(4)?;
        let end = start.checked_add(size)?;
        let data = self.rest.get(start..end)?;
        self.rest = self
            .rest
            .get(end.checked_next_multiple_of(4)?..)
            .unwrap_or(&[]);
        (name != TRAILER).then_some((name, data))
    }
}

fn number(header: &[u8], offset: usize) -> Option<usize> {
    let digits = core::str::from_utf8(header.get(offset..offset + 8)?).ok()?;
    usize::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, data) in entries.iter().chain(&[("TRAILER!!!", &[][..])]) {
            let mut fields = [0_u32; 13];
            fields[6] = data.len() as u32;
            fields[11] = name.len() as u32 + 1;
            bytes.extend_from_slice(b"070701");
            for field in fields {
                bytes.extend_from_slice(std::format!("{field:08x}").as_bytes());
            }
            bytes.extend_from_slice(name.as_bytes());
            bytes.push(0);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn a_container_gives_its_entries_in_order() {
        let bytes = archive(&[
            ("testudo-modules", b""),
            ("kernel a b", b"12345"),
            ("initrd", b"x"),
        ]);
        let found: Vec<_> = entries(&bytes).expect("a container").collect();
        assert_eq!(
            found,
            [("kernel a b", &b"12345"[..]), ("initrd", &b"x"[..])]
        );
    }

    #[test]
    fn an_initrd_is_not_a_container() {
        assert!(entries(&archive(&[("init", b"#!/bin/sh")])).is_none());
        assert!(entries(b"\x1f\x8b compressed").is_none());
        assert!(entries(b"").is_none());
    }

    #[test]
    fn damage_ends_the_entries_without_a_panic() {
        let bytes = archive(&[("testudo-modules", b""), ("kernel", b"12345678")]);
        for length in 0..bytes.len() {
            if let Some(entries) = entries(&bytes[..length]) {
                assert!(entries.count() <= 1);
            }
        }
        let mut wild = bytes.clone();
        let second = HEADER + 16 + 2;
        wild[second + SIZE_FIELD..second + SIZE_FIELD + 8].copy_from_slice(b"ffffffff");
        assert_eq!(entries(&wild).expect("the mark is intact").count(), 0);
    }
}
