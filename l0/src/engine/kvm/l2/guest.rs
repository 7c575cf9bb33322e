//! One L2 of one EPT root in KVM: a VM with one vCPU, whose memory is a window.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings as kb;
use kvm_ioctls::{VcpuFd, VmFd};
use turtles_cpu::Cpu;
use turtles_cpu::attention::Attention;
use turtles_cpu::cpuid::{CpuModel, Dynamic};
use turtles_cpu::state::CpuState;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use x86defs::dr;

use super::fence;
use super::mapped::Mapped;
use crate::engine::EngineError;
use crate::engine::kvm::transfer::{ALL_IN_RUN_PAGE, Image};
use crate::engine::kvm::vcpu::Ended;
use crate::engine::kvm::{KvmHost, failed, msrs, user};

/// A page beyond the window, where a slot may come and go.
const SPARE_SLOT: u32 = 1;
/// "CPUID faulting": the MSR that says it exists, and the one that turns it on.
const PLATFORM_INFO_CPUID_FAULT: u64 = 1 << 31;
const MISC_FEATURES_ENABLES: u32 = 0x140;
/// A guest that has told Hyper-V its name gets #UD for VMCALL and VMMCALL in ring 3; any other an error in RAX.
const HV_GUEST_OS_ID: u32 = 0x4000_0000;
const HV_INTERFACE: u32 = u32::from_le_bytes(*b"Hv#1");

/// Why a stretch on KVM ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Left {
    /// At an instruction that the software CPU has to execute.
    Instruction,
    /// At one whose memory is not in the window.
    Memory,
    /// By our signal.
    Signal,
}

pub(super) struct Guest {
    // Dropped in this order: KVM has let go of the window before it goes.
    vcpu: VcpuFd,
    vm: VmFd,
    pub(super) mapped: Arc<Mapped>,
    host: KvmHost,
    image: Image,
    spare: Option<GuestMemoryMmap<()>>,
    /// See [`fence::fence_in`].
    flush: bool,
    /// When ring 3 was left, if what KVM derived from page tables is of then: see [`Cpu::mode_changes`].
    left_at: Option<u64>,
    in_run_page: bool,
    /// Time in KVM_RUN of the last stretch.
    pub(super) took: Duration,
}

