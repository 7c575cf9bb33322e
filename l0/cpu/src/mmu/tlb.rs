//! The software TLB: direct-mapped tables in front of the page walker, one set for each address space in use.
//!
//! What is displaced from a data table's first place is kept in a second one, found by other bits of the address: two
//! pages of a hot loop in one place would cost a walk for each access, and stacks are at random addresses.
//!
//! A data entry answers two questions with one compare each: may this mode read (write) the page, and where is it
//! in host memory. Entries exist only for RAM. The layout is fixed so that translated code can use it.
//!
//! Invariants:
//! - TLB-1: a `write` tag is set only for a page whose dirty bit is set and that holds no code (CODE-1).
//! - TLB-2: the table of [`Mode::Slow`] is always empty: every access takes the slow path, where alignment checks
//!   and data breakpoints are.
//! - TLB-3: in its place, a fetch entry's `key` names the page and the physical page, for as long as the translation may be
//!   used. It is the same in every address space, so that who remembers code by it finds it in all of them.

/// Entries of each data table (a power of two), and as many second places behind them.
pub const DATA_ENTRIES: usize = 512;
/// Entries of each fetch table (a power of two).
pub const FETCH_ENTRIES: usize = 2048;
/// Address spaces kept at once: the half-dozen process contexts that Linux uses, for a hypervisor and three guests.
pub const SPACES: usize = 24;
/// Tag of a fetch entry never used: no page address has its low bits set.
pub const EMPTY: u64 = u64::MAX;

/// One data translation. `addend` + linear address = host address.
#[derive(Clone, Copy, Debug)]
pub struct DataEntry {
    /// The page that may be read, negated: an address in the page plus this is its offset there. [`no_page`] if none.
    pub read: u64,
    /// The page that may be written, likewise.
    pub write: u64,
    pub addend: u64,
    /// Physical page address, and in the low bits [`GLOBAL`] and [`LARGE`].
    pub info: u64,
}

impl DataEntry {
    /// Whether `size` bytes at `linear` may be read; they lie in one page then.
    #[inline(always)]
    pub fn reads(&self, linear: u64, size: usize) -> bool {
        holds(self.read, linear, size)
    }

    /// Whether they may be written.
    #[inline(always)]
    pub fn writes(&self, linear: u64, size: usize) -> bool {
        holds(self.write, linear, size)
    }
}

/// An entry is looked at by its index only, which is that of the first byte: if the last byte is in its page, so is the
/// first.
#[inline(always)]
fn holds(tag: u64, linear: u64, size: usize) -> bool {
    linear.wrapping_add(size as u64 - 1).wrapping_add(tag) < 4096
}

/// Tag of nothing: a page that does not belong at `index`, nor beside it. (Those below 2 MiB have the same index for both
/// places.)
pub fn no_page(index: usize) -> u64 {
    let index = index % DATA_ENTRIES;
    (((index ^ (DATA_ENTRIES / 2)) as u64) << 12).wrapping_neg()
}

/// `info`: the translation is global.
pub const GLOBAL: u64 = 1;
/// `info`: part of a page larger than 4 KiB.
pub const LARGE: u64 = 2;

/// One instruction-fetch translation.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct FetchEntry {
    pub page: u64,
    /// Physical page address.
    pub physical: u64,
    pub info: u64,
    /// TLB-3; with [`RETIRED`] if the translation may not be used.
    pub key: u64,
}

/// In a fetch entry's `page` and `key`: what the entry says held until a flush. (No page address has its low bits set.)
const RETIRED: u64 = 1;

const NO_FETCH: FetchEntry = FetchEntry { page: EMPTY, physical: 0, info: 0, key: RETIRED };

impl FetchEntry {
    /// The key, if it holds.
    pub fn key(&self) -> Option<u64> {
        (self.key & RETIRED == 0).then_some(self.key)
    }

    fn retire(&mut self) {
        self.page |= RETIRED;
        self.key |= RETIRED;
    }
}

