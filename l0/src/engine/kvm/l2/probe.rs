//! What ring 3 can do on this host's KVM that we would not notice: tried, once, in a small guest of its own.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ept_merge::{L1Gpa, L2Gpa};
use turtles_cpu::Cpu;
use turtles_cpu::attention::Attention;
use turtles_cpu::bus::{Bus, MsrRefused};
use turtles_cpu::cpuid::CpuModel;
use turtles_cpu::phys::{PhysMemory, RamRange};
use turtles_cpu::state::{CpuState, Seg, Segment, reg};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use x86defs::{cr0, cr4, efer, paging, rflags};

use super::guest::{Guest, Left};
use super::mapped::{FileMap, Mapped};
use super::ranges::Rights;
use super::window::Window;
use crate::engine::EngineError;
use crate::engine::kvm::kick::{Running, Target};
use crate::engine::kvm::{KvmHost, tunables};

const MEMORY: u64 = 64 << 10;
const CODE: u64 = 0x1000;
const GDT: u64 = 0x2000;
const PML4: u64 = 0x4000;
const STACK: u64 = 0x8000;

/// KVM_RUN that does not come back by itself is ended after this time.
const LONGEST: Duration = Duration::from_millis(20);

/// What must not be executed unseen, and its name.
const TRIED: &[(&str, &[u8])] = &[
    ("CPUID", &[0x0f, 0xa2]),
    ("VMCALL", &[0x0f, 0x01, 0xc1]),
    ("VMMCALL", &[0x0f, 0x01, 0xd9]),
    ("VMFUNC", &[0x0f, 0x01, 0xd4]),
    ("VMREAD", &[0x0f, 0x78, 0xc0]),
    ("RDTSC", &[0x0f, 0x31]),
    ("RDTSCP", &[0x0f, 0x01, 0xf9]),
    ("RDPID", &[0xf3, 0x0f, 0xc7, 0xf8]),
    ("RDPMC", &[0x0f, 0x33]),
    ("SGDT", &[0x0f, 0x01, 0x04, 0x24]),
    ("SIDT", &[0x0f, 0x01, 0x0c, 0x24]),
    ("SLDT", &[0x0f, 0x00, 0xc0]),
    ("STR", &[0x0f, 0x00, 0xc8]),
    ("SMSW", &[0x0f, 0x01, 0xe0]),
    ("SYSCALL", &[0x0f, 0x05]),
    ("SYSENTER", &[0x0f, 0x34]),
    ("INT3", &[0xcc]),
    ("INT 80H", &[0xcd, 0x80]),
    ("UD2", &[0x0f, 0x0b]),
    ("HLT", &[0xf4]),
    ("IN", &[0xe4, 0x80]),
    ("OUTS", &[0x6e]),
    ("RDMSR", &[0x0f, 0x32]),
    ("XSETBV", &[0x0f, 0x01, 0xd1]),
    ("INVD", &[0x0f, 0x08]),
    ("WBINVD", &[0x0f, 0x09]),
    ("MWAIT", &[0x0f, 0x01, 0xc9]),
    ("a page fault", &[0x8a, 0x04, 0x25, 0, 0, 0, 0x40]),
    ("missing memory", &[0x8a, 0x04, 0x25, 0, 0, 2, 0]),
    ("a write to read-only memory", &[0x88, 0x04, 0x25, 0, 0, 1, 0]),
];

/// The names of what would go unnoticed.
pub type Leaks = Vec<&'static str>;

/// Tries, or remembers. What cannot be tried counts as a leak of everything.
pub(super) fn leaks(host: &KvmHost) -> &'static [&'static str] {
    static LEAKS: OnceLock<Leaks> = OnceLock::new();
    LEAKS.get_or_init(|| {
        let found = Probe::new(host).and_then(|mut probe| probe.leaks());
        found.unwrap_or_else(|error| {
            log::warn!("L2 stays in the software CPU, since nothing could be tried on KVM: {error}");
            vec!["everything"]
        })
    })
}

impl KvmHost {
    /// What L2's ring 3 can do on this KVM that nobody would notice.
    pub fn ring3_leaks(&self) -> &'static [&'static str] {
        leaks(self)
    }
}

struct Nobody;

impl Bus for Nobody {
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

struct Probe {
    cpu: Cpu,
    guest: Guest,
    memory: Arc<GuestMemoryMmap<()>>,
}

fn memory_failed<E: std::error::Error + Send + Sync + 'static>(error: E) -> EngineError {
    EngineError::Kvm { what: "preparing the probe's memory".into(), source: std::io::Error::other(error) }
}

