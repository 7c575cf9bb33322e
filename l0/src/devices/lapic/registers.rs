//! The local APIC's registers, as xAPIC MMIO and as x2APIC MSRs.
//!
//! Both interfaces number registers alike: MMIO offset 16 * n is MSR 0x800 + n. What differs is which exist and
//! how strict they are, so one table of reads and writes serves both, and each front checks its own rules.

use super::network::{DeliveryMode, Destination, Message};
use super::{ApicMode, ESR_ILLEGAL_REGISTER, ESR_SEND_ILLEGAL_VECTOR, Effect, GeneralProtection, Lapic, Lvt};

/// Version 14H, seven LVT entries (the field holds one less), EOI-broadcast suppression.
const VERSION: u32 = 0x14 | 6 << 16 | 1 << 24;

pub(super) const SVR_BITS: u32 = 0x11ff;
const ICR_RESERVED: u64 = 0xfff3_2000;
const ICR_STATUS: u64 = 1 << 12;

const ID: u16 = 0x02;
const VER: u16 = 0x03;
const TPR: u16 = 0x08;
const APR: u16 = 0x09;
const PPR: u16 = 0x0a;
const EOI: u16 = 0x0b;
const RRD: u16 = 0x0c;
const LDR: u16 = 0x0d;
const DFR: u16 = 0x0e;
const SVR: u16 = 0x0f;
const ISR: u16 = 0x10;
const ISR_END: u16 = 0x17;
const TMR: u16 = 0x18;
const TMR_END: u16 = 0x1f;
const IRR: u16 = 0x20;
const IRR_END: u16 = 0x27;
const ESR: u16 = 0x28;
const ICR: u16 = 0x30;
const ICR_HIGH: u16 = 0x31;
const INITIAL_COUNT: u16 = 0x38;
const CURRENT_COUNT: u16 = 0x39;
const DIVIDE: u16 = 0x3e;
const SELF_IPI: u16 = 0x3f;

fn lvt_at(index: u16) -> Option<Lvt> {
    Some(match index {
        0x2f => Lvt::Cmci,
        0x32 => Lvt::Timer,
        0x33 => Lvt::Thermal,
        0x34 => Lvt::PerfMon,
        0x35 => Lvt::Lint0,
        0x36 => Lvt::Lint1,
        0x37 => Lvt::Error,
        _ => return None,
    })
}

/// The bits that an entry defines, those software cannot change included.
pub(super) fn lvt_bits(entry: Lvt) -> u32 {
    match entry {
        Lvt::Timer => 0x0007_10ff,
        Lvt::Cmci | Lvt::Thermal | Lvt::PerfMon => 0x0001_17ff,
        Lvt::Lint0 | Lvt::Lint1 => 0x0001_f7ff,
        Lvt::Error => 0x0001_10ff,
    }
}

impl Lapic {
    /// A load from the register page. Registers are 32 bits wide on 16-byte boundaries.
    pub fn read_mmio(&mut self, offset: u64, data: &mut [u8]) {
        if self.mode() != ApicMode::Xapic || offset >= 0x1000 {
            data.fill(0xff);
            return;
        }
        let value = match self.read_register((offset >> 4) as u16) {
            Some(value) => value,
            None => {
                self.record_error(ESR_ILLEGAL_REGISTER);
                0
            }
        };
        // Parts of a register can be read; the twelve bytes between registers are zero.
        let start = (offset & 15) as usize;
        let bytes = value.to_le_bytes();
        for (at, byte) in (start..).zip(data) {
            *byte = bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// A store to the register page; only aligned 32-bit stores are defined.
    pub fn write_mmio(&mut self, offset: u64, data: &[u8]) -> Effect {
        if self.mode() != ApicMode::Xapic || offset >= 0x1000 || offset & 15 != 0 {
            return Effect::None;
        }
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return Effect::None };
        self.write_register((offset >> 4) as u16, u32::from_le_bytes(bytes)).unwrap_or_else(|| {
            self.record_error(ESR_ILLEGAL_REGISTER);
            Effect::None
        })
    }

    /// RDMSR of 0x800 to 0x8ff.
    pub fn read_msr(&mut self, msr: u32) -> Result<u64, GeneralProtection> {
        let index = self.x2apic_index(msr)?;
        match index {
            APR | EOI | RRD | DFR | ICR_HIGH | SELF_IPI => Err(GeneralProtection),
            ICR => Ok(self.icr),
            _ => self.read_register(index).map(u64::from).ok_or(GeneralProtection),
        }
    }

    /// WRMSR to 0x800 to 0x8ff.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<Effect, GeneralProtection> {
        let index = self.x2apic_index(msr)?;
        let allowed = match index {
            ICR if value & ICR_RESERVED != 0 => return Err(GeneralProtection),
            ICR => {
                self.icr = value & !ICR_STATUS;
                return Ok(self.send_ipi());
            }
            TPR | SELF_IPI => 0xff,
            EOI | ESR => 0,
            SVR => SVR_BITS,
            INITIAL_COUNT => u32::MAX,
            DIVIDE => 0xb,
            _ => lvt_at(index).map(lvt_bits).ok_or(GeneralProtection)?,
        };
        if value & !u64::from(allowed) != 0 {
            return Err(GeneralProtection);
        }
        if index == SELF_IPI {
            return Ok(self.send_self(value as u8));
        }
        self.write_register(index, value as u32).ok_or(GeneralProtection)
    }

