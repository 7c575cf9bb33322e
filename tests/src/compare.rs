//! The difference between two finals, less what the architecture or the vendors leave open.
//!
//! Flags that the SDM calls undefined are compared too, for the software CPU computes them with the host's own
//! arithmetic; where it does not, [`undefined_flags`] says so per mnemonic.

use std::fmt::Write;

use iced_x86::{Instruction, Mnemonic};
use x86defs::{rflags, vector};

use crate::case::{Case, FLAGS, Final, arena_offset};

/// Lines that say what differs, `native` first; empty if the finals agree.
pub fn differences(case: &Case, insn: &Instruction, native: &Final, soft: &Final) -> Vec<String> {
    let mut lines = Vec::new();
    if unordered(insn, native, soft) {
        return lines;
    }
    exceptions(native, soft, &mut lines);
    registers(insn, native, soft, &mut lines);
    fpu(native, soft, &mut lines);
    memory(case, native, soft, &mut lines);
    lines
}

/// Two faults of one instruction whose order the SDM leaves to the implementation.
fn unordered(insn: &Instruction, native: &Final, soft: &Final) -> bool {
    let one_is = |a: u8, b: u8| {
        let (n, s) = (native.exception.vector, soft.exception.vector);
        (n, s) == (a, b) || (n, s) == (b, a)
    };
    // "Priority Among Concurrent Events" has both in one class.
    if one_is(vector::AC, vector::PF) {
        return true;
    }
    // A near branch to a non-canonical address, against the faults of the stack access that goes with it.
    let branch = insn.flow_control() != iced_x86::FlowControl::Next;
    if branch && [vector::AC, vector::PF, vector::SS].into_iter().any(|v| one_is(v, vector::GP)) {
        return true;
    }
    // ENTER's check that the new top of stack is writable may include its alignment.
    if insn.mnemonic() == Mnemonic::Enter && native.exception.vector == vector::AC {
        return true;
    }
    // Some processors want the offset to be canonical too, where FS or GS makes a canonical address of it.
    let based = matches!(insn.memory_segment(), iced_x86::Register::FS | iced_x86::Register::GS);
    if based && native.exception.vector == vector::GP && soft.exception.address >> 63 != 0 {
        return true;
    }
    // UD0 and UD1 at the end of a page: vendors differ in whether the ModRM byte is fetched.
    let fetch = x86defs::pf_error::FETCH;
    insn.is_invalid() && native.exception.vector == vector::UD && soft.exception.error_code & fetch != 0
}

fn exceptions(native: &Final, soft: &Final, lines: &mut Vec<String>) {
    let (n, s) = (native.exception, soft.exception);
    let mut soft_code = s.error_code;
    if s.vector == vector::PF && s.address >= 0x7fff_ffff_f000 {
        // Linux shows user code that every page of the kernel's half is present.
        soft_code |= x86defs::pf_error::PRESENT;
    }
    if (n.vector, n.error_code, n.address) != (s.vector, soft_code, s.address) {
        lines.push(format!("exception  {}  |  {}", exception(native), exception(soft)));
    }
}

/// An exception in words.
pub fn exception(of: &Final) -> String {
    const NAMES: [&str; 22] = [
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "?9", "#TS", "#NP", "#SS", "#GP", "#PF", "?15",
        "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
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
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
];

fn registers(insn: &Instruction, native: &Final, soft: &Final, lines: &mut Vec<String>) {
    let (n, s) = (&native.registers, &soft.registers);
    // A POPA that faults half-way is executed again whole: what it loaded so far is nobody's business.
    let partial = matches!(insn.mnemonic(), Mnemonic::Popa | Mnemonic::Popad) && native.exception.vector == vector::PF;
    for (i, name) in GPR_NAMES.iter().enumerate() {
        if n.gpr[i] != s.gpr[i] && !(partial && i != 4) {
            lines.push(format!("{name}  {:#x}  |  {:#x}", n.gpr[i], s.gpr[i]));
        }
    }
    if n.rip != s.rip {
        lines.push(format!("rip  {:#x}  |  {:#x}", n.rip, s.rip));
    }
    let mask = FLAGS & !undefined_flags(insn);
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

/// Status flags that an instruction leaves undefined and that the software CPU does not take from the host's own
/// instruction: they are not compared.
pub fn undefined_flags(insn: &Instruction) -> u64 {
    const AF_PF: u64 = rflags::AF | rflags::PF;
    match insn.mnemonic() {
        // No host division is executed where it could fault.
        Mnemonic::Div | Mnemonic::Idiv => rflags::STATUS,
        Mnemonic::Andn | Mnemonic::Blsi | Mnemonic::Blsmsk | Mnemonic::Blsr | Mnemonic::Bzhi => AF_PF,
        Mnemonic::Bextr => AF_PF | rflags::SF,
        // Decimal adjustment does not exist in 64-bit mode, which the software CPU itself runs in.
        Mnemonic::Aaa | Mnemonic::Aas => rflags::OF | rflags::SF | rflags::ZF | rflags::PF,
        Mnemonic::Aad | Mnemonic::Aam => rflags::OF | rflags::AF | rflags::CF,
        Mnemonic::Daa | Mnemonic::Das => rflags::OF,
        _ => 0,
    }
}

fn fpu(native: &Final, soft: &Final, lines: &mut Vec<String>) {
    let (n, s) = (&native.registers.fpu, &soft.registers.fpu);
    let words = [
        ("fcw", u32::from(n.fcw), u32::from(s.fcw)),
        ("fsw", u32::from(n.fsw), u32::from(s.fsw)),
        ("ftw", u32::from(n.ftw), u32::from(s.ftw)),
        ("mxcsr", n.mxcsr, s.mxcsr),
    ];
    for (name, n, s) in words {
        if n != s {
            lines.push(format!("{name}  {n:#x}  |  {s:#x}"));
        }
    }
    for i in 0..8 {
        if n.st[i] != s.st[i] {
            lines.push(format!("st{i}  {}  |  {}", hex(&n.st[i]), hex(&s.st[i])));
        }
    }
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
        lines.push(format!("memory+{:#x}  {:#04x}  |  {:#04x}", arena_offset(i), native.image[i], soft.image[i]));
    }
    if wrong.len() > MOST {
        lines.push(format!("and {} more bytes of memory", wrong.len() - MOST));
    }
}
