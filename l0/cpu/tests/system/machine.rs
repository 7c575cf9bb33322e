//! A CPU over four megabytes of RAM, with descriptor tables in which every vector's handler halts, so that a test sees
//! from RIP which exception was raised and finds its frame on the stack.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use iced_x86::code_asm::CodeAssembler;
use turtles_cpu::attention::Attention;
use turtles_cpu::bus::{Bus, MsrRefused};
use turtles_cpu::cpuid::CpuModel;
use turtles_cpu::phys::{PhysMemory, RamRange};
use turtles_cpu::state::{CpuState, Seg, Segment, TableRegister, reg};
use turtles_cpu::{Cpu, Exit};
use x86defs::{cr0, cr4, efer, msr};

pub const RAM: usize = 4 << 20;
pub const PML4: u64 = 0x1000;
pub const PDPT: u64 = 0x2000;
pub const LDT: u64 = 0x4000;
pub const GDT: u64 = 0x5000;
pub const IDT: u64 = 0x6000;
pub const TSS: u64 = 0x7000;
/// A second task's TSS.
pub const TSS2: u64 = 0x7800;
/// Vector `v`'s handler, a HLT, is at `HANDLERS + 16 * v`.
pub const HANDLERS: u64 = 0x8000;
pub const CODE: u64 = 0x1_0000;
pub const KERNEL_STACK: u64 = 0x2_0000;
pub const IST1: u64 = 0x2_2000;
pub const USER_STACK: u64 = 0x3_0000;
pub const DATA: u64 = 0x4_0000;

/// Selectors of both GDTs.
pub const KCODE: u16 = 0x08;
pub const KDATA: u16 = 0x10;
/// 32-bit in both, so compatibility mode in IA-32e mode.
pub const UCODE32: u16 = 0x1b;
pub const UDATA: u16 = 0x23;
pub const UCODE64: u16 = 0x2b;
pub const TR: u16 = 0x30;
/// Tests put what they need here; each is 16 bytes apart.
pub const FREE: u16 = 0x40;

/// What happened on the bus, and what it answers.
#[derive(Default)]
pub struct Log {
    pub written: Vec<(u16, u64)>,
    /// Writes to physical memory that is no RAM.
    pub mmio: Vec<(u64, u64)>,
    pub interrupts: VecDeque<u8>,
    pub cr8: u8,
}

struct TestBus(Arc<Mutex<Log>>);

impl Bus for TestBus {
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, address: u64, data: &[u8]) {
        let value = data.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        self.0.lock().unwrap().mmio.push((address, value));
    }
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        data.copy_from_slice(&u64::from(port).to_le_bytes()[..data.len()]);
    }
    fn port_write(&mut self, port: u16, data: &[u8]) {
        let value = data.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        self.0.lock().unwrap().written.push((port, value));
    }
    fn read_msr(&mut self, index: u32) -> Result<u64, MsrRefused> {
        match index {
            msr::IA32_APIC_BASE => Ok(msr::apic_base::DEFAULT | msr::apic_base::ENABLE),
            _ => Err(MsrRefused),
        }
    }
    fn write_msr(&mut self, _: u32, _: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn cr8(&mut self) -> u8 {
        self.0.lock().unwrap().cr8
    }
    fn set_cr8(&mut self, value: u8) {
        self.0.lock().unwrap().cr8 = value;
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.0.lock().unwrap().interrupts.pop_front()
    }
    fn tsc(&mut self, instructions: u64) -> u64 {
        1000 + instructions
    }
}

/// A code or data descriptor; `access` as in `Segment::access`, the limit in units of its G bit.
pub fn descriptor(base: u64, limit: u64, access: u64) -> u64 {
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | (access & 0xff) << 40
        | (limit & 0xf_0000) << 32
        | (access >> 12 & 0xf) << 52
        | (base >> 24 & 0xff) << 56
}

/// A gate; `kind` is the access byte.
pub fn gate(selector: u16, offset: u64, kind: u64, count: u64) -> u64 {
    (offset & 0xffff)
        | u64::from(selector) << 16
        | (count & 0x1f) << 32
        | (kind & 0xff) << 40
        | (offset >> 16 & 0xffff) << 48
}

pub const CODE32: u64 = 0xc09b;
pub const CODE16: u64 = 0x009b;
pub const CODE64: u64 = 0xa09b;
pub const DATA32: u64 = 0xc093;
/// Added to access rights: descriptor privilege level 3.
pub const DPL3: u64 = 0x60;

pub struct Machine {
    pub cpu: Cpu,
    pub log: Arc<Mutex<Log>>,
    pub attention: Arc<Attention>,
}

