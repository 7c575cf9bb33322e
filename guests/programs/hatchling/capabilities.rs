//! Capability MSRs, CR4.VMXE, IA32_FEATURE_CONTROL, and the way into VMX operation and out of it.

use crate::want::{failed, succeeded};
use rt::cpu::{self, MSR_EFER, rdmsr, set_cr0, set_cr4, wrmsr};
use rt::report::{equal, faulted, ran, skip};
use rt::vmx::capability::{self as cap, Allowed};
use rt::vmx::control::{self, Group};
use rt::vmx::{self, CR4_VMXE, Failure, insn};
use rt::{check, mem, probe, real, trap, user};

const INSTRUCTIONS: [(&str, &[u8]); 11] = [
    ("VMCALL", &[0x0f, 0x01, 0xc1]),
    ("VMLAUNCH", &[0x0f, 0x01, 0xc2]),
    ("VMRESUME", &[0x0f, 0x01, 0xc3]),
    ("VMXOFF", &[0x0f, 0x01, 0xc4]),
    ("VMPTRLD", &[0x0f, 0xc7, 0x30]),
    ("VMPTRST", &[0x0f, 0xc7, 0x38]),
    ("VMCLEAR", &[0x66, 0x0f, 0xc7, 0x30]),
    ("VMREAD", &[0x0f, 0x78, 0xc0]),
    ("VMWRITE", &[0x0f, 0x79, 0xc0]),
    ("INVEPT", &[0x66, 0x0f, 0x38, 0x80, 0x00]),
    ("INVVPID", &[0x66, 0x0f, 0x38, 0x81, 0x00]),
];

/// Where CPUID shows no VMX, its instructions do not exist. (VMCALL is left out: hypervisors answer it.)
pub fn without_vmx() {
    let region = 0u64;
    faulted("#UD: VMXON without VMX", &probe!(["vmxon [{p}]"], p = in(reg) &region), trap::UD, 0, 0);
    faulted("#UD: VMPTRLD without VMX", &probe!(["vmptrld [{p}]"], p = in(reg) &region), trap::UD, 0, 0);
    faulted("#UD: VMXOFF without VMX", &probe!(["vmxoff"]), trap::UD, 0, 0);
}

/// Everything that can be seen outside VMX operation.
pub fn before_vmxon() {
    basic();
    control_msrs();
    fixed_bits();
    misc();
    ept_vpid();
    read_only();
    outside_vmx_operation();
    feature_control();
    vmxon_faults();
    vmxon_failures();
}

fn basic() {
    let basic = rdmsr(cap::BASIC);
    check!(
        "IA32_VMX_BASIC: bit 31 and reserved bits are 0",
        basic & (1 << 31 | 7 << 45 | !0 << 59) == 0,
        "{basic:#x}"
    );
    let size = basic >> 32 & 0x1fff;
    check!("IA32_VMX_BASIC: size of the VMCS region", (1..=4096).contains(&size), "{size}");
    let kind = basic >> 50 & 15;
    check!("IA32_VMX_BASIC: memory type", kind == 0 || kind == 6, "{kind}");
    check!(
        "IA32_VMX_BASIC: no 32-bit limit where there is long mode",
        basic & cap::BASIC_32BIT_ADDRESSES == 0,
        "{basic:#x}"
    );
}

fn control_msrs() {
    let groups = [
        ("pin-based controls", cap::PINBASED_CTLS, Group::Pin, 0x0000_0016),
        ("primary controls", cap::PROCBASED_CTLS, Group::Primary, 0x0401_e172),
        ("VM-exit controls", cap::EXIT_CTLS, Group::Exit, 0x0003_6dff),
        ("VM-entry controls", cap::ENTRY_CTLS, Group::Entry, 0x0000_11ff),
    ];
    for (name, msr, group, default1) in groups {
        let (plain, exact) = (Allowed::read(msr), group.allowed());
        check!(name, plain.zero == default1, "plain MSR: {:#x} must be 1, wanted {default1:#x}", plain.zero);
        check!(
            name,
            exact.zero & !plain.zero == 0,
            "TRUE MSR: {:#x} must be 1 beyond the plain MSR's",
            exact.zero
        );
        check!(name, exact.zero & !exact.one == 0, "{:#x} must be 1 and must be 0", exact.zero & !exact.one);
        check!(name, exact.one == plain.one, "may be 1: TRUE {:#x}, plain {:#x}", exact.one, plain.one);
    }
    if control::ACTIVATE_SECONDARY.available() {
        equal("secondary controls may all be 0", Allowed::read(cap::PROCBASED_CTLS2).zero, 0);
    }
    implied_controls();
}

