//! VM exit from L2 to L1: reflection, in the SDM's steps ("VM Exits").

use turtles_cpu::Cpu;
use turtles_cpu::state::Activity;
use turtles_cpu::vmx::{Operation, VmExit};
use vmcs_shadow::caps::PREEMPTION_TIMER_RATE;
use vmcs_shadow::reflect::{self, ExitInformation};
use vmcs_shadow::{Field, Vmcs};
use x86defs::vmx::{event, exit_ctl, pin, reason, secondary};

use super::enter::forget_untagged;
use super::{After, NO_POINTER, Nested, guest_state, host_state, msr_lists, vmx_insn};

/// VMX abort indicators.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Abort {
    StoringGuestMsrs = 1,
    HostPdptes = 2,
    LoadingHostMsrs = 4,
}

impl Nested {
    /// Gives L1 the exit that the CPU reports.
    pub(super) fn reflect(&mut self, cpu: &mut Cpu) -> After {
        let exit = cpu.vmx.exit;
        let Some(mut vmcs12) = self.vmcs12.take() else { return After::GoOn };
        self.timer.cancel();
        // STEP 1: the exit-information fields.
        reflect::write_exit_information(&mut vmcs12, &information(&exit));
        // STEP 2: the guest-state area, then the MSR list.
        guest_state::save(cpu, &mut vmcs12);
        self.save_timer(cpu, &mut vmcs12);
        save_log_index(cpu, &mut vmcs12);
        self.hide_shadow_vmcs(cpu, &vmcs12);
        if let Err(bad) = msr_lists::store(cpu, &vmcs12, msr_lists::EXIT_STORE) {
            self.tell_bad_entry(cpu, "VM-exit MSR-store", &bad);
            return self.abort(cpu, vmcs12, Abort::StoringGuestMsrs);
        }
        cpu.state.nmi_blocked = nmi_blocked_after(cpu.state.nmi_blocked, &exit, &vmcs12);
        let controls = std::mem::take(&mut cpu.vmx.controls);
        forget_untagged(cpu, &controls);
        self.return_to_l1(cpu, vmcs12)
    }

    /// Loads L1's state and goes on there.
    pub(super) fn return_to_l1(&mut self, cpu: &mut Cpu, vmcs12: Box<Vmcs>) -> After {
        // STEP 3: the host-state area, then the MSR list.
        if let Err(abort) = host_state::load(cpu, &vmcs12) {
            return self.abort(cpu, vmcs12, abort);
        }
        if let Err(bad) = msr_lists::load(cpu, &vmcs12, msr_lists::EXIT_LOAD) {
            self.tell_bad_entry(cpu, "VM-exit MSR-load", &bad);
            return self.abort(cpu, vmcs12, Abort::LoadingHostMsrs);
        }
        cpu.vmx.current = Some(vmcs12);
        cpu.leave_non_root();
        After::GoOn
    }

    fn save_timer(&self, cpu: &mut Cpu, vmcs12: &mut Vmcs) {
        let saves = vmcs12.get32(Field::ExitControls) & exit_ctl::SAVE_PREEMPTION_TIMER != 0;
        if !saves || vmcs12.get32(Field::PinControls) & pin::PREEMPTION_TIMER == 0 {
            return;
        }
        let deadline = cpu.vmx.controls.preemption_deadline;
        let rate = PREEMPTION_TIMER_RATE;
        let left = (deadline >> rate).saturating_sub(cpu.root_tsc() >> rate);
        vmcs12.set(Field::PreemptionTimerValue, left & 0xffff_ffff);
    }

    /// The VMCS that L2 saw goes back to L1's memory.
    fn hide_shadow_vmcs(&mut self, cpu: &mut Cpu, vmcs12: &Vmcs) {
        let link = vmcs12.get(Field::VmcsLinkPointer);
        if let (Some(shadow), true) = (cpu.vmx.current.take(), link != NO_POINTER) {
            vmx_insn::store(cpu, link, &shadow, self.shadow_launched);
        }
    }

    /// VMX abort: the indicator is written, and the logical processor shuts down.
    fn abort(&mut self, cpu: &mut Cpu, vmcs12: Box<Vmcs>, why: Abort) -> After {
        const INDICATOR: u64 = 4;
        let at = cpu.vmx.current_pointer.wrapping_add(INDICATOR);
        cpu.memory().write(at, &(why as u32).to_le_bytes());
        log::warn!("VMX abort: {why:?}");
        cpu.vmx.current = Some(vmcs12);
        cpu.vmx.operation = Operation::Root;
        cpu.leave_non_root();
        cpu.state.activity = Activity::Shutdown;
        After::Shutdown
    }
}

fn information(exit: &VmExit) -> ExitInformation {
    ExitInformation {
        reason: exit.reason,
        qualification: exit.qualification,
        guest_linear: exit.guest_linear,
        guest_physical: exit.guest_physical,
        interruption: exit.interruption,
        interruption_error: exit.interruption_error,
        idt_vectoring: exit.idt_vectoring,
        idt_vectoring_error: exit.idt_vectoring_error,
        instruction_length: exit.instruction_length,
        instruction_information: exit.instruction_information,
    }
}

fn save_log_index(cpu: &mut Cpu, vmcs12: &mut Vmcs) {
    if vmcs12.secondary() & secondary::ENABLE_PML == 0 {
        return;
    }
    if let Some(index) = vmx_insn::tables(cpu).and_then(|tables| tables.log_index()) {
        vmcs12.set(Field::PmlIndex, u64::from(index));
    }
}

/// Blocking by NMI in L1 after the exit: an NMI that caused it blocks further ones; with virtual NMIs L2's blocking was
/// virtual and says nothing of L1's.
fn nmi_blocked_after(in_guest: bool, exit: &VmExit, vmcs12: &Vmcs) -> bool {
    let kind = (exit.interruption & event::TYPE) >> event::TYPE_SHIFT;
    if exit.reason == reason::EXCEPTION_OR_NMI && kind == event::NMI {
        return true;
    }
    !guest_state::virtual_nmis(vmcs12) && in_guest
}
