//! CPUID as data: what a processor answers, and what a guest is to be told.

use arrayvec::ArrayVec;
use raw_cpuid::{CpuIdReader, CpuIdResult};

/// One leaf (and sub-leaf) with its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input, where the leaf has sub-leaves.
    pub subleaf: u32,
    /// Whether ECX selects among sub-leaves of this leaf.
    pub indexed: bool,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// A table of CPUID answers: a snapshot of a processor, or the processor a guest is to see.
///
/// It implements [`CpuIdReader`], so `raw_cpuid::CpuId::with_cpuid_reader` decodes it:
///
/// ```
/// use testudo_arch::cpuid::{Cpuid, CpuidEntry};
///
/// let mut cpuid = Cpuid::new();
/// let vendor = CpuidEntry {
///     leaf: 0,
///     eax: 1,
///     ebx: u32::from_le_bytes(*b"Auth"),
///     edx: u32::from_le_bytes(*b"enti"),
///     ecx: u32::from_le_bytes(*b"cAMD"),
///     ..CpuidEntry::default()
/// };
/// assert!(cpuid.set(vendor));
/// let decoded = raw_cpuid::CpuId::with_cpuid_reader(cpuid);
/// assert_eq!(decoded.get_vendor_info().unwrap().as_str(), "AuthenticAMD");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpuid {
    entries: ArrayVec<CpuidEntry, { Cpuid::MAX_ENTRIES }>,
}

impl Cpuid {
    /// The largest number of entries.
    pub const MAX_ENTRIES: usize = 256;

    /// A table without entries.
    pub const fn new() -> Self {
        Self {
            entries: ArrayVec::new_const(),
        }
    }

    /// Sets one answer, replacing the one for the same leaf and sub-leaf. `false` when the table is
    /// full.
    pub fn set(&mut self, entry: CpuidEntry) -> bool {
        let same = |e: &&mut CpuidEntry| {
            e.leaf == entry.leaf && (!entry.indexed || e.subleaf == entry.subleaf)
        };
        match self.entries.iter_mut().find(same) {
            Some(place) => *place = entry,
            None => return self.entries.try_push(entry).is_ok(),
        }
        true
    }

    /// Removes every entry for which `keep` is false, and lets it change the others.
    pub fn retain(&mut self, mut keep: impl FnMut(&mut CpuidEntry) -> bool) {
        self.entries.retain(|entry| keep(entry));
    }

    /// The answer for a leaf and sub-leaf exactly as stored.
    #[inline]
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.entries
            .iter()
            .find(|e| e.leaf == leaf && (!e.indexed || e.subleaf == subleaf))
    }

    /// The answer for a leaf and sub-leaf, to be changed.
    pub fn get_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut CpuidEntry> {
        self.entries
            .iter_mut()
            .find(|e| e.leaf == leaf && (!e.indexed || e.subleaf == subleaf))
    }

    /// All entries in the order of their addition.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// What a processor with this table answers to CPUID: zeros for leaves it does not have
    /// (AMD's behaviour; Intel's repeats the highest basic leaf, APM vol. 3, CPUID; SDM vol. 2A,
    /// CPUID).
    #[inline]
    pub fn query(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        match self.get(leaf, subleaf) {
            Some(e) => [e.eax, e.ebx, e.ecx, e.edx],
            None => [0; 4],
        }
    }

    /// Reads the basic, hypervisor-free and extended leaves from `read(leaf, subleaf)`.
    ///
    /// Sub-leaves are enumerated for the leaves that have them (4, 7, 0xB, 0xD, 0xF, 0x10, 0x12,
    /// 0x14, 0x17, 0x18, 0x1A, 0x1D, 0x1F, 0x8000_001D and 0x8000_0026) as far as their own lists say.
    pub fn read_from(read: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        let mut table = Self::new();
        for base in [0, 0x8000_0000] {
            let last = read(base, 0)[0];
            // A hostile or absent range answers with nonsense; no processor has that many leaves.
            if last < base || last - base > 0x40 {
                continue;
            }
            for leaf in base..=last {
                table.read_leaf(leaf, &read);
            }
        }
        table
    }

    fn read_leaf(&mut self, leaf: u32, read: &impl Fn(u32, u32) -> [u32; 4]) {
        let subleaves = match leaf {
            0x7 | 0x14 | 0x17 | 0x18 | 0x1D => read(leaf, 0)[0].min(31).saturating_add(1),
            0x4 | 0x8000_001D => {
                (0..31)
                    .take_while(|&i| read(leaf, i)[0] & 0x1F != 0)
                    .count() as u32
                    + 1
            }
            0xB | 0x1F | 0x8000_0026 => {
                (0..31)
                    .take_while(|&i| read(leaf, i)[2] & 0xFF00 != 0)
                    .count() as u32
                    + 1
            }
            0xD => 64,
            0xF | 0x10 | 0x12 => 4,
            _ => {
                let [eax, ebx, ecx, edx] = read(leaf, 0);
                self.set(CpuidEntry {
                    leaf,
                    subleaf: 0,
                    indexed: false,
                    eax,
                    ebx,
                    ecx,
                    edx,
                });
                return;
            }
        };
        for subleaf in 0..subleaves {
            let [eax, ebx, ecx, edx] = read(leaf, subleaf);
            if subleaf > 1 && eax | ebx | ecx | edx == 0 {
                continue;
            }
            self.set(CpuidEntry {
                leaf,
                subleaf,
                indexed: true,
                eax,
                ebx,
                ecx,
                edx,
            });
        }
    }

    /// The answers of the processor that this program runs on.
    #[cfg(feature = "hw")]
    pub fn of_this_processor() -> Self {
        Self::read_from(|leaf, subleaf| {
            let r = raw_cpuid::native_cpuid::cpuid_count(leaf, subleaf);
            [r.eax, r.ebx, r.ecx, r.edx]
        })
    }
}

