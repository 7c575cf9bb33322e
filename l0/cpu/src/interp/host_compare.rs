//! For tests: a vCPU to execute single instructions on, and the comparison of its whole state with the host's after
//! the same instruction (see [`crate::native::oracle`]).

use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, Instruction};
use x86defs::{cr0, cr4, efer, rflags, segment, xcr0};

use crate::Cpu;
use crate::attention::Attention;
use crate::bus::{Bus, MsrRefused};
use crate::interp;
use crate::native::FeatureSet;
use crate::native::oracle::{Machine, available};
use crate::op::Op;
use crate::phys::{PhysMemory, RamRange};
use crate::state::{Seg, Segment, X87State, reg};
use crate::trap::{Exec, Trap};

struct NoBus;

impl Bus for NoBus {
    fn mmio_read(&mut self, _address: u64, _data: &mut [u8]) {}
    fn mmio_write(&mut self, _address: u64, _data: &[u8]) {}
    fn port_read(&mut self, _port: u16, _data: &mut [u8]) {}
    fn port_write(&mut self, _port: u16, _data: &[u8]) {}
    fn read_msr(&mut self, _msr: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn write_msr(&mut self, _msr: u32, _value: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _value: u8) {}
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn tsc(&mut self, instructions: u64) -> u64 {
        instructions
    }
}

const RAM: usize = 1 << 16;
/// Where tests put memory operands.
pub(crate) const OPERAND: u64 = 0x3000;
/// Bytes of memory that are compared.
pub(crate) const MEMORY: usize = 128;
const PAGE_TABLES: u64 = 0x8000;

/// A vCPU in 64-bit mode with 64 KiB of RAM mapped one to one by 4-KiB pages, all features enabled.
pub(crate) fn cpu() -> Cpu {
    #[repr(align(4096))]
    struct Ram([u8; RAM]);
    let ram = Box::leak(Box::new(Ram([0; RAM])));
    let range = RamRange { start: 0, len: RAM as u64, host: ram.0.as_mut_ptr() };
    // SAFETY: the memory is leaked and used as guest memory only.
    let memory = Arc::new(unsafe { PhysMemory::new(vec![range], Box::new(())) });
    let mut tables = vec![(PAGE_TABLES, 0x9003_u64), (0x9000, 0xa003), (0xa000, 0xb003)];
    tables.extend((0..16).map(|page| (0xb000 + page * 8, page << 12 | 3)));
    for (at, entry) in tables {
        memory.write(at, &entry.to_le_bytes());
    }
    let mut cpu = Cpu::new(memory, Box::new(NoBus), Arc::default(), Arc::new(Attention::default()), 0);
    let state = &mut cpu.state;
    state.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::MP | cr0::ET | cr0::WP;
    state.cr3 = PAGE_TABLES;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    state.efer = efer::LME | efer::LMA;
    state.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::PKRU;
    *state.seg_mut(Seg::Cs) = Segment { base: 0, limit: !0, access: 0x9b | segment::L, selector: 8 };
    state.x87 = X87State::default();
    state.rip = 0x1000;
    cpu.state_changed();
    cpu
}

/// Removes a page from the tables of [`cpu`].
pub(crate) fn unmap(cpu: &mut Cpu, address: u64) {
    cpu.memory.write(0xb000 + (address >> 12) * 8, &[0; 8]);
    cpu.state_changed();
}

pub(crate) fn read<const N: usize>(cpu: &Cpu, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    cpu.memory.read(address, &mut bytes);
    bytes
}

/// xorshift64*: repeatable and good enough to pick operands.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Eight bytes that are now and then interesting numbers of some type.
    pub(crate) fn word(&mut self) -> u64 {
        let [single, other] = [0, 0].map(|_: u8| {
            const SINGLES: [u32; 8] =
                [0, 0x8000_0000, 0x3f80_0000, 0x7f80_0000, 0x7fc0_0001, 0x7f80_0001, 1, 0x7f7f_ffff];
            u64::from(SINGLES[(self.next() >> 40) as usize & 7])
        });
        match self.next() >> 60 {
            0 => 0x3ff0_0000_0000_0000,
            1 => self.next() >> 48,
            2 => (self.next() as i64 >> 50) as u64,
            3 => [0, 1 << 63, 0x7ff0_0000_0000_0000, 0x7ff0_0000_0000_0001, 1, 0x7fef_ffff_ffff_ffff]
                [(self.next() % 6) as usize],
            4..=6 => single << 32 | other,
            7..=8 => {
                // Singles of moderate size.
                let pick = |r: u64| r & 0x8fff_ffff | 0x3000_0000;
                pick(self.next() >> 32) << 32 | pick(self.next() >> 32)
            }
            9..=10 => self.next() & 0x801f_ffff_ffff_ffff | (0x3f0 + (self.next() >> 59)) << 52,
            _ => self.next(),
        }
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.word().to_le_bytes()[..chunk.len()]);
        }
    }
}

