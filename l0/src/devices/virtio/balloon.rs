//! The memory balloon: the guest hands back pages, and their memory returns to the host.
//!
//! A page given back is a hole in the memory file: it reads as zeroes on every engine, and costs nothing until
//! somebody writes to it. So deflating needs no work here.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use super::dma::{Dma, Segments};
use super::queue::{QueueError, VirtQueue};
use super::runner::Waker;
use super::{DeviceConfig, DeviceType, VirtioDevice, feature, read_registers};
use crate::vcpu_signal::lock;

const INFLATE: usize = 0;
/// Queue 1 deflates. Queues are numbered without gaps, and as no statistics are offered, this is the next.
const REPORTING: usize = 2;
/// The guest may take pages back when it runs out of memory, without asking.
const F_DEFLATE_ON_OOM: u32 = 2;
/// The guest reports free pages without giving them up for good.
const F_REPORTING: u32 = 5;
/// Unit of the balloon.
const PAGE: u64 = 4096;
/// Page numbers that one request may list (drivers list 256 or 1024): a reset waits for one request.
const PFN_LIMIT: u64 = 4096;
/// Bytes of page numbers read at once.
const CHUNK: usize = 4096;

#[derive(Default)]
struct Registers {
    target: AtomicU32,
    actual: AtomicU32,
}

impl DeviceConfig for Registers {
    fn read(&self, offset: usize, data: &mut [u8]) {
        let mut registers = [0; 8];
        registers[..4].copy_from_slice(&self.target.load(Ordering::Acquire).to_le_bytes());
        registers[4..].copy_from_slice(&self.actual.load(Ordering::Acquire).to_le_bytes());
        read_registers(&registers, offset, data);
    }

    fn write(&self, offset: usize, data: &[u8]) {
        if let (4, &[a, b, c, d]) = (offset, data) {
            self.actual.store(u32::from_le_bytes([a, b, c, d]), Ordering::Release);
        }
    }
}

/// A virtio memory balloon.
pub struct Balloon {
    registers: Arc<Registers>,
    waker: Arc<Mutex<Option<Waker>>>,
}

/// Sets the balloon's size.
#[derive(Clone)]
pub struct BalloonHandle {
    registers: Arc<Registers>,
    waker: Arc<Mutex<Option<Waker>>>,
}

impl Balloon {
    /// An empty balloon, and the handle that asks it to grow.
    pub fn new() -> (Self, BalloonHandle) {
        let (registers, waker) = (Arc::new(Registers::default()), Arc::new(Mutex::new(None)));
        let handle = BalloonHandle { registers: Arc::clone(&registers), waker: Arc::clone(&waker) };
        (Self { registers, waker }, handle)
    }
}

impl BalloonHandle {
    /// Asks the guest to give back memory until `bytes` of it are in the balloon.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.registers.target.store(pages, Ordering::Release);
        let waker = lock(&self.waker).clone();
        if let Some(waker) = waker {
            waker.config_changed();
        }
    }

    /// Bytes that the guest says are in the balloon.
    pub fn actual(&self) -> u64 {
        u64::from(self.registers.actual.load(Ordering::Acquire)) * PAGE
    }
}

/// Gives back the pages that `list` (32-bit page numbers) names; neighbours in one go. Numbers outside of RAM
/// are ignored.
fn inflate(list: &Segments, dma: &Dma) {
    let mut run: Option<(u64, u64)> = None;
    let give_back = |run: Option<(u64, u64)>| {
        if let Some((first, count)) = run {
            discard(first * PAGE, count * PAGE, dma);
        }
    };
    let len = list.len().min(4 * PFN_LIMIT) & !3;
    let mut buffer = [0; CHUNK];
    let mut done = 0;
    while done < len {
        let part = (len - done).min(CHUNK as u64) as usize;
        if dma.read(list, done, &mut buffer[..part]).is_err() {
            break;
        }
        for number in buffer[..part].chunks_exact(4) {
            let page = u64::from(u32::from_le_bytes([number[0], number[1], number[2], number[3]]));
            run = match run {
                Some((first, count)) if first + count == page => Some((first, count + 1)),
                _ => {
                    give_back(run);
                    Some((page, 1))
                }
            };
        }
        done += part as u64;
    }
    give_back(run);
}

