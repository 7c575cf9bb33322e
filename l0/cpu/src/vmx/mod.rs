//! Virtual-machine extensions as this processor's hardware: one level. It executes under loaded [`Controls`] with a
//! loaded second level of translation, and exits to its owner with [`VmExit`]. What a VMCS means to whom, and nesting,
//! are the owner's.
//!
//! Three operations ([`Operation`]):
//! - `Off`: VMX instructions are #UD, but for VMXON.
//! - `Root`: a hypervisor runs. VMREAD and VMWRITE work on [`Vmx::current`]; every other VMX instruction, once its own
//!   checks have passed and its operands are read, returns [`crate::Exit::Vm`] with RIP at it; the owner completes it
//!   ([`crate::Cpu::complete_instruction`]), or injects an exception.
//! - `NonRoot`: its guest runs, under [`Vmx::controls`]. Whatever the controls ask for returns [`crate::Exit::Vm`] with
//!   the registers as the SDM has them saved. The owner enters and leaves by setting `state` and calling
//!   [`crate::Cpu::enter_non_root`] and [`crate::Cpu::leave_non_root`].
//!
//! Who causes exits: `instructions` (asked by the handlers once the faults that come first are out of the way; the VMX
//! instructions themselves are in `interp/vmx`), `events` (between instructions, exceptions, and whatever interrupts a
//! delivery; also how an exit leaves RF, shadows and pending debug exceptions), `ept` and `apic`. None of them costs
//! anything where VMX is not in use: only handlers of the rare instructions and the run loop's slow path ask.
//!
//! An event that the owner gives back is [`crate::state::CpuState::injected`]; a fault for the instruction at RIP is
//! [`crate::Cpu::inject_fault`]. The VMX-preemption timer's deadline is looked at on entry and when the owner raises
//! [`crate::attention::Attention::PREEMPTION`], which it does once the TSC has reached it.

mod apic;
mod ept;
mod events;
pub(crate) mod information;
pub(crate) mod instructions;
mod owner;

use std::any::Any;

use vmcs_shadow::Vmcs;
use vmcs_shadow::access::Access;

use crate::phys::PhysMemory;
use crate::trap::{Fault, Trap};
use crate::{Cpu, Exit};

/// What the processor is doing as far as VMX goes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Operation {
    /// Outside VMX operation.
    #[default]
    Off,
    Root,
    NonRoot,
}

/// The VMX side of a vCPU.
#[derive(Default)]
pub struct Vmx {
    pub operation: Operation,
    /// Which fields VMREAD and VMWRITE know.
    pub access: Access,
    /// The VMCS that VMREAD and VMWRITE reach without an exit: in root operation the current one, in non-root
    /// operation with VMCS shadowing the one of the link pointer.
    pub current: Option<Box<Vmcs>>,
    /// The current-VMCS pointer, for VMPTRST; all ones is none.
    pub current_pointer: u64,
    /// In force in non-root operation.
    pub controls: Controls,
    /// The extended page tables; used in non-root operation with [`Controls::ept`].
    pub second_level: Option<Box<dyn SecondLevel>>,
    /// Details of the last [`crate::Exit::Vm`].
    pub exit: VmExit,
    /// The last VMREAD or VMWRITE that failed: for explanations.
    pub failed_access: Option<FailedAccess>,
    /// The last PAUSEs, since the last VM entry.
    pub(crate) pause_loop: Option<instructions::PauseLoop>,
    pub(crate) apic: apic::VirtualApic,
    /// Compare the VMX-preemption timer's deadline with the TSC before the next instruction.
    pub(crate) check_timer: bool,
    /// A fault for RIP, from the owner.
    pub(crate) raised: Option<Fault>,
}

/// A VMREAD or VMWRITE that failed with a VM-instruction error.
#[derive(Clone, Copy, Debug)]
pub struct FailedAccess {
    /// Exit reason that stands for the instruction.
    pub reason: u32,
    pub encoding: u64,
    pub error: u32,
    /// Start of the block of instructions that it is in.
    pub rip: u64,
}

