//! Whose is an exit of L2? The rules are `vmcs_shadow::exit_policy`'s; here is what they need to know.

use turtles_cpu::Cpu;
use turtles_cpu::phys::PhysMemory;
use turtles_cpu::state::reg;
use turtles_cpu::vmx::VmExit;
use vmcs_shadow::exit_policy::{Bitmaps, ExitFacts, Handler, route};
use vmcs_shadow::{Field, Vmcs};
use x86defs::vmx::reason;

/// Routes the CPU's last exit.
pub fn handler(cpu: &Cpu, vmcs12: &Vmcs) -> Handler {
    let exit = &cpu.vmx.exit;
    // The CPU's walker has asked EPT02, and EPT02 EPT12: what comes out as an exit is what EPT12 does not allow.
    if matches!(exit.reason, reason::EPT_VIOLATION | reason::EPT_MISCONFIGURATION) {
        return Handler::L1;
    }
    let facts = ExitFacts {
        reason: exit.reason,
        qualification: exit.qualification,
        interruption: exit.interruption,
        interruption_error: exit.interruption_error,
        operand: operand(cpu, exit),
    };
    route(&facts, vmcs12, &L1Bitmaps { memory: cpu.memory(), vmcs12 })
}

/// What the exiting instruction was given.
fn operand(cpu: &Cpu, exit: &VmExit) -> u64 {
    let gpr = |index: u64| cpu.state.gpr.get(index as usize & 15);
    match exit.reason {
        reason::CR_ACCESS => gpr(exit.qualification >> 8),
        reason::RDMSR | reason::WRMSR => gpr(reg::RCX as u64),
        // The second register of the instruction information holds the field's encoding.
        reason::VMREAD | reason::VMWRITE => gpr(u64::from(exit.instruction_information >> 28)),
        reason::XSAVES | reason::XRSTORS => {
            (gpr(reg::RDX as u64) << 32 | gpr(reg::RAX as u64) & 0xffff_ffff) & cpu.state.msrs.xss
        }
        _ => 0,
    }
}

/// L1's bitmaps, in its memory.
struct L1Bitmaps<'a> {
    memory: &'a PhysMemory,
    vmcs12: &'a Vmcs,
}

impl L1Bitmaps<'_> {
    fn bit(&self, bitmap: Field, offset: u64, number: u32) -> bool {
        let mut byte = [0];
        let at = self.vmcs12.get(bitmap).wrapping_add(offset + u64::from(number / 8));
        self.memory.read(at, &mut byte);
        byte[0] >> (number % 8) & 1 != 0
    }

    /// The page has four bitmaps of 1 KiB: reads of low and of high MSRs, writes of low and of high ones.
    fn msr(&self, index: u32, write: bool) -> bool {
        let high = u64::from(index >= 0xc000_0000);
        let offset = (2 * u64::from(write) + high) * 1024;
        self.bit(Field::MsrBitmap, offset, index & 0x1fff)
    }
}

impl Bitmaps for L1Bitmaps<'_> {
    fn io(&self, port: u16) -> bool {
        let bitmap = if port & 0x8000 == 0 { Field::IoBitmapA } else { Field::IoBitmapB };
        self.bit(bitmap, 0, u32::from(port & 0x7fff))
    }

    fn msr_read(&self, index: u32) -> bool {
        self.msr(index, false)
    }

    fn msr_write(&self, index: u32) -> bool {
        self.msr(index, true)
    }

    fn vmread(&self, encoding: u16) -> bool {
        self.bit(Field::VmreadBitmap, 0, u32::from(encoding))
    }

    fn vmwrite(&self, encoding: u16) -> bool {
        self.bit(Field::VmwriteBitmap, 0, u32::from(encoding))
    }
}
