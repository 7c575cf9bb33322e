//! Thunks: the few host instructions around one guest instruction.
//!
//! A thunk is a function in the C convention of System V:
//! ```text
//! thunk(rdi = vector registers, rsi = frame, rdx = x87 image to load, rcx = x87 image to store)
//!     fxrstor64 [rdx]                      x87 and MMX
//!     ldmxcsr   [rsi + mxcsr]              SIMD floating point
//!     movups    xmmN, [rdi + 32 N]         vmovups ymmN with VEX
//!     mov eax, [rsi + status]; add al, 7fh; sahf
//!     mov rax, [rsi + rax] ...
//!     ; the guest's instruction, its memory operand being [rsi]
//!     mov [rsi + rax], rax ...
//!     seto al; lahf; mov [rsi + status], eax
//!     movups    [rdi + 32 N], xmmN
//!     stmxcsr   [rsi + mxcsr_after]
//!     cmp [rsi + mxcsr_differs], 0; je +4; ldmxcsr [rsi + mxcsr_default]
//!     fxsave64  [rcx]; fninit
//!     vzeroupper
//!     ret
//! ```
//! of which each line is there only if the instruction needs it. Legacy instructions touch only the low halves in
//! the register file, VEX instructions move whole registers, so the upper halves come out as on the processor.
//!
//! Nothing can fault inside a thunk: the operand is ours and aligned, SIMD exceptions are masked by the caller (or by
//! none being raised), and a pending x87 exception is only ever stored, never waited for.
//!
//! Unsafe island: the call.

use std::mem::offset_of;

use iced_x86::{Code, Encoder, IcedError, Instruction, MemoryOperand, Register};

use super::plan::{Class, Plan, RAX, RCX, RDX};
use crate::state::{VectorState, X87State};

/// MXCSR as Rust code expects it.
const MXCSR_DEFAULT: u32 = 0x1f80;

/// What a thunk reads and writes beside the vector registers.
#[repr(C, align(64))]
pub(crate) struct Frame {
    /// The memory operand.
    pub operand: [u8; 64],
    pub rax: u64,
    pub rdx: u64,
    pub rcx: u64,
    /// Status flags in the format of `CpuState::status`.
    pub status: u32,
    pub mxcsr: u32,
    pub mxcsr_after: u32,
    mxcsr_default: u32,
    /// The guest's rounding mode or the like is not the host's.
    mxcsr_differs: u32,
}

const _: () = assert!(offset_of!(Frame, operand) == 0);

impl Frame {
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Self {
            operand: [0; 64],
            rax: 0,
            rdx: 0,
            rcx: 0,
            status: 0,
            mxcsr: MXCSR_DEFAULT,
            mxcsr_after: 0,
            mxcsr_default: MXCSR_DEFAULT,
            mxcsr_differs: 0,
        }
    }

    /// Leaves only bits that every processor with SSE2 and DAZ knows, others would fault on loading, and finds out
    /// whether Rust code may run with them (it does not care for the sticky flags).
    #[inline(always)]
    fn set_mxcsr(&mut self) {
        const FLAGS: u32 = 0x3f;
        self.mxcsr &= 0xffff;
        self.mxcsr_differs = (self.mxcsr ^ MXCSR_DEFAULT) & !FLAGS;
    }
}

/// A thunk's entry point.
pub(super) type Entry =
    unsafe extern "sysv64" fn(*mut VectorState, *mut Frame, *const X87State, *mut X87State);

/// A plan with the code that carries it out.
pub(crate) struct Thunk {
    pub plan: Plan,
    entry: Entry,
}

impl Thunk {
    /// # Safety
    /// `code` must be the code [`emit`] made for `plan`, and stay in place while the thunk is used.
    pub(super) unsafe fn new(plan: Plan, code: *const u8) -> Self {
        // SAFETY: the caller says that the code follows the convention of `Entry`.
        let entry = unsafe { std::mem::transmute::<*const u8, Entry>(code) };
        Self { plan, entry }
    }

    /// Executes an instruction that has only vector registers.
    #[inline(always)]
    pub(crate) fn run_registers(&self, vector: &mut VectorState) {
        debug_assert!(self.plan.is_registers_only());
        let none = std::ptr::null_mut();
        // SAFETY: the code was made for this plan, which touches nothing but `vector`.
        unsafe { (self.entry)(vector, none, none.cast(), none.cast()) }
    }

    /// Executes an instruction that has only vector registers and a memory operand that it reads.
    ///
    /// # Safety
    /// `operand` must point to as many readable bytes as the plan's operand has, aligned if the plan says so.
    #[inline(always)]
    pub(super) unsafe fn run_load(&self, vector: &mut VectorState, operand: *const u8) {
        debug_assert!(self.plan.is_plain_load());
        let frame = operand.cast_mut().cast::<Frame>();
        // SAFETY: the code was made for this plan, which touches `vector` and reads the operand at the start of what
        // it takes for a frame, and nothing else.
        unsafe { (self.entry)(vector, frame, std::ptr::null(), std::ptr::null_mut()) }
    }

    /// Executes an instruction without x87 or MMX registers.
    #[inline(always)]
    pub(crate) fn run(&self, vector: &mut VectorState, frame: &mut Frame) {
        assert!(!self.plan.x87);
        frame.set_mxcsr();
        // SAFETY: the code was made for this plan, which touches `vector` and `frame` only (no x87).
        unsafe { (self.entry)(vector, frame, std::ptr::null(), std::ptr::null_mut()) }
    }

