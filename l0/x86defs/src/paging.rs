//! Page-table entries ("Paging" in the SDM, volume 3).

pub const PRESENT: u64 = 1 << 0;
pub const WRITE: u64 = 1 << 1;
pub const USER: u64 = 1 << 2;
pub const WRITE_THROUGH: u64 = 1 << 3;
pub const CACHE_DISABLE: u64 = 1 << 4;
pub const ACCESSED: u64 = 1 << 5;
pub const DIRTY: u64 = 1 << 6;
/// In a PDPTE or PDE: maps a page.
pub const LARGE: u64 = 1 << 7;
pub const GLOBAL: u64 = 1 << 8;
pub const NX: u64 = 1 << 63;
/// The physical address in an 8-byte entry (bits 51:12).
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
pub const PROTECTION_KEY_SHIFT: u32 = 59;
pub const PAGE_SIZE: u64 = 4096;
pub const PAGE_MASK: u64 = 4095;
