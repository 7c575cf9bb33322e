//! APIC virtualization ("APIC Virtualization and Virtual Interrupts"): the guest's task priority, its accesses to the
//! APIC-access page and to x2APIC MSRs, and interrupts delivered without an exit. The registers are in the virtual-APIC
//! page; RVI and SVI are in [`super::Controls::interrupt_status`].
//!
//! An access to the APIC-access page either goes to the virtual-APIC page or is a VM exit, before it is done. What a
//! write means comes after the instruction (APIC-write emulation), and so do the exits it causes.
//!
//! Invariant:
//! - APIC-1: the APIC-access page is in no fast translation of a guest under "virtualize APIC accesses": every access
//!   comes through [`Cpu::apic_access`].

use std::sync::atomic::Ordering;

use x86defs::msr::{self, apic_base};
use x86defs::rflags;
use x86defs::vmx::{pin, primary, reason, secondary};

use crate::Cpu;
use crate::bus::MsrRefused;
use crate::mmu::walk::Access;
use crate::state::{Event, EventKind, Shadow};
use crate::trap::{Exec, Trap};

/// Page offsets of registers.
mod register {
    pub const TPR: u16 = 0x80;
    pub const PPR: u16 = 0xa0;
    pub const EOI: u16 = 0xb0;
    /// Eight registers each, 16 bytes apart.
    pub const ISR: u16 = 0x100;
    pub const IRR: u16 = 0x200;
    pub const ICR_LOW: u16 = 0x300;
    pub const ICR_HIGH: u16 = 0x310;
    pub const ICR_HIGH_END: u16 = 0x313;
    pub const SELF_IPI: u16 = 0x3f0;
}

/// Registers whose reads APIC-register virtualization takes ("Virtualizing Reads from the APIC-Access Page"), by their
/// page offset in units of 16 bytes: bit n is offset 16 * n.
const READABLE: u64 = bits(0x02, 0x03)
    | bits(0x08, 0x08)
    | bits(0x0b, 0x0b)
    | bits(0x0d, 0x28)
    | bits(0x30, 0x38)
    | bits(0x3e, 0x3e);
/// The same of writes ("Determining Whether a Write Access Is Virtualized").
const WRITABLE: u64 = bits(0x02, 0x02)
    | bits(0x08, 0x08)
    | bits(0x0b, 0x0b)
    | bits(0x0d, 0x0f)
    | bits(0x28, 0x28)
    | bits(0x30, 0x38)
    | bits(0x3e, 0x3e);

const fn bits(first: u32, last: u32) -> u64 {
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

/// Exit qualification of APIC-access VM exits: bits 15:12.
mod access_type {
    pub const LINEAR_READ: u64 = 0 << 12;
    pub const LINEAR_WRITE: u64 = 1 << 12;
    pub const LINEAR_FETCH: u64 = 2 << 12;
    pub const LINEAR_IN_DELIVERY: u64 = 3 << 12;
    pub const PHYSICAL_IN_DELIVERY: u64 = 10 << 12;
    pub const PHYSICAL: u64 = 15 << 12;
}

/// What VICR_LO must be for self-IPI virtualization: no reserved bit (31:20, 17:16, 13) and no delivery status (12),
/// shorthand "self" (19:18), edge-triggered (15), fixed (10:8). Level (14) and destination mode (11) do not count.
const SELF_IPI_MASK: u32 = 0xffff_b700;
const SELF_IPI: u32 = 1 << 18;

/// Offset of the outstanding-notification bit's word in a posted-interrupt descriptor, after the requests.
const OUTSTANDING_AT: u64 = 32;
const OUTSTANDING: u64 = 1;

/// What goes on besides the registers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct VirtualApic {
    /// Page offset and size of the write that the operation under way has done; its emulation follows the operation.
    written: Option<(u16, usize)>,
    /// A trap-like VM exit is due: reason and qualification.
    exit: Option<(u32, u64)>,
    /// A pending virtual interrupt is recognized ("Evaluation of Pending Virtual Interrupts").
    recognized: bool,
}

