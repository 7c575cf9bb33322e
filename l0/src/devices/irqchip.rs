//! All interrupt controllers of the PC, wired: devices and MSIs on one side, vCPUs on the other.
//!
//! ISA interrupt n reaches input n of the 8259s and input n of the I/O APIC, but for the timer's: interrupt 0 is
//! I/O APIC input 2, as the MADT's override says. GSIs 16 to 23 reach the I/O APIC alone. The 8259s' INTR is LINT0
//! of the bootstrap processor; LINT1 of every processor is the platform's NMI.
//!
//! Locks: 8259s → one local APIC, I/O APIC → one local APIC; never the other way and never two local APICs. So
//! everything here is a leaf for devices: they may call with their own lock held.
//!
//! Must not know: devices, engines.

use std::sync::{Arc, Mutex};

use super::ioapic::{IOAPIC_BASE, IOAPIC_PINS, IOAPIC_SIZE, IoApic};
use super::lapic::{ApicMode, Apics, DeliveryMode, Destination, GeneralProtection, Message};
use super::pic::{ELCR_PORT, MASTER_PORT, PicPair, SLAVE_PORT};
use super::window::{Window, read_bytes, write_bytes};
use super::{Bus, IrqRouter, MsiSink};
use crate::clock::Clock;
use crate::vcpu_signal::{VcpuSignal, lock};

/// The interrupt controllers of a machine.
pub struct IrqChip {
    apics: Apics,
    ioapic: Mutex<IoApic>,
    pic: Mutex<PicPair>,
}

impl IrqChip {
    /// Controllers for the vCPUs with these mailboxes, the first of which is the bootstrap processor.
    /// `physical_bits` is CPUID's MAXPHYADDR.
    pub fn new(clock: &Arc<Clock>, signals: &[Arc<VcpuSignal>], physical_bits: u8) -> Arc<Self> {
        Arc::new(Self {
            apics: Apics::new(clock, signals, physical_bits),
            ioapic: Mutex::default(),
            pic: Mutex::default(),
        })
    }

    /// Puts the 8259s' and the I/O APIC's registers on the buses; false if their place is taken. The local APICs'
    /// page is each vCPU's own and is not on a bus.
    pub fn attach(self: &Arc<Self>, ports: &Bus, mmio: &Bus) -> bool {
        let master = Window::shared(
            self,
            |chip, at, data| read_bytes(at, data, |at| chip.pic_read(at)),
            |chip, at, data| write_bytes(at, data, |at, byte| chip.pic_write(at, byte)),
        );
        let slave = Window::shared(
            self,
            |chip, at, data| read_bytes(at, data, |at| chip.pic_read(at + 2)),
            |chip, at, data| write_bytes(at, data, |at, byte| chip.pic_write(at + 2, byte)),
        );
        let elcr = Window::shared(
            self,
            |chip, at, data| read_bytes(at, data, |at| lock(&chip.pic).read_elcr(at)),
            |chip, at, data| {
                write_bytes(at, data, |at, byte| chip.with_pic(|pic| pic.write_elcr(at, byte)));
            },
        );
        let ioapic = Window::shared(
            self,
            |chip, at, data| lock(&chip.ioapic).read(at, data),
            |chip, at, data| lock(&chip.ioapic).write(at, data, &mut |message| chip.apics.deliver(message)),
        );
        ports.insert(MASTER_PORT, 2, master)
            && ports.insert(SLAVE_PORT, 2, slave)
            && ports.insert(ELCR_PORT, 2, elcr)
            && mmio.insert(IOAPIC_BASE, IOAPIC_SIZE, ioapic)
    }

    fn pic_read(&self, register: u64) -> u8 {
        self.with_pic(|pic| pic.read(register))
    }

    fn pic_write(&self, register: u64, value: u8) {
        self.with_pic(|pic| pic.write(register, value));
    }

    /// Works on the 8259s and passes their INTR on before anyone else can change it.
    fn with_pic<T>(&self, work: impl FnOnce(&mut PicPair) -> T) -> T {
        let mut pic = lock(&self.pic);
        let result = work(&mut pic);
        if self.apics.count() > 0 {
            self.apics.apic(0).set_lint(0, pic.intr());
        }
        result
    }

    /// Something would interrupt `vcpu` if its flags let it.
    pub fn interrupt_pending(&self, vcpu: usize) -> bool {
        self.apics.apic(vcpu).wants_cpu()
    }

    /// The vCPU takes an interrupt: its vector, from the local APIC or, through it, from the 8259s.
    pub fn acknowledge(&self, vcpu: usize) -> Option<u8> {
        let external = {
            let mut apic = self.apics.apic(vcpu);
            if let Some(vector) = apic.acknowledge() {
                return Some(vector);
            }
            apic.external_interrupt()
        };
        // The request may have gone since; then there is no interrupt, which spares the guest a spurious one.
        external.then(|| self.with_pic(|pic| pic.intr().then(|| pic.acknowledge()))).flatten()
    }

    /// The highest vector that the local APIC would deliver to `vcpu` now.
    pub fn pending_vector(&self, vcpu: usize) -> Option<u8> {
        self.apics.apic(vcpu).pending_vector()
    }

    /// Where `vcpu` sees its APIC's register page, in xAPIC mode.
    pub fn apic_page(&self, vcpu: usize) -> Option<u64> {
        let apic = self.apics.apic(vcpu);
        (apic.mode() == ApicMode::Xapic).then(|| apic.base() & !0xfff)
    }

