//! A processor that is none: it exits by script, and at every entry the validator decides.

use super::*;

pub(super) type Script = Box<dyn FnOnce(&mut FakeVmcs, &mut GuestRegisters)>;

/// A processor that exits as the script says.
pub(super) struct FakeProcessor {
    /// The VMCS that is current, whose it is, and the others.
    pub(super) vmcs: FakeVmcs,
    pub(super) level: Level,
    pub(super) others: [FakeVmcs; 3],
    pub(super) has_shadow: bool,
    pub(super) caps: VmxCaps,
    pub(super) exits: VecDeque<Script>,
    /// VMREADs and VMWRITEs between the last exit and each entry.
    pub(super) costs: Vec<(usize, usize)>,
    /// The interruption information of each entry.
    pub(super) injected: Vec<u32>,
    pub(super) nmis: u32,
    pub(super) machine_checks: u32,
    pub(super) interrupts: u32,
    /// So many entries fail, for something in memory that they check.
    pub(super) refuses: u32,
    pub(super) flushes: u32,
    pub(super) dr6: u64,
    pub(super) xcr0: u64,
    pub(super) tsc: u64,
}

impl FakeProcessor {
    pub(super) fn new(caps: &VmxCaps) -> Self {
        let mut vmcs = FakeVmcs::with_caps(caps);
        let model = samples::valid(caps);
        for field in fields::FIELDS {
            if field.encoding.area() == Area::Host {
                vmcs.preset(field.encoding, model.read_raw(field.encoding).unwrap());
            }
        }
        Self {
            others: core::array::from_fn(|_| vmcs.clone()),
            has_shadow: false,
            vmcs,
            level: Level::L1,
            caps: caps.clone(),
            exits: VecDeque::new(),
            costs: Vec::new(),
            injected: Vec::new(),
            nmis: 0,
            machine_checks: 0,
            interrupts: 0,
            refuses: 0,
            flushes: 0,
            dr6: 0,
            xcr0: 1,
            tsc: 0,
        }
    }
}

impl VmcsRead for FakeProcessor {
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail> {
        self.vmcs.read_raw(field)
    }
}

impl VmcsWrite for FakeProcessor {
    fn write_raw(&mut self, field: Encoding, value: u64) -> Result<(), VmFail> {
        self.vmcs.write_raw(field, value)
    }
}

/// A processor that keeps no MSRs of the guest's.
pub(super) struct NoMsrs;

impl Msrs for NoMsrs {
    fn read(&mut self, _: Msr) -> Option<u64> {
        None
    }

    fn write(&mut self, _: Msr, _: u64) -> bool {
        false
    }
}

#[allow(unsafe_code, reason = "the trait's, without hardware")]
impl Processor for FakeProcessor {
    unsafe fn enter(&mut self, registers: &mut GuestRegisters) -> Result<(), VmFail> {
        self.costs.push(self.vmcs.counts());
        self.vmcs.clear_trace();
        let violations = check_entry(self.vmcs.image(), &self.caps).unwrap();
        let refused = self.refuses > 0;
        self.refuses = self.refuses.saturating_sub(1);
        if refused || !violations.is_empty() {
            return Err(VmFail::Valid(InstructionError::InvalidControlField));
        }
        let information = fields::ENTRY_INTERRUPTION_INFORMATION;
        let injected = self.vmcs.image().get(information).unwrap();
        self.injected.push(injected);
        // "Bit 31 is cleared on every VM exit" (SDM vol. 3C, 27.8.3).
        self.vmcs
            .preset(information, u64::from(injected & 0x7FFF_FFFF));
        self.vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0);
        let script = self.exits.pop_front().expect("an exit is scripted");
        script(&mut self.vmcs, registers);
        Ok(())
    }

    fn take_pending(&mut self) {
        self.interrupts += 1;
    }

    fn take_nmi(&mut self) {
        self.nmis += 1;
    }

    fn take_machine_check(&mut self) {
        self.machine_checks += 1;
    }

    fn forget_translations(&mut self, _: Level) -> Result<(), VmFail> {
        self.flushes += 1;
        Ok(())
    }

    fn forget_ept(&mut self) -> Result<(), VmFail> {
        self.flushes += 1;
        Ok(())
    }

    type GuestMsrs = NoMsrs;

    fn guest_msrs(&self) -> NoMsrs {
        NoMsrs
    }

    fn select(&mut self, level: Level) -> Result<(), VmFail> {
        let (from, to) = (self.level as usize, level as usize);
        core::mem::swap(&mut self.vmcs, &mut self.others[from]);
        core::mem::swap(&mut self.vmcs, &mut self.others[to]);
        self.level = level;
        Ok(())
    }

    fn has_shadow(&self) -> bool {
        self.has_shadow
    }

    unsafe fn set_xcr0(&mut self, value: u64) {
        self.xcr0 = value;
    }

    unsafe fn pkru(&self) -> u32 {
        0x55
    }

    fn tsc(&self) -> u64 {
        self.tsc
    }

    fn dr6(&self) -> u64 {
        self.dr6
    }

    fn set_dr6(&mut self, value: u64) {
        self.dr6 = value;
    }
}

