//! The table of VMCS fields (SDM volume 3, appendix B): encoding, kind, name. Everything that knows fields derives from
//! it: VMREAD and VMWRITE, dumps, checks, and the layout of a VMCS12 in L1's memory.

use crate::encoding::{Area, Encoding, Width};

macro_rules! fields {
    ($($encoding:literal $field:ident $name:literal,)*) => {
        /// A VMCS field. The discriminant is its index in [`FIELDS`] and in [`Vmcs`].
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        #[repr(u8)]
        pub enum Field { $($field,)* }

        /// Every field, in the order of [`Field`].
        pub const FIELDS: &[FieldInfo] = &[$(FieldInfo { field: Field::$field, raw: $encoding, name: $name },)*];
    };
}

/// What the table says of a field.
#[derive(Clone, Copy, Debug)]
pub struct FieldInfo {
    pub field: Field,
    /// Encoding of the full access.
    pub raw: u32,
    /// The SDM's name.
    pub name: &'static str,
}

fields! {
    // 16-bit control fields
    0x0000 Vpid "VPID",
    0x0002 PostedInterruptVector "posted-interrupt notification vector",
    0x0004 EptpIndex "EPTP index",
    // 16-bit guest-state fields
    0x0800 GuestEsSelector "guest ES selector",
    0x0802 GuestCsSelector "guest CS selector",
    0x0804 GuestSsSelector "guest SS selector",
    0x0806 GuestDsSelector "guest DS selector",
    0x0808 GuestFsSelector "guest FS selector",
    0x080a GuestGsSelector "guest GS selector",
    0x080c GuestLdtrSelector "guest LDTR selector",
    0x080e GuestTrSelector "guest TR selector",
    0x0810 GuestInterruptStatus "guest interrupt status",
    0x0812 PmlIndex "PML index",
    // 16-bit host-state fields
    0x0c00 HostEsSelector "host ES selector",
    0x0c02 HostCsSelector "host CS selector",
    0x0c04 HostSsSelector "host SS selector",
    0x0c06 HostDsSelector "host DS selector",
    0x0c08 HostFsSelector "host FS selector",
    0x0c0a HostGsSelector "host GS selector",
    0x0c0c HostTrSelector "host TR selector",
    // 64-bit control fields
    0x2000 IoBitmapA "address of I/O bitmap A",
    0x2002 IoBitmapB "address of I/O bitmap B",
    0x2004 MsrBitmap "address of MSR bitmaps",
    0x2006 ExitMsrStoreAddress "VM-exit MSR-store address",
    0x2008 ExitMsrLoadAddress "VM-exit MSR-load address",
    0x200a EntryMsrLoadAddress "VM-entry MSR-load address",
    0x200c ExecutiveVmcsPointer "executive-VMCS pointer",
    0x200e PmlAddress "PML address",
    0x2010 TscOffset "TSC offset",
    0x2012 VirtualApicAddress "virtual-APIC address",
    0x2014 ApicAccessAddress "APIC-access address",
    0x2016 PostedInterruptDescriptor "posted-interrupt descriptor address",
    0x2018 VmFunctionControls "VM-function controls",
    0x201a EptPointer "EPT pointer",
    0x201c EoiExitBitmap0 "EOI-exit bitmap 0",
    0x201e EoiExitBitmap1 "EOI-exit bitmap 1",
    0x2020 EoiExitBitmap2 "EOI-exit bitmap 2",
    0x2022 EoiExitBitmap3 "EOI-exit bitmap 3",
    0x2024 EptpListAddress "EPTP-list address",
    0x2026 VmreadBitmap "VMREAD-bitmap address",
    0x2028 VmwriteBitmap "VMWRITE-bitmap address",
    0x202a VirtualizationExceptionAddress "virtualization-exception information address",
    0x202c XssExitingBitmap "XSS-exiting bitmap",
    0x2032 TscMultiplier "TSC multiplier",
    // 64-bit read-only data field
    0x2400 GuestPhysicalAddress "guest-physical address",
    // 64-bit guest-state fields
    0x2800 VmcsLinkPointer "VMCS link pointer",
    0x2802 GuestDebugctl "guest IA32_DEBUGCTL",
    0x2804 GuestPat "guest IA32_PAT",
    0x2806 GuestEfer "guest IA32_EFER",
    0x2808 GuestPerfGlobalCtrl "guest IA32_PERF_GLOBAL_CTRL",
    0x280a GuestPdpte0 "guest PDPTE0",
    0x280c GuestPdpte1 "guest PDPTE1",
    0x280e GuestPdpte2 "guest PDPTE2",
    0x2810 GuestPdpte3 "guest PDPTE3",
    // 64-bit host-state fields
    0x2c00 HostPat "host IA32_PAT",
    0x2c02 HostEfer "host IA32_EFER",
    0x2c04 HostPerfGlobalCtrl "host IA32_PERF_GLOBAL_CTRL",
    // 32-bit control fields
    0x4000 PinControls "pin-based VM-execution controls",
    0x4002 PrimaryControls "primary processor-based VM-execution controls",
    0x4004 ExceptionBitmap "exception bitmap",
    0x4006 PageFaultMask "page-fault error-code mask",
    0x4008 PageFaultMatch "page-fault error-code match",
    0x400a Cr3TargetCount "CR3-target count",
    0x400c ExitControls "VM-exit controls",
    0x400e ExitMsrStoreCount "VM-exit MSR-store count",
    0x4010 ExitMsrLoadCount "VM-exit MSR-load count",
    0x4012 EntryControls "VM-entry controls",
    0x4014 EntryMsrLoadCount "VM-entry MSR-load count",
    0x4016 EntryInterruption "VM-entry interruption-information field",
    0x4018 EntryErrorCode "VM-entry exception error code",
    0x401a EntryInstructionLength "VM-entry instruction length",
    0x401c TprThreshold "TPR threshold",
    0x401e SecondaryControls "secondary processor-based VM-execution controls",
    0x4020 PleGap "PLE_Gap",
    0x4022 PleWindow "PLE_Window",
    // 32-bit read-only data fields
    0x4400 InstructionError "VM-instruction error",
    0x4402 ExitReason "exit reason",
    0x4404 ExitInterruption "VM-exit interruption information",
    0x4406 ExitErrorCode "VM-exit interruption error code",
    0x4408 IdtVectoring "IDT-vectoring information field",
    0x440a IdtVectoringErrorCode "IDT-vectoring error code",
    0x440c ExitInstructionLength "VM-exit instruction length",
    0x440e ExitInstructionInformation "VM-exit instruction information",
    // 32-bit guest-state fields
    0x4800 GuestEsLimit "guest ES limit",
    0x4802 GuestCsLimit "guest CS limit",
    0x4804 GuestSsLimit "guest SS limit",
    0x4806 GuestDsLimit "guest DS limit",
    0x4808 GuestFsLimit "guest FS limit",
    0x480a GuestGsLimit "guest GS limit",
    0x480c GuestLdtrLimit "guest LDTR limit",
    0x480e GuestTrLimit "guest TR limit",
    0x4810 GuestGdtrLimit "guest GDTR limit",
    0x4812 GuestIdtrLimit "guest IDTR limit",
    0x4814 GuestEsAccess "guest ES access rights",
    0x4816 GuestCsAccess "guest CS access rights",
    0x4818 GuestSsAccess "guest SS access rights",
    0x481a GuestDsAccess "guest DS access rights",
    0x481c GuestFsAccess "guest FS access rights",
    0x481e GuestGsAccess "guest GS access rights",
    0x4820 GuestLdtrAccess "guest LDTR access rights",
    0x4822 GuestTrAccess "guest TR access rights",
    0x4824 GuestInterruptibility "guest interruptibility state",
    0x4826 GuestActivity "guest activity state",
    0x4828 GuestSmbase "guest SMBASE",
    0x482a GuestSysenterCs "guest IA32_SYSENTER_CS",
    0x482e PreemptionTimerValue "VMX-preemption timer value",
    // 32-bit host-state field
    0x4c00 HostSysenterCs "host IA32_SYSENTER_CS",
    // Natural-width control fields
    0x6000 Cr0Mask "CR0 guest/host mask",
    0x6002 Cr4Mask "CR4 guest/host mask",
    0x6004 Cr0Shadow "CR0 read shadow",
    0x6006 Cr4Shadow "CR4 read shadow",
    0x6008 Cr3Target0 "CR3-target value 0",
    0x600a Cr3Target1 "CR3-target value 1",
    0x600c Cr3Target2 "CR3-target value 2",
    0x600e Cr3Target3 "CR3-target value 3",
    // Natural-width read-only data fields
    0x6400 ExitQualification "exit qualification",
    0x6402 IoRcx "I/O RCX",
    0x6404 IoRsi "I/O RSI",
    0x6406 IoRdi "I/O RDI",
    0x6408 IoRip "I/O RIP",
    0x640a GuestLinearAddress "guest-linear address",
    // Natural-width guest-state fields
    0x6800 GuestCr0 "guest CR0",
    0x6802 GuestCr3 "guest CR3",
    0x6804 GuestCr4 "guest CR4",
    0x6806 GuestEsBase "guest ES base",
    0x6808 GuestCsBase "guest CS base",
    0x680a GuestSsBase "guest SS base",
    0x680c GuestDsBase "guest DS base",
    0x680e GuestFsBase "guest FS base",
    0x6810 GuestGsBase "guest GS base",
    0x6812 GuestLdtrBase "guest LDTR base",
    0x6814 GuestTrBase "guest TR base",
    0x6816 GuestGdtrBase "guest GDTR base",
    0x6818 GuestIdtrBase "guest IDTR base",
    0x681a GuestDr7 "guest DR7",
    0x681c GuestRsp "guest RSP",
    0x681e GuestRip "guest RIP",
    0x6820 GuestRflags "guest RFLAGS",
    0x6822 GuestPendingDebug "guest pending debug exceptions",
    0x6824 GuestSysenterEsp "guest IA32_SYSENTER_ESP",
    0x6826 GuestSysenterEip "guest IA32_SYSENTER_EIP",
    // Natural-width host-state fields
    0x6c00 HostCr0 "host CR0",
    0x6c02 HostCr3 "host CR3",
    0x6c04 HostCr4 "host CR4",
    0x6c06 HostFsBase "host FS base",
    0x6c08 HostGsBase "host GS base",
    0x6c0a HostTrBase "host TR base",
    0x6c0c HostGdtrBase "host GDTR base",
    0x6c0e HostIdtrBase "host IDTR base",
    0x6c10 HostSysenterEsp "host IA32_SYSENTER_ESP",
    0x6c12 HostSysenterEip "host IA32_SYSENTER_EIP",
    0x6c14 HostRsp "host RSP",
    0x6c16 HostRip "host RIP",
}

