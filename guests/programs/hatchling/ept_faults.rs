//! EPT violations of each kind with their qualification, EPT misconfigurations, accessed and dirty flags.

use crate::simple_exits::to_ring3;
use crate::want::{Want, to_end};
use rt::cpu;
use rt::mem::{self, PAGE};
use rt::report::{equal, skip};
use rt::vmx::capability::{self as cap};
use rt::vmx::control::*;
use rt::vmx::ept::{self, A, ADDRESS, D, Ept, LARGE, R, RWX, W, WB, X};
use rt::vmx::exit::event;
use rt::vmx::vm::expect;
use rt::vmx::{Exit, Vm, field as f, reason, vmread, vmwrite};
use rt::{check, l2, paging, trap, user};

/// The page that cases forbid.
pub const PAGE_AT: u64 = mem::FREE + 0x40_0000;

/// Qualification bits.
pub const READ: u64 = 1;
pub const WRITE: u64 = 2;
pub const FETCH: u64 = 4;
pub const LINEAR: u64 = 1 << 7;
pub const FINAL: u64 = 1 << 8;
/// What every processor defines; bit 6 and bits 9 to 11 depend on others.
const DEFINED: u64 = 0x1bf;

/// A machine with an EPT of its own that maps everything to itself.
pub fn with_ept(name: &str, code: u64) -> Option<(Vm, Ept)> {
    let mut vm = Vm::fresh(code);
    if !vm.set_or_skip(name, &[ENABLE_EPT]) {
        return None;
    }
    let ept = shared_ept();
    vmwrite(f::EPT_POINTER, ept.pointer());
    Some((vm, ept))
}

/// One hierarchy for all cases, made anew for each.
pub fn shared_ept() -> Ept {
    use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
    static ROOT: AtomicU64 = AtomicU64::new(0);
    if ROOT.load(Relaxed) == 0 {
        ROOT.store(Ept::identity().root, Relaxed);
    }
    let ept = Ept { root: ROOT.load(Relaxed) };
    ept.reset();
    expect(ept.invalidate(), "INVEPT");
    ept
}

pub fn all() {
    if !ENABLE_EPT.available() {
        return skip("everything about EPT", ENABLE_EPT.name);
    }
    translation();
    violations();
    levels();
    paging_structures();
    accessed_and_dirty();
    misconfigurations();
    advanced_information();
    other_instructions();
}

fn translation() {
    let name = "EPT maps L2's page elsewhere";
    let Some((mut vm, ept)) = with_ept(name, l2!(["mov rax, [rbx]", "mov [rbx + 8], rax"])) else { return };
    mem::write(PAGE_AT + 0x5ff8, 0x1111_2222_3333_4444u64);
    ept.set(PAGE_AT, (PAGE_AT + 5 * PAGE) | RWX | WB);
    vm.regs.rbx = PAGE_AT + 0xff8 - 0x10;
    mem::write(PAGE_AT + 0x5fe8, 0xaaaa_bbbbu64);
    to_end(name, &mut vm);
    equal("L2 reads the page that EPT names", vm.regs.rax, 0xaaaa_bbbb);
    equal("L2 writes the page that EPT names", mem::read(PAGE_AT + 0x5ff0), 0xaaaa_bbbbu64);
    // An access across two pages that EPT maps apart.
    let Some((mut vm, ept)) = with_ept(name, l2!(["mov rax, [rbx]"])) else { return };
    ept.set(PAGE_AT, (PAGE_AT + 5 * PAGE) | RWX | WB);
    ept.set(PAGE_AT + PAGE, (PAGE_AT + 9 * PAGE) | RWX | WB);
    mem::write(PAGE_AT + 0x5ffc, 0x5566_7788u32);
    mem::write(PAGE_AT + 0x9000, 0x1122_3344u32);
    vm.regs.rbx = PAGE_AT + 0xffc;
    to_end("an access across two pages mapped apart", &mut vm);
    equal("it reads both", vm.regs.rax, 0x1122_3344_5566_7788);
    huge_page();
}

