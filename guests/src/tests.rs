//! What a loader relies on in the images, and, where QEMU is installed, the guests against an independent machine.

use super::*;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Program headers as (type, offset, address, size in file, size in memory).
fn segments(image: &[u8]) -> Vec<(u32, u64, u64, u64, u64)> {
    let table = u64_at(image, 32) as usize;
    let count = u16::from_le_bytes(image[56..58].try_into().unwrap()) as usize;
    (0..count)
        .map(|i| table + i * 56)
        .map(|h| {
            (
                u32_at(image, h),
                u64_at(image, h + 8),
                u64_at(image, h + 24),
                u64_at(image, h + 32),
                u64_at(image, h + 40),
            )
        })
        .collect()
}

#[test]
fn both_entries_lead_to_the_same_address() {
    for guest in ALL {
        let image = guest.image;
        assert_eq!(&image[..6], b"\x7fELF\x02\x01", "{}", guest.name);
        let entry = u64_at(image, 24);
        let segments = segments(image);
        let note = segments.iter().find(|s| s.0 == 4).expect("a PT_NOTE");
        let at = note.1 as usize;
        assert_eq!(
            (u32_at(image, at), u32_at(image, at + 4), u32_at(image, at + 8)),
            (4, 8, 18),
            "{}",
            guest.name
        );
        assert_eq!(&image[at + 12..at + 16], b"Xen\0");
        assert_eq!(u64_at(image, at + 16), entry);

        let header =
            (0..8192).step_by(4).find(|&at| u32_at(image, at) == 0x1bad_b002).expect("a Multiboot header");
        let sum = (0..3).fold(0u32, |sum, i| sum.wrapping_add(u32_at(image, header + i * 4)));
        assert_eq!(sum, 0);
        assert_eq!(u64::from(u32_at(image, header + 28)), entry);
    }
}

#[test]
fn one_segment_holds_everything_and_fits() {
    for guest in ALL {
        let loads: Vec<_> = segments(guest.image).into_iter().filter(|s| s.0 == 1).collect();
        let &[(_, offset, address, in_file, in_memory)] = &loads[..] else {
            panic!("{}: {loads:?}", guest.name)
        };
        assert_eq!(address, 0x10_0000);
        assert!(offset + in_file <= guest.image.len() as u64);
        assert!(in_file <= in_memory);
        // Guests use the RAM above 4 MiB for themselves.
        assert!(address + in_memory <= 4 << 20, "{} ends at {:#x}", guest.name, address + in_memory);
    }
}

#[test]
fn names_find_their_guest() {
    assert!(ALL.is_sorted_by_key(|guest| guest.name));
    for guest in ALL {
        assert!(
            by_name(guest.name).is_some_and(|found| found.name == guest.name && found.image == guest.image)
        );
        assert!(!guest.what.is_empty());
    }
    assert!(by_name("no such guest").is_none());
}

#[test]
fn flat_image_is_a_boot_sector() {
    assert_eq!(FLAT.len(), 512);
    assert_eq!(&FLAT[510..], &[0x55, 0xaa]);
}
