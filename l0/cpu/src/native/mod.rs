//! Guest instructions executed by the host's own processor: host and guest are the same architecture, so the
//! arithmetic of vector and x87 instructions is not written again but run, one instruction at a time, inside a thunk
//! (see [`thunk`]).
//!
//! This folder knows how to execute; whether the guest may (CPUID, control registers), its memory and its
//! exceptions are the business of `interp::{vector, x87}`.
//!
//! Invariants:
//! - THUNK-1: a thunk in the process-wide store is never freed or changed. [`Thunk::data`] is its address, and whoever
//!   gives an op a handler that asks [`Thunk::of`] puts that into the op, and nothing else.
//! - THUNK-2: the store is bounded. When it is full, instructions it does not have are assembled anew into
//!   per-thread memory each time they execute: slow, but a guest cannot make us grow.
//!
//! Unsafe island, all of it.

pub(crate) mod code_mem;
mod features;
#[cfg(test)]
pub(crate) mod oracle;
mod plan;
mod thunk;
mod wide;

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};

use iced_x86::Instruction;

pub(crate) use features::FeatureSet;
pub(crate) use plan::{
    Class, MemoryUse, Plan, RAX, RCX, RDX, class_of as vector_class, is_aligned as vector_is_aligned,
    is_floating, is_x87,
};
pub(crate) use thunk::{Frame, Thunk};
pub(crate) use wide::Xmm;

pub(crate) use code_mem::CodeMemory;

/// Most plans kept; together with their code about 4 MiB.
const MOST_THUNKS: usize = code_mem::CAPACITY / 128;

struct Store {
    code: CodeMemory,
    thunks: HashMap<Vec<u8>, &'static Thunk>,
}

fn store() -> Result<&'static Mutex<Store>, &'static io::Error> {
    static STORE: OnceLock<io::Result<Mutex<Store>>> = OnceLock::new();
    let store = STORE.get_or_init(|| {
        let code = CodeMemory::new(code_mem::CAPACITY);
        if let Err(error) = &code {
            log::error!("no executable memory for vector and x87 instructions, they will raise #UD: {error}");
        }
        Ok(Mutex::new(Store { code: code?, thunks: HashMap::new() }))
    });
    store.as_ref()
}

/// Says whether the host lets us have executable memory, without which guests have no vector or x87 instructions.
pub fn check_host() -> Result<(), &'static io::Error> {
    store().map(|_| ())
}

/// How an instruction is to be executed.
pub(crate) enum Handle {
    /// By this thunk.
    Kept(&'static Thunk),
    /// By a thunk assembled each time: see [`with_temporary`].
    Temporary,
}

/// Finds or makes the thunk for an instruction; none if it is not one that we execute.
pub(crate) fn prepare(insn: &Instruction) -> Option<Handle> {
    let plan = Plan::new(insn)?;
    if !FeatureSet::host().contains(plan.features) {
        return None;
    }
    let key = thunk::key(&plan).ok()?;
    let mut store = store().ok()?.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(thunk) = store.thunks.get(&key) {
        return Some(Handle::Kept(thunk));
    }
    let code = thunk::emit(&plan).ok()?;
    if store.thunks.len() >= MOST_THUNKS {
        return Some(Handle::Temporary);
    }
    let Some(entry) = store.code.append(&code) else { return Some(Handle::Temporary) };
    // SAFETY: `entry` is where the code just made for the plan was put, for good.
    let thunk = unsafe { Thunk::new(plan, entry) };
    let thunk: &'static Thunk = Box::leak(Box::new(thunk));
    store.thunks.insert(key, thunk);
    Some(Handle::Kept(thunk))
}

impl Thunk {
    /// What to keep in an op.
    pub(crate) fn data(&'static self) -> u64 {
        std::ptr::from_ref(self) as u64
    }

    /// The thunk that an op names; the handlers for kept thunks may ask this of their own op, and nobody else.
    #[inline(always)]
    pub(crate) fn of(data: u64) -> &'static Self {
        // SAFETY: THUNK-1: an op with such a handler names a leaked thunk.
        unsafe { &*(data as *const Self) }
    }
}

/// Assembles a thunk for `insn`, calls `f` with it and forgets it.
pub(crate) fn with_temporary<T>(insn: &Instruction, f: impl FnOnce(&Thunk) -> T) -> Option<T> {
    thread_local! {
        static MEMORY: RefCell<Option<CodeMemory>> = const { RefCell::new(None) };
    }
    let plan = Plan::new(insn)?;
    let code = thunk::emit(&plan).ok()?;
    MEMORY.with_borrow_mut(|memory| {
        if memory.is_none() {
            *memory = CodeMemory::new(4096).ok();
        }
        let memory = memory.as_mut()?;
        memory.reset();
        let entry = memory.append(&code)?;
        // The bytes may be in the processor's prefetch queue under the executable address: CPUID discards them
        // ("Handling Self- and Cross-Modifying Code").
        std::arch::x86_64::__cpuid(0);
        // SAFETY: `entry` is where the code just made for the plan was put; nobody else uses this thread's memory
        // before `f` returns, and the thunk does not outlive it.
        let thunk = unsafe { Thunk::new(plan, entry) };
        Some(f(&thunk))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, MemoryOperand, Register};

    #[test]
    fn instructions_that_differ_in_the_address_share_a_thunk() {
        let make = |base, register| {
            let memory = MemoryOperand::with_base_displ(base, 64);
            Instruction::with2(Code::Paddb_xmm_xmmm128, register, memory).unwrap()
        };
        let address = |insn: &Instruction| match prepare(insn) {
            Some(Handle::Kept(thunk)) => thunk.data(),
            _ => panic!("no thunk"),
        };
        let first = address(&make(Register::RAX, Register::XMM3));
        assert_eq!(first, address(&make(Register::RBX, Register::XMM3)));
        assert_ne!(first, address(&make(Register::RAX, Register::XMM4)));
    }
}
