//! Which L2-physical pages are where in the memory file: leaves of EPT02, coalesced into ranges. Pure data; what a
//! change of it means for mappings comes out as [`Change`]s.
//!
//! Like EPT02 it is a cache: it may forget anything, and is told what it must forget. Its size is bounded, since each
//! range is a mapping of the host kernel's (vm.max_map_count): the ranges that were filled longest ago go first. What
//! KVM uses of a range it does not tell, so time of filling stands for time of use; a range that is still used comes
//! back with its next fill.

use std::collections::BTreeMap;

use ept_merge::L2Gpa;

/// Of eight ranges, as many go when there is no room, so that the search for the oldest is rare.
const DROPPED_OF_EIGHT: usize = 1;

/// What may be done with a range's pages without leaving KVM.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Rights {
    Read,
    ReadWrite,
}

/// What changes in the address space that KVM sees.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Change {
    /// The memory file's bytes from `offset` are at `gpa`.
    Map { gpa: L2Gpa, len: u64, offset: u64, rights: Rights },
    /// Nothing is there any more.
    Unmap { gpa: L2Gpa, len: u64 },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Range {
    len: u64,
    offset: u64,
    rights: Rights,
    filled: u64,
}

impl Range {
    /// Its part from `from` to `to`, counted from its start.
    fn part(&self, from: u64, to: u64) -> Self {
        Self { len: to - from, offset: self.offset + from, ..*self }
    }

    /// `next`, which starts `self.len` later, goes on where this one ends.
    fn goes_on_in(&self, next: &Self) -> bool {
        self.offset + self.len == next.offset && self.rights == next.rights
    }
}

/// The ranges of one window, by where they start.
pub(super) struct Ranges {
    ranges: BTreeMap<u64, Range>,
    most: usize,
    clock: u64,
}

impl Ranges {
    /// At most `most` ranges.
    pub(super) fn new(most: usize) -> Self {
        Self { ranges: BTreeMap::new(), most: most.max(1), clock: 0 }
    }

    /// Ranges at present.
    pub(super) fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Allows fewer ranges from now on.
    pub(super) fn limit(&mut self, most: usize) {
        self.most = most.max(1);
    }

    /// The most ranges there may be.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// Where `gpa` is, and what may be done there.
    #[cfg(test)]
    pub(super) fn find(&self, gpa: L2Gpa) -> Option<(u64, Rights)> {
        let (start, range) = self.ranges.range(..=gpa.0).next_back()?;
        let into = gpa.0 - start;
        (into < range.len).then_some((range.offset + into, range.rights))
    }

    /// `len` bytes at `gpa` are those of the file from `offset`. Everything is a multiple of the page size.
    pub(super) fn fill(
        &mut self,
        gpa: L2Gpa,
        len: u64,
        offset: u64,
        rights: Rights,
        changes: &mut Vec<Change>,
    ) {
        self.clock += 1;
        let new = Range { len, offset, rights, filled: self.clock };
        if let Some((start, range)) = self.ranges.range_mut(..=gpa.0).next_back() {
            let into = gpa.0 - *start;
            let inside = into.checked_add(len).is_some_and(|end| end <= range.len);
            if inside && range.offset + into == offset && range.rights == rights {
                range.filled = self.clock;
                return;
            }
        }
        self.carve(gpa.0, len);
        changes.push(Change::Map { gpa, len, offset, rights });
        self.insert_merged(gpa.0, new);
        self.keep_bound(changes);
    }

    fn keep_bound(&mut self, changes: &mut Vec<Change>) {
        if self.ranges.len() > self.most {
            self.drop_oldest(changes);
        }
    }

    /// Nothing is known of `len` bytes at `gpa` any more.
    pub(super) fn forget(&mut self, gpa: L2Gpa, len: u64, changes: &mut Vec<Change>) {
        if self.carve(gpa.0, len) {
            changes.push(Change::Unmap { gpa, len });
            // A hole in one range makes two of it.
            self.keep_bound(changes);
        }
    }

    /// Nothing is known any more.
    pub(super) fn forget_all(&mut self, changes: &mut Vec<Change>) {
        let first = self.ranges.first_key_value().map(|(start, _)| *start);
        let end = self.ranges.last_key_value().map(|(start, range)| start + range.len);
        if let (Some(first), Some(end)) = (first, end) {
            changes.push(Change::Unmap { gpa: L2Gpa(first), len: end - first });
        }
        self.ranges.clear();
    }

