//! How fast this KVM is, measured in a throw-away VM within milliseconds.
//!
//! Ring-0 code runs at the processor's speed on a processor with virtualization, and a thousand times slower where
//! KVM emulates it instruction by instruction. The CPU's flags do not tell which: measuring does.

use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use x86defs::{cr0, cr4, efer, paging};

use super::{KvmHost, failed};
use crate::engine::EngineError;

const MEMORY: usize = 64 << 10;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x4000;
/// The first loop is short even where one instruction takes a microsecond.
const FIRST_LOOPS: u64 = 1000;
/// Loops are made longer until one takes this long.
const LONG_ENOUGH: Duration = Duration::from_millis(2);
const MOST_LOOPS: u64 = 10_000_000;
/// A slow KVM is measured as often: some tens of milliseconds in all.
const MOST_TRIES: u32 = 8;
const OUTS: u32 = 100;

/// Ring-0 instructions a second from which KVM beats the software CPU. A processor with virtualization does
/// thousands of millions, a KVM that emulates a few; the software CPU is in between.
pub const FAST_RING0: f64 = 50e6;

/// `mov rcx, rax; 1: dec rcx; jnz 1b; hlt`.
const COUNT: &[u8] = &[0x48, 0x89, 0xc1, 0x48, 0xff, 0xc9, 0x75, 0xfb, 0xf4];
/// `1: out 0x80, al; jmp 1b`.
const OUT: &[u8] = &[0xe6, 0x80, 0xeb, 0xfc];

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Instructions a second of a counting loop in ring 0, in 64-bit mode with paging.
    pub ring0_per_second: f64,
    /// From OUT to our handler and back.
    pub out_round_trip: Duration,
}

pub(super) struct Probe {
    pub(super) vm: VmFd,
    pub(super) vcpu: VcpuFd,
    memory: GuestMemoryMmap<()>,
}

fn memory_failed<E: std::error::Error + Send + Sync + 'static>(error: E) -> EngineError {
    EngineError::Kvm { what: "preparing the probe's memory".into(), source: std::io::Error::other(error) }
}

impl Probe {
    pub(super) fn new(kvm: &Kvm) -> Result<Self, EngineError> {
        let memory: GuestMemoryMmap<()> =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(memory_failed)?;
        let entry = paging::PRESENT | paging::WRITE;
        for (at, value) in
            [(PML4, PDPT | entry), (PDPT, PAGE_DIRECTORY | entry), (PAGE_DIRECTORY, entry | paging::LARGE)]
        {
            memory.write_obj(value, GuestAddress(at)).map_err(memory_failed)?;
        }
        let vm = kvm.create_vm().map_err(failed("creating a VM"))?;
        let host = memory.get_host_address(GuestAddress(0)).map_err(memory_failed)? as u64;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: host,
        };
        // SAFETY: the memory is mapped by `memory`, which is dropped after the VM and the vCPU that alone can use it.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("giving the probe memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("creating a vCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("asking what CPUID may show"))?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("setting CPUID"))?;
        let sregs = vcpu.get_sregs().map_err(failed("reading system registers"))?;
        vcpu.set_sregs(&long_mode(sregs)).map_err(failed("writing system registers"))?;
        Ok(Self { vm, vcpu, memory })
    }

    /// Writes to the guest's memory.
    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), EngineError> {
        self.memory.write_slice(bytes, GuestAddress(at)).map_err(memory_failed)
    }

    /// Starts `code` with `rax` in ring 0.
    pub(super) fn load(&mut self, code: &[u8], rax: u64) -> Result<(), EngineError> {
        self.put(CODE, code)?;
        let regs = kvm_regs { rip: CODE, rflags: 2, rsp: MEMORY as u64, rax, ..Default::default() };
        self.vcpu.set_regs(&regs).map_err(failed("writing registers"))
    }

    fn count(&mut self, loops: u64) -> Result<Duration, EngineError> {
        self.load(COUNT, loops)?;
        let start = Instant::now();
        match self.vcpu.run().map_err(failed("running the probe"))? {
            VcpuExit::Hlt => Ok(start.elapsed()),
            other => Err(EngineError::KvmExit(format!("{other:?} in the probe's loop"))),
        }
    }

    fn ring0_per_second(&mut self) -> Result<f64, EngineError> {
        // The first run, not counted, pays for the guest's first page faults.
        self.count(1)?;
        let mut loops = FIRST_LOOPS;
        loop {
            let took = self.count(loops)?;
            if took >= LONG_ENOUGH || loops >= MOST_LOOPS {
                // The host may be busy with something else: only a KVM that is slow each time is slow.
                let rate = |took: Duration| (2 * loops + 2) as f64 / took.as_secs_f64().max(1e-9);
                let mut best = took;
                for _ in 0..MOST_TRIES {
                    if rate(best) >= FAST_RING0 {
                        break;
                    }
                    best = best.min(self.count(loops)?);
                }
                return Ok(rate(best));
            }
            // As many as should take long enough, with a margin, if the next ones are as fast.
            let enough = loops as f64 * LONG_ENOUGH.as_secs_f64() / took.as_secs_f64().max(1e-9) * 1.5;
            loops = (enough as u64).clamp(loops + 1, loops * 100);
        }
    }

    fn out_round_trip(&mut self) -> Result<Duration, EngineError> {
        self.load(OUT, 0)?;
        let mut start = Instant::now();
        // The first exit is not counted either.
        for number in 0..=OUTS {
            match self.vcpu.run().map_err(failed("running the probe"))? {
                VcpuExit::IoOut(..) => {}
                other => return Err(EngineError::KvmExit(format!("{other:?} in the probe's OUT loop"))),
            }
            if number == 0 {
                start = Instant::now();
            }
        }
        Ok(start.elapsed() / OUTS)
    }
}

fn long_mode(mut sregs: kvm_sregs) -> kvm_sregs {
    let data = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, db: 0, ..data };
    [sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss] = [data; 5];
    sregs.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::PG;
    sregs.cr3 = PML4;
    sregs.cr4 = cr4::PAE;
    sregs.efer = efer::LME | efer::LMA;
    sregs
}

impl KvmHost {
    /// Measures this KVM.
    pub fn measure(&self) -> Result<Speed, EngineError> {
        let mut probe = Probe::new(&self.kvm)?;
        Ok(Speed { ring0_per_second: probe.ring0_per_second()?, out_round_trip: probe.out_round_trip()? })
    }
}
