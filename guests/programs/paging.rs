//! Paging in every mode: page sizes, accessed and dirty bits, protections, reserved bits, TLB invalidation.
#![no_std]
#![no_main]

use rt::cpu::*;
use rt::legacy::{self, CR0_NO_PAGING, CR0_PAGING, Controls, Op};
use rt::mem::{self, PAGE};
use rt::paging::{self, A, D, ERR_I, ERR_P, ERR_PK, ERR_RSVD, ERR_W, G, NX as NO_EXECUTE, P, PS, U, W};
use rt::report::{equal, faulted, page_faulted, ran, skip};
use rt::{Fault, check, probe, trap};

/// A region apart from everything else: 512 GiB up, under its own PML4 entry.
const VA: u64 = 0x80_0000_0000;
/// Physical memory for large test pages.
const BIG: u64 = 0x80_0000;

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    no_paging();
    paging_32bit();
    large_pages_32bit();
    paging_pae();
    pae_pointer_registers();
    page_sizes();
    accessed_and_dirty();
    write_protect();
    no_execute();
    smep();
    smap();
    reserved_bits();
    invalidation();
    global_pages();
    pcid();
    invpcid();
    protection_keys();
    five_levels();
}

fn read(va: u64) -> Option<Fault> {
    probe!(["mov al, [{p}]"], p = in(reg) va, out("al") _)
}

fn write(va: u64) -> Option<Fault> {
    probe!(["mov byte ptr [{p}], 1"], p = in(reg) va)
}

fn call(va: u64) -> Option<Fault> {
    probe!(["call {p}"], p = in(reg) va)
}

fn op_ran(name: &str, op: &Op) {
    check!(name, op.vector == 0, "vector {} error {:#x} CR2 {:#x}", op.vector, op.error, op.cr2);
}

fn op_faulted(name: &str, op: &Op, error: u32, address: u64) {
    let holds = op.vector == 14 && op.error == error && op.cr2 == address as u32;
    check!(
        name,
        holds,
        "vector {} error {:#x} CR2 {:#x}, wanted error {error:#x}",
        op.vector,
        op.error,
        op.cr2
    );
}

fn no_paging() {
    let mut ops = [Op::write(BIG, 0x1234_5678), Op::read(BIG)];
    legacy::run(&Controls { cr0: CR0_NO_PAGING, cr3: 0, cr4: 0 }, &mut ops);
    equal("no paging: a write is read back", ops[1].value, 0x1234_5678);
    equal("no paging: the write went to that address", mem::read::<u32>(BIG), 0x1234_5678);
}

/// A 32-bit page directory that maps the low 4 MiB by a page table; returns (directory, table).
fn directory_32bit() -> (u64, u64) {
    let (directory, table) = (mem::frame(), mem::frame());
    for i in 0..1024u64 {
        mem::write(table + i * 4, (i * PAGE | P | W) as u32);
    }
    mem::write(directory, (table | P | W) as u32);
    // Tables and frames lie above 4 MiB: map them through the directory, each 4 MiB by a table of its own.
    for slot in 1..8u64 {
        let more = mem::frame();
        for i in 0..1024u64 {
            mem::write(more + i * 4, ((slot * 1024 + i) * PAGE | P | W) as u32);
        }
        mem::write(directory + slot * 4, (more | P | W) as u32);
    }
    (directory, table)
}

