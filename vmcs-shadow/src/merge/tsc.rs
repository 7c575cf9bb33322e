//! The TSC that L2 sees is L1's TSC, scaled and offset as L1 has it; L1's is the processor's, scaled and offset as L0 has
//! it ("Time-Stamp Counter Offsetting and Scaling"):
//!
//! ```text
//! tsc1 = tsc × m01 + o01
//! tsc2 = tsc1 × m12 + o12 = tsc × (m01 × m12) + (o01 × m12 + o12)
//! ```
//!
//! where a multiplier counts in units of 2^-48, and an offset is signed.

use x86defs::vmx::{primary, secondary};

use super::{Pair, set_bits};
use crate::field::{Field, Vmcs};

/// A multiplier of one.
pub const ONE: u64 = 1 << 48;

/// How a VMCS makes its guest's TSC of the TSC it stands on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Tsc {
    multiplier: u64,
    offset: u64,
}

impl Tsc {
    /// Scaling is in force only with offsetting.
    fn of(vmcs: &Vmcs) -> Self {
        if vmcs.get32(Field::PrimaryControls) & primary::USE_TSC_OFFSETTING == 0 {
            return Self { multiplier: ONE, offset: 0 };
        }
        let scaling = vmcs.secondary() & secondary::USE_TSC_SCALING != 0;
        let multiplier = if scaling { vmcs.get(Field::TscMultiplier) } else { ONE };
        Self { multiplier, offset: vmcs.get(Field::TscOffset) }
    }

    /// `outer`, and on it `self`.
    fn on(self, outer: Self) -> Self {
        let multiplier = (u128::from(outer.multiplier) * u128::from(self.multiplier)) >> 48;
        // The product of 64 bits signed and 64 unsigned fits 128 signed.
        let scaled = (i128::from(outer.offset as i64) * i128::from(self.multiplier)) >> 48;
        Self { multiplier: multiplier as u64, offset: (scaled as u64).wrapping_add(self.offset) }
    }
}

pub(super) fn merge(vmcs02: &mut Vmcs, pair: &Pair) {
    let tsc = Tsc::of(pair.vmcs12).on(Tsc::of(pair.vmcs01));
    if tsc == (Tsc { multiplier: ONE, offset: 0 }) {
        return;
    }
    set_bits(vmcs02, Field::PrimaryControls, primary::USE_TSC_OFFSETTING);
    vmcs02.set(Field::TscOffset, tsc.offset);
    if tsc.multiplier != ONE {
        set_bits(vmcs02, Field::SecondaryControls, secondary::USE_TSC_SCALING);
        vmcs02.set(Field::TscMultiplier, tsc.multiplier);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What RDTSC returns: the high bits of a 128-bit product, and the offset.
    fn read(tsc: u64, how: Tsc) -> u64 {
        let product = u128::from(tsc) * u128::from(how.multiplier);
        ((product >> 48) as u64).wrapping_add(how.offset)
    }

    #[test]
    fn one_step_is_the_two_steps() {
        let offsets = [0, 1, 1000, 1 << 40, 0_u64.wrapping_sub(1000), 0_u64.wrapping_sub(1 << 40)];
        let multipliers = [ONE, ONE / 2, ONE * 3, ONE / 3, ONE + ONE / 7];
        for (m01, o01) in multipliers.iter().flat_map(|&m| offsets.map(|o| (m, o))) {
            for (m12, o12) in multipliers.iter().flat_map(|&m| offsets.map(|o| (m, o))) {
                let outer = Tsc { multiplier: m01, offset: o01 };
                let inner = Tsc { multiplier: m12, offset: o12 };
                // Late enough that L1's TSC is not negative, early enough for what a multiplier's last bit is worth.
                for tsc in [1_u64 << 43, (1 << 46) + 12345] {
                    let two = read(read(tsc, outer), inner);
                    let one = read(tsc, inner.on(outer));
                    let apart = two.wrapping_sub(one) as i64;
                    assert!(apart.abs() <= 5, "{outer:?} {inner:?} {tsc}: {apart}");
                }
            }
        }
    }

    #[test]
    fn exact_cases() {
        let double = Tsc { multiplier: 2 * ONE, offset: 10 };
        let minus = Tsc { multiplier: ONE, offset: 0_u64.wrapping_sub(5) };
        assert_eq!(double.on(minus), Tsc { multiplier: 2 * ONE, offset: 0 }, "(t - 5) * 2 + 10");
        assert_eq!(minus.on(double), Tsc { multiplier: 2 * ONE, offset: 5 }, "t * 2 + 10 - 5");
    }

    #[test]
    fn scaling_counts_only_with_offsetting() {
        let mut vmcs = Vmcs::default();
        vmcs.set(Field::PrimaryControls, primary::ACTIVATE_SECONDARY.into());
        vmcs.set(Field::SecondaryControls, secondary::USE_TSC_SCALING.into());
        vmcs.set(Field::TscMultiplier, 7);
        vmcs.set(Field::TscOffset, 8);
        assert_eq!(Tsc::of(&vmcs), Tsc { multiplier: ONE, offset: 0 });
        set_bits(&mut vmcs, Field::PrimaryControls, primary::USE_TSC_OFFSETTING);
        assert_eq!(Tsc::of(&vmcs), Tsc { multiplier: 7, offset: 8 });
        vmcs.set(Field::SecondaryControls, 0);
        assert_eq!(Tsc::of(&vmcs), Tsc { multiplier: ONE, offset: 8 });
    }
}
