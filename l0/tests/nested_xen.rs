//! Xen as guest hypervisor, end to end: Debian's Xen is L1, Debian's kernel is its paravirtual dom0, and Debian's xl in it
//! starts domUs that boot Debian's cloud kernel as L2. `scripts/nested-xen` makes the images and runs it; its exit code is 0
//! only if every level did what was asked.

mod nested_script;

use nested_script::{NestedScript, assert_lines};

const NESTED_XEN: NestedScript = NestedScript {
    name: "nested-xen",
    fetch_option: "--xen",
    images: &["xen/dom0-kernel", "xen/hypervisor", "xen.img", "initrd-dom0.gz"],
};

#[test]
fn debian_xen_boots_a_pvh_domu_to_a_prompt() {
    let Some(console) = NESTED_XEN.run(&[]) else { return };
    assert_lines(
        &console,
        &[
            "(XEN)  - Extended Page Tables (EPT)",
            "(XEN)  - Virtual-Processor Identifiers (VPID)",
            "(XEN)  - Unrestricted Guest",
            "(XEN)  - Virtual Interrupt Delivery",
            "(XEN) HVM: VMX enabled",
            "(XEN) HVM: Hardware Assisted Paging (HAP) detected",
            "L1: Xen 4.",
            "L2: turtles: init reached",
            "L2: turtles# Linux",
            "L2: turtles: done",
            "L1: L2 done",
            "turtles: done",
        ],
    );
}
