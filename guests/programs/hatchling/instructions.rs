//! The VMX instructions in VMX root operation: how each fails, and what it leaves behind.

use crate::capabilities::run_code;
use crate::want::{failed, succeeded};
use rt::cpu;
use rt::mem::{self, PAGE};
use rt::report::{equal, faulted, page_faulted, ran, skip};
use rt::vmx::capability::{self as cap};
use rt::vmx::{Failure, Vm, control, field as f, insn, vmread, vmwrite};
use rt::{check, l2, paging, probe, trap, user, vmx};

const INVALID: Failure = Failure::Invalid;

const fn valid(number: u32) -> Failure {
    Failure::Valid(number)
}

/// An address that is aligned but too wide, if there are such.
fn too_wide(region: u64) -> Option<u64> {
    let width = cpu::physical_bits();
    (width < 52).then(|| region | 1 << width)
}

/// Without a current VMCS every failure is VMfailInvalid.
pub fn without_vmcs(vmxon_region: u64) {
    equal("VMPTRST without a current VMCS", insn::vmptrst(), !0);
    failed("VMREAD without a current VMCS", insn::try_vmread(f::GUEST_RIP.into()).map(drop), INVALID);
    failed("VMWRITE without a current VMCS", insn::try_vmwrite(f::GUEST_RIP.into(), 0), INVALID);
    failed("VMREAD of no field without a current VMCS", insn::try_vmread(0xffff).map(drop), INVALID);
    failed("VMLAUNCH without a current VMCS", insn::vmlaunch(), INVALID);
    failed("VMRESUME without a current VMCS", insn::vmresume(), INVALID);
    failed("VMCALL without a current VMCS", insn::vmcall(), INVALID);
    failed("VMXON in VMX root operation without a current VMCS", insn::vmxon(vmxon_region), INVALID);
    failed("VMPTRLD of an unaligned pointer without a current VMCS", insn::vmptrld(8), INVALID);
    failed("VMCLEAR of the VMXON pointer without a current VMCS", insn::vmclear(vmxon_region), INVALID);
    failed("VMPTRLD of the VMXON pointer without a current VMCS", insn::vmptrld(vmxon_region), INVALID);
    invalidations("without a current VMCS", |_| INVALID);
}

pub fn with_vmcs(vmxon_region: u64) {
    let region = vmx::region();
    vmclear(region, vmxon_region);
    vmptrld(region, vmxon_region);
    root_only(vmxon_region);
    launch_states(region);
    mov_ss(region);
    privilege();
    operands(region);
    status_flags(region);
    persistence(region);
    invalidations("with a current VMCS", valid);
}

fn vmclear(region: u64, vmxon_region: u64) {
    succeeded("VMCLEAR of a fresh region", insn::vmclear(region));
    succeeded("VMPTRLD", insn::vmptrld(region));
    equal("VMPTRST", insn::vmptrst(), region);
    failed("VMCLEAR of an unaligned pointer", insn::vmclear(region + 1), valid(2));
    if let Some(pointer) = too_wide(region) {
        failed("VMCLEAR of a pointer beyond the physical-address width", insn::vmclear(pointer), valid(2));
    }
    failed("VMCLEAR of the VMXON pointer", insn::vmclear(vmxon_region), valid(3));
    equal("a failed VMCLEAR leaves the current VMCS", insn::vmptrst(), region);
    let other = mem::frame();
    succeeded("VMCLEAR ignores the revision", insn::vmclear(other));
    equal("VMCLEAR of another VMCS leaves the current one", insn::vmptrst(), region);
    succeeded("VMCLEAR of the current VMCS", insn::vmclear(region));
    equal("VMCLEAR of the current VMCS leaves none", insn::vmptrst(), !0);
}