/// Controls that need others.
fn implied_controls() {
    use control::*;
    let needs: &[(Control, Control)] = &[
        (UNRESTRICTED_GUEST, ENABLE_EPT),
        (ENABLE_PML, ENABLE_EPT),
        (EPT_VIOLATION_VE, ENABLE_EPT),
        (MODE_BASED_EXECUTE, ENABLE_EPT),
        (VIRTUAL_NMIS, NMI_EXITING),
        (NMI_WINDOW_EXITING, VIRTUAL_NMIS),
        (SAVE_PREEMPTION_TIMER, PREEMPTION_TIMER),
        (POSTED_INTERRUPTS, VIRTUAL_INTERRUPT_DELIVERY),
        (VIRTUAL_INTERRUPT_DELIVERY, EXTERNAL_INTERRUPT_EXITING),
        (VIRTUAL_INTERRUPT_DELIVERY, USE_TPR_SHADOW),
        (VIRTUALIZE_X2APIC, USE_TPR_SHADOW),
        (APIC_REGISTER_VIRTUALIZATION, USE_TPR_SHADOW),
    ];
    for (control, needed) in needs {
        check!(control.name, !control.available() || needed.available(), "offered without {}", needed.name);
    }
    for control in [ENTRY_TO_SMM, DEACTIVATE_DUAL_MONITOR] {
        check!(control.name, control.clearable(), "must be 1 outside SMM");
    }
}

fn fixed_bits() {
    let (zero, one) = (rdmsr(cap::CR0_FIXED0), rdmsr(cap::CR0_FIXED1));
    equal("CR0: PE, NE and PG are fixed to 1", zero, 0x8000_0021);
    equal("CR0: nothing is fixed to 0", one, 0xffff_ffff);
    let (zero, one) = (rdmsr(cap::CR4_FIXED0), rdmsr(cap::CR4_FIXED1));
    equal("CR4: VMXE is fixed to 1", zero, CR4_VMXE);
    check!("CR4: no bit is fixed to both", zero & !one == 0, "{zero:#x}, {one:#x}");
    check!("CR4: bits in use may be 1", cpu::cr4() & !one == 0, "{:#x}, {one:#x}", cpu::cr4());
    for (bit, feature) in [
        (cpu::CR4_PCIDE, cpu::PCID),
        (cpu::CR4_SMEP, cpu::SMEP),
        (cpu::CR4_SMAP, cpu::SMAP),
        (cpu::CR4_FSGSBASE, cpu::FSGSBASE),
        (cpu::CR4_UMIP, cpu::UMIP),
        (cpu::CR4_OSXSAVE, cpu::XSAVE),
        (cpu::CR4_PKE, cpu::PKU),
        (cpu::CR4_LA57, cpu::LA57),
    ] {
        check!(
            "CR4: CPUID and the fixed bits agree",
            (one & bit != 0) == feature.present(),
            "{}",
            feature.name
        );
    }
}

fn misc() {
    let misc = rdmsr(cap::MISC);
    check!("IA32_VMX_MISC: reserved bits", misc & (0x1f << 9 | 1 << 31) == 0, "{misc:#x}");
    let targets = misc >> 16 & 0x1ff;
    check!("IA32_VMX_MISC: number of CR3 targets", targets <= 256, "{targets}");
    let unrestricted = control::UNRESTRICTED_GUEST.available();
    check!(
        "IA32_VMX_MISC: exits store EFER.LMA where L2 may be unrestricted",
        !unrestricted || cap::misc(cap::MISC_STORES_LMA),
        "{misc:#x}"
    );
    let highest = rdmsr(cap::VMCS_ENUM);
    check!("IA32_VMX_VMCS_ENUM: reserved bits", highest & !0x3fe == 0, "{highest:#x}");
}

