//! VMLAUNCH and VMRESUME: VM entry from L1 to L2, in the SDM's steps ("VM Entries").

use turtles_cpu::Cpu;
use turtles_cpu::cpuid::Feature;
use turtles_cpu::mmu::walk::PHYSICAL_BITS;
use turtles_cpu::state::{Event, EventKind, Shadow};
use turtles_cpu::vmx::Controls;
use vmcs_shadow::caps::PREEMPTION_TIMER_RATE;
use vmcs_shadow::check::{self, Inputs, Rule};
use vmcs_shadow::{Field, Vmcs, merge};
use x86defs::vmx::{event, insn_error, pin, reason, secondary};

use super::controls::{NO_VPID, controls};
use super::second_level::CombinedTables;
use super::{After, NO_POINTER, Nested, guest_state, msr_lists, vmx_insn};

/// How VM entry fails once the guest state is at stake: an exit to L1.
struct EntryFailure {
    reason: u32,
    qualification: u64,
}

/// What the checks found.
enum Refusal {
    /// VMfailValid with this number; the instruction ends.
    Error(u32),
    Failure(EntryFailure),
}

impl Nested {
    pub(super) fn enter(&mut self, cpu: &mut Cpu) -> After {
        let Some(vmcs12) = cpu.vmx.current.take() else {
            self.fail_invalid(cpu);
            return After::GoOn;
        };
        if self.current_is_shadow {
            cpu.vmx.current = Some(vmcs12);
            self.fail_invalid(cpu);
            return After::GoOn;
        }
        match self.check_entry(cpu, &vmcs12) {
            Err(Refusal::Error(number)) => {
                cpu.vmx.current = Some(vmcs12);
                self.fail(cpu, number);
                After::GoOn
            }
            Err(Refusal::Failure(failure)) => self.fail_entry(cpu, vmcs12, &failure),
            Ok(pdptes) => self.enter_checked(cpu, vmcs12, pdptes),
        }
    }

    /// STEP 1 to 4: everything that is checked before any state is loaded. Returns the PDPTEs to load.
    fn check_entry(&mut self, cpu: &Cpu, vmcs12: &Vmcs) -> Result<Option<[u64; 4]>, Refusal> {
        // STEP 1: the instruction's own conditions.
        if cpu.state.shadow == Shadow::MovSs {
            return Err(Refusal::Error(insn_error::ENTRY_BLOCKED_BY_MOV_SS));
        }
        match (cpu.vmx.exit.reason, self.launched) {
            (reason::VMLAUNCH, true) => return Err(Refusal::Error(insn_error::VMLAUNCH_NOT_CLEAR)),
            (reason::VMRESUME, false) => return Err(Refusal::Error(insn_error::VMRESUME_NOT_LAUNCHED)),
            _ => {}
        }
        let pdptes = Self::guest_pdptes(cpu, vmcs12);
        let inputs = Self::inputs(cpu, vmcs12, pdptes);
        // STEP 2: VM-execution, VM-exit and VM-entry controls. STEP 3: the host-state area.
        check::check_controls(vmcs12, &self.capabilities, &inputs)
            .map_err(|rule| self.refuse(cpu, vmcs12, rule, Refusal::Error(insn_error::ENTRY_BAD_CONTROLS)))?;
        check::check_host_state(vmcs12, &self.capabilities, &inputs).map_err(|rule| {
            self.refuse(cpu, vmcs12, rule, Refusal::Error(insn_error::ENTRY_BAD_HOST_STATE))
        })?;
        // STEP 4: the guest-state area.
        check::check_guest_state(vmcs12, &self.capabilities, &inputs).map_err(|rule| {
            let qualification = rule.entry_failure_qualification();
            let failure = EntryFailure { reason: reason::ENTRY_FAILURE_GUEST_STATE, qualification };
            self.refuse(cpu, vmcs12, rule, Refusal::Failure(failure))
        })?;
        Ok(pdptes)
    }

