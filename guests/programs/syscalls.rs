//! Ways between ring 0 and ring 3: SYSCALL, SYSENTER, IRET, far calls, and what ring 3 may do there.
#![no_std]
#![no_main]

use core::arch::global_asm;
use rt::cpu::*;
use rt::mem;
use rt::report::{equal, faulted, ran, skip};
use rt::tables::{
    self, CODE64, DATA, DPL3, FLAT_CODE32, FLAT_CODE64, FLAT_DATA, SPARE, USER_CODE32, USER_CODE64, USER_DATA,
};
use rt::{Fault, check, probe, trap, user};

/// Selectors in the order SYSENTER and SYSEXIT want: ring-0 code, data, ring-3 32-bit code, data, 64-bit code, data.
const FAST: u16 = SPARE + 0x20;

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    user::map_window();
    iret();
    syscall64();
    syscall_compat();
    sysret();
    sysenter();
    sysexit();
    swapgs();
    fs_gs_base();
    segment_bases();
    far_calls();
    call_gate();
    umip();
    time_stamp();
    performance_counters();
    ports();
    iopl();
    flags_by_popf();
}

// Where SYSCALL and SYSENTER land: they keep the stack of ring 3, so trap at once with all registers in view.
global_asm!(
    ".globl landing64, landing32, landing_enter, landing_gate",
    "landing64: int 0x81",
    "landing32: int 0x82",
    "landing_enter: int 0x83",
    "landing_gate: int 0x84",
);

fn landing(which: u64) -> u64 {
    unsafe extern "C" {
        static landing64: u8;
    }
    &raw const landing64 as u64 + which * 2
}

fn iret() {
    let fault = user::run64(&[0x0f, 0x0b]);
    faulted("IRETQ to 64-bit ring 3", &Some(fault), trap::UD, 0, 0);
    equal("IRETQ: CS", fault.frame.cs, USER_CODE64.into());
    equal("IRETQ: SS", fault.frame.ss, USER_DATA.into());
    equal("IRETQ: RSP", fault.frame.rsp, user::ENTRY64.rsp);
    // 32-bit code: inc eax is one byte there, a REX prefix in 64-bit code.
    user::load(&[0x40, 0x0f, 0x0b]);
    let fault = user::run(&user::Entry { rax: 41, ..user::ENTRY32 });
    check!(
        "IRETQ to compatibility mode",
        fault.vector == trap::UD && fault.at == 1 && fault.frame.rax == 42,
        "{fault}"
    );
    equal("compatibility mode: CS", fault.frame.cs, USER_CODE32.into());
    user::load(&[0x0f, 0x0b]);
    let flags = 0xcd5;
    let fault = user::run(&user::Entry { rflags: flags | 2, ..user::ENTRY64 });
    equal("IRETQ loads the flags", fault.frame.rflags & 0xcd5, flags);
    let to = |cs: u16, ss: u16| {
        probe!(
            ["mov rax, rsp", "push {ss}", "push rax", "push 2", "push {cs}", "push {rip}", "iretq"],
            ss = in(reg) u64::from(ss), cs = in(reg) u64::from(cs), rip = in(reg) user::CODE, out("rax") _
        )
    };
    let refused = |name: &str, fault: Option<Fault>, error: u16| {
        let holds = fault.is_some_and(|f| {
            f.vector == trap::GP && f.error == u32::from(error) && f.frame.cs == u64::from(CODE64)
        });
        check!(name, holds, "{}", fault.map_or(0, |f| f.error));
    };
    refused("IRETQ to a data segment", to(DATA, DATA), DATA);
    refused("IRETQ to a null CS", to(0, DATA), 0);
    refused("IRETQ to ring 3 with a null SS", to(USER_CODE64, 3), 0);
    refused("IRETQ to ring 3 with a ring-0 SS", to(USER_CODE64, DATA), DATA);
    let fault = probe!(
        ["mov rax, rsp", "push 0", "push rax", "push 2", "push 8", "lea rcx, [rip + 2f]", "push rcx", "iretq", "2:"],
        out("rax") _, out("rcx") _
    );
    ran("IRETQ within ring 0 takes a null SS", &fault);
    reload_ss();
    iret_loads_rsp();
}

fn reload_ss() {
    probe!(["mov ss, {s:e}"], s = in(reg) u32::from(DATA));
}

