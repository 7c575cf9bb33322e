//! A virtqueue as devices use it: chains come out checked, used buffers go back, interrupts are suppressed as
//! the driver asked. Configuration, available ring and chains are virtio-queue's; the used ring is written here,
//! as that crate cannot publish several buffers at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::dma::{Dma, Segment, Segments};
use super::interrupts::Interrupts;

/// The most descriptors of one chain, direct or in an indirect table. Also what one readv of the host takes.
pub const MAX_SEGMENTS: usize = 1024;
/// Bytes of an element of the used ring, and of the ring's header.
const USED_ELEMENT: u64 = 8;
const USED_HEADER: u64 = 4;
/// Bytes of the available ring's header, of the event index behind both rings, and of a descriptor.
const AVAIL_HEADER: u64 = 4;
const EVENT: u64 = 2;
const DESCRIPTOR: u64 = 16;

/// The driver broke the queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings are wrong.
    #[error("virtqueue: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A chain is wrong.
    #[error("virtqueue: {0}")]
    Chain(&'static str),
}

/// One request: what the device reads, then what it writes. Addresses are not checked yet.
#[derive(Debug)]
pub struct Chain {
    /// Its number in the descriptor table.
    pub head: u16,
    /// What the driver says.
    pub readable: Segments,
    /// Where the device answers.
    pub writable: Segments,
}

impl Chain {
    fn parse(raw: DescriptorChain<&GuestMemoryMmap<()>>) -> Result<Self, QueueError> {
        let mut chain =
            Self { head: raw.head_index(), readable: Segments::default(), writable: Segments::default() };
        // The iterator just ends at a descriptor it cannot follow: then the last one still promised another.
        let mut more = true;
        for (count, descriptor) in raw.enumerate() {
            if count == MAX_SEGMENTS {
                return Err(QueueError::Chain("a chain of more than 1024 descriptors"));
            }
            more = descriptor.has_next();
            let segment = Segment { gpa: descriptor.addr().0, len: descriptor.len() };
            if descriptor.is_write_only() {
                chain.writable.push(segment);
            } else if chain.writable.is_empty() {
                chain.readable.push(segment);
            } else {
                return Err(QueueError::Chain("a readable descriptor behind a writable one"));
            }
        }
        if more {
            return Err(QueueError::Chain("a chain that loops, leaves its table or names one outside RAM"));
        }
        Ok(chain)
    }
}

/// A queue in use.
pub struct VirtQueue {
    queue: Queue,
    dma: Dma,
    interrupts: Arc<Interrupts>,
    index: usize,
    /// A reset waits: no more chains.
    stop: Arc<AtomicBool>,
    /// The driver was told that it need not notify.
    quiet: bool,
    /// The used index when an interrupt was last considered.
    signalled: u16,
}

impl VirtQueue {
    /// A queue whose configuration is complete; an error if its rings are not in RAM.
    pub(super) fn new(
        queue: Queue,
        dma: Dma,
        interrupts: Arc<Interrupts>,
        index: usize,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, QueueError> {
        // Not `Queue::is_valid`: it logs, as often as the driver likes to try.
        let size = u64::from(queue.size());
        let areas = [
            (queue.desc_table(), DESCRIPTOR * size),
            (queue.avail_ring(), AVAIL_HEADER + 2 * size + EVENT),
            (queue.used_ring(), USED_HEADER + USED_ELEMENT * size + EVENT),
        ];
        let in_ram = |&(at, len): &(u64, u64)| {
            GuestMemoryBackend::check_range(dma.memory(), GuestAddress(at), len as usize)
        };
        if !areas.iter().all(in_ram) || queue.avail_ring() == 0 {
            return Err(QueueError::Chain("rings outside of RAM"));
        }
        Ok(Self { queue, dma, interrupts, index, stop, quiet: false, signalled: 0 })
    }

    /// Guest memory.
    pub fn dma(&self) -> &Dma {
        &self.dma
    }

    /// The next request, if there is one. When there is none, the driver will notify of the next.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        // Twice at most: a driver that adds a buffer just now is seen by the second look.
        for _ in 0..2 {
            if self.stop.load(Ordering::Acquire) {
                return Ok(None);
            }
            if !self.quiet {
                self.queue.disable_notification(self.dma.memory())?;
                self.quiet = true;
            }
            if let Some(raw) = self.queue.iter(self.dma.memory())?.next() {
                return Chain::parse(raw).map(Some);
            }
            self.quiet = false;
            if !self.queue.enable_notification(self.dma.memory())? {
                break;
            }
        }
        Ok(None)
    }