fn vmptrld(region: u64, vmxon_region: u64) {
    succeeded("VMPTRLD after VMCLEAR", insn::vmptrld(region));
    failed("VMPTRLD of an unaligned pointer", insn::vmptrld(region + 0x800), valid(9));
    if let Some(pointer) = too_wide(region) {
        failed("VMPTRLD of a pointer beyond the physical-address width", insn::vmptrld(pointer), valid(9));
    }
    failed("VMPTRLD of the VMXON pointer", insn::vmptrld(vmxon_region), valid(10));
    let other = vmx::region();
    mem::write(other, cap::revision() ^ 2);
    failed("VMPTRLD of a wrong revision", insn::vmptrld(other), valid(11));
    mem::write(other, cap::revision() | 1 << 31);
    if control::VMCS_SHADOWING.available() {
        succeeded("VMPTRLD of a shadow VMCS", insn::vmptrld(other));
        failed("VMLAUNCH of a shadow VMCS", insn::vmlaunch(), INVALID);
        failed("VMRESUME of a shadow VMCS", insn::vmresume(), INVALID);
        vmx::vm::expect(insn::vmclear(other), "VMCLEAR");
        vmx::vm::expect(insn::vmptrld(region), "VMPTRLD");
    } else {
        failed("VMPTRLD of a shadow VMCS without VMCS shadowing", insn::vmptrld(other), valid(11));
    }
    equal("a failed VMPTRLD leaves the current VMCS", insn::vmptrst(), region);
    equal("the error number is in the VMCS", vmread(f::INSTRUCTION_ERROR), 11);
}

fn root_only(vmxon_region: u64) {
    failed("VMCALL in VMX root operation", insn::vmcall(), valid(1));
    failed("VMXON in VMX root operation", insn::vmxon(vmxon_region), valid(15));
    failed("VMXON in VMX root operation, of an unaligned pointer", insn::vmxon(7), valid(15));
    faulted("#UD: VMFUNC in VMX root operation", &run_code(&[0x0f, 0x01, 0xd4], 0), trap::UD, 0, 0);
}

fn launch_states(region: u64) {
    let mut vm = Vm::new(region, l2!([]));
    failed("VMRESUME of a clear VMCS", insn::vmresume(), valid(5));
    let exit = vm.run();
    check!("VMLAUNCH makes the VMCS launched", exit.reason == vmx::reason::VMCALL, "{exit}");
    failed("VMLAUNCH of a launched VMCS", insn::vmlaunch(), valid(4));
    vmx::vm::expect(insn::vmclear(region), "VMCLEAR");
    vmx::vm::expect(insn::vmptrld(region), "VMPTRLD");
    failed("VMRESUME after VMCLEAR", insn::vmresume(), valid(5));
    // A failed launch leaves the state clear.
    let good = vmread(f::HOST_CR4);
    vmwrite(f::HOST_CR4, good & !vmx::CR4_VMXE);
    failed("VMLAUNCH with a bad host state", insn::vmlaunch(), valid(8));
    vmwrite(f::HOST_CR4, good);
    failed("a VMLAUNCH that failed leaves the VMCS clear", insn::vmresume(), valid(5));
}

/// VM entry right behind MOV SS fails, before the launch state is looked at.
fn mov_ss(region: u64) {
    let _vm = Vm::new(region, l2!([]));
    let flags: u64;
    let fault = probe!(
        ["mov ss, {s:x}", "vmlaunch", "pushfq", "pop {f}"],
        s = in(reg) rt::tables::DATA, f = lateout(reg) flags
    );
    ran("VMLAUNCH behind MOV SS does not enter", &fault);
    failed("VMLAUNCH with events blocked by MOV SS", insn::outcome(flags), valid(26));
    let flags: u64;
    let fault = probe!(
        ["mov ss, {s:x}", "vmresume", "pushfq", "pop {f}"],
        s = in(reg) rt::tables::DATA, f = lateout(reg) flags
    );
    ran("VMRESUME behind MOV SS does not enter", &fault);
    failed("VMRESUME with events blocked by MOV SS, of a clear VMCS", insn::outcome(flags), valid(26));
}

