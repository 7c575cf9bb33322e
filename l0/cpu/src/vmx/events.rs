//! Events in non-root operation: which are due between instructions and in which order, which cause VM exits instead of
//! being delivered, and what a VM exit in the middle of a delivery tells ("Other Causes of VM Exits", "Recording VM-Exit
//! Information", "Saving Guest State").

use x86defs::vmx::{ept_qualification, event, exit_ctl, pending_debug, pin, primary, reason};
use x86defs::{dr, rflags, vector};

use crate::Cpu;
use crate::attention::Attention;
use crate::exec::Due;
use crate::state::{Activity, Event, EventKind, Shadow};
use crate::trap::{Exec, Fault, Trap};

impl EventKind {
    /// The type in interruption information.
    fn number(self) -> u32 {
        match self {
            Self::ExternalInterrupt => event::EXTERNAL_INTERRUPT,
            Self::Nmi => event::NMI,
            Self::HardwareException => event::HARDWARE_EXCEPTION,
            Self::SoftwareInterrupt => event::SOFTWARE_INTERRUPT,
            Self::PrivilegedSoftwareException => event::PRIVILEGED_SOFTWARE_EXCEPTION,
            Self::SoftwareException => event::SOFTWARE_EXCEPTION,
        }
    }

    /// Raised by an instruction whose length the exit information tells.
    pub(crate) fn has_length(self) -> bool {
        matches!(self, Self::SoftwareInterrupt | Self::PrivilegedSoftwareException | Self::SoftwareException)
    }
}

/// Interruption information of a vector and type.
fn information(vector: u8, kind: EventKind) -> u32 {
    event::VALID | kind.number() << event::TYPE_SHIFT | u32::from(vector)
}

/// What the debug exception's exit qualification tells of DR6.
const DEBUG_QUALIFICATION: u64 = pending_debug::B0_B3 | dr::DR6_BD | dr::DR6_BS;

/// What comes between instructions.
impl Cpu {
    /// In non-root operation with one of these pin-based controls.
    pub(crate) fn under_pin(&self, bits: u32) -> bool {
        self.non_root() && self.vmx.controls.has_pin(bits)
    }

    /// What is due before the next instruction, in the order of "Priority Among Concurrent Events" and of the sections on
    /// each VM exit.
    pub(crate) fn due_in_non_root(&mut self, attention: u32) -> Due {
        let activity = self.state.activity;
        if self.state.injected.is_some() {
            return Due::Injected;
        }
        if self.vmx.raised.is_some() {
            return Due::Raised;
        }
        if activity == Activity::WaitForSipi {
            return Due::Nothing;
        }
        let shutdown = activity == Activity::Shutdown;
        if self.vmx.controls.pending_mtf && !shutdown {
            return Due::Exit(reason::MONITOR_TRAP_FLAG);
        }
        if self.state.pending_debug != 0 && self.state.shadow != Shadow::MovSs && !shutdown {
            return Due::Debug;
        }
        if self.preemption_timer_expired(attention) {
            return Due::Exit(reason::PREEMPTION_TIMER);
        }
        let open = self.state.shadow == Shadow::None;
        let c = &self.vmx.controls;
        if c.has_primary(primary::NMI_WINDOW_EXITING) && open && !self.state.nmi_blocked {
            return Due::Exit(reason::NMI_WINDOW);
        }
        // With virtual NMIs the blocking is that of virtual NMIs.
        let nmi_blocked = self.state.nmi_blocked && !c.has_pin(pin::VIRTUAL_NMIS);
        if attention & Attention::NMI != 0 && open && !nmi_blocked {
            return Due::Nmi;
        }
        if !open || shutdown {
            return Due::Nothing;
        }
        let enabled = self.state.system_flag(rflags::IF);
        let exiting = c.has_pin(pin::EXTERNAL_INTERRUPT_EXITING);
        if enabled && c.has_primary(primary::INTERRUPT_WINDOW_EXITING) {
            return Due::Exit(reason::INTERRUPT_WINDOW);
        }
        if enabled && self.virtual_interrupt_pending() {
            return Due::VirtualInterrupt;
        }
        if enabled && !exiting && self.want_interrupt_window {
            return Due::Window;
        }
        let interrupt = attention & Attention::INTERRUPT != 0 && (enabled || exiting);
        if interrupt { Due::Interrupt } else { Due::Nothing }
    }

    /// The VMX-preemption timer has counted down. Its deadline is looked at on VM entry and whenever the owner asks.
    fn preemption_timer_expired(&mut self, attention: u32) -> bool {
        if !self.under_pin(pin::PREEMPTION_TIMER) {
            return false;
        }
        if attention & Attention::PREEMPTION == 0 && !self.vmx.check_timer {
            return false;
        }
        let expired = self.root_tsc() >= self.vmx.controls.preemption_deadline;
        if !expired {
            self.attention.clear(Attention::PREEMPTION);
        }
        self.vmx.check_timer = expired;
        expired
    }

