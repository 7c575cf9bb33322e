//! Moving a vCPU's state between its home, [`turtles_cpu::state::CpuState`], and KVM, as far as it differs.

use kvm_bindings::{
    KVM_SYNC_X86_VALID_FIELDS, kvm_debugregs, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use turtles_cpu::Cpu;
use turtles_cpu::attention::Attention;
use turtles_cpu::state::CpuState;
use x86defs::{cr0, cr4, msr};

use super::msrs::KvmMsrs;
use super::xsave::XsaveArea;
use super::{KvmHost, convert, failed};
use crate::engine::EngineError;

/// Register sets in the run page.
pub(super) const ALL_IN_RUN_PAGE: u64 = KVM_SYNC_X86_VALID_FIELDS as u64;

/// What KVM holds of a vCPU, as it was last moved.
pub(super) struct Image {
    sregs: kvm_sregs,
    debug: kvm_debugregs,
    xcr0: u64,
    has_xcrs: bool,
    run_page: bool,
    xsave: XsaveArea,
    msrs: KvmMsrs,
}

/// PAE paging: CR3 points to four page-directory pointers, which the processor keeps.
fn pae_paging(state: &CpuState) -> bool {
    state.cr0 & cr0::PG != 0 && state.cr4 & cr4::PAE != 0 && !state.long_mode()
}

impl Image {
    /// Of a vCPU as KVM made it, its CPUID set.
    pub(super) fn new(host: &KvmHost, vcpu: &VcpuFd) -> Result<Self, EngineError> {
        let mut this = Self {
            sregs: vcpu.get_sregs().map_err(failed("reading system registers"))?,
            debug: vcpu.get_debug_regs().map_err(failed("reading debug registers"))?,
            xcr0: 0,
            has_xcrs: host.has_xcrs,
            run_page: host.has_sync_regs,
            xsave: XsaveArea::new(host, vcpu)?,
            msrs: KvmMsrs::new(vcpu)?,
        };
        this.xcr0 = this.fetch_xcr0(vcpu)?;
        Ok(this)
    }

    /// True if registers can travel in the run page.
    pub(super) fn uses_run_page(&self) -> bool {
        self.run_page
    }

    fn fetch_xcr0(&self, vcpu: &VcpuFd) -> Result<u64, EngineError> {
        if !self.has_xcrs {
            return Ok(0);
        }
        let xcrs = vcpu.get_xcrs().map_err(failed("reading XCR0"))?;
        Ok(xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(0, |x| x.value))
    }

    /// Moves the state into KVM, and an NMI that waits. Registers may be left in the run page, for KVM to take at the
    /// next KVM_RUN, which forgets events queued before.
    pub(super) fn move_in(&mut self, vcpu: &mut VcpuFd, cpu: &mut Cpu, nmi: bool) -> Result<(), EngineError> {
        let cr8 = cpu.bus().cr8();
        let apic_base = cpu.bus().read_msr(msr::IA32_APIC_BASE).unwrap_or(self.sregs.apic_base);
        let state = &mut cpu.state;
        if self.has_xcrs && self.xcr0 != state.xcr0 {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            xcrs.xcrs[0].value = state.xcr0;
            let what = format!("setting XCR0 to {:#x}", state.xcr0);
            vcpu.set_xcrs(&xcrs).map_err(failed(what))?;
            self.xcr0 = state.xcr0;
        }
        self.xsave.set(vcpu, state)?;
        self.msrs.set(vcpu, &mut state.msrs)?;
        let debug = convert::debugregs_of(state);
        if debug != self.debug {
            vcpu.set_debug_regs(&debug).map_err(failed("writing debug registers"))?;
            self.debug = debug;
        }
        let sregs = convert::sregs_of(state, cr8, apic_base);
        let sregs_differ = sregs != self.sregs;
        self.sregs = sregs;
        self.put_registers(vcpu, &convert::regs_of(state), sregs_differ, &convert::events_of(state, nmi))
    }

    fn put_registers(
        &self,
        vcpu: &mut VcpuFd,
        regs: &kvm_regs,
        sregs_differ: bool,
        events: &kvm_vcpu_events,
    ) -> Result<(), EngineError> {
        if self.run_page {
            let page = vcpu.sync_regs_mut();
            page.regs = *regs;
            page.sregs = self.sregs;
            page.events = *events;
            let sregs_bit = u64::from(kvm_bindings::KVM_SYNC_X86_SREGS);
            let dirty = if sregs_differ { ALL_IN_RUN_PAGE } else { ALL_IN_RUN_PAGE & !sregs_bit };
            vcpu.get_kvm_run().kvm_dirty_regs = dirty;
            return Ok(());
        }
        vcpu.set_regs(regs).map_err(failed("writing registers"))?;
        if sregs_differ {
            vcpu.set_sregs(&self.sregs).map_err(failed("writing system registers"))?;
        }
        vcpu.set_vcpu_events(events).map_err(failed("writing events"))
    }

    /// Moves the state out of KVM. `in_run_page`: KVM has stored registers there when it returned.
    pub(super) fn move_out(
        &mut self,
        vcpu: &VcpuFd,
        cpu: &mut Cpu,
        attention: &Attention,
        in_run_page: bool,
    ) -> Result<(), EngineError> {
        let (regs, mut sregs, events) = if in_run_page {
            let page = vcpu.sync_regs();
            (page.regs, page.sregs, page.events)
        } else {
            (
                vcpu.get_regs().map_err(failed("reading registers"))?,
                vcpu.get_sregs().map_err(failed("reading system registers"))?,
                vcpu.get_vcpu_events().map_err(failed("reading events"))?,
            )
        };
        sregs.interrupt_bitmap = [0; 4];
        self.sregs = sregs;
        self.debug = vcpu.get_debug_regs().map_err(failed("reading debug registers"))?;
        let state = &mut cpu.state;
        convert::regs_into(&regs, state);
        convert::sregs_into(&sregs, state);
        convert::debugregs_into(&self.debug, state);
        if convert::events_into(&events, state) {
            attention.raise(Attention::NMI);
        }
        if state.cr4 & cr4::OSXSAVE != 0 {
            self.xcr0 = self.fetch_xcr0(vcpu)?;
            state.xcr0 = self.xcr0;
        }
        self.xsave.get(vcpu, state)?;
        self.msrs.get(vcpu, &mut state.msrs)?;
        if pae_paging(state) {
            // DEVIATION: KVM's interface for registers does not give the PDPTE registers. They are read from memory
            // again, which differs only if the guest has changed them there without loading CR3.
            let mut bytes = [0; 32];
            cpu.memory().read(cpu.state.cr3 & 0xffff_ffe0, &mut bytes);
            for (to, from) in cpu.state.pdptes.iter_mut().zip(bytes.chunks_exact(8)) {
                *to = from.try_into().map_or(0, u64::from_le_bytes);
            }
        }
        Ok(())
    }

    /// Makes KVM flush the guest's TLB: a change of CR0.WP, taken back by the next `move_in`.
    pub(super) fn flush_tlb(&mut self, vcpu: &VcpuFd) -> Result<(), EngineError> {
        if self.sregs.cr0 & cr0::PG == 0 {
            return Ok(());
        }
        self.sregs.cr0 ^= cr0::WP;
        vcpu.set_sregs(&self.sregs).map_err(failed("flushing the guest's TLB"))
    }
}
