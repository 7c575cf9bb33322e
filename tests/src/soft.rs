//! The subject: a case on the software CPU, in user mode under page tables that map the arena as the native
//! process does.
//!
//! Exceptions go through an IDT whose gates lead to one HLT each: where RIP stops says which vector it was, and
//! the frame on the supervisor's stack is the state at the exception.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use turtles_cpu::attention::Attention;
use turtles_cpu::bus::{Bus, MsrRefused};
use turtles_cpu::cpuid::CpuModel;
use turtles_cpu::phys::{PhysMemory, RamRange};
use turtles_cpu::state::{Activity, CpuState, Seg, Segment, Shadow, TableRegister};
use turtles_cpu::{Cpu, Exit};
use x86defs::{cr0, cr4, efer, paging, rflags, segment, vector, xcr0};

use crate::case::{
    Bits, Case, Exception, FIXED_FLAGS, FLAGS, Final, Fpu, HIGH, IMAGE_SIZE, Image, LOW, Outcome, PAGE,
    PAGES, Registers, Rights, image_index, selector,
};
use crate::generate::decode_comparable;

const RAM: usize = 1 << 20;
/// Guest-physical addresses.
mod at {
    pub const PML4: u64 = 0x1000;
    pub const TABLES: u64 = 0x2000;
    pub const IDT: u64 = 0x4_0000;
    pub const GDT: u64 = 0x4_1000;
    pub const TSS: u64 = 0x4_2000;
    pub const STUBS: u64 = 0x4_3000;
    pub const STACK_TOP: u64 = 0x4_6000;
    pub const ARENA: u64 = 0x8_0000;
}
/// The supervisor's half: all of RAM, linearly.
const KERNEL: u64 = 0xffff_8000_0000_0000;
/// Distance between the stubs of two vectors.
const STUB: u64 = 16;
const KERNEL_CODE: u16 = 0x10;
const TSS_SELECTOR: u16 = 0x40;
/// Instructions and partial string operations after which a case counts as endless.
const LIMIT: u64 = 20_000;

/// The software CPU with the arena.
pub struct Soft {
    cpu: Cpu,
    memory: Arc<PhysMemory>,
    /// The state that every case starts from.
    idle: CpuState,
    translate: bool,
}

/// Guest RAM, page-aligned.
struct Ram(*mut u8);

/// 1 MiB of RAM at address 0.
pub(crate) fn small_memory() -> Arc<PhysMemory> {
    let ram = map_ram();
    let range = RamRange { start: 0, len: RAM as u64, host: ram.0 };
    // SAFETY: the mapping is page-aligned, lives as long as `ram`, and only this value uses it.
    Arc::new(unsafe { PhysMemory::new(vec![range], Box::new(ram)) })
}

// SAFETY: the mapping is used through `PhysMemory` only, which says how threads share it.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: mapped by `map_ram` with this size; `PhysMemory` drops this value last.
        unsafe { libc::munmap(self.0.cast(), RAM) };
    }
}

fn map_ram() -> Ram {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), RAM, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED, "1 MiB of memory for the guest");
    Ram(at.cast())
}

/// Nothing but RAM and a constant clock.
struct NoDevices;

impl Bus for NoDevices {
    fn mmio_read(&mut self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _address: u64, _data: &[u8]) {}
    fn port_read(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
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

impl Default for Soft {
    fn default() -> Self {
        Self::new()
    }
}

impl Soft {
    /// A CPU ready for cases, which translates at once what runs in one go. (Single steps are the interpreter's.)
    pub fn new() -> Self {
        Self::with(true)
    }

    /// A CPU that interprets everything.
    pub fn interpreter() -> Self {
        Self::with(false)
    }

    fn with(translate: bool) -> Self {
        let memory = small_memory();
        build_tables(&memory);
        let cpu = new_cpu(&memory, translate);
        let idle = idle_state(&cpu.state);
        Self { cpu, memory, idle, translate }
    }

    /// Executes a case; `by_steps` one instruction at a time, looking at each before it executes.
    pub fn execute(&mut self, case: &Case, by_steps: bool) -> Outcome {
        self.load(case);
        match catch_unwind(AssertUnwindSafe(|| self.go(case, by_steps))) {
            Ok(outcome) => outcome,
            Err(panic) => {
                self.cpu = new_cpu(&self.memory, self.translate);
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&s| s.to_owned()));
                Outcome::Broken(format!("panic: {}", text.unwrap_or_default()))
            }
        }
    }

    /// Instructions that the last case completed, without the HLT behind its exception.
    pub fn instructions(&self) -> u64 {
        self.cpu.state.instructions - u64::from(self.cpu.state.activity == Activity::Halted)
    }

    /// Events and pieces of instructions that the last case took besides.
    pub fn stalls(&self) -> u64 {
        self.cpu.state.stalls
    }