impl Machine {
    fn new(model: &str) -> Self {
        let ram = Box::leak(vec![0u64; RAM / 8 + 512].into_boxed_slice());
        let host = ram.as_mut_ptr().cast::<u8>();
        let host = host.wrapping_add(host.align_offset(4096));
        // SAFETY: the memory is leaked, so it stays; only the CPU under test uses it.
        let memory =
            unsafe { PhysMemory::new(vec![RamRange { start: 0, len: RAM as u64, host }], Box::new(())) };
        let log = Arc::<Mutex<Log>>::default();
        let model = Arc::new(CpuModel::parse(model).expect("a model"));
        let attention = Arc::<Attention>::default();
        let bus = Box::new(TestBus(Arc::clone(&log)));
        let mut cpu = Cpu::new(Arc::new(memory), bus, model, Arc::clone(&attention), 0);
        cpu.state = CpuState::reset();
        cpu.state.gpr = Default::default();
        cpu.state.rip = 0;
        let mut machine = Self { cpu, log, attention };
        for v in 0..256 {
            machine.put(HANDLERS + 16 * v, &[0xf4]);
        }
        machine
    }

    /// Real mode, CS base 0, at [`CODE`] with all data segments at 0.
    pub fn real() -> Self {
        let mut m = Self::new("max");
        for v in 0..256u64 {
            m.put32(4 * v, (HANDLERS + 16 * v) as u32);
        }
        *m.cpu.state.seg_mut(Seg::Cs) =
            Segment { base: CODE, limit: 0xffff, access: 0x9b, selector: (CODE >> 4) as u16 };
        m.cpu.state.gpr.set(reg::RSP, 0x7000);
        m.cpu.state_changed();
        m
    }

    /// 32-bit protected mode without paging at CPL 0, flat segments.
    pub fn protected() -> Self {
        let mut m = Self::new("max");
        for (selector, access) in
            [(KCODE, CODE32), (KDATA, DATA32), (UCODE32, CODE32 | DPL3), (UDATA, DATA32 | DPL3)]
        {
            m.put64(GDT + u64::from(selector & !7), descriptor(0, 0xf_ffff, access));
        }
        m.put64(GDT + u64::from(TR), descriptor(TSS, 0x20ff, 0x8b));
        for v in 0..256 {
            m.put64(IDT + 8 * v, gate(KCODE, HANDLERS + 16 * v, 0x8e, 0));
        }
        m.put32(TSS + 4, KERNEL_STACK as u32);
        m.put32(TSS + 8, u32::from(KDATA));
        m.put16(TSS + 102, 0x1000);
        let s = &mut m.cpu.state;
        s.cr0 = cr0::PE | cr0::ET;
        s.gdtr = TableRegister { base: GDT, limit: 0xfff };
        s.idtr = TableRegister { base: IDT, limit: 0x7ff };
        s.tr = Segment { base: TSS, limit: 0x20ff, access: 0x8b, selector: TR };
        m.enter(KCODE, CODE32, KDATA, 0);
        m
    }

    /// 64-bit mode at CPL 0: the first gigabyte mapped one to one, for users too.
    pub fn long() -> Self {
        let mut m = Self::new("max");
        for (selector, access) in [
            (KCODE, CODE64),
            (KDATA, DATA32),
            (UCODE32, CODE32 | DPL3),
            (UDATA, DATA32 | DPL3),
            (UCODE64, CODE64 | DPL3),
        ] {
            m.put64(GDT + u64::from(selector & !7), descriptor(0, 0xf_ffff, access));
        }
        m.put64(GDT + u64::from(TR), descriptor(TSS, 0x20ff, 0x8b));
        m.put64(GDT + u64::from(TR) + 8, 0);
        for v in 0..256 {
            m.put64(IDT + 16 * v, gate(KCODE, HANDLERS + 16 * v, 0x8e, 0));
        }
        m.put64(TSS + 4, KERNEL_STACK);
        m.put64(TSS + 36, IST1);
        m.put16(TSS + 102, 0x1000);
        m.put64(PML4, PDPT | 7);
        m.put64(PDPT, 0x87);
        let s = &mut m.cpu.state;
        s.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::WP;
        s.cr3 = PML4;
        s.cr4 = cr4::PAE;
        s.efer = efer::LME | efer::LMA | efer::SCE;
        s.gdtr = TableRegister { base: GDT, limit: 0xfff };
        s.idtr = TableRegister { base: IDT, limit: 0xfff };
        s.tr = Segment { base: TSS, limit: 0x20ff, access: 0x8b, selector: TR };
        m.enter(KCODE, CODE64, KDATA, 0);
        m
    }

    /// Loads flat CS, SS and data segments and the privilege level directly, at [`CODE`].
    pub fn enter(&mut self, cs: u16, code: u64, ss: u16, cpl: u8) {
        let dpl = u32::from(cpl) << 5;
        let flat = |selector, access| Segment { base: 0, limit: u32::MAX, access, selector };
        let s = &mut self.cpu.state;
        *s.seg_mut(Seg::Cs) = flat(cs, code as u32 | dpl);
        for seg in [Seg::Ss, Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
            *s.seg_mut(seg) = flat(ss, DATA32 as u32 | dpl);
        }
        s.cpl = cpl;
        s.rip = CODE;
        s.gpr.set(reg::RSP, if cpl == 3 { USER_STACK } else { KERNEL_STACK });
        self.cpu.state_changed();
    }

