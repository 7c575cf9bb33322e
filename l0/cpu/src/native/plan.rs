//! What a thunk has to do for one instruction, read off iced's description of it: the registers that travel, the
//! memory operand's size and direction, the status words involved.
//!
//! A plan depends on the instruction's encoding only, with its memory operand taken out: all instructions that
//! differ in nothing but the address share one.

use iced_x86::{
    EncodingKind, Instruction, InstructionInfoFactory, InstructionInfoOptions, MemorySize, Mnemonic,
    OpAccess, OpKind, Register,
};

use super::features::FeatureSet;

/// Which rules decide whether the instruction may execute at all.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Class {
    /// Legacy encodings on XMM registers.
    Sse,
    /// VEX encodings.
    Vex,
    /// MMX registers, alone or with XMM registers.
    Mmx,
    /// The x87 stack.
    X87,
}

/// What the instruction does with its memory operand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum MemoryUse {
    None,
    Read,
    Write,
}

/// Type of a floating-point result, for telling tiny ones.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Element {
    Half,
    Single,
    Double,
}

/// The floating-point results an instruction leaves in its first operand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Results {
    pub element: Element,
    /// Bytes of the operand that hold results.
    pub bytes: usize,
}

/// RAX, RDX, RCX as bits of [`Plan::gpr_in`] and [`Plan::gpr_out`].
pub(crate) const RAX: u8 = 1;
pub(crate) const RDX: u8 = 2;
pub(crate) const RCX: u8 = 4;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// The instruction as the host executes it: memory at [RSI], a general register operand replaced by RAX.
    pub insn: Instruction,
    pub class: Class,
    pub features: FeatureSet,
    /// Vector registers to load before, and to store after.
    pub vector_in: u16,
    pub vector_out: u16,
    pub gpr_in: u8,
    pub gpr_out: u8,
    /// The guest's register that stands behind RAX.
    pub gpr: Register,
    pub memory: MemoryUse,
    /// Bytes of the memory operand.
    pub size: usize,
    /// The memory operand must be aligned to its size.
    pub aligned: bool,
    /// Reads or writes the status flags.
    pub status: bool,
    /// A SIMD floating-point instruction: under MXCSR's control.
    pub mxcsr: bool,
    /// Reads or writes x87 state (MMX registers included).
    pub x87: bool,
    /// Where an underflow would show.
    pub results: Option<Results>,
}

impl Plan {
    /// The plan for an instruction that is to run in a thunk; none for encodings we do not execute.
    pub(crate) fn new(original: &Instruction) -> Option<Self> {
        let class = class_of(original)?;
        let features = FeatureSet::of(original.cpuid_features())?;
        let (insn, gpr) = normalise(original);
        let mut plan = Self {
            insn,
            class,
            features,
            vector_in: 0,
            vector_out: 0,
            gpr_in: 0,
            gpr_out: 0,
            gpr,
            memory: MemoryUse::None,
            size: 0,
            aligned: false,
            status: original.rflags_read() | original.rflags_modified() != 0,
            mxcsr: is_floating(original),
            x87: matches!(class, Class::Mmx | Class::X87),
            results: results(original),
        };
        plan.find_operands()?;
        plan.aligned = plan.memory != MemoryUse::None && needs_alignment(original, class, plan.size);
        Some(plan)
    }

    fn find_operands(&mut self) -> Option<()> {
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info_options(&self.insn, InstructionInfoOptions::NO_MEMORY_USAGE);
        for used in info.used_registers() {
            let register = used.register();
            if !register.is_vector_register() {
                continue;
            }
            let bit = 1_u16.checked_shl(register.number() as u32)?;
            // Legacy instructions keep the rest of their destination: it is always loaded.
            if used.access() != OpAccess::Write || self.class != Class::Vex {
                self.vector_in |= bit;
            }
            if writes(used.access()) {
                self.vector_out |= bit;
            }
        }
        for index in 0..self.insn.op_count() {
            let access = info.op_access(index);
            match self.insn.op_kind(index) {
                OpKind::Memory => {
                    self.memory = if writes(access) { MemoryUse::Write } else { MemoryUse::Read };
                    self.size = operand_size(&self.insn)?;
                }
                OpKind::Register if self.insn.op_register(index).is_gpr() => {
                    if access != OpAccess::Write {
                        self.gpr_in |= RAX;
                    }
                    if writes(access) {
                        self.gpr_out |= RAX;
                    }
                }
                _ => {}
            }
        }
        self.find_implicit_operands();
        Some(())
    }

