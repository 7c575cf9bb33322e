//! VMREAD and VMWRITE: every field with its width and its high half, the encodings that are none, read-only fields.

use crate::want::failed;
use rt::report::{fail, pass, skip};
use rt::vmx::capability::{self as cap};
use rt::vmx::control::{self, Control};
use rt::vmx::{Failure, Vm, field as f, insn, vmread, vmwrite};
use rt::{check, cpu, l2, vmx};

const UNSUPPORTED: Failure = Failure::Valid(12);
const READ_ONLY: Failure = Failure::Valid(13);

pub fn all() {
    let _vm = Vm::new(vmx::region(), l2!([]));
    for &(field, name) in f::ALL {
        match presence(field) {
            Presence::Always => exists(field, name),
            Presence::With(control) if control.available() => exists(field, name),
            Presence::With(control) => absent(field, name, control.name),
            Presence::IfOf(_, true) => exists(field, name),
            Presence::IfOf(wanted, false) => absent(field, name, wanted),
        }
    }
    not_fields();
    memory_operands();
    highest_index();
}

/// When the SDM says that a field exists (appendix B).
enum Presence {
    Always,
    With(Control),
    IfOf(&'static str, bool),
}

fn presence(field: u32) -> Presence {
    use Presence::*;
    use control::*;
    match field {
        f::VPID => With(ENABLE_VPID),
        f::POSTED_INTERRUPT_VECTOR | f::POSTED_INTERRUPT_DESCRIPTOR => With(POSTED_INTERRUPTS),
        f::EPTP_INDEX | f::VE_INFORMATION_ADDRESS => With(EPT_VIOLATION_VE),
        f::GUEST_INTERRUPT_STATUS => With(VIRTUAL_INTERRUPT_DELIVERY),
        f::PML_INDEX | f::PML_ADDRESS => With(ENABLE_PML),
        f::MSR_BITMAP => With(USE_MSR_BITMAPS),
        f::VIRTUAL_APIC_ADDRESS | f::TPR_THRESHOLD => With(USE_TPR_SHADOW),
        f::APIC_ACCESS_ADDRESS => With(VIRTUALIZE_APIC_ACCESSES),
        f::VM_FUNCTION_CONTROLS => With(ENABLE_VMFUNC),
        f::EPT_POINTER | f::GUEST_PHYSICAL_ADDRESS => With(ENABLE_EPT),
        f::GUEST_PDPTE0..=f::GUEST_PDPTE3 => With(ENABLE_EPT),
        f::EOI_EXIT_BITMAP0..=f::EOI_EXIT_BITMAP3 => With(VIRTUAL_INTERRUPT_DELIVERY),
        f::EPTP_LIST_ADDRESS => IfOf("EPTP switching", cap::vm_functions() & 1 != 0),
        f::VMREAD_BITMAP | f::VMWRITE_BITMAP => With(VMCS_SHADOWING),
        f::XSS_EXITING_BITMAP => With(ENABLE_XSAVES),
        f::TSC_MULTIPLIER => With(USE_TSC_SCALING),
        f::GUEST_PAT => IfOf("load or save IA32_PAT", ENTRY_LOAD_PAT.available() || SAVE_PAT.available()),
        f::GUEST_EFER => IfOf("load or save IA32_EFER", ENTRY_LOAD_EFER.available() || SAVE_EFER.available()),
        f::GUEST_PERF_GLOBAL_CTRL => With(ENTRY_LOAD_PERF_GLOBAL_CTRL),
        f::HOST_PAT => With(EXIT_LOAD_PAT),
        f::HOST_EFER => With(EXIT_LOAD_EFER),
        f::HOST_PERF_GLOBAL_CTRL => With(EXIT_LOAD_PERF_GLOBAL_CTRL),
        f::SECONDARY_CONTROLS => With(ACTIVATE_SECONDARY),
        f::PLE_GAP | f::PLE_WINDOW => With(PAUSE_LOOP_EXITING),
        f::PREEMPTION_TIMER_VALUE => With(PREEMPTION_TIMER),
        f::CR3_TARGET0..=f::CR3_TARGET3 => {
            let targets = rt::cpu::rdmsr(cap::MISC) >> 16 & 0x1ff;
            IfOf("CR3 targets", targets > u64::from(field - f::CR3_TARGET0) / 2)
        }
        _ => Always,
    }
}

/// A field that exists: its width, its high half.
fn exists(field: u32, name: &str) {
    let before = match insn::try_vmread(field.into()) {
        Ok(value) => value,
        Err(failure) => return fail(name, format_args!("VMREAD: {failure}")),
    };
    if f::is_read_only(field) && !cap::misc(cap::MISC_WRITE_ANY_FIELD) {
        check!(name, insn::try_vmwrite(field.into(), 0) == Err(READ_ONLY), "VMWRITE of a read-only field");
        return;
    }
    match width_problem(field) {
        None => pass(name),
        Some((what, found)) => fail(name, format_args!("{what}: {found:#x}")),
    }
    vmwrite(field, before);
}

fn width_problem(field: u32) -> Option<(&'static str, u64)> {
    let pattern = 0x8765_4321_fedc_ba98u64;
    let bits = f::bits(field);
    let kept = if bits == 64 { pattern } else { pattern & ((1 << bits) - 1) };
    vmwrite(field, pattern);
    let found = vmread(field);
    // Access rights have bits that read as 0 on some processors (11:8 and 31:17).
    let access = (f::GUEST_ES_ACCESS..=f::GUEST_TR_ACCESS).contains(&field);
    let mask = if access { 0x1_f0ff } else { !0 };
    if found & mask != kept & mask {
        return Some(("VMWRITE and VMREAD of all ones and zeroes", found));
    }
    let high = u64::from(field) | 1;
    if !f::has_high_half(field) {
        return (insn::try_vmread(high) != Err(UNSUPPORTED))
            .then_some(("high access to a field without a high half", high));
    }
    if insn::try_vmread(high) != Ok(kept >> 32) {
        return Some(("VMREAD of the high half", vmread(field | 1)));
    }
    vmwrite(field | 1, 0xffff_ffff_1234_5678);
    let found = vmread(field);
    (found != 0x1234_5678_fedc_ba98).then_some(("VMWRITE of the high half", found))
}

fn absent(field: u32, name: &str, feature: &str) {
    if insn::try_vmread(field.into()) == Err(UNSUPPORTED)
        && insn::try_vmwrite(field.into(), 0) == Err(UNSUPPORTED)
    {
        return pass(name);
    }
    skip(name, feature);
}

/// Encodings that name no field.
fn not_fields() {
    let reserved = |encoding: u64, what: &str| {
        check!("VMREAD of no field", insn::try_vmread(encoding) == Err(UNSUPPORTED), "{what}");
        check!("VMWRITE of no field", insn::try_vmwrite(encoding, 0) == Err(UNSUPPORTED), "{what}");
    };
    let rip = u64::from(f::GUEST_RIP);
    reserved(rip | 1 << 12, "bit 12");
    reserved(rip | 1 << 15, "bit 15");
    reserved(rip | 1 << 31, "bit 31");
    reserved(rip | 1 << 32, "bit 32");
    reserved(rip | 1 << 63, "bit 63");
    reserved(0x7fff, "the highest encoding");
    reserved(u64::from(f::HOST_RIP) + 2, "behind HOST_RIP");
    reserved(u64::from(f::GUEST_TR) + 0x100, "a hole of the 16-bit guest fields");
    failed("VMWRITE of no field", insn::try_vmwrite(!0, 0), UNSUPPORTED);
}

/// A memory operand has 64 bits whatever the field's width.
fn memory_operands() {
    let mut memory = [!0u64; 3];
    vmwrite(f::GUEST_ES, 0x1234);
    // SAFETY: stores eight bytes in the array.
    unsafe {
        core::arch::asm!("vmread [{p}], {e}", p = in(reg) &mut memory[1], e = in(reg) u64::from(f::GUEST_ES))
    };
    check!("VMREAD to memory zero-extends to 64 bits", memory == [!0, 0x1234, !0], "{memory:x?}");
    memory[1] = 0xaaaa_bbbb_cccc_dddd;
    // SAFETY: writes a field that no entry uses.
    unsafe {
        core::arch::asm!("vmwrite {e}, [{p}]", p = in(reg) &memory[1], e = in(reg) u64::from(f::GUEST_RSP))
    };
    check!(
        "VMWRITE from memory takes 64 bits",
        vmread(f::GUEST_RSP) == memory[1],
        "{:#x}",
        vmread(f::GUEST_RSP)
    );
}

/// IA32_VMX_VMCS_ENUM names the highest index of all encodings.
fn highest_index() {
    let highest = cpu::rdmsr(cap::VMCS_ENUM) >> 1 & 0x1ff;
    for &(field, name) in f::ALL {
        if insn::try_vmread(field.into()).is_ok() && u64::from(field >> 1 & 0x1ff) > highest {
            return fail("IA32_VMX_VMCS_ENUM covers every field", format_args!("{name}, {highest:#x}"));
        }
    }
    pass("IA32_VMX_VMCS_ENUM covers every field");
}
