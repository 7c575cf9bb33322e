//! The local APIC: one [`Lapic`] per vCPU, all of them joined by [`Apics`], the interrupt message bus.
//!
//! A [`Lapic`] is one APIC's state and what the SDM says about it: modes, priorities, acceptance, EOI, local
//! vector table. Register decoding (xAPIC MMIO and x2APIC MSRs) is in `registers`, the timer in `timer`,
//! destinations and inter-processor interrupts in `network`.
//!
//! Invariants:
//! - `Attention::INTERRUPT` of the vCPU is set exactly while [`Lapic::wants_cpu`], as of the last release of the
//!   APIC's lock. Every method that changes what that depends on ends in `refresh`.
//! - An APIC never calls out with its lock held, except to its vCPU's signal and to the clock. What it wants of
//!   others (an IPI, an EOI to the I/O APIC) it hands back as an [`Effect`].
//!
//! Must not know: the I/O APIC, the 8259s, engines.
//!
//! SDM volume 3, chapter "Advanced Programmable Interrupt Controller (APIC)".

mod network;
mod registers;
#[cfg(test)]
mod tests;
mod timer;
mod vectors;

use std::sync::Arc;

use turtles_cpu::attention::Attention;

use crate::clock::{Clock, TimerId};
use crate::vcpu_signal::VcpuSignal;

pub use network::{Apics, DeliveryMode, Destination, Message};
pub use timer::APIC_TIMER_HZ;
use timer::{ApicTimer, TimerMode};
use vectors::VectorSet;

/// Where the APIC's registers are after reset.
pub const APIC_DEFAULT_BASE: u64 = 0xfee0_0000;

/// IA32_APIC_BASE: this is the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const BASE_EXTD: u64 = 1 << 10;
/// IA32_APIC_BASE: APIC globally enabled.
pub const BASE_ENABLE: u64 = 1 << 11;

/// The access is one that raises #GP(0) in the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GeneralProtection;

/// The APIC's mode, from IA32_APIC_BASE.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ApicMode {
    /// EN = 0: the processor has no APIC; LINT0 is its INTR pin.
    Disabled,
    /// EN = 1, EXTD = 0: registers in memory.
    Xapic,
    /// EN = 1, EXTD = 1: registers are MSRs.
    X2apic,
}

impl ApicMode {
    /// None for EXTD without EN, which is invalid.
    fn from_base(base: u64) -> Option<Self> {
        match (base & BASE_ENABLE != 0, base & BASE_EXTD != 0) {
            (false, false) => Some(Self::Disabled),
            (true, false) => Some(Self::Xapic),
            (true, true) => Some(Self::X2apic),
            (false, true) => None,
        }
    }
}

/// What a register write asks of the rest of the machine.
#[must_use]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The EOI of a level-triggered vector is broadcast to the I/O APICs.
    EoiBroadcast(u8),
    /// An interrupt message goes out.
    Send(Message),
}

/// Entries of the local vector table, in the order of [`Lapic::lvt`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub(crate) enum Lvt {
    Cmci,
    Timer,
    Thermal,
    PerfMon,
    Lint0,
    Lint1,
    Error,
}

const LVT_COUNT: usize = 7;
const LVT_MASKED: u32 = 1 << 16;
const LVT_LEVEL: u32 = 1 << 15;
const LVT_REMOTE_IRR: u32 = 1 << 14;

const SVR_ENABLE: u32 = 1 << 8;
const SVR_SUPPRESS_EOI: u32 = 1 << 12;

const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// One local APIC.
pub struct Lapic {
    id: u32,
    base: u64,
    physical_bits: u8,
    tpr: u8,
    /// LDR and DFR of xAPIC mode; x2APIC derives its LDR from the ID and has no DFR.
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: VectorSet,
    tmr: VectorSet,
    irr: VectorSet,
    /// ESR as it reads, and the errors that the next write to it moves there.
    esr: u32,
    new_errors: u32,
    icr: u64,
    lvt: [u32; LVT_COUNT],
    lint: [bool; 2],
    timer: ApicTimer,
    timer_id: TimerId,
    clock: Arc<Clock>,
    signal: Arc<VcpuSignal>,
}

