//! EPT02 as a whole, on tables in a small memory.

use crate::invalidate::Invalidation;
use crate::test_memory::{CAPS, TestMemory};
use crate::*;

const RWX: u64 = 7;
const A: u64 = Entry::ACCESSED;
const D: u64 = Entry::DIRTY;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;
const PLAIN: u64 = PML4 | 0x1e;
const WITH_FLAGS: u64 = PML4 | 0x5e;

/// One table of each level; L2-physical 0x5000 is L1-physical 0x9000.
fn memory() -> TestMemory {
    let memory = TestMemory::new(0x10000);
    memory.set(PML4, PDPT | RWX);
    memory.set(PDPT, PD | RWX);
    memory.set(PD, PT | RWX);
    memory.set(PT + 5 * 8, 0x9000 | 0x30 | RWX);
    memory
}

fn ept02(eptp: u64) -> Ept02 {
    ept02_with(eptp, ExecuteControl::Single)
}

fn ept02_with(eptp: u64, execute: ExecuteControl) -> Ept02 {
    Ept02::new(Limits { sets: 16, roots: 4 }, CAPS, Root::new(eptp, execute))
}

fn translate(ept02: &mut Ept02, memory: &TestMemory, gpa: u64, access: Access) -> Result<u64, Fault> {
    ept02.translate(memory, &Identity, L2Gpa(gpa), access).map(|page| page.piece(L2Gpa(gpa)).0)
}

fn violation(allowed: Permissions) -> Result<u64, Fault> {
    Err(Fault::Violation { allowed, suppress_ve: false })
}

#[test]
fn a_page_is_walked_once() {
    let memory = memory();
    let mut ept02 = ept02(PLAIN);
    for access in [Access::READ, Access::WRITE, Access::FETCH, Access::USER_FETCH, Access::PAGING] {
        assert_eq!(translate(&mut ept02, &memory, 0x5123, access), Ok(0x9000));
    }
    assert_eq!(ept02.walks(), 1);
    assert_eq!(memory.get(PT + 5 * 8), 0x9037, "no flags without bit 6 of the EPT pointer");
}

#[test]
fn permissions_are_what_all_entries_allow() {
    let memory = memory();
    memory.set(PD, PT | 5);
    memory.set(PT + 5 * 8, 0x9033);
    let mut ept02 = ept02(PLAIN);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::READ), Ok(0x9000));
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), violation(Permissions::READ));
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::FETCH), violation(Permissions::READ));
}

#[test]
fn more_permission_is_seen_without_invept_and_less_is_not() {
    let memory = memory();
    memory.set(PT + 5 * 8, 0x9031);
    let mut ept02 = ept02(PLAIN);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::READ), Ok(0x9000));
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), violation(Permissions::READ));
    memory.set(PT + 5 * 8, 0xa033);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), Ok(0xa000));
    memory.set(PT + 5 * 8, 0);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), Ok(0xa000), "still kept");
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::FETCH), violation(Permissions::NONE));
    let gone = translate(&mut ept02, &memory, 0x5000, Access::WRITE);
    assert_eq!(gone, violation(Permissions::NONE), "a violation ends what was kept");
}

#[test]
fn execute_only_pages() {
    let memory = memory();
    memory.set(PT + 5 * 8, 0x9034);
    let mut ept02 = ept02(PLAIN);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::FETCH), Ok(0x9000));
    let executable = Permissions::EXECUTE | Permissions::USER_EXECUTE;
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::READ), violation(executable));
}

#[test]
fn mode_based_execution_asks_the_bit_of_its_mode() {
    let memory = memory();
    for at in [PML4, PDPT, PD] {
        memory.set(at, memory.get(at) | 1 << 10);
    }
    memory.set(PT + 5 * 8, 0x9031 | 1 << 10);
    let mut ept02 = ept02_with(PLAIN, ExecuteControl::ModeBased);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::USER_FETCH), Ok(0x9000));
    let allowed = Permissions::READ | Permissions::USER_EXECUTE;
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::FETCH), violation(allowed));
    ept02.select(Root::new(PLAIN, ExecuteControl::Single));
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::USER_FETCH), violation(Permissions::READ));
}

