//! Guest-physical memory as the software CPU sees it: RAM ranges in host memory, and which of their bytes have
//! been translated as code.
//!
//! Invariants:
//! - CODE-1: a page that some fresh block was decoded from is in nobody's fast write translations. Whoever sets the
//!   first bit of a code mask waits until every vCPU that is executing has dropped its fast write translations.
//! - CODE-2: after a write that overlaps a page's code mask, the page's version differs from what every block
//!   decoded before the write remembers.
//! - CODE-3: a page's version is odd while its mask goes from or to zero, and is another one afterwards. Blocks
//!   remember even versions, so a block that is fresh has all its bits in the mask, set before it was decoded.
//!
//! An engine that lets guests write to RAM on its own takes part as a [`CodeObserver`]: it asks [`PhysMemory::has_code`]
//! before it makes a page writable, and makes it read-only when told that code appeared there.
//!
//! One of the crate's unsafe islands: raw host pointers to guest RAM, which the owner keeps mapped for as long as
//! this value lives. Guest RAM is accessed with single `mov`s of the operand's width, so that ordinary guest
//! accesses have the host's (x86's) ordering and atomicity.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use crate::attention::Attention;

/// Bytes that one bit of a page's code mask covers.
pub(crate) const CODE_GRAIN: u64 = 64;

/// What is remembered of one 4-KiB page of RAM.
#[derive(Default)]
pub(crate) struct CodePage {
    /// One bit for every 64 bytes that some block was decoded from.
    mask: AtomicU64,
    /// Goes up by two whenever the mask goes from or to zero; odd meanwhile (CODE-3).
    version: AtomicU32,
}

impl CodePage {
    /// Where the version is, for translated code.
    pub(crate) const VERSION_OFFSET: usize = std::mem::offset_of!(CodePage, version);

    #[inline(always)]
    pub(crate) fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// Takes the right to move the mask from or to zero; none if the page changed since it had `version`.
    fn begin_change(&self, version: u32) -> Option<Change<'_>> {
        let odd = version.wrapping_add(1);
        self.version.compare_exchange(version, odd, Ordering::SeqCst, Ordering::Relaxed).ok()?;
        Some(Change { page: self, after: version.wrapping_add(2) })
    }

    /// True when stores to the page need no look at the code mask.
    #[inline(always)]
    pub(crate) fn is_plain(&self) -> bool {
        self.mask.load(Ordering::SeqCst) == 0
    }
}

/// The right to move a page's mask from or to zero; given back on drop.
struct Change<'a> {
    page: &'a CodePage,
    after: u32,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.page.version.store(self.after, Ordering::SeqCst);
    }
}

/// One range of RAM: `len` bytes at guest-physical `start`, at `host` in our address space.
pub struct RamRange {
    pub start: u64,
    pub len: u64,
    pub host: *mut u8,
}

struct Range {
    start: u64,
    len: u64,
    host: *mut u8,
    pages: Box<[CodePage]>,
}

/// A vCPU as its peers see it.
#[derive(Default)]
pub struct Peer {
    /// It is inside [`crate::Cpu::run`] and may hold fast write translations.
    pub(crate) inside: AtomicBool,
    /// Its attention word.
    pub(crate) attention: Arc<Attention>,
}

impl Peer {
    /// Does what another vCPU waits for, if one does.
    fn answer(&self, drop_own_writes: &mut dyn FnMut()) {
        if self.attention.get() & Attention::FORGET_WRITES != 0 {
            drop_own_writes();
            self.attention.clear(Attention::FORGET_WRITES);
        }
    }
}

/// Held while a vCPU executes: other vCPUs wait for its answers, and no longer once it is dropped, be it by a panic.
pub(crate) struct Inside(Arc<Peer>);

impl Inside {
    pub(crate) fn enter(peer: &Arc<Peer>) -> Self {
        peer.inside.store(true, Ordering::SeqCst);
        // Whoever did not see us inside has left us a flag that we see now.
        fence(Ordering::SeqCst);
        Self(Arc::clone(peer))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.store(false, Ordering::SeqCst);
    }
}

/// Somebody besides the vCPUs here through whom guests write to RAM.
pub trait CodeObserver: Send + Sync {
    /// Code is about to be decoded from the 4-KiB page at `page`, which had none: when this returns, no write to it goes
    /// by that [`PhysMemory::wrote`] is not told of.
    fn code_appears(&self, page: u64);
}

