//! What the guest sees in CPUID while KVM runs it: the CPU model's leaves, less what KVM cannot give.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use turtles_cpu::cpuid::standard_size;
use x86defs::cpuid::{FEATURES, Register};
use x86defs::xcr0;

use super::KvmHost;
use crate::engine::EngineError;

/// Feature words: a set bit promises something that KVM must be able to keep.
const FEATURE_WORDS: &[(u32, u32, Register)] = &[
    (1, 0, Register::Ecx),
    (1, 0, Register::Edx),
    (7, 0, Register::Ebx),
    (7, 0, Register::Ecx),
    (7, 0, Register::Edx),
    (7, 1, Register::Eax),
    (0xd, 0, Register::Eax),
    (0xd, 0, Register::Edx),
    (0xd, 1, Register::Eax),
    (0xd, 1, Register::Ecx),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (0x8000_0008, 0, Register::Ebx),
];
/// Leaves with subleaves, and how many of them a guest may ask for.
const SUBLEAVES: &[(u32, u32)] = &[(4, 4), (7, 2), (0xb, 3), (0xd, 10), (0x14, 1), (0x1f, 3)];
/// No range of leaves is longer, whatever its first leaf says.
const LONGEST_RANGE: u32 = 0x40;

/// Protection keys, in leaf 7's ECX.
const PKU: u32 = 1 << 3;
/// The TSC-deadline timer, in leaf 1's ECX.
const TSC_DEADLINE: u32 = 1 << 24;
/// Bytes of PKRU in an XSAVE area.
const PKRU_LEN: u32 = 8;

/// Bits that do not depend on what KVM can do: what we, not KVM, give the guest.
fn ours(leaf: u32, subleaf: u32, register: Register) -> u32 {
    match (leaf, subleaf, register) {
        // VMX, x2APIC, TSC-deadline timer, OSXSAVE (KVM shows CR4's bit), hypervisor present.
        (1, 0, Register::Ecx) => 1 << 5 | 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31,
        // APIC, MTRR, MCE, MCA, HTT (topology), PAT: our APIC, our MSRs.
        (1, 0, Register::Edx) => 1 << 7 | 1 << 9 | 1 << 12 | 1 << 14 | 1 << 16 | 1 << 28,
        // IA32_TSC_ADJUST.
        (7, 0, Register::Ebx) => 1 << 1,
        // OSPKE (KVM shows CR4's bit).
        (7, 0, Register::Ecx) => 1 << 4,
        // IA32_ARCH_CAPABILITIES.
        (7, 0, Register::Edx) => 1 << 29,
        _ => 0,
    }
}

/// Feature bits of the CPU model that KVM cannot give.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LostFeature {
    /// Leaf.
    pub leaf: u32,
    /// Subleaf.
    pub subleaf: u32,
    /// Output register.
    pub register: Register,
    /// The bits.
    pub bits: u32,
}

impl std::fmt::Display for LostFeature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { leaf, subleaf, register, bits } = *self;
        let mut separator = "";
        for bit in (0..32).filter(|bit| bits >> bit & 1 != 0) {
            let place = (leaf, subleaf, register, bit);
            match FEATURES.iter().find(|f| (f.leaf, f.subleaf, f.register, f.bit) == place) {
                Some(feature) => write!(f, "{separator}{}", feature.name)?,
                None => write!(f, "{separator}CPUID.{leaf:X}H.{subleaf}:{register:?}[{bit}]")?,
            }
            separator = ", ";
        }
        Ok(())
    }
}

/// The entry for `leaf` and `subleaf`, if there is one.
pub(super) fn find(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|e| {
        let indexed = e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        e.function == leaf && (!indexed || e.index == subleaf)
    })
}

