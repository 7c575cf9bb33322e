//! Decoded blocks, kept by the physical memory they were decoded from.
//!
//! A block is a straight run of instructions within one page, ended by a branch, by an instruction that may change
//! how the next one is decoded or whether it is reached, by the page, or by its length. It is found through the
//! fetch translation of its first byte, so address spaces share blocks and survive switches; it is valid as long as
//! its page's version is what it was at decoding (see [`crate::phys`]).
//!
//! Ops live in one arena that is emptied when full. Handlers run with a pointer into it (see `exec`), so it is
//! emptied only between blocks.

use std::collections::HashMap;
use std::ptr;

use crate::op::{Cold, Op};
use crate::phys::{CODE_GRAIN, CodePage, PhysMemory};
use crate::tunables::{BLOCK_SLOTS, COLD_CAPACITY, OP_CAPACITY};

/// Longest block, in instructions.
pub(crate) const MAX_BLOCK: usize = 64;

/// Bytes of memory that count as code or not together.
const GRAIN: usize = CODE_GRAIN as usize;

/// A decoded block.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    /// Physical address of the first byte, with the decoding mode in the top bits; see [`key`].
    pub key: u64,
    /// The page the block lies in; null for an empty slot.
    code: *const CodePage,
    version: u32,
    /// Version of the second page of a page-crossing instruction.
    second_version: u32,
    /// The second page, if the block's only instruction crosses into it, and its physical address.
    second: *const CodePage,
    pub second_physical: u64,
    pub first: u32,
    pub count: u16,
    pub len: u16,
    /// Times it was looked for, as far as the translator counts.
    pub heat: u32,
    /// Address of its translation; 0 without.
    pub translation: u64,
    /// Instructions in its translation, which may go on beyond the block.
    pub translated: u16,
}

/// The part of a block that executing it takes: small enough to be returned in registers.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Run {
    pub first: u32,
    pub count: u16,
    pub len: u16,
}

const EMPTY: Block = Block {
    key: u64::MAX,
    code: ptr::null(),
    version: 0,
    second_version: 0,
    second: ptr::null(),
    second_physical: 0,
    first: 0,
    count: 0,
    len: 0,
    heat: 0,
    translation: 0,
    translated: 0,
};

impl Block {
    pub(crate) fn new(key: u64, code: &CodePage, version: u32) -> Self {
        Self { key, code, version, ..EMPTY }
    }

    pub(crate) fn set_second(&mut self, physical: u64, code: &CodePage, version: u32) {
        self.second_physical = physical;
        self.second = code;
        self.second_version = version;
    }

    /// Nothing was written over the block since it was decoded.
    #[inline(always)]
    fn is_fresh(&self) -> bool {
        // SAFETY: a slot with a matching key was filled by `new`, and `CodePage`s live as long as the memory, which
        // the CPU keeps alive.
        unsafe { (*self.code).version() == self.version }
    }

    /// The version its page had.
    pub(crate) fn version(&self) -> u32 {
        self.version
    }

    /// What is to be executed of it.
    #[inline(always)]
    pub(crate) fn run(&self) -> Run {
        Run { first: self.first, count: self.count, len: self.len }
    }

    /// The same for the second page of a page-crossing instruction.
    pub(crate) fn second_is_fresh(&self) -> bool {
        // SAFETY: as above; null means that there is no second page.
        self.second.is_null() || unsafe { (*self.second).version() == self.second_version }
    }

    /// The only instruction crosses into the next page.
    #[inline(always)]
    pub(crate) fn crosses(&self) -> bool {
        !self.second.is_null()
    }
}

/// What a block is found by: where its bytes are, and how they are decoded (16, 32 or 64 bits).
#[inline(always)]
pub(crate) fn key(physical: u64, code_bits: u32) -> u64 {
    physical | u64::from(code_bits) << 56
}

/// Slots that a block may be in: with one, pairs of blocks that a loop runs through would throw each other out for ever.
const WAYS: usize = 4;

/// Blocks that are forgotten one by one; more are forgotten by emptying the whole table.
const FEW: usize = 1024;

/// The first of a block's slots.
#[inline(always)]
fn slot(key: u64) -> usize {
    // Fibonacci hashing: the low bits of nearby addresses are spread by the multiplication.
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - (BLOCK_SLOTS / WAYS).trailing_zeros())) as usize * WAYS
}

/// The blocks of one vCPU.
pub struct BlockCache {
    slots: Box<[Block]>,
    /// Never grows beyond the room it was made with: it stays where it is.
    ops: Vec<Op>,
    /// Likewise.
    cold: Vec<Cold>,
    generation: u64,
    /// First slots of the blocks inserted since everything was forgotten, as long as they are few.
    inserted: Vec<u32>,
    /// The bytes that were decoded, by page, if somebody may change them behind our back.
    sources: Option<HashMap<u64, Source>>,
}

/// What was decoded of a page.
struct Source {
    /// The grains that are here.
    grains: u64,
    bytes: Box<[u8; 4096]>,
}

// SAFETY: the raw pointers name `CodePage`s, which are shared between threads by design and kept alive by the memory.
unsafe impl Send for BlockCache {}