/// CPL and mode in VMX operation.
fn privilege() {
    const CODES: [(&str, &[u8]); 12] = [
        ("VMCALL", &[0x0f, 0x01, 0xc1]),
        ("VMLAUNCH", &[0x0f, 0x01, 0xc2]),
        ("VMRESUME", &[0x0f, 0x01, 0xc3]),
        ("VMXOFF", &[0x0f, 0x01, 0xc4]),
        ("VMXON", &[0xf3, 0x0f, 0xc7, 0x30]),
        ("VMPTRLD", &[0x0f, 0xc7, 0x30]),
        ("VMPTRST", &[0x0f, 0xc7, 0x38]),
        ("VMCLEAR", &[0x66, 0x0f, 0xc7, 0x30]),
        ("VMREAD", &[0x0f, 0x78, 0xc0]),
        ("VMWRITE", &[0x0f, 0x79, 0xc0]),
        ("INVEPT", &[0x66, 0x0f, 0x38, 0x80, 0x00]),
        ("INVVPID", &[0x66, 0x0f, 0x38, 0x81, 0x00]),
    ];
    for (name, code) in CODES {
        user::load(code);
        let exists = match name {
            "INVEPT" => cap::ept_vpid() & cap::INVEPT != 0,
            "INVVPID" => cap::ept_vpid() & cap::INVVPID != 0,
            _ => true,
        };
        // A missing operand page does not come into it: #GP goes first.
        let fault = user::run(&user::Entry { rax: user::SCRATCH + 64 * PAGE, ..user::ENTRY64 });
        let vector = if exists { trap::GP } else { trap::UD };
        check!(name, fault.vector == vector && fault.error == 0 && fault.at == 0, "ring 3: {fault}");
        let fault = user::run(&user::ENTRY32);
        check!(name, fault.vector == trap::UD && fault.at == 0, "compatibility mode: {fault}");
    }
}

/// Faults of memory operands.
fn operands(region: u64) {
    let _vm = Vm::new(region, l2!([]));
    let absent = user::SCRATCH + 16 * PAGE;
    paging::set_pte(absent, 0);
    let wild = 1u64 << 63;
    page_faulted("#PF: VMCLEAR", &probe!(["vmclear [{p}]"], p = in(reg) absent), 0, absent, 0);
    page_faulted("#PF: VMPTRLD", &probe!(["vmptrld [{p}]"], p = in(reg) absent), 0, absent, 0);
    page_faulted("#PF: VMPTRST", &probe!(["vmptrst [{p}]"], p = in(reg) absent), paging::ERR_W, absent, 0);
    let rip = u64::from(f::GUEST_RIP);
    let fault = probe!(["vmread [{p}], {e}"], p = in(reg) absent, e = in(reg) rip);
    page_faulted("#PF: VMREAD to memory", &fault, paging::ERR_W, absent, 0);
    let fault = probe!(["vmwrite {e}, [{p}]"], p = in(reg) absent, e = in(reg) rip);
    page_faulted("#PF: VMWRITE from memory", &fault, 0, absent, 0);
    let flags: u64;
    let fault = probe!(["vmread [{p}], {e}", "pushfq", "pop {f}"], p = in(reg) absent, e = in(reg) 0xffffu64, f = lateout(reg) flags);
    ran("VMREAD of no field does not touch its operand", &fault);
    failed("VMREAD of no field to memory", insn::outcome(flags), valid(12));
    faulted(
        "#GP: VMPTRLD of a non-canonical operand",
        &probe!(["vmptrld [{p}]"], p = in(reg) wild),
        trap::GP,
        0,
        0,
    );
    faulted(
        "#GP: VMPTRST to a non-canonical operand",
        &probe!(["vmptrst [{p}]"], p = in(reg) wild),
        trap::GP,
        0,
        0,
    );
    let fault = probe!(["vmclear [rsp + {p}]"], p = in(reg) wild);
    faulted("#SS: VMCLEAR through the stack segment", &fault, trap::SS, 0, 0);
    let fault = probe!(["vmread [{p}], {e}"], p = in(reg) wild, e = in(reg) rip);
    faulted("#GP: VMREAD to a non-canonical operand", &fault, trap::GP, 0, 0);
    // The register forms of VMPTRLD and VMCLEAR are RDRAND.
    for (name, code) in [
        ("#UD: INVEPT of a register", &[0x66, 0x0f, 0x38, 0x80, 0xc0]),
        ("#UD: INVVPID of a register", &[0x66, 0x0f, 0x38, 0x81, 0xc0]),
    ] {
        faulted(name, &run_code(code, 0), trap::UD, 0, 0);
    }
}