impl Guest {
    pub(super) fn new(host: &KvmHost, model: &CpuModel, mapped: Arc<Mapped>) -> Result<Self, EngineError> {
        let vm = host.kvm.create_vm().map_err(failed("creating a VM for L2"))?;
        let window = mapped.window();
        let region = kb::kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: window.len(),
            userspace_addr: window.address(),
        };
        // SAFETY: the window is an address range of its own, in which only the memory file is ever mapped; it goes
        // after the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("giving KVM L2's memory"))?;
        if host.has_exit_on_emulation_failure {
            let cap = kb::KVM_CAP_EXIT_ON_EMULATION_FAILURE;
            let cap = kb::kvm_enable_cap { cap, args: [1, 0, 0, 0], ..Default::default() };
            vm.enable_cap(&cap).map_err(failed("asking to be told of emulation failures"))?;
        }
        leave_instructions_alone(host, &vm);
        let vcpu = vm.create_vcpu(0).map_err(failed("creating a vCPU for L2"))?;
        let after_reset = Dynamic { code64: true, ..Dynamic::default() };
        let bits = window.len().trailing_zeros();
        let (entries, _) = host.cpuid_entries(&|leaf, subleaf| {
            tell(leaf, subleaf, model.cpuid(leaf, subleaf, &after_reset), host, bits)
        })?;
        vcpu.set_cpuid2(&entries).map_err(failed("setting L2's CPUID"))?;
        let spare = host.shadow_paging.then(|| GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]));
        let spare = spare.transpose().map_err(|error| EngineError::Kvm {
            what: "mapping a page".into(),
            source: std::io::Error::other(error),
        })?;
        let image = Image::new(host, &vcpu)?;
        forbid(&vcpu)?;
        if !host.emulates_ring0 {
            see_debug_exceptions(&vcpu)?;
        }
        let host = host.clone();
        Ok(Self {
            vcpu,
            vm,
            mapped,
            host,
            image,
            spare,
            flush: false,
            left_at: None,
            in_run_page: false,
            took: Duration::ZERO,
        })
    }

    /// Where a signal's handler makes KVM_RUN return at once.
    pub(super) fn immediate_exit(&mut self) -> *mut u8 {
        &raw mut self.vcpu.get_kvm_run().immediate_exit
    }

    fn set_immediate_exit(&mut self, value: u8) {
        let at = self.immediate_exit();
        // SAFETY: a byte of the mapped run page; volatile, because the signal handler writes it too.
        unsafe { at.write_volatile(value) };
    }

    /// One stretch of ring 3. The state is at home before and after. `enter` is called right before KVM_RUN, when
    /// signals end it, and tells whether to enter at all; `leave` after it.
    pub(super) fn stretch(
        &mut self,
        cpu: &mut Cpu,
        enter: impl FnOnce() -> bool,
        leave: impl FnOnce(),
    ) -> Result<Left, EngineError> {
        self.refresh(cpu)?;
        let before = cpu.state.clone();
        if self.host.emulates_ring0 {
            user::fence_in(&mut cpu.state);
            cpu.state.cr4 |= fence::CR4_FORBIDS;
        } else {
            fence::fence_in(&mut cpu.state, &self.host, self.flush);
        }
        let moved = self.image.move_in(&mut self.vcpu, cpu, false);
        let ended = moved.and_then(|()| {
            self.set_immediate_exit(0);
            if !enter() {
                self.set_immediate_exit(1);
            }
            let start = Instant::now();
            let ended = self.run();
            self.took = start.elapsed();
            leave();
            ended
        });
        let home = self.come_home(cpu, before, &ended);
        let left = match ended? {
            Ended::MemoryFailure => Left::Memory,
            Ended::Interrupted => Left::Signal,
            Ended::Exit(_) => Left::Instruction,
        };
        home.map(|()| left)
    }

    /// What KVM derived from page tables is dropped if L2's kernel may have asked for that meanwhile.
    fn refresh(&mut self, cpu: &Cpu) -> Result<(), EngineError> {
        if self.left_at == Some(cpu.mode_changes()) {
            return Ok(());
        }
        self.flush = !self.flush;
        let Some(spare) = &self.spare else { return Ok(()) };
        let host = spare.get_host_address(GuestAddress(0)).map_or(0, |address| address as u64);
        let region = |memory_size, userspace_addr| kb::kvm_userspace_memory_region {
            slot: SPARE_SLOT,
            flags: 0,
            guest_phys_addr: self.mapped.window().len(),
            memory_size,
            userspace_addr,
        };
        // SAFETY: the page is `spare`'s, and the slot is gone after the second call.
        unsafe { self.vm.set_user_memory_region(region(4096, host)) }
            .and_then(|()| unsafe { self.vm.set_user_memory_region(region(0, 0)) })
            .map_err(failed("making KVM drop what it derived from page tables"))
    }

    fn run(&mut self) -> Result<Ended, EngineError> {
        let valid = if self.image.uses_run_page() { ALL_IN_RUN_PAGE } else { 0 };
        let run = self.vcpu.get_kvm_run();
        run.request_interrupt_window = 0;
        run.cr8 = 0;
        run.kvm_valid_regs = valid;
        let trap_tsc = self.host.emulates_ring0;
        if trap_tsc {
            set_tsc_trap(true);
        }
        let result = self.vcpu.run().map(|exit| matches!(exit, kvm_ioctls::VcpuExit::MemoryFault { .. }));
        if trap_tsc {
            set_tsc_trap(false);
        }
        let run = self.vcpu.get_kvm_run();
        self.in_run_page = run.kvm_valid_regs == ALL_IN_RUN_PAGE;
        match result.map_err(|error| (error.errno(), error)) {
            Ok(false) => Ok(Ended::Exit(run.exit_reason)),
            Ok(true) | Err((libc::EFAULT, _)) => Ok(Ended::MemoryFailure),
            Err((libc::EINTR | libc::EAGAIN, _)) => Ok(Ended::Interrupted),
            Err((_, error)) => Err(failed("running L2")(error)),
        }
    }

    fn come_home(
        &mut self,
        cpu: &mut Cpu,
        before: CpuState,
        ended: &Result<Ended, EngineError>,
    ) -> Result<(), EngineError> {
        if self.vcpu.get_kvm_run().kvm_dirty_regs != 0 {
            // KVM returned before it took the registers.
            self.set_immediate_exit(1);
            self.run()?;
        }
        let moved = self.image.move_out(&self.vcpu, cpu, &Attention::default(), self.in_run_page);
        let reason = match ended {
            Ok(Ended::Exit(reason)) => Some(*reason),
            _ => None,
        };
        if matches!(reason, Some(kb::KVM_EXIT_MMIO | kb::KVM_EXIT_IO)) {
            self.abandon(cpu)?;
        }
        let pkru = before.pkru;
        if self.host.emulates_ring0 {
            let shut_down = reason == Some(kb::KVM_EXIT_SHUTDOWN);
            let trapped = user::is_trap(&cpu.state, shut_down);
            cpu.state = user::take_back(before, &cpu.state);
            cpu.registers_changed();
            if trapped {
                user::redo_trap(cpu);
            }
        } else {
            cpu.state = fence::take_back(before, &cpu.state);
            if reason == Some(kb::KVM_EXIT_DEBUG) && self.was_single_step() {
                cpu.state.pending_debug |= dr::DR6_BS;
            }
            cpu.registers_changed();
        }
        if cpu.state.pkru != pkru {
            // Translations have it in them.
            cpu.state_changed();
        }
        self.left_at = Some(cpu.mode_changes());
        moved
    }

    /// KVM is in the middle of an access to a place outside the window. The software CPU begins the instruction anew;
    /// KVM ends its own with page tables in which nothing can be reached.
    fn abandon(&mut self, cpu: &mut Cpu) -> Result<(), EngineError> {
        let kept = cpu.state.clone();
        cpu.state.cr3 = self.mapped.window().len() - 4096;
        self.image.move_in(&mut self.vcpu, cpu, false)?;
        self.set_immediate_exit(1);
        self.run()?;
        cpu.state = kept;
        Ok(())
    }

    fn was_single_step(&mut self) -> bool {
        // SAFETY: the exit reason said that KVM filled in this part of the union.
        let debug = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.debug.arch };
        debug.dr6 & dr::DR6_BS != 0
    }

    /// Nothing of ring 0 has been executed since the last stretch, whatever `cpu` counts.
    pub(super) fn stayed_in_ring_3(&mut self, cpu: &Cpu) {
        self.left_at = Some(cpu.mode_changes());
    }
}

