//! x87 instructions against the host, and their images in memory and exceptions by table.

use iced_x86::{Decoder, DecoderOptions};
use x86defs::{cr0, vector};

use crate::Cpu;
use crate::interp::host_compare::{
    MEMORY, OPERAND, Random, compare, cpu, decode, execute, raised, randomise, read,
};
use crate::native::oracle::{Machine, available, instructions};
use crate::state::{SLOT_BLOCK_IP, Seg, Segment, X87State};

#[test]
fn x87_instructions_match_the_host() {
    let table = instructions!(
        turtles_test_x87,
        "fadd st, st(1)",
        "fadd dword ptr [r8]",
        "fadd qword ptr [r8]",
        "faddp st(2), st",
        "fiadd word ptr [r8]",
        "fisub dword ptr [r8]",
        "fsubr st, st(3)",
        "fmul qword ptr [r8]",
        "fdiv st(1), st",
        "fdivr dword ptr [r8]",
        "fidiv word ptr [r8]",
        "fld st(2)",
        "fld dword ptr [r8]",
        "fld qword ptr [r8]",
        "fld tbyte ptr [r8]",
        "fild word ptr [r8]",
        "fild dword ptr [r8]",
        "fild qword ptr [r8]",
        "fbld [r8]",
        "fst dword ptr [r8]",
        "fst qword ptr [r8]",
        "fstp dword ptr [r8]",
        "fstp qword ptr [r8]",
        "fstp tbyte ptr [r8]",
        "fstp st(3)",
        "fist word ptr [r8]",
        "fistp dword ptr [r8]",
        "fistp qword ptr [r8]",
        "fisttp word ptr [r8]",
        "fbstp [r8]",
        "fld1",
        "fldz",
        "fldpi",
        "fldl2e",
        "fabs",
        "fchs",
        "fsqrt",
        "frndint",
        "fscale",
        "fxtract",
        "fprem",
        "fprem1",
        "fsin",
        "fcos",
        "fsincos",
        "fptan",
        "fpatan",
        "f2xm1",
        "fyl2x",
        "fyl2xp1",
        "fxam",
        "ftst",
        "fxch st(2)",
        "fcom st(1)",
        "fcom dword ptr [r8]",
        "fcompp",
        "fucom st(2)",
        "fucompp",
        "ficom word ptr [r8]",
        "fcomi st, st(1)",
        "fcomip st, st(2)",
        "fucomi st, st(3)",
        "fucomip st, st(1)",
        "fcmovb st, st(1)",
        "fcmovne st, st(2)",
        "fcmovu st, st(3)",
        "fcmovnbe st, st(1)",
        "fincstp",
        "fdecstp",
        "ffree st(2)",
        "fnop",
        "fninit",
        "fnclex",
        "fldcw [r8]",
        "fnstcw [r8]",
        "fnstsw [r8]",
        "fnstsw ax",
    );
    compare(&table, 120);
}

#[test]
fn environment_images_match_the_host() {
    // Environment size, and which instructions those in hexadecimal (16-bit formats) are.
    let table = instructions!(
        turtles_test_environment,
        "fnstenv [r8]",
        "fnsave [r8]",
        "fldenv [r8]",
        "frstor [r8]",
        ".byte 0x66, 0x41, 0xd9, 0x30 # fnstenv",
        ".byte 0x66, 0x41, 0xdd, 0x30 # fnsave",
        ".byte 0x66, 0x41, 0xd9, 0x20 # fldenv",
        ".byte 0x66, 0x41, 0xdd, 0x20 # frstor",
    );
    if !available() {
        println!("SKIP: the native oracle needs AVX2");
        return;
    }
    let (mut cpu, mut machine, mut random) = (cpu(), Machine::new(), Random(42));
    for (text, code) in table {
        // Hosts differ in the last-instruction pointers.
        let (pointers, width) = if text.starts_with('.') { (6..14, 2) } else { (12..28, 4) };
        for round in 0..200 {
            let mut memory = [0; MEMORY];
            randomise(&mut cpu, &mut machine, &mut memory, &mut random);
            let mut native = [0; 256];
            let at = 64 - (native.as_ptr() as usize & 31);
            native[at..at + MEMORY].copy_from_slice(&memory);
            cpu.memory.write(OPERAND, &memory);
            cpu.state.gpr.set(8, OPERAND);
            // SAFETY: instructions on x87 state and at most 108 bytes at R8.
            unsafe { machine.execute(code.as_ptr(), &mut native) };
            assert_eq!(execute(&mut cpu, decode(code)), Ok(()), "{text}");
            let mut ours = read::<MEMORY>(&cpu, OPERAND);
            let theirs = &mut native[at..at + MEMORY];
            ours[pointers.clone()].fill(0);
            theirs[pointers.clone()].fill(0);
            assert_eq!(ours[..], *theirs, "{text} ({width}-byte fields), round {round}");
            let words = |x: &X87State| (x.fcw, x.fsw, x.ftw);
            assert_eq!(words(&cpu.state.x87), words(&machine.x87), "{text}, round {round}: {memory:02x?}");
            for i in 0..8 {
                assert_eq!(
                    cpu.state.x87.st[i][..10],
                    machine.x87.st[i][..10],
                    "{text}, round {round}: st{i}"
                );
            }
        }
    }
}

