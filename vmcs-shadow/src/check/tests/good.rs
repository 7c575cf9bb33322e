//! VM entries that pass: a hypervisor in 64-bit mode (but for the last) and guests in each mode.

use x86defs::vmx::{entry_ctl, event, exit_ctl, pin, primary, secondary};
use x86defs::{cr0, cr4, efer, rflags};

use crate::caps::Capabilities;
use crate::check::{self, Inputs, Rule};
use crate::field::{Field, Vmcs};
use crate::segment::Segment;

/// What VM entry is asked for.
pub struct Entry {
    pub vmcs: Vmcs,
    pub caps: Capabilities,
    pub inputs: Inputs,
}

/// Makes an entry.
pub type Base = fn() -> Entry;

pub const ALL: &[(&str, Base)] = &[
    ("64-bit", long_mode),
    ("compatibility mode", compatibility),
    ("real mode", real_mode),
    ("virtual-8086 mode", v86),
    ("PAE", pae),
    ("PAE without EPT", pae_without_ept),
    ("32-bit guest of a 32-bit hypervisor", bits32),
];

const CODE64: u64 = 0xa09b;
const CODE32: u64 = 0xc09b;
const DATA32: u64 = 0xc093;
const UNUSABLE: u64 = 0x1_0000;
const PAT: u64 = 0x0007_0406_0007_0406;

impl Entry {
    /// The three checks; an error says which.
    pub fn check(&self) -> Result<(), (usize, Rule)> {
        let Self { vmcs, caps, inputs } = self;
        check::check_controls(vmcs, caps, inputs).map_err(|rule| (0, rule))?;
        check::check_host_state(vmcs, caps, inputs).map_err(|rule| (1, rule))?;
        check::check_guest_state(vmcs, caps, inputs).map_err(|rule| (2, rule))
    }

    pub fn get(&self, field: Field) -> u64 {
        self.vmcs.get(field)
    }

    pub fn set(&mut self, field: Field, value: u64) {
        assert_eq!(field.width().truncate(value), value, "{field:?}");
        self.vmcs.set(field, value);
    }

    pub fn or(&mut self, field: Field, bits: u64) {
        self.set(field, self.get(field) | bits);
    }

    pub fn clear(&mut self, field: Field, bits: u64) {
        self.set(field, self.get(field) & !bits);
    }

    /// Secondary controls.
    pub fn with(&mut self, bits: u32) {
        self.or(Field::SecondaryControls, bits.into());
    }

    pub fn without(&mut self, bits: u32) {
        self.clear(Field::SecondaryControls, bits.into());
    }

    pub fn flag(&mut self, name: &str, on: bool) {
        self.caps.set_flag(name, on).expect(name);
    }

    /// An event to inject.
    pub fn inject(&mut self, kind: u32, vector: u8) {
        self.set(Field::EntryInterruption, (event::VALID | kind << 8 | u32::from(vector)).into());
    }

    pub fn segment(&mut self, segment: Segment, selector: u64, base: u64, limit: u64, access: u64) {
        self.set(segment.selector(), selector);
        self.set(segment.base(), base);
        self.set(segment.limit(), limit);
        self.set(segment.access(), access);
    }

    fn flat_data(&mut self) {
        for segment in [Segment::Es, Segment::Ss, Segment::Ds, Segment::Fs, Segment::Gs] {
            self.segment(segment, 0x10, 0, 0xffff_ffff, DATA32);
        }
    }
}

/// A 64-bit guest, with most controls in use.
pub fn long_mode() -> Entry {
    let mut entry = Entry {
        vmcs: Vmcs::default(),
        caps: Capabilities::default(),
        inputs: Inputs { current_pointer: 0xff000, ..Inputs::default() },
    };
    controls(&mut entry);
    host(&mut entry);
    guest(&mut entry);
    entry
}

