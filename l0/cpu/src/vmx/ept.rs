//! What follows when the second level refuses an access ("EPT-Induced VM Exits"), and the invalidation of what both
//! levels' translations left in the TLB ("Caching Translation Information").

use x86defs::vmx::{ept_qualification as q, reason, secondary};
use x86defs::{cr0, cr4, efer, vector};

use super::{EptAccess, EptFault};
use crate::Cpu;
use crate::mmu::tlb::SpaceTag;
use crate::mmu::walk::{Cause, Nested, Physical, Refused, Translation};
use crate::trap::{Exec, Fault, Trap};

/// Offset of the word in the virtualization-exception information area that says it is in use.
const VE_BUSY: u64 = 4;

/// Bits 2:0 of the exit qualification: what the access was.
fn access_bits(access: EptAccess) -> u64 {
    let bit = |set, bit| if set { bit } else { 0 };
    bit(access.read, q::READ) | bit(access.write, q::WRITE) | bit(access.fetch, q::FETCH)
}

impl Cpu {
    /// The second level refused an access that the translation of `linear` needed, to a paging-structure entry or (with
    /// the guest's own translation `to`) to the page.
    #[cold]
    pub(crate) fn refused_at(&mut self, linear: u64, refused: Refused, to: Option<Translation>) -> Trap {
        if to.is_some() {
            // "Operations that Invalidate Cached Mappings": an EPT violation takes what translated the linear address.
            let own = self.tlb.current_tag();
            self.tlb.flush_page(linear, false, |tag| *tag == own);
        }
        let kind = q::LINEAR_VALID | to.map_or(0, |to| q::FINAL_TRANSLATION | self.advanced_bits(to));
        self.refused(kind, linear, refused)
    }

    /// Bits 11:9 of the exit qualification ("Exit Qualification for EPT Violations").
    fn advanced_bits(&self, to: Translation) -> u64 {
        let nx_in_use = self.state.cr0 & cr0::PG != 0 && self.state.cr4 & cr4::PAE != 0;
        let nx = nx_in_use && self.state.efer & efer::NXE != 0 && !to.executable;
        let bit = |set, bit| if set { bit } else { 0 };
        bit(to.user, q::USER_PAGE) | bit(to.writable, q::WRITABLE_PAGE) | bit(nx, q::NX_PAGE)
    }

    fn refused(&mut self, kind: u64, linear: u64, refused: Refused) -> Trap {
        let fault = match refused.cause {
            Cause::SecondLevel(fault) => fault,
            Cause::ApicAccess => return self.apic_access_by_physical_address(),
        };
        match fault {
            EptFault::Violation { allowed, suppress_ve } => {
                // With accessed and dirty flags an access to a paging-structure entry is a write as well.
                let write = refused.access.paging && self.vmx.controls.ept_flags();
                let access = access_bits(refused.access) | if write { q::WRITE } else { 0 };
                let qualification = access | allowed & q::ALLOWED | kind;
                if !suppress_ve && self.becomes_ve() {
                    return self.raise_ve(qualification, linear, refused.gpa);
                }
                let trap = self.vm_exit(reason::EPT_VIOLATION, qualification);
                self.vmx.exit.guest_linear = linear;
                self.vmx.exit.guest_physical = refused.gpa;
                trap
            }
            EptFault::Misconfiguration => {
                let trap = self.vm_exit(reason::EPT_MISCONFIGURATION, 0);
                self.vmx.exit.guest_physical = refused.gpa;
                trap
            }
            EptFault::LogFull => self.vm_exit(reason::PML_FULL, 0),
        }
    }

    /// An EPT violation whose entry allows it is a virtualization exception now ("Convertible EPT Violations"): the
    /// information area is free, and no event is being delivered.
    fn becomes_ve(&self) -> bool {
        self.vmx.controls.has_secondary(secondary::EPT_VIOLATION_VE)
            && self.state.protected()
            && !self.delivering
            && self.physical_u32(self.vmx.controls.ve_information + VE_BUSY) == 0
    }

    fn physical_u32(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.memory.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// "Virtualization-Exception Information".
    fn raise_ve(&mut self, qualification: u64, linear: u64, gpa: u64) -> Trap {
        let area = self.vmx.controls.ve_information;
        let mut bytes = [0; 34];
        bytes[..4].copy_from_slice(&reason::EPT_VIOLATION.to_le_bytes());
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        bytes[8..16].copy_from_slice(&qualification.to_le_bytes());
        bytes[16..24].copy_from_slice(&linear.to_le_bytes());
        bytes[24..32].copy_from_slice(&gpa.to_le_bytes());
        bytes[32..].copy_from_slice(&self.vmx.controls.eptp_index.to_le_bytes());
        self.memory.write(area, &bytes);
        self.raise(Fault::plain(vector::VE))
    }

    /// Where the page of guest-physical `gpa` is that the processor itself reads, without a linear address (the PDPTEs).
    pub(crate) fn guest_physical_page(&mut self, gpa: u64) -> Exec<u64> {
        if !self.vmx.nested_paging() {
            return Ok(gpa & !4095);
        }
        let Some(second) = self.vmx.second_level.as_deref_mut() else {
            return Err(self.vm_exit(reason::EPT_MISCONFIGURATION, 0));
        };
        let access = EptAccess { read: true, ..EptAccess::default() };
        match (Nested { memory: &self.memory, second, apic_page: self.apic_page }).page(gpa, access) {
            Ok(page) if page.physical == self.apic_page => Err(self.apic_access_by_physical_address()),
            Ok(page) => Ok(page.physical),
            Err(refused) => Err(self.refused(0, 0, refused)),
        }
    }

    /// Drops every translation of the spaces that `which` selects (INVEPT by EPT pointer, INVVPID by VPID).
    pub fn invalidate(&mut self, which: impl Fn(&SpaceTag) -> bool) {
        self.tlb.flush_spaces(false, which);
    }

    /// The same, but for global translations (INVVPID, single-context-retaining-globals).
    pub fn invalidate_non_global(&mut self, which: impl Fn(&SpaceTag) -> bool) {
        self.tlb.flush_spaces(true, which);
    }

    /// Drops what translates `linear` in the spaces that `which` selects, global or not (INVVPID, individual address).
    pub fn invalidate_page(&mut self, linear: u64, which: impl Fn(&SpaceTag) -> bool) {
        self.tlb.flush_page(linear, false, which);
    }
}