/// TLB-3. What of the page the index does not say already, the physical page's number, and a clear [`RETIRED`]. A physical
/// page beyond the first TiB has no key that holds.
fn fetch_key(page: u64, physical: u64) -> u64 {
    const FRAME_BITS: u32 = 28;
    const LINEAR_BITS: u32 = 57;
    const PAGE_BITS: u32 = LINEAR_BITS - 12 - FETCH_ENTRIES.trailing_zeros();
    const { assert!(1 + FRAME_BITS + PAGE_BITS <= 64) };
    let (frame, rest) = (physical >> 12, page >> (12 + FETCH_ENTRIES.trailing_zeros()));
    if frame >> FRAME_BITS != 0 {
        return RETIRED;
    }
    (rest & ((1 << PAGE_BITS) - 1)) << (1 + FRAME_BITS) | frame << 1
}

/// Which entries may be filled, so that emptying costs no more than filling did.
struct Filled<const WORDS: usize>([u64; WORDS]);

impl<const WORDS: usize> Filled<WORDS> {
    fn note(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    fn for_each(&self, mut f: impl FnMut(usize)) {
        for (number, word) in self.0.iter().enumerate() {
            let mut left = *word;
            while left != 0 {
                f(number * 64 + left.trailing_zeros() as usize);
                left &= left - 1;
            }
        }
    }
}

/// The fields of entries, each in an array of its own: what translated code indexes by eight bytes.
#[repr(C)]
pub struct DataTable {
    pub read: [u64; PLACES],
    pub write: [u64; PLACES],
    pub addend: [u64; PLACES],
    info: [u64; PLACES],
    filled: Filled<{ PLACES / 64 }>,
}

/// First and second places.
const PLACES: usize = 2 * DATA_ENTRIES;

impl DataTable {
    fn new() -> Self {
        Self {
            read: std::array::from_fn(no_page),
            write: std::array::from_fn(no_page),
            addend: [0; PLACES],
            info: [0; PLACES],
            filled: Filled([0; PLACES / 64]),
        }
    }

    /// The entry for `linear`.
    #[inline(always)]
    pub fn entry(&self, linear: u64) -> DataEntry {
        self.at(data_index(linear))
    }

    /// What is in its second place.
    pub fn second(&self, linear: u64) -> DataEntry {
        self.at(second_index(linear))
    }

    #[inline(always)]
    fn at(&self, i: usize) -> DataEntry {
        DataEntry { read: self.read[i], write: self.write[i], addend: self.addend[i], info: self.info[i] }
    }

    /// Puts an entry in its first place, and what was there, if it is of another page, in its second.
    fn insert(&mut self, page: u64, entry: DataEntry) {
        let index = data_index(page);
        let mut old = self.at(index);
        if old.read != no_page(index) && old.read != entry.read {
            let second = second_index(old.read.wrapping_neg());
            if old.write != old.read {
                old.write = no_page(second);
            }
            self.put(second, old);
        }
        self.put(index, entry);
        // Not with fewer rights in its second place.
        let second = second_index(page);
        if self.read[second] == entry.read {
            self.remove(second);
        }
    }

    fn put(&mut self, index: usize, entry: DataEntry) {
        self.read[index] = entry.read;
        self.write[index] = entry.write;
        self.addend[index] = entry.addend;
        self.info[index] = entry.info;
        self.filled.note(index);
    }

    fn remove(&mut self, index: usize) {
        self.read[index] = no_page(index);
        self.write[index] = no_page(index);
    }

    fn empty_if(&mut self, goes: impl Fn(u64) -> bool) {
        let Self { read, write, info, filled, .. } = self;
        filled.for_each(|i| {
            if goes(info[i]) {
                (read[i], write[i]) = (no_page(i), no_page(i));
            }
        });
    }

    fn empty(&mut self) {
        self.empty_if(|_| true);
        self.filled.0.fill(0);
    }

