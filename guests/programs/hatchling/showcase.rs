//! The end: an L2 that does nothing but CPUID, and what that costs at each level.

use rt::cpu::tsc;
use rt::vmx::control::{ENABLE_EPT, ENABLE_VPID};
use rt::vmx::ept::Ept;
use rt::vmx::{Vm, field as f, reason, vmwrite};
use rt::{check, l2, println};

const EXITS: u64 = 10_000;

pub fn all() {
    let mut vm = Vm::fresh(l2!(["2:", "cpuid", "dec rsi", "jnz 2b"]));
    let ept = vm.set(&[ENABLE_EPT]);
    if ept {
        vmwrite(f::EPT_POINTER, Ept::identity().pointer());
    }
    if vm.set(&[ENABLE_VPID]) {
        vmwrite(f::VPID, 1);
    }
    vm.regs.rsi = EXITS;
    let start = tsc();
    let mut exits = 0;
    let last = loop {
        let exit = vm.run();
        if exit.reason != reason::CPUID {
            break exit;
        }
        exits += 1;
        vm.skip();
    };
    let nested = (tsc() - start) / exits.max(1);
    let right = exits == EXITS && last.reason == reason::VMCALL;
    check!("L1 answers every CPUID of L2", right, "{exits} of {EXITS}, then {last}");
    println!(
        "levels: L0 runs this hypervisor (L1), which has run a guest of its own (L2){}",
        if ept { ", on EPT" } else { "" }
    );
    println!("CPUID of L2: {exits} exits, {nested} TSC ticks for exit, answer and entry");
    println!("CPUID of L1: {} TSC ticks", direct());
}

fn direct() -> u64 {
    let start = tsc();
    for _ in 0..EXITS {
        core::hint::black_box(rt::cpu::cpuid(0, 0).eax);
    }
    (tsc() - start) / EXITS
}
