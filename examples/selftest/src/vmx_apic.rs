//! Cases on APIC virtualization (SDM vol. 3C, chapter 32): a guest that runs in this program's own address space, and
//! whose local APIC is a page of this program's. What the processor does for it, and how it leaves, is the
//! same on a processor and on what a hypervisor makes of one for a guest that is a hypervisor itself.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use core::arch::asm;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::regs::SystemRegisters;
use testudo_arch::segment::{DescriptorTable, SegmentAttributes as A};
use testudo_arch::{Gpa, Hpa, Msr, PageSize, Segment};
use testudo_ept::format::Format;
use testudo_ept::format::ept::Ept;
use testudo_ept::{PageTable, Rights};
use testudo_rt::irq::{self, TrapFrame};
use testudo_rt::memory::{self, Frames};
use testudo_rt::{apic, msr, time, timer};
use testudo_vmx::bitmap::MsrBitmap;
use testudo_vmx::controls::{
    EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls as S,
};
use testudo_vmx::exit::{ApicAccess, ApicAccessKind, Exit, advance};
use testudo_vmx::hw::{CurrentVmcs, GuestRegisters, HostState, RegionFrame, VmcsKind, Vmx};
use testudo_vmx::{Defects, InstructionError, VmFail, VmcsRead, VmcsWrite, VmxCaps, fields, state};

use crate::case::{Case, Outcome, check, check_eq};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "vmx::apic_task_priority",
        run: |_| on_rig(S::empty(), task_priority),
    },
    Case {
        name: "vmx::apic_accesses",
        run: |_| on_rig(S::VIRTUALIZE_APIC_ACCESSES, accesses),
    },
    Case {
        name: "vmx::apic_x2apic_mode",
        run: |_| on_rig(S::VIRTUALIZE_X2APIC_MODE, x2apic_mode),
    },
    Case {
        name: "vmx::apic_registers",
        run: |_| on_rig(PAGE | S::VIRTUALIZE_X2APIC_MODE, registers),
    },
    Case {
        name: "vmx::apic_interrupts_by_the_page",
        run: |_| on_rig(PAGE | S::VIRTUAL_INTERRUPT_DELIVERY, interrupts_by_the_page),
    },
    Case {
        name: "vmx::apic_interrupts_by_msrs",
        run: |_| on_rig(MSRS, interrupts_by_msrs),
    },
    Case {
        name: "vmx::apic_interrupt_stays_masked",
        run: |_| on_rig(PAGE | S::VIRTUAL_INTERRUPT_DELIVERY, interrupt_stays_masked),
    },
    Case {
        name: "vmx::apic_posted_interrupts",
        run: |_| on_rig(PAGE | S::VIRTUAL_INTERRUPT_DELIVERY, posted_interrupts),
    },
    Case {
        name: "vmx::apic_interrupt_ends_a_halt",
        run: |_| on_rig(PAGE | S::VIRTUAL_INTERRUPT_DELIVERY, interrupt_ends_a_halt),
    },
];

const PAGE: S = S::VIRTUALIZE_APIC_ACCESSES.union(S::APIC_REGISTER_VIRTUALIZATION);
const MSRS: S = S::VIRTUALIZE_X2APIC_MODE
    .union(S::APIC_REGISTER_VIRTUALIZATION)
    .union(S::VIRTUAL_INTERRUPT_DELIVERY);

/// Where the guest has its local APIC, by the tables that it shares with this program.
const APIC: u64 = 0xFEE0_0000;
const ID: u16 = 0x20;
const TPR: u16 = 0x80;
const ICR: u16 = 0x300;
const LVT_TIMER: u16 = 0x320;
/// The vector of the guest's interrupts, and where its bits are.
const VECTOR: u8 = 0x61;
const VISR: u16 = 0x100 + 0x10 * (VECTOR as u16 / 32);
const VIRR: u16 = 0x200 + 0x10 * (VECTOR as u16 / 32);
const BIT: u32 = 1 << (VECTOR % 32);
const MEMORY: u64 = 1 << 30;

/// How often the guest has had its interrupt.
static INTERRUPTS: AtomicU64 = AtomicU64::new(0);

