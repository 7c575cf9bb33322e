//! The transport as a driver meets it, and every device under noise.

use std::io;
use std::sync::Arc;

use super::interrupts::NO_VECTOR;
use super::test_driver::*;
use super::{Access, Balloon, Block, Console, Processing, Rng, RngSource, VirtioDevice, VirtioPci};
use crate::devices::pci::{ECAM_BASE, PciDevice, PciHost, command};
use crate::devices::{Bus, MachineControl, MachineEvent};
use crate::memory::Ram;
use crate::vcpu_signal::lock;

/// Capability IDs, and what virtio's own describe.
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
/// Offsets in the window capability.
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;
const BAR_SIZE: u64 = 0x8000;

fn rng() -> Rng {
    Rng::new(RngSource::Seed(1))
}

fn config<const N: usize>(driver: &mut Driver, offset: usize) -> [u8; N] {
    let mut data = [0; N];
    driver.pci.read_config(offset, &mut data);
    data
}

/// Offset of the first capability `id` whose fourth byte (virtio: what it describes) is `kind`.
fn capability(driver: &mut Driver, id: u8, kind: Option<u8>) -> usize {
    let mut at = usize::from(config::<1>(driver, 0x34)[0]);
    for _ in 0..48 {
        let bytes = config::<4>(driver, at);
        if bytes[0] == id && kind.is_none_or(|kind| bytes[3] == kind) {
            return at;
        }
        at = bytes[1].into();
    }
    panic!("no capability {id:#x} {kind:?}");
}

#[test]
fn looks_like_a_modern_virtio_device() {
    let mut driver = Driver::new(rng(), Processing::Inline);
    assert_eq!(config(&mut driver, 0), [0xf4, 0x1a, 0x44, 0x10]);
    assert_eq!(config(&mut driver, 8), [1, 0, 0xff, 0]);
    assert_eq!(config(&mut driver, 0x3d), [1]);
    for (kind, page) in [(CFG_COMMON, 0), (CFG_ISR, 0x1000u32), (CFG_DEVICE, 0x2000), (CFG_NOTIFY, 0x3000)] {
        let at = capability(&mut driver, CAP_VENDOR, Some(kind));
        assert_eq!(config(&mut driver, at + 4), [0; 4], "BAR 0");
        assert_eq!(config(&mut driver, at + 8), page.to_le_bytes());
    }
    let msix = capability(&mut driver, CAP_MSIX, None);
    assert_eq!(config(&mut driver, msix + 2), [1, 0], "two vectors");
    assert_eq!(config(&mut driver, msix + 4), 0x4000u32.to_le_bytes());
    assert_eq!(config(&mut driver, msix + 8), 0x5000u32.to_le_bytes());
}

#[test]
fn only_version_1_drivers_with_offered_features_get_in() {
    let mut driver = Driver::new(rng(), Processing::Inline);
    assert_eq!(driver.offered(), VERSION_1 | EVENT_IDX | 1 << 28);
    for features in [0, EVENT_IDX, VERSION_1 | 1 << 34, VERSION_1 | 1] {
        driver.negotiate(features);
        assert_eq!(driver.status(), 3, "{features:#x}");
        driver.set_status(DRIVER_OK);
        assert_eq!(driver.status(), 3, "not ready without features");
        driver.reset();
    }
    driver.negotiate(VERSION_1);
    assert_eq!(driver.status(), 11);
    driver.accept(VERSION_1 | EVENT_IDX);
    driver.write(8, &0u32.to_le_bytes());
    assert_eq!(driver.read(0xc), [0; 4], "too late");
    driver.write(0, &2u32.to_le_bytes());
    assert_eq!(driver.read(4), [0; 4], "there are 64 bits");
    driver.write(0x14, &[1]);
    assert_eq!(driver.status(), 11, "bits do not go away but by reset");
}

