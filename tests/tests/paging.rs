//! Page walks against a model: random paging structures in every paging mode, random control bits, random accesses, with
//! and without a random second level of translation.
//!
//! The model is written from the SDM's chapter "Paging" as a table of levels, and shares nothing with the walker
//! but the names of bits.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use turtles_cpu::mmu::walk::{Access, Direct, Failure, Nested, PHYSICAL_BITS, Privilege, translate};
use turtles_cpu::phys::{PhysMemory, RamRange};
use turtles_cpu::state::CpuState;
use turtles_cpu::vmx::{EptAccess, EptFault, EptPage, SecondLevel};
use turtles_tests::random::Random;
use x86defs::{cr0, cr4, efer, paging as p, pf_error, rflags};

const CASES: u64 = 60_000;
const PAGES: usize = 16;
const SIZE: usize = PAGES * 4096;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mode {
    Bits32,
    Pae,
    FourLevel,
    FiveLevel,
}

/// One level of a paging mode: which bits of the address select the entry, and what a page bit here means.
struct Level {
    shift: u32,
    index_bits: u32,
    /// PS may be set and maps a page.
    large: bool,
    /// PS is reserved (clear is the only value).
    ps_reserved: bool,
}

fn levels(mode: Mode, pse: bool) -> Vec<Level> {
    let level = |shift, large, ps_reserved| Level { shift, index_bits: 9, large, ps_reserved };
    match mode {
        Mode::Bits32 => vec![
            Level { shift: 22, index_bits: 10, large: pse, ps_reserved: false },
            Level { shift: 12, index_bits: 10, large: false, ps_reserved: false },
        ],
        // The PDPTEs are registers.
        Mode::Pae => vec![level(21, true, false), level(12, false, false)],
        Mode::FourLevel => {
            vec![
                level(39, false, true),
                level(30, true, false),
                level(21, true, false),
                level(12, false, false),
            ]
        }
        Mode::FiveLevel => vec![
            level(48, false, true),
            level(39, false, true),
            level(30, true, false),
            level(21, true, false),
            level(12, false, false),
        ],
    }
}

struct Case {
    state: CpuState,
    mode: Mode,
    memory: Vec<u8>,
    linear: u64,
    access: Access,
    privilege: Privilege,
}

/// Why the model has no page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Failed {
    /// A page fault with this error code.
    Fault(u32),
    /// The second level refused this access to a guest-physical address; the last one, or one to a paging structure.
    Refused { gpa: u64, access: EptAccess, last: bool },
}

/// What the model says: the page's physical address and the memory with accessed and dirty bits, or why not.
type Answer = Result<(u64, Vec<u8>), Failed>;

/// A second level as a table of pages: what is not in it is not present.
#[derive(Clone, Debug, Default)]
struct Second {
    /// Physical page, and permissions: 1 read, 2 write, 4 execute, 8 execute for user-mode addresses.
    pages: HashMap<u64, (u64, u32)>,
    flags: bool,
    mode_based: bool,
}

impl Second {
    fn permissions(&self, gpa: u64) -> u32 {
        self.pages.get(&(gpa & !4095)).map_or(0, |page| page.1)
    }

    fn wants(&self, access: EptAccess) -> u32 {
        let write = access.write || access.paging && self.flags;
        let fetch = if self.mode_based && access.user { 8 } else { 4 };
        u32::from(access.read) | if write { 2 } else { 0 } | if access.fetch { fetch } else { 0 }
    }
}

impl SecondLevel for Second {
    fn translate(&mut self, _: &PhysMemory, gpa: u64, access: EptAccess) -> Result<EptPage, EptFault> {
        let allowed = self.permissions(gpa);
        if self.wants(access) & !allowed != 0 {
            return Err(EptFault::Violation { allowed: u64::from(allowed) << 3, suppress_ve: true });
        }
        Ok(EptPage {
            physical: self.pages[&(gpa & !4095)].0,
            large: false,
            write: allowed & 2 != 0,
            execute_supervisor: allowed & 4 != 0,
            execute_user: allowed & if self.mode_based { 8 } else { 4 } != 0,
        })
    }
    fn peek(&self, _: &PhysMemory, gpa: u64) -> Option<u64> {
        self.pages.get(&(gpa & !4095)).map(|page| page.0)
    }
    fn set_root(&mut self, _: u64) -> bool {
        false
    }
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}

