//! The same program on two CPUs, one that interprets and one that translates, slice by slice: after each slice their
//! states must be the same, at the end their memories too.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use turtles_cpu::attention::Attention;
use turtles_cpu::bus::{Bus, MsrRefused};
use turtles_cpu::cpuid::CpuModel;
use turtles_cpu::phys::PhysMemory;
use turtles_cpu::state::CpuState;
use turtles_cpu::{Cpu, Exit};

use super::state::differences;
use super::world::{self, RAM};
use crate::generate::system::Program;
use crate::random::{Random, mix};
use crate::soft::small_memory;

/// Ticks after which a program is taken to be over.
const LIMIT: u64 = 20_000;

/// How the program is cut into slices.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pace {
    /// In one go.
    Whole,
    /// So many ticks at a time.
    Every(u64),
    /// Slices of any length, with interrupts in between.
    Random,
}

/// The slices of a run and the interrupts between them: the same for the same seed.
struct Plan {
    random: Random,
    pace: Pace,
}

impl Plan {
    fn new(seed: u64, pace: Pace) -> Self {
        Self { random: Random::new(mix(&[seed, 1])), pace }
    }

    /// Ticks of the next slice, and the interrupt that is raised before it.
    fn next(&mut self) -> (u64, Option<u8>) {
        match self.pace {
            Pace::Whole => (LIMIT, None),
            Pace::Every(ticks) => (ticks, None),
            Pace::Random => {
                let most = self.random.pick(&[4, 20, 100, 1000]);
                let vector = (0x20 + self.random.below(64)) as u8;
                (1 + self.random.below(most), self.random.chance(20).then_some(vector))
            }
        }
    }
}

/// Interrupts that are pending, one bit each from vector 0x20 on, and a port that raises them.
struct Devices {
    pending: Arc<AtomicU64>,
    attention: Arc<Attention>,
}

fn raise(pending: &AtomicU64, attention: &Attention, vector: u8) {
    pending.fetch_or(1 << (vector & 63), Ordering::SeqCst);
    attention.raise(Attention::INTERRUPT);
}

impl Bus for Devices {
    fn mmio_read(&mut self, address: u64, data: &mut [u8]) {
        data.fill(address as u8);
    }
    fn mmio_write(&mut self, _address: u64, _data: &[u8]) {}
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn port_write(&mut self, port: u16, data: &[u8]) {
        if port == 0x10 {
            raise(&self.pending, &self.attention, 0x20 + (data[0] & 63));
        }
    }
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
        let pending = self.pending.load(Ordering::SeqCst);
        let bit = 63u32.checked_sub(pending.leading_zeros())?;
        let left = pending & !(1 << bit);
        self.pending.store(left, Ordering::SeqCst);
        if left == 0 {
            self.attention.clear(Attention::INTERRUPT);
        }
        // Bits stand for vectors modulo 64, from 0x20 on.
        Some(if bit < 32 { bit as u8 + 64 } else { bit as u8 })
    }
    fn tsc(&mut self, ticks: u64) -> u64 {
        ticks * 3
    }
}

/// One CPU with its memory.
struct Machine {
    cpu: Cpu,
    memory: Arc<PhysMemory>,
    pending: Arc<AtomicU64>,
    attention: Arc<Attention>,
    reset: CpuState,
}

impl Machine {
    /// `threshold`: executions before a block is translated; none interprets.
    fn new(threshold: Option<u32>) -> Self {
        let memory = small_memory();
        let (pending, attention) = (Arc::new(AtomicU64::new(0)), Arc::new(Attention::default()));
        let bus = Devices { pending: Arc::clone(&pending), attention: Arc::clone(&attention) };
        let model = Arc::new(CpuModel::default());
        let mut cpu = Cpu::new(Arc::clone(&memory), Box::new(bus), model, Arc::clone(&attention), 0);
        match threshold {
            Some(threshold) => cpu.translate_after(threshold),
            None => cpu.set_translate(false),
        }
        let reset = world::start(&cpu.state);
        Self { cpu, memory, pending, attention, reset }
    }