pub(crate) fn decode(code: &[u8]) -> Instruction {
    Decoder::new(64, code, DecoderOptions::NONE).decode()
}

/// Executes an instruction as the run loop would: decoded with its own address as the block's start.
pub(crate) fn execute(cpu: &mut Cpu, insn: Instruction) -> Exec {
    let (op, _) = cpu.lower(&insn, false);
    (op.handler)(cpu, &op)
}

/// One of these families executes it.
fn is_executed(insn: &Instruction) -> bool {
    interp::vector::lower(insn, &mut Op::new(|_, _| Ok(())), true).is_some()
        || interp::vector::lower_cold(insn).is_some()
        || interp::x87::lower(insn).is_some()
}

/// Sets both machines to the same random state.
pub(crate) fn randomise(
    cpu: &mut Cpu,
    machine: &mut Machine,
    memory: &mut [u8; MEMORY],
    random: &mut Random,
) {
    for ymm in &mut cpu.state.vector.ymm {
        random.fill(ymm);
    }
    // Rounding mode, DAZ and FTZ at random; everything masked; sticky flags at random.
    cpu.state.vector.mxcsr = random.next() as u32 & 0xe07f | 0x1f80;
    random.fill(memory);
    for (i, number) in [reg::RAX, reg::RCX, reg::RDX, reg::RBX].into_iter().enumerate() {
        let value = random.word();
        machine.gpr[i] = value;
        cpu.state.gpr.set(number, value);
    }
    let status = random.next() & rflags::STATUS;
    machine.rflags = status | 2;
    cpu.state.set_status(status);
    randomise_x87(cpu, random);
    machine.vector = cpu.state.vector;
    machine.x87 = cpu.state.x87;
}

fn randomise_x87(cpu: &mut Cpu, random: &mut Random) {
    let x87 = &mut cpu.state.x87;
    for st in &mut x87.st {
        let exponent = match random.next() >> 61 {
            0 => 0x7fff,
            1 => 0,
            2 => random.next() as u16,
            _ => 0x3fff - 20 + (random.next() >> 58) as u16,
        };
        let sign = (random.next() >> 48) as u16 & 0x8000;
        let fraction = match random.next() >> 62 {
            0 => 1 << 63,
            1 => random.next(),
            _ => random.next() | 1 << 63,
        };
        st[..8].copy_from_slice(&fraction.to_le_bytes());
        st[8..10].copy_from_slice(&(exponent | sign).to_le_bytes());
    }
    x87.fsw = random.next() as u16 & 0x7f7f;
    x87.ftw = if random.next() >> 62 == 0 { random.next() as u8 } else { 0xff };
    x87.set_control(random.next() as u16 | if random.next() >> 63 == 0 { 0x3f } else { 0 });
    // A pending exception stops most instructions: that is tested apart.
    let pending = x87.fsw & !x87.fcw & 0x3f;
    x87.fsw &= !pending;
    x87.update_summary();
}