/// In 64-bit mode IRET loads RSP and SS even when the ring stays.
fn iret_loads_rsp() {
    let found: u64;
    // SAFETY: RSP comes back from a register.
    unsafe {
        core::arch::asm!(
            "mov rax, rsp", "push 0x10", "lea rcx, [rax - 4096]", "push rcx", "push 2", "push 8",
            "lea rcx, [rip + 2f]", "push rcx", "iretq",
            "2: mov rcx, rsp", "mov rsp, rax", "sub rax, rcx",
            out("rax") found, out("rcx") _
        );
    }
    equal("IRETQ within ring 0 loads RSP", found, 4096);
}

fn enable_syscall() {
    wrmsr(MSR_STAR, u64::from(USER_CODE32) << 48 | u64::from(CODE64) << 32);
    wrmsr(MSR_LSTAR, landing(0));
    wrmsr(MSR_CSTAR, landing(1));
    wrmsr(MSR_FMASK, 0x4_0701);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
}

fn syscall64() {
    if !SYSCALL.or_skip("SYSCALL") {
        return;
    }
    enable_syscall();
    // nop; syscall
    user::load(&[0x90, 0x0f, 0x05]);
    let flags = 2 | 1 | 0x80 | 0x400; // CF (masked), SF, DF (masked)
    let fault = user::run(&user::Entry { rflags: flags, ..user::ENTRY64 });
    equal("SYSCALL lands at LSTAR", fault.vector, 0x81);
    equal("SYSCALL: CS", fault.frame.cs, CODE64.into());
    equal("SYSCALL: SS", fault.frame.ss, DATA.into());
    equal("SYSCALL: RCX is the next RIP", fault.frame.rcx, user::CODE + 3);
    equal("SYSCALL: R11 is RFLAGS", fault.frame.r11, flags);
    equal("SYSCALL keeps RSP", fault.frame.rsp, user::ENTRY64.rsp);
    equal("SYSCALL masks RFLAGS by FMASK", fault.frame.rflags & 0xfff, flags & !0x701);
}

fn syscall_compat() {
    let name = "SYSCALL in compatibility mode";
    user::load(&[0x0f, 0x05]);
    let fault = user::run(&user::ENTRY32);
    if is_intel() {
        faulted(name, &Some(fault), trap::UD, 0, 0);
    } else {
        // AMD: lands at CSTAR.
        equal(name, fault.vector, 0x82);
    }
}

/// Executes a SYSRET and reports what ring 3 saw.
fn sysret_to(long: bool, rcx: u64, r11: u64) -> Fault {
    user::load(&[0x0f, 0x0b]);
    let fault = if long {
        probe!([".byte 0x48", "sysret"], in("rcx") rcx, in("r11") r11)
    } else {
        probe!(["sysret"], in("rcx") rcx, in("r11") r11)
    };
    fault.unwrap_or_else(|| rt::report::abort(format_args!("SYSRET fell through")))
}

fn sysret() {
    if !SYSCALL.or_skip("SYSRET") {
        return;
    }
    let fault = sysret_to(true, user::CODE, 0x23_0ed5);
    equal("SYSRETQ: vector", fault.vector, trap::UD);
    equal("SYSRETQ: RIP", fault.frame.rip, user::CODE);
    equal("SYSRETQ: CS", fault.frame.cs, USER_CODE64.into());
    equal("SYSRETQ: SS", fault.frame.ss, USER_DATA.into());
    // RF and VM are cleared, bit 1 is set; the fault itself sets RF in the saved image.
    equal("SYSRETQ: RFLAGS", fault.frame.rflags & !0x1_0000, 0x20_0ed7);
    let fault = sysret_to(false, user::CODE, 2);
    equal("SYSRETL: CS", fault.frame.cs, USER_CODE32.into());
    equal("SYSRETL: SS", fault.frame.ss, USER_DATA.into());
    equal("SYSRETL: RIP", fault.frame.rip, user::CODE);
    let fault = sysret_to(true, 1 << 63, 2);
    // Intel faults in ring 0, before leaving.
    check!(
        "SYSRETQ to a non-canonical address",
        fault.vector == trap::GP && fault.frame.cs == u64::from(CODE64),
        "{fault}"
    );
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) & !EFER_SCE);
    faulted("UD: SYSRET without EFER.SCE", &probe!([".byte 0x48", "sysret"]), trap::UD, 0, 0);
}

fn load_fast_descriptors() {
    let table =
        [FLAT_CODE64, FLAT_DATA, FLAT_CODE32 | DPL3, FLAT_DATA | DPL3, FLAT_CODE64 | DPL3, FLAT_DATA | DPL3];
    for (i, descriptor) in table.into_iter().enumerate() {
        tables::set_descriptor(FAST + 8 * i as u16, descriptor);
    }
}

