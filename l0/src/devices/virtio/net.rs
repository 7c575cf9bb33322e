//! The network card on a tap interface. Checksum and segmentation offloads pass through: both sides speak
//! virtio_net_hdr, so a packet's header goes on as it came.
//!
//! UNSUPPORTED: control queue (filters, VLANs), several queue pairs, UFO and USO.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};

use super::dma::DmaError;
use super::queue::{Chain, QueueError, VirtQueue};
use super::tap::Tap;
use super::{DeviceConfig, DeviceType, FixedConfig, VirtioDevice, feature};

const RECEIVE: usize = 0;
const QUEUE_SIZE: u16 = 256;
/// virtio_net_hdr with num_buffers.
pub(super) const HEADER: usize = 12;
/// Offset of num_buffers in it.
const NUM_BUFFERS: usize = 10;
/// The longest packet with its header: 64 KiB of IP behind an Ethernet header with VLAN tag.
const PACKET_MAX: usize = HEADER + 18 + 65536;
/// Packets handed over before the guest is interrupted and the other queue gets its turn.
const BUDGET: usize = 64;
/// Status register: the link is up.
const LINK_UP: u16 = 1;

/// A virtio network card.
pub struct Net {
    tap: Tap,
    mac: [u8; 6],
    mergeable: bool,
    /// A packet from the host, waiting for enough buffers; `waiting` bytes of it.
    packet: Box<[u8]>,
    waiting: usize,
    /// Buffers taken for it, and their size.
    held: Vec<Chain>,
    room: u64,
    complained: bool,
}

impl Net {
    /// A card on `tap`. Without `mac` it gets a locally administered address made from the tap's name.
    pub fn new(tap: Tap, mac: Option<[u8; 6]>) -> Self {
        let mac = mac.unwrap_or_else(|| mac_for(tap.name()));
        Self {
            tap,
            mac,
            mergeable: false,
            packet: vec![0; PACKET_MAX].into(),
            waiting: 0,
            held: Vec::new(),
            room: 0,
            complained: false,
        }
    }

    fn receive(&mut self, queue: &mut VirtQueue) -> Result<(), QueueError> {
        for _ in 0..BUDGET {
            if self.waiting == 0 {
                match self.tap.file().read(&mut self.packet) {
                    Ok(0) => break,
                    Ok(len) if len <= HEADER => continue,
                    Ok(len) => self.waiting = len,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        self.complain(&error);
                        break;
                    }
                }
            }
            if !self.collect_buffers(queue)? {
                break;
            }
            self.deliver(queue)?;
        }
        Ok(())
    }

    /// Takes buffers until the packet fits; false while the guest has not enough.
    fn collect_buffers(&mut self, queue: &mut VirtQueue) -> Result<bool, QueueError> {
        while self.room < self.waiting as u64 && (self.mergeable || self.held.is_empty()) {
            let Some(chain) = queue.pop()? else { return Ok(false) };
            if chain.writable.len() <= HEADER as u64 || self.held.len() >= QUEUE_SIZE.into() {
                return Err(QueueError::Chain("a receive buffer too small for a header"));
            }
            self.room = self.room.saturating_add(chain.writable.len());
            self.held.push(chain);
        }
        Ok(true)
    }

    /// Puts the packet into the buffers held. A packet that does not fit in one buffer of a driver that cannot
    /// merge them is lost; the buffer serves the next one.
    fn deliver(&mut self, queue: &mut VirtQueue) -> Result<(), QueueError> {
        let len = std::mem::take(&mut self.waiting);
        if self.room < len as u64 {
            return Ok(());
        }
        let buffers = self.held.len() as u16;
        self.packet[NUM_BUFFERS..HEADER].copy_from_slice(&buffers.to_le_bytes());
        let mut rest = &self.packet[..len];
        let mut used = Vec::with_capacity(self.held.len());
        for chain in self.held.drain(..) {
            let part = chain.writable.len().min(rest.len() as u64) as usize;
            let (now, later) = rest.split_at(part);
            // A buffer outside of RAM comes back empty.
            let written = queue.dma().write(&chain.writable, 0, now).map_or(0, |()| part);
            used.push((chain.head, written as u32));
            rest = later;
        }
        self.room = 0;
        queue.complete_together(&used)
    }

    fn transmit(&mut self, queue: &mut VirtQueue) -> Result<(), QueueError> {
        while let Some(chain) = queue.pop()? {
            let len = chain.readable.len();
            // Anything else is no packet, and is dropped.
            if len > HEADER as u64 && len <= PACKET_MAX as u64 {
                if let Err(DmaError::Host(error)) = queue.dma().send(&chain.readable, self.tap.file()) {
                    self.complain(&error);
                }
            }
            queue.complete(&chain, 0)?;
        }
        Ok(())
    }

    /// Packets get lost on networks; the first reason may be worth knowing.
    fn complain(&mut self, error: &io::Error) {
        let name = self.tap.name();
        // The host refuses headers that make no sense: the guest's mistake, or its attack.
        let guests_fault = matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::WouldBlock);
        if !guests_fault && !std::mem::replace(&mut self.complained, true) {
            log::warn!("tap interface {name}: {error}; is it up? (ip link set {name} up)");
        }
    }
}

