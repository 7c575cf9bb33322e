//! The state under which KVM gets L2's ring 3: nothing leads out of ring 3 but through us.
//!
//! Delivering any event fails, for want of an IDT, in a triple fault (KVM_EXIT_SHUTDOWN), which leaves the registers as
//! they were before the instruction; there is no SYSCALL, no SYSENTER, and no TSS that a gate could take a stack from;
//! CPUID, RDTSC, RDPMC and what tells of descriptor tables raise #GP, RDTSCP and RDPID #UD. [`super::probe`] finds out
//! whether this host's KVM keeps all that. The software CPU then executes the instruction under L2's own system
//! registers and L1's controls.
//!
//! Where KVM emulates ring 0, [`crate::engine::kvm::user`] has a fence of its own.

use turtles_cpu::state::{CpuState, Seg, Segment, Shadow, TableRegister};
use x86defs::{cr0, cr4, dr, efer, rflags, xcr0};

use crate::engine::kvm::KvmHost;

/// Ring 3's own bits of CR0: what they forbid raises faults, as it should.
const CR0_KEPT: u64 = cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::AM | cr0::PG;
/// Ring 3's own bits of CR4.
const CR4_KEPT: u64 =
    cr4::DE | cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::FSGSBASE | cr4::OSXSAVE | cr4::PKE;
/// Bits that make instructions of ring 3 fault which tell what they are not to tell.
pub(super) const CR4_FORBIDS: u64 = cr4::TSD | cr4::UMIP;
/// RFLAGS that ring 3 cannot change.
const KERNELS_FLAGS: u64 = rflags::IF | rflags::IOPL | rflags::VM | rflags::VIF | rflags::VIP | rflags::RF;

/// CR4 bits for which KVM must have the feature, by leaf 7's register (1 EBX, 2 ECX) and bit.
const NEEDS: &[(u64, usize, u32)] = &[(cr4::FSGSBASE, 1, 0), (cr4::PKE, 2, 3), (cr4::UMIP, 2, 2)];

/// True if the processor, in KVM, behaves as `state` demands of it.
pub(super) fn suits(state: &CpuState, host: &KvmHost) -> bool {
    let leaf7 = host.supported_cpuid(7, 0);
    let control = state.cr0 & (cr0::PE | cr0::PG | cr0::NE | cr0::CD | cr0::NW)
        == cr0::PE | cr0::PG | cr0::NE
        && state.cr4 & cr4::LA57 == 0
        && NEEDS
            .iter()
            .all(|&(bit, register, number)| state.cr4 & bit == 0 || leaf7[register] >> number & 1 != 0);
    let components = xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::PKRU;
    let [low, _, _, high] = host.supported_cpuid(0xd, 0);
    let offered = (u64::from(low) | u64::from(high) << 32) & components;
    let forbidden = rflags::TF | rflags::RF | rflags::VM | rflags::IOPL;
    let quiet = state.injected.is_none()
        && state.pending_debug == 0
        && state.shadow == Shadow::None
        && state.dr7 & dr::DR7_ENABLES == 0
        && state.system_flag(rflags::IF)
        && !state.system_flag(forbidden);
    state.cpl == 3 && state.long_mode() && control && state.xcr0 & !offered == 0 && quiet
}

/// The state as KVM gets it. A `flush` that differs from the last one makes KVM flush the TLB: it is CR0.WP, which
/// ring 3 does not see.
pub(super) fn fence_in(state: &mut CpuState, host: &KvmHost, flush: bool) {
    let umip = host.supported_cpuid(7, 0)[2] >> 2 & 1 != 0;
    state.idtr = TableRegister { base: 0, limit: 0 };
    state.tr = Segment { base: 0, limit: 0, access: 0x8b, selector: state.tr.selector };
    state.cr0 = state.cr0 & CR0_KEPT | if flush { cr0::WP } else { 0 };
    state.cr4 = state.cr4 & CR4_KEPT | CR4_FORBIDS & if umip { !0 } else { !cr4::UMIP };
    state.cr3 &= !0xfff;
    state.efer &= efer::LME | efer::LMA | efer::NXE;
    state.dr7 = dr::DR7_FIXED_1;
    state.msrs = Default::default();
    state.nmi_blocked = false;
}

/// Takes from `kvm` what ring 3 can change, and the rest from `before`.
pub(super) fn take_back(before: CpuState, kvm: &CpuState) -> CpuState {
    let mut state = before;
    state.gpr = kvm.gpr;
    state.rip = kvm.rip;
    state.set_rflags(kvm.rflags() & !KERNELS_FLAGS | state.rflags() & KERNELS_FLAGS);
    state.x87 = kvm.x87;
    state.vector = kvm.vector;
    state.pkru = kvm.pkru;
    state.shadow = kvm.shadow;
    for seg in [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
        *state.seg_mut(seg) = *kvm.seg(seg);
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ring_3s_own_comes_back() {
        let mut before = CpuState::reset();
        before.cr0 |= cr0::WP;
        before.set_rflags(rflags::IF);
        before.msrs.lstar = 5;
        let mut kvm = before.clone();
        kvm.gpr.set(3, 7);
        kvm.rip = 0x1234;
        kvm.cr0 = 0;
        kvm.cr2 = 9;
        kvm.cr3 = 9;
        kvm.msrs.lstar = 0;
        kvm.set_rflags(rflags::CF | rflags::TF | rflags::RF);
        let state = take_back(before.clone(), &kvm);
        assert_eq!((state.gpr.get(3), state.rip, state.rflags()), (7, 0x1234, 0x303));
        assert_eq!((state.cr0, state.cr2, state.cr3, state.msrs.lstar), (before.cr0, 0, 0, 5));
    }
}
