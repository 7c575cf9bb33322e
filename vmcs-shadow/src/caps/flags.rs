//! The one description of what VMX we offer: every capability with its place, QEMU's name for it, and what it needs.
//! Capability MSRs, the VMCS fields there are, and the allowed settings of controls all derive from it.

use x86defs::cpuid::Feature;
use x86defs::vmx::{basic_cap as basic, entry_ctl as entry, exit_ctl as exit, pin, primary, secondary};
use x86defs::vmx::{ept_vpid_cap as ept, misc_cap as misc, vm_function};

/// A group of capability bits. Of the five groups of VM-execution, exit and entry controls a set bit says that the
/// control may be either 0 or 1; the groups after them are bits of an MSR as they stand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Word {
    Pin,
    Primary,
    Secondary,
    Exit,
    Entry,
    Misc,
    EptVpid,
    VmFunctions,
    Basic,
}

pub(super) const WORDS: usize = 9;

/// One set of capabilities.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Words(pub [u64; WORDS]);

impl Words {
    pub fn has(&self, word: Word, bits: u64) -> bool {
        self.0[word as usize] & bits == bits
    }

    pub fn set(&mut self, word: Word, bits: u64, on: bool) {
        let value = &mut self.0[word as usize];
        *value = if on { *value | bits } else { *value & !bits };
    }
}

/// How we stand to a capability.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Offer {
    /// Offered unless switched off.
    On,
    /// Implemented, and offered when asked for.
    OnRequest,
    /// Known to QEMU, and not implemented here.
    Never,
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flag {
    pub name: &'static str,
    pub word: Word,
    pub bits: u64,
    pub offer: Offer,
}

const fn row(word: Word, bits: u64, name: &'static str, offer: Offer) -> Flag {
    Flag { name, word, bits, offer }
}

/// A 32-bit control that is offered.
const fn on(word: Word, bits: u32, name: &'static str) -> Flag {
    row(word, bits as u64, name, Offer::On)
}

/// A bit of a 64-bit capability MSR that is offered.
const fn wide(word: Word, bits: u64, name: &'static str) -> Flag {
    row(word, bits, name, Offer::On)
}

const fn never(word: Word, bit: u32, name: &'static str) -> Flag {
    row(word, 1 << bit, name, Offer::Never)
}

use Word::{Basic, Entry, EptVpid, Exit, Misc, Pin, Primary, Secondary, VmFunctions};

