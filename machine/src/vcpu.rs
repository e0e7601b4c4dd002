//! The vCPU: the one trait that every backend implements, and the exits it reports.

use alloc::vec::Vec;
use core::sync::atomic::AtomicU32;

use testudo_arch::regs::SystemRegisters;
use testudo_arch::{Event, Gpa, Gprs, Gva, Msr};

use crate::emulate::linear::StageAccess;
use crate::irq::ApicState;
use crate::stats::Settled;

/// Why a vCPU stopped, in one vocabulary for all backends.
///
/// A backend reports only what the machine must decide; what it settled itself (KVM's CPUID, for
/// instance) never appears. No value a guest can cause is left out: the rest is [`VmExit::Unknown`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmExit {
    /// Something on the host's side wants attention: a kick, a host interrupt, or requests that
    /// were pending before entry. The guest noticed nothing.
    Interrupted,
    /// The guest can take the interrupt for which a window was requested.
    InterruptWindow,
    /// An event is about to be delivered, to the guest or to a guest of its own, and an exit is to
    /// follow at once: the host's timer shall fire now, so that the next entry delivers the event
    /// and is ended by the interrupt.
    DeliveryDue,
    /// A guest of the guest's was entered in the state that HLT makes: it waits for an event.
    EnteredHalted,
    /// CPUID.
    Cpuid,
    /// HLT. RIP is still at the instruction.
    Halt,
    /// MWAIT, MONITOR or PAUSE, which the guest may treat as hints.
    Idle,
    /// RDMSR of the register.
    ReadMsr(Msr),
    /// WRMSR of the value to the register.
    WriteMsr(Msr, u64),
    /// XSETBV: EDX:EAX for the extended control register in ECX.
    SetXcr {
        /// ECX.
        index: u32,
        /// EDX:EAX.
        value: u64,
    },
    /// IN or OUT with the accumulator.
    Port(PortAccess),
    /// INS or OUTS, to be emulated at the current RIP.
    StringPort(PortAccess),
    /// An access to a guest-physical address that is not mapped, or not for this use. The
    /// instruction at RIP is to be emulated, or the mapping made.
    Memory(MemoryAccess),
    /// An access that the backend has already taken apart (KVM).
    Mmio {
        /// The address.
        gpa: Gpa,
        /// What is written, or where the answer goes with [`Vcpu::complete_read`].
        data: u64,
        /// 1, 2, 4 or 8 bytes.
        size: u8,
        /// Whether the guest writes.
        write: bool,
    },
    /// The guest wrote a register of its local APIC, and the processor has put the value into the
    /// page of the registers: what it does is the machine's. The instruction has been executed.
    ApicWrite {
        /// The register's offset in the page.
        register: u16,
    },
    /// The guest ended the interrupt with this vector, which stands for a level. The instruction
    /// has been executed.
    EndOfInterrupt(u8),
    /// VMCALL or VMMCALL.
    Hypercall,
    /// WBINVD, INVD or the like.
    CacheFlush,
    /// An instruction of the virtualization extension, or another that this guest must not have:
    /// #UD unless a nested layer handles it.
    Forbidden,
    /// An exception that the backend intercepts.
    Exception {
        /// The vector.
        vector: u8,
        /// The error code, if there is one.
        error_code: Option<u32>,
    },
    /// An access to a control register (MOV, LMSW, SMSW, CLTS) or INVLPG that the backend
    /// intercepts and has not taken apart: the instruction at RIP is to be emulated.
    ControlRegister,
    /// The processor cannot run the guest as it is (real mode, without unrestricted guests): the event
    /// is to be delivered, or the instruction at RIP executed, by emulation.
    Emulate(Option<Event>),
    /// The guest's processor shut down: a triple fault.
    Shutdown,
    /// The processor refused the guest's state.
    InvalidState,
    /// An exit that this version does not know, with the backend's raw code and information.
    Unknown {
        /// The raw exit code.
        code: u64,
        /// What the processor said about it.
        info: [u64; 2],
    },
}

/// The interrupt for which a window is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AwaitedInterrupt {
    /// One of the local APIC's with this vector, which the task priority can hold back.
    Vector(u8),
    /// One of an external interrupt controller, whatever the task priority.
    External,
}

/// A port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAccess {
    /// The port.
    pub port: u16,
    /// 1, 2 or 4 bytes.
    pub size: u8,
    /// Whether the guest writes (OUT).
    pub write: bool,
}

