//! ACPI tables: what the machine is made of, for guests that ask. Here also stand the addresses, ports and
//! values the tables promise; the devices use these constants, so table and chip cannot disagree.
//!
//! Tables lie in the BIOS area (0xE0000 to 0xEFFFF), where a guest that was handed no pointer looks for the RSDP.
//! Interrupt inputs are those of one I/O APIC: ISA IRQs on 0 to 15 with the timer on 2, PCI on 16 to 23.
//!
//! Must not know: devices' code, image formats.

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::{GenericAddress, Sdt};
use acpi_tables::xsdt::XSDT;

use super::dsdt;
use super::error::BootError;
use super::layout::{Layout, align_up};

/// PM1a event block: status and enable registers, 2 bytes each.
pub const PM1A_EVENT_PORT: u16 = 0x600;
pub const PM1A_EVENT_LEN: u8 = 4;
/// PM1a control register.
pub const PM1A_CONTROL_PORT: u16 = 0x604;
pub const PM1A_CONTROL_LEN: u8 = 2;
/// PM timer: 3.579545 MHz. We promise 24 bits; a chip that counts 32 keeps the promise.
pub const PM_TIMER_PORT: u16 = 0x608;
pub const PM_TIMER_LEN: u8 = 4;
/// A write of [`ACPI_ENABLE`] here sets SCI_EN in the PM1a control register, of [`ACPI_DISABLE`] clears it.
pub const SMI_COMMAND_PORT: u16 = 0xb2;
pub use crate::devices::acpi_pm::{ACPI_DISABLE, ACPI_ENABLE};
/// A write of [`RESET_VALUE`] here resets the machine.
pub const RESET_PORT: u16 = 0xcf9;
pub const RESET_VALUE: u8 = 6;
/// SLP_TYP of S5, soft off.
pub use crate::devices::acpi_pm::S5_SLEEP_TYPE as SLP_TYP_S5;
/// The system control interrupt: level-triggered.
pub const SCI_IRQ: u8 = 9;

/// PCI configuration space, memory-mapped: bus 0 to 255.
pub const ECAM_BASE: u64 = 0xe000_0000;
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// PCI devices' memory below 4 GiB.
pub const PCI_MMIO32_BASE: u64 = 0xc000_0000;
pub const PCI_MMIO32_SIZE: u64 = 0x2000_0000;
/// PCI devices' memory above RAM starts here or higher, see [`pci_mmio64`].
pub const PCI_MMIO64_BASE: u64 = 0x40_0000_0000;
pub const PCI_MMIO64_SIZE: u64 = 0x20_0000_0000;
/// PCI interrupt pins share the I/O APIC's inputs from here.
pub const PCI_GSI_BASE: u32 = 16;
pub const PCI_GSI_COUNT: u32 = 8;

pub const IO_APIC_BASE: u64 = 0xfec0_0000;
pub const LOCAL_APIC_BASE: u64 = 0xfee0_0000;
pub const HPET_BASE: u64 = 0xfed0_0000;
/// HPET capabilities, low half: revision 1, three 64-bit timers, legacy routing, Intel.
pub const HPET_BLOCK_ID: u32 = 0x8086_a201;

/// Tables lie between these.
const AREA_START: u64 = 0xe_0000;
const AREA_END: u64 = 0xf_0000;
const OEM_ID: [u8; 6] = *b"TURTLE";
const OEM_TABLE_ID: [u8; 8] = *b"TURTLES ";
const OEM_REVISION: u32 = 1;
const HEADER: u32 = 36;
const RSDP_LEN: usize = 36;

/// The I/O APIC input of a PCI slot's interrupt `pin` (0 is INTA).
pub fn pci_gsi(slot: u8, pin: u8) -> u32 {
    PCI_GSI_BASE + (u32::from(slot) + u32::from(pin)) % PCI_GSI_COUNT
}

/// Base and size of the window for 64-bit BARs, above all RAM and within 39 physical address bits for guests
/// of less than 256 GiB.
pub fn pci_mmio64(ranges: &[(u64, u64, u64)]) -> (u64, u64) {
    let ram_end = ranges.iter().map(|&(start, len, _)| start.saturating_add(len)).max().unwrap_or(0);
    let base = align_up(ram_end, 1 << 30).map_or(PCI_MMIO64_BASE, |end| end.max(PCI_MMIO64_BASE));
    (base, PCI_MMIO64_SIZE)
}

/// The I/O APIC's ID: the first that no local APIC has, as far as 8 bits go.
pub fn io_apic_id(cpus: u32) -> u8 {
    u8::try_from(cpus).ok().filter(|&id| id < u8::MAX).unwrap_or(0)
}