impl Probe {
    fn new(host: &KvmHost) -> Result<Self, EngineError> {
        // SAFETY: memfd_create takes a valid C string and returns a new descriptor, which we own, or -1.
        let file = unsafe {
            let fd = libc::memfd_create(c"turtles-probe".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(memory_failed(std::io::Error::last_os_error()));
            }
            Arc::new(File::from_raw_fd(fd))
        };
        file.set_len(MEMORY).map_err(memory_failed)?;
        let range = (GuestAddress(0), MEMORY as usize, Some(FileOffset::from_arc(Arc::clone(&file), 0)));
        let memory = Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).map_err(memory_failed)?);
        let at = memory.get_host_address(GuestAddress(0)).map_err(memory_failed)?;
        let range = RamRange { start: 0, len: MEMORY, host: at };
        // SAFETY: the range is `memory`'s mapping, which the second argument keeps.
        let physical = Arc::new(unsafe { PhysMemory::new(vec![range], Box::new(Arc::clone(&memory))) });
        let model = Arc::new(CpuModel::default());
        let cpu = Cpu::new(Arc::clone(&physical), Box::new(Nobody), model, Arc::new(Attention::default()), 0);
        let window = Window::reserve(tunables::SMALLEST_WINDOW, file).map_err(memory_failed)?;
        let mapped = Mapped::new(window, FileMap::whole(MEMORY), &physical, 16);
        // The last half is not there, and the page before it cannot be written.
        mapped.fill(L2Gpa(0), L1Gpa(0), MEMORY, Rights::ReadWrite, None);
        mapped.fill(L2Gpa(MEMORY), L1Gpa(0), 4096, Rights::Read, None);
        let guest = Guest::new(host, cpu.model(), mapped)?;
        let this = Self { cpu, guest, memory };
        this.prepare()?;
        Ok(this)
    }

    /// The first 2 MiB mapped to themselves for ring 3; a GDT with Linux's selectors.
    fn prepare(&self) -> Result<(), EngineError> {
        let entry = paging::PRESENT | paging::WRITE | paging::USER;
        for (at, value) in [
            (PML4, (PML4 + 0x1000) | entry),
            (PML4 + 0x1000, (PML4 + 0x2000) | entry),
            (PML4 + 0x2000, entry | paging::LARGE),
            (GDT + 8 * 5, 0x00cf_f300_0000_ffff),
            (GDT + 8 * 6, 0x00af_fb00_0000_ffff),
        ] {
            self.memory.write_obj(value, GuestAddress(at)).map_err(memory_failed)?;
        }
        Ok(())
    }

    fn leaks(&mut self) -> Result<Leaks, EngineError> {
        let mut leaks = Vec::new();
        for &(name, bytes) in TRIED {
            if self.goes_unnoticed(bytes)? {
                leaks.push(name);
            }
        }
        Ok(leaks)
    }

    /// Executes two NOPs, which KVM must get past, and `bytes`, at which it must stop.
    fn goes_unnoticed(&mut self, bytes: &[u8]) -> Result<bool, EngineError> {
        let code = [&[0x90, 0x90], bytes, &[0x0f, 0x0b]].concat();
        self.memory.write_slice(&code, GuestAddress(CODE)).map_err(memory_failed)?;
        self.cpu.state = ring3();
        self.cpu.state_changed();
        let before = self.cpu.state.clone();
        let (target, mut timer) = (Target::default(), None);
        // SAFETY: the run page is mapped as long as the guest's vCPU is open, which is longer than `running` lives.
        let running = unsafe { Running::new(&target, &mut timer, self.guest.immediate_exit(), LONGEST) }?;
        let left = self.guest.stretch(&mut self.cpu, || true, || {});
        drop(running);
        let left = left?;
        let state = &self.cpu.state;
        // SYSCALL may have overwritten what it overwrites.
        let same = [0, 2, 3, 4, 5, 6, 7]
            .into_iter()
            .all(|register| state.gpr.get(register) == before.gpr.get(register));
        Ok(left == Left::Signal || state.rip != CODE + 2 || !same || state.cpl != 3)
    }
}

fn ring3() -> CpuState {
    let mut state = CpuState::reset();
    state.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP | cr0::MP;
    state.cr3 = PML4;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    state.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    let data = Segment { base: 0, limit: 0xffff_ffff, access: 0xc0f3, selector: 0x2b };
    state.segments = [data; 6];
    *state.seg_mut(Seg::Cs) = Segment { access: 0xa0fb, selector: 0x33, ..data };
    state.gdtr.base = GDT;
    state.gdtr.limit = 0x3f;
    state.tr = Segment { base: 0, limit: 0x67, access: 0x8b, selector: 0x40 };
    state.cpl = 3;
    state.rip = CODE;
    state.gpr.set(reg::RSP, STACK);
    state.set_rflags(rflags::IF);
    state
}
