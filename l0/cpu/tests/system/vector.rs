//! Vector instructions in whole programs: state that changes between them, interpreted and translated.

use iced_x86::code_asm::*;
use turtles_cpu::state::reg;
use x86defs::{cr0, cr4, vector, xcr0};

use crate::machine::*;

const MASKED: u32 = 0x1f80;

fn machine(translated: bool) -> Machine {
    let mut m = Machine::long().with(|s| {
        s.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        s.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        for (i, ymm) in s.vector.ymm.iter_mut().enumerate() {
            ymm.fill(i as u8 + 1);
        }
    });
    if translated {
        m.cpu.translate_after(0);
    }
    m
}

/// Both ways, `looks` at the machine after the program has halted.
fn both(write: impl Fn(&mut CodeAssembler), set: impl Fn(&mut Machine), look: impl Fn(&Machine)) {
    for translated in [false, true] {
        let mut m = machine(translated);
        set(&mut m);
        m.asm(|a| write(a));
        m.run();
        look(&m);
    }
}

/// Says so if the host has no AVX2 to execute the guest's.
fn without_avx2() -> bool {
    let without = !is_x86_feature_detected!("avx2");
    if without {
        println!("SKIP: the host has no AVX2");
    }
    without
}

fn at_handler(m: &Machine, vector: u8) -> bool {
    m.cpu.state.rip == HANDLERS + 16 * u64::from(vector) + 1
}

#[test]
fn setting_ts_between_two_instructions_traps_the_second() {
    both(
        |a| {
            a.paddb(xmm1, xmm2).unwrap();
            a.mov(rax, cr0).unwrap();
            a.or(rax, cr0::TS as i32).unwrap();
            a.mov(cr0, rax).unwrap();
            a.paddb(xmm3, xmm1).unwrap();
            a.hlt().unwrap();
        },
        |_| {},
        |m| {
            assert!(at_handler(m, vector::NM));
            assert_eq!(m.cpu.state.vector.ymm[1][..16], [5; 16]);
            assert_eq!(m.cpu.state.vector.ymm[1][16..], [2; 16]);
            assert_eq!(m.cpu.state.vector.ymm[3], [4; 32]);
        },
    );
}

#[test]
fn a_device_between_vector_instructions_sees_and_leaves_their_state() {
    if without_avx2() {
        return;
    }
    both(
        |a| {
            a.vpaddb(ymm1, ymm2, ymm3).unwrap();
            a.out(0x80, al).unwrap();
            a.vpaddb(xmm4, xmm1, xmm3).unwrap();
            // Missing in the TLB, in the middle of vector code.
            a.vpaddb(ymm5, ymm5, ymmword_ptr(DATA)).unwrap();
            a.vpaddb(ymm6, ymm6, ymm5).unwrap();
            a.movdqu(xmmword_ptr(DATA + 4096 - 8), xmm6).unwrap();
            a.movdqa(xmm7, xmmword_ptr(DATA + 4096)).unwrap();
            a.hlt().unwrap();
        },
        |m| m.put(DATA, &[9; 32]),
        |m| {
            let ymm = &m.cpu.state.vector.ymm;
            assert_eq!(ymm[1], [7; 32]);
            assert_eq!((&ymm[4][..16], &ymm[4][16..]), (&[11; 16][..], &[0; 16][..]));
            assert_eq!((ymm[5], ymm[6]), ([15; 32], [22; 32]));
            let half = [[22; 8], [0; 8]].concat();
            assert_eq!((&ymm[7][..16], &ymm[7][16..]), (&half[..], &[8; 16][..]));
        },
    );
}

#[test]
fn avx_disabled_in_xcr0_between_two_instructions_is_undefined() {
    if without_avx2() {
        return;
    }
    both(
        |a| {
            a.vpaddb(ymm1, ymm2, ymm3).unwrap();
            a.mov(eax, (xcr0::X87 | xcr0::SSE) as u32).unwrap();
            a.xor(edx, edx).unwrap();
            a.xor(ecx, ecx).unwrap();
            a.xsetbv().unwrap();
            a.paddb(xmm4, xmm1).unwrap();
            a.vpaddb(ymm5, ymm2, ymm3).unwrap();
            a.hlt().unwrap();
        },
        |_| {},
        |m| {
            assert!(at_handler(m, vector::UD));
            assert_eq!(m.cpu.state.vector.ymm[4][..16], [12; 16]);
            assert_eq!(m.cpu.state.vector.ymm[5], [6; 32]);
        },
    );
}

#[test]
fn floating_point_runs_under_the_guests_mxcsr_and_leaves_its_flags() {
    const ONE: u64 = 0x3ff0_0000_0000_0000;
    const THREE: u64 = 0x4008_0000_0000_0000;
    let program = |a: &mut CodeAssembler| {
        a.movq(xmm1, rax).unwrap();
        a.movq(xmm2, rcx).unwrap();
        a.divsd(xmm1, xmm2).unwrap();
        a.ldmxcsr(dword_ptr(DATA)).unwrap();
        a.movq(xmm3, rax).unwrap();
        a.divsd(xmm3, xmm2).unwrap();
        a.hlt().unwrap();
    };
    let set = |mxcsr: u32| {
        move |m: &mut Machine| {
            m.set(reg::RAX, ONE);
            m.set(reg::RCX, THREE);
            m.put(DATA, &mxcsr.to_le_bytes());
        }
    };
    let low = |m: &Machine, n: usize| u64::from_le_bytes(m.cpu.state.vector.ymm[n][..8].try_into().unwrap());
    // A third, to nearest and up; inexact.
    both(program, set(MASKED | 2 << 13), |m| {
        assert_eq!((low(m, 1), low(m, 3)), (0x3fd5_5555_5555_5555, 0x3fd5_5555_5555_5556));
        assert_eq!(m.cpu.state.vector.mxcsr, MASKED | 2 << 13 | 0x20);
    });
    // Inexact unmasked.
    both(program, set(MASKED & !(0x20 << 7)), |m| {
        assert!(at_handler(m, vector::XM));
        assert_eq!((low(m, 1), low(m, 3)), (0x3fd5_5555_5555_5555, ONE));
        assert_eq!(m.cpu.state.vector.mxcsr, MASKED & !(0x20 << 7) | 0x20);
    });
    // Another one unmasked: the handler executes it, and the program goes on.
    both(program, set(MASKED & !(0x04 << 7)), |m| {
        assert_eq!(low(m, 3), 0x3fd5_5555_5555_5555);
        assert_eq!(m.cpu.state.vector.mxcsr, MASKED & !(0x04 << 7) | 0x20);
        assert!(!at_handler(m, vector::XM));
    });
}
