//! Cases of the rules about guest segment registers: one for each rule and register at least.

use x86defs::vmx::secondary;
use x86defs::{cr0, rflags};

use super::super::segment::SegmentRule as R;
use super::good::{self, Entry};
use super::{Case, Rule, case};
use crate::field::Field;
use crate::segment::Segment::{self, Cs, Ds, Es, Fs, Gs, Ldtr, Ss, Tr};

const UNUSABLE: u64 = 1 << 16;
const CODE_OR_DATA: [Segment; 6] = [Es, Cs, Ss, Ds, Fs, Gs];
const DATA: [Segment; 4] = [Es, Ds, Fs, Gs];

pub fn cases() -> Vec<Case> {
    let mut cases = selectors_and_bases();
    cases.extend(v86());
    cases.extend(types());
    cases.extend(privilege());
    cases.extend(rest());
    cases.extend(tables());
    cases
}

fn rule(rule: R, segment: Segment) -> Rule {
    Rule::Segment(rule, segment)
}

/// One field of a register: a bad value, a good value.
fn values(of: R, segment: Segment, field: Field, bad: u64, good: u64) -> Case {
    case(rule(of, segment), move |e| e.set(field, bad), move |e| e.set(field, good))
}

/// An access-rights value that is bad while the register is usable, and fine when it is not.
fn usable(of: R, segment: Segment, bad: u64) -> Case {
    values(of, segment, segment.access(), bad, bad | UNUSABLE)
}

/// LDTR holds a table.
fn with_ldt() -> Entry {
    let mut e = good::long_mode();
    e.segment(Ldtr, 0x28, 0x1000, 0xfff, 0x82);
    e
}

fn restricted() -> Entry {
    let mut e = good::long_mode();
    e.without(secondary::UNRESTRICTED_GUEST);
    e
}

fn selectors_and_bases() -> Vec<Case> {
    let mut cases = vec![
        values(R::SelectorTi, Tr, Tr.selector(), 0x1c, 0x1b),
        values(R::SelectorTi, Ldtr, Ldtr.selector(), 0x2c, 0x2b).on(with_ldt),
        case(
            rule(R::SelectorTi, Ldtr),
            |e| e.set(Ldtr.selector(), 0x2c),
            |e| {
                e.set(Ldtr.selector(), 0x2c);
                e.or(Ldtr.access(), UNUSABLE);
            },
        )
        .on(with_ldt),
        values(R::SsSelectorRpl, Ss, Ss.selector(), 0x13, 0x20).on(restricted),
        case(
            rule(R::SsSelectorRpl, Ss),
            |e| e.set(Cs.selector(), 9),
            |e| {
                e.set(Cs.selector(), 9);
                e.with(secondary::UNRESTRICTED_GUEST);
            },
        )
        .on(restricted),
    ];
    const NOT_CANONICAL: u64 = 1 << 47;
    for segment in [Tr, Fs, Gs] {
        cases.push(values(R::BaseCanonical, segment, segment.base(), NOT_CANONICAL, NOT_CANONICAL - 1));
        cases.push(case(
            rule(R::BaseCanonical, segment),
            move |e| {
                e.inputs.linear_bits = 57;
                e.set(segment.base(), 1 << 56);
            },
            move |e| {
                e.inputs.linear_bits = 57;
                e.set(segment.base(), NOT_CANONICAL);
            },
        ));
    }
    for segment in [Fs, Gs] {
        // Unusable is no excuse.
        cases.push(case(
            rule(R::BaseCanonical, segment),
            move |e| {
                e.or(segment.access(), UNUSABLE);
                e.set(segment.base(), NOT_CANONICAL);
            },
            move |e| {
                e.or(segment.access(), UNUSABLE);
                e.set(segment.base(), 0xffff_8000_0000_0000);
            },
        ));
    }
    cases
        .push(values(R::LdtrBaseCanonical, Ldtr, Ldtr.base(), NOT_CANONICAL, NOT_CANONICAL - 1).on(with_ldt));
    cases.push(
        case(
            rule(R::LdtrBaseCanonical, Ldtr),
            |e| e.set(Ldtr.base(), NOT_CANONICAL),
            |e| {
                e.set(Ldtr.base(), NOT_CANONICAL);
                e.or(Ldtr.access(), UNUSABLE);
            },
        )
        .on(with_ldt),
    );
    for segment in [Cs, Ss, Ds, Es] {
        cases.push(values(R::BaseHigh, segment, segment.base(), 1 << 32, 0xffff_ffff));
    }
    for segment in [Ss, Ds, Es] {
        cases.push(case(
            rule(R::BaseHigh, segment),
            move |e| e.set(segment.base(), u64::MAX),
            move |e| {
                e.set(segment.base(), u64::MAX);
                e.or(segment.access(), UNUSABLE);
            },
        ));
    }
    cases
}

