//! Says hello from long mode: the mode, the CPU's name, the clock.
#![no_std]
#![no_main]

use rt::cpu::{self, cpuid};
use rt::{check, println, report};

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    println!("Hello from a bare-metal guest in 64-bit mode.");
    print_identity();

    let (cr0, cr4, efer) = (cpu::cr0(), cpu::cr4(), cpu::rdmsr(cpu::MSR_EFER));
    println!("CR0 {cr0:#x}  CR3 {:#x}  CR4 {cr4:#x}  EFER {efer:#x}", cpu::cr3());
    check!("protected mode with paging", cr0 & 0x8000_0001 == 0x8000_0001, "CR0 {cr0:#x}");
    check!("long mode is active", efer & 0x500 == 0x500, "EFER {efer:#x}");

    let first = cpu::tsc();
    let second = cpu::tsc();
    check!("the time-stamp counter advances", second > first, "{first} then {second}");
    report::equal("a breakpoint reaches its handler", breakpoint_vector(), 3);
}

fn print_identity() {
    let vendor = cpuid(0, 0);
    let mut name = [0u8; 12];
    for (part, value) in name.chunks_mut(4).zip([vendor.ebx, vendor.edx, vendor.ecx]) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    println!("CPU vendor: {}", text(&name));

    let mut brand = [0u8; 48];
    for (i, part) in brand.chunks_mut(16).enumerate() {
        let leaf = cpuid(0x8000_0002 + i as u32, 0);
        for (word, value) in part.chunks_mut(4).zip([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    println!("CPU brand:  {}", text(&brand));

    let version = cpuid(1, 0);
    println!(
        "signature {:#x}, APIC ID {}, {} physical address bits",
        version.eax,
        version.ebx >> 24,
        cpu::physical_bits()
    );
}

/// Printable text up to the first zero.
fn text(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    core::str::from_utf8(&bytes[..end]).unwrap_or("?").trim()
}

fn breakpoint_vector() -> u8 {
    rt::probe!(["int3"]).map_or(255, |fault| fault.vector)
}
