//! Registers and events between [`CpuState`] and KVM's structures: pure functions.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI, kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
};
use turtles_cpu::state::{CpuState, Event, EventKind, Seg, Segment, Shadow, TableRegister};
use x86defs::segment as access;

/// General registers, RIP and RFLAGS as KVM takes them.
pub(super) fn regs_of(state: &CpuState) -> kvm_regs {
    let r = |index| state.gpr.get(index);
    kvm_regs {
        rax: r(0),
        rcx: r(1),
        rdx: r(2),
        rbx: r(3),
        rsp: r(4),
        rbp: r(5),
        rsi: r(6),
        rdi: r(7),
        r8: r(8),
        r9: r(9),
        r10: r(10),
        r11: r(11),
        r12: r(12),
        r13: r(13),
        r14: r(14),
        r15: r(15),
        rip: state.rip,
        rflags: state.rflags(),
    }
}

/// The same back.
pub(super) fn regs_into(regs: &kvm_regs, state: &mut CpuState) {
    let values = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    for (index, value) in values.into_iter().enumerate() {
        state.gpr.set(index, value);
    }
    state.rip = regs.rip;
    state.set_rflags(regs.rflags);
}

fn segment_of(segment: &Segment, dpl: Option<u8>) -> kvm_segment {
    let bits = segment.access;
    let flag = |mask: u32| u8::from(bits & mask != 0);
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (bits & access::TYPE) as u8,
        present: flag(access::PRESENT),
        dpl: dpl.unwrap_or(segment.dpl()),
        db: flag(access::DB),
        s: flag(access::S),
        l: flag(access::L),
        g: flag(access::G),
        avl: flag(access::AVL),
        unusable: flag(access::UNUSABLE),
        padding: 0,
    }
}

fn segment_from(segment: &kvm_segment) -> Segment {
    let bits = [
        (segment.s, access::S),
        (segment.present, access::PRESENT),
        (segment.avl, access::AVL),
        (segment.l, access::L),
        (segment.db, access::DB),
        (segment.g, access::G),
        (segment.unusable, access::UNUSABLE),
    ];
    let flags = bits.iter().filter(|(set, _)| *set != 0).fold(0, |all, (_, bit)| all | bit);
    let type_and_dpl = u32::from(segment.type_ & 15) | u32::from(segment.dpl & 3) << access::DPL_SHIFT;
    Segment {
        base: segment.base,
        limit: segment.limit,
        access: flags | type_and_dpl,
        selector: segment.selector,
    }
}

fn table_of(table: &TableRegister) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, padding: [0; 3] }
}

