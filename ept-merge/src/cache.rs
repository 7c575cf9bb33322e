//! Where EPT02's pages are kept: a set-associative table of fixed size, shared by all roots.
//!
//! A page is found by a number that stands for its root, its size and its frame. Forgetting a root is giving it another
//! number; what was kept under the old one is never found again, and makes room in time.

use crate::memory::L2Gpa;
use crate::merge::Page;

/// Bits of a root's number.
const NUMBER_BITS: u32 = 26;
/// Bits of a guest frame (48-bit addresses).
const FRAME_BITS: u32 = 36;
/// Pages of a set: one cache line.
const WAYS: usize = 4;

/// Stands for a root; never zero.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Number(u64);

impl Number {
    pub const FIRST: Self = Self(1);

    /// The next one; none if all have been used.
    pub fn next(self) -> Option<Self> {
        let next = self.0 + 1;
        (next >> NUMBER_BITS == 0).then_some(Self(next))
    }
}

#[derive(Clone, Copy, Default)]
struct Slot {
    /// Zero is empty.
    tag: u64,
    page: u64,
}

#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Set([Slot; WAYS]);

/// The table.
pub struct Cache {
    sets: Box<[Set]>,
}

impl Cache {
    /// With room for four pages in each of `sets` (made a power of two).
    pub fn new(sets: usize) -> Self {
        Self { sets: vec![Set::default(); sets.max(1).next_power_of_two()].into_boxed_slice() }
    }

    /// Forgets everything, so that numbers may be used again.
    pub fn clear(&mut self) {
        self.sets.fill(Set::default());
    }

    /// The page of this size around `gpa`.
    #[inline(always)]
    pub fn find(&self, number: Number, level: u32, gpa: L2Gpa) -> Option<Page> {
        let tag = tag(number, level, gpa);
        let set = self.sets.get(self.index(tag))?;
        set.0.iter().find(|slot| slot.tag == tag).map(|slot| Page::from_word(slot.page))
    }

    /// Keeps a page, in place of the oldest one of its set.
    pub fn insert(&mut self, number: Number, gpa: L2Gpa, page: Page) {
        let tag = tag(number, page.level(), gpa);
        let index = self.index(tag);
        let Some(Set(ways)) = self.sets.get_mut(index) else { return };
        let place = ways.iter().position(|slot| slot.tag == tag || slot.tag == 0).unwrap_or(WAYS - 1);
        ways.copy_within(0..place, 1);
        ways[0] = Slot { tag, page: page.word() };
    }

    /// Forgets the page of this size around `gpa`.
    pub fn remove(&mut self, number: Number, level: u32, gpa: L2Gpa) {
        let tag = tag(number, level, gpa);
        let index = self.index(tag);
        if let Some(Set(ways)) = self.sets.get_mut(index) {
            ways.iter_mut().filter(|slot| slot.tag == tag).for_each(|slot| *slot = Slot::default());
        }
    }

    /// Pages kept, those that nobody can find included.
    pub fn len(&self) -> usize {
        self.sets.iter().flat_map(|set| &set.0).filter(|slot| slot.tag != 0).count()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Neighbouring frames are in neighbouring sets; roots and sizes are spread.
    #[inline(always)]
    fn index(&self, tag: u64) -> usize {
        let spread = (tag >> FRAME_BITS).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let frame = tag ^ tag >> 18;
        (frame ^ spread) as usize & (self.sets.len() - 1)
    }
}

/// Of the page's first frame, counted in pages of its size.
#[inline(always)]
fn tag(number: Number, level: u32, gpa: L2Gpa) -> u64 {
    let frame = gpa.0 >> (12 + 9 * (level - 1)) & ((1 << FRAME_BITS) - 1);
    number.0 << (FRAME_BITS + 2) | u64::from(level) << FRAME_BITS | frame
}
