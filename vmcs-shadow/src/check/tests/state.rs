//! Cases of the rules about the host's and the guest's state, but for segment registers.

use x86defs::vmx::{
    activity, entry_ctl, event, exit_ctl, interruptibility, pending_debug, pin, primary, secondary,
};
use x86defs::{cr0, cr4, efer, rflags};

use super::good::{self, Entry};
use super::{Case, Rule, case};
use crate::caps::REVISION;
use crate::field::Field;

const TOO_FAR: u64 = 1 << 46;
/// The first address of 48 bits that is not canonical, and the last that is.
const NOT_CANONICAL: u64 = 1 << 47;
const LAST_LOW: u64 = NOT_CANONICAL - 1;

pub fn cases() -> Vec<Case> {
    let mut cases = host_registers();
    cases.extend(host_segments());
    cases.extend(address_space());
    cases.extend(guest_registers());
    cases.extend(guest_msrs());
    cases.extend(tables_and_flags());
    cases.extend(activity_state());
    cases.extend(interruptibility_state());
    cases.extend(pending_debug_exceptions());
    cases.extend(link_pointer());
    cases.extend(pdptes());
    cases
}

/// One field's bad value and a good one.
fn value(rule: Rule, field: Field, bad: u64, good: u64) -> Case {
    case(rule, move |e| e.set(field, bad), move |e| e.set(field, good))
}

/// A bad value of a field that counts only with a control.
fn only_with(rule: Rule, field: Field, bad: u64, control: Field, bit: u32) -> Case {
    case(
        rule,
        move |e| e.set(field, bad),
        move |e| {
            e.set(field, bad);
            e.clear(control, bit.into());
        },
    )
}

/// An address that must be canonical, in each direction and with 57 bits.
fn canonical(rule: Rule, field: Field) -> [Case; 3] {
    [
        value(rule, field, NOT_CANONICAL, LAST_LOW),
        value(rule, field, 0xffff_7fff_ffff_ffff, 0xffff_8000_0000_0000),
        case(
            rule,
            move |e| {
                e.inputs.linear_bits = 57;
                e.set(field, 1 << 56);
            },
            move |e| {
                e.inputs.linear_bits = 57;
                e.set(field, NOT_CANONICAL);
            },
        ),
    ]
}

fn host_registers() -> Vec<Case> {
    let mut cases = vec![
        value(Rule::HostCr0, Field::HostCr0, cr0::PE | cr0::PG, cr0::PE | cr0::PG | cr0::NE),
        value(Rule::HostCr0, Field::HostCr0, cr0::PE | cr0::NE, cr0::ALL),
        value(Rule::HostCr0, Field::HostCr0, cr0::ALL | 1 << 32, cr0::ALL),
        value(Rule::HostCr4, Field::HostCr4, cr4::PAE, cr4::PAE | cr4::VMXE),
        value(
            Rule::HostCr4,
            Field::HostCr4,
            cr4::PAE | cr4::VMXE | cr4::LA57,
            cr4::PAE | cr4::VMXE | cr4::SMEP,
        ),
        value(Rule::HostCr3, Field::HostCr3, TOO_FAR, TOO_FAR - 1),
        case(
            Rule::HostPerfGlobalCtrl,
            |e| {
                load_perf_global_ctrl(e);
                e.set(Field::HostPerfGlobalCtrl, 1);
            },
            load_perf_global_ctrl,
        ),
        value(Rule::HostPat, Field::HostPat, 0x0107_0406_0206_0405, 0x0107_0406_0006_0405),
        only_with(Rule::HostPat, Field::HostPat, 3 << 56, Field::ExitControls, exit_ctl::LOAD_PAT),
        value(
            Rule::HostEferReserved,
            Field::HostEfer,
            efer::LMA | efer::LME | 1 << 12,
            efer::LMA | efer::LME | efer::SCE,
        ),
        only_with(
            Rule::HostEferReserved,
            Field::HostEfer,
            u64::MAX,
            Field::ExitControls,
            exit_ctl::LOAD_EFER,
        ),
        only_with(Rule::HostEferMode, Field::HostEfer, efer::LMA, Field::ExitControls, exit_ctl::LOAD_EFER),
        value(Rule::HostEferMode, Field::HostEfer, efer::LME, efer::LMA | efer::LME),
        value(Rule::HostEferMode, Field::HostEfer, efer::LME | efer::LMA, efer::NXE).on(good::bits32),
    ];
    cases.extend(canonical(Rule::HostSysenter, Field::HostSysenterEsp));
    cases.extend(canonical(Rule::HostSysenter, Field::HostSysenterEip));
    cases
}

