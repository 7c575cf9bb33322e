//! The page walker: linear to physical ("Paging", SDM volume 3), setting accessed and dirty bits.
//!
//! The walk is a function of control registers and memory; it neither reads nor fills the TLB. In what way its
//! addresses reach memory ([`Physical`]) is a type of its own, so that a walk without a second level has nothing of it.

use std::sync::atomic::Ordering;

use x86defs::{cr0, cr4, efer, paging, pf_error};

use crate::phys::PhysMemory;
use crate::state::CpuState;
use crate::trap::Fault;
use crate::vmx::{EptAccess, EptFault, EptPage, SecondLevel};

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
    /// Address of the 4-KiB page: guest-physical while the walk is under way, physical once it is done.
    pub physical: u64,
    /// Part of a page larger than 4 KiB, in either level.
    pub large: bool,
    pub global: bool,
    /// What the guest's paging structures allow.
    pub user: bool,
    pub writable: bool,
    pub executable: bool,
    /// A write has nothing left to set: the dirty flag is, and the second level allows writes and has its own set.
    pub dirty: bool,
    pub key: u32,
}

impl Translation {
    /// Of a linear address where paging is off.
    fn unpaged(linear: u64) -> Self {
        Self {
            physical: linear & 0xffff_f000,
            large: true,
            global: false,
            user: true,
            writable: true,
            executable: true,
            dirty: true,
            key: 0,
        }
    }
}

/// How a walk reaches memory by guest-physical addresses.
pub trait Physical {
    /// Where the page of `gpa` is, for one access.
    fn page(&mut self, gpa: u64, access: EptAccess) -> Result<EptPage, Refused>;
    /// The memory that physical addresses name.
    fn memory(&self) -> &PhysMemory;
}

/// Guest-physical addresses are physical.
pub struct Direct<'a>(pub &'a PhysMemory);

impl Physical for Direct<'_> {
    #[inline(always)]
    fn page(&mut self, gpa: u64, _: EptAccess) -> Result<EptPage, Refused> {
        let physical = gpa & !4095;
        Ok(EptPage { physical, large: false, write: true, execute_supervisor: true, execute_user: true })
    }

    #[inline(always)]
    fn memory(&self) -> &PhysMemory {
        self.0
    }
}

/// Guest-physical addresses go through the second level ("The Extended Page Table Mechanism").
pub struct Nested<'a> {
    pub memory: &'a PhysMemory,
    pub second: &'a mut dyn SecondLevel,
    /// A physical page that paging structures must not be in.
    pub apic_page: u64,
}

impl Physical for Nested<'_> {
    fn page(&mut self, gpa: u64, access: EptAccess) -> Result<EptPage, Refused> {
        match self.second.translate(self.memory, gpa, access) {
            Ok(page) if access.paging && page.physical == self.apic_page => {
                Err(Refused { gpa, access, cause: Cause::ApicAccess })
            }
            Ok(page) => Ok(page),
            Err(fault) => Err(Refused { gpa, access, cause: Cause::SecondLevel(fault) }),
        }
    }

    fn memory(&self) -> &PhysMemory {
        self.memory
    }
}

/// The same for debuggers: nothing changes, and permissions do not count.
struct Peek<'a> {
    memory: &'a PhysMemory,
    second: Option<&'a dyn SecondLevel>,
}

impl Physical for Peek<'_> {
    fn page(&mut self, gpa: u64, access: EptAccess) -> Result<EptPage, Refused> {
        let physical = match self.second {
            Some(second) => second.peek(self.memory, gpa),
            None => Some(gpa),
        };
        let cause = Cause::SecondLevel(EptFault::Misconfiguration);
        let physical = physical.ok_or(Refused { gpa, access, cause })? & !4095;
        Ok(EptPage { physical, large: false, write: false, execute_supervisor: true, execute_user: true })
    }

    fn memory(&self) -> &PhysMemory {
        self.memory
    }
}

/// Why an access by guest-physical address fails.
#[derive(Clone, Copy, Debug)]
pub enum Cause {
    SecondLevel(EptFault),
    /// A paging-structure entry in the APIC-access page.
    ApicAccess,
}

/// An access by guest-physical address failed.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    /// All bits of the guest-physical address.
    pub gpa: u64,
    pub access: EptAccess,
    pub cause: Cause,
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    Page(Fault),
    /// With what the guest's paging structures say of the page if the access was to the page itself.
    Refused(Refused, Option<Translation>),
}

/// Why a walk ended early.
enum Stop {
    /// A page fault with these bits of the error code.
    Page(u32),
    Refused(Refused),
}