fn sysenter() {
    if !SEP.or_skip("SYSENTER") {
        return;
    }
    load_fast_descriptors();
    let stack = mem::frame() + 0x800;
    wrmsr(MSR_SYSENTER_ESP, stack);
    wrmsr(MSR_SYSENTER_EIP, landing(2));
    wrmsr(MSR_SYSENTER_CS, 0);
    user::load(&[0x0f, 0x34]);
    if !is_intel() {
        // AMD has no SYSENTER in long mode.
        return faulted("SYSENTER from 64-bit mode", &Some(user::run(&user::ENTRY64)), trap::UD, 0, 0);
    }
    faulted("SYSENTER with a null SYSENTER_CS", &Some(user::run(&user::ENTRY64)), trap::GP, 0, 0);
    wrmsr(MSR_SYSENTER_CS, FAST.into());
    let modes =
        [("SYSENTER from 64-bit mode", &user::ENTRY64), ("SYSENTER from compatibility mode", &user::ENTRY32)];
    for (name, entry) in modes {
        let fault = user::run(&user::Entry { rflags: 2 | 1, ..*entry });
        let f = fault.frame;
        let holds = fault.vector == 0x83 && (f.cs, f.ss, f.rsp) == (FAST.into(), u64::from(FAST) + 8, stack);
        check!(name, holds && f.rflags & 0x2_0201 == 1, "{fault} SS {:#x} RSP {:#x}", f.ss, f.rsp);
    }
}

fn sysexit() {
    if !SEP.or_skip("SYSEXIT") {
        return;
    }
    if !is_intel() {
        return faulted("SYSEXIT in long mode", &probe!(["sysexit"]), trap::UD, 0, 0);
    }
    user::load(&[0x0f, 0x0b]);
    let (code, stack) = (user::CODE, user::ENTRY64.rsp);
    let fault = probe!([".byte 0x48", "sysexit"], in("rdx") code, in("rcx") stack);
    if let Some(f) = fault {
        let found = (f.frame.cs, f.frame.ss, f.frame.rip, f.frame.rsp);
        let wanted = (u64::from(FAST) + 0x20 + 3, u64::from(FAST) + 0x28 + 3, code, stack);
        check!("SYSEXIT to 64-bit ring 3", f.vector == trap::UD && found == wanted, "{f} {found:x?}");
    }
    let fault = probe!(["sysexit"], in("rdx") code | 0xff << 32, in("rcx") stack | 0xff << 32);
    if let Some(f) = fault {
        let found = (f.frame.cs, f.frame.ss, f.frame.rip, f.frame.rsp);
        let wanted = (u64::from(FAST) + 0x10 + 3, u64::from(FAST) + 0x18 + 3, code, stack);
        check!("SYSEXIT to compatibility mode", f.vector == trap::UD && found == wanted, "{f} {found:x?}");
    }
    wrmsr(MSR_SYSENTER_CS, 0);
    faulted(
        "SYSEXIT with a null SYSENTER_CS",
        &probe!(["sysexit"], in("rdx") code, in("rcx") stack),
        trap::GP,
        0,
        0,
    );
    // sysexit in ring 3
    faulted("SYSEXIT in ring 3", &Some(user::run64(&[0x0f, 0x35])), trap::GP, 0, 0);
}

fn swapgs() {
    wrmsr(MSR_GS_BASE, 0x1111_0000);
    wrmsr(MSR_KERNEL_GS_BASE, 0x2222_0000);
    ran("SWAPGS", &probe!(["swapgs"]));
    equal("SWAPGS: GS base", rdmsr(MSR_GS_BASE), 0x2222_0000);
    equal("SWAPGS: kernel GS base", rdmsr(MSR_KERNEL_GS_BASE), 0x1111_0000);
    probe!(["swapgs"]);
    equal("SWAPGS back", rdmsr(MSR_GS_BASE), 0x1111_0000);
    wrmsr(MSR_GS_BASE, 0);
}

