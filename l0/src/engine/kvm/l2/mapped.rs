//! A window and what is in it, shared with the software CPUs: they say where code appears.
//!
//! - CODE-4: a page that code was decoded from ([`PhysMemory::has_code`]) is writable in no window. Whoever decodes takes
//!   the window's lock after marking the page; whoever maps looks at the mark under that lock. So what L2 writes on KVM
//!   never makes decoded code stale unseen, and nothing need be forgotten when L2 comes home.

use std::sync::{Arc, Mutex};

use ept_merge::{L1Gpa, L2Gpa};
use turtles_cpu::phys::{CodeObserver, PhysMemory};

use super::ranges::{Change, Ranges, Rights};
use super::window::Window;
use crate::engine::kvm::tunables;
use crate::memory::Ram;
use crate::vcpu_signal::lock;

const PAGE: u64 = 4096;

/// Where RAM is in the memory file: `(L1-physical start, length, file offset)`.
#[derive(Clone)]
pub(in crate::engine::kvm) struct FileMap(Arc<[(u64, u64, u64)]>);

impl FileMap {
    pub(in crate::engine::kvm) fn of(ram: &Ram) -> Self {
        Self(ram.ranges.as_slice().into())
    }

    /// A file that is all of RAM.
    pub(super) fn whole(len: u64) -> Self {
        Self([(0, len, 0)].into())
    }

    /// A power of two that is at least twice where RAM ends.
    pub(super) fn twice_the_ram(&self) -> u64 {
        let end = self.0.iter().map(|(start, len, _)| start + len).max().unwrap_or(0);
        (2 * end).next_power_of_two().max(tunables::SMALLEST_WINDOW)
    }

    /// File offset of a page; none outside RAM.
    fn offset(&self, page: u64) -> Option<u64> {
        self.0.iter().find_map(|&(start, len, offset)| {
            let into = page.wrapping_sub(start);
            (into < len).then(|| offset + into)
        })
    }
}

struct Inner {
    ranges: Ranges,
    /// Times that the window changed.
    changes: u64,
}

/// See the module.
pub(super) struct Mapped {
    inner: Mutex<Inner>,
    window: Window,
    files: FileMap,
    memory: Arc<PhysMemory>,
}

impl Mapped {
    /// An empty window with at most `most` ranges.
    pub(super) fn new(window: Window, files: FileMap, memory: &Arc<PhysMemory>, most: usize) -> Arc<Self> {
        let inner = Mutex::new(Inner { ranges: Ranges::new(most), changes: 0 });
        let this = Arc::new(Self { inner, window, files, memory: Arc::clone(memory) });
        let observer: Arc<dyn CodeObserver> = this.clone();
        memory.observe_code(Arc::downgrade(&observer));
        this
    }

    pub(super) fn window(&self) -> &Window {
        &self.window
    }

    /// Counts what has changed in the window.
    pub(super) fn changes(&self) -> u64 {
        lock(&self.inner).changes
    }

    /// Ranges at present.
    pub(super) fn ranges(&self) -> usize {
        lock(&self.inner).ranges.len()
    }

    /// L2's `len` bytes at `gpa` are L1's at `page`: maps what of them is RAM, not L1's page `except`, and was not mapped
    /// so. True if that changed something.
    pub(super) fn fill(
        &self,
        gpa: L2Gpa,
        page: L1Gpa,
        len: u64,
        rights: Rights,
        except: Option<L1Gpa>,
    ) -> bool {
        if gpa.0.checked_add(len).is_none_or(|end| end > self.window.len()) {
            return false;
        }
        let mut inner = lock(&self.inner);
        let mut changes = Vec::new();
        let (mut from, mut at) = (0, 0);
        let kind_of = |page| if except == Some(L1Gpa(page)) { None } else { self.kind(page, rights) };
        let mut kind = kind_of(page.0);
        while at < len {
            at += PAGE;
            let next = if at < len { kind_of(page.0 + at) } else { None };
            let goes_on = match (kind, next) {
                (Some((a, x)), Some((b, y))) => b == a + (at - from) && x == y,
                (None, None) => true,
                _ => false,
            };
            if at == len || !goes_on {
                let piece = L2Gpa(gpa.0 + from);
                match kind {
                    Some((offset, rights)) => {
                        inner.ranges.fill(piece, at - from, offset, rights, &mut changes);
                    }
                    None => inner.ranges.forget(piece, at - from, &mut changes),
                }
                (from, kind) = (at, next);
            }
        }
        self.apply(&mut inner, &changes);
        !changes.is_empty()
    }

    /// Where the page is in the file, and what may be done there while code is decoded as it is.
    fn kind(&self, page: u64, rights: Rights) -> Option<(u64, Rights)> {
        let offset = self.files.offset(page)?;
        Some((offset, if self.memory.has_code(page) { Rights::Read } else { rights }))
    }

    /// `len` bytes at `gpa` are no longer what they were.
    pub(super) fn forget(&self, gpa: L2Gpa, len: u64) {
        self.change(|ranges, changes| ranges.forget(gpa, len, changes));
    }

    /// Nothing is what it was.
    pub(super) fn forget_all(&self) {
        self.change(Ranges::forget_all);
    }

    fn change(&self, change: impl FnOnce(&mut Ranges, &mut Vec<Change>)) {
        let mut inner = lock(&self.inner);
        let mut changes = Vec::new();
        change(&mut inner.ranges, &mut changes);
        self.apply(&mut inner, &changes);
    }

    /// Where the host has no room for another mapping, everything goes, and from then on half as much is kept.
    fn apply(&self, inner: &mut Inner, changes: &[Change]) {
        inner.changes += changes.len() as u64;
        let failed = changes.iter().find_map(|change| self.window.apply(change).err());
        let Some(error) = failed else { return };
        let fewer = inner.ranges.most() / 2;
        log::debug!("mapping L2's memory: {error}; keeping {fewer} ranges from now on");
        inner.ranges.limit(fewer);
        inner.ranges.forget_all(&mut Vec::new());
        let all = Change::Unmap { gpa: L2Gpa(0), len: self.window.len() };
        if let Err(error) = self.window.apply(&all) {
            // One mapping in place of many needs no room: not seen, and nothing to go on from.
            panic!("an address range of ours cannot be emptied: {error}");
        }
    }
}

impl CodeObserver for Mapped {
    fn code_appears(&self, page: u64) {
        if let Some(offset) = self.files.offset(page) {
            self.change(|ranges, changes| ranges.protect(offset, PAGE, changes));
        }
    }
}