#[test]
fn queues_take_only_sizes_that_can_be() {
    let mut driver = Driver::new(rng(), Processing::Inline);
    assert_eq!(driver.read_u16(0x12), 1);
    for (size, expected) in [(0, 64), (3, 64), (128, 64), (0x8000, 64), (32, 32), (1, 1)] {
        driver.write_u16(0x18, size);
        assert_eq!(driver.read_u16(0x18), expected, "{size}");
    }
    driver.write_u16(0x16, 1);
    assert_eq!(driver.read_u16(0x18), 0, "no such queue");
    driver.write_u16(0x18, 16);
    driver.write(0x20, &[0xff; 8]);
    driver.write_u16(0x1c, 1);
    assert_eq!((driver.read_u16(0x1c), driver.status()), (0, 0));
    driver.enable_queue(0);
    assert_eq!(driver.read_u16(0x1c), 0, "not before the features");
    driver.negotiate(VERSION_1);
    driver.enable_queue(0);
    assert_eq!(driver.read_u16(0x1c), 1);
    driver.write_u16(0x18, 8);
    driver.write(0x20, &[0xff; 8]);
    assert_eq!(driver.read_u16(0x18), QUEUE_SIZE, "fixed while enabled");
    assert_eq!(u64::from_le_bytes(driver.read(0x20)), Driver::areas(0)[0]);
    driver.reset();
    assert_eq!((driver.read_u16(0x18), driver.read_u16(0x1c)), (64, 0));
}

#[test]
fn rings_outside_of_ram_need_a_reset() {
    let good = Driver::areas(0);
    for (area, at) in [
        (0, RAM),
        (0, RAM - 16),
        (1, RAM - 4),
        (2, u64::MAX - 3),
        (0, good[0] + 8),
        (1, good[1] + 1),
        (2, 2),
        (1, 0),
    ] {
        let mut areas = good;
        areas[area] = at;
        let mut driver = Driver::new(rng(), Processing::Inline);
        driver.negotiate(VERSION_1);
        driver.enable_queue_at(0, areas);
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "area {area} at {at:#x}");
        driver.set_status(DRIVER_OK);
        driver.notify(0);
        driver.reset();
        driver.start(0, 1);
        driver.submit(0, &[(BUFFERS, 8, WRITE)]);
        assert_eq!(driver.take_used(0), Some((0, 8)));
    }
}

#[test]
fn buffers_wait_for_the_driver_and_for_bus_mastering() {
    let mut driver = Driver::new(rng(), Processing::Inline);
    driver.set_command(command::MEMORY);
    driver.negotiate(VERSION_1);
    driver.enable_queue(0);
    driver.submit(0, &[(BUFFERS, 8, WRITE)]);
    driver.set_status(DRIVER_OK);
    driver.notify(0);
    assert_eq!(driver.take_used(0), None);
    driver.set_command(command::MEMORY | command::BUS_MASTER);
    assert_eq!(driver.take_used(0), Some((0, 8)));
}

#[test]
fn intx_follows_isr_and_the_command_register() {
    let mut driver = Driver::ready(rng(), 0, 1);
    let level = |driver: &Driver| *lock(&driver.world.line);
    driver.submit(0, &[(BUFFERS, 8, WRITE)]);
    assert!(level(&driver));
    assert_eq!(config::<1>(&mut driver, 6)[0] & 8, 8, "interrupt status");
    driver.set_command(command::MEMORY | command::BUS_MASTER | command::INTX_DISABLE);
    assert!(!level(&driver));
    assert_eq!(config::<1>(&mut driver, 6)[0] & 8, 8, "still pending");
    driver.set_command(command::MEMORY | command::BUS_MASTER);
    assert!(level(&driver));
    assert_eq!(driver.read::<1>(ISR), [1]);
    assert!(!level(&driver));
    assert_eq!((driver.read::<1>(ISR), config::<1>(&mut driver, 6)[0] & 8), ([0], 0));
}

