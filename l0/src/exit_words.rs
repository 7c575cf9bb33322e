//! An exit's details in words: what its qualification and the registers say, without the reason's name.

use turtles_cpu::state::{CpuState, Event, EventKind, reg};
use turtles_cpu::vmx::VmExit;
use x86defs::vmx::{ept_qualification as ept, event, reason};

const REGISTERS: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14",
    "R15",
];

/// Vectors 0 to 21.
const EXCEPTIONS: [&str; 22] = [
    "#DE",
    "#DB",
    "NMI",
    "#BP",
    "#OF",
    "#BR",
    "#UD",
    "#NM",
    "#DF",
    "vector 9",
    "#TS",
    "#NP",
    "#SS",
    "#GP",
    "#PF",
    "vector 15",
    "#MF",
    "#AC",
    "#MC",
    "#XM",
    "#VE",
    "#CP",
];

const PAGE_FAULT: u32 = 14;

/// What is to be said beside the reason's name; empty if nothing is. The registers are still the guest's.
pub fn details(exit: &VmExit, state: &CpuState) -> String {
    let mut text = match exit.reason {
        reason::EXCEPTION_OR_NMI => exception(exit),
        reason::EXTERNAL_INTERRUPT if exit.interruption & event::VALID != 0 => {
            format!("vector {:#x}", exit.interruption & event::VECTOR)
        }
        reason::EPT_VIOLATION => ept_violation(exit),
        reason::EPT_MISCONFIGURATION => format!("at {:#x}", exit.guest_physical),
        reason::SIPI => format!("vector {:#x}", exit.qualification),
        reason::APIC_ACCESS => apic_access(exit.qualification),
        reason::APIC_WRITE => format!("offset {:#x}", exit.qualification),
        reason::VIRTUALIZED_EOI => format!("vector {:#x}", exit.qualification),
        reason::TASK_SWITCH => task_switch(exit.qualification),
        _ => instruction(exit, state),
    };
    if exit.idt_vectoring & event::VALID != 0 {
        let separator = if text.is_empty() { "" } else { ", " };
        text += separator;
        text += "while delivering ";
        text += &interruption(exit.idt_vectoring, exit.idt_vectoring_error);
    }
    text
}

fn instruction(exit: &VmExit, state: &CpuState) -> String {
    let qualification = exit.qualification;
    let low = |register: usize| state.gpr.get(register) & 0xffff_ffff;
    match exit.reason {
        reason::CPUID => format!("leaf {:#x}, subleaf {:#x}", low(reg::RAX), low(reg::RCX)),
        reason::CR_ACCESS => control_register(qualification),
        reason::MOV_DR => {
            let register = REGISTERS[(qualification >> 8 & 15) as usize];
            let debug = qualification & 7;
            let from = qualification >> 4 & 1 != 0;
            if from { format!("{register} from DR{debug}") } else { format!("DR{debug} from {register}") }
        }
        reason::IO_INSTRUCTION => port(qualification, low(reg::RAX)),
        reason::RDMSR => format!("{:#x}", low(reg::RCX)),
        reason::WRMSR => format!("{:#x} = {:#x}", low(reg::RCX), low(reg::RDX) << 32 | low(reg::RAX)),
        reason::VMCALL => format!("RAX {:#x}", state.gpr.get(reg::RAX)),
        reason::VMFUNC => format!("function {}, RCX {:#x}", low(reg::RAX), low(reg::RCX)),
        reason::XSETBV => format!("XCR{} = {:#x}", low(reg::RCX), low(reg::RDX) << 32 | low(reg::RAX)),
        reason::INVLPG => format!("{qualification:#x}"),
        reason::GDTR_IDTR_ACCESS => {
            pick(exit.instruction_information >> 28, ["SGDT", "SIDT", "LGDT", "LIDT"])
        }
        reason::LDTR_TR_ACCESS => pick(exit.instruction_information >> 28, ["SLDT", "STR", "LLDT", "LTR"]),
        _ => String::new(),
    }
}

/// What a VMX instruction in root operation was given.
pub fn operands(exit: &VmExit) -> String {
    match exit.reason {
        reason::VMXON | reason::VMPTRLD | reason::VMCLEAR => format!("{:#x}", exit.operand),
        reason::INVEPT | reason::INVVPID => {
            format!("type {:#x}, {:#x} {:#x}", exit.operand, exit.descriptor[0], exit.descriptor[1])
        }
        _ => String::new(),
    }
}