impl Vmx {
    /// Guest-physical addresses go through [`Vmx::second_level`].
    #[inline(always)]
    pub fn nested_paging(&self) -> bool {
        self.operation == Operation::NonRoot && self.controls.ept()
    }

    /// What names translations besides the PCID: virtual processor and EPT pointer.
    pub(crate) fn space(&self) -> (u32, u64) {
        match self.operation {
            Operation::NonRoot => {
                let eptp = if self.controls.ept() { self.controls.ept_pointer & EP4TA } else { 0 };
                (self.controls.vpid_tag, eptp)
            }
            Operation::Off | Operation::Root => (0, 0),
        }
    }
}

impl Vmx {
    /// What, besides the EPT pointer's address, decides what the second level allows.
    pub(crate) fn second_level_modes(&self) -> u32 {
        if !self.nested_paging() {
            return 0;
        }
        let mode_based = self.controls.secondary & x86defs::vmx::secondary::MODE_BASED_EXECUTE;
        mode_based | u32::from(self.controls.ept_flags())
    }
}

/// Bits of an EPT pointer that hold the address of the root table, which translations are tagged with.
pub const EP4TA: u64 = 0x000f_ffff_ffff_f000;

/// The VM-execution controls in force, with addresses that are physical to this processor. Fields that their control
/// bits do not use are meaningless.
#[derive(Clone, Debug, Default)]
pub struct Controls {
    /// Pin-based controls.
    pub pin: u32,
    /// Primary and (0 unless activated) secondary processor-based controls.
    pub primary: u32,
    pub secondary: u32,
    /// VM-exit controls (acknowledge interrupt on exit).
    pub exit: u32,
    pub exception_bitmap: u32,
    pub page_fault_mask: u32,
    pub page_fault_match: u32,
    pub cr0_mask: u64,
    pub cr0_shadow: u64,
    pub cr4_mask: u64,
    pub cr4_shadow: u64,
    /// The CR3-target values in use: the first `cr3_target_count`.
    pub cr3_targets: [u64; 4],
    pub cr3_target_count: u32,
    /// Bitmaps A and B.
    pub io_bitmaps: [u64; 2],
    pub msr_bitmap: u64,
    pub vmread_bitmap: u64,
    pub vmwrite_bitmap: u64,
    pub xss_exiting_bitmap: u64,
    /// Added to the TSC after it is multiplied by `tsc_multiplier` / 2^48.
    pub tsc_offset: u64,
    /// 1 << 48 unless TSC scaling is in use.
    pub tsc_multiplier: u64,
    pub apic_access_page: u64,
    pub virtual_apic_page: u64,
    pub tpr_threshold: u32,
    pub eoi_exit_bitmap: [u64; 4],
    /// Guest interrupt status: RVI in the low byte, SVI in the high byte. Live.
    pub interrupt_status: u16,
    pub posted_interrupt_vector: u8,
    pub posted_interrupt_descriptor: u64,
    /// EPT pointer in force (VMFUNC may change it). Live.
    pub ept_pointer: u64,
    /// Names the translations of this guest; never 0, which are the translations of root operation.
    pub vpid_tag: u32,
    pub ple_gap: u32,
    pub ple_window: u32,
    pub vm_function_controls: u64,
    pub eptp_list: u64,
    /// EPTP index, for #VE. Live.
    pub eptp_index: u16,
    pub ve_information: u64,
    /// TSC (of the hypervisor, not scaled or offset) at which the VMX-preemption timer runs out.
    pub preemption_deadline: u64,
    /// An MTF VM exit is pending at entry (injected event of type 7).
    pub pending_mtf: bool,
}

impl Controls {
    /// Some of these pin-based controls are set.
    #[inline(always)]
    pub fn has_pin(&self, bits: u32) -> bool {
        self.pin & bits != 0
    }