impl Default for BlockCache {
    fn default() -> Self {
        Self {
            slots: vec![EMPTY; BLOCK_SLOTS].into_boxed_slice(),
            ops: Vec::with_capacity(OP_CAPACITY),
            cold: Vec::with_capacity(COLD_CAPACITY),
            generation: 1,
            inserted: Vec::with_capacity(FEW),
            sources: None,
        }
    }
}

impl BlockCache {
    /// Keeps from now on what is decoded, for [`BlockCache::find_changes`].
    pub(crate) fn keep_sources(&mut self) {
        self.clear();
        self.sources = Some(HashMap::new());
    }

    /// The grain of memory at `physical`, which is marked as code, is about to be decoded.
    #[inline]
    pub(crate) fn note_source(&mut self, memory: &PhysMemory, physical: u64) {
        if let Some(sources) = &mut self.sources {
            let nothing = || Source { grains: 0, bytes: Box::new([0; 4096]) };
            let source = sources.entry(physical & !4095).or_insert_with(nothing);
            let at = physical as usize & 4095 & !(GRAIN - 1);
            memory.read(physical & !(GRAIN as u64 - 1), &mut source.bytes[at..at + GRAIN]);
            source.grains |= 1 << (at / GRAIN);
        }
    }

    /// Makes all blocks stale whose memory is not what was decoded. False if that is not known.
    pub(crate) fn find_changes(&mut self, memory: &PhysMemory) -> bool {
        let Some(sources) = &mut self.sources else { return false };
        let mut now = [0; 4096];
        sources.retain(|&page, source| {
            memory.read(page, &mut now);
            let changed = |grain: usize| {
                let bytes = grain * GRAIN..(grain + 1) * GRAIN;
                source.grains >> grain & 1 != 0 && now[bytes.clone()] != source.bytes[bytes]
            };
            let mut same = true;
            for grain in (0..4096 / GRAIN).filter(|&grain| changed(grain)) {
                memory.wrote(page + (grain * GRAIN) as u64, GRAIN as u64);
                same = false;
            }
            // With one grain the whole page's blocks are stale.
            same
        });
        true
    }

    /// The block for `key`, if it is here and fresh.
    #[inline(always)]
    pub(crate) fn find(&self, key: u64) -> Option<&Block> {
        let block = &self.slots[slot(key)];
        if block.key == key && block.is_fresh() {
            return Some(block);
        }
        self.find_behind(key)
    }

    /// Looks at the slots behind the first.
    fn find_behind(&self, key: u64) -> Option<&Block> {
        let ways = &self.slots[slot(key)..][1..WAYS];
        ways.iter().find(|block| block.key == key && block.is_fresh())
    }

    /// The same, to change what is kept of it for the translator.
    #[inline(always)]
    pub(crate) fn find_mut(&mut self, key: u64) -> Option<&mut Block> {
        let ways = &mut self.slots[slot(key)..][..WAYS];
        ways.iter_mut().find(|block| block.key == key && block.is_fresh())
    }

    /// The ops of a block.
    pub(crate) fn block_ops(&self, run: Run) -> &[Op] {
        &self.ops[run.first as usize..][..usize::from(run.count)]
    }

    /// Changes whenever the arena is emptied.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Makes room for one more block, emptying everything if needed. Only between blocks.
    pub(crate) fn make_room(&mut self) {
        if self.ops.len() + MAX_BLOCK > OP_CAPACITY || self.cold.len() + MAX_BLOCK > COLD_CAPACITY {
            self.clear();
        }
    }

    /// Forgets every block.
    pub(crate) fn clear(&mut self) {
        // An engine that comes and goes forgets often, after few blocks.
        if self.inserted.len() < FEW {
            for &first in &self.inserted {
                self.slots[first as usize..][..WAYS].fill(EMPTY);
            }
        } else {
            self.slots.fill(EMPTY);
        }
        self.inserted.clear();
        if let Some(sources) = &mut self.sources {
            sources.clear();
        }
        self.ops.clear();
        self.cold.clear();
        self.generation += 1;
    }

    /// Adds a block's ops; `make_room` came before.
    pub(crate) fn insert(&mut self, mut block: Block, ops: &[Op]) -> Block {
        block.first = self.ops.len() as u32;
        assert!(self.ops.len() + ops.len() <= OP_CAPACITY);
        self.ops.extend_from_slice(ops);
        // The latest comes first; of those behind it, what it replaces or else the oldest goes.
        let first = slot(block.key);
        if self.inserted.len() < FEW {
            self.inserted.push(first as u32);
        }
        let ways = &mut self.slots[first..][..WAYS];
        let gone = ways.iter().position(|way| way.key == block.key).unwrap_or(WAYS - 1);
        ways[..=gone].rotate_right(1);
        ways[0] = block;
        block
    }

    /// Keeps the cold part of an instruction; returns its index.
    pub(crate) fn add_cold(&mut self, cold: Cold) -> u64 {
        assert!(self.cold.len() < COLD_CAPACITY);
        self.cold.push(cold);
        self.cold.len() as u64 - 1
    }

    /// The ops, for `exec`.
    #[inline(always)]
    pub(crate) fn ops(&self) -> *const Op {
        self.ops.as_ptr()
    }

    /// The cold part at `index`.
    #[inline(always)]
    pub(crate) fn cold(&self, index: u64) -> *const Cold {
        &raw const self.cold[index as usize]
    }
}