    fn forget_writes(&mut self) {
        let Self { write, filled, .. } = self;
        filled.for_each(|i| write[i] = no_page(i));
    }
}

struct FetchTable {
    entries: [FetchEntry; FETCH_ENTRIES],
    filled: Filled<{ FETCH_ENTRIES / 64 }>,
}

impl FetchTable {
    fn new() -> Self {
        Self { entries: [NO_FETCH; FETCH_ENTRIES], filled: Filled([0; FETCH_ENTRIES / 64]) }
    }

    fn insert(&mut self, page: u64, physical: u64, info: u64) {
        let index = fetch_index(page);
        self.entries[index] = FetchEntry { page, physical, info, key: fetch_key(page, physical) };
        self.filled.note(index);
    }

    fn empty_if(&mut self, goes: impl Fn(u64) -> bool) {
        let Self { entries, filled } = self;
        filled.for_each(|i| {
            if goes(entries[i].info) {
                entries[i].retire();
            }
        });
    }

    fn empty(&mut self) {
        self.empty_if(|_| true);
        self.filled.0.fill(0);
    }
}

/// Which data table an access uses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub enum Mode {
    /// Supervisor access that SMAP applies to.
    Supervisor = 0,
    /// Supervisor access to user pages allowed (no SMAP, or AC set).
    SupervisorAc = 1,
    User = 2,
    Slow = 3,
}

/// What names an address space: translations of one are never used in another.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SpaceTag {
    /// Process-context identifier (0 without).
    pub pcid: u16,
    /// Virtual processor ([`crate::vmx::Controls::vpid_tag`]; 0: no VMX non-root operation).
    pub vpid: u32,
    /// Bits 51:12 of the EPT pointer (0: none).
    pub eptp: u64,
}

/// What translations were made under, and are not used without.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Regime {
    /// Bits of CR0, CR4 and EFER.
    pub modes: u64,
    /// Mode-based execute control, accessed and dirty flags for EPT.
    pub second_level: u32,
    /// The page that has no translations (APIC-1).
    pub apic_page: u64,
}

/// The translations of one address space.
pub struct Space {
    tag: SpaceTag,
    regime: Regime,
    used: u64,
    data: [DataTable; 4],
    fetch: [FetchTable; 2],
    /// Linear range that large pages were inserted in (first, last).
    large: (u64, u64),
    /// Some entry is of a page with a protection key other than 0.
    keys: bool,
    /// Everything in it is empty.
    clean: bool,
}

impl Space {
    fn new() -> Box<Self> {
        Box::new(Self {
            tag: SpaceTag::default(),
            regime: Regime::default(),
            used: 0,
            data: std::array::from_fn(|_| DataTable::new()),
            fetch: std::array::from_fn(|_| FetchTable::new()),
            large: (u64::MAX, 0),
            keys: false,
            clean: true,
        })
    }

    fn flush(&mut self) {
        if self.clean {
            return;
        }
        self.data.iter_mut().for_each(DataTable::empty);
        self.fetch.iter_mut().for_each(FetchTable::empty);
        self.large = (u64::MAX, 0);
        self.keys = false;
        self.clean = true;
    }

    fn flush_non_global(&mut self) {
        if self.clean {
            return;
        }
        self.empty_if(|info| info & GLOBAL == 0);
    }

    fn empty_if(&mut self, goes: impl Fn(u64) -> bool) {
        self.data.iter_mut().for_each(|t| t.empty_if(&goes));
        self.fetch.iter_mut().for_each(|t| t.empty_if(&goes));
    }

