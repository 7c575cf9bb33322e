//! Pages that have, or lately had, an instruction breakpoint.
//!
//! - GUARD-1: no fetch translation of a guarded page is kept. So nothing enters such a page but through the run loop, which
//!   goes there instruction by instruction, and all other pages run as if there were no breakpoint.
//!
//! A page stays guarded after its breakpoint is gone: a hypervisor has its own and its guest's breakpoints in turns, and
//! must not lose all it knows about its code each time.

/// As many as two levels of virtualization have breakpoints.
const MOST: usize = 8;

/// Linear addresses of the pages.
#[derive(Default)]
pub(crate) struct GuardedPages {
    pages: [u64; MOST],
    count: usize,
    oldest: usize,
}

impl GuardedPages {
    /// True if `linear` is in one of them.
    #[inline(always)]
    pub(crate) fn has(&self, linear: u64) -> bool {
        self.count != 0 && self.pages[..self.count].contains(&(linear & !4095))
    }

    /// Adds the page of `linear`, in place of the oldest if need be. True if its fetch translations are to be dropped.
    pub(crate) fn add(&mut self, linear: u64) -> bool {
        if self.has(linear) {
            return false;
        }
        self.pages[self.oldest] = linear & !4095;
        self.oldest = (self.oldest + 1) % MOST;
        self.count = (self.count + 1).min(MOST);
        true
    }
}