/// The physical address of `gpa` for an access, if there is a second level and it allows it.
fn through(second: Option<&Second>, gpa: u64, access: EptAccess, last: bool) -> Result<u64, Failed> {
    match second {
        None => Ok(gpa),
        Some(second) if second.wants(access) & !second.permissions(gpa) == 0 => {
            Ok(second.pages[&(gpa & !4095)].0 | gpa & 4095)
        }
        Some(_) => Err(Failed::Refused { gpa, access, last }),
    }
}

/// An entry; where there is no RAM, all ones.
fn entry_at(memory: &[u8], address: u64, bytes: usize) -> u64 {
    let mut word = [0; 8];
    match memory.get(address as usize..).and_then(|rest| rest.get(..bytes)) {
        Some(entry) => word[..bytes].copy_from_slice(entry),
        None => word[..bytes].fill(0xff),
    }
    u64::from_le_bytes(word)
}

fn mark(memory: &mut [u8], address: u64, bit: u64) {
    if let Some(byte) = memory.get_mut(address as usize) {
        *byte |= bit as u8;
    }
}

/// The reserved bits of a present entry.
fn reserved(case: &Case, level: &Level, entry: u64) -> u64 {
    let leaf = level.shift == 12 || level.large && entry & p::LARGE != 0;
    if case.mode == Mode::Bits32 {
        // A 4-MByte page: bits 20:13 are physical address bits 39:32, bit 21 is reserved.
        return if leaf && level.shift == 22 { 1 << 21 } else { 0 };
    }
    let mut bits = (1 << 52) - (1 << PHYSICAL_BITS);
    if case.mode == Mode::Pae {
        bits |= 0x7ff << 52;
    }
    if case.state.efer & efer::NXE == 0 {
        bits |= p::NX;
    }
    if level.ps_reserved {
        bits |= p::LARGE;
    }
    if leaf && level.shift > 12 {
        bits |= (1 << level.shift) - (1 << 13);
    }
    bits
}

/// An access to a guest paging-structure entry.
const READS_ENTRY: EptAccess =
    EptAccess { read: true, write: false, fetch: false, user: false, paging: true };
const MARKS_ENTRY: EptAccess = EptAccess { write: true, ..READS_ENTRY };

/// The bits of the error code that tell of the access.
fn access_code(case: &Case) -> u32 {
    let state = &case.state;
    let mut code = 0;
    if case.access == Access::Write {
        code |= pf_error::WRITE;
    }
    if case.privilege == Privilege::User {
        code |= pf_error::USER;
    }
    let nx = state.cr4 & cr4::PAE != 0 && state.efer & efer::NXE != 0;
    if case.access == Access::Fetch && (nx || state.cr4 & cr4::SMEP != 0) {
        code |= pf_error::FETCH;
    }
    code
}

fn model(case: &Case, second: Option<&Second>) -> Answer {
    let state = &case.state;
    let code = access_code(case);
    let nx = state.cr4 & cr4::PAE != 0 && state.efer & efer::NXE != 0;
    let bytes = if case.mode == Mode::Bits32 { 4 } else { 8 };
    let mut table = state.cr3 & if bytes == 4 { 0xffff_f000 } else { p::ADDRESS };
    if case.mode == Mode::Pae {
        let pdpte = state.pdptes[(case.linear >> 30 & 3) as usize];
        if pdpte & p::PRESENT == 0 {
            return Err(Failed::Fault(code));
        }
        table = pdpte & p::ADDRESS;
    }
    let (mut writable, mut user, mut executable) = (true, true, true);
    let mut used = Vec::new();
    for level in levels(case.mode, state.cr4 & cr4::PSE != 0) {
        let index = case.linear >> level.shift & ((1 << level.index_bits) - 1);
        let gpa = table + index * bytes as u64;
        let at = through(second, gpa, READS_ENTRY, false)?;
        let entry = entry_at(&case.memory, at, bytes);
        if entry & p::PRESENT == 0 {
            return Err(Failed::Fault(code));
        }
        if entry & reserved(case, &level, entry) != 0 {
            return Err(Failed::Fault(code | pf_error::PRESENT | pf_error::RESERVED));
        }
        writable &= entry & p::WRITE != 0;
        user &= entry & p::USER != 0;
        executable &= !(nx && entry & p::NX != 0);
        used.push((gpa, at, entry, p::ACCESSED));
        let leaf = level.shift == 12 || level.large && entry & p::LARGE != 0;
        if !leaf {
            table = entry & if bytes == 4 { 0xffff_f000 } else { p::ADDRESS };
            continue;
        }
        let rights = Rights { writable, user, executable, key: (entry >> 59 & 15) as u32 };
        if let Some(why) = refused(case, &rights) {
            return Err(Failed::Fault(code | pf_error::PRESENT | why));
        }
        if case.access == Access::Write {
            used.push((gpa, at, entry, p::DIRTY));
        }
        let mask = (1u64 << level.shift) - 1;
        let mut frame = entry & p::ADDRESS & !mask;
        if bytes == 4 {
            frame = entry & 0xffff_f000 & !mask;
            if level.shift == 22 {
                frame |= (entry >> 13 & 0xff) << 32;
            }
        }
        return finish(case, second, &used, frame | case.linear & mask, user);
    }
    unreachable!("the last level is a leaf")
}

