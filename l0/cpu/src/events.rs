//! Interrupts and exceptions into the IDT ("Interrupt and Exception Handling", SDM volume 3), in every mode.
//!
//! Delivery commits nothing before its last check has passed: a fault on the way leaves all registers as they
//! were, so the fault can itself be delivered from there. (Frames already written to a stack stay written, below
//! a stack pointer that did not move.)

use x86defs::segment::{self, SELECTOR_RPL, SELECTOR_TI, system};
use x86defs::{cr4, dr, rflags, vector};

use crate::Cpu;
use crate::interp::descriptor::{Descriptor, EXT, Found, IDT, is_null, selector_code};
use crate::interp::segment::null_segment;
use crate::interp::stack_switch::NewStack;
use crate::interp::task::Switch;
use crate::mmu::walk::Privilege;
use crate::state::{Activity, Event, EventKind, Seg, Segment, Shadow, reg};
use crate::trap::{Exec, Fault, Trap};

/// IA32_DEBUGCTL.BTF and LBR, which a debug exception clears.
const DEBUGCTL_LBR_BTF: u64 = 3;
/// Faults on the way into a handler that may follow each other before the processor gives up.
const MAX_NESTING: usize = 8;

/// How exceptions combine ("Conditions for Generating a Double Fault").
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class_of(vector: u8, kind: EventKind) -> Class {
    if kind != EventKind::HardwareException {
        return Class::Benign;
    }
    match vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP | vector::CP => Class::Contributory,
        vector::PF | vector::VE => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What to deliver when `raised` is raised on the way into the handler of `first`; none is shutdown.
fn combine(first: Event, raised: Fault) -> Option<Fault> {
    let second = class_of(raised.vector, EventKind::HardwareException);
    let serious = matches!(second, Class::Contributory | Class::PageFault);
    match (class_of(first.vector, first.kind), second) {
        (Class::Contributory, Class::Contributory) => Some(Fault::with_code(vector::DF, 0)),
        (Class::PageFault, _) if serious => Some(Fault::with_code(vector::DF, 0)),
        (Class::DoubleFault, _) if serious => None,
        _ => Some(raised),
    }
}

impl Event {
    /// Raised by INT n, INT3 or INTO: the gate's DPL is checked, and error codes have EXT clear.
    fn is_software(&self) -> bool {
        matches!(self.kind, EventKind::SoftwareInterrupt | EventKind::SoftwareException)
    }

    fn ext(&self) -> u32 {
        if self.is_software() { 0 } else { EXT }
    }
}

/// The code segment and entry point that a gate leads to.
struct Target {
    code: Found,
    offset: u64,
    /// Of the handler.
    cpl: u8,
    /// Interrupt gate: IF is cleared.
    masks: bool,
}

impl Cpu {
    /// Delivers an interrupt, or an exception that the owner injects, from `state.rip`.
    pub(crate) fn deliver(&mut self, event: Event) -> Exec {
        self.deliver_from(event, self.state.rflags())
    }

    /// Delivers the fault that an instruction raised, or the delivery of an event (`self.fault`), from `state.rip`;
    /// false is shutdown.
    pub(crate) fn deliver_fault(&mut self) -> Exec<bool> {
        let during = self.vectoring.take();
        self.deliver_fault_during(during)
    }

    /// Raises #DB as a fault; `bits` go to DR6.
    pub(crate) fn raise_debug(&mut self, bits: u64) -> Trap {
        self.raise(Fault { address: bits, ..Fault::plain(vector::DB) })
    }

    /// The event that a fault is, after what it does to CR2 or the debug registers.
    pub(crate) fn exception(&mut self, fault: Fault) -> Event {
        match fault.vector {
            vector::PF => self.state.cr2 = fault.address,
            vector::DB => self.enter_debug(fault.address),
            _ => {}
        }
        Event {
            vector: fault.vector,
            kind: EventKind::HardwareException,
            error_code: fault.error_code,
            instruction_length: 0,
        }
    }

    /// DR6, DR7.GD and IA32_DEBUGCTL as a debug exception leaves them.
    fn enter_debug(&mut self, bits: u64) {
        // New hits replace old ones; whoever has noted them already passes none.
        let kept = if bits & 0xf != 0 { !0xf } else { u64::MAX };
        self.state.dr6 = self.state.dr6 & kept | bits | dr::DR6_FIXED_1;
        self.state.msrs.debugctl &= !DEBUGCTL_LBR_BTF;
        if self.state.dr7 & dr::DR7_GD != 0 {
            self.state.dr7 &= !dr::DR7_GD;
        }
    }

    /// Delivers `self.fault`, raised on the way into the handler of `during` if there is one; false is shutdown.
    pub(crate) fn deliver_fault_during(&mut self, mut during: Option<Event>) -> Exec<bool> {
        for _ in 0..MAX_NESTING {
            let raised = self.fault;
            // The exception bitmap sees each exception before two of them become a double fault: a hypervisor that
            // intercepts the second combines them itself.
            let flags = self.fault_flags(raised);
            self.exit_on_exception(raised, during, flags)?;
            let Some(fault) = during.map_or(Some(raised), |event| combine(event, raised)) else { break };
            if fault != raised {
                if raised.vector == vector::PF {
                    self.state.cr2 = raised.address;
                }
                // A double fault is not something that happened on the way: it is what has become of both.
                self.exit_on_exception(fault, None, flags)?;
            }
            let event = self.exception(fault);
            match self.deliver_from(event, flags) {
                // A task switch on the way may have met its end in the new task.
                Ok(()) => return Ok(self.state.activity != Activity::Shutdown),
                Err(Trap::Exit) => return Err(Trap::Exit),
                Err(_) => during = self.vectoring.take(),
            }
        }
        self.exit_on_triple_fault()?;
        self.state.activity = Activity::Shutdown;
        self.attend();
        Ok(false)
    }

    /// The image of RFLAGS that a fault saves.
    fn fault_flags(&self, fault: Fault) -> u64 {
        // An instruction breakpoint's handler decides itself whether to set RF; every other fault sets it.
        let breakpoint = fault.vector == vector::DB && fault.address & dr::DR6_BD == 0;
        self.state.rflags() | if breakpoint { 0 } else { rflags::RF }
    }

    /// Delivers `event` with `flags` as the image of RFLAGS to save.
    fn deliver_from(&mut self, event: Event, flags: u64) -> Exec {
        if event.kind == EventKind::Nmi {
            self.state.nmi_blocked = true;
        }
        self.delivering = true;
        let done = if !self.state.protected() {
            self.deliver_real(event.vector, flags)
        } else if self.state.long_mode() {
            self.deliver_long(event, flags)
        } else {
            self.deliver_protected(event, flags)
        };
        self.delivering = false;
        match done {
            Ok(()) => {
                if self.state.activity == Activity::Halted || self.non_root() {
                    self.state.activity = Activity::Active;
                }
                self.state.shadow = Shadow::None;
                self.refresh_mode();
                self.attend();
            }
            Err(Trap::Exit) => self.record_delivery(event, flags),
            Err(_) => self.vectoring = Some(event),
        }
        done
    }

    /// Real-address mode: the interrupt vector table. Error codes are not pushed.
    fn deliver_real(&mut self, vector: u8, flags: u64) -> Exec {
        let offset = u64::from(vector) * 4;
        if offset + 3 > u64::from(self.state.idtr.limit) {
            return Err(self.raise(Fault::gp(u32::from(vector) << 3 | IDT)));
        }
        let entry = self.read_system::<u32>(self.table_address(self.state.idtr.base, offset))?;
        self.push_real_frame(flags)?;
        self.enter_real(entry);
        let clear = rflags::IF | rflags::TF | rflags::AC | rflags::RF;
        self.state.set_rflags(self.state.rflags() & !clear);
        Ok(())
    }

    /// FLAGS, CS and IP on the current stack.
    fn push_real_frame(&mut self, flags: u64) -> Exec {
        let mut stack = self.current_stack();
        let cs = u64::from(self.state.seg(Seg::Cs).selector);
        self.push_frame(&mut stack, 2, &[flags, cs, self.state.rip], 0)?;
        self.adopt_stack_pointer(&stack);
        Ok(())
    }

    fn enter_real(&mut self, entry: u32) {
        let selector = (entry >> 16) as u16;
        let cs = self.state.seg_mut(Seg::Cs);
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.state.rip = u64::from(entry & 0xffff);
    }

    /// INT n in virtual-8086 mode with CR4.VME: by the redirection bitmap it may stay in the program's own hands
    /// ("Software Interrupt Handling in Virtual-8086 Mode", methods 5 and 6). True if done.
    fn redirect_to_v86(&mut self, event: Event, flags: u64) -> Exec<bool> {
        if event.kind != EventKind::SoftwareInterrupt || !self.state.v86() {
            return Ok(false);
        }
        if self.state.cr4 & cr4::VME != 0 && !self.redirection_bit(event.vector)? {
            let entry = self.read_system::<u32>(u64::from(event.vector) * 4)?;
            let own_if = self.state.iopl() == 3;
            let image = if own_if { flags } else { virtual_flags(flags) };
            self.push_real_frame(image)?;
            *self.state.seg_mut(Seg::Cs) = Segment { access: 0xf3, ..Segment::real((entry >> 16) as u16) };
            self.state.rip = u64::from(entry & 0xffff);
            let interrupt = if own_if { rflags::IF } else { rflags::VIF };
            let clear = interrupt | rflags::TF | rflags::NT | rflags::RF;
            self.state.set_rflags(self.state.rflags() & !clear);
            return Ok(true);
        }
        if self.state.iopl() < 3 {
            return Err(self.raise(Fault::gp(0)));
        }
        Ok(false)
    }

    /// The bit of the software-interrupt redirection bitmap, 32 bytes below the I/O bitmap in the TSS.
    fn redirection_bit(&mut self, vector: u8) -> Exec<bool> {
        let tr = self.state.tr;
        if !is_tss32(&tr) || tr.limit < 103 {
            return Err(self.raise(Fault::gp(0)));
        }
        let map = self.read_system::<u16>(self.table_address(tr.base, 102))?;
        let offset = (u64::from(map) + u64::from(vector / 8)).wrapping_sub(32);
        if offset > u64::from(tr.limit) {
            return Err(self.raise(Fault::gp(0)));
        }
        let byte = self.read_system::<u8>(self.table_address(tr.base, offset))?;
        Ok(byte >> (vector & 7) & 1 != 0)
    }

    /// #GP or #NP that names an IDT entry.
    fn gate_fault(&mut self, vector: u8, event: Event) -> Trap {
        self.raise(Fault::with_code(vector, u32::from(event.vector) << 3 | IDT | event.ext()))
    }

    /// Checks that `width` bytes of IDT entry are inside the limit and returns their address.
    fn gate_address(&mut self, event: Event, width: u64) -> Exec<u64> {
        let offset = u64::from(event.vector) * width;
        if offset + width - 1 > u64::from(self.state.idtr.limit) {
            return Err(self.gate_fault(vector::GP, event));
        }
        Ok(self.table_address(self.state.idtr.base, offset))
    }

    /// DPL and presence of a gate.
    fn check_gate(&mut self, gate: Descriptor, event: Event) -> Exec {
        if event.is_software() && gate.dpl() < self.state.cpl {
            return Err(self.gate_fault(vector::GP, event));
        }
        if !gate.present() {
            return Err(self.gate_fault(vector::NP, event));
        }
        Ok(())
    }

    /// The code segment a gate names, checked.
    fn gate_target(&mut self, gate: Descriptor, offset: u64, event: Event) -> Exec<Target> {
        let (selector, ext) = (gate.gate_selector(), event.ext());
        if is_null(selector) {
            return Err(self.raise(Fault::gp(ext)));
        }
        let code = self.fetch_descriptor(selector, vector::GP, ext)?;
        let d = code.descriptor;
        let cpl = self.state.cpl;
        if !d.is_code() || d.dpl() > cpl || self.state.long_mode() && !d.is_code64() {
            return Err(self.selector_fault(vector::GP, selector, ext));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector, ext));
        }
        let target_cpl = if d.is_conforming() { cpl } else { d.dpl() };
        if self.state.v86() && target_cpl != 0 {
            return Err(self.selector_fault(vector::GP, selector, ext));
        }
        let masks = gate.access() & 1 == 0;
        Ok(Target { code, offset, cpl: target_cpl, masks })
    }

    /// Protected mode without IA-32e: 8-byte gates.
    fn deliver_protected(&mut self, event: Event, flags: u64) -> Exec {
        if self.redirect_to_v86(event, flags)? {
            return Ok(());
        }
        let at = self.gate_address(event, 8)?;
        let gate = Descriptor(self.read_system::<u64>(at)?);
        let wide = match gate.system_type() {
            Some(system::INTERRUPT_GATE | system::TRAP_GATE) => true,
            Some(system::INTERRUPT_GATE16 | system::TRAP_GATE16) => false,
            Some(system::TASK_GATE) => {
                self.check_gate(gate, event)?;
                return self.deliver_through_task(event, gate.gate_selector(), flags);
            }
            _ => return Err(self.gate_fault(vector::GP, event)),
        };
        self.check_gate(gate, event)?;
        let offset = u64::from(if wide { gate.gate_offset() } else { gate.gate_offset() & 0xffff });
        let target = self.gate_target(gate, offset, event)?;
        let v86 = self.state.v86();
        let inner = target.cpl < self.state.cpl;
        let ext = event.ext();
        let mut stack = if inner { self.inner_stack(target.cpl, ext)? } else { self.current_stack() };
        if target.offset > u64::from(target.code.descriptor.limit()) {
            return Err(self.raise(Fault::gp(ext)));
        }
        let mut frame = Frame::default();
        if v86 {
            for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
                frame.push(u64::from(self.state.seg(seg).selector));
            }
        }
        if inner {
            frame.push(u64::from(self.state.seg(Seg::Ss).selector));
            frame.push(self.state.gpr.get(reg::RSP));
        }
        self.push_return(&mut frame, flags, event);
        let code = if inner { selector_code(stack.ss.selector) } else { 0 } | ext;
        self.push_frame(&mut stack, if wide { 4 } else { 2 }, frame.items(), code)?;
        self.mark_accessed(&target.code)?;
        if inner {
            self.adopt_stack(&stack)?;
        } else {
            self.adopt_stack_pointer(&stack);
        }
        if v86 {
            for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
                *self.state.seg_mut(seg) = null_segment(0, 0);
            }
        }
        self.enter_handler(&target);
        Ok(())
    }

    /// IA-32e mode: 16-byte gates.
    fn deliver_long(&mut self, event: Event, flags: u64) -> Exec {
        let at = self.gate_address(event, 16)?;
        let mut entry = [0; 16];
        self.read_table(at, &mut entry)?;
        let [gate, upper] =
            [0, 8].map(|i| entry[i..i + 8].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte)));
        let gate = Descriptor(gate);
        if !matches!(gate.system_type(), Some(system::INTERRUPT_GATE | system::TRAP_GATE)) {
            return Err(self.gate_fault(vector::GP, event));
        }
        self.check_gate(gate, event)?;
        let offset = u64::from(gate.gate_offset()) | upper << 32;
        let target = self.gate_target(gate, offset, event)?;
        let inner = target.cpl < self.state.cpl;
        let ext = event.ext();
        let ist = u64::from(gate.gate_count() & 7);
        let rsp = if ist != 0 {
            self.tss_stack_pointer(28 + 8 * ist, ext)?
        } else if inner {
            self.tss_stack_pointer(4 + 8 * u64::from(target.cpl), ext)?
        } else {
            self.state.gpr.get(reg::RSP)
        };
        let ss =
            if inner { null_segment(u16::from(target.cpl), target.cpl) } else { *self.state.seg(Seg::Ss) };
        let mut stack = NewStack::long(ss, rsp & !0xf, target.cpl);
        let mut frame = Frame::default();
        frame.push(u64::from(self.state.seg(Seg::Ss).selector));
        frame.push(self.state.gpr.get(reg::RSP));
        self.push_return(&mut frame, flags, event);
        self.push_frame(&mut stack, 8, frame.items(), ext)?;
        if !self.is_canonical(target.offset) {
            return Err(self.raise(Fault::gp(ext)));
        }
        self.mark_accessed(&target.code)?;
        if inner {
            *self.state.seg_mut(Seg::Ss) = stack.ss;
        }
        self.state.gpr.set(reg::RSP, stack.rsp);
        self.enter_handler(&target);
        Ok(())
    }

    /// The part of the frame that every gate pushes.
    fn push_return(&self, frame: &mut Frame, flags: u64, event: Event) {
        frame.push(flags);
        frame.push(u64::from(self.state.seg(Seg::Cs).selector));
        frame.push(self.state.rip);
        if let Some(code) = event.error_code {
            frame.push(u64::from(code));
        }
    }

    fn enter_handler(&mut self, target: &Target) {
        let selector = target.code.selector & !SELECTOR_RPL | u16::from(target.cpl);
        *self.state.seg_mut(Seg::Cs) = target.code.descriptor.to_segment(selector);
        self.state.cpl = target.cpl;
        self.state.rip = target.offset;
        let masked = if target.masks { rflags::IF } else { 0 };
        let clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM | masked;
        self.state.set_rflags(self.state.rflags() & !clear);
    }

    /// A task gate: the handler is a task.
    fn deliver_through_task(&mut self, event: Event, selector: u16, flags: u64) -> Exec {
        let ext = event.ext();
        if is_null(selector) || selector & SELECTOR_TI != 0 {
            return Err(self.selector_fault(vector::GP, selector, ext));
        }
        let found = self.fetch_descriptor(selector, vector::GP, ext)?;
        let available = [Some(system::TSS_AVAILABLE), Some(system::TSS16_AVAILABLE)];
        if !available.contains(&found.descriptor.system_type()) {
            return Err(self.selector_fault(vector::GP, selector, ext));
        }
        if !found.descriptor.present() {
            return Err(self.selector_fault(vector::NP, selector, ext));
        }
        self.switch_task(&found, Switch::Interrupt { flags, ext, event })
    }
}

/// RFLAGS as a virtual-8086 program with IOPL below 3 sees it: VIF in IF's place, IOPL 3.
pub(crate) fn virtual_flags(flags: u64) -> u64 {
    let interrupts = if flags & rflags::VIF != 0 { rflags::IF } else { 0 };
    flags & !rflags::IF | interrupts | rflags::IOPL
}

/// TR holds a 32-bit (or 64-bit) TSS.
pub(crate) fn is_tss32(tr: &Segment) -> bool {
    matches!(tr.access & (segment::S | segment::TYPE), system::TSS_AVAILABLE | system::TSS_BUSY)
        && !tr.unusable()
}

/// Up to the largest interrupt frame, in push order.
#[derive(Default)]
struct Frame {
    values: [u64; 10],
    len: usize,
}

impl Frame {
    fn push(&mut self, value: u64) {
        self.values[self.len] = value;
        self.len += 1;
    }

    fn items(&self) -> &[u64] {
        &self.values[..self.len]
    }
}

/// Privilege of accesses to a stack of privilege level `cpl`.
pub(crate) fn stack_privilege(cpl: u8) -> Privilege {
    if cpl == 3 { Privilege::User } else { Privilege::Supervisor }
}