#[test]
fn msix_vectors_take_the_place_of_intx() {
    let mut driver = Driver::new(rng(), Processing::Inline);
    let control = capability(&mut driver, CAP_MSIX, None) + 2;
    driver.pci.write_config(control, &0xc000u16.to_le_bytes());
    driver.write_u16(0x10, 2);
    assert_eq!(driver.read_u16(0x10), NO_VECTOR, "there are two");
    driver.write_u16(0x10, 0);
    driver.write_u16(0x1a, 1);
    assert_eq!((driver.read_u16(0x10), driver.read_u16(0x1a)), (0, 1));
    (0..2).for_each(|vector| driver.set_vector(vector));
    driver.start(0, 1);
    driver.submit(0, &[(BUFFERS, 8, WRITE)]);
    assert!(lock(&driver.world.messages).is_empty(), "function mask");
    assert_eq!(driver.read(0x5000), [2], "pending");
    driver.pci.write_config(control, &0x8000u16.to_le_bytes());
    assert_eq!(*lock(&driver.world.messages), [1]);
    driver.write(MSIX_TABLE + 28, &1u32.to_le_bytes());
    driver.submit(0, &[(BUFFERS, 8, WRITE)]);
    assert_eq!(lock(&driver.world.messages).len(), 1, "vector mask");
    driver.write(MSIX_TABLE + 28, &0u32.to_le_bytes());
    assert_eq!(*lock(&driver.world.messages), [1, 1]);
    driver.put(Driver::areas(0)[1] + 2, &[0xff, 0xff]);
    driver.notify(0);
    assert_eq!(*lock(&driver.world.messages), [1, 1, 0], "a configuration change");
    assert!(!*lock(&driver.world.line));
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let mut driver = Driver::new(rng(), Processing::Inline);
    let window = capability(&mut driver, CAP_VENDOR, Some(CFG_PCI));
    let select = |driver: &mut Driver, offset: u32, length: u32| {
        driver.pci.write_config(window + WINDOW_OFFSET, &offset.to_le_bytes());
        driver.pci.write_config(window + WINDOW_LENGTH, &length.to_le_bytes());
    };
    select(&mut driver, 0x18, 2);
    assert_eq!(config::<4>(&mut driver, window + WINDOW_DATA)[..2], [64, 0]);
    select(&mut driver, 0x14, 1);
    driver.pci.write_config(window + WINDOW_DATA, &[3, 0, 0, 0]);
    assert_eq!(driver.status(), 3);
    for (offset, length) in [(0x15, 2), (0x14, 0), (0x14, 3), (0x14, 8), (0x8000, 4), (u32::MAX - 3, 4)] {
        select(&mut driver, offset, length);
        driver.pci.write_config(window + WINDOW_DATA, &[0; 4]);
        config::<4>(&mut driver, window + WINDOW_DATA);
        assert_eq!(driver.status(), 3, "{offset:#x} {length}");
    }
}

#[test]
fn a_machine_reset_starts_over() {
    let mut driver = Driver::ready(rng(), 0, 1);
    driver.submit(0, &[(BUFFERS, 8, WRITE)]);
    driver.pci.reset();
    assert_eq!((driver.status(), *lock(&driver.world.line)), (0, false));
}

#[test]
fn works_behind_the_host_bridge_and_goes_with_the_buses() {
    struct Nobody;
    impl MachineControl for Nobody {
        fn request(&self, _event: MachineEvent) {}
    }
    let (pio, mmio, world) = (Arc::new(Bus::default()), Arc::new(Bus::default()), Arc::new(World::default()));
    let host = PciHost::new(&pio, &mmio, world.clone(), Arc::new(Nobody), 0..0).expect("empty buses");
    let memory = Ram::new(RAM).expect("RAM").memory;
    let device = Box::new(Console::new(Box::new(io::sink())).0);
    let line = host.intx_line(4);
    let device = VirtioPci::new(device, memory, line, world.clone(), Processing::Thread, world.clone())
        .expect("a device");
    host.add(4, Box::new(device)).expect("slot 4 is free");
    let mut bar = [0; 4];
    mmio.read(ECAM_BASE + (4 << 15) + 0x10, &mut bar);
    let base = u64::from(u32::from_le_bytes(bar) & !0xf);
    let mut queues = [0; 2];
    assert!(mmio.read(base + 0x12, &mut queues));
    assert_eq!(queues, [2, 0]);
    drop((host, pio, mmio));
    assert_eq!(Arc::strong_count(&world), 1, "the device and its thread are gone");
}

