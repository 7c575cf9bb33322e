//! Images in memory by the manual's tables, and what the instructions refuse.

use x86defs::{cr0, cr4, vector, xcr0};

use super::{AVX_OFFSET, PKRU_OFFSET, xinuse};
use crate::Cpu;
use crate::interp::host_compare::{MEMORY, OPERAND, Random, cpu, decode, raised, randomise, read, unmap};
use crate::native::oracle::{Machine, instructions};
use crate::state::reg;

const ALL: u64 = xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::PKRU;

fn code(index: usize) -> &'static [u8] {
    instructions!(
        turtles_test_xstate,
        "fxsave64 [r8]",
        "fxrstor64 [r8]",
        "xsave64 [r8]",
        "xrstor64 [r8]",
        "xsavec64 [r8]",
        "xsaveopt64 [r8]",
        "xsaves64 [r8]",
        "xrstors64 [r8]",
    )[index]
        .1
}
const FXSAVE: usize = 0;
const FXRSTOR: usize = 1;
const XSAVE: usize = 2;
const XRSTOR: usize = 3;
const XSAVEC: usize = 4;
const XSAVEOPT: usize = 5;
const XSAVES: usize = 6;
const XRSTORS: usize = 7;

/// Executes one of the instructions on the components `mask`.
fn run(cpu: &mut Cpu, index: usize, mask: u64) -> Option<(u8, Option<u32>)> {
    cpu.state.gpr.set(reg::RAX, mask);
    cpu.state.gpr.set(reg::RDX, 0);
    raised(cpu, decode(code(index)))
}

/// A vCPU with random registers, and memory full of 0xcc.
fn filled(seed: u64) -> Cpu {
    let mut cpu = cpu();
    randomise(&mut cpu, &mut Machine::new(), &mut [0; MEMORY], &mut Random(seed));
    cpu.state.pkru = 0x5555_aaa0;
    (cpu.state.x87.fip, cpu.state.x87.fdp, cpu.state.x87.fop) = (0x1234_5678_9abc, 0x7fff_0000_1111, 0x3ff);
    cpu.state.gpr.set(8, OPERAND);
    cpu.memory.write(OPERAND, &[0xcc; 3072]);
    cpu
}

fn clear(cpu: &mut Cpu) {
    cpu.state.x87 = Default::default();
    cpu.state.vector = Default::default();
    cpu.state.pkru = 0;
}

fn same(a: &Cpu, b: &Cpu, components: u64) {
    let (a, b) = (&a.state, &b.state);
    if components & xcr0::X87 != 0 {
        let words = |x: &crate::state::X87State| (x.fcw, x.fsw, x.ftw, x.fip, x.fdp, x.fop, x.st);
        assert_eq!(words(&a.x87), words(&b.x87));
    }
    for i in 0..16 {
        if components & xcr0::SSE != 0 {
            assert_eq!(a.vector.ymm[i][..16], b.vector.ymm[i][..16]);
        }
        if components & xcr0::AVX != 0 {
            assert_eq!(a.vector.ymm[i][16..], b.vector.ymm[i][16..]);
        }
    }
    if components & xcr0::PKRU != 0 {
        assert_eq!(a.pkru, b.pkru);
    }
}

#[test]
fn fxsave_and_fxrstor_are_inverse_and_leave_the_rest_alone() {
    let mut cpu = filled(1);
    let original = filled(1);
    assert_eq!(run(&mut cpu, FXSAVE, 0), None);
    let image = read::<512>(&cpu, OPERAND);
    assert_eq!(image[24..28], original.state.vector.mxcsr.to_le_bytes());
    assert_eq!(image[28..32], 0xffff_u32.to_le_bytes());
    assert_eq!(image[32..42], original.state.x87.st[0][..10]);
    assert_eq!(image[160..176], original.state.vector.ymm[0][..16]);
    assert_eq!(image[8..16], 0x1234_5678_9abc_u64.to_le_bytes());
    assert_eq!(image[416..], [0xcc; 96]);
    clear(&mut cpu);
    assert_eq!(run(&mut cpu, FXRSTOR, 0), None);
    same(&cpu, &original, xcr0::X87 | xcr0::SSE);
    assert_eq!(cpu.state.vector.mxcsr, original.state.vector.mxcsr);
    assert_eq!(cpu.state.vector.ymm[3][16..], [0; 16]);
}

#[test]
fn fxrstor_refuses_reserved_mxcsr_bits_and_misalignment() {
    let mut cpu = filled(2);
    assert_eq!(run(&mut cpu, FXRSTOR, 0), Some((vector::GP, Some(0))), "MXCSR is cccccccc");
    cpu.state.gpr.set(8, OPERAND + 8);
    assert_eq!(run(&mut cpu, FXSAVE, 0), Some((vector::GP, Some(0))));
    cpu.state.cr0 |= cr0::TS;
    assert_eq!(run(&mut cpu, FXSAVE, 0).map(|f| f.0), Some(vector::NM));
}

#[test]
fn every_save_form_restores() {
    for (save, restore) in
        [(XSAVE, XRSTOR), (XSAVEOPT, XRSTOR), (XSAVEC, XRSTOR), (XSAVES, XRSTORS), (XSAVEC, XRSTORS)]
    {
        for components in [ALL, xcr0::SSE, xcr0::X87 | xcr0::AVX, xcr0::PKRU, xcr0::AVX | xcr0::PKRU] {
            let mut cpu = filled(3);
            let original = filled(3);
            cpu.memory.write(OPERAND + 512, &[0; 64]);
            assert_eq!(run(&mut cpu, save, components), None);
            clear(&mut cpu);
            assert_eq!(run(&mut cpu, restore, components), None);
            same(&cpu, &original, components);
            let mut untouched = filled(3);
            clear(&mut untouched);
            same(&cpu, &untouched, ALL & !components);
        }
    }
}

