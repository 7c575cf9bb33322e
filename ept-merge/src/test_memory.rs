//! L1's memory for tests: a few pages, everything else is no RAM.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use crate::entry::Capabilities;
use crate::memory::{L1Gpa, Memory};

pub const CAPS: Capabilities = Capabilities {
    execute_only: true,
    pages_2m: true,
    pages_1g: true,
    accessed_dirty: true,
    uncacheable: true,
    write_back: true,
    physical_bits: 46,
};

/// RAM from address 0 on.
#[derive(Clone, Default)]
pub struct TestMemory {
    pub size: u64,
    pub words: RefCell<BTreeMap<u64, u64>>,
    pub log: RefCell<Vec<(u64, u64)>>,
    /// Exchanges that are going to fail.
    pub disturbances: Cell<u32>,
}

impl TestMemory {
    pub fn new(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    pub fn get(&self, address: u64) -> u64 {
        self.words.borrow().get(&address).copied().unwrap_or(0)
    }

    pub fn set(&self, address: u64, value: u64) {
        self.words.borrow_mut().insert(address, value);
    }
}

impl Memory for TestMemory {
    fn read_entry(&self, address: L1Gpa) -> Option<u64> {
        assert_eq!(address.0 % 8, 0);
        (address.0 < self.size).then(|| self.get(address.0))
    }

    fn exchange_entry(&self, address: L1Gpa, old: u64, new: u64) -> bool {
        if self.disturbances.get() > 0 {
            self.disturbances.set(self.disturbances.get() - 1);
            return false;
        }
        let same = address.0 < self.size && self.get(address.0) == old;
        if same {
            self.set(address.0, new);
        }
        same
    }

    fn write_log(&self, address: L1Gpa, value: u64) {
        self.log.borrow_mut().push((address.0, value));
    }
}