    /// Executes an instruction of the x87 or MMX families: x87 state from `from` to `to`. The last-instruction
    /// pointers in `to` are of no use.
    pub(crate) fn run_x87(
        &self,
        vector: &mut VectorState,
        frame: &mut Frame,
        from: &mut X87State,
        to: &mut X87State,
    ) {
        frame.set_mxcsr();
        from.mxcsr_image = MXCSR_DEFAULT;
        // SAFETY: the code was made for this plan; `from` and `to` are aligned FXSAVE images, and `from` holds a
        // valid MXCSR.
        unsafe { (self.entry)(vector, frame, from, to) }
    }
}

struct Emitter {
    encoder: Encoder,
}

impl Emitter {
    fn add(&mut self, insn: Instruction) -> Result<(), IcedError> {
        self.encoder.encode(&insn, 0).map(|_| ())
    }

    fn memory(&mut self, code: Code, base: Register, offset: usize) -> Result<(), IcedError> {
        self.add(Instruction::with1(code, at(base, offset))?)
    }

    fn load(
        &mut self,
        code: Code,
        register: Register,
        base: Register,
        offset: usize,
    ) -> Result<(), IcedError> {
        self.add(Instruction::with2(code, register, at(base, offset))?)
    }

    fn store(
        &mut self,
        code: Code,
        base: Register,
        offset: usize,
        register: Register,
    ) -> Result<(), IcedError> {
        self.add(Instruction::with2(code, at(base, offset), register)?)
    }

    fn vectors(&mut self, plan: &Plan, set: u16, store: bool) -> Result<(), IcedError> {
        for number in (0..16_u32).filter(|n| set & 1 << n != 0) {
            let (register, load_code, store_code) = if plan.class == Class::Vex {
                (Register::YMM0, Code::VEX_Vmovups_ymm_ymmm256, Code::VEX_Vmovups_ymmm256_ymm)
            } else {
                (Register::XMM0, Code::Movups_xmm_xmmm128, Code::Movups_xmmm128_xmm)
            };
            let (register, offset) = (register + number, number as usize * 32);
            if store {
                self.store(store_code, Register::RDI, offset, register)?;
            } else {
                self.load(load_code, register, Register::RDI, offset)?;
            }
        }
        Ok(())
    }

    fn enter(&mut self, plan: &Plan) -> Result<(), IcedError> {
        if plan.x87 {
            self.memory(Code::Fxrstor64_m512byte, Register::RDX, 0)?;
        }
        if plan.mxcsr {
            self.memory(Code::Ldmxcsr_m32, Register::RSI, offset_of!(Frame, mxcsr))?;
        }
        self.vectors(plan, plan.vector_in, false)?;
        if plan.status {
            self.load(Code::Mov_r32_rm32, Register::EAX, Register::RSI, offset_of!(Frame, status))?;
            self.add(Instruction::with2(Code::Add_AL_imm8, Register::AL, 0x7f)?)?;
            self.add(Instruction::with(Code::Sahf))?;
        }
        for (bit, register, offset) in GPRS {
            if plan.gpr_in & bit != 0 {
                self.load(Code::Mov_r64_rm64, register, Register::RSI, offset)?;
            }
        }
        Ok(())
    }

    fn leave(&mut self, plan: &Plan) -> Result<(), IcedError> {
        for (bit, register, offset) in GPRS {
            if plan.gpr_out & bit != 0 {
                self.store(Code::Mov_rm64_r64, Register::RSI, offset, register)?;
            }
        }
        if plan.status {
            self.add(Instruction::with1(Code::Seto_rm8, Register::AL)?)?;
            self.add(Instruction::with(Code::Lahf))?;
            self.store(Code::Mov_rm32_r32, Register::RSI, offset_of!(Frame, status), Register::EAX)?;
        }
        self.vectors(plan, plan.vector_out, true)?;
        if plan.mxcsr {
            let code = Code::Stmxcsr_m32;
            self.memory(code, Register::RSI, offset_of!(Frame, mxcsr_after))?;
            let differs = at(Register::RSI, offset_of!(Frame, mxcsr_differs));
            self.add(Instruction::with2(Code::Cmp_rm32_imm8, differs, 0)?)?;
            let restore =
                Instruction::with1(Code::Ldmxcsr_m32, at(Register::RSI, offset_of!(Frame, mxcsr_default)))?;
            let (length, jump) = (Encoder::new(64).encode(&restore, 0)?, 2);
            self.add(Instruction::with_branch(Code::Je_rel8_64, (jump + length) as u64)?)?;
            self.add(restore)?;
        }
        if plan.x87 {
            self.memory(Code::Fxsave64_m512byte, Register::RCX, 0)?;
            self.add(Instruction::with(Code::Fninit))?;
        }
        if plan.class == Class::Vex {
            self.add(Instruction::with(Code::VEX_Vzeroupper))?;
        }
        self.add(Instruction::with(Code::Retnq))
    }
}

/// RAX, RDX and RCX, their bits in a plan and places in a frame.
const GPRS: [(u8, Register, usize); 3] = [
    (RDX, Register::RDX, offset_of!(Frame, rdx)),
    (RCX, Register::RCX, offset_of!(Frame, rcx)),
    (RAX, Register::RAX, offset_of!(Frame, rax)),
];

fn at(base: Register, offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(base, offset as i64)
}

/// The thunk's code.
pub(super) fn emit(plan: &Plan) -> Result<Vec<u8>, IcedError> {
    let mut emitter = Emitter { encoder: Encoder::new(64) };
    emitter.enter(plan)?;
    emitter.add(plan.insn)?;
    emitter.leave(plan)?;
    Ok(emitter.encoder.take_buffer())
}

/// The guest's instruction alone, with its general register: what tells one plan from another.
pub(super) fn key(plan: &Plan) -> Result<Vec<u8>, IcedError> {
    let mut encoder = Encoder::new(64);
    encoder.encode(&plan.insn, 0)?;
    let mut key = encoder.take_buffer();
    key.push(plan.gpr as u8);
    Ok(key)
}
