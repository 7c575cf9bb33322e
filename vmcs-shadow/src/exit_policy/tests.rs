use x86defs::vector;
use x86defs::vmx::{entry_ctl, exit_ctl};

use super::*;
use Handler::{L0, L1};

/// Bitmaps with these bits set.
#[derive(Default)]
struct Set {
    io: Vec<u16>,
    read: Vec<u32>,
    write: Vec<u32>,
    vmread: Vec<u16>,
    vmwrite: Vec<u16>,
}

impl Bitmaps for Set {
    fn io(&self, port: u16) -> bool {
        self.io.contains(&port)
    }
    fn msr_read(&self, index: u32) -> bool {
        assert!(is_in_msr_bitmaps(index));
        self.read.contains(&index)
    }
    fn msr_write(&self, index: u32) -> bool {
        assert!(is_in_msr_bitmaps(index));
        self.write.contains(&index)
    }
    fn vmread(&self, encoding: u16) -> bool {
        self.vmread.contains(&encoding)
    }
    fn vmwrite(&self, encoding: u16) -> bool {
        self.vmwrite.contains(&encoding)
    }
}

fn vmcs(fields: &[(Field, u64)]) -> Vmcs {
    let mut vmcs = Vmcs::default();
    for &(field, value) in fields {
        vmcs.set(field, value);
    }
    vmcs
}

fn exit(reason: u32) -> ExitFacts {
    ExitFacts { reason, ..ExitFacts::default() }
}

fn ask(exit: ExitFacts, vmcs12: &Vmcs) -> Handler {
    route(&exit, vmcs12, &Set::default())
}

/// What decides an exit in VMCS12.
#[derive(Clone, Copy)]
enum By {
    Always(Handler),
    Pin(u32),
    Primary(u32),
    Secondary(u32),
    /// Both must be 1.
    Both(u32, u32),
    /// Tested apart.
    Operand,
}

/// Appendix C against "VMX Non-Root Operation", one row for each number.
const TABLE: &[(u32, By)] = &[
    (0, By::Operand),
    (1, By::Pin(pin::EXTERNAL_INTERRUPT_EXITING)),
    (2, By::Always(L1)),
    (3, By::Always(L1)),
    (4, By::Always(L1)),
    (5, By::Always(L0)), // I/O SMI: no dual-monitor treatment
    (6, By::Always(L0)), // other SMI
    (7, By::Primary(primary::INTERRUPT_WINDOW_EXITING)),
    (8, By::Primary(primary::NMI_WINDOW_EXITING)),
    (9, By::Always(L1)),
    (10, By::Always(L1)),
    (11, By::Always(L1)),
    (12, By::Primary(primary::HLT_EXITING)),
    (13, By::Always(L1)),
    (14, By::Primary(primary::INVLPG_EXITING)),
    (15, By::Primary(primary::RDPMC_EXITING)),
    (16, By::Primary(primary::RDTSC_EXITING)),
    (17, By::Always(L1)),
    (18, By::Always(L1)),
    (19, By::Always(L1)),
    (20, By::Always(L1)),
    (21, By::Always(L1)),
    (22, By::Always(L1)),
    (23, By::Operand),
    (24, By::Always(L1)),
    (25, By::Operand),
    (26, By::Always(L1)),
    (27, By::Always(L1)),
    (28, By::Operand),
    (29, By::Primary(primary::MOV_DR_EXITING)),
    (30, By::Operand),
    (31, By::Operand),
    (32, By::Operand),
    (33, By::Always(L1)),
    (34, By::Always(L1)),
    (35, By::Always(L0)), // not used
    (36, By::Primary(primary::MWAIT_EXITING)),
    (37, By::Primary(primary::MONITOR_TRAP_FLAG)),
    (38, By::Always(L0)), // not used
    (39, By::Primary(primary::MONITOR_EXITING)),
    (40, By::Primary(primary::PAUSE_EXITING)),
    (41, By::Always(L1)),
    (42, By::Always(L0)), // not used
    (43, By::Primary(primary::USE_TPR_SHADOW)),
    (44, By::Secondary(secondary::VIRTUALIZE_APIC_ACCESSES)),
    (45, By::Secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY)),
    (46, By::Secondary(secondary::DESCRIPTOR_TABLE_EXITING)),
    (47, By::Secondary(secondary::DESCRIPTOR_TABLE_EXITING)),
    (48, By::Always(L0)), // L0 walks EPT12
    (49, By::Always(L0)),
    (50, By::Always(L1)),
    (51, By::Both(primary::RDTSC_EXITING, secondary::ENABLE_RDTSCP)),
    (52, By::Pin(pin::PREEMPTION_TIMER)),
    (53, By::Always(L1)),
    (54, By::Secondary(secondary::WBINVD_EXITING)),
    (55, By::Always(L1)),
    (56, By::Secondary(secondary::APIC_REGISTER_VIRTUALIZATION)),
    (57, By::Secondary(secondary::RDRAND_EXITING)),
    (58, By::Both(primary::INVLPG_EXITING, secondary::ENABLE_INVPCID)),
    (59, By::Secondary(secondary::ENABLE_VMFUNC)),
    (60, By::Always(L0)), // ENCLS: no SGX
    (61, By::Secondary(secondary::RDSEED_EXITING)),
    (62, By::Secondary(secondary::ENABLE_PML)),
    (63, By::Operand),
    (64, By::Operand),
];

