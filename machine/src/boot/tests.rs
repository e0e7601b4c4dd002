use super::*;
use crate::layout::{EBDA, FIRMWARE_CODE, HIGH_MEMORY, MemoryType};
use proptest::prelude::*;
use std::string::ToString;
use std::vec;
use std::vec::Vec;
use testudo_arch::memory::GuestRam;

const MIB: u64 = 1 << 20;

/// A machine's memory, filled with a pattern so that forgotten clearing and stray writes show.
struct Machine {
    _bytes: Vec<u64>,
    memory: GuestRam,
    layout: Layout,
}

const PATTERN: u64 = 0xA5A5_A5A5_A5A5_A5A5;

#[allow(unsafe_code)]
fn machine(mib: u64) -> Machine {
    let mut bytes = vec![PATTERN; (mib * MIB / 8) as usize];
    let mut memory = GuestRam::new();
    // SAFETY: the vector is kept beside the memory, never reallocated, and not used otherwise.
    unsafe { memory.add(Gpa(0), bytes.as_mut_ptr().cast(), mib * MIB, true) }.unwrap();
    Machine {
        _bytes: bytes,
        memory,
        layout: Layout::new(mib * MIB, 40).unwrap(),
    }
}

impl Machine {
    fn load(&self, image: &BootImage<'_>) -> Result<BootState, LoadError> {
        let result = load(&self.memory, &self.layout, image);
        self.check_untouched();
        result
    }

    /// Nothing but usable memory and the firmware's code has been written.
    fn check_untouched(&self) {
        for range in self.layout.memory_map() {
            if range.kind == MemoryType::Reserved && range.end() <= HIGH_MEMORY.0 {
                let end = range.end().min(FIRMWARE_CODE.0);
                let bytes = self.bytes(range.start, end - range.start.0);
                assert!(bytes.iter().all(|byte| *byte == 0xA5), "{range:x?}");
            }
        }
    }

    fn bytes(&self, gpa: Gpa, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory.read(gpa, &mut bytes).unwrap();
        bytes
    }

    fn u32(&self, gpa: u64) -> u32 {
        self.memory.read_value(Gpa(gpa)).unwrap()
    }

    fn u64(&self, gpa: u64) -> u64 {
        self.memory.read_value(Gpa(gpa)).unwrap()
    }

    fn string(&self, gpa: u64) -> Vec<u8> {
        let bytes = self.bytes(Gpa(gpa), 256);
        bytes.split(|byte| *byte == 0).next().unwrap().to_vec()
    }
}

fn image(kernel: &[u8]) -> BootImage<'_> {
    BootImage {
        kernel,
        command_line: b"console=ttyS0",
        modules: &[],
        rsdp: Some(Gpa(0xE_0000)),
    }
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