fn v86() -> Vec<Case> {
    let mut cases = Vec::new();
    for segment in CODE_OR_DATA {
        cases.push(case(
            rule(R::V86Base, segment),
            move |e| e.set(segment.base(), 0x1_2350),
            move |e| {
                e.set(segment.base(), 0x1_2350);
                e.set(segment.selector(), 0x1235);
            },
        ));
        cases.push(values(R::V86Limit, segment, segment.limit(), 0xf_ffff, 0xffff));
        for bad in [0x93, 0xf2, 0xfb, 0x10f3, 0x80f3, 0x1_00f3] {
            cases.push(values(R::V86Access, segment, segment.access(), bad, 0xf3));
        }
    }
    cases.into_iter().map(|case| case.on(good::v86)).collect()
}

fn types() -> Vec<Case> {
    let mut cases = Vec::new();
    // CS: accessed code; and, in an unrestricted guest, read/write accessed expand-up data.
    for kind in 0..16 {
        let cs = move |unrestricted: bool, kind: u64| {
            move |e: &mut Entry| {
                e.set(Cs.access(), 0xa090 | kind);
                if !unrestricted {
                    e.without(secondary::UNRESTRICTED_GUEST);
                }
            }
        };
        match kind {
            9 | 11 | 13 | 15 => {
                cases.push(case(rule(R::CsType, Cs), cs(false, 3), cs(false, kind)));
                cases.push(case(rule(R::CsType, Cs), cs(true, 1), cs(true, kind)));
            }
            3 => cases.push(case(rule(R::CsType, Cs), cs(false, 3), cs(true, 3))),
            _ => {
                cases.push(case(rule(R::CsType, Cs), cs(true, kind), cs(true, 3)));
                cases.push(case(rule(R::CsType, Cs), cs(false, kind), cs(false, 11)));
            }
        }
    }
    for kind in (0..16).filter(|kind| !matches!(kind, 3 | 7)) {
        cases.push(usable(R::SsType, Ss, 0xc090 | kind));
    }
    cases.push(values(R::SsType, Ss, Ss.access(), 0xc091, 0xc097));
    for segment in DATA {
        for kind in (0..16).step_by(2) {
            cases.push(usable(R::DataAccessed, segment, 0xc090 | kind));
        }
        cases.push(values(R::DataAccessed, segment, segment.access(), 0xc09a, 0xc091));
        cases.push(usable(R::DataReadable, segment, 0xc099));
        cases.push(values(R::DataReadable, segment, segment.access(), 0xc09d, 0xc09f));
        cases.push(usable(R::SystemBit, segment, 0xc083));
    }
    cases.push(usable(R::SystemBit, Ss, 0xc083));
    // CS counts as usable whatever its bit says.
    cases.push(values(R::SystemBit, Cs, Cs.access(), 0xa08b, 0xa09b));
    cases.push(values(R::SystemBit, Cs, Cs.access(), 0x1_a08b, 0x1_a09b));
    cases
}

/// CS's and SS's access rights, and whether the guest is unrestricted.
fn stack_and_code(cs: u64, ss: u64) -> impl Fn(&mut Entry) {
    move |e| {
        e.set(Cs.access(), cs);
        e.set(Ss.access(), ss);
    }
}

