//! CPU models: which features a guest sees, and every CPUID leaf made of them.
//!
//! A model is data: a set of [`Feature`]s, two clock frequencies and a CPU count. What a model shows, the software
//! CPU executes; features whose instructions run on the host are shown only where the host has them.

use std::arch::x86_64::__cpuid_count;

pub use x86defs::cpuid::Feature;
use x86defs::cpuid::{ALIASES, FEATURES, Register};
use x86defs::xcr0;

use crate::mmu::walk::PHYSICAL_BITS;

/// Family 6, model 6AH, stepping 6: what CPUID.1:EAX and EDX after reset say.
pub const SIGNATURE: u32 = 0x0006_06a6;
/// Highest basic leaf.
const MAX_BASIC: u32 = 0x1f;
/// Highest leaf for hypervisors.
const MAX_HYPERVISOR: u32 = 0x4000_0010;
/// Highest extended leaf.
const MAX_EXTENDED: u32 = 0x8000_0008;
/// What leaf 40000000H calls us. It is nobody else's signature, so no guest expects another's interfaces.
pub const HYPERVISOR_SIGNATURE: &[u8; 12] = b"TurtlesTurtl";

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

use Feature as F;

/// What every x86-64 processor has.
const BASE: FeatureSet = FeatureSet::of(&[
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
const TURTLES: FeatureSet = BASE.with(FeatureSet::of(&[
    F::Sse3,
    F::Pclmulqdq,
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
const MAX: FeatureSet = TURTLES.with(FeatureSet::of(&[F::La57, F::Serialize]));

/// Models by name. `host` is the default, as everything the host lacks is masked in any case.
const MODELS: &[(&str, FeatureSet)] =
    &[("turtles", TURTLES), ("host", TURTLES), ("base", BASE), ("max", MAX)];

/// Features whose instructions are executed by the host's own.
const NEEDS_HOST: FeatureSet = FeatureSet::of(&[
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
]);

/// Features with registers of AVX state: the host's OS must have enabled it too.
const NEEDS_HOST_AVX: FeatureSet =
    FeatureSet::of(&[F::Avx, F::Avx2, F::Fma, F::F16c, F::Vaes, F::Vpclmulqdq]);

/// A feature, and one it makes no sense without.
const DEPENDENCIES: &[(Feature, Feature)] = &[
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
];

/// IA32_ARCH_CAPABILITIES: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO,
/// SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, FB_CLEAR, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO. Nothing here speculates, and
/// a guest that knows so leaves its slow mitigations off.
pub const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 17
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// What CPUID shows that depends on the vCPU's state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dynamic {
    pub apic_id: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// CR4.PKE.
    pub ospke: bool,
    /// IA32_APIC_BASE's global enable.
    pub apic_enabled: bool,
    /// Executing 64-bit code (SYSCALL is shown there only).
    pub code64: bool,
    pub xcr0: u64,
    pub xss: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
}

/// IA32_MISC_ENABLE: leaves above 3 are hidden.
pub const MISC_LIMIT_CPUID: u64 = 1 << 22;
/// IA32_MISC_ENABLE: NX is hidden and disabled.
pub const MISC_XD_DISABLE: u64 = 1 << 34;

/// Why a `--cpu` value was refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CpuModelError {
    #[error("unknown CPU model '{name}'; there are: {known}")]
    UnknownModel { name: String, known: String },
    #[error("unknown CPU flag '{name}'{}", near_text(.near))]
    UnknownFlag { name: String, near: Vec<&'static str> },
    #[error("CPU flag '{name}' is not supported by the software CPU; leave it out")]
    Unsupported { name: &'static str },
    #[error("bad value '{value}' for CPU flag '{name}': say on or off")]
    BadValue { name: String, value: String },
}

fn near_text(near: &[&'static str]) -> String {
    if near.is_empty() { String::new() } else { format!("; did you mean {}?", near.join(", ")) }
}

/// What a guest sees of its processor.
#[derive(Clone, Debug)]
pub struct CpuModel {
    features: FeatureSet,
    tsc_hz: u64,
    timer_hz: u64,
    /// Ratio of the two above for leaf 15H.
    ratio: (u32, u32),
    cpus: u32,
    warnings: Vec<String>,
}

impl Default for CpuModel {
    fn default() -> Self {
        Self::from_features(TURTLES, FeatureSet::default())
    }
}

impl CpuModel {
    /// Names of the models.
    pub fn names() -> impl Iterator<Item = &'static str> {
        MODELS.iter().map(|m| m.0)
    }

    /// Names of the flags that may be switched on.
    pub fn flag_names() -> impl Iterator<Item = &'static str> {
        FEATURES.iter().filter(|f| MAX.has(f.feature)).map(|f| f.name)
    }

    /// Reads `model[,+flag|,-flag|,flag=on|,flag=off]...`.
    pub fn parse(text: &str) -> Result<Self, CpuModelError> {
        let mut parts = text.split(',').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let Some(&(_, mut features)) = MODELS.iter().find(|m| m.0 == name) else {
            let known = Self::names().collect::<Vec<_>>().join(", ");
            return Err(CpuModelError::UnknownModel { name: name.to_owned(), known });
        };
        let mut asked = FeatureSet::default();
        for part in parts.filter(|p| !p.is_empty()) {
            let (flag, on) = parse_flag(part)?;
            let feature = find_feature(flag)?;
            if on && !MAX.has(feature) {
                return Err(CpuModelError::Unsupported { name: feature.bit().name });
            }
            features.set(feature, on);
            asked.set(feature, on);
        }
        Ok(Self::from_features(features, asked))
    }

    /// `features` less what the host or another missing feature rules out; warns of what was `asked` for.
    fn from_features(mut features: FeatureSet, asked: FeatureSet) -> Self {
        let mut warnings = Vec::new();
        let host_avx = std::arch::is_x86_feature_detected!("avx");
        for feature in FEATURES.iter().map(|f| f.feature).filter(|&f| NEEDS_HOST.has(f)) {
            if features.has(feature) && !(host_has(feature) && (host_avx || !NEEDS_HOST_AVX.has(feature))) {
                features.set(feature, false);
                if asked.has(feature) {
                    warnings.push(format!("this host's processor has no {}: left out", feature.bit().name));
                }
            }
        }
        let mut again = true;
        while again {
            again = false;
            for &(feature, needs) in DEPENDENCIES {
                if features.has(feature) && !features.has(needs) {
                    features.set(feature, false);
                    again = true;
                    if asked.has(feature) {
                        let (name, needs) = (feature.bit().name, needs.bit().name);
                        warnings.push(format!("{name} makes no sense without {needs}: left out"));
                    }
                }
            }
        }
        let (tsc_hz, timer_hz) = (2_000_000_000, 25_000_000);
        let ratio = clock_ratio(tsc_hz, timer_hz);
        Self { features, tsc_hz, timer_hz, ratio, cpus: 1, warnings }
    }

    /// The frequencies of the TSC and of the local APIC's timer, which leaf 15H tells the guest.
    #[must_use]
    pub fn with_clocks(mut self, tsc_hz: u64, timer_hz: u64) -> Self {
        self.tsc_hz = tsc_hz.max(1_000_000);
        self.timer_hz = timer_hz.clamp(1_000_000, u64::from(u32::MAX));
        self.ratio = clock_ratio(self.tsc_hz, self.timer_hz);
        self
    }

    /// The number of CPUs in the package, each a core of its own.
    #[must_use]
    pub fn with_cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus.max(1);
        self
    }

    /// What was asked for and is not there.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// True if the model has `feature`.
    #[inline(always)]
    pub const fn has(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }

    /// All features.
    pub fn features(&self) -> &FeatureSet {
        &self.features
    }

    /// True if the model has what `insn` needs; without, it is #UD. Instructions that older processors take for
    /// another one, or for a hint, are always allowed.
    pub fn allows(&self, insn: &iced_x86::Instruction) -> bool {
        insn.cpuid_features().iter().all(|&needs| match needed_feature(needs) {
            Need::Nothing => true,
            Need::One(feature) => self.has(feature),
            Need::Absent => false,
        })
    }

    /// How iced is to read bytes that mean another instruction without a feature: TZCNT is BSF then, LZCNT is BSR.
    pub fn decoder_options(&self) -> u32 {
        let mut options = iced_x86::DecoderOptions::NONE;
        if !self.has(F::Bmi1) {
            options |= iced_x86::DecoderOptions::NO_MPFX_0FBC;
        }
        if !self.has(F::Lzcnt) {
            options |= iced_x86::DecoderOptions::NO_MPFX_0FBD;
        }
        options
    }

    /// Frequency of the TSC.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// The state components XCR0 may enable.
    pub fn xcr0_allowed(&self) -> u64 {
        if !self.has(F::Xsave) {
            return 0;
        }
        let mut mask = xcr0::X87 | xcr0::SSE;
        if self.has(F::Avx) {
            mask |= xcr0::AVX;
        }
        if self.has(F::Pku) {
            mask |= xcr0::PKRU;
        }
        mask
    }

    /// CPUID.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, now: &Dynamic) -> [u32; 4] {
        let mut out = match leaf {
            0x4000_0000..=0x4000_ffff if self.has(F::Hypervisor) => return self.hypervisor_leaf(leaf),
            0x8000_0000..=MAX_EXTENDED => self.extended_leaf(leaf),
            0..=MAX_BASIC => self.basic_leaf(leaf, subleaf, now),
            // Leaves above the highest answer as the highest basic leaf does.
            _ => return self.cpuid(MAX_BASIC, subleaf, now),
        };
        for bit in FEATURES.iter().filter(|b| b.leaf == leaf && b.subleaf == subleaf_of(leaf, subleaf)) {
            if self.has(bit.feature) && shown(bit.feature, now) {
                out[bit.register as usize] |= 1 << bit.bit;
            }
        }
        out
    }

    fn basic_leaf(&self, leaf: u32, subleaf: u32, now: &Dynamic) -> [u32; 4] {
        match leaf {
            0 => {
                let max = if now.misc_enable & MISC_LIMIT_CPUID != 0 { 3 } else { MAX_BASIC };
                [max, word(b"Genu"), word(b"ntel"), word(b"ineI")]
            }
            1 => self.version_leaf(now),
            // No descriptors: leaf 4 tells of caches, and there is no TLB to describe (FEH).
            2 => [0x00fe_ff01, 0, 0, 0],
            4 => self.cache_leaf(subleaf),
            6 => [0; 4],
            7 if subleaf == 0 => [1, 0, u32::from(now.ospke) << 4, 0],
            0xb | 0x1f => self.topology_leaf(subleaf, now.apic_id),
            0xd => self.xsave_leaf(subleaf, now),
            0x15 => [self.ratio.0, self.ratio.1, self.timer_hz as u32, 0],
            0x16 => {
                let mhz = (self.tsc_hz / 1_000_000) as u32 & 0xffff;
                [mhz, mhz, 100, 0]
            }
            _ => [0; 4],
        }
    }

    fn version_leaf(&self, now: &Dynamic) -> [u32; 4] {
        let clflush_line = 8 << 8;
        let ids = self.cpus.next_power_of_two().min(255) << 16;
        let ebx = (now.apic_id & 0xff) << 24 | ids | clflush_line;
        let osxsave = u32::from(now.osxsave) << 27;
        let ht = u32::from(self.cpus > 1) << 28;
        [SIGNATURE, ebx, osxsave, ht]
    }

    /// Deterministic cache parameters: 48 KiB L1D, 32 KiB L1I, 1.25 MiB L2 for each core, 24 MiB L3 for the package.
    fn cache_leaf(&self, subleaf: u32) -> [u32; 4] {
        let cores = (self.cpus.next_power_of_two() - 1).min(63);
        // (type, level, ways, sets, sharing threads - 1, EDX)
        let (kind, level, ways, sets, shared, edx) = match subleaf {
            0 => (1, 1, 12, 64, 0, 0),
            1 => (2, 1, 8, 64, 0, 0),
            2 => (3, 2, 20, 1024, 0, 0),
            3 => (3, 3, 12, 32768, cores, 4),
            _ => return [0; 4],
        };
        let self_initializing = 1 << 8;
        let eax = kind | level << 5 | self_initializing | shared << 14 | cores << 26;
        [eax, (ways - 1) << 22 | 63, sets - 1, edx]
    }

    /// Extended topology: one thread in each core, all cores in one package.
    fn topology_leaf(&self, subleaf: u32, apic_id: u32) -> [u32; 4] {
        let core_bits = self.cpus.next_power_of_two().trailing_zeros();
        match subleaf {
            0 => [0, 1, 1 << 8, apic_id],
            1 => [core_bits, self.cpus, 2 << 8 | 1, apic_id],
            n => [0, 0, n & 0xff, apic_id],
        }
    }

    fn xsave_leaf(&self, subleaf: u32, now: &Dynamic) -> [u32; 4] {
        let allowed = self.xcr0_allowed();
        if allowed == 0 {
            return [0; 4];
        }
        match subleaf {
            0 => [allowed as u32, standard_size(now.xcr0), standard_size(allowed), (allowed >> 32) as u32],
            1 if self.has(F::Xsaves) => [0, compact_size(now.xcr0 | now.xss), 0, 0],
            1 if self.has(F::Xsavec) => [0, compact_size(now.xcr0), 0, 0],
            2 if allowed & xcr0::AVX != 0 => [AVX_SIZE, AVX_OFFSET, 0, 0],
            9 if allowed & xcr0::PKRU != 0 => [PKRU_SIZE, PKRU_OFFSET, 0, 0],
            _ => [0; 4],
        }
    }

    fn hypervisor_leaf(&self, leaf: u32) -> [u32; 4] {
        match leaf {
            0x4000_0000 => {
                let s = HYPERVISOR_SIGNATURE;
                [MAX_HYPERVISOR, word(&s[0..4]), word(&s[4..8]), word(&s[8..12])]
            }
            // TSC and local APIC timer in kHz, where several hypervisors tell them.
            0x4000_0010 => [(self.tsc_hz / 1000) as u32, (self.timer_hz / 1000) as u32, 0, 0],
            _ => [0; 4],
        }
    }

    fn extended_leaf(&self, leaf: u32) -> [u32; 4] {
        match leaf {
            0x8000_0000 => [MAX_EXTENDED, 0, 0, 0],
            0x8000_0002..=0x8000_0004 => {
                let mut brand = [0; 48];
                let text = b"Intel(R) Xeon(R) compatible Turtles Processor";
                brand[..text.len()].copy_from_slice(text);
                let at = (leaf - 0x8000_0002) as usize * 16;
                std::array::from_fn(|i| word(&brand[at + 4 * i..at + 4 * i + 4]))
            }
            // L2: 1280 KiB, 20 ways as 16 (8H), 64-byte lines.
            0x8000_0006 => [0, 0, 1280 << 16 | 8 << 12 | 64, 0],
            0x8000_0008 => {
                let linear = if self.has(F::La57) { 57 } else { 48 };
                [PHYSICAL_BITS | linear << 8, 0, 0, 0]
            }
            _ => [0; 4],
        }
    }
}

/// What an instruction-set extension, as iced names it, asks of a model.
enum Need {
    Nothing,
    One(Feature),
    /// No model has it.
    Absent,
}

fn needed_feature(feature: iced_x86::CpuidFeature) -> Need {
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
        I::VPCLMULQDQ => F::Vpclmulqdq,
        I::XSAVE => F::Xsave,
        I::XSAVEC => F::Xsavec,
        I::XSAVEOPT => F::Xsaveopt,
        I::XSAVES => F::Xsaves,
        // Everything else is of features no model has (iced knows some two hundred).
        _ => return Need::Absent,
    })
}

