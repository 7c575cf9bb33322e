//! /dev/kvm: whether we may use it, and what it can do.

use std::sync::{Arc, OnceLock};

use kvm_bindings as kb;
use kvm_ioctls::Kvm;

use super::failed;
use super::l2::L2Policy;
use super::probe::FAST_RING0;
use super::probe_exits::{Exits, VmxReach};
use crate::engine::EngineError;

/// The only version of KVM's interface there has been since 2007.
const API_VERSION: i32 = 12;

/// Whether the engine can do without a capability.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Need {
    /// The engine refuses to start.
    Required,
    /// The engine works around it.
    Optional,
}

/// A capability of KVM's that the engine uses.
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// Its name in the kernel's documentation.
    pub name: &'static str,
    /// Its number.
    pub number: u32,
    /// Whether it must be there.
    pub need: Need,
    /// What its absence means, and what to do.
    pub without: &'static str,
}

const fn capability(name: &'static str, number: u32, need: Need, without: &'static str) -> Capability {
    Capability { name, number, need, without }
}

/// Everything the engine asks KVM for.
pub const CAPABILITIES: &[Capability] = &[
    capability(
        "KVM_CAP_IMMEDIATE_EXIT",
        kb::KVM_CAP_IMMEDIATE_EXIT,
        Need::Required,
        "a vCPU cannot be stopped without a race: use Linux 4.13 or later, or --engine soft",
    ),
    capability(
        "KVM_CAP_X86_USER_SPACE_MSR",
        kb::KVM_CAP_X86_USER_SPACE_MSR,
        Need::Required,
        "our local APIC's MSRs would not reach us: use Linux 5.10 or later, or --engine soft",
    ),
    capability(
        "KVM_CAP_X86_MSR_FILTER",
        kb::KVM_CAP_X86_MSR_FILTER,
        Need::Required,
        "KVM would answer MSRs that are ours: use Linux 5.10 or later, or --engine soft",
    ),
    capability(
        "KVM_CAP_SYNC_REGS",
        kb::KVM_CAP_SYNC_REGS,
        Need::Optional,
        "registers move by separate system calls: a little slower",
    ),
    capability(
        "KVM_CAP_EXIT_ON_EMULATION_FAILURE",
        kb::KVM_CAP_EXIT_ON_EMULATION_FAILURE,
        Need::Optional,
        "user-mode instructions that KVM cannot emulate raise #UD in the guest: Linux 5.14 or later has it",
    ),
    capability(
        "KVM_CAP_XSAVE2",
        kb::KVM_CAP_XSAVE2,
        Need::Optional,
        "vector state moves by the older call, which has room for everything the guest is shown",
    ),
    capability(
        "KVM_CAP_TSC_CONTROL",
        kb::KVM_CAP_TSC_CONTROL,
        Need::Optional,
        "the guest's TSC runs at the host's frequency",
    ),
    capability(
        "KVM_CAP_DEBUGREGS",
        kb::KVM_CAP_DEBUGREGS,
        Need::Required,
        "debug registers cannot be moved: use Linux 2.6.35 or later, or --engine soft",
    ),
    capability(
        "KVM_CAP_XCRS",
        kb::KVM_CAP_XCRS,
        Need::Optional,
        "the processor has no XSAVE: the guest gets none either",
    ),
];

/// Why there is no KVM for us.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No such device.
    #[error(
        "/dev/kvm is missing: load the kernel module (modprobe kvm_intel or kvm_amd), enable virtualization in the \
         firmware or for this virtual machine, or use --engine soft"
    )]
    Missing,
    /// No permission.
    #[error(
        "no permission to open /dev/kvm: add your user to the group that owns it (often kvm), or use --engine soft"
    )]
    NotPermitted,
    /// It is there but something else is wrong.
    #[error("cannot open /dev/kvm: {0}")]
    Other(std::io::Error),
    /// Something else has its name.
    #[error(
        "/dev/kvm is no KVM: whoever set up this system or container put something else there; use --engine soft"
    )]
    NotKvm,
    /// Not the interface we know.
    #[error(
        "KVM's interface has version {0}, not 12: this kernel is older than Linux 2.6.22; use --engine soft"
    )]
    Version(i32),
    /// A required capability is missing.
    #[error("KVM has no {}: {}", .0.name, .0.without)]
    Lacks(&'static Capability),
}

/// What KVM is given to execute; see the table in the module's documentation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Share {
    /// All of the guest: the processor virtualizes it.
    All,
    /// Long stretches of 64-bit code in ring 3: KVM emulates all else, slowly and not exactly.
    User,
}

/// The host's KVM.
#[derive(Clone)]
pub struct KvmHost {
    pub(super) kvm: Arc<Kvm>,
    pub(super) has_sync_regs: bool,
    pub(super) has_tsc_control: bool,
    pub(super) has_exit_on_emulation_failure: bool,
    pub(super) has_xcrs: bool,
    /// Bytes of KVM's XSAVE area.
    pub(super) xsave_size: usize,
    /// What KVM can show in CPUID.
    pub(super) supported_cpuid: Arc<[kb::kvm_cpuid_entry2]>,
    /// KVM keeps its own translations of guest page tables, which only the guest's own writes keep fresh.
    pub(super) shadow_paging: bool,
    /// The processor has no virtualization of its own: KVM emulates ring 0, many instructions at a time, and does not
    /// look in between whether interrupts can be taken.
    pub(super) emulates_ring0: bool,
    /// What KVM executes.
    pub(super) share: Share,
    /// What was tried of its exits.
    pub(super) exits: Exits,
    /// What it executes of guests of the guest.
    pub(super) l2: L2Policy,
}

