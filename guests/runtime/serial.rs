//! COM1, polled.

use crate::cpu::{inb, outb};
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMIT_EMPTY: u8 = 0x20;

/// Held while one CPU writes a line.
static BUSY: AtomicBool = AtomicBool::new(false);

struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

fn put(byte: u8) {
    while inb(LINE_STATUS) & TRANSMIT_EMPTY == 0 {}
    outb(COM1, byte);
}

/// Writes formatted text; lines from several CPUs do not mix.
pub fn print(text: fmt::Arguments) {
    while BUSY.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    let _ = fmt::Write::write_fmt(&mut Console, text);
    BUSY.store(false, Ordering::Release);
}

/// For the last words of a CPU that may hold the lock itself.
pub fn print_unlocked(text: fmt::Arguments) {
    let _ = fmt::Write::write_fmt(&mut Console, text);
}

/// Prints a line on COM1.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => { $crate::serial::print(format_args!("{}\n", format_args!($($arg)*))) };
}
