//! The few KVM ioctls that kvm-ioctls has no call for on x86. Part of an unsafe island: KVM calls.

use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_interrupt, kvm_xen_hvm_config,
};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_iow_nr!(KVM_XEN_HVM_CONFIG, KVMIO, 0x7a, kvm_xen_hvm_config);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

fn checked(result: libc::c_int) -> Result<(), kvm_ioctls::Error> {
    if result < 0 { Err(kvm_ioctls::Error::last()) } else { Ok(()) }
}

/// Queues an external interrupt, which KVM delivers at the next entry.
pub(super) fn queue_interrupt(vcpu: &kvm_ioctls::VcpuFd, vector: u8) -> Result<(), kvm_ioctls::Error> {
    let interrupt = kvm_interrupt { irq: u32::from(vector) };
    // SAFETY: KVM_INTERRUPT on a vCPU's descriptor reads one kvm_interrupt.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &interrupt) })
}

/// Says what a VM has of Xen's interface.
pub(super) fn set_xen(vm: &impl AsRawFd, config: &kvm_xen_hvm_config) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: KVM_XEN_HVM_CONFIG on a VM's descriptor reads one kvm_xen_hvm_config.
    checked(unsafe { ioctl_with_ref(vm, KVM_XEN_HVM_CONFIG(), config) })
}

fn tsc_offset_attribute(value: *const u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
    }
}

/// True if the distance between the host's and the guest's TSC can be set exactly.
pub(super) fn has_tsc_offset(vcpu: &impl AsRawFd) -> bool {
    let attribute = tsc_offset_attribute(std::ptr::null());
    // SAFETY: KVM_HAS_DEVICE_ATTR reads one kvm_device_attr, and does not follow its address.
    unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attribute) == 0 }
}

/// The guest's TSC less the host's.
pub(super) fn tsc_offset(vcpu: &impl AsRawFd) -> Result<u64, kvm_ioctls::Error> {
    let mut value = 0u64;
    let attribute = tsc_offset_attribute(&raw mut value);
    // SAFETY: KVM_GET_DEVICE_ATTR reads one kvm_device_attr and writes eight bytes where it points: `value`.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    Ok(value)
}

/// Sets the guest's TSC less the host's.
pub(super) fn set_tsc_offset(vcpu: &impl AsRawFd, value: u64) -> Result<(), kvm_ioctls::Error> {
    let attribute = tsc_offset_attribute(&raw const value);
    // SAFETY: KVM_SET_DEVICE_ATTR reads one kvm_device_attr and eight bytes where it points: `value`.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}