impl VirtualApic {
    /// A VM exit happens: what the operation has written is not emulated any more.
    pub(crate) fn forget_operation(&mut self) {
        self.written = None;
        self.exit = None;
    }
}

impl Cpu {
    fn tpr_shadow(&self) -> bool {
        self.under_primary(primary::USE_TPR_SHADOW)
    }

    fn interrupt_delivery(&self) -> bool {
        self.vmx.controls.has_secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY)
    }

    fn apic_register(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.memory.read(self.vmx.controls.virtual_apic_page + u64::from(offset), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set_apic_register(&mut self, offset: u16, value: u32) {
        self.memory.write(self.vmx.controls.virtual_apic_page + u64::from(offset), &value.to_le_bytes());
    }

    fn rvi(&self) -> u8 {
        self.vmx.controls.interrupt_status as u8
    }

    fn svi(&self) -> u8 {
        (self.vmx.controls.interrupt_status >> 8) as u8
    }

    fn set_rvi(&mut self, vector: u8) {
        self.vmx.controls.interrupt_status = u16::from_le_bytes([vector, self.svi()]);
    }

    fn set_svi(&mut self, vector: u8) {
        self.vmx.controls.interrupt_status = u16::from_le_bytes([self.rvi(), vector]);
    }

    /// Sets or clears the bit of `vector` in VISR or VIRR.
    fn set_vector(&mut self, registers: u16, vector: u8, on: bool) {
        let at = registers + u16::from(vector / 32) * 16;
        let bit = 1 << (vector % 32);
        let old = self.apic_register(at);
        self.set_apic_register(at, if on { old | bit } else { old & !bit });
    }

    /// The highest vector in VISR or VIRR, or 0.
    fn highest_vector(&self, registers: u16) -> u8 {
        let found = (0..8).rev().map(|i| (i, self.apic_register(registers + i * 16))).find(|r| r.1 != 0);
        found.map_or(0, |(i, word)| (i * 32) as u8 + word.ilog2() as u8)
    }

    /// A VM exit after the operation under way.
    fn exit_after(&mut self, reason: u32, qualification: u64) {
        self.vmx.apic.exit = Some((reason, qualification));
        self.attend();
        self.leave_block();
    }

    /// VM entry: "PPR virtualization" and the first evaluation, or "VM Exits Induced by the TPR Threshold".
    pub(crate) fn enter_virtual_apic(&mut self) {
        self.vmx.apic = VirtualApic::default();
        if self.interrupt_delivery() {
            self.virtualize_ppr();
            self.evaluate_virtual_interrupts();
        } else if self.tpr_shadow() && self.under_secondary(secondary::VIRTUALIZE_APIC_ACCESSES) {
            self.check_tpr_threshold();
        }
    }

    /// Acts on what the operation that is over wrote; a VM exit may come of it. An event injected by the VM entry is
    /// delivered first.
    pub(crate) fn finish_apic_operation(&mut self) -> Option<Trap> {
        if let Some((offset, _)) = self.vmx.apic.written.take() {
            self.emulate_apic_write(offset);
        }
        if self.state.injected.is_some() {
            return None;
        }
        let (reason, qualification) = self.vmx.apic.exit.take()?;
        Some(self.vm_exit(reason, qualification))
    }
}

/// "TPR Virtualization", "PPR Virtualization", "EOI Virtualization", "Self-IPI Virtualization".
impl Cpu {
    fn check_tpr_threshold(&mut self) {
        if self.apic_register(register::TPR) >> 4 & 0xf < self.vmx.controls.tpr_threshold & 0xf {
            self.exit_after(reason::TPR_BELOW_THRESHOLD, 0);
        }
    }

    fn virtualize_tpr(&mut self) {
        if self.interrupt_delivery() {
            self.virtualize_ppr();
            self.evaluate_virtual_interrupts();
        } else {
            self.check_tpr_threshold();
        }
    }

    fn virtualize_ppr(&mut self) {
        let (tpr, svi) = (self.apic_register(register::TPR) as u8, self.svi());
        let ppr = if tpr >> 4 >= svi >> 4 { tpr } else { svi & 0xf0 };
        self.set_apic_register(register::PPR, u32::from(ppr));
    }

    fn virtualize_eoi(&mut self) {
        let vector = self.svi();
        self.set_vector(register::ISR, vector, false);
        let next = self.highest_vector(register::ISR);
        self.set_svi(next);
        self.virtualize_ppr();
        let bitmap = self.vmx.controls.eoi_exit_bitmap[usize::from(vector / 64)];
        if bitmap >> (vector % 64) & 1 != 0 {
            self.exit_after(reason::VIRTUALIZED_EOI, u64::from(vector));
        } else {
            self.evaluate_virtual_interrupts();
        }
    }

    fn virtualize_self_ipi(&mut self, vector: u8) {
        self.set_vector(register::IRR, vector, true);
        self.set_rvi(self.rvi().max(vector));
        self.evaluate_virtual_interrupts();
    }

    /// "Evaluation of Pending Virtual Interrupts".
    fn evaluate_virtual_interrupts(&mut self) {
        let window = self.vmx.controls.has_primary(primary::INTERRUPT_WINDOW_EXITING);
        let ppr = self.apic_register(register::PPR) as u8;
        self.vmx.apic.recognized = !window && self.rvi() >> 4 > ppr >> 4;
        self.attend();
    }

    /// A virtual interrupt is recognized: it is delivered as soon as interrupts can be.
    pub(crate) fn virtual_interrupt_pending(&self) -> bool {
        self.vmx.apic.recognized && self.non_root()
    }

    /// The virtual interrupt to deliver now ("Virtual-Interrupt Delivery"). It comes after NMIs and before external
    /// interrupts.
    pub(crate) fn take_virtual_interrupt(&mut self) -> Option<Event> {
        if !self.virtual_interrupt_pending()
            || !self.state.system_flag(rflags::IF)
            || self.state.shadow != Shadow::None
        {
            return None;
        }
        let vector = self.rvi();
        self.set_vector(register::ISR, vector, true);
        self.set_svi(vector);
        self.set_apic_register(register::PPR, u32::from(vector & 0xf0));
        self.set_vector(register::IRR, vector, false);
        let next = self.highest_vector(register::IRR);
        self.set_rvi(next);
        self.vmx.apic.recognized = false;
        Some(Event { vector, kind: EventKind::ExternalInterrupt, error_code: None, instruction_length: 0 })
    }
}

/// The task-priority register as CR8.
impl Cpu {
    /// MOV from CR8.
    pub(crate) fn cr8(&mut self) -> u8 {
        if self.tpr_shadow() {
            return self.apic_register(register::TPR) as u8 >> 4;
        }
        self.bus().cr8()
    }

    /// MOV to CR8.
    pub(crate) fn set_cr8(&mut self, value: u8) {
        if self.tpr_shadow() {
            self.set_apic_register(register::TPR, u32::from(value) << 4);
            self.virtualize_tpr();
        } else {
            self.bus().set_cr8(value);
            self.attend();
        }
    }
}

/// "Virtualizing Memory-Mapped APIC Accesses".
impl Cpu {
    /// The APIC-access page where accesses to it are special, or what is no page.
    pub(crate) fn apic_access_page(&self) -> u64 {
        if self.under_secondary(secondary::VIRTUALIZE_APIC_ACCESSES) {
            self.vmx.controls.apic_access_page & !4095
        } else {
            u64::MAX
        }
    }

    /// `size` bytes at page offset `offset` are about to be accessed by a linear address: a VM exit, or the access goes
    /// to the virtual-APIC page.
    pub(crate) fn apic_access(&mut self, offset: u16, size: usize, access: Access) -> Exec {
        let contained = offset & 0xc == 0 && usize::from(offset & 3) + size <= 4;
        let second =
            self.vmx.apic.written.is_some_and(|done| access == Access::Read || done != (offset, size));
        let register = 1u64.checked_shl(u32::from(offset >> 4)).unwrap_or(0);
        let registers = self.under_secondary(secondary::APIC_REGISTER_VIRTUALIZATION);
        let virtualized = match access {
            Access::Fetch => false,
            Access::Read if registers => READABLE & register != 0,
            Access::Write if registers => WRITABLE & register != 0,
            Access::Write if self.interrupt_delivery() => {
                matches!(offset, register::TPR | register::EOI | register::ICR_LOW)
            }
            Access::Read | Access::Write => offset == register::TPR,
        };
        if self.tpr_shadow() && contained && !second && virtualized {
            return Ok(());
        }
        let kind = match access {
            Access::Fetch => access_type::LINEAR_FETCH,
            _ if self.delivering => access_type::LINEAR_IN_DELIVERY,
            Access::Read => access_type::LINEAR_READ,
            Access::Write => access_type::LINEAR_WRITE,
        };
        Err(self.vm_exit(reason::APIC_ACCESS, u64::from(offset) | kind))
    }

    /// The read that [`Cpu::apic_access`] let pass.
    pub(crate) fn read_apic_page(&mut self, offset: u16, data: &mut [u8]) {
        self.memory.read(self.vmx.controls.virtual_apic_page + u64::from(offset), data);
    }

    /// The write that [`Cpu::apic_access`] let pass.
    pub(crate) fn write_apic_page(&mut self, offset: u16, data: &[u8]) {
        self.memory.write(self.vmx.controls.virtual_apic_page + u64::from(offset), data);
        self.vmx.apic.written = Some((offset, data.len()));
        self.attend();
        self.leave_block();
    }

    /// A guest-physical address that no linear address translates to (a paging-structure entry) is in the APIC-access
    /// page ("APIC Accesses Not Directly Resulting From Linear Addresses").
    pub(crate) fn apic_access_by_physical_address(&mut self) -> Trap {
        let kind = if self.delivering { access_type::PHYSICAL_IN_DELIVERY } else { access_type::PHYSICAL };
        self.vm_exit(reason::APIC_ACCESS, kind)
    }

    /// "APIC-Write Emulation".
    fn emulate_apic_write(&mut self, offset: u16) {
        let delivery = self.interrupt_delivery();
        match offset {
            register::TPR => {
                let value = self.apic_register(register::TPR);
                self.set_apic_register(register::TPR, value & 0xff);
                self.virtualize_tpr();
            }
            register::EOI if delivery => {
                self.set_apic_register(register::EOI, 0);
                self.virtualize_eoi();
            }
            register::ICR_LOW if delivery => {
                let value = self.apic_register(register::ICR_LOW);
                let vector = value as u8;
                if value & SELF_IPI_MASK == SELF_IPI && vector >= 16 {
                    self.virtualize_self_ipi(vector);
                } else {
                    self.exit_after(reason::APIC_WRITE, u64::from(offset));
                }
            }
            register::ICR_HIGH..=register::ICR_HIGH_END => {
                let value = self.apic_register(register::ICR_HIGH);
                self.set_apic_register(register::ICR_HIGH, value & 0xff00_0000);
            }
            _ => self.exit_after(reason::APIC_WRITE, u64::from(offset)),
        }
    }
}

/// "Virtualizing MSR-Based APIC Accesses". None of it depends on the mode that the local APIC is in.
impl Cpu {
    fn x2apic_offset(&self, index: u32) -> Option<u16> {
        let ours = matches!(index, msr::X2APIC_FIRST..=msr::X2APIC_LAST)
            && self.under_secondary(secondary::VIRTUALIZE_X2APIC);
        ours.then_some((index & 0xff) as u16 * 16)
    }

    /// RDMSR, if it is virtualized.
    pub(crate) fn virtual_x2apic_read(&mut self, index: u32) -> Option<u64> {
        let offset = self.x2apic_offset(index)?;
        let registers = self.under_secondary(secondary::APIC_REGISTER_VIRTUALIZATION);
        if offset != register::TPR && !registers {
            return None;
        }
        let mut bytes = [0; 8];
        self.memory.read(self.vmx.controls.virtual_apic_page + u64::from(offset), &mut bytes);
        Some(u64::from_le_bytes(bytes))
    }

    /// WRMSR; false if it is not virtualized.
    pub(crate) fn virtual_x2apic_write(&mut self, index: u32, value: u64) -> Result<bool, MsrRefused> {
        let Some(offset) = self.x2apic_offset(index) else { return Ok(false) };
        let allowed = match offset {
            register::TPR => 0xff,
            register::EOI if self.interrupt_delivery() => 0,
            register::SELF_IPI if self.interrupt_delivery() => 0xff,
            _ => return Ok(false),
        };
        if value & !allowed != 0 {
            return Err(MsrRefused);
        }
        self.memory.write(self.vmx.controls.virtual_apic_page + u64::from(offset), &value.to_le_bytes());
        match offset {
            register::TPR => self.virtualize_tpr(),
            register::EOI => self.virtualize_eoi(),
            _ if value >= 16 => self.virtualize_self_ipi(value as u8),
            _ => self.exit_after(reason::APIC_WRITE, u64::from(offset)),
        }
        Ok(true)
    }
}

/// "Posted-Interrupt Processing".
impl Cpu {
    /// The external interrupt that was just acknowledged: true if it was the notification of posted interrupts, which
    /// are requested by now, and causes no VM exit.
    pub(crate) fn process_posted_interrupts(&mut self, vector: u8) -> bool {
        if !self.non_root()
            || !self.vmx.controls.has_pin(pin::POSTED_INTERRUPTS)
            || self.vmx.controls.posted_interrupt_vector != vector
        {
            return false;
        }
        let descriptor = self.vmx.controls.posted_interrupt_descriptor;
        if let Some(word) = self.memory.entry64(descriptor + OUTSTANDING_AT) {
            word.fetch_and(!OUTSTANDING, Ordering::SeqCst);
        }
        self.dismiss_interrupt();
        let mut highest = self.rvi();
        for i in 0..4u8 {
            let Some(word) = self.memory.entry64(descriptor + 8 * u64::from(i)) else { continue };
            let requests = word.swap(0, Ordering::SeqCst);
            if requests != 0 {
                highest = highest.max(i * 64 + requests.ilog2() as u8);
            }
            for (half, bits) in [(0, requests as u32), (1, (requests >> 32) as u32)] {
                let at = register::IRR + (u16::from(i) * 2 + half) * 16;
                let old = self.apic_register(at);
                self.set_apic_register(at, old | bits);
            }
        }
        self.memory.wrote(descriptor, OUTSTANDING_AT + 8);
        self.set_rvi(highest);
        self.evaluate_virtual_interrupts();
        true
    }

    /// End of interrupt at the processor's own local APIC.
    fn dismiss_interrupt(&mut self) {
        let base = self.bus().read_msr(msr::IA32_APIC_BASE).unwrap_or(apic_base::DEFAULT);
        let end = register::EOI;
        if base & apic_base::X2APIC != 0 {
            // An APIC in x2APIC mode accepts this write.
            let _ = self.bus().write_msr(msr::X2APIC_FIRST + u32::from(end / 16), 0);
        } else {
            self.bus().mmio_write((base & !4095) + u64::from(end), &[0; 4]);
        }
    }
}