/// The flags of the entries used, and the access itself.
fn finish(
    case: &Case,
    second: Option<&Second>,
    used: &[(u64, u64, u64, u64)],
    gpa: u64,
    user: bool,
) -> Answer {
    let mut memory = case.memory.clone();
    for &(entry_gpa, at, entry, flag) in used {
        if entry & flag == 0 {
            through(second, entry_gpa, MARKS_ENTRY, false)?;
            mark(&mut memory, at, flag);
        }
    }
    let last = EptAccess {
        read: case.access == Access::Read,
        write: case.access == Access::Write,
        fetch: case.access == Access::Fetch,
        user,
        paging: false,
    };
    Ok((through(second, gpa, last, true)? & !4095, memory))
}

struct Rights {
    writable: bool,
    user: bool,
    executable: bool,
    key: u32,
}

/// "Determination of Access Rights": the bits to add to the error code if the access is refused.
fn refused(case: &Case, rights: &Rights) -> Option<u32> {
    let state = &case.state;
    let write_protect = state.cr0 & cr0::WP != 0;
    let user_access = case.privilege == Privilege::User;
    let supervisor_page = !rights.user;
    let data = case.access != Access::Fetch;
    let by_mode = match case.access {
        Access::Fetch if user_access => supervisor_page || !rights.executable,
        Access::Fetch => rights.user && state.cr4 & cr4::SMEP != 0 || !rights.executable,
        _ if user_access => supervisor_page || case.access == Access::Write && !rights.writable,
        _ => {
            let may_touch_user = case.privilege == Privilege::Supervisor && state.rflags() & rflags::AC != 0;
            let smap = rights.user && state.cr4 & cr4::SMAP != 0 && !may_touch_user;
            smap || case.access == Access::Write && write_protect && !rights.writable
        }
    };
    let long = matches!(case.mode, Mode::FourLevel | Mode::FiveLevel);
    let mut by_key = false;
    if long && data && rights.user && state.cr4 & cr4::PKE != 0 {
        let disabled = state.pkru >> (2 * rights.key) & 1 != 0;
        let write_disabled = state.pkru >> (2 * rights.key + 1) & 1 != 0;
        by_key = disabled || write_disabled && case.access == Access::Write && (user_access || write_protect);
    }
    match (by_mode, by_key) {
        (false, false) => None,
        (_, true) => Some(pf_error::PROTECTION_KEY),
        (true, false) => Some(0),
    }
}

