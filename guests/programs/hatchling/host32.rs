//! L1 itself in 32-bit mode: VMXON, VMREAD and VMWRITE of 32 bits, a 32-bit L2, and the checks of VM entry that only
//! such a host meets.
//!
//! CR0.PG cannot be cleared in VMX operation, so each case leaves it: 64-bit code fills the VMCS and clears it, 32-bit
//! code makes it current, enters, and comes back with what it found.

use crate::modes::{protected_mode, tables32};
use core::arch::global_asm;
use rt::cpu::{self, rdmsr};
use rt::legacy::{self, Controls, Op};
use rt::mem;
use rt::report::{abort, equal, skip};
use rt::tables::{CODE32, Shared};
use rt::vmx::capability as cap;
use rt::vmx::control::*;
use rt::vmx::vm::expect;
use rt::vmx::{CR4_VMXE, Vm, field as f, insn, reason, vmread, vmwrite};
use rt::{check, l2, vmx};

/// What the 32-bit code takes and leaves. It knows the layout.
#[repr(C)]
#[derive(Clone, Copy)]
struct Trip {
    vmxon_region: u64,
    vmcs: u64,
    /// RFLAGS behind VMLAUNCH, 0 if L2 was entered.
    flags: u32,
    exit_reason: u32,
    qualification: u32,
    error: u32,
    /// VMREAD of natural width, of a 64-bit field and its high half, of a 16-bit field.
    read: [u32; 4],
}

#[unsafe(no_mangle)]
static HOST32_TRIP: Shared<Trip> = Shared::new(Trip {
    vmxon_region: 0,
    vmcs: 0,
    flags: 0,
    exit_reason: 0,
    qualification: 0,
    error: 0,
    read: [0; 4],
});

pub fn all() {
    let vmxon_region = vmx::region();
    let region = vmx::region();
    enters(vmxon_region, region);
    fields(vmxon_region, region);
    let cases: [(&str, fn()); 5] = [
        ("GuestModeOutsideLongMode", || set(f::ENTRY_CONTROLS, IA32E_MODE_GUEST.mask.into())),
        ("HostModeOutsideLongMode", || set(f::EXIT_CONTROLS, HOST_ADDRESS_SPACE_SIZE.mask.into())),
        ("HostSsNull", || vmwrite(f::HOST_SS, 0)),
        ("HostRipHigh", || set(f::HOST_RIP, 1 << 32)),
        ("HostPcidWithoutLongMode", || set(f::HOST_CR4, cpu::CR4_PCIDE)),
    ];
    for (rule, broken) in cases {
        if rule == "HostPcidWithoutLongMode" && !cpu::PCID.present() {
            skip(rule, "PCID");
            continue;
        }
        prepare(vmxon_region, region, broken);
        let trip = travel(vmxon_region, region);
        let right = trip.flags & 0x40 != 0 && trip.error == 8;
        check!(rule, right, "flags {:#x}, error {}, exit {}", trip.flags, trip.error, trip.exit_reason);
    }
}

fn set(field: u32, bits: u64) {
    vmwrite(field, vmread(field) | bits);
}

/// Goes to VMX operation, fills the VMCS for 32-bit L1 and L2, and leaves again.
fn prepare(vmxon_region: u64, region: u64, change: fn()) {
    unsafe extern "C" {
        static host32_exit: u8;
    }
    cpu::set_cr4(cpu::cr4() | CR4_VMXE);
    expect(insn::vmxon(vmxon_region), "VMXON");
    let vm = Vm::new(region, l2!([".code32", "mov eax, 0x12345678", "cpuid", ".code64"]));
    protected_mode();
    vmwrite(f::EXIT_CONTROLS, vmread(f::EXIT_CONTROLS) & !u64::from(HOST_ADDRESS_SPACE_SIZE.mask));
    vmwrite(f::HOST_CS, CODE32.into());
    vmwrite(f::HOST_CR0, legacy::CR0_PAGING.into());
    vmwrite(f::HOST_CR3, tables32());
    vmwrite(f::HOST_CR4, cpu::CR4_PSE | CR4_VMXE);
    vmwrite(f::HOST_RIP, &raw const host32_exit as u64);
    vmwrite(f::GUEST_GS_BASE, 0x89ab_cdef);
    vmwrite(f::TSC_OFFSET, 0x1111_2222_3333_4444);
    vmwrite(f::GUEST_ES_BASE, 0);
    change();
    expect(insn::vmclear(vm.region), "VMCLEAR");
    expect(insn::vmxoff(), "VMXOFF");
    cpu::set_cr4(cpu::cr4() & !CR4_VMXE);
}