/// Number of fields.
pub const COUNT: usize = FIELDS.len();

/// Field of each encoding without its access bit; 255 is none.
static BY_ENCODING: [u8; 1 << 14] = {
    let mut table = [u8::MAX; 1 << 14];
    let mut i = 0;
    while i < FIELDS.len() {
        table[(FIELDS[i].raw >> 1) as usize] = i as u8;
        i += 1;
    }
    table
};

const _: () = assert!(COUNT < 255);

impl Field {
    /// The field that a well-formed encoding names, whether the access is to all of it or to its high half.
    #[inline]
    pub fn from_encoding(encoding: Encoding) -> Option<Self> {
        let index = BY_ENCODING[(encoding.raw() >> 1) as usize & 0x3fff];
        FIELDS.get(index as usize).map(|info| info.field)
    }

    /// What the table says.
    pub fn info(self) -> &'static FieldInfo {
        &FIELDS[self as usize]
    }

    /// Its encoding (full access).
    #[inline]
    pub fn encoding(self) -> Encoding {
        // Table entries are well-formed: a test sees to it.
        Encoding::of_table(self.info().raw)
    }

    /// The area it belongs to.
    #[inline]
    pub fn area(self) -> Area {
        self.encoding().area()
    }

    /// Its width.
    #[inline]
    pub fn width(self) -> Width {
        self.encoding().width()
    }

    /// The field `distance` encodings (of one width and area) further on: how runs like ES..TR are indexed.
    #[inline]
    pub fn nth(self, distance: usize) -> Self {
        FIELDS[self as usize + distance].field
    }
}