    /// A VM exit that is due between instructions.
    pub(crate) fn exit_between_instructions(&mut self, reason: u32) -> Trap {
        match reason {
            reason::MONITOR_TRAP_FLAG => self.vmx.controls.pending_mtf = false,
            reason::PREEMPTION_TIMER => self.attention.clear(Attention::PREEMPTION),
            _ => {}
        }
        self.vm_exit(reason, 0)
    }

    /// An NMI: the VM exit, if it causes one.
    pub(crate) fn exit_on_nmi(&mut self) -> Exec {
        if !self.under_pin(pin::NMI_EXITING) {
            return Ok(());
        }
        let trap = self.vm_exit(reason::EXCEPTION_OR_NMI, 0);
        self.vmx.exit.interruption = information(vector::NMI, EventKind::Nmi);
        Err(trap)
    }

    /// An external interrupt: the VM exit, if it causes one. With "acknowledge interrupt on exit" it is taken from the
    /// interrupt controller, unless it has gone; the notification of posted interrupts is no VM exit.
    pub(crate) fn exit_on_interrupt(&mut self) -> Exec {
        if !self.under_pin(pin::EXTERNAL_INTERRUPT_EXITING) {
            return Ok(());
        }
        let acknowledges = self.vmx.controls.exit & exit_ctl::ACKNOWLEDGE_INTERRUPT != 0;
        let interruption = if acknowledges {
            let Some(vector) = self.bus().acknowledge_interrupt() else { return Err(Trap::Again) };
            if self.process_posted_interrupts(vector) {
                // It takes time, after which there may be a virtual interrupt to deliver.
                self.state.stalls += 1;
                return Err(Trap::Again);
            }
            information(vector, EventKind::ExternalInterrupt)
        } else {
            0
        };
        let trap = self.vm_exit(reason::EXTERNAL_INTERRUPT, 0);
        self.vmx.exit.interruption = interruption;
        Err(trap)
    }

    /// An instruction or an event is done: with the monitor trap flag that is where the guest stops ("Monitor Trap Flag").
    pub(crate) fn note_monitor_trap(&mut self) {
        if self.under_primary(primary::MONITOR_TRAP_FLAG) {
            self.vmx.controls.pending_mtf = true;
            self.attend();
        }
    }

    /// Pending debug exceptions that an injected event leaves ("Delivery of Pending Debug Exceptions after VM Entry").
    pub(crate) fn drop_pending_debug(&mut self, event: Event) {
        let software = matches!(event.kind, EventKind::SoftwareInterrupt | EventKind::SoftwareException);
        if self.non_root() && !(software && self.state.shadow == Shadow::MovSs) {
            self.state.pending_debug = 0;
        }
    }
}

/// Exceptions.
impl Cpu {
    fn exception_exits(&self, fault: &Fault) -> bool {
        let c = &self.vmx.controls;
        let bit = c.exception_bitmap >> (fault.vector & 31) & 1 != 0;
        if fault.vector != vector::PF {
            return bit;
        }
        let matches = fault.error_code.unwrap_or(0) & c.page_fault_mask == c.page_fault_match;
        bit == matches
    }

    /// A fault, with `flags` as the image of RFLAGS that it would save, raised on the way into the handler of `during`:
    /// the VM exit, if it causes one. CR2, DR6, DR7 and IA32_DEBUGCTL stay as they are.
    pub(crate) fn exit_on_exception(&mut self, fault: Fault, during: Option<Event>, flags: u64) -> Exec {
        if !self.non_root() || !self.exception_exits(&fault) {
            return Ok(());
        }
        let qualification = match fault.vector {
            vector::PF => fault.address,
            vector::DB => fault.address & DEBUG_QUALIFICATION,
            _ => 0,
        };
        let trap = self.vm_exit(reason::EXCEPTION_OR_NMI, qualification);
        let (interruption, code) = self.describe(Event {
            vector: fault.vector,
            kind: EventKind::HardwareException,
            error_code: fault.error_code,
            instruction_length: 0,
        });
        self.vmx.exit.interruption = interruption;
        self.vmx.exit.interruption_error = code;
        match during {
            Some(event) => self.record_delivery(event, flags),
            None => self.set_resume_flag(flags),
        }
        Err(trap)
    }

    /// INT3, INTO and INT1: the VM exit, if it causes one.
    pub(crate) fn exit_on_software_exception(&mut self, vector: u8, kind: EventKind) -> Exec {
        let exits = self.non_root()
            && kind != EventKind::SoftwareInterrupt
            && self.vmx.controls.exception_bitmap >> (vector & 31) & 1 != 0;
        if !exits {
            return Ok(());
        }
        let trap = self.vm_exit(reason::EXCEPTION_OR_NMI, 0);
        self.vmx.exit.interruption = information(vector, kind);
        Err(trap)
    }

    /// A fault too many: a VM exit in non-root operation.
    pub(crate) fn exit_on_triple_fault(&mut self) -> Exec {
        if self.non_root() { Err(self.vm_exit(reason::TRIPLE_FAULT, 0)) } else { Ok(()) }
    }