    fn load(&mut self, program: &Program) {
        self.memory.write(0, &program.ram);
        let mut state = self.reset.clone();
        for (i, &value) in program.gpr.iter().enumerate() {
            state.gpr.set(i, value);
        }
        state.rip = program.rip;
        state.set_rflags(program.rflags);
        state.vector.ymm = program.fpu.ymm;
        state.vector.mxcsr = program.fpu.mxcsr;
        state.x87.fcw = program.fpu.fcw;
        state.x87.ftw = program.fpu.ftw;
        for (to, from) in state.x87.st.iter_mut().zip(&program.fpu.st) {
            to[..10].copy_from_slice(from);
        }
        self.pending.store(0, Ordering::SeqCst);
        self.attention.clear(u32::MAX);
        self.cpu.state = state;
        self.cpu.state_changed();
    }

    fn run(&mut self, (ticks, vector): (u64, Option<u8>)) -> Exit {
        if let Some(vector) = vector {
            raise(&self.pending, &self.attention, vector);
        }
        self.cpu.run(ticks)
    }

    fn ram(&self) -> Vec<u8> {
        let mut ram = vec![0; RAM];
        self.memory.read(0, &mut ram);
        ram
    }

    /// The instruction at RIP in words.
    fn disassemble(&self) -> String {
        let mut bytes = [0; 15];
        let rip = self.cpu.state.rip;
        let len = self.cpu.peek(rip, &mut bytes);
        let insn = Decoder::with_ip(64, &bytes[..len], rip, DecoderOptions::NONE).decode();
        let mut text = String::new();
        IntelFormatter::new().format(&insn, &mut text);
        let hex: String = bytes[..insn.len().min(len)].iter().map(|b| format!("{b:02x}")).collect();
        format!("{:>8}  CPL{} {rip:#x}  {hex:24} {text}", self.cpu.state.ticks(), self.cpu.state.cpl)
    }
}

fn exits(one: Exit, other: Exit, lines: &mut Vec<String>) {
    if one != other {
        lines.push(format!("exit  {one:?}  |  {other:?}"));
    }
}

fn memories(one: &Machine, other: &Machine) -> Vec<String> {
    let (a, b) = (one.ram(), other.ram());
    let wrong: Vec<usize> = (0..RAM).filter(|&i| a[i] != b[i]).collect();
    let mut lines: Vec<String> = wrong
        .iter()
        .take(16)
        .map(|&i| format!("memory at {i:#x}  {:#04x}  |  {:#04x}", a[i], b[i]))
        .collect();
    if wrong.len() > 16 {
        lines.push(format!("and {} more bytes of memory", wrong.len() - 16));
    }
    lines
}

/// Where two machines parted.
struct Parted {
    /// Slices that went well.
    slices: usize,
    ticks: u64,
    lines: Vec<String>,
}

/// Runs both to the end. `look` compares memory after each slice, not at the end only.
fn run(pair: (&mut Machine, &mut Machine), plan: &mut Plan, look: bool) -> Result<u64, Parted> {
    let (one, other) = pair;
    for slices in 0.. {
        let slice = plan.next();
        let (a, b) = (one.run(slice), other.run(slice));
        let over = a != Exit::Budget || one.cpu.state.ticks() >= LIMIT;
        let mut lines = Vec::new();
        exits(a, b, &mut lines);
        lines.extend(differences(&one.cpu.state, &other.cpu.state));
        if lines.is_empty() && (look || over) {
            lines = memories(one, other);
        }
        if !lines.is_empty() {
            return Err(Parted { slices, ticks: slice.0, lines });
        }
        if over {
            break;
        }
    }
    Ok(one.cpu.state.instructions)
}

/// An interpreting CPU and translating ones, kept from program to program: what is left of one may disturb the next.
pub struct Lockstep {
    interpreter: Machine,
    /// With the threshold they have.
    translators: Vec<(u32, Machine)>,
}

impl Default for Lockstep {
    fn default() -> Self {
        let translators = [0, 3].map(|threshold| (threshold, Machine::new(Some(threshold))));
        Self { interpreter: Machine::new(None), translators: translators.into() }
    }
}

