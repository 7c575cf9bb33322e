//! Segment descriptors and access rights.
//!
//! Access rights are kept in the format of the VMCS ("Format of Access Rights"): descriptor bytes 5 and 6,
//! with bit 16 for an unusable register.

/// Type field (bits 3:0) of a code or data segment.
pub const TYPE: u32 = 0xf;
pub const ACCESSED: u32 = 1 << 0;
/// Data: writable. Code: readable.
pub const WRITABLE: u32 = 1 << 1;
pub const READABLE: u32 = 1 << 1;
/// Data: expand-down. Code: conforming.
pub const EXPAND_DOWN: u32 = 1 << 2;
pub const CONFORMING: u32 = 1 << 2;
pub const CODE: u32 = 1 << 3;
/// Code or data (clear: system).
pub const S: u32 = 1 << 4;
pub const DPL_SHIFT: u32 = 5;
pub const PRESENT: u32 = 1 << 7;
pub const AVL: u32 = 1 << 12;
/// 64-bit code.
pub const L: u32 = 1 << 13;
/// Default operand size / stack size / upper bound.
pub const DB: u32 = 1 << 14;
/// Limit counts 4-KByte units.
pub const G: u32 = 1 << 15;
/// The register holds no segment (VMX's name for a null selector).
pub const UNUSABLE: u32 = 1 << 16;

/// System-segment and gate types (S = 0).
pub mod system {
    pub const TSS16_AVAILABLE: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS16_BUSY: u32 = 3;
    pub const CALL_GATE16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INTERRUPT_GATE16: u32 = 6;
    pub const TRAP_GATE16: u32 = 7;
    pub const TSS_AVAILABLE: u32 = 9;
    pub const TSS_BUSY: u32 = 11;
    pub const CALL_GATE: u32 = 12;
    pub const INTERRUPT_GATE: u32 = 14;
    pub const TRAP_GATE: u32 = 15;
}

/// Selector bits.
pub const SELECTOR_TI: u16 = 4;
pub const SELECTOR_RPL: u16 = 3;
