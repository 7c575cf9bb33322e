//! Which instructions can be compared: those that CPUID offers in both worlds and whose result depends on
//! nothing but the case.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind, Register,
};

use crate::case::Bits;

/// The features of the virtual CPU that user code can use.
const OFFERED: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::ADX,
    CpuidFeature::AES,
    CpuidFeature::AVX,
    CpuidFeature::AVX2,
    CpuidFeature::BMI1,
    CpuidFeature::BMI2,
    CpuidFeature::CLFLUSHOPT,
    CpuidFeature::CLFSH,
    CpuidFeature::CLWB,
    CpuidFeature::CMOV,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::CX8,
    CpuidFeature::F16C,
    CpuidFeature::FMA,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::FSGSBASE,
    CpuidFeature::FXSR,
    CpuidFeature::LZCNT,
    CpuidFeature::MMX,
    CpuidFeature::MOVBE,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::PCLMULQDQ,
    CpuidFeature::POPCNT,
    CpuidFeature::PREFETCHW,
    CpuidFeature::SHA,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::SSSE3,
    CpuidFeature::XSAVE,
    CpuidFeature::XSAVEC,
    CpuidFeature::XSAVEOPT,
    CpuidFeature::XSAVES,
    CpuidFeature::CET_IBT,
    CpuidFeature::MSR,
    CpuidFeature::INVPCID,
];

/// Every form of user-mode instruction to test with code of that width.
pub fn forms(bits: Bits) -> Vec<Code> {
    Code::values()
        .filter(|code| {
            let info = code.op_code();
            info.is_instruction()
                && info.is_available_in_mode(bits.count())
                && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
                && !info.fwait()
                && offered(*code)
                && native_has(*code)
                && excluded(code.mnemonic()).is_none()
        })
        .collect()
}

fn offered(code: Code) -> bool {
    code.cpuid_features().iter().all(|feature| OFFERED.contains(feature))
}

/// The host must have it too. (What every x86-64 processor with AVX has is not asked for.)
fn native_has(code: Code) -> bool {
    code.cpuid_features().iter().all(|&feature| match feature {
        CpuidFeature::ADX => is_x86_feature_detected!("adx"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::AVX => is_x86_feature_detected!("avx"),
        CpuidFeature::AVX2 => is_x86_feature_detected!("avx2"),
        CpuidFeature::BMI1 => is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => is_x86_feature_detected!("bmi2"),
        CpuidFeature::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        CpuidFeature::F16C => is_x86_feature_detected!("f16c"),
        CpuidFeature::FMA => is_x86_feature_detected!("fma"),
        CpuidFeature::LZCNT => is_x86_feature_detected!("lzcnt"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        CpuidFeature::XSAVEC => is_x86_feature_detected!("xsavec"),
        CpuidFeature::XSAVEOPT => is_x86_feature_detected!("xsaveopt"),
        CpuidFeature::XSAVES => is_x86_feature_detected!("xsaves"),
        _ => true,
    })
}

/// Why a mnemonic's result is not a matter of the case alone.
fn excluded(mnemonic: Mnemonic) -> Option<&'static str> {
    Some(match mnemonic {
        Mnemonic::Rdtsc | Mnemonic::Rdtscp | Mnemonic::Rdpmc => "reads a counter",
        Mnemonic::Rdrand | Mnemonic::Rdseed => "random by design",
        Mnemonic::Cpuid | Mnemonic::Xgetbv | Mnemonic::Rdpid => "shows which CPU it is",
        Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Sldt | Mnemonic::Str | Mnemonic::Smsw => {
            "the host's kernel answers it instead of the CPU"
        }
        Mnemonic::Lar | Mnemonic::Lsl | Mnemonic::Verr | Mnemonic::Verw => "reads the host's descriptors",
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => "loads a segment",
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Retf => "loads a segment",
        Mnemonic::Syscall | Mnemonic::Sysenter | Mnemonic::Sysexit | Mnemonic::Sysexitq => {
            "enters the host's kernel, or depends on the vendor"
        }
        Mnemonic::Sysret | Mnemonic::Sysretq => "depends on the vendor",
        Mnemonic::Int1 => "what RIP its handler sees depends on how the host virtualizes it",
        Mnemonic::Rdpkru | Mnemonic::Wrpkru => "hosts differ in protection keys",
        Mnemonic::Vmcall
        | Mnemonic::Vmmcall
        | Mnemonic::Vmxon
        | Mnemonic::Vmxoff
        | Mnemonic::Vmread
        | Mnemonic::Vmwrite
        | Mnemonic::Vmlaunch
        | Mnemonic::Vmresume
        | Mnemonic::Vmptrld
        | Mnemonic::Vmptrst
        | Mnemonic::Vmclear
        | Mnemonic::Vmfunc
        | Mnemonic::Invept
        | Mnemonic::Invvpid => "the host may have no VMX",
        Mnemonic::Monitor | Mnemonic::Mwait => "may be allowed to user code on some hosts",
        Mnemonic::Getsec => "depends on the vendor",
        Mnemonic::Loadall | Mnemonic::Umov | Mnemonic::Ibts | Mnemonic::Xbts => "of processors long gone",
        _ => return None,
    })
}

/// Whether a decoded instruction can be compared, or why not.
fn comparable(insn: &Instruction, bits: Bits) -> Result<(), String> {
    let code = insn.code();
    if code == Code::INVALID {
        return Ok(());
    }
    if let Some(why) = excluded(code.mnemonic()) {
        return Err(why.to_owned());
    }
    if !offered(code) {
        return Err(format!("{:?} is of a feature that is not offered", code));
    }
    if matches!(code, Code::Int_imm8) && insn.immediate8() == 0x80 {
        return Err("a system call".to_owned());
    }
    let far = matches!(insn.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32);
    if far || insn.is_call_far_indirect() || insn.is_jmp_far_indirect() {
        return Err("loads a segment".to_owned());
    }
    let loads_segment = insn.op_count() > 0
        && insn.op0_kind() == OpKind::Register
        && insn.op0_register().is_segment_register()
        && matches!(insn.mnemonic(), Mnemonic::Mov | Mnemonic::Pop);
    if loads_segment {
        return Err("loads a segment".to_owned());
    }
    if matches!(insn.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne)
        && (insn.has_rep_prefix() || insn.has_repne_prefix())
    {
        return Err("a repeat prefix on LOOPcc: some processors let it choose the condition".to_owned());
    }
    if code == Code::Movsxd_r16_rm16 && insn.op1_kind() == OpKind::Memory {
        return Err("MOVSXD with 16-bit operands reads 16 or 32 bits, by vendor".to_owned());
    }
    if matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    ) {
        return Err("PREFETCHW without memory: #UD or no operation, by vendor".to_owned());
    }
    if bits == Bits::B32 && matches!(insn.segment_prefix(), Register::FS | Register::GS | Register::CS) {
        return Err("the segment's hidden part is the host's".to_owned());
    }
    Ok(())
}

