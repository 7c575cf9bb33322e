//! The report protocol: one line a case, a sum at the end, and the debug-exit port.

use crate::cpu::outb;
use crate::println;
use crate::trap::Fault;
use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

const EXIT_PORT: u16 = 0xf4;
const ALL_PASSED: u8 = 0x10;
const SOME_FAILED: u8 = 0x11;

static PASSED: AtomicU32 = AtomicU32::new(0);
static FAILED: AtomicU32 = AtomicU32::new(0);

/// Reports a case that held.
pub fn pass(name: &str) {
    PASSED.fetch_add(1, Ordering::Relaxed);
    println!("PASS {name}");
}

/// Reports a case that did not hold, and why.
pub fn fail(name: &str, why: fmt::Arguments) {
    FAILED.fetch_add(1, Ordering::Relaxed);
    println!("FAIL {name}: {why}");
}

/// Reports a case that needs a feature which CPUID does not show.
pub fn skip(name: &str, feature: &str) {
    println!("SKIP {name}: no {feature}");
}

/// Ends the run with the sum of all cases.
pub fn finish() -> ! {
    let failed = FAILED.load(Ordering::Relaxed);
    println!("DONE {} {failed}", PASSED.load(Ordering::Relaxed));
    leave(if failed == 0 { ALL_PASSED } else { SOME_FAILED })
}

/// Ends the run at once: the program itself went wrong.
pub fn abort(why: fmt::Arguments) -> ! {
    crate::serial::print_unlocked(format_args!("FAIL guest stopped: {why}\n"));
    crate::serial::print_unlocked(format_args!(
        "DONE {} {}\n",
        PASSED.load(Ordering::Relaxed),
        FAILED.load(Ordering::Relaxed) + 1
    ));
    leave(SOME_FAILED)
}

fn leave(value: u8) -> ! {
    outb(EXIT_PORT, value);
    loop {
        crate::cpu::cli();
        crate::cpu::hlt();
    }
}

/// Passes when the two values are equal.
pub fn equal<T: PartialEq + fmt::LowerHex>(name: &str, found: T, wanted: T) {
    if found == wanted { pass(name) } else { fail(name, format_args!("{found:#x}, wanted {wanted:#x}")) }
}

/// Passes when the fragment ran to its end.
pub fn ran(name: &str, fault: &Option<Fault>) {
    match fault {
        None => pass(name),
        Some(fault) => fail(name, format_args!("unexpected {fault}")),
    }
}

/// Passes when the fragment raised `vector` with `error` at byte `at` of the fragment.
pub fn faulted(name: &str, fault: &Option<Fault>, vector: u8, error: u32, at: u64) {
    match fault {
        None => fail(name, format_args!("no fault, wanted vector {vector} error {error:#x}")),
        Some(f) if f.vector == vector && f.error == error && f.at == at => pass(name),
        Some(f) => fail(name, format_args!("{f}, wanted vector {vector} error {error:#x} at +{at:#x}")),
    }
}

/// Passes on a page fault with this error code, at this address, at byte `at` of the fragment.
pub fn page_faulted(name: &str, fault: &Option<Fault>, error: u32, address: u64, at: u64) {
    match fault {
        Some(f) if f.vector == 14 && f.error == error && f.at == at && f.cr2 == address => pass(name),
        Some(f) => fail(name, format_args!("{f}, wanted #PF error {error:#x} at +{at:#x}, CR2 {address:#x}")),
        None => fail(name, format_args!("no fault, wanted #PF error {error:#x}")),
    }
}

/// Passes when the condition holds; otherwise says why in the words given.
#[macro_export]
macro_rules! check {
    ($name:expr, $holds:expr, $($why:tt)+) => {
        if $holds { $crate::report::pass($name) } else { $crate::report::fail($name, format_args!($($why)+)) }
    };
}
