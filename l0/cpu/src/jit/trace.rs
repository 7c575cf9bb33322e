//! The path that a translation takes: from a hot block on along the likelier side of each branch, within the page.
//!
//! Every block on it has been decoded, and executed, before: how often says which side of a branch is the likelier.

use iced_x86::{Decoder, Instruction, Mnemonic, OpKind};

use super::gate::Place;
use super::lower::has_lowering;
use crate::block::{Block, BlockCache, MAX_BLOCK, key};
use crate::cpuid::CpuModel;
use crate::tunables::{TRACE_BLOCKS, TRACE_INSTRUCTIONS};

/// What comes after an instruction in the trace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Follow {
    /// What follows it in memory.
    Next,
    /// A jump's target.
    Taken,
    /// Nothing: it is the last.
    End,
}

/// What there is to know of an instruction besides itself.
#[derive(Clone, Copy)]
pub(super) struct Step {
    /// Its op's place in the arena.
    pub op: u32,
    /// Its block.
    pub place: Place,
    /// It is the last of its block: its handler returns to the run loop.
    pub last: bool,
    pub follow: Follow,
}

/// Instructions to be executed one after the other. They are decoded with the start of the page as address 0.
pub(super) struct Trace {
    pub insns: Vec<Instruction>,
    pub steps: Vec<Step>,
    start: u16,
    /// It is one instruction, which crosses into the next page, and is not here: what it is, the next page says.
    pub crosses: bool,
}

impl Trace {
    /// The trace from the block at `physical` on; `bytes` are its page's. None if these are not what was decoded.
    pub(super) fn find(
        blocks: &BlockCache,
        model: &CpuModel,
        physical: u64,
        bytes: &[u8; 4096],
    ) -> Option<Self> {
        let page = physical & !4095;
        let first = blocks.find(key(physical, 64))?;
        let start = (physical & 4095) as u16;
        let mut trace = Self { insns: Vec::new(), steps: Vec::new(), start, crosses: first.crosses() };
        if trace.crosses {
            return Some(trace);
        }
        let mut starts = vec![start];
        trace.add(blocks, model, first, start, bytes)?;
        while starts.len() < TRACE_BLOCKS {
            let usable = |offset: u64| {
                let block = (offset < 4096).then(|| blocks.find(key(page | offset, 64))).flatten()?;
                let usable = !block.crosses()
                    && block.version() == first.version()
                    && trace.insns.len() + usize::from(block.count) <= TRACE_INSTRUCTIONS
                    && !starts.contains(&(offset as u16));
                usable.then_some((offset as u16, *block))
            };
            let Some((follow, (offset, block))) = trace.likelier(model, usable) else { break };
            if let Some(step) = trace.steps.last_mut() {
                step.follow = follow;
            }
            trace.add(blocks, model, &block, offset, bytes)?;
            starts.push(offset);
        }
        Some(trace)
    }

    /// Where the trace goes on after its last block, of what is `usable`.
    fn likelier(
        &self,
        model: &CpuModel,
        usable: impl Fn(u64) -> Option<(u16, Block)>,
    ) -> Option<(Follow, (u16, Block))> {
        let last = self.insns.last()?;
        let next = || usable(last.next_ip()).map(|found| (Follow::Next, found));
        let target = || usable(last.near_branch64()).map(|found| (Follow::Taken, found));
        if last.is_jcc_short_or_near() {
            let heat = |block: &Block| if block.translation == 0 { block.heat } else { u32::MAX };
            return match (next(), target()) {
                (Some(next), Some(target)) if heat(&target.1.1) > heat(&next.1.1) => Some(target),
                (next, target) => next.or(target),
            };
        }
        match last.mnemonic() {
            Mnemonic::Jmp if last.op0_kind() == OpKind::NearBranch64 => target(),
            Mnemonic::Jmp | Mnemonic::Call | Mnemonic::Ret => None,
            // A handler at a block's end returns to the run loop.
            _ if !has_lowering(model, last) => None,
            _ => next(),
        }
    }

    fn add(
        &mut self,
        blocks: &BlockCache,
        model: &CpuModel,
        block: &Block,
        offset: u16,
        bytes: &[u8; 4096],
    ) -> Option<()> {
        let run = block.run();
        let end = usize::from(offset) + usize::from(run.len);
        let code = bytes.get(usize::from(offset)..end)?;
        let mut decoder = Decoder::with_ip(64, code, u64::from(offset), model.decoder_options());
        let place = Place { offset, len: run.len };
        debug_assert!(usize::from(run.count) <= MAX_BLOCK);
        for (number, op) in blocks.block_ops(run).iter().enumerate() {
            if !decoder.can_decode() {
                return None;
            }
            let insn = decoder.decode();
            if insn.ip() != u64::from(offset + op.at) {
                return None;
            }
            let last = number + 1 == usize::from(run.count);
            let follow = if last { Follow::End } else { Follow::Next };
            self.insns.push(insn);
            self.steps.push(Step { op: run.first + number as u32, place, last, follow });
        }
        Some(())
    }

    /// Instructions in it.
    pub(super) fn len(&self) -> usize {
        if self.crosses { 1 } else { self.insns.len() }
    }

    /// Offset of the first instruction in the page.
    pub(super) fn start(&self) -> u16 {
        self.start
    }
}
