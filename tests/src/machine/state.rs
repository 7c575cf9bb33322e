//! How two vCPUs' states differ.

use turtles_cpu::state::CpuState;

const GPR: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// Lines that say what differs, `one` first; empty if the states are the same, to the instruction and the bit.
pub fn differences(one: &CpuState, other: &CpuState) -> Vec<String> {
    let mut lines = Vec::new();
    let mut number = |name: &str, a: u64, b: u64| {
        if a != b {
            lines.push(format!("{name}  {a:#x}  |  {b:#x}"));
        }
    };
    for (i, name) in GPR.iter().enumerate() {
        number(name, one.gpr.get(i), other.gpr.get(i));
    }
    number("rip", one.rip, other.rip);
    number("rflags", one.rflags(), other.rflags());
    number("instructions", one.instructions, other.instructions);
    number("stalls", one.stalls, other.stalls);
    for (name, a, b) in [
        ("cr0", one.cr0, other.cr0),
        ("cr2", one.cr2, other.cr2),
        ("cr3", one.cr3, other.cr3),
        ("cr4", one.cr4, other.cr4),
        ("dr6", one.dr6, other.dr6),
        ("dr7", one.dr7, other.dr7),
        ("pending debug exceptions", one.pending_debug, other.pending_debug),
        ("cpl", one.cpl.into(), other.cpl.into()),
        ("mxcsr", one.vector.mxcsr.into(), other.vector.mxcsr.into()),
        ("fcw", one.x87.fcw.into(), other.x87.fcw.into()),
        ("fsw", one.x87.fsw.into(), other.x87.fsw.into()),
        ("ftw", one.x87.ftw.into(), other.x87.ftw.into()),
        ("fop", one.x87.fop.into(), other.x87.fop.into()),
        ("fip", one.x87.fip, other.x87.fip),
        ("fdp", one.x87.fdp, other.x87.fdp),
    ] {
        number(name, a, b);
    }
    for i in 0..4 {
        number(&format!("dr{i}"), one.dr[i], other.dr[i]);
    }
    let hex = |bytes: &[u8]| crate::compare::hex(bytes);
    for i in 0..16 {
        let (a, b) = (&one.vector.ymm[i], &other.vector.ymm[i]);
        if a != b {
            lines.push(format!("ymm{i}  {}  |  {}", hex(a), hex(b)));
        }
    }
    for i in 0..8 {
        let (a, b) = (&one.x87.st[i][..10], &other.x87.st[i][..10]);
        if a != b {
            lines.push(format!("st{i}  {}  |  {}", hex(a), hex(b)));
        }
    }
    rest(one, other, &mut lines);
    lines
}

fn rest(one: &CpuState, other: &CpuState, lines: &mut Vec<String>) {
    if one.segments != other.segments || (one.ldtr, one.tr) != (other.ldtr, other.tr) {
        lines.push(format!("segments  {:x?}  |  {:x?}", one.segments, other.segments));
    }
    if (one.gdtr, one.idtr) != (other.gdtr, other.idtr) {
        lines.push("gdtr or idtr".to_owned());
    }
    if (one.activity, one.shadow) != (other.activity, other.shadow) {
        let say = |s: &CpuState| format!("{:?}, shadow {:?}", s.activity, s.shadow);
        lines.push(format!("activity  {}  |  {}", say(one), say(other)));
    }
    if (one.nmi_blocked, one.injected, one.pkru) != (other.nmi_blocked, other.injected, other.pkru) {
        lines.push("NMI blocking, injected event or PKRU".to_owned());
    }
    let msrs = |s: &CpuState| {
        let m = &s.msrs;
        let bases = [m.star, m.lstar, m.fmask, m.kernel_gs_base, m.debugctl, m.tsc_aux, m.tsc_adjust];
        (bases, s.efer, s.xcr0)
    };
    if msrs(one) != msrs(other) {
        lines.push(format!("MSRs  {:x?}  |  {:x?}", msrs(one), msrs(other)));
    }
}
