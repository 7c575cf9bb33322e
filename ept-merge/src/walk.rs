//! Walking EPT12 where it lies, in L1's memory ("EPT Translation Mechanism").

use crate::entry::{Capabilities, Entry, Misconfiguration, Permissions};
use crate::memory::{L1Gpa, L2Gpa, Memory};
use crate::pointer::Root;

/// Guest-physical addresses that four levels can translate.
const WIDTH: u32 = 48;

/// Why an access to a guest-physical address does not take place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    Violation {
        /// What all the entries used allow; nothing if one was not present.
        allowed: Permissions,
        /// The entry asks for a VM exit rather than #VE.
        suppress_ve: bool,
    },
    Misconfiguration(Misconfiguration),
    /// The page-modification log has no room; nothing was done.
    LogFull,
}

/// An entry of EPT12 with the place it was read from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Used {
    pub address: L1Gpa,
    pub entry: Entry,
}

const UNUSED: Used = Used { address: L1Gpa(0), entry: Entry { raw: 0, level: 1 } };

/// A walk that found a page.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// The tables' entries on the way, from the root; the first `count`.
    tables: [Used; 3],
    count: usize,
    pub leaf: Used,
    /// What all entries allow.
    pub allowed: Permissions,
}

impl Walk {
    /// The entries that name tables, from the root on.
    pub fn tables(&self) -> impl Iterator<Item = &Used> {
        self.tables.iter().take(self.count)
    }

    /// The page's dirty flag is set.
    pub fn is_dirty(&self) -> bool {
        self.leaf.entry.raw & Entry::DIRTY != 0
    }

    /// The violation of an access that `allowed` does not cover.
    pub fn violation(&self) -> Fault {
        Fault::Violation { allowed: self.allowed, suppress_ve: self.leaf.entry.suppresses_ve() }
    }
}

/// Finds the leaf that translates `gpa`, in the order of "Prioritization of EPT Misconfigurations and EPT Violations": a
/// missing or malformed entry ends the walk at once, what the entries forbid is for the caller to see at its end.
pub fn walk_ept12(memory: &impl Memory, caps: &Capabilities, root: &Root, gpa: L2Gpa) -> Result<Walk, Fault> {
    if gpa.0 >> WIDTH != 0 {
        // No entry is used. Its violation cannot be converted to #VE: that is the entries' to allow.
        return Err(Fault::Violation { allowed: Permissions::NONE, suppress_ve: true });
    }
    let mut walk = Walk { tables: [UNUSED; 3], count: 0, leaf: UNUSED, allowed: Permissions::ALL };
    let mut table = root.table.0;
    for level in (1..=4).rev() {
        let used = read(memory, table, level, gpa);
        let entry = used.entry;
        if !entry.is_present(root.execute) {
            let suppress_ve = entry.suppresses_ve();
            return Err(Fault::Violation { allowed: Permissions::NONE, suppress_ve });
        }
        entry.check(caps, root.execute).map_err(Fault::Misconfiguration)?;
        walk.allowed &= entry.permissions(root.execute);
        if entry.is_leaf() {
            walk.leaf = used;
            break;
        }
        if let Some(slot) = walk.tables.get_mut(walk.count) {
            *slot = used;
            walk.count += 1;
        }
        table = entry.address();
    }
    Ok(walk)
}

/// Tables outside RAM read as all ones, as they do on a PC; that is a misconfiguration at every level.
fn read(memory: &impl Memory, table: u64, level: u32, gpa: L2Gpa) -> Used {
    let index = gpa.0 >> (12 + 9 * (level - 1)) & 0x1ff;
    let address = L1Gpa(table | index << 3);
    let raw = memory.read_entry(address).unwrap_or(u64::MAX);
    Used { address, entry: Entry { raw, level } }
}