/// The table. Two names are ours, as QEMU has none: `vmx-ept-violation-ve` and `vmx-exit-host-addr-space-size`.
pub(super) const FLAGS: &[Flag] = &[
    on(Pin, pin::EXTERNAL_INTERRUPT_EXITING, "vmx-intr-exit"),
    on(Pin, pin::NMI_EXITING, "vmx-nmi-exit"),
    on(Pin, pin::VIRTUAL_NMIS, "vmx-vnmi"),
    on(Pin, pin::PREEMPTION_TIMER, "vmx-preemption-timer"),
    on(Pin, pin::POSTED_INTERRUPTS, "vmx-posted-intr"),
    on(Primary, primary::INTERRUPT_WINDOW_EXITING, "vmx-vintr-pending"),
    on(Primary, primary::USE_TSC_OFFSETTING, "vmx-tsc-offset"),
    on(Primary, primary::HLT_EXITING, "vmx-hlt-exit"),
    on(Primary, primary::INVLPG_EXITING, "vmx-invlpg-exit"),
    on(Primary, primary::MWAIT_EXITING, "vmx-mwait-exit"),
    on(Primary, primary::RDPMC_EXITING, "vmx-rdpmc-exit"),
    on(Primary, primary::RDTSC_EXITING, "vmx-rdtsc-exit"),
    on(Primary, primary::CR3_LOAD_EXITING, "vmx-cr3-load-noexit"),
    on(Primary, primary::CR3_STORE_EXITING, "vmx-cr3-store-noexit"),
    on(Primary, primary::CR8_LOAD_EXITING, "vmx-cr8-load-exit"),
    on(Primary, primary::CR8_STORE_EXITING, "vmx-cr8-store-exit"),
    on(Primary, primary::USE_TPR_SHADOW, "vmx-flexpriority"),
    on(Primary, primary::NMI_WINDOW_EXITING, "vmx-vnmi-pending"),
    on(Primary, primary::MOV_DR_EXITING, "vmx-movdr-exit"),
    on(Primary, primary::UNCONDITIONAL_IO_EXITING, "vmx-io-exit"),
    on(Primary, primary::USE_IO_BITMAPS, "vmx-io-bitmap"),
    on(Primary, primary::MONITOR_TRAP_FLAG, "vmx-mtf"),
    on(Primary, primary::USE_MSR_BITMAPS, "vmx-msr-bitmap"),
    on(Primary, primary::MONITOR_EXITING, "vmx-monitor-exit"),
    on(Primary, primary::PAUSE_EXITING, "vmx-pause-exit"),
    on(Primary, primary::ACTIVATE_SECONDARY, "vmx-secondary-ctls"),
    on(Secondary, secondary::VIRTUALIZE_APIC_ACCESSES, "vmx-apicv-xapic"),
    on(Secondary, secondary::ENABLE_EPT, "vmx-ept"),
    on(Secondary, secondary::DESCRIPTOR_TABLE_EXITING, "vmx-desc-exit"),
    on(Secondary, secondary::ENABLE_RDTSCP, "vmx-rdtscp-exit"),
    on(Secondary, secondary::VIRTUALIZE_X2APIC, "vmx-apicv-x2apic"),
    on(Secondary, secondary::ENABLE_VPID, "vmx-vpid"),
    on(Secondary, secondary::WBINVD_EXITING, "vmx-wbinvd-exit"),
    on(Secondary, secondary::UNRESTRICTED_GUEST, "vmx-unrestricted-guest"),
    on(Secondary, secondary::APIC_REGISTER_VIRTUALIZATION, "vmx-apicv-register"),
    on(Secondary, secondary::VIRTUAL_INTERRUPT_DELIVERY, "vmx-apicv-vid"),
    on(Secondary, secondary::PAUSE_LOOP_EXITING, "vmx-ple"),
    on(Secondary, secondary::RDRAND_EXITING, "vmx-rdrand-exit"),
    on(Secondary, secondary::ENABLE_INVPCID, "vmx-invpcid-exit"),
    on(Secondary, secondary::ENABLE_VMFUNC, "vmx-vmfunc"),
    on(Secondary, secondary::VMCS_SHADOWING, "vmx-shadow-vmcs"),
    never(Secondary, 15, "vmx-encls-exit"),
    on(Secondary, secondary::RDSEED_EXITING, "vmx-rdseed-exit"),
    on(Secondary, secondary::ENABLE_PML, "vmx-pml"),
    on(Secondary, secondary::EPT_VIOLATION_VE, "vmx-ept-violation-ve"),
    on(Secondary, secondary::ENABLE_XSAVES, "vmx-xsaves"),
    on(Secondary, secondary::MODE_BASED_EXECUTE, "vmx-mbec"),
    on(Secondary, secondary::USE_TSC_SCALING, "vmx-tsc-scaling"),
    never(Secondary, 26, "vmx-enable-user-wait-pause"),
    on(Exit, exit::SAVE_DEBUG_CONTROLS, "vmx-exit-nosave-debugctl"),
    on(Exit, exit::HOST_ADDRESS_SPACE_SIZE, "vmx-exit-host-addr-space-size"),
    // There is no PMU, so the MSR has no bit that may be set; whoever asks gets a control that loads zero.
    row(Exit, exit::LOAD_PERF_GLOBAL_CTRL as u64, "vmx-exit-load-perf-global-ctrl", Offer::OnRequest),
    on(Exit, exit::ACKNOWLEDGE_INTERRUPT, "vmx-exit-ack-intr"),
    on(Exit, exit::SAVE_PAT, "vmx-exit-save-pat"),
    on(Exit, exit::LOAD_PAT, "vmx-exit-load-pat"),
    on(Exit, exit::SAVE_EFER, "vmx-exit-save-efer"),
    on(Exit, exit::LOAD_EFER, "vmx-exit-load-efer"),
    on(Exit, exit::SAVE_PREEMPTION_TIMER, "vmx-exit-save-preemption-timer"),
    never(Exit, 23, "vmx-exit-clear-bndcfgs"),
    never(Exit, 25, "vmx-exit-clear-rtit-ctl"),
    never(Exit, 28, "vmx-exit-save-cet"),
    never(Exit, 29, "vmx-exit-load-pkrs"),
    never(Exit, 31, "vmx-exit-secondary-ctls"),
    on(Entry, entry::LOAD_DEBUG_CONTROLS, "vmx-entry-noload-debugctl"),
    on(Entry, entry::IA32E_MODE_GUEST, "vmx-entry-ia32e-mode"),
    row(Entry, entry::LOAD_PERF_GLOBAL_CTRL as u64, "vmx-entry-load-perf-global-ctrl", Offer::OnRequest),
    on(Entry, entry::LOAD_PAT, "vmx-entry-load-pat"),
    on(Entry, entry::LOAD_EFER, "vmx-entry-load-efer"),
    never(Entry, 16, "vmx-entry-load-bndcfgs"),
    never(Entry, 18, "vmx-entry-load-rtit-ctl"),
    never(Entry, 20, "vmx-entry-load-cet"),
    never(Entry, 22, "vmx-entry-load-pkrs"),
    never(Entry, 23, "vmx-entry-load-fred"),
    wide(Misc, misc::STORE_LMA, "vmx-store-lma"),
    wide(Misc, misc::ACTIVITY_HLT, "vmx-activity-hlt"),
    wide(Misc, misc::ACTIVITY_SHUTDOWN, "vmx-activity-shutdown"),
    wide(Misc, misc::ACTIVITY_WAIT_FOR_SIPI, "vmx-activity-wait-sipi"),
    wide(Misc, misc::VMWRITE_ANY_FIELD, "vmx-vmwrite-vmexit-fields"),
    wide(Misc, misc::INJECT_ZERO_LENGTH, "vmx-zero-len-inject"),
    wide(EptVpid, ept::EXECUTE_ONLY, "vmx-ept-execonly"),
    wide(EptVpid, ept::WALK_4, "vmx-page-walk-4"),
    never(EptVpid, 7, "vmx-page-walk-5"),
    wide(EptVpid, ept::PAGE_2M, "vmx-ept-2mb"),
    wide(EptVpid, ept::PAGE_1G, "vmx-ept-1gb"),
    wide(EptVpid, ept::INVEPT, "vmx-invept"),
    wide(EptVpid, ept::ACCESSED_DIRTY, "vmx-eptad"),
    wide(EptVpid, ept::ADVANCED_EXIT_INFORMATION, "vmx-ept-advanced-exitinfo"),
    wide(EptVpid, ept::INVEPT_SINGLE, "vmx-invept-single-context"),
    wide(EptVpid, ept::INVEPT_ALL, "vmx-invept-all-context"),
    wide(EptVpid, ept::INVVPID, "vmx-invvpid"),
    wide(EptVpid, ept::INVVPID_ADDRESS, "vmx-invvpid-single-addr"),
    wide(EptVpid, ept::INVVPID_SINGLE, "vmx-invvpid-single-context"),
    wide(EptVpid, ept::INVVPID_ALL, "vmx-invvpid-all-context"),
    wide(EptVpid, ept::INVVPID_SINGLE_NO_GLOBALS, "vmx-invvpid-single-context-noglobals"),
    wide(Basic, basic::INS_OUTS_INFORMATION, "vmx-ins-outs"),
    wide(Basic, basic::TRUE_CONTROLS, "vmx-true-ctls"),
    wide(Basic, basic::ANY_ERROR_CODE, "vmx-any-errcode"),
    never(Basic, 58, "vmx-nested-exception"),
    wide(VmFunctions, vm_function::EPTP_SWITCHING, "vmx-eptp-switching"),
];

