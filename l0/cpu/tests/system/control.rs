//! Control and debug registers, XCR0, HLT and translations.

use iced_x86::code_asm::*;
use turtles_cpu::state::reg;
use x86defs::{cr0, cr4, dr, efer};

use crate::machine::*;

#[test]
fn illegal_control_register_values() {
    let cr0_now = cr0::PE | cr0::PG | cr0::ET | cr0::WP;
    type Set = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let to_cr0: Set = |a| a.mov(cr0, rax);
    let to_cr3: Set = |a| a.mov(cr3, rax);
    let to_cr4: Set = |a| a.mov(cr4, rax);
    let to_cr8: Set = |a| a.mov(cr8, rax);
    for (set, value, legal) in [
        (to_cr0, cr0_now, true),
        (to_cr0, cr0_now | cr0::CD, true),
        (to_cr0, cr0_now | cr0::NW, false),
        (to_cr0, cr0_now & !cr0::PE, false),
        (to_cr0, cr0_now & !cr0::PG, false),
        (to_cr0, cr0_now | 1 << 32, false),
        (to_cr0, cr0_now | 1 << 6, true),
        (to_cr3, PML4 | 0x18, true),
        (to_cr3, PML4 | 1 << 46, false),
        (to_cr3, PML4 | 1 << 63, false),
        (to_cr4, cr4::PAE | cr4::PGE | cr4::PCIDE, true),
        (to_cr4, cr4::PGE, false),
        (to_cr4, cr4::PAE | cr4::LA57, false),
        (to_cr4, cr4::PAE | cr4::VMXE, true),
        (to_cr4, cr4::PAE | cr4::SMXE, false),
        (to_cr4, cr4::PAE | 1 << 15, false),
        (to_cr4, cr4::PAE | 1 << 35, false),
        (to_cr8, 15, true),
        (to_cr8, 16, false),
    ] {
        let mut m = Machine::long();
        m.set(reg::RAX, value);
        m.asm(|a| {
            set(a).unwrap();
            a.hlt().unwrap();
        });
        m.run();
        let faulted = m.cpu.state.rip == HANDLERS + 16 * 13 + 1;
        assert_eq!(!faulted, legal, "{value:#x}");
    }
}

#[test]
fn pcide_needs_pcid_zero() {
    let mut m = Machine::long().with(|s| s.cr3 |= 8);
    m.set(reg::RAX, cr4::PAE | cr4::PCIDE);
    m.asm(|a| a.mov(cr4, rax).unwrap());
    assert_eq!(m.fault(), (13, 0));
}

#[test]
fn users_cannot_touch_them() {
    for bytes in [
        &[0x0f, 0x20, 0xc0][..],
        &[0x0f, 0x22, 0xc0],
        &[0x0f, 0x21, 0xc0],
        &[0x0f, 0x06],
        &[0x0f, 0x01, 0x38],
        &[0xf4],
        &[0x0f, 0x08],
        &[0x0f, 0x09],
        &[0x0f, 0x32],
        &[0x0f, 0x30],
        &[0x0f, 0x01, 0xf0],
        &[0xfa],
        &[0x0f, 0x33],
    ] {
        let mut m = Machine::long().user();
        m.bytes(bytes);
        assert_eq!(m.fault(), (13, 0), "{bytes:x?}");
    }
}