/// Runs every instruction of a table `count` times on both.
pub(crate) fn compare(table: &[(&'static str, &'static [u8])], count: u32) {
    if !available() {
        println!("SKIP: the native oracle needs AVX2");
        return;
    }
    let mut cpu = cpu();
    let mut machine = Machine::new();
    let mut random = Random(0x1234_5678_9abc_def1);
    for &(text, code) in table {
        let insn = decode(code);
        let needs =
            FeatureSet::of(insn.cpuid_features()).unwrap_or_else(|| panic!("{text}: unknown feature"));
        if !FeatureSet::host().contains(needs) {
            println!("SKIP: the host has no {needs:?} for {text}");
            continue;
        }
        for round in 0..count {
            let mut memory = [0; MEMORY];
            randomise(&mut cpu, &mut machine, &mut memory, &mut random);
            compare_one(&mut cpu, &mut machine, memory, (text, code), insn, round);
        }
    }
}

pub(crate) fn compare_one(
    cpu: &mut Cpu,
    machine: &mut Machine,
    memory: [u8; MEMORY],
    (text, code): (&str, &'static [u8]),
    insn: Instruction,
    round: u32,
) {
    let before = machine.clone();
    let mut operand = [0; 256];
    let at = 64 - (operand.as_ptr() as usize & 31);
    operand[at..at + MEMORY].copy_from_slice(&memory);
    // SAFETY: the tables hold instructions on the registers and on up to 128 bytes at R8, and the host has them.
    unsafe { machine.execute(code.as_ptr(), &mut operand) };
    cpu.memory.write(OPERAND, &memory);
    cpu.state.gpr.set(8, OPERAND);
    let done = execute(cpu, insn);
    let context = format!("{text}, round {round}, mxcsr {:#x}", before.vector.mxcsr);
    assert_eq!(done, Ok(()), "{context}: {:?}", cpu.fault);
    for i in 0..16 {
        let (ours, theirs) = (cpu.state.vector.ymm[i], machine.vector.ymm[i]);
        assert_eq!(ours, theirs, "{context}: ymm{i}, before {:x?}", before.vector.ymm[i]);
    }
    assert_eq!(cpu.state.vector.mxcsr, machine.vector.mxcsr, "{context}: mxcsr");
    for (i, number) in [reg::RAX, reg::RCX, reg::RDX, reg::RBX].into_iter().enumerate() {
        assert_eq!(cpu.state.gpr.get(number), machine.gpr[i], "{context}: general register {number}");
    }
    let status = (cpu.state.rflags() & rflags::STATUS, machine.rflags & rflags::STATUS);
    assert_eq!(status.0, status.1, "{context}: flags");
    assert_eq!(read::<MEMORY>(cpu, OPERAND), operand[at..at + MEMORY], "{context}: memory");
    let words = |x: &X87State| (x.fcw, x.fsw, x.ftw);
    assert_eq!(words(&cpu.state.x87), words(&machine.x87), "{context}: x87 control, status, tags");
    for i in 0..8 {
        assert_eq!(cpu.state.x87.st[i][..10], machine.x87.st[i][..10], "{context}: st{i}");
    }
}

/// Executes an instruction: vector and error code of the exception it raised, if any.
pub(crate) fn raised(cpu: &mut Cpu, insn: Instruction) -> Option<(u8, Option<u32>)> {
    match execute(cpu, insn) {
        Ok(()) => None,
        Err(Trap::Fault) => Some((cpu.fault.vector, cpu.fault.error_code)),
        Err(other) => panic!("{other:?}"),
    }
}

/// An encoding drawn at random: legacy, VEX or x87, with whatever prefixes, opcodes and registers come.
fn random_code(random: &mut Random) -> [u8; 15] {
    let mut code = [0; 15];
    for byte in &mut code {
        *byte = (random.next() >> 32) as u8;
    }
    let pick = random.next();
    let map = [0x0f, 0x38, 0x3a][(pick >> 20) as usize % 3];
    let mut at = 0;
    let mut put = |byte: u8| {
        code[at] = byte;
        at += 1;
    };
    match pick >> 61 {
        0 => put(0xd8 | (pick & 7) as u8),
        1..=4 => {
            let prefix = [0, 0x66, 0xf2, 0xf3][(pick >> 8) as usize & 3];
            if prefix != 0 {
                put(prefix);
            }
            if pick & 1 << 16 != 0 {
                put(0x40 | (pick >> 12 & 15) as u8);
            }
            put(0x0f);
            if map != 0x0f {
                put(map);
            }
        }
        _ => {
            put(0xc4);
            put((pick & 0xe0) as u8 | [1, 2, 3][(pick >> 20) as usize % 3]);
            // Half of the instructions want no third register.
            let third = (pick >> 40) as u8;
            put(if pick & 1 << 50 == 0 { third } else { third | 0x78 });
        }
    }
    code
}

/// Makes an instruction one that both sides can execute: memory at [R8], general registers that both have.
fn tame(mut insn: Instruction, random: &mut Random) -> Option<Instruction> {
    use iced_x86::{Mnemonic as M, OpKind, Register as R};
    // Compared apart: their memory operand is not one piece, or holds control words that stop the host.
    let apart = matches!(
        insn.mnemonic(),
        M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Maskmovq
            | M::Ldmxcsr
            | M::Vldmxcsr
            | M::Fldenv
            | M::Frstor
            | M::Fnsave
            | M::Fnstenv
            | M::Wait
    );
    if apart || insn.is_vsib() {
        return None;
    }
    insn.set_segment_prefix(R::None);
    for index in 0..insn.op_count() {
        match insn.op_kind(index) {
            OpKind::Memory => {
                insn.set_memory_base(R::R8);
                insn.set_memory_index(R::None);
                insn.set_memory_displacement64(0);
                insn.set_memory_displ_size(0);
            }
            OpKind::Register if insn.op_register(index).is_gpr() && insn.mnemonic() != M::Fnstsw => {
                let register = match insn.op_register(index).size() {
                    8 => R::RAX,
                    4 => R::EAX,
                    2 => R::AX,
                    _ => return None,
                };
                insn.set_op_register(index, register + (random.next() >> 62) as u32);
            }
            _ => {}
        }
    }
    Some(insn)
}

/// Executes random encodings of these families, as many as come out of `draws`, on both sides.
pub(crate) fn compare_random(seed: u64, draws: u32) {
    if !available() {
        println!("SKIP: the native oracle needs AVX2");
        return;
    }
    let mut cpu = cpu();
    let mut machine = Machine::new();
    let mut random = Random(seed);
    let mut native = crate::native::oracle::Code::new();
    let mut seen = std::collections::HashSet::new();
    for round in 0..draws {
        if round % 4096 == 0 {
            cpu.forget_code();
        }
        let insn = decode(&random_code(&mut random));
        let Some(needs) = FeatureSet::of(insn.cpuid_features()) else { continue };
        if insn.is_invalid()
            || !cpu.model.allows(&insn)
            || !is_executed(&insn)
            || !FeatureSet::host().contains(needs)
        {
            continue;
        }
        let Some(insn) = tame(insn, &mut random) else { continue };
        let code = native.put(&insn);
        let mut memory = [0; MEMORY];
        randomise(&mut cpu, &mut machine, &mut memory, &mut random);
        let text = format!("{:?} {code:02x?}", insn.code());
        compare_one(&mut cpu, &mut machine, memory, (&text, code), decode(code), round);
        seen.insert(insn.code());
    }
    println!("{} different instructions compared", seen.len());
    // There are about 1250 on a host with AVX2.
    assert!(seen.len() > 1000, "only {} instructions compared", seen.len());
}
