//! The layout of an enlightened VMCS, version 1 (Hyper-V Top-Level Functional Specification, "Nested
//! Virtualization" and HV_VMX_ENLIGHTENED_VMCS): a page of L1's memory with the fields of a VMCS in fixed
//! places, so that L1 needs neither VMREAD nor VMWRITE.
//!
//! Each row is a field, its byte offset, and the clean-field bit that its group has: "The L1 hypervisor
//! must clear the corresponding VMCS clean fields every time it modifies the enlightened VMCS".

use testudo_vmx::encoding::{Area, Encoding};
use testudo_vmx::fields as f;
use testudo_vmx::image::{VmcsImage, offset_of};

/// The version, in CPUID 0x4000_000A and at the page's start.
pub const ENLIGHTENED_VERSION: u32 = 1;

/// As many bytes of the page as have a meaning.
pub(super) const SIZE: usize = 1024;

/// The bits of the clean fields; where the specification assigns a field to none of them, it is loaded
/// at each entry.
mod group {
    pub(super) const ALWAYS: u16 = 0;
    pub(super) const IO_BITMAP: u16 = 1;
    pub(super) const MSR_BITMAP: u16 = 1 << 1;
    pub(super) const CONTROL_GRP2: u16 = 1 << 2;
    pub(super) const CONTROL_GRP1: u16 = 1 << 3;
    pub(super) const CONTROL_PROC: u16 = 1 << 4;
    pub(super) const CONTROL_EVENT: u16 = 1 << 5;
    pub(super) const CONTROL_ENTRY: u16 = 1 << 6;
    pub(super) const CONTROL_EXCPN: u16 = 1 << 7;
    pub(super) const CRDR: u16 = 1 << 8;
    pub(super) const CONTROL_XLAT: u16 = 1 << 9;
    pub(super) const GUEST_BASIC: u16 = 1 << 10;
    pub(super) const GUEST_GRP1: u16 = 1 << 11;
    pub(super) const GUEST_GRP2: u16 = 1 << 12;
    pub(super) const HOST_POINTER: u16 = 1 << 13;
    pub(super) const HOST_GRP1: u16 = 1 << 14;
}

/// All groups: what L0 leaves in the clean fields.
const ALL_CLEAN: u32 = 0xFFFF;

/// Where the clean fields are.
const CLEAN_FIELDS: usize = 824;
/// Where the error number of a VMX instruction is.
pub(super) const INSTRUCTION_ERROR: usize = 688;

struct Row {
    field: Encoding,
    at: u16,
    group: u16,
}

macro_rules! rows {
    ($($group:ident { $($field:ident = $at:literal;)* })*) => {
        &[$($(Row { field: f::$field.encoding(), at: $at, group: group::$group },)*)*]
    };
}

