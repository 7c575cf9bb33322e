//! Between Rust and translated code: how it is entered and left, and how it calls the interpreter's handlers.
//!
//! Unsafe island: the calls into code memory and back.

use std::mem::offset_of;

use x86defs::vector;

use super::JumpEntry;
use super::emit::{
    Alu, Assembler, B4, B8, EQUAL, Fixup, Mem, NOT_EQUAL, R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP,
    RBX, RCX, RDI, RDX, RSI, RSP, Reg,
};
use super::lower::table;
use crate::Cpu;
use crate::mmu::tlb::{DATA_ENTRIES, DataTable, FETCH_ENTRIES, FetchEntry, SECOND_MASK, SECOND_SHIFT};
use crate::op::Op;
use crate::profile::Doing;
use crate::state::SLOT_BLOCK_IP;
use crate::trap::Trap;

/// Where each guest register is while translated code runs: in a host register, or in the register file.
pub(super) const PINNED: [Option<Reg>; 16] = [
    Some(R9),
    Some(R10),
    Some(R11),
    Some(RBX),
    Some(R14),
    Some(R15),
    Some(RSI),
    Some(RDI),
    Some(R8),
    None,
    None,
    None,
    Some(R12),
    Some(R13),
    None,
    None,
];

/// RBP points this far into the CPU: general registers, status flags and what of [`Hot`] is used most are within a byte's
/// displacement.
const BIAS: usize = offset_of!(Cpu, state.gpr);
const _: () = assert!(BIAS - offset_of!(Cpu, jit.left) <= 112);

/// A field of the CPU as an operand of translated code.
pub(super) fn field(offset: usize) -> Mem {
    Mem::at(RBP, offset as i32 - BIAS as i32)
}

/// A guest register's place in the register file.
pub(super) fn slot(guest: usize) -> Mem {
    field(offset_of!(Cpu, state.gpr) + guest * 8)
}

/// Translated code returned with RIP and counts up to date: look up, find the next block.
pub(super) const LOOK: u64 = 1;
/// Added to a [`Trap`]: the instruction at RIP trapped.
const TRAP: u64 = 0x100;
/// The same as [`LOOK`], and the jump whose displacement is at the offset in the upper half may be linked.
const LINK: u64 = 2;
/// The same for a jump forwards in the page (JIT-5).
const LINK_FORWARD: u64 = 3;
/// From a handler: go on at RIP, without a look.
const GO: u64 = 4;

/// Why translated code returned.
pub(super) enum Left {
    Look,
    Link { site: usize, forward: bool },
    Trap(Trap),
}

impl Left {
    fn of(code: u64) -> Self {
        const FAULT: u64 = TRAP | Trap::Fault as u64;
        const AGAIN: u64 = TRAP | Trap::Again as u64;
        const EXIT: u64 = TRAP | Trap::Exit as u64;
        match code & 0xffff_ffff {
            FAULT => Self::Trap(Trap::Fault),
            AGAIN => Self::Trap(Trap::Again),
            EXIT => Self::Trap(Trap::Exit),
            link @ (LINK | LINK_FORWARD) => {
                Self::Link { site: (code >> 32) as usize, forward: link == LINK_FORWARD }
            }
            _ => Self::Look,
        }
    }
}

/// The block that an op is in, as translated code tells [`call_op`]: its offset in its page and its length.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub offset: u16,
    pub len: u16,
}

impl Place {
    pub(super) fn pack(self) -> u32 {
        u32::from(self.offset) | u32::from(self.len) << 12
    }

    fn unpack(word: u32) -> Self {
        Self { offset: (word & 0xfff) as u16, len: (word >> 12) as u16 }
    }
}

/// Addresses of the code that all translations share.
#[derive(Clone, Copy, Default)]
pub(super) struct Gate {
    enter: u64,
    /// Leaves translated code with RAX.
    pub exit: u64,
    /// Executes the op EAX by its handler; EDX a [`Place`], ECX the instructions of the trace from it on. Returns RAX:
    /// zero, or what to exit with.
    pub call_op: u64,
    /// Executes the only op of a block that crosses into the next page: EDX its [`Place`].
    pub call_crossing: u64,
    /// Leaves with [`LOOK`] for the address in RAX.
    pub look_at: u64,
    /// Gets vector state into the host's registers: see [`super::vector::emit`].
    pub get_vector: u64,
    /// Look in a data translation's second place: RDX the address, RCX the page of the last byte, with what of its low bits
    /// must be clear. ZF if it is there, with its addend in RAX. Clobber RCX.
    pub second_read: u64,
    pub second_write: u64,
    /// What the host's processor has.
    pub host: Host,
}