    fn flush_page(&mut self, linear: u64, keep_global: bool) {
        if self.clean {
            return;
        }
        let page = linear & !4095;
        let kept = |info: u64| keep_global && info & GLOBAL != 0;
        if page >= self.large.0 && page <= self.large.1 {
            // Some entry may be a piece of a large page around this address: drop all pieces of large pages.
            self.empty_if(|info| info & LARGE != 0 && !kept(info));
        }
        for table in &mut self.data {
            for index in [data_index(page), second_index(page)] {
                let entry = table.at(index);
                if (entry.reads(page, 1) || entry.writes(page, 1)) && !kept(entry.info) {
                    table.remove(index);
                }
            }
        }
        for table in &mut self.fetch {
            let entry = &mut table.entries[fetch_index(page)];
            if entry.page == page && !kept(entry.info) {
                entry.retire();
            }
        }
    }
}

/// Index of a linear address in a data table.
#[inline(always)]
pub fn data_index(linear: u64) -> usize {
    (linear >> 12) as usize & (DATA_ENTRIES - 1)
}

/// The second place of a linear address in a data table. (Translated code computes it too.) The lowest bit of the page's
/// number stays, so that no page has its neighbour's place: see [`DataEntry::reads`].
#[inline(always)]
pub fn second_index(linear: u64) -> usize {
    let above = linear >> SECOND_SHIFT & SECOND_MASK;
    DATA_ENTRIES + ((linear ^ above) >> 12) as usize % DATA_ENTRIES
}

/// How far up the bits are that make the second place another one, and where they come to.
pub const SECOND_SHIFT: u8 = DATA_ENTRIES.trailing_zeros() as u8 - 1;
pub const SECOND_MASK: u64 = 0xffff_e000;

/// Index of a linear address in a fetch table.
#[inline(always)]
pub fn fetch_index(linear: u64) -> usize {
    (linear >> 12) as usize & (FETCH_ENTRIES - 1)
}

/// All translations of one vCPU.
pub struct Tlb {
    spaces: Vec<Box<Space>>,
    current: usize,
    clock: u64,
}

impl Default for Tlb {
    fn default() -> Self {
        Self { spaces: (0..SPACES).map(|_| Space::new()).collect(), current: 0, clock: 0 }
    }
}

impl Tlb {
    /// The data table of `mode` in the current space.
    #[inline(always)]
    pub fn data(&self, mode: Mode) -> &DataTable {
        &self.spaces[self.current].data[mode as usize]
    }

    /// The fetch entry for `linear`, user or supervisor.
    #[inline(always)]
    pub fn fetch(&self, user: bool, linear: u64) -> &FetchEntry {
        &self.spaces[self.current].fetch[usize::from(user)].entries[fetch_index(linear)]
    }

    /// Makes `tag`'s space the current one, taking the least recently used for it if it has none. What it has from
    /// under another regime is dropped.
    pub fn switch(&mut self, tag: SpaceTag, regime: Regime) {
        self.clock += 1;
        let found = self.spaces.iter().position(|s| s.tag == tag && s.used != 0);
        let index = found.unwrap_or_else(|| {
            let oldest = (0..self.spaces.len()).min_by_key(|&i| self.spaces[i].used).unwrap_or(0);
            let space = &mut self.spaces[oldest];
            space.flush();
            space.tag = tag;
            oldest
        });
        let space = &mut self.spaces[index];
        if space.regime != regime {
            space.flush();
            space.regime = regime;
        }
        space.used = self.clock;
        self.current = index;
    }

    /// The fetch entries of the current space, user or supervisor: for who remembers where code is, and by which key.
    #[inline(always)]
    pub(crate) fn fetch_table(&self, user: bool) -> *const FetchEntry {
        self.spaces[self.current].fetch[usize::from(user)].entries.as_ptr()
    }

    /// Inserts a data translation.
    pub fn insert_data(&mut self, mode: Mode, linear: u64, entry: DataEntry, key: u32) {
        let space = &mut self.spaces[self.current];
        if mode == Mode::Slow {
            return;
        }
        space.clean = false;
        space.keys |= key != 0;
        note_large(&mut space.large, linear, entry.info);
        space.data[mode as usize].insert(linear & !4095, entry);
    }

