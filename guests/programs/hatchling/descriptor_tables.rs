//! Descriptor-table exiting: SGDT to LTR with instruction identity, operand and displacement.

use crate::simple_exits::BASE_FORM;
use crate::want::{Want, exits, runs};
use rt::l2;
use rt::vmx::control::DESCRIPTOR_TABLE_EXITING;
use rt::vmx::{Vm, reason};

const IDENTITY: u32 = 3 << 28;

pub fn all() {
    // 64-bit address, DS, base RBX, no index.
    let operand = 3 << 23 | 1 << 22 | 3 << 15 | 2 << 7;
    let memory = BASE_FORM | IDENTITY;
    for (name, code, why, identity, length) in [
        ("SGDT exits", l2!(["sgdt [rbx]"]), reason::GDTR_IDTR_ACCESS, 0, 3),
        ("SIDT exits", l2!(["sidt [rbx]"]), reason::GDTR_IDTR_ACCESS, 1, 3),
        ("LGDT exits", l2!(["lgdt [rbx]"]), reason::GDTR_IDTR_ACCESS, 2, 3),
        ("LIDT exits", l2!(["lidt [rbx]"]), reason::GDTR_IDTR_ACCESS, 3, 3),
        ("SLDT exits", l2!(["sldt word ptr [rbx]"]), reason::LDTR_TR_ACCESS, 0, 3),
        ("STR exits", l2!(["str word ptr [rbx]"]), reason::LDTR_TR_ACCESS, 1, 3),
        ("LLDT exits", l2!(["lldt word ptr [rbx]"]), reason::LDTR_TR_ACCESS, 2, 3),
        ("LTR exits", l2!(["ltr word ptr [rbx]"]), reason::LDTR_TR_ACCESS, 3, 3),
    ] {
        let want = Want::instruction(why, length).information(identity << 28 | operand, memory);
        exits(name, &[DESCRIPTOR_TABLE_EXITING], code, want);
    }
    let register = |identity: u32, register: u32| {
        (identity << 28 | 1 << 10 | register << 3, IDENTITY | 1 << 10 | 15 << 3)
    };
    for (name, code, identity, number, length) in [
        ("SLDT of a register exits", l2!(["sldt eax"]), 0, 0, 3),
        ("STR of a register exits", l2!(["str r11d"]), 1, 11, 4),
        ("LLDT of a register exits", l2!(["lldt dx"]), 2, 2, 3),
        ("LTR of a register exits", l2!(["ltr di"]), 3, 7, 3),
    ] {
        let (value, defined) = register(identity, number);
        let want = Want::instruction(reason::LDTR_TR_ACCESS, length).information(value, defined);
        exits(name, &[DESCRIPTOR_TABLE_EXITING], code, want);
    }
    let want = Want::instruction(reason::GDTR_IDTR_ACCESS, 4).qualification(0x40);
    exits("SGDT exits with its displacement", &[DESCRIPTOR_TABLE_EXITING], l2!(["sgdt [rbx + 0x40]"]), want);
    let code = l2!([
        "sub rsp, 16",
        "sgdt [rsp]",
        "lgdt [rsp]",
        "sidt [rsp]",
        "lidt [rsp]",
        "sldt eax",
        "lldt ax",
        "str eax"
    ]);
    runs("descriptor-table instructions run in L2", &[], &[], code);
    let mut vm = Vm::fresh(l2!(["lldt ax"]));
    vm.regs.rax = 0xffff;
    let want = Want::instruction(reason::LDTR_TR_ACCESS, 3).any_qualification();
    if vm.set(&[DESCRIPTOR_TABLE_EXITING]) {
        want.run("LLDT of a bad selector exits before it faults", &mut vm);
    }
}
