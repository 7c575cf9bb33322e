//! A KVM virtual machine: guest RAM as memory slots, and which MSRs come to us.

use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_XEN_HVM,
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_X86_QUIRK_FIX_HYPERCALL_INSN, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, kvm_enable_cap,
    kvm_userspace_memory_region, kvm_xen_hvm_config,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use turtles_cpu::Cpu;
use turtles_cpu::cpuid::Dynamic;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

use super::l2::{FileMap, L2Share};
use super::{KvmHost, KvmVcpu, failed, ioctl, msrs};
use crate::engine::EngineError;
use crate::memory::{GuestMemory, Ram};
use crate::vcpu_signal::{VcpuSignal, lock};

/// Where Intel's processors without "unrestricted guest" need a page of identity map and three pages of TSS: in the
/// hole below 4 GiB, above the local APIC and below the firmware, where the guest has nothing.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;
/// A page in the same place where a slot may come and go.
const SPARE_PAGE: u64 = 0xfeff_b000;
const SPARE_SLOT: u32 = 100;

/// KVM wants an MSR for Xen's hypercall page. The guest's accesses to it come to us like those to any unknown MSR.
const XEN_MSR: u32 = 0x4000_0000;

/// A KVM virtual machine over guest RAM.
pub struct KvmVm {
    pub(super) host: KvmHost,
    pub(super) fd: VmFd,
    memory: GuestMemory,
    /// Held while the spare slot is there.
    spare: Mutex<GuestMemoryMmap<()>>,
    /// vCPUs made so far.
    pub(super) vcpus: AtomicUsize,
    /// Where RAM is, for guests of the guest.
    files: FileMap,
    file: Arc<File>,
}

impl KvmVm {
    /// A virtual machine with `ram` as its memory and no vCPUs.
    pub fn new(host: &KvmHost, ram: &Ram) -> Result<Self, EngineError> {
        let fd = host.kvm.create_vm().map_err(failed("creating a VM"))?;
        // Not every KVM asks for them, and none that can do without minds.
        if let Err(error) = fd.set_identity_map_address(IDENTITY_MAP).and_then(|()| fd.set_tss_address(TSS)) {
            log::debug!("KVM takes no addresses for real mode: {error}");
        }
        let spare = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).map_err(|error| {
            EngineError::Kvm { what: "mapping a page".into(), source: std::io::Error::other(error) }
        })?;
        let vm = Self {
            host: host.clone(),
            fd,
            memory: Arc::clone(&ram.memory),
            spare: Mutex::new(spare),
            vcpus: AtomicUsize::new(0),
            files: FileMap::of(ram),
            file: Arc::clone(&ram.file),
        };
        for (slot, &(start, len, _)) in (0..).zip(&ram.ranges) {
            vm.set_slot(slot, start, len, host_address(&vm.memory, start)?)?;
        }
        take_msrs(&vm.fd)?;
        take_hypercalls(&vm.fd);
        if vm.host.has_exit_on_emulation_failure {
            enable(&vm.fd, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1, "emulation failures")?;
        }
        Ok(vm)
    }

    /// The KVM that it is in.
    pub fn host(&self) -> &KvmHost {
        &self.host
    }

    /// The vCPU with number `index`, whose home is `cpu`, and which others reach through `signal`.
    pub fn vcpu(
        self: &Arc<Self>,
        index: usize,
        signal: Arc<VcpuSignal>,
        cpu: &Cpu,
    ) -> Result<KvmVcpu, EngineError> {
        let model = cpu.model();
        self.vcpus.fetch_add(1, Ordering::Relaxed);
        let after_reset = Dynamic {
            apic_id: u32::try_from(index).unwrap_or(u32::MAX),
            apic_enabled: true,
            // KVM hides what this mode or that does not show.
            code64: true,
            xcr0: cpu.state.xcr0,
            misc_enable: cpu.state.msrs.misc_enable,
            ..Dynamic::default()
        };
        let mut vcpu = KvmVcpu::new(self, index, signal, model.tsc_hz(), &|leaf, subleaf| {
            model.cpuid(leaf, subleaf, &after_reset)
        })?;
        vcpu.l2 = Some(Box::new(L2Share::new(&self.host, &self.file, &self.files)));
        Ok(vcpu)
    }

    fn set_slot(&self, slot: u32, start: u64, len: u64, host: u64) -> Result<(), EngineError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start,
            memory_size: len,
            userspace_addr: host,
        };
        // SAFETY: the host range is guest memory mapped by `memory` or `spare`, which live as long as the VM's
        // descriptor (fields drop in order, and a vCPU holds the whole VM); a length of zero removes a slot.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(failed(format!("giving KVM {len:#x} bytes of memory at {start:#x}")))
    }

    /// Makes KVM drop all it has derived from guest page tables (STALE-1): removing any slot does so, for every
    /// vCPU, while they run.
    pub(super) fn drop_shadow_pages(&self) -> Result<(), EngineError> {
        let spare = lock(&self.spare);
        self.set_slot(SPARE_SLOT, SPARE_PAGE, 4096, host_address(&spare, 0)?)?;
        self.set_slot(SPARE_SLOT, SPARE_PAGE, 0, 0)
    }
}