/// A bzImage with one setup sector and a kernel of 4 KiB that wants 2 MiB at 16 MiB.
fn bzimage() -> Vec<u8> {
    let mut kernel = vec![0x90; 1024 + 4096];
    kernel[..1024].fill(0);
    kernel[0x1F1] = 1;
    put(&mut kernel, 0x1F4, &256u32.to_le_bytes());
    put(&mut kernel, 0x1FE, &[0x55, 0xAA, 0xEB, 0x66]);
    put(&mut kernel, 0x202, b"HdrS");
    put(&mut kernel, 0x206, &0x020Fu16.to_le_bytes());
    kernel[0x211] = 1;
    put(&mut kernel, 0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(&mut kernel, 0x230, &0x20_0000u32.to_le_bytes());
    kernel[0x234] = 1;
    put(&mut kernel, 0x236, &3u16.to_le_bytes());
    put(&mut kernel, 0x238, &2047u32.to_le_bytes());
    put(&mut kernel, 0x248, &0x300u32.to_le_bytes());
    put(&mut kernel, 0x24C, &0x100u32.to_le_bytes());
    put(&mut kernel, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut kernel, 0x260, &0x20_0000u32.to_le_bytes());
    kernel
}

#[test]
fn a_bzimage_is_entered_in_64_bit_mode() {
    let machine = machine(32);
    let kernel = bzimage();
    let modules = [
        Module {
            data: b"first",
            arguments: b"",
        },
        Module {
            data: b"second",
            arguments: b"",
        },
    ];
    let image = BootImage {
        modules: &modules,
        ..image(&kernel)
    };
    assert_eq!(detect(&kernel), Ok(Protocol::Linux64));
    let state = machine.load(&image).unwrap();
    let system = state.system;
    assert_eq!(system.rip, 0x100_0200);
    assert_eq!(system.mode(), testudo_arch::regs::CpuMode::Long64);
    assert_eq!((system.cs.selector, system.ss.selector), (0x10, 0x18));
    assert_eq!(system.rflags, 2);
    assert_eq!(machine.bytes(Gpa(0x100_0000), 4096), kernel[1024..]);

    let params = state.gprs.rsi;
    assert_eq!(machine.u64(params + 0x70), 0xE_0000);
    assert_eq!(machine.bytes(Gpa(params + 0x202), 4), b"HdrS");
    assert_eq!(machine.bytes(Gpa(params + 0x210), 1), [0xFF]);
    assert_eq!(machine.bytes(Gpa(params + 0x1EF), 1), [0]);
    let command_line = machine.u32(params + 0x228);
    assert_eq!(machine.string(command_line.into()), b"console=ttyS0");
    let (ramdisk, len) = (machine.u32(params + 0x218), machine.u32(params + 0x21C));
    assert_eq!(len, 14);
    assert_eq!(ramdisk, 32 * MIB as u32 - 4096);
    let ramdisk = machine.bytes(Gpa(ramdisk.into()), 14);
    assert_eq!(ramdisk, b"first\0\0\0second");

    let map = machine.layout.memory_map();
    assert_eq!(machine.bytes(Gpa(params + 0x1E8), 1), [map.len() as u8]);
    for (index, range) in map.iter().enumerate() {
        let entry = params + 0x2D0 + index as u64 * 20;
        assert_eq!(machine.u64(entry), range.start.0);
        assert_eq!(machine.u64(entry + 8), range.len);
        assert_eq!(machine.u32(entry + 16), range.kind as u32);
    }

    // The tables map the first 4 GiB onto themselves, and the descriptors match the registers.
    for address in [0, 0x100_0200, 0xFEE0_0000u64, 0xFFFF_FFFF] {
        let level4 = machine.u64(system.cr3);
        let level3 = machine.u64((level4 & !0xFFF) + (address >> 30) * 8);
        let level2 = machine.u64((level3 & !0xFFF) + ((address >> 21) & 511) * 8);
        assert_eq!(level2 & !0x1F_FFFF, address & !0x1F_FFFF);
        assert_eq!((level4 & 3, level3 & 3, level2 & 0x83), (3, 3, 0x83));
    }
    assert_eq!(machine.u64(system.cr3 + 8), 0);
    assert_eq!(machine.u64(system.gdtr.base + 0x10), 0x00AF_9B00_0000_FFFF);
    assert_eq!(machine.u32(0x40E) & 0xFFFF, EBDA.0 as u32 >> 4);
}

/// Runs what a real-mode program would meet, on the instruction decoder's word.
#[test]
fn bios_calls_are_declined() {
    let machine = machine(32);
    machine.load(&image(&bzimage())).unwrap();
    for vector in [0x10, 0x13, 0x15, 0xFF] {
        assert_eq!(machine.u32(vector * 4), 0xF000_FFE0);
    }
    let code = machine.bytes(FIRMWARE_CODE, 9);
    let mut decoder = iced_x86::Decoder::new(16, &code, iced_x86::DecoderOptions::NONE);
    let mut codes = Vec::new();
    while decoder.can_decode() {
        let instruction = decoder.decode();
        codes.push(instruction.code());
        if instruction.mnemonic() == iced_x86::Mnemonic::Or {
            // BP, IP, CS and then the flags, whose lowest bit is CF.
            assert_eq!(instruction.memory_displacement64(), 6);
            assert_eq!(instruction.immediate8(), 1);
        }
    }
    use iced_x86::Code;
    assert_eq!(
        codes,
        [
            Code::Push_r16,
            Code::Mov_rm16_r16,
            Code::Or_rm8_imm8,
            Code::Pop_r16,
            Code::Iretw
        ]
    );
    assert_eq!(machine.bytes(Gpa(0xF_FFF0), 3), [0xBA, 0xF9, 0x0C]);
}

#[test]
fn a_taken_preference_moves_a_relocatable_kernel_up_only() {
    let mut kernel = bzimage();
    put(&mut kernel, 0x258, &0x108_0000u64.to_le_bytes());
    let state = machine(32).load(&image(&kernel)).unwrap();
    assert_eq!(state.system.rip, 0x120_0200);
    let error = machine(18).load(&image(&kernel)).unwrap_err();
    assert!(matches!(
        error,
        LoadError::TooLittleMemory {
            start: Gpa(0x108_0000),
            len: 0x20_0000,
            ram: 0x120_0000,
            ..
        }
    ));
    kernel[0x234] = 0;
    let state = machine(32).load(&image(&kernel)).unwrap();
    assert_eq!(state.system.rip, 0x108_0200);
    let error = machine(16).load(&image(&kernel)).unwrap_err();
    assert!(matches!(
        error,
        LoadError::NotMemory {
            start: Gpa(0x108_0000),
            ..
        }
    ));
}

#[test]
fn a_defective_bzimage_is_named() {
    let broken = |offset: usize, value: &[u8]| {
        let mut kernel = bzimage();
        put(&mut kernel, offset, value);
        machine(32).load(&image(&kernel)).unwrap_err()
    };
    let truncated = |len: usize| machine(32).load(&image(&bzimage()[..len])).unwrap_err();
    assert_eq!(truncated(0), LoadError::Empty);
    assert_eq!(truncated(0x202), LoadError::UnknownFormat);
    for len in [0x207, 0x264, 1024, 5119] {
        assert!(
            matches!(truncated(len), LoadError::Truncated { .. }),
            "{len}"
        );
    }
    assert_eq!(
        truncated(5119).to_string(),
        "the kernel is truncated or corrupt: the protected-mode kernel ends at byte 5120, \
         the file at 5119"
    );
    let unsupported = [(0x206, &[0x0B, 0x02][..]), (0x211, &[0]), (0x236, &[2, 0])];
    for (offset, value) in unsupported {
        let error = broken(offset, value);
        assert!(matches!(error, LoadError::Unsupported { .. }), "{error}");
    }
    let corrupt = [
        (0x201, &[0x10][..], "the end of the setup header"),
        (0x201, &[0xFF], "the end of the setup header"),
        (0x1F4, &[0, 0, 0, 0], "syssize"),
        (0x230, &[3, 0, 0, 0], "kernel_alignment"),
        (0x260, &[0, 1, 0, 0], "init_size"),
    ];
    for (offset, value, name) in corrupt {
        let error = broken(offset, value);
        assert!(
            matches!(error, LoadError::Corrupt { field, .. } if field == name),
            "{error}"
        );
    }
    // The payload must lie inside, the sum of its fields must not wrap.
    for (offset, value) in [(0x248, [0, 0x10, 0, 0]), (0x24C, [0xFF; 4])] {
        let error = broken(offset, &value);
        assert!(matches!(error, LoadError::Truncated { .. }), "{error}");
    }
}

#[test]
fn what_comes_with_a_bzimage_must_fit() {
    let kernel = bzimage();
    let long = vec![b'x'; 2048];
    let error = machine(32)
        .load(&BootImage {
            command_line: &long,
            ..image(&kernel)
        })
        .unwrap_err();
    assert_eq!(
        error,
        LoadError::CommandLineTooLong {
            len: 2048,
            max: 2047
        }
    );
    let error = machine(32)
        .load(&BootImage {
            command_line: b"a\0b",
            ..image(&kernel)
        })
        .unwrap_err();
    assert!(matches!(error, LoadError::ZeroByte { position: 1, .. }));
    let data = vec![1; 15 * MIB as usize];
    let modules = [Module {
        data: &data,
        arguments: b"",
    }];
    let image = BootImage {
        modules: &modules,
        ..image(&kernel)
    };
    // 15 MiB fit below the kernel (1 to 16 MiB) or above it, but not into 17 MiB twice over.
    machine(33).load(&image).unwrap();
    let data = vec![1; 16 * MIB as usize];
    let modules = [Module {
        data: &data,
        arguments: b"",
    }];
    let image = BootImage {
        modules: &modules,
        ..image
    };
    let error = machine(33).load(&image).unwrap_err();
    assert_eq!(
        error,
        LoadError::TooLittleMemory {
            what: "the initial RAM disk",
            len: 16 * MIB,
            start: Gpa::ZERO,
            end: Gpa(u64::MAX),
            ram: 33 * MIB,
        }
    );
    let modules = [modules[0]; MAX_MODULES + 1];
    let error = machine(33)
        .load(&BootImage {
            modules: &modules,
            ..image
        })
        .unwrap_err();
    assert_eq!(error, LoadError::TooManyModules(MAX_MODULES + 1));
}

/// An ELF file: one segment with `contents` at 0x200 in the file, loaded at `paddr`, `memory` bytes
/// long, its virtual address higher by `shift`, entered at its start; and notes.
fn elf(wide: bool, paddr: u64, contents: &[u8], memory: u64, shift: u64, notes: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x200];
    put(&mut file, 0, b"\x7FELF");
    file[4] = if wide { 2 } else { 1 };
    put(&mut file, 5, &[1, 1]);
    put(&mut file, 16, &2u16.to_le_bytes());
    put(&mut file, 18, &if wide { 62u16 } else { 3 }.to_le_bytes());
    let (headers, header) = if wide { (64, 56) } else { (52, 32) };
    let notes_at = 0x200 + contents.len() as u64;
    let len = contents.len() as u64;
    let rows = [
        (1u32, 0x200u64, paddr + shift, paddr, len, memory, 4096u64),
        (4, notes_at, 0, 0, notes.len() as u64, notes.len() as u64, 4),
    ];
    if wide {
        put(&mut file, 24, &(paddr + shift).to_le_bytes());
        put(&mut file, 32, &(headers as u64).to_le_bytes());
    } else {
        put(&mut file, 24, &((paddr + shift) as u32).to_le_bytes());
        put(&mut file, 28, &(headers as u32).to_le_bytes());
    }
    let sizes = if wide { 54 } else { 42 };
    put(&mut file, sizes, &(header as u16).to_le_bytes());
    put(&mut file, sizes + 2, &2u16.to_le_bytes());
    for (index, (kind, offset, vaddr, paddr, file_len, memory, align)) in
        rows.into_iter().enumerate()
    {
        let at = headers + index * header;
        put(&mut file, at, &kind.to_le_bytes());
        if wide {
            for (slot, value) in [offset, vaddr, paddr, file_len, memory, align]
                .iter()
                .enumerate()
            {
                put(&mut file, at + 8 + slot * 8, &value.to_le_bytes());
            }
        } else {
            let values = [offset, vaddr, paddr, file_len, memory, 0, align];
            for (slot, value) in values.iter().enumerate() {
                put(&mut file, at + 4 + slot * 4, &(*value as u32).to_le_bytes());
            }
        }
    }
    file.extend_from_slice(contents);
    file.extend_from_slice(notes);
    file
}