fn paging_32bit() {
    let (directory, _) = directory_32bit();
    let (table, page) = (mem::frame(), mem::frame());
    let va = 0x4000_0000u64;
    let pde = directory + (va >> 22) * 4;
    mem::write(pde, (table | P | W) as u32);
    mem::write(table, (page | P | W) as u32);
    mem::write(table + 4, (page | P) as u32);
    mem::write(page, 0xcafe_f00du32);
    let controls = Controls { cr0: CR0_PAGING, cr3: directory as u32, cr4: 0 };
    let mut ops =
        [Op::read(va), Op::read(va + 2 * PAGE), Op::write(va + 2 * PAGE, 0), Op::write(va + PAGE + 8, 1)];
    legacy::run(&controls, &mut ops);
    equal("32-bit: a 4 KiB page", ops[0].value, 0xcafe_f00d);
    op_faulted("32-bit: absent page, read", &ops[1], 0, va + 2 * PAGE);
    op_faulted("32-bit: absent page, write", &ops[2], ERR_W, va + 2 * PAGE);
    op_faulted("32-bit: read-only page", &ops[3], ERR_P | ERR_W, va + PAGE + 8);
    equal("32-bit: a read sets A", mem::read::<u32>(table) & 0x60, A as u32);
    equal("32-bit: A in the directory, never D", mem::read::<u32>(pde) & 0x60, A as u32);
    let mut ops = [Op::write(va, 7), Op::set_cr0(CR0_PAGING & !(CR0_WP as u32)), Op::write(va + PAGE + 8, 1)];
    legacy::run(&controls, &mut ops);
    equal("32-bit: a write sets D", mem::read::<u32>(table) & 0x60, (A | D) as u32);
    op_ran("32-bit: without CR0.WP ring 0 writes a read-only page", &ops[2]);
    // Edit the entry through its identity mapping, then invalidate.
    let other = mem::frame();
    mem::write(other, 0x0b5e_55edu32);
    let mut ops = [Op::read(va), Op::write(table, (other | P | W) as u32), Op::invlpg(va), Op::read(va)];
    legacy::run(&controls, &mut ops);
    equal("32-bit: a new mapping after INVLPG", ops[3].value, 0x0b5e_55ed);
}

fn large_pages_32bit() {
    if !PSE.or_skip("PSE: 4 MiB page") {
        return;
    }
    let (directory, _) = directory_32bit();
    let va = 0x4000_0000u64;
    let pde = directory + (va >> 22) * 4;
    mem::write(pde, (BIG | P | W | PS) as u32);
    mem::write(BIG + 0x12_3450, 0x0dd_ba11u32);
    let controls = Controls { cr0: CR0_PAGING, cr3: directory as u32, cr4: CR4_PSE as u32 };
    let mut ops = [Op::read(va + 0x12_3450)];
    legacy::run(&controls, &mut ops);
    equal("PSE: 4 MiB page", ops[0].value, 0x0dd_ba11);
    equal("PSE: a read sets A", mem::read::<u32>(pde) & 0x60, A as u32);
    legacy::run(&controls, &mut [Op::write(va + 4, 1)]);
    equal("PSE: a write sets D", mem::read::<u32>(pde) & 0x60, (A | D) as u32);
    mem::write(pde, (BIG | P | W | PS) as u32 | 1 << 21);
    let mut ops = [Op::read(va + 4)];
    legacy::run(&controls, &mut ops);
    op_faulted("PSE: reserved bit 21", &ops[0], ERR_P | ERR_RSVD, va + 4);
    // Without CR4.PSE the PS bit is ignored: the entry names a page table.
    let (table, page) = (mem::frame(), mem::frame());
    mem::write(table, (page | P | W) as u32);
    mem::write(page + 8, 0x7ab1_eu32);
    mem::write(pde, (table | P | W | PS) as u32);
    let mut ops = [Op::read(va + 8)];
    legacy::run(&Controls { cr4: 0, ..controls }, &mut ops);
    equal("PSE: without CR4.PSE the PS bit is ignored", ops[0].value, 0x7ab1_e);
}

/// PAE tables: identity for the first GiB by 2 MiB pages, and an empty directory for the second.
fn tables_pae() -> (u64, u64) {
    let (pointers, low, test) = (mem::frame(), mem::frame(), mem::frame());
    for i in 0..512 {
        mem::write(low + i * 8, i << 21 | P | W | PS);
    }
    mem::write(pointers, low | P);
    mem::write(pointers + 8, test | P);
    (pointers, test)
}