#[test]
fn misconfiguration_comes_before_what_upper_entries_forbid() {
    let memory = memory();
    memory.set(PDPT, PD | 1);
    memory.set(PT + 5 * 8, 0x9000 | 2 << 3 | RWX);
    let mut ept02 = ept02(PLAIN);
    let fault = Err(Fault::Misconfiguration(Misconfiguration::MemoryType));
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), fault);
    // And what is not present comes before both.
    memory.set(PD, 2 << 3 | 1 << 51);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), violation(Permissions::NONE));
}

#[test]
fn suppress_ve_of_the_entry_that_ends_the_walk() {
    let memory = memory();
    let suppressed = |allowed| Err(Fault::Violation { allowed, suppress_ve: true });
    let mut ept02 = ept02(PLAIN);
    // Ignored in an entry that names a table.
    memory.set(PD, memory.get(PD) | 1 << 63);
    memory.set(PT + 5 * 8, 0x9031);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), violation(Permissions::READ));
    memory.set(PT + 5 * 8, 0x9031 | 1 << 63);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), suppressed(Permissions::READ));
    memory.set(PDPT, 1 << 63);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), suppressed(Permissions::NONE));
}

#[test]
fn accessed_and_dirty_flags() {
    let memory = memory();
    let mut ept02 = ept02(WITH_FLAGS);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::READ), Ok(0x9000));
    for (at, table) in [(PML4, PDPT), (PDPT, PD), (PD, PT)] {
        assert_eq!(memory.get(at), table | RWX | A);
    }
    assert_eq!(memory.get(PT + 5 * 8), 0x9037 | A);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), Ok(0x9000));
    assert_eq!(memory.get(PT + 5 * 8), 0x9037 | A | D);
    assert_eq!(memory.get(PD), PT | RWX | A, "entries that name tables have no dirty flag");
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), Ok(0x9000));
    assert_eq!(ept02.walks(), 2);
}

#[test]
fn a_read_of_a_dirty_page_makes_writes_ready() {
    let memory = memory();
    memory.set(PT + 5 * 8, 0x9037 | A | D);
    let mut ept02 = ept02(WITH_FLAGS);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::READ), Ok(0x9000));
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), Ok(0x9000));
    assert_eq!(ept02.walks(), 1);
}

#[test]
fn use_of_a_paging_structure_is_a_write_only_with_flags() {
    let memory = memory();
    memory.set(PT + 5 * 8, 0x9035);
    let mut plain = ept02(PLAIN);
    assert_eq!(translate(&mut plain, &memory, 0x5000, Access::PAGING), Ok(0x9000));
    let mut flags = ept02(WITH_FLAGS);
    let allowed = Permissions::ALL.without(Permissions::WRITE);
    assert_eq!(translate(&mut flags, &memory, 0x5000, Access::PAGING), violation(allowed));
    memory.set(PT + 5 * 8, 0x9037);
    assert_eq!(translate(&mut flags, &memory, 0x5000, Access::PAGING), Ok(0x9000));
    assert_eq!(memory.get(PT + 5 * 8), 0x9037 | A | D);
}

#[test]
fn a_refused_access_sets_no_flags() {
    let memory = memory();
    memory.set(PT + 5 * 8, 0x9031);
    let mut ept02 = ept02(WITH_FLAGS);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), violation(Permissions::READ));
    assert_eq!(memory.get(PML4), PDPT | RWX);
}