    /// Inserts the fetch translation of `page`.
    pub fn insert_fetch(&mut self, user: bool, page: u64, physical: u64, info: u64) {
        let space = &mut self.spaces[self.current];
        space.clean = false;
        note_large(&mut space.large, page, info);
        space.fetch[usize::from(user)].insert(page, physical, info);
    }

    /// Drops everything, in every space.
    pub fn flush_all(&mut self) {
        self.flush_spaces(false, |_| true);
    }

    /// Drops everything of spaces that `which` selects; with `keep_global`, global translations stay.
    pub fn flush_spaces(&mut self, keep_global: bool, which: impl Fn(&SpaceTag) -> bool) {
        for space in self.spaces.iter_mut().filter(|s| !s.clean && which(&s.tag)) {
            if keep_global { space.flush_non_global() } else { space.flush() }
        }
    }

    /// Drops what translates `linear` in spaces that `which` selects.
    pub fn flush_page(&mut self, linear: u64, keep_global: bool, which: impl Fn(&SpaceTag) -> bool) {
        for space in self.spaces.iter_mut().filter(|s| !s.clean && which(&s.tag)) {
            space.flush_page(linear, keep_global);
        }
    }

    /// Drops every fast write translation (CODE-1); reads stay.
    pub fn forget_writes(&mut self) {
        for space in self.spaces.iter_mut().filter(|s| !s.clean) {
            space.data.iter_mut().for_each(DataTable::forget_writes);
        }
    }

    /// PKRU changed: drops data translations in spaces with protection keys in use.
    pub fn protection_keys_changed(&mut self) {
        for space in self.spaces.iter_mut().filter(|s| s.keys) {
            space.data.iter_mut().for_each(DataTable::empty);
        }
    }

    /// The tag of the current space.
    pub fn current_tag(&self) -> SpaceTag {
        self.spaces[self.current].tag
    }
}