/// Two notes: another owner's of the same type, and the PVH one.
fn pvh_notes(entry: &[u8]) -> Vec<u8> {
    let mut notes = Vec::new();
    for (owner, contents) in [(&b"GNU\0"[..], &b"abcde"[..]), (b"Xen\0", entry)] {
        notes.extend_from_slice(&(owner.len() as u32).to_le_bytes());
        notes.extend_from_slice(&(contents.len() as u32).to_le_bytes());
        notes.extend_from_slice(&18u32.to_le_bytes());
        notes.extend_from_slice(owner);
        notes.extend_from_slice(contents);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
    notes
}

const MODULES: [Module<'static>; 2] = [
    Module {
        data: b"one",
        arguments: b"first module",
    },
    Module {
        data: b"two!",
        arguments: b"",
    },
];

fn with_modules(kernel: &[u8]) -> BootImage<'_> {
    BootImage {
        modules: &MODULES,
        ..image(kernel)
    }
}

fn check_flat(state: &BootState, entry: u64) {
    let system = &state.system;
    assert_eq!(system.rip, entry);
    assert_eq!(system.mode(), testudo_arch::regs::CpuMode::Protected32);
    assert_eq!((system.cr0, system.cr4, system.efer), (0x11, 0, 0));
    for segment in [system.cs, system.ss, system.ds, system.es] {
        assert_eq!((segment.base, segment.limit), (0, u32::MAX));
    }
    assert_eq!(system.rflags, 2);
}