    fn load(&mut self, case: &Case) {
        self.memory.write(at::ARENA, &*case.image);
        let mut state = self.idle.clone();
        let start = &case.start;
        for (i, &value) in start.gpr.iter().enumerate() {
            state.gpr.set(i, value);
        }
        state.rip = start.rip;
        state.set_rflags(start.rflags & FLAGS | FIXED_FLAGS);
        if case.bits == Bits::B32 {
            *state.seg_mut(Seg::Cs) = flat(selector::CODE32, 0xfb | segment::DB | segment::G);
        }
        state.seg_mut(Seg::Fs).base = start.fs_base;
        state.seg_mut(Seg::Gs).base = start.gs_base;
        load_fpu(&mut state, &start.fpu);
        self.cpu.state = state;
        self.cpu.state_changed();
    }

    fn go(&mut self, case: &Case, by_steps: bool) -> Outcome {
        let mut executed = 0;
        while self.cpu.state.cpl == 3 {
            if by_steps && let Err(why) = self.look(case) {
                return Outcome::Skipped(why);
            }
            let exit = if by_steps { self.cpu.step() } else { self.cpu.run(LIMIT) };
            executed += 1;
            match exit {
                Exit::Halted | Exit::Shutdown => break,
                Exit::Budget if by_steps && executed < LIMIT => {}
                Exit::Budget => return Outcome::Skipped("endless".to_owned()),
                exit => return Outcome::Broken(format!("exit {exit:?}")),
            }
        }
        self.outcome(case)
    }

    /// Looks at the instruction to execute next.
    fn look(&self, case: &Case) -> Result<(), String> {
        let rip = self.cpu.state.rip;
        let Some(index) = image_index(rip) else { return Ok(()) };
        let mut bytes = [0; 15];
        let mut len = 0;
        while len < bytes.len() && image_index(rip + len as u64) == Some(index + len) {
            len += 1;
        }
        self.memory.read(at::ARENA + index as u64, &mut bytes[..len]);
        decode_comparable(case.bits, &bytes[..len], rip).map(|_| ())
    }

    /// Undoes the delivery of the exception.
    fn outcome(&mut self, case: &Case) -> Outcome {
        let state = &self.cpu.state;
        let offset = state.rip.wrapping_sub(KERNEL + at::STUBS);
        if state.cpl != 0 || offset >= 256 * STUB {
            return Outcome::Broken(format!("stopped at {:#x} with CPL {}", state.rip, state.cpl));
        }
        let vector = (offset / STUB) as u8;
        let depth = (KERNEL + at::STACK_TOP).wrapping_sub(state.gpr.get(4));
        let has_code = depth == 48;
        if depth != 40 && depth != 48 {
            return Outcome::Broken(format!("the frame of vector {vector} has {depth} bytes"));
        }
        let word = |index: u64| {
            let mut bytes = [0; 8];
            self.memory.read(at::STACK_TOP - 40 + index * 8, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        let mut code = [0; 8];
        self.memory.read(at::STACK_TOP - 48, &mut code);
        let want = match case.bits {
            Bits::B64 => selector::CODE64,
            Bits::B32 => selector::CODE32,
        };
        if word(1) != u64::from(want) || word(4) != u64::from(selector::DATA) {
            return Outcome::Broken(format!("saved CS {:#x}, SS {:#x}", word(1), word(4)));
        }
        let mut gpr = [0; 16];
        for (i, value) in gpr.iter_mut().enumerate() {
            *value = state.gpr.get(i);
        }
        gpr[4] = word(3);
        let mut image: Box<Image> = Box::new([0; IMAGE_SIZE]);
        self.memory.read(at::ARENA, &mut *image);
        Outcome::Done(Box::new(Final {
            exception: Exception {
                vector,
                error_code: if has_code { u64::from_le_bytes(code) as u32 } else { 0 },
                address: if vector == vector::PF { state.cr2 } else { 0 },
            },
            registers: Registers {
                gpr,
                rip: word(0),
                rflags: word(2),
                fs_base: state.seg(Seg::Fs).base,
                gs_base: state.seg(Seg::Gs).base,
                fpu: save_fpu(state),
            },
            image,
        }))
    }
}

fn new_cpu(memory: &Arc<PhysMemory>, translate: bool) -> Cpu {
    let model = Arc::new(CpuModel::default());
    let attention = Arc::new(Attention::default());
    let mut cpu = Cpu::new(Arc::clone(memory), Box::new(NoDevices), model, attention, 0);
    if translate {
        cpu.translate_after(0);
    } else {
        cpu.set_translate(false);
    }
    cpu
}

fn flat(selector: u16, access: u32) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, access, selector }
}