impl From<Refused> for Stop {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

type Walked<T> = Result<T, Stop>;

/// A read of a guest paging-structure entry.
const READ_ENTRY: EptAccess = EptAccess { read: true, write: false, fetch: false, user: false, paging: true };
/// Setting its accessed or dirty flag.
const MARK_ENTRY: EptAccess = EptAccess { write: true, ..READ_ENTRY };

/// Physical-address width that CPUID reports; paging entries with higher bits set are malformed.
pub const PHYSICAL_BITS: u32 = 46;

/// Walks for `linear` and checks the access; on success accessed (and for writes dirty) bits are set, and the final
/// address has been through the second level.
pub fn translate<P: Physical>(
    state: &CpuState,
    physical: &mut P,
    linear: u64,
    access: Access,
    privilege: Privilege,
) -> Result<Translation, Failure> {
    let to = if state.cr0 & cr0::PG == 0 {
        Translation::unpaged(linear)
    } else {
        let failure = |stop| match stop {
            Stop::Page(code) => {
                Failure::Page(Fault::page(linear, code | access_bits(state, access, privilege)))
            }
            Stop::Refused(refused) => Failure::Refused(refused, None),
        };
        walk_and_mark(state, physical, linear, access, privilege).map_err(failure)?
    };
    let last = EptAccess {
        read: access == Access::Read,
        write: access == Access::Write,
        fetch: access == Access::Fetch,
        user: to.user,
        paging: false,
    };
    match physical.page(to.physical | linear & 4095, last) {
        Ok(page) => Ok(Translation {
            physical: page.physical,
            large: to.large || page.large,
            dirty: to.dirty && page.write,
            ..to
        }),
        Err(refused) => Err(Failure::Refused(refused, Some(to))),
    }
}

/// The guest's own part: to a guest-physical address that the access may use, with A/D bits set.
fn walk_and_mark<P: Physical>(
    state: &CpuState,
    physical: &mut P,
    linear: u64,
    access: Access,
    privilege: Privilege,
) -> Walked<Translation> {
    let mut walk = Walk::new();
    // The walk is done again when another processor changed the leaf under us while we set its A/D bits.
    for _ in 0..64 {
        walk.go(state, physical, linear)?;
        check(state, &walk.to, access, privilege)?;
        if walk.mark(physical, access == Access::Write)? {
            return Ok(walk.to);
        }
    }
    // Another processor keeps rewriting the entry: take what is there without marking it, as if it had not been
    // cached; the next access walks again.
    walk.go(state, physical, linear)?;
    check(state, &walk.to, access, privilege)?;
    Ok(walk.to)
}

/// Physical address of `linear` if it is mapped, whatever the access rights, changing nothing: for debuggers and
/// crash reports. `second` is the second level in use.
pub(crate) fn peek(
    state: &CpuState,
    memory: &PhysMemory,
    second: Option<&dyn SecondLevel>,
    linear: u64,
) -> Option<u64> {
    let mut physical = Peek { memory, second };
    let to = if state.cr0 & cr0::PG == 0 {
        Translation::unpaged(linear)
    } else {
        let mut walk = Walk::new();
        walk.go(state, &mut physical, linear).ok()?;
        walk.to
    };
    let page = physical.page(to.physical, EptAccess::default()).ok()?;
    Some(page.physical | linear & 4095)
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
fn check(state: &CpuState, to: &Translation, access: Access, privilege: Privilege) -> Walked<()> {
    let by_key = access != Access::Fetch && key_refuses(state, to, access, privilege);
    if !by_key && rights_allow(state, to, access, privilege) {
        return Ok(());
    }
    Err(Stop::Page(pf_error::PRESENT | if by_key { pf_error::PROTECTION_KEY } else { 0 }))
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

/// A paging-structure entry that a walk used.
#[derive(Clone, Copy, Default)]
struct Used {
    gpa: u64,
    physical: u64,
    value: u64,
    /// The second level has nothing to say about a write to it.
    writable: bool,
}

/// A walk, with the entries that it used, so that they can be marked.
struct Walk {
    to: Translation,
    /// Root first.
    entries: [Used; 5],
    count: usize,
    wide: bool,
}

impl Walk {
    #[inline(always)]
    fn new() -> Self {
        Self { to: Translation::unpaged(0), entries: [Used::default(); 5], count: 0, wide: false }
    }

    #[inline(always)]
    fn go<P: Physical>(&mut self, state: &CpuState, physical: &mut P, linear: u64) -> Walked<()> {
        self.to = Translation { large: false, dirty: false, ..Translation::unpaged(0) };
        self.count = 0;
        self.wide = state.cr4 & cr4::PAE != 0;
        if self.wide { walk64(state, physical, linear, self) } else { walk32(state, physical, linear, self) }
    }

    fn note(&mut self, used: Used) {
        self.entries[self.count] = used;
        self.count += 1;
        self.to.user &= used.value & paging::USER != 0;
        self.to.writable &= used.value & paging::WRITE != 0;
    }

    /// Sets accessed bits, and the leaf's dirty bit for a write; false if an entry changed meanwhile.
    #[inline(always)]
    fn mark<P: Physical>(&mut self, physical: &mut P, write: bool) -> Result<bool, Refused> {
        for (i, used) in self.entries[..self.count].iter().enumerate() {
            let leaf = i + 1 == self.count;
            let wanted = used.value | paging::ACCESSED | if leaf && write { paging::DIRTY } else { 0 };
            if wanted != used.value {
                if !used.writable {
                    physical.page(used.gpa, MARK_ENTRY)?;
                }
                if !exchange(physical.memory(), used.physical, self.wide, used.value, wanted) {
                    return Ok(false);
                }
            }
            if leaf {
                self.to.dirty = wanted & paging::DIRTY != 0;
            }
        }
        Ok(true)
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

/// Reads the entry at `gpa`. Paging structures outside RAM read as all ones on a PC, which is a malformed entry.
#[inline(always)]
fn entry<P: Physical>(physical: &mut P, gpa: u64, wide: bool) -> Result<Used, Refused> {
    let page = physical.page(gpa, READ_ENTRY)?;
    let at = page.physical | gpa & 4095;
    let memory = physical.memory();
    let value = if wide {
        memory.entry64(at).map_or(u64::MAX, |e| e.load(Ordering::Acquire))
    } else {
        u64::from(memory.entry32(at).map_or(u32::MAX, |e| e.load(Ordering::Acquire)))
    };
    Ok(Used { gpa, physical: at, value, writable: page.write })
}

/// 32-bit paging.
fn walk32<P: Physical>(state: &CpuState, physical: &mut P, linear: u64, walk: &mut Walk) -> Walked<()> {
    let pde_at = (state.cr3 & 0xffff_f000) | ((linear >> 22 & 0x3ff) << 2);
    let used = entry(physical, pde_at, false)?;
    let pde = used.value;
    if pde & paging::PRESENT == 0 {
        return Err(Stop::Page(0));
    }
    walk.note(used);
    if pde & paging::LARGE != 0 && state.cr4 & cr4::PSE != 0 {
        // Bits 20:13 are address bits 39:32 (PSE-36), bit 21 is reserved.
        if pde & 1 << 21 != 0 {
            return Err(Stop::Page(pf_error::PRESENT | pf_error::RESERVED));
        }
        walk.to.physical = (pde & 0xffc0_0000) | (pde >> 13 & 0xff) << 32 | (linear & 0x3f_f000);
        walk.to.large = true;
        walk.to.global = pde & paging::GLOBAL != 0 && state.cr4 & cr4::PGE != 0;
        return Ok(());
    }
    let pte_at = (pde & 0xffff_f000) | ((linear >> 12 & 0x3ff) << 2);
    let used = entry(physical, pte_at, false)?;
    let pte = used.value;
    if pte & paging::PRESENT == 0 {
        return Err(Stop::Page(0));
    }
    walk.note(used);
    walk.to.physical = pte & 0xffff_f000;
    walk.to.global = pte & paging::GLOBAL != 0 && state.cr4 & cr4::PGE != 0;
    Ok(())
}

/// Reserved bits common to all 8-byte entries.
fn reserved64(state: &CpuState) -> u64 {
    let above = !((1u64 << PHYSICAL_BITS) - 1);
    let mask = if state.long_mode() { 0x000f_ffff_ffff_ffff } else { 0x7fff_ffff_ffff_ffff };
    let nx = if state.efer & efer::NXE == 0 { paging::NX } else { 0 };
    above & mask | nx
}

/// PAE, 4-level and 5-level paging.
fn walk64<P: Physical>(state: &CpuState, physical: &mut P, linear: u64, walk: &mut Walk) -> Walked<()> {
    let reserved = reserved64(state);
    let (mut table, mut level) = if state.long_mode() {
        (state.cr3 & paging::ADDRESS, if state.cr4 & cr4::LA57 != 0 { 5 } else { 4 })
    } else {
        let pdpte = state.pdptes[(linear >> 30 & 3) as usize];
        if pdpte & paging::PRESENT == 0 {
            return Err(Stop::Page(0));
        }
        (pdpte & paging::ADDRESS, 2)
    };
    loop {
        let shift = 12 + 9 * (level - 1);
        let at = (table & !0xfff) | ((linear >> shift & 0x1ff) << 3);
        let used = entry(physical, at, true)?;
        let entry = used.value;
        if entry & paging::PRESENT == 0 {
            return Err(Stop::Page(0));
        }
        let large = entry & paging::LARGE != 0 && level > 1;
        let mut malformed = entry & reserved != 0 || large && level > 3;
        if large && level <= 3 {
            // Bit 12 is PAT; bits from 13 to the page's size are reserved.
            malformed |= entry & ((1 << shift) - (1 << 13)) != 0;
        }
        if malformed {
            return Err(Stop::Page(pf_error::PRESENT | pf_error::RESERVED));
        }
        walk.note(used);
        walk.to.executable &= entry & paging::NX == 0;
        if level == 1 || large {
            let size = 1u64 << shift;
            walk.to.physical = (entry & paging::ADDRESS & !(size - 1)) | (linear & (size - 1) & !0xfff);
            walk.to.large = large;
            walk.to.global = entry & paging::GLOBAL != 0 && state.cr4 & cr4::PGE != 0;
            walk.to.key = (entry >> paging::PROTECTION_KEY_SHIFT & 0xf) as u32;
            return Ok(());
        }
        table = entry & paging::ADDRESS;
        level -= 1;
    }
}