fn paging_pae() {
    let (pointers, directory) = tables_pae();
    let (table, page) = (mem::frame(), mem::frame());
    let va = 0x4000_0000u64;
    mem::write(directory, table | P | W);
    mem::write(directory + 8, BIG | P | W | PS);
    mem::write(table, page | P | W);
    mem::write(table + 8, page | P | W | 1 << 51);
    mem::write(table + 16, page | P | W | NO_EXECUTE);
    mem::write(page, 0x00c3_c3c3u32);
    mem::write(BIG + 0x1_0004, 0x9ae_2u32);
    let controls = Controls { cr0: CR0_PAGING, cr3: pointers as u32, cr4: CR4_PAE as u32 };
    let mut ops = [
        Op::read(va),
        Op::read(va + (2 << 20) + 0x1_0004),
        Op::read(va + 3 * PAGE),
        Op::read(va + PAGE),
        Op::call(va),
        Op::call(va + 2 * PAGE),
        Op::read(0x8000_0000),
    ];
    legacy::run(&controls, &mut ops);
    equal("PAE: a 4 KiB page", ops[0].value, 0x00c3_c3c3);
    equal("PAE: a 2 MiB page", ops[1].value, 0x9ae_2);
    op_faulted("PAE: absent page", &ops[2], 0, va + 3 * PAGE);
    op_faulted("PAE: reserved bit", &ops[3], ERR_P | ERR_RSVD, va + PAGE);
    op_ran("PAE: code runs from a page without NX", &ops[4]);
    if NX.or_skip("PAE: no-execute page") {
        op_faulted("PAE: no-execute page", &ops[5], ERR_P | ERR_I, va + 2 * PAGE);
    }
    op_faulted("PAE: absent pointer entry", &ops[6], 0, 0x8000_0000);
    equal("PAE: a read sets A", mem::read::<u64>(table) & 0x60, A);
    equal("PAE: A in the directory", mem::read::<u64>(directory) & 0x60, A);
    legacy::run(&controls, &mut [Op::write(va + (2 << 20), 1)]);
    equal("PAE: a write sets D of a 2 MiB page", mem::read::<u64>(directory + 8) & 0x60, A | D);
}

/// Intel processors load the four pointer entries at MOV CR3 (SDM, "PDPTE Registers").
fn pae_pointer_registers() {
    let (pointers, directory) = tables_pae();
    let va = 0x4000_0000u64;
    mem::write(directory, BIG | P | W | PS);
    let controls = Controls { cr0: CR0_PAGING, cr3: pointers as u32, cr4: CR4_PAE as u32 };
    let mut ops = [
        Op::write(pointers + 8, 0),
        Op::invlpg(va),
        Op::read(va),
        Op::set_cr3(pointers),
        Op::read(va),
        Op::write(pointers + 8, (directory | P | 1 << 1) as u32),
        Op::set_cr3(pointers),
        Op::read(va),
    ];
    legacy::run(&controls, &mut ops);
    op_ran("PAE: an edited pointer entry waits for MOV CR3", &ops[2]);
    op_faulted("PAE: MOV CR3 loads the pointer entries", &ops[4], 0, va);
    check!(
        "PAE: MOV CR3 refuses a reserved bit in a pointer entry",
        ops[6].vector == 13,
        "vector {}",
        ops[6].vector
    );
    op_faulted("PAE: a refused MOV CR3 changes nothing", &ops[7], 0, va);
}

fn page_sizes() {
    let page = mem::frame();
    mem::write(page + 0x10, 0x11u64);
    mem::write(BIG + 0x10_0010, 0x22u64);
    paging::set_pte(VA, page | P | W);
    equal("4 KiB page", mem::read::<u64>(VA + 0x10), 0x11);
    paging::set_entry(VA + (2 << 20), 2, BIG | P | W | PS);
    equal("2 MiB page", mem::read::<u64>(VA + (2 << 20) + 0x10_0010), 0x22);
    if PAGE_1G.or_skip("1 GiB page") {
        paging::set_entry(VA + (1 << 30), 3, P | W | PS);
        equal("1 GiB page", mem::read::<u64>(VA + (1 << 30) + BIG + 0x10_0010), 0x22);
        paging::set_entry(VA + (1 << 30), 3, 0);
    }
    page_faulted("absent PML4 entry", &read(2 * VA), 0, 2 * VA, 0);
    page_faulted("absent pointer entry", &read(VA + (4 << 30)), 0, VA + (4 << 30), 0);
    page_faulted("absent directory entry", &read(VA + (4 << 20)), 0, VA + (4 << 20), 0);
    page_faulted("absent table entry", &read(VA + PAGE), 0, VA + PAGE, 0);
    crossing(page);
}