impl Lapic {
    fn new(
        id: u32,
        physical_bits: u8,
        clock: Arc<Clock>,
        timer_id: TimerId,
        signal: Arc<VcpuSignal>,
    ) -> Self {
        let mut apic = Self {
            id,
            base: 0,
            physical_bits,
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            irr: VectorSet::default(),
            esr: 0,
            new_errors: 0,
            icr: 0,
            lvt: [0; LVT_COUNT],
            lint: [false; 2],
            timer: ApicTimer::new(),
            timer_id,
            clock,
            signal,
        };
        apic.power_up();
        apic
    }

    /// State after power-up or reset. The bootstrap processor's LINT0 is then in virtual wire mode: what
    /// firmware would have set up before it starts an operating system (MP specification, "Virtual Wire Mode").
    pub(crate) fn power_up(&mut self) {
        self.base = APIC_DEFAULT_BASE | BASE_ENABLE | if self.id == 0 { BASE_BSP } else { 0 };
        self.init();
        if self.id == 0 {
            self.lvt[Lvt::Lint0 as usize] = (DeliveryMode::ExtInt as u32) << 8;
        }
        self.refresh();
    }

    /// INIT: everything but the ID and IA32_APIC_BASE ("Local APIC State After It Receives an INIT-Deassert").
    pub(crate) fn init(&mut self) {
        self.tpr = 0;
        self.ldr = 0;
        self.dfr = u32::MAX;
        self.svr = 0xff;
        self.isr = VectorSet::default();
        self.tmr = VectorSet::default();
        self.irr = VectorSet::default();
        self.esr = 0;
        self.new_errors = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; LVT_COUNT];
        self.timer.reset();
        self.arm();
        self.refresh();
    }

    /// The APIC's mode.
    pub fn mode(&self) -> ApicMode {
        ApicMode::from_base(self.base).unwrap_or(ApicMode::Disabled)
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// WRMSR to IA32_APIC_BASE: only the transitions of "x2APIC State Transitions" are legal.
    pub fn set_base(&mut self, value: u64) -> Result<(), GeneralProtection> {
        let address = ((1u64 << self.physical_bits.clamp(36, 52)) - 1) & !0xfff;
        if value & !(address | BASE_BSP | BASE_EXTD | BASE_ENABLE) != 0 {
            return Err(GeneralProtection);
        }
        let mode = ApicMode::from_base(value).ok_or(GeneralProtection)?;
        match (self.mode(), mode) {
            (ApicMode::Disabled, ApicMode::X2apic) | (ApicMode::X2apic, ApicMode::Xapic) => {
                return Err(GeneralProtection);
            }
            // Enabled again it is as after power-up, so it may as well be cleared now.
            (ApicMode::Xapic | ApicMode::X2apic, ApicMode::Disabled) => self.init(),
            (ApicMode::Xapic, ApicMode::X2apic) => self.icr &= 0xffff_ffff,
            _ => {}
        }
        self.base = value;
        self.refresh();
        Ok(())
    }

    fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    /// The task priority register.
    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    /// Sets the task priority register; CR8 is its upper half.
    pub fn set_tpr(&mut self, value: u8) {
        self.tpr = value;
        self.refresh();
    }

    /// The processor priority register: the higher of the task's and the class of the vector in service.
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// The highest vector that may interrupt the processor now.
    pub fn pending_vector(&self) -> Option<u8> {
        if self.mode() == ApicMode::Disabled {
            return None;
        }
        self.irr.highest().filter(|vector| vector & 0xf0 > self.ppr() & 0xf0)
    }

    /// Moves the highest deliverable vector from IRR to ISR.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending_vector()?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        self.refresh();
        Some(vector)
    }

    /// LINT0 passes the 8259's INTR on to the processor and INTR is high.
    pub fn external_interrupt(&self) -> bool {
        self.lint[0] && self.passes_external_interrupts()
    }

    fn passes_external_interrupts(&self) -> bool {
        let lint0 = self.lvt[Lvt::Lint0 as usize];
        self.mode() == ApicMode::Disabled
            || (lint0 & LVT_MASKED == 0 && DeliveryMode::from_bits(lint0 >> 8) == Some(DeliveryMode::ExtInt))
    }

    /// Something would interrupt the processor if its flags let it.
    pub fn wants_cpu(&self) -> bool {
        self.pending_vector().is_some() || self.external_interrupt()
    }

    fn refresh(&mut self) {
        // Only this APIC changes the flag, so a look spares most of the atomic writes: CR8 is written often.
        let told = self.signal.attention.get() & Attention::INTERRUPT != 0;
        match (self.wants_cpu(), told) {
            (true, false) => self.signal.raise(Attention::INTERRUPT),
            (false, true) => self.signal.clear(Attention::INTERRUPT),
            _ => {}
        }
    }

    /// A fixed interrupt arrives, from the bus or from the local vector table. False if it is refused.
    fn accept(&mut self, vector: u8, level: bool) -> bool {
        if self.mode() == ApicMode::Disabled || !self.software_enabled() {
            return false;
        }
        if vector < 16 {
            self.record_error(ESR_RECEIVE_ILLEGAL_VECTOR);
            return true;
        }
        self.irr.insert(vector);
        self.tmr.assign(vector, level);
        self.refresh();
        true
    }

    fn record_error(&mut self, error: u32) {
        self.new_errors |= error;
        let lvt = self.lvt[Lvt::Error as usize];
        let vector = lvt as u8;
        if lvt & LVT_MASKED != 0 {
            return;
        }
        if vector < 16 {
            self.new_errors |= ESR_RECEIVE_ILLEGAL_VECTOR;
        } else {
            self.irr.insert(vector);
            self.tmr.remove(vector);
            self.refresh();
        }
    }

    /// EOI: ends the highest vector in service.
    fn end_of_interrupt(&mut self) -> Effect {
        let Some(vector) = self.isr.highest() else { return Effect::None };
        self.isr.remove(vector);
        let level = self.tmr.contains(vector);
        if level {
            self.end_local_level(vector);
        }
        self.refresh();
        if level && self.svr & SVR_SUPPRESS_EOI == 0 { Effect::EoiBroadcast(vector) } else { Effect::None }
    }

    /// A level-triggered LINT pin may be the one that was waiting for this EOI.
    fn end_local_level(&mut self, vector: u8) {
        for (pin, entry) in [Lvt::Lint0, Lvt::Lint1].into_iter().enumerate() {
            let lvt = &mut self.lvt[entry as usize];
            if *lvt & LVT_REMOTE_IRR != 0 && *lvt as u8 == vector {
                *lvt &= !LVT_REMOTE_IRR;
                if self.lint[pin] {
                    self.raise_local(entry);
                }
            }
        }
    }

    /// Drives local interrupt pin `pin` (0 or 1).
    pub(crate) fn set_lint(&mut self, pin: usize, level: bool) {
        let Some(before) = self.lint.get_mut(pin).map(|line| std::mem::replace(line, level)) else { return };
        if level && !before {
            let entry = if pin == 0 { Lvt::Lint0 } else { Lvt::Lint1 };
            if self.mode() == ApicMode::Disabled {
                if pin == 1 {
                    self.signal.raise(Attention::NMI);
                }
            } else {
                self.raise_local(entry);
            }
        }
        self.refresh();
    }

    /// The source of a local vector table entry asks for its interrupt.
    fn raise_local(&mut self, entry: Lvt) {
        let lvt = self.lvt[entry as usize];
        if lvt & LVT_MASKED != 0 || self.mode() == ApicMode::Disabled {
            return;
        }
        let mode = match entry {
            Lvt::Timer | Lvt::Error => Some(DeliveryMode::Fixed),
            _ => DeliveryMode::from_bits(lvt >> 8),
        };
        match mode {
            Some(DeliveryMode::Fixed) => {
                let pin = matches!(entry, Lvt::Lint0 | Lvt::Lint1);
                let level = pin && lvt & LVT_LEVEL != 0;
                if level && lvt & LVT_REMOTE_IRR != 0 {
                    return;
                }
                if self.accept(lvt as u8, level) && level {
                    self.lvt[entry as usize] |= LVT_REMOTE_IRR;
                }
            }
            Some(DeliveryMode::Nmi) => self.signal.raise(Attention::NMI),
            Some(DeliveryMode::Init) => self.signal.init(),
            // ExtINT is a level that `external_interrupt` reads.
            Some(DeliveryMode::ExtInt) => {}
            // UNSUPPORTED: SMI. The machine has no SMM, and an SMI without a handler changes nothing.
            Some(DeliveryMode::Smi) => {}
            // Not defined for the local vector table.
            Some(DeliveryMode::LowestPriority | DeliveryMode::StartUp) | None => {}
        }
    }

    /// A counter of the performance monitor overflowed; the processor then masks the entry ("Generating an
    /// Interrupt on Overflow").
    pub fn raise_performance_monitor(&mut self) {
        self.raise_local(Lvt::PerfMon);
        self.lvt[Lvt::PerfMon as usize] |= LVT_MASKED;
    }

    /// The clock says that time has passed.
    pub(crate) fn tick(&mut self, now: u64) {
        if self.timer.expire(now) {
            self.raise_local(Lvt::Timer);
        }
        self.arm();
    }

    /// Arms the clock for the timer's next expiry. A masked periodic timer needs no wake-up: it catches up when
    /// it is looked at.
    fn arm(&self) {
        let masked = self.lvt[Lvt::Timer as usize] & LVT_MASKED != 0;
        match self.timer.wake_at() {
            Some(at) if !masked => self.clock.arm(self.timer_id, at),
            _ => self.clock.disarm(self.timer_id),
        }
    }

    /// Lets the timer catch up with guest time before a register is looked at or changed.
    fn catch_up(&mut self) -> u64 {
        let now = self.clock.now_ns();
        if self.timer.expire(now) {
            self.raise_local(Lvt::Timer);
        }
        now
    }

    /// IA32_TSC_DEADLINE; reads zero outside TSC-deadline mode and after it has passed.
    pub fn tsc_deadline(&mut self) -> u64 {
        self.catch_up();
        self.arm();
        self.timer.tsc_deadline()
    }

    /// WRMSR to IA32_TSC_DEADLINE.
    pub fn set_tsc_deadline(&mut self, value: u64) {
        let now = self.catch_up();
        self.timer.set_tsc_deadline(value, &self.clock, now);
        self.tick(now);
    }

    /// The guest moved its TSC: it is now `offset` (modulo 2^64) ahead of the clock's.
    pub fn set_tsc_offset(&mut self, offset: u64) {
        let now = self.catch_up();
        self.timer.set_tsc_offset(offset, &self.clock, now);
        self.tick(now);
    }

    fn set_lvt(&mut self, entry: Lvt, value: u32) {
        let now = self.catch_up();
        let writable = registers::lvt_bits(entry) & !(LVT_REMOTE_IRR | 1 << 12);
        let lvt = &mut self.lvt[entry as usize];
        let mut new = value & writable;
        if self.svr & SVR_ENABLE == 0 {
            new |= LVT_MASKED;
        }
        if new & LVT_LEVEL != 0 {
            new |= *lvt & LVT_REMOTE_IRR;
        }
        *lvt = new;
        if entry == Lvt::Timer {
            self.timer.set_mode(TimerMode::from_lvt(value));
            self.tick(now);
        }
        // A level on a pin that was just unmasked counts.
        let pin = match entry {
            Lvt::Lint0 => 0,
            Lvt::Lint1 => 1,
            _ => return,
        };
        if self.lint[pin] && new & LVT_LEVEL != 0 {
            self.raise_local(entry);
        }
        self.refresh();
    }

    fn set_svr(&mut self, value: u32) {
        self.catch_up();
        self.svr = value & registers::SVR_BITS;
        if !self.software_enabled() {
            self.lvt.iter_mut().for_each(|lvt| *lvt |= LVT_MASKED);
        }
        self.arm();
        self.refresh();
    }
}
