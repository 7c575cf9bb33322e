//! Small bare-metal programs, embedded as bytes, that test and demonstrate a virtual machine from inside.
//!
//! Each [`Guest`] is a 64-bit ELF with a PVH entry note and a Multiboot 1 header; both lead to the same 32-bit
//! entry. A program sets up long mode for itself, runs its cases and reports on COM1, one line each:
//!
//! ```text
//! PASS name
//! FAIL name: why
//! SKIP name: no FEATURE
//! DONE passed failed
//! ```
//!
//! Then it writes [`ALL_PASSED`] or [`SOME_FAILED`] to the debug-exit port 0xf4, which ends the machine with the
//! exit code `(value << 1) | 1`, as QEMU's isa-debug-exit does. Guests need [`MIN_MEMORY`] of RAM from address 0,
//! COM1, and what their description names; nothing else. They know nothing of who runs them.

#![forbid(unsafe_code)]

/// A bare-metal program and what it shows.
#[derive(Debug, Clone, Copy)]
pub struct Guest {
    /// Short name, as in `turtles demo NAME`.
    pub name: &'static str,
    /// One line for people.
    pub what: &'static str,
    /// An ELF image: PVH and Multiboot 1.
    pub image: &'static [u8],
}

/// Every guest, sorted by name.
pub const ALL: &[Guest] = include!(concat!(env!("OUT_DIR"), "/table.rs"));

/// A 16-bit real-mode image without headers, to be loaded and entered at [`FLAT_ADDRESS`] (CS:IP 0:7c00).
/// It prints one line on COM1 and leaves through port 0xf4.
pub const FLAT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/flat.bin"));

/// Where [`FLAT`] is linked to run.
pub const FLAT_ADDRESS: u64 = 0x7c00;

/// The line [`FLAT`] prints.
pub const FLAT_OUTPUT: &str = "PASS real mode\r\nDONE 1 0\r\n";

/// RAM that every guest can count on.
pub const MIN_MEMORY: u64 = 32 << 20;

/// The port that ends a run.
pub const EXIT_PORT: u16 = 0xf4;

/// What a guest writes to [`EXIT_PORT`] when no case failed.
pub const ALL_PASSED: u8 = 0x10;

/// What a guest writes to [`EXIT_PORT`] when a case failed.
pub const SOME_FAILED: u8 = 0x11;

/// The process exit code that stands for a value written to [`EXIT_PORT`].
pub const fn exit_code(value: u8) -> u8 {
    value << 1 | 1
}

/// Looks a guest up by its name.
pub fn by_name(name: &str) -> Option<&'static Guest> {
    ALL.iter().find(|guest| guest.name == name)
}

#[cfg(test)]
mod tests;