#[test]
fn pending_exceptions_stop_waiting_instructions_only() {
    let table = instructions!(
        turtles_test_pending,
        "fadd st, st(1)",
        "fld1",
        "fldcw [r8]",
        "fwait",
        "fldenv [r8]",
        "fnop",
        "movq mm0, mm1",
        "frstor [r8]",
        "fnstsw ax",
        "fnstcw [r8]",
        "fnclex",
        "fnstenv [r8]",
        "fninit",
        "fnsave [r8]",
        "fxsave [r8]",
        "movaps xmm0, xmm1",
    );
    for (i, (text, code)) in table.into_iter().enumerate() {
        let mut cpu = cpu();
        cpu.state.gpr.set(8, OPERAND);
        cpu.state.x87.fsw = 4;
        cpu.state.x87.set_control(0x37b);
        assert_eq!(cpu.state.x87.fsw, 0x8084, "ES and B follow the masks");
        let expected = if i < 8 { Some((vector::MF, None)) } else { None };
        assert_eq!(raised(&mut cpu, decode(code)), expected, "{text}");
    }
}

#[test]
fn fwait_needs_both_mp_and_ts_to_raise_nm() {
    let code = instructions!(turtles_test_fwait, "fwait")[0].1;
    for (bits, expected) in
        [(0, None), (cr0::MP, None), (cr0::TS, None), (cr0::MP | cr0::TS, Some(vector::NM))]
    {
        let mut cpu = cpu();
        cpu.state.cr0 = cpu.state.cr0 & !(cr0::MP | cr0::TS) | bits;
        assert_eq!(raised(&mut cpu, decode(code)).map(|f| f.0), expected);
    }
}

#[test]
fn last_instruction_pointers_follow_the_rules() {
    let table =
        instructions!(turtles_test_pointers, "fld1", "fidiv word ptr [r8 + 4]", "fldcw [r8]", "fninit");
    let [fld1, fidiv, fldcw, fninit] = [0, 1, 2, 3].map(|i: usize| table[i].1);
    let mut cpu = cpu();
    let run = |cpu: &mut Cpu, code: &'static [u8], ip: u64| {
        cpu.state.gpr.raw[usize::from(SLOT_BLOCK_IP) / 8] = ip;
        assert_eq!(raised(cpu, decode(code)), None);
        (cpu.state.x87.fip, cpu.state.x87.fdp, cpu.state.x87.fop)
    };
    cpu.state.gpr.set(8, OPERAND);
    // The divisor at OPERAND + 4 is 0; the control word at OPERAND unmasks division by zero.
    cpu.memory.write(OPERAND, &[0x7b, 3, 0, 0, 0, 0]);
    assert_eq!(run(&mut cpu, fld1, 0x1_2345_6789), (0x1_2345_6789, 0, 0));
    assert_eq!(run(&mut cpu, fidiv, 0x2000), (0x2000, 0, 0), "masked: no data pointer, no opcode");
    cpu.state.x87.fsw &= !0x3f;
    run(&mut cpu, fld1, 0x2800);
    assert_eq!(run(&mut cpu, fldcw, 0x3000), (0x2800, 0, 0), "control instructions leave them");
    // DE /6 with an 8-bit displacement from R8.
    assert_eq!(run(&mut cpu, fidiv, 0x4000), (0x4000, OPERAND + 4, 0x670));
    assert_eq!(cpu.state.x87.fsw & 0x80, 0x80, "pending");
    assert_eq!(run(&mut cpu, fninit, 0x5000), (0, 0, 0));
}

#[test]
fn images_of_real_mode_hold_addresses_in_pieces() {
    // fnstenv [bx], fldenv [bx], with and without operand-size prefix.
    let images: [(&[u8], &[u8], usize); 2] =
        [(&[0xd9, 0x37], &[0xd9, 0x27], 14), (&[0x66, 0xd9, 0x37], &[0x66, 0xd9, 0x27], 28)];
    for (store, load, size) in images {
        let mut cpu = cpu();
        cpu.state.cr0 &= !(cr0::PE | cr0::PG);
        cpu.state.efer = 0;
        *cpu.state.seg_mut(Seg::Cs) = Segment::real(0);
        *cpu.state.seg_mut(Seg::Ds) = Segment::real(0);
        cpu.state_changed();
        cpu.state.gpr.set(3, OPERAND);
        (cpu.state.x87.fip, cpu.state.x87.fdp, cpu.state.x87.fop) = (0x5_4321, 0xa_bcde, 0x123);
        let insn = |code| Decoder::new(16, code, DecoderOptions::NONE).decode();
        assert_eq!(raised(&mut cpu, insn(store)), None);
        let image = read::<28>(&cpu, OPERAND);
        if size == 14 {
            assert_eq!(image[6..14], [0x21, 0x43, 0x23, 0x51, 0xde, 0xbc, 0, 0xa0]);
        } else {
            assert_eq!(image[12..28], [0x21, 0x43, 0, 0, 0x23, 0x51, 0, 0, 0xde, 0xbc, 0, 0, 0, 0xa0, 0, 0]);
        }
        (cpu.state.x87.fip, cpu.state.x87.fdp, cpu.state.x87.fop) = (0, 0, 0);
        assert_eq!(raised(&mut cpu, insn(load)), None);
        assert_eq!((cpu.state.x87.fip, cpu.state.x87.fdp, cpu.state.x87.fop), (0x5_4321, 0xa_bcde, 0x123));
    }
}