fn huge_page() {
    let name = "EPT: 1 GiB page";
    if cap::ept_vpid() & cap::EPT_1G == 0 {
        return skip(name, "1 GiB EPT pages");
    }
    let Some((mut vm, ept)) = with_ept(name, l2!(["mov eax, [rbx]"])) else { return };
    let at = ept.entry_at(0, 3);
    let table: u64 = mem::read(at);
    mem::write(at, RWX | LARGE | WB);
    expect(ept.invalidate(), "INVEPT");
    mem::write(PAGE_AT + 0x10, 0x1234_5678u32);
    vm.regs.rbx = PAGE_AT + 0x10;
    to_end(name, &mut vm);
    equal("EPT: 1 GiB page maps", vm.regs.rax, 0x1234_5678);
    mem::write(at, table);
    expect(ept.invalidate(), "INVEPT");
}

/// What L2 does with the page.
#[derive(Clone, Copy, PartialEq)]
enum Access {
    Read,
    Write,
    Fetch,
}

impl Access {
    fn code(self) -> u64 {
        match self {
            Access::Read => l2!(["mov al, [rbx]"]),
            Access::Write => l2!(["mov [rbx], al"]),
            Access::Fetch => l2!(["call rbx"]),
        }
    }

    fn bit(self) -> u64 {
        match self {
            Access::Read => READ,
            Access::Write => WRITE,
            Access::Fetch => FETCH,
        }
    }
}

/// Checks an EPT violation, of whose qualification bits 9 to 11 and 6 are left out.
pub fn violation(name: &str, exit: &Exit, qualification: u64, physical: u64, linear: Option<u64>) {
    let found = exit.qualification & DEFINED;
    check!(
        name,
        exit.reason == reason::EPT_VIOLATION
            && found == qualification
            && exit.physical == physical
            && linear.is_none_or(|linear| exit.linear == linear)
            && exit.vectoring & event::VALID == 0
            && exit.interruption & event::VALID == 0,
        "{exit}, wanted EPT violation, qualification {qualification:#x} guest-physical {physical:#x} linear {linear:x?}"
    );
}

fn violations() {
    use Access::*;
    let execute_only = cap::ept_vpid() & cap::EPT_EXECUTE_ONLY != 0;
    let cases = [
        ("EPT: hole", 0, [Read, Write, Fetch], [true, true, true]),
        ("EPT: read-only page", R, [Read, Write, Fetch], [false, true, true]),
        ("EPT: page without execute", R | W, [Read, Write, Fetch], [false, false, true]),
        ("EPT: page without write", R | X, [Read, Write, Fetch], [false, true, false]),
        ("EPT: execute-only page", X, [Read, Write, Fetch], [true, true, false]),
        ("EPT: page with everything", RWX, [Read, Write, Fetch], [false, false, false]),
    ];
    mem::write(PAGE_AT + 0x20, 0xc3u8);
    for (name, permissions, accesses, outcomes) in cases {
        if permissions == X && !execute_only {
            skip(name, "execute-only EPT pages");
            continue;
        }
        for (access, exits) in accesses.into_iter().zip(outcomes) {
            one_violation(name, permissions, access, exits);
        }
    }
}

fn one_violation(name: &str, permissions: u64, access: Access, exits: bool) {
    let Some((mut vm, ept)) = with_ept(name, access.code()) else { return };
    mem::write(PAGE_AT + 0x20, 0xc3u8);
    ept.permit(PAGE_AT, permissions);
    vm.regs.rbx = PAGE_AT + 0x20;
    vm.regs.rax = 0xc3;
    if !exits {
        to_end(name, &mut vm);
        return;
    }
    let exit = vm.run();
    let qualification = access.bit() | permissions << 3 | LINEAR | FINAL;
    violation(name, &exit, qualification, PAGE_AT + 0x20, Some(PAGE_AT + 0x20));
    let rip = if access == Access::Fetch { PAGE_AT + 0x20 } else { vm.start };
    check!(name, exit.rip == rip, "RIP {:#x}, wanted {rip:#x}", exit.rip);
    equal("EPT: a violation saves RF", exit.rflags >> 16 & 1, 1);
    // Once L1 has mapped the page, L2 goes on where it was.
    ept.permit(PAGE_AT, RWX);
    to_end("EPT: L2 goes on after L1 has mapped the page", &mut vm);
}