fn privilege() -> Vec<Case> {
    let real = R::SsDplReal;
    let mut cases = vec![
        case(rule(R::CsDplData, Cs), stack_and_code(0xa0b3, 0xc093), stack_and_code(0xa093, 0xc093)),
        case(rule(R::CsDplNonconforming, Cs), stack_and_code(0xa0fb, 0xc093), stack_and_code(0xa0fb, 0xc0f3)),
        case(rule(R::CsDplNonconforming, Cs), stack_and_code(0xa099, 0xc0b3), stack_and_code(0xa0b9, 0xc0b3)),
        case(rule(R::CsDplConforming, Cs), stack_and_code(0xa0bf, 0xc093), stack_and_code(0xa0bf, 0xc0f3)),
        case(rule(R::CsDplConforming, Cs), stack_and_code(0xa0fd, 0xc0d3), stack_and_code(0xa0dd, 0xc0d3)),
        case(
            rule(R::SsDplRpl, Ss),
            |e| {
                stack_and_code(0xa0fb, 0xc0f3)(e);
                e.without(secondary::UNRESTRICTED_GUEST);
            },
            stack_and_code(0xa0fb, 0xc0f3),
        ),
        // Unusable is no excuse.
        case(
            rule(R::SsDplRpl, Ss),
            |e| stack_and_code(0xa0fb, 0x1_0060)(e),
            |e| {
                stack_and_code(0xa0fb, 0x1_0060)(e);
                e.set(Cs.selector(), 0x0b);
                e.set(Ss.selector(), 0x13);
            },
        )
        .on(restricted),
        case(rule(real, Ss), stack_and_code(0xa093, 0xc0b3), stack_and_code(0xa093, 0xc093)),
        case(
            rule(real, Ss),
            |e| stack_and_code(0xfb, 0xf3)(e),
            |e| {
                stack_and_code(0xfb, 0xf3)(e);
                e.or(Field::GuestCr0, cr0::PE);
            },
        )
        .on(good::real_mode),
    ];
    for segment in DATA {
        let with = move |selector: u64, access: u64| {
            move |e: &mut Entry| {
                e.set(segment.selector(), selector);
                e.set(segment.access(), access);
            }
        };
        let of = rule(R::DataDpl, segment);
        // Data, expand-down data, non-conforming code; conforming code may be less privileged than its RPL.
        cases.push(case(of, with(0x13, 0xc0d3), with(0x13, 0xc0f3)).on(restricted));
        cases.push(case(of, with(0x11, 0xc095), with(0x10, 0xc095)).on(restricted));
        cases.push(case(of, with(0x11, 0xc09b), with(0x11, 0xc09f)).on(restricted));
        cases.push(case(of, with(0x11, 0xc093), with(0x11, 0x1_c093)).on(restricted));
        cases.push(
            case(of, with(0x11, 0xc093), move |e| {
                with(0x11, 0xc093)(e);
                e.with(secondary::UNRESTRICTED_GUEST);
            })
            .on(restricted),
        );
    }
    cases
}

/// Good access rights of a register in the 64-bit guest.
fn good_access(segment: Segment) -> u64 {
    if segment == Cs { 0xa09b } else { 0xc093 }
}