/// An access that second-stage translation stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryAccess {
    /// The guest-physical address: the machine's, even if a guest of the guest's knows it by another.
    pub gpa: Gpa,
    /// The linear address, where the processor tells.
    pub gva: Option<Gva>,
    /// Whether it was a write.
    pub write: bool,
    /// Whether it was an instruction fetch.
    pub fetch: bool,
    /// Whether it was made by the page walk, for a table entry.
    pub table: bool,
}

/// Why a backend cannot go on: it failed itself, or the guest did what it does not support.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// The processor refused to enter the guest, with its error number.
    #[error("the processor refused to enter the guest (error {0})")]
    Entry(u32),
    /// The host's interface failed with this error number.
    #[error("the host's virtualization interface failed (error {0})")]
    Host(i32),
    /// The processor refused to enter the guest: the rule that is violated is named.
    #[cfg(feature = "vmx")]
    #[error("{0}")]
    VmEntry(crate::backend::vmx::Refusal),
    /// The guest did what this backend does not support.
    #[cfg(feature = "vmx")]
    #[error("{0}")]
    Unsupported(crate::backend::vmx::UnsupportedExit),
    /// VMREAD or VMWRITE failed.
    #[cfg(feature = "vmx")]
    #[error(transparent)]
    Vmcs(#[from] testudo_vmx::AccessError),
    /// The guest's tables cannot be shadowed.
    #[error(transparent)]
    Shadow(#[from] testudo_ept::shadow::ShadowError),
    /// VMPTRLD failed.
    #[cfg(feature = "vmx")]
    #[error("a VMCS cannot be made current: {0}")]
    Vmptrld(testudo_vmx::VmFail),
    /// The guest has given the memory back in which its own guest, that runs, has its local APIC.
    #[cfg(feature = "vmx")]
    #[error("a nested guest runs with its local APIC in memory that is the guest's no more")]
    LostApicPage,
    /// INVEPT or INVVPID failed.
    #[cfg(feature = "vmx")]
    #[error("cached translations cannot be dropped: {0}")]
    Invalidation(testudo_vmx::VmFail),
}

/// Nested state that a vCPU does not take up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NestedStateError {
    /// The vCPU is not a hypervisor's.
    #[error("this vCPU has no nested virtualization")]
    Unsupported,
    /// The nested layer for AMD-V refuses it.
    #[cfg(feature = "svm")]
    #[error(transparent)]
    Svm(#[from] testudo_nested::svm::RestoreError),
    /// The nested layer for VT-x refuses it.
    #[cfg(feature = "vmx")]
    #[error(transparent)]
    Vmx(#[from] testudo_nested::vmx::RestoreError),
    /// The backend failed.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// What an INIT does to a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitSignal {
    /// The processor begins anew ([`Vcpu::reset`]).
    Resets,
    /// It waits: the guest is in VMX operation as a hypervisor, or has GIF clear, or is to be told of it
    /// by an exit first.
    Waits,
    /// It has ended the turn of a guest of the guest's, and nothing else.
    Exits,
    /// It has become an exception of whoever runs.
    Redirected,
}

/// A virtual processor.
///
/// A vCPU belongs to one thread or processor. `run` enters the guest; everything else reads or
/// changes the state that the next entry takes up.
pub trait Vcpu {
    /// Enters the guest until an exit that the machine must decide.
    ///
    /// When `requests` is not zero, or becomes so together with a kick, the result is
    /// [`VmExit::Interrupted`]; no request is ever missed between the test and the entry.
    fn run(&mut self, requests: &AtomicU32) -> Result<VmExit, VcpuError>;

    /// The general registers. RSP is up to date after [`load_rsp`](Self::load_rsp).
    fn gprs(&self) -> &Gprs;

    /// The general registers, to be changed. RSP is among them, and to be loaded before it is set.
    fn gprs_mut(&mut self) -> &mut Gprs;

    /// Brings RSP into the general registers, on processors that keep it elsewhere and where few
    /// exits need it.
    fn load_rsp(&mut self) {}

    /// The instruction pointer.
    fn rip(&self) -> u64;

    /// Moves the instruction pointer, and ends an interrupt shadow as a completed instruction does.
    fn set_rip(&mut self, rip: u64);

    /// The whole of the system registers.
    fn system(&self) -> SystemRegisters;

    /// Sets the whole of the system registers.
    fn set_system(&mut self, system: &SystemRegisters);

    /// The state after RESET or INIT, nested virtualization included.
    fn reset(&mut self) {
        *self.gprs_mut() = Gprs::default();
        self.set_system(&SystemRegisters::reset());
    }

    /// What an INIT that was sent to the vCPU does now. One that waits is asked about again when
    /// something has happened.
    fn init_signal(&mut self) -> InitSignal {
        InitSignal::Resets
    }

    /// Ends the exiting instruction (CPUID, RDMSR, HLT, …): RIP past it, interrupt shadow over.
    ///
    /// The length comes from the processor where it says, and from the instruction's bytes where
    /// not.
    fn advance(&mut self);

    /// Answers a [`VmExit::Mmio`] read of a backend that takes accesses apart itself.
    fn complete_read(&mut self, data: u64);

    /// Whether an external interrupt would be delivered at the next entry: RFLAGS.IF set, no
    /// shadow, and no event waiting already.
    fn can_take_interrupt(&self) -> bool;

    /// Whether an NMI would be delivered at the next entry.
    fn can_take_nmi(&self) -> bool;

    /// Has the event delivered at the next entry. An event that an exit interrupted is delivered
    /// again by the backend itself and comes first.
    fn inject(&mut self, event: Event);

    /// Raises the #DB of a single step, after an instruction that was emulated with RFLAGS.TF set: DR6
    /// says BS.
    fn single_step(&mut self);

    /// Asks for [`VmExit::InterruptWindow`] as soon as the guest can take an interrupt of this
    /// kind, or stops asking. A vector needs none where the processor [delivers](Self::delivers_interrupts)
    /// it as soon as that.
    fn set_interrupt_window(&mut self, wanted: Option<AwaitedInterrupt>);

    /// Says whether an NMI waits for [`can_take_nmi`](Self::can_take_nmi) to become true.
    fn set_nmi_window(&mut self, _wanted: bool) {}

    /// Whether the processor, at present, delivers the interrupts that are requested in the page of the
    /// local APIC's registers by itself, and takes their ends. It hears of changes by
    /// [`set_apic`](Self::set_apic).
    fn delivers_interrupts(&self) -> bool {
        false
    }

    /// Whether it does so at some times, if not at present: then it hears of changes at all times.
    fn virtualizes_apic(&self) -> bool {
        self.delivers_interrupts()
    }

    /// Takes an interrupt that the local APIC has acknowledged, if it only notifies the guest's guest, which runs, of
    /// interrupts that are posted to it: the local APIC is to be told of its end. The inner value says that these
    /// end a halt.
    fn take_notification(&mut self, vector: u8) -> Option<bool> {
        let _ = vector;
        None
    }

    /// Tells a processor that [virtualizes the local APIC](Self::virtualizes_apic) what it must know of it
    /// besides the page.
    fn set_apic(&mut self, _state: &ApicState) {}

    /// How many exits the backend settled by itself, if it counts them.
    fn settled(&self) -> Option<Settled> {
        None
    }

    /// All that the vCPU has of a nested guest, as bytes in a versioned format: with it the guest's
    /// own guest goes on in another vCPU that has the same registers otherwise. `None` without
    /// nested virtualization.
    ///
    /// # Errors
    ///
    /// The backend failed.
    fn save_nested(&mut self) -> Result<Option<Vec<u8>>, VcpuError> {
        Ok(None)
    }

    /// Takes such state up in place of what there is; says whether the guest's own guest runs by it.
    /// Windows are to be asked for again. After an error the guest must not run before another attempt
    /// succeeds.
    ///
    /// # Errors
    ///
    /// The state is one that this vCPU cannot have been in, or the backend failed.
    fn restore_nested(&mut self, _state: &[u8]) -> Result<bool, NestedStateError> {
        Err(NestedStateError::Unsupported)
    }

    /// Whether an event has ended the turn of a guest of the guest's since the last call: if that
    /// one had halted, the guest runs all the same.
    fn take_interrupted(&mut self) -> bool {
        false
    }

    /// Whether it is a guest of the guest's that runs. Nothing that it does may end the machine, with
    /// the guest in it.
    fn runs_nested_guest(&self) -> bool {
        false
    }

    /// Where a guest-physical address of what runs lies in the machine: itself, unless a guest of
    /// the guest's runs on nested paging. `None` if it has no translation at present, so that the
    /// instruction is to be tried again.
    fn translate(&mut self, gpa: Gpa, _access: &StageAccess) -> Option<Gpa> {
        Some(gpa)
    }

    /// What [`translate`](Self::translate) had no translation for ends the turn of the guest's guest, if its
    /// hypervisor's tables do not allow it.
    fn settle_refusal(&mut self) {}

    /// Has [`run`](Self::run) end with [`VmExit::Interrupted`] soon after the host's time-stamp counter
    /// has reached `tsc`; `None` takes that back. False from a vCPU that needs the host's timer for
    /// it.
    fn set_deadline(&mut self, _tsc: Option<u64>) -> bool {
        false
    }

    /// Sets the segment registers and descriptor tables alone, on a backend that reports
    /// [`VmExit::Emulate`].
    fn set_segments(&mut self, _system: &SystemRegisters) {}

    /// The emulated instruction that has just ended holds interrupts back for one more, on a backend
    /// that reports [`VmExit::Emulate`].
    fn begin_interrupt_shadow(&mut self) {}

    /// Says that the machine has written guest memory for an instruction of the guest's: it may
    /// have been a table that the backend follows.
    fn memory_written(&mut self, _gpa: Gpa, _len: usize) {}

    /// The instruction that writes at this address cannot be emulated: lets the guest execute it, if
    /// nothing but the backend's own watch keeps it from that. `false` if something else does.
    fn stop_watching(&mut self, _gpa: Gpa) -> bool {
        false
    }

    /// Writes CR0, CR3 or CR4 as the guest's own instruction would, on a backend that intercepts
    /// that; `false` is #GP(0).
    fn set_control_register(&mut self, _number: u8, _value: u64) -> bool {
        false
    }

    /// INVLPG, on a backend that intercepts it.
    fn invalidate_page(&mut self, _address: Gva) {}

    /// Has the processor forget all translations of guest-physical addresses, those for guests of
    /// the guest's included, before the guest runs again: memory was taken away. Others may get
    /// that memory on the strength of this.
    ///
    /// # Errors
    ///
    /// The processor refuses: the guest must not run again.
    fn forget_memory(&mut self) -> Result<(), VcpuError>;

    /// CR8 as the guest left it: the task priority, 0 to 15.
    fn task_priority(&self) -> u8;

    /// Sets CR8, when the guest wrote its local APIC's task priority instead.
    fn set_task_priority(&mut self, cr8: u8);

    /// Runs `work` with the processor as the host's own code wants it, interrupts possible: for
    /// waiting, and for work that may take long.
    fn outside<R>(&mut self, work: impl FnOnce() -> R) -> R {
        work()
    }

    /// Raises a fault of an instruction that was executed by software; `cr2` is the address of a page
    /// fault. A fault meets the event whose delivery the exit interrupted, if there is one, as it would
    /// on a processor; and a guest of the guest's exits by one that its hypervisor intercepts. Gives what
    /// the machine must decide about it: [`VmExit::Shutdown`].
    fn raise(&mut self, fault: Event, cr2: Option<u64>) -> Option<VmExit> {
        if let Some(address) = cr2 {
            self.set_cr2(address);
        }
        self.inject(fault);
        None
    }

    /// Reads an MSR that is part of the processor's own state (EFER, STAR, FS base, …); `None`
    /// for all others, which are the machine's to decide.
    fn read_msr(&mut self, msr: Msr) -> Option<u64>;

    /// Writes such an MSR: `None` for all others, `Some(false)` when the value is invalid and the
    /// guest gets #GP.
    fn write_msr(&mut self, msr: Msr, value: u64) -> Option<bool>;

    /// Sets an extended control register; `false` when the value is invalid.
    fn set_xcr(&mut self, index: u32, value: u64) -> bool;

    /// XCR0.
    fn xcr0(&self) -> u64;

    /// PKRU: the rights of protection keys, zero on a processor without them.
    fn pkru(&self) -> u32;

    /// CR4 alone, which CPUID mirrors.
    fn cr4(&self) -> u64;

    /// The current privilege level alone.
    fn cpl(&self) -> u8;

    /// Sets CR2 alone, before a page fault is injected.
    fn set_cr2(&mut self, cr2: u64);

    /// Sets RFLAGS alone.
    fn set_rflags(&mut self, rflags: u64);

    /// An XMM register by its number, for emulated instructions; `None` above 15.
    fn xmm(&self, number: u8) -> Option<u128>;

    /// Sets an XMM register (numbers above 15 are ignored); the rest of the vector register stays.
    fn set_xmm(&mut self, number: u8, value: u128);

    /// What the guest's TSC reads when the host's reads `host_tsc`.
    fn guest_tsc(&self, host_tsc: u64) -> u64;

    /// Makes the guest's TSC read `guest_tsc` when the host's reads `host_tsc`.
    fn set_guest_tsc(&mut self, host_tsc: u64, guest_tsc: u64);
}