/// An access over two pages that are not neighbours in memory.
fn crossing(page: u64) {
    let second = mem::frames(3) + 2 * PAGE;
    paging::set_pte(VA + PAGE, second | P | W);
    mem::write(VA + PAGE - 4, 0x1122_3344_5566_7788u64);
    equal("a write over two pages: first", mem::read::<u32>(page + PAGE - 4), 0x5566_7788);
    equal("a write over two pages: second", mem::read::<u32>(second), 0x1122_3344);
    equal("a read over two pages", mem::read::<u64>(VA + PAGE - 4), 0x1122_3344_5566_7788);
    paging::set_pte(VA + PAGE, second | P);
    let fault = probe!(["mov qword ptr [{p}], 0"], p = in(reg) VA + PAGE - 4);
    page_faulted("a write into a read-only second page", &fault, ERR_P | ERR_W, VA + PAGE, 0);
    equal("it changed nothing in the first page", mem::read::<u32>(page + PAGE - 4), 0x5566_7788);
    paging::set_pte(VA + PAGE, 0);
}

fn accessed_and_dirty() {
    let page = mem::frame();
    let pte = paging::entry_at(VA, 1);
    let upper = [paging::entry_at(VA, 2), paging::entry_at(VA, 3), paging::entry_at(VA, 4)];
    for at in upper {
        mem::write(at, mem::read::<u64>(at) & !A);
    }
    paging::flush();
    paging::set_pte(VA, page | P | W);
    ran("A/D: read", &read(VA));
    equal("a read sets A alone", paging::pte(VA) & (A | D), A);
    for (name, at) in ["A in the directory", "A in the pointer table", "A in the PML4"].iter().zip(upper) {
        equal(name, mem::read::<u64>(at) & A, A);
    }
    ran("A/D: write", &write(VA));
    equal("a write after a read sets D", mem::read::<u64>(pte) & (A | D), A | D);
    paging::set_pte(VA, page | P | W);
    ran("A/D: first write", &write(VA));
    equal("a first write sets both", mem::read::<u64>(pte) & (A | D), A | D);
    paging::set_pte(VA, page | P | W | A);
    let exchanged = probe!(["lock cmpxchg [{p}], ecx"], p = in(reg) VA, inout("eax") -1 => _, in("ecx") 5);
    ran("A/D: failing CMPXCHG", &exchanged);
    equal("a CMPXCHG that does not store sets D", mem::read::<u64>(pte) & D, D);
    paging::set_pte(VA, page | P);
    faulted("A/D: refused write", &write(VA), trap::PF, ERR_P | ERR_W, 0);
    equal("a refused write does not set D", mem::read::<u64>(pte) & D, 0);
    paging::set_entry(VA + (2 << 20), 2, BIG | P | W | PS);
    ran("A/D: write to a 2 MiB page", &write(VA + (2 << 20)));
    equal(
        "a write sets D of a 2 MiB page",
        mem::read::<u64>(paging::entry_at(VA + (2 << 20), 2)) & (A | D),
        A | D,
    );
    paging::set_pte(VA, page | P | W);
    ran("A/D: prefetch", &probe!(["prefetcht0 [{p}]"], p = in(reg) VA + PAGE));
}

fn write_protect() {
    let page = mem::frame();
    paging::set_pte(VA, page | P);
    page_faulted("WP: ring 0 cannot write a read-only page", &write(VA), ERR_P | ERR_W, VA, 0);
    set_cr0(cr0() & !CR0_WP);
    let fault = write(VA);
    set_cr0(cr0() | CR0_WP);
    ran("WP: clear, ring 0 can", &fault);
    equal("WP: that write sets D", paging::pte(VA) & D, D);
    page_faulted("WP: set again, it cannot", &write(VA), ERR_P | ERR_W, VA, 0);
    // Writability is the AND over all levels.
    paging::set_pte(VA, page | P | W);
    let directory = paging::entry_at(VA, 2);
    let entry: u64 = mem::read(directory);
    mem::write(directory, entry & !W);
    paging::flush();
    page_faulted("a read-only directory entry protects its pages", &write(VA), ERR_P | ERR_W, VA, 0);
    mem::write(directory, entry);
    paging::flush();
    ran("it is writable again", &write(VA));
}