/// By ascending offset.
const ROWS: &[Row] = rows! {
    HOST_GRP1 {
        HOST_ES_SELECTOR = 8;
        HOST_CS_SELECTOR = 10;
        HOST_SS_SELECTOR = 12;
        HOST_DS_SELECTOR = 14;
        HOST_FS_SELECTOR = 16;
        HOST_GS_SELECTOR = 18;
        HOST_TR_SELECTOR = 20;
        HOST_PAT = 24;
        HOST_EFER = 32;
        HOST_CR0 = 40;
        HOST_CR3 = 48;
        HOST_CR4 = 56;
        HOST_SYSENTER_ESP = 64;
        HOST_SYSENTER_EIP = 72;
        HOST_RIP = 80;
        HOST_SYSENTER_CS = 88;
    }
    CONTROL_GRP1 {
        PIN_CONTROLS = 92;
        EXIT_CONTROLS = 96;
        SECONDARY_CONTROLS = 100;
    }
    IO_BITMAP {
        IO_BITMAP_A = 104;
        IO_BITMAP_B = 112;
    }
    MSR_BITMAP {
        MSR_BITMAPS = 120;
    }
    GUEST_GRP2 {
        GUEST_ES_SELECTOR = 128;
        GUEST_CS_SELECTOR = 130;
        GUEST_SS_SELECTOR = 132;
        GUEST_DS_SELECTOR = 134;
        GUEST_FS_SELECTOR = 136;
        GUEST_GS_SELECTOR = 138;
        GUEST_LDTR_SELECTOR = 140;
        GUEST_TR_SELECTOR = 142;
        GUEST_ES_LIMIT = 144;
        GUEST_CS_LIMIT = 148;
        GUEST_SS_LIMIT = 152;
        GUEST_DS_LIMIT = 156;
        GUEST_FS_LIMIT = 160;
        GUEST_GS_LIMIT = 164;
        GUEST_LDTR_LIMIT = 168;
        GUEST_TR_LIMIT = 172;
        GUEST_GDTR_LIMIT = 176;
        GUEST_IDTR_LIMIT = 180;
        GUEST_ES_ACCESS_RIGHTS = 184;
        GUEST_CS_ACCESS_RIGHTS = 188;
        GUEST_SS_ACCESS_RIGHTS = 192;
        GUEST_DS_ACCESS_RIGHTS = 196;
        GUEST_FS_ACCESS_RIGHTS = 200;
        GUEST_GS_ACCESS_RIGHTS = 204;
        GUEST_LDTR_ACCESS_RIGHTS = 208;
        GUEST_TR_ACCESS_RIGHTS = 212;
        GUEST_ES_BASE = 216;
        GUEST_CS_BASE = 224;
        GUEST_SS_BASE = 232;
        GUEST_DS_BASE = 240;
        GUEST_FS_BASE = 248;
        GUEST_GS_BASE = 256;
        GUEST_LDTR_BASE = 264;
        GUEST_TR_BASE = 272;
        GUEST_GDTR_BASE = 280;
        GUEST_IDTR_BASE = 288;
    }
    ALWAYS {
        EXIT_MSR_STORE_ADDRESS = 320;
        EXIT_MSR_LOAD_ADDRESS = 328;
        ENTRY_MSR_LOAD_ADDRESS = 336;
        CR3_TARGET_VALUE_0 = 344;
        CR3_TARGET_VALUE_1 = 352;
        CR3_TARGET_VALUE_2 = 360;
        CR3_TARGET_VALUE_3 = 368;
        PAGE_FAULT_ERROR_CODE_MASK = 376;
        PAGE_FAULT_ERROR_CODE_MATCH = 380;
        CR3_TARGET_COUNT = 384;
        EXIT_MSR_STORE_COUNT = 388;
        EXIT_MSR_LOAD_COUNT = 392;
        ENTRY_MSR_LOAD_COUNT = 396;
    }
    CONTROL_GRP2 {
        TSC_OFFSET = 400;
        VIRTUAL_APIC_ADDRESS = 408;
    }
    GUEST_GRP1 {
        VMCS_LINK_POINTER = 416;
        GUEST_DEBUGCTL = 424;
        GUEST_PAT = 432;
        GUEST_EFER = 440;
        GUEST_PDPTE0 = 448;
        GUEST_PDPTE1 = 456;
        GUEST_PDPTE2 = 464;
        GUEST_PDPTE3 = 472;
        GUEST_PENDING_DEBUG = 480;
        GUEST_SYSENTER_ESP = 488;
        GUEST_SYSENTER_EIP = 496;
        GUEST_ACTIVITY_STATE = 504;
        GUEST_SYSENTER_CS = 508;
    }
    CRDR {
        CR0_GUEST_HOST_MASK = 512;
        CR4_GUEST_HOST_MASK = 520;
        CR0_READ_SHADOW = 528;
        CR4_READ_SHADOW = 536;
        GUEST_CR0 = 544;
        GUEST_CR3 = 552;
        GUEST_CR4 = 560;
        GUEST_DR7 = 568;
    }
    HOST_POINTER {
        HOST_FS_BASE = 576;
        HOST_GS_BASE = 584;
        HOST_TR_BASE = 592;
        HOST_GDTR_BASE = 600;
        HOST_IDTR_BASE = 608;
        HOST_RSP = 616;
    }
    CONTROL_XLAT {
        EPT_POINTER = 624;
        VPID = 632;
    }
    ALWAYS {
        GUEST_PHYSICAL_ADDRESS = 680;
        VM_INSTRUCTION_ERROR = 688;
        EXIT_REASON = 692;
        EXIT_INTERRUPTION_INFORMATION = 696;
        EXIT_INTERRUPTION_ERROR_CODE = 700;
        IDT_VECTORING_INFORMATION = 704;
        IDT_VECTORING_ERROR_CODE = 708;
        EXIT_INSTRUCTION_LENGTH = 712;
        EXIT_INSTRUCTION_INFORMATION = 716;
        EXIT_QUALIFICATION = 720;
        IO_RCX = 728;
        IO_RSI = 736;
        IO_RDI = 744;
        IO_RIP = 752;
        GUEST_LINEAR_ADDRESS = 760;
    }
    GUEST_BASIC {
        GUEST_RSP = 768;
        GUEST_RFLAGS = 776;
        GUEST_INTERRUPTIBILITY = 784;
    }
    CONTROL_PROC {
        PRIMARY_CONTROLS = 788;
    }
    CONTROL_EXCPN {
        EXCEPTION_BITMAP = 792;
    }
    CONTROL_ENTRY {
        ENTRY_CONTROLS = 796;
    }
    CONTROL_EVENT {
        ENTRY_INTERRUPTION_INFORMATION = 800;
        ENTRY_EXCEPTION_ERROR_CODE = 804;
        ENTRY_INSTRUCTION_LENGTH = 808;
    }
    ALWAYS {
        TPR_THRESHOLD = 812;
        GUEST_RIP = 816;
    }
    CONTROL_GRP2 {
        TSC_MULTIPLIER = 984;
    }
};

