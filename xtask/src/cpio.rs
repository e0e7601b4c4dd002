//! A cpio archive in the "newc" format, the format of initial RAM disks
//! (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`).

/// The entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive being written.
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    pub(crate) fn new() -> Self {
        Self {
            bytes: Vec::new(),
            inode: 0,
        }
    }

    /// Adds a file with its permissions.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, data: &[u8]) {
        self.entry(name, 0o100_000 | permissions, 0, 0, data);
    }

    /// Adds a folder.
    pub(crate) fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, 0, 0, &[]);
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, name: &str, target: &str) {
        self.entry(name, 0o120_777, 0, 0, target.as_bytes());
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, 0o020_600, major, minor, &[]);
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, 0, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, major: u32, minor: u32, data: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(data.len()).expect("a cpio entry is smaller than 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a name is short");
        let (user, group, links, time, device_major, device_minor, checksum) =
            (0, 0, 1, 0, 0, 0, 0);
        let fields = [
            self.inode,
            mode,
            user,
            group,
            links,
            time,
            size,
            device_major,
            device_minor,
            major,
            minor,
            name_size,
            checksum,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_laid_out_as_the_kernel_reads_it() {
        let mut archive = Archive::new();
        archive.file("init", 0o755, b"hello");
        let bytes = archive.finish();
        let expected = concat!(
            "070701",
            "00000001",
            "000081ed",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000005",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000005",
            "00000000",
            "init\0\0",
            "hello\0\0\0",
        );
        assert_eq!(&bytes[..expected.len()], expected.as_bytes());
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0"));
    }
}