fn load_perf_global_ctrl(e: &mut Entry) {
    e.flag("vmx-exit-load-perf-global-ctrl", true);
    e.or(Field::ExitControls, exit_ctl::LOAD_PERF_GLOBAL_CTRL.into());
}

fn host_segments() -> Vec<Case> {
    let mut cases = Vec::new();
    for i in 0..7 {
        let field = Field::HostEsSelector.nth(i);
        for bit in [1, 2, 4] {
            cases.push(value(Rule::HostSelector, field, 0x40 | bit, 0x48));
        }
    }
    cases.push(value(Rule::HostCsTrNull, Field::HostCsSelector, 0, 0xfff8));
    cases.push(value(Rule::HostCsTrNull, Field::HostTrSelector, 0, 0xfff8));
    cases.push(value(Rule::HostSsNull, Field::HostSsSelector, 0, 0x18).on(good::bits32));
    for i in 0..5 {
        cases.extend(canonical(Rule::HostBaseCanonical, Field::HostFsBase.nth(i)));
    }
    cases
}

fn address_space() -> Vec<Case> {
    const HOST_LONG: u64 = exit_ctl::HOST_ADDRESS_SPACE_SIZE as u64;
    const GUEST_LONG: u64 = entry_ctl::IA32E_MODE_GUEST as u64;
    let load_no_efer = |e: &mut Entry| e.clear(Field::ExitControls, exit_ctl::LOAD_EFER.into());
    let mut cases = vec![
        case(Rule::GuestModeOutsideLongMode, |e| e.or(Field::EntryControls, GUEST_LONG), |_| ())
            .on(good::bits32),
        case(
            Rule::HostModeOutsideLongMode,
            move |e| {
                load_no_efer(e);
                e.or(Field::ExitControls, HOST_LONG);
            },
            move |e| {
                load_no_efer(e);
                e.or(Field::ExitControls, HOST_LONG);
                e.or(Field::HostCr4, cr4::PAE);
                e.inputs.long_mode = true;
            },
        )
        .on(good::bits32),
        case(
            Rule::HostModeInLongMode,
            move |e| {
                load_no_efer(e);
                e.clear(Field::ExitControls, HOST_LONG);
                e.set(Field::HostSsSelector, 0x10);
            },
            load_no_efer,
        ),
        case(Rule::HostPcidWithoutLongMode, |e| e.or(Field::HostCr4, cr4::PCIDE), |_| ()).on(good::bits32),
        value(Rule::HostRipHigh, Field::HostRip, 1 << 32, 0xffff_ffff).on(good::bits32),
        case(Rule::HostPae, |e| e.clear(Field::HostCr4, cr4::PAE), |_| ()),
    ];
    cases.extend(canonical(Rule::HostRipCanonical, Field::HostRip));
    cases
}