fn controls(e: &mut Entry) {
    const SECONDARY: u32 = secondary::ENABLE_EPT
        | secondary::ENABLE_VPID
        | secondary::UNRESTRICTED_GUEST
        | secondary::ENABLE_VMFUNC
        | secondary::VMCS_SHADOWING
        | secondary::EPT_VIOLATION_VE
        | secondary::ENABLE_PML
        | secondary::USE_TSC_SCALING
        | secondary::MODE_BASED_EXECUTE
        | secondary::VIRTUALIZE_APIC_ACCESSES
        | secondary::ENABLE_XSAVES
        | secondary::ENABLE_RDTSCP;
    let pin = pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING | pin::VIRTUAL_NMIS | pin::PREEMPTION_TIMER;
    let primary = primary::USE_TPR_SHADOW
        | primary::USE_IO_BITMAPS
        | primary::USE_MSR_BITMAPS
        | primary::ACTIVATE_SECONDARY;
    let exit = exit_ctl::HOST_ADDRESS_SPACE_SIZE
        | exit_ctl::ACKNOWLEDGE_INTERRUPT
        | exit_ctl::LOAD_PAT
        | exit_ctl::LOAD_EFER
        | exit_ctl::SAVE_PREEMPTION_TIMER;
    let enter = entry_ctl::LOAD_DEBUG_CONTROLS
        | entry_ctl::IA32E_MODE_GUEST
        | entry_ctl::LOAD_PAT
        | entry_ctl::LOAD_EFER;
    // With what the TRUE capability MSRs want to be 1.
    e.set(Field::PinControls, (0x16 | pin).into());
    e.set(Field::PrimaryControls, (0x0400_6172 | primary).into());
    e.set(Field::SecondaryControls, SECONDARY.into());
    e.set(Field::ExitControls, (0x3_6dfb | exit).into());
    e.set(Field::EntryControls, (0x11fb | enter).into());
    for (field, value) in [
        (Field::IoBitmapA, 0x1000),
        (Field::IoBitmapB, 0x2000),
        (Field::MsrBitmap, 0x3000),
        (Field::VirtualApicAddress, 0x4000),
        (Field::ApicAccessAddress, 0x5000),
        (Field::EptPointer, 0x605e),
        (Field::PmlAddress, 0x7000),
        (Field::VmFunctionControls, 1),
        (Field::EptpListAddress, 0x8000),
        (Field::VmreadBitmap, 0x9000),
        (Field::VmwriteBitmap, 0xa000),
        (Field::VirtualizationExceptionAddress, 0xb000),
        (Field::TscMultiplier, 1 << 48),
        (Field::Vpid, 1),
        (Field::ExitMsrStoreAddress, 0xc000),
        (Field::ExitMsrStoreCount, 2),
        (Field::ExitMsrLoadAddress, 0xd010),
        (Field::ExitMsrLoadCount, 1),
        (Field::EntryMsrLoadAddress, 0x3fff_ffff_ffc0),
        (Field::EntryMsrLoadCount, 4),
    ] {
        e.set(field, value);
    }
}

fn host(e: &mut Entry) {
    for (field, value) in [
        (Field::HostCr0, cr0::PE | cr0::NE | cr0::PG | cr0::WP),
        (Field::HostCr3, 0x10_0000),
        (Field::HostCr4, cr4::VMXE | cr4::PAE | cr4::PCIDE),
        (Field::HostEfer, efer::LMA | efer::LME | efer::NXE | efer::SCE),
        (Field::HostPat, PAT),
        (Field::HostCsSelector, 8),
        (Field::HostTrSelector, 0x40),
        (Field::HostGsBase, 0xffff_8880_0000_0000),
        (Field::HostSysenterEip, 0xffff_ffff_8100_0000),
        (Field::HostRip, 0xffff_ffff_8100_0000),
        (Field::HostRsp, 0xffff_c900_0000_0000),
    ] {
        e.set(field, value);
    }
}

fn guest(e: &mut Entry) {
    for (field, value) in [
        (Field::GuestCr0, cr0::PE | cr0::NE | cr0::PG | cr0::ET),
        (Field::GuestCr3, 0x20_0000),
        (Field::GuestCr4, cr4::VMXE | cr4::PAE),
        (Field::GuestDr7, 0x400),
        (Field::GuestEfer, efer::LMA | efer::LME),
        (Field::GuestPat, PAT),
        (Field::GuestRip, 0xffff_ffff_8000_0000),
        (Field::GuestRflags, rflags::FIXED_1),
        (Field::VmcsLinkPointer, u64::MAX),
        (Field::GuestGdtrLimit, 0xffff),
        (Field::GuestIdtrLimit, 0xfff),
    ] {
        e.set(field, value);
    }
    e.flat_data();
    e.segment(Segment::Cs, 8, 0, 0xffff_ffff, CODE64);
    e.segment(Segment::Ldtr, 0, 0, 0, UNUSABLE);
    e.segment(Segment::Tr, 0x18, 0, 0x67, 0x8b);
}