fn rest() -> Vec<Case> {
    let mut cases = vec![
        values(R::CsDefaultSize, Cs, Cs.access(), 0xe09b, 0xa09b),
        case(
            rule(R::CsDefaultSize, Cs),
            |e| e.set(Cs.access(), 0xe09b),
            |e| {
                // Compatibility mode.
                e.set(Cs.access(), 0xc09b);
                e.set(Field::GuestRip, 0x1000);
            },
        ),
    ];
    for segment in CODE_OR_DATA {
        let access = segment.access();
        let good = good_access(segment);
        cases.push(values(R::Present, segment, access, good & !0x80, good));
        for bit in 8..12 {
            cases.push(values(R::Reserved, segment, access, good | 1 << bit, good | 1 << 12));
        }
        for bit in [17, 24, 31] {
            cases.push(values(R::ReservedHigh, segment, access, good | 1 << bit, good));
        }
        let sized = move |limit: u64, granular: bool| {
            move |e: &mut Entry| {
                e.set(segment.limit(), limit);
                e.set(access, if granular { good } else { good & !0x8000 });
            }
        };
        cases.push(case(
            rule(R::GranularityBytes, segment),
            sized(0xffff_fffe, true),
            sized(0xffff_ffff, true),
        ));
        cases.push(case(rule(R::GranularityBytes, segment), sized(0x7ff, true), sized(0x7ff, false)));
        cases.push(case(
            rule(R::GranularityPages, segment),
            sized(0x0010_0fff, false),
            sized(0x0010_0fff, true),
        ));
        cases.push(case(
            rule(R::GranularityPages, segment),
            sized(0xffff_ffff, false),
            sized(0xf_ffff, false),
        ));
        if segment != Cs {
            cases.push(usable(R::Present, segment, good & !0x80));
            cases.push(usable(R::Reserved, segment, good | 0xf00));
            cases.push(usable(R::ReservedHigh, segment, good | 0x8000_0000));
            cases.push(usable(R::GranularityPages, segment, good & !0x8000));
        }
    }
    cases
}

fn tables() -> Vec<Case> {
    let mut cases = vec![
        values(R::TrType, Tr, Tr.access(), 0x83, 0x8b),
        values(R::TrType, Tr, Tr.access(), 0x89, 0x83).on(good::pae),
        values(R::TrType, Tr, Tr.access(), 0x82, 0x8b).on(good::v86),
        values(R::TrUsable, Tr, Tr.access(), 0x1_008b, 0x8b),
        values(R::LdtrType, Ldtr, Ldtr.access(), 0x83, 0x82).on(with_ldt),
    ];
    for (segment, good) in [(Tr, 0x8b), (Ldtr, 0x82)] {
        let access = segment.access();
        let mut of_table = vec![
            values(R::TableSystemBit, segment, access, good | 0x10, good),
            values(R::TablePresent, segment, access, good & !0x80, good),
            values(R::TableReserved, segment, access, good | 0x100, good | 0x1000),
            values(R::TableReserved, segment, access, good | 0x800, good | 0x6000),
            values(R::TableReservedHigh, segment, access, good | 1 << 17, good | 0x60),
            values(R::TableReservedHigh, segment, access, good | 1 << 31, good),
        ];
        let sized = move |limit: u64, granular: u64| {
            move |e: &mut Entry| {
                e.set(segment.limit(), limit);
                e.set(access, good | granular);
            }
        };
        let (bytes, pages) =
            (rule(R::TableGranularityBytes, segment), rule(R::TableGranularityPages, segment));
        of_table.push(case(bytes, sized(0x67, 0x8000), sized(0x67, 0)));
        of_table.push(case(bytes, sized(0xffe, 0x8000), sized(0xfff, 0x8000)));
        of_table.push(case(pages, sized(0x0010_0fff, 0), sized(0x0010_0fff, 0x8000)));
        cases.extend(of_table.into_iter().map(|case| case.on(with_ldt)));
    }
    for bad in [0x83, 0x92, 0x02, 0x182, 0x2_0082] {
        // Whatever an unusable LDTR has.
        let of = match bad {
            0x83 => R::LdtrType,
            0x92 => R::TableSystemBit,
            0x02 => R::TablePresent,
            0x182 => R::TableReserved,
            _ => R::TableReservedHigh,
        };
        cases.push(usable(of, Ldtr, bad).on(with_ldt));
    }
    // In virtual-8086 mode TR and LDTR are checked just so.
    cases.push(
        case(
            rule(R::TablePresent, Tr),
            |e| e.clear(Tr.access(), 0x80),
            |e| e.or(Field::GuestRflags, rflags::NT),
        )
        .on(good::v86),
    );
    cases
}