#[test]
fn every_reason_follows_its_control() {
    const ACTIVATE: u64 = primary::ACTIVATE_SECONDARY as u64;
    let ones = u64::from(u32::MAX);
    for (number, &(reason, by)) in TABLE.iter().enumerate() {
        assert_eq!(number as u32, reason, "a row for each");
        let controls = |pin: u64, primary: u64, secondary: u64| {
            let fields = [
                (Field::PinControls, pin),
                (Field::PrimaryControls, primary),
                (Field::SecondaryControls, secondary),
                // Exit and entry controls decide nothing here.
                (Field::ExitControls, u64::from(exit_ctl::ACKNOWLEDGE_INTERRUPT)),
                (Field::EntryControls, u64::from(entry_ctl::LOAD_EFER)),
            ];
            ask(exit(reason), &vmcs(&fields))
        };
        match by {
            By::Operand => {}
            By::Always(handler) => {
                assert_eq!(controls(0, 0, 0), handler, "{reason}");
                assert_eq!(controls(ones, ones, ones), handler, "{reason}");
            }
            By::Pin(bit) => {
                assert_eq!(controls(bit.into(), 0, 0), L1, "{reason}");
                assert_eq!(controls(ones & !u64::from(bit), ones, ones), L0, "{reason}");
            }
            By::Primary(bit) => {
                // Pause-loop exiting asks for exits of PAUSE as well.
                let ple = u64::from(secondary::PAUSE_LOOP_EXITING);
                assert_eq!(controls(0, bit.into(), 0), L1, "{reason}");
                assert_eq!(controls(ones, ones & !u64::from(bit), ones & !ple), L0, "{reason}");
            }
            By::Secondary(bit) => {
                let vid = u64::from(secondary::VIRTUAL_INTERRUPT_DELIVERY);
                assert_eq!(controls(0, ACTIVATE, bit.into()), L1, "{reason}");
                assert_eq!(controls(ones, ones, ones & !(u64::from(bit) | vid)), L0, "{reason}");
                assert_eq!(controls(ones, ones & !ACTIVATE, ones), L0, "{reason}: not activated");
            }
            By::Both(first, second) => {
                let (first, second) = (u64::from(first), u64::from(second));
                assert_eq!(controls(0, first | ACTIVATE, second), L1, "{reason}");
                assert_eq!(controls(ones, ones & !first, ones), L0, "{reason}");
                assert_eq!(controls(ones, ones, ones & !second), L0, "{reason}");
            }
        }
    }
    assert_eq!(TABLE.len() as u32, reason::LAST + 1);
    assert_eq!(ask(exit(1000), &vmcs(&[(Field::PrimaryControls, ones)])), L0);
}

