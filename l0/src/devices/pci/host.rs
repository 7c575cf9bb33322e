//! The host bridge: configuration mechanism #1 (ports CF8 and CFC), ECAM, and the BARs of all devices on the
//! machine's buses.
//!
//! Invariant: after every write to a command register or BAR, the buses hold exactly the BARs that are decoded,
//! lie inside a window the bridge forwards, and do not overlap another range. A BAR that lost against another
//! range gets its place as soon as that range is free.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use super::intx::SharedLines;
use super::{
    BarKind, ConfigSpace, ECAM_BASE, ECAM_SIZE, IO_WINDOW, Identity, LOW_WINDOW, PciDevice, SLOTS, command,
    intx_gsi, register,
};
use crate::devices::{Bus, BusDevice, IrqLine, IrqRouter, MachineControl, MachineEvent, SharedDevice};
use crate::memory::HIGH_RAM_START;
use crate::vcpu_signal::lock;

/// Ports CF8 to CFF: address, reset control (CF9) and data.
const CONFIG_PORTS: u64 = 0xcf8;
const CONFIG_PORTS_LEN: u64 = 8;
/// Reset control register, inside the dword of CF8 but reached by byte accesses only.
const RESET_CONTROL: u64 = 1;
/// Reset control: 0 to 1 resets the machine.
const RESET_CPU: u8 = 1 << 2;

/// Why the host bridge or a device could not be put into the machine.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// The bridge's own ports or ECAM belong to someone else.
    #[error("PCI: {0} already belong to another device")]
    Occupied(&'static str),
    /// No such slot, or it has a device.
    #[error("PCI: slot {0} is taken or does not exist (1 to 31 are for devices)")]
    Slot(u8),
    /// No window has room for a BAR.
    #[error("PCI: no address space left for a BAR of {0:#x} bytes; use fewer devices")]
    NoSpace(u64),
}

type SharedFunction = Arc<Mutex<Box<dyn PciDevice>>>;

/// The PCI host bridge of the machine, device 00:00.0, with everything behind it.
pub struct PciHost {
    bridge: Arc<Bridge>,
}

struct Bridge {
    // Weak: the buses own the bridge's ports.
    pio: Weak<Bus>,
    mmio: Weak<Bus>,
    lines: Arc<SharedLines>,
    control: Arc<dyn MachineControl>,
    high_window: Range<u64>,
    slots: Mutex<Slots>,
}

struct Slots {
    by_number: BTreeMap<u8, Slot>,
    /// What is still free of each window, for BARs we place.
    free_io: Range<u64>,
    free_low: Range<u64>,
    free_high: Range<u64>,
}

struct Slot {
    function: SharedFunction,
    at_power_on: ConfigSpace,
    /// What the buses call for each BAR.
    windows: [SharedDevice; 6],
    mapped: [Option<(BarKind, u64)>; 6],
}

impl PciHost {
    /// A host bridge that answers on both buses. `high_window` is the part above RAM and above 4 GiB that it
    /// forwards (for `_CRS` too); it may be empty. `control` gets the reset that port CF9 asks for.
    pub fn new(
        pio: &Arc<Bus>,
        mmio: &Arc<Bus>,
        router: Arc<dyn IrqRouter>,
        control: Arc<dyn MachineControl>,
        high_window: Range<u64>,
    ) -> Result<Self, PciError> {
        assert!(high_window.is_empty() || high_window.start >= HIGH_RAM_START, "window below 4 GiB");
        let slots = Slots {
            by_number: BTreeMap::new(),
            free_io: IO_WINDOW,
            free_low: LOW_WINDOW,
            free_high: high_window.clone(),
        };
        let bridge = Arc::new(Bridge {
            pio: Arc::downgrade(pio),
            mmio: Arc::downgrade(mmio),
            lines: SharedLines::new(router),
            control,
            high_window,
            slots: Mutex::new(slots),
        });
        let ports = ConfigPorts { bridge: Arc::clone(&bridge), address: 0, reset_control: 0 };
        if !pio.insert(CONFIG_PORTS, CONFIG_PORTS_LEN, Arc::new(Mutex::new(ports))) {
            return Err(PciError::Occupied("ports 0xCF8 to 0xCFF"));
        }
        let ecam = Ecam { bridge: Arc::clone(&bridge) };
        if !mmio.insert(ECAM_BASE, ECAM_SIZE, Arc::new(Mutex::new(ecam))) {
            return Err(PciError::Occupied("the addresses of ECAM"));
        }
        let host = Self { bridge };
        host.put(0, Box::new(HostBridge::new()))?;
        Ok(host)
    }

