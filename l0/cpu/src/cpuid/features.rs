//! The tables CPU models are made of: which features each has, which need the host or each other, and which feature an
//! instruction needs.

use x86defs::cpuid::{FEATURES, Feature, Feature as F};

/// A set of features.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FeatureSet([u64; 4]);

impl FeatureSet {
    /// The set of `list`.
    pub const fn of(list: &[Feature]) -> Self {
        let mut set = Self([0; 4]);
        let mut i = 0;
        while i < list.len() {
            set.0[list[i] as usize >> 6] |= 1 << (list[i] as usize & 63);
            i += 1;
        }
        set
    }

    /// True if `feature` is in the set.
    #[inline(always)]
    pub const fn has(&self, feature: Feature) -> bool {
        self.0[feature as usize >> 6] >> (feature as usize & 63) & 1 != 0
    }

    /// Puts `feature` into the set, or takes it out.
    pub fn set(&mut self, feature: Feature, on: bool) {
        let bit = 1 << (feature as usize & 63);
        let word = &mut self.0[feature as usize >> 6];
        *word = if on { *word | bit } else { *word & !bit };
    }

    /// All features of this set or of `other`.
    #[must_use]
    pub const fn with(mut self, other: Self) -> Self {
        let mut i = 0;
        while i < 4 {
            self.0[i] |= other.0[i];
            i += 1;
        }
        self
    }

    /// The features in the set.
    pub fn iter(&self) -> impl Iterator<Item = Feature> + '_ {
        FEATURES.iter().map(|f| f.feature).filter(|&f| self.has(f))
    }
}

const _: () = assert!(FEATURES.len() <= 256);

/// What every x86-64 processor has.
pub(super) const BASE: FeatureSet = FeatureSet::of(&[
    F::Fpu,
    F::Vme,
    F::De,
    F::Pse,
    F::Tsc,
    F::Msr,
    F::Pae,
    F::Mce,
    F::Cx8,
    F::Apic,
    F::Sep,
    F::Mtrr,
    F::Pge,
    F::Mca,
    F::Cmov,
    F::Pat,
    F::Pse36,
    F::Clflush,
    F::Mmx,
    F::Fxsr,
    F::Sse,
    F::Sse2,
    F::SelfSnoop,
    F::FdpExcptnOnly,
    F::ZeroFcsFds,
    F::Syscall,
    F::Nx,
    F::Lm,
    F::Arat,
    F::Hypervisor,
]);

/// A server processor of Intel's as of 2021, less AVX-512, TSX, SGX and performance monitoring.
pub(super) const TURTLES: FeatureSet = BASE.with(FeatureSet::of(&[
    F::Sse3,
    F::Pclmulqdq,
    F::Vmx,
    F::Ssse3,
    F::Fma,
    F::Cx16,
    F::Pcid,
    F::Sse41,
    F::Sse42,
    F::X2apic,
    F::Movbe,
    F::Popcnt,
    F::TscDeadline,
    F::Aes,
    F::Xsave,
    F::Avx,
    F::F16c,
    F::Rdrand,
    F::Fsgsbase,
    F::TscAdjust,
    F::Bmi1,
    F::Avx2,
    F::Smep,
    F::Bmi2,
    F::Erms,
    F::Invpcid,
    F::Rdseed,
    F::Adx,
    F::Smap,
    F::Clflushopt,
    F::Clwb,
    F::Sha,
    F::Umip,
    F::Pku,
    F::Gfni,
    F::Vaes,
    F::Vpclmulqdq,
    F::Rdpid,
    F::Fsrm,
    F::MdClear,
    F::SpecCtrl,
    F::Stibp,
    F::FlushL1d,
    F::ArchCapabilities,
    F::Xsaveopt,
    F::Xsavec,
    F::Xgetbv1,
    F::Xsaves,
    F::Pdpe1gb,
    F::Rdtscp,
    F::LahfLm,
    F::Lzcnt,
    F::Prefetchw,
    F::Invtsc,
    F::Wbnoinvd,
]));

/// Everything the software CPU executes.
pub(super) const MAX: FeatureSet = TURTLES.with(FeatureSet::of(&[F::La57, F::Serialize, F::AvxVnni]));

/// Models by name. `host` is `turtles`, as what the host lacks is masked in any case.
pub(super) const MODELS: &[(&str, FeatureSet)] =
    &[("turtles", TURTLES), ("host", TURTLES), ("base", BASE), ("max", MAX)];

/// Features whose instructions are executed by the host's own.
pub(super) const NEEDS_HOST: FeatureSet = FeatureSet::of(&[
    F::Sse3,
    F::Pclmulqdq,
    F::Ssse3,
    F::Fma,
    F::Cx16,
    F::Sse41,
    F::Sse42,
    F::Aes,
    F::Avx,
    F::F16c,
    F::Avx2,
    F::Sha,
    F::Gfni,
    F::Vaes,
    F::Vpclmulqdq,
    F::AvxVnni,
]);

/// Features with registers of AVX state: the host's OS must have enabled it too.
pub(super) const NEEDS_HOST_AVX: FeatureSet =
    FeatureSet::of(&[F::Avx, F::Avx2, F::Fma, F::F16c, F::Vaes, F::Vpclmulqdq, F::AvxVnni]);