/// User code in 64-bit mode as Linux sets it up, with FS and GS null selectors that have a base.
fn idle_state(reset: &CpuState) -> CpuState {
    let mut state = reset.clone();
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    state.cr3 = at::PML4;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE | cr4::PGE;
    state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    state.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
    *state.seg_mut(Seg::Cs) = flat(selector::CODE64, 0xfb | segment::L | segment::G);
    for seg in [Seg::Ss, Seg::Ds, Seg::Es] {
        *state.seg_mut(seg) = flat(selector::DATA, 0xf3 | segment::DB | segment::G);
    }
    for seg in [Seg::Fs, Seg::Gs] {
        *state.seg_mut(seg) = Segment { base: 0, limit: 0xffff_ffff, access: segment::UNUSABLE, selector: 0 };
    }
    state.ldtr = Segment { base: 0, limit: 0, access: segment::UNUSABLE, selector: 0 };
    state.tr = Segment { base: KERNEL + at::TSS, limit: 0x67, access: 0x8b, selector: TSS_SELECTOR };
    state.gdtr = TableRegister { base: KERNEL + at::GDT, limit: 0x7f };
    state.idtr = TableRegister { base: KERNEL + at::IDT, limit: 0xfff };
    state.cpl = 3;
    state.activity = Activity::Active;
    state.shadow = Shadow::None;
    state
}

fn load_fpu(state: &mut CpuState, fpu: &Fpu) {
    state.x87.fcw = fpu.fcw;
    state.x87.fsw = fpu.fsw;
    state.x87.ftw = fpu.ftw;
    for (to, from) in state.x87.st.iter_mut().zip(&fpu.st) {
        to[..10].copy_from_slice(from);
    }
    state.vector.ymm = fpu.ymm;
    state.vector.mxcsr = fpu.mxcsr;
}

fn save_fpu(state: &CpuState) -> Fpu {
    let mut fpu = Fpu {
        fcw: state.x87.fcw,
        fsw: state.x87.fsw,
        ftw: state.x87.ftw,
        mxcsr: state.vector.mxcsr,
        st: [[0; 10]; 8],
        ymm: state.vector.ymm,
    };
    for (to, from) in fpu.st.iter_mut().zip(&state.x87.st) {
        to.copy_from_slice(&from[..10]);
    }
    fpu
}

/// Page tables, descriptor tables and the exception stubs.
fn build_tables(memory: &PhysMemory) {
    let mut tables = Tables { memory, next: at::TABLES };
    for base in [LOW, HIGH] {
        for (index, &(offset, rights)) in PAGES.iter().enumerate() {
            let rights = match rights {
                Rights::ReadWrite => paging::WRITE | paging::NX,
                Rights::ReadOnly => paging::NX,
                Rights::ReadExecute => 0,
                Rights::ReadWriteExecute => paging::WRITE,
            };
            tables.map(base + offset, at::ARENA + (index * PAGE) as u64, rights | paging::USER);
        }
    }
    for page in (0..RAM as u64).step_by(PAGE) {
        tables.map(KERNEL + page, page, paging::WRITE);
    }
    let write = |at: u64, value: u64| memory.write(at, &value.to_le_bytes());
    for vector in 0..256 {
        let stub = KERNEL + at::STUBS + vector * STUB;
        memory.write(at::STUBS + vector * STUB, &[0xf4, 0xeb, 0xfd]);
        // Linux lets user code reach the gates of INT3 and INTO.
        let dpl = if vector == 3 || vector == 4 { 3 } else { 0 };
        let low = stub & 0xffff
            | u64::from(KERNEL_CODE) << 16
            | (0x8e | dpl << 5) << 40
            | (stub >> 16 & 0xffff) << 48;
        write(at::IDT + vector * 16, low);
        write(at::IDT + vector * 16 + 8, stub >> 32);
    }
    for (selector, descriptor) in [
        (KERNEL_CODE, 0x00af_9b00_0000_ffff),
        (0x18, 0x00cf_9300_0000_ffff),
        (selector::CODE32, 0x00cf_fb00_0000_ffff),
        (selector::DATA, 0x00cf_f300_0000_ffff),
        (selector::CODE64, 0x00af_fb00_0000_ffff),
    ] {
        write(at::GDT + u64::from(selector & !7), descriptor);
    }
    write(at::TSS + 4, KERNEL + at::STACK_TOP);
    // No I/O permission map: its offset lies beyond the limit.
    memory.write(at::TSS + 102, &[0xff, 0xff]);
    debug_assert_eq!(FIXED_FLAGS & rflags::IF, rflags::IF);
}

struct Tables<'a> {
    memory: &'a PhysMemory,
    next: u64,
}

impl Tables<'_> {
    fn map(&mut self, linear: u64, physical: u64, rights: u64) {
        let mut table = at::PML4;
        for level in [39, 30, 21] {
            let entry_at = table + (linear >> level & 511) * 8;
            let mut bytes = [0; 8];
            self.memory.read(entry_at, &mut bytes);
            let mut entry = u64::from_le_bytes(bytes);
            if entry == 0 {
                entry = self.next | paging::PRESENT | paging::WRITE | paging::USER | paging::ACCESSED;
                self.memory.write(entry_at, &entry.to_le_bytes());
                self.next += PAGE as u64;
            }
            table = entry & paging::ADDRESS;
        }
        let entry = physical | rights | paging::PRESENT | paging::ACCESSED | paging::DIRTY;
        self.memory.write(table + (linear >> 12 & 511) * 8, &entry.to_le_bytes());
    }
}
