//! EPT02 for the software CPU. L1-physical addresses are this machine's, so EPT01 is the identity; what is no RAM is a
//! device or nothing, as the CPU finds out.

use std::any::Any;

use ept_merge::invalidate::Invalidation;
use ept_merge::qualification::allowed_bits;
use ept_merge::{
    Access, Capabilities, Ept02, ExecuteControl, Fault, Identity, L1Gpa, L2Gpa, Limits, Log, Memory, Page,
    Permissions, Root, check_eptp,
};
use turtles_cpu::phys::PhysMemory;
use turtles_cpu::vmx::{EptAccess, EptFault, EptPage, SecondLevel};

/// The combined tables of one vCPU.
pub struct CombinedTables {
    ept02: Ept02,
    faults: u64,
}

impl CombinedTables {
    /// Nothing is cached, and no EPT pointer in force yet.
    pub fn new(caps: Capabilities) -> Self {
        let root = Root::new(0, ExecuteControl::Single);
        Self { ept02: Ept02::new(Limits::default(), caps, root), faults: 0 }
    }

    /// Puts an EPT pointer that VM entry accepted in force, with the VMCS's mode-based execute control and
    /// page-modification log.
    pub fn select(&mut self, eptp: u64, execute: ExecuteControl, log: Option<Log>) {
        self.ept02.select(Root::new(eptp, execute));
        self.ept02.log = log;
    }

    /// The page-modification log's index, if there is a log.
    pub fn log_index(&self) -> Option<u16> {
        self.ept02.log.map(|log| log.index)
    }

    /// INVEPT. The CPU's own translations are for its owner to forget.
    pub fn invalidate(&mut self, what: Invalidation) {
        self.ept02.invalidate(what);
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
        match self.ept02.translate(&Physical(memory), &Identity, gpa, access_of(access)) {
            Ok(page) => Ok(page_of(page, gpa)),
            Err(fault) => Err(self.refuse(fault)),
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
