//! The page walker: linear to guest-physical ("Paging", SDM volume 3), setting accessed and dirty bits.
//!
//! The walk is a function of control registers and memory; it neither reads nor fills the TLB.

use std::sync::atomic::Ordering;

use x86defs::{cr0, cr4, efer, paging, pf_error};

use crate::phys::PhysMemory;
use crate::state::CpuState;
use crate::trap::Fault;

/// What an access does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    Read,
    Write,
    Fetch,
}

/// On whose behalf an access is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Privilege {
    /// CPL 3.
    User,
    /// CPL below 3, explicitly by an instruction's operand.
    Supervisor,
    /// The processor itself at any CPL: descriptor tables, TSS. SMAP applies whatever AC says.
    Implicit,
}

/// Where a linear page is, and what may be done with it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Translation {
    /// Guest-physical address of the 4-KiB page.
    pub physical: u64,
    /// A page larger than 4 KiB.
    pub large: bool,
    pub global: bool,
    pub user: bool,
    pub writable: bool,
    pub executable: bool,
    pub dirty: bool,
    pub key: u32,
}

/// Physical-address width that CPUID reports; paging entries with higher bits set are malformed.
pub const PHYSICAL_BITS: u32 = 46;

/// Walks for `linear` and checks the access; on success accessed (and for writes dirty) bits are set.
pub fn translate(
    state: &CpuState,
    memory: &PhysMemory,
    linear: u64,
    access: Access,
    privilege: Privilege,
) -> Result<Translation, Fault> {
    if state.cr0 & cr0::PG == 0 {
        return Ok(Translation {
            physical: linear & 0xffff_f000,
            large: true,
            global: false,
            user: true,
            writable: true,
            executable: true,
            dirty: true,
            key: 0,
        });
    }
    let fault = |code: u32| Fault::page(linear, code | access_bits(state, access, privilege));
    // The walk is done again when another processor changed the leaf under us while we set its A/D bits.
    for _ in 0..64 {
        let walked = if state.cr4 & cr4::PAE == 0 {
            walk32(state, memory, linear)
        } else {
            walk64(state, memory, linear)
        };
        let walk = walked.map_err(fault)?;
        check(state, &walk.to, access, privilege).map_err(fault)?;
        if let Some(done) = walk.mark(memory, access == Access::Write) {
            return Ok(done);
        }
    }
    // Another processor keeps rewriting the entry: take what is there without marking it, as if it had not been
    // cached; the next access walks again.
    let walked =
        if state.cr4 & cr4::PAE == 0 { walk32(state, memory, linear) } else { walk64(state, memory, linear) };
    let walk = walked.map_err(fault)?;
    check(state, &walk.to, access, privilege).map_err(fault)?;
    Ok(walk.to)
}

/// Physical address of `linear` if it is mapped, whatever the access rights, changing nothing: for debuggers and
/// crash reports.
pub fn peek(state: &CpuState, memory: &PhysMemory, linear: u64) -> Option<u64> {
    if state.cr0 & cr0::PG == 0 {
        return Some(linear & 0xffff_ffff);
    }
    let walk =
        if state.cr4 & cr4::PAE == 0 { walk32(state, memory, linear) } else { walk64(state, memory, linear) };
    walk.ok().map(|w| w.to.physical | linear & 4095)
}

fn access_bits(state: &CpuState, access: Access, privilege: Privilege) -> u32 {
    let mut code = 0;
    if access == Access::Write {
        code |= pf_error::WRITE;
    }
    if privilege == Privilege::User {
        code |= pf_error::USER;
    }
    let nx = state.cr4 & cr4::PAE != 0 && state.efer & efer::NXE != 0;
    if access == Access::Fetch && (nx || state.cr4 & cr4::SMEP != 0) {
        code |= pf_error::FETCH;
    }
    code
}

