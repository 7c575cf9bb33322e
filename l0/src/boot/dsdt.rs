//! The DSDT: devices that cannot be found by looking, in AML.
//!
//! Says what [`super::acpi`]'s constants say, in the language of ACPI; no address of its own but those of the ISA
//! devices, which are where a PC has them.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Interrupt, Memory32Fixed, Method, Name, Or, Package, PackageBuilder, Path, ResourceTemplate, Return,
    Scope, Uuid,
};
use acpi_tables::sdt::Sdt;

use super::acpi;

const SLOTS: u8 = 32;
const PINS: u8 = 4;

/// The table for `cpus` vCPUs, with PCI's 64-bit window `(base, size)`.
pub fn build(cpus: u32, pci_mmio64: (u64, u64)) -> Sdt {
    let mut aml = Vec::new();
    sleep_states(&mut aml);
    processors(cpus, &mut aml);
    motherboard(&mut aml);
    isa_devices(&mut aml);
    pci_host_bridge(pci_mmio64, &mut aml);
    // Revision 2: integers have 64 bits.
    let mut dsdt = acpi::table(*b"DSDT", 2);
    dsdt.append_slice(&aml);
    dsdt
}

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(path.into(), value)
}

fn io(port: u16, len: u8) -> IO {
    IO::new(port, port, 1, len)
}

/// An ISA interrupt: edge-triggered, active high, not shared.
fn irq(number: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, number.into())
}

/// Only S5; the other states cannot be entered.
fn sleep_states(aml: &mut Vec<u8>) {
    let zero = 0u8;
    name("\\_S5_", &Package::new(vec![&acpi::SLP_TYP_S5, &zero, &zero, &zero])).to_aml_bytes(aml);
}

fn processors(cpus: u32, aml: &mut Vec<u8>) {
    for cpu in 0..cpus {
        let device = format!("\\_SB_.C{cpu:03X}");
        // More than these names can count do not fit in the BIOS area either, which is checked there.
        if cpu > 0xfff {
            break;
        }
        let hid = name("_HID", &"ACPI0007");
        let uid = name("_UID", &cpu);
        Device::new(device.as_str().into(), vec![&hid, &uid]).to_aml_bytes(aml);
    }
}

/// Keeps guests from giving the chips' addresses to PCI devices; ECAM must be here for guests to trust the MCFG.
fn motherboard(aml: &mut Vec<u8>) {
    let hid = name("_HID", &EISAName::new("PNP0C02"));
    let uid = name("_UID", &0u8);
    let ecam = Memory32Fixed::new(true, acpi::ECAM_BASE as u32, acpi::ECAM_SIZE as u32);
    let io_apic = Memory32Fixed::new(true, acpi::IO_APIC_BASE as u32, 0x1000);
    let local_apic = Memory32Fixed::new(true, acpi::LOCAL_APIC_BASE as u32, 0x10_0000);
    let power = io(acpi::PM1A_EVENT_PORT, 0x10);
    let smi = io(acpi::SMI_COMMAND_PORT, 1);
    let resources = name("_CRS", &ResourceTemplate::new(vec![&ecam, &io_apic, &local_apic, &power, &smi]));
    Device::new("\\_SB_.MBRD".into(), vec![&hid, &uid, &resources]).to_aml_bytes(aml);
}

fn isa_devices(aml: &mut Vec<u8>) {
    let mut device = |path: &str, id: &str, resources: Vec<&dyn Aml>| {
        let hid = name("_HID", &EISAName::new(id));
        let uid = name("_UID", &1u8);
        let crs = name("_CRS", &ResourceTemplate::new(resources));
        Device::new(path.into(), vec![&hid, &uid, &crs]).to_aml_bytes(aml);
    };
    device("\\_SB_.COM1", "PNP0501", vec![&io(0x3f8, 8), &irq(4)]);
    device("\\_SB_.RTC_", "PNP0B00", vec![&io(0x70, 2), &irq(8)]);
    device("\\_SB_.TIMR", "PNP0100", vec![&io(0x40, 4), &irq(0)]);
    device("\\_SB_.HPET", "PNP0103", vec![&Memory32Fixed::new(false, acpi::HPET_BASE as u32, 0x400)]);
}

