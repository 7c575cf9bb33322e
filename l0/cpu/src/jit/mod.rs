//! The translator: hot blocks of 64-bit code become host code. Guest and host are the same architecture, so most
//! guest instructions are the host's own with other registers and with their memory operand's address looked up in
//! the software TLB; whatever has no such lowering is a call of its interpreter handler.
//!
//! # Constraints
//! - Host executable memory is never writable at the address it is executed from (W^X, by two mappings), and bounded.
//! - Whatever the interpreter would do is what happens: registers, flags, memory, faults, and the instruction count at
//!   every return. The interpreter is the slow path of every instruction: a memory access that misses the TLB leaves
//!   nothing done and calls the whole instruction's handler.
//! - Only [`crate::exec`]'s ordinary running of blocks enters translations; single steps, breakpoints, shadows and what
//!   is left of a budget go through the interpreter.
//!
//! # Life of a translation
//! 1. The run loop finds a decoded block and counts it; at [`crate::tunables::TRANSLATE_AFTER`] the path that begins
//!    with it ([`trace`]) is decoded again in iced's form and lowered ([`lower`]) into code memory. The block's slot then
//!    names the code.
//! 2. The run loop enters the code ([`gate`]). Eleven guest registers are in host registers until it returns; the
//!    others, and status flags where they are needed, are in [`crate::state::CpuState`].
//! 3. Where it leaves its trace it jumps: within its page, to an exit that is patched into a direct jump once the target
//!    is translated; elsewhere through the jump cache, which maps addresses to code.
//! 4. Every translation begins with three checks: the page not written since, nothing asks for attention, enough budget
//!    left for the whole trace. When one fails it returns to the run loop, which finds out why.
//! 5. Code goes all at once, between traces: when its memory is full or the decoder's arena is emptied.
//!
//! # Invariants
//! - JIT-1: code is entered only through a block whose page has the version it was translated under: the first
//!   instructions of every translation compare it.
//! - JIT-2: translated code names ops by their place in the arena: emptying the arena forgets all translations
//!   (`BlockCache::generation`).
//! - JIT-3: a link never leaves its page, so the fetch translation that reached its source holds for its target. What
//!   leaves the page goes through the jump cache, whose entries hold while the target's page is where it was (TLB-3).
//! - JIT-4: a trace's instructions are taken off `left` when it is entered, and what it did not execute is given back
//!   where it is left early; `end - left` is the instruction count once the running trace has run whole.
//! - JIT-5: a jump forwards in its page skips the first two checks: its source passed them, pages' versions only go up,
//!   and whatever does not end goes backwards or through the jump cache some time.
//! - JIT-6: whatever leaves translated code, or calls Rust from it, first puts the vector registers back
//!   ([`vector::emit_put_back`]).
//!
//! Unsafe islands: [`gate`] (entry, calls back) and the code memory.

mod emit;
mod gate;
mod lower;
mod trace;
mod vector;

use crate::Cpu;
use crate::attention::Attention;
use crate::block::key;
use crate::mmu::tlb::{DATA_ENTRIES, FetchEntry};
use crate::native::CodeMemory;
use crate::phys::CodePage;
use crate::profile::{Count, Doing};
use crate::state::Seg;
use crate::trap::Exec;
use crate::tunables::{CODE_ASIDES, CODE_CAPACITY, TRANSLATE_AFTER};
use emit::Assembler;
use gate::{Gate, Left};
use trace::Trace;

/// Entries of the jump cache (a power of two).
const JUMPS: usize = 32768;

/// Where code for a guest address is.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct JumpEntry {
    rip: u64,
    /// The key of its page's fetch translation when it was entered (TLB-3).
    key: u64,
    code: u64,
}

/// No translation has this key.
const NO_JUMP: JumpEntry = JumpEntry { rip: 0, key: u64::MAX, code: 0 };

/// What translated code reads and writes besides the CPU's state. The fields from `masks` on are used most: they are last,
/// just before the CPU's state, whose beginning RBP points to ([`gate`]).
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Hot {
    /// The instruction count at which `left` is zero.
    end: u64,
    jumps: *const JumpEntry,
    /// The fetch translations of the current address space and privilege.
    fetch: *const FetchEntry,
    /// Target of the indirect call under way.
    target: u64,
    /// What GS points to, in translated code.
    gs: u64,
    /// MXCSR as Rust code expects it.
    host_mxcsr: u32,
    room: [u64; 6],
    /// For PEXT. The last: the bits of an address that are the TLB's index. Before it, backwards, for operands to be aligned
    /// to 1, 2, 4, … bytes: the bits that a distance from the page's start must not have.
    masks: [u64; MASKS],
    /// Instructions that may still be executed (JIT-4); signed, as a trace whose handler asks to look up runs to its
    /// end.
    left: i64,
    /// Linear address of the running code's page.
    page_ip: u64,
    /// The attention word.
    attention: *const Attention,
    /// The flags in it that the run loop has seen and that make nothing due as
    /// long as nobody attends (an interrupt while IF is clear).
    seen: u32,
    /// What of the guest's vector state is in the host's registers: see [`vector`].
    vector: u32,
}