/// What translated code may use beyond what every host has.
#[derive(Clone, Copy, Default)]
pub(super) struct Host {
    /// PEXT, of BMI2, is fast: looking up an address can leave the flags alone.
    pub pext: bool,
    /// FSGSBASE: GS points to the TLB's table of data translations while translated code runs. Nothing else in this
    /// process uses GS.
    pub gs: bool,
}

impl Host {
    fn detect() -> Self {
        const HWCAP2_FSGSBASE: u64 = 2;
        // SAFETY: reads the auxiliary vector.
        let gs = unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE != 0;
        Self { pext: gs && std::is_x86_feature_detected!("bmi2") && !has_slow_pext(), gs }
    }
}

/// AMD's processors before Zen 3 (family 19H) take a microcode loop for it.
fn has_slow_pext() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    let signature = std::arch::x86_64::__cpuid(1).eax;
    let family = (signature >> 8 & 15) + (signature >> 20 & 255);
    vendor.ebx == u32::from_le_bytes(*b"Auth") && family < 0x19
}

/// GS to the current table of data translations, after it may have changed. Clobbers RCX.
fn point_gs(asm: &mut Assembler) {
    asm.load(B8, RCX, field(offset_of!(Cpu, data_table)));
    asm.write_gs_base(RCX);
    asm.store(B8, field(offset_of!(Cpu, jit.gs)), RCX);
}

impl Gate {
    /// What to exit with to have the jump whose displacement is at `site` linked.
    pub(super) fn link_code(&self, site: u64, forward: bool) -> u64 {
        let link = if forward { LINK_FORWARD } else { LINK };
        link | site.wrapping_sub(self.enter) << 32
    }
}

fn save_pinned(asm: &mut Assembler) {
    for (guest, host) in PINNED.iter().enumerate() {
        if let Some(host) = *host {
            asm.store(B8, slot(guest), host);
        }
    }
}

fn load_pinned(asm: &mut Assembler) {
    for (guest, host) in PINNED.iter().enumerate() {
        if let Some(host) = *host {
            asm.load(B8, host, slot(guest));
        }
    }
}

/// Writes the shared code at the start of `asm`.
pub(super) fn emit(asm: &mut Assembler) -> Gate {
    const SAVED: [Reg; 6] = [RBX, RBP, R12, R13, R14, R15];
    let enter = asm.address(asm.here());
    SAVED.iter().for_each(|&r| asm.push(r));
    // Six registers and the return address: eight more bytes align the stack for calls.
    asm.alu_imm(B8, Alu::Sub, RSP, 8);
    asm.mov(B8, RBP, RDI);
    asm.mov(B8, RAX, RSI);
    let host = Host::detect();
    if host.gs {
        point_gs(asm);
    }
    load_pinned(asm);
    asm.jump_register(RAX);

    let vectors = super::vector::emit(asm);

    let exit = asm.address(asm.here());
    save_pinned(asm);
    super::vector::emit_put_back(asm, &vectors);
    asm.alu_imm(B8, Alu::Add, RSP, 8);
    SAVED.iter().rev().for_each(|&r| asm.pop(r));
    asm.bytes(&[0xc3]);

    let look_at = asm.address(asm.here());
    asm.store(B8, field(offset_of!(Cpu, state.rip)), RAX);
    asm.set(RAX, LOOK);
    asm.jump_to(exit);

    let call_op = emit_call(asm, &vectors, host, call_op as *const () as u64, exit);
    let call_crossing = emit_call(asm, &vectors, host, call_crossing as *const () as u64, exit);
    let second_read = emit_second(asm, host, offset_of!(DataTable, read));
    let second_write = emit_second(asm, host, offset_of!(DataTable, write));
    let get_vector = vectors.get;
    Gate { enter, exit, call_op, call_crossing, look_at, get_vector, second_read, second_write, host }
}