    /// INTA of `slot`, to build its device with. Slots that share an input are ORed.
    pub fn intx_line(&self, slot: u8) -> IrqLine {
        self.bridge.lines.line(slot)
    }

    /// Puts a device into a slot (1 to 31), gives its BARs addresses and decodes them.
    pub fn add(&self, slot: u8, device: Box<dyn PciDevice>) -> Result<(), PciError> {
        if slot == 0 {
            return Err(PciError::Slot(slot));
        }
        self.put(slot, device)
    }

    fn put(&self, number: u8, mut device: Box<dyn PciDevice>) -> Result<(), PciError> {
        let mut slots = lock(&self.bridge.slots);
        if number >= SLOTS || slots.by_number.contains_key(&number) {
            return Err(PciError::Slot(number));
        }
        slots.place_bars(device.config())?;
        let config = device.config();
        if config.u16_at(register::INTERRUPT_LINE) >> 8 != 0 {
            config.set(register::INTERRUPT_LINE, &[intx_gsi(number) as u8]);
        }
        let at_power_on = config.clone();
        let function: SharedFunction = Arc::new(Mutex::new(device));
        let windows = std::array::from_fn(|bar| {
            Arc::new(Mutex::new(BarWindow { function: Arc::clone(&function), bar })) as SharedDevice
        });
        slots.by_number.insert(number, Slot { function, at_power_on, windows, mapped: [None; 6] });
        self.bridge.map_bars(&mut slots);
        Ok(())
    }

    /// Every device back to power-on, with BARs where we put them.
    pub fn reset(&self) {
        let mut slots = lock(&self.bridge.slots);
        for slot in slots.by_number.values() {
            let mut function = lock(&slot.function);
            function.reset();
            *function.config() = slot.at_power_on.clone();
        }
        self.bridge.map_bars(&mut slots);
    }
}

impl Slots {
    /// Gives every BAR an address, naturally aligned, and turns decoding on, as firmware leaves it.
    fn place_bars(&mut self, config: &mut ConfigSpace) -> Result<(), PciError> {
        let mut decode = config.command();
        for index in 0..6 {
            let Some((kind, size)) = config.bar(index) else { continue };
            let base = match kind {
                BarKind::Io => take(&mut self.free_io, size),
                BarKind::Memory32 => take(&mut self.free_low, size),
                BarKind::Memory64 => {
                    take(&mut self.free_low, size).or_else(|| take(&mut self.free_high, size))
                }
            };
            config.set_bar(index, base.ok_or(PciError::NoSpace(size))?);
            decode |= if kind == BarKind::Io { command::IO } else { command::MEMORY };
        }
        config.set(register::COMMAND, &decode.to_le_bytes());
        Ok(())
    }
}

/// Cuts `size` bytes, aligned to `size`, from the front of `free`.
fn take(free: &mut Range<u64>, size: u64) -> Option<u64> {
    let base = free.start.checked_next_multiple_of(size)?;
    let end = base.checked_add(size).filter(|&end| end <= free.end)?;
    free.start = end;
    Some(base)
}

impl Bridge {
    /// Whether the bridge forwards all of `base..base + size` to PCI.
    fn forwards(&self, kind: BarKind, base: u64, size: u64) -> bool {
        let Some(end) = base.checked_add(size) else { return false };
        let inside = |window: &Range<u64>| window.start <= base && end <= window.end;
        match kind {
            BarKind::Io => inside(&IO_WINDOW),
            BarKind::Memory32 | BarKind::Memory64 => inside(&LOW_WINDOW) || inside(&self.high_window),
        }
    }

    /// Makes the buses follow command registers and BARs.
    fn map_bars(&self, slots: &mut Slots) {
        let (Some(pio), Some(mmio)) = (self.pio.upgrade(), self.mmio.upgrade()) else { return };
        let bus = |kind| if kind == BarKind::Io { &pio } else { &mmio };
        let mut missing = Vec::new();
        for (&number, slot) in &mut slots.by_number {
            let mut function = lock(&slot.function);
            for (index, mapped) in slot.mapped.iter_mut().enumerate() {
                let wanted = function.config().decoded_bar(index);
                let wanted = wanted.filter(|&(kind, base, size)| self.forwards(kind, base, size));
                if *mapped == wanted.map(|(kind, base, _)| (kind, base)) {
                    continue;
                }
                if let Some((kind, base)) = mapped.take() {
                    bus(kind).remove(base);
                }
                if let Some(wanted) = wanted {
                    missing.push((number, index, wanted));
                }
            }
        }
        for (number, index, (kind, base, size)) in missing {
            let Some(slot) = slots.by_number.get_mut(&number) else { continue };
            if bus(kind).insert(base, size, Arc::clone(&slot.windows[index])) {
                slot.mapped[index] = Some((kind, base));
            }
        }
    }

