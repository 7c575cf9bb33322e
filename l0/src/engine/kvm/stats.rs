//! What happened between us and KVM.

use std::fmt;

/// Counters that add up over vCPUs, each with the words `--stats` has for it.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident $words:literal,)*) => {
        /// What happened, for `--stats` and tests.
        #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl std::ops::AddAssign for Stats {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)*
            }
        }

        impl fmt::Display for Stats {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let all = [$((self.$name, $words),)*];
                for (count, words) in all.into_iter().filter(|(count, _)| *count > 0) {
                    writeln!(f, "  {words:<52}{count:>12}")?;
                }
                Ok(())
            }
        }
    };
}

counters! {
    /// Entries into KVM_RUN.
    runs "entries into KVM_RUN",
    /// Exits for I/O ports.
    io "exits for I/O ports",
    /// Exits for physical memory that is not RAM.
    mmio "exits for memory-mapped I/O",
    /// Exits for MSRs that the vCPU's owner answered.
    owner_msrs "exits for the local APIC's MSRs",
    /// Exits for MSRs that the software CPU answered.
    cpu_msrs "exits for other MSRs",
    /// HLT.
    halts "HLT",
    /// External interrupts delivered through KVM.
    interrupts "external interrupts delivered through KVM",
    /// Exits because interrupts could be taken.
    interrupt_windows "exits for interrupt windows",
    /// KVM_RUN ended by a signal.
    kicks "KVM_RUN ended by a signal",
    /// Instructions KVM could not emulate.
    emulation_failures "instructions that KVM could not emulate",
    /// Accesses KVM could not make (EFAULT).
    memory_failures "accesses that KVM could not make",
    /// Entries the processor refused.
    entry_failures "entries that the processor refused",
    /// Runs at the same instruction from signal to signal.
    stuck "runs that stayed at one instruction",
    /// VMX instructions, and MOV to CR4, that came by a breakpoint on their exception's handler.
    vmx_instructions "VMX instructions of L1 by a breakpoint",
    /// The same breakpoints for exceptions that are the guest's.
    handlers_entered "breakpoints for L1's own exceptions",
    /// VMCALL.
    hypercalls "VMCALL",
    /// Hops to the software CPU and back, and instructions completed there.
    bursts "runs of the software CPU",
    /// See above.
    software_instructions "instructions of the software CPU",
    /// Stretches of ring 3 that KVM executed alone ([`super::Share::User`]), and their host time in µs.
    user_stretches "stretches of ring 3 on KVM",
    /// See above.
    user_micros "microseconds of them",
    /// The same of guests' guests, which are VMs of their own.
    l2_stretches "stretches of L2's ring 3 on KVM",
    /// See above.
    l2_micros "microseconds of them",
    /// Stretches that ended at memory which was not there yet.
    l2_misses "of them ended by memory not met before",
    /// KVM VMs made for them.
    l2_guests "KVM virtual machines for L2",
    /// State moved into KVM.
    moved_in "vCPU state moved into KVM",
    /// State moved out.
    moved_out "vCPU state moved out of KVM",
}
