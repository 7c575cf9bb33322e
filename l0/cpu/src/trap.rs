//! Why an instruction did not complete.
//!
//! Faults are ordinary values. `Trap` is one byte so that `Result<u64, Trap>` travels in two registers; the
//! details of a fault wait in [`crate::Cpu::fault`].

use x86defs::vector;

/// The instruction did not complete (or must be looked at before the next one).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Trap {
    /// An exception: details in `Cpu::fault`. RIP stays at the instruction.
    Fault = 1,
    /// Stop after part of a repeated instruction, all registers up to date: RIP stays at the instruction, which
    /// goes on when it is executed again.
    Again = 2,
    /// Return to the owner with `Cpu::exit`; RIP stays at the instruction.
    Exit = 3,
}

/// Result of executing part of an instruction.
pub type Exec<T = ()> = Result<T, Trap>;

/// A hardware exception as an instruction raised it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Fault {
    pub vector: u8,
    pub error_code: Option<u32>,
    /// The address that goes to CR2 (page faults).
    pub address: u64,
}

impl Fault {
    /// A fault without error code.
    pub fn plain(vector: u8) -> Self {
        Self { vector, error_code: None, address: 0 }
    }

    /// A fault with an error code.
    pub fn with_code(vector: u8, code: u32) -> Self {
        Self { vector, error_code: Some(code), address: 0 }
    }

    /// #GP(`code`).
    pub fn gp(code: u32) -> Self {
        Self::with_code(vector::GP, code)
    }

    /// #UD.
    pub fn ud() -> Self {
        Self::plain(vector::UD)
    }

    /// #PF.
    pub fn page(address: u64, code: u32) -> Self {
        Self { vector: vector::PF, error_code: Some(code), address }
    }
}