    /// Tells which rule was broken to whoever asked.
    fn refuse(&mut self, cpu: &Cpu, vmcs12: &Vmcs, rule: Rule, refusal: Refusal) -> Refusal {
        if let Some(explainer) = &mut self.explainer {
            let number = match refusal {
                Refusal::Error(number) => Some(number),
                Refusal::Failure(_) => None,
            };
            explainer.entry(cpu, vmcs12, rule, number);
        }
        refusal
    }

    /// The PDPTEs of a guest with PAE paging: from the VMCS with EPT, else from memory. None if those in memory are bad, or
    /// the guest uses none.
    fn guest_pdptes(cpu: &Cpu, vmcs12: &Vmcs) -> Option<[u64; 4]> {
        if !guest_state::uses_pae(vmcs12) {
            return None;
        }
        if vmcs12.secondary() & secondary::ENABLE_EPT != 0 {
            return Some(std::array::from_fn(|n| vmcs12.get(Field::GuestPdpte0.nth(n))));
        }
        cpu.pdptes_at(vmcs12.get(Field::GuestCr3) & 0xffff_ffff)
    }

    /// What the checks need beyond the VMCS.
    fn inputs(cpu: &Cpu, vmcs12: &Vmcs, pdptes: Option<[u64; 4]>) -> Inputs {
        let mut inputs = Inputs {
            physical_bits: PHYSICAL_BITS,
            linear_bits: if cpu.model().has(Feature::La57) { 57 } else { 48 },
            long_mode: cpu.state.long_mode(),
            current_pointer: cpu.vmx.current_pointer,
            pdptes,
            ..Inputs::default()
        };
        if check::wants_link_revision(vmcs12, &inputs) {
            let link = vmcs12.get(Field::VmcsLinkPointer);
            inputs.link_revision = Some(Self::region_revision(cpu, link));
        }
        if check::wants_vtpr(vmcs12) {
            const VTPR: u64 = 0x80;
            let mut byte = [0];
            cpu.memory().read(vmcs12.get(Field::VirtualApicAddress).wrapping_add(VTPR), &mut byte);
            inputs.vtpr = Some(byte[0]);
        }
        inputs
    }

    /// Tells which entry of an MSR list was bad to whoever asked.
    pub(super) fn tell_bad_entry(&mut self, cpu: &Cpu, list: &str, bad: &msr_lists::BadEntry) {
        if let Some(explainer) = &mut self.explainer {
            explainer.msr(cpu, list, bad);
        }
    }

    /// The entry fails as an exit: nothing is saved, the host state is loaded.
    fn fail_entry(&mut self, cpu: &mut Cpu, mut vmcs12: Box<Vmcs>, failure: &EntryFailure) -> After {
        cpu.state.instructions += 1;
        vmcs12.set(Field::ExitReason, u64::from(failure.reason | reason::ENTRY_FAILURE));
        vmcs12.set(Field::ExitQualification, failure.qualification);
        self.return_to_l1(cpu, vmcs12)
    }

    fn enter_checked(&mut self, cpu: &mut Cpu, vmcs12: Box<Vmcs>, pdptes: Option<[u64; 4]>) -> After {
        // STEP 5: load the guest state. STEP 6: load MSRs from the list.
        guest_state::load(cpu, &vmcs12, pdptes);
        if let Err(bad) = msr_lists::load(cpu, &vmcs12, msr_lists::ENTRY_LOAD) {
            self.tell_bad_entry(cpu, "VM-entry MSR-load", &bad);
            let failure =
                EntryFailure { reason: reason::ENTRY_FAILURE_MSR_LOADING, qualification: bad.number };
            return self.fail_entry(cpu, vmcs12, &failure);
        }
        cpu.state.instructions += 1;
        self.launched = true;
        // STEP 7: VMCS02 out of L0's wishes and L1's.
        let vmcs02 = merge::merge(&self.vmcs01, &vmcs12);
        let mut controls = controls(&vmcs02);
        self.select_tables(cpu, &vmcs12, &controls);
        // STEP 8: event injection.
        inject(cpu, &vmcs12, &mut controls);
        self.show_shadow_vmcs(cpu, &vmcs12);
        forget_untagged(cpu, &controls);
        // Last, so that what VM entry itself takes does not count.
        self.start_timer(cpu, &vmcs12, &mut controls);
        self.vmcs12 = Some(vmcs12);
        cpu.enter_non_root(controls);
        After::GoOn
    }