pub(super) type Fake = VmxVcpu<'static, FakeProcessor, GuestRam>;

/// Where a vCPU's tables would be, if a processor looked.
pub(super) fn tables_with(apic: Option<ApicTables>) -> VmxTables {
    VmxTables {
        ept_pointer: 0x1000 | 3 << 3 | 6,
        msr_bitmap: Hpa(0x2000),
        apic,
    }
}

/// What a vCPU on nested paging is made of.
pub(super) fn parts<'a>(
    caps: &'a VmxCaps,
    controls: &'a Controls,
    tables: &'a VmxTables,
) -> Parts<'a> {
    Parts {
        caps,
        controls,
        tables,
        apic_page: (Box::leak(Box::default()), Hpa(0x3000)),
        vpid: 1,
        xcr0_valid: 7,
        shadow: None,
        gate: None,
        switched: None,
    }
}

pub(super) fn vcpu_on(caps: &VmxCaps) -> Fake {
    let caps: &'static VmxCaps = Box::leak(Box::new(caps.clone()));
    let controls = Box::leak(Box::new(Controls::choose(caps).unwrap()));
    let tables = Box::leak(Box::new(tables_with(None)));
    let parts = parts(caps, controls, tables);
    let memory = Box::leak(Box::new(ram(0x2000)));
    VmxVcpu::on(FakeProcessor::new(caps), &parts, memory).unwrap()
}

pub(super) fn vcpu() -> Fake {
    vcpu_on(&fixtures::skylake_sp())
}

impl<S: SecondStage> VmxVcpu<'static, FakeProcessor, GuestRam, S> {
    pub(super) fn will(
        &mut self,
        script: impl FnOnce(&mut FakeVmcs, &mut GuestRegisters) + 'static,
    ) {
        self.processor.exits.push_back(Box::new(script));
    }

    /// Scripts an exit by an instruction of two bytes.
    pub(super) fn will_exit(&mut self, reason: BasicReason, qualification: u64) {
        self.will(move |vmcs, _| exit(vmcs, reason, qualification));
    }

    pub(super) fn enter_once(&mut self) -> VmExit {
        self.run(&AtomicU32::new(0)).unwrap()
    }

    /// Runs until the scripted exits are used up; the last leads to an interrupt of the host.
    pub(super) fn run_out(&mut self) {
        self.will_exit(BasicReason::ExternalInterrupt, 0);
        assert_eq!(self.enter_once(), VmExit::Interrupted);
    }

    pub(super) fn cost(&self) -> (usize, usize) {
        *self.processor.costs.last().unwrap()
    }

    pub(super) fn last_injected(&self) -> u32 {
        *self.processor.injected.last().unwrap()
    }

    pub(super) fn hardware<W: encoding::Width>(&self, field: Field<W>) -> W::Value {
        self.processor.vmcs.image().get(field).unwrap()
    }

    /// The guest executes MOV to a control register.
    pub(super) fn guest_moves_to(&mut self, register: u8, value: u64) {
        self.will(move |vmcs, registers| {
            registers.gprs.rbx = value;
            exit(
                vmcs,
                BasicReason::ControlRegister,
                u64::from(register) | 3 << 8,
            );
        });
        self.run_out();
    }

    /// From reset to 64-bit mode, as kernels do it.
    pub(super) fn guest_enters_long_mode(&mut self) {
        self.guest_moves_to(4, 0x20);
        assert_eq!(self.write_msr(Msr::EFER, LME), Some(true));
        self.guest_moves_to(0, 0x8000_0011);
        assert_eq!(self.system().efer, LME | LMA);
        // The far jump.
        self.will(|vmcs, _| {
            vmcs.preset(fields::GUEST_CS_ACCESS_RIGHTS, 0xA09B);
            exit(vmcs, BasicReason::Cpuid, 0);
        });
        assert_eq!(self.enter_once(), VmExit::Cpuid);
    }
}

pub(super) fn exit(vmcs: &mut FakeVmcs, reason: BasicReason, qualification: u64) {
    vmcs.preset(fields::EXIT_REASON, reason.number().into());
    vmcs.preset(fields::EXIT_QUALIFICATION, qualification);
    vmcs.preset(fields::EXIT_INSTRUCTION_LENGTH, 2);
}

pub(super) fn exception(vmcs: &mut FakeVmcs, information: u32, qualification: u64) {
    exit(vmcs, BasicReason::ExceptionOrNmi, qualification);
    vmcs.preset(fields::EXIT_INTERRUPTION_INFORMATION, information.into());
}
