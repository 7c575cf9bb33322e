//! EPT02 against a model that knows no cache: random tables, random edits, accesses, INVEPTs and root switches.
//!
//! The model translates with one straight walk, written from the SDM's text and not from the code. What EPT02 answers
//! with a walk of its own must be the model's answer, with the model's effects on memory and log; what it answers without
//! one must have been a right answer at some time since the last INVEPT, with no violation there in between.

use std::cell::RefCell;

use ept_merge::invalidate::Invalidation;
use ept_merge::{
    Access, Capabilities, Ept02, ExecuteControl, Fault, Identity, L1Gpa, L2Gpa, Limits, Log, Memory,
    Permissions, Root,
};

const PAGES: u64 = 12;
/// Table indices in use, at every level.
const INDICES: [u64; 3] = [0, 1, 511];
const LOG: u64 = 0x40_0000;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

#[derive(Clone, Default, PartialEq)]
struct Ram {
    words: Vec<u64>,
    log: Vec<(u64, u64)>,
}

struct Shared(RefCell<Ram>);

impl Memory for Shared {
    fn read_entry(&self, address: L1Gpa) -> Option<u64> {
        self.0.borrow().words.get(address.0 as usize / 8).copied()
    }

    fn exchange_entry(&self, address: L1Gpa, old: u64, new: u64) -> bool {
        let mut ram = self.0.borrow_mut();
        let word = &mut ram.words[address.0 as usize / 8];
        let same = *word == old;
        if same {
            *word = new;
        }
        same
    }

