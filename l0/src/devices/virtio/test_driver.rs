//! The other side for tests: a driver that talks to a device through its registers and rings, and can break
//! every rule.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::{DmaObserver, Processing, VirtioDevice, VirtioPci};
use crate::devices::pci::{MSIX_ENTRY_SIZE, PciDevice, command};
use crate::devices::{IrqLine, IrqRouter, MsiSink};
use crate::memory::{GuestMemory, Ram};
use crate::vcpu_signal::lock;

pub(super) const RAM: u64 = 4 << 20;
/// Where tests keep their buffers.
pub(super) const BUFFERS: u64 = 0x10_0000;
pub(super) const QUEUE_SIZE: u16 = 16;
pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const EVENT_IDX: u64 = 1 << 29;
/// Descriptor flags.
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;
/// Device status.
pub(super) const FEATURES_OK: u8 = 8;
pub(super) const DRIVER_OK: u8 = 4;
pub(super) const NEEDS_RESET: u8 = 64;
/// Pages of the BAR.
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const NOTIFY: u64 = 0x3000;
pub(super) const MSIX_TABLE: u64 = 0x4000;

/// Everything the device does to the outside.
#[derive(Default)]
pub(super) struct World {
    pub messages: Mutex<Vec<u32>>,
    pub line: Mutex<bool>,
    pub wrote: Mutex<Vec<(u64, u64)>>,
}

impl MsiSink for World {
    fn send(&self, _address: u64, data: u32) {
        lock(&self.messages).push(data);
    }
}

impl IrqRouter for World {
    fn set_irq(&self, _gsi: u32, level: bool) {
        *lock(&self.line) = level;
    }
}

impl DmaObserver for World {
    fn wrote(&self, gpa: u64, len: u64) {
        lock(&self.wrote).push((gpa, len));
    }
}

#[derive(Clone, Copy, Default)]
struct Ring {
    added: u16,
    seen: u16,
    next_descriptor: u16,
}

pub(super) struct Driver {
    pub pci: VirtioPci,
    pub memory: GuestMemory,
    pub world: Arc<World>,
    rings: [Ring; 4],
}

impl Driver {
    /// A device with bus mastering on, otherwise untouched.
    pub fn new(device: impl VirtioDevice + 'static, processing: Processing) -> Self {
        let memory = Ram::new(RAM).expect("RAM").memory;
        let world = Arc::new(World::default());
        let line = IrqLine::new(world.clone(), 17);
        let device = Box::new(device);
        let pci = VirtioPci::new(device, memory.clone(), line, world.clone(), processing, world.clone());
        let mut driver = Self { pci: pci.expect("a device"), memory, world, rings: Default::default() };
        driver.set_command(command::MEMORY | command::BUS_MASTER);
        driver
    }

    /// The same, with the device and `queues` of its queues working.
    pub fn ready(device: impl VirtioDevice + 'static, features: u64, queues: u16) -> Self {
        let mut driver = Self::new(device, Processing::Inline);
        driver.start(features, queues);
        driver
    }

    pub fn start(&mut self, features: u64, queues: u16) {
        self.negotiate(features | VERSION_1);
        (0..queues).for_each(|index| self.enable_queue(index));
        self.set_status(DRIVER_OK);
        assert_eq!(self.status(), 15);
    }

    pub fn set_command(&mut self, value: u16) {
        self.pci.write_config(4, &value.to_le_bytes());
    }

