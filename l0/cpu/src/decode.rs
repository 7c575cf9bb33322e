//! Bytes to ops, once: asks each family of [`crate::interp`] for its handler.
//!
//! Bytes are marked as code before they are read ([`crate::phys::PhysMemory::mark_code`]), so a write that comes
//! later is noticed.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};
use x86defs::vector;

use crate::Cpu;
use crate::block::{Block, MAX_BLOCK, key};
use crate::interp::operands::{address_bits, memory_segment, offset_of};
use crate::interp::{self};
use crate::op::{Cold, ColdHandler, Op};
use crate::phys::CodePage;
use crate::profile::{Count, Doing};
use crate::state::SLOT_BLOCK_IP;
use crate::trap::{Exec, Fault};

/// Longest x86 instruction.
const MAX_LENGTH: usize = 15;
/// Bytes marked and read at a time.
const GRAIN: usize = 64;

/// Ops of a block being decoded.
struct Builder {
    ops: [Op; MAX_BLOCK],
    count: usize,
}

impl Cpu {
    /// Decodes the block at linear address `linear`, whose first byte is at `physical`.
    pub(crate) fn decode_block(&mut self, linear: u64, physical: u64) -> Exec<Block> {
        let before = self.begin(Doing::Decoding);
        self.count(Count::Decoded);
        let generation = self.blocks.generation();
        self.blocks.make_room();
        if self.blocks.generation() != generation {
            self.count(Count::Forgotten);
        }
        let block = self.decode_block_at(linear, physical);
        self.resume(before);
        block
    }

    fn decode_block_at(&mut self, linear: u64, physical: u64) -> Exec<Block> {
        let memory = std::sync::Arc::clone(&self.memory);
        let Some((_, code)) = memory.page(physical) else {
            // Fetching from outside RAM: all ones come back, which is no instruction.
            return Err(self.raise(Fault::ud()));
        };
        let step = grain_left(physical);
        let version = self.mark_and_version(code, physical, step);
        let mut block = Block::new(key(physical, self.code_bits), code, version);
        let mut builder = Builder { ops: [Op::new(undefined); MAX_BLOCK], count: 0 };
        self.decode_within_page(&mut block, &mut builder, physical, code);
        if builder.count == 0 {
            return self.decode_crossing(block, linear, physical);
        }
        Ok(self.blocks.insert(block, &builder.ops[..builder.count]))
    }

    fn mark_and_version(&mut self, code: &CodePage, physical: u64, len: usize) -> u32 {
        let memory = std::sync::Arc::clone(&self.memory);
        let peer = std::sync::Arc::clone(&self.peer);
        let tlb = &mut self.tlb;
        memory.mark_code(&peer, code, physical & 4095, len as u64, &mut || tlb.forget_writes())
    }

    /// Decodes instructions that lie wholly in the page. `block` has the page's version from before its first bytes
    /// were read: if another vCPU writes to the page meanwhile, what comes out is executed once, as instructions
    /// fetched just before the write, and is not fresh when it is looked for again. So there is no need to decode
    /// again here, which a guest could make endless.
    fn decode_within_page(
        &mut self,
        block: &mut Block,
        builder: &mut Builder,
        physical: u64,
        code: &CodePage,
    ) {
        let page_left = 4096 - (physical & 4095) as usize;
        let mut bytes = [0u8; 4096];
        let (mut have, mut at) = (0, 0);
        while builder.count < MAX_BLOCK && at < page_left {
            let want = (at + MAX_LENGTH).min(page_left);
            while have < want {
                let start = physical + have as u64;
                let step = grain_left(start);
                self.mark_and_version(code, start, step);
                self.memory.read(start, &mut bytes[have..have + step]);
                self.blocks.note_source(&self.memory, start);
                have += step;
            }
            let end = (at + MAX_LENGTH).min(page_left);
            let mut decoder =
                Decoder::with_ip(self.code_bits, &bytes[at..end], at as u64, self.model.decoder_options());
            let insn = decoder.decode();
            if insn.is_invalid()
                && end - at < MAX_LENGTH
                && decoder.last_error() == iced_x86::DecoderError::NoMoreBytes
                && can_continue(self.code_bits, &bytes[at..end])
            {
                // It goes on in the next page: a block of its own.
                break;
            }
            let too_long = insn.is_invalid() && is_too_long(self.code_bits, &bytes[at..end]);
            if starts_block(&insn) && builder.count > 0 {
                break;
            }
            let (op, ends) = self.lower(&insn, too_long);
            builder.ops[builder.count] = op;
            builder.count += 1;
            at += insn.len().max(1);
            if ends {
                break;
            }
        }
        block.count = builder.count as u16;
        block.len = at as u16;
    }