    /// Gives `chain` back to the driver with `written` bytes in its writable part.
    pub fn complete(&mut self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        self.complete_together(&[(chain.head, written)])
    }

    /// Gives several chains, by [`Chain::head`], back so that the driver sees all of them or none: a packet in
    /// several buffers must not be found half there.
    pub fn complete_together(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let memory = self.dma.memory();
        let ring = GuestAddress(self.queue.used_ring());
        let mut next = self.queue.next_used();
        for &(head, written) in used {
            if head >= self.queue.size() {
                return Err(virtio_queue::Error::InvalidDescriptorIndex.into());
            }
            let slot = u64::from(next % self.queue.size());
            let element = ring.unchecked_add(USED_HEADER + slot * USED_ELEMENT);
            let bytes = (u64::from(written) << 32 | u64::from(head)).to_le_bytes();
            memory.write_slice(&bytes, element).map_err(virtio_queue::Error::GuestMemory)?;
            self.dma.wrote(element.0, USED_ELEMENT);
            next = next.wrapping_add(1);
        }
        memory
            .store(next.to_le(), ring.unchecked_add(2), Ordering::Release)
            .map_err(virtio_queue::Error::GuestMemory)?;
        self.dma.wrote(ring.0, USED_HEADER);
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Interrupts for the buffers used since the last call, if the driver wants that.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        let next = self.queue.next_used();
        let before = std::mem::replace(&mut self.signalled, next);
        if next != before && self.driver_wants_interrupt(before, next)? {
            self.interrupts.raise_queue(self.index);
        }
        Ok(())
    }