fn no_execute() {
    let page = mem::frame();
    mem::write(page, 0xc3u8);
    paging::set_pte(VA, page | P | W);
    ran("code runs from a mapped page", &call(VA));
    if !NX.or_skip("NX") {
        return;
    }
    let fetch_fault = |name: &str, error: u32| {
        let fault = call(VA);
        let holds = fault
            .is_some_and(|f| f.vector == trap::PF && f.error == error && f.cr2 == VA && f.frame.rip == VA);
        check!(name, holds, "{}", fault.map_or(0, |f| f.error));
    };
    paging::set_pte(VA, page | P | W | NO_EXECUTE);
    fetch_fault("NX: fetch", ERR_P | ERR_I);
    ran("NX: data access passes", &write(VA));
    paging::set_pte(VA, page | P | W);
    let directory = paging::entry_at(VA, 2);
    let entry: u64 = mem::read(directory);
    mem::write(directory, entry | NO_EXECUTE);
    paging::flush();
    fetch_fault("NX: in the directory", ERR_P | ERR_I);
    mem::write(directory, entry);
    paging::set_pte(VA, page | P | W | NO_EXECUTE);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) & !EFER_NXE);
    paging::flush();
    let fault = read(VA);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_NXE);
    paging::flush();
    page_faulted("NX: without EFER.NXE the bit is reserved", &fault, ERR_P | ERR_RSVD, VA, 0);
    paging::set_pte(VA, 0);
    fetch_fault("fetch from an absent page", ERR_I);
}

fn smep() {
    if !SMEP.or_skip("SMEP") {
        return;
    }
    let page = mem::frame();
    mem::write(page, 0xc3u8);
    paging::set_pte(VA, page | P | W | U);
    ran("without SMEP ring 0 runs user pages", &call(VA));
    set_cr4(cr4() | CR4_SMEP);
    let fault = call(VA);
    let data = read(VA);
    paging::set_pte(VA, page | P | W);
    let supervisor = call(VA);
    set_cr4(cr4() & !CR4_SMEP);
    let holds = fault.is_some_and(|f| f.vector == trap::PF && f.error == ERR_P | ERR_I && f.cr2 == VA);
    check!("SMEP: ring 0 cannot run user pages", holds, "{}", fault.is_some());
    ran("SMEP: data access passes", &data);
    ran("SMEP: supervisor pages run", &supervisor);
}

fn smap() {
    if !SMAP.or_skip("SMAP") {
        return;
    }
    let page = mem::frame();
    paging::set_pte(VA, page | P | W | U);
    set_cr4(cr4() | CR4_SMAP);
    let loaded = read(VA);
    let stored = write(VA);
    let opened = probe!(["stac", "mov al, [{p}]", "mov [{p}], al", "clac"], p = in(reg) VA, out("al") _);
    let closed = read(VA);
    let by_popf = probe!(
        ["pushfq", "or dword ptr [rsp], 0x40000", "popfq", "mov al, [{p}]", "clac"],
        p = in(reg) VA, out("al") _
    );
    set_cr4(cr4() & !CR4_SMAP);
    page_faulted("SMAP: ring 0 reads a user page", &loaded, ERR_P, VA, 0);
    page_faulted("SMAP: ring 0 writes a user page", &stored, ERR_P | ERR_W, VA, 0);
    ran("SMAP: STAC opens, CLAC closes", &opened);
    page_faulted("SMAP: closed after CLAC", &closed, ERR_P, VA, 0);
    ran("SMAP: RFLAGS.AC by POPF opens too", &by_popf);
    ran("without SMAP ring 0 reads user pages", &read(VA));
}