    /// The string comparisons take lengths in RAX and RDX and leave an index in RCX.
    fn find_implicit_operands(&mut self) {
        use Mnemonic as M;
        match self.insn.mnemonic() {
            M::Pcmpestri | M::Pcmpestri64 | M::Vpcmpestri | M::Vpcmpestri64 => {
                self.gpr_in |= RAX | RDX;
                self.gpr_out |= RCX;
            }
            M::Pcmpestrm | M::Pcmpestrm64 | M::Vpcmpestrm | M::Vpcmpestrm64 => self.gpr_in |= RAX | RDX,
            M::Pcmpistri | M::Vpcmpistri => self.gpr_out |= RCX,
            M::Fnstsw => self.gpr_in = 0,
            _ => {}
        }
    }

    /// The thunk needs nothing but the vector registers.
    pub(crate) fn is_registers_only(&self) -> bool {
        self.memory == MemoryUse::None && self.needs_no_status()
    }

    /// The thunk needs nothing but the vector registers and a memory operand it reads.
    pub(crate) fn is_plain_load(&self) -> bool {
        self.memory == MemoryUse::Read && self.needs_no_status()
    }

    fn needs_no_status(&self) -> bool {
        !(self.status || self.mxcsr || self.x87) && self.gpr_in | self.gpr_out == 0
    }
}

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// The class of an instruction; none for encodings and extensions that are never offered.
pub(crate) fn class_of(insn: &Instruction) -> Option<Class> {
    match insn.encoding() {
        EncodingKind::VEX => return Some(Class::Vex),
        EncodingKind::Legacy => {}
        _ => return None,
    }
    let mut class = None;
    for index in 0..insn.op_count() {
        let register = match insn.op_kind(index) {
            OpKind::Register => insn.op_register(index),
            _ => continue,
        };
        if register.is_mm() {
            return Some(Class::Mmx);
        }
        if register.is_st() {
            return Some(Class::X87);
        }
        if register.is_xmm() {
            class = Some(Class::Sse);
        }
    }
    match insn.mnemonic() {
        // Enters MMX state even when its source is memory.
        Mnemonic::Cvtpi2ps | Mnemonic::Emms => Some(Class::Mmx),
        // From memory to a general register.
        Mnemonic::Cvtss2si | Mnemonic::Cvtsd2si | Mnemonic::Cvttss2si | Mnemonic::Cvttsd2si => {
            Some(Class::Sse)
        }
        _ if class.is_none() && is_x87(insn) => Some(Class::X87),
        _ => class,
    }
}

/// True for instructions of the x87 unit.
pub(crate) fn is_x87(insn: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    insn.encoding() == EncodingKind::Legacy
        && insn.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
}

/// Takes the address out of an instruction and puts RAX in place of its general register, which is returned.
fn normalise(original: &Instruction) -> (Instruction, Register) {
    let mut insn = *original;
    let mut gpr = Register::None;
    insn.set_segment_prefix(Register::None);
    insn.set_has_lock_prefix(false);
    insn.set_has_repe_prefix(false);
    insn.set_has_repne_prefix(false);
    for index in 0..insn.op_count() {
        match insn.op_kind(index) {
            OpKind::Memory => {
                insn.set_memory_base(Register::RSI);
                insn.set_memory_index(Register::None);
                insn.set_memory_index_scale(1);
                insn.set_memory_displacement64(0);
                insn.set_memory_displ_size(0);
            }
            OpKind::Register if insn.op_register(index).is_gpr() => {
                gpr = insn.op_register(index);
                insn.set_op_register(
                    index,
                    match gpr.size() {
                        8 => Register::RAX,
                        4 => Register::EAX,
                        2 => Register::AX,
                        _ => Register::AL,
                    },
                );
            }
            _ => {}
        }
    }
    insn.set_ip(0);
    (insn, gpr)
}

