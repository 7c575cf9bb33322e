//! What other threads tell a running vCPU: one word of flags the vCPU looks at between blocks of instructions.
//!
//! This is the only channel by which anything outside the vCPU's thread may disturb it. Interrupt
//! controllers, timers and other vCPUs set bits; the vCPU's engine reads the word once per block (one relaxed
//! load, the only cost on the hot path) and acts on what it finds.

use std::sync::atomic::{AtomicU32, Ordering};

/// Flags that ask a vCPU to look up from executing.
#[derive(Debug, Default)]
pub struct Attention(AtomicU32);

impl Attention {
    /// The interrupt controller has an interrupt it would deliver now (level: set while true).
    pub const INTERRUPT: u32 = 1 << 0;
    /// An NMI is to be delivered (edge: the vCPU takes it).
    pub const NMI: u32 = 1 << 1;
    /// INIT signal (edge).
    pub const INIT: u32 = 1 << 2;
    /// Start-up IPI (edge); the vector is kept by the sender's side.
    pub const SIPI: u32 = 1 << 3;
    /// Return to the owner as soon as the present instruction is complete (edge).
    pub const CANCEL: u32 = 1 << 4;
    /// Another vCPU began to execute from a page this one may hold a fast write translation for (edge).
    pub const FORGET_WRITES: u32 = 1 << 5;
    /// The VMX-preemption timer may have run out: compare its deadline with the TSC (edge).
    pub const PREEMPTION: u32 = 1 << 6;

    /// Sets `bits`; true when at least one of them was not set before.
    pub fn raise(&self, bits: u32) -> bool {
        self.0.fetch_or(bits, Ordering::SeqCst) & bits != bits
    }

    /// Clears `bits`.
    pub fn clear(&self, bits: u32) {
        self.0.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Clears `bits` and tells which of them had been set.
    pub fn take(&self, bits: u32) -> u32 {
        self.0.fetch_and(!bits, Ordering::SeqCst) & bits
    }

    /// The present flags.
    #[inline(always)]
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }
}
