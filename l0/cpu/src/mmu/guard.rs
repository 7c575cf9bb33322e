//! Pages that have, or lately had, an instruction breakpoint.
//!
//! - GUARD-1: no fetch translation of a guarded page is kept. So nothing enters such a page but through the run loop, which
//!   goes there instruction by instruction, and all other pages run as if there were no breakpoint.
//!
//! A page stays guarded after its breakpoint is gone: a hypervisor has its own and its guest's breakpoints in turns, and
//! must not lose all it knows about its code each time.

/// As many as two levels of virtualization have breakpoints.
const MOST: usize = 8;

/// Linear addresses of the pages, those armed last at the end.
#[derive(Default)]
pub(crate) struct GuardedPages {
    pages: [u64; MOST],
    count: usize,
}

impl GuardedPages {
    /// True if `linear` is in one of them.
    #[inline(always)]
    pub(crate) fn has(&self, linear: u64) -> bool {
        self.count != 0 && self.pages[..self.count].contains(&(linear & !4095))
    }

    /// The page of `linear` is armed, if it is guarded already: what comes takes the place of others.
    pub(crate) fn touch(&mut self, linear: u64) -> bool {
        let known = self.pages[..self.count].iter().position(|&page| page == linear & !4095);
        if let Some(at) = known {
            self.pages[at..self.count].rotate_left(1);
        }
        known.is_some()
    }

    /// Adds the page of `linear`, in place of the one that was armed longest ago if need be; all that are armed have been
    /// touched. True if its fetch translations are to be dropped.
    pub(crate) fn add(&mut self, linear: u64) -> bool {
        if self.touch(linear) {
            return false;
        }
        if self.count == MOST {
            self.pages.rotate_left(1);
        } else {
            self.count += 1;
        }
        self.pages[self.count - 1] = linear & !4095;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_armed_stays_guarded() {
        let mut guarded = GuardedPages::default();
        let page = |number: u64| number << 12;
        assert!(guarded.add(page(0)));
        // Page 0 stays armed while others come and go.
        for number in 1..100 {
            assert!(guarded.touch(page(0) + 17));
            assert!(guarded.add(page(number)));
            assert!(guarded.has(page(0)) && guarded.has(page(number)));
        }
        assert!(!guarded.has(page(1)), "the list is bounded");
        assert!(!guarded.add(page(99)));
    }
}