fn discard(gpa: u64, len: u64, dma: &Dma) {
    // The guest asked for nothing that it could notice if it does not happen.
    if let Err(error) = dma.discard(gpa, len) {
        log::debug!("virtio balloon: {error}");
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        feature(F_DEFLATE_ON_OOM) | feature(F_REPORTING)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 32]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        Arc::clone(&self.registers) as Arc<dyn DeviceConfig>
    }

    fn connect(&mut self, waker: Waker) {
        *lock(&self.waker) = Some(waker);
    }

    fn process(&mut self, index: usize, queue: &mut VirtQueue) -> Result<(), QueueError> {
        while let Some(chain) = queue.pop()? {
            match index {
                INFLATE => inflate(&chain.readable, queue.dma()),
                // Each writable piece is a free stretch of memory.
                REPORTING => chain.writable.iter().for_each(|s| discard(s.gpa, s.len.into(), queue.dma())),
                _ => {} // deflate
            }
            queue.complete(&chain, 0)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.registers.actual.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_driver::*;
    use super::*;

    fn balloon(features: u64, queues: u16) -> (Driver, BalloonHandle) {
        let (balloon, handle) = Balloon::new();
        (Driver::ready(balloon, features, queues), handle)
    }

    fn put_numbers(driver: &Driver, numbers: &[u32]) -> u32 {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        driver.put(BUFFERS, &bytes);
        bytes.len() as u32
    }

    #[test]
    fn inflated_pages_lose_their_content_and_come_back_empty() {
        let (mut driver, _) = balloon(0, 2);
        driver.put(0x20_0000, &[0x55; 0x5000]);
        let len = put_numbers(&driver, &[0x200, 0x201, 0x204, u32::MAX, (RAM / PAGE) as u32, 0x203]);
        driver.submit(0, &[(BUFFERS, len, 0)]);
        assert_eq!(driver.take_used(0), Some((0, 0)));
        let kept: Vec<usize> = (0..5)
            .filter(|page| driver.get(0x20_0000 + page * PAGE, 1) == [0x55])
            .map(|p| p as usize)
            .collect();
        assert_eq!(kept, [2]);
        let wrote = lock(&driver.world.wrote);
        let discarded: Vec<_> = wrote.iter().filter(|(gpa, _)| *gpa >= 0x20_0000).collect();
        assert_eq!(discarded, [&(0x20_0000, 0x2000), &(0x20_4000, 0x1000), &(0x20_3000, 0x1000)]);
        drop(wrote);
        driver.submit(1, &[(BUFFERS, len, 0)]);
        assert_eq!(driver.take_used(1), Some((0, 0)));
        driver.put(0x20_0000, &[1]);
        assert_eq!(driver.get(0x20_0000, 2), [1, 0]);
    }

    #[test]
    fn a_list_of_all_memory_and_more_is_bounded() {
        let (mut driver, _) = balloon(0, 2);
        driver.submit(0, &[(0x20_0000, 0x20_0000, 0), (0, 0x20_0003, 0)]);
        assert_eq!(driver.take_used(0), Some((0, 0)));
        driver.submit(0, &[(RAM - 8, 16, 0)]);
        assert_eq!(driver.take_used(0), Some((2, 0)));
        assert_eq!(driver.status(), 15);
    }

    #[test]
    fn a_new_target_interrupts_and_changes_the_generation() {
        let (mut driver, handle) = balloon(0, 2);
        let generation = driver.read::<1>(0x15);
        handle.set_target(3 << 20);
        assert_ne!(driver.read::<1>(0x15), generation);
        assert_eq!(driver.read::<1>(ISR), [2]);
        assert_eq!(u32::from_le_bytes(driver.read(DEVICE)), 768);
        driver.write(DEVICE + 4, &100u32.to_le_bytes());
        assert_eq!(handle.actual(), 100 * PAGE);
        driver.reset();
        assert_eq!(handle.actual(), 0);
    }

    #[test]
    fn reported_pages_are_given_back() {
        let (mut driver, _) = balloon(1 << F_REPORTING, 3);
        driver.put(0x20_0000, &[0x55; 0x3000]);
        driver.submit(2, &[(0x20_0000, 0x1000, WRITE), (0x20_1800, 0x1800, WRITE), (RAM, 0x1000, WRITE)]);
        assert_eq!(driver.take_used(2), Some((0, 0)));
        let content = [0, 0x1000, 0x2000].map(|at| driver.get(0x20_0000 + at, 1)[0]);
        assert_eq!(content, [0, 0x55, 0], "only whole pages");
    }
}