/// Writes all tables for `cpus` vCPUs; gives the address of the RSDP.
///
/// The BIOS area is nobody's to claim, so no image is in the way.
pub fn write_tables(layout: &Layout, cpus: u32, pci_mmio64: (u64, u64)) -> Result<u64, BootError> {
    let (rsdp, bytes) = build_tables(cpus, pci_mmio64)?;
    layout.write(AREA_START, &bytes, "ACPI tables")?;
    Ok(rsdp)
}

/// Lays tables out one after another.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    fn place(&mut self, table: &dyn Aml) -> u64 {
        let offset = self.bytes.len().next_multiple_of(64);
        self.bytes.resize(offset, 0);
        table.to_aml_bytes(&mut self.bytes);
        AREA_START + offset as u64
    }
}

fn build_tables(cpus: u32, pci_mmio64: (u64, u64)) -> Result<(u64, Vec<u8>), BootError> {
    let mut area = Area { bytes: vec![0; RSDP_LEN] };
    let facs = area.place(&FACS::new());
    let dsdt = area.place(&dsdt::build(cpus, pci_mmio64));
    let tables =
        [area.place(&fadt(facs, dsdt)), area.place(&madt(cpus)), area.place(&mcfg()), area.place(&hpet())];
    let mut rsdt = table(*b"RSDT", 1);
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for address in tables {
        rsdt.append_slice(&(address as u32).to_le_bytes());
        xsdt.add_entry(address);
    }
    let rsdt = area.place(&rsdt);
    let xsdt = area.place(&xsdt);
    area.bytes[..RSDP_LEN].copy_from_slice(&rsdp(rsdt, xsdt));
    let (len, max) = (area.bytes.len() as u64, AREA_END - AREA_START);
    if len > max {
        return Err(BootError::TooManyCpus { cpus, len, max });
    }
    Ok((AREA_START, area.bytes))
}

/// A table with nothing but a header; appending keeps length and checksum right.
pub(super) fn table(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(signature, HEADER, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION)
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &b| sum.wrapping_sub(b))
}

/// The root pointer, revision 2, with an RSDT too for guests from before ACPI 2.0.
fn rsdp(rsdt: u64, xsdt: u64) -> [u8; RSDP_LEN] {
    let mut bytes = [0; RSDP_LEN];
    bytes[..8].copy_from_slice(b"RSD PTR ");
    bytes[9..15].copy_from_slice(&OEM_ID);
    bytes[15] = 2;
    bytes[16..20].copy_from_slice(&(rsdt as u32).to_le_bytes());
    bytes[20..24].copy_from_slice(&(RSDP_LEN as u32).to_le_bytes());
    bytes[24..32].copy_from_slice(&xsdt.to_le_bytes());
    bytes[8] = checksum(&bytes[..20]);
    bytes[32] = checksum(&bytes);
    bytes
}