    /// Whether the driver asked to hear of used indices `before` to `next`.
    fn driver_wants_interrupt(&self, before: u16, next: u16) -> Result<bool, QueueError> {
        // The used index must be visible before the driver's wish is read, or both sides may wait.
        fence(Ordering::SeqCst);
        let ring = GuestAddress(self.queue.avail_ring());
        let load = |at: GuestAddress| -> Result<u16, QueueError> {
            let value = self.dma.memory().load(at, Ordering::Acquire);
            Ok(u16::from_le(value.map_err(virtio_queue::Error::GuestMemory)?))
        };
        if self.queue.event_idx_enabled() {
            // used_event stands behind the available ring; it is met if it lies in before..next.
            let event = load(ring.unchecked_add(AVAIL_HEADER + 2 * u64::from(self.queue.size())))?;
            return Ok(next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(before));
        }
        Ok(u32::from(load(ring)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_driver::*;
    use super::super::{Rng, RngSource};
    use crate::vcpu_signal::lock;

    /// An entropy device answers whatever has room, so that only the rings can be wrong.
    fn driver(features: u64) -> Driver {
        Driver::ready(Rng::new(RngSource::Seed(1)), features, 1)
    }

    const TABLE: u64 = BUFFERS + 0x8000;

    #[track_caller]
    fn assert_broken(mut driver: Driver) {
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
        assert_eq!(driver.used_index(0), 0, "nothing was answered");
        assert_eq!(driver.read::<1>(ISR), [2], "the driver is told");
        driver.notify(0);
        driver.reset();
        assert_eq!(driver.status(), 0);
        driver.put(Driver::areas(0)[1], &[0; 64]);
        driver.put(Driver::areas(0)[2], &[0; 64]);
        driver.start(0, 1);
        driver.submit(0, &[(BUFFERS, 8, WRITE)]);
        assert_eq!(driver.take_used(0), Some((0, 8)), "works after the reset");
    }

    #[test]
    fn a_loop_breaks_the_queue() {
        let mut driver = driver(0);
        let [table, ..] = Driver::areas(0);
        driver.put_descriptor(table, 0, BUFFERS, 8, NEXT | WRITE, 1);
        driver.put_descriptor(table, 1, BUFFERS, 8, NEXT | WRITE, 0);
        driver.make_available(0, 0);
        driver.notify(0);
        assert_broken(driver);
    }

    #[test]
    fn descriptors_outside_the_table_break_the_queue() {
        for (head, next) in [(0, QUEUE_SIZE), (0, 0xffff), (QUEUE_SIZE, 0), (0xffff, 0)] {
            let mut driver = driver(0);
            driver.put_descriptor(Driver::areas(0)[0], 0, BUFFERS, 8, NEXT | WRITE, next);
            driver.make_available(0, head);
            driver.notify(0);
            assert_broken(driver);
        }
    }

    #[test]
    fn an_index_that_jumps_breaks_the_queue() {
        let mut driver = driver(0);
        driver.put(Driver::areas(0)[1] + 2, &(QUEUE_SIZE + 1).to_le_bytes());
        driver.notify(0);
        assert_broken(driver);
    }

    #[test]
    fn bad_indirect_tables_break_the_queue() {
        // Of no whole number of descriptors, empty, outside of RAM, of the largest length there is.
        for (at, len) in
            [(TABLE, 15), (TABLE, 24), (TABLE, 0), (RAM, 16), (u64::MAX - 7, 16), (RAM, 0xffff_fff0)]
        {
            let mut driver = driver(0);
            driver.submit(0, &[(at, len, INDIRECT)]);
            assert_broken(driver);
        }
        let mut nested = driver(0);
        nested.put_descriptor(TABLE, 0, TABLE, 16, INDIRECT, 0);
        nested.submit(0, &[(TABLE, 16, INDIRECT)]);
        assert_broken(nested);
        let mut looping = driver(0);
        looping.put_descriptor(TABLE, 0, BUFFERS, 1, NEXT | WRITE, 0);
        looping.submit(0, &[(TABLE, 16 * 0xffff, INDIRECT)]);
        assert_broken(looping);
    }

    #[test]
    fn readable_behind_writable_breaks_the_queue() {
        let mut driver = driver(0);
        driver.submit(0, &[(BUFFERS, 8, WRITE), (BUFFERS, 8, 0)]);
        assert_broken(driver);
    }

    #[test]
    fn more_than_4_gib_in_one_chain_breaks_the_queue() {
        let mut driver = driver(0);
        driver.submit(0, &[(BUFFERS, u32::MAX, WRITE), (BUFFERS, u32::MAX, WRITE)]);
        assert_broken(driver);
    }

    #[test]
    fn empty_and_huge_buffers_are_answered() {
        let mut driver = driver(0);
        driver.submit(0, &[(BUFFERS, 0, WRITE)]);
        assert_eq!(driver.take_used(0), Some((0, 0)));
        driver.submit(0, &[(BUFFERS, u32::MAX, WRITE)]);
        assert_eq!(driver.take_used(0), Some((1, 64 << 10)), "never more than 64 KiB");
        driver.submit(0, &[(RAM - 4096, u32::MAX, WRITE)]);
        assert_eq!(driver.take_used(0), Some((2, 0)), "reaches out of RAM, so nothing was written");
        assert_eq!(driver.status(), 15);
    }

    #[test]
    fn writes_are_observed_before_the_buffer_is_used() {
        let mut driver = driver(0);
        driver.submit(0, &[(BUFFERS, 8, WRITE), (BUFFERS + 0x100, 4, WRITE)]);
        let used = Driver::areas(0)[2];
        assert_eq!(
            *lock(&driver.world.wrote),
            [(BUFFERS, 8), (BUFFERS + 0x100, 4), (used + 4, 8), (used, 4)]
        );
    }

    #[test]
    fn the_driver_can_turn_interrupts_off() {
        let mut driver = driver(0);
        driver.put(Driver::areas(0)[1], &1u16.to_le_bytes());
        driver.submit(0, &[(BUFFERS, 8, WRITE)]);
        assert!(!*lock(&driver.world.line));
        driver.put(Driver::areas(0)[1], &0u16.to_le_bytes());
        driver.submit(0, &[(BUFFERS, 8, WRITE)]);
        assert!(*lock(&driver.world.line));
    }

    #[test]
    fn with_event_index_the_driver_says_at_which_buffer_it_wants_to_hear() {
        let mut driver = driver(EVENT_IDX);
        let [_, available, used] = Driver::areas(0);
        let used_event = available + 4 + 2 * u64::from(QUEUE_SIZE);
        driver.put(used_event, &2u16.to_le_bytes());
        for expected in [false, false, true] {
            driver.submit(0, &[(BUFFERS, 8, WRITE)]);
            assert_eq!(driver.read::<1>(ISR) == [1], expected);
        }
        let avail_event = driver.get(used + 4 + 8 * u64::from(QUEUE_SIZE), 2);
        assert_eq!(avail_event, 3u16.to_le_bytes(), "the device wants to hear of the next one");
        // Several at once, with the event among them.
        driver.put(used_event, &4u16.to_le_bytes());
        for _ in 0..3 {
            let head = driver.chain(0, &[(BUFFERS, 8, WRITE)]);
            driver.make_available(0, head);
        }
        driver.notify(0);
        assert_eq!(driver.read::<1>(ISR), [1]);
    }

    #[test]
    fn indices_wrap() {
        let mut driver = driver(EVENT_IDX);
        for turn in 0..70_000u32 {
            driver.submit(0, &[(BUFFERS, 1, WRITE)]);
            assert_eq!(driver.take_used(0), Some((turn as u16 % QUEUE_SIZE, 1)));
        }
    }
}
