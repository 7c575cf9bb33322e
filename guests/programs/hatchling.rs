//! A tiny hypervisor of our own: every VMX instruction, VM-entry check, exit and injection, one case each.
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
#[path = "hatchling/simple_exits.rs"]
mod simple_exits;
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
}