/// Other spellings QEMU accepts.
pub(super) const ALIASES: &[(&str, &str)] =
    &[("vmx-invept-single-context-noglobals", "vmx-invvpid-single-context-noglobals")];

/// The first capability makes no sense without the second ("VM-Execution Control Fields" and appendix A).
pub(super) const DEPENDENCIES: &[(&str, &str)] = &[
    ("vmx-vnmi", "vmx-nmi-exit"),
    ("vmx-vnmi-pending", "vmx-vnmi"),
    ("vmx-posted-intr", "vmx-apicv-vid"),
    ("vmx-posted-intr", "vmx-exit-ack-intr"),
    ("vmx-exit-save-preemption-timer", "vmx-preemption-timer"),
    ("vmx-apicv-x2apic", "vmx-flexpriority"),
    ("vmx-apicv-register", "vmx-flexpriority"),
    ("vmx-apicv-vid", "vmx-flexpriority"),
    ("vmx-apicv-vid", "vmx-intr-exit"),
    ("vmx-ept", "vmx-page-walk-4"),
    ("vmx-unrestricted-guest", "vmx-ept"),
    ("vmx-pml", "vmx-ept"),
    ("vmx-pml", "vmx-eptad"),
    ("vmx-mbec", "vmx-ept"),
    ("vmx-ept-violation-ve", "vmx-ept"),
    ("vmx-vmfunc", "vmx-ept"),
    ("vmx-eptp-switching", "vmx-vmfunc"),
    ("vmx-invept-single-context", "vmx-invept"),
    ("vmx-invept-all-context", "vmx-invept"),
    ("vmx-invvpid", "vmx-vpid"),
    ("vmx-invvpid-single-addr", "vmx-invvpid"),
    ("vmx-invvpid-single-context", "vmx-invvpid"),
    ("vmx-invvpid-all-context", "vmx-invvpid"),
    ("vmx-invvpid-single-context-noglobals", "vmx-invvpid"),
];

/// Capabilities that stand for an instruction, or a mode, of the processor itself.
pub(super) const FEATURES: &[(&str, Feature)] = &[
    ("vmx-rdtscp-exit", Feature::Rdtscp),
    ("vmx-invpcid-exit", Feature::Invpcid),
    ("vmx-rdrand-exit", Feature::Rdrand),
    ("vmx-rdseed-exit", Feature::Rdseed),
    ("vmx-xsaves", Feature::Xsaves),
    ("vmx-apicv-x2apic", Feature::X2apic),
    ("vmx-entry-ia32e-mode", Feature::Lm),
    ("vmx-exit-host-addr-space-size", Feature::Lm),
];

/// The row of a name.
pub(super) fn find(name: &str) -> Option<&'static Flag> {
    let name = ALIASES.iter().find(|alias| alias.0 == name).map_or(name, |alias| alias.1);
    FLAGS.iter().find(|flag| flag.name == name)
}