/// The name that a hypervisor, or an emulator, gives itself on the processor that this program runs
/// on (CPUID 1 ECX bit 31, and leaf 4000_0000h).
#[cfg(feature = "hw")]
pub fn hypervisor_signature() -> Option<[u8; 12]> {
    let leaf = |leaf| raw_cpuid::native_cpuid::cpuid_count(leaf, 0);
    (leaf(1).ecx >> 31 != 0).then(|| {
        let name = leaf(0x4000_0000);
        let mut signature = [0; 12];
        for (to, from) in signature.chunks_mut(4).zip([name.ebx, name.ecx, name.edx]) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        signature
    })
}

impl CpuIdReader for Cpuid {
    fn cpuid2(&self, leaf: u32, subleaf: u32) -> CpuIdResult {
        let [eax, ebx, ecx, edx] = self.query(leaf, subleaf);
        CpuIdResult { eax, ebx, ecx, edx }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(leaf: u32, subleaf: u32, indexed: bool, eax: u32) -> CpuidEntry {
        CpuidEntry {
            leaf,
            subleaf,
            indexed,
            eax,
            ..CpuidEntry::default()
        }
    }

    #[test]
    fn subleaves_count_only_where_the_leaf_has_them() {
        let mut table = Cpuid::new();
        assert!(table.set(entry(1, 0, false, 10)));
        assert!(table.set(entry(7, 0, true, 70)) && table.set(entry(7, 1, true, 71)));
        assert_eq!(table.query(1, 99)[0], 10);
        assert_eq!((table.query(7, 1)[0], table.query(7, 2)[0]), (71, 0));
        assert!(table.set(entry(7, 1, true, 72)));
        assert_eq!((table.query(7, 1)[0], table.entries().len()), (72, 3));
    }

    #[test]
    fn a_full_table_says_so() {
        let mut table = Cpuid::new();
        let added = (0..300)
            .filter(|&leaf| table.set(entry(leaf, 0, false, 1)))
            .count();
        assert_eq!(added, Cpuid::MAX_ENTRIES);
    }

    #[test]
    fn reading_ends_even_if_the_processor_talks_nonsense() {
        let table = Cpuid::read_from(|_, _| [u32::MAX; 4]);
        assert!(table.entries().is_empty());
        let table = Cpuid::read_from(|leaf, _| if leaf == 0 { [0x20, 0, 0, 0] } else { [!0; 4] });
        assert!(table.entries().len() <= Cpuid::MAX_ENTRIES);
    }
}