fn random_state(random: &mut Random, mode: Mode) -> CpuState {
    let mut state = CpuState::reset();
    let mut bit = |mask: u64| if random.chance(50) { mask } else { 0 };
    state.cr0 = cr0::PE | cr0::PG | bit(cr0::WP);
    state.cr4 = bit(cr4::SMEP) | bit(cr4::SMAP) | bit(cr4::PSE) | bit(cr4::PGE);
    let ac = bit(rflags::AC);
    let nxe = bit(efer::NXE);
    let pke = bit(cr4::PKE);
    state.set_rflags(ac | 2);
    match mode {
        Mode::Bits32 => state.efer = nxe,
        Mode::Pae => {
            state.cr4 |= cr4::PAE;
            state.efer = nxe;
        }
        Mode::FourLevel | Mode::FiveLevel => {
            state.cr4 |= cr4::PAE | pke | if mode == Mode::FiveLevel { cr4::LA57 } else { 0 };
            state.efer = efer::LME | efer::LMA | nxe;
            state.pkru = random.bits() as u32 & random.bits() as u32;
        }
    }
    state.cr3 = random.below(PAGES as u64) << 12;
    for pdpte in &mut state.pdptes {
        *pdpte = random.below(PAGES as u64) << 12 | u64::from(random.chance(90));
    }
    state
}

/// An entry that mostly leads on.
fn random_entry(random: &mut Random, mode: Mode) -> u64 {
    let mut entry = random.below(PAGES as u64) << 12;
    for (mask, percent) in [
        (p::PRESENT, 95),
        (p::WRITE, 75),
        (p::USER, 70),
        (p::ACCESSED, 40),
        (p::DIRTY, 40),
        (p::LARGE, 12),
        (p::GLOBAL, 20),
        (p::WRITE_THROUGH, 20),
        (p::CACHE_DISABLE, 20),
    ] {
        if random.chance(percent) {
            entry |= mask;
        }
    }
    if mode == Mode::Bits32 {
        return entry;
    }
    if random.chance(12) {
        entry |= p::NX;
    }
    if matches!(mode, Mode::FourLevel | Mode::FiveLevel) {
        entry |= random.bits() & 0x7ff << 52;
    }
    if entry & p::LARGE != 0 && random.chance(80) {
        // A large page's low address bits must be clear: take an aligned one.
        entry = entry & !0x000f_ffff_ffff_e000 | random.below(1 << 10) << 30;
    }
    if random.chance(3) {
        entry |= 1 << random.below(64);
    }
    entry
}

fn random_case(random: &mut Random) -> Case {
    let mode = random.pick(&[Mode::Bits32, Mode::Pae, Mode::FourLevel, Mode::FiveLevel]);
    let state = random_state(random, mode);
    let mut memory = vec![0; SIZE];
    let linear = match mode {
        Mode::Bits32 | Mode::Pae => random.bits() & 0xffff_ffff,
        // Canonical: bit 47 (56) goes on to the top.
        Mode::FourLevel => ((random.bits() << 16) as i64 >> 16) as u64,
        Mode::FiveLevel => ((random.bits() << 7) as i64 >> 7) as u64,
    };
    // Only the entries that this address selects matter, in whichever page a table turns out to be.
    let bytes = if mode == Mode::Bits32 { 4 } else { 8 };
    for level in levels(mode, true) {
        let index = (linear >> level.shift & ((1 << level.index_bits) - 1)) as usize;
        for page in 0..PAGES {
            let at = page * 4096 + index * bytes;
            memory[at..at + bytes].copy_from_slice(&random_entry(random, mode).to_le_bytes()[..bytes]);
        }
    }
    let access = random.pick(&[Access::Read, Access::Write, Access::Fetch]);
    let privilege = match access {
        Access::Fetch => random.pick(&[Privilege::User, Privilege::Supervisor]),
        _ => random.pick(&[Privilege::User, Privilege::Supervisor, Privilege::Implicit]),
    };
    Case { state, mode, memory, linear, access, privilege }
}

/// Guest RAM, page-aligned.
#[repr(C, align(4096))]
struct Ram([u8; SIZE]);

fn ram() -> Arc<PhysMemory> {
    let ram = Box::into_raw(Box::new(Ram([0; SIZE])));
    let range = RamRange { start: 0, len: SIZE as u64, host: ram.cast() };
    // SAFETY: page-aligned, never freed, and used by nothing else.
    Arc::new(unsafe { PhysMemory::new(vec![range], Box::new(())) })
}

