//! Linux's KVM as guest hypervisor, end to end: Debian's kernel with kvm_intel is L1, Debian's own QEMU in it boots the
//! same kernel as L2 to a shell prompt, and both power off. `scripts/nested-kvm` makes the images and runs it; its exit
//! code is 0 only if every level did what was asked.

mod nested_script;

use nested_script::{NestedScript, assert_lines};

const NESTED_KVM: NestedScript = NestedScript {
    name: "nested-kvm",
    fetch_option: "--kvm",
    images: &["vmlinuz-cloud", "kvm.img", "initrd-kvm.gz"],
};

#[test]
fn debian_kvm_boots_linux_as_l2_to_a_prompt() {
    let Some(console) = NESTED_KVM.run(&[]) else { return };
    assert_lines(
        &console,
        &[
            "L1: kvm_intel loaded, ept=Y",
            "L2: turtles: init reached",
            "L2: turtles# Linux",
            "L2: turtles: done",
            "L1: L2 done",
            "turtles: done",
        ],
    );
}

#[test]
fn l2_on_shadow_paging_keeps_its_disk_clean() {
    let Some(console) = NESTED_KVM.run(&["--l1-options", "ept=0", "--l2-disk", "--machine", "microvm"])
    else {
        return;
    };
    assert_lines(
        &console,
        &[
            "L1: kvm_intel loaded, ept=N",
            "L2: turtles: end disk",
            "L1: L2 done",
            "nested-kvm: L2's disk is clean",
        ],
    );
}