#[test]
fn pvh_kernels_get_their_start_info() {
    let machine = machine(16);
    let entry = 0x20_0010u64;
    for note in [&entry.to_le_bytes()[..], &(entry as u32).to_le_bytes()] {
        let kernel = elf(
            true,
            0x20_0000,
            &[7; 0x100],
            0x2000,
            0xFFFF_0000,
            &pvh_notes(note),
        );
        assert_eq!(detect(&kernel), Ok(Protocol::Pvh));
        let state = machine.load(&with_modules(&kernel)).unwrap();
        check_flat(&state, entry);
        assert_eq!(machine.bytes(Gpa(0x20_0000), 0x100), [7; 0x100]);
        assert_eq!(machine.bytes(Gpa(0x20_0100), 0x1F00), [0; 0x1F00]);
        assert_eq!(machine.bytes(Gpa(0x20_2000), 8), PATTERN.to_le_bytes());

        let info = state.gprs.rbx;
        assert_eq!(machine.u32(info), 0x336E_C578);
        assert_eq!((machine.u32(info + 4), machine.u32(info + 12)), (1, 2));
        assert_eq!(machine.string(machine.u64(info + 24)), b"console=ttyS0");
        assert_eq!(machine.u64(info + 32), 0xE_0000);
        let list = machine.u64(info + 16);
        for (index, module) in MODULES.iter().enumerate() {
            let entry = list + index as u64 * 32;
            let len = machine.u64(entry + 8);
            assert_eq!(machine.bytes(Gpa(machine.u64(entry)), len), module.data);
            assert_eq!(machine.u64(entry) % 4096, 0);
            match machine.u64(entry + 16) {
                0 => assert!(module.arguments.is_empty()),
                string => assert_eq!(machine.string(string), module.arguments),
            }
        }
        let map = machine.layout.memory_map();
        assert_eq!(machine.u32(info + 48), map.len() as u32);
        let entry = machine.u64(info + 40) + 3 * 24;
        assert_eq!(machine.u64(entry), map[3].start.0);
        assert_eq!(machine.u64(entry + 8), map[3].len);
        assert_eq!(machine.u32(entry + 16), 1);
    }
}