/// Fields that follow one another in the page and in an image alike.
#[derive(Clone, Copy)]
struct Run {
    page: u16,
    image: u16,
    len: u16,
    group: u16,
}

/// Whether an entry loads a field.
const fn is_loaded(row: &Row) -> bool {
    !matches!(row.field.area(), Area::ExitInformation)
}

/// Whether an exit stores a field: what it saves of L2, what it says of itself, and the two fields of
/// the entry that it changes.
const fn is_stored(row: &Row) -> bool {
    match row.field.area() {
        Area::Guest | Area::ExitInformation => true,
        Area::Control => {
            row.field.0 == f::ENTRY_CONTROLS.encoding().0
                || row.field.0 == f::ENTRY_INTERRUPTION_INFORMATION.encoding().0
        }
        Area::Host => false,
    }
}

/// The runs of the rows that are stored, or of those that are loaded; how many there are is found by
/// the same walk.
const fn runs<const N: usize>(stored: bool) -> ([Run; N], usize) {
    let mut runs = [Run {
        page: 0,
        image: 0,
        len: 0,
        group: 0,
    }; N];
    let (mut count, mut i) = (0, 0);
    while i < ROWS.len() {
        let row = &ROWS[i];
        i += 1;
        if !(if stored {
            is_stored(row)
        } else {
            is_loaded(row)
        }) {
            continue;
        }
        let Some(image) = offset_of(row.field) else {
            panic!("not in the table of fields");
        };
        let (image, len) = (image as u16, row.field.width().bytes() as u16);
        assert!(row.at as usize + len as usize <= SIZE);
        if count > 0 {
            let last = if count <= N {
                runs[count - 1]
            } else {
                continue;
            };
            assert!(row.at >= last.page + last.len);
            let same = stored || last.group == row.group;
            if same && last.page + last.len == row.at && last.image + last.len == image {
                runs[count - 1].len += len;
                continue;
            }
        }
        if count < N {
            runs[count] = Run {
                page: row.at,
                image,
                len,
                group: row.group,
            };
        }
        count += 1;
    }
    (runs, count)
}

const LOADED: [Run; runs::<128>(false).1] = runs(false).0;
const STORED: [Run; runs::<128>(true).1] = runs(true).0;

/// The parts of the page that hold nothing but what an exit stores, and the clean fields.
const WRITTEN: [(usize, usize); 6] = [
    (128, 296),
    (416, 512),
    (544, 576),
    (680, 788),
    (796, 804),
    (816, CLEAN_FIELDS + 4),
];

/// The groups in which a seldom-used guest field lies.
const RARE_GROUPS: u32 = (group::GUEST_GRP1 | group::GUEST_GRP2) as u32;

/// L0's copy of the page: what it says is decided by this copy alone.
pub(super) type Page = [u8; SIZE];

pub(super) fn u32_at(page: &Page, at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&page[at..at + 4]);
    u32::from_le_bytes(bytes)
}

/// The groups that L1 says it has not changed.
pub(super) fn clean_fields(page: &Page) -> u32 {
    u32_at(page, CLEAN_FIELDS)
}

/// Takes the groups into an image that are not clean; says whether seldom-used guest fields are among
/// them.
pub(super) fn load(page: &Page, clean: u32, image: &mut VmcsImage) -> bool {
    let bytes = image.as_mut_bytes();
    for run in &LOADED {
        if u32::from(run.group) & clean == 0 {
            let (from, to, len) = (run.page.into(), run.image.into(), usize::from(run.len));
            copy(&page[from..], &mut bytes[to..], len);
        }
    }
    clean & RARE_GROUPS != RARE_GROUPS
}

