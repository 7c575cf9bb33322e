//! The PC around the vCPUs: which chip sits where, wired to what.

use std::sync::{Arc, Mutex};

use turtles_cpu::mmu::walk::PHYSICAL_BITS;

use crate::boot::acpi;
use crate::clock::{Clock, ClockSource};
use crate::config::MachineConfig;
use crate::console::InputSink;
use crate::devices::acpi_pm::{AcpiPm, TimerWidth};
use crate::devices::debug_exit::DebugExit;
use crate::devices::hpet::{Hpet, LegacyGate};
use crate::devices::i8042::I8042;
use crate::devices::irqchip::IrqChip;
use crate::devices::pci::PciHost;
use crate::devices::pit::Pit;
use crate::devices::rtc::Rtc;
use crate::devices::uart::Uart;
use crate::devices::virtio::{
    Access, Balloon, Block, DmaObserver, Net, Processing, Rng, RngSource, Tap, VirtioDevice, VirtioPci,
};
use crate::devices::{Bus, IrqLine, IrqRouter, MachineControl, MsiSink};
use crate::error::RunError;
use crate::memory::Ram;
use crate::vcpu_signal::{VcpuSignal, lock};
use crate::vm::{SerialSink, Stop};

const COM1_IRQ: u32 = 4;
const SCI_IRQ: u32 = 9;

/// Everything around the vCPUs.
pub struct Chipset {
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Physical addresses without RAM.
    pub mmio: Arc<Bus>,
    /// Interrupt controllers.
    pub irqchip: Arc<IrqChip>,
    uart: Arc<Mutex<Uart>>,
    pci: Option<PciHost>,
}

impl Chipset {
    /// Builds and wires all chips.
    pub fn build(
        config: &MachineConfig,
        ram: &Ram,
        clock: &Arc<Clock>,
        signals: &[Arc<VcpuSignal>],
        stop: Arc<Stop>,
        observer: Arc<dyn DmaObserver>,
        serial: SerialSink,
        unix_seconds: u64,
    ) -> Result<Self, RunError> {
        let control: Arc<dyn MachineControl> = stop;
        let (ports, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let irqchip = IrqChip::new(clock, signals, PHYSICAL_BITS as u8);
        let mut fits = irqchip.attach(&ports, &mmio);
        let gate = LegacyGate::new(Arc::clone(&irqchip) as Arc<dyn IrqRouter>);
        let router = Arc::clone(&gate) as Arc<dyn IrqRouter>;
        let line = |gsi| IrqLine::new(Arc::clone(&router), gsi);
        let direct = |gsi| IrqLine::new(Arc::clone(&irqchip) as Arc<dyn IrqRouter>, gsi);

        fits &= Pit::attach(&Pit::new(Arc::clone(clock), line(0)), &ports);
        fits &= Rtc::attach(&Rtc::new(Arc::clone(clock), line(8), unix_seconds, config.memory), &ports);
        fits &= Hpet::attach(&Hpet::new(Arc::clone(clock), gate), &mmio);
        let uart = Uart::new(Arc::clone(clock), direct(COM1_IRQ), serial);
        fits &= Uart::attach(&uart, &ports);
        fits &= I8042::attach(&I8042::new(direct(1), Arc::clone(&control)), &ports);
        let pm = AcpiPm::new(Arc::clone(clock), direct(SCI_IRQ), Arc::clone(&control), TimerWidth::Bits32);
        fits &= AcpiPm::attach(&pm, &ports);
        fits &= DebugExit::attach(&DebugExit::new(Arc::clone(&control)), &ports);
        assert!(fits, "two chips of ours claim the same address");

        let (base, size) = acpi::pci_mmio64(&ram.ranges);
        let irqs = Arc::clone(&irqchip) as Arc<dyn IrqRouter>;
        let pci = PciHost::new(&ports, &mmio, irqs, Arc::clone(&control), base..base + size)?;
        let mut chipset = Self { ports, mmio, irqchip, uart, pci: None };
        chipset.add_devices(config, ram, &pci, &observer, &control)?;
        chipset.pci = Some(pci);
        Ok(chipset)
    }

    fn add_devices(
        &mut self,
        config: &MachineConfig,
        ram: &Ram,
        pci: &PciHost,
        observer: &Arc<dyn DmaObserver>,
        control: &Arc<dyn MachineControl>,
    ) -> Result<(), RunError> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        for (i, disk) in config.disks.iter().enumerate() {
            let access = if disk.read_only { Access::ReadOnly } else { Access::ReadWrite };
            let block = Block::open(&disk.path, access, &format!("turtles-disk{i}"))?;
            devices.push(Box::new(block.stopping(Arc::clone(control))));
        }
        for net in &config.nets {
            devices.push(Box::new(Net::new(Tap::open(&net.tap)?, None)));
        }
        if config.rng {
            let source = match config.clock {
                ClockSource::Host => RngSource::Host,
                ClockSource::Virtual => RngSource::Seed(1),
            };
            devices.push(Box::new(Rng::new(source)));
        }
        if config.balloon {
            devices.push(Box::new(Balloon::new().0));
        }
        let processing = match config.clock {
            ClockSource::Host => Processing::Thread,
            ClockSource::Virtual => Processing::Inline,
        };
        for (i, device) in devices.into_iter().enumerate() {
            let slot = i as u8 + 1;
            let virtio = VirtioPci::new(
                device,
                Arc::clone(&ram.memory),
                pci.intx_line(slot),
                Arc::clone(&self.irqchip) as Arc<dyn MsiSink>,
                processing,
                Arc::clone(observer),
            )
            .map_err(RunError::Thread)?;
            pci.add(slot, Box::new(virtio))?;
        }
        Ok(())
    }

    /// COM1's input side.
    pub fn serial_input(&self) -> InputSink {
        let uart = Arc::clone(&self.uart);
        Arc::new(move |bytes| lock(&uart).push_input(bytes))
    }

    /// The run is over: devices finish what they have begun (disks are flushed), in this order.
    pub fn finish(&mut self) {
        self.pci = None;
    }
}