/// Guest-physical memory, shared by all vCPUs.
pub struct PhysMemory {
    ranges: Box<[Range]>,
    peers: RwLock<Vec<Arc<Peer>>>,
    observers: RwLock<Vec<Weak<dyn CodeObserver>>>,
    split: Mutex<()>,
    keep_alive: Box<dyn std::any::Any + Send + Sync>,
}

// SAFETY: the raw pointers name guest RAM, which is shared between threads by design; every access to it is a
// single machine access (see `raw`), and everything else in here is atomic or locked.
unsafe impl Send for PhysMemory {}
// SAFETY: as above.
unsafe impl Sync for PhysMemory {}

impl PhysMemory {
    /// Describes guest memory.
    ///
    /// # Safety
    /// Every range must stay mapped readable and writable for as long as `keep_alive` lives, page-aligned in
    /// guest-physical and host addresses, and be used by others only as guest memory.
    pub unsafe fn new(ranges: Vec<RamRange>, keep_alive: Box<dyn std::any::Any + Send + Sync>) -> Self {
        let ranges = ranges
            .into_iter()
            .map(|r| Range {
                start: r.start,
                len: r.len & !4095,
                host: r.host,
                pages: (0..r.len / 4096).map(|_| CodePage::default()).collect(),
            })
            .collect();
        Self {
            ranges,
            peers: RwLock::default(),
            observers: RwLock::default(),
            split: Mutex::default(),
            keep_alive,
        }
    }

    /// Adds somebody who writes to RAM besides the vCPUs here, for as long as they live.
    pub fn observe_code(&self, observer: Weak<dyn CodeObserver>) {
        let mut observers = self.observers.write().unwrap_or_else(PoisonError::into_inner);
        observers.retain(|old| old.strong_count() > 0);
        observers.push(observer);
    }

    /// True if code was decoded from the page at `page`, so that writes to it must not go unnoticed. An observer that
    /// asks before a page becomes writable and is asked to protect it under the same lock misses nothing.
    pub fn has_code(&self, page: u64) -> bool {
        self.page(page).is_some_and(|(_, code)| !code.is_plain())
    }

    fn tell_observers(&self, code: &CodePage) {
        let observers = self.observers.read().unwrap_or_else(PoisonError::into_inner);
        if observers.is_empty() {
            return;
        }
        let at = std::ptr::from_ref(code) as usize;
        let page = self.ranges.iter().find_map(|range| {
            let index = at.wrapping_sub(range.pages.as_ptr() as usize) / size_of::<CodePage>();
            range.pages.get(index).filter(|found| std::ptr::eq(*found, code))?;
            Some(range.start + ((index as u64) << 12))
        });
        for observer in observers.iter().filter_map(Weak::upgrade) {
            page.into_iter().for_each(|page| observer.code_appears(page));
        }
    }

