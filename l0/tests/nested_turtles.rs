//! Turtles on turtles: the KVM engine on a stock kvm_intel, which is Debian's in Debian's kernel on the software CPU. What
//! the embedded guests say, a hypervisor among them, is judged by `scripts/nested-turtles`, whose exit code is 0 only if
//! nothing failed but what is listed as KVM's own (tests/data/kvm-deviations).

mod nested_script;

use nested_script::{NestedScript, assert_lines};

const NESTED_TURTLES: NestedScript = NestedScript {
    name: "nested-turtles",
    fetch_option: "--kvm",
    images: &["vmlinuz-cloud", "kvm.img", "initrd-kvm.gz"],
};

#[test]
fn kvm_without_nesting_runs_hypervisors_and_linux() {
    let Some(console) = NESTED_TURTLES.run(&["doctor", "guests", "linux"]) else { return };
    assert_lines(
        &console,
        &[
            "L1: kvm_intel loaded, ept=Y unrestricted_guest=Y vpid=Y enable_apicv=Y nested=N",
            "L2:   VMX instructions of a guest hypervisor reach us by breakpoints on its #UD and #GP handlers.",
            "L2: Engine that --engine auto picks: kvm",
            "L2: turtles# Linux",
            "nested-turtles: all done",
        ],
    );
}

#[test]
fn kvm_with_nesting_leaves_vmx_to_us_and_hops_show_nowhere() {
    let arguments = [
        "--kvm",
        "nested=1",
        "judged turtles demo --engine kvm hatchling",
        "judged turtles demo --engine kvm,hop hatchling faults paging smc syscalls xstate",
    ];
    let Some(console) = NESTED_TURTLES.run(&arguments) else { return };
    assert_lines(&console, &["nested-turtles: all done"]);
    assert!(console.contains("nested=Y"), "kvm_intel took no nested=1:\n{console}");
}