/// Writes [`Gate::second_read`] or, with the other array of tags, [`Gate::second_write`].
fn emit_second(asm: &mut Assembler, host: Host, tags: usize) -> u64 {
    let start = asm.address(asm.here());
    // As `second_index`; the first is shr rax, SECOND_SHIFT.
    asm.mov(B8, RAX, RDX);
    asm.bytes(&[0x48, 0xc1, 0xe8, SECOND_SHIFT]);
    asm.alu_imm(B4, Alu::And, RAX, SECOND_MASK as u32 as i32);
    asm.alu(B4, Alu::Xor, RAX, RDX);
    asm.shr32(RAX, 12);
    asm.alu_imm(B4, Alu::And, RAX, DATA_ENTRIES as i32 - 1);
    let behind = DATA_ENTRIES * 8;
    let (tag, addend) = (table(RAX, tags + behind), table(RAX, offset_of!(DataTable, addend) + behind));
    if host.pext {
        asm.add_gs(RCX, tag);
        asm.load_gs(RAX, addend);
    } else {
        asm.shl32(RAX, 3);
        asm.alu_load(B8, Alu::Add, RAX, field(offset_of!(Cpu, data_table)));
        asm.alu_load(B8, Alu::Add, RCX, Mem::at(RAX, tag.disp));
        asm.load(B8, RAX, Mem::at(RAX, addend.disp));
    }
    asm.bytes(&[0xc3]);
    start
}

/// Writes the way to a Rust function of an op, a place and a number of instructions, and back.
fn emit_call(asm: &mut Assembler, vectors: &super::vector::Vectors, host: Host, to: u64, exit: u64) -> u64 {
    let call = asm.address(asm.here());
    save_pinned(asm);
    super::vector::emit_put_back(asm, vectors);
    asm.alu_imm(B8, Alu::Sub, RSP, 8);
    asm.lea(B8, RDI, Mem::at(RBP, -(BIAS as i32)));
    asm.mov(B4, RSI, RAX);
    asm.set(RAX, to);
    asm.call_register(RAX);
    asm.alu_imm(B8, Alu::Add, RSP, 8);
    load_pinned(asm);
    if host.gs {
        asm.load(B8, RCX, field(offset_of!(Cpu, data_table)));
        asm.alu_load(B8, Alu::Cmp, RCX, field(offset_of!(Cpu, jit.gs)));
        let same = asm.jcc(EQUAL);
        point_gs(asm);
        asm.bind(same);
    }
    asm.alu_imm(B4, Alu::Cmp, RAX, GO as i32);
    let go = asm.jcc(EQUAL);
    asm.test32(RAX, RAX);
    asm.bytes(&[0xc3]);

    asm.bind(go);
    // The caller is done with.
    asm.alu_imm(B8, Alu::Add, RSP, 8);
    asm.load(B8, RAX, field(offset_of!(Cpu, state.rip)));
    let misses = emit_lookup(asm);
    emit_follow(asm);
    misses.into_iter().for_each(|miss| asm.bind(miss));
    asm.set(RAX, LOOK);
    asm.jump_to(exit);
    call
}

/// Looks up RAX in the jump cache: on a hit RCX points to the entry; returns the jumps to take on a miss.
pub(super) fn emit_lookup(asm: &mut Assembler) -> [Fixup; 2] {
    asm.mov(B4, RCX, RAX);
    asm.shr32(RCX, 12);
    asm.alu(B4, Alu::Xor, RCX, RAX);
    asm.alu_imm(B4, Alu::And, RCX, super::JUMPS as i32 - 1);
    asm.shl32(RCX, size_of::<JumpEntry>().trailing_zeros() as u8);
    asm.alu_load(B8, Alu::Add, RCX, field(offset_of!(Cpu, jit.jumps)));
    asm.alu_load(B8, Alu::Cmp, RAX, Mem::at(RCX, offset_of!(JumpEntry, rip) as i32));
    let other_rip = asm.jcc(NOT_EQUAL);
    asm.mov(B4, RDX, RAX);
    asm.shr32(RDX, 12);
    asm.alu_imm(B4, Alu::And, RDX, FETCH_ENTRIES as i32 - 1);
    asm.shl32(RDX, size_of::<FetchEntry>().trailing_zeros() as u8);
    asm.alu_load(B8, Alu::Add, RDX, field(offset_of!(Cpu, jit.fetch)));
    asm.load(B8, RDX, Mem::at(RDX, offset_of!(FetchEntry, key) as i32));
    asm.alu_load(B8, Alu::Cmp, RDX, Mem::at(RCX, offset_of!(JumpEntry, key) as i32));
    [other_rip, asm.jcc(NOT_EQUAL)]
}

/// Goes where the entry at RCX says; RAX is the address that was looked up.
pub(super) fn emit_follow(asm: &mut Assembler) {
    asm.alu_imm(B8, Alu::And, RAX, -4096);
    asm.store(B8, field(offset_of!(Cpu, jit.page_ip)), RAX);
    asm.jump_memory(Mem::at(RCX, offset_of!(JumpEntry, code) as i32));
}

