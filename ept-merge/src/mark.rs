//! Accessed and dirty flags of EPT12, and the page-modification log ("Accessed and Dirty Flags for EPT",
//! "Page-Modification Logging").

use crate::entry::Entry;
use crate::memory::{L1Gpa, L2Gpa, Memory};
use crate::walk::{Fault, Used, Walk};

/// The page-modification log, as the VMCS has it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Log {
    pub address: L1Gpa,
    /// Of the next entry. The log fills downwards, from 511.
    pub index: u16,
}

impl Log {
    const ENTRIES: u16 = 512;

    fn is_full(&self) -> bool {
        self.index >= Self::ENTRIES
    }

    /// Writes the access's own page, even if a large one became dirty.
    fn append(&mut self, memory: &impl Memory, gpa: L2Gpa) {
        let at = self.address.0.wrapping_add(8 * u64::from(self.index));
        memory.write_log(L1Gpa(at), gpa.0 & !0xfff);
        self.index = self.index.wrapping_sub(1);
    }
}

/// How marking ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Marked {
    Done,
    /// Another processor changed an entry meanwhile: what was walked is no longer so.
    Changed,
}

/// Sets the accessed flags of all entries used, and for a write the leaf's dirty flag. With a log that has no room,
/// nothing is set, be it only an accessed flag that is missing.
pub fn mark(
    memory: &impl Memory,
    walk: &Walk,
    write: bool,
    gpa: L2Gpa,
    log: Option<&mut Log>,
) -> Result<Marked, Fault> {
    let leaf_flags = if write { Entry::ACCESSED | Entry::DIRTY } else { Entry::ACCESSED };
    let complete = walk.tables().all(|used| has(used, Entry::ACCESSED)) && has(&walk.leaf, leaf_flags);
    if complete {
        return Ok(Marked::Done);
    }
    if log.as_ref().is_some_and(|log| log.is_full()) {
        return Err(Fault::LogFull);
    }
    for used in walk.tables() {
        if !set(memory, used, Entry::ACCESSED) {
            return Ok(Marked::Changed);
        }
    }
    if !set(memory, &walk.leaf, leaf_flags) {
        return Ok(Marked::Changed);
    }
    if let Some(log) = log {
        if write && !has(&walk.leaf, Entry::DIRTY) {
            log.append(memory, gpa);
        }
    }
    Ok(Marked::Done)
}

fn has(used: &Used, flags: u64) -> bool {
    used.entry.raw & flags == flags
}

fn set(memory: &impl Memory, used: &Used, flags: u64) -> bool {
    has(used, flags) || memory.exchange_entry(used.address, used.entry.raw, used.entry.raw | flags)
}
