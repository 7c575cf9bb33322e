//! EPT02: the combined table, a cache of EPT12∘EPT01 for one processor.
//!
//! Invariants:
//! - EPT02-1: a page is kept only as one walk of EPT12 found it since the last INVEPT of its root, and with
//!   permissions that this walk allowed.
//! - EPT02-2: an access that the kept page does not allow walks EPT12 again before it is refused, and what is refused
//!   is kept no longer.
//! - EPT02-3: memory is fixed at creation but for the roots' small records, whose number is limited.

use std::collections::HashMap;

use crate::cache::{Cache, Number};
use crate::entry::{Capabilities, Permissions};
use crate::invalidate::Invalidation;
use crate::mark::{Log, Marked, mark};
use crate::memory::{Ept01, L1Gpa, L2Gpa, Memory};
use crate::merge::{Page, merge};
use crate::pointer::Root;
use crate::tunables;
use crate::walk::{Fault, walk_ept12};

/// What an access asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Access {
    wants: Permissions,
    paging: bool,
}

impl Access {
    pub const READ: Self = Self { wants: Permissions::READ, paging: false };
    pub const WRITE: Self = Self { wants: Permissions::WRITE, paging: false };
    /// A fetch from a supervisor-mode linear address.
    pub const FETCH: Self = Self { wants: Permissions::EXECUTE, paging: false };
    /// A fetch from a user-mode linear address.
    pub const USER_FETCH: Self = Self { wants: Permissions::USER_EXECUTE, paging: false };
    /// Use of an entry of L2's paging structures.
    pub const PAGING: Self = Self { wants: Permissions::READ, paging: true };

    /// An access that asks for all of `wants`; `paging` if it is to an entry of L2's paging structures.
    #[inline(always)]
    pub fn new(wants: Permissions, paging: bool) -> Self {
        Self { wants, paging }
    }

    /// With accessed and dirty flags, use of a paging-structure entry counts as a write.
    #[inline(always)]
    pub fn wants(self, accessed_dirty: bool) -> Permissions {
        if self.paging && accessed_dirty {
            self.wants | Permissions::READ | Permissions::WRITE
        } else {
            self.wants
        }
    }
}

/// Bounds on memory.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sets of four pages, 64 bytes each.
    pub sets: usize,
    /// Roots alive at once.
    pub roots: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { sets: tunables::SETS, roots: tunables::ROOTS }
    }
}

/// What is remembered of a root.
#[derive(Clone, Copy, Debug)]
struct Known {
    number: Number,
    /// Bit n: pages of level n are kept.
    levels: u32,
    used: u64,
}

/// The combined tables of one processor, one for each root that it used.
pub struct Ept02 {
    caps: Capabilities,
    limits: Limits,
    cache: Cache,
    root: Root,
    known: Known,
    /// All roots but the current one.
    others: HashMap<Root, Known>,
    last_number: Number,
    clock: u64,
    walks: u64,
    /// The page-modification log, if enabled.
    pub log: Option<Log>,
}

impl Ept02 {
    /// With `root` as its current root.
    pub fn new(limits: Limits, caps: Capabilities, root: Root) -> Self {
        Self {
            caps,
            limits,
            cache: Cache::new(limits.sets),
            root,
            known: Known { number: Number::FIRST, levels: 0, used: 0 },
            others: HashMap::new(),
            last_number: Number::FIRST,
            clock: 0,
            walks: 0,
            log: None,
        }
    }

    pub fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    /// The current root.
    pub fn root(&self) -> Root {
        self.root
    }

    /// Walks of EPT12 so far.
    pub fn walks(&self) -> u64 {
        self.walks
    }

    /// Roots whose pages may be kept.
    pub fn roots(&self) -> usize {
        self.others.len() + 1
    }

    /// Pages kept, of any root.
    pub fn pages(&self) -> usize {
        self.cache.len()
    }

    /// Makes `root` the current one; what is kept of it is found again.
    #[inline]
    pub fn select(&mut self, root: Root) {
        if root != self.root {
            self.switch(root);
        }
    }