/// Subleaf that the feature table is asked for: most leaves have only one.
fn subleaf_of(leaf: u32, subleaf: u32) -> u32 {
    if matches!(leaf, 7 | 0xd) { subleaf } else { 0 }
}

/// Features that come and go with the vCPU's state.
fn shown(feature: Feature, now: &Dynamic) -> bool {
    match feature {
        F::Apic | F::X2apic => now.apic_enabled,
        F::Syscall => now.code64,
        F::Nx => now.misc_enable & MISC_XD_DISABLE == 0,
        _ => true,
    }
}

const AVX_OFFSET: u32 = 576;
const AVX_SIZE: u32 = 256;
const PKRU_OFFSET: u32 = 2688;
const PKRU_SIZE: u32 = 8;

/// Size of an XSAVE area in standard format for the components of `xcr0`.
pub fn standard_size(xcr0: u64) -> u32 {
    if xcr0 & xcr0::PKRU != 0 {
        PKRU_OFFSET + PKRU_SIZE
    } else if xcr0 & xcr0::AVX != 0 {
        AVX_OFFSET + AVX_SIZE
    } else {
        AVX_OFFSET
    }
}

/// Size of an XSAVE area in compacted format for `components`.
pub fn compact_size(components: u64) -> u32 {
    let avx = if components & xcr0::AVX != 0 { AVX_SIZE } else { 0 };
    let pkru = if components & xcr0::PKRU != 0 { PKRU_SIZE } else { 0 };
    AVX_OFFSET + avx + pkru
}