fn guest_registers() -> Vec<Case> {
    const DEBUG: u32 = entry_ctl::LOAD_DEBUG_CONTROLS;
    let mut cases = vec![
        case(Rule::GuestCr0, |e| e.clear(Field::GuestCr0, cr0::NE), |_| ()).on(good::real_mode),
        case(Rule::GuestCr0, |e| e.or(Field::GuestCr0, 1 << 32), |e| e.or(Field::GuestCr0, cr0::ALL)),
        // PE and PG need to be 1 but in an unrestricted guest.
        case(
            Rule::GuestCr0,
            |e| e.without(secondary::UNRESTRICTED_GUEST),
            |e| {
                e.without(secondary::UNRESTRICTED_GUEST);
                e.or(Field::GuestCr0, cr0::PE | cr0::PG);
                e.set(Field::GuestCsAccess, 0x9b);
                e.set(Field::GuestSsSelector, 0xf000);
            },
        )
        .on(good::real_mode),
        case(
            Rule::GuestPagingWithoutProtection,
            |e| e.or(Field::GuestCr0, cr0::PG),
            |e| e.or(Field::GuestCr0, cr0::PG | cr0::PE),
        )
        .on(good::real_mode),
        case(Rule::GuestCr4, |e| e.clear(Field::GuestCr4, cr4::VMXE), |_| ()),
        case(
            Rule::GuestCr4,
            |e| e.or(Field::GuestCr4, cr4::SMXE),
            |e| {
                e.or(Field::GuestCr4, cr4::SMXE);
                e.caps.cr4_allowed |= cr4::SMXE;
            },
        ),
        value(Rule::GuestDebugctl, Field::GuestDebugctl, 1 << 6, 3),
        only_with(Rule::GuestDebugctl, Field::GuestDebugctl, u64::MAX, Field::EntryControls, DEBUG),
        case(
            Rule::GuestLongModePaging,
            |e| e.clear(Field::GuestCr4, cr4::PAE),
            |e| e.or(Field::GuestCr4, cr4::PCIDE),
        ),
        case(Rule::GuestLongModePaging, |e| e.clear(Field::GuestCr0, cr0::PG), |_| ()),
        case(Rule::GuestPcidWithoutLongMode, |e| e.or(Field::GuestCr4, cr4::PCIDE), |_| ()).on(good::pae),
        value(Rule::GuestCr3, Field::GuestCr3, TOO_FAR, TOO_FAR - 1),
        value(Rule::GuestCr3, Field::GuestCr3, 1 << 63, 0),
        value(Rule::GuestDr7, Field::GuestDr7, 1 << 32, 0xffff_ffff),
        only_with(Rule::GuestDr7, Field::GuestDr7, u64::MAX, Field::EntryControls, DEBUG),
    ];
    cases.extend(canonical(Rule::GuestSysenter, Field::GuestSysenterEsp));
    cases.extend(canonical(Rule::GuestSysenter, Field::GuestSysenterEip));
    cases
}

fn guest_msrs() -> Vec<Case> {
    const EFER: u32 = entry_ctl::LOAD_EFER;
    let performance = |e: &mut Entry| {
        e.flag("vmx-entry-load-perf-global-ctrl", true);
        e.or(Field::EntryControls, entry_ctl::LOAD_PERF_GLOBAL_CTRL.into());
    };
    vec![
        case(
            Rule::GuestPerfGlobalCtrl,
            move |e| {
                performance(e);
                e.set(Field::GuestPerfGlobalCtrl, 1);
            },
            performance,
        ),
        value(Rule::GuestPat, Field::GuestPat, 2, 7),
        value(Rule::GuestPat, Field::GuestPat, 8 << 56, 5 << 56),
        only_with(Rule::GuestPat, Field::GuestPat, u64::MAX, Field::EntryControls, entry_ctl::LOAD_PAT),
        value(
            Rule::GuestEferReserved,
            Field::GuestEfer,
            efer::LMA | efer::LME | 2,
            efer::LMA | efer::LME | efer::SCE | efer::NXE,
        ),
        only_with(Rule::GuestEferReserved, Field::GuestEfer, u64::MAX, Field::EntryControls, EFER),
        value(Rule::GuestEferLma, Field::GuestEfer, efer::LME, efer::LMA | efer::LME),
        value(Rule::GuestEferLma, Field::GuestEfer, efer::LMA | efer::LME, 0).on(good::pae),
        value(Rule::GuestEferLme, Field::GuestEfer, efer::LMA, efer::LMA | efer::LME),
        value(Rule::GuestEferLme, Field::GuestEfer, efer::LME, efer::NXE).on(good::pae),
        // Without paging LME may be anything.
        case(
            Rule::GuestEferLme,
            |e| {
                e.or(Field::GuestCr0, cr0::PG | cr0::PE);
                e.set(Field::GuestEfer, efer::LME);
            },
            |e| e.set(Field::GuestEfer, efer::LME),
        )
        .on(good::real_mode),
    ]
}

