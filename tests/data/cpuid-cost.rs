//! What one CPUID costs, measured from ring 3 of a Linux guest: `cpuid-cost COUNT` executes it COUNT times and prints
//! two lines, the mean in time-stamp counter cycles and in nanoseconds of the guest's clock:
//!
//! ```text
//! tsc 2600
//! ns 812
//! ```
//!
//! CPUID always leaves a VMX guest, and a hypervisor has next to nothing to do for it, so this is the price of an
//! exit. A static program without a C library, built by scripts/fetch-images with a bare call of rustc.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm, x86_64};

// The kernel enters with argc and argv on the stack.
global_asm!(".globl _start", "_start: mov rdi, rsp", "and rsp, -16", "call {main}", "ud2", main = sym main);

const WRITE: usize = 1;
const CLOCK_GETTIME: usize = 228;
const EXIT_GROUP: usize = 231;
const CLOCK_MONOTONIC: usize = 1;
const NANOSECONDS: u64 = 1_000_000_000;
const DEFAULT_COUNT: u64 = 1000;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    exit(101)
}

/// Named by the tables of the precompiled `core`; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

extern "C" fn main(stack: *const usize) -> ! {
    // SAFETY: the kernel put argc here, and behind it argc pointers to strings that end in 0.
    let count = unsafe { if *stack > 1 { parse(*stack.add(2) as *const u8) } else { DEFAULT_COUNT } };
    if count == 0 {
        exit(2);
    }
    // The first ones find cold caches and tables not yet filled, at every level.
    execute(count / 10 + 1);
    let (time, cycles) = (nanoseconds(), cycle_counter());
    execute(count);
    let (cycles, time) = (cycle_counter() - cycles, nanoseconds() - time);
    print("tsc ", cycles / count);
    print("ns ", time / count);
    exit(0)
}

fn execute(count: u64) {
    for _ in 0..count {
        core::hint::black_box(x86_64::__cpuid(0));
    }
}

fn cycle_counter() -> u64 {
    // SAFETY: every x86-64 CPU has a time-stamp counter, and Linux lets ring 3 read it.
    unsafe { x86_64::_rdtsc() }
}

fn nanoseconds() -> u64 {
    let mut time = [0u64; 2];
    // SAFETY: the kernel writes two words there.
    unsafe { system_call(CLOCK_GETTIME, CLOCK_MONOTONIC, (&raw mut time) as usize, 0) };
    time[0] * NANOSECONDS + time[1]
}

/// The decimal number at the start of a string that ends in 0.
///
/// # Safety
/// `text` points to such a string.
unsafe fn parse(text: *const u8) -> u64 {
    let mut value = 0u64;
    for at in 0.. {
        // SAFETY: no byte before this one was the end.
        match unsafe { *text.add(at) } {
            digit @ b'0'..=b'9' => value = value.wrapping_mul(10).wrapping_add(u64::from(digit - b'0')),
            _ => break,
        }
    }
    value
}

fn print(label: &str, mut value: u64) {
    let mut digits = [b'\n'; 21];
    let mut at = digits.len() - 1;
    loop {
        at -= 1;
        digits[at] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    write(label.as_bytes());
    write(&digits[at..]);
}

fn write(bytes: &[u8]) {
    // SAFETY: the kernel only reads the bytes.
    unsafe { system_call(WRITE, 1, bytes.as_ptr() as usize, bytes.len()) };
}

fn exit(code: usize) -> ! {
    // SAFETY: does not come back.
    unsafe { system_call(EXIT_GROUP, code, 0, 0) };
    loop {}
}

/// # Safety
/// What the arguments point to must be as the call wants it.
unsafe fn system_call(number: usize, first: usize, second: usize, third: usize) -> usize {
    let result;
    // SAFETY: the caller vouches for the arguments; the kernel changes rax, rcx and r11 only.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") first, in("rsi") second, in("rdx") third,
             lateout("rcx") _, lateout("r11") _);
    }
    result
}
