//! VPID and INVVPID, page-modification log, VM functions with EPTP switching, #VE, mode-based execute control.

use crate::ept_faults::{FETCH, FINAL, LINEAR, PAGE_AT, WRITE, with_ept};
use crate::simple_exits::to_ring3;
use crate::want::{Want, to_end};
use rt::cpu;
use rt::mem::{self, PAGE};
use rt::report::{equal, fail, skip};
use rt::vmx::capability::{self as cap};
use rt::vmx::control::*;
use rt::vmx::ept::{self, ADDRESS, Ept, RWX, SUPPRESS_VE, W, WB, X, XU};
use rt::vmx::vm::expect;
use rt::vmx::{Vm, field as f, handler, insn, reason, vmread, vmwrite};
use rt::{check, l2, paging, user};

pub fn all() {
    vpid();
    vpids_apart();
    page_modification_log();
    log_full();
    eptp_switching();
    virtualization_exception();
    mode_based_execute();
}

/// Two frames with known words, and a linear address that L1 maps to one of them.
struct Window {
    va: u64,
    frames: [u64; 2],
}

fn window() -> Window {
    let (va, frames) = (user::SCRATCH + 64 * PAGE, [PAGE_AT + 16 * PAGE, PAGE_AT + 17 * PAGE]);
    mem::write(frames[0], 0xaaaau32);
    mem::write(frames[1], 0xbbbbu32);
    Window { va, frames }
}

/// INVVPID of every type makes a changed translation of L2 visible.
fn vpid() {
    let name = "VPID";
    if !ENABLE_VPID.available() {
        return skip(name, ENABLE_VPID.name);
    }
    let window = window();
    let map = |which: usize| {
        mem::write(paging::entry_at(window.va, 1), window.frames[which] | paging::P | paging::W)
    };
    let value = cap::ept_vpid();
    for (what, kind, bit) in [
        ("INVVPID of an address", 0, cap::INVVPID_ADDRESS),
        ("INVVPID of a VPID", 1, cap::INVVPID_SINGLE),
        ("INVVPID of all", 2, cap::INVVPID_ALL),
        ("INVVPID that keeps globals", 3, cap::INVVPID_KEEP_GLOBALS),
    ] {
        if value & bit == 0 {
            continue;
        }
        let mut vm = Vm::fresh(l2!(["mov eax, [rbx]"]));
        vm.set(&[ENABLE_VPID]);
        vmwrite(f::VPID, 0x12);
        map(0);
        expect(insn::invvpid(kind, [0x12, window.va]), "INVVPID");
        vm.regs.rbx = window.va;
        to_end(what, &mut vm);
        equal("L2 reads through its translation", vm.regs.rax, 0xaaaa);
        map(1);
        expect(insn::invvpid(kind, [0x12, window.va]), "INVVPID");
        vm.start_at(vm.start);
        to_end(what, &mut vm);
        equal("L2 sees the changed translation after INVVPID", vm.regs.rax, 0xbbbb);
    }
    let mut vm = Vm::fresh(l2!(["mov eax, [rbx]"]));
    map(0);
    vm.regs.rbx = window.va;
    to_end("without VPID", &mut vm);
    map(1);
    vm.start_at(vm.start);
    to_end("without VPID", &mut vm);
    equal("without VPID each entry forgets translations", vm.regs.rax, 0xbbbb);
    paging::set_pte(window.va, 0);
}

