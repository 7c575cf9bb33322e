//! A [`Machine`] in non-root operation with a second level of translation.

use std::sync::{Arc, Mutex};

use iced_x86::code_asm::CodeAssembler;
use turtles_cpu::Exit;
use turtles_cpu::vmx::{Controls, VmExit};
use x86defs::vmx::{primary, reason, secondary};

use crate::level::{Level, Page, Table};
use crate::machine::Machine;

pub struct Guest {
    pub m: Machine,
    pub table: Arc<Mutex<Table>>,
    pub controls: Controls,
}

/// Where the guest and its hypervisor see the APIC-access page, and the hypervisor the virtual-APIC page.
pub const APIC_ACCESS: u64 = 0x30_0000;
pub const VIRTUAL_APIC: u64 = 0x31_0000;
const MSR_BITMAP: u64 = 0x32_0000;

/// EPT pointer with four levels, write-back.
pub const EPTP: u64 = 0x9_9000 | 0x1e;
/// Bit 6 of the EPT pointer.
pub const EPT_FLAGS: u64 = 1 << 6;

impl Guest {
    pub fn new(m: Machine) -> Self {
        let controls = Controls {
            secondary: secondary::ENABLE_EPT | secondary::UNRESTRICTED_GUEST,
            ept_pointer: EPTP,
            vpid_tag: 1,
            tsc_multiplier: 1 << 48,
            ..Controls::default()
        };
        let mut guest = Self { m, table: Arc::default(), controls };
        guest.m.cpu.vmx.second_level = Some(Box::new(Level(Arc::clone(&guest.table))));
        guest.enter();
        guest
    }

    /// Enters with what `controls` says now.
    pub fn enter(&mut self) {
        self.m.cpu.enter_non_root(self.controls.clone());
    }

    /// The same guest with other controls.
    pub fn with(mut self, change: impl FnOnce(&mut Controls)) -> Self {
        change(&mut self.controls);
        self.enter();
        self
    }

    /// With the virtual-APIC page, the APIC-access page and these secondary controls; MSRs don't exit.
    pub fn with_apic(self, controls: u32) -> Self {
        self.m.cpu.memory().write(VIRTUAL_APIC, &[0; 4096]);
        self.with(|c| {
            c.primary |= primary::USE_TPR_SHADOW | primary::USE_MSR_BITMAPS | primary::ACTIVATE_SECONDARY;
            c.secondary |= controls;
            c.msr_bitmap = MSR_BITMAP;
            c.virtual_apic_page = VIRTUAL_APIC;
            c.apic_access_page = APIC_ACCESS;
        })
    }

    /// A register of the virtual-APIC page.
    pub fn apic(&self, offset: u64) -> u64 {
        self.m.get(VIRTUAL_APIC + offset, 4)
    }

    pub fn set_apic(&mut self, offset: u64, value: u32) {
        self.m.put32(VIRTUAL_APIC + offset, value);
    }

    /// With accessed and dirty flags for EPT.
    pub fn with_flags(self) -> Self {
        self.table.lock().unwrap().flags = true;
        self.with(|c| c.ept_pointer |= EPT_FLAGS)
    }

    pub fn code(mut self, write: impl FnOnce(&mut CodeAssembler)) -> Self {
        self.m.asm(write);
        self
    }

    /// Maps guest-physical `gpa` to itself with permissions.
    pub fn allow(&self, gpa: u64, allowed: u64) {
        self.map(gpa, Page::new(gpa & !4095, allowed));
    }

    pub fn map(&self, gpa: u64, page: Page) {
        self.table.lock().unwrap().pages.insert(gpa & !4095, page);
    }

    pub fn page(&self, gpa: u64) -> Page {
        self.table.lock().unwrap().pages[&(gpa & !4095)]
    }

    /// Runs to a VM exit, with the instruction not completed.
    pub fn exit(&mut self) -> VmExit {
        assert_eq!(self.m.cpu.run(1000), Exit::Vm, "at {:#x}", self.m.cpu.state.rip);
        self.m.cpu.vmx.exit
    }

    /// Runs to an EPT violation: qualification, linear and physical address.
    pub fn violation(&mut self) -> (u64, u64, u64) {
        let exit = self.exit();
        assert_eq!(exit.reason, reason::EPT_VIOLATION, "{}", reason::name(exit.reason));
        (exit.qualification, exit.guest_linear, exit.guest_physical)
    }
}
