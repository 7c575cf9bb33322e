//! Checks on guest segment registers: exit reason 33, qualification 0.

use crate::entry::{Case, Fails, check_all, clear, nothing, set};
use crate::entry_cases;
use crate::modes;
use rt::tables;
use rt::vmx::control::*;
use rt::vmx::vm::{DATA_RIGHTS, Segment, UNUSABLE};
use rt::vmx::{field as f, vmread, vmwrite};

const WILD: u64 = 0x8000_0000_0000;
const DATA: [Segment; 4] = [Segment::Ds, Segment::Es, Segment::Fs, Segment::Gs];

pub fn all() {
    check_all(SELECTORS, Fails::Guest(0));
    check_all(BASES, Fails::Guest(0));
    check_all(TYPES, Fails::Guest(0));
    check_all(PRIVILEGE, Fails::Guest(0));
    check_all(RIGHTS, Fails::Guest(0));
    check_all(GRANULARITY, Fails::Guest(0));
    check_all(SYSTEM, Fails::Guest(0));
    check_all(VIRTUAL_8086, Fails::Guest(0));
    check_all(LEGAL, Fails::Guest(0));
}

/// All data segments usable, and an LDT.
fn usable() {
    for segment in DATA {
        segment.write(tables::DATA, 0, 0xffff_ffff, DATA_RIGHTS);
    }
    Segment::Ldtr.write(tables::SPARE, 0x1000, 0xfff, 0x82);
}

fn rights(segment: Segment, value: u64) {
    vmwrite(segment.rights_field(), value);
}

/// Changes the type, the low four bits of the access rights.
fn kind(segment: Segment, kind: u64) {
    rights(segment, vmread(segment.rights_field()) & !15 | kind);
}

const SELECTORS: &[Case] = entry_cases! {
    GuestSelectorTi [] nothing => || set(f::GUEST_TR, 4);
    GuestSelectorTi [] usable => || set(f::GUEST_LDTR, 4);
    GuestSsSelectorRpl [] nothing => || set(f::GUEST_SS, 1);
    GuestSsSelectorRpl [] nothing => || set(f::GUEST_CS, 3);
};

const BASES: &[Case] = entry_cases! {
    GuestBaseCanonical [] nothing => || vmwrite(f::GUEST_TR_BASE, WILD);
    GuestBaseCanonical [] nothing => || vmwrite(f::GUEST_FS_BASE, WILD);
    GuestBaseCanonical [] usable => || vmwrite(f::GUEST_GS_BASE, WILD);
    GuestLdtrBaseCanonical [] usable => || vmwrite(f::GUEST_LDTR_BASE, WILD);
    GuestBaseHigh [] nothing => || vmwrite(f::GUEST_CS_BASE, 1 << 32);
    GuestBaseHigh [] usable => || vmwrite(f::GUEST_SS_BASE, 1 << 32);
    GuestBaseHigh [] usable => || vmwrite(f::GUEST_DS_BASE, 1 << 40);
    GuestBaseHigh [] usable => || vmwrite(f::GUEST_ES_BASE, 1 << 32);
};

const TYPES: &[Case] = entry_cases! {
    GuestCsType [] nothing => || kind(Segment::Cs, 8);
    GuestCsType [] nothing => || kind(Segment::Cs, 10);
    GuestCsType [] nothing => || kind(Segment::Cs, 3);
    GuestCsType [] nothing => || rights(Segment::Cs, UNUSABLE);
    GuestSsType [] nothing => || kind(Segment::Ss, 1);
    GuestSsType [] nothing => || kind(Segment::Ss, 11);
    GuestSsType [] nothing => || kind(Segment::Ss, 2);
    GuestDataAccessed [] usable => || kind(Segment::Ds, 2);
    GuestDataAccessed [] usable => || kind(Segment::Es, 0);
    GuestDataAccessed [] usable => || kind(Segment::Fs, 6);
    GuestDataAccessed [] usable => || kind(Segment::Gs, 10);
    GuestDataReadable [] usable => || kind(Segment::Ds, 9);
    GuestDataReadable [] usable => || kind(Segment::Gs, 13);
    GuestSystemBit [] usable => || clear(f::GUEST_CS_ACCESS, 0x10);
    GuestSystemBit [] usable => || clear(f::GUEST_SS_ACCESS, 0x10);
    GuestSystemBit [] usable => || clear(f::GUEST_DS_ACCESS, 0x10);
    GuestSystemBit [] usable => || clear(f::GUEST_FS_ACCESS, 0x10);
};