/// Two L2s with their own VPID and page tables, and L1 with a third translation of one address.
fn vpids_apart() {
    let name = "VPIDs keep translations apart";
    if !ENABLE_VPID.available() {
        return skip(name, ENABLE_VPID.name);
    }
    let window = window();
    let code = l2!(["mov eax, [rbx]", "vmcall", "mov eax, [rbx]"]);
    let regions = [rt::vmx::region(), rt::vmx::region()];
    let own = mem::frame();
    mem::write(own, 0xccccu32);
    paging::set_pte(window.va, own | paging::P | paging::W);
    let mut machines = [0, 1].map(|which| {
        let mut vm = Vm::new(regions[which], code);
        vm.set(&[ENABLE_VPID]);
        vmwrite(f::VPID, 0x20 + which as u64);
        vmwrite(f::GUEST_CR3, tables_with(window.va, window.frames[which]));
        vm.regs.rbx = window.va;
        vm
    });
    for round in 0..2 {
        for (which, vm) in machines.iter_mut().enumerate() {
            expect(insn::vmptrld(regions[which]), "VMPTRLD");
            if round == 1 {
                vm.skip();
            }
            to_end(name, vm);
            equal("an L2 reads by its own page tables", vm.regs.rax, [0xaaaa, 0xbbbb][which]);
            equal("L1 reads by its own page tables", mem::read::<u32>(window.va), 0xcccc);
        }
    }
    for region in regions {
        expect(insn::vmclear(region), "VMCLEAR");
    }
    paging::set_pte(window.va, 0);
}

/// A copy of L1's page tables in which `va` leads to another frame.
fn tables_with(va: u64, frame: u64) -> u64 {
    let mut table = cpu::cr3() & paging::ADDRESS;
    let mut root = 0;
    let mut link = 0;
    for level in (1..=4).rev() {
        let copy = mem::frame();
        mem::copy(copy, mem::bytes(table, PAGE as usize));
        if level == 4 {
            root = copy;
        } else {
            mem::write(link, copy | paging::P | paging::W | paging::U);
        }
        link = copy + (va >> (12 + 9 * (level - 1)) & 511) * 8;
        table = mem::read::<u64>(link) & paging::ADDRESS;
    }
    mem::write(link, frame | paging::P | paging::W);
    root
}

/// A machine with a page-modification log at this index, whose page tables are dirty already.
fn with_log(name: &str, index: u64) -> Option<(Vm, Ept, u64)> {
    let (mut vm, ept) =
        with_ept(name, l2!(["mov al, [rbx]", "vmcall", "mov [rbx], al", "mov [rbx + 8], al"]))?;
    if !vm.set_or_skip(name, &[ENABLE_PML]) {
        return None;
    }
    let log = PAGE_AT + 32 * PAGE;
    mem::fill(log, 0, PAGE);
    vmwrite(f::EPT_POINTER, ept.pointer() | ept::POINTER_AD);
    vmwrite(f::PML_ADDRESS, log);
    vmwrite(f::PML_INDEX, 511);
    ept.permit(PAGE_AT, RWX);
    expect(insn::invept(2, [0, 0]), "INVEPT");
    vm.regs.rbx = PAGE_AT + 0x123;
    to_end(name, &mut vm);
    vm.skip();
    mem::fill(log, 0, PAGE);
    vmwrite(f::PML_INDEX, index);
    Some((vm, ept, log))
}

fn page_modification_log() {
    let name = "PML: L2 writes a clean page";
    let Some((mut vm, ept, log)) = with_log(name, 7) else { return };
    to_end(name, &mut vm);
    equal("PML: the page is in the log", mem::read(log + 7 * 8), PAGE_AT);
    equal("PML: the index goes down by one", vmread(f::PML_INDEX), 6);
    equal("PML: a page is logged once", mem::read::<u64>(log + 6 * 8), 0);
    check!("PML: the dirty flag is set", ept.get(PAGE_AT) & ept::D != 0, "{:#x}", ept.get(PAGE_AT));
    vm.start_at(vm.start);
    to_end(name, &mut vm);
    vm.skip();
    to_end(name, &mut vm);
    equal("PML: a dirty page is not logged", vmread(f::PML_INDEX), 6);
    let Some((mut vm, _, log)) = with_log(name, 0) else { return };
    to_end("PML: the last entry", &mut vm);
    equal("PML: entry 0 is used", mem::read(log), PAGE_AT);
    equal("PML: the index wraps to 0xffff", vmread(f::PML_INDEX), 0xffff);
}

