//! What the CPU is doing at the moment, for whoever samples it, and how often it did what costs time. Nothing of this is
//! kept unless the owner asked for it: then a store where one activity gives way to another.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use iced_x86::{Decoder, DecoderOptions, Mnemonic};

use crate::Cpu;
use crate::tunables::OP_CAPACITY;

/// What a vCPU's time goes to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Doing {
    /// The owner's own work between runs.
    Owner,
    /// Asleep: HLT, waiting for a start-up IPI.
    Idle,
    /// What a VMX instruction or a VM exit asks of the owner.
    Nested,
    /// Another engine.
    Engine,
    /// Devices: ports, MMIO, interrupt controllers.
    Devices,
    /// Finding the next block, looking at what is due.
    RunLoop,
    /// Delivering interrupts and exceptions.
    Events,
    Translated,
    /// An instruction's handler, called from translated code.
    Handler,
    /// Interpreting blocks.
    Interpreter,
    /// Walking page tables after a TLB miss.
    Walking,
    /// Decoding guest code into ops.
    Decoding,
    /// Translating them.
    Translating,
}

impl Doing {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Translated,
        Self::Handler,
        Self::Walking,
        Self::Interpreter,
        Self::RunLoop,
        Self::Events,
        Self::Decoding,
        Self::Translating,
        Self::Devices,
        Self::Nested,
        Self::Engine,
        Self::Owner,
        Self::Idle,
    ];

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Owner => "L0, other",
            Self::Idle => "idle",
            Self::Nested => "VMX instructions and exits",
            Self::Engine => "KVM",
            Self::Devices => "devices",
            Self::RunLoop => "finding blocks",
            Self::Events => "interrupts and exceptions",
            Self::Translated => "translated code",
            Self::Handler => "handlers called from it",
            Self::Interpreter => "interpreter",
            Self::Walking => "page walks",
            Self::Decoding => "decoding",
            Self::Translating => "translation",
        }
    }
}

/// What is counted exactly.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub enum Count {
    /// Page walks after TLB misses.
    Walks,
    /// Blocks decoded.
    Decoded,
    /// Traces translated.
    Translated,
    /// Times that everything decoded and translated was forgotten.
    Forgotten,
    /// Times that translated code was entered from the run loop.
    Entered,
    /// Blocks interpreted.
    Interpreted,
    /// Single instructions interpreted, for traps, shadows or the end of a budget.
    Stepped,
    /// Pages whose decoded code was overwritten by this CPU.
    Overwritten,
    /// Stores that took the slow path since their page holds code.
    BesideCode,
}

