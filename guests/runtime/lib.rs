//! What every guest program stands on: the entry, the console, reports, traps, page tables, APIC, CPUs.
//!
//! A guest program owns its machine: no other code runs on it, and every address below 4 GiB is mapped. So the
//! wrappers for privileged instructions are safe functions here, although most of them can break memory safety:
//! marking each call site `unsafe` would say nothing about it that the module's name does not say. Raw memory and
//! inline assembly stay `unsafe`, inside the runtime where possible.
//!
//! Invariants: everything before `guest_main` runs on the boot CPU; traps of CPU 0 are recorded for [`probe!`],
//! other CPUs must not trap; no allocation.
#![no_std]

pub mod apic;
mod builtins;
pub mod cpu;
mod entry;
pub mod legacy;
pub mod mem;
pub mod paging;
pub mod pic;
pub mod protected;
pub mod real;
pub mod report;
pub mod serial;
pub mod smp;
pub mod tables;
pub mod trap;
pub mod user;
pub mod vmx;

pub use trap::Fault;

/// Called by the entry code in long mode, on the boot stack.
#[unsafe(no_mangle)]
extern "C" fn runtime_main() -> ! {
    unsafe extern "C" {
        safe fn guest_main();
    }
    tables::load_boot_cpu();
    trap::load();
    cpu::enable_nx();
    pic::set_mask(0xffff);
    guest_main();
    report::finish()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    report::abort(format_args!("{info}"))
}