#[test]
fn the_log_takes_pages_as_they_become_dirty_and_fills_downwards() {
    let memory = memory();
    for page in 0..4 {
        memory.set(PT + page * 8, (0x9000 + page * 0x1000) | 0x37);
    }
    let mut ept02 = ept02(WITH_FLAGS);
    ept02.log = Some(Log { address: L1Gpa(0x8000), index: 1 });
    assert_eq!(translate(&mut ept02, &memory, 0x3000, Access::READ), Ok(0xc000));
    assert!(memory.log.borrow().is_empty());
    assert_eq!(translate(&mut ept02, &memory, 0x2fff, Access::WRITE), Ok(0xb000));
    assert_eq!(translate(&mut ept02, &memory, 0x2000, Access::WRITE), Ok(0xb000));
    assert_eq!(translate(&mut ept02, &memory, 0x1238, Access::PAGING), Ok(0xa000));
    assert_eq!(*memory.log.borrow(), [(0x8008, 0x2000), (0x8000, 0x1000)]);
    assert_eq!(ept02.log.map(|log| log.index), Some(0xffff));
    // Full: neither a dirty nor an accessed flag is set any more, and what has its flags goes on.
    assert_eq!(translate(&mut ept02, &memory, 0x3000, Access::WRITE), Err(Fault::LogFull));
    assert_eq!(translate(&mut ept02, &memory, 0, Access::READ), Err(Fault::LogFull));
    assert_eq!(memory.get(PT), 0x9037);
    assert_eq!(memory.get(PT + 3 * 8), 0xc037 | A);
    assert_eq!(translate(&mut ept02, &memory, 0x3000, Access::READ), Ok(0xc000));
    assert_eq!(translate(&mut ept02, &memory, 0x2000, Access::WRITE), Ok(0xb000));
}

#[test]
fn large_pages_are_kept_large_and_logged_by_the_piece_written() {
    let memory = memory();
    memory.set(PD + 8, 0xa0_0000 | 0xb7);
    memory.set(PDPT + 8, 1 << 30 | 0xb7);
    let mut ept02 = ept02(WITH_FLAGS);
    ept02.log = Some(Log { address: L1Gpa(0x8000), index: 511 });
    assert_eq!(translate(&mut ept02, &memory, 0x20_3456, Access::WRITE), Ok(0xa0_0000 + 0x3000));
    for piece in 0..512 {
        let at = 0x20_0000 + piece * 0x1000;
        assert_eq!(translate(&mut ept02, &memory, at, Access::WRITE), Ok(0xa0_0000 + piece * 0x1000));
    }
    assert_eq!(ept02.walks(), 1);
    assert_eq!(*memory.log.borrow(), [(0x8000 + 511 * 8, 0x20_3000)]);
    assert_eq!(translate(&mut ept02, &memory, 0x4000_0000, Access::FETCH), Ok(1 << 30));
    assert_eq!(translate(&mut ept02, &memory, 0x7fff_f000, Access::FETCH), Ok(0x7fff_f000));
    assert_eq!(ept02.walks(), 2);
}

#[test]
fn pages_are_no_larger_than_ept01s() {
    struct Pieces;
    impl Ept01 for Pieces {
        fn span(&self, page: L1Gpa) -> u64 {
            if page.0 < 0x4010_0000 { 4096 } else { 2 << 20 }
        }
    }
    let memory = memory();
    memory.set(PDPT + 8, 1 << 30 | 0xb7);
    let mut ept02 = ept02(PLAIN);
    let mut at = |gpa: u64| {
        let page = ept02
            .translate(&memory, &Pieces, L2Gpa(gpa), Access::READ)
            .map(|page| (page.level(), page.base().0));
        page.map(|page| (page.0, page.1, ept02.walks()))
    };
    assert_eq!(at(0x4000_1fff), Ok((1, 0x4000_1000, 1)));
    assert_eq!(at(0x4000_2000), Ok((1, 0x4000_2000, 2)));
    assert_eq!(at(0x4020_1000), Ok((2, 0x4020_0000, 3)));
    assert_eq!(at(0x4030_1000), Ok((2, 0x4020_0000, 3)));
}