const PRIVILEGE: &[Case] = entry_cases! {
    GuestCsDplNonconforming [] nothing => || set(f::GUEST_CS_ACCESS, 3 << 5);
    GuestCsDplConforming [] nothing => || rights(Segment::Cs, 0xa0ff);
    GuestSsDplRpl [] nothing => || set(f::GUEST_SS_ACCESS, 1 << 5);
    GuestDataDpl [] usable => || set(f::GUEST_DS, 1);
    GuestDataDpl [] usable => || set(f::GUEST_ES, 3);
    GuestDataDpl [] usable => || {
        rights(Segment::Fs, 0xc09b);
        set(f::GUEST_FS, 2);
    };
};

const RIGHTS: &[Case] = entry_cases! {
    GuestPresent [] usable => || clear(f::GUEST_CS_ACCESS, 0x80);
    GuestPresent [] usable => || clear(f::GUEST_SS_ACCESS, 0x80);
    GuestPresent [] usable => || clear(f::GUEST_DS_ACCESS, 0x80);
    GuestPresent [] usable => || clear(f::GUEST_GS_ACCESS, 0x80);
    GuestReserved [] usable => || set(f::GUEST_CS_ACCESS, 0x100);
    GuestReserved [] usable => || set(f::GUEST_SS_ACCESS, 0x800);
    GuestReserved [] usable => || set(f::GUEST_ES_ACCESS, 0x400);
    GuestReservedHigh [] usable => || set(f::GUEST_CS_ACCESS, 1 << 17);
    GuestReservedHigh [] usable => || set(f::GUEST_SS_ACCESS, 1 << 31);
    GuestReservedHigh [] usable => || set(f::GUEST_FS_ACCESS, 1 << 24);
    GuestCsDefaultSize [] nothing => || set(f::GUEST_CS_ACCESS, 1 << 14);
};

const GRANULARITY: &[Case] = entry_cases! {
    GuestGranularityBytes [] nothing => || vmwrite(f::GUEST_CS_LIMIT, 0xffff_fffe);
    GuestGranularityBytes [] usable => || vmwrite(f::GUEST_SS_LIMIT, 0x1000);
    GuestGranularityBytes [] usable => || vmwrite(f::GUEST_DS_LIMIT, 0x1_0000);
    GuestGranularityPages [] nothing => || clear(f::GUEST_CS_ACCESS, 1 << 15);
    GuestGranularityPages [] usable => || clear(f::GUEST_ES_ACCESS, 1 << 15);
    GuestGranularityPages [] usable => || {
        clear(f::GUEST_GS_ACCESS, 1 << 15);
        vmwrite(f::GUEST_GS_LIMIT, 0x0010_0000);
    };
};

