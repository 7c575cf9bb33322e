//! The virtio-pci transport, modern interface only: common configuration, notifications, ISR, device
//! configuration, and the capability that reaches all of them through configuration space.
//!
//! One 64-bit BAR holds everything, each part on its own 4 KiB page, so that a hypervisor in the guest may hand
//! single parts on to its own guests:
//!
//! ```text
//! 0000 common configuration   1000 ISR   2000 device configuration   3000 notifications, 4 bytes a queue
//! 4000 MSI-X table            5000 MSI-X pending bits
//! ```

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::interrupts::Interrupts;
use super::queue::{QueueError, VirtQueue};
use super::runner::Runner;
use super::{DeviceConfig, DeviceType, Dma, DmaObserver, Processing, VirtioDevice, feature, read_registers};
use crate::devices::pci::{BarKind, ConfigSpace, Identity, Msix, PciDevice, command, register};
use crate::devices::{IrqLine, MsiSink};
use crate::memory::GuestMemory;

/// Vendor of every virtio device.
const VENDOR: u16 = 0x1af4;
/// Device IDs of modern devices count from here by device type.
const DEVICE_BASE: u16 = 0x1040;
/// The one BAR.
const BAR: usize = 0;
const BAR_SIZE: u64 = 0x8000;
const PAGE: u64 = 0x1000;
/// Pages of the BAR.
const COMMON: u64 = 0;
const ISR: u64 = 1;
const DEVICE: u64 = 2;
const NOTIFY: u64 = 3;
const MSIX_TABLE: u64 = 4;
const MSIX_PENDING: u64 = 5;
/// Bytes of notification space for each queue.
const NOTIFY_MULTIPLIER: u32 = 4;

/// Capability IDs.
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
/// MSI-X control: function mask and enable, in the capability's upper byte.
const MSIX_MASKED: u16 = 1 << 14;
const MSIX_ENABLED: u16 = 1 << 15;
/// What a virtio capability describes.
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
/// Offsets in the capability that reaches the BAR through configuration space.
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// Device status bits.
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// Those a driver may set.
const DRIVER_BITS: u8 = (VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED) as u8;

/// Length of the common configuration structure.
const COMMON_LEN: usize = 0x38;

/// A queue as the driver configures it.
#[derive(Clone, Copy)]
struct QueueSetup {
    max_size: u16,
    size: u16,
    enabled: bool,
    /// Addresses of descriptor table, driver area (available ring) and device area (used ring).
    areas: [u64; 3],
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, enabled: false, areas: [0; 3] }
    }

    fn build(&self, event_idx: bool) -> Result<Queue, QueueError> {
        let mut queue = Queue::new(self.max_size)?;
        queue.try_set_size(self.size)?;
        queue.try_set_desc_table_address(GuestAddress(self.areas[0]))?;
        queue.try_set_avail_ring_address(GuestAddress(self.areas[1]))?;
        queue.try_set_used_ring_address(GuestAddress(self.areas[2]))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    config: ConfigSpace,
    device_config: Arc<dyn DeviceConfig>,
    offered: u64,
    accepted: u64,
    offered_select: u32,
    accepted_select: u32,
    queue_select: u16,
    queues: Vec<QueueSetup>,
    dma: Dma,
    interrupts: Arc<Interrupts>,
    runner: Arc<Runner>,
    thread: Option<JoinHandle<()>>,
    msix_cap: usize,
    window_cap: usize,
}