/// The instruction's memory operand must be aligned to its size.
pub(crate) fn is_aligned(insn: &Instruction) -> bool {
    let operand = class_of(insn).zip(operand_size(insn));
    operand.is_some_and(|(class, size)| needs_alignment(insn, class, size))
}

fn operand_size(insn: &Instruction) -> Option<usize> {
    let size = match insn.memory_size() {
        MemorySize::Unknown => 0,
        size => size.size(),
    };
    (1..=32).contains(&size).then_some(size)
}

/// "Memory must be aligned": every 16-byte operand of a legacy encoding but those named, and with VEX only the
/// aligned and the non-temporal moves.
fn needs_alignment(insn: &Instruction, class: Class, size: usize) -> bool {
    use Mnemonic as M;
    match class {
        Class::X87 => false,
        Class::Sse | Class::Mmx => {
            let tolerant = matches!(
                insn.mnemonic(),
                M::Movups
                    | M::Movupd
                    | M::Movdqu
                    | M::Lddqu
                    | M::Pcmpestri
                    | M::Pcmpestri64
                    | M::Pcmpestrm
                    | M::Pcmpestrm64
                    | M::Pcmpistri
                    | M::Pcmpistrm
            );
            size == 16 && !tolerant
        }
        Class::Vex => matches!(
            insn.mnemonic(),
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
        ),
    }
}

/// The mnemonic without VEX's V, in lower case.
fn stem(insn: &Instruction) -> String {
    let name = format!("{:?}", insn.mnemonic()).to_lowercase();
    match name.strip_prefix('v') {
        Some(rest) => rest.to_owned(),
        None => name,
    }
}

const ARITHMETIC: [&str; 13] = [
    "add", "sub", "mul", "div", "dpp", "hadd", "hsub", "addsub", "fmadd", "fmsub", "fnmadd", "fnmsub", "cvt",
];

/// True if the instruction is under MXCSR's control: it may round, or raise SIMD floating-point exceptions.
pub(crate) fn is_floating(insn: &Instruction) -> bool {
    const OTHERS: [&str; 9] = ["sqrt", "min", "max", "cmp", "comi", "ucomi", "round", "rcp", "rsqrt"];
    if !matches!(insn.encoding(), EncodingKind::Legacy | EncodingKind::VEX) || is_x87(insn) {
        return false;
    }
    let stem = stem(insn);
    if stem.starts_with("cvt") {
        return true;
    }
    let floating = ["ps", "pd", "ss", "sd"].iter().any(|suffix| stem.ends_with(suffix));
    floating && ARITHMETIC.iter().chain(&OTHERS).any(|prefix| stem.starts_with(prefix))
}

/// Where an instruction that can underflow leaves its results.
fn results(insn: &Instruction) -> Option<Results> {
    let stem = stem(insn);
    if !is_floating(insn) || !ARITHMETIC.iter().any(|prefix| stem.starts_with(prefix)) {
        return None;
    }
    if stem.starts_with("cvt") && !matches!(&*stem, "cvtsd2ss" | "cvtpd2ps" | "cvtps2ph") {
        return None;
    }
    let whole = match insn.op0_kind() {
        OpKind::Register => insn.op0_register().size(),
        _ => operand_size(insn)?,
    };
    let (element, bytes) = match &stem[stem.len() - 2..] {
        "ss" => (Element::Single, 4),
        "sd" => (Element::Double, 8),
        "ps" => (Element::Single, whole),
        "pd" => (Element::Double, whole),
        "ph" => (Element::Half, whole),
        _ => return None,
    };
    Some(Results { element, bytes })
}

impl Results {
    /// True if one of the results in `operand` is a denormal number.
    pub(crate) fn has_denormal(&self, operand: &[u8]) -> bool {
        let bytes = operand.get(..self.bytes).unwrap_or(operand);
        let (width, exponent, fraction) = match self.element {
            Element::Half => (2, 0x7c00, 0x3ff),
            Element::Single => (4, 0x7f80_0000, 0x7f_ffff),
            Element::Double => (8, 0x7ff0_0000_0000_0000, 0xf_ffff_ffff_ffff),
        };
        bytes.chunks_exact(width).any(|chunk| {
            let value = chunk.iter().rev().fold(0_u64, |value, &byte| value << 8 | u64::from(byte));
            value & exponent == 0 && value & fraction != 0
        })
    }
}
