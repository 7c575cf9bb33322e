//! How interrupt messages find their APIC: destinations, lowest priority, inter-processor interrupts.
//!
//! Lock order: at most one APIC is locked at a time, and nothing is called with it locked but its vCPU's signal
//! and the clock. Senders (I/O APIC, 8259s, another vCPU) may hold locks of their own, never an APIC's.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use turtles_cpu::attention::Attention;

use super::{ApicMode, Effect, GeneralProtection, Lapic};
use crate::clock::{Clock, TimerClient};
use crate::vcpu_signal::{VcpuSignal, lock};

/// Delivery modes of messages and local vector table entries.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DeliveryMode {
    /// The vector, to all destinations.
    Fixed = 0,
    /// The vector, to the least busy of the destinations.
    LowestPriority = 1,
    /// System management interrupt.
    Smi = 2,
    /// Non-maskable interrupt.
    Nmi = 4,
    /// INIT signal.
    Init = 5,
    /// Start-up IPI.
    StartUp = 6,
    /// The 8259 has the vector.
    ExtInt = 7,
}

impl DeliveryMode {
    /// From the low three bits; None for the reserved encoding.
    pub fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => return None,
        })
    }
}

/// Who is to get a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Destination {
    /// Every APIC.
    All,
    /// Every APIC but the one with this ID.
    AllBut(u32),
    /// The APIC with this ID.
    Only(u32),
    /// Those whose logical ID matches.
    Logical(u32),
}

impl Destination {
    /// The 8-bit destination of an xAPIC, of the I/O APIC and of an MSI.
    pub fn narrow(destination: u8, logical: bool) -> Self {
        match (destination, logical) {
            (0xff, _) => Self::All,
            (mda, true) => Self::Logical(mda.into()),
            (id, false) => Self::Only(id.into()),
        }
    }

    /// The 32-bit destination of an x2APIC.
    pub fn wide(destination: u32, logical: bool) -> Self {
        match (destination, logical) {
            (u32::MAX, _) => Self::All,
            (mda, true) => Self::Logical(mda),
            (id, false) => Self::Only(id),
        }
    }

    fn matches(self, apic: &Lapic) -> bool {
        match self {
            Self::All => true,
            Self::AllBut(id) => apic.id != id,
            Self::Only(id) => apic.id == id,
            Self::Logical(mda) => matches_logical(apic, mda),
        }
    }
}

fn matches_logical(apic: &Lapic, mda: u32) -> bool {
    let id = apic.logical_id();
    if apic.mode() == ApicMode::X2apic {
        return id >> 16 == mda >> 16 && id & mda & 0xffff != 0;
    }
    let (id, Ok(mda)) = ((id >> 24) as u8, u8::try_from(mda)) else { return false };
    match apic.destination_format() >> 28 {
        0xf => id & mda != 0,
        0x0 => id >> 4 == mda >> 4 && id & mda & 0xf != 0,
        // The other models are reserved.
        _ => false,
    }
}

/// One interrupt message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Message {
    /// To whom.
    pub destination: Destination,
    /// As what.
    pub mode: DeliveryMode,
    /// The vector; for a start-up IPI the page where the processor starts.
    pub vector: u8,
    /// The source is level-triggered and waits for the EOI.
    pub level_triggered: bool,
}

struct Unit {
    apic: Mutex<Lapic>,
    signal: Arc<VcpuSignal>,
}

impl TimerClient for Unit {
    fn fire(&self, now_ns: u64) {
        lock(&self.apic).tick(now_ns);
    }
}

/// The local APICs of all vCPUs. The ID of an APIC is the index of its vCPU.
pub struct Apics {
    units: Vec<Arc<Unit>>,
    /// Where the search for the least busy APIC starts next.
    turn: AtomicUsize,
}

