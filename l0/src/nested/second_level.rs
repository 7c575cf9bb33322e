//! EPT02 for the software CPU. L1-physical addresses are this machine's, so EPT01 is the identity; what is no RAM is a
//! device or nothing, as the CPU finds out.

use std::any::Any;
use std::sync::Arc;

use ept_merge::invalidate::Invalidation;
use ept_merge::qualification::allowed_bits;
use ept_merge::{
    Access, Capabilities, Ept02, ExecuteControl, Fault, Identity, L1Gpa, L2Gpa, Limits, Log, Memory, Page,
    Permissions, Root, check_eptp,
};
use turtles_cpu::mmu::walk::PHYSICAL_BITS;
use turtles_cpu::phys::PhysMemory;
use turtles_cpu::vmx::{EptAccess, EptFault, EptPage, SecondLevel};

use crate::trace::{Level, Trace};

/// What an engine that keeps translations of its own has to hear of EPT02. It takes what has come together before it
/// lets L2 run.
#[derive(Default)]
pub struct Journal {
    /// What translated an access, by the root in force.
    pub found: Vec<(Root, L2Gpa, Page)>,
    /// What no longer translates: by root and address, as an EPT violation has it.
    pub lost: Vec<(Root, L2Gpa)>,
    pub invalidated: Vec<Invalidation>,
}

impl Journal {
    /// Further pages found are not told: they will be found again when they are missed.
    const MOST_FOUND: usize = 512;
    /// Beyond this, everything is as good as lost.
    const MOST_LOST: usize = 64;

    fn lose(&mut self, root: Root, gpa: L2Gpa) {
        if self.lost.len() < Self::MOST_LOST {
            self.lost.push((root, gpa));
        } else {
            self.invalidate(Invalidation::AllContexts);
        }
    }

    fn invalidate(&mut self, what: Invalidation) {
        if what == Invalidation::AllContexts || self.invalidated.len() >= Self::MOST_LOST {
            self.invalidated = vec![Invalidation::AllContexts];
            self.found.clear();
            self.lost.clear();
        } else {
            if let Invalidation::SingleContext(table) = what {
                self.found.retain(|(root, ..)| root.table != table);
            }
            self.invalidated.push(what);
        }
    }

    /// Nothing to hear.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty() && self.lost.is_empty() && self.invalidated.is_empty()
    }
}

/// The combined tables of one vCPU.
pub struct CombinedTables {
    ept02: Ept02,
    faults: u64,
    /// Kept once an engine asks for it.
    journal: Option<Box<Journal>>,
    /// Where fills are told, and whose they are.
    trace: Option<(Arc<Trace>, usize)>,
}

impl CombinedTables {
    /// Nothing is cached, and no EPT pointer in force yet.
    pub fn new(capabilities: &vmcs_shadow::caps::Capabilities) -> Self {
        let caps = Capabilities::from_msr(capabilities.ept_vpid(), PHYSICAL_BITS);
        let root = Root::new(0, ExecuteControl::Single);
        Self { ept02: Ept02::new(Limits::default(), caps, root), faults: 0, journal: None, trace: None }
    }

    /// Puts an EPT pointer that VM entry accepted in force, with the VMCS's mode-based execute control and
    /// page-modification log (its address and index).
    pub fn select(&mut self, eptp: u64, mode_based: bool, log: Option<(u64, u16)>) {
        let execute = if mode_based { ExecuteControl::ModeBased } else { ExecuteControl::Single };
        self.ept02.select(Root::new(eptp, execute));
        self.ept02.log = log.map(|(address, index)| Log { address: L1Gpa(address), index });
    }

    /// The page-modification log's index, if there is a log.
    pub fn log_index(&self) -> Option<u16> {
        self.ept02.log.map(|log| log.index)
    }

    /// INVEPT of a single context. The CPU's own translations are for its owner to forget.
    pub fn invalidate_context(&mut self, eptp: u64) {
        self.invalidate(Invalidation::of(eptp));
    }

    /// INVEPT of all contexts.
    pub fn invalidate_all(&mut self) {
        self.invalidate(Invalidation::AllContexts);
    }

    fn invalidate(&mut self, what: Invalidation) {
        self.ept02.invalidate(what);
        if let Some(journal) = &mut self.journal {
            journal.invalidate(what);
        }
    }