fn levels() {
    let name = "EPT: permissions of all levels count";
    for level in [2, 3, 4] {
        let Some((mut vm, ept)) = with_ept(name, Access::Write.code()) else { return };
        ept.permit(PAGE_AT, RWX);
        let at = ept.entry_at(PAGE_AT, level);
        let entry: u64 = mem::read(at);
        mem::write(at, entry & !W);
        expect(ept.invalidate(), "INVEPT");
        // Everything L2 touches lies below 1 GiB: its stack and accessed flags need no write here.
        vm.regs.rbx = PAGE_AT;
        let exit = vm.run();
        mem::write(at, entry);
        expect(ept.invalidate(), "INVEPT");
        let right = exit.reason == reason::EPT_VIOLATION && exit.qualification & WRITE != 0;
        check!(name, right && exit.qualification & 0x38 == 0x28, "level {level}: {exit}");
    }
    let Some((mut vm, ept)) = with_ept(name, Access::Read.code()) else { return };
    let at = ept.entry_at(PAGE_AT, 2);
    mem::write(at, 0u64);
    expect(ept.invalidate(), "INVEPT");
    vm.regs.rbx = PAGE_AT + 0x777;
    let wanted = READ | LINEAR | FINAL;
    violation("EPT: hole of 2 MiB", &vm.run(), wanted, PAGE_AT + 0x777, Some(PAGE_AT + 0x777));
    let Some((mut vm, ept)) = with_ept(name, Access::Write.code()) else { return };
    let at = ept.entry_at(PAGE_AT, 2);
    mem::write(at, PAGE_AT & !0x1f_ffff | R | X | LARGE | WB);
    expect(ept.invalidate(), "INVEPT");
    vm.regs.rbx = PAGE_AT + 0x777;
    let wanted = WRITE | (R | X) << 3 | LINEAR | FINAL;
    violation("EPT: large page without write", &vm.run(), wanted, PAGE_AT + 0x777, Some(PAGE_AT + 0x777));
    let Some((mut vm, _)) = with_ept(name, l2!(["mov rax, [rbx]"])) else { return };
    let far = 0x40_0000_0000u64;
    paging::set_pte(user::SCRATCH + 32 * PAGE, far | paging::P | paging::W);
    vm.regs.rbx = user::SCRATCH + 32 * PAGE + 8;
    let exit = vm.run();
    violation("EPT: beyond the map", &exit, wanted & !WRITE & !0x38 | READ, far + 8, Some(vm.regs.rbx));
}

/// L2's page tables are read through EPT.
fn paging_structures() {
    let va = user::SCRATCH + 40 * PAGE;
    paging::set_pte(va, PAGE_AT | paging::P | paging::W | paging::A | paging::D);
    let table = paging::entry_at(va, 1);
    let name = "EPT: page table in a hole";
    let Some((mut vm, ept)) = with_ept(name, Access::Read.code()) else { return };
    ept.permit(table & ADDRESS, 0);
    vm.regs.rbx = va + 0x30;
    violation(name, &vm.run(), READ | LINEAR, table, Some(va + 0x30));
    ept.permit(table & ADDRESS, R);
    to_end("EPT: page table that is read-only, with accessed flags set", &mut vm);
    paging::set_pte(va, PAGE_AT | paging::P | paging::W);
    let name = "EPT: page table that is read-only, without accessed flags";
    let Some((mut vm, ept)) = with_ept(name, Access::Read.code()) else { return };
    ept.permit(table & ADDRESS, R);
    vm.regs.rbx = va + 0x30;
    let exit = vm.run();
    // Whether setting a flag counts as a read as well is left to the processor.
    let found = exit.qualification & DEFINED & !READ;
    check!(name, found == WRITE | R << 3 | LINEAR && exit.physical == table, "{exit}");
    let Some((mut vm, ept)) = with_ept("EPT: page table with accessed and dirty flags", Access::Read.code())
    else {
        return;
    };
    if cap::ept_vpid() & cap::EPT_ACCESSED_DIRTY != 0 {
        paging::set_pte(va, PAGE_AT | paging::P | paging::W | paging::A | paging::D);
        vmwrite(f::EPT_POINTER, ept.pointer() | ept::POINTER_AD);
        ept.permit(table & ADDRESS, R);
        vm.regs.rbx = va + 0x30;
        let name = "EPT: with accessed and dirty flags, page-table accesses are writes";
        violation(name, &vm.run(), READ | WRITE | R << 3 | LINEAR, table, Some(va + 0x30));
    }
    // A page fault of L2's own tables goes before the violation of the page.
    paging::set_pte(va, 0);
    let Some((mut vm, ept)) = with_ept(name, Access::Write.code()) else { return };
    ept.permit(PAGE_AT, 0);
    vm.regs.rbx = va;
    let event = event::HARDWARE_EXCEPTION | u32::from(trap::PF);
    let want = Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(event, 2).qualification(va);
    want.run("EPT: #PF of L2's tables goes first", &mut vm);
}