/// Every device gets noise in its registers, its rings and its buffers. Nothing may panic or hang.
#[test]
fn noise_does_no_harm() {
    let image = vmm_sys_util::tempfile::TempFile::new().expect("temporary file");
    image.as_file().set_len(1 << 20).expect("length");
    for seed in 1..=3 {
        let block = Block::open(image.as_path(), Access::ReadWrite, "").expect("a good image");
        noise_against(block, seed, 0x7fff);
        noise_against(rng(), seed, 0);
        noise_against(Console::new(Box::new(io::sink())).0, seed, 0);
        noise_against(Balloon::new().0, seed, 0x24);
    }
    assert_eq!(image.as_file().metadata().expect("metadata").len(), 1 << 20);
}

fn noise_against(device: impl VirtioDevice + 'static, seed: u64, features: u64) {
    let offered = device.features();
    let queues = device.queue_sizes().len() as u64;
    let mut driver = Driver::new(device, Processing::Inline);
    let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut answered = 0u64;
    for _ in 0..60 {
        for index in 0..queues as u16 {
            answered += u64::from(driver.used_index(index));
            driver.put(Driver::areas(index)[1], &[0; 64]);
            driver.put(Driver::areas(index)[2], &[0; 256]);
        }
        driver.reset();
        driver.negotiate(VERSION_1 | offered & features);
        (0..queues).for_each(|index| driver.enable_queue(index as u16));
        driver.set_status(DRIVER_OK);
        for _ in 0..40 {
            match noise.below(8) {
                0 => write_noise_to_registers(&mut driver, &mut noise),
                1 => {
                    let mut data = [0; 8];
                    let len = 1 << noise.below(4);
                    driver.pci.read_bar(0, noise.below(BAR_SIZE - 8), &mut data[..len]);
                    driver.pci.read_config(noise.below(256) as usize, &mut data[..len]);
                }
                _ => submit_noise(&mut driver, &mut noise, queues),
            }
        }
    }
    assert!(answered > 100, "the noise was refused at the door: {answered}");
}

fn write_noise_to_registers(driver: &mut Driver, noise: &mut Noise) {
    let data = noise.next().to_le_bytes();
    let len = 1 << noise.below(4);
    if noise.below(8) == 0 {
        driver.pci.write_config(noise.below(256) as usize, &data[..len.min(4)]);
        driver.set_command(command::MEMORY | command::BUS_MASTER);
    } else {
        driver.pci.write_bar(0, noise.below(BAR_SIZE - 8), &data[..len]);
    }
}

fn submit_noise(driver: &mut Driver, noise: &mut Noise, queues: u64) {
    let queue = noise.below(queues) as u16;
    // Something that looks like a request header, and like page numbers.
    driver.put(BUFFERS, &(noise.below(16) as u32).to_le_bytes());
    driver.put(BUFFERS + 8, &(noise.next() >> noise.below(64)).to_le_bytes());
    let count = 1 + noise.below(5) as usize;
    let writable_from = noise.below(6) as usize;
    let parts: Vec<_> = (0..count)
        .map(|i| {
            let gpa = if noise.below(4) == 0 { noise.next() >> noise.below(64) } else { BUFFERS };
            let len =
                [16, 16, 1, 512, 0, 4096, noise.next() as u32 >> noise.below(32)][noise.below(7) as usize];
            let flags = if noise.below(64) == 0 { noise.next() as u16 } else { 0 };
            (gpa, len, flags | if i >= writable_from || i + 1 == count { WRITE } else { 0 })
        })
        .collect();
    let head = driver.chain(queue, &parts);
    let head = if noise.below(128) == 0 { noise.next() as u16 } else { head };
    driver.make_available(queue, head);
    driver.notify(queue);
}