    fn switch(&mut self, root: Root) {
        self.clock += 1;
        self.known.used = self.clock;
        self.others.insert(self.root, self.known);
        self.root = root;
        match self.others.remove(&root) {
            Some(known) => self.known = known,
            None => self.start_afresh(),
        }
        while self.roots() > self.limits.roots.max(1) {
            let oldest = self.others.iter().min_by_key(|(_, known)| known.used).map(|(root, _)| *root);
            let Some(oldest) = oldest else { break };
            self.others.remove(&oldest);
        }
    }

    /// Gives the current root a new number, under which nothing is kept.
    fn start_afresh(&mut self) {
        let number = self.last_number.next().unwrap_or_else(|| {
            self.cache.clear();
            self.others.clear();
            Number::FIRST
        });
        self.last_number = number;
        self.known = Known { number, levels: 0, used: self.clock };
    }

    /// INVEPT.
    pub fn invalidate(&mut self, what: Invalidation) {
        match what {
            Invalidation::SingleContext(table) => {
                self.others.retain(|root, _| root.table != table);
                if self.root.table == table && self.known.levels != 0 {
                    self.start_afresh();
                }
            }
            Invalidation::AllContexts => {
                self.others.clear();
                if self.known.levels != 0 {
                    self.start_afresh();
                }
            }
        }
    }

    /// Translates for an access under the current root, with all its effects on EPT12 and the log.
    #[inline]
    pub fn translate(
        &mut self,
        memory: &impl Memory,
        ept01: &impl Ept01,
        gpa: L2Gpa,
        access: Access,
    ) -> Result<Page, Fault> {
        let wants = access.wants(self.root.accessed_dirty);
        if let Some(page) = self.find(gpa) {
            if page.ready().contains(wants) {
                return Ok(page);
            }
        }
        self.fill(memory, ept01, gpa, wants)
    }

    #[inline(always)]
    fn find(&self, gpa: L2Gpa) -> Option<Page> {
        if gpa.0 >> 48 != 0 {
            return None;
        }
        (1..=3)
            .filter(|level| self.known.levels >> level & 1 != 0)
            .find_map(|level| self.cache.find(self.known.number, level, gpa))
    }

    #[cold]
    #[inline(never)]
    fn fill(
        &mut self,
        memory: &impl Memory,
        ept01: &impl Ept01,
        gpa: L2Gpa,
        wants: Permissions,
    ) -> Result<Page, Fault> {
        self.forget(gpa);
        let mut refused = Fault::LogFull;
        for _ in 0..tunables::MARK_ATTEMPTS {
            self.walks += 1;
            let walk = walk_ept12(memory, &self.caps, &self.root, gpa)?;
            if !walk.allowed.contains(wants) {
                return Err(walk.violation());
            }
            let mut ready = walk.allowed;
            if self.root.accessed_dirty {
                let write = wants.contains(Permissions::WRITE);
                if mark(memory, &walk, write, gpa, self.log.as_mut())? == Marked::Changed {
                    refused = walk.violation();
                    continue;
                }
                if !write && !walk.is_dirty() {
                    ready = ready.without(Permissions::WRITE);
                }
            }
            let page = merge(&walk, ept01, gpa, ready);
            self.cache.insert(self.known.number, gpa, page);
            self.known.levels |= 1 << page.level();
            return Ok(page);
        }
        // The entries change faster than we look: as good as if they had forbidden the access for a moment.
        Err(refused)
    }

    /// Drops every page that translates `gpa`, as an EPT violation does ("Operations that Invalidate Cached Mappings").
    fn forget(&mut self, gpa: L2Gpa) {
        for level in (1..=3).filter(|level| self.known.levels >> level & 1 != 0) {
            self.cache.remove(self.known.number, level, gpa);
        }
    }

    /// Where `gpa` is mapped, whatever the entries allow, changing nothing: for debuggers.
    pub fn peek(&self, memory: &impl Memory, gpa: L2Gpa) -> Option<L1Gpa> {
        let walk = walk_ept12(memory, &self.caps, &self.root, gpa).ok()?;
        Some(merge(&walk, &crate::memory::Identity, gpa, Permissions::NONE).piece(gpa))
    }
}