fn tables_and_flags() -> Vec<Case> {
    const VALID_EXTERNAL: u32 = event::EXTERNAL_INTERRUPT;
    let flags = |rule, bad: u64, good: u64| value(rule, Field::GuestRflags, bad, good);
    let mut cases = vec![
        value(Rule::GuestTableLimit, Field::GuestGdtrLimit, 0x1_0000, 0xffff),
        value(Rule::GuestTableLimit, Field::GuestIdtrLimit, 0x8000_0000, 0),
        value(Rule::GuestRipHigh, Field::GuestRip, 1 << 32, 0xffff_ffff).on(good::compatibility),
        value(Rule::GuestRipHigh, Field::GuestRip, 1 << 32, 0xffff_ffff).on(good::real_mode),
        // Outside IA-32e mode L means nothing.
        case(
            Rule::GuestRipHigh,
            |e| {
                e.or(Field::GuestCsAccess, 1 << 13);
                e.set(Field::GuestRip, 1 << 32);
            },
            |e| e.or(Field::GuestCsAccess, 1 << 13),
        )
        .on(good::pae),
        flags(Rule::GuestRflagsReserved, 0, 2),
        flags(Rule::GuestRflagsReserved, 2 | 1 << 3, 2 | rflags::STATUS),
        flags(Rule::GuestRflagsReserved, 2 | 1 << 5, 2 | rflags::TF | rflags::NT),
        flags(Rule::GuestRflagsReserved, 2 | 1 << 15, 2 | rflags::IOPL),
        flags(Rule::GuestRflagsReserved, 2 | 1 << 22, 2 | rflags::ID | rflags::VIP),
        flags(Rule::GuestRflagsReserved, 2 | 1 << 63, 2 | rflags::AC | rflags::RF),
        case(Rule::GuestRflagsVm, |e| e.clear(Field::GuestCr0, cr0::PE), |_| ()).on(good::v86),
        case(
            Rule::GuestRflagsVm,
            |e| {
                e.or(Field::EntryControls, entry_ctl::IA32E_MODE_GUEST.into());
                e.set(Field::GuestEfer, efer::LMA | efer::LME);
                e.or(Field::GuestCr0, cr0::PG);
                e.or(Field::GuestCr4, cr4::PAE);
            },
            |e| {
                e.or(Field::GuestCr0, cr0::PG);
                e.or(Field::GuestCr4, cr4::PAE);
            },
        )
        .on(good::v86),
        case(
            Rule::GuestRflagsIf,
            |e| e.inject(VALID_EXTERNAL, 0x30),
            |e| {
                e.inject(VALID_EXTERNAL, 0x30);
                e.or(Field::GuestRflags, rflags::IF);
            },
        ),
        case(Rule::GuestRflagsIf, |e| e.inject(VALID_EXTERNAL, 0x30), |e| e.inject(event::NMI, 2)),
    ];
    for field in [Field::GuestGdtrBase, Field::GuestIdtrBase] {
        cases.extend(canonical(Rule::GuestTableBase, field));
    }
    cases.extend(canonical(Rule::GuestRipCanonical, Field::GuestRip));
    cases
}

fn state(e: &mut Entry, state: u32) {
    e.set(Field::GuestActivity, state.into());
}

fn activity_state() -> Vec<Case> {
    let mut cases = vec![
        case(Rule::ActivityState, |e| state(e, 4), |e| state(e, activity::WAIT_FOR_SIPI)),
        case(Rule::ActivityHltUser, |e| state(e, activity::HLT), |e| state(e, activity::SHUTDOWN))
            .on(good::compatibility),
        case(Rule::ActivityHltUser, |e| state(e, activity::HLT), |_| ()).on(good::compatibility),
        case(
            Rule::ActivityBlocked,
            |e| {
                state(e, activity::HLT);
                e.set(Field::GuestInterruptibility, interruptibility::MOV_SS.into());
            },
            |e| e.set(Field::GuestInterruptibility, interruptibility::MOV_SS.into()),
        ),
        case(
            Rule::ActivityBlocked,
            |e| {
                state(e, activity::SHUTDOWN);
                e.or(Field::GuestRflags, rflags::IF);
                e.set(Field::GuestInterruptibility, interruptibility::STI.into());
            },
            |e| {
                state(e, activity::SHUTDOWN);
                e.set(Field::GuestInterruptibility, interruptibility::NMI.into());
            },
        ),
    ];
    for (name, number) in [
        ("vmx-activity-hlt", activity::HLT),
        ("vmx-activity-shutdown", activity::SHUTDOWN),
        ("vmx-activity-wait-sipi", activity::WAIT_FOR_SIPI),
    ] {
        cases.push(case(
            Rule::ActivityState,
            move |e| {
                e.flag(name, false);
                state(e, number);
            },
            move |e| e.flag(name, false),
        ));
    }
    // Which events each state takes.
    let inject = |number, kind, vector| {
        move |e: &mut Entry| {
            e.or(Field::GuestRflags, rflags::IF);
            state(e, number);
            e.inject(kind, vector);
        }
    };
    for kind in [0, 2, 3, 4, 5, 6, 7] {
        for vector in [0, 1, 2, 14, 18] {
            let consistent = match kind {
                event::NMI => vector == 2,
                event::OTHER => vector == 0,
                _ => true,
            };
            if !consistent {
                continue;
            }
            let hlt = matches!((kind, vector), (0 | 2 | 7, _) | (3, 1 | 18));
            let shutdown = matches!((kind, vector), (2, _) | (3, 18));
            for (number, takes) in
                [(activity::HLT, hlt), (activity::SHUTDOWN, shutdown), (activity::WAIT_FOR_SIPI, false)]
            {
                if !takes {
                    cases.push(case(
                        Rule::ActivityInjection,
                        inject(number, kind, vector),
                        inject(activity::ACTIVE, kind, vector),
                    ));
                } else {
                    cases.push(case(
                        Rule::ActivityInjection,
                        inject(number, event::SOFTWARE_INTERRUPT, 0x80),
                        inject(number, kind, vector),
                    ));
                }
            }
        }
    }
    cases
}