/// The TLB's index, and alignments up to 64 bytes.
const MASKS: usize = 8;

impl Hot {
    pub(crate) fn new(attention: *const Attention) -> Self {
        Self {
            left: 0,
            end: 0,
            page_ip: 0,
            attention,
            seen: 0,
            jumps: std::ptr::null(),
            fetch: std::ptr::null(),
            target: 0,
            vector: 0,
            host_mxcsr: vector::HOST_MXCSR,
            gs: 0,
            room: [0; 6],
            masks: std::array::from_fn(|i| match MASKS - 1 - i {
                0 => (DATA_ENTRIES as u64 - 1) << 12,
                n => !4095 | ((1 << (n - 1)) - 1),
            }),
        }
    }

    /// Instructions executed once the running trace has run whole.
    fn executed(&self) -> u64 {
        self.end.wrapping_sub(self.left as u64)
    }

    /// Makes the next trace return to the run loop.
    fn expire(&mut self) {
        let executed = self.executed();
        self.left = i64::MIN / 2;
        self.end = executed.wrapping_add(self.left as u64);
    }
}

/// The translations of one vCPU.
pub(crate) struct Translator {
    memory: CodeMemory,
    gate: Gate,
    jumps: Box<[JumpEntry]>,
    asm: Assembler,
    /// Executions after which a block is translated.
    threshold: u32,
    /// [`crate::block::BlockCache::generation`] that the translations belong to.
    generation: u64,
    /// From a translation's start to where jumps forwards in its page enter it (JIT-5); the same for all.
    forward: u64,
}

impl Translator {
    fn new(threshold: u32) -> std::io::Result<Self> {
        let mut translator = Self {
            memory: CodeMemory::with_asides(CODE_CAPACITY, CODE_ASIDES)?,
            gate: Gate::default(),
            jumps: vec![NO_JUMP; JUMPS].into_boxed_slice(),
            asm: Assembler::new(),
            threshold,
            generation: 0,
            forward: 0,
        };
        translator.reset(0);
        Ok(translator)
    }

    /// Forgets every translation.
    fn reset(&mut self, generation: u64) {
        self.memory.reset();
        self.generation = generation;
        self.jumps.fill(NO_JUMP);
        self.asm.start(self.memory.next());
        self.gate = gate::emit(&mut self.asm);
        if self.memory.append_parts(self.asm.parts()).is_none() {
            log::error!("no room for the translator's own code");
        }
        // What was executed from here before may be in the processor's prefetch queue ("Handling Self- and
        // Cross-Modifying Code").
        std::arch::x86_64::__cpuid(0);
    }

    fn remember(&mut self, rip: u64, key: Option<u64>, code: u64) {
        let Some(key) = key else { return };
        let hash = (rip as u32 ^ (rip as u32 >> 12)) as usize & (JUMPS - 1);
        self.jumps[hash] = JumpEntry { rip, key, code };
    }
}

/// The threshold that `TURTLES_TRANSLATE_AFTER` asks for, so that tests can run with everything translated.
pub(crate) fn threshold_from_environment() -> Option<u32> {
    static THRESHOLD: std::sync::OnceLock<Option<u32>> = std::sync::OnceLock::new();
    *THRESHOLD.get_or_init(|| std::env::var("TURTLES_TRANSLATE_AFTER").ok()?.parse().ok())
}

/// A translated block as the run loop got to it.
pub(crate) struct Entry {
    code: u64,
}

impl Cpu {
    /// Turns the translator on: blocks executed more than `threshold` times are translated. Does nothing if the host gives
    /// no executable memory.
    pub fn translate_after(&mut self, threshold: u32) {
        match Translator::new(threshold) {
            Ok(translator) => {
                self.jit.jumps = translator.jumps.as_ptr();
                self.translator = Some(Box::new(translator));
                self.blocks.clear();
            }
            Err(error) => log::warn!("no executable memory, guest code is interpreted: {error}"),
        }
    }

    /// Turns the translator on or off.
    pub fn set_translate(&mut self, on: bool) {
        if on {
            self.translate_after(threshold_from_environment().unwrap_or(TRANSLATE_AFTER));
        } else {
            self.translator = None;
        }
    }