#[test]
fn pause_loops_and_injected_mtf() {
    let ple = vmcs(&[
        (Field::PrimaryControls, primary::ACTIVATE_SECONDARY.into()),
        (Field::SecondaryControls, secondary::PAUSE_LOOP_EXITING.into()),
    ]);
    assert_eq!(ask(exit(reason::PAUSE), &ple), L1);
    let injected = |kind: u32| vmcs(&[(Field::EntryInterruption, (event::VALID | kind << 8).into())]);
    assert_eq!(ask(exit(reason::MONITOR_TRAP_FLAG), &injected(event::OTHER)), L1);
    assert_eq!(ask(exit(reason::MONITOR_TRAP_FLAG), &injected(event::NMI)), L0);
    let delivery = vmcs(&[
        (Field::PrimaryControls, primary::ACTIVATE_SECONDARY.into()),
        (Field::SecondaryControls, secondary::VIRTUAL_INTERRUPT_DELIVERY.into()),
    ]);
    assert_eq!(ask(exit(reason::APIC_WRITE), &delivery), L1);
}

#[test]
fn exceptions_follow_the_bitmap() {
    let information = |kind: u32, vector: u8| event::VALID | kind << 8 | u32::from(vector);
    for number in 0..32 {
        let kind = match number {
            vector::BP | vector::OF => event::SOFTWARE_EXCEPTION,
            vector::DB => event::PRIVILEGED_SOFTWARE_EXCEPTION,
            vector::NMI => continue,
            // Not matching mask 0, match 1: as if it were the bitmap's opposite, tested below.
            vector::PF => continue,
            _ => event::HARDWARE_EXCEPTION,
        };
        let facts = ExitFacts { interruption: information(kind, number), ..exit(0) };
        assert_eq!(ask(facts, &vmcs(&[(Field::ExceptionBitmap, 1 << number)])), L1, "{number}");
        let others = u64::from(u32::MAX) & !(1 << number);
        assert_eq!(ask(facts, &vmcs(&[(Field::ExceptionBitmap, others)])), L0, "{number}");
    }
    let nmi = ExitFacts { interruption: information(event::NMI, 2), ..exit(0) };
    assert_eq!(ask(nmi, &vmcs(&[(Field::PinControls, pin::NMI_EXITING.into())])), L1);
    assert_eq!(ask(nmi, &vmcs(&[(Field::ExceptionBitmap, 1 << 2)])), L0, "the bitmap is not about NMIs");
    assert_eq!(ask(exit(0), &vmcs(&[(Field::ExceptionBitmap, u64::MAX >> 32)])), L0, "no valid event");
}

/// "A page fault causes a VM exit iff bit 14 of the bitmap equals (PFEC AND mask = match)", against the table spelt out.
#[test]
fn page_faults_follow_mask_and_match() {
    let interruption = event::VALID | event::ERROR_CODE_VALID | 3 << 8 | 14;
    for (bit, mask, equal, code, expected) in [
        (0, 0, 0, 5, L0),
        (1, 0, 0, 5, L1),
        (0, 0, u64::from(u32::MAX), 5, L1),
        (1, 0, u64::from(u32::MAX), 5, L0),
        (1, 1, 0, 2, L1),
        (1, 1, 0, 3, L0),
        (1, 1, 1, 3, L1),
        (0, 1, 1, 3, L0),
        (0, 1, 1, 2, L1),
        (1, 0x14, 0x10, 0x13, L1),
        (1, 0x14, 0x10, 0x17, L0),
    ] {
        let vmcs12 = vmcs(&[
            (Field::ExceptionBitmap, bit << 14),
            (Field::PageFaultMask, mask),
            (Field::PageFaultMatch, equal),
        ]);
        let facts = ExitFacts { interruption, interruption_error: code, ..exit(0) };
        assert_eq!(ask(facts, &vmcs12), expected, "bit {bit} mask {mask:#x} match {equal:#x} code {code:#x}");
    }
}