    /// Interruption information and error code. In real-address mode no error code is pushed.
    fn describe(&self, event: Event) -> (u32, u32) {
        let base = information(event.vector, event.kind);
        match event.error_code {
            Some(code) if self.state.protected() => (base | event::ERROR_CODE_VALID, code),
            _ => (base, 0),
        }
    }

    /// A VM exit in the middle of the delivery of `event`, whose image of RFLAGS is `flags` ("Information for VM Exits
    /// That Occur During Event Delivery"): the event has happened as far as blocking and inactive states go.
    #[cold]
    pub(crate) fn record_delivery(&mut self, event: Event, flags: u64) {
        let (vectoring, code) = self.describe(event);
        self.vmx.exit.idt_vectoring = vectoring;
        self.vmx.exit.idt_vectoring_error = code;
        if event.kind.has_length() {
            self.vmx.exit.instruction_length = u32::from(event.instruction_length);
        }
        self.set_resume_flag(flags);
        self.state.shadow = Shadow::None;
        self.state.activity = Activity::Active;
    }

    fn set_resume_flag(&mut self, image: u64) {
        self.state.rflags_system = self.state.rflags_system & !rflags::RF | image & rflags::RF;
    }
}

/// What RFLAGS.RF is saved as, by what caused the VM exit ("Saving RIP, RSP, RFLAGS, and SSP").
enum Resume {
    /// An instruction: 0.
    Clear,
    /// An access to guest memory: 1.
    Set,
    /// Something else: what it was.
    Keep,
}

fn resume_flag(reason: u32) -> Resume {
    use reason::*;
    match reason {
        APIC_ACCESS | EPT_VIOLATION | EPT_MISCONFIGURATION | PML_FULL => Resume::Set,
        EXCEPTION_OR_NMI | EXTERNAL_INTERRUPT | TRIPLE_FAULT | INIT | SIPI | INTERRUPT_WINDOW
        | NMI_WINDOW | MONITOR_TRAP_FLAG | TPR_BELOW_THRESHOLD | VIRTUALIZED_EOI | PREEMPTION_TIMER
        | APIC_WRITE => Resume::Keep,
        _ => Resume::Clear,
    }
}

/// The guest's state as a VM exit leaves it.
impl Cpu {
    /// Gives RF, pending debug exceptions and blocking by NMI the values that a VM exit saves.
    #[cold]
    pub(crate) fn settle_exit(&mut self) {
        let reason = self.vmx.exit.reason;
        let delivering = self.vmx.exit.idt_vectoring & event::VALID != 0;
        if !delivering {
            match resume_flag(reason) {
                // RF is cleared at the start of a software interrupt ("Instruction-Breakpoint Exception Condition").
                Resume::Keep if self.exits_for_software_exception() => self.set_resume_flag(0),
                Resume::Clear => self.set_resume_flag(0),
                Resume::Set => self.set_resume_flag(rflags::RF),
                Resume::Keep => {}
            }
        }
        if std::mem::take(&mut self.iret_unblocked) {
            self.record_unblocking(reason, delivering);
        }
        if !self.keeps_pending_debug(reason) {
            self.state.pending_debug = 0;
        }
    }

    /// The VM exit is that of INT3, INTO or INT1.
    fn exits_for_software_exception(&self) -> bool {
        let kind = (self.vmx.exit.interruption & event::TYPE) >> event::TYPE_SHIFT;
        self.vmx.exit.reason == reason::EXCEPTION_OR_NMI
            && matches!(kind, event::PRIVILEGED_SOFTWARE_EXCEPTION | event::SOFTWARE_EXCEPTION)
    }

    /// "NMI unblocking due to IRET".
    fn record_unblocking(&mut self, reason: u32, delivering: bool) {
        let exit = &mut self.vmx.exit;
        match reason {
            // The task switch has not happened, nor has its IRET.
            reason::TASK_SWITCH => self.state.nmi_blocked = true,
            reason::EXCEPTION_OR_NMI
                if !delivering && exit.interruption & event::VECTOR != u32::from(vector::DF) =>
            {
                exit.interruption |= event::NMI_UNBLOCKING;
            }
            reason::EPT_VIOLATION | reason::PML_FULL if !delivering => {
                exit.qualification |= ept_qualification::NMI_UNBLOCKING;
            }
            _ => {}
        }
    }

    /// VM exits that save pending debug exceptions rather than drop them ("Saving Non-Register State").
    fn keeps_pending_debug(&self, reason: u32) -> bool {
        use reason::*;
        match reason {
            INIT | MONITOR_TRAP_FLAG | TPR_BELOW_THRESHOLD | VIRTUALIZED_EOI | APIC_WRITE => true,
            EXCEPTION_OR_NMI if self.vmx.exit.interruption & event::VECTOR == u32::from(vector::DB) => false,
            _ => self.state.shadow == Shadow::MovSs,
        }
    }
}
