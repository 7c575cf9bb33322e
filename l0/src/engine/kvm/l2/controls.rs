//! Whether L2's ring 3 may run on KVM under L1's controls: see the table in the module's documentation.

use turtles_cpu::vmx::Controls;
use x86defs::vmx::{primary, secondary};

/// Primary controls that KVM does not let us honour in ring 3, or under which something is due at once.
const PRIMARY: &[(u32, &str)] = &[
    (primary::MONITOR_TRAP_FLAG, "monitor trap flag"),
    (primary::PAUSE_EXITING, "PAUSE exiting"),
    (primary::INTERRUPT_WINDOW_EXITING, "interrupt-window exiting"),
    (primary::NMI_WINDOW_EXITING, "NMI-window exiting"),
];
/// The same of the secondary ones.
const SECONDARY: &[(u32, &str)] =
    &[(secondary::RDRAND_EXITING, "RDRAND exiting"), (secondary::RDSEED_EXITING, "RDSEED exiting")];

/// The control for which L2 has to run in the software CPU, if there is one.
pub(super) fn forbids(controls: &Controls) -> Option<&'static str> {
    if !controls.ept() {
        return Some("no EPT: L2's memory is L1's, by L1's page tables");
    }
    if controls.pending_mtf {
        return Some("an MTF VM exit is pending");
    }
    let primary = PRIMARY.iter().find(|(bit, _)| controls.has_primary(*bit));
    let secondary = SECONDARY.iter().find(|(bit, _)| controls.has_secondary(*bit));
    primary.or(secondary).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stock_kvm_as_l1_runs_its_l2s_ring_3_on_kvm() {
        // What Linux 6.12's kvm_intel asks for while L2 runs, with EPT and without APIC virtualization.
        let mut controls = Controls {
            pin: 0x3f,
            primary: primary::USE_TSC_OFFSETTING
                | primary::HLT_EXITING
                | primary::MWAIT_EXITING
                | primary::RDPMC_EXITING
                | primary::MOV_DR_EXITING
                | primary::UNCONDITIONAL_IO_EXITING
                | primary::USE_MSR_BITMAPS
                | primary::MONITOR_EXITING
                | primary::USE_TPR_SHADOW
                | primary::ACTIVATE_SECONDARY,
            secondary: secondary::ENABLE_EPT
                | secondary::ENABLE_VPID
                | secondary::UNRESTRICTED_GUEST
                | secondary::PAUSE_LOOP_EXITING
                | secondary::WBINVD_EXITING
                | secondary::ENABLE_RDTSCP,
            ..Controls::default()
        };
        assert_eq!(forbids(&controls), None);
        controls.primary |= primary::MONITOR_TRAP_FLAG;
        assert_eq!(forbids(&controls), Some("monitor trap flag"));
        controls.primary = 0;
        controls.secondary = 0;
        assert!(forbids(&controls).is_some());
    }
}
