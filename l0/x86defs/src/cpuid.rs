//! CPUID feature bits, as `(leaf, subleaf, register, bit)` with the names QEMU's `-cpu` option uses.

/// An output register of CPUID.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Where CPUID reports a feature, and what a user calls it.
#[derive(Clone, Copy, Debug)]
pub struct FeatureBit {
    pub feature: Feature,
    pub name: &'static str,
    pub leaf: u32,
    pub subleaf: u32,
    pub register: Register,
    pub bit: u32,
}

macro_rules! features {
    ($(($leaf:literal, $subleaf:literal, $register:ident) { $($bit:literal $feature:ident $name:literal,)* })*) => {
        /// A feature that CPUID reports with one bit.
        #[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
        #[repr(u16)]
        pub enum Feature { $($($feature,)*)* }

        /// Every feature, in the order of [`Feature`]'s discriminants.
        pub const FEATURES: &[FeatureBit] = &[$($(FeatureBit {
            feature: Feature::$feature,
            name: $name,
            leaf: $leaf,
            subleaf: $subleaf,
            register: Register::$register,
            bit: $bit,
        },)*)*];
    };
}

features! {
    (1, 0, Edx) {
        0 Fpu "fpu", 1 Vme "vme", 2 De "de", 3 Pse "pse", 4 Tsc "tsc", 5 Msr "msr", 6 Pae "pae", 7 Mce "mce",
        8 Cx8 "cx8", 9 Apic "apic", 11 Sep "sep", 12 Mtrr "mtrr", 13 Pge "pge", 14 Mca "mca", 15 Cmov "cmov",
        16 Pat "pat", 17 Pse36 "pse36", 18 Pn "pn", 19 Clflush "clflush", 21 Ds "ds", 22 Acpi "acpi", 23 Mmx "mmx",
        24 Fxsr "fxsr", 25 Sse "sse", 26 Sse2 "sse2", 27 SelfSnoop "ss", 28 Ht "ht", 29 Tm "tm", 30 Ia64 "ia64",
        31 Pbe "pbe",
    }
    (1, 0, Ecx) {
        0 Sse3 "sse3", 1 Pclmulqdq "pclmulqdq", 2 Dtes64 "dtes64", 3 Monitor "monitor", 4 DsCpl "ds-cpl",
        5 Vmx "vmx", 6 Smx "smx", 7 Est "est", 8 Tm2 "tm2", 9 Ssse3 "ssse3", 10 Cid "cid", 12 Fma "fma",
        13 Cx16 "cx16", 14 Xtpr "xtpr", 15 Pdcm "pdcm", 17 Pcid "pcid", 18 Dca "dca", 19 Sse41 "sse4.1",
        20 Sse42 "sse4.2", 21 X2apic "x2apic", 22 Movbe "movbe", 23 Popcnt "popcnt",
        24 TscDeadline "tsc-deadline", 25 Aes "aes", 26 Xsave "xsave", 28 Avx "avx", 29 F16c "f16c",
        30 Rdrand "rdrand", 31 Hypervisor "hypervisor",
    }
    (6, 0, Eax) {
        2 Arat "arat",
    }
    (7, 0, Ebx) {
        0 Fsgsbase "fsgsbase", 1 TscAdjust "tsc-adjust", 2 Sgx "sgx", 3 Bmi1 "bmi1", 4 Hle "hle", 5 Avx2 "avx2",
        6 FdpExcptnOnly "fdp-excptn-only", 7 Smep "smep", 8 Bmi2 "bmi2", 9 Erms "erms", 10 Invpcid "invpcid",
        11 Rtm "rtm", 13 ZeroFcsFds "zero-fcs-fds", 14 Mpx "mpx", 16 Avx512f "avx512f", 17 Avx512dq "avx512dq",
        18 Rdseed "rdseed", 19 Adx "adx", 20 Smap "smap", 21 Avx512ifma "avx512ifma", 22 Pcommit "pcommit",
        23 Clflushopt "clflushopt", 24 Clwb "clwb", 25 IntelPt "intel-pt", 26 Avx512pf "avx512pf",
        27 Avx512er "avx512er", 28 Avx512cd "avx512cd", 29 Sha "sha-ni", 30 Avx512bw "avx512bw",
        31 Avx512vl "avx512vl",
    }
    (7, 0, Ecx) {
        1 Avx512vbmi "avx512vbmi", 2 Umip "umip", 3 Pku "pku", 5 Waitpkg "waitpkg", 6 Avx512vbmi2 "avx512vbmi2",
        7 CetShadowStack "shstk", 8 Gfni "gfni", 9 Vaes "vaes", 10 Vpclmulqdq "vpclmulqdq",
        11 Avx512vnni "avx512vnni", 12 Avx512bitalg "avx512bitalg", 14 Avx512vpopcntdq "avx512-vpopcntdq",
        16 La57 "la57", 22 Rdpid "rdpid", 24 BusLockDetect "bus-lock-detect", 25 Cldemote "cldemote",
        27 Movdiri "movdiri", 28 Movdir64b "movdir64b", 30 SgxLc "sgxlc", 31 Pks "pks",
    }
    (7, 0, Edx) {
        2 Avx5124vnniw "avx512-4vnniw", 3 Avx5124fmaps "avx512-4fmaps", 4 Fsrm "fsrm",
        8 Avx512vp2intersect "avx512-vp2intersect", 10 MdClear "md-clear", 14 Serialize "serialize",
        16 TsxLdtrk "tsx-ldtrk", 20 CetIbt "ibt", 22 AmxBf16 "amx-bf16", 23 Avx512fp16 "avx512-fp16",
        24 AmxTile "amx-tile", 25 AmxInt8 "amx-int8", 26 SpecCtrl "spec-ctrl", 27 Stibp "stibp",
        28 FlushL1d "flush-l1d", 29 ArchCapabilities "arch-capabilities", 30 CoreCapability "core-capability",
        31 Ssbd "ssbd",
    }
    (7, 1, Eax) {
        4 AvxVnni "avx-vnni", 5 Avx512bf16 "avx512-bf16", 10 Fzrm "fzrm", 11 Fsrs "fsrs", 12 Fsrc "fsrc",
        17 Fred "fred", 18 Lkgs "lkgs", 21 AmxFp16 "amx-fp16", 23 AvxIfma "avx-ifma", 26 Lam "lam",
    }
    (0xd, 1, Eax) {
        0 Xsaveopt "xsaveopt", 1 Xsavec "xsavec", 2 Xgetbv1 "xgetbv1", 3 Xsaves "xsaves", 4 Xfd "xfd",
    }
    (0x8000_0001, 0, Edx) {
        11 Syscall "syscall", 20 Nx "nx", 26 Pdpe1gb "pdpe1gb", 27 Rdtscp "rdtscp", 29 Lm "lm",
    }
    (0x8000_0001, 0, Ecx) {
        0 LahfLm "lahf-lm", 2 Svm "svm", 5 Lzcnt "abm", 6 Sse4a "sse4a", 8 Prefetchw "3dnowprefetch",
        11 Xop "xop", 16 Fma4 "fma4", 21 Tbm "tbm",
    }
    (0x8000_0007, 0, Edx) {
        8 Invtsc "invtsc",
    }
    (0x8000_0008, 0, Ebx) {
        9 Wbnoinvd "wbnoinvd",
    }
}

/// Other spellings QEMU accepts, and the names above they stand for. (`_` and `.` are read as `-` besides.)
pub const ALIASES: &[(&str, &str)] = &[
    ("pni", "sse3"),
    ("pclmuldq", "pclmulqdq"),
    ("cmpxchg16b", "cx16"),
    ("xd", "nx"),
    ("i64", "lm"),
    ("lzcnt", "abm"),
    ("sha", "sha-ni"),
    ("ibrs", "spec-ctrl"),
];

impl Feature {
    /// Name and place in CPUID.
    pub const fn bit(self) -> &'static FeatureBit {
        &FEATURES[self as usize]
    }
}