#[test]
fn a_defective_elf_file_is_named() {
    let good = elf(
        true,
        0x20_0000,
        &[7; 64],
        64,
        0,
        &pvh_notes(&0x20_0000u32.to_le_bytes()),
    );
    let broken = |offset: usize, value: &[u8]| {
        let mut kernel = good.clone();
        put(&mut kernel, offset, value);
        machine(16).load(&image(&kernel)).unwrap_err()
    };
    let cases: [(usize, &[u8], ElfError); 8] = [
        (4, &[3], ElfError::Class(3)),
        (5, &[2], ElfError::Encoding(2)),
        (16, &[1, 0], ElfError::Type(1)),
        (18, &[183, 0], ElfError::Machine(183)),
        (54, &[55, 0], ElfError::HeaderSize(55)),
        (56, &[0, 0], ElfError::Segments(0)),
        (56, &[129, 0], ElfError::Segments(129)),
        (
            64 + 40,
            &[63, 0],
            ElfError::Segment {
                start: 0x20_0000,
                file: 64,
                memory: 63,
            },
        ),
    ];
    for (offset, value, expected) in cases {
        assert_eq!(broken(offset, value), LoadError::Elf(expected));
    }
    // Segments outside the file, of the memory, and of the address space.
    for (offset, value) in [(64 + 8, [0xFF; 8]), (64 + 32, [0xFF; 8]), (32, [0xFF; 8])] {
        let error = broken(offset, &value);
        assert!(matches!(error, LoadError::Truncated { .. }), "{error}");
    }
    let error = broken(64 + 24, &(u64::MAX - 8).to_le_bytes());
    assert!(
        matches!(error, LoadError::Elf(ElfError::Segment { .. })),
        "{error}"
    );
    for address in [0u64, 0xA_0000, 0xF_FFF0, 16 * MIB - 32] {
        let note = pvh_notes(&(address as u32).to_le_bytes());
        let kernel = elf(true, address, &[7; 64], 64, 0, &note);
        let error = machine(16).load(&image(&kernel)).unwrap_err();
        assert!(matches!(error, LoadError::NotMemory { .. }), "{error}");
    }
    // An entry outside, a note that is cut off, no note at all.
    let bad_entry = pvh_notes(&0x20_0040u32.to_le_bytes());
    let mut cut_off = pvh_notes(&[0; 4]);
    cut_off.truncate(cut_off.len() - 2);
    for (notes, expected) in [
        (bad_entry, ElfError::Entry(0x20_0040)),
        (pvh_notes(&[0; 5]), ElfError::Note),
        (cut_off, ElfError::Note),
    ] {
        let kernel = elf(true, 0x20_0000, &[7; 64], 64, 0, &notes);
        let error = machine(16).load(&image(&kernel)).unwrap_err();
        assert_eq!(error, LoadError::Elf(expected));
    }
    let kernel = elf(true, 0x20_0000, &[7; 64], 64, 0, &[]);
    assert!(matches!(
        detect(&kernel),
        Err(LoadError::Unsupported { .. })
    ));
}

/// A Multiboot header with these flags and address fields.
fn multiboot1(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
    let mut header = Vec::new();
    let sum = 0x1BAD_B002u32.wrapping_add(flags).wrapping_neg();
    for word in [0x1BAD_B002, flags, sum].into_iter().chain(addresses) {
        header.extend_from_slice(&word.to_le_bytes());
    }
    header
}

fn check_multiboot1(machine: &Machine, state: &BootState, entry: u64) {
    check_flat(state, entry);
    assert_eq!(state.gprs.rax, 0x2BAD_B002);
    let info = state.gprs.rbx;
    assert_eq!(machine.u32(info), 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9);
    assert_eq!(
        (machine.u32(info + 4), machine.u32(info + 8)),
        (639, 15 * 1024)
    );
    assert_eq!(
        machine.string(machine.u32(info + 16).into()),
        b"kernel console=ttyS0"
    );
    assert_eq!(machine.u32(info + 20), 2);
    let list = u64::from(machine.u32(info + 24));
    for (index, module) in MODULES.iter().enumerate() {
        let entry = list + index as u64 * 16;
        let (start, end) = (machine.u32(entry), machine.u32(entry + 4));
        assert_eq!(start % 4096, 0);
        let bytes = machine.bytes(Gpa(start.into()), u64::from(end - start));
        assert_eq!(bytes, module.data);
        assert_eq!(
            machine.string(machine.u32(entry + 8).into()),
            module.arguments
        );
    }
    let (len, map) = (machine.u32(info + 44), u64::from(machine.u32(info + 48)));
    assert_eq!(len as usize, machine.layout.memory_map().len() * 24);
    assert_eq!(machine.u32(map), 20);
    assert_eq!((machine.u64(map + 4), machine.u64(map + 12)), (0, EBDA.0));
    assert_eq!(machine.u32(map + 20), 1);
    assert_eq!(machine.string(machine.u32(info + 64).into()), b"Testudo");
}

#[test]
fn multiboot_kernels_get_their_information() {
    for wide in [false, true] {
        let machine = machine(16);
        let header = multiboot1(3, [0; 5]);
        let kernel = elf(wide, 0x20_0000, &header, 0x1000, 0x4000_0000, &[]);
        assert_eq!(detect(&kernel), Ok(Protocol::Multiboot1));
        let state = machine.load(&with_modules(&kernel)).unwrap();
        check_multiboot1(&machine, &state, 0x20_0000);
        assert_eq!(machine.bytes(Gpa(0x20_0000), header.len() as u64), header);
    }
    // By addresses: the header is 16 bytes into the image, which is 8 bytes into the file.
    let machine = machine(16);
    let mut kernel = vec![0xEE; 8];
    kernel.extend_from_slice(&[1; 16]);
    kernel.extend_from_slice(&multiboot1(
        1 << 16,
        [0x10_0010, 0x10_0000, 0, 0x10_1000, 0x10_0004],
    ));
    let state = machine.load(&with_modules(&kernel)).unwrap();
    check_multiboot1(&machine, &state, 0x10_0004);
    let len = kernel.len() as u64 - 8;
    assert_eq!(machine.bytes(Gpa(0x10_0000), len), kernel[8..]);
    assert_eq!(
        machine.bytes(Gpa(0x10_0000 + len), 0x1000 - len),
        vec![0; 0x1000 - len as usize]
    );
    assert_eq!(machine.u64(0x10_1000), PATTERN);
}