    fn write_log(&self, address: L1Gpa, value: u64) {
        self.0.borrow_mut().log.push((address.0, value));
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    Page { at: u64, span: u64, ready: u64 },
    Violation { allowed: u64, suppress_ve: bool },
    Misconfiguration,
    LogFull,
}

#[derive(Clone, Copy, Debug)]
struct Context {
    eptp: u64,
    mode_based: bool,
}

impl Context {
    fn flags(self) -> bool {
        self.eptp & 0x40 != 0
    }
}

/// What an access is made of; `wants` is R, W, X and user X in bits 0 to 3.
#[derive(Clone, Copy, Debug)]
struct Ask {
    gpa: u64,
    wants: u64,
    paging: bool,
}

/// R, W, XS, XU of an entry.
fn rights(entry: u64, context: Context) -> u64 {
    let user = if context.mode_based { entry & 1 << 10 != 0 } else { entry & 4 != 0 };
    entry & 7 | u64::from(user) << 3
}

/// "EPT Misconfigurations".
fn is_misconfigured(entry: u64, level: u32, caps: &Capabilities, context: Context) -> bool {
    let bits = |from: u32, to: u32| entry & ((1u64 << (to + 1)) - (1 << from)) != 0;
    let has = rights(entry, context);
    let maps_page = match level {
        1 => true,
        2 | 3 => entry & 0x80 != 0,
        _ => false,
    };
    let reserved = match (level, maps_page) {
        (4, _) => bits(3, 7),
        (3, true) => !caps.pages_1g || bits(12, 29),
        (2, true) => !caps.pages_2m || bits(12, 20),
        (1, _) => false,
        _ => bits(3, 6),
    };
    has & 3 == 2
        || has & 1 == 0 && has & 12 != 0 && !caps.execute_only
        || reserved
        || (caps.physical_bits < 52 && bits(caps.physical_bits, 51))
        || maps_page && [2, 3, 7].contains(&(entry >> 3 & 7))
}

/// The access, on `ram`, with everything it does to it.
fn model(ram: &mut Ram, log: &mut Option<Log>, caps: &Capabilities, context: Context, ask: Ask) -> Answer {
    let read = |ram: &Ram, at: u64| ram.words.get(at as usize / 8).copied().unwrap_or(u64::MAX);
    let nothing = |suppress_ve| Answer::Violation { allowed: 0, suppress_ve };
    if ask.gpa >> 48 != 0 {
        return nothing(true);
    }
    let mut used = Vec::new();
    let mut at = context.eptp & 0x000f_ffff_ffff_f000 | (ask.gpa >> 39 & 511) << 3;
    let mut allowed = 15;
    let mut level = 4;
    let leaf = loop {
        let entry = read(ram, at);
        if rights(entry, context) == 0 {
            return nothing(entry >> 63 != 0);
        }
        if is_misconfigured(entry, level, caps, context) {
            return Answer::Misconfiguration;
        }
        used.push(at);
        allowed &= rights(entry, context);
        if level == 1 || level < 4 && entry & 0x80 != 0 {
            break entry;
        }
        level -= 1;
        at = entry & 0x000f_ffff_ffff_f000 | (ask.gpa >> (12 + 9 * (level - 1)) & 511) << 3;
    };
    let wants = if ask.paging && context.flags() { ask.wants | 3 } else { ask.wants };
    if wants & !allowed != 0 {
        return Answer::Violation { allowed, suppress_ve: leaf >> 63 != 0 };
    }
    let write = wants & 2 != 0;
    let dirty = leaf & 1 << 9 != 0;
    if context.flags() {
        let lacking = used.iter().any(|&at| read(ram, at) & 1 << 8 == 0) || write && !dirty;
        if lacking && log.is_some_and(|log| log.index > 511) {
            return Answer::LogFull;
        }
        for &at in &used {
            ram.words[at as usize / 8] |= 1 << 8;
        }
        if write {
            ram.words[at as usize / 8] |= 1 << 9;
        }
        if let (Some(log), true, false) = (log, write, dirty) {
            ram.log.push((log.address.0 + 8 * u64::from(log.index), ask.gpa & !0xfff));
            log.index = log.index.wrapping_sub(1);
        }
    }
    let span = 1u64 << (12 + 9 * (level - 1));
    let clean = context.flags() && !write && !dirty;
    let ready = if clean { allowed & !2 } else { allowed };
    Answer::Page { at: leaf & 0x000f_ffff_ffff_f000 & !(span - 1), span, ready }
}

fn random_entry(random: &mut Random) -> u64 {
    let rights = if random.chance(3) { random.below(8) } else { 7 };
    let user = if random.chance(3) { 0 } else { 1 << 10 };
    let table = random.below(PAGES) << 12;
    // A page's memory type makes a table's entry malformed, so it is rare enough for walks to get through.
    let memory_type = if random.chance(4) { random.below(8) << 3 } else { 0 };
    let mut entry = rights | user | table | memory_type;
    match random.below(24) {
        0 => entry |= 0x80,
        1 | 2 => entry = entry & 0xfff | random.below(1 << 16) << 30 | 0x80,
        3 => entry |= 1 << random.below(64),
        4 => entry |= random.below(1 << 36) << 12,
        5 => entry |= 1 << 63,
        6 => entry |= 0x300,
        7 => entry = random.next() << 20 ^ random.next(),
        8 => entry = random.below(2) << 63,
        _ => {}
    }
    entry
}

fn random_gpa(random: &mut Random) -> u64 {
    let mut gpa =
        (0..4).fold(random.below(4096), |gpa, level| gpa | random.pick(&INDICES) << (12 + 9 * level));
    if random.chance(50) {
        gpa |= 1 << (48 + random.below(16));
    }
    gpa
}

fn random_ask(random: &mut Random) -> Ask {
    let paging = random.chance(4);
    let wants = if paging { 1 } else { random.pick(&[1, 1, 2, 3, 4, 8]) };
    Ask { gpa: random_gpa(random), wants, paging }
}

/// A right answer that EPT02 may still give.
struct Kept {
    table: u64,
    context: Context,
    gpa: u64,
    at: u64,
    span: u64,
    ready: u64,
}

struct Run {
    random: Random,
    caps: Capabilities,
    memory: Shared,
    ept02: Ept02,
    context: Context,
    log: Option<Log>,
    kept: Vec<Kept>,
    hits: u64,
    pages: u64,
    last: u64,
}

impl Run {
    fn new(seed: u64, limits: Limits) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let caps = Capabilities {
            execute_only: !random.chance(4),
            pages_2m: !random.chance(8),
            pages_1g: !random.chance(4),
            accessed_dirty: true,
            uncacheable: true,
            write_back: true,
            physical_bits: random.pick(&[36, 46, 46, 52]),
        };
        let mut ram = Ram { words: vec![0; PAGES as usize * 512], log: Vec::new() };
        for page in 0..PAGES {
            for index in INDICES {
                ram.words[(page * 512 + index) as usize] = random_entry(&mut random);
            }
        }
        let context = Context { eptp: 0x1e, mode_based: false };
        let ept02 = Ept02::new(limits, caps, Root::new(context.eptp, ExecuteControl::Single));
        let memory = Shared(RefCell::new(ram));
        Self { random, caps, memory, ept02, context, log: None, kept: Vec::new(), hits: 0, pages: 0, last: 0 }
    }

