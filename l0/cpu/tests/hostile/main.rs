//! Random bytes as code in random system states: whatever a guest does, the software CPU neither panics, nor hangs,
//! nor touches memory outside guest RAM (guard pages around it kill the test), with one vCPU or several.
//!
//! The oracle is our own survival, plus what must hold of the state afterwards. `TURTLES_FUZZ_CASES` sets how many
//! cases are tried, `TURTLES_FUZZ_SEED` where they begin.

#[path = "../guest/mod.rs"]
mod guest;
mod vmx;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use guest::{PAGE, vcpu};
use turtles_cpu::attention::Attention;
use turtles_cpu::phys::PhysMemory;
use turtles_cpu::state::{Activity, CpuState, Seg, Segment, Shadow};
use turtles_cpu::{Cpu, Exit};
use x86defs::{cr0, cr4, dr, efer, paging, rflags, segment, xcr0};

/// Low RAM, ending in the middle of a 2-MiB page, and a piece above 4 GiB.
const LOW: u64 = 0x2a_0000;
const HIGH: (u64, u64) = (0x1_0000_0000, 0x6000);
const RAM: [(u64, u64); 2] = [(0, LOW), HIGH];
const TICKS: u64 = 1500;

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Each of `bits` set or not.
    fn some_of(&mut self, bits: &[u64]) -> u64 {
        bits.iter().fold(0, |sum, bit| sum | if self.next() & 1 != 0 { *bit } else { 0 })
    }

    /// A number near something interesting.
    fn number(&mut self) -> u64 {
        let near = |random: &mut Self, at: u64| at.wrapping_add(random.below(33)).wrapping_sub(16);
        match self.below(10) {
            0 => self.next(),
            1 => self.below(64),
            2 => near(self, LOW),
            3 => near(self, HIGH.0 + HIGH.1),
            4 => near(self, 0),
            5 => near(self, 0x8000_0000_0000),
            6 => near(self, 1 << 32),
            7 => self.next() & 0xffff_ffff,
            _ => self.address(),
        }
    }

    /// An address in RAM, often near the end of a page.
    fn address(&mut self) -> u64 {
        let page = self.below(LOW / PAGE) * PAGE;
        page + if self.one_in(3) { PAGE - 1 - self.below(20) } else { self.below(PAGE) }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mode {
    Real,
    Protected16,
    Protected32,
    Virtual86,
    Compatibility,
    Long,
}

const MODES: [Mode; 6] =
    [Mode::Real, Mode::Protected16, Mode::Protected32, Mode::Virtual86, Mode::Compatibility, Mode::Long];

/// Page tables, descriptor tables and the TSS live in these pages.
const TABLES: u64 = 0x8000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TSS: u64 = 0x6000;

/// An entry of any paging structure: mostly a frame of RAM that is present.
fn entry(random: &mut Random, frame: u64, wide: bool) -> u64 {
    let flags = paging::PRESENT | paging::WRITE | paging::USER;
    if random.one_in(12) {
        return if wide { random.next() } else { random.next() & 0xffff_ffff };
    }
    let noise = random.some_of(&[paging::ACCESSED, paging::DIRTY, paging::GLOBAL]);
    let key = if wide && random.one_in(4) { random.below(16) << paging::PROTECTION_KEY_SHIFT } else { 0 };
    let nx = if wide && random.one_in(8) { paging::NX } else { 0 };
    let large = if random.one_in(16) { paging::LARGE } else { 0 };
    let drop =
        if random.one_in(8) { random.some_of(&[paging::PRESENT, paging::WRITE, paging::USER]) } else { 0 };
    (frame | flags | noise | key | nx | large) & !drop
}

/// Tables of whatever paging mode: five levels of random entries that mostly lead on to one another and then
/// to RAM, in the form of both entry widths.
fn write_paging(random: &mut Random, memory: &PhysMemory, wide: bool) {
    let levels = 5;
    for level in 0..levels {
        let at = TABLES + level * PAGE;
        let next = TABLES + (level + 1) * PAGE;
        let width = if wide { 8 } else { 4 };
        for i in 0..PAGE / width {
            let last = level == levels - 1 || !wide && level == 1 || random.one_in(24);
            let frame = if last { random.below(LOW / PAGE) * PAGE } else { next };
            // The first gigabytes one to one where it is the last level, so that things are where they seem.
            let frame = if last && !random.one_in(6) { (i * PAGE) % LOW } else { frame };
            let value = entry(random, frame, wide);
            memory.write(at + i * width, &value.to_le_bytes()[..width as usize]);
        }
    }
}

fn descriptor(random: &mut Random) -> u64 {
    if random.one_in(8) {
        return random.next();
    }
    let access = match random.below(6) {
        0 => 0x9b,
        1 => 0x93,
        2 => 0xfb,
        3 => 0xf3,
        4 => 0x80 | random.below(16),
        _ => random.below(256),
    };
    let flags = random.pick(&[0xc, 0x4, 0x0, 0xa, 0x2, 0x8]);
    let (base, limit) = match random.below(4) {
        0 => (random.number(), random.next() & 0xfffff),
        1 => (TSS, 0x67 + random.below(200)),
        _ => (0, 0xfffff),
    };
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

fn write_descriptors(random: &mut Random, memory: &PhysMemory) {
    for i in 0..64 {
        let value = descriptor(random);
        memory.write(GDT + i * 8, &value.to_le_bytes());
    }
    for i in 0..512 {
        let value = match random.below(4) {
            0 => random.next(),
            1 => descriptor(random),
            _ => {
                let (at, kind) = (random.address(), random.pick(&[0x8e, 0xee, 0x8f, 0xef, 0x86, 0x85, 0xe5]));
                (at & 0xffff) | random.below(32) << 19 | kind << 40 | (at >> 16 & 0xffff) << 48
            }
        };
        memory.write(IDT + i * 8, &value.to_le_bytes());
    }
    for i in 0..PAGE / 8 {
        let value = random.number();
        memory.write(TSS + i * 8, &value.to_le_bytes());
    }
}

fn write_code(random: &mut Random, memory: &PhysMemory, at: u64) {
    let mut bytes = [0; 256];
    for byte in &mut bytes {
        *byte = random.next() as u8;
    }
    // More of what is rare among random bytes: two-byte opcodes, prefixes, VEX, string and system instructions.
    for _ in 0..24 {
        let start: &[u8] = random.pick::<&[u8]>(&[
            &[0x0f],
            &[0x0f, 0x01],
            &[0x0f, 0x00],
            &[0x0f, 0xae],
            &[0x0f, 0xc7],
            &[0x66, 0x0f],
            &[0xf3, 0x0f],
            &[0xf2, 0x0f],
            &[0xf0, 0x48],
            &[0xf3, 0xa4],
            &[0xf3, 0xab],
            &[0xf2, 0xae],
            &[0xf3, 0x6c],
            &[0xc4],
            &[0xc5],
            &[0x0f, 0x38],
            &[0x0f, 0x3a],
            &[0x0f, 0x22],
            &[0x0f, 0x23],
            &[0xcf],
            &[0xcd],
            &[0x9d],
            &[0x8e],
            &[0xff],
            &[0xd9],
            &[0xdb],
            &[0xdd],
            &[0x67],
            &[0x0f, 0x78],
            &[0x0f, 0x79],
            &[0x0f, 0x01, 0xc1],
            &[0x0f, 0x01, 0xd4],
            &[0xf3, 0x0f, 0xc7],
            &[0x66, 0x0f, 0x38, 0x80],
            &[0x66, 0x0f, 0x38, 0x81],
            &[0xf3, 0x90],
        ]);
        let place = random.below((bytes.len() - start.len()) as u64) as usize;
        bytes[place..place + start.len()].copy_from_slice(start);
    }
    memory.write(at, &bytes);
}

fn random_segment(random: &mut Random, mode: Mode, cpl: u64) -> Segment {
    if matches!(mode, Mode::Real | Mode::Virtual86) {
        let selector = random.below(0x1_0000) as u16;
        let access = if mode == Mode::Virtual86 { 0xf3 } else { 0x93 };
        return Segment { access, ..Segment::real(selector) };
    }
    let flat =
        Segment { base: 0, limit: !0, access: 0x93 | segment::DB | segment::G, selector: 16 | cpl as u16 };
    let dpl = (cpl as u32) << segment::DPL_SHIFT;
    match random.below(8) {
        0 => Segment { access: segment::UNUSABLE, ..flat },
        1 => Segment { base: random.number() & 0xffff_ffff, access: flat.access | dpl, ..flat },
        2 => Segment { limit: random.number() as u32, access: flat.access & !segment::DB | dpl, ..flat },
        // Expand-down.
        3 => Segment { limit: random.number() as u32 & 0xffff, access: flat.access | 4 | dpl, ..flat },
        4 => Segment { access: 0x9b | segment::DB | segment::G | dpl, ..flat },
        _ => Segment { access: flat.access | dpl, ..flat },
    }
}

/// A state that a guest could have brought about.
fn random_state(random: &mut Random, state: &mut CpuState, mode: Mode, code: u64) {
    *state = CpuState::reset();
    let cpl = match mode {
        Mode::Real => 0,
        Mode::Virtual86 => 3,
        _ => random.pick(&[0, 0, 3]),
    };
    for i in 0..16 {
        state.gpr.set(i, random.number());
    }
    let long = matches!(mode, Mode::Long | Mode::Compatibility);
    let paged = long || mode != Mode::Real && random.one_in(2);
    let pae = long || random.one_in(2);
    state.cr0 = cr0::ET | random.some_of(&[cr0::WP, cr0::NE, cr0::MP, cr0::AM, cr0::TS, cr0::EM]);
    if mode != Mode::Real {
        state.cr0 |= cr0::PE;
    }
    if paged {
        state.cr0 |= cr0::PG;
    }
    state.cr4 = random.some_of(&[
        cr4::VME,
        cr4::PVI,
        cr4::DE,
        cr4::PSE,
        cr4::PGE,
        cr4::OSFXSR,
        cr4::OSXMMEXCPT,
        cr4::OSXSAVE,
        cr4::SMEP,
        cr4::SMAP,
        cr4::PKE,
        cr4::FSGSBASE,
        cr4::UMIP,
    ]);
    state.cr4 |= if pae { cr4::PAE } else { 0 };
    state.cr4 |= if long { random.some_of(&[cr4::PCIDE, cr4::LA57]) } else { 0 };
    state.efer = random.some_of(&[efer::SCE, efer::NXE]) | if long { efer::LME | efer::LMA } else { 0 };
    state.xcr0 = random.pick(&[xcr0::X87, xcr0::X87 | xcr0::SSE, xcr0::X87 | xcr0::SSE | xcr0::AVX]);
    state.cr3 = TABLES + random.below(3) * PAGE;
    if state.cr4 & cr4::PCIDE != 0 {
        state.cr3 |= random.below(16);
    }
    state.pdptes = [(TABLES + PAGE) | 1, (TABLES + 2 * PAGE) | 1, (TABLES + 3 * PAGE) | 1, 0];
    state.pkru = if random.one_in(2) { 0 } else { random.next() as u32 };
    for seg in [Seg::Es, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
        *state.seg_mut(seg) = random_segment(random, mode, cpl);
    }
    let kind = match mode {
        Mode::Real | Mode::Protected16 | Mode::Virtual86 => 0,
        Mode::Protected32 | Mode::Compatibility => segment::DB | segment::G,
        Mode::Long => segment::L | segment::G,
    };
    let dpl = (cpl as u32) << segment::DPL_SHIFT;
    let base = if mode == Mode::Long { 0 } else { code & !0xf };
    let limit = if matches!(mode, Mode::Real | Mode::Protected16 | Mode::Virtual86) { 0xffff } else { !0 };
    let selector = if mode == Mode::Virtual86 { (base >> 4) as u16 } else { 8 | cpl as u16 };
    let access = if mode == Mode::Virtual86 { 0xf3 } else { 0x9b | kind | dpl };
    *state.seg_mut(Seg::Cs) = Segment { base, limit, access, selector };
    state.rip = code.wrapping_sub(base);
    if mode == Mode::Long && random.one_in(4) {
        state.seg_mut(Seg::Fs).base = random.number();
        state.seg_mut(Seg::Gs).base = random.number();
    }
    let flags = random.next() & rflags::ALL & !(rflags::VM | rflags::TF | rflags::RF);
    let flags = if random.one_in(6) { flags | rflags::TF } else { flags };
    state
        .set_rflags(if mode == Mode::Virtual86 { flags | rflags::VM } else { flags } & !rflags_in_long(long));
    state.cpl = cpl as u8;
    state.gdtr.base = GDT;
    state.gdtr.limit = random.pick(&[0x1ff, 0x1ff, 0x1ff, 0x3f, 0, 0xffff]);
    state.idtr.base = if random.one_in(10) { random.number() } else { IDT };
    state.idtr.limit = random.pick(&[0xfff, 0xfff, 0xfff, 0x3ff, 0x20, 0, 0xffff]);
    state.tr = Segment { base: TSS, limit: 0x67 + random.below(0x2100) as u32, access: 0x8b, selector: 0x28 };
    state.ldtr = Segment { base: GDT + 0x100, limit: 0xff, access: 0x82, selector: 0x30 };
    if random.one_in(8) {
        state.dr7 = random.next() & 0xffff_23ff | dr::DR7_FIXED_1;
        for i in 0..4 {
            state.dr[i] = random.address();
        }
    }
    state.shadow = random.pick(&[Shadow::None, Shadow::None, Shadow::Sti, Shadow::MovSs]);
    state.nmi_blocked = random.one_in(2);
    state.msrs.lstar = random.address();
    state.msrs.cstar = random.address();
    state.msrs.star = random.next() & 0x0038_0038_ffff_ffff;
    state.msrs.fmask = random.next() & 0xffff_ffff;
    state.msrs.sysenter_cs = random.pick(&[0, 8, 0x10]);
    state.msrs.sysenter_eip = random.address();
    state.msrs.sysenter_esp = random.address();
    for byte in state.vector.ymm.iter_mut().flatten() {
        *byte = random.next() as u8;
    }
    for register in &mut state.x87.st {
        for byte in &mut register[..10] {
            *byte = random.next() as u8;
        }
    }
    state.x87.fcw = random.next() as u16 & 0x1f7f | 0x40;
    state.x87.fsw = random.next() as u16;
    state.x87.ftw = random.next() as u8;
    state.vector.mxcsr = random.next() as u32 & 0xffff;
}

/// VM does not exist in IA-32e mode.
fn rflags_in_long(long: bool) -> u64 {
    if long { rflags::VM } else { 0 }
}

/// What holds of every state a guest can reach.
fn check(state: &CpuState) {
    let protected = state.cr0 & cr0::PE != 0;
    assert!(protected || state.cpl == 0, "CPL {} in real mode", state.cpl);
    assert!(protected || state.cr0 & cr0::PG == 0, "paging without protection");
    assert!(!state.v86() || state.cpl == 3, "virtual-8086 mode at CPL {}", state.cpl);
    assert!(!(state.v86() && state.long_mode()), "virtual-8086 mode in IA-32e mode");
    assert_eq!(state.long_mode(), state.efer & efer::LME != 0 && state.cr0 & cr0::PG != 0);
    assert!(!state.long_mode() || state.cr4 & cr4::PAE != 0);
    assert_eq!(state.vector.mxcsr & !0xffff, 0);
    assert!(state.code_bits() == 64 || state.rip >> 32 == 0, "RIP {:#x}", state.rip);
}

fn cases(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let first = number("TURTLES_FUZZ_SEED").unwrap_or(0);
    first..first + number("TURTLES_FUZZ_CASES").unwrap_or(default)
}

/// Reloads memory and state for a case.
fn prepare(random: &mut Random, memory: &PhysMemory, cpu: &mut Cpu, mode: Mode) {
    let code = 0x1_0000 + random.below(0x8) * PAGE + random.pick(&[0, 16, 0xf80, 0xff8, 0xfff]);
    write_code(random, memory, code);
    // Where stray jumps lead.
    for _ in 0..4 {
        let at = random.address();
        write_code(random, memory, at);
    }
    random_state(random, &mut cpu.state, mode, code);
    write_paging(random, memory, cpu.state.cr4 & cr4::PAE != 0);
    write_descriptors(random, memory);
    cpu.state_changed();
}

/// Runs, and acts as the owner would.
fn go(random: &mut Random, cpu: &mut Cpu, attention: &Attention) {
    for _ in 0..4 {
        let before = cpu.state.ticks();
        let exit = cpu.run(TICKS);
        let used = cpu.state.ticks() - before;
        assert!(used <= TICKS, "{used} ticks of {TICKS}");
        check(&cpu.state);
        match exit {
            Exit::Shutdown | Exit::Attention => return,
            Exit::Budget => assert_eq!(used, TICKS),
            Exit::Halted | Exit::InterruptWindow => {}
            Exit::Vm => panic!("VMX is off"),
        }
        if random.one_in(2) {
            attention.raise(random.pick(&[Attention::NMI, Attention::INTERRUPT, Attention::FORGET_WRITES]));
        }
    }
}

fn report(seed: u64, mode: Mode, run: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
        eprintln!("TURTLES_FUZZ_SEED={seed} ({mode:?})");
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn random_code_in_random_states_is_survived() {
    let memory = guest::ram(&RAM);
    let (mut cpu, attention) = vcpu(&memory, 0);
    for seed in cases(3000) {
        let mut random = Random(seed.wrapping_mul(0x1234_5678_9abc_def1));
        let mode = MODES[(seed % MODES.len() as u64) as usize];
        attention.clear(!0);
        report(seed, mode, || {
            prepare(&mut random, &memory, &mut cpu, mode);
            go(&mut random, &mut cpu, &attention);
        });
    }
}

/// One instruction at a time: each uses exactly one tick, or the vCPU has stopped.
#[test]
fn random_code_is_survived_step_by_step() {
    let memory = guest::ram(&RAM);
    let (mut cpu, attention) = vcpu(&memory, 0);
    for seed in cases(600) {
        let mut random = Random(seed.wrapping_mul(0x9876_5432_1234_5671));
        let mode = MODES[(seed % MODES.len() as u64) as usize];
        attention.clear(!0);
        report(seed, mode, || {
            prepare(&mut random, &memory, &mut cpu, mode);
            for _ in 0..200 {
                let before = cpu.state.ticks();
                let exit = cpu.step();
                let used = cpu.state.ticks() - before;
                assert!(used == 1 || used == 0 && exit != Exit::Budget, "{used} ticks, {exit:?}");
                check(&cpu.state);
                if exit != Exit::Budget {
                    break;
                }
            }
        });
    }
}

/// Two vCPUs in different random states over the same memory, with a device that writes into it.
#[test]
fn random_code_on_two_vcpus_at_once_is_survived() {
    let memory = guest::ram(&RAM);
    let mut cpus = [vcpu(&memory, 0), vcpu(&memory, 1)];
    for seed in cases(500) {
        let mut random = Random(seed.wrapping_mul(0x5555_1234_9abc_de01));
        let mode = MODES[(seed % MODES.len() as u64) as usize];
        let noise = (random.address(), random.next());
        for (cpu, attention) in &mut cpus {
            attention.clear(!0);
            prepare(&mut random, &memory, cpu, mode);
        }
        report(seed, mode, || {
            std::thread::scope(|scope| {
                for (i, (cpu, attention)) in cpus.iter_mut().enumerate() {
                    let mut random = Random(seed ^ (i as u64 + 1) << 32);
                    scope.spawn(move || go(&mut random, cpu, attention));
                }
                for i in 0..64 {
                    memory.write(noise.0.wrapping_add(i * 64) % LOW, &noise.1.to_le_bytes());
                }
            });
        });
    }
}

/// Nothing of a machine check or a debugger's look may depend on what the guest has mapped.
#[test]
fn peeking_at_random_addresses_changes_nothing() {
    let memory: Arc<PhysMemory> = guest::ram(&RAM);
    let (mut cpu, _) = vcpu(&memory, 0);
    for seed in 0..200 {
        let mut random = Random(seed);
        prepare(&mut random, &memory, &mut cpu, MODES[(seed % 6) as usize]);
        let (before, mut tables) = (cpu.state.activity, [0; 4096]);
        memory.read(TABLES, &mut tables);
        for _ in 0..50 {
            let mut bytes = [0; 100];
            let at = random.number();
            assert!(cpu.peek(at, &mut bytes) <= bytes.len());
        }
        let mut after = [0; 4096];
        memory.read(TABLES, &mut after);
        assert!(tables == after && before == Activity::Active);
    }
}
