//! RDMSR, WRMSR, CPUID and the counters.

use iced_x86::code_asm::*;
use turtles_cpu::state::{Seg, reg};
use x86defs::{cr4, efer, msr, vmx};

use crate::machine::*;

/// Writes an MSR and reads it back; none if either faulted.
fn round_trip(m: &mut Machine, index: u32, value: u64) -> Option<u64> {
    m.set(reg::RCX, u64::from(index));
    m.set(reg::RAX, value & 0xffff_ffff);
    m.set(reg::RDX, value >> 32);
    m.asm(|a| {
        a.wrmsr().unwrap();
        a.rdmsr().unwrap();
        a.hlt().unwrap();
    });
    m.run();
    (m.cpu.state.rip > CODE).then(|| m.reg(reg::RDX) << 32 | m.reg(reg::RAX))
}

#[test]
fn what_may_be_written() {
    let bad = None;
    let same = |v| (v, Some(v));
    for (index, (value, expected)) in [
        (msr::IA32_LSTAR, same(0xffff_8000_0000_0000)),
        (msr::IA32_LSTAR, (1 << 60, bad)),
        (msr::IA32_FS_BASE, same(0x7fff_ffff_f000)),
        (msr::IA32_KERNEL_GS_BASE, (1 << 63, bad)),
        (msr::IA32_FMASK, (1 << 32, bad)),
        (msr::IA32_TSC_AUX, same(0x1234_5678)),
        (msr::IA32_TSC_AUX, (1 << 32, bad)),
        (msr::IA32_SYSENTER_EIP, (1 << 62, bad)),
        (msr::IA32_EFER, same(efer::SCE | efer::LME | efer::LMA | efer::NXE)),
        (msr::IA32_EFER, (efer::LME, Some(efer::LME | efer::LMA))),
        (msr::IA32_EFER, (efer::SCE, bad)),
        (msr::IA32_EFER, (efer::LME | 1 << 1, bad)),
        (msr::IA32_EFER, (efer::LME | 1 << 12, bad)),
        (msr::IA32_PAT, same(0x0007_0106_0500_0406)),
        (msr::IA32_PAT, (2, bad)),
        (msr::IA32_MTRR_DEF_TYPE, same(0xc06)),
        (msr::IA32_MTRR_DEF_TYPE, (0x1000, bad)),
        (msr::IA32_MTRR_DEF_TYPE, (7, bad)),
        (msr::IA32_MTRR_PHYSBASE0, same(0x8000_0006)),
        (msr::IA32_MTRR_PHYSBASE0, (0x106, bad)),
        (msr::IA32_MTRR_PHYSBASE0 + 1, same(0x3fff_8000_0800)),
        (msr::IA32_MTRR_PHYSBASE0 + 1, (0x400, bad)),
        (msr::IA32_MTRR_PHYSBASE0 + 1, (1 << 46, bad)),
        (msr::IA32_MTRR_PHYSBASE0 + 16, (0, bad)),
        (msr::IA32_MTRR_FIX4K_F8000, same(0x0606_0606_0506_0400)),
        (msr::IA32_MTRR_FIX64K_00000, (3, bad)),
        (msr::IA32_SPEC_CTRL, same(3)),
        (msr::IA32_SPEC_CTRL, (8, bad)),
        (msr::IA32_XSS, same(0)),
        (msr::IA32_XSS, (0x100, bad)),
        (msr::IA32_DEBUGCTL, same(2)),
        (msr::IA32_DEBUGCTL, (3, Some(2))),
        (msr::IA32_DEBUGCTL, (1 << 20, bad)),
        (msr::IA32_MISC_ENABLE, (1, Some(0x1801))),
        (msr::IA32_MISC_ENABLE, (1 << 40, bad)),
        (msr::IA32_MTRRCAP, (0x508, bad)),
        (msr::IA32_FEATURE_CONTROL, same(4)),
        (msr::IA32_FEATURE_CONTROL, same(5)),
        (msr::IA32_FEATURE_CONTROL, (2, bad)),
        (vmx::msr::BASIC, (0, bad)),
        (msr::IA32_ARCH_CAPABILITIES, (0, bad)),
        (msr::IA32_P5_MC_ADDR, same(0)),
        (msr::IA32_P5_MC_ADDR, (1, bad)),
        (0xdead, (0, bad)),
        (0x4000_0000, (0, bad)),
    ] {
        let mut m = Machine::long();
        assert_eq!(round_trip(&mut m, index, value), expected, "{index:#x} {value:#x}");
    }
}

#[test]
fn bases_take_effect() {
    let mut m = Machine::long();
    assert_eq!(round_trip(&mut m, msr::IA32_GS_BASE, DATA), Some(DATA));
    assert_eq!(m.cpu.state.seg(Seg::Gs).base, DATA);
}

#[test]
fn time_stamp_counter_and_its_adjustment() {
    let mut m = Machine::long();
    let now = round_trip(&mut m, msr::IA32_TSC, 1_000_000).unwrap();
    // The bus's clock counts instructions.
    assert_eq!(now, 1_000_001);
    let adjust = m.cpu.state.msrs.tsc_adjust;
    let mut m = Machine::long().with(|s| s.msrs.tsc_adjust = adjust);
    m.asm(|a| {
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.reg(reg::RAX), 1_000_000);
    let mut m = Machine::long().user().with(|s| s.cr4 |= cr4::TSD);
    m.asm(|a| a.rdtsc().unwrap());
    assert_eq!(m.fault(), (13, 0));
}

#[test]
fn write_only_registers() {
    for index in [msr::IA32_PRED_CMD, msr::IA32_FLUSH_CMD, msr::IA32_BIOS_UPDT_TRIG] {
        let mut m = Machine::long();
        m.set(reg::RCX, u64::from(index));
        m.set(reg::RAX, 1);
        m.asm(|a| {
            a.wrmsr().unwrap();
            a.inc(ebx).unwrap();
            a.rdmsr().unwrap();
        });
        assert_eq!(m.fault(), (13, 0));
        assert_eq!(m.reg(reg::RBX), 1, "{index:#x}");
    }
}

#[test]
fn cpuid_follows_the_state() {
    let mut m = Machine::long().with(|s| s.cr4 |= cr4::OSXSAVE);
    m.set(reg::RAX, 1);
    m.asm(|a| {
        a.cpuid().unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.reg(reg::RAX), u64::from(turtles_cpu::cpuid::SIGNATURE));
    assert_ne!(m.reg(reg::RCX) & 1 << 27, 0);
    assert_ne!(m.reg(reg::RDX) & 1 << 9, 0);
}

#[test]
fn features_the_model_lacks_are_undefined() {
    for bytes in [
        &[0x0f, 0x01, 0xc1][..],
        &[0x0f, 0x01, 0xc8],
        &[0x0f, 0x01, 0xc9],
        &[0x0f, 0x01, 0xd9],
        &[0x0f, 0x37],
    ] {
        let mut m = Machine::long();
        m.bytes(bytes);
        assert_eq!(m.vector(), 6, "{bytes:x?}");
    }
}

#[test]
fn feature_control_is_written_until_it_is_locked() {
    let mut m = Machine::long().with(|s| s.msrs.feature_control = 1);
    m.set(reg::RCX, u64::from(msr::IA32_FEATURE_CONTROL));
    m.set(reg::RAX, 5);
    m.asm(|a| a.wrmsr().unwrap());
    assert_eq!(m.fault(), (13, 0));
    assert_eq!(m.cpu.state.msrs.feature_control, 1);
}