/// The 32-bit half.
fn travel(vmxon_region: u64, region: u64) -> Trip {
    unsafe extern "C" {
        static host32_run: u8;
    }
    let at = HOST32_TRIP.address();
    let empty = Trip {
        vmxon_region,
        vmcs: region,
        flags: !0,
        exit_reason: !0,
        qualification: 0,
        error: 0,
        read: [0; 4],
    };
    mem::write(at, empty);
    let controls =
        Controls { cr0: legacy::CR0_PAGING, cr3: tables32() as u32, cr4: (cpu::CR4_PSE | CR4_VMXE) as u32 };
    let mut ops = [Op::call(&raw const host32_run as u64)];
    legacy::run(&controls, &mut ops);
    if ops[0].vector != 0 {
        abort(format_args!("32-bit L1: vector {} error {:#x}", ops[0].vector, ops[0].error));
    }
    mem::read(at)
}

fn enters(vmxon_region: u64, region: u64) {
    prepare(vmxon_region, region, || {});
    let trip = travel(vmxon_region, region);
    let right = trip.flags == 0 && trip.exit_reason == reason::CPUID && trip.qualification == 0;
    check!(
        "32-bit L1 runs 32-bit L2",
        right,
        "flags {:#x}, error {}, exit {}",
        trip.flags,
        trip.error,
        trip.exit_reason
    );
    equal("L1 is in long mode again", rdmsr(cpu::MSR_EFER) >> 10 & 1, 1);
}

/// Outside 64-bit mode operands have 32 bits: VMREAD takes the low bits, VMWRITE clears the high bits.
fn fields(vmxon_region: u64, region: u64) {
    prepare(vmxon_region, region, || {});
    let trip = travel(vmxon_region, region);
    equal("32-bit VMREAD of a natural-width field", trip.read[0], 0x89ab_cdef);
    equal("32-bit VMREAD of a 64-bit field", trip.read[1], 0x3333_4444);
    equal("32-bit VMREAD of a high half", trip.read[2], 0x1111_2222);
    equal("32-bit VMREAD of a 16-bit field", trip.read[3], u32::from(CODE32));
    cpu::set_cr4(cpu::cr4() | CR4_VMXE);
    expect(insn::vmxon(vmxon_region), "VMXON");
    expect(insn::vmptrld(region), "VMPTRLD");
    equal(
        "32-bit VMWRITE clears the high bits of a natural-width field",
        vmread(f::GUEST_SYSENTER_EIP),
        0x5566_7788,
    );
    equal(
        "32-bit VMWRITE clears the high bits of a 64-bit field",
        vmread(f::EXECUTIVE_VMCS_POINTER),
        0x5566_7788,
    );
    equal("32-bit VMWRITE of a high half", vmread(f::TSC_OFFSET), 0x5566_7788_3333_4444);
    equal("the revision is the same", mem::read::<u32>(region), cap::revision());
    expect(insn::vmclear(region), "VMCLEAR");
    expect(insn::vmxoff(), "VMXOFF");
    cpu::set_cr4(cpu::cr4() & !CR4_VMXE);
}

global_asm!(
    r#"
    .section .text.host32, "ax"
    .code32
    .globl host32_run, host32_exit
host32_run:
    pushad
    vmxon [HOST32_TRIP]
    jbe 9f
    vmptrld [HOST32_TRIP + 8]
    jbe 8f
    mov eax, 0x6810             # guest GS base
    vmread [HOST32_TRIP + 32], eax
    mov eax, 0x2010             # TSC offset
    vmread ebx, eax
    mov [HOST32_TRIP + 36], ebx
    inc eax
    vmread ebx, eax
    mov [HOST32_TRIP + 40], ebx
    mov eax, 0x0c02             # host CS
    vmread ebx, eax
    mov [HOST32_TRIP + 44], ebx
    mov ebx, 0x55667788
    mov eax, 0x6826             # guest IA32_SYSENTER_EIP
    vmwrite eax, ebx
    mov eax, 0x200c             # executive-VMCS pointer
    vmwrite eax, ebx
    mov eax, 0x2011             # TSC offset, high half
    vmwrite eax, ebx
    mov eax, 0x6c14             # host RSP
    vmwrite eax, esp
    mov dword ptr [HOST32_TRIP + 16], 0
    vmlaunch
    pushfd
    pop dword ptr [HOST32_TRIP + 16]
host32_exit:
    mov eax, 0x4402
    vmread [HOST32_TRIP + 20], eax
    mov eax, 0x6400
    vmread [HOST32_TRIP + 24], eax
    mov eax, 0x4400
    vmread [HOST32_TRIP + 28], eax
    vmclear [HOST32_TRIP + 8]
8:  vmxoff
9:  popad
    ret
    .code64
    .text
    "#
);
