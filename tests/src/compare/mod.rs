//! The difference between two finals, less what the architecture or the vendors leave open.
//!
//! Flags that the SDM calls undefined are compared too, for the software CPU computes them with the host's own
//! arithmetic; where it does not, [`open::flags`] says so per mnemonic.

pub mod open;

use std::fmt::Write;

use iced_x86::Instruction;
use x86defs::{rflags, vector};

use crate::case::{Case, Exception, FLAGS, Final, arena_offset};

/// Lines that say what differs, `native` first; empty if the finals agree.
pub fn differences(case: &Case, insn: &Instruction, native: &Final, soft: &Final) -> Vec<String> {
    let mut lines = Vec::new();
    if open::either_fault(case, insn, native, soft) {
        return lines;
    }
    exceptions(native, soft, &mut lines);
    registers(insn, native, soft, &mut lines);
    if !open::vectors(insn, native) {
        vectors(insn, native, soft, &mut lines);
    }
    if !open::x87(insn, native) {
        x87(native, soft, &mut lines);
    }
    memory(case, native, soft, &mut lines);
    lines
}

fn exceptions(native: &Final, soft: &Final, lines: &mut Vec<String>) {
    // Linux shows user code that every page of the kernel's half is present.
    let shown = |e: Exception| {
        let kernel = e.vector == vector::PF && e.address >= 0x7fff_ffff_f000;
        let code = e.error_code | if kernel { x86defs::pf_error::PRESENT } else { 0 };
        (e.vector, code, e.address)
    };
    if shown(native.exception) != shown(soft.exception) {
        lines.push(format!("exception  {}  |  {}", exception(native), exception(soft)));
    }
}

/// An exception in words.
pub fn exception(of: &Final) -> String {
    const NAMES: [&str; 22] = [
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "?9", "#TS", "#NP", "#SS", "#GP",
        "#PF", "?15", "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
    ];
    let e = of.exception;
    let mut text = NAMES.get(usize::from(e.vector)).map_or(format!("vector {}", e.vector), |&n| n.to_owned());
    if matches!(e.vector, 8 | 10..=14 | 17 | 21) {
        let _ = write!(text, "({:#x})", e.error_code);
    }
    if e.vector == vector::PF {
        let _ = write!(text, " at {:#x}", e.address);
    }
    text
}

const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

fn registers(insn: &Instruction, native: &Final, soft: &Final, lines: &mut Vec<String>) {
    let (n, s) = (&native.registers, &soft.registers);
    let partial = open::loaded_registers(insn, native);
    for (i, name) in GPR_NAMES.iter().enumerate() {
        if n.gpr[i] != s.gpr[i] && !(partial && i != 4) {
            lines.push(format!("{name}  {:#x}  |  {:#x}", n.gpr[i], s.gpr[i]));
        }
    }
    if n.rip != s.rip {
        lines.push(format!("rip  {:#x}  |  {:#x}", n.rip, s.rip));
    }
    let mask = FLAGS & !open::flags(insn);
    if (n.rflags ^ s.rflags) & mask != 0 {
        let wrong = (n.rflags ^ s.rflags) & mask;
        lines.push(format!("rflags  {}  |  {}  ({})", flags(n.rflags), flags(s.rflags), flags(wrong)));
    }
}

/// The flags set in an RFLAGS image, by name.
pub fn flags(value: u64) -> String {
    const NAMES: [(u64, &str); 13] = [
        (rflags::CF, "CF"),
        (rflags::PF, "PF"),
        (rflags::AF, "AF"),
        (rflags::ZF, "ZF"),
        (rflags::SF, "SF"),
        (rflags::TF, "TF"),
        (rflags::IF, "IF"),
        (rflags::DF, "DF"),
        (rflags::OF, "OF"),
        (rflags::IOPL, "IOPL"),
        (rflags::NT, "NT"),
        (rflags::AC, "AC"),
        (rflags::ID, "ID"),
    ];
    let set: Vec<&str> = NAMES.iter().filter(|(bit, _)| value & bit != 0).map(|&(_, name)| name).collect();
    format!("[{}]", set.join(" "))
}

fn word(name: &str, n: u32, s: u32, lines: &mut Vec<String>) {
    if n != s {
        lines.push(format!("{name}  {n:#x}  |  {s:#x}"));
    }
}

fn x87(native: &Final, soft: &Final, lines: &mut Vec<String>) {
    let (n, s) = (&native.registers.fpu, &soft.registers.fpu);
    word("fcw", n.fcw.into(), s.fcw.into(), lines);
    word("fsw", n.fsw.into(), s.fsw.into(), lines);
    word("ftw", n.ftw.into(), s.ftw.into(), lines);
    for i in 0..8 {
        if n.st[i] != s.st[i] {
            lines.push(format!("st{i}  {}  |  {}", hex(&n.st[i]), hex(&s.st[i])));
        }
    }
}

fn vectors(insn: &Instruction, native: &Final, soft: &Final, lines: &mut Vec<String>) {
    let (n, s) = (&native.registers.fpu, &soft.registers.fpu);
    let mask = open::mxcsr(insn, native);
    word("mxcsr", n.mxcsr & !mask, s.mxcsr & !mask, lines);
    for i in 0..16 {
        if n.ymm[i] != s.ymm[i] {
            lines.push(format!("ymm{i}  {}  |  {}", hex(&n.ymm[i]), hex(&s.ymm[i])));
        }
    }
}

/// Bytes as one number, the highest first.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn memory(case: &Case, native: &Final, soft: &Final, lines: &mut Vec<String>) {
    if native.image == soft.image {
        return;
    }
    const MOST: usize = 12;
    let open = |index: usize| case.open.iter().any(|&(start, len, _)| index.wrapping_sub(start) < len);
    let wrong: Vec<usize> =
        (0..native.image.len()).filter(|&i| native.image[i] != soft.image[i] && !open(i)).collect();
    for &i in wrong.iter().take(MOST) {
        lines.push(format!(
            "memory+{:#x}  {:#04x}  |  {:#04x}",
            arena_offset(i),
            native.image[i],
            soft.image[i]
        ));
    }
    if wrong.len() > MOST {
        lines.push(format!("and {} more bytes of memory", wrong.len() - MOST));
    }
}