/// Every outcome defines all six status flags.
fn status_flags(region: u64) {
    let _vm = Vm::new(region, l2!([]));
    let set_all = insn::STATUS_FLAGS | 2;
    let flags_after = |pointer: u64| {
        let flags: u64;
        // SAFETY: RFLAGS and VMCLEAR of the pointer given.
        unsafe {
            core::arch::asm!(
                "push {s}", "popfq", "vmptrld [{p}]", "pushfq", "pop {f}",
                s = in(reg) set_all, p = in(reg) &pointer, f = lateout(reg) flags
            );
        }
        flags & insn::STATUS_FLAGS
    };
    equal("VMsucceed clears all status flags", flags_after(region), 0);
    equal("VMfailValid sets ZF and clears the others", flags_after(1), 0x40);
    vmx::vm::expect(insn::vmclear(region), "VMCLEAR");
    equal("VMfailInvalid sets CF and clears the others", flags_after(1), 0x01);
}

/// Values live in the region while another VMCS is current, and outlive VMCLEAR.
fn persistence(region: u64) {
    let other = vmx::region();
    let _vm = Vm::new(region, l2!([]));
    vmwrite(f::GUEST_RIP, 0x1111);
    vmwrite(f::GUEST_ES, 0x11);
    let _other = Vm::new(other, l2!([]));
    vmwrite(f::GUEST_RIP, 0x2222);
    vmwrite(f::GUEST_ES, 0x22);
    let read = || (vmread(f::GUEST_RIP), vmread(f::GUEST_ES));
    vmx::vm::expect(insn::vmptrld(region), "VMPTRLD");
    check!("VMPTRLD switches between two VMCSs", read() == (0x1111, 0x11), "{:x?}", read());
    vmx::vm::expect(insn::vmptrld(other), "VMPTRLD");
    check!("VMPTRLD switches back", read() == (0x2222, 0x22), "{:x?}", read());
    vmx::vm::expect(insn::vmptrld(other), "VMPTRLD");
    check!("VMPTRLD of the current VMCS changes nothing", read() == (0x2222, 0x22), "{:x?}", read());
    vmx::vm::expect(insn::vmclear(region), "VMCLEAR");
    vmx::vm::expect(insn::vmclear(other), "VMCLEAR");
    // VMCLEAR brings a VMCS to memory: a copy of its bytes is the same VMCS.
    let copy = mem::frame();
    mem::copy(copy, mem::bytes(region, 4096));
    mem::fill(region + 8, 0, 4088);
    vmx::vm::expect(insn::vmptrld(copy), "VMPTRLD of a copy");
    check!("a copied region holds the values", read() == (0x1111, 0x11), "{:x?}", read());
    vmx::vm::expect(insn::vmclear(copy), "VMCLEAR");
    vmx::vm::expect(insn::vmptrld(other), "VMPTRLD");
    check!("values outlive VMCLEAR", read() == (0x2222, 0x22), "{:x?}", read());
    vmx::vm::expect(insn::vmclear(other), "VMCLEAR");
    vmx::vm::expect(insn::vmptrld(other), "VMPTRLD");
}