    /// A single instruction that crosses into the next page. Its second page's fetch may fault.
    fn decode_crossing(&mut self, mut block: Block, linear: u64, physical: u64) -> Exec<Block> {
        let memory = std::sync::Arc::clone(&self.memory);
        let first_len = 4096 - (physical & 4095) as usize;
        let next_page = self.wrap(linear.wrapping_add(first_len as u64));
        let second = self.fetch_physical(next_page)?;
        let Some((_, second_code)) = memory.page(second) else { return Err(self.raise(Fault::ud())) };
        let first_len = first_len.min(MAX_LENGTH);
        // Marked and versioned before it is read, like the first page.
        let second_version = self.mark_and_version(second_code, second, MAX_LENGTH - first_len);
        let mut bytes = [0u8; MAX_LENGTH];
        memory.read(physical, &mut bytes[..first_len]);
        memory.read(second, &mut bytes[first_len..]);
        self.blocks.note_source(&memory, second);
        let mut decoder = Decoder::with_ip(self.code_bits, &bytes, 0, self.model.decoder_options());
        let insn = decoder.decode();
        let too_long = insn.is_invalid() && is_too_long(self.code_bits, &bytes);
        let (op, _) = self.lower(&insn, too_long);
        block.set_second(second, second_code, second_version);
        block.count = 1;
        block.len = insn.len().max(1) as u16;
        Ok(self.blocks.insert(block, &[op]))
    }

    /// The op for one instruction, and whether it ends its block.
    pub(crate) fn lower(&mut self, insn: &Instruction, too_long: bool) -> (Op, bool) {
        let mut op = Op::new(undefined);
        op.at = insn.ip() as u16;
        op.next = insn.next_ip() as u16;
        if insn.is_invalid() {
            if too_long {
                op.handler = general_protection;
            }
            return (op, true);
        }
        if !self.model.allows(insn) {
            return (op, true);
        }
        memory_operand(insn, &mut op);
        let flat = self.code_bits == 64 && op.address_bits == 64;
        let hot = interp::arith::lower(insn, &mut op, flat)
            .or_else(|| interp::mov::lower(insn, &mut op, flat))
            .or_else(|| interp::branch::lower(insn, &mut op))
            .or_else(|| interp::shift::lower(insn, &mut op, flat))
            .or_else(|| interp::bits::lower(insn, &mut op))
            .or_else(|| interp::muldiv::lower(insn, &mut op))
            .or_else(|| interp::stack::lower(insn, &mut op))
            .or_else(|| interp::string::lower(insn, &mut op))
            .or_else(|| interp::vector::lower(insn, &mut op, flat));
        if let Some(handler) = hot {
            op.handler = handler;
            return (op, ends_block(insn));
        }
        let Some((handler, data, ends)) = interp::lower_cold(insn) else {
            log::debug!("no handler for {insn} ({:?})", insn.code());
            return (op, true);
        };
        op.handler = interp::vmx::shortcut(insn, &mut op).unwrap_or(cold);
        op.imm = self.blocks.add_cold(Cold { insn: *insn, handler, data });
        (op, ends)
    }
}