/// What KVM knows of L2's CPUID: ring 3 is not to see it, but for what decides which instructions exist.
fn tell(leaf: u32, subleaf: u32, mut answer: [u32; 4], host: &KvmHost, bits: u32) -> [u32; 4] {
    let supported = host.supported_cpuid(leaf, subleaf);
    match (leaf, subleaf) {
        (0x4000_0000, _) => return [HV_LAST, 0, 0, 0],
        (HV_LAST, _) => return [HV_INTERFACE, 0, 0, 0],
        (7, 0) => {
            // FSGSBASE, PKU, UMIP as CR4 wants them; RDPID as RDTSCP.
            answer[1] |= supported[1] & 1;
            answer[2] = answer[2] & !(1 << 22) | supported[2] & (1 << 2 | 1 << 3);
        }
        (0x8000_0001, _) => answer[3] &= !(1 << 27),
        // With shadow paging KVM finds addresses beyond the window to be reserved; otherwise it does not look.
        (0x8000_0008, _) if host.shadow_paging => answer[0] = answer[0] & !0xff | bits,
        _ => {}
    }
    answer
}

const HV_LAST: u32 = 0x4000_0001;

/// Makes KVM neither write VMCALL where it finds VMMCALL nor execute MWAIT that CPUID does not offer.
fn leave_instructions_alone(host: &KvmHost, vm: &VmFd) {
    let known = KvmHost::ask(&host.kvm, kb::KVM_CAP_DISABLE_QUIRKS2);
    let unwanted = kb::KVM_X86_QUIRK_FIX_HYPERCALL_INSN | kb::KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS;
    let quirks = u64::from(unwanted) & u64::try_from(known).unwrap_or(0);
    let cap = kb::kvm_enable_cap {
        cap: kb::KVM_CAP_DISABLE_QUIRKS2,
        args: [quirks, 0, 0, 0],
        ..Default::default()
    };
    if quirks == 0 || vm.enable_cap(&cap).is_err() {
        log::debug!("this KVM keeps its quirks");
    }
}

/// Makes CPUID, VMCALL and VMMCALL of ring 3 fault, where KVM can.
fn forbid(vcpu: &VcpuFd) -> Result<(), EngineError> {
    msrs::write_one(vcpu, x86defs::msr::MSR_PLATFORM_INFO, PLATFORM_INFO_CPUID_FAULT)?;
    msrs::write_one(vcpu, MISC_FEATURES_ENABLES, 1)?;
    msrs::write_one(vcpu, HV_GUEST_OS_ID, 1)?;
    Ok(())
}

/// Single-step traps come after their instruction, and are to be told from its faults: KVM_EXIT_DEBUG.
fn see_debug_exceptions(vcpu: &VcpuFd) -> Result<(), EngineError> {
    let mut debug = kb::kvm_guest_debug {
        control: kb::KVM_GUESTDBG_ENABLE | kb::KVM_GUESTDBG_USE_HW_BP,
        ..Default::default()
    };
    debug.arch.debugreg[7] = dr::DR7_FIXED_1;
    vcpu.set_guest_debug(&debug).map_err(failed("asking for L2's debug exceptions"))
}

/// Where ring 3 is the processor's own ring 3, this thread's RDTSC and RDTSCP fault or not.
fn set_tsc_trap(on: bool) {
    const PR_SET_TSC: libc::c_int = 26;
    const PR_TSC_ENABLE: libc::c_ulong = 1;
    const PR_TSC_SIGSEGV: libc::c_ulong = 2;
    let mode = if on { PR_TSC_SIGSEGV } else { PR_TSC_ENABLE };
    // SAFETY: changes what RDTSC does on this thread, which executes none until it is changed back: between the two
    // calls is one ioctl, and the signal handler that may run there reads no clock.
    unsafe { libc::prctl(PR_SET_TSC, mode) };
}