fn log_full() {
    let name = "PML: a full log exits";
    let Some((mut vm, ept, log)) = with_log(name, 0xffff) else { return };
    let exit = vm.run();
    Want::exit(reason::PML_FULL).anywhere().check(name, &exit);
    equal("PML: the exit comes before the write", ept.get(PAGE_AT) & ept::D, 0);
    vmwrite(f::PML_INDEX, 511);
    to_end("PML: L2 goes on after L1 has emptied the log", &mut vm);
    equal("PML: the page is logged then", mem::read(log + 511 * 8), PAGE_AT);
    let Some((mut vm, ..)) = with_log(name, 512) else { return };
    Want::exit(reason::PML_FULL).anywhere().run("PML: an index above 511 is full", &mut vm);
}

fn eptp_switching() {
    let name = "VMFUNC switches the EPT pointer";
    let code = l2!(["mov r8d, [rbx]", ".byte 0x0f, 0x01, 0xd4", "mov r9d, [rbx]"]);
    let Some((mut vm, first)) = with_ept(name, code) else { return };
    if cap::vm_functions() & 1 == 0 || !vm.set(&[ENABLE_VMFUNC]) {
        return skip(name, "EPTP switching");
    }
    let (second, list) = (Ept::identity(), PAGE_AT + 33 * PAGE);
    let window = window();
    second.set(window.frames[0], window.frames[1] | RWX | WB);
    mem::fill(list, 0, PAGE);
    mem::write(list, first.pointer());
    mem::write(list + 5 * 8, second.pointer());
    mem::write(list + 6 * 8, second.pointer() | 1 << 11);
    vmwrite(f::VM_FUNCTION_CONTROLS, 1);
    vmwrite(f::EPTP_LIST_ADDRESS, list);
    (vm.regs.rbx, vm.regs.rcx) = (window.frames[0], 5);
    to_end(name, &mut vm);
    equal("before VMFUNC L2 reads by the first table", vm.regs.r8, 0xaaaa);
    equal("behind VMFUNC L2 reads by the second table", vm.regs.r9, 0xbbbb);
    equal("VMFUNC changes the EPT-pointer field", vmread(f::EPT_POINTER), second.pointer());
    for (what, index) in
        [("an entry that is 0", 7), ("an entry with a reserved bit", 6), ("an index of 512", 512)]
    {
        vm.start_at(vm.start);
        vm.regs.rcx = index;
        let exit = vm.run();
        check!(
            "VMFUNC exits for a bad EPT pointer",
            exit.reason == reason::VMFUNC && exit.length == 3,
            "{what}: {exit}"
        );
    }
    vm.start_at(vm.start);
    (vm.regs.rcx, vm.regs.rax) = (0, 0);
    to_end("VMFUNC switches back", &mut vm);
    equal("behind it L2 reads by the first table", vm.regs.r9, 0xaaaa);
    let mut vm_ring3 = vm;
    to_ring3(&mut vm_ring3, &[0x0f, 0x01, 0xd4]);
    to_end("VMFUNC works in ring 3", &mut vm_ring3);
}

const VE: u8 = 20;