    /// What has happened since the last call, and the root in force. The first call has nothing to tell.
    pub fn journal(&mut self) -> (Root, &mut Journal) {
        (self.ept02.root(), self.journal.get_or_insert_default())
    }

    #[cold]
    fn note(journal: &mut Journal, root: Root, gpa: L2Gpa, found: Option<Page>) {
        match found {
            Some(page) if journal.found.len() < Journal::MOST_FOUND => journal.found.push((root, gpa, page)),
            Some(_) => {}
            None => journal.lose(root, gpa),
        }
    }

    /// The part of an EPT pointer by which INVEPT knows its context.
    pub fn context(eptp: u64) -> u64 {
        Root::table_of(eptp).0
    }

    pub fn capabilities(&self) -> &Capabilities {
        self.ept02.capabilities()
    }

    /// Walks of EPT12 so far: what the cache did not have, or had with less permission.
    pub fn walks(&self) -> u64 {
        self.ept02.walks()
    }

    /// Violations, misconfigurations and full logs so far.
    pub fn faults(&self) -> u64 {
        self.faults
    }

    /// From now on tells every page that a walk of EPT12 finds.
    pub fn trace_fills(&mut self, trace: &Arc<Trace>, vcpu: usize) {
        if self.trace.is_none() {
            self.trace = Some((Arc::clone(trace), vcpu));
        }
    }

    #[cold]
    fn tell(trace: &Trace, vcpu: usize, gpa: L2Gpa, page: Page) {
        let size = ["", "4K", "2M", "1G"][(page.level() & 3) as usize];
        let ready = page.ready();
        let letters: String = [
            (Permissions::READ, 'r'),
            (Permissions::WRITE, 'w'),
            (Permissions::EXECUTE, 'x'),
            (Permissions::USER_EXECUTE, 'u'),
        ]
        .into_iter()
        .filter_map(|(permission, letter)| ready.contains(permission).then_some(letter))
        .collect();
        let details = format!("{:#x} is {:#x}, {size} page, {letters}", gpa.0, page.piece(gpa).0);
        trace.happened(vcpu, Level::L2, "EPT02 fill", &details);
    }

    #[cold]
    fn refuse(&mut self, fault: Fault) -> EptFault {
        self.faults += 1;
        match fault {
            Fault::Violation { allowed, suppress_ve } => {
                let execute = self.ept02.root().execute;
                EptFault::Violation { allowed: allowed_bits(allowed, execute), suppress_ve }
            }
            Fault::Misconfiguration(_) => EptFault::Misconfiguration,
            Fault::LogFull => EptFault::LogFull,
        }
    }
}

impl SecondLevel for CombinedTables {
    #[inline]
    fn translate(&mut self, memory: &PhysMemory, gpa: u64, access: EptAccess) -> Result<EptPage, EptFault> {
        let gpa = L2Gpa(gpa);
        let walks = self.ept02.walks();
        match self.ept02.translate(&Physical(memory), &Identity, gpa, access_of(access)) {
            Ok(page) => {
                if let Some(journal) = &mut self.journal {
                    Self::note(journal, self.ept02.root(), gpa, Some(page));
                }
                if let Some((trace, vcpu)) = &self.trace {
                    if self.ept02.walks() != walks {
                        Self::tell(trace, *vcpu, gpa, page);
                    }
                }
                Ok(page_of(page, gpa))
            }
            Err(fault) => {
                if let Some(journal) = &mut self.journal {
                    Self::note(journal, self.ept02.root(), gpa, None);
                }
                Err(self.refuse(fault))
            }
        }
    }

    fn peek(&self, memory: &PhysMemory, gpa: u64) -> Option<u64> {
        let page = self.ept02.peek(&Physical(memory), L2Gpa(gpa))?;
        Some(page.0 | gpa & 0xfff)
    }