    fn select_tables(&self, cpu: &mut Cpu, vmcs12: &Vmcs, controls: &Controls) {
        if !controls.ept() {
            return;
        }
        let capabilities = &self.capabilities;
        let tables = cpu.vmx.second_level.get_or_insert_with(|| Box::new(CombinedTables::new(capabilities)));
        if let Some(tables) = tables.as_any().downcast_mut::<CombinedTables>() {
            let log = controls
                .has_secondary(secondary::ENABLE_PML)
                .then(|| (vmcs12.get(Field::PmlAddress), vmcs12.get(Field::PmlIndex) as u16));
            tables.select(controls.ept_pointer, controls.has_secondary(secondary::MODE_BASED_EXECUTE), log);
        }
    }

    /// The timer counts down from its value whenever the TSC's bit of the rate changes.
    fn start_timer(&self, cpu: &mut Cpu, vmcs12: &Vmcs, controls: &mut Controls) {
        if !controls.has_pin(pin::PREEMPTION_TIMER) {
            return;
        }
        let rate = PREEMPTION_TIMER_RATE;
        let value = vmcs12.get(Field::PreemptionTimerValue);
        controls.preemption_deadline = ((cpu.root_tsc() >> rate).wrapping_add(value)) << rate;
        self.timer.set(controls.preemption_deadline.wrapping_sub(cpu.state.msrs.tsc_adjust));
    }

    /// With VMCS shadowing, L2's VMREAD and VMWRITE work on the VMCS that the link pointer names.
    fn show_shadow_vmcs(&mut self, cpu: &mut Cpu, vmcs12: &Vmcs) {
        let link = vmcs12.get(Field::VmcsLinkPointer);
        self.shadow_launched = false;
        if vmcs12.secondary() & secondary::VMCS_SHADOWING != 0 && link != NO_POINTER {
            let (vmcs, launched) = vmx_insn::load(cpu, link);
            cpu.vmx.current = Some(Box::new(vmcs));
            self.shadow_launched = launched;
        }
    }
}

/// Translations of guests without a VPID do not outlive an entry or exit, nor do those of VPID 0, which is L1's own.
pub(super) fn forget_untagged(cpu: &mut Cpu, controls: &Controls) {
    if controls.vpid_tag == NO_VPID {
        cpu.invalidate(|tag| tag.vpid == NO_VPID || tag.vpid == 0);
    }
}

/// The event that VM entry delivers ("Event Injection").
fn inject(cpu: &mut Cpu, vmcs12: &Vmcs, controls: &mut Controls) {
    let information = vmcs12.get32(Field::EntryInterruption);
    if information & event::VALID == 0 {
        return;
    }
    let kind = match (information & event::TYPE) >> event::TYPE_SHIFT {
        event::EXTERNAL_INTERRUPT => EventKind::ExternalInterrupt,
        event::NMI => EventKind::Nmi,
        event::HARDWARE_EXCEPTION => EventKind::HardwareException,
        event::SOFTWARE_INTERRUPT => EventKind::SoftwareInterrupt,
        event::PRIVILEGED_SOFTWARE_EXCEPTION => EventKind::PrivilegedSoftwareException,
        event::SOFTWARE_EXCEPTION => EventKind::SoftwareException,
        _ => {
            controls.pending_mtf = true;
            return;
        }
    };
    let has_code = information & event::ERROR_CODE_VALID != 0;
    let software = matches!(
        kind,
        EventKind::SoftwareInterrupt | EventKind::PrivilegedSoftwareException | EventKind::SoftwareException
    );
    cpu.state.injected = Some(Event {
        vector: (information & event::VECTOR) as u8,
        kind,
        error_code: has_code.then(|| vmcs12.get32(Field::EntryErrorCode)),
        instruction_length: if software { vmcs12.get(Field::EntryInstructionLength) as u8 } else { 0 },
    });
}