#[test]
fn a_defective_multiboot_header_is_named() {
    let fail = |kernel: &[u8]| machine(16).load(&image(kernel)).unwrap_err();
    let error = fail(&multiboot1(1 << 2, [0; 5]));
    assert!(
        matches!(error, LoadError::Unsupported { value: 4, .. }),
        "{error}"
    );
    // Neither an ELF file nor addresses; a checksum that does not fit.
    assert_eq!(fail(&multiboot1(0, [0; 5])), LoadError::UnknownFormat);
    let mut kernel = multiboot1(0, [0; 5]);
    kernel[8] ^= 1;
    assert_eq!(fail(&kernel), LoadError::UnknownFormat);
    let base = 0x10_0000;
    let cases = [
        ([base, base + 1, 0, 0, base], "load_addr"),
        ([base + 1, base, 0, 0, base], "header_addr"),
        ([base, base, base - 1, 0, base], "load_end_addr"),
        ([base, base, 0, base - 1, base], "bss_end_addr"),
        ([base, base, 0, 0, base - 1], "entry_addr"),
        ([base, base, 0, base + 64, base + 64], "entry_addr"),
    ];
    for (addresses, name) in cases {
        let error = fail(&multiboot1(1 << 16, addresses));
        assert!(
            matches!(error, LoadError::Corrupt { field, .. } if field == name),
            "{error}"
        );
    }
    let error = fail(&multiboot1(1 << 16, [base, base, base + 33, 0, base]));
    assert!(matches!(error, LoadError::Truncated { .. }), "{error}");
    let error = fail(&multiboot1(1 << 16, [base, base, 0, 0xFFFF_FFFF, base]));
    assert!(matches!(error, LoadError::NotMemory { .. }), "{error}");
    let header = &multiboot1(1 << 16, [base, base, 0, 0, base])[..20];
    assert!(matches!(fail(header), LoadError::Truncated { .. }));
}

/// A Multiboot 2 header with these tags: type, flags, contents.
fn multiboot2(tags: &[(u16, u16, &[u32])]) -> Vec<u8> {
    let mut header = vec![0; 16];
    for (kind, flags, contents) in tags.iter().chain([&(0, 0, &[][..])]) {
        header.extend_from_slice(&kind.to_le_bytes());
        header.extend_from_slice(&flags.to_le_bytes());
        header.extend_from_slice(&(8 + contents.len() as u32 * 4).to_le_bytes());
        for word in *contents {
            header.extend_from_slice(&word.to_le_bytes());
        }
        header.resize(header.len().next_multiple_of(8), 0);
    }
    let len = header.len() as u32;
    let sum = 0xE852_50D6u32.wrapping_add(len).wrapping_neg();
    for (index, word) in [0xE852_50D6, 0, len, sum].iter().enumerate() {
        put(&mut header, index * 4, &word.to_le_bytes());
    }
    header
}

/// The tags of the information structure: type and contents.
fn information(machine: &Machine, state: &BootState) -> Vec<(u32, Vec<u8>)> {
    assert_eq!(state.gprs.rax, 0x36D7_6289);
    let info = state.gprs.rbx;
    let (mut at, end) = (info + 8, info + u64::from(machine.u32(info)));
    let mut tags = Vec::new();
    while at < end {
        let (kind, size) = (machine.u32(at), u64::from(machine.u32(at + 4)));
        tags.push((kind, machine.bytes(Gpa(at + 8), size - 8)));
        at += size.next_multiple_of(8);
    }
    assert_eq!((at, tags.last().unwrap().0), (end, 0));
    tags
}

fn tag(tags: &[(u32, Vec<u8>)], kind: u32) -> &[u8] {
    &tags
        .iter()
        .find(|tag| tag.0 == kind)
        .expect("the tag is there")
        .1
}