#[test]
fn control_registers() {
    let mov = |direction: u64, register: u64, operand| ExitFacts {
        qualification: direction << 4 | register,
        operand,
        ..exit(reason::CR_ACCESS)
    };
    let (to, from) = (0, 1);
    for (register, mask, shadow) in
        [(0, Field::Cr0Mask, Field::Cr0Shadow), (4, Field::Cr4Mask, Field::Cr4Shadow)]
    {
        let owned = vmcs(&[(mask, 0x8000_0021), (shadow, 0x8000_0001)]);
        assert_eq!(ask(mov(to, register, 0x8000_0001), &owned), L0);
        assert_eq!(ask(mov(to, register, 0x8001_001f & !0x20), &owned), L0, "bits that are not owned");
        assert_eq!(ask(mov(to, register, 0x8000_0021), &owned), L1);
        assert_eq!(ask(mov(to, register, 0x0000_0001), &owned), L1);
        assert_eq!(ask(mov(from, register, 0), &owned), L0, "reads never exit");
    }
    let control = |bit: u32| vmcs(&[(Field::PrimaryControls, bit.into())]);
    for (facts, bit) in [
        (mov(to, 3, 0x1000), primary::CR3_LOAD_EXITING),
        (mov(from, 3, 0), primary::CR3_STORE_EXITING),
        (mov(to, 8, 0), primary::CR8_LOAD_EXITING),
        (mov(from, 8, 0), primary::CR8_STORE_EXITING),
    ] {
        assert_eq!(ask(facts, &control(bit)), L1);
        assert_eq!(ask(facts, &control(!bit)), L0);
    }
    assert_eq!(ask(mov(to, 2, 0), &control(!0)), L0, "CR2 never exits");
}

#[test]
fn cr3_targets() {
    let mut vmcs12 = vmcs(&[
        (Field::PrimaryControls, primary::CR3_LOAD_EXITING.into()),
        (Field::Cr3Target0, 0x1000),
        (Field::Cr3Target1, 0x2000),
        (Field::Cr3Target3, 0x4000),
    ]);
    let load = |operand| ExitFacts { qualification: 3, operand, ..exit(reason::CR_ACCESS) };
    for (count, targets) in
        [(0, &[][..]), (1, &[0x1000]), (2, &[0x1000, 0x2000]), (4, &[0x1000, 0x2000, 0, 0x4000])]
    {
        vmcs12.set(Field::Cr3TargetCount, count);
        for value in [0, 0x1000, 0x2000, 0x3000, 0x4000] {
            let expected = if targets.contains(&value) { L0 } else { L1 };
            assert_eq!(ask(load(value), &vmcs12), expected, "{count} targets, {value:#x}");
        }
    }
    vmcs12.set(Field::Cr3TargetCount, u64::MAX);
    assert_eq!(ask(load(0x9000), &vmcs12), L1, "a count that VM entry would refuse");
}

#[test]
fn clts_and_lmsw() {
    let clts = ExitFacts { qualification: 2 << 4, ..exit(reason::CR_ACCESS) };
    let lmsw = |source: u64| ExitFacts { qualification: 3 << 4 | source << 16, ..exit(reason::CR_ACCESS) };
    let cr0 = |mask, shadow| vmcs(&[(Field::Cr0Mask, mask), (Field::Cr0Shadow, shadow)]);
    assert_eq!(ask(clts, &cr0(8, 8)), L1);
    assert_eq!(ask(clts, &cr0(8, 0)), L0);
    assert_eq!(ask(clts, &cr0(0, 8)), L0);
    assert_eq!(ask(lmsw(1), &cr0(1, 0)), L1, "sets PE");
    assert_eq!(ask(lmsw(0), &cr0(1, 1)), L0, "LMSW cannot clear PE");
    assert_eq!(ask(lmsw(1), &cr0(1, 1)), L0);
    assert_eq!(ask(lmsw(8), &cr0(8, 0)), L1, "sets TS");
    assert_eq!(ask(lmsw(0), &cr0(8, 8)), L1, "clears TS");
    assert_eq!(ask(lmsw(6), &cr0(8, 0)), L0, "MP and EM are not owned");
    assert_eq!(ask(lmsw(0xfff0), &cr0(0xffff, 0)), L0, "LMSW has four bits");
}