    fn step(&mut self) {
        match self.random.below(40) {
            0..4 => {
                let at = self.random.below(PAGES) * 512 + self.random.pick(&INDICES);
                let entry = random_entry(&mut self.random);
                self.memory.0.borrow_mut().words[at as usize] = entry;
            }
            4 => self.select(),
            5 => {
                let index = self.random.pick(&[0, 1, 3, 511, 512, 0xffff]);
                self.log = (!self.random.chance(3)).then_some(Log { address: L1Gpa(LOG), index });
                self.ept02.log = self.log;
            }
            6 => {
                let table = if self.random.chance(2) { self.table() } else { self.random.below(4) << 12 };
                self.ept02.invalidate(Invalidation::of(table | 0x1e));
                self.kept.retain(|kept| kept.table != table);
            }
            7 if self.random.chance(3) => {
                self.ept02.invalidate(Invalidation::AllContexts);
                self.kept.clear();
            }
            _ => self.access(),
        }
    }

    fn table(&self) -> u64 {
        self.context.eptp & !0xfff
    }

    fn select(&mut self) {
        let eptp = self.random.below(4) << 12 | self.random.pick(&[0x1e, 0x5e]);
        self.context = Context { eptp, mode_based: self.random.chance(3) };
        let execute =
            if self.context.mode_based { ExecuteControl::ModeBased } else { ExecuteControl::Single };
        self.ept02.select(Root::new(eptp, execute));
    }

    fn access(&mut self) {
        let mut ask = random_ask(&mut self.random);
        if self.random.chance(2) {
            ask.gpa = self.last;
        }
        self.last = ask.gpa;
        let before = self.log;
        let walks = self.ept02.walks();
        let mut ram = self.memory.0.borrow().clone();
        let expected = model(&mut ram, &mut self.log, &self.caps, self.context, ask);
        let access = Access::new(Permissions::from_bits(ask.wants), ask.paging);
        let answer = match self.ept02.translate(&self.memory, &Identity, L2Gpa(ask.gpa), access) {
            Ok(page) => {
                let span = 1 << (12 + 9 * (page.level() - 1));
                let piece = page.base().0 | ask.gpa & (span - 1) & !0xfff;
                assert_eq!(page.piece(L2Gpa(ask.gpa)).0, piece);
                Answer::Page { at: page.base().0, span, ready: page.ready().bits() }
            }
            Err(Fault::Violation { allowed, suppress_ve }) => {
                Answer::Violation { allowed: allowed.bits(), suppress_ve }
            }
            Err(Fault::Misconfiguration(_)) => Answer::Misconfiguration,
            Err(Fault::LogFull) => Answer::LogFull,
        };
        if self.ept02.walks() == walks {
            assert_eq!(self.ept02.log, before);
            self.log = before;
            self.check_kept(ask, answer);
            return;
        }
        assert_eq!(answer, expected, "{:x?} {ask:x?}", self.context);
        assert!(*self.memory.0.borrow() == ram, "effects on memory: {:x?} {ask:x?}", self.context);
        assert_eq!(self.ept02.log, self.log);
        let (table, context) = (self.table(), self.context);
        self.kept.retain(|kept| !kept.is_of(context) || ask.gpa & !(kept.span - 1) != kept.gpa);
        if let Answer::Page { at, span, ready } = answer {
            self.pages += 1;
            self.kept.push(Kept { table, context, gpa: ask.gpa & !(span - 1), at, span, ready });
        }
    }

    fn check_kept(&mut self, ask: Ask, answer: Answer) {
        self.hits += 1;
        let wants = if ask.paging && self.context.flags() { ask.wants | 3 } else { ask.wants };
        let right = self.kept.iter().any(|kept| {
            kept.is_of(self.context)
                && kept.gpa == ask.gpa & !(kept.span - 1)
                && answer == Answer::Page { at: kept.at, span: kept.span, ready: kept.ready }
                && wants & !kept.ready == 0
        });
        assert!(right, "nothing that could be kept: {ask:x?} {answer:x?}");
    }
}

impl Kept {
    fn is_of(&self, context: Context) -> bool {
        self.context.eptp == context.eptp && self.context.mode_based == context.mode_based
    }
}

fn run(seeds: std::ops::Range<u64>, steps: u32, limits: Limits) -> (u64, u64) {
    seeds.fold((0, 0), |(hits, pages), seed| {
        let mut run = Run::new(seed, limits);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..steps).for_each(|_| run.step());
        }));
        if let Err(panic) = result {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
        (hits + run.hits, pages + run.pages)
    })
}

#[test]
fn random_tables_against_the_model() {
    let (hits, pages) = run(0..300, 1500, Limits { sets: 256, roots: 16 });
    assert!(hits > 10_000 && pages > 10_000, "the tables are too wild to test anything: {hits} {pages}");
}

#[test]
fn the_same_with_hardly_any_room() {
    let (hits, pages) = run(1000..1100, 1500, Limits { sets: 1, roots: 2 });
    assert!(hits > 500 && pages > 5_000, "the tables are too wild to test anything: {hits} {pages}");
}