    /// The file's `len` bytes from `offset` may be written nowhere any more.
    pub(super) fn protect(&mut self, offset: u64, len: u64, changes: &mut Vec<Change>) {
        let writable: Vec<_> = self
            .ranges
            .iter()
            .filter(|(_, r)| {
                r.rights == Rights::ReadWrite && r.offset < offset + len && offset < r.offset + r.len
            })
            .map(|(start, r)| {
                let from = offset.max(r.offset);
                let to = (offset + len).min(r.offset + r.len);
                (L2Gpa(start + (from - r.offset)), to - from, from)
            })
            .collect();
        for (gpa, len, offset) in writable {
            self.fill(gpa, len, offset, Rights::Read, changes);
        }
    }

    /// Takes out whatever is in `len` bytes from `start`; true if there was something.
    fn carve(&mut self, start: u64, len: u64) -> bool {
        let end = start.saturating_add(len);
        let mut any = false;
        while let Some((&at, &range)) = self.ranges.range(..end).next_back() {
            let range_end = at + range.len;
            if range_end <= start {
                break;
            }
            any = true;
            self.ranges.remove(&at);
            if at < start {
                self.ranges.insert(at, range.part(0, start - at));
            }
            if range_end > end {
                self.ranges.insert(end, range.part(end - at, range.len));
            }
            if at <= start {
                break;
            }
        }
        any
    }

    fn insert_merged(&mut self, mut start: u64, mut new: Range) {
        if let Some((&at, before)) = self.ranges.range(..start).next_back() {
            if at + before.len == start && before.goes_on_in(&new) {
                new = Range { len: before.len + new.len, offset: before.offset, ..new };
                self.ranges.remove(&at);
                start = at;
            }
        }
        if let Some(&after) = self.ranges.get(&(start + new.len)) {
            if new.goes_on_in(&after) {
                self.ranges.remove(&(start + new.len));
                new.len += after.len;
            }
        }
        self.ranges.insert(start, new);
    }