fn enable(vm: &VmFd, cap: u32, argument: u64, what: &str) -> Result<(), EngineError> {
    let cap = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&cap).map_err(failed(format!("asking to be told of {what}")))
}

/// Lets KVM answer only the MSRs that it must know; all others, and whatever it refuses, exit to us.
pub(super) fn take_msrs(vm: &VmFd) -> Result<(), EngineError> {
    let reasons = KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN;
    enable(vm, KVM_CAP_X86_USER_SPACE_MSR, u64::from(reasons), "MSR accesses")?;
    let allowed = [0xffu8; 1];
    let ranges: Vec<_> = msrs::KVM_ANSWERS
        .iter()
        .map(|range| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: *range.start(),
            msr_count: range.end() - range.start() + 1,
            bitmap: &allowed,
        })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges).map_err(failed("setting the MSR filter"))
}

/// Makes VMCALL and VMMCALL exit to us: KVM would answer them as hypercalls of its own, and overwrite the one that the
/// processor does not have. What KVM has for a Xen guest's hypercalls does it, at every privilege level.
///
/// DEVIATION: KVM keeps to itself the yield of Xen's sched_op (RAX 29 with RDI 0 or 3). Where the kernel was built
/// without this (CONFIG_KVM_XEN), VMCALL leaves an error of KVM's in RAX.
pub(super) fn take_hypercalls(vm: &VmFd) {
    let has = |cap: u32, bit: u32| vm.check_extension_raw(cap.into()) & bit as i32 != 0;
    if has(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_FIX_HYPERCALL_INSN) {
        let quirk = u64::from(KVM_X86_QUIRK_FIX_HYPERCALL_INSN);
        if let Err(error) = enable(vm, KVM_CAP_DISABLE_QUIRKS2, quirk, "hypercalls as they are") {
            log::debug!("{error}");
        }
    }
    if has(KVM_CAP_XEN_HVM, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL) {
        let flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL;
        let config = kvm_xen_hvm_config { flags, msr: XEN_MSR, ..Default::default() };
        if let Err(error) = ioctl::set_xen(vm, &config) {
            log::debug!("VMCALL stays with KVM: {error}");
        }
    }
}

fn host_address(memory: &GuestMemoryMmap<()>, start: u64) -> Result<u64, EngineError> {
    let address = memory.get_host_address(GuestAddress(start)).map_err(|error| EngineError::Kvm {
        what: format!("finding guest memory at {start:#x}"),
        source: std::io::Error::other(error),
    })?;
    Ok(address as u64)
}