/// Takes what an exit stores out of an image, and gives the parts of the page to be written.
pub(super) fn store<'p>(
    image: &VmcsImage,
    page: &'p mut Page,
) -> impl Iterator<Item = (usize, &'p [u8])> + use<'p> {
    let bytes = image.as_bytes();
    for run in &STORED {
        let (to, from, len) = (run.page.into(), run.image.into(), usize::from(run.len));
        copy(&bytes[from..], &mut page[to..], len);
    }
    page[CLEAN_FIELDS..CLEAN_FIELDS + 4].copy_from_slice(&ALL_CLEAN.to_le_bytes());
    let page = &*page;
    WRITTEN.iter().map(|&(from, to)| (from, &page[from..to]))
}

#[inline]
fn copy(from: &[u8], to: &mut [u8], len: usize) {
    to[..len].copy_from_slice(&from[..len]);
}

/// An enlightened VMCS with the fields of an image, none of them clean: as a hypervisor would make one that
/// is L1 itself. The rest of its page is zero.
pub fn enlightened_vmcs(image: &VmcsImage) -> [u8; SIZE] {
    let (mut page, bytes) = ([0; SIZE], image.as_bytes());
    for run in LOADED.iter().chain(&STORED) {
        let (to, from, len) = (run.page.into(), run.image.into(), usize::from(run.len));
        copy(&bytes[from..], &mut page[to..], len);
    }
    page[..4].copy_from_slice(&ENLIGHTENED_VERSION.to_le_bytes());
    page
}

/// Where a field is in the page, and its group.
#[cfg(test)]
pub(super) fn place(field: Encoding) -> Option<(usize, u32)> {
    let row = ROWS.iter().find(|row| row.field == field)?;
    Some((row.at.into(), row.group.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmx::{Offer, guest_fields, offer};
    use std::vec;
    use testudo_vmx::caps::fixtures;
    use testudo_vmx::fields::FIELDS;
    use testudo_vmx::{VmcsRead, VmcsWrite};

    #[test]
    fn an_image_goes_through_the_page_and_back() {
        let mut image = VmcsImage::new();
        for (n, row) in ROWS.iter().enumerate() {
            image
                .write_raw(row.field, 0x0101_0101_0101_0101 * (n as u64 + 1))
                .unwrap();
        }
        let page = enlightened_vmcs(&image);
        for row in ROWS {
            let value = image.read_raw(row.field).unwrap().to_le_bytes();
            let (at, len) = (usize::from(row.at), row.field.width().bytes());
            assert_eq!(page[at..at + len], value[..len], "{}", row.field);
        }
        let mut back = VmcsImage::new();
        assert!(load(&page, 0, &mut back));
        for row in ROWS.iter().filter(|row| is_loaded(row)) {
            assert_eq!(
                back.read_raw(row.field),
                image.read_raw(row.field),
                "{}",
                row.field
            );
        }
        let mut stored = [0xEE; SIZE];
        let written: vec::Vec<_> = store(&image, &mut stored)
            .map(|(at, b)| (at, b.to_vec()))
            .collect();
        for row in ROWS.iter().filter(|row| is_stored(row)) {
            let at = usize::from(row.at);
            let (start, bytes) = written
                .iter()
                .find(|(start, bytes)| (*start..start + bytes.len()).contains(&at))
                .unwrap();
            let value = image.read_raw(row.field).unwrap().to_le_bytes();
            let len = row.field.width().bytes();
            assert_eq!(
                bytes[at - start..at - start + len],
                value[..len],
                "{}",
                row.field
            );
        }
    }

    /// What is written back is what an exit stores, byte by byte: no control or host field of L1's.
    #[test]
    fn nothing_else_is_written() {
        let mut stored = [false; SIZE];
        for row in ROWS.iter().filter(|row| is_stored(row)) {
            let at = usize::from(row.at);
            stored[at..at + row.field.width().bytes()].fill(true);
        }
        stored[CLEAN_FIELDS..CLEAN_FIELDS + 4].fill(true);
        let mut written = [false; SIZE];
        for (from, to) in WRITTEN {
            written[from..to].fill(true);
        }
        assert_eq!(written, stored);
    }

    #[test]
    fn every_offered_field_has_a_place() {
        let processor = fixtures::sapphire_rapids();
        let wanted = Offer {
            ept: true,
            vpid: true,
            apic: true,
            enlightened: true,
        };
        let caps = offer(&processor, processor.processor, wanted);
        // What no control that is offered uses.
        let absent = ["EXECUTIVE_VMCS_POINTER", "GUEST_SMBASE"];
        for info in FIELDS.iter().filter(|info| info.exists(&caps)) {
            let placed = ROWS.iter().any(|row| row.field == info.encoding);
            assert!(placed || absent.contains(&info.name), "{}", info.name);
        }
        for row in ROWS.iter().filter(|row| guest_fields::is_rare(row.field)) {
            assert!(u32::from(row.group) & RARE_GROUPS != 0, "{}", row.field);
        }
    }

    #[test]
    fn clean_groups_stay_as_they_were() {
        let page = [0xFF; SIZE];
        for bit in 0..15 {
            let mut image = VmcsImage::new();
            load(&page, 1 << bit, &mut image);
            for row in ROWS.iter().filter(|row| is_loaded(row)) {
                let kept = row.group == 1 << bit;
                assert_eq!(image.read_raw(row.field) == Ok(0), kept, "{}", row.field);
            }
        }
    }
}