    /// Adds a vCPU.
    pub(crate) fn add_peer(&self, attention: Arc<Attention>) -> Arc<Peer> {
        let peer = Arc::new(Peer { inside: AtomicBool::new(false), attention });
        self.peers.write().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&peer));
        peer
    }

    /// Held during a locked access that host atomics cannot do (across a page boundary).
    pub(crate) fn split_lock(&self) -> MutexGuard<'_, ()> {
        self.split.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Host address of the page at guest-physical `address`, and what is remembered of it; none outside RAM.
    #[inline]
    pub(crate) fn page(&self, address: u64) -> Option<(*mut u8, &CodePage)> {
        for range in &self.ranges {
            let offset = address.wrapping_sub(range.start);
            if offset < range.len {
                let page = offset >> 12;
                // SAFETY: `offset` is inside the range, whose mapping the constructor's caller vouched for.
                let host = unsafe { range.host.add((page << 12) as usize) };
                return range.pages.get(page as usize).map(|code| (host, code));
            }
        }
        None
    }

    /// Host pointer to `len` bytes at `address`, if they are RAM and inside one page.
    #[inline]
    pub(crate) fn host(&self, address: u64, len: usize) -> Option<*mut u8> {
        let offset = (address & 4095) as usize;
        if offset + len > 4096 {
            return None;
        }
        // SAFETY: `page` returned the host address of a whole mapped page and `offset` is inside it.
        self.page(address).map(|(host, _)| unsafe { host.add(offset) })
    }

    /// Reads an aligned 8-byte paging-structure entry; none outside RAM.
    #[inline]
    pub(crate) fn entry64(&self, address: u64) -> Option<&AtomicU64> {
        let host = self.host(address & !7, 8)?;
        // SAFETY: eight aligned bytes inside mapped guest RAM, accessed atomically by everyone who races.
        Some(unsafe { AtomicU64::from_ptr(host.cast()) })
    }

    /// Reads an aligned 4-byte paging-structure entry; none outside RAM.
    #[inline]
    pub(crate) fn entry32(&self, address: u64) -> Option<&AtomicU32> {
        let host = self.host(address & !3, 4)?;
        // SAFETY: four aligned bytes inside mapped guest RAM, accessed atomically by everyone who races.
        Some(unsafe { AtomicU32::from_ptr(host.cast()) })
    }

    /// Reads the aligned 8 bytes at `address`; none outside RAM.
    #[inline]
    pub fn read_u64(&self, address: u64) -> Option<u64> {
        self.entry64(address).map(|entry| entry.load(Ordering::Acquire))
    }

    /// Makes `new` of `old` in the aligned 8 bytes at `address`; false if something else is there, or no RAM.
    pub fn compare_exchange_u64(&self, address: u64, old: u64, new: u64) -> bool {
        let done = self
            .entry64(address)
            .is_some_and(|e| e.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed).is_ok());
        if done {
            self.wrote(address & !7, 8);
        }
        done
    }

    /// Copies bytes out of guest memory (page by page); bytes outside RAM read as ones.
    pub fn read(&self, mut address: u64, mut data: &mut [u8]) {
        while !data.is_empty() {
            let step = data.len().min(4096 - (address & 4095) as usize);
            let (now, rest) = data.split_at_mut(step);
            match self.host(address, step) {
                // SAFETY: `step` bytes at `host` lie inside one mapped page; `now` is ours alone.
                Some(host) => unsafe { std::ptr::copy_nonoverlapping(host, now.as_mut_ptr(), step) },
                None => now.fill(0xff),
            }
            address = address.wrapping_add(step as u64);
            data = rest;
        }
    }

    /// Copies bytes into guest memory as a device would; bytes outside RAM are lost.
    pub fn write(&self, mut address: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let step = data.len().min(4096 - (address & 4095) as usize);
            let (now, rest) = data.split_at(step);
            if let Some(host) = self.host(address, step) {
                // SAFETY: `step` bytes at `host` lie inside one mapped page; `now` does not overlap guest RAM.
                unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), host, step) };
                self.wrote(address, step as u64);
            }
            address = address.wrapping_add(step as u64);
            data = rest;
        }
    }

    /// Tells that guest memory was written by someone other than a vCPU's fast path (a device, another engine):
    /// code decoded from there is forgotten.
    pub fn wrote(&self, address: u64, len: u64) {
        let end = address.saturating_add(len);
        let mut at = address;
        while at < end {
            let page_end = (at | 4095).saturating_add(1).min(end);
            if let Some((_, code)) = self.page(at) {
                Self::wrote_page(code, at & 4095, page_end - at);
            } else if !self.is_near_ram(at, end) {
                return;
            }
            at = page_end;
        }
    }

    fn is_near_ram(&self, at: u64, end: u64) -> bool {
        self.ranges.iter().any(|r| r.start < end && at < r.start + r.len)
    }

    /// The same within one page; true if code was overwritten.
    pub(crate) fn wrote_page(code: &CodePage, offset: u64, len: u64) -> bool {
        fence(Ordering::SeqCst);
        let mask = code.mask.load(Ordering::SeqCst);
        if mask == 0 || len == 0 {
            return false;
        }
        let first = offset / CODE_GRAIN;
        let last = (offset + len - 1).min(4095) / CODE_GRAIN;
        let touched = (u64::MAX >> (63 - (last - first))) << first;
        if mask & touched == 0 {
            return false;
        }
        // The whole page's blocks become invalid, so nothing of it counts as code until it is decoded again. Where
        // somebody else is changing the page or has just done so, they make everything stale that was decoded
        // before our write, and what is decoded afterwards sees it.
        let version = code.version();
        if version & 1 == 0 {
            if let Some(_change) = code.begin_change(version) {
                code.mask.store(0, Ordering::SeqCst);
            }
        }
        true
    }

    /// Marks `len` bytes at `offset` of a page as code, before they are decoded, and returns the version that a
    /// block decoded now must carry. Waits for other vCPUs if the page had no code before (CODE-1);
    /// `drop_own_writes` drops the caller's fast write translations.
    pub(crate) fn mark_code(
        &self,
        me: &Peer,
        code: &CodePage,
        offset: u64,
        len: u64,
        drop_own_writes: &mut dyn FnMut(),
    ) -> u32 {
        let first = offset / CODE_GRAIN;
        let last = (offset + len.max(1) - 1).min(4095) / CODE_GRAIN;
        let bits = (u64::MAX >> (63 - (last - first))) << first;
        loop {
            let version = code.version();
            if version & 1 != 0 {
                // Whoever changes the page may be waiting for us.
                me.answer(drop_own_writes);
                std::thread::yield_now();
                continue;
            }
            let mask = code.mask.load(Ordering::SeqCst);
            if mask == 0 {
                let Some(change) = code.begin_change(version) else { continue };
                code.mask.store(bits, Ordering::SeqCst);
                drop_own_writes();
                self.drop_write_translations_of_others(me, drop_own_writes);
                self.tell_observers(code);
                return change.after;
            }
            // Never from zero, which would leave out the others: hence no plain `fetch_or`.
            let wanted = mask | bits;
            let marked = wanted == mask
                || code.mask.compare_exchange(mask, wanted, Ordering::SeqCst, Ordering::Relaxed).is_ok();
            // The same even version as before: the mask was not zero in between.
            if marked && code.version() == version {
                return version;
            }
        }
    }

    fn drop_write_translations_of_others(&self, me: &Peer, drop_own_writes: &mut dyn FnMut()) {
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        for peer in peers.iter().filter(|p| !std::ptr::eq(&raw const ***p, me)) {
            peer.attention.raise(Attention::FORGET_WRITES);
        }
        for peer in peers.iter().filter(|p| !std::ptr::eq(&raw const ***p, me)) {
            while peer.inside.load(Ordering::SeqCst) && peer.attention.get() & Attention::FORGET_WRITES != 0 {
                // Two vCPUs may wait for each other.
                me.answer(drop_own_writes);
                std::thread::yield_now();
            }
        }
    }

    /// What keeps the memory mapped.
    pub fn keep_alive(&self) -> &(dyn std::any::Any + Send + Sync) {
        &*self.keep_alive
    }
}

