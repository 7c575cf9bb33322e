//! Checks on the host-state area: error 8. And what of 32-bit hosts can be seen from a 64-bit one.

use crate::entry::{Case, Fails, check, check_all, clear, nothing, set, wide};
use crate::entry_cases;
use rt::cpu::{self, MSR_EFER, rdmsr};
use rt::l2;
use rt::vmx::capability as cap;
use rt::vmx::control::*;
use rt::vmx::{CR4_VMXE, Failure, Vm, field as f, insn, vmwrite};

const WILD: u64 = 0x8000_0000_0000;

pub fn all() {
    check_all(REGISTERS, Fails::Host);
    check_all(SEGMENTS, Fails::Host);
    check_all(MODES, Fails::Host);
    fixed_bits();
    instruction_pointer();
}

/// Each entry through the runtime sets HOST_RIP, so this one goes without.
fn instruction_pointer() {
    for wild in [WILD, 1 << 63] {
        let _vm = Vm::fresh(l2!([]));
        vmwrite(f::HOST_RIP, wild);
        let found = insn::vmlaunch();
        rt::check!(
            "HostRipCanonical",
            found == Err(Failure::Valid(8)),
            "{wild:#x}: {found:?}, wanted error 8"
        );
    }
}

const REGISTERS: &[Case] = entry_cases! {
    HostCr0 [] nothing => || clear(f::HOST_CR0, 1);
    HostCr0 [] nothing => || clear(f::HOST_CR0, cpu::CR0_NE);
    HostCr0 [] nothing => || clear(f::HOST_CR0, 1 << 31);
    HostCr0 [] nothing => || set(f::HOST_CR0, 1 << 32);
    HostCr4 [] nothing => || clear(f::HOST_CR4, CR4_VMXE);
    HostCr4 [] nothing => || set(f::HOST_CR4, 1 << 15);
    HostCr4 [] nothing => || set(f::HOST_CR4, 1 << 63);
    HostCr3 [] nothing => || set(f::HOST_CR3, wide());
    HostCr3 [] nothing => || set(f::HOST_CR3, 1 << 62);
    HostSysenter [] nothing => || vmwrite(f::HOST_SYSENTER_ESP, WILD);
    HostSysenter [] nothing => || vmwrite(f::HOST_SYSENTER_EIP, WILD);
    HostPat [EXIT_LOAD_PAT] nothing => || vmwrite(f::HOST_PAT, 2);
    HostPat [EXIT_LOAD_PAT] nothing => || vmwrite(f::HOST_PAT, 3 << 56);
    HostPat [EXIT_LOAD_PAT] nothing => || vmwrite(f::HOST_PAT, 8 << 24);
    HostPerfGlobalCtrl [EXIT_LOAD_PERF_GLOBAL_CTRL] nothing => || vmwrite(f::HOST_PERF_GLOBAL_CTRL, 1 << 63);
    HostEferReserved [EXIT_LOAD_EFER] nothing => || set(f::HOST_EFER, 2);
    HostEferReserved [EXIT_LOAD_EFER] nothing => || set(f::HOST_EFER, 1 << 63);
    HostEferMode [EXIT_LOAD_EFER] nothing => || clear(f::HOST_EFER, 1 << 10);
    HostEferMode [EXIT_LOAD_EFER] nothing => || clear(f::HOST_EFER, 1 << 8);
};

const SEGMENTS: &[Case] = entry_cases! {
    HostSelector [] nothing => || set(f::HOST_CS, 1);
    HostSelector [] nothing => || set(f::HOST_CS, 4);
    HostSelector [] nothing => || set(f::HOST_SS, 3);
    HostSelector [] nothing => || set(f::HOST_DS, 4);
    HostSelector [] nothing => || set(f::HOST_ES, 2);
    HostSelector [] nothing => || set(f::HOST_FS, 1);
    HostSelector [] nothing => || set(f::HOST_GS, 4);
    HostSelector [] nothing => || set(f::HOST_TR, 3);
    HostCsTrNull [] nothing => || vmwrite(f::HOST_CS, 0);
    HostCsTrNull [] nothing => || vmwrite(f::HOST_TR, 0);
    HostBaseCanonical [] nothing => || vmwrite(f::HOST_FS_BASE, WILD);
    HostBaseCanonical [] nothing => || vmwrite(f::HOST_GS_BASE, WILD);
    HostBaseCanonical [] nothing => || vmwrite(f::HOST_GDTR_BASE, WILD);
    HostBaseCanonical [] nothing => || vmwrite(f::HOST_IDTR_BASE, WILD);
    HostBaseCanonical [] nothing => || vmwrite(f::HOST_TR_BASE, 1 << 63);
};

const MODES: &[Case] = entry_cases! {
    HostModeInLongMode [] nothing => || clear(f::EXIT_CONTROLS, HOST_ADDRESS_SPACE_SIZE.mask.into());
    HostPae [] nothing => || clear(f::HOST_CR4, cpu::CR4_PAE);
};

/// Every bit that IA32_VMX_CR4_FIXED1 forbids.
fn fixed_bits() {
    let forbidden = !rdmsr(cap::CR4_FIXED1);
    for bit in 0..64 {
        if forbidden >> bit & 1 != 0 {
            // A function pointer has no captures: the bit goes through a static.
            BIT.store(1 << bit, core::sync::atomic::Ordering::Relaxed);
            let broken = || set(f::HOST_CR4, BIT.load(core::sync::atomic::Ordering::Relaxed));
            check(&Case { rule: "HostCr4", needs: &[], prepare: nothing, broken }, Fails::Host);
        }
    }
    // Without the control the field does not matter.
    if EXIT_LOAD_EFER.clearable() {
        let case = Case {
            rule: "HostEferMode",
            needs: &[EXIT_LOAD_EFER],
            prepare: || vmwrite(f::HOST_EFER, rdmsr(MSR_EFER)),
            broken: || vmwrite(f::HOST_EFER, 0),
        };
        check(&case, Fails::Host);
    }
}

static BIT: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);