fn interruptibility_state() -> Vec<Case> {
    use interruptibility::{ENCLAVE, MOV_SS, NMI, SMI, STI};
    let blocked = |bits: u32| {
        move |e: &mut Entry| {
            e.or(Field::GuestRflags, rflags::IF);
            e.set(Field::GuestInterruptibility, bits.into());
        }
    };
    let injected = move |bits: u32, kind: u32, vector: u8| {
        move |e: &mut Entry| {
            blocked(bits)(e);
            e.inject(kind, vector);
        }
    };
    vec![
        case(Rule::InterruptibilityReserved, blocked(1 << 5), blocked(STI)),
        case(Rule::InterruptibilityReserved, blocked(1 << 31), blocked(MOV_SS | NMI)),
        case(Rule::InterruptibilityStiAndMovSs, blocked(STI | MOV_SS), blocked(STI | NMI)),
        case(
            Rule::InterruptibilityStiWithoutIf,
            |e| e.set(Field::GuestInterruptibility, STI.into()),
            |e| e.set(Field::GuestInterruptibility, MOV_SS.into()),
        ),
        case(Rule::InterruptibilityExternal, injected(STI, 0, 0x30), injected(0, 0, 0x30)),
        case(Rule::InterruptibilityExternal, injected(MOV_SS, 0, 0x30), injected(NMI, 0, 0x30)),
        case(
            Rule::InterruptibilityNmiMovSs,
            injected(MOV_SS, event::NMI, 2),
            // Blocking by STI does not block NMIs on this processor.
            injected(STI, event::NMI, 2),
        ),
        case(Rule::InterruptibilitySmi, blocked(SMI), blocked(NMI)),
        case(Rule::InterruptibilityVirtualNmi, injected(NMI, event::NMI, 2), move |e| {
            injected(NMI, event::NMI, 2)(e);
            e.clear(Field::PinControls, pin::VIRTUAL_NMIS.into());
        }),
        case(Rule::InterruptibilityEnclave, blocked(ENCLAVE), blocked(0)),
    ]
}