#[test]
fn standard_and_compacted_formats_place_components() {
    let mut cpu = filled(4);
    cpu.memory.write(OPERAND + 512, &[0; 64]);
    assert_eq!(run(&mut cpu, XSAVE, ALL), None);
    let image = read::<3072>(&cpu, OPERAND);
    assert_eq!(image[512..520], ALL.to_le_bytes());
    assert_eq!(image[520..528], [0; 8]);
    assert_eq!(image[AVX_OFFSET..AVX_OFFSET + 16], cpu.state.vector.ymm[0][16..]);
    assert_eq!(image[PKRU_OFFSET..PKRU_OFFSET + 8], u64::from(cpu.state.pkru).to_le_bytes());
    assert_eq!(image[AVX_OFFSET + 256], 0xcc, "between components nothing is written");
    assert_eq!(run(&mut cpu, XSAVEC, ALL & !xcr0::AVX), None);
    let image = read::<3072>(&cpu, OPERAND);
    assert_eq!(image[512..520], (ALL & !xcr0::AVX).to_le_bytes());
    assert_eq!(image[520..528], (ALL & !xcr0::AVX | 1 << 63).to_le_bytes());
    assert_eq!(image[576..584], u64::from(cpu.state.pkru).to_le_bytes());
}

#[test]
fn initial_components_are_left_out_and_come_back_initial() {
    let mut cpu = filled(5);
    let before = filled(5);
    for ymm in &mut cpu.state.vector.ymm {
        ymm[16..].fill(0);
    }
    assert_eq!(xinuse(&cpu.state), ALL & !xcr0::AVX);
    cpu.memory.write(OPERAND + 512, &[0; 64]);
    assert_eq!(run(&mut cpu, XSAVEOPT, ALL), None);
    assert_eq!(read::<8>(&cpu, OPERAND + 512), (ALL & !xcr0::AVX).to_le_bytes());
    assert_eq!(read::<1>(&cpu, OPERAND + AVX_OFFSET as u64), [0xcc]);
    cpu.state.vector.ymm = before.state.vector.ymm;
    assert_eq!(run(&mut cpu, XRSTOR, ALL), None);
    assert!(cpu.state.vector.ymm.iter().all(|ymm| ymm[16..] == [0; 16]));
    // XSAVE keeps the header's bits of components it was not asked for.
    assert_eq!(run(&mut cpu, XSAVE, xcr0::X87), None);
    assert_eq!(read::<8>(&cpu, OPERAND + 512), (ALL & !xcr0::AVX).to_le_bytes());
    clear(&mut cpu);
    assert_eq!(xinuse(&cpu.state), 0);
}

#[test]
fn xrstor_refuses_bad_headers() {
    const COMPACT: u64 = 1 << 63;
    // XSTATE_BV, XCOMP_BV, a byte further on in the header; accepted by XRSTOR, by XRSTORS.
    let headers = [
        (ALL, 0, 0, true, false),
        (ALL | 1 << 5, 0, 0, false, false),
        (ALL, 1, 0, false, false),
        (xcr0::X87, COMPACT | ALL, 0, true, true),
        (ALL, COMPACT | xcr0::X87, 0, false, false),
        (xcr0::X87, COMPACT | ALL | 1 << 3, 0, false, false),
        (xcr0::X87, COMPACT | ALL, 1, false, false),
        (xcr0::X87, 0, 1, true, false),
    ];
    for (bv, comp, byte, plain, supervisor) in headers {
        let mut cpu = filled(6);
        let mut image = [0; 3072];
        image[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        image[512..520].copy_from_slice(&bv.to_le_bytes());
        image[520..528].copy_from_slice(&comp.to_le_bytes());
        image[540] = byte;
        cpu.memory.write(OPERAND, &image);
        let gp = Some((vector::GP, Some(0)));
        let context = format!("{bv:#x} {comp:#x} {byte}");
        assert_eq!(run(&mut cpu, XRSTOR, ALL), if plain { None } else { gp }, "XRSTOR {context}");
        assert_eq!(run(&mut cpu, XRSTORS, ALL), if supervisor { None } else { gp }, "XRSTORS {context}");
    }
}

#[test]
fn the_family_checks_privilege_alignment_and_enabling() {
    let mut cpu = filled(7);
    let gp = Some((vector::GP, Some(0)));
    cpu.state.cpl = 3;
    assert_eq!(run(&mut cpu, XSAVES, ALL), gp);
    assert_eq!(run(&mut cpu, XRSTORS, ALL), gp);
    cpu.state.cpl = 0;
    cpu.state.gpr.set(8, OPERAND + 32);
    assert_eq!(run(&mut cpu, XSAVE, ALL), gp);
    cpu.state.cr4 &= !cr4::OSXSAVE;
    assert_eq!(run(&mut cpu, XSAVE, ALL), Some((vector::UD, None)));
}

#[test]
fn a_save_that_faults_writes_nothing() {
    let mut cpu = filled(8);
    unmap(&mut cpu, 0x4000);
    cpu.memory.write(0x3c00, &[0xcc; 1024]);
    cpu.state.gpr.set(8, 0x3c00);
    assert_eq!(run(&mut cpu, XSAVE, ALL).map(|f| f.0), Some(vector::PF));
    assert_eq!(cpu.fault.address, 0x4000);
    assert_eq!(read::<1024>(&cpu, 0x3c00), [0xcc; 1024]);
}