fn fs_gs_base() {
    let cr4 = cr4();
    set_cr4(cr4 & !CR4_FSGSBASE);
    faulted("UD: RDFSBASE without CR4.FSGSBASE", &probe!(["rdfsbase {x}"], x = out(reg) _), trap::UD, 0, 0);
    if !FSGSBASE.or_skip("FSGSBASE") {
        return;
    }
    set_cr4(cr4 | CR4_FSGSBASE);
    mem::write(mem::FREE + 0x18, 0xfeed_beefu32);
    let (base, value): (u64, u32);
    // SAFETY: CR4.FSGSBASE is set, and FS is used by nothing else.
    unsafe {
        core::arch::asm!("wrfsbase {n}", "rdfsbase {b}", "mov {v:e}, fs:[0x18]", n = in(reg) mem::FREE, b = lateout(reg) base, v = lateout(reg) value)
    };
    equal("RDFSBASE reads what WRFSBASE wrote", base, mem::FREE);
    equal("WRFSBASE moves the segment", value, 0xfeed_beef);
    equal("WRFSBASE shows in the MSR", rdmsr(MSR_FS_BASE), mem::FREE);
    faulted(
        "GP: WRGSBASE of a non-canonical address",
        &probe!(["wrgsbase {x}"], x = in(reg) 1u64 << 63),
        trap::GP,
        0,
        0,
    );
    // wrfsbase rax; rdfsbase rbx; ud2, in ring 3
    user::load(&[0xf3, 0x48, 0x0f, 0xae, 0xd0, 0xf3, 0x48, 0x0f, 0xae, 0xc3, 0x0f, 0x0b]);
    let fault = user::run(&user::Entry { rax: 0x1234_5678_9000, ..user::ENTRY64 });
    equal("WRFSBASE in ring 3", fault.frame.rbx, 0x1234_5678_9000);
    wrmsr(MSR_FS_BASE, 0);
    set_cr4(cr4);
}

fn segment_bases() {
    // Loading FS from the GDT loads a 32-bit base; the MSR sees it.
    tables::set_descriptor(SPARE, tables::build_descriptor(0x1234_5000, 0xfffff, 0x93, 0xc));
    probe!(["mov fs, {s:e}"], s = in(reg) u32::from(SPARE));
    equal("MOV FS loads the base", rdmsr(MSR_FS_BASE), 0x1234_5000);
    // In 64-bit mode DS has no base and no limit.
    tables::set_descriptor(SPARE, tables::build_descriptor(0x1234_5000, 0, 0x93, 0x4));
    mem::write(mem::FREE, 0x77u32);
    let mut value = 0u32;
    let fault = probe!(["mov ds, {s:e}", "mov {v:e}, [{p}]"], s = in(reg) u32::from(SPARE), v = inout(reg) value, p = in(reg) mem::FREE);
    ran("DS with a base in 64-bit mode", &fault);
    equal("its base and limit are ignored", value, 0x77);
    probe!(["mov ds, {s:e}", "mov fs, {z:e}"], s = in(reg) u32::from(DATA), z = in(reg) 0);
}

fn far_calls() {
    tables::set_descriptor(SPARE, FLAT_CODE64);
    let at = mem::FREE;
    let (found_cs, found_depth): (u64, u64);
    // SAFETY: the far call returns by a far return; the second code segment is the same as the first.
    unsafe {
        core::arch::asm!(
            "lea rax, [rip + 2f]", "mov [{p}], rax", "mov word ptr [{p} + 8], {s:x}",
            "mov rdx, rsp",
            ".byte 0x48", "call fword ptr [{p}]",
            "jmp 3f",
            "2: mov ecx, cs", "sub rdx, rsp", "retfq",
            "3:",
            p = in(reg) at, s = in(reg) u32::from(SPARE), out("rax") _, out("rcx") found_cs, out("rdx") found_depth
        );
    }
    equal("far CALL loads CS", found_cs, SPARE.into());
    equal("far CALL with REX.W pushes two quadwords", found_depth, 16);
    // retf to ring 3
    user::load(&[0x0f, 0x0b]);
    let fault = probe!(
        ["push {ss}", "push {sp}", "push {cs}", "push {ip}", "retfq"],
        ss = in(reg) u64::from(USER_DATA), sp = in(reg) user::ENTRY64.rsp, cs = in(reg) u64::from(USER_CODE64), ip = in(reg) user::CODE
    );
    let arrived = fault.is_some_and(|f| {
        f.vector == trap::UD && f.frame.cs == u64::from(USER_CODE64) && f.frame.ss == u64::from(USER_DATA)
    });
    check!("far RET to ring 3", arrived, "another outcome");
}

