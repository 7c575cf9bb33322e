//! A tiny hypervisor of our own: every VMX instruction, VM-entry check, exit and injection, one case each.
//!
//! It sets up VMX operation (L1), and runs code fragments as guests of its own (L2), with one case for each rule. What
//! a case expects comes from the SDM. As a second opinion, the cases were run in Bochs 3.0 built with VMX (CPU model
//! `arrow_lake`), where all hold but these, in which Bochs differs from the SDM:
//!
//! | case | Bochs |
//! | --- | --- |
//! | INVEPT, INVVPID of a bad type | looks at 32 bits of the type |
//! | VMLAUNCH and VMRESUME of a shadow VMCS | treats it like any other |
//! | VMCALL in VMX root operation | gives up |
//! | RDRAND with 16 bits | tells of 32 bits |
//! | page tables in EPT pages without write access | sets accessed flags; sets bit 1 alone of the qualification |
//! | 2 MiB EPT page with bit 12 | no misconfiguration |
//! | PML: index 0, index above 511 | the log is full for accesses that need no flag, too |
//! | #VE: EPTP index | tells 0 |
//! | external interrupt with L1's and L2's IF clear | exits once IF is set |
//! | monitor trap flag with a fault that L2 handles | may exit before the fault |
//! | HLT: interrupt and interrupt window | saves the active state; the window does not end HLT |
//! | fetch from the APIC-access page | gives up |
//! | entry: descriptor of posted interrupts | must be page-aligned |
//! | entry: IA32_DEBUGCTL, IA32_PERF_GLOBAL_CTRL, canonical RIP, pending debug exceptions, virtual NMI while blocked, exceptions in HLT, entry to SMM | takes them |
#![no_std]
#![no_main]

#[path = "hatchling/apic_access.rs"]
mod apic_access;
#[path = "hatchling/capabilities.rs"]
mod capabilities;
#[path = "hatchling/control_registers.rs"]
mod control_registers;
#[path = "hatchling/descriptor_tables.rs"]
mod descriptor_tables;
#[path = "hatchling/entry.rs"]
mod entry;
#[path = "hatchling/entry_controls.rs"]
mod entry_controls;
#[path = "hatchling/entry_guest.rs"]
mod entry_guest;
#[path = "hatchling/entry_host.rs"]
mod entry_host;
#[path = "hatchling/entry_segments.rs"]
mod entry_segments;
#[path = "hatchling/ept_faults.rs"]
mod ept_faults;
#[path = "hatchling/ept_features.rs"]
mod ept_features;
#[path = "hatchling/exceptions.rs"]
mod exceptions;
#[path = "hatchling/fields.rs"]
mod fields;
#[path = "hatchling/first.rs"]
mod first;
#[path = "hatchling/host32.rs"]
mod host32;
#[path = "hatchling/injection.rs"]
mod injection;
#[path = "hatchling/instructions.rs"]
mod instructions;
#[path = "hatchling/interrupts.rs"]
mod interrupts;
#[path = "hatchling/io_msr.rs"]
mod io_msr;
#[path = "hatchling/modes.rs"]
mod modes;
#[path = "hatchling/msr_lists.rs"]
mod msr_lists;
#[path = "hatchling/shadowing.rs"]
mod shadowing;
#[path = "hatchling/showcase.rs"]
mod showcase;
#[path = "hatchling/simple_exits.rs"]
mod simple_exits;
#[path = "hatchling/states.rs"]
mod states;
#[path = "hatchling/tasks.rs"]
mod tasks;
#[path = "hatchling/timing.rs"]
mod timing;
#[path = "hatchling/virtual_interrupts.rs"]
mod virtual_interrupts;
#[path = "hatchling/vmx_in_l2.rs"]
mod vmx_in_l2;
#[path = "hatchling/want.rs"]
mod want;

use rt::report::abort;
use rt::{user, vmx};

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    if !vmx::VMX.present() {
        capabilities::without_vmx();
        return rt::report::skip("everything about VMX", "VMX");
    }
    user::map_window();
    capabilities::before_vmxon();
    host32::all();
    match vmx::on() {
        Ok(vmxon_region) => in_vmx_operation(vmxon_region),
        Err(failure) => abort(format_args!("VMXON: {failure}")),
    }
    capabilities::after_vmxoff();
}

fn in_vmx_operation(vmxon_region: u64) {
    instructions::without_vmcs(vmxon_region);
    instructions::with_vmcs(vmxon_region);
    fields::all();
    first::all();
    simple_exits::all();
    vmx_in_l2::all();
    control_registers::all();
    io_msr::all();
    descriptor_tables::all();
    exceptions::all();
    ept_faults::all();
    ept_features::all();
    interrupts::all();
    timing::all();
    apic_access::all();
    virtual_interrupts::all();
    msr_lists::all();
    modes::all();
    entry_controls::all();
    entry_host::all();
    entry_guest::all();
    entry_segments::all();
    injection::all();
    tasks::all();
    shadowing::all();
    states::all();
    showcase::all();
}