const SYSTEM: &[Case] = entry_cases! {
    GuestTrType [] nothing => || kind(Segment::Tr, 9);
    GuestTrType [] nothing => || kind(Segment::Tr, 3);
    GuestTrType [] modes::protected_mode => || kind(Segment::Tr, 1);
    GuestLdtrType [] usable => || kind(Segment::Ldtr, 3);
    GuestTableSystemBit [] nothing => || set(f::GUEST_TR_ACCESS, 0x10);
    GuestTableSystemBit [] usable => || set(f::GUEST_LDTR_ACCESS, 0x10);
    GuestTablePresent [] nothing => || clear(f::GUEST_TR_ACCESS, 0x80);
    GuestTablePresent [] usable => || clear(f::GUEST_LDTR_ACCESS, 0x80);
    GuestTableReserved [] nothing => || set(f::GUEST_TR_ACCESS, 0x200);
    GuestTableReserved [] usable => || set(f::GUEST_LDTR_ACCESS, 0x100);
    GuestTableReservedHigh [] nothing => || set(f::GUEST_TR_ACCESS, 1 << 17);
    GuestTableReservedHigh [] usable => || set(f::GUEST_LDTR_ACCESS, 1 << 20);
    GuestTableGranularityBytes [] nothing => || set(f::GUEST_TR_ACCESS, 1 << 15);
    GuestTableGranularityBytes [] usable => || {
        set(f::GUEST_LDTR_ACCESS, 1 << 15);
        vmwrite(f::GUEST_LDTR_LIMIT, 0xffe);
    };
    GuestTableGranularityPages [] nothing => || vmwrite(f::GUEST_TR_LIMIT, 0x0010_0067);
    GuestTableGranularityPages [] usable => || vmwrite(f::GUEST_LDTR_LIMIT, 0x0020_0fff);
    GuestTrUsable [] nothing => || set(f::GUEST_TR_ACCESS, UNUSABLE);
};

const VIRTUAL_8086: &[Case] = entry_cases! {
    GuestV86Base [] modes::virtual_8086 => || vmwrite(f::GUEST_CS_BASE, 0x1_0010);
    GuestV86Base [] modes::virtual_8086 => || vmwrite(f::GUEST_GS_BASE, 0x10);
    GuestV86Limit [] modes::virtual_8086 => || vmwrite(f::GUEST_SS_LIMIT, 0xfffe);
    GuestV86Limit [] modes::virtual_8086 => || vmwrite(f::GUEST_FS_LIMIT, 0x1_ffff);
    GuestV86Access [] modes::virtual_8086 => || vmwrite(f::GUEST_DS_ACCESS, 0x93);
    GuestV86Access [] modes::virtual_8086 => || vmwrite(f::GUEST_CS_ACCESS, 0xfb);
};

/// Real mode with a data segment in CS, as after reset.
fn data_in_cs() {
    modes::real_mode();
    rights(Segment::Cs, 0x93);
}

/// Odd but legal states as the neighbours of something broken: conforming code, expand-down and null segments.
const LEGAL: &[Case] = entry_cases! {
    GuestCsType [] || rights(Segment::Cs, 0xa09f) => || kind(Segment::Cs, 12);
    GuestDataAccessed [] || {
        usable();
        kind(Segment::Ds, 7);
    } => || kind(Segment::Ds, 4);
    GuestSsType [] || rights(Segment::Ss, UNUSABLE) => || rights(Segment::Ss, DATA_RIGHTS & !2);
    GuestReserved [] || rights(Segment::Es, UNUSABLE | 0x0f00) => || rights(Segment::Es, DATA_RIGHTS | 0x0f00);
    GuestBaseHigh [] || {
        rights(Segment::Ds, UNUSABLE);
        vmwrite(f::GUEST_DS_BASE, 1 << 40);
    } => || rights(Segment::Ds, DATA_RIGHTS);
    GuestCsDplData [ENABLE_EPT, UNRESTRICTED_GUEST] data_in_cs => || set(f::GUEST_CS_ACCESS, 3 << 5);
    GuestSsDplReal [ENABLE_EPT, UNRESTRICTED_GUEST] modes::real_mode => || set(f::GUEST_SS_ACCESS, 3 << 5);
    GuestPagingWithoutProtection [ENABLE_EPT, UNRESTRICTED_GUEST] modes::real_mode => || set(f::GUEST_CR0, 1 << 31);
    GuestRflagsVm [ENABLE_EPT, UNRESTRICTED_GUEST] modes::real_mode => || set(f::GUEST_RFLAGS, 1 << 17);
};