fn virtualization_exception() {
    let name = "#VE instead of an EPT violation";
    let area = PAGE_AT + 34 * PAGE;
    let start = |suppress: u64| {
        let (mut vm, ept) = with_ept(name, l2!(["nop", "mov [rbx], al"]))?;
        if !vm.set_or_skip(name, &[EPT_VIOLATION_VE]) {
            return None;
        }
        handler::install();
        mem::fill(area, 0, PAGE);
        vmwrite(f::VE_INFORMATION_ADDRESS, area);
        vmwrite(f::EPTP_INDEX, 3);
        ept.set(PAGE_AT, PAGE_AT | WB | ept::R | suppress);
        vm.regs.rbx = PAGE_AT + 0x70;
        Some(vm)
    };
    let Some(mut vm) = start(0) else { return };
    let exit = vm.run();
    match handler::delivered(&exit) {
        Some(frame) => {
            let right = frame.vector == u64::from(VE) && frame.rip == vm.start + 1;
            check!(name, right, "vector {} at {:#x}", frame.vector, frame.rip);
        }
        None => fail(name, format_args!("{exit}")),
    }
    let wanted = WRITE | ept::R << 3 | LINEAR | FINAL;
    equal("#VE: exit reason", mem::read::<u32>(area), reason::EPT_VIOLATION);
    equal("#VE: busy mark", mem::read::<u32>(area + 4), 0xffff_ffff);
    equal("#VE: exit qualification", mem::read::<u64>(area + 8) & 0x1bf, wanted);
    equal("#VE: guest-linear address", mem::read::<u64>(area + 16), PAGE_AT + 0x70);
    equal("#VE: guest-physical address", mem::read::<u64>(area + 24), PAGE_AT + 0x70);
    equal("#VE: EPTP index", mem::read::<u16>(area + 32), 3);
    let Some(mut vm) = start(0) else { return };
    mem::write(area + 4, 1u32);
    let want = Want::exit(reason::EPT_VIOLATION).any_qualification().at(1).physical(PAGE_AT + 0x70);
    want.run("#VE: a busy area makes it an EPT violation", &mut vm);
    let Some(mut vm) = start(SUPPRESS_VE) else { return };
    want.run("#VE: the suppress bit makes it an EPT violation", &mut vm);
    let Some(mut vm) = start(0) else { return };
    vmwrite(f::EXCEPTION_BITMAP, 1 << VE);
    let event = rt::vmx::exit::event::HARDWARE_EXCEPTION | u32::from(VE);
    let want = Want::exit(reason::EXCEPTION_OR_NMI).event(event).any_qualification().at(1);
    want.run("#VE: the exception bitmap makes it exit", &mut vm);
}

fn mode_based_execute() {
    let name = "mode-based execute control";
    let page = paging::pte(user::CODE) & ADDRESS;
    let start = |ring3: bool, permissions: u64| {
        let (mut vm, ept) = with_ept(name, user::CODE)?;
        if !vm.set_or_skip(name, &[MODE_BASED_EXECUTE]) {
            return None;
        }
        to_ring3(&mut vm, &[0x90]);
        if !ring3 {
            rt::vmx::vm::Segment::Cs.write(8, 0, 0xffff_ffff, rt::vmx::vm::CODE64_RIGHTS);
            rt::vmx::vm::Segment::Ss.write(16, 0, 0xffff_ffff, rt::vmx::vm::DATA_RIGHTS);
            // Ring 0 executes the page as a supervisor page.
            paging::set_pte(user::CODE, page | paging::P | paging::W);
        }
        ept.permit(page, permissions);
        Some(vm)
    };
    let run = |what: &str, ring3: bool, permissions: u64, allowed: bool| {
        let Some(mut vm) = start(ring3, permissions) else { return false };
        if allowed {
            to_end(what, &mut vm);
        } else {
            let exit = vm.run();
            let right = exit.reason == reason::EPT_VIOLATION && exit.qualification & 7 == FETCH;
            let bits = exit.qualification >> 3 & 15;
            let wanted = permissions & 7 | if permissions & XU != 0 { 8 } else { 0 };
            check!(what, right && bits == wanted, "{exit}, wanted permissions {wanted:#x}");
        }
        paging::set_pte(user::CODE, page | paging::P | paging::W | paging::U);
        true
    };
    let read = ept::R | W;
    if run("MBEC: supervisor fetch of a supervisor-executable page", false, read | X, true) {
        run("MBEC: supervisor fetch of a user-executable page", false, read | XU, false);
        run("MBEC: user fetch of a supervisor-executable page", true, read | X, false);
        run("MBEC: user fetch of a user-executable page", true, read | XU, true);
    }
}