/// Decodes what stands at the start of `code`; an error if the two vendors' processors decode it differently
/// (operand-size prefixes on near branches).
pub fn decode_comparable(bits: Bits, code: &[u8], ip: u64) -> Result<Instruction, String> {
    let decode = |options| Decoder::with_ip(bits.count(), code, ip, options).decode();
    let insn = decode(DecoderOptions::NONE);
    let amd = decode(DecoderOptions::AMD);
    if insn.code() != amd.code() || insn.len() != amd.len() {
        return Err("vendors decode it differently".to_owned());
    }
    if insn.is_invalid() && code.iter().take(insn.len()).any(|&byte| byte == 0x62) {
        return Err("may be EVEX, which the host may have".to_owned());
    }
    if insn.is_invalid() && valid_with_other_w(bits, code, ip) {
        return Err("VEX.W where it must have one value: ignored or undefined, by vendor".to_owned());
    }
    if bits == Bits::B32 && insn.op_code().is_wig32() && vex_w(code).is_some_and(|at| code[at] & 0x80 != 0) {
        return Err("VEX.W outside 64-bit mode: ignored or undefined, by vendor".to_owned());
    }
    let rex_b = bits == Bits::B64 && insn.len() > 1 && code[insn.len() - 2] & 0xf1 == 0x41;
    if insn.code() == Code::Pause && rex_b {
        return Err("PAUSE with REX.B: some processors exchange registers".to_owned());
    }
    comparable(&insn, bits).map(|()| insn)
}

/// Where the byte with VEX.W is, if there is one.
fn vex_w(code: &[u8]) -> Option<usize> {
    code.iter().position(|&byte| byte == 0xc4).map(|at| at + 2).filter(|&at| at < code.len())
}

fn valid_with_other_w(bits: Bits, code: &[u8], ip: u64) -> bool {
    let Some(at) = vex_w(code) else { return false };
    let mut other = code[..code.len().min(15)].to_vec();
    if let Some(byte) = other.get_mut(at) {
        *byte ^= 0x80;
    }
    !Decoder::with_ip(bits.count(), &other, ip, DecoderOptions::NONE).decode().is_invalid()
}
