//! Every CPUID leaf, made of a model's features, clocks and CPU count.

use x86defs::cpuid::{FEATURES, Feature, Feature as F};
use x86defs::xcr0;

use super::{CpuModel, Dynamic, MISC_LIMIT_CPUID, MISC_XD_DISABLE, SIGNATURE};
use crate::mmu::walk::PHYSICAL_BITS;

/// Highest basic leaf.
const MAX_BASIC: u32 = 0x1f;
/// Highest leaf for hypervisors.
const MAX_HYPERVISOR: u32 = 0x4000_0010;
/// Highest extended leaf.
const MAX_EXTENDED: u32 = 0x8000_0008;
/// What leaf 40000000H calls us. It is nobody else's signature, so no guest expects another's interfaces.
pub const HYPERVISOR_SIGNATURE: &[u8; 12] = b"TurtlesTurtl";

impl CpuModel {
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
pub(super) fn clock_ratio(tsc_hz: u64, timer_hz: u64) -> (u32, u32) {
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