impl VirtioPci {
    /// Puts `device` behind the transport. `irq` is INTA of the slot it will be in
    /// ([`crate::devices::pci::PciHost::intx_line`]); `observer` sees every write of the device to `memory`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        irq: IrqLine,
        msi: Arc<dyn MsiSink>,
        processing: Processing,
        observer: Arc<dyn DmaObserver>,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes();
        assert!(sizes.len() <= 64, "a device of ours has too many queues");
        let offered = device.features()
            | feature(VIRTIO_F_VERSION_1)
            | feature(VIRTIO_RING_F_INDIRECT_DESC)
            | feature(VIRTIO_RING_F_EVENT_IDX);
        let vectors = sizes.len() + 1;
        let (config, msix_cap, window_cap) = config_space(device.device_type(), sizes.len(), vectors);
        let device_config = device.config();
        let interrupts = Interrupts::new(sizes.len(), Msix::new(vectors, msi), irq);
        let (runner, thread) = Runner::start(device, Arc::clone(&interrupts), processing)?;
        Ok(Self {
            config,
            device_config,
            offered,
            accepted: 0,
            offered_select: 0,
            accepted_select: 0,
            queue_select: 0,
            queues: sizes.iter().map(|&size| QueueSetup::new(size)).collect(),
            dma: Dma::new(memory, observer),
            interrupts,
            runner,
            thread,
            msix_cap,
            window_cap,
        })
    }

    fn selected(&mut self) -> Option<&mut QueueSetup> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    /// The common configuration structure as it reads now.
    fn common(&mut self) -> [u8; COMMON_LEN] {
        let mut image = [0; COMMON_LEN];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.offered_select.to_le_bytes());
        put(0x04, &half(self.offered, self.offered_select).to_le_bytes());
        put(0x08, &self.accepted_select.to_le_bytes());
        put(0x0c, &half(self.accepted, self.accepted_select).to_le_bytes());
        put(0x10, &self.interrupts.config_vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.runner.status(), self.runner.generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        let index = self.queue_select;
        let vector = self.interrupts.queue_vector(index.into());
        // A queue that does not exist has size 0.
        if let Some(queue) = self.selected() {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &index.to_le_bytes());
            for (i, area) in queue.areas.iter().enumerate() {
                put(0x20 + 8 * i, &area.to_le_bytes());
            }
        }
        image
    }

    /// Writes to common configuration; a driver must use each field's own width (64-bit fields by halves, too).
    fn write_common(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0x14, &[status]) => self.write_status(status),
            (0x10..0x20, &[low, high]) => self.write_common_u16(offset, u16::from_le_bytes([low, high])),
            (0x00..0x10, &[a, b, c, d]) => self.write_common_u32(offset, u32::from_le_bytes([a, b, c, d])),
            (0x20..0x38, bytes) if matches!(bytes.len(), 4 | 8) && offset % bytes.len() as u64 == 0 => {
                let Some(queue) = self.selected().filter(|queue| !queue.enabled) else { return };
                let at = (offset - 0x20) as usize;
                if let Some(area) = queue.areas.get_mut(at / 8) {
                    let mut value = area.to_le_bytes();
                    value[at % 8..at % 8 + bytes.len()].copy_from_slice(bytes);
                    *area = u64::from_le_bytes(value);
                }
            }
            _ => {}
        }
    }

    fn write_common_u32(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.offered_select = value,
            0x08 => self.accepted_select = value,
            0x0c if self.runner.status() & FEATURES_OK == 0 && self.accepted_select < 2 => {
                let shift = 32 * self.accepted_select;
                self.accepted = self.accepted & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
            _ => {}
        }
    }

    fn write_common_u16(&mut self, offset: u64, value: u16) {
        match offset {
            0x10 => self.interrupts.set_config_vector(value),
            0x16 => self.queue_select = value,
            0x18 => {
                let Some(queue) = self.selected().filter(|queue| !queue.enabled) else { return };
                if value.is_power_of_two() && value <= queue.max_size {
                    queue.size = value;
                }
            }
            0x1a => self.interrupts.set_queue_vector(self.queue_select.into(), value),
            0x1c if value == 1 => self.enable_queue(),
            _ => {}
        }
    }

    /// Device status. A driver adds bits one after the other; zero resets.
    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.reset_device();
            return;
        }
        let status = self.runner.status();
        let mut added = value & DRIVER_BITS & !status;
        let acceptable =
            self.accepted & !self.offered == 0 && self.accepted & feature(VIRTIO_F_VERSION_1) != 0;
        if !acceptable {
            added &= !FEATURES_OK; // reads back clear: the driver gives up, as the specification asks
        }
        if (status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        self.runner.set_status(added, self.accepted);
    }

    fn enable_queue(&mut self) {
        let index = usize::from(self.queue_select);
        let event_idx = self.accepted & feature(VIRTIO_RING_F_EVENT_IDX) != 0;
        if self.runner.status() & FEATURES_OK == 0 {
            return;
        }
        let Some(setup) = self.selected().filter(|queue| !queue.enabled) else { return };
        setup.enabled = true;
        let queue = setup.build(event_idx).and_then(|queue| {
            let interrupts = Arc::clone(&self.interrupts);
            VirtQueue::new(queue, self.dma.clone(), interrupts, index, self.runner.stop_flag())
        });
        self.runner.set_queue(index, queue);
        if self.runner.status() & DRIVER_OK != 0 {
            self.runner.kick(index);
        }
    }

    fn reset_device(&mut self) {
        self.runner.reset();
        self.accepted = 0;
        self.offered_select = 0;
        self.accepted_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
    }

    /// Follows the command register and MSI-X's control bits.
    fn follow_config(&mut self) {
        let command = self.config.command();
        let msix = self.config.u16_at(self.msix_cap + 2);
        let bus_master = command & command::BUS_MASTER != 0;
        // A message is a memory write: without bus mastering it has to wait, as if masked.
        let masked = msix & MSIX_MASKED != 0 || !bus_master;
        self.interrupts.set_control(command & command::INTX_DISABLE != 0, msix & MSIX_ENABLED != 0, masked);
        self.runner.set_memory_access(bus_master);
    }

    /// The access that the window capability selects, if `offset` is its data register.
    fn window(&self, offset: usize, len: usize) -> Option<(u64, usize)> {
        let selected = self.config.u32_at(self.window_cap + WINDOW_LENGTH) as usize;
        let at = u64::from(self.config.u32_at(self.window_cap + WINDOW_OFFSET));
        let bar = self.config.u32_at(self.window_cap + WINDOW_BAR) & 0xff;
        let hit = offset == self.window_cap + WINDOW_DATA && bar == BAR as u32;
        let sound = matches!(selected, 1 | 2 | 4) && selected <= len && at % selected as u64 == 0;
        (hit && sound && at < BAR_SIZE).then_some((at, selected))
    }
}

