//! One processor's GDT, task-state segment and interrupt stacks.
//!
//! The compiled core library uses the red zone below the stack pointer, so every vector switches to a
//! stack of its own (IST). Vectors that can arrive in the middle of another's handler have their own:
//! NMI, double fault and machine check may interrupt the handlers of the rest; exceptions may happen
//! in interrupt handlers.

use core::mem::MaybeUninit;

use x86_64::VirtAddr;
use x86_64::instructions::tables::load_tss;
use x86_64::registers::segmentation::{CS, DS, ES, FS, GS, SS, Segment};
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::tss::TaskStateSegment;

/// Interrupt stacks; the number in the IDT is one more than the index.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum Stack {
    Interrupt,
    Exception,
    Nmi,
    DoubleFault,
    MachineCheck,
}

const STACKS: usize = 5;
const STACK_SIZE: usize = 16 << 10;

#[repr(C, align(16))]
struct StackMemory([u8; STACK_SIZE]);

/// See the module.
pub(super) struct Segments {
    gdt: MaybeUninit<GlobalDescriptorTable>,
    tss: MaybeUninit<TaskStateSegment>,
    stacks: [StackMemory; STACKS],
}

impl Segments {
    pub(super) const fn new() -> Self {
        Self {
            gdt: MaybeUninit::uninit(),
            tss: MaybeUninit::uninit(),
            stacks: [const { StackMemory([0; STACK_SIZE]) }; STACKS],
        }
    }

    /// Fills the tables in and has the processor use them.
    ///
    /// # Safety
    /// On the processor that these belong to, once.
    pub(super) unsafe fn load(&'static mut self) {
        let tss = self.tss.write(TaskStateSegment::new());
        for (index, stack) in self.stacks.iter().enumerate() {
            let top = core::ptr::from_ref(stack) as u64 + STACK_SIZE as u64;
            tss.interrupt_stack_table[index] = VirtAddr::new(top);
        }
        let gdt = self.gdt.write(GlobalDescriptorTable::new());
        let code = gdt.append(Descriptor::kernel_code_segment());
        let data = gdt.append(Descriptor::kernel_data_segment());
        let task = gdt.append(Descriptor::tss_segment(tss));
        gdt.load();
        // SAFETY: the selectors are those of the table just loaded, which is never dropped or changed;
        // flat segments change no address.
        unsafe {
            CS::set_reg(code);
            SS::set_reg(data);
            DS::set_reg(data);
            ES::set_reg(data);
            FS::set_reg(SegmentSelector::NULL);
            GS::set_reg(SegmentSelector::NULL);
            load_tss(task);
        }
    }
}