    /// To ring 3 of the present mode.
    pub fn user(mut self) -> Self {
        if self.cpu.state.long_mode() {
            self.enter(UCODE64, CODE64, UDATA, 3);
        } else {
            self.enter(UCODE32, CODE32, UDATA, 3);
        }
        self
    }

    /// Changes the state, with everything derived from it.
    pub fn with(mut self, change: impl FnOnce(&mut CpuState)) -> Self {
        change(&mut self.cpu.state);
        self.cpu.state_changed();
        self
    }

    /// Assembles a program at linear `at` for the present code size.
    pub fn asm_at(&mut self, at: u64, ip: u64, bits: u32, write: impl FnOnce(&mut CodeAssembler)) -> usize {
        let mut a = CodeAssembler::new(bits).expect("bits");
        write(&mut a);
        let bytes = a.assemble(ip).expect("assembles");
        self.put(at, &bytes);
        bytes.len()
    }

    /// Assembles a program at the present CS:RIP.
    pub fn asm(&mut self, write: impl FnOnce(&mut CodeAssembler)) -> usize {
        let s = &self.cpu.state;
        let (at, ip, bits) = (s.seg(Seg::Cs).base + s.rip, s.rip, s.code_bits());
        self.asm_at(at, ip, bits, write)
    }

    /// Puts bytes at the present CS:RIP.
    pub fn bytes(&mut self, bytes: &[u8]) {
        let s = &self.cpu.state;
        let at = s.seg(Seg::Cs).base + s.rip;
        self.put(at, bytes);
    }

    /// Runs until HLT.
    pub fn run(&mut self) {
        assert_eq!(self.cpu.run(10_000), Exit::Halted, "{:#x}", self.cpu.state.rip);
    }

    /// Executes `n` instructions.
    pub fn steps(&mut self, n: usize) {
        for _ in 0..n {
            assert_eq!(self.complete_one(), Exit::Budget);
        }
    }

    /// Executes what faults or is interrupted: the handler's first instruction is then the one executed.
    pub fn step_into_handler(&mut self) {
        let _ = self.complete_one();
    }

    /// Steps until one more instruction is complete; a delivery counts as a step of its own.
    fn complete_one(&mut self) -> Exit {
        let goal = self.cpu.state.instructions + 1;
        for _ in 0..4 {
            let exit = self.cpu.step();
            if self.cpu.state.instructions >= goal || exit != Exit::Budget {
                return exit;
            }
        }
        panic!("no instruction completed at {:#x}", self.cpu.state.rip);
    }

    /// Runs until a handler halts; which vector it is.
    pub fn vector(&mut self) -> u64 {
        self.run();
        let rip = self.cpu.state.seg(Seg::Cs).base + self.cpu.state.rip - 1;
        assert!((HANDLERS..HANDLERS + 0x1000).contains(&rip), "halted at {rip:#x}");
        (rip - HANDLERS) / 16
    }

    /// Runs until a handler halts, for vectors with an error code: vector and code.
    pub fn fault(&mut self) -> (u64, u64) {
        let vector = self.vector();
        (vector, self.stack(0))
    }

    /// Slot `n` of the stack, counted in the present mode's stack width.
    pub fn stack(&self, n: u64) -> u64 {
        let s = &self.cpu.state;
        let at = s.seg(Seg::Ss).base + s.gpr.get(reg::RSP);
        match s.code_bits() {
            64 => self.get(at + 8 * n, 8),
            32 => self.get(at + 4 * n, 4),
            _ => self.get(at + 2 * n, 2),
        }
    }

    pub fn reg(&self, index: usize) -> u64 {
        self.cpu.state.gpr.get(index)
    }

    pub fn set(&mut self, index: usize, value: u64) {
        self.cpu.state.gpr.set(index, value);
    }

    pub fn get(&self, at: u64, size: usize) -> u64 {
        let mut bytes = [0; 8];
        self.cpu.memory().read(at, &mut bytes[..size]);
        u64::from_le_bytes(bytes)
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.cpu.memory().write(at, bytes);
    }

    pub fn put16(&mut self, at: u64, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn put32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn put64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// Puts a descriptor into the GDT.
    pub fn gdt(&mut self, selector: u16, value: u64) {
        self.put64(GDT + u64::from(selector & !7), value);
    }

    /// Sets a gate of the IDT (its low half in IA-32e mode).
    pub fn idt(&mut self, vector: u64, value: u64) {
        let width = if self.cpu.state.long_mode() { 16 } else { 8 };
        self.put64(IDT + width * vector, value);
    }
}