/// The contents of a VMCS: one value for each field of [`FIELDS`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Vmcs {
    values: [u64; COUNT],
}

impl Default for Vmcs {
    fn default() -> Self {
        Self { values: [0; COUNT] }
    }
}

impl Vmcs {
    /// A field's value.
    #[inline(always)]
    pub fn get(&self, field: Field) -> u64 {
        self.values[field as usize]
    }

    /// A field's low 32 bits: controls and the like.
    #[inline(always)]
    pub fn get32(&self, field: Field) -> u32 {
        self.values[field as usize] as u32
    }

    /// Sets a field; the caller keeps to its width.
    #[inline(always)]
    pub fn set(&mut self, field: Field, value: u64) {
        self.values[field as usize] = value;
    }

    /// All values, in the order of [`FIELDS`].
    pub fn values(&self) -> &[u64; COUNT] {
        &self.values
    }

    /// The secondary controls if they are activated, else 0.
    #[inline]
    pub fn secondary(&self) -> u32 {
        if self.get32(Field::PrimaryControls) & x86defs::vmx::primary::ACTIVATE_SECONDARY != 0 {
            self.get32(Field::SecondaryControls)
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_well_formed() {
        for (i, info) in FIELDS.iter().enumerate() {
            assert_eq!(info.field as usize, i);
            let encoding = Encoding::new(u64::from(info.raw)).expect(info.name);
            assert!(!encoding.is_high(), "{}", info.name);
            assert_eq!(Field::from_encoding(encoding), Some(info.field), "{}", info.name);
        }
        assert!(FIELDS.windows(2).all(|pair| pair[0].raw < pair[1].raw), "in the order of encodings");
    }
}
