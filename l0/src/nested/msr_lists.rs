//! The MSR areas in L1's memory: loaded on VM entry, stored and loaded on VM exit.
//!
//! An entry is 16 bytes: index, reserved, value.

use turtles_cpu::Cpu;
use vmcs_shadow::caps::MSR_LIST_MAX;
use vmcs_shadow::check::msr_list::{MsrEntry, MsrRule, check_msr_load, check_msr_store};
use vmcs_shadow::{Field, Vmcs};

/// Most entries that a list is read to.
const LONGEST: u64 = MSR_LIST_MAX as u64;

/// One of the three lists: its address and count fields.
#[derive(Clone, Copy)]
pub struct List {
    address: Field,
    count: Field,
}

pub const ENTRY_LOAD: List = List { address: Field::EntryMsrLoadAddress, count: Field::EntryMsrLoadCount };
pub const EXIT_STORE: List = List { address: Field::ExitMsrStoreAddress, count: Field::ExitMsrStoreCount };
pub const EXIT_LOAD: List = List { address: Field::ExitMsrLoadAddress, count: Field::ExitMsrLoadCount };

/// An entry that could not be processed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BadEntry {
    /// Counted from 1.
    pub number: u64,
    pub entry: MsrEntry,
    pub rule: MsrRule,
}

impl List {
    fn entries(self, vmcs: &Vmcs) -> impl Iterator<Item = (u64, u64)> + use<> {
        let address = vmcs.get(self.address);
        // One more than the recommended maximum is reached only to be refused.
        let count = vmcs.get(self.count).min(LONGEST + 1);
        (1..=count).map(move |n| (n, address.wrapping_add(16 * (n - 1))))
    }
}

fn read_entry(cpu: &Cpu, address: u64) -> MsrEntry {
    let mut bytes = [0; 16];
    cpu.memory().read(address, &mut bytes);
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    MsrEntry { index: word(0), reserved: word(4), value: u64::from(word(8)) | u64::from(word(12)) << 32 }
}

/// Loads a list into the MSRs ("Loading MSRs"); stops at the first entry that breaks a rule.
pub fn load(cpu: &mut Cpu, vmcs: &Vmcs, list: List) -> Result<(), BadEntry> {
    for (number, address) in list.entries(vmcs) {
        let entry = read_entry(cpu, address);
        let bad = |rule| BadEntry { number, entry, rule };
        check_msr_load(entry).map_err(bad)?;
        if number > LONGEST || !cpu.load_msr(entry.index, entry.value) {
            return Err(bad(MsrRule::Refused));
        }
    }
    Ok(())
}

/// Stores MSRs into a list ("Saving MSRs").
pub fn store(cpu: &mut Cpu, vmcs: &Vmcs, list: List) -> Result<(), BadEntry> {
    for (number, address) in list.entries(vmcs) {
        let entry = read_entry(cpu, address);
        let bad = |rule| BadEntry { number, entry, rule };
        check_msr_store(entry).map_err(bad)?;
        let value = cpu.stored_msr(entry.index).filter(|_| number <= LONGEST);
        let value = value.ok_or(bad(MsrRule::Refused))?;
        cpu.memory().write(address.wrapping_add(8), &value.to_le_bytes());
    }
    Ok(())
}
