//! Bare vCPUs for tests: RAM between guard pages, page tables, no devices.

// Each test crate uses its own part of this.
#![allow(dead_code)]

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;
use turtles_cpu::attention::Attention;
use turtles_cpu::bus::{Bus, MsrRefused};
use turtles_cpu::cpuid::CpuModel;
use turtles_cpu::phys::{PhysMemory, RamRange};
use turtles_cpu::state::{CpuState, Seg, Segment};
use turtles_cpu::{Cpu, Exit};
use x86defs::{cr0, cr4, efer, paging, segment, xcr0};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of inaccessible memory on either side of RAM: further than any wrong index would reach.
const GUARD: usize = 1 << 24;

/// No devices; the TSC counts ticks.
pub struct NoDevices;

impl Bus for NoDevices {
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) {}
    fn port_read(&mut self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&mut self, _: u16, _: &[u8]) {}
    fn read_msr(&mut self, _: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn write_msr(&mut self, _: u32, _: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _: u8) {}
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn tsc(&mut self, ticks: u64) -> u64 {
        ticks
    }
}

/// RAM with inaccessible memory around it.
struct Mapping {
    start: *mut libc::c_void,
    len: usize,
}

// SAFETY: the mapping is only unmapped through this value; its contents are used through `PhysMemory`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `ram` with this length; `PhysMemory` drops this value last.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

/// `ranges` of RAM (start, length), each between guard pages: an access past their ends kills the test.
pub fn ram(ranges: &[(u64, u64)]) -> Arc<PhysMemory> {
    let (mut described, mut mappings) = (Vec::new(), Vec::new());
    for &(start, len) in ranges {
        let whole = len as usize + 2 * GUARD;
        // SAFETY: new mappings at an address of the kernel's choice; the inner part is made accessible.
        let host = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let at = libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED, "memory for the guest");
            mappings.push(Mapping { start: at, len: whole });
            let host = at.cast::<u8>().add(GUARD);
            assert_eq!(libc::mprotect(host.cast(), len as usize, libc::PROT_READ | libc::PROT_WRITE), 0);
            host
        };
        described.push(RamRange { start, len, host });
    }
    // SAFETY: the ranges are page-aligned mappings that `mappings` keeps, used as guest memory only.
    Arc::new(unsafe { PhysMemory::new(described, Box::new(mappings)) })
}

/// A vCPU with its mailbox, at reset.
pub fn vcpu(memory: &Arc<PhysMemory>, index: u32) -> (Cpu, Arc<Attention>) {
    let attention = Arc::new(Attention::default());
    let model = Arc::new(CpuModel::parse("max").expect("a model we have"));
    (Cpu::new(Arc::clone(memory), Box::new(NoDevices), model, Arc::clone(&attention), index), attention)
}

/// Where [`long_mode`] has its page tables: PML4, PDPT, page directory, then a page table for each 2 MiB.
pub const TABLES: u64 = 0x10_0000;
/// Bytes that the tables of [`long_mode`] map one to one, in 4-KiB pages.
pub const MAPPED: u64 = 16 << 20;

/// Address of the page-table entry of `linear` in the tables of [`long_mode`].
pub fn entry_of(linear: u64) -> u64 {
    TABLES + 3 * PAGE + (linear >> 12) * 8
}

/// Writes page tables that map [`MAPPED`] bytes one to one, writable and executable.
pub fn write_tables(memory: &PhysMemory) {
    let flags = paging::PRESENT | paging::WRITE | paging::USER;
    let set = |at: u64, value: u64| memory.write(at, &value.to_le_bytes());
    set(TABLES, (TABLES + PAGE) | flags);
    set(TABLES + PAGE, (TABLES + 2 * PAGE) | flags);
    for table in 0..MAPPED >> 21 {
        set(TABLES + 2 * PAGE + table * 8, (TABLES + (3 + table) * PAGE) | flags);
    }
    for page in 0..MAPPED >> 12 {
        set(entry_of(page << 12), page << 12 | flags);
    }
}

/// A flat 64-bit state at CPL 0 under the tables of [`write_tables`].
pub fn long_mode(state: &mut CpuState, rip: u64, rsp: u64) {
    *state = CpuState::reset();
    state.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    state.cr3 = TABLES;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    state.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    state.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
    *state.seg_mut(Seg::Cs) =
        Segment { base: 0, limit: !0, access: 0x9b | segment::L | segment::G, selector: 8 };
    for seg in [Seg::Es, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
        *state.seg_mut(seg) =
            Segment { base: 0, limit: !0, access: 0x93 | segment::DB | segment::G, selector: 16 };
    }
    state.idtr.limit = 0;
    state.rip = rip;
    state.gpr.set(4, rsp);
}

/// Assembles 64-bit code at `address`.
pub fn assemble(memory: &PhysMemory, address: u64, write: impl FnOnce(&mut CodeAssembler)) {
    let mut a = CodeAssembler::new(64).expect("64 bits are supported");
    write(&mut a);
    memory.write(address, &a.assemble(address).expect("the test's code assembles"));
}

/// Runs until HLT; what else ends it is the test's failure.
pub fn run_to_halt(cpu: &mut Cpu, ticks: u64) {
    let exit = cpu.run(ticks);
    assert_eq!(exit, Exit::Halted, "RIP {:#x} {:?}", cpu.state.rip, cpu.state.gpr);
}

/// Reads a little-endian number.
pub fn read64(memory: &PhysMemory, address: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.read(address, &mut bytes);
    u64::from_le_bytes(bytes)
}