/// A feature, and one it makes no sense without.
pub(super) const DEPENDENCIES: &[(Feature, Feature)] = &[
    (F::Sse, F::Fxsr),
    (F::Sse2, F::Sse),
    (F::Sse3, F::Sse2),
    (F::Ssse3, F::Sse3),
    (F::Sse41, F::Ssse3),
    (F::Sse42, F::Sse41),
    (F::Aes, F::Sse2),
    (F::Pclmulqdq, F::Sse2),
    (F::Sha, F::Sse2),
    (F::Gfni, F::Sse2),
    (F::Avx, F::Xsave),
    (F::Avx, F::Sse42),
    (F::Avx2, F::Avx),
    (F::Fma, F::Avx),
    (F::F16c, F::Avx),
    (F::AvxVnni, F::Avx2),
    (F::Vaes, F::Avx),
    (F::Vaes, F::Aes),
    (F::Vpclmulqdq, F::Avx),
    (F::Vpclmulqdq, F::Pclmulqdq),
    (F::Xsaveopt, F::Xsave),
    (F::Xsavec, F::Xsave),
    (F::Xgetbv1, F::Xsave),
    (F::Xsaves, F::Xsavec),
    (F::Pku, F::Xsave),
    (F::Pku, F::Lm),
    (F::Lm, F::Pae),
    (F::La57, F::Lm),
    (F::Pcid, F::Lm),
    (F::LahfLm, F::Lm),
    (F::Pdpe1gb, F::Lm),
    (F::X2apic, F::Apic),
    (F::TscDeadline, F::Apic),
    (F::TscAdjust, F::Tsc),
    (F::Rdtscp, F::Tsc),
    (F::Stibp, F::SpecCtrl),
    (F::Mtrr, F::Msr),
    (F::Vmx, F::Msr),
    (F::Vmx, F::Lm),
];

/// What an instruction-set extension, as iced names it, asks of a model.
pub(super) enum Need {
    Nothing,
    One(Feature),
    /// No model has it.
    Absent,
}

pub(super) fn needed_feature(feature: iced_x86::CpuidFeature) -> Need {
    use iced_x86::CpuidFeature as I;
    Need::One(match feature {
        I::INTEL8086
        | I::INTEL8086_ONLY
        | I::INTEL186
        | I::INTEL286
        | I::INTEL386
        | I::INTEL486
        | I::X64
        | I::CPUID
        | I::FPU287
        | I::FPU387
        | I::MULTIBYTENOP
        | I::PAUSE
        | I::RDPMC
        | I::PREFETCHW
        | I::PREFETCHWT1
        | I::CLDEMOTE
        | I::CET_IBT
        | I::CET_SS
        | I::WBNOINVD
        | I::SMM => return Need::Nothing,
        I::FPU => F::Fpu,
        I::ADX => F::Adx,
        I::AES => F::Aes,
        I::AVX => F::Avx,
        I::AVX2 => F::Avx2,
        I::AVX_VNNI => F::AvxVnni,
        I::BMI1 => F::Bmi1,
        I::BMI2 => F::Bmi2,
        I::CLFLUSHOPT => F::Clflushopt,
        I::CLFSH => F::Clflush,
        I::CLWB => F::Clwb,
        I::CMOV => F::Cmov,
        I::CMPXCHG16B => F::Cx16,
        I::CX8 => F::Cx8,
        I::F16C => F::F16c,
        I::FMA => F::Fma,
        I::FSGSBASE => F::Fsgsbase,
        I::FXSR => F::Fxsr,
        I::GFNI => F::Gfni,
        I::INVPCID => F::Invpcid,
        I::LZCNT => F::Lzcnt,
        I::MMX => F::Mmx,
        I::MOVBE => F::Movbe,
        I::MSR => F::Msr,
        I::PCLMULQDQ => F::Pclmulqdq,
        I::PKU => F::Pku,
        I::POPCNT => F::Popcnt,
        I::RDPID => F::Rdpid,
        I::RDRAND => F::Rdrand,
        I::RDSEED => F::Rdseed,
        I::RDTSCP => F::Rdtscp,
        I::SEP => F::Sep,
        I::SERIALIZE => F::Serialize,
        I::SHA => F::Sha,
        I::SMAP => F::Smap,
        I::SSE => F::Sse,
        I::SSE2 => F::Sse2,
        I::SSE3 => F::Sse3,
        I::SSE4_1 => F::Sse41,
        I::SSE4_2 => F::Sse42,
        I::SSSE3 => F::Ssse3,
        I::SYSCALL => F::Syscall,
        I::TSC => F::Tsc,
        I::VAES => F::Vaes,
        I::INVEPT | I::INVVPID | I::VMX => F::Vmx,
        I::VPCLMULQDQ => F::Vpclmulqdq,
        I::XSAVE => F::Xsave,
        I::XSAVEC => F::Xsavec,
        I::XSAVEOPT => F::Xsaveopt,
        I::XSAVES => F::Xsaves,
        // Everything else is of features no model has (iced knows some two hundred).
        _ => return Need::Absent,
    })
}
