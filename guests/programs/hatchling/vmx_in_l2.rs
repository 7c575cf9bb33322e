//! VMX instructions in L2: every one exits, at any privilege, and its operand is decoded but not read.

use crate::simple_exits::{BASE_FORM, MEMORY_FORM, REG2, UD, to_ring3};
use crate::want::Want;
use rt::vmx::capability as cap;
use rt::vmx::{Regs, Vm, reason};
use rt::{check, l2};

/// 64-bit address, DS, base RBX, no index.
const RBX: u32 = 3 << 23 | 1 << 22 | 3 << 15 | 2 << 7;

pub fn all() {
    plain();
    pointers();
    fields();
    invalidations();
    addressing();
    any_privilege();
    compatibility_mode();
}

fn plain() {
    for (name, code, why) in [
        ("VMCALL", l2!(["vmcall"]), reason::VMCALL),
        ("VMLAUNCH exits", l2!(["vmlaunch"]), reason::VMLAUNCH),
        ("VMRESUME exits", l2!(["vmresume"]), reason::VMRESUME),
        ("VMXOFF exits", l2!(["vmxoff"]), reason::VMXOFF),
    ] {
        Want::instruction(why, 3).run(name, &mut Vm::fresh(code));
    }
}

/// Operands point nowhere: reading them would fault.
const NOWHERE: Regs = Regs {
    rax: 0,
    rcx: 1 << 62,
    rdx: 0,
    rbx: 1 << 63,
    unused: 0,
    rbp: 1 << 62,
    rsi: 0,
    rdi: 0,
    r8: 0,
    r9: 0,
    r10: 0,
    r11: 0,
    r12: 1 << 62,
    r13: 1 << 62,
    r14: 0,
    r15: 0,
};

fn run(name: &str, code: u64, want: Want) {
    let mut vm = Vm::fresh(code);
    vm.regs = NOWHERE;
    want.run(name, &mut vm);
}

fn pointers() {
    for (name, code, why, length) in [
        ("VMPTRLD exits", l2!(["vmptrld [rbx]"]), reason::VMPTRLD, 3),
        ("VMPTRST exits", l2!(["vmptrst [rbx]"]), reason::VMPTRST, 3),
        ("VMCLEAR exits", l2!(["vmclear [rbx]"]), reason::VMCLEAR, 4),
        ("VMXON exits", l2!(["vmxon [rbx]"]), reason::VMXON, 4),
    ] {
        run(name, code, Want::instruction(why, length).information(RBX, BASE_FORM));
    }
    for (name, code, why, length) in [
        ("VMPTRLD exits with its displacement", l2!(["vmptrld [rbx - 0x12345678]"]), reason::VMPTRLD, 7),
        ("VMPTRST exits with its displacement", l2!(["vmptrst [rbx - 0x12345678]"]), reason::VMPTRST, 7),
    ] {
        let want = Want::instruction(why, length).qualification(-0x1234_5678i64 as u64);
        run(name, code, want.information(RBX, BASE_FORM));
    }
}

fn fields() {
    // Registers: the one in ModRM.rm is the first, the other holds the field's encoding.
    let registers = |reg1: u32, reg2: u32| reg2 << 28 | 1 << 10 | reg1 << 3;
    let mask = REG2 | 1 << 10 | 15 << 3;
    let want = Want::instruction(reason::VMREAD, 3);
    run("VMREAD to a register exits", l2!(["vmread rcx, rdx"]), want.information(registers(1, 2), mask));
    let want = Want::instruction(reason::VMREAD, 4);
    run("VMREAD to R9 exits", l2!(["vmread r9, r14"]), want.information(registers(9, 14), mask));
    let want = Want::instruction(reason::VMWRITE, 3);
    run("VMWRITE from a register exits", l2!(["vmwrite rsi, rdi"]), want.information(registers(7, 6), mask));
    let want = Want::instruction(reason::VMREAD, 4).qualification(0x10);
    run(
        "VMREAD to memory exits",
        l2!(["vmread [rbx + 0x10], rsi"]),
        want.information(6 << 28 | RBX, BASE_FORM | REG2),
    );
    let information = 8 << 28 | 3 << 23 | 1 << 18 | 3 << 15 | 2 << 7 | 2;
    let want = Want::instruction(reason::VMWRITE, 9).qualification(0x1234_5678);
    run(
        "VMWRITE from memory exits",
        l2!(["vmwrite r8, [rbx + rcx * 4 + 0x12345678]"]),
        want.information(information, MEMORY_FORM | REG2),
    );
}