fn reserved_bits() {
    let reserved = ERR_P | ERR_RSVD;
    let page = mem::frame();
    let high = 1 << 51;
    if physical_bits() == 52 {
        return skip("reserved address bits", "reserved address bit");
    }
    let with = |name: &str, level: u32, entry: u64, va: u64| {
        let at = paging::entry_at(va, level);
        let old: u64 = mem::read(at);
        mem::write(at, entry);
        paging::flush();
        let fault = read(va);
        mem::write(at, old);
        paging::flush();
        page_faulted(name, &fault, reserved, va, 0);
    };
    paging::set_pte(VA, page | P | W);
    let entry = |level| mem::read::<u64>(paging::entry_at(VA, level));
    with("reserved: address bit in a table entry", 1, page | P | W | high, VA);
    with("reserved: address bit in a directory entry", 2, entry(2) | high, VA);
    with("reserved: address bit in a pointer entry", 3, entry(3) | high, VA);
    with("reserved: address bit in a PML4 entry", 4, entry(4) | high, VA);
    with("reserved: PS in a PML4 entry", 4, entry(4) | PS, VA);
    let big = VA + (2 << 20);
    with("reserved: low address bit of a 2 MiB page", 2, BIG | 1 << 13 | P | W | PS, big);
    let huge = VA + (1 << 30);
    if PAGE_1G.or_skip("reserved: low address bit of a 1 GiB page") {
        with("reserved: low address bit of a 1 GiB page", 3, 1 << 21 | P | W | PS, huge);
    } else {
        with("reserved: PS in a pointer entry", 3, P | W | PS, huge);
    }
    // Reserved bits of an absent entry mean nothing.
    paging::set_pte(VA, page | W | high);
    page_faulted("an absent entry has no reserved bits", &read(VA), 0, VA, 0);
}

/// Two frames with different contents.
fn two_pages() -> [u64; 2] {
    let pages = [mem::frame(), mem::frame()];
    mem::write(pages[0], 0xaau8);
    mem::write(pages[1], 0xbbu8);
    pages
}

fn invalidation() {
    let [first, second] = two_pages();
    let pte = paging::entry_at(VA, 1);
    paging::set_pte(VA, first | P | W);
    equal("TLB: first mapping", mem::read::<u8>(VA), 0xaa);
    mem::write(pte, second | P | W);
    invlpg(VA);
    equal("TLB: new mapping after INVLPG", mem::read::<u8>(VA), 0xbb);
    mem::write(pte, first | P | W);
    paging::flush();
    equal("TLB: new mapping after MOV CR3", mem::read::<u8>(VA), 0xaa);
    mem::write(pte, 0u64);
    invlpg(VA + 0xfff);
    page_faulted("TLB: INVLPG of any byte drops the page", &read(VA), 0, VA, 0);
    // Absent entries are never cached: no invalidation is needed to add one.
    mem::write(pte, first | P | W);
    ran("TLB: a page that becomes present needs no INVLPG", &read(VA));
    // After a page fault the entry is gone from the TLB: relaxing rights needs no INVLPG (SDM, 4.10.4.3).
    mem::write(pte, first | P);
    invlpg(VA);
    faulted("TLB: read-only", &write(VA), trap::PF, ERR_P | ERR_W, 0);
    mem::write(pte, first | P | W);
    ran("TLB: after the fault a widened right counts", &write(VA));
    large_page_invalidation();
}

fn large_page_invalidation() {
    let va = VA + (2 << 20);
    let table = mem::frame();
    let page = mem::frame();
    mem::write(page, 0x44u8);
    mem::write(BIG, 0x33u8);
    mem::write(table, page | P | W);
    paging::set_entry(va, 2, BIG | P | W | PS);
    equal("TLB: 2 MiB page", mem::read::<u8>(va), 0x33);
    equal("TLB: 2 MiB page, last byte", mem::read::<u8>(va + 0x1f_ffff), mem::read::<u8>(BIG + 0x1f_ffff));
    mem::write(paging::entry_at(va, 2), table | P | W);
    invlpg(va + 0x10_0000);
    equal("TLB: replaced by a table", mem::read::<u8>(va), 0x44);
    page_faulted("TLB: the rest of the large page is gone", &read(va + 0x10_0000), 0, va + 0x10_0000, 0);
}

