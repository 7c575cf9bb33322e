//! Which instructions the CPU model offers: what CPUID does not show raises #UD.

use iced_x86::{CpuidFeature as C, Instruction, Mnemonic};
use x86defs::cpuid::Feature as F;

use crate::cpuid::CpuModel;

impl CpuModel {
    /// True if CPUID shows everything that the instruction needs.
    pub(crate) fn allows(&self, insn: &Instruction) -> bool {
        match insn.mnemonic() {
            // Run as BSF, BSR and plain string instructions where the feature is absent; hints are always there.
            Mnemonic::Tzcnt | Mnemonic::Lzcnt | Mnemonic::Pause | Mnemonic::Prefetchw => return true,
            _ => {}
        }
        insn.cpuid_features().iter().all(|&feature| self.offers(feature))
    }

    fn offers(&self, feature: C) -> bool {
        let needed = match feature {
            C::INTEL8086
            | C::INTEL8086_ONLY
            | C::INTEL186
            | C::INTEL286
            | C::INTEL386
            | C::INTEL486
            | C::INTEL286_ONLY
            | C::INTEL386_ONLY
            | C::INTEL386_A0_ONLY
            | C::INTEL486_A_ONLY
            | C::X64
            | C::CPUID
            | C::SMM
            | C::UDBG
            | C::MULTIBYTENOP
            | C::PAUSE
            | C::RDPMC
            | C::CET_IBT
            | C::CET_SS
            | C::FPU287
            | C::FPU387
            | C::PREFETCHW => return true,
            C::FPU => F::Fpu,
            C::TSC => F::Tsc,
            C::MSR => F::Msr,
            C::CX8 => F::Cx8,
            C::SEP => F::Sep,
            C::CMOV => F::Cmov,
            C::MMX => F::Mmx,
            C::FXSR => F::Fxsr,
            C::SSE => F::Sse,
            C::SSE2 => F::Sse2,
            C::CLFSH => F::Clflush,
            C::SSE3 => F::Sse3,
            C::PCLMULQDQ => F::Pclmulqdq,
            C::MONITOR => F::Monitor,
            C::VMX => F::Vmx,
            C::SMX => F::Smx,
            C::SSSE3 => F::Ssse3,
            C::FMA => F::Fma,
            C::CMPXCHG16B => F::Cx16,
            C::SSE4_1 => F::Sse41,
            C::SSE4_2 => F::Sse42,
            C::MOVBE => F::Movbe,
            C::POPCNT => F::Popcnt,
            C::AES => F::Aes,
            C::XSAVE => F::Xsave,
            C::AVX => F::Avx,
            C::F16C => F::F16c,
            C::RDRAND => F::Rdrand,
            C::FSGSBASE => F::Fsgsbase,
            C::BMI1 => F::Bmi1,
            C::AVX2 => F::Avx2,
            C::BMI2 => F::Bmi2,
            C::INVPCID => F::Invpcid,
            C::RTM | C::HLE_or_RTM => F::Rtm,
            C::RDSEED => F::Rdseed,
            C::ADX => F::Adx,
            C::SMAP => F::Smap,
            C::CLFLUSHOPT => F::Clflushopt,
            C::CLWB => F::Clwb,
            C::SHA => F::Sha,
            C::PKU => F::Pku,
            C::WAITPKG => F::Waitpkg,
            C::GFNI => F::Gfni,
            C::VAES => F::Vaes,
            C::VPCLMULQDQ => F::Vpclmulqdq,
            C::RDPID => F::Rdpid,
            C::CLDEMOTE => F::Cldemote,
            C::MOVDIRI => F::Movdiri,
            C::MOVDIR64B => F::Movdir64b,
            C::SERIALIZE => F::Serialize,
            C::TSXLDTRK => F::TsxLdtrk,
            C::AVX_VNNI => F::AvxVnni,
            C::XSAVEOPT => F::Xsaveopt,
            C::XSAVEC => F::Xsavec,
            C::XSAVES => F::Xsaves,
            C::SYSCALL => F::Syscall,
            C::RDTSCP => F::Rdtscp,
            C::LZCNT => F::Lzcnt,
            C::WBNOINVD => F::Wbnoinvd,
            C::SSE4A => F::Sse4a,
            C::SVM => F::Svm,
            // Everything else is an extension that no model of ours has.
            _ => return false,
        };
        self.has(needed)
    }
}