    /// Some of these primary controls are set.
    #[inline(always)]
    pub fn has_primary(&self, bits: u32) -> bool {
        self.primary & bits != 0
    }

    /// Some of these secondary controls are set.
    #[inline(always)]
    pub fn has_secondary(&self, bits: u32) -> bool {
        self.secondary & bits != 0
    }

    /// Accessed and dirty flags for EPT are in use.
    pub fn ept_flags(&self) -> bool {
        self.ept_pointer & 1 << 6 != 0
    }

    /// Extended page tables are in use.
    #[inline(always)]
    pub fn ept(&self) -> bool {
        self.has_secondary(x86defs::vmx::secondary::ENABLE_EPT)
    }
}

/// Why non-root operation ended, or which VMX instruction root operation executes: the VM-exit information fields.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct VmExit {
    /// Basic exit reason ([`x86defs::vmx::reason`]).
    pub reason: u32,
    pub qualification: u64,
    /// Set for every exit that an instruction causes.
    pub instruction_length: u32,
    pub instruction_information: u32,
    /// VM-exit interruption information and error code.
    pub interruption: u32,
    pub interruption_error: u32,
    /// IDT-vectoring information and error code.
    pub idt_vectoring: u32,
    pub idt_vectoring_error: u32,
    pub guest_linear: u64,
    pub guest_physical: u64,
    /// VMX instructions in root operation: the value of the source operand (a pointer, the type of INVEPT and INVVPID),
    /// and the descriptor of INVEPT and INVVPID.
    pub operand: u64,
    pub descriptor: [u64; 2],
}

/// What an access asks of the second level.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct EptAccess {
    pub read: bool,
    pub write: bool,
    pub fetch: bool,
    /// The linear address is a user-mode address (mode-based execute control).
    pub user: bool,
    /// The access is to a guest paging-structure entry: with accessed and dirty flags it counts as a write.
    pub paging: bool,
}

/// Where a guest-physical page is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct EptPage {
    /// Physical address of the 4-KiB page.
    pub physical: u64,
    /// Part of a page larger than 4 KiB.
    pub large: bool,
    /// Writes need no further look: they are allowed, and the dirty flag (if in use) is set.
    pub write: bool,
    pub execute_supervisor: bool,
    pub execute_user: bool,
}

/// Why the second level refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EptFault {
    Violation {
        /// Bits 6:3 of the exit qualification: what the entries allow.
        allowed: u64,
        /// The entry asks for a VM exit rather than #VE.
        suppress_ve: bool,
    },
    Misconfiguration,
    /// The page-modification log has no room; nothing was done.
    LogFull,
}

/// The second level of address translation, as the owner built it. One processor's own: it may cache what it walked
/// until the owner invalidates it.
pub trait SecondLevel: Send {
    /// Translates and sets accessed and dirty flags.
    fn translate(&mut self, memory: &PhysMemory, gpa: u64, access: EptAccess) -> Result<EptPage, EptFault>;
    /// Physical address of `gpa` if something maps it, whatever the permissions, changing nothing.
    fn peek(&self, memory: &PhysMemory, gpa: u64) -> Option<u64>;
    /// Makes `pointer` the EPT pointer (VMFUNC leaf 0); false if VM entry would refuse it.
    fn set_root(&mut self, pointer: u64) -> bool;
    /// The owner's own type.
    fn as_any(&mut self) -> &mut dyn Any;
}

impl Cpu {
    /// Ends non-root operation, or hands a VMX instruction of root operation to the owner. Whatever else the exit
    /// information has, the caller adds to [`Vmx::exit`].
    #[cold]
    pub(crate) fn vm_exit(&mut self, reason: u32, qualification: u64) -> Trap {
        self.vmx.exit = VmExit { reason, qualification, ..VmExit::default() };
        self.vmx.apic.forget_operation();
        self.exit = Exit::Vm;
        Trap::Exit
    }
}