fn pending_debug_exceptions() -> Vec<Case> {
    use pending_debug::{B0_B3, BS, ENABLED_BREAKPOINT, RTM};
    const BTF: u64 = 2;
    let pending = |bits: u64| move |e: &mut Entry| e.set(Field::GuestPendingDebug, bits);
    /// State in which a single step may be pending, and the flags that say whether it is.
    fn stepping(step: u64, flags: u64, debugctl: u64, block: fn(&mut Entry)) -> impl Fn(&mut Entry) {
        move |e| {
            e.set(Field::GuestRflags, rflags::FIXED_1 | rflags::IF | flags);
            e.set(Field::GuestDebugctl, debugctl);
            e.set(Field::GuestPendingDebug, step);
            block(e);
        }
    }
    let mut cases = vec![
        case(Rule::PendingDebugRtm, pending(RTM | ENABLED_BREAKPOINT), pending(ENABLED_BREAKPOINT)),
        // Without blocking BS is as it may be.
        case(Rule::PendingDebugReserved, pending(1 << 4), pending(BS)),
    ];
    for bit in [4, 11, 13, 15, 17, 63] {
        cases.push(case(
            Rule::PendingDebugReserved,
            pending(1 << bit),
            pending(B0_B3 | ENABLED_BREAKPOINT | BS),
        ));
    }
    let blocks: [fn(&mut Entry); 3] = [
        |e| e.set(Field::GuestInterruptibility, interruptibility::STI.into()),
        |e| e.set(Field::GuestInterruptibility, interruptibility::MOV_SS.into()),
        |e| state(e, activity::HLT),
    ];
    for block in blocks {
        let missing = Rule::PendingDebugStepMissing;
        cases.push(case(missing, stepping(0, rflags::TF, 0, block), stepping(BS, rflags::TF, 0, block)));
        cases.push(case(missing, stepping(0, rflags::TF, 0, block), stepping(0, rflags::TF, BTF, block)));
        cases.push(case(missing, stepping(0, rflags::TF, 0, block), stepping(0, rflags::TF, 0, |_| ())));
        let unexpected = Rule::PendingDebugStepUnexpected;
        cases.push(case(unexpected, stepping(BS, 0, 0, block), stepping(0, 0, 0, block)));
        cases.push(case(
            unexpected,
            stepping(BS, rflags::TF, BTF, block),
            stepping(BS, rflags::TF, 0, block),
        ));
    }
    cases
}

fn link_pointer() -> Vec<Case> {
    const AT: u64 = 0x1_0000;
    const SHADOW: u32 = 1 << 31;
    let link = |at: u64, word: Option<u32>, shadowing: bool| {
        move |e: &mut Entry| {
            e.set(Field::VmcsLinkPointer, at);
            e.inputs.link_revision = word;
            if !shadowing {
                e.without(secondary::VMCS_SHADOWING);
            }
        }
    };
    let (ordinary, shadow) = (Some(REVISION), Some(REVISION | SHADOW));
    vec![
        case(Rule::LinkPointerAddress, link(AT + 8, shadow, true), link(AT, shadow, true)),
        case(Rule::LinkPointerAddress, link(TOO_FAR, shadow, true), link(TOO_FAR - 0x1000, shadow, true)),
        case(Rule::LinkPointerRevision, link(AT, Some(SHADOW), true), link(AT, shadow, true)),
        case(Rule::LinkPointerRevision, link(AT, None, true), link(u64::MAX, None, true)),
        case(Rule::LinkPointerShadow, link(AT, ordinary, true), link(AT, ordinary, false)),
        case(Rule::LinkPointerShadow, link(AT, shadow, false), link(AT, shadow, true)),
        case(Rule::LinkPointerShadow, link(AT, ordinary, true), move |e| {
            link(AT, ordinary, true)(e);
            // Not activated: as if 0.
            e.clear(Field::PrimaryControls, primary::ACTIVATE_SECONDARY.into());
        }),
        case(Rule::LinkPointerCurrent, link(0xff000, shadow, true), link(AT, shadow, true)),
    ]
}

fn pdptes() -> Vec<Case> {
    let mut cases = Vec::new();
    for i in 0..4 {
        for bit in [1, 2, 5, 8, 46, 52, 63] {
            let entry = move |present: u64| {
                move |e: &mut Entry| e.set(Field::GuestPdpte0.nth(i), 0x40_0000 | 1 << bit | present)
            };
            cases.push(case(Rule::GuestPdpte, entry(1), entry(0)).on(good::pae));
            let in_memory = move |present: u64| {
                move |e: &mut Entry| {
                    let mut entries = [0; 4];
                    entries[i] = 0x40_0000 | 1 << bit | present;
                    e.inputs.pdptes = Some(entries);
                }
            };
            cases.push(case(Rule::GuestPdpte, in_memory(1), in_memory(0)).on(good::pae_without_ept));
        }
    }
    cases.push(
        case(
            Rule::GuestPdpte,
            |e| e.inputs.pdptes = None,
            |e| {
                e.inputs.pdptes = None;
                // 32-bit paging has none.
                e.clear(Field::GuestCr4, cr4::PAE);
            },
        )
        .on(good::pae_without_ept),
    );
    // In 64-bit mode the fields mean nothing.
    cases.push(
        case(
            Rule::GuestPdpte,
            |e| e.set(Field::GuestPdpte2, 0x1e7),
            |e| {
                *e = good::long_mode();
                e.set(Field::GuestPdpte2, 0x1e7);
            },
        )
        .on(good::pae),
    );
    cases
}