/// Out of IA-32e mode: protected mode without paging.
fn leave_long_mode(e: &mut Entry) {
    e.clear(Field::EntryControls, entry_ctl::IA32E_MODE_GUEST.into());
    e.set(Field::GuestEfer, 0);
    e.set(Field::GuestRip, 0x7c00);
    e.segment(Segment::Cs, 8, 0, 0xffff_ffff, CODE32);
    e.set(Field::GuestCr0, cr0::PE | cr0::NE);
    e.set(Field::GuestCr4, cr4::VMXE);
}

/// A program in compatibility mode, in ring 3.
pub fn compatibility() -> Entry {
    let mut e = long_mode();
    e.set(Field::GuestRip, 0x0804_8000);
    e.segment(Segment::Cs, 0x23, 0, 0xffff_ffff, 0xc0fb);
    for segment in [Segment::Es, Segment::Ss, Segment::Ds] {
        e.segment(segment, 0x2b, 0, 0xffff_ffff, 0xc0f3);
    }
    for segment in [Segment::Fs, Segment::Gs] {
        e.segment(segment, 0, 0x7fff_0000_0000, 0, UNUSABLE);
    }
    e
}

/// Real mode, for which unrestricted guest is.
pub fn real_mode() -> Entry {
    let mut e = long_mode();
    leave_long_mode(&mut e);
    e.set(Field::GuestCr0, cr0::NE);
    for segment in [Segment::Es, Segment::Cs, Segment::Ss, Segment::Ds, Segment::Fs, Segment::Gs] {
        e.segment(segment, 0xf000, 0xf_0000, 0xffff, 0x93);
    }
    e.segment(Segment::Tr, 0, 0, 0xffff, 0x83);
    e.set(Field::GuestRflags, rflags::FIXED_1 | rflags::IF);
    e
}

/// Virtual-8086 mode.
pub fn v86() -> Entry {
    let mut e = long_mode();
    leave_long_mode(&mut e);
    for segment in [Segment::Es, Segment::Cs, Segment::Ss, Segment::Ds, Segment::Fs, Segment::Gs] {
        e.segment(segment, 0x1234, 0x1_2340, 0xffff, 0xf3);
    }
    e.set(Field::GuestRflags, rflags::FIXED_1 | rflags::VM | rflags::IF);
    e
}

/// PAE paging, entries in the VMCS.
pub fn pae() -> Entry {
    let mut e = long_mode();
    leave_long_mode(&mut e);
    e.or(Field::GuestCr0, cr0::PG);
    e.or(Field::GuestCr4, cr4::PAE);
    e.set(Field::GuestPdpte0, 0x30_0001);
    // Not present: anything goes.
    e.set(Field::GuestPdpte1, u64::MAX - 1);
    e.set(Field::GuestPdpte3, 0x3fff_ffff_f019);
    e
}

/// PAE paging, entries in memory.
pub fn pae_without_ept() -> Entry {
    let mut e = pae();
    e.without(
        secondary::ENABLE_EPT
            | secondary::UNRESTRICTED_GUEST
            | secondary::ENABLE_PML
            | secondary::MODE_BASED_EXECUTE
            | secondary::ENABLE_VMFUNC,
    );
    e.set(Field::GuestPdpte0, u64::MAX);
    e.inputs.pdptes = Some([0x30_0001, 0, u64::MAX - 1, 0x3fff_ffff_f019]);
    e
}

/// A hypervisor and a guest that both are in 32-bit paging.
pub fn bits32() -> Entry {
    let mut e = long_mode();
    leave_long_mode(&mut e);
    e.inputs.long_mode = false;
    e.clear(Field::ExitControls, exit_ctl::HOST_ADDRESS_SPACE_SIZE.into());
    e.set(Field::HostEfer, 0);
    e.set(Field::HostCr4, cr4::VMXE);
    e.set(Field::HostRip, 0xc010_0000);
    e.set(Field::HostSsSelector, 0x10);
    e.or(Field::GuestCr0, cr0::PG);
    e
}