    /// `vcpu` loads from its APIC page.
    pub fn apic_mmio_read(&self, vcpu: usize, offset: u64, data: &mut [u8]) {
        self.apics.apic(vcpu).read_mmio(offset, data);
    }

    /// `vcpu` stores to its APIC page.
    pub fn apic_mmio_write(&self, vcpu: usize, offset: u64, data: &[u8]) {
        let ended = self.apics.write_mmio(vcpu, offset, data);
        self.broadcast_eoi(ended);
    }

    /// RDMSR of an x2APIC register (0x800 to 0x8ff).
    pub fn apic_msr_read(&self, vcpu: usize, msr: u32) -> Result<u64, GeneralProtection> {
        self.apics.apic(vcpu).read_msr(msr)
    }

    /// WRMSR to an x2APIC register (0x800 to 0x8ff).
    pub fn apic_msr_write(&self, vcpu: usize, msr: u32, value: u64) -> Result<(), GeneralProtection> {
        let ended = self.apics.write_msr(vcpu, msr, value)?;
        self.broadcast_eoi(ended);
        Ok(())
    }

    fn broadcast_eoi(&self, vector: Option<u8>) {
        if let Some(vector) = vector {
            lock(&self.ioapic).end_of_interrupt(vector, &mut |message| self.apics.deliver(message));
        }
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self, vcpu: usize) -> u64 {
        self.apics.apic(vcpu).base()
    }

    /// WRMSR to IA32_APIC_BASE.
    pub fn set_apic_base(&self, vcpu: usize, value: u64) -> Result<(), GeneralProtection> {
        self.apics.apic(vcpu).set_base(value)
    }

    /// CR8: the task priority class.
    pub fn cr8(&self, vcpu: usize) -> u8 {
        self.tpr(vcpu) >> 4
    }

    /// MOV to CR8. The reserved bits raise #GP before it comes to this.
    pub fn set_cr8(&self, vcpu: usize, value: u8) {
        self.set_tpr(vcpu, value << 4);
    }

    /// The task priority register.
    pub fn tpr(&self, vcpu: usize) -> u8 {
        self.apics.apic(vcpu).tpr()
    }

    /// Sets the task priority register.
    pub fn set_tpr(&self, vcpu: usize, value: u8) {
        self.apics.apic(vcpu).set_tpr(value);
    }

    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self, vcpu: usize) -> u64 {
        self.apics.apic(vcpu).tsc_deadline()
    }

    /// WRMSR to IA32_TSC_DEADLINE.
    pub fn set_tsc_deadline(&self, vcpu: usize, value: u64) {
        self.apics.apic(vcpu).set_tsc_deadline(value);
    }

    /// The guest moved its TSC (IA32_TSC, IA32_TSC_ADJUST): it is now `offset` ahead of the clock's, modulo 2^64.
    pub fn set_tsc_offset(&self, vcpu: usize, offset: u64) {
        self.apics.apic(vcpu).set_tsc_offset(offset);
    }

    /// A performance counter of `vcpu` overflowed.
    pub fn raise_performance_monitor(&self, vcpu: usize) {
        self.apics.apic(vcpu).raise_performance_monitor();
    }

    /// The platform's NMI (the button on the front, so to speak): LINT1 of every processor.
    pub fn inject_nmi(&self) {
        for vcpu in 0..self.apics.count() {
            let mut apic = self.apics.apic(vcpu);
            apic.set_lint(1, true);
            apic.set_lint(1, false);
        }
    }

    /// `vcpu` received INIT: its APIC's part of that.
    pub fn init(&self, vcpu: usize) {
        self.apics.apic(vcpu).init();
    }

    /// Machine reset. Inputs stay as devices drive them; devices that are reset let go of theirs.
    pub fn reset(&self) {
        self.with_pic(PicPair::reset);
        lock(&self.ioapic).reset();
        for vcpu in 0..self.apics.count() {
            self.apics.apic(vcpu).power_up();
        }
    }
}

impl IrqRouter for IrqChip {
    fn set_irq(&self, gsi: u32, level: bool) {
        let pin = match gsi {
            0 => 2,
            // The cascade: no device has this one.
            2 => return,
            1..24 => gsi as usize,
            _ => return,
        };
        debug_assert!(pin < IOAPIC_PINS);
        if gsi < 16 {
            self.with_pic(|pic| pic.set_irq(gsi as u8, level));
        }
        lock(&self.ioapic).set_pin(pin, level, &mut |message| self.apics.deliver(message));
    }
}

impl MsiSink for IrqChip {
    /// SDM volume 3, "Message Signalled Interrupts".
    fn send(&self, address: u64, data: u32) {
        if address & !0xf_ffff != 0xfee0_0000 {
            return;
        }
        let Some(mode) = DeliveryMode::from_bits(data >> 8) else { return };
        let level_triggered = data & 1 << 15 != 0;
        // A level-triggered message that says "deasserted" has nothing to tell an edge-recording APIC.
        if level_triggered && data & 1 << 14 == 0 {
            return;
        }
        let redirect = address & 1 << 3 != 0;
        let logical = address & 1 << 2 != 0;
        let mode = if redirect && mode == DeliveryMode::Fixed { DeliveryMode::LowestPriority } else { mode };
        self.apics.deliver(&Message {
            destination: Destination::narrow((address >> 12) as u8, logical),
            mode,
            vector: data as u8,
            level_triggered,
        });
    }
}

#[cfg(test)]
#[path = "irqchip_tests.rs"]
mod tests;