fn global_pages() {
    if !PGE.or_skip("global pages") {
        return;
    }
    let [first, second] = two_pages();
    let pte = paging::entry_at(VA, 1);
    set_cr4(cr4() | CR4_PGE);
    paging::set_pte(VA, first | P | W | G);
    equal("G: first mapping", mem::read::<u8>(VA), 0xaa);
    mem::write(pte, second | P | W | G);
    paging::flush();
    let value: u8 = mem::read(VA);
    check!("G: after MOV CR3 the old or the new mapping", value == 0xaa || value == 0xbb, "{value:#x}");
    invlpg(VA);
    equal("G: INVLPG drops a global page", mem::read::<u8>(VA), 0xbb);
    mem::write(pte, first | P | W | G);
    set_cr4(cr4() & !CR4_PGE);
    equal("G: a change of CR4.PGE drops global pages", mem::read::<u8>(VA), 0xaa);
    paging::set_pte(VA, 0);
}

/// Two address spaces that differ in `VA` only.
fn two_roots() -> [u64; 2] {
    two_pages().map(|page| {
        let root = mem::frame();
        let old = cr3() & paging::ADDRESS;
        mem::copy(root, mem::bytes(old, PAGE as usize));
        mem::write(root + (VA >> 39) * 8, 0u64);
        let before = cr3();
        set_cr3(root);
        paging::set_pte(VA, page | P | W);
        set_cr3(before);
        root
    })
}

const NO_FLUSH: u64 = 1 << 63;

fn pcid() {
    if !PCID.or_skip("PCID") {
        return;
    }
    let home = cr3();
    faulted(
        "PCID: CR3 bit 63 without CR4.PCIDE",
        &probe!(["mov cr3, {x}"], x = in(reg) home | NO_FLUSH),
        trap::GP,
        0,
        0,
    );
    set_cr3(home | 0x18);
    let bits = probe!(["mov cr4, {x}"], x = in(reg) cr4() | CR4_PCIDE);
    set_cr4(cr4() & !CR4_PCIDE);
    faulted("PCID: CR4.PCIDE with low bits in CR3", &bits, trap::GP, 0, 0);
    set_cr3(home);
    let [first, second] = two_roots();
    set_cr4(cr4() | CR4_PCIDE);
    set_cr3(first | 1);
    let one: u8 = mem::read(VA);
    set_cr3(second | 2);
    let two: u8 = mem::read(VA);
    set_cr3(first | 1 | NO_FLUSH);
    let one_again: u8 = mem::read(VA);
    let read_back = cr3();
    set_cr3(second | 2 | NO_FLUSH);
    let two_again: u8 = mem::read(VA);
    // A new root under an old PCID, with a flush.
    set_cr3(second | 1);
    let flushed: u8 = mem::read(VA);
    set_cr3(home);
    set_cr4(cr4() & !CR4_PCIDE);
    equal("PCID: first space", one, 0xaa);
    equal("PCID: second space", two, 0xbb);
    equal("PCID: back to the first without a flush", one_again, 0xaa);
    equal("PCID: CR3 reads back without bit 63", read_back, first | 1);
    equal("PCID: back to the second without a flush", two_again, 0xbb);
    equal("PCID: MOV CR3 without bit 63 flushes its PCID", flushed, 0xbb);
}

fn invpcid_with(kind: u64, pcid: u64, address: u64) -> Option<Fault> {
    mem::write(mem::FREE, [pcid, address]);
    probe!(["invpcid {k}, [{p}]"], k = in(reg) kind, p = in(reg) mem::FREE)
}

fn invpcid() {
    if !INVPCID.or_skip("INVPCID") {
        return;
    }
    let [first, second] = two_pages();
    let pte = paging::entry_at(VA, 1);
    let names = [
        "INVPCID: one address",
        "INVPCID: one PCID",
        "INVPCID: everything with global pages",
        "INVPCID: everything but global pages",
    ];
    for (kind, name) in names.iter().enumerate() {
        paging::set_pte(VA, first | P | W);
        let before: u8 = mem::read(VA);
        mem::write(pte, second | P | W);
        ran(name, &invpcid_with(kind as u64, 0, VA));
        check!(name, before == 0xaa && mem::read::<u8>(VA) == 0xbb, "the old mapping stayed");
    }
    faulted("INVPCID: type above 3", &invpcid_with(4, 0, 0), trap::GP, 0, 0);
    faulted("INVPCID: reserved bits of the descriptor", &invpcid_with(1, 1 << 12, 0), trap::GP, 0, 0);
    faulted("INVPCID: address not canonical", &invpcid_with(0, 0, 1 << 63), trap::GP, 0, 0);
    faulted("INVPCID: a PCID without CR4.PCIDE", &invpcid_with(1, 1, 0), trap::GP, 0, 0);
    paging::set_pte(VA, 0);
}