fn ept_vpid() {
    let value = cap::ept_vpid();
    let defined = 0x003f_0f01_06f3_41c1;
    check!("IA32_VMX_EPT_VPID_CAP: reserved bits", value & !defined == 0, "{value:#x}");
    if control::ENABLE_EPT.available() {
        check!(
            "EPT: four levels, write-back",
            value & cap::EPT_WALK_4 != 0 && value & cap::EPT_WB != 0,
            "{value:#x}"
        );
        check!(
            "EPT: INVEPT and a type of it",
            value & cap::INVEPT != 0 && value & (3 << 25) != 0,
            "{value:#x}"
        );
    }
    if value & cap::INVVPID != 0 {
        check!("INVVPID has a type", value >> 40 & 15 != 0, "{value:#x}");
    }
    let functions = cap::vm_functions();
    check!("IA32_VMX_VMFUNC: reserved bits", functions & !1 == 0, "{functions:#x}");
}

fn read_only() {
    for msr in cap::BASIC..=cap::VMCS_ENUM {
        let fault = probe!(["wrmsr"], in("ecx") msr, in("eax") 0, in("edx") 0);
        check!("capability MSRs are read-only", fault.is_some_and(|f| f.vector == trap::GP), "{msr:#x}");
    }
}

/// #UD of every instruction without VMX operation, with CR4.VMXE clear and set.
fn outside_vmx_operation() {
    let pointer = 0u64;
    for vmxe in [0, CR4_VMXE] {
        set_cr4(cpu::cr4() & !CR4_VMXE | vmxe);
        for (name, code) in INSTRUCTIONS {
            let fault = run_code(code, &pointer as *const u64 as u64);
            check!(
                name,
                fault.is_some_and(|f| f.vector == trap::UD),
                "no #UD outside VMX operation, VMXE {vmxe:#x}"
            );
            let fault = user::run64(code);
            check!(name, fault.vector == trap::UD, "no #UD in ring 3 outside VMX operation: {fault}");
        }
    }
    set_cr4(cpu::cr4() & !CR4_VMXE);
    let fault = probe!(["vmxon [{p}]"], p = in(reg) &pointer);
    faulted("#UD: VMXON without CR4.VMXE", &fault, trap::UD, 0, 0);
    let fault = user::run64(&[0xf3, 0x0f, 0xc7, 0x30]);
    faulted("#UD: VMXON without CR4.VMXE in ring 3", &Some(fault), trap::UD, 0, 0);
}

/// Runs bytes as ring-0 code with RAX as given. The fault counts from their start.
pub fn run_code(code: &[u8], rax: u64) -> Option<rt::Fault> {
    let start = mem::FREE_END - mem::PAGE;
    mem::copy(start, code);
    mem::write(start + code.len() as u64, 0xc3u8);
    let fault = probe!(["call {p}"], p = in(reg) start, inout("rax") rax => _)?;
    Some(rt::Fault { at: fault.frame.rip.wrapping_sub(start), ..fault })
}

fn feature_control() {
    let before = rdmsr(vmx::MSR_FEATURE_CONTROL);
    let name = "#GP: VMXON with IA32_FEATURE_CONTROL unlocked";
    if before & vmx::LOCKED == 0 {
        set_cr4(cpu::cr4() | CR4_VMXE);
        let region = vmx::region();
        faulted(name, &probe!(["vmxon [{p}]"], p = in(reg) &region), trap::GP, 0, 0);
    } else {
        skip(name, "unlocked IA32_FEATURE_CONTROL (firmware locks it)");
    }
    check!("IA32_FEATURE_CONTROL allows VMX", vmx::open_feature_control(), "{before:#x}");
    let value = rdmsr(vmx::MSR_FEATURE_CONTROL);
    let fault = probe!(["wrmsr"], in("ecx") vmx::MSR_FEATURE_CONTROL, in("eax") value as u32, in("edx") 0);
    faulted("#GP: WRMSR of a locked IA32_FEATURE_CONTROL", &fault, trap::GP, 0, 0);
}