#[test]
fn io() {
    let access = |port: u64, size: u64| ExitFacts {
        qualification: port << 16 | (size - 1),
        ..exit(reason::IO_INSTRUCTION)
    };
    let control = |bits: u32| vmcs(&[(Field::PrimaryControls, bits.into())]);
    assert_eq!(ask(access(0x60, 1), &control(0)), L0);
    assert_eq!(ask(access(0x60, 1), &control(primary::UNCONDITIONAL_IO_EXITING)), L1);
    // "Use I/O bitmaps" makes the other control ignored.
    for others in [0, primary::UNCONDITIONAL_IO_EXITING] {
        let vmcs12 = control(primary::USE_IO_BITMAPS | others);
        let bits = Set { io: vec![0x64, 0x8003], ..Set::default() };
        for (port, size, expected) in [
            (0x64, 1, L1),
            (0x63, 1, L0),
            (0x63, 2, L1),
            (0x61, 4, L1),
            (0x60, 4, L0),
            (0x65, 4, L0),
            (0x8000, 4, L1),
            (0x7ffe, 4, L0),
            (0xffff, 1, L0),
            (0xffff, 2, L1),
            (0xfffd, 4, L1),
            (0xfffc, 4, L0),
        ] {
            assert_eq!(route(&access(port, size), &vmcs12, &bits), expected, "{port:#x} {size}");
        }
    }
}

#[test]
fn msrs() {
    let access = |reason, index: u64| ExitFacts { operand: index, ..exit(reason) };
    let with = vmcs(&[(Field::PrimaryControls, primary::USE_MSR_BITMAPS.into())]);
    let bits = Set { read: vec![0x10, 0xc000_0080], write: vec![0x1fff], ..Set::default() };
    for (reason, index, expected) in [
        (reason::RDMSR, 0x10, L1),
        (reason::WRMSR, 0x10, L0),
        (reason::RDMSR, 0x11, L0),
        (reason::RDMSR, 0xc000_0080, L1),
        (reason::WRMSR, 0xc000_0080, L0),
        (reason::WRMSR, 0x1fff, L1),
        (reason::RDMSR, 0x2000, L1),
        (reason::RDMSR, 0xbfff_ffff, L1),
        (reason::RDMSR, 0xc000_1fff, L0),
        (reason::WRMSR, 0xc000_2000, L1),
        (reason::WRMSR, 0xffff_ffff, L1),
    ] {
        assert_eq!(route(&access(reason, index), &with, &bits), expected, "{reason} {index:#x}");
        assert_eq!(route(&access(reason, index), &Vmcs::default(), &bits), L1, "without bitmaps all exit");
    }
}

#[test]
fn vmread_and_vmwrite() {
    let access = |reason, encoding: u64| ExitFacts { operand: encoding, ..exit(reason) };
    let shadowing = vmcs(&[
        (Field::PrimaryControls, primary::ACTIVATE_SECONDARY.into()),
        (Field::SecondaryControls, secondary::VMCS_SHADOWING.into()),
    ]);
    let bits = Set { vmread: vec![0x4402], vmwrite: vec![0x681e], ..Set::default() };
    for (reason, encoding, expected) in [
        (reason::VMREAD, 0x4402, L1),
        (reason::VMWRITE, 0x4402, L0),
        (reason::VMREAD, 0x681e, L0),
        (reason::VMWRITE, 0x681e, L1),
        (reason::VMREAD, 0x681e | 0x8000, L1),
        (reason::VMREAD, 0x681e | 1 << 40, L1),
    ] {
        assert_eq!(route(&access(reason, encoding), &shadowing, &bits), expected, "{reason} {encoding:#x}");
        assert_eq!(route(&access(reason, encoding), &Vmcs::default(), &bits), L1);
    }
}

#[test]
fn extended_states() {
    let vmcs12 = |secondary: u32| {
        vmcs(&[
            (Field::PrimaryControls, primary::ACTIVATE_SECONDARY.into()),
            (Field::SecondaryControls, secondary.into()),
            (Field::XssExitingBitmap, 0x100),
        ])
    };
    for reason in [reason::XSAVES, reason::XRSTORS] {
        let states = |operand| ExitFacts { operand, ..exit(reason) };
        assert_eq!(ask(states(0x100), &vmcs12(secondary::ENABLE_XSAVES)), L1);
        assert_eq!(ask(states(0xeff), &vmcs12(secondary::ENABLE_XSAVES)), L0);
        assert_eq!(ask(states(0x100), &vmcs12(!secondary::ENABLE_XSAVES)), L0);
    }
}
