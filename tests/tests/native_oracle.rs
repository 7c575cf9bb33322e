//! The oracle itself: known instructions with the results that the SDM gives them, and differences that must be seen.

use turtles_tests::case::{
    Bits, CODE, Case, DATA, HIGH, IMAGE_CODE, IMAGE_SIZE, LOW, Outcome, Registers, STOP,
};
use turtles_tests::compare::differences;
use turtles_tests::generate::decode;
use turtles_tests::native::Native;
use x86defs::{pf_error, rflags, vector};

fn case(bits: Bits, code: &[u8]) -> Case {
    let mut image = Box::new([0; IMAGE_SIZE]);
    image[IMAGE_CODE..].fill(STOP);
    image[IMAGE_CODE..IMAGE_CODE + code.len()].copy_from_slice(code);
    let start = Registers {
        gpr: [0; 16],
        rip: LOW + CODE,
        rflags: 0,
        fs_base: 0,
        gs_base: 0,
        fpu: Default::default(),
    };
    Case { bits, start, image, code_len: code.len(), open: Vec::new() }
}

/// Executes a case; none if the host cannot be the oracle.
fn native(case: &Case) -> Option<turtles_tests::case::Final> {
    let mut native = match Native::new() {
        Ok(native) => native,
        Err(why) => {
            println!("SKIP native_oracle: {why}");
            return None;
        }
    };
    match native.execute(&[case]).pop() {
        Some(Outcome::Done(done)) => Some(*done),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_addition_and_its_flags() {
    // add rax, rcx
    let mut case = case(Bits::B64, &[0x48, 0x01, 0xc8]);
    case.start.gpr[0] = u64::MAX;
    case.start.gpr[1] = 1;
    let Some(end) = native(&case) else { return };
    assert_eq!(end.exception.vector, vector::BP);
    assert_eq!(end.registers.rip, LOW + CODE + 4);
    assert_eq!(end.registers.gpr[0], 0);
    let set = rflags::CF | rflags::PF | rflags::AF | rflags::ZF;
    assert_eq!(end.registers.rflags & rflags::STATUS, set);
}

#[test]
fn a_write_to_a_hole() {
    // mov [rbx], eax
    let mut case = case(Bits::B64, &[0x89, 0x03]);
    case.start.gpr[3] = HIGH + DATA - 2;
    let Some(end) = native(&case) else { return };
    assert_eq!(end.exception.vector, vector::PF);
    assert_eq!(end.exception.error_code, pf_error::WRITE | pf_error::USER);
    assert_eq!(end.exception.address, HIGH + DATA - 2);
    assert_eq!(end.registers.rip, LOW + CODE);
}

#[test]
fn compatibility_mode_has_decimal_adjustment() {
    // aam: 123 = 12 * 10 + 3
    let mut case = case(Bits::B32, &[0xd4, 10]);
    case.start.gpr[0] = 123;
    let Some(end) = native(&case) else { return };
    assert_eq!(end.exception.vector, vector::BP);
    assert_eq!(end.registers.gpr[0], 12 << 8 | 3);
}

#[test]
fn a_system_call_is_stopped() {
    let mut native = match Native::new() {
        Ok(native) => native,
        Err(why) => return println!("SKIP native_oracle: {why}"),
    };
    let mut call = case(Bits::B64, &[0x0f, 0x05]);
    // exit_group, which the child's own loop may call
    call.start.gpr[0] = 231;
    let good = case(Bits::B64, &[0x90]);
    let outcomes = native.execute(&[&call, &good]);
    assert!(matches!(outcomes[0], Outcome::Skipped(_)), "{:?}", outcomes[0]);
    assert!(matches!(outcomes[1], Outcome::Done(_)), "{:?}", outcomes[1]);
}

#[test]
fn every_kind_of_difference_is_seen() {
    let case = case(Bits::B64, &[0x90]);
    let Some(end) = native(&case) else { return };
    let insn = decode(Bits::B64, &[0x90], LOW + CODE);
    assert!(differences(&case, &insn, &end, &end).is_empty());
    let changes: [fn(&mut turtles_tests::case::Final); 9] = [
        |f| f.registers.gpr[7] ^= 1 << 63,
        |f| f.registers.rip += 1,
        |f| f.registers.rflags ^= rflags::AF,
        |f| f.registers.fpu.mxcsr ^= 1,
        |f| f.registers.fpu.ymm[15][31] ^= 1,
        |f| f.registers.fpu.st[7][9] ^= 1,
        |f| f.registers.fpu.fsw ^= 1 << 11,
        |f| f.image[0] ^= 1,
        |f| f.exception.vector = vector::UD,
    ];
    for change in changes {
        let mut other = end.clone();
        change(&mut other);
        assert_eq!(differences(&case, &insn, &end, &other).len(), 1);
    }
}