    fn read(&self, place: Place, data: &mut [u8]) {
        match lock(&self.slots).by_number.get(&place.slot) {
            Some(slot) if place.exists(data.len()) => lock(&slot.function).read_config(place.offset, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, place: Place, data: &[u8]) {
        let mut slots = lock(&self.slots);
        let Some(slot) = slots.by_number.get(&place.slot) else { return };
        if !place.exists(data.len()) {
            return;
        }
        lock(&slot.function).write_config(place.offset, data);
        let touched = place.offset..place.offset + data.len();
        let bars = touched.start < register::BARS_END && touched.end > register::BAR0;
        if bars || (touched.start < register::STATUS && touched.end > register::COMMAND) {
            self.map_bars(&mut slots);
        }
    }
}

/// One place in configuration space.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Place {
    bus: u8,
    slot: u8,
    function: u8,
    offset: usize,
}

impl Place {
    fn exists(&self, len: usize) -> bool {
        self.bus == 0 && self.function == 0 && self.offset + len <= 256
    }

    /// As CF8 spells it.
    fn from_address(address: u32, data_offset: u64) -> Self {
        let offset = (address & 0xfc) as usize + data_offset as usize;
        Self::from_bits(address >> 16, address >> 11, address >> 8, offset)
    }

    /// As ECAM spells it.
    fn from_ecam(offset: u64) -> Self {
        let bits = offset as u32;
        Self::from_bits(bits >> 20, bits >> 15, bits >> 12, (offset & 0xfff) as usize)
    }

    fn from_bits(bus: u32, slot: u32, function: u32, offset: usize) -> Self {
        Self { bus: bus as u8, slot: slot as u8 & 31, function: function as u8 & 7, offset }
    }
}

/// Ports CF8 to CFF.
struct ConfigPorts {
    bridge: Arc<Bridge>,
    address: u32,
    reset_control: u8,
}

impl ConfigPorts {
    fn selected(&self, offset: u64, len: usize) -> Option<Place> {
        let data = offset.checked_sub(4)?;
        let fits = data + len as u64 <= 4;
        (self.address >> 31 != 0 && fits).then(|| Place::from_address(self.address, data))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (RESET_CONTROL, 1) => data[0] = self.reset_control,
            (_, len) => match self.selected(offset, len) {
                Some(place) => self.bridge.read(place, data),
                None => data.fill(0xff),
            },
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc,
            (RESET_CONTROL, &[value]) => {
                let rising = value & !self.reset_control & RESET_CPU != 0;
                // Bit 2 does not stick: the reset it asks for clears it.
                self.reset_control = value & 0x0a;
                if rising {
                    self.bridge.control.request(MachineEvent::Reset);
                }
            }
            _ => {
                if let Some(place) = self.selected(offset, data.len()) {
                    self.bridge.write(place, data);
                }
            }
        }
    }
}

/// Memory-mapped configuration space.
struct Ecam {
    bridge: Arc<Bridge>,
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.bridge.read(Place::from_ecam(offset), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.bridge.write(Place::from_ecam(offset), data);
    }
}

/// A BAR as buses see it.
struct BarWindow {
    function: SharedFunction,
    bar: usize,
}

impl BusDevice for BarWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.function).read_bar(self.bar, offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        lock(&self.function).write_bar(self.bar, offset, data);
    }
}

/// Device 00:00.0: the memory controller hub of a Q35 chipset, so far as system software looks at it.
struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    /// PCIEXBAR: where ECAM is. 256 buses (bits 2:1 zero), enabled (bit 0).
    const PCIEXBAR: usize = 0x60;

    fn new() -> Self {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x29c0,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.set(Self::PCIEXBAR, &(ECAM_BASE | 1).to_le_bytes());
        Self { config }
    }
}

impl PciDevice for HostBridge {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Machine(Mutex<Vec<MachineEvent>>);

    impl MachineControl for Machine {
        fn request(&self, event: MachineEvent) {
            lock(&self.0).push(event);
        }
    }

    impl IrqRouter for Machine {
        fn set_irq(&self, _gsi: u32, _level: bool) {}
    }

    /// Answers every read with its mark.
    struct Marked {
        config: ConfigSpace,
        mark: u8,
    }