fn note_large(range: &mut (u64, u64), linear: u64, info: u64) {
    if info & LARGE != 0 {
        // Large pages are at most 1 GiB: widen to whole gigabytes so that any address in the page is covered.
        range.0 = range.0.min(linear & !0x3fff_ffff);
        range.1 = range.1.max(linear | 0x3fff_ffff);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(page: u64, writable: bool) -> DataEntry {
        let tag = page.wrapping_neg();
        let write = if writable { tag } else { no_page(data_index(page)) };
        DataEntry { read: tag, write, addend: page, info: 0 }
    }

    #[test]
    fn neighbours_never_share_a_place() {
        let edges = (9..52).flat_map(|bit| [(1u64 << bit) - 2, (1 << bit) - 1, 1 << bit]);
        for page in (0..2048).chain(edges) {
            let (here, next) = (page << 12, (page + 1) << 12);
            assert_ne!(data_index(here), data_index(next), "{page:#x}");
            assert_ne!(second_index(here), second_index(next), "{page:#x}");
        }
    }

    #[test]
    fn nothing_is_no_page_of_its_place() {
        for index in 0..PLACES {
            let page = no_page(index).wrapping_neg();
            for near in [page, page.wrapping_sub(4096)] {
                assert_ne!(data_index(near), index);
                assert_ne!(second_index(near), index);
            }
        }
    }

    #[test]
    fn what_is_displaced_is_found_and_flushed() {
        let mut tlb = Tlb::default();
        let pages = [0x7fff_1234_5000, 0x0040_0000_5000 | 0x14_5000];
        assert_eq!(data_index(pages[0]), data_index(pages[1]));
        for page in pages {
            tlb.insert_data(Mode::User, page, entry(page, true), 0);
        }
        let table = tlb.data(Mode::User);
        assert!(table.entry(pages[1]).writes(pages[1], 8));
        assert!(!table.entry(pages[0]).reads(pages[0], 8));
        assert!(table.second(pages[0]).writes(pages[0], 8));
        tlb.forget_writes();
        assert!(!tlb.data(Mode::User).second(pages[0]).writes(pages[0], 8));
        assert!(tlb.data(Mode::User).second(pages[0]).reads(pages[0], 8));
        for space in &mut tlb.spaces {
            space.flush_page(pages[0], false);
        }
        assert!(!tlb.data(Mode::User).second(pages[0]).reads(pages[0], 8));
        assert!(tlb.data(Mode::User).entry(pages[1]).reads(pages[1], 8));
    }

    #[test]
    fn the_second_place_keeps_rights() {
        let mut tlb = Tlb::default();
        let (first, other) = (0x7fff_1234_5000, 0x14_5000);
        tlb.insert_data(Mode::User, first, entry(first, false), 0);
        tlb.insert_data(Mode::User, other, entry(other, true), 0);
        let second = tlb.data(Mode::User).second(first);
        assert!(second.reads(first, 4096) && !second.writes(first, 1));
        // Back with more rights: the old one is gone.
        tlb.insert_data(Mode::User, first, entry(first, true), 0);
        assert!(tlb.data(Mode::User).entry(first).writes(first, 1));
        assert!(!tlb.data(Mode::User).second(first).reads(first, 1));
    }

    const PAGE: u64 = 0x7000;
    const FRAME: u64 = 0x1_2000;

    fn key(tlb: &Tlb) -> u64 {
        tlb.fetch(false, PAGE).key
    }

    #[test]
    fn a_page_that_lies_where_it_lay_has_its_key_again() {
        let mut tlb = Tlb::default();
        tlb.insert_fetch(false, PAGE, FRAME, 0);
        let first = key(&tlb);
        tlb.flush_page(PAGE, false, |_| true);
        assert_ne!(key(&tlb), first, "a dropped translation has no key that holds");
        assert_ne!(tlb.fetch(false, PAGE).page, PAGE);
        tlb.insert_fetch(false, PAGE, FRAME, 0);
        assert_eq!(key(&tlb), first);
        tlb.flush_all();
        assert_ne!(key(&tlb), first);
        tlb.insert_fetch(false, PAGE, FRAME, LARGE);
        assert_eq!(key(&tlb), first);
    }

    #[test]
    fn another_page_and_another_frame_have_other_keys_and_another_space_has_the_same() {
        let mut tlb = Tlb::default();
        let mut seen = std::collections::HashMap::new();
        let places =
            [PAGE, PAGE + ((FETCH_ENTRIES as u64) << 12), PAGE | 0xffff_8000_0000_0000, PAGE | 1 << 56];
        for page in places {
            for frame in [0, FRAME, FRAME + 0x1000, 0xff_ffff_f000] {
                for pcid in [0, 1] {
                    tlb.switch(SpaceTag { pcid, ..SpaceTag::default() }, Regime::default());
                    for user in [false, true] {
                        tlb.insert_fetch(user, page, frame, 0);
                        let whose = *seen.entry(tlb.fetch(user, page).key).or_insert((page, frame));
                        assert_eq!(whose, (page, frame), "two pairs have one key");
                    }
                }
            }
        }
        assert_eq!(seen.len(), 16, "one key for each pair");
        tlb.insert_fetch(false, PAGE, 1 << 40, 0);
        assert_eq!(key(&tlb) & RETIRED, RETIRED, "a frame too far has none");
    }

    #[test]
    fn global_translations_keep_their_keys_where_others_lose_them() {
        let mut tlb = Tlb::default();
        tlb.insert_fetch(false, PAGE, FRAME, GLOBAL);
        tlb.insert_fetch(false, PAGE + 0x1000, FRAME, 0);
        let (global, other) = (key(&tlb), tlb.fetch(false, PAGE + 0x1000).key);
        tlb.flush_spaces(true, |_| true);
        assert_eq!(key(&tlb), global);
        assert_ne!(tlb.fetch(false, PAGE + 0x1000).key, other);
    }
}