/// "Determination of Access Rights" and "Protection Keys". The error code says PK whenever the key refuses, even if
/// the access is refused for another reason as well.
fn check(state: &CpuState, to: &Translation, access: Access, privilege: Privilege) -> Result<(), u32> {
    let by_key = access != Access::Fetch && key_refuses(state, to, access, privilege);
    if !by_key && rights_allow(state, to, access, privilege) {
        return Ok(());
    }
    Err(pf_error::PRESENT | if by_key { pf_error::PROTECTION_KEY } else { 0 })
}

fn rights_allow(state: &CpuState, to: &Translation, access: Access, privilege: Privilege) -> bool {
    let user_access = privilege == Privilege::User;
    if user_access && !to.user {
        return false;
    }
    let supervisor_on_user = !user_access && to.user;
    if access == Access::Fetch {
        return to.executable && !(supervisor_on_user && state.cr4 & cr4::SMEP != 0);
    }
    let smap = state.cr4 & cr4::SMAP != 0
        && (privilege == Privilege::Implicit || !state.system_flag(x86defs::rflags::AC));
    if supervisor_on_user && smap {
        return false;
    }
    let write_protect = state.cr0 & cr0::WP != 0;
    access == Access::Read || to.writable || !(user_access || write_protect)
}

fn key_refuses(state: &CpuState, to: &Translation, access: Access, privilege: Privilege) -> bool {
    if !to.user || state.cr4 & cr4::PKE == 0 || !state.long_mode() {
        return false;
    }
    let rights = state.pkru >> (to.key * 2);
    let protects = privilege == Privilege::User || state.cr0 & cr0::WP != 0;
    rights & 1 != 0 || rights & 2 != 0 && access == Access::Write && protects
}

/// A finished walk, with the entries that led there, so that they can be marked.
struct Walk {
    to: Translation,
    /// Address, width and value of each entry used, root first.
    entries: [(u64, u64); 5],
    count: usize,
    wide: bool,
    /// PAE's PDPTE registers have no accessed bit; entries before this index are not marked.
    first_marked: usize,
}

impl Walk {
    fn new(wide: bool) -> Self {
        let to = Translation {
            physical: 0,
            large: false,
            global: false,
            user: true,
            writable: true,
            executable: true,
            dirty: false,
            key: 0,
        };
        Self { to, entries: [(0, 0); 5], count: 0, wide, first_marked: 0 }
    }

    fn note(&mut self, address: u64, entry: u64) {
        self.entries[self.count] = (address, entry);
        self.count += 1;
        self.to.user &= entry & paging::USER != 0;
        self.to.writable &= entry & paging::WRITE != 0;
    }

    /// Sets accessed bits, and the leaf's dirty bit for a write; none if an entry changed meanwhile.
    fn mark(mut self, memory: &PhysMemory, write: bool) -> Option<Translation> {
        for i in self.first_marked..self.count {
            let (address, entry) = self.entries[i];
            let leaf = i + 1 == self.count;
            let wanted = entry | paging::ACCESSED | if leaf && write { paging::DIRTY } else { 0 };
            if wanted != entry && !exchange(memory, address, self.wide, entry, wanted) {
                return None;
            }
            if leaf {
                self.to.dirty = wanted & paging::DIRTY != 0;
            }
        }
        Some(self.to)
    }
}

fn exchange(memory: &PhysMemory, address: u64, wide: bool, old: u64, new: u64) -> bool {
    let done = if wide {
        memory
            .entry64(address)
            .is_some_and(|e| e.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed).is_ok())
    } else {
        memory.entry32(address).is_some_and(|e| {
            e.compare_exchange(old as u32, new as u32, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        })
    };
    if done {
        if let Some((_, code)) = memory.page(address) {
            PhysMemory::wrote_page(code, address & 4095, if wide { 8 } else { 4 });
        }
    }
    done
}

/// Paging structures outside RAM read as all ones on a PC, which is a malformed entry.
fn read64(memory: &PhysMemory, address: u64) -> u64 {
    memory.entry64(address).map_or(u64::MAX, |e| e.load(Ordering::Acquire))
}

fn read32(memory: &PhysMemory, address: u64) -> u64 {
    u64::from(memory.entry32(address).map_or(u32::MAX, |e| e.load(Ordering::Acquire)))
}

