//! Raw memory at an address, and a pool of 4 KiB frames for tables and test pages.
//!
//! Volatile on purpose: what a case reads was changed by a page-table trick or another CPU, not by the compiler.

use core::sync::atomic::{AtomicU64, Ordering};

pub const PAGE: u64 = 4096;

/// RAM that programs use as they like: 4 MiB up to [`FREE_END`]; the image stays below, the frame pool above.
pub const FREE: u64 = 0x40_0000;
pub const FREE_END: u64 = 0x180_0000;
/// The frame pool ends here, within the RAM every guest can count on.
const POOL_END: u64 = 0x1f0_0000;

static NEXT: AtomicU64 = AtomicU64::new(FREE_END);

/// A fresh zeroed frame. Frames are never given back: programs end soon.
pub fn frame() -> u64 {
    frames(1)
}

/// Fresh zeroed frames in a row.
pub fn frames(count: u64) -> u64 {
    let address = NEXT.fetch_add(count * PAGE, Ordering::Relaxed);
    assert!(address + count * PAGE <= POOL_END, "out of frames");
    fill(address, 0, count * PAGE);
    address
}

/// Reads a value of any plain type.
#[inline(always)]
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the address is mapped, or the access traps and is reported.
    unsafe { core::ptr::read_volatile(address as *const T) }
}

/// Writes a value of any plain type.
#[inline(always)]
pub fn write<T: Copy>(address: u64, value: T) {
    // SAFETY: callers name memory that is theirs: free RAM, frames, device registers.
    unsafe { core::ptr::write_volatile(address as *mut T, value) }
}

/// Fills memory with one byte.
pub fn fill(address: u64, byte: u8, count: u64) {
    // SAFETY: as for `write`.
    unsafe { core::ptr::write_bytes(address as *mut u8, byte, count as usize) }
}

/// Copies bytes to an address.
pub fn copy(to: u64, bytes: &[u8]) {
    // SAFETY: as for `write`.
    unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) }
}

/// The bytes at an address.
pub fn bytes(at: u64, count: usize) -> &'static [u8] {
    // SAFETY: callers name mapped memory that does not change while they look.
    unsafe { core::slice::from_raw_parts(at as *const u8, count) }
}

/// The bytes between two labels of an assembly fragment.
#[macro_export]
macro_rules! code {
    ($start:ident, $end:ident) => {{
        unsafe extern "C" {
            static $start: u8;
            static $end: u8;
        }
        let (start, end) = (&raw const $start as u64, &raw const $end as u64);
        $crate::mem::bytes(start, (end - start) as usize)
    }};
}