fn accessed_and_dirty() {
    let name = "EPT: accessed and dirty flags";
    if cap::ept_vpid() & cap::EPT_ACCESSED_DIRTY == 0 {
        return skip(name, "EPT accessed and dirty flags");
    }
    let flags = |ept: Ept| mem::read::<u64>(ept.entry_at(PAGE_AT, 1)) & (A | D);
    let Some((mut vm, ept)) = with_ept(name, l2!(["mov al, [rbx]", "vmcall", "mov [rbx], al"])) else {
        return;
    };
    vmwrite(f::EPT_POINTER, ept.pointer() | ept::POINTER_AD);
    ept.permit(PAGE_AT, RWX);
    let directory = ept.entry_at(PAGE_AT, 2);
    mem::write(directory, mem::read::<u64>(directory) & !A);
    expect(rt::vmx::insn::invept(2, [0, 0]), "INVEPT");
    vm.regs.rbx = PAGE_AT + 4;
    to_end("EPT: L2 reads", &mut vm);
    equal("EPT: a read sets the accessed flag", flags(ept), A);
    equal("EPT: it sets the accessed flag of the directory", mem::read::<u64>(directory) & (A | D), A);
    vm.skip();
    to_end("EPT: L2 writes", &mut vm);
    equal("EPT: a write sets the dirty flag", flags(ept), A | D);
    let Some((mut vm, ept)) = with_ept(name, Access::Write.code()) else { return };
    ept.permit(PAGE_AT, RWX);
    vm.regs.rbx = PAGE_AT + 4;
    to_end("EPT: L2 writes without flags", &mut vm);
    equal("EPT: flags stay clear where they are off", flags(ept), 0);
}

fn misconfigurations() {
    let good = PAGE_AT | WB;
    let width = cpu::physical_bits();
    let execute_only = cap::ept_vpid() & cap::EPT_EXECUTE_ONLY != 0;
    let cases = [
        ("write without read", 1, Some(good | W)),
        ("write and execute without read", 1, Some(good | W | X)),
        ("execute-only where that is not offered", 1, (!execute_only).then_some(good | X)),
        ("memory type 2", 1, Some(PAGE_AT | RWX | 2 << 3)),
        ("memory type 3", 1, Some(PAGE_AT | RWX | 3 << 3)),
        ("memory type 7", 1, Some(PAGE_AT | RWX | 7 << 3)),
        ("an address beyond the physical-address width", 1, (width < 52).then_some(good | RWX | 1 << width)),
        ("directory entry with bit 3", 2, Some(0)),
        ("directory entry with write alone", 2, Some(1)),
        ("2 MiB page with bit 12", 2, Some(2)),
        ("pointer-table entry with bit 4", 3, Some(3)),
        ("root entry with bit 7", 4, Some(4)),
        ("root entry with bit 5", 4, Some(5)),
    ];
    for (what, level, entry) in cases {
        let Some(entry) = entry else { continue };
        let Some((mut vm, ept)) = with_ept(what, Access::Read.code()) else { return };
        // L2's own code must be reachable: break a far part of the map at the higher levels.
        let gpa = if level >= 3 { far_gpa(ept, level) } else { PAGE_AT };
        let at = ept.entry_at(gpa, level);
        let before: u64 = mem::read(at);
        let table = mem::read::<u64>(at) & ADDRESS;
        mem::write(
            at,
            match entry {
                0 => table & !0x1f_ffff | RWX | 1 << 3,
                1 => table & !0x1f_ffff | W,
                2 => PAGE_AT & !0x1f_ffff | RWX | WB | LARGE | 1 << 12,
                3 => table | RWX | 1 << 4,
                4 => table | RWX | 1 << 7,
                5 => table | RWX | 1 << 5,
                entry => entry,
            },
        );
        expect(ept.invalidate(), "INVEPT");
        let va = user::SCRATCH + 48 * PAGE;
        paging::set_pte(va, gpa | paging::P | paging::W | paging::A | paging::D);
        vm.regs.rbx = va + 0x10;
        let want = Want::exit(reason::EPT_MISCONFIGURATION).any_qualification().physical(gpa + 0x10);
        want.run(what, &mut vm);
        mem::write(at, before);
        paging::set_pte(va, 0);
    }
}