fn word(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |w, &b| w << 8 | u32::from(b))
}

/// Denominator and numerator that give `tsc_hz` from `timer_hz` best, such that a guest that computes
/// `timer_khz * numerator` in 32 bits (Linux) has no overflow.
fn clock_ratio(tsc_hz: u64, timer_hz: u64) -> (u32, u32) {
    let limit = u64::from(u32::MAX) / (timer_hz / 1000).max(1);
    let mut best = (1, (tsc_hz / timer_hz).clamp(1, limit), u64::MAX);
    for denominator in 1..4096 {
        let numerator = (tsc_hz * denominator + timer_hz / 2) / timer_hz;
        if numerator > limit {
            break;
        }
        let got = timer_hz * numerator / denominator;
        let error = got.abs_diff(tsc_hz);
        if numerator > 0 && error < best.2 {
            best = (denominator, numerator, error);
        }
    }
    (best.0 as u32, best.1 as u32)
}

fn host_has(feature: Feature) -> bool {
    let bit = feature.bit();
    // CPUID has no side effects, and every x86-64 processor has leaves 0 and 80000000H.
    let max = __cpuid_count(bit.leaf & 0x8000_0000, 0).eax;
    if bit.leaf > max {
        return false;
    }
    let out = __cpuid_count(bit.leaf, bit.subleaf);
    let value = match bit.register {
        Register::Eax => out.eax,
        Register::Ebx => out.ebx,
        Register::Ecx => out.ecx,
        Register::Edx => out.edx,
    };
    value >> bit.bit & 1 != 0
}