impl Lockstep {
    /// Runs a program at that pace; the number of instructions, or a report of what differs.
    pub fn check(&mut self, seed: u64, pace: Pace) -> Result<u64, String> {
        let program = crate::generate::system::program(seed);
        let index = seed as usize % self.translators.len();
        let (threshold, translator) = &mut self.translators[index];
        self.interpreter.load(&program);
        translator.load(&program);
        let mut plan = Plan::new(seed, pace);
        run((&mut self.interpreter, translator), &mut plan, false).map_err(|parted| {
            let what = format!("seed {seed}, pace {pace:?}, translated after {threshold}");
            let found = explain(&program, seed, pace, *threshold);
            found.map_or_else(
                || {
                    format!(
                        "{what}: only after other programs, {} slices:\n  {}",
                        parted.slices,
                        parted.lines.join("\n  ")
                    )
                },
                |text| format!("{what}\n{text}"),
            )
        })
    }
}

/// Both machines after `slices` of the plan.
fn prefix(
    program: &Program,
    seed: u64,
    pace: Pace,
    threshold: u32,
    slices: usize,
) -> (Machine, Machine, Plan) {
    let (mut one, mut other) = (Machine::new(None), Machine::new(Some(threshold)));
    one.load(program);
    other.load(program);
    let mut plan = Plan::new(seed, pace);
    for _ in 0..slices {
        let slice = plan.next();
        one.run(slice);
        other.run(slice);
    }
    (one, other, plan)
}

/// Finds the shortest run that differs, on fresh machines; none if they agree.
fn explain(program: &Program, seed: u64, pace: Pace, threshold: u32) -> Option<String> {
    let (mut one, mut other, mut plan) = prefix(program, seed, pace, threshold, 0);
    let parted = run((&mut one, &mut other), &mut plan, true).err()?;
    let differs = |ticks: u64| {
        let (mut one, mut other, mut plan) = prefix(program, seed, pace, threshold, parted.slices);
        let slice = (ticks, plan.next().1);
        let mut lines = Vec::new();
        exits(one.run(slice), other.run(slice), &mut lines);
        lines.extend(differences(&one.cpu.state, &other.cpu.state));
        lines.extend(memories(&one, &other));
        lines
    };
    // What differs after a while need not differ later, but what differs at the end began somewhere.
    let (mut good, mut bad) = (0, parted.ticks);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if differs(middle).is_empty() { good = middle } else { bad = middle }
    }
    let mut lines = differs(bad);
    if lines.is_empty() {
        lines = parted.lines;
    }
    let mut text = trace(program, seed, pace, parted.slices, bad);
    let _ = write!(
        text,
        "after {} slices, {bad} ticks into one (interpreter | translator):\n  {}",
        parted.slices,
        lines.join("\n  ")
    );
    Some(text)
}

/// The instructions that led there, as the interpreter executes them one by one.
fn trace(program: &Program, seed: u64, pace: Pace, slices: usize, ticks: u64) -> String {
    const MOST: usize = 40;
    let (mut machine, _, mut plan) = prefix(program, seed, pace, 0, slices);
    let vector = plan.next().1;
    let end = machine.cpu.state.ticks() + ticks;
    let mut lines = vec![format!("interrupt: {vector:x?}")];
    while machine.cpu.state.ticks() < end {
        lines.push(machine.disassemble());
        if machine.run((1, if lines.len() == 2 { vector } else { None })) != Exit::Budget {
            break;
        }
    }
    lines.push(machine.disassemble());
    let from = lines.len().saturating_sub(MOST);
    lines[from..].iter().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "  {line}");
        text
    })
}

/// The pace that a program's number picks: all small slices, and the others.
pub fn pace_of(seed: u64) -> Pace {
    let mut random = Random::new(mix(&[seed, 2]));
    match random.below(10) {
        0..=2 => Pace::Whole,
        3..=5 => Pace::Every(1 + random.below(70)),
        _ => Pace::Random,
    }
}
