//! A [`Machine`] in non-root operation with a second level of translation.

use std::sync::{Arc, Mutex};

use iced_x86::code_asm::CodeAssembler;
use turtles_cpu::Exit;
use turtles_cpu::vmx::{Controls, VmExit};
use x86defs::vmx::{reason, secondary};

use crate::level::{Level, Page, Table};
use crate::machine::Machine;

pub struct Guest {
    pub m: Machine,
    pub table: Arc<Mutex<Table>>,
    pub controls: Controls,
}

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
