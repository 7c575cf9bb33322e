//! A VMCS in L1's memory. Software sees eight bytes of the region; the rest is the processor's business ("Format of the
//! VMCS Region"), that is, ours:
//!
//! ```text
//! 0       VMCS revision identifier; bit 31: shadow VMCS      software's
//! 4       VMX-abort indicator                                software's and the processor's
//! 8       launch state: 0 clear, 1 launched                  from here on: DATA_OFFSET, encode() and decode()
//! 16      one little-endian 64-bit word for each field, in the order of FIELDS
//! ```
//!
//! Any contents decode to some VMCS: L1 may write what it likes there, and its VM entry checks the values.

use crate::caps::REVISION;
use crate::field::{COUNT, FIELDS, Vmcs};

/// Size of a VMXON or VMCS region.
pub const SIZE: usize = 4096;
/// Offset of the VMX-abort indicator.
pub const ABORT_OFFSET: usize = 4;
/// Where our part begins.
pub const DATA_OFFSET: usize = 8;
/// Size of our part.
pub const DATA_SIZE: usize = 8 + 8 * COUNT;
/// In the first word: this is a shadow VMCS.
pub const SHADOW_INDICATOR: u32 = 1 << 31;

const _: () = assert!(DATA_OFFSET + DATA_SIZE <= SIZE);

const LAUNCHED: u8 = 1;

/// True if the first word names a VMCS region of ours, ordinary or shadow.
pub fn is_revision(word: u32, may_be_shadow: bool) -> bool {
    word == REVISION || may_be_shadow && word == REVISION | SHADOW_INDICATOR
}

/// Writes our part; `data` begins at [`DATA_OFFSET`] of the region and has [`DATA_SIZE`] bytes.
pub fn encode(vmcs: &Vmcs, launched: bool, data: &mut [u8]) {
    let Some((state, words)) = data.split_at_mut_checked(8) else { return };
    state.fill(0);
    state[0] = if launched { LAUNCHED } else { 0 };
    for (word, value) in words.chunks_exact_mut(8).zip(vmcs.values()) {
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Reads our part: the VMCS, and whether it is launched. What is missing is zero.
pub fn decode(data: &[u8]) -> (Vmcs, bool) {
    let mut vmcs = Vmcs::default();
    let launched = data.first() == Some(&LAUNCHED);
    let words = data.get(8..).unwrap_or_default().chunks_exact(8);
    for (info, word) in FIELDS.iter().zip(words) {
        let value = word.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        vmcs.set(info.field, info.field.width().truncate(value));
    }
    (vmcs, launched)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::Width;

    #[test]
    fn a_vmcs_survives_its_region() {
        let mut vmcs = Vmcs::default();
        for (i, info) in FIELDS.iter().enumerate() {
            let value = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            vmcs.set(info.field, info.field.width().truncate(value));
        }
        for launched in [false, true] {
            let mut data = [0xcc; DATA_SIZE];
            encode(&vmcs, launched, &mut data);
            assert_eq!(decode(&data), (vmcs.clone(), launched));
        }
    }

    #[test]
    fn garbage_is_cut_to_the_widths() {
        let (vmcs, launched) = decode(&[0xff; DATA_SIZE]);
        assert!(!launched);
        for info in FIELDS {
            let expected = match info.field.width() {
                Width::W16 => 0xffff,
                Width::W32 => 0xffff_ffff,
                Width::W64 | Width::Natural => u64::MAX,
            };
            assert_eq!(vmcs.get(info.field), expected, "{}", info.name);
        }
    }

    #[test]
    fn short_data_is_harmless() {
        assert_eq!(decode(&[]), (Vmcs::default(), false));
        assert_eq!(decode(&[1, 0, 0]), (Vmcs::default(), true));
        encode(&Vmcs::default(), true, &mut [0; 3]);
        encode(&Vmcs::default(), true, &mut [0; 20]);
    }

    #[test]
    fn revisions() {
        assert!(is_revision(REVISION, false) && is_revision(REVISION, true));
        assert!(is_revision(REVISION | SHADOW_INDICATOR, true));
        assert!(!is_revision(REVISION | SHADOW_INDICATOR, false));
        assert!(!is_revision(0, true));
    }
}