    /// The translation of the block at RIP, made now if it has become hot; none if the interpreter is to execute it.
    #[inline]
    pub(crate) fn find_translation(&mut self, limit: u64) -> Option<Entry> {
        if self.translator.is_none() || self.code_bits != 64 {
            return None;
        }
        let rip = self.state.rip;
        let linear = self.linear_base[Seg::Cs as usize].wrapping_add(rip);
        let entry = self.tlb.fetch(self.state.cpl == 3, linear);
        if entry.page != linear & !4095 {
            return None;
        }
        let physical = entry.physical | linear & 4095;
        let threshold = self.translator.as_ref().map_or(u32::MAX, |t| t.threshold);
        let ticks = self.state.ticks();
        let block = self.blocks.find_mut(key(physical, 64))?;
        let least = if block.translation == 0 { block.count } else { block.translated };
        if ticks + u64::from(least) > limit {
            return None;
        }
        if block.translation != 0 {
            return Some(Entry { code: block.translation });
        }
        block.heat = block.heat.saturating_add(1);
        if block.heat <= threshold {
            return None;
        }
        block.heat = 0;
        let before = self.begin(Doing::Translating);
        self.count(Count::Translated);
        let code = self.translate_trace(physical);
        self.resume(before);
        let code = code?;
        // It may be longer than the block.
        let fits =
            self.blocks.find(key(physical, 64)).is_some_and(|b| ticks + u64::from(b.translated) <= limit);
        fits.then_some(Entry { code })
    }

    /// Executes translated code from the block at RIP on, for at most as many instructions as are left to `limit` ticks.
    /// The run loop has looked at the flags in `attention`.
    pub(crate) fn run_translated(&mut self, entry: Entry, limit: u64, attention: u32) -> Exec {
        let Some(translator) = self.translator.as_deref_mut() else { return Ok(()) };
        let gate = translator.gate;
        let rip = self.state.rip;
        let user = self.state.cpl == 3;
        translator.remember(rip, self.tlb.fetch(user, rip).key(), entry.code);
        self.jit.fetch = self.tlb.fetch_table(user);
        // The others are done with once seen, and may be set anew.
        self.jit.seen = attention & (Attention::INTERRUPT | Attention::NMI);
        self.jit.page_ip = rip & !4095;
        let left = limit.saturating_sub(self.state.ticks()).min(i64::MAX as u64);
        self.jit.left = left as i64;
        self.jit.end = self.state.instructions.wrapping_add(left);
        self.count(Count::Entered);
        self.begin(Doing::Translated);
        // SAFETY: the block's slot named the code, which is in this translator's memory; `find_translation` has seen to
        // JIT-2.
        let why = unsafe { gate::enter(self, gate, entry.code) };
        self.begin(Doing::RunLoop);
        self.state.instructions = self.jit.executed();
        match why {
            Left::Look => Ok(()),
            Left::Trap(trap) => Err(trap),
            Left::Link { site, forward } => {
                self.link(site, forward);
                Ok(())
            }
        }
    }

    /// Makes the jump whose displacement is at `site` go to the translation of the block at RIP, if there is one. The
    /// jump has just been taken, within its page.
    fn link(&mut self, site: usize, forward: bool) {
        if self.look_up {
            return;
        }
        let generation = self.translator.as_ref().map(|t| t.generation);
        let Some(entry) = self.find_translation(u64::MAX) else { return };
        let Some(translator) = self.translator.as_deref_mut() else { return };
        // A translation made just now may have thrown away the code that the site was in.
        if generation == Some(translator.generation) {
            let past = if forward { translator.forward } else { 0 };
            translator.memory.link(site, entry.code + past);
        }
    }

    /// Translates the trace that begins with the block at `physical`.
    fn translate_trace(&mut self, physical: u64) -> Option<u64> {
        let memory = std::sync::Arc::clone(&self.memory);
        let (_, page) = memory.page(physical)?;
        let translator = self.translator.as_deref_mut()?;
        if translator.generation != self.blocks.generation() {
            translator.reset(self.blocks.generation());
        }
        let version = self.blocks.find(key(physical, 64))?.version();
        let mut bytes = [0; 4096];
        memory.read(physical & !4095, &mut bytes);
        let trace = Trace::find(&self.blocks, &self.model, physical, &bytes)?;
        if page.version() != version {
            return None;
        }
        let source = lower::Source {
            trace: &trace,
            model: &self.model,
            version: (std::ptr::from_ref::<CodePage>(page) as u64, version),
        };
        let asm = &mut translator.asm;
        asm.start(translator.memory.next());
        let Some(forward) = lower::lower(asm, translator.gate, &source) else {
            log::debug!("a block at {physical:#x} could not be translated");
            return None;
        };
        debug_assert!(translator.forward == 0 || translator.forward == forward as u64);
        translator.forward = forward as u64;
        let Some(code) = translator.memory.append_parts(translator.asm.parts()) else {
            self.blocks.clear();
            return None;
        };
        let code = code as u64;
        if let Some(block) = self.blocks.find_mut(key(physical, 64)) {
            block.translation = code;
            block.translated = trace.len() as u16;
        }
        Some(code)
    }
}