/// A guest-physical address under an entry of its own at this level.
fn far_gpa(ept: Ept, level: u32) -> u64 {
    let gpa = 1u64 << if level == 4 { 39 } else { 32 };
    ept.entry_at(gpa, 1);
    gpa
}

/// Bits 9 to 11: what L2's own tables say of the linear address.
fn advanced_information() {
    let name = "EPT: advanced information";
    if cap::ept_vpid() & cap::EPT_ADVANCED_INFORMATION == 0 {
        return skip(name, "advanced EPT-violation information");
    }
    let va = user::SCRATCH + 56 * PAGE;
    let nx = if cpu::NX.present() { paging::NX } else { 0 };
    for (what, flags, wanted) in [
        ("supervisor read-only page", paging::P, 0u64),
        ("supervisor writable page", paging::P | paging::W, 1 << 10),
        ("user writable page", paging::P | paging::W | paging::U, 1 << 9 | 1 << 10),
        (
            "user read-only no-execute page",
            paging::P | paging::U | nx,
            1 << 9 | if nx != 0 { 1 << 11 } else { 0 },
        ),
    ] {
        let Some((mut vm, ept)) = with_ept(name, Access::Read.code()) else { return };
        paging::set_pte(va, PAGE_AT | flags | paging::A | paging::D);
        ept.permit(PAGE_AT, 0);
        vm.regs.rbx = va;
        let exit = vm.run();
        check!(name, exit.qualification & 0xe00 == wanted, "{what}: {exit}, wanted {wanted:#x}");
    }
    paging::set_pte(va, 0);
}

/// Violations out of other accesses than plain loads and stores.
fn other_instructions() {
    let start = |code: u64, permissions: u64| {
        let (mut vm, ept) = with_ept("EPT", code)?;
        ept.permit(PAGE_AT, permissions);
        vm.regs.rbx = PAGE_AT + 0x40;
        Some(vm)
    };
    if let Some(mut vm) = start(l2!(["lock inc dword ptr [rbx]"]), R) {
        let exit = vm.run();
        let right =
            exit.reason == reason::EPT_VIOLATION && exit.qualification & (WRITE | 0x38) == WRITE | R << 3;
        check!("EPT: read-modify-write of a read-only page", right, "{exit}");
    }
    if let Some(mut vm) = start(l2!(["rep stosb"]), R) {
        (vm.regs.rdi, vm.regs.rcx) = (PAGE_AT - 3, 8);
        violation(
            "EPT: REP STOS runs into the page",
            &vm.run(),
            WRITE | R << 3 | LINEAR | FINAL,
            PAGE_AT,
            Some(PAGE_AT),
        );
        equal("EPT: REP STOS stops in its middle", vm.regs.rcx, 5);
    }
    if let Some(mut vm) = start(l2!(["mov rax, [rbx]"]), 0) {
        vm.regs.rbx = PAGE_AT - 3;
        violation(
            "EPT: access across the page's start",
            &vm.run(),
            READ | LINEAR | FINAL,
            PAGE_AT,
            Some(PAGE_AT),
        );
    }
    if let Some(mut vm) = start(0, 0) {
        let va = user::SCRATCH + 8;
        let physical = paging::pte(va) & ADDRESS | 8;
        to_ring3(&mut vm, &[0x8a, 0x03]);
        vm.regs.rbx = va;
        shared_entry(physical, 0);
        violation("EPT: ring 3", &vm.run(), READ | LINEAR | FINAL, physical, Some(va));
    }
}

/// Changes the permissions of a page in the EPT in use.
fn shared_entry(gpa: u64, permissions: u64) {
    let ept = Ept { root: vmread(f::EPT_POINTER) & ADDRESS };
    ept.permit(gpa, permissions);
    expect(ept.invalidate(), "INVEPT");
}