fn invalidations() {
    let information = 2 << 28 | RBX;
    if cap::ept_vpid() & cap::INVEPT != 0 {
        let want = Want::instruction(reason::INVEPT, 5).information(information, BASE_FORM | REG2);
        run("INVEPT exits", l2!(["invept rdx, [rbx]"]), want);
    } else {
        run("INVEPT raises #UD where there is none", l2!(["invept rdx, [rbx]"]), UD);
    }
    if cap::ept_vpid() & cap::INVVPID != 0 {
        let want = Want::instruction(reason::INVVPID, 5).information(information, BASE_FORM | REG2);
        run("INVVPID exits", l2!(["invvpid rdx, [rbx]"]), want);
    } else {
        run("INVVPID raises #UD where there is none", l2!(["invvpid rdx, [rbx]"]), UD);
    }
}

/// Every part of an address in the instruction-information field.
fn addressing() {
    let want = |length| Want::instruction(reason::VMPTRLD, length);
    let none = 1 << 27 | 1 << 22;
    let absolute = 7 << 7 | 1 << 10 | 7 << 15 | 1 << 22 | 1 << 27;
    run(
        "operand: absolute address",
        l2!([".byte 0x0f, 0xc7, 0x34, 0x25, 0x44, 0x33, 0x22, 0x11"]),
        want(8).qualification(0x1122_3344).information(none | 3 << 15 | 2 << 7, absolute),
    );
    let code = l2!([".byte 0x0f, 0xc7, 0x35, 0xf0, 0xff, 0xff, 0xff"]);
    let mut vm = Vm::fresh(code);
    let exit = want(7).qualification(code + 7 - 16).run("operand: RIP-relative address, as a sum", &mut vm);
    check!("operand: RIP-relative has no index", exit.information & 1 << 22 != 0, "{:#x}", exit.information);
    run(
        "operand: RBP means SS",
        l2!(["vmptrld [rbp + 8]"]),
        want(4).qualification(8).information(5 << 23 | 1 << 22 | 2 << 15 | 2 << 7, BASE_FORM),
    );
    run(
        "operand: RSP as base",
        l2!(["vmptrld [rsp]"]),
        want(4).information(4 << 23 | 1 << 22 | 2 << 15 | 2 << 7, BASE_FORM),
    );
    run(
        "operand: segment prefix GS, R12 and R13",
        l2!(["vmptrld gs:[r12 + r13 * 2]"]),
        want(6).information(12 << 23 | 13 << 18 | 5 << 15 | 2 << 7 | 1, MEMORY_FORM),
    );
    run(
        "operand: 32-bit address",
        l2!(["vmptrld [ebx]"]),
        want(4).information(3 << 23 | 1 << 22 | 3 << 15 | 1 << 7, BASE_FORM),
    );
    run(
        "operand: index without base",
        l2!([".byte 0x0f, 0xc7, 0x34, 0xcd, 0x00, 0x10, 0x00, 0x00"]),
        want(8).qualification(0x1000).information(
            1 << 27 | 1 << 18 | 3 << 15 | 2 << 7 | 3,
            3 | 7 << 7 | 1 << 10 | 7 << 15 | 15 << 18 | 1 << 22 | 1 << 27,
        ),
    );
}

fn any_privilege() {
    let codes: [(&str, &[u8], u32); 6] = [
        ("ring 3: VMLAUNCH exits", &[0x0f, 0x01, 0xc2], reason::VMLAUNCH),
        ("ring 3: VMXOFF exits", &[0x0f, 0x01, 0xc4], reason::VMXOFF),
        ("ring 3: VMPTRLD exits", &[0x0f, 0xc7, 0x30], reason::VMPTRLD),
        ("ring 3: VMREAD exits", &[0x0f, 0x78, 0xc0], reason::VMREAD),
        ("ring 3: VMWRITE exits", &[0x0f, 0x79, 0xc0], reason::VMWRITE),
        ("ring 3: VMXON exits", &[0xf3, 0x0f, 0xc7, 0x30], reason::VMXON),
    ];
    for (name, code, why) in codes {
        let mut vm = Vm::fresh(0);
        to_ring3(&mut vm, code);
        Want::instruction(why, code.len() as u32).run(name, &mut vm);
    }
}

/// In compatibility mode all but VMCALL (and VMFUNC) raise #UD.
fn compatibility_mode() {
    let code32 = |code| {
        let vm = Vm::fresh(code);
        rt::vmx::vm::Segment::Cs.write(rt::tables::CODE32, 0, 0xffff_ffff, rt::vmx::vm::CODE32_RIGHTS);
        vm
    };
    UD.run("compatibility mode: VMLAUNCH raises #UD", &mut code32(l2!(["vmlaunch"])));
    UD.run("compatibility mode: VMXOFF raises #UD", &mut code32(l2!(["vmxoff"])));
    UD.run("compatibility mode: VMPTRLD raises #UD", &mut code32(l2!(["vmptrld [rbx]"])));
    UD.run("compatibility mode: VMREAD raises #UD", &mut code32(l2!(["vmread rcx, rdx"])));
    let name = "compatibility mode: VMCALL exits";
    Want::instruction(reason::VMCALL, 3).run(name, &mut code32(l2!(["vmcall"])));
}