    fn set_root(&mut self, pointer: u64) -> bool {
        let valid = check_eptp(pointer, self.ept02.capabilities());
        if valid {
            self.ept02.select(Root::new(pointer, self.ept02.root().execute));
        }
        valid
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}

#[inline(always)]
fn access_of(access: EptAccess) -> Access {
    let bit = |set: bool, to: u32| u64::from(set) << to;
    let fetch = bit(access.fetch && !access.user, 2) | bit(access.fetch && access.user, 3);
    Access::new(Permissions::from_bits(bit(access.read, 0) | bit(access.write, 1) | fetch), access.paging)
}

#[inline(always)]
fn page_of(page: Page, gpa: L2Gpa) -> EptPage {
    let ready = page.ready();
    EptPage {
        physical: page.piece(gpa).0,
        large: page.level() > 1,
        write: ready.contains(Permissions::WRITE),
        execute_supervisor: ready.contains(Permissions::EXECUTE),
        execute_user: ready.contains(Permissions::USER_EXECUTE),
    }
}

/// The machine's memory, which is L1's.
struct Physical<'a>(&'a PhysMemory);

impl Memory for Physical<'_> {
    fn read_entry(&self, address: L1Gpa) -> Option<u64> {
        self.0.read_u64(address.0)
    }

    fn exchange_entry(&self, address: L1Gpa, old: u64, new: u64) -> bool {
        self.0.compare_exchange_u64(address.0, old, new)
    }

    fn write_log(&self, address: L1Gpa, value: u64) {
        self.0.write(address.0, &value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    use crate::memory::Ram;
    use crate::vm::software_memory;

    /// A machine's memory in which L2-physical page 0 is L1-physical 0x9000, by tables from 0x1000 on.
    fn memory() -> (Ram, Arc<PhysMemory>) {
        let ram = Ram::new(16 << 20).unwrap();
        for (at, entry) in [(0x1000u64, 0x2007u64), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, 0x9037)] {
            ram.memory.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let physical = software_memory(&ram);
        (ram, physical)
    }

    fn tables() -> CombinedTables {
        CombinedTables::new(&vmcs_shadow::caps::Capabilities::default())
    }

    const WRITE: EptAccess = EptAccess { read: true, write: true, fetch: false, user: false, paging: false };
    const USER_FETCH: EptAccess =
        EptAccess { read: false, write: false, fetch: true, user: true, paging: false };

    #[test]
    fn the_cpu_finds_l2s_memory_and_its_flags_and_log_are_kept() {
        let (_ram, memory) = memory();
        let mut tables = tables();
        tables.select(0x105e, false, Some((0x8000, 511)));
        let page = tables.translate(&memory, 0x123, WRITE).unwrap();
        assert_eq!((page.physical, page.large, page.write), (0x9000, false, true));
        assert!(page.execute_supervisor && page.execute_user);
        assert_eq!(memory.read_u64(0x4000), Some(0x9337));
        assert_eq!(memory.read_u64(0x8000 + 511 * 8), Some(0));
        assert_eq!(tables.log_index(), Some(510));
        assert_eq!(tables.peek(&memory, 0x123), Some(0x9123));
        assert_eq!((tables.walks(), tables.faults()), (1, 0));
    }

    #[test]
    fn what_the_entries_refuse_is_told_in_the_bits_of_the_exit_qualification() {
        let (_ram, memory) = memory();
        let mut tables = tables();
        tables.select(0x101e, true, None);
        let refused = tables.translate(&memory, 0, USER_FETCH);
        assert_eq!(refused, Err(EptFault::Violation { allowed: 0x38, suppress_ve: false }));
        let missing = tables.translate(&memory, 0x1000, WRITE);
        assert_eq!(missing, Err(EptFault::Violation { allowed: 0, suppress_ve: false }));
        assert!(memory.compare_exchange_u64(0x4008, 0, 2));
        assert_eq!(tables.translate(&memory, 0x1000, WRITE), Err(EptFault::Misconfiguration));
        assert_eq!(tables.faults(), 3);
    }

    #[test]
    fn only_good_pointers_become_roots() {
        let (_ram, memory) = memory();
        let mut tables = tables();
        tables.select(0x101e, false, None);
        assert!(!tables.set_root(0x1001));
        assert!(tables.translate(&memory, 0, WRITE).is_ok());
        assert!(tables.set_root(0x501e));
        assert!(tables.translate(&memory, 0, WRITE).is_err());
        assert_eq!(CombinedTables::context(0x505e), 0x5000);
    }
}
