//! Every rule a VM entry checks, as data: what must hold, where the SDM says so, which fields are involved. Checks
//! return the rule that is broken; tests, traces and explanations speak of it by the same name.

use std::fmt;

use super::segment::SegmentRule;
use crate::field::Field;
use crate::segment::Segment;

macro_rules! rules {
    ($($section:literal { $($rule:ident [$($field:ident),+] $text:literal;)* })*) => {
        /// A rule of VM entry.
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        pub enum Rule {
            $($(#[doc = $text] $rule,)*)*
            /// A rule of one of the guest's segment registers.
            Segment(SegmentRule, Segment),
        }

        impl Rule {
            /// Every rule but those of segment registers, in the SDM's order.
            pub const PLAIN: &[Self] = &[$($(Self::$rule,)*)*];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self {
                    $($(Self::$rule => stringify!($rule),)*)*
                    Self::Segment(rule, _) => rule.name(),
                }
            }

            /// The title of the SDM's section that has it.
            pub fn section(self) -> &'static str {
                match self {
                    $($(Self::$rule => $section,)*)*
                    Self::Segment(..) => "Checks on Guest Segment Registers",
                }
            }

            /// What must hold.
            pub fn describe(self) -> &'static str {
                match self {
                    $($(Self::$rule => $text,)*)*
                    Self::Segment(rule, _) => rule.describe(),
                }
            }

            /// The fields it is about: those to blame first, then those that decide whether it applies.
            pub fn fields(self) -> Vec<Field> {
                match self {
                    $($(Self::$rule => vec![$(Field::$field),+],)*)*
                    Self::Segment(rule, segment) => rule.fields(segment),
                }
            }
        }
    };
}