fn parse_flag(part: &str) -> Result<(&str, bool), CpuModelError> {
    if let Some(flag) = part.strip_prefix('+') {
        return Ok((flag, true));
    }
    if let Some(flag) = part.strip_prefix('-') {
        return Ok((flag, false));
    }
    match part.split_once('=') {
        None | Some((_, "on" | "yes" | "true")) => Ok((part.split('=').next().unwrap_or(part), true)),
        Some((flag, "off" | "no" | "false")) => Ok((flag, false)),
        Some((flag, value)) => {
            Err(CpuModelError::BadValue { name: flag.to_owned(), value: value.to_owned() })
        }
    }
}

fn normal(name: &str) -> String {
    name.to_ascii_lowercase().replace(['_', '.'], "-")
}

fn find_feature(flag: &str) -> Result<Feature, CpuModelError> {
    let wanted = normal(flag);
    let alias = ALIASES.iter().find(|a| normal(a.0) == wanted);
    let wanted = alias.map_or(wanted, |a| normal(a.1));
    if let Some(bit) = FEATURES.iter().find(|b| normal(b.name) == wanted) {
        return Ok(bit.feature);
    }
    let mut near: Vec<(usize, &'static str)> = CpuModel::flag_names()
        .map(|name| (distance(&normal(name), &wanted), name))
        .filter(|&(d, name)| d <= 2 && d < wanted.len() || wanted.len() > 2 && normal(name).contains(&wanted))
        .collect();
    near.sort();
    near.truncate(4);
    Err(CpuModelError::UnknownFlag { name: flag.to_owned(), near: near.into_iter().map(|n| n.1).collect() })
}

/// Edit distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (corner + usize::from(x != y)).min(above + 1).min(row[j] + 1);
            corner = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Dynamic {
        Dynamic { apic_enabled: true, code64: true, xcr0: 7, ..Dynamic::default() }
    }

    #[test]
    fn table_is_in_order_of_the_enum() {
        for (i, bit) in FEATURES.iter().enumerate() {
            assert_eq!(bit.feature as usize, i);
        }
    }

    #[test]
    fn flags_switch_bits() {
        let model = CpuModel::parse("turtles,-smep,+la57,smap=off").unwrap();
        assert_eq!(model.cpuid(7, 0, &now())[1] & (1 << 7 | 1 << 20), 0);
        assert_ne!(model.cpuid(7, 0, &now())[2] & 1 << 16, 0);
        assert_eq!(model.cpuid(0x8000_0008, 0, &now())[0], 46 | 57 << 8);
    }

    #[test]
    fn flags_are_spelled_as_in_qemu() {
        for text in ["base,+sse4.1", "base,+sse4_1", "base,sse4-1=on", "base,pni=on", "base,+SSE3"] {
            assert!(CpuModel::parse(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn instructions_go_with_their_flags() {
        use iced_x86::{Code, Instruction, Register::*};
        let base = CpuModel::parse("base").unwrap();
        let popcnt = Instruction::with2(Code::Popcnt_r64_rm64, RAX, RCX).unwrap();
        assert!(!base.allows(&popcnt) && CpuModel::default().allows(&popcnt));
        for code in [Code::Endbr64, Code::Pause, Code::Wbnoinvd, Code::Nopd, Code::Syscall, Code::Iretq] {
            assert!(base.allows(&Instruction::with(code)), "{code:?}");
        }
        for code in [Code::Vmlaunch, Code::Xend, Code::Vmmcall, Code::Getsecd] {
            assert!(!CpuModel::default().allows(&Instruction::with(code)), "{code:?}");
        }
    }

    #[test]
    fn unknown_flags_name_their_neighbours() {
        let Err(CpuModelError::UnknownFlag { near, .. }) = CpuModel::parse("turtles,+smapp") else {
            panic!()
        };
        assert!(near.contains(&"smap"));
        assert!(matches!(CpuModel::parse("turtles,+avx512f"), Err(CpuModelError::Unsupported { .. })));
        assert!(matches!(CpuModel::parse("pentium"), Err(CpuModelError::UnknownModel { .. })));
    }

    #[test]
    fn dependents_go_with_what_they_need() {
        let model = CpuModel::parse("turtles,-xsave,+avx2").unwrap();
        assert!(!model.has(F::Avx) && !model.has(F::Avx2) && !model.has(F::Pku) && !model.has(F::Xsaves));
        assert!(!model.warnings().is_empty());
        assert_eq!(model.cpuid(0xd, 0, &now()), [0; 4]);
    }

    #[test]
    fn xsave_sizes() {
        let model = CpuModel::parse("max").unwrap();
        if !model.has(F::Avx) {
            return;
        }
        assert_eq!(model.cpuid(0xd, 0, &now()), [0x207, 832, 2696, 0]);
        assert_eq!(model.cpuid(0xd, 1, &now())[1], 832);
        assert_eq!(model.cpuid(0xd, 2, &now()), [256, 576, 0, 0]);
        assert_eq!(model.cpuid(0xd, 9, &now()), [8, 2688, 0, 0]);
    }

    #[test]
    fn vendor_and_limits() {
        let model = CpuModel::default();
        let [max, b, c, d] = model.cpuid(0, 0, &now());
        let text: Vec<u8> = [b, d, c].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!((max, &text[..]), (0x1f, &b"GenuineIntel"[..]));
        let limited = Dynamic { misc_enable: MISC_LIMIT_CPUID, ..now() };
        assert_eq!(model.cpuid(0, 0, &limited)[0], 3);
        assert_eq!(model.cpuid(0x8000_ffff, 0, &now()), model.cpuid(0x1f, 0, &now()));
    }

    #[test]
    fn clocks_survive_32_bit_arithmetic() {
        for (tsc, timer) in
            [(2_893_202_000, 25_000_000), (2_000_000_000, 1_000_000_000), (3_700_123_456, 24_000_000)]
        {
            let model = CpuModel::default().with_clocks(tsc, timer);
            let [den, num, hz, _] = model.cpuid(0x15, 0, &now());
            let khz = (hz / 1000).checked_mul(num).unwrap() / den;
            let error = (i64::from(khz) - (tsc / 1000) as i64).abs();
            assert!(error < 30, "{tsc}: {khz}");
        }
    }

    #[test]
    fn topology() {
        let model = CpuModel::default().with_cpus(6);
        let two = Dynamic { apic_id: 2, ..now() };
        assert_eq!(model.cpuid(0xb, 0, &two), [0, 1, 0x100, 2]);
        assert_eq!(model.cpuid(0xb, 1, &two), [3, 6, 0x201, 2]);
        assert_eq!(model.cpuid(0xb, 2, &two), [0, 0, 2, 2]);
        assert_eq!(model.cpuid(1, 0, &two)[1], 2 << 24 | 8 << 16 | 8 << 8);
    }
}