fn count(_: &mut TrapFrame) {
    INTERRUPTS.fetch_add(1, Ordering::Relaxed);
}

/// How a turn of the guest's ended.
#[derive(Debug, PartialEq)]
enum Turn {
    /// It said this, by VMCALL.
    Said(u64),
    Left(Exit),
    Refused(VmFail),
}

use Turn::{Left, Refused, Said};

/// The guest tells its hypervisor.
fn say(value: u64) {
    // SAFETY: VMCALL exits, and the hypervisor changes no register.
    unsafe { asm!("vmcall", in("rax") value, options(nostack)) };
}

fn cr8() -> u64 {
    let value;
    // SAFETY: reading changes nothing.
    unsafe { asm!("mov {}, cr8", out(reg) value, options(nomem, nostack)) };
    value
}

fn set_cr8(value: u64) {
    // SAFETY: the guest's task priority is the guest's own.
    unsafe { asm!("mov cr8, {}", in(reg) value, options(nomem, nostack)) };
}

fn apic_read(register: u16) -> u32 {
    // SAFETY: the page is mapped there, and its registers may be read.
    unsafe { ((APIC + u64::from(register)) as *const u32).read_volatile() }
}

fn apic_write(register: u16, value: u32) {
    // SAFETY: as for reads; the guest's local APIC is the guest's own.
    unsafe { ((APIC + u64::from(register)) as *mut u32).write_volatile(value) };
}

fn msr_read(msr: Msr) -> u64 {
    msr::try_read(msr.0).unwrap_or(u64::MAX)
}

fn msr_write(msr: Msr, value: u64) {
    // SAFETY: these MSRs control the guest's local APIC only.
    if !unsafe { msr::try_write(msr.0, value) } {
        say(0xBAD);
    }
}

/// The guest takes what interrupts there are, and says how many it has had.
fn with_interrupts() {
    let_interrupts_in();
    say(INTERRUPTS.load(Ordering::Relaxed));
}

/// The guest, and its hypervisor's view of it.
struct Rig<'a> {
    vmcs: CurrentVmcs<'a>,
    caps: &'a VmxCaps,
    gprs: GuestRegisters,
    page: u64,
    access: u64,
    stack: u64,
}

impl Rig<'_> {
    /// A register in the virtual-APIC page.
    fn register(&self, offset: u16) -> u32 {
        // SAFETY: the frame is this case's own, mapped where it is.
        unsafe { ((self.page + u64::from(offset)) as *const u32).read_volatile() }
    }

    fn set_register(&mut self, offset: u16, value: u32) {
        // SAFETY: as for reads.
        unsafe { ((self.page + u64::from(offset)) as *mut u32).write_volatile(value) };
    }

    fn get<W: testudo_vmx::encoding::Width>(&mut self, field: testudo_vmx::Field<W>) -> W::Value {
        self.vmcs.get(field).expect("the field exists")
    }

    fn set<W: testudo_vmx::encoding::Width>(
        &mut self,
        field: testudo_vmx::Field<W>,
        value: W::Value,
    ) {
        self.vmcs.set(field, value).expect("the field exists");
    }

    /// Chooses the controls about the local APIC, and begins anew with this code.
    fn begin(&mut self, shadow: bool, apic: S, code: extern "C" fn() -> !) {
        let own = PrimaryControls::ACTIVATE_SECONDARY_CONTROLS
            | PrimaryControls::UNCONDITIONAL_IO_EXITING
            | PrimaryControls::USE_MSR_BITMAPS;
        let primary = match shadow {
            true => own | PrimaryControls::USE_TPR_SHADOW,
            false => own,
        };
        let primary = self.caps.primary.require(primary).expect("offered");
        self.set(fields::PRIMARY_CONTROLS, primary.bits());
        let secondary = self.caps.secondary.require(S::ENABLE_EPT | apic);
        self.set(
            fields::SECONDARY_CONTROLS,
            secondary.expect("offered").bits(),
        );
        self.set(fields::GUEST_RIP, code as *const () as u64);
        self.set(fields::GUEST_RSP, self.stack + 4096 - 8);
        self.set(fields::GUEST_RFLAGS, 2);
        self.set(fields::GUEST_INTERRUPTIBILITY, 0);
        INTERRUPTS.store(0, Ordering::Relaxed);
    }

    /// Has the guest request its interrupt.
    fn request(&mut self) {
        self.set_register(VIRR, BIT);
        self.set(fields::GUEST_INTERRUPT_STATUS, u16::from(VECTOR));
    }

    fn turn(&mut self) -> Turn {
        // SAFETY: host state is this processor's, the guest runs this program's code on a stack of its own and
        // without interrupts of the machine's, and no other guest has run.
        if let Err(fail) = unsafe { self.vmcs.enter(&mut self.gprs) } {
            return Refused(fail);
        }
        let exit = Exit::read(&self.vmcs).expect("a current VMCS");
        if exit == Exit::Vmcall {
            advance(&mut self.vmcs).expect("a current VMCS");
            return Said(self.gprs.gprs.rax);
        }
        Left(exit)
    }

    fn skip(&mut self) {
        advance(&mut self.vmcs).expect("a current VMCS");
    }
}