impl Apics {
    /// One APIC for each of `signals`, in vCPU order. `physical_bits` is CPUID's MAXPHYADDR.
    pub fn new(clock: &Arc<Clock>, signals: &[Arc<VcpuSignal>], physical_bits: u8) -> Self {
        let unit = |(index, signal): (usize, &Arc<VcpuSignal>)| {
            Arc::new_cyclic(|weak: &Weak<Unit>| {
                let timer = clock.add_timer(weak.clone());
                let apic =
                    Lapic::new(index as u32, physical_bits, Arc::clone(clock), timer, Arc::clone(signal));
                Unit { apic: Mutex::new(apic), signal: Arc::clone(signal) }
            })
        };
        Self { units: signals.iter().enumerate().map(unit).collect(), turn: AtomicUsize::new(0) }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.units.len()
    }

    /// Locks the APIC of `vcpu`, which exists.
    pub fn apic(&self, vcpu: usize) -> MutexGuard<'_, Lapic> {
        lock(&self.units[vcpu].apic)
    }

    /// A store to the APIC page of `vcpu`. Gives back the vector whose EOI the I/O APICs must see.
    pub fn write_mmio(&self, vcpu: usize, offset: u64, data: &[u8]) -> Option<u8> {
        let effect = self.apic(vcpu).write_mmio(offset, data);
        self.carry_out(effect)
    }

    /// WRMSR to an x2APIC register of `vcpu`. Gives back the vector whose EOI the I/O APICs must see.
    pub fn write_msr(&self, vcpu: usize, msr: u32, value: u64) -> Result<Option<u8>, GeneralProtection> {
        let effect = self.apic(vcpu).write_msr(msr, value)?;
        Ok(self.carry_out(effect))
    }

    fn carry_out(&self, effect: Effect) -> Option<u8> {
        match effect {
            Effect::None => None,
            Effect::EoiBroadcast(vector) => Some(vector),
            Effect::Send(message) => {
                self.deliver(&message);
                None
            }
        }
    }

    /// Sends `message`; true if an APIC took it.
    pub fn deliver(&self, message: &Message) -> bool {
        if message.mode == DeliveryMode::LowestPriority {
            return self.deliver_lowest(message);
        }
        match message.destination {
            Destination::Only(id) => self.units.get(id as usize).is_some_and(|unit| unit.take(message)),
            _ => self.units.iter().fold(false, |taken, unit| unit.take(message) | taken),
        }
    }

    /// Chooses the destination with the lowest processor priority; among equals they take turns.
    fn deliver_lowest(&self, message: &Message) -> bool {
        let count = self.units.len();
        let start = self.turn.load(Ordering::Relaxed);
        let mut best: Option<(u8, usize)> = None;
        for index in (0..count).map(|i| start.wrapping_add(i) % count) {
            let apic = lock(&self.units[index].apic);
            let eligible = apic.mode() != ApicMode::Disabled
                && apic.software_enabled()
                && message.destination.matches(&apic);
            let class = apic.ppr() >> 4;
            if eligible && best.is_none_or(|(lowest, _)| class < lowest) {
                best = Some((class, index));
            }
        }
        let Some((_, index)) = best else { return false };
        self.turn.store(index.wrapping_add(1), Ordering::Relaxed);
        lock(&self.units[index].apic).accept(message.vector, message.level_triggered)
    }
}

impl Unit {
    fn take(&self, message: &Message) -> bool {
        let mut apic = lock(&self.apic);
        if apic.mode() == ApicMode::Disabled || !message.destination.matches(&apic) {
            return false;
        }
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                return apic.accept(message.vector, message.level_triggered);
            }
            DeliveryMode::Nmi => self.signal.raise(Attention::NMI),
            DeliveryMode::Init => self.signal.init(),
            DeliveryMode::StartUp => self.signal.start_up(message.vector),
            // UNSUPPORTED: the machine has no SMM.
            DeliveryMode::Smi => {}
            // UNSUPPORTED: the 8259s are wired to LINT0 of the bootstrap processor, not to the I/O APIC.
            DeliveryMode::ExtInt => return false,
        }
        true
    }
}
