//! VMCS shadowing: VMREAD and VMWRITE of L2 that reach the VMCS at the link pointer.

use crate::want::{Want, to_end};
use rt::mem::{self, PAGE};
use rt::report::equal;
use rt::vmx::capability as cap;
use rt::vmx::control::VMCS_SHADOWING;
use rt::vmx::vm::expect;
use rt::vmx::{Regs, Vm, field as f, insn, reason, vmread, vmwrite};
use rt::{check, l2};

const REGION: u64 = mem::FREE + 0x7c_0000;
const READ_BITMAP: u64 = REGION + PAGE;
const WRITE_BITMAP: u64 = REGION + 2 * PAGE;

/// Runs `with` while the shadow VMCS is current.
fn in_shadow<T>(vm: &Vm, with: impl FnOnce() -> T) -> T {
    expect(insn::vmptrld(REGION), "VMPTRLD of the shadow VMCS");
    let result = with();
    expect(insn::vmclear(REGION), "VMCLEAR of the shadow VMCS");
    expect(insn::vmptrld(vm.region), "VMPTRLD");
    result
}

fn start(code: u64) -> Option<Vm> {
    mem::fill(REGION, 0, 3 * PAGE);
    mem::write(REGION, cap::revision() | 1 << 31);
    let mut vm = Vm::fresh(code);
    if !vm.set_or_skip("VMCS shadowing", &[VMCS_SHADOWING]) {
        return None;
    }
    expect(insn::vmclear(REGION), "VMCLEAR of the shadow VMCS");
    vmwrite(f::VMCS_LINK_POINTER, REGION);
    vmwrite(f::VMREAD_BITMAP, READ_BITMAP);
    vmwrite(f::VMWRITE_BITMAP, WRITE_BITMAP);
    Some(vm)
}

/// Sets the bit of a field.
fn intercept(bitmap: u64, field: u32) {
    let at = bitmap + u64::from(field / 8);
    mem::write(at, mem::read::<u8>(at) | 1 << (field % 8));
}

pub fn all() {
    let code = l2!(["vmread rax, rdx", "pushfq", "pop rbx", "vmwrite rdx, rcx", "pushfq", "pop rsi"]);
    let Some(mut vm) = start(code) else { return };
    in_shadow(&vm, || vmwrite(f::GUEST_RIP, 0x1122_3344_5566));
    vm.regs = Regs { rdx: f::GUEST_RIP.into(), rcx: 0x7788_99aa_bbcc, ..vm.regs };
    to_end("VMCS shadowing: VMREAD and VMWRITE run in L2", &mut vm);
    equal("VMCS shadowing: VMREAD reads the shadow VMCS", vm.regs.rax, 0x1122_3344_5566);
    equal("VMCS shadowing: VMREAD succeeds", vm.regs.rbx & insn::STATUS_FLAGS, 0);
    equal("VMCS shadowing: VMWRITE succeeds", vm.regs.rsi & insn::STATUS_FLAGS, 0);
    let written = in_shadow(&vm, || vmread(f::GUEST_RIP));
    equal("VMCS shadowing: VMWRITE writes the shadow VMCS", written, 0x7788_99aa_bbcc);
    check!("VMCS shadowing: L1's own VMCS is untouched", vmread(f::GUEST_RIP) != written, "written");
    intercepted(code);
    failures(code);
}

fn intercepted(code: u64) {
    let Some(mut vm) = start(code) else { return };
    intercept(READ_BITMAP, f::GUEST_RIP);
    vm.regs.rdx = f::GUEST_RIP.into();
    Want::instruction(reason::VMREAD, 3).run("VMCS shadowing: a bit of the VMREAD bitmap exits", &mut vm);
    let Some(mut vm) = start(code) else { return };
    intercept(WRITE_BITMAP, f::GUEST_RIP);
    vm.regs.rdx = f::GUEST_RIP.into();
    Want::instruction(reason::VMWRITE, 3)
        .at(5)
        .run("VMCS shadowing: a bit of the VMWRITE bitmap exits", &mut vm);
    let Some(mut vm) = start(code) else { return };
    vm.regs.rdx = 1 << 15;
    Want::instruction(reason::VMREAD, 3).run("VMCS shadowing: an encoding beyond 15 bits exits", &mut vm);
    let Some(mut vm) = start(code) else { return };
    vm.regs.rdx = 1 << 32 | u64::from(f::GUEST_RIP);
    Want::instruction(reason::VMREAD, 3).run("VMCS shadowing: an encoding beyond 32 bits exits", &mut vm);
    // Without the control everything exits, bitmaps or not.
    let Some(mut vm) = start(code) else { return };
    vm.unset(&[VMCS_SHADOWING]);
    vmwrite(f::VMCS_LINK_POINTER, !0);
    vm.regs.rdx = f::GUEST_RIP.into();
    Want::instruction(reason::VMREAD, 3).run("without VMCS shadowing VMREAD exits", &mut vm);
    let Some(mut vm) = start(l2!(["vmread [rbx], rdx"])) else { return };
    in_shadow(&vm, || vmwrite(f::GUEST_ES, 0x4321));
    mem::write(mem::FREE + 0x200, !0u64);
    vm.regs = Regs { rdx: f::GUEST_ES.into(), rbx: mem::FREE + 0x200, ..vm.regs };
    to_end("VMCS shadowing: VMREAD to memory", &mut vm);
    equal("VMCS shadowing: VMREAD to memory writes 64 bits", mem::read::<u64>(mem::FREE + 0x200), 0x4321);
}

fn failures(code: u64) {
    let Some(mut vm) = start(code) else { return };
    vmwrite(f::VMCS_LINK_POINTER, !0);
    vm.regs.rdx = f::GUEST_RIP.into();
    to_end("VMCS shadowing: no shadow VMCS", &mut vm);
    equal("VMCS shadowing: VMREAD without one is VMfailInvalid", vm.regs.rbx & insn::STATUS_FLAGS, 1);
    let Some(mut vm) = start(code) else { return };
    vm.regs.rdx = 0x7ffe;
    to_end("VMCS shadowing: no field", &mut vm);
    equal("VMCS shadowing: VMREAD of no field is VMfailValid", vm.regs.rbx & insn::STATUS_FLAGS, 0x40);
}