    pub fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.pci.read_bar(0, offset, &mut data);
        data
    }

    pub fn read_u16(&mut self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.pci.write_bar(0, offset, data);
    }

    pub fn write_u16(&mut self, offset: u64, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }

    pub fn status(&mut self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    /// Adds a status bit.
    pub fn set_status(&mut self, bit: u8) {
        let status = self.status();
        self.write(0x14, &[status | bit]);
    }

    pub fn reset(&mut self) {
        self.write(0x14, &[0]);
        self.rings = Default::default();
    }

    pub fn offered(&mut self) -> u64 {
        let mut features = 0;
        for half in [1u32, 0] {
            self.write(0, &half.to_le_bytes());
            features = features << 32 | u64::from(u32::from_le_bytes(self.read(4)));
        }
        features
    }

    pub fn accept(&mut self, features: u64) {
        for half in [0u32, 1] {
            self.write(8, &half.to_le_bytes());
            self.write(0xc, &((features >> (32 * half)) as u32).to_le_bytes());
        }
    }

    /// Up to FEATURES_OK.
    pub fn negotiate(&mut self, features: u64) {
        self.set_status(1);
        self.set_status(2);
        self.accept(features);
        self.set_status(FEATURES_OK);
    }

    /// Where a queue's three areas lie: descriptors, available ring, used ring.
    pub fn areas(index: u16) -> [u64; 3] {
        let base = 0x1_0000 + u64::from(index) * 0x4000;
        [base, base + 0x1000, base + 0x2000]
    }

    pub fn enable_queue(&mut self, index: u16) {
        self.enable_queue_at(index, Self::areas(index));
    }

    pub fn enable_queue_at(&mut self, index: u16, areas: [u64; 3]) {
        self.write_u16(0x16, index);
        self.write_u16(0x18, QUEUE_SIZE);
        for (area, offset) in areas.into_iter().zip([0x20, 0x28, 0x30]) {
            self.write(offset, &(area as u32).to_le_bytes());
            self.write(offset + 4, &((area >> 32) as u32).to_le_bytes());
        }
        self.write_u16(0x1c, 1);
    }

    /// Gives a source a vector, and the vector an unmasked message that tells its number.
    pub fn set_vector(&mut self, vector: u16) {
        let entry = MSIX_TABLE + u64::from(vector) * MSIX_ENTRY_SIZE as u64;
        self.write(entry, &0xfee0_0000u64.to_le_bytes());
        self.write(entry + 8, &u32::from(vector).to_le_bytes());
        self.write(entry + 12, &0u32.to_le_bytes());
    }

    pub fn put(&self, gpa: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(gpa)).expect("tests write to RAM");
    }

    pub fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(gpa)).expect("tests read from RAM");
        data
    }

    pub fn put_descriptor(&self, table: u64, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    /// Makes a chain of `(address, length, flags)` and returns its head; nothing is available yet.
    pub fn chain(&mut self, queue: u16, parts: &[(u64, u32, u16)]) -> u16 {
        let ring = &mut self.rings[usize::from(queue)];
        let head = ring.next_descriptor;
        ring.next_descriptor = (head + parts.len() as u16) % QUEUE_SIZE;
        for (i, &(gpa, len, flags)) in parts.iter().enumerate() {
            let index = (head + i as u16) % QUEUE_SIZE;
            let more = if i + 1 < parts.len() { NEXT } else { 0 };
            let next = (index + 1) % QUEUE_SIZE;
            self.put_descriptor(Self::areas(queue)[0], index, gpa, len, flags | more, next);
        }
        head
    }

    /// Makes `head` available without notifying.
    pub fn make_available(&mut self, queue: u16, head: u16) {
        let [_, available, _] = Self::areas(queue);
        let ring = &mut self.rings[usize::from(queue)];
        let slot = u64::from(ring.added % QUEUE_SIZE);
        ring.added = ring.added.wrapping_add(1);
        let added = ring.added;
        self.put(available + 4 + 2 * slot, &head.to_le_bytes());
        self.put(available + 2, &added.to_le_bytes());
    }

    pub fn notify(&mut self, queue: u16) {
        self.write_u16(NOTIFY + 4 * u64::from(queue), queue);
    }

    /// A whole request.
    pub fn submit(&mut self, queue: u16, parts: &[(u64, u32, u16)]) -> u16 {
        let head = self.chain(queue, parts);
        self.make_available(queue, head);
        self.notify(queue);
        head
    }

    pub fn used_index(&self, queue: u16) -> u16 {
        let bytes = self.get(Self::areas(queue)[2] + 2, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// The next used buffer: its head and length.
    pub fn take_used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let index = self.used_index(queue);
        let ring = &mut self.rings[usize::from(queue)];
        if ring.seen == index {
            return None;
        }
        let slot = u64::from(ring.seen % QUEUE_SIZE);
        ring.seen = ring.seen.wrapping_add(1);
        let element = self.get(Self::areas(queue)[2] + 4 + 8 * slot, 8);
        let word =
            |at: usize| u32::from_le_bytes([element[at], element[at + 1], element[at + 2], element[at + 3]]);
        Some((word(0) as u16, word(4)))
    }

    /// The same from a device with a thread, or with input from outside.
    pub fn wait_used(&mut self, queue: u16) -> (u16, u32) {
        let mut used = None;
        wait_until(|| {
            used = self.take_used(queue);
            used.is_some()
        });
        used.expect("it came")
    }
}

/// Waits for something that another thread does.
pub(super) fn wait_until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Numbers for tests that try everything, the same in every run.
pub(super) struct Noise(pub u64);

impl Noise {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