#[test]
fn machine_status_word() {
    let mut m = Machine::protected();
    m.asm(|a| {
        a.mov(eax, 0xe).unwrap();
        a.lmsw(ax).unwrap();
        a.smsw(ebx).unwrap();
        a.clts().unwrap();
        a.smsw(ecx).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    // PE stays set.
    assert_eq!((m.reg(reg::RBX), m.reg(reg::RCX)), (0x1f, 0x17));
}

#[test]
fn long_mode_needs_pae_when_paging_is_switched_on() {
    let mut m = Machine::protected().with(|s| s.efer = efer::LME);
    m.set(reg::RAX, cr0::PE | cr0::PG);
    m.asm(|a| a.mov(cr0, eax).unwrap());
    assert_eq!(m.fault(), (13, 0));
    assert_eq!(m.cpu.state.efer, efer::LME);
}

#[test]
fn pdptes_are_loaded_and_checked() {
    for (pdpte, legal) in
        [(0x2001u64, true), (0x2003, false), (0x2021, false), (0x2000 | 1 << 50 | 1, false), (2, true)]
    {
        let mut m = Machine::protected().with(|s| s.cr4 = cr4::PAE);
        m.put64(0x9000, 0x2001);
        m.put64(0x9008, pdpte);
        m.put64(0x2000, 0x83);
        m.set(reg::RAX, 0x9000);
        m.set(reg::RBX, cr0::PE | cr0::PG);
        m.asm(|a| {
            a.mov(cr3, eax).unwrap();
            a.mov(cr0, ebx).unwrap();
            a.hlt().unwrap();
        });
        m.run();
        assert_eq!(m.cpu.state.rip < HANDLERS || m.cpu.state.rip > CODE, legal, "{pdpte:#x}");
        if legal {
            assert_eq!(m.cpu.state.pdptes[1], pdpte);
        }
    }
}

#[test]
fn debug_register_aliases_and_fixed_bits() {
    let mut m = Machine::long();
    m.set(reg::RAX, 0xffff_ffff);
    m.asm(|a| {
        a.mov(dr6, rax).unwrap();
        a.mov(rbx, dr4).unwrap();
        a.xor(eax, eax).unwrap();
        a.mov(dr7, rax).unwrap();
        a.mov(rcx, dr5).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!((m.reg(reg::RBX), m.reg(reg::RCX)), (0xffff_eff0 | 0xf, dr::DR7_FIXED_1));
    let mut m = Machine::long().with(|s| s.cr4 |= cr4::DE);
    m.asm(|a| a.mov(rbx, dr4).unwrap());
    assert_eq!(m.vector(), 6);
    let mut m = Machine::long();
    m.set(reg::RAX, 1 << 32);
    m.asm(|a| a.mov(dr7, rax).unwrap());
    assert_eq!(m.fault(), (13, 0));
}

#[test]
fn extended_control_register() {
    for (value, legal) in
        [(1, true), (3, true), (7, true), (0x207, true), (2, false), (5, false), (0xf, false)]
    {
        let mut m = Machine::long().with(|s| s.cr4 |= cr4::OSXSAVE);
        let has_avx = m.cpu.model().has(turtles_cpu::cpuid::Feature::Avx);
        m.set(reg::RAX, value);
        m.asm(|a| {
            a.xsetbv().unwrap();
            a.xgetbv().unwrap();
            a.hlt().unwrap();
        });
        m.run();
        let done = m.cpu.state.rip > CODE;
        assert_eq!(done, legal && (has_avx || value & 4 == 0), "{value:#x}");
        assert_eq!(m.cpu.state.xcr0, if done { value } else { 1 });
    }
    let mut m = Machine::long();
    m.asm(|a| a.xgetbv().unwrap());
    assert_eq!(m.vector(), 6);
}

#[test]
fn invlpg_and_cr3_drop_translations() {
    let mut m = Machine::long();
    // 2-MiB pages: linear 2 MiB is a page of its own.
    m.put64(PDPT, 0x3003);
    m.put64(0x3000, 0x83);
    m.put64(0x3008, 0x20_0083);
    m.put64(0x20_0000, 0x22);
    m.put64(DATA, 0x11);
    m.asm(|a| {
        a.mov(rbx, qword_ptr(0x20_0000)).unwrap();
        a.mov(qword_ptr(0x3008), 0x83).unwrap();
        a.invlpg(ptr(0x20_0000)).unwrap();
        a.mov(rcx, qword_ptr(0x20_0000 + DATA as i32 as i64)).unwrap();
        a.mov(rax, 0x20_0083i64).unwrap();
        a.mov(qword_ptr(0x3008), rax).unwrap();
        a.mov(rax, cr3).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(rdx, qword_ptr(0x20_0000)).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!((m.reg(reg::RBX), m.reg(reg::RCX), m.reg(reg::RDX)), (0x22, 0x11, 0x22));
}

#[test]
fn invpcid_descriptors_are_checked() {
    for (kind, pcid, address, legal) in [
        (0u64, 0u64, 0u64, true),
        (0, 1, 0, false),
        (0, 0, 1 << 60, false),
        (1, 1, 0, false),
        (2, 5, 0, true),
        (2, 1 << 12, 0, false),
        (3, 0, 1 << 60, true),
        (4, 0, 0, false),
    ] {
        let mut m = Machine::long();
        m.put64(DATA, pcid);
        m.put64(DATA + 8, address);
        m.set(reg::RAX, kind);
        m.asm(|a| {
            a.invpcid(rax, xmmword_ptr(DATA)).unwrap();
            a.hlt().unwrap();
        });
        m.run();
        assert_eq!(m.cpu.state.rip > CODE, legal, "{kind} {pcid:#x} {address:#x}");
    }
}

#[test]
fn protection_keys_register() {
    let mut m = Machine::long().with(|s| s.cr4 |= cr4::PKE);
    m.set(reg::RAX, 0x5555_5554);
    m.asm(|a| {
        a.wrpkru().unwrap();
        a.xor(eax, eax).unwrap();
        a.rdpkru().unwrap();
        a.mov(ecx, 1).unwrap();
        a.rdpkru().unwrap();
    });
    assert_eq!(m.fault(), (13, 0));
    assert_eq!((m.reg(reg::RAX), m.cpu.state.pkru), (0x5555_5554, 0x5555_5554));
}