/// An address in QEMU's and KVM's usual range, the same for the same name.
fn mac_for(name: &str) -> [u8; 6] {
    // FNV-1a.
    let hash =
        name.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let [a, b, c, _] = hash.to_le_bytes();
    [0x52, 0x54, 0x00, a, b, c]
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
        ]
        .into_iter()
        .fold(0, |all, bit| all | feature(bit))
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        let mut registers = [0; 8];
        registers[..6].copy_from_slice(&self.mac);
        registers[6..].copy_from_slice(&LINK_UP.to_le_bytes());
        Arc::new(FixedConfig(registers))
    }

    fn activate(&mut self, features: u64) {
        self.mergeable = features & feature(VIRTIO_NET_F_MRG_RXBUF) != 0;
        if let Err(error) = self.tap.set_offloads(features) {
            self.complain(&error);
        }
    }

    fn process(&mut self, index: usize, queue: &mut VirtQueue) -> Result<(), QueueError> {
        if index == RECEIVE { self.receive(queue) } else { self.transmit(queue) }
    }

    fn host_input(&self) -> Option<(RawFd, usize)> {
        Some((self.tap.file().as_raw_fd(), RECEIVE))
    }

    fn wants_host_input(&self) -> bool {
        self.waiting == 0
    }

    fn reset(&mut self) {
        self.mergeable = false;
        self.waiting = 0;
        self.held.clear();
        self.room = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::super::test_driver::*;
    use super::super::{Processing, Tap, TapError};
    use super::*;

    const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

    /// A card and the other end of its wire. Reception always has its thread.
    fn net(features: u64, processing: Processing) -> (Driver, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().expect("a socket pair");
        theirs.set_read_timeout(Some(std::time::Duration::from_secs(20))).expect("a timeout");
        let mut driver = Driver::new(Net::new(Tap::from_socket(ours), Some([2, 0, 0, 0, 0, 1])), processing);
        driver.start(features, 2);
        (driver, theirs)
    }

    fn packet(len: usize) -> Vec<u8> {
        let mut packet = vec![0; HEADER];
        packet.extend((0..len).map(|i| i as u8));
        packet
    }

    #[test]
    fn sends_packets_as_they_are_gathered() {
        for processing in [Processing::Inline, Processing::Thread] {
            let (mut driver, wire) = net(0, processing);
            driver.put(BUFFERS, &packet(100));
            driver.submit(1, &[(BUFFERS, HEADER as u32, 0), (BUFFERS + HEADER as u64, 100, 0)]);
            let mut received = [0; 200];
            assert_eq!(wire.recv(&mut received).expect("a packet"), HEADER + 100);
            assert_eq!(received[..HEADER + 100], packet(100));
            assert_eq!(driver.wait_used(1), (0, 0));
        }
    }

    #[test]
    fn what_is_no_packet_is_dropped() {
        let (mut driver, wire) = net(0, Processing::Inline);
        driver.submit(1, &[(BUFFERS, HEADER as u32, 0)]);
        driver.submit(1, &[(BUFFERS, PACKET_MAX as u32 + 1, 0)]);
        driver.submit(1, &[(RAM - 50, 100, 0)]);
        driver.submit(1, &[(BUFFERS, 50, WRITE)]);
        for head in 0..4 {
            assert_eq!(driver.take_used(1), Some((head, 0)));
        }
        wire.set_nonblocking(true).expect("non-blocking");
        assert!(wire.recv(&mut [0; 16]).is_err());
        assert_eq!(driver.status(), 15);
    }

    #[test]
    fn receives_with_one_buffer_each() {
        let (mut driver, wire) = net(0, Processing::Thread);
        wire.send(&packet(60)).expect("sent");
        wire.send(&packet(3000)).expect("sent"); // does not fit, and is lost
        wire.send(&packet(61)).expect("sent");
        driver.submit(0, &[(BUFFERS, 12, WRITE), (BUFFERS + 0x1000, 1514, WRITE)]);
        driver.submit(0, &[(BUFFERS + 0x2000, 1526, WRITE)]);
        assert_eq!(driver.wait_used(0), (0, 72));
        assert_eq!(driver.get(BUFFERS + NUM_BUFFERS as u64, 2), [1, 0]);
        assert_eq!(driver.get(BUFFERS + 0x1000, 60), packet(60)[HEADER..]);
        assert_eq!(driver.wait_used(0), (2, 73));
    }

    #[test]
    fn merges_buffers_and_waits_for_enough_of_them() {
        let (mut driver, wire) = net(MERGEABLE, Processing::Thread);
        wire.send(&packet(2500)).expect("sent");
        driver.submit(0, &[(BUFFERS, 1024, WRITE)]);
        driver.submit(0, &[(BUFFERS + 0x1000, 1024, WRITE)]);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(driver.take_used(0), None, "all buffers of a packet at once");
        driver.submit(0, &[(BUFFERS + 0x2000, 1024, WRITE)]);
        let used = [driver.wait_used(0), driver.wait_used(0), driver.wait_used(0)];
        assert_eq!(used, [(0, 1024), (1, 1024), (2, 464)]);
        assert_eq!(driver.get(BUFFERS + NUM_BUFFERS as u64, 2), [3, 0]);
        let parts = [
            driver.get(BUFFERS, 1024),
            driver.get(BUFFERS + 0x1000, 1024),
            driver.get(BUFFERS + 0x2000, 464),
        ];
        assert_eq!(parts.concat()[HEADER..], packet(2500)[HEADER..]);
    }

    #[test]
    fn receives_without_a_vcpus_help_in_inline_mode() {
        let (mut driver, wire) = net(0, Processing::Inline);
        driver.submit(0, &[(BUFFERS, 2000, WRITE)]);
        wire.send(&packet(60)).expect("sent");
        assert_eq!(driver.wait_used(0), (0, 72));
        driver.reset();
        wire.send(&packet(60)).expect("sent");
        drop(driver);
    }

    #[test]
    fn a_buffer_without_room_for_a_header_breaks_the_queue() {
        let (mut driver, wire) = net(MERGEABLE, Processing::Thread);
        driver.submit(0, &[(BUFFERS, 0, WRITE)]);
        wire.send(&packet(60)).expect("sent");
        wait_until(|| driver.status() & NEEDS_RESET != 0);
    }

    #[test]
    fn shows_its_address_and_that_the_link_is_up() {
        let (mut driver, _wire) = net(0, Processing::Inline);
        assert_eq!(driver.read(DEVICE), [2, 0, 0, 0, 0, 1, 1, 0]);
        assert_eq!(mac_for("tap0"), mac_for("tap0"));
        assert_ne!(mac_for("tap0"), mac_for("tap1"));
        assert_eq!(mac_for("tap0")[0] & 3, 2, "locally administered, not a group");
    }

    #[test]
    fn names_that_cannot_be_interfaces_are_refused() {
        for name in ["", "a/b", "with space", "sixteen-letters-", "nul\0"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name:?}");
        }
        let missing = TapError::Missing("tap7".into()).to_string();
        assert!(missing.contains("ip tuntap add dev tap7 mode tap"), "{missing}");
    }
}