/// ACPI 6.5, "Fixed ACPI Description Table".
fn fadt(facs: u64, dsdt: u64) -> impl Aml {
    /// There are devices on ISA ports.
    const LEGACY_DEVICES: u16 = 1 << 0;
    const NO_VGA: u16 = 1 << 2;
    let port = |port: u16, len: u8, access| GAS::new(AddressSpace::SystemIo, len * 8, 0, access, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs as u32)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = u16::from(SCI_IRQ).into();
    fadt.smi_cmd = u32::from(SMI_COMMAND_PORT).into();
    fadt.acpi_enable = ACPI_ENABLE;
    fadt.acpi_disable = ACPI_DISABLE;
    fadt.pm1a_evt_blk = u32::from(PM1A_EVENT_PORT).into();
    fadt.pm1_evt_len = PM1A_EVENT_LEN;
    fadt.x_pm1a_evt_blk = port(PM1A_EVENT_PORT, PM1A_EVENT_LEN, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(PM1A_CONTROL_PORT).into();
    fadt.pm1_cnt_len = PM1A_CONTROL_LEN;
    fadt.x_pm1a_cnt_blk = port(PM1A_CONTROL_PORT, PM1A_CONTROL_LEN, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(PM_TIMER_PORT).into();
    fadt.pm_tmr_len = PM_TIMER_LEN;
    fadt.x_pm_tmr_blk = port(PM_TIMER_PORT, PM_TIMER_LEN, AccessSize::DwordAccess);
    // Above 100 and 1000 microseconds these say: no C2, no C3.
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    fadt.reset_reg = port(RESET_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// ACPI 6.5, "Multiple APIC Description Table". Processor UIDs and APIC IDs are the vCPUs' numbers.
fn madt(cpus: u32) -> Sdt {
    /// There is a pair of 8259s too.
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    const ACTIVE_HIGH_LEVEL: u16 = 0b11_01;
    const ALL_UIDS: u8 = 0xff;
    let mut entries = Vec::new();
    entries.extend((LOCAL_APIC_BASE as u32).to_le_bytes());
    entries.extend(PCAT_COMPAT.to_le_bytes());
    for cpu in 0..cpus {
        match u8::try_from(cpu) {
            Ok(id) if id != u8::MAX => entries.extend([0, 8, id, id]),
            _ => {
                entries.extend([9, 16, 0, 0]);
                entries.extend(cpu.to_le_bytes());
            }
        }
        entries.extend(ENABLED.to_le_bytes());
        if cpu >= u32::from(u8::MAX) {
            entries.extend(cpu.to_le_bytes());
        }
    }
    entries.extend([1, 12, io_apic_id(cpus), 0]);
    entries.extend((IO_APIC_BASE as u32).to_le_bytes());
    entries.extend(0u32.to_le_bytes());
    for (irq, gsi, flags) in [(0u8, 2u32, 0u16), (SCI_IRQ, u32::from(SCI_IRQ), ACTIVE_HIGH_LEVEL)] {
        entries.extend([2, 10, 0, irq]);
        entries.extend(gsi.to_le_bytes());
        entries.extend(flags.to_le_bytes());
    }
    // NMI on LINT1 of every local APIC; vCPUs with large IDs are named by the x2APIC's entry only.
    entries.extend([4, 6, ALL_UIDS, 0, 0, 1]);
    if cpus > u32::from(u8::MAX) {
        entries.extend([0xa, 12, 0, 0]);
        entries.extend(u32::MAX.to_le_bytes());
        entries.extend([1, 0, 0, 0]);
    }
    let mut madt = table(*b"APIC", 5);
    madt.append_slice(&entries);
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_BASE, 0, 0, 255);
    mcfg
}

/// IA-PC HPET specification, "The ACPI 2.0 HPET Description Table".
fn hpet() -> Sdt {
    const MINIMUM_TICK: u16 = 0x80;
    let mut hpet = table(*b"HPET", 1);
    hpet.append_slice(&HPET_BLOCK_ID.to_le_bytes());
    let GenericAddress { address_space_id, register_bit_width, register_bit_offset, address, .. } =
        GenericAddress::mmio_address::<u64>(HPET_BASE);
    hpet.append_slice(&[address_space_id, register_bit_width, register_bit_offset, 0]);
    hpet.append_slice(&address.to_le_bytes());
    hpet.append_slice(&[0]);
    hpet.append_slice(&MINIMUM_TICK.to_le_bytes());
    hpet.append_slice(&[0]);
    hpet
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: (u64, u64) = (PCI_MMIO64_BASE, PCI_MMIO64_SIZE);

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, &b| a.wrapping_add(b))
    }

    /// Follows the pointers as a guest does; every table's length and checksum is checked on the way.
    fn tables(cpus: u32) -> Vec<Vec<u8>> {
        let (rsdp, bytes) = build_tables(cpus, WINDOW).unwrap();
        let slice = |address: u64, len: usize| &bytes[(address - AREA_START) as usize..][..len];
        let sdt = |address: u64| {
            let table = slice(address, u32_at(slice(address, 8), 4) as usize);
            assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(&table[..4]));
            table.to_vec()
        };
        assert_eq!(rsdp % 16, 0);
        let root = slice(rsdp, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root[..20]), sum(root)), (0, 0));
        let rsdt = sdt(u64::from(u32_at(root, 16)));
        let xsdt = sdt(u64_at(root, 24));
        let from_rsdt: Vec<u64> = rsdt[36..].chunks_exact(4).map(|c| u64::from(u32_at(c, 0))).collect();
        let from_xsdt: Vec<u64> = xsdt[36..].chunks_exact(8).map(|c| u64_at(c, 0)).collect();
        assert_eq!(from_rsdt, from_xsdt);
        let mut found: Vec<Vec<u8>> = from_xsdt.iter().map(|&a| sdt(a)).collect();
        let fadt = found.iter().find(|t| t.starts_with(b"FACP")).unwrap();
        let facs = u64::from(u32_at(fadt, 36));
        assert_eq!((slice(facs, 4), facs % 64), (&b"FACS"[..], 0));
        assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140));
        found.push(sdt(u64_at(fadt, 140)));
        found
    }

    fn named(cpus: u32, signature: &[u8; 4]) -> Vec<u8> {
        tables(cpus).into_iter().find(|t| t.starts_with(signature)).unwrap()
    }

    #[test]
    fn every_table_is_found_and_sums_to_zero() {
        let names: Vec<String> =
            tables(2).iter().map(|t| String::from_utf8_lossy(&t[..4]).into_owned()).collect();
        assert_eq!(names, ["FACP", "APIC", "MCFG", "HPET", "DSDT"]);
    }

    #[test]
    fn fadt_names_the_ports() {
        let fadt = named(1, b"FACP");
        assert_eq!((fadt.len(), fadt[8]), (276, 6));
        assert_eq!(u16::from_le_bytes([fadt[46], fadt[47]]), 9);
        assert_eq!(u32_at(&fadt, 48), 0xb2);
        assert_eq!([fadt[52], fadt[53]], [ACPI_ENABLE, ACPI_DISABLE]);
        assert_eq!(u32_at(&fadt, 56), 0x600);
        assert_eq!(u32_at(&fadt, 64), 0x604);
        assert_eq!(u32_at(&fadt, 76), 0x608);
        assert_eq!([fadt[88], fadt[89], fadt[91]], [4, 2, 4]);
        let flags = u32_at(&fadt, 112);
        assert_ne!(flags & 1 << 10, 0, "reset register");
        assert_eq!(flags & (1 << 20 | 1 << 4), 0, "fixed hardware and a fixed power button");
        assert_eq!((fadt[116], u64_at(&fadt, 120), fadt[128]), (1, 0xcf9, 6));
        assert_eq!((fadt[148], fadt[149], u64_at(&fadt, 152)), (1, 32, 0x600));
        assert_eq!((fadt[172], fadt[173], u64_at(&fadt, 176)), (1, 16, 0x604));
        assert_eq!((fadt[208], fadt[209], u64_at(&fadt, 212)), (1, 32, 0x608));
    }

    /// `(type, bytes)` of each interrupt controller structure.
    fn madt_entries(cpus: u32) -> Vec<(u8, Vec<u8>)> {
        let madt = named(cpus, b"APIC");
        assert_eq!((u32_at(&madt, 36), u32_at(&madt, 40)), (0xfee0_0000, 1));
        let mut entries = Vec::new();
        let mut rest = &madt[44..];
        while let [kind, len, ..] = *rest {
            entries.push((kind, rest[..len as usize].to_vec()));
            rest = &rest[len as usize..];
        }
        assert!(rest.is_empty());
        entries
    }

    #[test]
    fn madt_names_every_cpu_and_the_io_apic() {
        let entries = madt_entries(3);
        let of = |kind| entries.iter().filter(|e| e.0 == kind).map(|e| e.1.clone()).collect::<Vec<_>>();
        let ids: Vec<(u8, u8, u32)> = of(0).iter().map(|e| (e[2], e[3], u32_at(e, 4))).collect();
        assert_eq!(ids, [(0, 0, 1), (1, 1, 1), (2, 2, 1)]);
        assert_eq!(of(1), [[1, 12, 3, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]]);
        assert_eq!(of(2), [[2, 10, 0, 0, 2, 0, 0, 0, 0, 0], [2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0]]);
        assert_eq!(of(4), [[4, 6, 0xff, 0, 0, 1]]);
        assert!(of(9).is_empty() && of(10).is_empty());
    }

    #[test]
    fn large_apic_ids_are_x2apic_entries() {
        let entries = madt_entries(257);
        assert_eq!(entries.iter().filter(|e| e.0 == 0).count(), 255);
        let x2apic: Vec<(u32, u32, u32)> = entries
            .iter()
            .filter(|e| e.0 == 9)
            .map(|(_, e)| (u32_at(e, 4), u32_at(e, 8), u32_at(e, 12)))
            .collect();
        assert_eq!(x2apic, [(255, 1, 255), (256, 1, 256)]);
        assert!(entries.iter().any(|e| e.0 == 10));
    }

    #[test]
    fn mcfg_and_hpet_point_at_the_chips() {
        let mcfg = named(1, b"MCFG");
        assert_eq!((u64_at(&mcfg, 44), mcfg[54], mcfg[55]), (0xe000_0000, 0, 255));
        let hpet = named(1, b"HPET");
        assert_eq!((hpet.len(), u64_at(&hpet, 44)), (56, 0xfed0_0000));
    }

    #[test]
    fn more_cpus_than_fit_are_refused() {
        assert!(build_tables(1024, WINDOW).is_ok());
        assert!(matches!(build_tables(4096, WINDOW), Err(BootError::TooManyCpus { .. })));
    }

    #[test]
    fn the_64_bit_window_lies_above_ram() {
        assert_eq!(pci_mmio64(&[(0, 1 << 30, 0)]).0, 256 << 30);
        let ranges = [(0, 0xc000_0000, 0), (1 << 32, 300 << 30, 0xc000_0000)];
        assert_eq!(pci_mmio64(&ranges).0, 304 << 30);
    }

    #[test]
    fn pci_pins_rotate() {
        assert_eq!([pci_gsi(0, 0), pci_gsi(7, 0), pci_gsi(7, 1), pci_gsi(31, 3)], [16, 23, 16, 18]);
    }
}