/// A value that one x86 instruction moves.
pub trait Word: Copy + Default + PartialEq + Eq + Send + 'static {
    /// Bytes.
    const SIZE: usize;
    /// One load, as the guest's own instruction would do it.
    ///
    /// # Safety
    /// `at` must point to `SIZE` readable bytes of guest RAM.
    unsafe fn load(at: *const u8) -> Self;
    /// One store, as the guest's own instruction would do it.
    ///
    /// # Safety
    /// `at` must point to `SIZE` writable bytes of guest RAM.
    unsafe fn store(at: *mut u8, value: Self);
    /// Zero-extended to 64 bits (the low 64 bits of wider values).
    fn to_u64(self) -> u64;
    /// Truncated from 64 bits.
    fn from_u64(value: u64) -> Self;
    /// From little-endian bytes.
    fn from_bytes(bytes: &[u8]) -> Self;
    /// To little-endian bytes.
    fn to_bytes(self, bytes: &mut [u8]);
}

macro_rules! word {
    ($ty:ty, $class:ident, $modifier:literal) => {
        impl Word for $ty {
            const SIZE: usize = size_of::<$ty>();
            #[inline(always)]
            unsafe fn load(at: *const u8) -> Self {
                let value: $ty;
                // SAFETY: the caller says that `at` is readable; x86 loads need no alignment.
                unsafe {
                    std::arch::asm!(concat!("mov {v", $modifier, "}, [{at}]"), at = in(reg) at, v = out($class) value,
                        options(nostack, preserves_flags, readonly));
                }
                value
            }
            #[inline(always)]
            unsafe fn store(at: *mut u8, value: Self) {
                // SAFETY: the caller says that `at` is writable; x86 stores need no alignment.
                unsafe {
                    std::arch::asm!(concat!("mov [{at}], {v", $modifier, "}"), at = in(reg) at, v = in($class) value,
                        options(nostack, preserves_flags));
                }
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $ty
            }
            fn from_bytes(bytes: &[u8]) -> Self {
                let mut array = [0; size_of::<$ty>()];
                array.copy_from_slice(bytes);
                Self::from_le_bytes(array)
            }
            fn to_bytes(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
        }
    };
}
word!(u8, reg_byte, "");
word!(u16, reg, ":x");
word!(u32, reg, ":e");
word!(u64, reg, "");
