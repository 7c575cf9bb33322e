//! Which exits this KVM gives us that its documentation does not decide, tried in a throw-away VM.

use kvm_bindings as kb;
use kvm_ioctls::VcpuExit;
use x86defs::{dr, msr, vector};

use super::probe::Probe;
use super::vm::take_msrs;
use super::{KvmHost, failed};
use crate::engine::EngineError;

/// Places in the probe's memory that its measuring leaves alone.
const HANDLER: u64 = 0x5000;
const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;

/// How a guest hypervisor's VMX instructions reach us.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum VmxReach {
    /// KVM's emulator gives up at them.
    Emulator,
    /// A breakpoint on the guest's handler of the exception that they raise.
    Breakpoint,
    /// Not at all.
    Nothing,
}

/// What was tried.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Exits {
    /// See there.
    pub vmx: VmxReach,
    /// WRMSR of IA32_TSC_DEADLINE reaches us. Some kernels (Linux 6.1 among them) drop it where the VMX-preemption timer
    /// is there for KVM's own APIC timer, though KVM's APIC is not in use and the MSR filter gives the MSR to us.
    pub tsc_deadline: bool,
}

impl Probe {
    /// `vmptrst [rsp]`, with a handler of #UD that halts and a breakpoint on it.
    fn vmx_reach(&mut self) -> Result<VmxReach, EngineError> {
        let mut gate = [0; 16];
        gate[..2].copy_from_slice(&(HANDLER as u16).to_le_bytes());
        // Selector 8; a present interrupt gate of 64-bit mode.
        gate[2] = 8;
        gate[5] = 0x8e;
        self.put(IDT + 16 * u64::from(vector::UD), &gate)?;
        // Flat code for 64-bit mode.
        self.put(GDT + 8, &[0xff, 0xff, 0, 0, 0, 0x9b, 0xaf, 0])?;
        self.put(HANDLER, &[0xf4])?;
        let mut sregs = self.vcpu.get_sregs().map_err(failed("reading system registers"))?;
        sregs.idt = kb::kvm_dtable { base: IDT, limit: 0xfff, padding: [0; 3] };
        sregs.gdt = kb::kvm_dtable { base: GDT, limit: 15, padding: [0; 3] };
        self.vcpu.set_sregs(&sregs).map_err(failed("writing system registers"))?;
        let mut debug = kb::kvm_guest_debug {
            control: kb::KVM_GUESTDBG_ENABLE | kb::KVM_GUESTDBG_USE_HW_BP,
            ..Default::default()
        };
        debug.arch.debugreg[0] = HANDLER;
        debug.arch.debugreg[7] = dr::DR7_FIXED_1 | dr::DR7_GE | 2;
        if self.vcpu.set_guest_debug(&debug).is_err() {
            return Ok(VmxReach::Nothing);
        }
        self.load(&[0x0f, 0xc7, 0x3c, 0x24, 0xf4], 0)?;
        Ok(match self.vcpu.run() {
            Ok(VcpuExit::Debug(debug)) if debug.pc == HANDLER => VmxReach::Breakpoint,
            Ok(VcpuExit::InternalError) => VmxReach::Emulator,
            Ok(_) | Err(_) => VmxReach::Nothing,
        })
    }

    /// `mov ecx,IA32_TSC_DEADLINE; wrmsr; hlt` under our MSR filter.
    fn tsc_deadline(&mut self) -> Result<bool, EngineError> {
        take_msrs(&self.vm)?;
        let [a, b, c, d] = msr::IA32_TSC_DEADLINE.to_le_bytes();
        self.load(&[0xb9, a, b, c, d, 0x0f, 0x30, 0xf4], 1)?;
        Ok(matches!(self.vcpu.run(), Ok(VcpuExit::X86Wrmsr(_))))
    }
}

impl KvmHost {
    /// Tries them.
    pub(super) fn try_exits(&self) -> Result<Exits, EngineError> {
        Ok(Exits {
            tsc_deadline: Probe::new(&self.kvm)?.tsc_deadline()?,
            vmx: Probe::new(&self.kvm)?.vmx_reach()?,
        })
    }
}