impl Count {
    /// All of them, with their names.
    pub const ALL: [(Self, &'static str); 9] = [
        (Self::Walks, "page walks"),
        (Self::Decoded, "blocks decoded"),
        (Self::Translated, "translations"),
        (Self::Forgotten, "times all code was forgotten"),
        (Self::Entered, "entries into translated code"),
        (Self::Interpreted, "blocks interpreted"),
        (Self::Stepped, "instructions stepped"),
        (Self::Overwritten, "pages of code overwritten"),
        (Self::BesideCode, "stores beside code"),
    ];
}

/// Numbers of mnemonics there are room for.
const MNEMONICS: usize = 4096;

/// What one vCPU tells: written by its thread alone, read by any.
pub struct Profile {
    /// A [`Doing`], and in the upper half the mnemonic whose handler runs.
    doing: AtomicU32,
    /// The clock of the thread's processor time, as the system numbers them; 0 until it is known.
    clock: AtomicI32,
    counts: [AtomicU64; Count::ALL.len()],
    /// Handlers called from translated code, by mnemonic.
    handlers: Box<[AtomicU64]>,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            doing: AtomicU32::new(Doing::Owner as u32),
            clock: AtomicI32::new(0),
            counts: Default::default(),
            handlers: (0..MNEMONICS).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

/// One thread writes: no need for an atomic addition.
fn increment(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

impl Profile {
    /// What is being done, and in a handler the number of its mnemonic.
    pub fn now(&self) -> (Option<Doing>, usize) {
        let word = self.doing.load(Ordering::Relaxed);
        let doing = Doing::ALL.into_iter().find(|&doing| doing as u32 == word & 0xff);
        (doing, (word >> 16) as usize)
    }

    /// The vCPU's thread has begun, and this clock shows the processor time it takes.
    pub fn set_clock(&self, clock: i32) {
        self.clock.store(clock, Ordering::Relaxed);
    }

    /// That clock, once the thread has begun.
    pub fn clock(&self) -> Option<i32> {
        Some(self.clock.load(Ordering::Relaxed)).filter(|&clock| clock != 0)
    }

    /// From now on the vCPU does something else; returns what to [`Profile::resume`].
    pub fn begin(&self, doing: Doing) -> u32 {
        let before = self.doing.load(Ordering::Relaxed);
        self.doing.store(doing as u32, Ordering::Relaxed);
        before
    }

    /// Goes on with what was done before.
    pub fn resume(&self, before: u32) {
        self.doing.store(before, Ordering::Relaxed);
    }

    /// How often that happened.
    pub fn count(&self, what: Count) -> u64 {
        self.counts[what as usize].load(Ordering::Relaxed)
    }

    /// Handlers called from translated code: (number of the mnemonic, calls).
    pub fn handlers(&self) -> impl Iterator<Item = (usize, u64)> {
        let calls = self.handlers.iter().map(|calls| calls.load(Ordering::Relaxed));
        calls.enumerate().filter(|&(_, calls)| calls > 0)
    }
}

/// The mnemonic with that number, in small letters.
pub fn mnemonic_name(number: usize) -> String {
    let mnemonic = Mnemonic::values().find(|&m| m as usize == number);
    mnemonic.map_or_else(|| "?".to_owned(), |m| format!("{m:?}").to_lowercase())
}

/// A [`Profile`] and what its writer keeps.
pub(crate) struct Profiled {
    shared: Arc<Profile>,
    /// Mnemonic numbers of the arena's ops, as far as they are known; 0 otherwise.
    mnemonics: Box<[u16]>,
    /// What [`crate::block::BlockCache::generation`] they belong to.
    generation: u64,
}

impl Cpu {
    /// From now on tells `profile` what it does.
    pub fn set_profile(&mut self, profile: Arc<Profile>) {
        let mnemonics = vec![0; OP_CAPACITY].into_boxed_slice();
        self.profile = Some(Box::new(Profiled { shared: profile, mnemonics, generation: 0 }));
    }

    /// Something else begins; [`Cpu::resume`] takes what is returned.
    #[inline(always)]
    pub(crate) fn begin(&self, doing: Doing) -> u32 {
        match &self.profile {
            Some(profile) => profile.shared.begin(doing),
            None => 0,
        }
    }

    #[inline(always)]
    pub(crate) fn resume(&self, before: u32) {
        if let Some(profile) = &self.profile {
            profile.shared.resume(before);
        }
    }

    #[inline(always)]
    pub(crate) fn count(&self, what: Count) {
        if let Some(profile) = &self.profile {
            increment(&profile.shared.counts[what as usize]);
        }
    }

    /// Translated code calls the handler of the op at `index` of the arena, an instruction at `rip`.
    #[inline(always)]
    pub(crate) fn begin_handler(&mut self, index: u32, rip: u64) {
        if self.profile.is_some() {
            self.note_handler(index as usize, rip);
        }
    }

    #[inline(never)]
    fn note_handler(&mut self, index: usize, rip: u64) {
        let generation = self.blocks.generation();
        let Some(profile) = self.profile.as_deref_mut() else { return };
        if profile.generation != generation {
            profile.generation = generation;
            profile.mnemonics.fill(0);
        }
        let mut number = profile.mnemonics.get(index).copied().unwrap_or(0);
        if number == 0 {
            number = self.mnemonic_at(rip);
        }
        let Some(profile) = self.profile.as_deref_mut() else { return };
        if let Some(known) = profile.mnemonics.get_mut(index) {
            *known = number;
        }
        if let Some(calls) = profile.shared.handlers.get(usize::from(number)) {
            increment(calls);
        }
        let word = Doing::Handler as u32 | u32::from(number) << 16;
        profile.shared.doing.store(word, Ordering::Relaxed);
    }

    /// Number of the mnemonic at `rip` in 64-bit code.
    fn mnemonic_at(&self, rip: u64) -> u16 {
        let mut bytes = [0; 15];
        let len = self.peek(rip, &mut bytes);
        Decoder::with_ip(64, &bytes[..len], rip, DecoderOptions::NONE).decode().mnemonic() as u16
    }
}
