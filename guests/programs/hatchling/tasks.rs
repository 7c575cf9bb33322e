//! Task switches of 32-bit L2: JMP, CALL, IRET and task gates, which all exit.

use crate::modes::protected_mode;
use crate::want::Want;
use rt::mem;
use rt::report::equal;
use rt::tables::{self, SPARE, build_descriptor};
use rt::vmx::exit::event::{
    EXTERNAL_INTERRUPT, HARDWARE_EXCEPTION, SOFTWARE_EXCEPTION, SOFTWARE_INTERRUPT, VALID,
};
use rt::vmx::{Vm, field as f, reason, vmread, vmwrite};
use rt::{l2, trap};

/// An available 32-bit TSS, and a task gate for it.
const TASK: u16 = SPARE;
const GATE: u16 = SPARE + 8;
const TSS32: u64 = mem::FREE + 0x7a_0000;
const IDT32: u64 = TSS32 + 0x1000;

const CALL: u64 = 0 << 30;
const IRET: u64 = 1 << 30;
const JMP: u64 = 2 << 30;
const IDT_GATE: u64 = 3 << 30;

pub fn all() {
    tables::set_descriptor(TASK, build_descriptor(TSS32 as u32, 0x67, 0x89, 0));
    tables::set_descriptor(GATE, u64::from(TASK) << 16 | 0x85 << 40);
    mem::fill(TSS32, 0, 0x2000);
    instructions();
    nested_return();
    gates();
    faults_first();
}

fn machine(code: u64) -> Vm {
    let vm = Vm::fresh(code);
    protected_mode();
    vmwrite(f::GUEST_IDTR_BASE, IDT32);
    vmwrite(f::GUEST_IDTR_LIMIT, 0x7ff);
    vmwrite(f::EXCEPTION_BITMAP, 0);
    vm
}

fn switch(source: u64) -> Want {
    Want::exit(reason::TASK_SWITCH).qualification(source | u64::from(TASK))
}

fn instructions() {
    let jump = l2!([".code32", ".byte 0xea", ".long 0", ".word 0x48", ".code64"]);
    switch(JMP).length(7).run("JMP to a TSS exits", &mut machine(jump));
    let call = l2!([".code32", ".byte 0x9a", ".long 0", ".word 0x48", ".code64"]);
    switch(CALL).length(7).run("CALL of a TSS exits", &mut machine(call));
    let gate = l2!([".code32", ".byte 0xea", ".long 0", ".word 0x50", ".code64"]);
    switch(JMP).length(7).run("JMP to a task gate exits with the TSS's selector", &mut machine(gate));
    let indirect = l2!([".code32", ".byte 0xff, 0x1b", ".code64"]);
    let mut vm = machine(indirect);
    mem::write(mem::FREE, [0u16, 0, TASK]);
    vm.regs.rbx = mem::FREE;
    let exit = switch(CALL).length(2).run("CALL through memory exits", &mut vm);
    equal("a task switch that exits leaves TR", vmread(f::GUEST_TR), tables::TSS.into());
    equal("a task switch that exits leaves the TSS available", tables::descriptor(TASK) >> 40 & 15, 9);
    equal("a task switch that exits pushes nothing", exit.rsp, rt::vmx::vm::stack_top());
}

/// IRET with NT goes by the back link of the current TSS, to a busy one.
fn nested_return() {
    let mut vm = machine(l2!([".code32", "iretd", ".code64"]));
    vmwrite(f::GUEST_RFLAGS, 2 | 1 << 14);
    let current = vmread(f::GUEST_TR_BASE);
    mem::write(current, TASK);
    tables::set_descriptor(TASK, tables::descriptor(TASK) | 2 << 40);
    switch(IRET).length(1).run("IRET with NT exits", &mut vm);
    tables::set_descriptor(TASK, tables::descriptor(TASK) & !(2 << 40));
    mem::write(current, 0u16);
}

fn gates() {
    for vector in 0..256 {
        mem::write(IDT32 + vector * 8, u64::from(TASK) << 16 | 0xe5 << 40);
    }
    let name = "INT n through a task gate exits";
    let vectoring = SOFTWARE_INTERRUPT | 0x30;
    let code = l2!([".code32", "int 0x30", ".code64"]);
    switch(IDT_GATE).length(2).vectoring(vectoring).run(name, &mut machine(code));
    let code = l2!([".code32", "int3", ".code64"]);
    let vectoring = SOFTWARE_EXCEPTION | 3;
    switch(IDT_GATE).length(1).vectoring(vectoring).run("INT3 through a task gate exits", &mut machine(code));
    let code = l2!([".code32", "ud2", ".code64"]);
    let vectoring = HARDWARE_EXCEPTION | u32::from(trap::UD);
    switch(IDT_GATE).vectoring(vectoring).run("#UD through a task gate exits", &mut machine(code));
    let code = l2!([".code32", "mov ds, ax", ".code64"]);
    let mut vm = machine(code);
    tables::set_descriptor(0x168, 0);
    vm.regs.rax = 0x168;
    let vectoring = HARDWARE_EXCEPTION | u32::from(trap::GP);
    let want = switch(IDT_GATE).vectoring_with_error(vectoring, 0x168);
    want.run("#GP through a task gate exits with its error code", &mut vm);
    let mut vm = machine(l2!([".code32", "nop", ".code64"]));
    vmwrite(f::GUEST_RFLAGS, 2 | 1 << 9);
    vmwrite(f::ENTRY_INTERRUPTION, (VALID | EXTERNAL_INTERRUPT | 0x30).into());
    let want = switch(IDT_GATE).vectoring(EXTERNAL_INTERRUPT | 0x30);
    want.run("an injected interrupt through a task gate exits", &mut vm);
}

/// What is wrong with the descriptor is found before the exit.
fn faults_first() {
    let jump = l2!([".code32", ".byte 0xea", ".long 0", ".word 0x48", ".code64"]);
    let gp = |vector: u8| {
        Want::exit(reason::EXCEPTION_OR_NMI)
            .event_with_error(HARDWARE_EXCEPTION | u32::from(vector), TASK.into())
    };
    let good = tables::descriptor(TASK);
    for (name, descriptor, vector) in [
        ("JMP to a busy TSS faults", good | 2 << 40, trap::GP),
        ("JMP to a TSS that is not present faults", good & !tables::PRESENT, trap::NP),
    ] {
        let mut vm = machine(jump);
        vmwrite(f::EXCEPTION_BITMAP, 0xffff_ffff);
        tables::set_descriptor(TASK, descriptor);
        gp(vector).run(name, &mut vm);
    }
    tables::set_descriptor(TASK, good);
}
