//! What is shown of a guest that died: registers, mode, the instruction, and where it was called from.

use std::fmt;

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use turtles_cpu::Cpu;
use turtles_cpu::state::{CpuState, Seg, reg};
use x86defs::cr0;

/// Frames of the backtrace.
const MAX_FRAMES: usize = 16;

/// A dead guest's vCPU.
pub struct CrashReport {
    vcpu: usize,
    state: Box<CpuState>,
    instruction: String,
    bytes: Vec<u8>,
    frames: Vec<u64>,
}

impl CrashReport {
    /// Reads everything out of a stopped vCPU.
    pub fn new(vcpu: usize, cpu: &Cpu) -> Self {
        let state = Box::new(cpu.state.clone());
        let mut code = [0; 15];
        let have = cpu.peek(linear_rip(&state), &mut code);
        let bytes = code[..have].to_vec();
        Self { vcpu, instruction: disassemble(&state, &bytes), bytes, frames: backtrace(cpu), state }
    }
}

fn linear_rip(state: &CpuState) -> u64 {
    if state.code64() { state.rip } else { state.seg(Seg::Cs).base.wrapping_add(state.rip) & 0xffff_ffff }
}

fn disassemble(state: &CpuState, bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "(not mapped)".into();
    }
    let insn = Decoder::with_ip(state.code_bits(), bytes, state.rip, DecoderOptions::NONE).decode();
    let mut text = String::new();
    IntelFormatter::new().format(&insn, &mut text);
    text
}

/// Follows the chain of frame pointers; stops at the first that does not grow upward or is not mapped.
fn backtrace(cpu: &Cpu) -> Vec<u64> {
    let state = &cpu.state;
    let size = (state.code_bits() / 8) as usize;
    let base = if state.code64() { 0 } else { state.seg(Seg::Ss).base };
    let word = |offset: u64| {
        let mut bytes = [0; 8];
        let have = cpu.peek(base.wrapping_add(offset), &mut bytes[..size]);
        (have == size).then(|| u64::from_le_bytes(bytes))
    };
    let mut frames = Vec::new();
    let mut frame = state.gpr.get(reg::RBP);
    while frames.len() < MAX_FRAMES {
        let Some(next) = word(frame) else { break };
        let Some(back) = word(frame.wrapping_add(size as u64)) else { break };
        if back == 0 {
            break;
        }
        frames.push(back);
        if next <= frame {
            break;
        }
        frame = next;
    }
    frames
}

/// The mode in words.
pub fn mode_name(state: &CpuState) -> &'static str {
    match (state.protected(), state.v86(), state.long_mode(), state.code_bits()) {
        (false, ..) => "real mode",
        (_, true, ..) => "virtual-8086 mode",
        (_, _, true, 64) => "64-bit mode",
        (_, _, true, _) => "compatibility mode",
        (_, _, _, 32) => "32-bit protected mode",
        _ => "16-bit protected mode",
    }
}

impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.state;
        let paging = if s.cr0 & cr0::PG != 0 { "paging" } else { "no paging" };
        writeln!(f, "CPU {}: {}, {paging}, CPL {}", self.vcpu, mode_name(s), s.cpl)?;
        let names = [
            "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12", "R13",
            "R14", "R15",
        ];
        for (i, name) in names.iter().enumerate() {
            write!(f, "  {name} {:016x}{}", s.gpr.get(i), if i % 4 == 3 { "\n" } else { "" })?;
        }
        writeln!(f, "  RIP {:016x}  RFLAGS {:08x}", s.rip, s.rflags())?;
        writeln!(
            f,
            "  CR0 {:08x}  CR2 {:016x}  CR3 {:016x}  CR4 {:08x}  EFER {:x}",
            s.cr0, s.cr2, s.cr3, s.cr4, s.efer
        )?;
        for (name, seg) in ["ES", "CS", "SS", "DS", "FS", "GS"].iter().zip(&s.segments) {
            writeln!(
                f,
                "  {name}  {:04x}  base {:016x}  limit {:08x}  access {:05x}",
                seg.selector, seg.base, seg.limit, seg.access
            )?;
        }
        writeln!(
            f,
            "  GDT base {:016x} limit {:04x}  IDT base {:016x} limit {:04x}  TR {:04x} base {:016x}",
            s.gdtr.base, s.gdtr.limit, s.idtr.base, s.idtr.limit, s.tr.selector, s.tr.base
        )?;
        write!(f, "  at {:04x}:{:016x}:", s.seg(Seg::Cs).selector, s.rip)?;
        for byte in self.bytes.iter().take(15) {
            write!(f, " {byte:02x}")?;
        }
        writeln!(f, "\n    {}", self.instruction)?;
        if !self.frames.is_empty() {
            writeln!(f, "  called from")?;
            for frame in &self.frames {
                writeln!(f, "    {frame:016x}")?;
            }
        }
        Ok(())
    }
}