fn pick(index: u32, names: [&str; 4]) -> String {
    names[(index & 3) as usize].into()
}

fn exception(exit: &VmExit) -> String {
    let text = interruption(exit.interruption, exit.interruption_error);
    let is_page_fault = exit.interruption & (event::TYPE | event::VECTOR)
        == event::HARDWARE_EXCEPTION << event::TYPE_SHIFT | PAGE_FAULT;
    if is_page_fault { format!("{text} at {:#x}", exit.qualification) } else { text }
}

/// An event in the format of interruption information.
pub fn interruption(information: u32, error_code: u32) -> String {
    let vector = information & event::VECTOR;
    let text = match (information & event::TYPE) >> event::TYPE_SHIFT {
        event::EXTERNAL_INTERRUPT => format!("interrupt {vector:#x}"),
        event::NMI => "NMI".into(),
        event::SOFTWARE_INTERRUPT => format!("INT {vector:#x}"),
        event::OTHER => "a pending monitor trap".into(),
        _ => exception_name(vector),
    };
    if information & event::ERROR_CODE_VALID == 0 {
        return text;
    }
    format!("{text} with error code {error_code:#x}")
}

/// An event about to be delivered.
pub fn injected(event: &Event) -> String {
    let vector = u32::from(event.vector);
    let text = match event.kind {
        EventKind::ExternalInterrupt => format!("interrupt {vector:#x}"),
        EventKind::Nmi => "NMI".into(),
        EventKind::SoftwareInterrupt => format!("INT {vector:#x}"),
        EventKind::HardwareException
        | EventKind::PrivilegedSoftwareException
        | EventKind::SoftwareException => exception_name(vector),
    };
    match event.error_code {
        Some(code) => format!("{text} with error code {code:#x}"),
        None => text,
    }
}

fn exception_name(vector: u32) -> String {
    EXCEPTIONS.get(vector as usize).map_or_else(|| format!("vector {vector:#x}"), |name| (*name).into())
}

fn ept_violation(exit: &VmExit) -> String {
    let has = |bits: u64| exit.qualification & bits != 0;
    let access = match (has(ept::READ), has(ept::WRITE), has(ept::FETCH)) {
        (_, _, true) => "fetch",
        (true, true, _) => "read and write",
        (_, true, _) => "write",
        _ => "read",
    };
    let allowed: String =
        [(ept::READABLE, 'r'), (ept::WRITABLE, 'w'), (ept::EXECUTABLE, 'x'), (ept::USER_EXECUTABLE, 'u')]
            .into_iter()
            .filter_map(|(bit, letter)| has(bit).then_some(letter))
            .collect();
    let allowed = if allowed.is_empty() { "not mapped".into() } else { format!("mapped {allowed}") };
    let linear = if !has(ept::LINEAR_VALID) {
        String::new()
    } else if has(ept::FINAL_TRANSLATION) {
        format!(", linear {:#x}", exit.guest_linear)
    } else {
        format!(", walking for linear {:#x}", exit.guest_linear)
    };
    format!("{access} at {:#x}, {allowed}{linear}", exit.guest_physical)
}

fn apic_access(qualification: u64) -> String {
    let kind = match qualification >> 12 & 15 {
        0 => "read",
        1 => "write",
        2 => "fetch",
        3 => "event delivery",
        10 => "physical access in event delivery",
        15 => "physical access",
        _ => "access",
    };
    format!("{kind}, offset {:#x}", qualification & 0xfff)
}

fn task_switch(qualification: u64) -> String {
    let by = pick((qualification >> 30) as u32, ["CALL", "IRET", "JMP", "task gate"]);
    format!("to {:#x} by {by}", qualification & 0xffff)
}

fn control_register(qualification: u64) -> String {
    let control = qualification & 15;
    let register = REGISTERS[(qualification >> 8 & 15) as usize];
    match qualification >> 4 & 3 {
        0 => format!("CR{control} from {register}"),
        1 => format!("{register} from CR{control}"),
        2 => "CLTS".into(),
        _ => format!("LMSW {:#x}", qualification >> 16 & 0xffff),
    }
}

