//! What the CPU asks of its owner while an instruction is under way: everything outside RAM and outside the CPU.
//!
//! These are the exits that must be answered before the instruction can go on, so they are calls rather than
//! returns from [`crate::Cpu::run`]: an instruction with two device accesses (`movs` from MMIO to MMIO) needs no
//! replay. The KVM engine answers KVM's exits through the same trait.

/// An owner-held MSR was refused: the instruction raises #GP(0).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MsrRefused;

/// The owner of a vCPU.
pub trait Bus: Send {
    /// A read of physical memory that is not RAM.
    fn mmio_read(&mut self, address: u64, data: &mut [u8]);
    /// A write to physical memory that is not RAM.
    fn mmio_write(&mut self, address: u64, data: &[u8]);
    /// IN.
    fn port_read(&mut self, port: u16, data: &mut [u8]);
    /// OUT.
    fn port_write(&mut self, port: u16, data: &[u8]);
    /// RDMSR of an MSR that the CPU does not hold itself.
    fn read_msr(&mut self, msr: u32) -> Result<u64, MsrRefused>;
    /// WRMSR of an MSR that the CPU does not hold itself.
    fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), MsrRefused>;
    /// The task-priority register as CR8 shows it (0 to 15).
    fn cr8(&mut self) -> u8;
    /// MOV to CR8.
    fn set_cr8(&mut self, value: u8);
    /// Takes the interrupt to deliver now, if there still is one (the interrupt-acknowledge cycle).
    fn acknowledge_interrupt(&mut self) -> Option<u8>;
    /// The clock behind the TSC, the vCPU having executed for `ticks` ([`crate::state::CpuState::ticks`]).
    fn tsc(&mut self, ticks: u64) -> u64;
    /// Random bits for RDRAND and RDSEED; none makes them report failure (CF = 0).
    fn random(&mut self) -> Option<u64> {
        None
    }
    /// Called before every other call: the vCPU has executed for `ticks`. For owners whose clock counts them.
    fn at(&mut self, _ticks: u64) {}
    /// CPUID, when the owner wants to answer it itself.
    fn cpuid(&mut self, _leaf: u32, _subleaf: u32) -> Option<[u32; 4]> {
        None
    }
}