rules! {
    "VM-Execution Control Fields" {
        PinReserved [PinControls]
            "reserved pin-based controls must be as IA32_VMX_(TRUE_)PINBASED_CTLS says";
        PrimaryReserved [PrimaryControls]
            "reserved primary processor-based controls must be as IA32_VMX_(TRUE_)PROCBASED_CTLS says";
        SecondaryReserved [SecondaryControls, PrimaryControls]
            "reserved secondary processor-based controls must be as IA32_VMX_PROCBASED_CTLS2 says";
        Cr3TargetCount [Cr3TargetCount]
            "the CR3-target count must not be greater than 4";
        IoBitmapAddress [IoBitmapA, IoBitmapB, PrimaryControls]
            "with \"use I/O bitmaps\", both bitmap addresses must be page-aligned and within the physical-address width";
        MsrBitmapAddress [MsrBitmap, PrimaryControls]
            "with \"use MSR bitmaps\", the bitmaps' address must be page-aligned and within the physical-address width";
        VirtualApicAddress [VirtualApicAddress, PrimaryControls]
            "with \"use TPR shadow\", the virtual-APIC address must be page-aligned and within the physical-address width";
        TprThresholdReserved [TprThreshold, PrimaryControls, SecondaryControls]
            "with \"use TPR shadow\" and without \"virtual-interrupt delivery\", bits 31:4 of the TPR threshold must be 0";
        TprThresholdAboveVtpr [TprThreshold, VirtualApicAddress, PrimaryControls, SecondaryControls]
            "with \"use TPR shadow\" and without \"virtualize APIC accesses\" and \"virtual-interrupt delivery\", \
             the TPR threshold must not be greater than bits 7:4 of VTPR (byte 80H of the virtual-APIC page)";
        VirtualNmisWithoutNmiExiting [PinControls]
            "\"virtual NMIs\" needs \"NMI exiting\"";
        NmiWindowWithoutVirtualNmis [PrimaryControls, PinControls]
            "\"NMI-window exiting\" needs \"virtual NMIs\"";
        ApicAccessAddress [ApicAccessAddress, SecondaryControls]
            "with \"virtualize APIC accesses\", the APIC-access address must be page-aligned and within the \
             physical-address width";
        ApicControlsWithoutTprShadow [SecondaryControls, PrimaryControls]
            "\"virtualize x2APIC mode\", \"APIC-register virtualization\" and \"virtual-interrupt delivery\" need \
             \"use TPR shadow\"";
        X2ApicWithApicAccesses [SecondaryControls]
            "\"virtualize x2APIC mode\" and \"virtualize APIC accesses\" must not both be 1";
        InterruptDeliveryWithoutExiting [SecondaryControls, PinControls]
            "\"virtual-interrupt delivery\" needs \"external-interrupt exiting\"";
        PostedWithoutInterruptDelivery [PinControls, SecondaryControls]
            "\"process posted interrupts\" needs \"virtual-interrupt delivery\"";
        PostedWithoutAcknowledge [PinControls, ExitControls]
            "\"process posted interrupts\" needs \"acknowledge interrupt on exit\"";
        PostedVector [PostedInterruptVector, PinControls]
            "with \"process posted interrupts\", the notification vector must be at most 255";
        PostedDescriptorAddress [PostedInterruptDescriptor, PinControls]
            "with \"process posted interrupts\", the descriptor's address must be a multiple of 64 and within the \
             physical-address width";
        VpidZero [Vpid, SecondaryControls]
            "with \"enable VPID\", the VPID must not be 0";
        EptpMemoryType [EptPointer, SecondaryControls]
            "with \"enable EPT\", the EPT pointer's memory type (bits 2:0) must be one that IA32_VMX_EPT_VPID_CAP reports";
        EptpWalkLength [EptPointer, SecondaryControls]
            "with \"enable EPT\", the EPT pointer's bits 5:3 must be 3: a page-walk length of 4";
        EptpAccessedDirty [EptPointer, SecondaryControls]
            "with \"enable EPT\", the EPT pointer may ask for accessed and dirty flags (bit 6) only where \
             IA32_VMX_EPT_VPID_CAP reports them";
        EptpReserved [EptPointer, SecondaryControls]
            "with \"enable EPT\", the EPT pointer's bits 11:7 and those beyond the physical-address width must be 0";
        PmlWithoutEpt [SecondaryControls]
            "\"enable PML\" needs \"enable EPT\"";
        PmlAddress [PmlAddress, SecondaryControls]
            "with \"enable PML\", the PML address must be page-aligned and within the physical-address width";
        UnrestrictedWithoutEpt [SecondaryControls]
            "\"unrestricted guest\" needs \"enable EPT\"";
        ModeBasedExecuteWithoutEpt [SecondaryControls]
            "\"mode-based execute control for EPT\" needs \"enable EPT\"";
        VmFunctionsReserved [VmFunctionControls, SecondaryControls]
            "with \"enable VM functions\", reserved bits of the VM-function controls must be 0 (IA32_VMX_VMFUNC)";
        EptpSwitchingWithoutEpt [VmFunctionControls, SecondaryControls]
            "\"EPTP switching\" needs \"enable EPT\"";
        EptpListAddress [EptpListAddress, VmFunctionControls]
            "with \"EPTP switching\", the EPTP-list address must be page-aligned and within the physical-address width";
        ShadowBitmapAddress [VmreadBitmap, VmwriteBitmap, SecondaryControls]
            "with \"VMCS shadowing\", the VMREAD- and VMWRITE-bitmap addresses must be page-aligned and within the \
             physical-address width";
        VirtualizationExceptionAddress [VirtualizationExceptionAddress, SecondaryControls]
            "with \"EPT-violation #VE\", the virtualization-exception information address must be page-aligned and \
             within the physical-address width";
        TscMultiplierZero [TscMultiplier, SecondaryControls]
            "with \"use TSC scaling\", the TSC multiplier must not be 0";
    }
    "VM-Exit Control Fields" {
        ExitReserved [ExitControls]
            "reserved VM-exit controls must be as IA32_VMX_(TRUE_)EXIT_CTLS says";
        SavePreemptionTimerWithoutTimer [ExitControls, PinControls]
            "\"save VMX-preemption timer value\" needs \"activate VMX-preemption timer\"";
        ExitMsrStoreArea [ExitMsrStoreAddress, ExitMsrStoreCount]
            "the VM-exit MSR-store area must be 16-byte aligned and lie within the physical-address width";
        ExitMsrLoadArea [ExitMsrLoadAddress, ExitMsrLoadCount]
            "the VM-exit MSR-load area must be 16-byte aligned and lie within the physical-address width";
    }
    "VM-Entry Control Fields" {
        EntryReserved [EntryControls]
            "reserved VM-entry controls must be as IA32_VMX_(TRUE_)ENTRY_CTLS says";
        InjectionType [EntryInterruption]
            "an injected event's type must not be 1, nor 7 where there is no \"monitor trap flag\"";
        InjectionVector [EntryInterruption]
            "an injected event's vector must be 2 for an NMI, at most 31 for a hardware exception, 0 for type 7";
        InjectionErrorCodeMissing [EntryInterruption, GuestCr0]
            "where IA32_VMX_BASIC bit 56 is 0, an injected hardware exception that has an error code in protected mode \
             (#DF, #TS, #NP, #SS, #GP, #PF, #AC) must deliver one";
        InjectionErrorCodeUnexpected [EntryInterruption, GuestCr0]
            "only a hardware exception in protected mode may deliver an error code; where IA32_VMX_BASIC bit 56 is 0, \
             only one that has an error code";
        InjectionReserved [EntryInterruption]
            "bits 30:12 of the VM-entry interruption-information field must be 0";
        InjectionErrorCode [EntryErrorCode, EntryInterruption]
            "an injected error code's bits 31:16 must be 0";
        InjectionInstructionLength [EntryInstructionLength, EntryInterruption]
            "an injected software interrupt or exception needs an instruction length of 1 to 15 \
             (or 0 where IA32_VMX_MISC bit 30 is 1)";
        EntryMsrLoadArea [EntryMsrLoadAddress, EntryMsrLoadCount]
            "the VM-entry MSR-load area must be 16-byte aligned and lie within the physical-address width";
    }
    "Checks on Host Control Registers, MSRs, and SSP" {
        HostCr0 [HostCr0]
            "host CR0 must be supported in VMX operation (IA32_VMX_CR0_FIXED0, IA32_VMX_CR0_FIXED1)";
        HostCr4 [HostCr4]
            "host CR4 must be supported in VMX operation (IA32_VMX_CR4_FIXED0, IA32_VMX_CR4_FIXED1)";
        HostCr3 [HostCr3]
            "host CR3 must be within the physical-address width";
        HostSysenter [HostSysenterEsp, HostSysenterEip]
            "host IA32_SYSENTER_ESP and IA32_SYSENTER_EIP must be canonical";
        HostPerfGlobalCtrl [HostPerfGlobalCtrl, ExitControls]
            "with \"load IA32_PERF_GLOBAL_CTRL\", reserved bits of the host's value must be 0";
        HostPat [HostPat, ExitControls]
            "with \"load IA32_PAT\", each byte of the host's value must be 0, 1, 4, 5, 6 or 7";
        HostEferReserved [HostEfer, ExitControls]
            "with \"load IA32_EFER\", reserved bits of the host's value must be 0";
        HostEferMode [HostEfer, ExitControls]
            "with \"load IA32_EFER\", the host's LMA and LME must both equal \"host address-space size\"";
    }
    "Checks on Host Segment and Descriptor-Table Registers" {
        HostSelector [HostCsSelector, HostSsSelector, HostDsSelector, HostEsSelector, HostFsSelector, HostGsSelector,
                      HostTrSelector]
            "RPL and TI of every host selector must be 0";
        HostCsTrNull [HostCsSelector, HostTrSelector]
            "the host's CS and TR selectors must not be 0";
        HostSsNull [HostSsSelector, ExitControls]
            "without \"host address-space size\", the host's SS selector must not be 0";
        HostBaseCanonical [HostFsBase, HostGsBase, HostGdtrBase, HostIdtrBase, HostTrBase]
            "the host's FS, GS, GDTR, IDTR and TR bases must be canonical";
    }
    "Checks Related to Address-Space Size" {
        GuestModeOutsideLongMode [EntryControls]
            "\"IA-32e mode guest\" must be 0 outside IA-32e mode";
        HostModeOutsideLongMode [ExitControls]
            "\"host address-space size\" must be 0 outside IA-32e mode";
        HostModeInLongMode [ExitControls]
            "\"host address-space size\" must be 1 in IA-32e mode";
        HostPcidWithoutLongMode [HostCr4, ExitControls]
            "without \"host address-space size\", host CR4.PCIDE must be 0";
        HostRipHigh [HostRip, ExitControls]
            "without \"host address-space size\", bits 63:32 of the host's RIP must be 0";
        HostPae [HostCr4, ExitControls]
            "with \"host address-space size\", host CR4.PAE must be 1";
        HostRipCanonical [HostRip, ExitControls]
            "with \"host address-space size\", the host's RIP must be canonical";
    }
    "Checks on Guest Control Registers, Debug Registers, and MSRs" {
        GuestCr0 [GuestCr0, SecondaryControls]
            "guest CR0 must be supported in VMX operation (IA32_VMX_CR0_FIXED0, IA32_VMX_CR0_FIXED1); with \
             \"unrestricted guest\", PE and PG may be 0";
        GuestPagingWithoutProtection [GuestCr0]
            "guest CR0.PG needs CR0.PE";
        GuestCr4 [GuestCr4]
            "guest CR4 must be supported in VMX operation (IA32_VMX_CR4_FIXED0, IA32_VMX_CR4_FIXED1)";
        GuestDebugctl [GuestDebugctl, EntryControls]
            "with \"load debug controls\", reserved bits of the guest's IA32_DEBUGCTL must be 0";
        GuestLongModePaging [GuestCr0, GuestCr4, EntryControls]
            "with \"IA-32e mode guest\", guest CR0.PG and CR4.PAE must be 1";
        GuestPcidWithoutLongMode [GuestCr4, EntryControls]
            "without \"IA-32e mode guest\", guest CR4.PCIDE must be 0";
        GuestCr3 [GuestCr3]
            "guest CR3 must be within the physical-address width";
        GuestDr7 [GuestDr7, EntryControls]
            "with \"load debug controls\", bits 63:32 of the guest's DR7 must be 0";
        GuestSysenter [GuestSysenterEsp, GuestSysenterEip]
            "guest IA32_SYSENTER_ESP and IA32_SYSENTER_EIP must be canonical";
        GuestPerfGlobalCtrl [GuestPerfGlobalCtrl, EntryControls]
            "with \"load IA32_PERF_GLOBAL_CTRL\", reserved bits of the guest's value must be 0";
        GuestPat [GuestPat, EntryControls]
            "with \"load IA32_PAT\", each byte of the guest's value must be 0, 1, 4, 5, 6 or 7";
        GuestEferReserved [GuestEfer, EntryControls]
            "with \"load IA32_EFER\", reserved bits of the guest's value must be 0";
        GuestEferLma [GuestEfer, EntryControls]
            "with \"load IA32_EFER\", the guest's LMA must equal \"IA-32e mode guest\"";
        GuestEferLme [GuestEfer, EntryControls, GuestCr0]
            "with \"load IA32_EFER\" and guest CR0.PG, the guest's LME must equal LMA";
    }
    "Checks on Guest Descriptor-Table Registers" {
        GuestTableBase [GuestGdtrBase, GuestIdtrBase]
            "the guest's GDTR and IDTR bases must be canonical";
        GuestTableLimit [GuestGdtrLimit, GuestIdtrLimit]
            "bits 31:16 of the guest's GDTR and IDTR limits must be 0";
    }
    "Checks on Guest RIP, RFLAGS, and SSP" {
        GuestRipHigh [GuestRip, EntryControls, GuestCsAccess]
            "outside 64-bit mode, bits 63:32 of the guest's RIP must be 0";
        GuestRipCanonical [GuestRip, EntryControls, GuestCsAccess]
            "in 64-bit mode, the guest's RIP must be canonical";
        GuestRflagsReserved [GuestRflags]
            "bits 63:22, 15, 5 and 3 of the guest's RFLAGS must be 0, and bit 1 must be 1";
        GuestRflagsVm [GuestRflags, EntryControls, GuestCr0]
            "guest RFLAGS.VM must be 0 with \"IA-32e mode guest\" or without guest CR0.PE";
        GuestRflagsIf [GuestRflags, EntryInterruption]
            "guest RFLAGS.IF must be 1 where an external interrupt is injected";
    }
    "Checks on Guest Non-Register State" {
        ActivityState [GuestActivity]
            "the activity state must be one that IA32_VMX_MISC reports";
        ActivityHltUser [GuestActivity, GuestSsAccess]
            "the activity state must not be HLT unless SS.DPL is 0";
        ActivityBlocked [GuestActivity, GuestInterruptibility]
            "the activity state must be active with blocking by STI or by MOV SS";
        ActivityInjection [GuestActivity, EntryInterruption]
            "the injected event must not be one that the activity state blocks: HLT takes external interrupts, NMIs, \
             #DB, #MC and a pending MTF exit; shutdown takes NMIs and #MC; wait-for-SIPI takes none";
        InterruptibilityReserved [GuestInterruptibility]
            "bits 31:5 of the interruptibility state must be 0";
        InterruptibilityStiAndMovSs [GuestInterruptibility]
            "blocking by STI and blocking by MOV SS must not both be 1";
        InterruptibilityStiWithoutIf [GuestInterruptibility, GuestRflags]
            "blocking by STI needs guest RFLAGS.IF";
        InterruptibilityExternal [GuestInterruptibility, EntryInterruption]
            "there must be no blocking by STI or by MOV SS where an external interrupt is injected";
        InterruptibilityNmiMovSs [GuestInterruptibility, EntryInterruption]
            "there must be no blocking by MOV SS where an NMI is injected";
        InterruptibilitySmi [GuestInterruptibility]
            "blocking by SMI must be 0 outside system-management mode";
        InterruptibilityVirtualNmi [GuestInterruptibility, EntryInterruption, PinControls]
            "with \"virtual NMIs\", there must be no blocking by NMI where an NMI is injected";
        InterruptibilityEnclave [GuestInterruptibility]
            "enclave interruption must be 0 on a processor without SGX";
        PendingDebugReserved [GuestPendingDebug]
            "bits 11:4, 13, 15 and 63:17 of the pending debug exceptions must be 0";
        PendingDebugRtm [GuestPendingDebug]
            "bit 16 of the pending debug exceptions must be 0 on a processor without RTM";
        PendingDebugStepMissing [GuestPendingDebug, GuestRflags, GuestDebugctl, GuestInterruptibility, GuestActivity]
            "with blocking by STI or by MOV SS or in HLT, the pending debug exceptions' BS must be 1 where RFLAGS.TF is 1 \
             and IA32_DEBUGCTL.BTF is 0";
        PendingDebugStepUnexpected [GuestPendingDebug, GuestRflags, GuestDebugctl, GuestInterruptibility,
                                    GuestActivity]
            "with blocking by STI or by MOV SS or in HLT, the pending debug exceptions' BS must be 0 where RFLAGS.TF is 0 \
             or IA32_DEBUGCTL.BTF is 1";
        LinkPointerAddress [VmcsLinkPointer]
            "a VMCS link pointer that is not FFFFFFFF_FFFFFFFFH must be page-aligned and within the physical-address width";
        LinkPointerRevision [VmcsLinkPointer]
            "the VMCS at the link pointer must have the processor's revision identifier";
        LinkPointerShadow [VmcsLinkPointer, SecondaryControls]
            "the shadow-VMCS indicator of the VMCS at the link pointer must equal \"VMCS shadowing\"";
        LinkPointerCurrent [VmcsLinkPointer]
            "the VMCS link pointer must not be the current-VMCS pointer";
    }
    "Checks on Guest Page-Directory-Pointer-Table Entries" {
        GuestPdpte [GuestCr3, GuestPdpte0, GuestPdpte1, GuestPdpte2, GuestPdpte3]
            "with PAE paging, reserved bits must be 0 in each page-directory-pointer-table entry that is present (of the \
             VMCS with \"enable EPT\", else those at CR3)";
    }
}

impl Rule {
    /// Every rule, that of a segment register once for each register it is about.
    pub fn all() -> impl Iterator<Item = Self> {
        let of_segments = SegmentRule::ALL
            .iter()
            .flat_map(|&rule| rule.segments().iter().map(move |&segment| Self::Segment(rule, segment)));
        Self::PLAIN.iter().copied().chain(of_segments)
    }

    /// The exit qualification of the VM-entry failure a broken rule of the guest's state makes ("VM-Entry Failures
    /// During or After Loading Guest State").
    pub fn entry_failure_qualification(self) -> u64 {
        const PDPTE: u64 = 2;
        const LINK_POINTER: u64 = 4;
        match self {
            Self::GuestPdpte => PDPTE,
            Self::LinkPointerAddress
            | Self::LinkPointerRevision
            | Self::LinkPointerShadow
            | Self::LinkPointerCurrent => LINK_POINTER,
            // 3 is of processors that refuse an NMI with blocking by STI, which is their choice; this one does not.
            _ => 0,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(rule, segment) => write!(f, "{} ({})", rule.name(), segment.name()),
            rule => f.write_str(rule.name()),
        }
    }
}