fn port(qualification: u64, rax: u64) -> String {
    let size = (qualification & 7) + 1;
    let port = qualification >> 16 & 0xffff;
    let string = qualification >> 4 & 1 != 0;
    let repeated = if qualification >> 5 & 1 != 0 { "REP " } else { "" };
    let is_in = qualification >> 3 & 1 != 0;
    match (string, is_in) {
        (true, true) => format!("{repeated}INS, port {port:#x}, {size} bytes"),
        (true, false) => format!("{repeated}OUTS, port {port:#x}, {size} bytes"),
        (false, true) => format!("IN, port {port:#x}, {size} bytes"),
        (false, false) => {
            let value = rax & (u64::MAX >> (64 - 8 * size.min(8)));
            format!("OUT {value:#x}, port {port:#x}, {size} bytes")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(exit: VmExit) -> String {
        let mut state = CpuState::reset();
        state.gpr.set(reg::RAX, 0x1_0000_0041);
        state.gpr.set(reg::RCX, 0x277);
        state.gpr.set(reg::RDX, 5);
        details(&exit, &state)
    }

    fn of(reason: u32, qualification: u64) -> String {
        words(VmExit { reason, qualification, ..VmExit::default() })
    }

    #[test]
    fn qualifications_in_words() {
        assert_eq!(of(reason::CR_ACCESS, 0x300), "CR0 from RBX");
        assert_eq!(of(reason::CR_ACCESS, 0x813), "R8 from CR3");
        assert_eq!(of(reason::CR_ACCESS, 0x20), "CLTS");
        assert_eq!(of(reason::CR_ACCESS, 0x7_0030), "LMSW 0x7");
        assert_eq!(of(reason::MOV_DR, 0x117), "RCX from DR7");
        assert_eq!(of(reason::IO_INSTRUCTION, 0x3f8_0000), "OUT 0x41, port 0x3f8, 1 bytes");
        assert_eq!(of(reason::IO_INSTRUCTION, 0x1f0_0039), "REP INS, port 0x1f0, 2 bytes");
        assert_eq!(of(reason::RDMSR, 0), "0x277");
        assert_eq!(of(reason::WRMSR, 0), "0x277 = 0x500000041");
        assert_eq!(of(reason::CPUID, 0), "leaf 0x41, subleaf 0x277");
        assert_eq!(of(reason::APIC_ACCESS, 0x1300), "write, offset 0x300");
        assert_eq!(of(reason::TASK_SWITCH, 0x8000_0028), "to 0x28 by JMP");
        assert_eq!(of(reason::HLT, 0), "");
        assert_eq!(of(u32::MAX, u64::MAX), "");
    }

    #[test]
    fn ept_violations_in_words() {
        let exit = VmExit {
            reason: reason::EPT_VIOLATION,
            qualification: 0x18a,
            guest_physical: 0xfee0_0030,
            guest_linear: 0xffff_8000_0000_1030,
            ..VmExit::default()
        };
        assert_eq!(words(exit), "write at 0xfee00030, mapped r, linear 0xffff800000001030");
        let walk = VmExit { qualification: 0x83, guest_physical: 0x5000, guest_linear: 0x1000, ..exit };
        assert_eq!(words(walk), "read and write at 0x5000, not mapped, walking for linear 0x1000");
    }

    #[test]
    fn events_in_words() {
        let exit = VmExit {
            reason: reason::EXCEPTION_OR_NMI,
            qualification: 0x7000,
            interruption: event::VALID | event::ERROR_CODE_VALID | 3 << 8 | 14,
            interruption_error: 2,
            idt_vectoring: event::VALID | 0x30,
            ..VmExit::default()
        };
        assert_eq!(words(exit), "#PF with error code 0x2 at 0x7000, while delivering interrupt 0x30");
        assert_eq!(interruption(event::VALID | 2 << 8 | 2, 0), "NMI");
        assert_eq!(interruption(event::VALID | 4 << 8 | 0x80, 0), "INT 0x80");
        let event = Event {
            vector: 13,
            kind: EventKind::HardwareException,
            error_code: Some(0),
            instruction_length: 0,
        };
        assert_eq!(injected(&event), "#GP with error code 0x0");
    }
}