/// System registers as KVM takes them. What the vCPU's owner has (CR8, the APIC's base) is given.
pub(super) fn sregs_of(state: &CpuState, cr8: u8, apic_base: u64) -> kvm_sregs {
    // In virtual-8086 mode every segment's DPL is 3, and SS's is the CPL otherwise: a VM entry checks both.
    let all = state.v86().then_some(3);
    let seg = |index: Seg| segment_of(state.seg(index), all);
    let ss_dpl = if state.protected() { Some(state.cpl) } else { None };
    kvm_sregs {
        cs: seg(Seg::Cs),
        ds: seg(Seg::Ds),
        es: seg(Seg::Es),
        fs: seg(Seg::Fs),
        gs: seg(Seg::Gs),
        ss: segment_of(state.seg(Seg::Ss), ss_dpl),
        tr: segment_of(&state.tr, None),
        ldt: segment_of(&state.ldtr, None),
        gdt: table_of(&state.gdtr),
        idt: table_of(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: u64::from(cr8),
        efer: state.efer,
        apic_base,
        interrupt_bitmap: [0; 4],
    }
}

/// The same back. The PDPTE registers are not among them.
pub(super) fn sregs_into(sregs: &kvm_sregs, state: &mut CpuState) {
    let segments = [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs];
    for (to, from) in state.segments.iter_mut().zip(segments) {
        *to = segment_from(from);
    }
    state.tr = segment_from(&sregs.tr);
    state.ldtr = segment_from(&sregs.ldt);
    state.gdtr = TableRegister { base: sregs.gdt.base, limit: sregs.gdt.limit };
    state.idtr = TableRegister { base: sregs.idt.base, limit: sregs.idt.limit };
    state.cr0 = sregs.cr0;
    state.cr2 = sregs.cr2;
    state.cr3 = sregs.cr3;
    state.cr4 = sregs.cr4;
    state.efer = sregs.efer;
    state.cpl = match (state.protected(), state.v86()) {
        (false, _) => 0,
        (true, true) => 3,
        (true, false) => sregs.ss.dpl & 3,
    };
}

/// True if KVM can take over what is about to be delivered: for a software event it would need the
/// instruction's length, and it has no place for a debug trap that waits.
pub(super) fn kvm_can_hold_events(state: &CpuState) -> bool {
    let kind = state.injected.map(|event| event.kind);
    state.pending_debug == 0
        && match kind {
            None | Some(EventKind::ExternalInterrupt | EventKind::Nmi | EventKind::HardwareException) => true,
            Some(
                EventKind::SoftwareInterrupt
                | EventKind::PrivilegedSoftwareException
                | EventKind::SoftwareException,
            ) => false,
        }
}

/// Events and blocking as KVM takes them, with an NMI to deliver as soon as NMIs are not blocked.
pub(super) fn events_of(state: &CpuState, nmi_pending: bool) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING,
        ..Default::default()
    };
    events.interrupt.shadow = match state.shadow {
        Shadow::None => 0,
        Shadow::Sti => KVM_X86_SHADOW_INT_STI as u8,
        Shadow::MovSs => KVM_X86_SHADOW_INT_MOV_SS as u8,
    };
    events.nmi.pending = u8::from(nmi_pending);
    events.nmi.masked = u8::from(state.nmi_blocked);
    let Some(event) = state.injected else {
        return events;
    };
    match event.kind {
        EventKind::ExternalInterrupt => {
            events.interrupt.injected = 1;
            events.interrupt.nr = event.vector;
        }
        EventKind::Nmi => events.nmi.injected = 1,
        EventKind::HardwareException
        | EventKind::SoftwareInterrupt
        | EventKind::PrivilegedSoftwareException
        | EventKind::SoftwareException => {
            events.exception.injected = 1;
            events.exception.nr = event.vector;
            // Real mode pushes no error codes.
            let code = event.error_code.filter(|_| state.protected());
            events.exception.has_error_code = u8::from(code.is_some());
            events.exception.error_code = code.unwrap_or(0);
        }
    }
    events
}

/// The same back; returns whether an NMI waits that KVM had taken but not delivered.
///
/// A software interrupt under delivery is not taken over: RIP is still at its instruction, which delivers it again.
pub(super) fn events_into(events: &kvm_vcpu_events, state: &mut CpuState) -> bool {
    state.nmi_blocked = events.nmi.masked != 0;
    state.pending_debug = 0;
    state.shadow = match u32::from(events.interrupt.shadow) {
        shadow if shadow & KVM_X86_SHADOW_INT_MOV_SS != 0 => Shadow::MovSs,
        shadow if shadow & KVM_X86_SHADOW_INT_STI != 0 => Shadow::Sti,
        _ => Shadow::None,
    };
    let event = |vector, kind, error_code| Event { vector, kind, error_code, instruction_length: 0 };
    let exception = &events.exception;
    state.injected = if exception.injected != 0 || exception.pending != 0 {
        let code = (exception.has_error_code != 0).then_some(exception.error_code);
        Some(event(exception.nr, EventKind::HardwareException, code))
    } else if events.nmi.injected != 0 {
        Some(event(x86defs::vector::NMI, EventKind::Nmi, None))
    } else if events.interrupt.injected != 0 && events.interrupt.soft == 0 {
        Some(event(events.interrupt.nr, EventKind::ExternalInterrupt, None))
    } else {
        None
    };
    events.nmi.pending != 0
}