fn entry(leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    let flags = if subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
    kvm_cpuid_entry2 {
        function: leaf,
        index: subleaf.unwrap_or(0),
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

impl KvmHost {
    /// The state components that KVM can switch, where the software CPU has them too in an XSAVE area: guest memory
    /// must mean the same to both.
    fn shared_components(&self) -> u64 {
        let [low, _, _, _] = self.supported_cpuid(0xd, 0);
        let mut shared = u64::from(low) & (xcr0::X87 | xcr0::SSE | xcr0::AVX);
        let pkru_ends = self.supported_cpuid(0xd, 9)[1].wrapping_add(PKRU_LEN);
        if u64::from(low) & xcr0::PKRU != 0 && pkru_ends == standard_size(xcr0::PKRU) {
            shared |= xcr0::PKRU;
        }
        shared
    }

    /// The bits of a feature word that this KVM, or we beside it, can give a guest.
    fn gives(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        let mut supported = self.supported_cpuid(leaf, subleaf)[register as usize];
        let components = self.shared_components();
        match (leaf, subleaf, register) {
            (7, 0, Register::Ecx) if components & xcr0::PKRU == 0 => supported &= !PKU,
            (0xd, 0, Register::Eax) => supported &= components as u32,
            (0xd, 0, Register::Edx) => supported &= (components >> 32) as u32,
            _ => {}
        }
        let mut ours = ours(leaf, subleaf, register);
        if (leaf, register) == (1, Register::Ecx) && !self.exits.tsc_deadline {
            ours &= !TSC_DEADLINE;
            supported &= !TSC_DEADLINE;
        }
        supported | ours
    }

    /// True if a guest of this KVM can have the feature that `bit` of a CPUID register stands for.
    pub fn can_give(&self, leaf: u32, subleaf: u32, register: Register, bit: u32) -> bool {
        let is_feature = FEATURE_WORDS.contains(&(leaf, subleaf, register));
        !is_feature || self.gives(leaf, subleaf, register) >> (bit & 31) & 1 != 0
    }

    /// `answer`, the CPU model's for `leaf` and `subleaf`, less what KVM cannot give; also tells the bits lost. An
    /// owner of several engines shows the guest this, whichever engine runs it.
    pub fn limit_cpuid(&self, leaf: u32, subleaf: u32, mut answer: [u32; 4]) -> ([u32; 4], Vec<LostFeature>) {
        let mut lost = Vec::new();
        for &(l, s, register) in FEATURE_WORDS.iter().filter(|w| (w.0, w.1) == (leaf, subleaf)) {
            let index = register as usize;
            let bits = answer[index] & !self.gives(l, s, register);
            if bits != 0 {
                answer[index] &= !bits;
                lost.push(LostFeature { leaf, subleaf, register, bits });
            }
        }
        match (leaf, subleaf) {
            (0xd, 0) if !lost.is_empty() => {
                let components = u64::from(answer[0]) | u64::from(answer[3]) << 32;
                answer[2] = standard_size(components);
            }
            (0xd, 9) if self.shared_components() & xcr0::PKRU == 0 => answer = [0; 4],
            (0x8000_0008, _) => answer[0] = self.limit_widths(answer[0]),
            _ => {}
        }
        (answer, lost)
    }

    /// The widths of physical and linear addresses: the guest may not use bits that the host's processor reserves.
    fn limit_widths(&self, widths: u32) -> u32 {
        let supported = self.supported_cpuid(0x8000_0008, 0)[0];
        let physical = (widths & 0xff).min((supported & 0xff).max(36));
        let linear = (widths >> 8 & 0xff).min((supported >> 8 & 0xff).max(48));
        widths & !0xffff | linear << 8 | physical
    }

    /// All leaves that `ask` (the CPU model, in the state after reset) answers, as KVM takes them.
    pub(super) fn cpuid_entries(
        &self,
        ask: &dyn Fn(u32, u32) -> [u32; 4],
    ) -> Result<(CpuId, Vec<LostFeature>), EngineError> {
        let mut entries = Vec::new();
        let mut lost = Vec::new();
        for first in [0, 0x4000_0000, 0x8000_0000] {
            let last = ask(first, 0)[0];
            if last & 0xffff_0000 != first {
                continue;
            }
            for leaf in first..=last.min(first + LONGEST_RANGE) {
                let subleaves = SUBLEAVES.iter().find(|s| s.0 == leaf).map(|s| s.1);
                for subleaf in 0..subleaves.unwrap_or(1) {
                    let (answer, gone) = self.limit_cpuid(leaf, subleaf, ask(leaf, subleaf));
                    lost.extend(gone);
                    entries.push(entry(leaf, subleaves.map(|_| subleaf), answer));
                }
            }
        }
        let list = CpuId::from_entries(&entries).map_err(|error| EngineError::Kvm {
            what: "making a list of CPUID leaves".into(),
            source: std::io::Error::other(format!("{error:?}")),
        })?;
        Ok((list, lost))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_features_are_told_by_name() {
        let lost = LostFeature { leaf: 1, subleaf: 0, register: Register::Ecx, bits: 1 | 1 << 28 };
        assert_eq!(lost.to_string(), "sse3, avx");
        let unnamed = LostFeature { leaf: 0xd, subleaf: 0, register: Register::Eax, bits: 1 << 9 };
        assert_eq!(unnamed.to_string(), "CPUID.DH.0:Eax[9]");
    }

    #[test]
    fn entries_are_found_by_subleaf_only_where_it_counts() {
        let entries =
            [entry(1, None, [1, 0, 0, 0]), entry(7, Some(0), [2, 0, 0, 0]), entry(7, Some(1), [3, 0, 0, 0])];
        assert_eq!(find(&entries, 1, 5).map(|e| e.eax), Some(1));
        assert_eq!(find(&entries, 7, 1).map(|e| e.eax), Some(3));
        assert!(find(&entries, 7, 2).is_none());
        assert!(find(&entries, 2, 0).is_none());
    }
}