/// Executes translated code from `entry` on.
///
/// # Safety
/// `entry` must be a translation in the code memory that `gate` is in, none of whose ops are gone from the arena.
pub(super) unsafe fn enter(cpu: &mut Cpu, gate: Gate, entry: u64) -> Left {
    type Enter = unsafe extern "sysv64" fn(*mut u8, u64) -> u64;
    // SAFETY: `emit` wrote a function of this type at `enter`.
    let function = unsafe { std::mem::transmute::<*const (), Enter>(gate.enter as *const ()) };
    let cpu = std::ptr::from_mut(cpu).cast::<u8>();
    // SAFETY: RBP gets an address inside the CPU; translated code reads and writes its fields, and calls back with
    // the CPU's address, which is derived from our exclusive reference.
    Left::of(unsafe { function(cpu.add(BIAS), entry) })
}

/// Executes the op at `index` of the arena by its handler; see [`Gate::call_op`].
extern "sysv64" fn call_op(cpu: *mut Cpu, index: u32, place: u32, remaining: u32) -> u64 {
    // SAFETY: `enter` was given an exclusive reference, which translated code passes on.
    let cpu = unsafe { &mut *cpu };
    cpu.execute_op(index, Place::unpack(place), i64::from(remaining))
}

/// Executes an instruction that crosses into the next page; see [`Gate::call_crossing`].
extern "sysv64" fn call_crossing(cpu: *mut Cpu, _: u32, place: u32) -> u64 {
    // SAFETY: as in `call_op`.
    let cpu = unsafe { &mut *cpu };
    let mut place = Place::unpack(place);
    let base = cpu.jit.page_ip.wrapping_add(u64::from(place.offset));
    cpu.state.rip = base;
    cpu.state.instructions = cpu.jit.executed().wrapping_sub(1);
    // Whether the page behind is still the same one, and unchanged.
    match cpu.find_block() {
        Ok(block) if block.count == 1 => {
            place.len = block.len;
            cpu.execute_op(block.first, place, 1)
        }
        Ok(_) => {
            cpu.jit.left += 1;
            LOOK
        }
        Err(trap) => {
            cpu.jit.left += 1;
            TRAP | trap as u64
        }
    }
}

impl Cpu {
    /// Executes the op at `index` of the arena; `remaining` instructions of the trace, from this one on, were counted as
    /// executed. Returns zero, or what to exit with.
    fn execute_op(&mut self, index: u32, place: Place, remaining: i64) -> u64 {
        // SAFETY: the translation's ops are in the arena (JIT-2), which nobody writes while a block runs.
        let op: &Op = unsafe { &*self.blocks.ops().add(index as usize) };
        let base = self.jit.page_ip.wrapping_add(u64::from(place.offset));
        self.state.gpr.raw[(SLOT_BLOCK_IP / 8) as usize] = base;
        self.state.rip = base.wrapping_add(u64::from(place.len));
        self.state.instructions = self.jit.executed().wrapping_sub(remaining as u64);
        self.block_end = 1;
        self.begin_handler(index, base.wrapping_add(u64::from(op.at)));
        let result = (op.handler)(self, op);
        self.begin(Doing::Translated);
        if let Err(trap) = result {
            self.state.rip = base.wrapping_add(u64::from(op.at));
            self.jit.left += remaining;
            match trap {
                Trap::Fault if self.fault_is_on_stack(op) => self.fault.vector = vector::SS,
                Trap::Exit => self.vmx.exit.instruction_length = u32::from(op.next.wrapping_sub(op.at)),
                Trap::Fault | Trap::Again => {}
            }
            return TRAP | trap as u64;
        }
        if op.next == place.len {
            self.jit.left += remaining - 1;
            return self.go_or_look();
        }
        if self.block_end == 0 {
            self.state.rip = base.wrapping_add(u64::from(op.next));
            self.jit.left += remaining - 1;
            return LOOK;
        }
        if self.look_up || self.attention.get() != self.jit.seen {
            self.jit.expire();
        }
        self.jit.fetch = self.tlb.fetch_table(self.state.cpl == 3);
        0
    }

    /// Whether the run loop would have nothing to do but find the translation at RIP.
    fn go_or_look(&mut self) -> u64 {
        if self.look_up || self.attention.get() != 0 || self.code_bits != 64 {
            return LOOK;
        }
        self.jit.seen = 0;
        self.jit.fetch = self.tlb.fetch_table(self.state.cpl == 3);
        GO
    }
}
