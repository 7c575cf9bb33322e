//! CPUID feature bits, as `(leaf, subleaf, register, bit)` with the names QEMU's `-cpu` option uses.

/// An output register of CPUID.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