/// The half of a 64-bit feature set that `select` names.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Configuration space, with the offsets of the MSI-X and the window capability.
fn config_space(kind: DeviceType, queues: usize, vectors: usize) -> (ConfigSpace, usize, usize) {
    let class = match kind {
        DeviceType::Net => 0x02_00_00,
        DeviceType::Block => 0x01_00_00,
        DeviceType::Console => 0x07_80_00,
        DeviceType::Entropy | DeviceType::Balloon => 0x00_ff_00,
    };
    let mut config = ConfigSpace::new(Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + kind as u16,
        revision: 1,
        class,
        subsystem_vendor: VENDOR,
        subsystem: 0x1100,
    });
    config.set(register::INTERRUPT_PIN, &[1]);
    config.add_bar(BAR, BarKind::Memory64, BAR_SIZE);

    let mut msix = [0; 10];
    msix[0..2].copy_from_slice(&(vectors as u16 - 1).to_le_bytes());
    msix[2..6].copy_from_slice(&((MSIX_TABLE * PAGE) as u32 | BAR as u32).to_le_bytes());
    msix[6..10].copy_from_slice(&((MSIX_PENDING * PAGE) as u32 | BAR as u32).to_le_bytes());
    let control = (MSIX_ENABLED | MSIX_MASKED).to_le_bytes();
    let msix_cap = config.add_capability(CAP_MSIX, &msix, &[control[0], control[1], 0, 0, 0, 0, 0, 0, 0, 0]);

    let notify_len = queues as u32 * NOTIFY_MULTIPLIER;
    for (kind, page, len) in [
        (CFG_COMMON, COMMON, COMMON_LEN as u32),
        (CFG_NOTIFY, NOTIFY, notify_len),
        (CFG_ISR, ISR, 1),
        (CFG_DEVICE, DEVICE, PAGE as u32),
    ] {
        let mut body = vec![16, kind, BAR as u8, 0, 0, 0];
        body.extend(((page * PAGE) as u32).to_le_bytes());
        body.extend(len.to_le_bytes());
        if kind == CFG_NOTIFY {
            body[0] = 20;
            body.extend(NOTIFY_MULTIPLIER.to_le_bytes());
        }
        config.add_capability(CAP_VENDOR, &body, &vec![0; body.len()]);
    }

    let mut body = [0; 18];
    body[..2].copy_from_slice(&[20, CFG_PCI]);
    let mut mask = [0xff; 18];
    mask[..2].fill(0);
    mask[3..6].fill(0);
    let window_cap = config.add_capability(CAP_VENDOR, &body, &mask);
    (config, msix_cap, window_cap)
}

impl PciDevice for VirtioPci {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if let Some((at, len)) = self.window(offset, data.len()) {
            self.read_bar(BAR, at, &mut data[..len]);
            let bytes = data[..len].to_vec();
            self.config.set(self.window_cap + WINDOW_DATA, &bytes);
        }
        let interrupt = u8::from(self.interrupts.pending()) << 3;
        self.config.set(register::STATUS, &[self.config.u16_at(register::STATUS) as u8 & !8 | interrupt]);
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        if let Some((at, len)) = self.window(offset, data.len()) {
            self.write_bar(BAR, at, &data[..len]);
        }
        self.follow_config();
    }

    fn read_bar(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        let within = offset % PAGE;
        match offset / PAGE {
            COMMON => read_registers(&self.common(), within as usize, data),
            ISR => {
                data.fill(0);
                if let (0, [isr, ..]) = (within, data) {
                    *isr = self.interrupts.take_isr();
                }
            }
            DEVICE => self.device_config.read(within as usize, data),
            MSIX_TABLE => self.interrupts.msix().read_table(within, data),
            MSIX_PENDING => self.interrupts.msix().read_pending(within, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        let within = offset % PAGE;
        match offset / PAGE {
            COMMON => self.write_common(within, data),
            DEVICE => self.device_config.write(within as usize, data),
            // The value says the queue, too, but the address alone decides.
            NOTIFY => self.runner.kick((within / u64::from(NOTIFY_MULTIPLIER)) as usize),
            MSIX_TABLE => self.interrupts.msix().write_table(within, data),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.reset_device();
        self.interrupts.msix().reset();
        self.interrupts.set_control(false, false, true);
        self.runner.set_memory_access(false);
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.runner.quit();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there was reported there
        }
    }
}