fn vmxon_faults() {
    ran("CR4.VMXE can be set", &probe!(["mov cr4, {v}"], v = in(reg) cpu::cr4() | CR4_VMXE));
    let region = vmx::region();
    user::load(&[0xf3, 0x0f, 0xc7, 0x30]);
    mem::write(user::SCRATCH, region);
    let fault = user::run(&user::Entry { rax: user::SCRATCH, ..user::ENTRY64 });
    faulted("#GP: VMXON in ring 3", &Some(fault), trap::GP, 0, 0);
    let fault = user::run(&user::Entry { rax: user::SCRATCH, ..user::ENTRY32 });
    faulted("#UD: VMXON in compatibility mode", &Some(fault), trap::UD, 0, 0);
    let cr0 = cpu::cr0();
    set_cr0(cr0 & !cpu::CR0_NE);
    let fault = probe!(["vmxon [{p}]"], p = in(reg) &region);
    set_cr0(cr0);
    faulted("#GP: VMXON with a CR0 that VMX operation does not support", &fault, trap::GP, 0, 0);
    let fault = probe!(["vmxon [{p}]"], p = in(reg) 1u64 << 63);
    faulted("#GP: VMXON with a non-canonical operand", &fault, trap::GP, 0, 0);
    let absent = user::SCRATCH + 16 * mem::PAGE;
    rt::paging::set_pte(absent, 0);
    let fault = probe!(["vmxon [{p}]"], p = in(reg) absent);
    rt::report::page_faulted("#PF: VMXON with an absent operand", &fault, 0, absent, 0);
    faulted("#UD: VMXON of a register", &run_code(&[0xf3, 0x0f, 0xc7, 0xf0], 0), trap::UD, 0, 0);
    real::reset_vectors();
    let stop = real::run(&[0xf3, 0x0f, 0xc7, 0x30], &real::START);
    equal("#UD: VMXON in real mode", stop.vector, trap::UD.into());
    let stop = real::run(&[0x0f, 0x01, 0xc1], &real::START);
    equal("#UD: VMCALL in real mode", stop.vector, trap::UD.into());
}

fn vmxon_failures() {
    let region = vmx::region();
    failed("VMXON of an unaligned pointer", insn::vmxon(region + 8), Failure::Invalid);
    let width = cpu::physical_bits();
    if width < 52 {
        failed(
            "VMXON of a pointer beyond the physical-address width",
            insn::vmxon(region | 1 << width),
            Failure::Invalid,
        );
    }
    failed("VMXON of a pointer with bit 63", insn::vmxon(region | 1 << 63), Failure::Invalid);
    mem::write(region, cap::revision() ^ 1);
    failed("VMXON of a wrong revision", insn::vmxon(region), Failure::Invalid);
    mem::write(region, cap::revision() | 1 << 31);
    failed("VMXON of a revision with bit 31", insn::vmxon(region), Failure::Invalid);
    mem::write(region, cap::revision());
    succeeded("VMXON", insn::vmxon(region));
    equal("VMXON leaves no current VMCS", insn::vmptrst(), !0);
    fixed_in_vmx_operation();
    succeeded("VMXOFF", insn::vmxoff());
    let fault = probe!(["vmxoff"]);
    faulted("#UD: VMXOFF after VMXOFF", &fault, trap::UD, 0, 0);
}

fn fixed_in_vmx_operation() {
    let (cr0, cr4) = (cpu::cr0(), cpu::cr4());
    let fault = probe!(["mov cr4, {v}"], v = in(reg) cr4 & !CR4_VMXE);
    faulted("#GP: clearing CR4.VMXE in VMX operation", &fault, trap::GP, 0, 0);
    let fault = probe!(["mov cr0, {v}"], v = in(reg) cr0 & !cpu::CR0_NE);
    faulted("#GP: clearing CR0.NE in VMX operation", &fault, trap::GP, 0, 0);
    // LMSW cannot clear PE anyway, but sets what is allowed.
    let fault = probe!(["lmsw {v:x}"], v = in(reg) cr0 | cpu::CR0_TS);
    ran("LMSW in VMX operation", &fault);
    set_cr0(cr0);
    let efer = rdmsr(MSR_EFER);
    wrmsr(MSR_EFER, efer | cpu::EFER_SCE);
    wrmsr(MSR_EFER, efer);
}

/// After VMXOFF everything is as before VMXON.
pub fn after_vmxoff() {
    succeeded("VMXOFF at the end", insn::vmxoff());
    ran(
        "CR4.VMXE can be cleared after VMXOFF",
        &probe!(["mov cr4, {v}"], v = in(reg) cpu::cr4() & !CR4_VMXE),
    );
    faulted("#UD: VMCALL after VMXOFF", &probe!(["vmcall"]), trap::UD, 0, 0);
}