/// Whether `start` can be the start of an instruction: one whose opcode is undefined whatever follows is #UD at once,
/// and its next byte is not fetched. (The decoder asks for a ModRM byte first.)
fn can_continue(bits: u32, start: &[u8]) -> bool {
    // A VEX or EVEX prefix: which opcodes are defined depends on more than the next byte.
    if start.iter().any(|byte| matches!(byte, 0xc4 | 0xc5 | 0x62)) {
        return true;
    }
    let mut bytes = [0; MAX_LENGTH];
    let len = start.len().min(MAX_LENGTH - 1);
    bytes[..len].copy_from_slice(&start[..len]);
    (0..=255).any(|next| {
        bytes[len] = next;
        !Decoder::new(bits, &bytes, DecoderOptions::NONE).decode().is_invalid()
    })
}

/// Whether these bytes, which are no instruction, would be one but for its length. The decoder does not tell that
/// from an undefined opcode; but only redundant prefixes make an instruction too long, so one is tried without them.
fn is_too_long(bits: u32, bytes: &[u8]) -> bool {
    const PREFIXES: [u8; 11] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
    if bytes.len() < MAX_LENGTH {
        return false;
    }
    let mut window = [0; 2 * MAX_LENGTH];
    window[..MAX_LENGTH].copy_from_slice(&bytes[..MAX_LENGTH]);
    let rex = |byte: &u8| bits == 64 && byte & 0xf0 == 0x40;
    let prefixes = bytes[..MAX_LENGTH].iter().take_while(|b| PREFIXES.contains(b) || rex(b)).count();
    let total = (1..=prefixes).find_map(|skip| {
        let insn = Decoder::new(bits, &window[skip..skip + MAX_LENGTH], DecoderOptions::NONE).decode();
        (!insn.is_invalid()).then(|| insn.len() + skip)
    });
    total.is_some_and(|total| total > MAX_LENGTH)
}

/// Bytes from `address` to the end of its grain, which is in the same page.
fn grain_left(address: u64) -> usize {
    GRAIN - (address as usize & (GRAIN - 1))
}

/// Fills in the memory operand's parts.
fn memory_operand(insn: &Instruction, op: &mut Op) {
    if !(0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) {
        return;
    }
    op.seg = memory_segment(insn) as u8;
    op.address_bits = address_bits(insn) as u8;
    if insn.is_ip_rel_memory_operand() {
        // iced added the instruction's address, which is its offset in the block.
        op.base = SLOT_BLOCK_IP;
        op.disp = insn.memory_displacement64() as i32;
        return;
    }
    op.disp = insn.memory_displacement64() as i32;
    if let Some((base, _)) = offset_of(insn.memory_base()) {
        op.base = base;
    }
    if let Some((index, _)) = offset_of(insn.memory_index()) {
        op.index = index;
        op.scale = insn.memory_index_scale().trailing_zeros() as u8;
    }
}

/// A near branch, or anything else after which the next instruction is not simply the following one.
fn ends_block(insn: &Instruction) -> bool {
    insn.flow_control() != FlowControl::Next
}

/// Instructions that look at the clock or at devices: alone in a block, so that the instruction count is exact.
fn starts_block(insn: &Instruction) -> bool {
    use iced_x86::Mnemonic::*;
    matches!(
        insn.mnemonic(),
        Rdtsc | Rdtscp | Rdmsr | Wrmsr | In | Out | Insb | Insw | Insd | Outsb | Outsw | Outsd
    )
}

/// Executes an instruction from its cold part.
pub(crate) fn cold(cpu: &mut Cpu, op: &Op) -> Exec {
    let part = cpu.blocks.cold(op.imm);
    // SAFETY: the index was handed out by `add_cold` for this op; cold parts are dropped only together with all ops
    // and only between blocks.
    let part = unsafe { &*part };
    (part.handler)(cpu, part)
}

fn undefined(cpu: &mut Cpu, _: &Op) -> Exec {
    Err(cpu.raise(Fault::ud()))
}

fn general_protection(cpu: &mut Cpu, _: &Op) -> Exec {
    Err(cpu.raise(Fault::with_code(vector::GP, 0)))
}

/// A cold handler, its data, and whether it ends its block.
pub(crate) type ColdLowering = (ColdHandler, u64, bool);