#[test]
fn walks_agree_with_the_model() {
    let memory = ram();
    let mut mapped = 0;
    for number in 0..CASES {
        let case = random_case(&mut Random::new(number));
        memory.write(0, &case.memory);
        let found = translate(&case.state, &mut Direct(&memory), case.linear, case.access, case.privilege);
        let mut after = vec![0; SIZE];
        memory.read(0, &mut after);
        let context = || {
            format!(
                "case {number}: {:?}, {:?} by {:?} at {:#x}, cr0 {:#x} cr4 {:#x} efer {:#x} pkru {:#x}",
                case.mode,
                case.access,
                case.privilege,
                case.linear,
                case.state.cr0,
                case.state.cr4,
                case.state.efer,
                case.state.pkru
            )
        };
        match (model(&case, None), found) {
            (Ok((physical, marked)), Ok(to)) => {
                mapped += 1;
                assert_eq!(to.physical, physical, "{}", context());
                assert_eq!(after, marked, "{}: accessed and dirty bits", context());
            }
            (Err(Failed::Fault(code)), Err(Failure::Page(fault))) => {
                assert_eq!(fault.error_code, Some(code), "{}", context());
                assert_eq!(fault.address, case.linear, "{}", context());
                assert!(only_flags(&case.memory, &after), "{}: a fault changed more than flags", context());
            }
            (expected, found) => {
                let expected = expected.map(|(physical, _)| physical);
                panic!("{}: the model says {expected:x?}, the walker {found:x?}", context());
            }
        }
    }
    assert!(mapped > CASES / 20, "only {mapped} of {CASES} cases were mapped: the test tests little");
}

/// Nothing but accessed and dirty bits differs.
fn only_flags(before: &[u8], after: &[u8]) -> bool {
    before.iter().zip(after).all(|(b, a)| (b ^ a) & !0x60 == 0)
}

/// Guest-physical pages in another order, some of them with fewer permissions or missing.
fn random_second(random: &mut Random) -> Second {
    let rotate = random.below(PAGES as u64);
    let mut second =
        Second { flags: random.chance(40), mode_based: random.chance(40), pages: HashMap::new() };
    for page in 0..PAGES as u64 {
        let physical = (page * 5 + rotate) % PAGES as u64;
        let permissions = match random.below(100) {
            0..80 => 15,
            80..84 => 0,
            84..88 => 4 | (random.below(2) as u32 * 8),
            _ => 1 | (random.below(8) as u32 * 2),
        };
        if permissions != 0 {
            second.pages.insert(page << 12, (physical << 12, permissions));
        }
    }
    second
}

#[test]
fn walks_in_two_dimensions_agree_with_the_model() {
    let memory = ram();
    let (mut mapped, mut structures, mut pages) = (0, 0, 0);
    for number in 0..CASES {
        let mut random = Random::new(number ^ 0x5eed_0000_0000);
        let case = random_case(&mut random);
        let mut second = random_second(&mut random);
        memory.write(0, &case.memory);
        let mut nested = Nested { memory: &memory, second: &mut second, apic_page: u64::MAX };
        let found = translate(&case.state, &mut nested, case.linear, case.access, case.privilege);
        let mut after = vec![0; SIZE];
        memory.read(0, &mut after);
        let context = format!("case {number}: {:?} at {:#x}, {second:x?}", case.mode, case.linear);
        match (model(&case, Some(&second)), found) {
            (Ok((physical, marked)), Ok(to)) => {
                mapped += 1;
                assert_eq!(to.physical, physical, "{context}");
                assert_eq!(after, marked, "{context}: accessed and dirty bits");
            }
            (Err(Failed::Fault(code)), Err(Failure::Page(fault))) => {
                assert_eq!((fault.error_code, fault.address), (Some(code), case.linear), "{context}");
                assert!(only_flags(&case.memory, &after), "{context}");
            }
            (Err(Failed::Refused { gpa, access, last }), Err(Failure::Refused(refused, to))) => {
                assert_eq!((refused.gpa, refused.access, to.is_some()), (gpa, access, last), "{context}");
                assert!(only_flags(&case.memory, &after), "{context}");
                if last { pages += 1 } else { structures += 1 }
            }
            (expected, found) => {
                let expected = expected.map(|(physical, _)| physical);
                panic!("{context}: the model says {expected:x?}, the walker {found:x?}");
            }
        }
    }
    let least = mapped.min(structures).min(pages);
    assert!(least > CASES / 50, "{mapped} mapped, refused: {structures} structures, {pages} pages");
}