/// Runs a case, if the processor offers these controls.
fn on_rig(needed: S, case: fn(&mut Rig<'_>) -> Outcome) -> Outcome {
    // SAFETY: CPL 0.
    let Ok(caps) = (unsafe { Vmx::capabilities() }) else {
        return Outcome::Skipped("the processor has no VMX");
    };
    let shadow = caps.primary.allows(PrimaryControls::USE_TPR_SHADOW);
    if !shadow || !caps.secondary.allows(needed | S::ENABLE_EPT) {
        return Outcome::Skipped("the processor offers too little");
    }
    irq::disable();
    irq::set_handler(VECTOR, count);
    let outcome = prepare(&caps, case);
    irq::clear_handler(VECTOR);
    outcome.unwrap_or_else(Outcome::Failed)
}

fn frame() -> Result<u64, String> {
    memory::alloc_frame().ok_or_else(|| "no memory".into())
}

fn region() -> Result<RegionFrame, String> {
    let address = frame()?;
    let pointer = NonNull::new(address as *mut u8).ok_or("no memory")?;
    // SAFETY: the frame is nobody else's, mapped where it is.
    Ok(unsafe { RegionFrame::new(pointer, Hpa(address)) })
}

fn prepare(caps: &VmxCaps, case: fn(&mut Rig<'_>) -> Outcome) -> Result<Outcome, String> {
    let words = |error: &dyn core::fmt::Display| error.to_string();
    // SAFETY: CPL 0, the capabilities are this processor's, and the program's flow stays on it.
    let mut vmx = unsafe { Vmx::enable(caps, region()?) }.map_err(|e| words(&e))?;
    let vmcs = vmx.create_vmcs(region()?, VmcsKind::Ordinary);
    let mut vmcs = vmcs.map_err(|e| words(&e))?;
    let mut vmcs = vmx.load(&mut vmcs).map_err(|e| words(&e))?;
    state::initialize(&mut vmcs, caps).map_err(|e| words(&e))?;
    // SAFETY: CPL 0, 64-bit mode, and the runtime gives every vector a stack of its own.
    let host = unsafe { HostState::of_this_processor() };
    host.write(&mut vmcs).map_err(|e| words(&e))?;
    write_guest(&mut vmcs, caps).map_err(|e| words(&e))?;

    let (page, access, stack) = (frame()?, frame()?, frame()?);
    let format = Ept::new(caps.processor.physical_address_bits).with_largest_page(PageSize::Size2M);
    let table = PageTable::new(format, Frames).ok_or("no memory")?;
    let flags = format.flags(Rights::all()).ok_or("no such rights")?;
    let mapped = table.map(Gpa(0), MEMORY, Hpa(0), flags);
    mapped.map_err(|e| words(&e))?;
    let mapped = table.map(Gpa(APIC), 4096, Hpa(access), flags);
    mapped.map_err(|e| words(&e))?;
    let bitmap = Box::new(MsrBitmap::none_exit());
    let mut rig = Rig {
        vmcs,
        caps,
        gprs: GuestRegisters::default(),
        page,
        access,
        stack,
    };
    rig.set(fields::EPT_POINTER, format.pointer(table.root()));
    rig.set(fields::MSR_BITMAPS, core::ptr::from_ref(&*bitmap) as u64);
    rig.set(fields::VIRTUAL_APIC_ADDRESS, page);
    if caps.secondary.allows(S::VIRTUALIZE_APIC_ACCESSES) {
        rig.set(fields::APIC_ACCESS_ADDRESS, access);
    }
    let outcome = case(&mut rig);
    // SAFETY: nothing runs in the guest any more.
    unsafe { vmx.disable() }.map_err(|e| words(&e))?;
    Ok(outcome)
}

/// The guest's registers are this program's own, and its exits those that any hypervisor asks for.
fn write_guest(
    vmcs: &mut CurrentVmcs<'_>,
    caps: &VmxCaps,
) -> Result<(), Box<dyn core::error::Error>> {
    let pin = PinControls::EXTERNAL_INTERRUPT_EXITING | PinControls::NMI_EXITING;
    let exit = ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::LOAD_EFER;
    let entry = EntryControls::IA32E_MODE_GUEST | EntryControls::LOAD_EFER;
    vmcs.set(fields::PIN_CONTROLS, caps.pin.require(pin)?.bits())?;
    vmcs.set(fields::EXIT_CONTROLS, caps.exit.require(exit)?.bits())?;
    vmcs.set(fields::ENTRY_CONTROLS, caps.entry.require(entry)?.bits())?;
    let table = |base| DescriptorTable {
        base,
        limit: 0xFFFF,
    };
    let data = |selector| Segment::flat(selector, A::DATA);
    let registers = SystemRegisters {
        cs: Segment::flat(vmcs.get(fields::HOST_CS_SELECTOR)?, A::CODE64),
        ss: data(16),
        ds: data(16),
        es: data(16),
        fs: Segment {
            base: vmcs.get(fields::HOST_FS_BASE)?,
            ..data(16)
        },
        gs: Segment {
            base: vmcs.get(fields::HOST_GS_BASE)?,
            ..data(16)
        },
        tr: Segment {
            selector: vmcs.get(fields::HOST_TR_SELECTOR)?,
            base: vmcs.get(fields::HOST_TR_BASE)?,
            limit: 0x67,
            attributes: A::TSS_BUSY,
        },
        ldtr: Segment {
            attributes: A::UNUSABLE,
            ..Segment::default()
        },
        gdtr: table(vmcs.get(fields::HOST_GDTR_BASE)?),
        idtr: table(vmcs.get(fields::HOST_IDTR_BASE)?),
        cr0: vmcs.get(fields::HOST_CR0)?,
        cr3: vmcs.get(fields::HOST_CR3)?,
        cr4: vmcs.get(fields::HOST_CR4)?,
        efer: vmcs.get(fields::HOST_EFER)?,
        ..SystemRegisters::reset()
    };
    Ok(state::write_system_registers(vmcs, &registers)?)
}

/// With a TPR shadow CR8 is the task priority in the page, until it falls below the threshold.
fn task_priority(rig: &mut Rig<'_>) -> Outcome {
    extern "C" fn code() -> ! {
        set_cr8(7);
        say(cr8());
        set_cr8(4);
        say(cr8());
        loop {
            set_cr8(9);
            say(cr8());
        }
    }
    rig.begin(true, S::empty(), code);
    check_eq!(rig.turn(), Said(7));
    check_eq!(rig.register(TPR), 0x70);
    rig.set(fields::TPR_THRESHOLD, 5);
    check_eq!(rig.turn(), Left(Exit::TprBelowThreshold));
    check_eq!(rig.register(TPR), 0x40);
    let refused = Refused(VmFail::Valid(InstructionError::InvalidControlField));
    check_eq!(rig.turn(), refused);
    rig.set_register(TPR, 0x58);
    check_eq!(rig.turn(), Said(5));
    check_eq!(rig.turn(), Said(9));
    // Both kinds of access, as the hypervisor wants.
    let primary = rig.get(fields::PRIMARY_CONTROLS);
    let stores = PrimaryControls::CR8_STORE_EXITING.bits();
    rig.set(fields::PRIMARY_CONTROLS, primary | stores);
    for _ in 0..2 {
        let turn = rig.turn();
        check!(matches!(turn, Left(Exit::ControlRegister(_))), "{turn:?}");
        rig.skip();
        check!(matches!(rig.turn(), Said(_)), "it goes on");
        check_eq!(rig.register(TPR), 0x90);
    }
    Outcome::Passed
}

fn access(offset: u16, kind: ApicAccessKind) -> Turn {
    Left(Exit::ApicAccess(ApicAccess {
        offset,
        kind,
        asynchronous: false,
    }))
}

/// Accesses to the page are to the task priority in the other, or exit.
fn accesses(rig: &mut Rig<'_>) -> Outcome {
    extern "C" fn code() -> ! {
        apic_write(TPR, 0x35);
        say(apic_read(TPR).into());
        say(apic_read(ID).into());
        apic_write(LVT_TIMER, 1);
        loop {
            say(apic_read(TPR).into());
        }
    }
    let pages = S::VIRTUALIZE_APIC_ACCESSES;
    // Without a TPR shadow none is virtual.
    rig.begin(false, pages, code);
    check_eq!(rig.turn(), access(TPR, ApicAccessKind::Write));
    rig.begin(true, pages, code);
    check_eq!(rig.turn(), Said(0x35));
    check_eq!(rig.register(TPR), 0x35);
    check_eq!(rig.turn(), access(ID, ApicAccessKind::Read));
    rig.skip();
    check!(matches!(rig.turn(), Said(_)), "it goes on");
    check_eq!(rig.turn(), access(LVT_TIMER, ApicAccessKind::Write));
    rig.skip();
    // An entry below the threshold is an exit right behind it.
    rig.set(fields::TPR_THRESHOLD, 4);
    check_eq!(rig.turn(), Left(Exit::TprBelowThreshold));
    rig.set_register(TPR, 0x41);
    check_eq!(rig.turn(), Said(0x41));
    rig.set(fields::TPR_THRESHOLD, 0);
    // The page behind all this is never touched.
    let access = rig.access as *const u64;
    for word in 0..512 {
        // SAFETY: the frame is this case's own, mapped where it is.
        check_eq!(unsafe { access.add(word).read_volatile() }, 0);
    }
    Outcome::Passed
}

/// The MSR of the task priority is virtual, and no other.
fn x2apic_mode(rig: &mut Rig<'_>) -> Outcome {
    extern "C" fn code() -> ! {
        msr_write(Msr::X2APIC_TPR, 0x30);
        say(msr_read(Msr::X2APIC_TPR));
        loop {
            say(msr_read(Msr::X2APIC_APICID));
        }
    }
    rig.begin(true, S::VIRTUALIZE_X2APIC_MODE, code);
    rig.set_register(ID, 0x5A5A);
    check_eq!(rig.turn(), Said(0x30));
    check_eq!(rig.register(TPR), 0x30);
    check_eq!(rig.turn(), Said(msr_read(Msr::X2APIC_APICID)));
    Outcome::Passed
}

/// Reads are of the page; a write goes there, and exits behind it.
fn registers(rig: &mut Rig<'_>) -> Outcome {
    extern "C" fn by_the_page() -> ! {
        loop {
            say(apic_read(ID).into());
            apic_write(LVT_TIMER, 0x1_0032);
        }
    }
    extern "C" fn by_msrs() -> ! {
        loop {
            say(msr_read(Msr::X2APIC_APICID));
        }
    }
    rig.begin(true, PAGE, by_the_page);
    rig.set_register(ID, 0x0700_0000);
    check_eq!(rig.turn(), Said(0x0700_0000));
    check_eq!(rig.turn(), Left(Exit::ApicWrite { offset: LVT_TIMER }));
    check_eq!(rig.register(LVT_TIMER), 0x1_0032);
    check_eq!(rig.turn(), Said(0x0700_0000));
    let both = S::VIRTUALIZE_X2APIC_MODE | S::APIC_REGISTER_VIRTUALIZATION;
    rig.begin(true, both, by_msrs);
    rig.set_register(ID, 0x5A5A);
    check_eq!(rig.turn(), Said(0x5A5A));
    Outcome::Passed
}

/// An interrupt is requested, held back by the task priority, delivered, ended, and sent by the guest to itself.
fn interrupts_by_the_page(rig: &mut Rig<'_>) -> Outcome {
    extern "C" fn code() -> ! {
        with_interrupts();
        apic_write(TPR, 0x50);
        with_interrupts();
        // To itself, fixed, edge-triggered.
        apic_write(ICR, 1 << 18 | 1 << 14 | u32::from(VECTOR));
        loop {
            with_interrupts();
        }
    }
    if msr::try_read(Msr::X2APIC_APICID.0).is_some() {
        return Outcome::Skipped("the runtime does not use the APIC's page");
    }
    rig.begin(true, PAGE | S::VIRTUAL_INTERRUPT_DELIVERY, code);
    rig.set_register(TPR, 0x60);
    rig.request();
    check_eq!(rig.turn(), Said(0));
    check_eq!(rig.register(VIRR) & BIT, BIT);
    check_eq!(rig.turn(), Said(1));
    check_eq!((rig.register(VIRR) & BIT, rig.register(VISR) & BIT), (0, 0));
    check_eq!(rig.vmcs.get(fields::GUEST_INTERRUPT_STATUS), Ok(0));
    check_eq!(rig.turn(), Said(2));
    // Its end exits, if the hypervisor wants to know of it.
    rig.set(fields::EOI_EXIT_BITMAP_1, 1 << (VECTOR - 64));
    rig.request();
    check_eq!(rig.turn(), Left(Exit::VirtualizedEoi { vector: VECTOR }));
    check_eq!(rig.register(VISR) & BIT, 0);
    check_eq!(rig.turn(), Said(3));
    Outcome::Passed
}

/// The same by the x2APIC's registers, with the runtime's own end of the interrupt going nowhere.
fn interrupts_by_msrs(rig: &mut Rig<'_>) -> Outcome {
    extern "C" fn code() -> ! {
        loop {
            with_interrupts();
            msr_write(Msr::X2APIC_EOI, 0);
            msr_write(Msr::X2APIC_SELF_IPI, VECTOR.into());
        }
    }
    if msr::try_read(Msr::X2APIC_APICID.0).is_some() {
        return Outcome::Skipped("the runtime does not use the APIC's page");
    }
    rig.begin(true, MSRS, code);
    rig.request();
    check_eq!(rig.turn(), Said(1));
    check_eq!(rig.register(VISR) & BIT, BIT);
    let serving = u16::from(VECTOR) << 8;
    check_eq!(rig.vmcs.get(fields::GUEST_INTERRUPT_STATUS), Ok(serving));
    check_eq!(rig.turn(), Said(2));
    rig.set(fields::EOI_EXIT_BITMAP_1, 1 << (VECTOR - 64));
    check_eq!(rig.turn(), Left(Exit::VirtualizedEoi { vector: VECTOR }));
    check_eq!(rig.turn(), Said(3));
    rig.set(fields::EOI_EXIT_BITMAP_1, 0);
    Outcome::Passed
}

/// An interrupt of the machine's ends the turn, and lets none through that the guest masks.
fn interrupt_stays_masked(rig: &mut Rig<'_>) -> Outcome {
    static TURNS: AtomicU64 = AtomicU64::new(0);
    extern "C" fn code() -> ! {
        // It is off already; a processor may look at it only when something is done about it.
        irq::disable();
        while TURNS.load(Ordering::Relaxed) == 0 {
            core::hint::spin_loop();
        }
        say(INTERRUPTS.load(Ordering::Relaxed));
        loop {
            with_interrupts();
        }
    }
    const TIMER: u8 = 0x63;
    if msr::try_read(Msr::X2APIC_APICID.0).is_some() {
        return Outcome::Skipped("the runtime does not use the APIC's page");
    }
    if Defects::of(rig.caps).contains(Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS) {
        return Outcome::Skipped("the processor delivers it");
    }
    TURNS.store(0, Ordering::Relaxed);
    rig.begin(true, PAGE | S::VIRTUAL_INTERRUPT_DELIVERY, code);
    rig.request();
    irq::set_handler(TIMER, |_| {});
    timer::start(TIMER);
    timer::arm(time::tsc() + time::ns_to_tsc(2_000_000));
    check_eq!(rig.turn(), Left(Exit::ExternalInterrupt { vector: None }));
    let_interrupts_in();
    irq::clear_handler(TIMER);
    let requested = u16::from(VECTOR);
    check_eq!(rig.vmcs.get(fields::GUEST_INTERRUPT_STATUS), Ok(requested));
    TURNS.store(1, Ordering::Relaxed);
    check_eq!(rig.turn(), Said(0));
    check_eq!(rig.turn(), Said(1));
    Outcome::Passed
}

/// The notification, which waits when the guest is entered, requests what is posted, and is over without an exit.
fn posted_interrupts(rig: &mut Rig<'_>) -> Outcome {
    extern "C" fn code() -> ! {
        loop {
            with_interrupts();
        }
    }
    const NOTIFICATION: u8 = 0x62;
    let pin = PinControls::PROCESS_POSTED_INTERRUPTS;
    if !rig.caps.pin.allows(pin) || msr::try_read(Msr::X2APIC_APICID.0).is_some() {
        return Outcome::Skipped("the processor offers too little");
    }
    rig.begin(true, PAGE | S::VIRTUAL_INTERRUPT_DELIVERY, code);
    let pin = rig.get(fields::PIN_CONTROLS) | pin.bits();
    rig.set(fields::PIN_CONTROLS, pin);
    let acknowledge = ExitControls::ACKNOWLEDGE_INTERRUPT.bits();
    let exit = rig.get(fields::EXIT_CONTROLS) | acknowledge;
    rig.set(fields::EXIT_CONTROLS, exit);
    rig.set(
        fields::POSTED_INTERRUPT_NOTIFICATION_VECTOR,
        NOTIFICATION.into(),
    );
    // The rest of the stack's frame is free.
    let descriptor = rig.stack;
    rig.set(fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, descriptor);
    let word = |index: u64| {
        // SAFETY: the descriptor is in a frame of this case's own, mapped where it is.
        unsafe { AtomicU64::from_ptr((descriptor + 8 * index) as *mut u64) }
    };
    irq::set_handler(NOTIFICATION, count);
    for round in 1..3 {
        word(1).store(1 << (VECTOR - 64), Ordering::Relaxed);
        word(4).store(1, Ordering::Relaxed);
        apic::send_ipi(0, NOTIFICATION);
        check_eq!(rig.turn(), Said(round));
        check_eq!(
            (
                word(1).load(Ordering::Relaxed),
                word(4).load(Ordering::Relaxed)
            ),
            (0, 0)
        );
    }
    // Nothing is left for this program itself.
    let_interrupts_in();
    check_eq!(INTERRUPTS.load(Ordering::Relaxed), 2);
    irq::clear_handler(NOTIFICATION);
    Outcome::Passed
}

/// Whoever runs takes what interrupts there are.
fn let_interrupts_in() {
    irq::enable();
    // SAFETY: the shadow of STI is over behind it.
    unsafe { asm!("nop", "nop", options(nomem, nostack)) };
    irq::disable();
}

/// A guest that halts with an interrupt due does not wait.
fn interrupt_ends_a_halt(rig: &mut Rig<'_>) -> Outcome {
    extern "C" fn code() -> ! {
        loop {
            irq::wait();
            say(INTERRUPTS.load(Ordering::Relaxed));
            say(INTERRUPTS.load(Ordering::Relaxed));
        }
    }
    if msr::try_read(Msr::X2APIC_APICID.0).is_some() {
        return Outcome::Skipped("the runtime does not use the APIC's page");
    }
    if Defects::of(rig.caps).contains(Defects::HALTS_THROUGH_VIRTUAL_INTERRUPTS) {
        return Outcome::Skipped("the processor would halt for good");
    }
    rig.begin(true, PAGE | S::VIRTUAL_INTERRUPT_DELIVERY, code);
    for count in 1..4 {
        rig.request();
        check_eq!(rig.turn(), Said(count));
        if count < 3 {
            check_eq!(rig.turn(), Said(count));
        }
    }
    // Nor does one that an entry finds halted.
    rig.request();
    rig.set(fields::GUEST_RFLAGS, 0x202);
    rig.set(fields::GUEST_ACTIVITY_STATE, 1);
    check_eq!(rig.turn(), Said(4));
    Outcome::Passed
}
