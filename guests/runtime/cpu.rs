//! Ports, MSRs, control and debug registers, CPUID: one small function for each instruction.

use core::arch::asm;
pub use core::arch::x86_64::CpuidResult;

pub const CR0_MP: u64 = 1 << 1;
pub const CR0_EM: u64 = 1 << 2;
pub const CR0_TS: u64 = 1 << 3;
pub const CR0_NE: u64 = 1 << 5;
pub const CR0_WP: u64 = 1 << 16;
pub const CR0_AM: u64 = 1 << 18;
pub const CR4_VME: u64 = 1 << 0;
pub const CR4_TSD: u64 = 1 << 2;
pub const CR4_DE: u64 = 1 << 3;
pub const CR4_PSE: u64 = 1 << 4;
pub const CR4_PAE: u64 = 1 << 5;
pub const CR4_PGE: u64 = 1 << 7;
pub const CR4_PCE: u64 = 1 << 8;
pub const CR4_OSFXSR: u64 = 1 << 9;
pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
pub const CR4_UMIP: u64 = 1 << 11;
pub const CR4_LA57: u64 = 1 << 12;
pub const CR4_FSGSBASE: u64 = 1 << 16;
pub const CR4_PCIDE: u64 = 1 << 17;
pub const CR4_OSXSAVE: u64 = 1 << 18;
pub const CR4_SMEP: u64 = 1 << 20;
pub const CR4_SMAP: u64 = 1 << 21;
pub const CR4_PKE: u64 = 1 << 22;

pub const MSR_TSC: u32 = 0x10;
pub const MSR_APIC_BASE: u32 = 0x1b;
pub const MSR_SYSENTER_CS: u32 = 0x174;
pub const MSR_SYSENTER_ESP: u32 = 0x175;
pub const MSR_SYSENTER_EIP: u32 = 0x176;
pub const MSR_DEBUGCTL: u32 = 0x1d9;
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
pub const MSR_XSS: u32 = 0xda0;
pub const MSR_EFER: u32 = 0xc000_0080;
pub const MSR_STAR: u32 = 0xc000_0081;
pub const MSR_LSTAR: u32 = 0xc000_0082;
pub const MSR_CSTAR: u32 = 0xc000_0083;
pub const MSR_FMASK: u32 = 0xc000_0084;
pub const MSR_FS_BASE: u32 = 0xc000_0100;
pub const MSR_GS_BASE: u32 = 0xc000_0101;
pub const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const MSR_TSC_AUX: u32 = 0xc000_0103;

pub const EFER_SCE: u64 = 1 << 0;
pub const EFER_NXE: u64 = 1 << 11;

/// Defines functions that are one instruction each.
macro_rules! instruction {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $text:literal $(($reg:tt))? [$($ops:tt)*]);* $(;)?) => {
        $($(#[$doc])* #[inline(always)] pub fn $name($($arg: $ty),*) $(-> $ret)? {
            instruction!(@body $text, ($($ret)?), $(($reg))? [$($ops)*])
        })*
    };
    (@body $text:literal, (), [$($ops:tt)*]) => {
        // SAFETY: the program owns the machine (see the crate documentation).
        unsafe { asm!($text, $($ops)*) }
    };
    (@body $text:literal, ($ret:ty), ($reg:tt) [$($ops:tt)*]) => {{
        let value: $ret;
        // SAFETY: the program owns the machine (see the crate documentation).
        unsafe { asm!($text, out($reg) value, $($ops)*) };
        value
    }};
}

instruction! {
    outb(port: u16, value: u8) = "out dx, al" [in("dx") port, in("al") value];
    outw(port: u16, value: u16) = "out dx, ax" [in("dx") port, in("ax") value];
    outl(port: u16, value: u32) = "out dx, eax" [in("dx") port, in("eax") value];
    inb(port: u16) -> u8 = "in al, dx" ("al") [in("dx") port];
    inl(port: u16) -> u32 = "in eax, dx" ("eax") [in("dx") port];
    cli() = "cli" [];
    sti() = "sti" [];
    hlt() = "hlt" [];
    /// Enables interrupts for exactly one HLT: none can slip in between.
    sti_hlt() = "sti; hlt; cli" [];
    /// Opens interrupts for a moment.
    sti_window() = "sti; nop; nop; cli" [];
    cr0() -> u64 = "mov rax, cr0" ("rax") [];
    cr2() -> u64 = "mov rax, cr2" ("rax") [];
    cr3() -> u64 = "mov rax, cr3" ("rax") [];
    cr4() -> u64 = "mov rax, cr4" ("rax") [];
    cr8() -> u64 = "mov rax, cr8" ("rax") [];
    set_cr0(value: u64) = "mov cr0, {}" [in(reg) value];
    set_cr2(value: u64) = "mov cr2, {}" [in(reg) value];
    set_cr3(value: u64) = "mov cr3, {}" [in(reg) value];
    set_cr4(value: u64) = "mov cr4, {}" [in(reg) value];
    set_cr8(value: u64) = "mov cr8, {}" [in(reg) value];
    dr6() -> u64 = "mov rax, dr6" ("rax") [];
    dr7() -> u64 = "mov rax, dr7" ("rax") [];
    set_dr0(value: u64) = "mov dr0, {}" [in(reg) value];
    set_dr1(value: u64) = "mov dr1, {}" [in(reg) value];
    set_dr2(value: u64) = "mov dr2, {}" [in(reg) value];
    set_dr3(value: u64) = "mov dr3, {}" [in(reg) value];
    set_dr6(value: u64) = "mov dr6, {}" [in(reg) value];
    set_dr7(value: u64) = "mov dr7, {}" [in(reg) value];
    invlpg(address: u64) = "invlpg [{}]" [in(reg) address];
    rflags() -> u64 = "pushfq; pop rax" ("rax") [];
    wbinvd() = "wbinvd" [];
}