fn call_gate() {
    // A 64-bit call gate at SPARE to landing_gate.
    let to = landing(3);
    let low = to & 0xffff | u64::from(CODE64) << 16 | 0xec << 40 | (to >> 16 & 0xffff) << 48;
    tables::set_descriptor(SPARE, low);
    tables::set_descriptor(SPARE + 8, to >> 32);
    // call fword [SCRATCH] as rdi
    mem::write(user::SCRATCH, 0u32);
    mem::write(user::SCRATCH + 4, SPARE | 3);
    user::load(&[0xff, 0x1f]);
    let entry = user::Entry { rdi: user::SCRATCH, ..user::ENTRY64 };
    let fault = user::run(&entry);
    check!(
        "a call gate leads to ring 0",
        fault.vector == 0x84 && fault.frame.cs == u64::from(CODE64),
        "{fault}"
    );
    equal("a call gate takes RSP0", fault.frame.rsp, tables::rsp0() - 32);
    let pushed: [u64; 4] = mem::read(fault.frame.rsp);
    let wanted = [user::CODE + 2, USER_CODE64.into(), entry.rsp, USER_DATA.into()];
    check!("a call gate pushes RIP, CS, RSP, SS", pushed == wanted, "{pushed:x?}");
    check!("a call gate loads a null SS", fault.frame.ss & !3 == 0, "{:#x}", fault.frame.ss);
    reload_ss();
    tables::set_descriptor(SPARE, low & !(3 << 45));
    faulted("a DPL 0 call gate from ring 3", &Some(user::run(&entry)), trap::GP, SPARE.into(), 0);
    tables::set_descriptor(SPARE, low & !(1 << 47));
    faulted("an absent call gate", &Some(user::run(&entry)), trap::NP, SPARE.into(), 0);
    tables::set_descriptor(SPARE, low);
    tables::set_descriptor(SPARE + 8, to >> 32 | 1 << 40);
    faulted("a call gate with a wrong upper half", &Some(user::run(&entry)), trap::GP, SPARE.into(), 0);
}

fn umip() {
    // Into memory at rdi: sgdt, sidt, sldt, str, smsw
    const CODES: &[(&str, &[u8])] = &[
        ("SGDT", &[0x0f, 0x01, 0x07]),
        ("SIDT", &[0x0f, 0x01, 0x0f]),
        ("SLDT", &[0x0f, 0x00, 0x07]),
        ("STR", &[0x0f, 0x00, 0x0f]),
        ("SMSW", &[0x0f, 0x01, 0x27]),
    ];
    let run = |code: &[u8]| {
        let mut text = [0u8; 5];
        text[..3].copy_from_slice(code);
        text[3..].copy_from_slice(&[0x0f, 0x0b]);
        user::load(&text);
        user::run(&user::Entry { rdi: user::SCRATCH, ..user::ENTRY64 })
    };
    for (name, code) in CODES {
        let fault = run(code);
        check!(name, fault.vector == trap::UD && fault.at == 3, "without UMIP: {fault}");
    }
    equal("SMSW stores CR0", mem::read::<u16>(user::SCRATCH), cr0() as u16);
    if !UMIP.or_skip("UMIP") {
        return;
    }
    set_cr4(cr4() | CR4_UMIP);
    for (name, code) in CODES {
        let fault = run(code);
        check!(name, fault.vector == trap::GP && fault.at == 0, "with UMIP: {fault}");
    }
    ran("UMIP leaves ring 0 alone", &probe!(["sgdt [{p}]"], p = in(reg) mem::FREE));
    set_cr4(cr4() & !CR4_UMIP);
}

fn time_stamp() {
    // rdtsc; ud2
    let rdtsc = [0x0f, 0x31, 0x0f, 0x0b];
    faulted("RDTSC in ring 3", &Some(user::run64(&rdtsc)), trap::UD, 0, 2);
    set_cr4(cr4() | CR4_TSD);
    faulted("RDTSC in ring 3 with CR4.TSD", &Some(user::run64(&rdtsc)), trap::GP, 0, 0);
    ran("RDTSC in ring 0 with CR4.TSD", &probe!(["rdtsc"], out("rax") _, out("rdx") _));
    if RDTSCP.or_skip("RDTSCP") {
        let rdtscp = [0x0f, 0x01, 0xf9, 0x0f, 0x0b];
        faulted("RDTSCP in ring 3 with CR4.TSD", &Some(user::run64(&rdtscp)), trap::GP, 0, 0);
        set_cr4(cr4() & !CR4_TSD);
        wrmsr(MSR_TSC_AUX, 0x1234);
        let fault = user::run64(&rdtscp);
        faulted("RDTSCP in ring 3", &Some(fault), trap::UD, 0, 3);
        equal("RDTSCP: ECX is TSC_AUX", fault.frame.rcx, 0x1234);
    }
    set_cr4(cr4() & !CR4_TSD);
    let before = tsc();
    wrmsr(MSR_TSC, before + (1 << 40));
    let after = tsc();
    check!("WRMSR moves the TSC", after >= before + (1 << 40), "{before:#x} then {after:#x}");
}