    #[cold]
    fn drop_oldest(&mut self, changes: &mut Vec<Change>) {
        let mut filled: Vec<_> = self.ranges.values().map(|range| range.filled).collect();
        let count = (self.ranges.len() - self.most).max(self.most * DROPPED_OF_EIGHT / 8);
        let count = count.min(filled.len() - 1);
        let (_, &mut last_kept, _) = filled.select_nth_unstable(count);
        self.ranges.retain(|&start, range| {
            let keep = range.filled >= last_kept;
            if !keep {
                changes.push(Change::Unmap { gpa: L2Gpa(start), len: range.len });
            }
            keep
        });
        // What a split left with one age goes together or stays together; the bound holds in any case.
        while self.ranges.len() > self.most {
            let Some((start, range)) = self.ranges.pop_first() else { break };
            changes.push(Change::Unmap { gpa: L2Gpa(start), len: range.len });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const PAGE: u64 = 4096;

    #[derive(Clone, Debug)]
    enum Step {
        Fill { page: u64, pages: u64, file_page: u64, rights: Rights },
        Forget { page: u64, pages: u64 },
        Protect { file_page: u64, pages: u64 },
        ForgetAll,
    }

    fn steps() -> impl Strategy<Value = Step> {
        let rights = prop_oneof![Just(Rights::Read), Just(Rights::ReadWrite)];
        prop_oneof![
            8 => (0..64u64, 1..9u64, 0..64u64, rights)
                .prop_map(|(page, pages, file_page, rights)| Step::Fill { page, pages, file_page, rights }),
            // As a guest has it mostly: the same distance everywhere, so that ranges grow together.
            8 => (0..64u64, 1..3u64)
                .prop_map(|(page, pages)| Step::Fill { page, pages, file_page: page + 7, rights: Rights::ReadWrite }),
            3 => (0..64u64, 1..9u64).prop_map(|(page, pages)| Step::Forget { page, pages }),
            2 => (0..70u64, 1..5u64).prop_map(|(file_page, pages)| Step::Protect { file_page, pages }),
            1 => Just(Step::ForgetAll),
        ]
    }

    type Model = HashMap<u64, (u64, Rights)>;

    fn step_model(model: &mut Model, step: &Step) {
        match *step {
            Step::Fill { page, pages, file_page, rights } => {
                model.extend((0..pages).map(|i| (page + i, (file_page + i, rights))));
            }
            Step::Forget { page, pages } => model.retain(|at, _| !(page..page + pages).contains(at)),
            Step::Protect { file_page, pages } => {
                for (file, rights) in model.values_mut() {
                    if (file_page..file_page + pages).contains(file) {
                        *rights = Rights::Read;
                    }
                }
            }
            Step::ForgetAll => model.clear(),
        }
    }

    fn step_ranges(ranges: &mut Ranges, step: &Step, changes: &mut Vec<Change>) {
        match *step {
            Step::Fill { page, pages, file_page, rights } => {
                ranges.fill(L2Gpa(page * PAGE), pages * PAGE, file_page * PAGE, rights, changes);
            }
            Step::Forget { page, pages } => ranges.forget(L2Gpa(page * PAGE), pages * PAGE, changes),
            Step::Protect { file_page, pages } => ranges.protect(file_page * PAGE, pages * PAGE, changes),
            Step::ForgetAll => ranges.forget_all(changes),
        }
    }

    /// What a host kernel would have mapped after `changes`.
    fn apply(mapped: &mut Model, changes: &[Change]) {
        for change in changes {
            match *change {
                Change::Map { gpa, len, offset, rights } => {
                    mapped.extend((0..len / PAGE).map(|i| (gpa.0 / PAGE + i, (offset / PAGE + i, rights))));
                }
                Change::Unmap { gpa, len } => {
                    mapped.retain(|at, _| !(gpa.0 / PAGE..(gpa.0 + len) / PAGE).contains(at));
                }
            }
        }
    }

    fn seen(ranges: &Ranges) -> Model {
        (0..80)
            .filter_map(|page| {
                let (offset, rights) = ranges.find(L2Gpa(page * PAGE + 5))?;
                Some((page, ((offset - 5) / PAGE, rights)))
            })
            .collect()
    }

    proptest! {
        // Failures are repeated from their seed in the message, wherever the test is run.
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn ranges_are_a_page_table(all in proptest::collection::vec(steps(), 1..60)) {
            let (mut ranges, mut model, mut mapped) = (Ranges::new(1000), Model::new(), Model::new());
            for step in &all {
                let mut changes = Vec::new();
                step_model(&mut model, step);
                step_ranges(&mut ranges, step, &mut changes);
                apply(&mut mapped, &changes);
                prop_assert_eq!(&seen(&ranges), &model);
                prop_assert_eq!(&mapped, &model);
            }
        }

        #[test]
        fn with_a_bound_they_only_forget(most in 1..12usize, all in proptest::collection::vec(steps(), 1..60)) {
            let (mut ranges, mut model, mut mapped) = (Ranges::new(most), Model::new(), Model::new());
            for step in &all {
                let mut changes = Vec::new();
                step_model(&mut model, step);
                step_ranges(&mut ranges, step, &mut changes);
                apply(&mut mapped, &changes);
                prop_assert!(ranges.len() <= most);
                let known = seen(&ranges);
                prop_assert_eq!(&mapped, &known);
                for (page, what) in known {
                    prop_assert_eq!(model.get(&page), Some(&what));
                }
            }
        }
    }

    #[test]
    fn neighbours_become_one_range_and_what_is_filled_last_stays() {
        let (mut ranges, mut changes) = (Ranges::new(4), Vec::new());
        for page in [3, 1, 2, 0] {
            ranges.fill(L2Gpa(page * PAGE), PAGE, (page + 9) * PAGE, Rights::ReadWrite, &mut changes);
        }
        assert_eq!((ranges.len(), changes.len()), (1, 4));
        for page in [10u64, 20, 30, 40] {
            ranges.fill(L2Gpa(page * PAGE), PAGE, 0, Rights::Read, &mut changes);
        }
        assert_eq!(ranges.len(), 4);
        assert_eq!(changes.last(), Some(&Change::Unmap { gpa: L2Gpa(0), len: 4 * PAGE }));
        assert_eq!(ranges.find(L2Gpa(40 * PAGE + 1)), Some((1, Rights::Read)));
    }

    #[test]
    fn what_is_there_already_changes_nothing() {
        let (mut ranges, mut changes) = (Ranges::new(4), Vec::new());
        ranges.fill(L2Gpa(0), 512 * PAGE, 0, Rights::ReadWrite, &mut changes);
        ranges.fill(L2Gpa(7 * PAGE), PAGE, 7 * PAGE, Rights::ReadWrite, &mut changes);
        ranges.forget(L2Gpa(600 * PAGE), PAGE, &mut changes);
        assert_eq!(changes.len(), 1);
    }
}