    impl Marked {
        fn boxed(mark: u8, bars: &[(usize, BarKind, u64)]) -> Box<Self> {
            let mut config = ConfigSpace::new(Identity {
                vendor: 0x1234,
                device: mark.into(),
                revision: 0,
                class: 0xff_00_00,
                subsystem_vendor: 0,
                subsystem: 0,
            });
            config.set(register::INTERRUPT_PIN, &[1]);
            for &(index, kind, size) in bars {
                config.add_bar(index, kind, size);
            }
            Box::new(Self { config, mark })
        }
    }

    impl PciDevice for Marked {
        fn config(&mut self) -> &mut ConfigSpace {
            &mut self.config
        }
        fn read_bar(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
            data.fill(self.mark);
        }
    }

    const HIGH: Range<u64> = 0x10_0000_0000..0x20_0000_0000;

    fn machine() -> (Arc<Bus>, Arc<Bus>, Arc<Machine>, PciHost) {
        let (pio, mmio, machine) =
            (Arc::new(Bus::default()), Arc::new(Bus::default()), Arc::new(Machine::default()));
        let host = PciHost::new(&pio, &mmio, machine.clone(), machine.clone(), HIGH).expect("empty buses");
        (pio, mmio, machine, host)
    }

    fn in32(bus: &Bus, address: u64) -> u32 {
        let mut data = [0; 4];
        bus.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn ecam(slot: u64, offset: u64) -> u64 {
        ECAM_BASE + (slot << 15) + offset
    }

    fn answers(bus: &Bus, address: u64) -> Option<u8> {
        let mut data = [0];
        bus.read(address, &mut data).then_some(data[0])
    }

    #[test]
    fn both_mechanisms_show_the_same_space_at_every_width() {
        let (pio, mmio, _, host) = machine();
        host.add(3, Marked::boxed(7, &[])).expect("slot 3 is free");
        pio.write(0xcf8, &0x8000_1800u32.to_le_bytes());
        assert_eq!(in32(&pio, 0xcf8), 0x8000_1800);
        assert_eq!(in32(&pio, 0xcfc), 0x0007_1234);
        assert_eq!(in32(&mmio, ecam(3, 0)), 0x0007_1234);
        let mut half = [0; 2];
        pio.read(0xcfe, &mut half);
        assert_eq!(half, [7, 0]);
        assert_eq!(answers(&pio, 0xcfd), Some(0x12));
        let mut quad = [0; 8];
        mmio.read(ecam(0, 0x60), &mut quad);
        assert_eq!(u64::from_le_bytes(quad), ECAM_BASE | 1);
        pio.write(0xcf8, &0x8000_183cu32.to_le_bytes());
        assert_eq!(in32(&pio, 0xcfc), 0x0113, "INTA of slot 3 is GSI 19");
        pio.write(0xcfc, &[0x55]);
        assert_eq!(in32(&mmio, ecam(3, 0x3c)), 0x0155);
    }

    #[test]
    fn nobody_answers_with_all_ones() {
        let (pio, mmio, _, host) = machine();
        host.add(1, Marked::boxed(7, &[])).expect("slot 1 is free");
        for address in [0x8000_1000u32, 0x8000_0900, 0x8001_0800, 0x0000_0800] {
            pio.write(0xcf8, &address.to_le_bytes());
            assert_eq!(in32(&pio, 0xcfc), u32::MAX, "{address:#x}");
            pio.write(0xcfc, &[0; 4]);
        }
        assert_eq!(in32(&mmio, ecam(1, 0x100)), u32::MAX);
        assert_eq!(in32(&mmio, ecam(1, 0xfe)), u32::MAX, "across the end of the space");
        assert_eq!(in32(&mmio, ECAM_BASE + ECAM_SIZE - 4), u32::MAX);
    }

    #[test]
    fn a_disabled_or_narrow_write_to_cf8_selects_nothing() {
        let (pio, _, machine, _host) = machine();
        pio.write(0xcf8, &0x8000_0000u32.to_le_bytes());
        pio.write(0xcf8, &[0x40]);
        pio.write(0xcfa, &[0x40, 0x40]);
        assert_eq!(in32(&pio, 0xcf8), 0x8000_0000);
        assert_eq!(in32(&pio, 0xcfc), 0x29c0_8086);
        pio.write(0xcf8, &0u32.to_le_bytes());
        assert_eq!(in32(&pio, 0xcfc), u32::MAX);
        assert!(lock(&machine.0).is_empty());
    }

    #[test]
    fn cf9_resets_on_the_rising_edge_of_bit_2() {
        let (pio, _, machine, _host) = machine();
        pio.write(0xcf9, &[0x02]);
        assert!(lock(&machine.0).is_empty());
        assert_eq!(answers(&pio, 0xcf9), Some(2));
        pio.write(0xcf9, &[0x06]);
        assert_eq!(*lock(&machine.0), [MachineEvent::Reset]);
    }

    #[test]
    fn bars_are_placed_apart_and_decoded_from_the_start() {
        let (pio, mmio, _, host) = machine();
        let bars = [(0, BarKind::Memory64, 0x8000), (2, BarKind::Io, 0x20), (3, BarKind::Memory32, 0x1000)];
        host.add(1, Marked::boxed(1, &bars)).expect("slot 1");
        host.add(2, Marked::boxed(2, &bars)).expect("slot 2");
        assert!(matches!(host.add(2, Marked::boxed(3, &[])), Err(PciError::Slot(2))));
        assert!(matches!(host.add(0, Marked::boxed(3, &[])), Err(PciError::Slot(0))));
        assert!(matches!(host.add(32, Marked::boxed(3, &[])), Err(PciError::Slot(32))));
        for slot in 1..=2u8 {
            let base = |bar: u64| u64::from(in32(&mmio, ecam(slot.into(), 0x10 + 4 * bar)) & !0xf);
            assert_eq!(answers(&mmio, base(0) + 0x7fff), Some(slot));
            assert_eq!(answers(&pio, base(2) + 0x1f), Some(slot));
            assert_eq!(answers(&mmio, base(3)), Some(slot));
        }
    }

    #[test]
    fn a_large_bar_goes_above_4g_and_too_large_a_bar_is_refused() {
        let (_pio, mmio, _, host) = machine();
        host.add(1, Marked::boxed(1, &[(0, BarKind::Memory64, 1 << 34)])).expect("fits above");
        assert_eq!(in32(&mmio, ecam(1, 0x14)), 0x10);
        assert_eq!(answers(&mmio, HIGH.start + 5), Some(1));
        let huge = Marked::boxed(2, &[(0, BarKind::Memory64, 1 << 40)]);
        assert!(matches!(host.add(2, huge), Err(PciError::NoSpace(_))));
    }

    #[test]
    fn the_guest_moves_a_bar() {
        let (_pio, mmio, _, host) = machine();
        host.add(1, Marked::boxed(1, &[(0, BarKind::Memory64, 0x1000)])).expect("slot 1");
        let old = u64::from(in32(&mmio, ecam(1, 0x10)) & !0xf);
        mmio.write(ecam(1, 0x10), &[0xff; 4]); // sizing, without turning decoding off
        assert_eq!(answers(&mmio, old), None);
        assert_eq!(answers(&mmio, 0xffff_f000), None, "not inside a window");
        mmio.write(ecam(1, 0x10), &0xd000_0000u32.to_le_bytes());
        assert_eq!(answers(&mmio, 0xd000_0fff), Some(1));
        mmio.write(ecam(1, 0x14), &0x12u32.to_le_bytes());
        assert_eq!((answers(&mmio, 0xd000_0000), answers(&mmio, 0x12_d000_0000)), (None, Some(1)));
        mmio.write(ecam(1, 4), &[0, 0]);
        assert_eq!(answers(&mmio, 0x12_d000_0000), None);
        host.reset();
        assert_eq!(answers(&mmio, old), Some(1), "a reset puts it back");
    }

    #[test]
    fn bars_cannot_cover_ram_or_other_devices() {
        let (_pio, mmio, _, host) = machine();
        for slot in 1..=2 {
            host.add(slot, Marked::boxed(slot, &[(0, BarKind::Memory32, 0x1000)])).expect("free slot");
        }
        let second = in32(&mmio, ecam(2, 0x10));
        for ram in [0u32, 0x10_0000, 0xbfff_f000, ECAM_BASE as u32, 0xfee0_0000] {
            mmio.write(ecam(1, 0x10), &ram.to_le_bytes());
            assert_ne!(answers(&mmio, ram.into()), Some(1), "{ram:#x}");
        }
        mmio.write(ecam(1, 0x10), &second.to_le_bytes());
        assert_eq!(answers(&mmio, second.into()), Some(2), "the one that was there first");
        mmio.write(ecam(2, 0x10), &0xd000_0000u32.to_le_bytes());
        assert_eq!((answers(&mmio, second.into()), answers(&mmio, 0xd000_0000)), (Some(1), Some(2)));
    }
}
