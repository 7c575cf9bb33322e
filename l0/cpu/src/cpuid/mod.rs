//! CPU models: which features a guest sees, and every CPUID leaf made of them.
//!
//! A model is data: a set of [`Feature`]s, two clock frequencies and a CPU count. What a model shows, the software
//! CPU executes; features whose instructions run on the host are shown only where the host has them.

use std::arch::x86_64::__cpuid_count;

mod features;
mod leaves;

pub use x86defs::cpuid::Feature;
use x86defs::cpuid::{ALIASES, FEATURES, Feature as F, Register};
use x86defs::xcr0;

pub use features::FeatureSet;
use features::{DEPENDENCIES, MAX, MODELS, NEEDS_HOST, NEEDS_HOST_AVX, Need, TURTLES, needed_feature};
use leaves::clock_ratio;
pub use leaves::{HYPERVISOR_SIGNATURE, compact_size, standard_size};

/// Family 6, model 6AH, stepping 6: what CPUID.1:EAX and EDX after reset say.
pub const SIGNATURE: u32 = 0x0006_06a6;
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
        let vmlaunch = Instruction::with(Code::Vmlaunch);
        assert!(!base.allows(&vmlaunch) && CpuModel::default().allows(&vmlaunch));
        for code in [Code::Endbr64, Code::Pause, Code::Wbnoinvd, Code::Nopd, Code::Syscall, Code::Iretq] {
            assert!(base.allows(&Instruction::with(code)), "{code:?}");
        }
        for code in [Code::Xend, Code::Vmmcall, Code::Getsecd] {
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