/// 32-bit paging.
fn walk32(state: &CpuState, memory: &PhysMemory, linear: u64) -> Result<Walk, u32> {
    let mut walk = Walk::new(false);
    let pde_at = (state.cr3 & 0xffff_f000) | ((linear >> 22 & 0x3ff) << 2);
    let pde = read32(memory, pde_at);
    if pde & paging::PRESENT == 0 {
        return Err(0);
    }
    walk.note(pde_at, pde);
    if pde & paging::LARGE != 0 && state.cr4 & cr4::PSE != 0 {
        // Bits 20:13 are address bits 39:32 (PSE-36), bit 21 is reserved.
        if pde & 1 << 21 != 0 {
            return Err(pf_error::PRESENT | pf_error::RESERVED);
        }
        walk.to.physical = (pde & 0xffc0_0000) | (pde >> 13 & 0xff) << 32 | (linear & 0x3f_f000);
        walk.to.large = true;
        walk.to.global = pde & paging::GLOBAL != 0 && state.cr4 & cr4::PGE != 0;
        return Ok(walk);
    }
    let pte_at = (pde & 0xffff_f000) | ((linear >> 12 & 0x3ff) << 2);
    let pte = read32(memory, pte_at);
    if pte & paging::PRESENT == 0 {
        return Err(0);
    }
    walk.note(pte_at, pte);
    walk.to.physical = pte & 0xffff_f000;
    walk.to.global = pte & paging::GLOBAL != 0 && state.cr4 & cr4::PGE != 0;
    Ok(walk)
}

/// Reserved bits common to all 8-byte entries.
fn reserved64(state: &CpuState) -> u64 {
    let above = !((1u64 << PHYSICAL_BITS) - 1);
    let mask = if state.long_mode() { 0x000f_ffff_ffff_ffff } else { 0x7fff_ffff_ffff_ffff };
    let nx = if state.efer & efer::NXE == 0 { paging::NX } else { 0 };
    above & mask | nx
}

/// PAE, 4-level and 5-level paging.
fn walk64(state: &CpuState, memory: &PhysMemory, linear: u64) -> Result<Walk, u32> {
    let mut walk = Walk::new(true);
    let reserved = reserved64(state);
    let (mut table, mut level) = if state.long_mode() {
        (state.cr3 & paging::ADDRESS, if state.cr4 & cr4::LA57 != 0 { 5 } else { 4 })
    } else {
        let pdpte = state.pdptes[(linear >> 30 & 3) as usize];
        if pdpte & paging::PRESENT == 0 {
            return Err(0);
        }
        (pdpte & paging::ADDRESS, 2)
    };
    loop {
        let shift = 12 + 9 * (level - 1);
        let at = (table & !0xfff) | ((linear >> shift & 0x1ff) << 3);
        let entry = read64(memory, at);
        if entry & paging::PRESENT == 0 {
            return Err(0);
        }
        let large = entry & paging::LARGE != 0 && level > 1;
        let mut malformed = entry & reserved != 0 || large && level > 3;
        if large && level <= 3 {
            // Bit 12 is PAT; bits from 13 to the page's size are reserved.
            malformed |= entry & ((1 << shift) - (1 << 13)) != 0;
        }
        if malformed {
            return Err(pf_error::PRESENT | pf_error::RESERVED);
        }
        walk.note(at, entry);
        walk.to.executable &= entry & paging::NX == 0;
        if level == 1 || large {
            let size = 1u64 << shift;
            walk.to.physical = (entry & paging::ADDRESS & !(size - 1)) | (linear & (size - 1) & !0xfff);
            walk.to.large = large;
            walk.to.global = entry & paging::GLOBAL != 0 && state.cr4 & cr4::PGE != 0;
            walk.to.key = (entry >> paging::PROTECTION_KEY_SHIFT & 0xf) as u32;
            return Ok(walk);
        }
        table = entry & paging::ADDRESS;
        level -= 1;
    }
}