    fn x2apic_index(&self, msr: u32) -> Result<u16, GeneralProtection> {
        match msr.checked_sub(0x800) {
            Some(index @ 0..=0xff) if self.mode() == ApicMode::X2apic => Ok(index as u16),
            _ => Err(GeneralProtection),
        }
    }

    fn read_register(&mut self, index: u16) -> Option<u32> {
        Some(match index {
            ID if self.mode() == ApicMode::X2apic => self.id,
            ID => self.id << 24,
            VER => VERSION,
            TPR => self.tpr.into(),
            PPR => self.ppr().into(),
            // Not there since the Pentium 4, EOI and the self IPI are write-only: they read zero without error.
            APR | RRD | EOI => 0,
            LDR => self.logical_id(),
            DFR => self.dfr,
            SVR => self.svr,
            ISR..=ISR_END => self.isr.word(index),
            TMR..=TMR_END => self.tmr.word(index),
            IRR..=IRR_END => self.irr.word(index),
            ESR => self.esr,
            ICR => self.icr as u32,
            ICR_HIGH => (self.icr >> 32) as u32,
            INITIAL_COUNT => self.timer.initial_count(),
            CURRENT_COUNT => {
                let now = self.catch_up();
                self.arm();
                self.timer.current_count(now)
            }
            DIVIDE => self.timer.divide_config(),
            _ => self.lvt[lvt_at(index)? as usize],
        })
    }

    fn write_register(&mut self, index: u16, value: u32) -> Option<Effect> {
        match index {
            // DEVIATION: software cannot change the ID, as on recent processors.
            ID | VER | APR | PPR | RRD | CURRENT_COUNT => {}
            ISR..=IRR_END => {}
            TPR => self.set_tpr(value as u8),
            EOI => return Some(self.end_of_interrupt()),
            LDR => self.ldr = value & 0xff00_0000,
            DFR => self.dfr = value | 0x0fff_ffff,
            SVR => self.set_svr(value),
            ESR => self.esr = std::mem::take(&mut self.new_errors),
            ICR => {
                self.icr = (self.icr & !0xffff_ffff) | u64::from(value) & !(ICR_RESERVED | ICR_STATUS);
                return Some(self.send_ipi());
            }
            ICR_HIGH => self.icr = u64::from(value & 0xff00_0000) << 32 | self.icr & 0xffff_ffff,
            INITIAL_COUNT => {
                let now = self.catch_up();
                self.timer.set_initial_count(value, now);
                self.tick(now);
            }
            DIVIDE => {
                let now = self.catch_up();
                self.timer.set_divide_config(value, now);
                self.tick(now);
            }
            _ => self.set_lvt(lvt_at(index)?, value),
        }
        Some(Effect::None)
    }

    /// LDR: in x2APIC mode derived from the ID, cluster in the upper half ("Deriving Logical x2APIC ID").
    pub(super) fn logical_id(&self) -> u32 {
        match self.mode() {
            ApicMode::X2apic => (self.id >> 4) << 16 | 1 << (self.id & 15),
            _ => self.ldr,
        }
    }

    pub(super) fn destination_format(&self) -> u32 {
        self.dfr
    }

    fn send_self(&mut self, vector: u8) -> Effect {
        self.accept(vector, false);
        Effect::None
    }

    /// The write to ICR's low half sends.
    fn send_ipi(&mut self) -> Effect {
        let icr = self.icr;
        let vector = icr as u8;
        let Some(mode) = DeliveryMode::from_bits((icr >> 8) as u32) else { return Effect::None };
        let level = icr & 1 << 15 != 0;
        let assert = icr & 1 << 14 != 0;
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if vector < 16 => {
                self.record_error(ESR_SEND_ILLEGAL_VECTOR);
                return Effect::None;
            }
            // INIT level de-assert only synchronised arbitration IDs, on processors long gone.
            DeliveryMode::Init if level && !assert => return Effect::None,
            // Reserved for an IPI: only the I/O APIC and LINT0 send ExtINT.
            DeliveryMode::ExtInt => return Effect::None,
            _ => {}
        }
        let destination = match (icr >> 18) & 3 {
            0 => {
                let logical = icr & 1 << 11 != 0;
                match self.mode() {
                    ApicMode::X2apic => Destination::wide((icr >> 32) as u32, logical),
                    _ => Destination::narrow((icr >> 56) as u8, logical),
                }
            }
            1 => Destination::Only(self.id),
            2 => Destination::All,
            _ => Destination::AllBut(self.id),
        };
        // The trigger mode of an IPI is always edge, whatever the bit says ("Interrupt Command Register").
        Effect::Send(Message { destination, mode, vector, level_triggered: false })
    }
}