fn write_pkru(value: u32) -> Option<Fault> {
    probe!(["wrpkru"], in("eax") value, in("ecx") 0, in("edx") 0)
}

fn protection_keys() {
    faulted("UD: WRPKRU without CR4.PKE", &write_pkru(0), trap::UD, 0, 0);
    if !PKU.or_skip("protection keys") {
        return;
    }
    let page = mem::frame();
    mem::write(page, 0xc3u8);
    set_cr4(cr4() | CR4_PKE);
    paging::set_pte(VA, page | P | W | U | 1 << 59);
    let (no_access, no_write) = (1 << 2, 1 << 3);
    ran("PKU: WRPKRU", &write_pkru(no_access));
    let value: u32;
    // SAFETY: CR4.PKE is set.
    unsafe { core::arch::asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _) };
    equal("PKU: RDPKRU reads it back", value, no_access);
    page_faulted("PKU: access disabled, read", &read(VA), ERR_P | ERR_PK, VA, 0);
    page_faulted("PKU: access disabled, write", &write(VA), ERR_P | ERR_W | ERR_PK, VA, 0);
    ran("PKU: fetches are not checked", &call(VA));
    write_pkru(no_write);
    ran("PKU: write disabled, read passes", &read(VA));
    page_faulted("PKU: write disabled, write", &write(VA), ERR_P | ERR_W | ERR_PK, VA, 0);
    set_cr0(cr0() & !CR0_WP);
    let fault = write(VA);
    set_cr0(cr0() | CR0_WP);
    ran("PKU: ring 0 without CR0.WP ignores write disable", &fault);
    paging::set_pte(VA, page | P | W | 1 << 59);
    write_pkru(no_access | no_write);
    ran("PKU: supervisor pages have no key", &write(VA));
    faulted(
        "PKU: WRPKRU with ECX",
        &probe!(["wrpkru"], in("eax") 0, in("ecx") 1, in("edx") 0),
        trap::GP,
        0,
        0,
    );
    write_pkru(0);
    set_cr4(cr4() & !CR4_PKE);
}

fn five_levels() {
    if !LA57.or_skip("5-level paging") {
        return;
    }
    let four = cr3();
    let (root, pml4, pointers, directory, table, page) =
        (mem::frame(), mem::frame(), mem::frame(), mem::frame(), mem::frame(), mem::frame());
    mem::write(page + 0x20, 0x57u8);
    mem::write(table, page | P | W);
    mem::write(directory, table | P | W);
    mem::write(pointers, directory | P | W);
    mem::write(pml4, pointers | P | W);
    mem::write(root, four | P | W);
    mem::write(root + 8, pml4 | P | W);
    let high = 1u64 << 48;
    faulted("LA57: off, bit 48 is not canonical", &read(high), trap::GP, 0, 0);
    let cr4_before = cr4();
    legacy::change_paging(root, cr4_before | CR4_LA57);
    let value = probe!(["mov cl, [{p}]"], p = in(reg) high + 0x20, out("ecx") _);
    let found: u8 = if value.is_none() { mem::read(high + 0x20) } else { 0 };
    let accessed: u64 = mem::read(root + 8);
    let absent = read(high * 2);
    let not_canonical = read(1 << 57);
    legacy::change_paging(four, cr4_before);
    equal("LA57: a page beyond 47 bits", found, 0x57);
    equal("LA57: A in the PML5 entry", accessed & A, A);
    page_faulted("LA57: absent PML5 entry", &absent, 0, high * 2, 0);
    faulted("LA57: bit 57 is not canonical", &not_canonical, trap::GP, 0, 0);
    faulted("LA57: off again", &read(high), trap::GP, 0, 0);
}