/// INVEPT and INVVPID: types and descriptors. `failure` makes the outcome that an error number has.
fn invalidations(when: &str, failure: fn(u32) -> Failure) {
    let value = cap::ept_vpid();
    let bad = failure(28);
    if value & cap::INVEPT == 0 {
        skip("INVEPT", "INVEPT");
    } else {
        let good = vmx::ept::Ept { root: mem::FREE }.pointer();
        for kind in [0, 3, 4, 1 << 32 | 2, !0] {
            check!(
                "INVEPT of a bad type",
                insn::invept(kind, [good, 0]) == Err(bad),
                "{when}, type {kind:#x}"
            );
        }
        if value & cap::INVEPT_ALL != 0 {
            succeeded("INVEPT of all contexts", insn::invept(2, [0, 0]));
            succeeded("INVEPT of all contexts ignores the EPT pointer", insn::invept(2, [!0, 0]));
        }
        if value & cap::INVEPT_SINGLE != 0 {
            succeeded("INVEPT of a single context", insn::invept(1, [good, 0]));
            for (what, pointer) in bad_pointers(good) {
                check!(
                    "INVEPT of a bad EPT pointer",
                    insn::invept(1, [pointer, 0]) == Err(bad),
                    "{when}, {what}"
                );
            }
        }
    }
    if value & cap::INVVPID == 0 {
        return skip("INVVPID", "INVVPID");
    }
    for kind in [4, 5, 1 << 32, !0] {
        check!("INVVPID of a bad type", insn::invvpid(kind, [1, 0]) == Err(bad), "{when}, type {kind:#x}");
    }
    for (kind, bit) in [
        (0, cap::INVVPID_ADDRESS),
        (1, cap::INVVPID_SINGLE),
        (2, cap::INVVPID_ALL),
        (3, cap::INVVPID_KEEP_GLOBALS),
    ] {
        if value & bit == 0 {
            check!(
                "INVVPID of an unsupported type",
                insn::invvpid(kind, [1, 0]) == Err(bad),
                "{when}, type {kind}"
            );
            continue;
        }
        succeeded("INVVPID", insn::invvpid(kind, [1, 0x1000]));
        check!(
            "INVVPID with reserved bits",
            insn::invvpid(kind, [1 << 16 | 1, 0]) == Err(bad),
            "{when}, type {kind}"
        );
        let zero = insn::invvpid(kind, [0, 0]);
        check!("INVVPID of VPID 0", zero == if kind == 2 { Ok(()) } else { Err(bad) }, "{when}, type {kind}");
        let wild = insn::invvpid(kind, [1, 1 << 63]);
        check!(
            "INVVPID of a non-canonical address",
            wild == if kind == 0 { Err(bad) } else { Ok(()) },
            "{when}, type {kind}"
        );
    }
}

/// EPT pointers that VM entry and INVEPT refuse.
pub fn bad_pointers(good: u64) -> impl Iterator<Item = (&'static str, u64)> {
    let width = cpu::physical_bits();
    let value = cap::ept_vpid();
    let walk = good & !(7 << 3);
    [
        ("EptpMemoryType: 1", Some(good & !7 | 1)),
        ("EptpMemoryType: 7", Some(good & !7 | 7)),
        ("EptpMemoryType: UC where it is not offered", (value & cap::EPT_UC == 0).then_some(good & !7)),
        ("EptpWalkLength: 3", Some(walk | 2 << 3)),
        ("EptpWalkLength: 6", Some(walk | 5 << 3)),
        (
            "EptpAccessedDirty: where they are not offered",
            (value & cap::EPT_ACCESSED_DIRTY == 0).then_some(good | 1 << 6),
        ),
        ("EptpReserved: bit 8", Some(good | 1 << 8)),
        ("EptpReserved: bit 11", Some(good | 1 << 11)),
        ("EptpReserved: beyond the physical-address width", (width < 52).then_some(good | 1 << width)),
        ("EptpReserved: bit 63", Some(good | 1 << 63)),
    ]
    .into_iter()
    .filter_map(|(what, pointer)| Some((what, pointer?)))
}