fn performance_counters() {
    let rdpmc = [0x31, 0xc9, 0x0f, 0x33];
    faulted("RDPMC in ring 3 without CR4.PCE", &Some(user::run64(&rdpmc)), trap::GP, 0, 2);
    if cpuid(10, 0).eax & 0xff == 0 {
        return skip("RDPMC in ring 3 with CR4.PCE", PERFMON.name);
    }
    set_cr4(cr4() | CR4_PCE);
    let fault = user::run64(&[0x31, 0xc9, 0x0f, 0x33, 0x0f, 0x0b]);
    set_cr4(cr4() & !CR4_PCE);
    faulted("RDPMC in ring 3 with CR4.PCE", &Some(fault), trap::UD, 0, 4);
}

fn ports() {
    // in al, 0x80; ud2
    let byte = [0xe4, 0x80, 0x0f, 0x0b];
    faulted("IN without permission", &Some(user::run64(&byte)), trap::GP, 0, 0);
    tables::allow_port(0x80, true);
    faulted("IN with permission", &Some(user::run64(&byte)), trap::UD, 0, 2);
    // in eax, 0x80 needs four ports
    let dword = [0xe5, 0x80, 0x0f, 0x0b];
    faulted("a dword needs four permissions", &Some(user::run64(&dword)), trap::GP, 0, 0);
    for port in 0x81..0x84 {
        tables::allow_port(port, true);
    }
    faulted("a dword with four permissions", &Some(user::run64(&dword)), trap::UD, 0, 2);
    for port in 0x80..0x84 {
        tables::allow_port(port, false);
    }
    // The last bits are compared as two bytes, so the byte beyond the bitmap counts.
    tables::allow_port(0xffff, true);
    user::load(&[0xec, 0x0f, 0x0b]);
    let fault = user::run(&user::Entry { rdx: 0xffff, ..user::ENTRY64 });
    faulted("port 0xffff", &Some(fault), trap::UD, 0, 1);
    tables::allow_port(0xffff, false);
}

const IOPL3: u64 = 3 << 12;

fn iopl() {
    user::load(&[0xfa, 0xe4, 0x80, 0xfb, 0xfa, 0x0f, 0x0b]);
    let fault = user::run(&user::Entry { rflags: 2 | IOPL3, ..user::ENTRY64 });
    faulted("IOPL 3 allows CLI, STI, IN", &Some(fault), trap::UD, 0, 5);
    user::load(&[0xf4]);
    let fault = user::run(&user::Entry { rflags: 2 | IOPL3, ..user::ENTRY64 });
    faulted("IOPL 3 does not allow HLT", &Some(fault), trap::GP, 0, 0);
}

fn flags_by_popf() {
    // push 0x3202; popfq; ud2
    let code = [0x68, 0x02, 0x32, 0, 0, 0x9d, 0x0f, 0x0b];
    let fault = user::run64(&code);
    equal("POPF in ring 3 changes neither IF nor IOPL", fault.frame.rflags & 0x3200, 0);
    user::load(&[0x68, 0x02, 0, 0, 0, 0x9d, 0x0f, 0x0b]);
    let fault = user::run(&user::Entry { rflags: 2 | IOPL3, ..user::ENTRY64 });
    equal("POPF in ring 3 keeps IOPL", fault.frame.rflags & 0x3000, 0x3000);
    let flags =
        probe!(["push 0x3002", "popfq", "pushfq", "pop rax", "push 2", "popfq", "int 0x91"], out("rax") _);
    equal("POPF in ring 0 changes IOPL", flags.map_or(0, |f| f.frame.rax & 0x3000), 0x3000);
    // ID can be changed by any ring: push 0x200002; popfq; ud2
    let fault = user::run64(&[0x68, 0x02, 0, 0x20, 0, 0x9d, 0x0f, 0x0b]);
    equal("POPF in ring 3 sets ID", fault.frame.rflags & 0x20_0000, 0x20_0000);
}
