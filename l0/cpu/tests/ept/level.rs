//! A second level of translation as a table of pages: identity, but for what a test says of a page.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use turtles_cpu::phys::PhysMemory;
use turtles_cpu::vmx::{EptAccess, EptFault, EptPage, SecondLevel};

pub const R: u64 = 1;
pub const W: u64 = 2;
pub const X: u64 = 4;
/// Execute for user-mode linear addresses.
pub const XU: u64 = 8;
pub const ALL: u64 = R | W | X | XU;

/// What the table says of one page.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub physical: u64,
    pub allowed: u64,
    pub suppress_ve: bool,
    pub malformed: bool,
    pub large: bool,
    pub accessed: bool,
    pub dirty: bool,
}

impl Page {
    pub fn new(physical: u64, allowed: u64) -> Self {
        Self {
            physical,
            allowed,
            suppress_ve: true,
            malformed: false,
            large: false,
            accessed: false,
            dirty: false,
        }
    }
}

#[derive(Default)]
pub struct Table {
    pub pages: HashMap<u64, Page>,
    /// Accessed and dirty flags are in use.
    pub flags: bool,
    /// Mode-based execute control.
    pub mode_based: bool,
    /// Entries that the page-modification log has room for, and what is in it.
    pub room: Option<usize>,
    pub log: Vec<u64>,
    /// Translations asked for.
    pub asked: usize,
}

impl Table {
    fn translate(&mut self, gpa: u64, access: EptAccess) -> Result<EptPage, EptFault> {
        self.asked += 1;
        let at = gpa & !4095;
        let page = self.pages.entry(at).or_insert_with(|| Page::new(at, ALL));
        if page.malformed {
            return Err(EptFault::Misconfiguration);
        }
        let write = access.write || access.paging && self.flags;
        let execute = if self.mode_based && access.user { XU } else { X };
        let wanted = if access.read { R } else { 0 }
            | if write { W } else { 0 }
            | if access.fetch { execute } else { 0 };
        if wanted & !page.allowed != 0 {
            let shown = if self.mode_based { page.allowed } else { page.allowed & 7 };
            return Err(EptFault::Violation { allowed: shown << 3, suppress_ve: page.suppress_ve });
        }
        if self.flags && write && !page.dirty {
            if let Some(room) = self.room {
                if self.log.len() >= room {
                    return Err(EptFault::LogFull);
                }
                self.log.push(at);
            }
            page.dirty = true;
        }
        page.accessed |= self.flags;
        Ok(EptPage {
            physical: page.physical,
            large: page.large,
            write: page.allowed & W != 0 && (page.dirty || !self.flags),
            execute_supervisor: page.allowed & X != 0,
            execute_user: page.allowed & if self.mode_based { XU } else { X } != 0,
        })
    }
}

/// The CPU's hold on a table that the test keeps.
pub struct Level(pub Arc<Mutex<Table>>);

impl SecondLevel for Level {
    fn translate(&mut self, _: &PhysMemory, gpa: u64, access: EptAccess) -> Result<EptPage, EptFault> {
        self.0.lock().unwrap().translate(gpa, access)
    }
    fn peek(&self, _: &PhysMemory, gpa: u64) -> Option<u64> {
        let table = self.0.lock().unwrap();
        let page = table.pages.get(&(gpa & !4095));
        let physical = page.map_or(Some(gpa & !4095), |p| (p.allowed != 0).then_some(p.physical));
        physical.map(|p| p | gpa & 4095)
    }
    fn set_root(&mut self, _: u64) -> bool {
        false
    }
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}