#[test]
fn multiboot2_kernels_get_their_tags() {
    let machine = machine(16);
    let rsdp: [u8; 36] = core::array::from_fn(|index| index as u8);
    machine.memory.write(Gpa(0xE_0000), &rsdp).unwrap();
    let header = multiboot2(&[(1, 0, &[1, 3, 6]), (6, 0, &[]), (7, 1, &[])]);
    let kernel = elf(false, 0x20_0000, &header, 0x1000, 0, &[]);
    assert_eq!(detect(&kernel), Ok(Protocol::Multiboot2));
    let image = with_modules(&kernel);
    let state = load(&machine.memory, &machine.layout, &image).unwrap();
    check_flat(&state, 0x20_0000);
    let tags = information(&machine, &state);
    assert_eq!(tag(&tags, 1), b"console=ttyS0\0");
    assert!(tag(&tags, 2).starts_with(b"Testudo"));
    assert_eq!(tag(&tags, 15), rsdp);
    assert_eq!(tag(&tags, 4)[..4], 639u32.to_le_bytes());
    let map = tag(&tags, 6);
    assert_eq!(map.len(), 8 + 24 * machine.layout.memory_map().len());
    assert_eq!(map[..8], [24, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(map[16..24], EBDA.0.to_le_bytes());
    let modules: Vec<_> = tags.iter().filter(|tag| tag.0 == 3).collect();
    assert_eq!(modules.len(), 2);
    assert_eq!(&modules[0].1[8..], b"first module\0");
    let start = u32::from_le_bytes(modules[0].1[..4].try_into().unwrap());
    assert_eq!(machine.bytes(Gpa(start.into()), 3), b"one");
}

#[test]
fn multiboot2_kernels_move_if_they_can() {
    let place = |contents: &[u32], mib: u64| {
        let machine = machine(mib);
        let header = multiboot2(&[(10, 0, contents), (3, 0, &[0x20_0004])]);
        let kernel = elf(false, 0x20_0000, &header, 0x1000, 0, &[]);
        let state = machine.load(&BootImage {
            rsdp: None,
            ..image(&kernel)
        })?;
        let base = tag(&information(&machine, &state), 21).to_vec();
        let base = u32::from_le_bytes(base.try_into().unwrap());
        assert_eq!(state.system.rip, u64::from(base) + 4);
        assert_eq!(machine.bytes(Gpa(base.into()), 16), header[..16]);
        Ok::<_, LoadError>(base)
    };
    // Where it is, if that is allowed; else the next aligned place; at the top if preferred.
    assert_eq!(place(&[0, u32::MAX, 4096, 0], 16), Ok(0x20_0000));
    assert_eq!(
        place(&[0x30_0001, u32::MAX, 0x20_0000, 1], 16),
        Ok(0x40_0000)
    );
    assert_eq!(place(&[0, 0x1F_FFFF, 4096, 1], 16), Ok(0x1000));
    assert_eq!(place(&[0, u32::MAX, 4096, 2], 16), Ok(0xFF_F000));
    let error = place(&[0x100_0000, u32::MAX, 4096, 0], 16).unwrap_err();
    assert!(
        matches!(error, LoadError::TooLittleMemory { .. }),
        "{error}"
    );
    let error = place(&[0, u32::MAX, 3, 0], 16).unwrap_err();
    assert!(
        matches!(error, LoadError::Corrupt { value: 3, .. }),
        "{error}"
    );
}

#[test]
fn multiboot2_kernels_may_give_addresses() {
    let base = 0x10_0000;
    let header = multiboot2(&[(2, 0, &[base, base, 0, base + 0x100]), (3, 0, &[base + 8])]);
    let machine = machine(16);
    let state = machine.load(&image(&header));
    check_flat(&state.unwrap(), u64::from(base) + 8);
    assert_eq!(machine.bytes(Gpa(base.into()), header.len() as u64), header);
    let header = multiboot2(&[(2, 0, &[base, base, 0, 0])]);
    let error = machine.load(&image(&header)).unwrap_err();
    assert!(matches!(error, LoadError::Unsupported { .. }), "{error}");
}

#[test]
fn a_defective_multiboot2_header_is_named() {
    let fail = |header: &[u8]| {
        let kernel = elf(false, 0x20_0000, header, 0x1000, 0, &[]);
        machine(16).load(&image(&kernel)).unwrap_err()
    };
    for (kind, value) in [(99, 99), (5, 5)] {
        let error = fail(&multiboot2(&[(kind, 0, &[])]));
        assert!(
            matches!(error, LoadError::Unsupported { value: v, .. } if v == value),
            "{error}"
        );
    }
    let error = fail(&multiboot2(&[(1, 0, &[4, 77])]));
    assert!(
        matches!(error, LoadError::Unsupported { value: 77, .. }),
        "{error}"
    );
    let error = fail(&multiboot2(&[(10, 0, &[1])]));
    assert!(matches!(error, LoadError::Truncated { .. }), "{error}");
    for size in [0u32, 7, 4096] {
        let mut header = multiboot2(&[(6, 0, &[])]);
        put(&mut header, 20, &size.to_le_bytes());
        let error = fail(&header);
        assert!(matches!(error, LoadError::Corrupt { .. }), "{error}");
    }
    // Optional ones may be anything.
    let header = multiboot2(&[(99, 1, &[]), (1, 1, &[77])]);
    let kernel = elf(false, 0x20_0000, &header, 0x1000, 0, &[]);
    machine(16).load(&image(&kernel)).unwrap();
}

#[test]
fn what_is_no_kernel_is_said_to_be_none() {
    assert_eq!(detect(&[]), Err(LoadError::Empty));
    assert_eq!(detect(b"#!/bin/sh"), Err(LoadError::UnknownFormat));
    assert_eq!(detect(&[0; 65536]), Err(LoadError::UnknownFormat));
    assert_eq!(detect(b"\x1F\x8B\x08"), Err(LoadError::Compressed("gzip")));
    assert!(matches!(
        detect(b"\x7FELF"),
        Err(LoadError::Truncated { .. })
    ));
    // A protocol that the image does not offer is refused too.
    let machine = machine(16);
    let kernel = bzimage();
    for protocol in [Protocol::Multiboot1, Protocol::Multiboot2, Protocol::Pvh] {
        let result = load_as(protocol, &machine.memory, &machine.layout, &image(&kernel));
        assert_eq!(result, Err(LoadError::UnknownFormat));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever is in the headers: no panic, and no write outside usable memory.
    #[test]
    fn mutated_headers_never_escape(
        which in 0usize..7,
        changes in prop::collection::vec((0usize..1200, any::<u8>()), 1..12),
        words in prop::collection::vec((0usize..160, any::<u32>()), 0..3),
        cut in prop::option::of(0usize..6000),
    ) {
        let base = 0x10_0000;
        let notes = pvh_notes(&0x20_0000u32.to_le_bytes());
        let mut kernel = match which {
            0 => bzimage(),
            1 => elf(true, 0x20_0000, &[7; 64], 0x1000, 0, &notes),
            2 => elf(false, 0x20_0000, &[7; 64], 0x1000, 0, &notes),
            3 => elf(false, 0x20_0000, &multiboot1(3, [0; 5]), 0x1000, 0, &[]),
            4 => multiboot1(1 << 16, [base, base, 0, base + 64, base]),
            5 => multiboot2(&[(2, 0, &[base, base, 0, 0]), (3, 0, &[base])]),
            _ => {
                let header = multiboot2(&[(10, 0, &[0, u32::MAX, 4096, 1]), (1, 0, &[6])]);
                elf(true, 0x20_0000, &header, 0x1000, 0, &[])
            }
        };
        let len = kernel.len();
        for (offset, value) in changes {
            kernel[offset % len] = value;
        }
        for (slot, value) in words {
            let offset = (slot * 4) % (len - 3);
            put(&mut kernel, offset, &value.to_le_bytes());
        }
        if let Some(cut) = cut {
            kernel.truncate(cut);
        }
        let machine = machine(20);
        for protocol in [
            Protocol::Linux64, Protocol::Multiboot1, Protocol::Multiboot2, Protocol::Pvh,
        ] {
            let image = with_modules(&kernel);
            let _ = load_as(protocol, &machine.memory, &machine.layout, &image);
            machine.check_untouched();
        }
        let _ = machine.load(&with_modules(&kernel));
    }
}

#[test]
fn a_machine_with_firmware_keeps_it() {
    let machine = machine(64);
    let kernel = bzimage();
    let map = [
        (0x1000, 0x9_E000, MemoryType::Usable),
        (0x10_0000, 0x50_0000, MemoryType::Usable),
        (0x60_0000, 0x20_0000, MemoryType::Reserved),
        (0x80_0000, 0x300_0000, MemoryType::Usable),
        (0x380_0000, 0x1_0000, MemoryType::Acpi),
    ]
    .map(|(start, len, kind)| MemoryRange {
        start: Gpa(start),
        len,
        kind,
    });
    // Where the kernel would like to be.
    let taken = [0x100_0000..0x108_0000, 0x108_0000..0x110_0000];
    let state = load_beside_firmware(&machine.memory, &map, &taken, &image(&kernel)).unwrap();
    assert_eq!(state.system.rip, 0x120_0200);
    let params = state.gprs.rsi;
    assert_eq!(machine.u64(params + 0x70), 0xE_0000);
    assert_eq!(machine.bytes(Gpa(params + 0x1E8), 1), [map.len() as u8]);
    for (index, range) in map.iter().enumerate() {
        let at = params + 0x2D0 + index as u64 * 20;
        let told = (machine.u64(at), machine.u64(at + 8), machine.u32(at + 16));
        assert_eq!(told, (range.start.0, range.len, range.kind as u32));
        if range.kind != MemoryType::Usable {
            let bytes = machine.bytes(range.start, range.len);
            assert!(bytes.iter().all(|byte| *byte == 0xA5), "{range:x?}");
        }
    }
    // The interrupt table, the BIOS's data and code, and what holds the image.
    for (start, len) in [(0, 0x1000), (0x9_F000, 0x6_1000), (0x100_0000, 0x10_0000)] {
        assert!(
            machine
                .bytes(Gpa(start), len)
                .iter()
                .all(|byte| *byte == 0xA5)
        );
    }
    let many: Vec<_> = map.iter().cycle().take(129).copied().collect();
    assert_eq!(
        load_beside_firmware(&machine.memory, &many, &[], &image(&kernel)),
        Err(LoadError::MapTooLong {
            ranges: 129,
            max: 128
        })
    );
}
