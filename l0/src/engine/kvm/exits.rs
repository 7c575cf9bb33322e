//! What KVM's exits are answered with.

use kvm_bindings as kb;
use turtles_cpu::bus::Bus;
use turtles_cpu::state::{Activity, CpuState};
use turtles_cpu::{Cpu, Exit};
use x86defs::{msr, vector};

use super::traps;
use super::vcpu::{Ended, KvmVcpu, Next};
use crate::engine::EngineError;

impl KvmVcpu {
    /// Answers how KVM_RUN ended.
    pub(super) fn answer(&mut self, cpu: &mut Cpu, ended: Ended) -> Result<Next, EngineError> {
        let reason = match ended {
            Ended::Exit(reason) => reason,
            Ended::Interrupted => return self.after_signal(),
            Ended::MemoryFailure => {
                self.stats.memory_failures += 1;
                self.expect_state(true);
                return Ok(Next::Software(self.next_burst()));
            }
        };
        self.expect_state(matches!(reason, kb::KVM_EXIT_HLT | kb::KVM_EXIT_INTERNAL_ERROR));
        match reason {
            kb::KVM_EXIT_IO | kb::KVM_EXIT_MMIO => {
                self.answer_access(cpu, reason);
                Ok(Next::Again)
            }
            kb::KVM_EXIT_X86_RDMSR | kb::KVM_EXIT_X86_WRMSR => Ok(self.answer_msr(cpu, reason)),
            kb::KVM_EXIT_HLT => self.halted(cpu),
            kb::KVM_EXIT_IRQ_WINDOW_OPEN => {
                self.stats.interrupt_windows += 1;
                Ok(Next::Again)
            }
            // Somebody lowered CR8, which the owner has been told.
            kb::KVM_EXIT_SET_TPR | kb::KVM_EXIT_INTR | kb::KVM_EXIT_NMI | kb::KVM_EXIT_TPR_ACCESS => {
                Ok(Next::Again)
            }
            kb::KVM_EXIT_SHUTDOWN => self.shut_down(cpu),
            kb::KVM_EXIT_INTERNAL_ERROR => self.internal_error(cpu),
            kb::KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: the exit reason says which part of the union KVM filled in.
                let failure = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.fail_entry };
                Ok(self.entry_failed(failure.hardware_entry_failure_reason))
            }
            kb::KVM_EXIT_DEBUG => self.debug_exit(cpu),
            // VMCALL or VMMCALL, see `vm::take_hypercalls`.
            kb::KVM_EXIT_XEN => {
                self.stats.hypercalls += 1;
                Ok(Next::SoftwareInstead)
            }
            // Nobody asked for it: the software CPU does as the architecture has it.
            kb::KVM_EXIT_EXCEPTION => Ok(Next::Software(1)),
            other => {
                Err(EngineError::KvmExit(format!("exit reason {other}, which this version does not know")))
            }
        }
    }

    /// An exit that came while finishing an instruction. Only further accesses of the same instruction can be
    /// answered then; anything else, a fault for one, KVM keeps as an event, which moves out with the state.
    pub(super) fn answer_unfinished(&mut self, cpu: &mut Cpu, reason: u32) -> Option<Exit> {
        match reason {
            kb::KVM_EXIT_IO | kb::KVM_EXIT_MMIO => self.answer_access(cpu, reason),
            kb::KVM_EXIT_SHUTDOWN => return Some(Exit::Shutdown),
            _ => {}
        }
        None
    }

    fn answer_access(&mut self, cpu: &mut Cpu, reason: u32) {
        self.unfinished = true;
        if reason == kb::KVM_EXIT_IO {
            self.stats.io += 1;
            self.answer_io(cpu.bus());
        } else {
            self.stats.mmio += 1;
            self.answer_mmio(cpu.bus());
        }
    }

    /// I/O: one access, or several of a string instruction, whose data is in the run page.
    fn answer_io(&mut self, bus: &mut dyn Bus) {
        let room = self.vm.fd.run_size();
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says which part of the union KVM filled in.
        let io = unsafe { run.__bindgen_anon_1.io };
        let width = usize::from(io.size).max(1);
        let len = width.saturating_mul(io.count as usize);
        let start = usize::try_from(io.data_offset).unwrap_or(usize::MAX);
        if start.checked_add(len).is_none_or(|end| end > room) {
            return;
        }
        // SAFETY: KVM says that its data is there, and all of it is inside the mapped run page, which `self`
        // borrows exclusively; KVM touches it only in KVM_RUN.
        let data =
            unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(run).cast::<u8>().add(start), len) };
        for item in data.chunks_exact_mut(width) {
            if u32::from(io.direction) == kb::KVM_EXIT_IO_IN {
                bus.port_read(io.port, item);
            } else {
                bus.port_write(io.port, item);
            }
        }
    }

    fn answer_mmio(&mut self, bus: &mut dyn Bus) {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says which part of the union KVM filled in.
        let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
        let (address, write) = (mmio.phys_addr, mmio.is_write != 0);
        let len = (mmio.len as usize).min(mmio.data.len());
        let data = &mut mmio.data[..len];
        if write {
            bus.mmio_write(address, data);
        } else {
            bus.mmio_read(address, data);
        }
    }

    fn answer_msr(&mut self, cpu: &mut Cpu, reason: u32) -> Next {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says which part of the union KVM filled in.
        let access = unsafe { &mut run.__bindgen_anon_1.msr };
        let index = access.index;
        access.error = 0;
        if !CpuState::is_owner_msr(index) {
            self.stats.cpu_msrs += 1;
            return Next::SoftwareInstead;
        }
        let refused = if reason == kb::KVM_EXIT_X86_RDMSR {
            cpu.bus().read_msr(index).map(|value| access.data = value).is_err()
        } else {
            cpu.bus().write_msr(index, access.data).is_err()
        };
        // Anything but zero raises #GP(0).
        access.error = u8::from(refused);
        self.stats.owner_msrs += 1;
        self.unfinished = true;
        // Where the APIC is shows in CPUID, which KVM answers from its own copy.
        if index == msr::IA32_APIC_BASE && reason == kb::KVM_EXIT_X86_WRMSR {
            Next::Home
        } else {
            Next::Again
        }
    }

    /// A triple fault: perhaps of a VMX instruction whose exception L1 has no handler for.
    fn shut_down(&mut self, cpu: &mut Cpu) -> Result<Next, EngineError> {
        self.come_home_as(cpu, Activity::Shutdown)?;
        if self.traps.is_some() && traps::is_ours(cpu) {
            cpu.state.activity = Activity::Active;
            cpu.state.injected = None;
            return Ok(Next::Software(1));
        }
        Ok(Next::Leave(Exit::Shutdown))
    }

    /// HLT, which KVM has completed.
    fn halted(&mut self, cpu: &mut Cpu) -> Result<Next, EngineError> {
        use turtles_cpu::attention::Attention;
        self.stats.halts += 1;
        if self.is_ready() && self.signal.attention.get() & Attention::INTERRUPT != 0 {
            return Ok(Next::Again);
        }
        self.come_home_as(cpu, Activity::Halted)?;
        Ok(Next::Again)
    }

    /// KVM gave up. It is always the software CPU's turn then: at an instruction KVM cannot emulate, or at an event
    /// it cannot deliver.
    fn internal_error(&mut self, cpu: &mut Cpu) -> Result<Next, EngineError> {
        self.stats.emulation_failures += 1;
        // SAFETY: the exit reason says which part of the union KVM filled in.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        if suberror != kb::KVM_INTERNAL_ERROR_EMULATION {
            log::debug!("KVM gave up with internal error {suberror}: the software CPU goes on");
        }
        let burst = self.next_burst();
        if suberror == kb::KVM_INTERNAL_ERROR_EMULATION && !self.vm.host.has_exit_on_emulation_failure {
            // This KVM also queues the #UD that it would raise in user mode.
            self.come_home_as(cpu, Activity::Active)?;
            let is_ud = cpu.state.injected.is_some_and(|event| event.vector == vector::UD);
            if is_ud {
                cpu.state.injected = None;
            }
        }
        Ok(Next::Software(burst))
    }
}