#[test]
fn several_roots_live_at_once_and_invept_takes_its_own() {
    let memory = memory();
    for at in [0, 8] {
        memory.set(0x6000 + at, memory.get(PML4 + at));
    }
    let mut ept02 = ept02(PLAIN);
    let other = Root::new(0x601e, ExecuteControl::Single);
    let first = ept02.root();
    let flags = Root::new(WITH_FLAGS, ExecuteControl::Single);
    for _ in 0..3 {
        for root in [first, other, flags] {
            ept02.select(root);
            assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::READ), Ok(0x9000));
        }
    }
    assert_eq!(ept02.walks(), 3);
    memory.set(PT + 5 * 8, 0xa037);
    ept02.invalidate(Invalidation::of(0x6000));
    ept02.select(first);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::READ), Ok(0x9000), "kept");
    ept02.select(other);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::READ), Ok(0xa000));
    ept02.invalidate(Invalidation::of(PLAIN));
    for root in [first, flags] {
        ept02.select(root);
        assert_eq!(
            translate(&mut ept02, &memory, 0x5000, Access::READ),
            Ok(0xa000),
            "whatever the pointer's low bits"
        );
    }
    memory.set(PT + 5 * 8, 0xb037);
    ept02.invalidate(Invalidation::AllContexts);
    for root in [first, other, flags] {
        ept02.select(root);
        assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::READ), Ok(0xb000));
    }
}

#[test]
fn roots_and_pages_are_bounded() {
    let memory = TestMemory::new(1 << 30);
    for page in 0..512 {
        memory.set(PT + page * 8, page << 12 | 0x37);
    }
    let mut ept02 = ept02(PLAIN);
    for root in 0..100 {
        let table = 0x10_0000 + root * 0x1000;
        memory.set(table, PDPT | RWX);
        memory.set(PDPT, PD | RWX);
        memory.set(PD, PT | RWX);
        ept02.select(Root::new(table | 0x1e, ExecuteControl::Single));
        for page in 0..512 {
            assert_eq!(translate(&mut ept02, &memory, page << 12, Access::READ), Ok(page << 12));
        }
        assert!(ept02.roots() <= 4);
    }
    assert!(ept02.pages() <= 64);
}

#[test]
fn garbage_is_harmless() {
    let memory = memory();
    let mut ept02 = ept02(WITH_FLAGS);
    // Every entry names its own table: four steps, and the table is the page.
    memory.set(PML4, PML4 | RWX);
    assert_eq!(translate(&mut ept02, &memory, 0, Access::READ), Ok(PML4));
    assert_eq!(memory.get(PML4), PML4 | RWX | A);
    // Outside RAM: ones.
    for root in [0x10000, 0x3fff_ffff_f000, 0x000f_ffff_ffff_f000] {
        ept02.select(Root::new(root | 0x1e, ExecuteControl::Single));
        let fault = Err(Fault::Misconfiguration(Misconfiguration::ReservedBit));
        assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::READ), fault);
    }
    let beyond = translate(&mut ept02, &memory, 1 << 48, Access::READ);
    assert_eq!(beyond, Err(Fault::Violation { allowed: Permissions::NONE, suppress_ve: true }));
    assert_eq!(translate(&mut ept02, &memory, u64::MAX, Access::READ), beyond);
}

#[test]
fn entries_that_change_meanwhile_are_walked_again() {
    let memory = memory();
    let mut ept02 = ept02(WITH_FLAGS);
    memory.disturbances.set(3);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), Ok(0x9000));
    assert_eq!(memory.get(PT + 5 * 8), 0x9037 | A | D);
    memory.set(PT + 5 * 8, 0x9037);
    ept02.invalidate(Invalidation::AllContexts);
    memory.disturbances.set(u32::MAX);
    assert_eq!(translate(&mut ept02, &memory, 0x5000, Access::WRITE), violation(Permissions::ALL));
}