/// The time-stamp counter.
#[inline(always)]
pub fn tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

#[inline(always)]
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the program owns the machine; an MSR that does not exist traps.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

#[inline(always)]
pub fn wrmsr(msr: u32, value: u64) {
    // SAFETY: the program owns the machine; an MSR that does not exist traps.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32) };
}

pub fn xgetbv(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: only called with CR4.OSXSAVE set; otherwise it traps.
    unsafe { asm!("xgetbv", in("ecx") index, out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

pub fn xsetbv(index: u32, value: u64) {
    // SAFETY: only called with CR4.OSXSAVE set; otherwise it traps.
    unsafe { asm!("xsetbv", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32) };
}

/// CPUID of a leaf, all zero beyond the last leaf of its range (Intel repeats the last basic leaf there).
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    let highest = core::arch::x86_64::__cpuid_count(leaf & 0x8000_0000, 0).eax;
    if leaf > highest {
        return CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 };
    }
    core::arch::x86_64::__cpuid_count(leaf, subleaf)
}

/// QEMU's TCG misses some checks in a way that a guest does not survive.
pub fn is_tcg() -> bool {
    core::arch::x86_64::__cpuid(0x4000_0000).ebx == u32::from_le_bytes(*b"TCGT")
}

/// Bochs gives up in a few places where a processor goes on. It shows itself if its port 0xe9 is switched on.
pub fn is_bochs() -> bool {
    inb(0xe9) == 0xe9
}

/// A feature that a case may need, and where CPUID shows it.
#[derive(Clone, Copy)]
pub struct Feature {
    pub name: &'static str,
    leaf: u32,
    subleaf: u32,
    register: Register,
    bit: u32,
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Feature {
    pub fn present(&self) -> bool {
        let leaf = cpuid(self.leaf, self.subleaf);
        let value = match self.register {
            Register::Eax => leaf.eax,
            Register::Ebx => leaf.ebx,
            Register::Ecx => leaf.ecx,
            Register::Edx => leaf.edx,
        };
        value >> self.bit & 1 != 0
    }

    /// True when present; otherwise reports the case as skipped.
    pub fn or_skip(&self, case: &str) -> bool {
        let present = self.present();
        if !present {
            crate::report::skip(case, self.name);
        }
        present
    }
}

macro_rules! features {
    ($($name:ident $text:literal $leaf:literal $sub:literal $register:ident $bit:literal;)*) => {
        $(pub const $name: Feature =
            Feature { name: $text, leaf: $leaf, subleaf: $sub, register: Register::$register, bit: $bit };)*
    };
}

features! {
    VME "VME" 1 0 Edx 1;
    DE "DE" 1 0 Edx 2;
    PSE "PSE" 1 0 Edx 3;
    SEP "SEP" 1 0 Edx 11;
    PGE "PGE" 1 0 Edx 13;
    PSE36 "PSE36" 1 0 Edx 17;
    MONITOR "MONITOR" 1 0 Ecx 3;
    VMX "VMX" 1 0 Ecx 5;
    PCID "PCID" 1 0 Ecx 17;
    X2APIC "X2APIC" 1 0 Ecx 21;
    TSC_DEADLINE "TSC_DEADLINE" 1 0 Ecx 24;
    XSAVE "XSAVE" 1 0 Ecx 26;
    AVX "AVX" 1 0 Ecx 28;
    FSGSBASE "FSGSBASE" 7 0 Ebx 0;
    SGX "SGX" 7 0 Ebx 2;
    SMEP "SMEP" 7 0 Ebx 7;
    INVPCID "INVPCID" 7 0 Ebx 10;
    RTM "RTM" 7 0 Ebx 11;
    SMAP "SMAP" 7 0 Ebx 20;
    UMIP "UMIP" 7 0 Ecx 2;
    PKU "PKU" 7 0 Ecx 3;
    LA57 "LA57" 7 0 Ecx 16;
    XSAVEOPT "XSAVEOPT" 0xd 1 Eax 0;
    XSAVEC "XSAVEC" 0xd 1 Eax 1;
    XGETBV1 "XGETBV1" 0xd 1 Eax 2;
    XSAVES "XSAVES" 0xd 1 Eax 3;
    SYSCALL "SYSCALL" 0x8000_0001 0 Edx 11;
    NX "NX" 0x8000_0001 0 Edx 20;
    PAGE_1G "PDPE1GB" 0x8000_0001 0 Edx 26;
    RDTSCP "RDTSCP" 0x8000_0001 0 Edx 27;
    PERFMON "performance counters" 0xa 0 Eax 0;
}

/// Whether CPUID names Intel: some results differ by vendor.
pub fn is_intel() -> bool {
    cpuid(0, 0).ebx == u32::from_le_bytes(*b"Genu")
}

/// Switches on no-execute pages where they exist.
pub(crate) fn enable_nx() {
    if NX.present() {
        wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_NXE);
    }
}

/// Physical address bits.
pub fn physical_bits() -> u32 {
    let bits = cpuid(0x8000_0008, 0).eax & 0xff;
    if bits == 0 { 36 } else { bits }
}