fn pci_host_bridge(pci_mmio64: (u64, u64), aml: &mut Vec<u8>) {
    let hid = name("_HID", &EISAName::new("PNP0A08"));
    let cid = name("_CID", &EISAName::new("PNP0A03"));
    let numbers = ["_UID", "_SEG", "_BBN"].map(|path| name(path, &0u8));
    let resources = pci_windows(pci_mmio64);
    let routing = name("_PRT", &pci_routing());
    let mut children: Vec<&dyn Aml> = vec![&hid, &cid];
    children.extend(numbers.iter().map(|n| n as &dyn Aml));
    children.extend([&resources as &dyn Aml, &routing]);
    Device::new("\\_SB_.PCI0".into(), children).to_aml_bytes(aml);
    let mut capabilities = Vec::new();
    operating_system_capabilities(&mut capabilities);
    aml.extend(Scope::raw("\\_SB_.PCI0".into(), capabilities));
}

/// What PCI devices may be given.
fn pci_windows((base64, size64): (u64, u64)) -> Name {
    let buses = AddressSpace::<u16>::new_bus_number(0, 255);
    let configuration_ports = io(0xcf8, 8);
    let low_ports = AddressSpace::<u16>::new_io(0, 0xcf7, None);
    let high_ports = AddressSpace::<u16>::new_io(0xd00, 0xffff, None);
    let memory32 = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        acpi::PCI_MMIO32_BASE as u32,
        (acpi::PCI_MMIO32_BASE + acpi::PCI_MMIO32_SIZE - 1) as u32,
        None,
    );
    let memory64 = AddressSpace::<u64>::new_memory(
        AddressSpaceCacheable::Cacheable,
        true,
        base64,
        base64.saturating_add(size64 - 1),
        None,
    );
    name(
        "_CRS",
        &ResourceTemplate::new(vec![
            &buses,
            &configuration_ports,
            &low_ports,
            &high_ports,
            &memory32,
            &memory64,
        ]),
    )
}

/// `_PRT`: each pin of each slot straight to an I/O APIC input, level-triggered as PCI has it.
fn pci_routing() -> PackageBuilder {
    let mut routes = PackageBuilder::new();
    for slot in 0..SLOTS {
        for pin in 0..PINS {
            let every_function = u32::from(slot) << 16 | 0xffff;
            let gsi = acpi::pci_gsi(slot, pin);
            routes.add_element(&Package::new(vec![&every_function, &pin, &0u8, &gsi]));
        }
    }
    routes
}

/// `_OSC` of a PCI Express host bridge: the guest may have every native feature but SHPC hot-plug, none of which
/// firmware here would use.
fn operating_system_capabilities(aml: &mut Vec<u8>) {
    /// Bit 1 of the control field.
    const ALL_BUT_SHPC: u32 = !(1 << 1);
    const UNRECOGNIZED_UUID: u8 = 1 << 2;
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let pci_express = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
    let (uuid, buffer) = (Arg(0), Arg(3));
    let status_field = CreateDWordField::new(&status, &buffer, &0u8);
    let control_field = CreateDWordField::new(&control, &buffer, &8u8);
    let grant = And::new(&control, &control, &ALL_BUT_SHPC);
    let refuse = Or::new(&status, &status, &UNRECOGNIZED_UUID);
    let known = Equal::new(&uuid, &pci_express);
    let if_known = If::new(&known, vec![&control_field, &grant]);
    let otherwise = Else::new(vec![&refuse]);
    let answer = Return::new(&buffer);
    Method::new("_OSC".into(), 4, true, vec![&status_field, &if_known, &otherwise, &answer])
        .to_aml_bytes(aml);
}
