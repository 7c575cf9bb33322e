//! 16 and 32 bytes of guest memory as one operand.
//!
//! A 16-byte operand is one load or store of the host, so that an aligned one is atomic where the host's is (on
//! every processor with AVX), which is what guest software relies on.
//!
//! Unsafe island: the accesses themselves, at addresses that the TLB vouches for.

use std::arch::asm;
use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_setzero_si128, _mm_storeu_si128};

use super::Thunk;
use crate::Cpu;
use crate::phys::Word;
use crate::trap::Exec;

/// A 16-byte operand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Xmm(__m128i);

impl Xmm {
    /// From bytes in memory order.
    #[inline(always)]
    pub(crate) fn new(bytes: &[u8; 16]) -> Self {
        // SAFETY: 16 readable bytes; the instruction needs no alignment.
        Self(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
    }

    /// To bytes in memory order.
    #[inline(always)]
    pub(crate) fn put(self, bytes: &mut [u8; 16]) {
        // SAFETY: 16 writable bytes; the instruction needs no alignment.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), self.0) }
    }

    fn to_u128(self) -> u128 {
        let mut bytes = [0; 16];
        self.put(&mut bytes);
        u128::from_le_bytes(bytes)
    }
}

impl Default for Xmm {
    #[inline(always)]
    fn default() -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(unsafe { _mm_setzero_si128() })
    }
}

impl PartialEq for Xmm {
    fn eq(&self, other: &Self) -> bool {
        self.to_u128() == other.to_u128()
    }
}

impl Eq for Xmm {}

impl Word for Xmm {
    const SIZE: usize = 16;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> Self {
        let value: __m128i;
        // SAFETY: the caller says that 16 bytes at `at` are readable; MOVUPS needs no alignment.
        unsafe {
            asm!("movups {v}, [{at}]", at = in(reg) at, v = out(xmm_reg) value,
                options(nostack, preserves_flags, readonly));
        }
        Self(value)
    }
    #[inline(always)]
    unsafe fn store(at: *mut u8, value: Self) {
        // SAFETY: the caller says that 16 bytes at `at` are writable; MOVUPS needs no alignment.
        unsafe {
            asm!("movups [{at}], {v}", at = in(reg) at, v = in(xmm_reg) value.0,
                options(nostack, preserves_flags));
        }
    }
    fn to_u64(self) -> u64 {
        self.to_u128() as u64
    }
    fn from_u64(value: u64) -> Self {
        Self::from_bytes(&u128::from(value).to_le_bytes())
    }
    fn from_bytes(bytes: &[u8]) -> Self {
        let mut array = [0; 16];
        array.copy_from_slice(bytes);
        Self::new(&array)
    }
    fn to_bytes(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.to_u128().to_le_bytes());
    }
}

/// A buffer for an operand that is not accessed in place.
#[repr(align(64))]
struct Operand([u8; 64]);

impl Cpu {
    /// Executes an instruction with a memory operand at `linear` that it reads, in place where the TLB allows.
    #[inline(always)]
    pub(crate) fn run_load(&mut self, thunk: &Thunk, linear: u64) -> Exec {
        let size = thunk.plan.size;
        let in_page = (linear & 4095) as usize + size <= 4096;
        if let Some(host) = self.fast_read_pointer(linear).filter(|_| in_page) {
            // SAFETY: `fast_read_pointer` vouches for the page of guest RAM that holds the whole operand. Pages are
            // aligned alike in guest and host, so it is aligned if the guest's is, which the caller checked.
            unsafe { thunk.run_load(&mut self.state.vector, host) };
            return Ok(());
        }
        let mut operand = Operand([0; 64]);
        self.load_vector(linear, size, &mut operand.0)?;
        // SAFETY: the buffer is larger than any operand, and aligned.
        unsafe { thunk.run_load(&mut self.state.vector, operand.0.as_ptr()) };
        Ok(())
    }

    /// Reads a 32-byte operand.
    #[inline(always)]
    pub(crate) fn load_32(&mut self, linear: u64, to: &mut [u8; 32]) -> Exec {
        if (linear & 4095) > 4096 - 32 {
            return self.read_bytes(linear, to);
        }
        let low = self.load::<Xmm>(linear)?;
        let high = self.load::<Xmm>(linear.wrapping_add(16))?;
        let (first, second) = to.split_at_mut(16);
        low.put(first.first_chunk_mut().unwrap_or(&mut [0; 16]));
        high.put(second.first_chunk_mut().unwrap_or(&mut [0; 16]));
        Ok(())
    }

    /// Writes a 32-byte operand: all of it or nothing.
    #[inline(always)]
    pub(crate) fn store_32(&mut self, linear: u64, from: &[u8; 32]) -> Exec {
        let Some(host) = self.fast_write_pointer(linear, 32) else { return self.write_bytes(linear, from) };
        // SAFETY: `fast_write_pointer` vouches for 32 writable bytes of guest RAM, which no Rust object overlaps.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), host, 32) };
        Ok(())
    }
}