/// Debug registers as KVM takes them.
pub(super) fn debugregs_of(state: &CpuState) -> kvm_debugregs {
    kvm_debugregs { db: state.dr, dr6: state.dr6, dr7: state.dr7, ..Default::default() }
}

/// The same back.
pub(super) fn debugregs_into(regs: &kvm_debugregs, state: &mut CpuState) {
    state.dr = regs.db;
    state.dr6 = regs.dr6;
    state.dr7 = regs.dr7;
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86defs::{cr0, rflags};

    #[test]
    fn registers_come_back_as_they_went() {
        let mut state = CpuState::reset();
        for index in 0..16 {
            state.gpr.set(index, 0x1111_0000 + index as u64);
        }
        state.rip = 0xffff_ffff_8100_0000;
        state.set_rflags(rflags::CF | rflags::ZF | rflags::IF | rflags::OF);
        let mut back = CpuState::reset();
        regs_into(&regs_of(&state), &mut back);
        assert_eq!(regs_of(&back), regs_of(&state));
        assert_eq!(regs_of(&state).rflags, 0xa43);
        assert_eq!((regs_of(&state).rbx, regs_of(&state).rsp), (0x1111_0003, 0x1111_0004));
    }

    #[test]
    fn a_64_bit_code_segment_in_kvms_terms() {
        // Type 11, S, DPL 3, P, L, G: access rights A0FBH.
        let user = Segment { base: 0, limit: 0xffff_ffff, access: 0xa0fb, selector: 0x33 };
        let kvm = segment_of(&user, None);
        assert_eq!((kvm.type_, kvm.s, kvm.dpl, kvm.present, kvm.l, kvm.db, kvm.g), (11, 1, 3, 1, 1, 0, 1));
        assert_eq!(segment_from(&kvm), user);
    }

    #[test]
    fn cpl_comes_from_ss_in_protected_mode_and_is_3_in_virtual_8086_mode() {
        let mut state = CpuState::reset();
        state.cr0 |= cr0::PE;
        state.cpl = 3;
        let mut sregs = sregs_of(&state, 0, 0);
        assert_eq!(sregs.ss.dpl, 3);
        let mut back = CpuState::reset();
        sregs_into(&sregs, &mut back);
        assert_eq!(back.cpl, 3);
        sregs.cr0 = 0;
        sregs_into(&sregs, &mut back);
        assert_eq!(back.cpl, 0);
        state.set_rflags(rflags::VM);
        state.cpl = 3;
        assert!([sregs_of(&state, 0, 0).ds.dpl, sregs_of(&state, 0, 0).cs.dpl] == [3, 3]);
    }

    #[test]
    fn events_come_back_as_they_went() {
        let mut state = CpuState::reset();
        state.cr0 |= cr0::PE;
        let fault = Event {
            vector: 14,
            kind: EventKind::HardwareException,
            error_code: Some(6),
            instruction_length: 0,
        };
        let interrupt = Event {
            vector: 0x30,
            kind: EventKind::ExternalInterrupt,
            error_code: None,
            instruction_length: 0,
        };
        for (event, shadow) in [(fault, Shadow::MovSs), (interrupt, Shadow::None)] {
            state.injected = Some(event);
            state.shadow = shadow;
            state.nmi_blocked = shadow != Shadow::None;
            let mut back = CpuState::reset();
            assert!(!events_into(&events_of(&state, false), &mut back));
            assert!(events_into(&events_of(&state, true), &mut back), "the NMI still waits");
            assert_eq!(
                (back.injected, back.shadow, back.nmi_blocked),
                (Some(event), shadow, state.nmi_blocked)
            );
        }
    }

    #[test]
    fn what_kvm_cannot_hold_is_told() {
        let mut state = CpuState::reset();
        assert!(kvm_can_hold_events(&state));
        state.injected = Some(Event {
            vector: 3,
            kind: EventKind::SoftwareException,
            error_code: None,
            instruction_length: 1,
        });
        assert!(!kvm_can_hold_events(&state));
        state.injected = None;
        state.pending_debug = x86defs::dr::DR6_BS;
        assert!(!kvm_can_hold_events(&state));
    }
}
