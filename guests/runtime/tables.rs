//! GDT and TSS.
//!
//! One GDT for all CPUs with spare slots for cases; a TSS for each CPU, whose IST stacks serve every vector.

use core::arch::asm;
use core::cell::UnsafeCell;

pub const CODE64: u16 = 0x08;
pub const DATA: u16 = 0x10;
pub const CODE32: u16 = 0x18;
/// Ring 3, in the order SYSRET wants.
pub const USER_CODE32: u16 = 0x23;
pub const USER_DATA: u16 = 0x2b;
pub const USER_CODE64: u16 = 0x33;
/// The boot CPU's task register (a 16-byte descriptor).
pub const TSS: u16 = 0x38;
/// First spare slot for cases.
pub const SPARE: u16 = 0x48;
/// End of the spare slots; two for real mode follow, then the TSS descriptors of the other CPUs.
pub const SPARE_END: u16 = 0x170;
const OTHER_TSS: u16 = 0x180;

pub const MAX_CPUS: usize = 8;
const STACK: usize = 16 * 1024;

/// Descriptors as cases build them: flat, present, DPL 0.
pub const FLAT_CODE64: u64 = 0x00af_9b00_0000_ffff;
pub const FLAT_CODE32: u64 = 0x00cf_9b00_0000_ffff;
pub const FLAT_DATA: u64 = 0x00cf_9300_0000_ffff;
pub const DPL3: u64 = 3 << 45;
pub const PRESENT: u64 = 1 << 47;

/// Memory that hardware and cases change behind the compiler's back.
#[repr(C, align(16))]
pub struct Shared<T>(UnsafeCell<T>);

// SAFETY: every access goes through raw volatile reads and writes; programs order them themselves.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub const fn new(value: T) -> Self {
        Shared(UnsafeCell::new(value))
    }

    pub fn address(&self) -> u64 {
        self.0.get() as u64
    }
}

#[unsafe(no_mangle)]
static GDT: Shared<[u64; 64]> = Shared::new({
    let mut gdt = [0; 64];
    gdt[1] = FLAT_CODE64;
    gdt[2] = FLAT_DATA;
    gdt[3] = FLAT_CODE32;
    gdt[4] = FLAT_CODE32 | DPL3;
    gdt[5] = FLAT_DATA | DPL3;
    gdt[6] = FLAT_CODE64 | DPL3;
    gdt
});

/// A 64-bit TSS with the I/O permission bitmap of all ports.
#[repr(C, packed(4))]
struct Tss {
    reserved0: u32,
    rsp: [u64; 3],
    reserved1: u64,
    ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    io_map: u16,
    bitmap: [u8; 8193],
}

const EMPTY_TSS: Tss = Tss {
    reserved0: 0,
    rsp: [0; 3],
    reserved1: 0,
    ist: [0; 7],
    reserved2: 0,
    reserved3: 0,
    io_map: 104,
    bitmap: [0xff; 8193],
};

static TSSES: [Shared<Tss>; MAX_CPUS] = [const { Shared::new(EMPTY_TSS) }; MAX_CPUS];

/// Stacks for the IST entries: 1 faults, 2 interrupts, 3 NMI, 4 double fault; 5 is RSP0.
static STACKS: [Shared<[[u8; STACK]; 5]>; MAX_CPUS] = [const { Shared::new([[0; STACK]; 5]) }; MAX_CPUS];

pub const IST_FAULT: u8 = 1;
pub const IST_INTERRUPT: u8 = 2;
pub const IST_NMI: u8 = 3;
pub const IST_DOUBLE_FAULT: u8 = 4;

/// Where the descriptor of a selector lies.
fn slot(selector: u16) -> u64 {
    GDT.address() + u64::from(selector & !7)
}

/// Reads the descriptor of a selector.
pub fn descriptor(selector: u16) -> u64 {
    crate::mem::read(slot(selector))
}

/// Writes the descriptor of a selector.
pub fn set_descriptor(selector: u16, descriptor: u64) {
    crate::mem::write(slot(selector), descriptor);
}

/// A segment or system descriptor from its parts. `access` is byte 5, `flags` the high four bits of byte 6.
pub const fn build_descriptor(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    let (base, limit) = (base as u64, limit as u64);
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | (access as u64) << 40
        | (limit >> 16 & 0xf) << 48
        | (flags as u64 & 0xf) << 52
        | (base >> 24) << 56
}

/// Address of a CPU's TSS.
pub fn tss_address(cpu: usize) -> u64 {
    TSSES[cpu].address()
}

/// Sets an IST stack pointer (1 to 7) of the boot CPU.
pub fn set_ist(index: u8, stack: u64) {
    crate::mem::write(tss_address(0) + 0x24 + u64::from(index - 1) * 8, stack);
}

/// The IST stack pointer (1 to 7) of the boot CPU.
pub fn ist(index: u8) -> u64 {
    crate::mem::read(tss_address(0) + 0x24 + u64::from(index - 1) * 8)
}

/// RSP0 of the boot CPU.
pub fn rsp0() -> u64 {
    crate::mem::read(tss_address(0) + 4)
}

/// Allows or forbids a port in the I/O bitmap of the boot CPU.
pub fn allow_port(port: u16, allow: bool) {
    let at = tss_address(0) + 104 + u64::from(port / 8);
    let bit = 1u8 << (port % 8);
    let old: u8 = crate::mem::read(at);
    crate::mem::write(at, if allow { old & !bit } else { old | bit });
}

/// Writes the TSS of a CPU, loads GDTR and TR.
pub fn load(cpu: usize) {
    let tss = tss_address(cpu);
    for stack in 0..5 {
        let top = STACKS[cpu].address() + (stack as u64 + 1) * STACK as u64;
        crate::mem::write(if stack == 4 { tss + 4 } else { tss + 0x24 + stack as u64 * 8 }, top);
    }
    let pointer = TablePointer { limit: 64 * 8 - 1, base: GDT.address() };
    // SAFETY: the GDT is static, and holds the selectors in use.
    unsafe {
        asm!("lgdt [{}]", in(reg) &pointer);
        asm!("lldt {:x}", in(reg) 0);
    }
    load_task_register(cpu);
}

/// Loads TR of this CPU, again if need be: the descriptor is made available first.
pub fn load_task_register(cpu: usize) {
    let selector = if cpu == 0 { TSS } else { OTHER_TSS + 16 * (cpu as u16 - 1) };
    write_tss_descriptor(selector, tss_address(cpu));
    // SAFETY: the TSS is static and complete.
    unsafe { asm!("ltr {:x}", in(reg) selector) };
}

/// An available 64-bit TSS descriptor with the whole I/O bitmap inside the limit.
pub fn write_tss_descriptor(selector: u16, tss: u64) {
    set_descriptor(selector, build_descriptor(tss as u32, 104 + 8192, 0x89, 0));
    set_descriptor(selector + 8, tss >> 32);
}

pub(crate) fn load_boot_cpu() {
    load(0);
}

/// The memory operand of LGDT and LIDT.
#[repr(C, packed)]
pub struct TablePointer {
    pub limit: u16,
    pub base: u64,
}