impl KvmHost {
    /// Opens /dev/kvm and checks that it has what the engine needs.
    pub fn open() -> Result<Self, EngineError> {
        let kvm = Self::open_device()?;
        if let Some(missing) =
            CAPABILITIES.iter().find(|c| c.need == Need::Required && Self::ask(&kvm, c.number) <= 0)
        {
            return Err(OpenError::Lacks(missing).into());
        }
        let has = |number| Self::ask(&kvm, number) > 0;
        let all_sync = (kb::KVM_SYNC_X86_VALID_FIELDS) as i32;
        let xsave2 = Self::ask(&kvm, kb::KVM_CAP_XSAVE2);
        let supported = kvm
            .get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("asking what CPUID may show"))?;
        let mut this = Self {
            has_sync_regs: Self::ask(&kvm, kb::KVM_CAP_SYNC_REGS) & all_sync == all_sync,
            has_tsc_control: has(kb::KVM_CAP_TSC_CONTROL),
            has_exit_on_emulation_failure: has(kb::KVM_CAP_EXIT_ON_EMULATION_FAILURE),
            has_xcrs: has(kb::KVM_CAP_XCRS),
            xsave_size: usize::try_from(xsave2).unwrap_or(0).max(4096),
            supported_cpuid: supported.as_slice().into(),
            shadow_paging: !two_dimensional_paging(),
            emulates_ring0: !processor_virtualizes(),
            kvm: Arc::new(kvm),
            share: Share::All,
            exits: Exits { vmx: VmxReach::Nothing, tsc_deadline: true },
            l2: L2Policy::default(),
        };
        (this.share, this.exits) = this.tried()?;
        Ok(this)
    }

    /// The share that suits this host, and the exits that it gives, tried once in the process.
    fn tried(&self) -> Result<(Share, Exits), EngineError> {
        static TRIED: OnceLock<(Share, Exits)> = OnceLock::new();
        if let Some(&tried) = TRIED.get() {
            return Ok(tried);
        }
        let fast = self.measure()?.ring0_per_second >= FAST_RING0;
        let share = if fast { Share::All } else { Share::User };
        let exits = self.try_exits()?;
        Ok(*TRIED.get_or_init(|| (share, exits)))
    }

    /// What was tried of its exits.
    pub fn exits(&self) -> Exits {
        self.exits
    }

    /// True if a guest hypervisor can run on it: its VMX instructions reach us, or the software CPU executes them anyway.
    pub fn reaches_vmx(&self) -> bool {
        self.share == Share::User || self.exits.vmx != VmxReach::Nothing
    }

    /// The same KVM, given `share` to execute whatever was measured.
    pub fn with_share(self, share: Share) -> Self {
        Self { share, ..self }
    }

    /// The same KVM, given guests of the guest by another rule.
    pub fn with_l2(self, l2: L2Policy) -> Self {
        Self { l2, ..self }
    }

    /// What KVM executes.
    pub fn share(&self) -> Share {
        self.share
    }

    /// Opens the device, without asking what it can do.
    pub(crate) fn open_device() -> Result<Kvm, OpenError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => OpenError::Missing,
            libc::EACCES | libc::EPERM => OpenError::NotPermitted,
            number => OpenError::Other(std::io::Error::from_raw_os_error(number)),
        })?;
        match kvm.get_api_version() {
            API_VERSION => Ok(kvm),
            ..0 => Err(OpenError::NotKvm),
            other => Err(OpenError::Version(other)),
        }
    }

    /// What KVM answers for a capability: 0 when it is not there.
    pub(crate) fn ask(kvm: &Kvm, capability: u32) -> i32 {
        kvm.check_extension_raw(capability.into())
    }

    /// One register set of what KVM can show in CPUID; zeros for a leaf it does not know.
    pub fn supported_cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        super::cpuid::find(&self.supported_cpuid, leaf, subleaf)
            .map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }
}

/// True when the processor walks guest page tables itself (EPT, NPT), so that KVM keeps no copies of them.
fn two_dimensional_paging() -> bool {
    let on = |path: &str| std::fs::read_to_string(path).is_ok_and(|text| matches!(text.trim(), "Y" | "1"));
    on("/sys/module/kvm_intel/parameters/ept") || on("/sys/module/kvm_amd/parameters/npt")
}

/// True with VMX or SVM.
fn processor_virtualizes() -> bool {
    use std::arch::x86_64::__cpuid;
    __cpuid(1).ecx >> 5 & 1 != 0
        || __cpuid(0x8000_0000).eax > 0x8000_0000 && __cpuid(0x8000_0001).ecx >> 2 & 1 != 0
}
