//! Every exception: vector, error code, saved RIP and RFLAGS, CR2, DR6, and which comes first.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU64, Ordering};
use rt::cpu::{self, *};
use rt::mem::{self, PAGE};
use rt::paging::{self, A, D, ERR_I, ERR_P, ERR_RSVD, ERR_U, ERR_W, NX as NO_EXECUTE, P, U, W};
use rt::report::{equal, faulted, page_faulted, ran, skip};
use rt::tables::{self, FLAT_CODE64, FLAT_DATA, PRESENT, SPARE};
use rt::trap::{self, Frame};
use rt::{apic, check, probe, user};

const RF: u64 = 1 << 16;
const TF: u64 = 1 << 8;
const NON_CANONICAL: u64 = 0x8000_0000_0000_0000;

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    user::map_window();
    divide();
    software_interrupts();
    saved_flags();
    single_step();
    breakpoints();
    debug_registers();
    invalid_opcodes();
    instruction_length();
    no_math();
    math_faults();
    simd_faults();
    segment_loads();
    stack_faults();
    general_protection();
    control_registers();
    msr_faults();
    user_privileges();
    page_faults();
    alignment();
    gates_and_double_faults();
    task_state_fault();
    interrupt_stacks();
    interrupt_shadow();
}

fn divide() {
    faulted(
        "DE: DIV by zero",
        &probe!(["xor ecx, ecx", "div ecx"], out("eax") _, out("ecx") _, out("edx") _),
        trap::DE,
        0,
        2,
    );
    let fault = probe!(["idiv ecx"], inout("eax") i32::MIN => _, inout("edx") -1 => _, inout("ecx") -1 => _);
    faulted("DE: IDIV overflow", &fault, trap::DE, 0, 0);
    let fault = probe!(["div cl"], inout("eax") 0x1000 => _, inout("ecx") 2 => _);
    faulted("DE: 8-bit quotient overflow", &fault, trap::DE, 0, 0);
    if let Some(fault) = fault {
        equal("DE: AX unchanged by the fault", fault.frame.rax as u32, 0x1000);
    }
    // aam 0
    faulted("DE: AAM 0 in 32-bit code", &Some(user::run32(&[0x90, 0xd4, 0x00])), trap::DE, 0, 1);
}

fn software_interrupts() {
    faulted("BP: INT3 saves the next RIP", &probe!(["int3"]), trap::BP, 0, 1);
    faulted("BP: INT 3, two bytes", &probe!([".byte 0xcd, 3"]), trap::BP, 0, 2);
    faulted("INT n", &probe!(["int 0x91"]), 0x91, 0, 2);
    trap::set_gate(trap::GP, trap::stub(0x91), 0x8e, trap::default_ist(0x91));
    faulted("INT 13 pushes no error code", &probe!(["int 13"]), 0x91, 0, 2);
    trap::reset_gate(trap::GP);
    faulted("DB: INT1", &probe!([".byte 0xf1"]), trap::DB, 0, 1);

    let refused = |vector: u32| vector * 8 + 2;
    faulted("INT3 from ring 3 through a DPL 0 gate", &Some(user::run64(&[0xcc])), trap::GP, refused(3), 0);
    faulted(
        "INT n from ring 3 through a DPL 0 gate",
        &Some(user::run64(&[0xcd, 0x91])),
        trap::GP,
        refused(0x91),
        0,
    );
    faulted("INT1 from ring 3 ignores the gate's DPL", &Some(user::run64(&[0xf1])), trap::DB, 0, 1);
    for vector in [trap::BP, trap::OF, trap::BR] {
        trap::set_gate(vector, trap::stub(vector), 0xee, trap::default_ist(vector));
    }
    faulted("BP: INT3 from ring 3 through a DPL 3 gate", &Some(user::run64(&[0xcc])), trap::BP, 0, 1);
    // mov al, 0x7f; inc al; into
    faulted("OF: INTO with OF set", &Some(user::run32(&[0xb0, 0x7f, 0xfe, 0xc0, 0xce])), trap::OF, 0, 5);
    // xor eax, eax; into; ud2
    faulted(
        "INTO with OF clear goes on",
        &Some(user::run32(&[0x31, 0xc0, 0xce, 0x0f, 0x0b])),
        trap::UD,
        0,
        3,
    );
    // mov eax, 7; bound eax, [SCRATCH]
    mem::write(user::SCRATCH, [0i32, 6]);
    let bound = [0xb8, 7, 0, 0, 0, 0x62, 0x05, 0, 0, 1, 0x80];
    faulted("BR: BOUND outside", &Some(user::run32(&bound)), trap::BR, 0, 5);
    let inside = [0xb8, 6, 0, 0, 0, 0x62, 0x05, 0, 0, 1, 0x80, 0x0f, 0x0b];
    faulted("BOUND inside goes on", &Some(user::run32(&inside)), trap::UD, 0, 11);
    for vector in [trap::BP, trap::OF, trap::BR] {
        trap::reset_gate(vector);
    }
}

fn saved_flags() {
    let Some(fault) = probe!(["stc", "ud2"]) else {
        return rt::report::fail("UD2", format_args!("no fault"));
    };
    let flags = fault.frame.rflags;
    check!("a fault saves CF", flags & 1 == 1, "{flags:#x}");
    check!("a fault saves RF set", flags & RF != 0, "{flags:#x}");
    check!("a fault saves IF", flags & 0x200 == 0, "{flags:#x}");
    if let Some(fault) = probe!(["int3"]) {
        check!("a trap saves RF clear", fault.frame.rflags & RF == 0, "{:#x}", fault.frame.rflags);
    }
    let code = user::run64(&[0xf9, 0x0f, 0x0b]);
    equal("a fault in ring 3 saves its CS", code.frame.cs, u64::from(tables::USER_CODE64));
    equal("a fault in ring 3 saves its SS", code.frame.ss, u64::from(tables::USER_DATA));
    equal("a fault in ring 3 saves its RSP", code.frame.rsp, user::ENTRY64.rsp);
}

fn single_step() {
    set_dr6(0);
    let fault = probe!(["pushfq", "or qword ptr [rsp], 0x100", "popfq", "nop", "nop"]);
    // pushfq 1, or 8, popfq 1, nop 1
    faulted("DB: TF traps after the next instruction", &fault, trap::DB, 0, 11);
    if let Some(fault) = fault {
        check!("DB: DR6.BS", fault.dr6 & 0x400f == 0x4000, "DR6 {:#x}", fault.dr6);
        check!("DB: TF is in the saved RFLAGS", fault.frame.rflags & TF != 0, "{:#x}", fault.frame.rflags);
    }
    let fault = probe!(["pushfq", "or qword ptr [rsp], 0x100", "popfq", "mov ss, {s:e}", "nop", "nop"], s = in(reg) 0x10);
    faulted("DB: MOV SS holds the single-step trap for one instruction", &fault, trap::DB, 0, 13);
    let fault = probe!(["pushfq", "or qword ptr [rsp], 0x100", "popfq", "ud2"]);
    faulted("a fault goes before the single-step trap", &fault, trap::UD, 0, 10);
    // pushfq; or qword [rsp], 0x100; popfq; int 0x91: TF is clear in the handler.
    let fault = probe!(["pushfq", "or qword ptr [rsp], 0x100", "popfq", "int 0x91"]);
    faulted("INT n clears TF before the trap", &fault, 0x91, 0, 12);
    step_through_rep();
    step_user();
}

/// A REP instruction traps after each iteration, with RIP on the instruction until the last.
fn step_through_rep() {
    static STEPS: AtomicU64 = AtomicU64::new(0);
    static ON_REP: AtomicU64 = AtomicU64::new(0);
    trap::on(trap::DB, |frame| {
        STEPS.fetch_add(1, Ordering::Relaxed);
        if mem::read::<u16>(frame.rip) == 0xa4f3 {
            ON_REP.fetch_add(1, Ordering::Relaxed);
        }
        if frame.rcx == 0 {
            frame.rflags &= !TF;
        }
    });
    let fault = probe!(
        ["pushfq", "or qword ptr [rsp], 0x100", "popfq", "rep movsb", "nop"],
        inout("rcx") 5u64 => _, inout("rsi") mem::FREE => _, inout("rdi") mem::FREE + 64 => _
    );
    trap::off(trap::DB);
    ran("DB: single steps through REP MOVSB", &fault);
    equal("DB: one trap for each iteration", STEPS.load(Ordering::Relaxed), 5);
    equal("DB: RIP stays on REP between iterations", ON_REP.load(Ordering::Relaxed), 4);
}

fn step_user() {
    user::load(&[0x90, 0x90, 0x90]);
    let fault = user::run(&user::Entry { rflags: 2 | TF, ..user::ENTRY64 });
    faulted("DB: IRET to ring 3 with TF traps after one instruction", &Some(fault), trap::DB, 0, 1);
}

/// DR7 bits for one register: local enable, type (0 execute, 1 write, 2 I/O, 3 read or write), length (2: 8 bytes).
fn dr7_for(register: u32, kind: u64, length: u64) -> u64 {
    1 << (register * 2) | kind << (16 + register * 4) | length << (18 + register * 4)
}

fn breakpoints() {
    let target = user::CODE;
    user::load(&[0x90, 0x90, 0x0f, 0x0b]);
    set_dr6(0);
    set_dr0(target + 1);
    set_dr7(dr7_for(0, 0, 0));
    let fault = user::run(&user::ENTRY64);
    faulted("DB: instruction breakpoint, before the instruction", &Some(fault), trap::DB, 0, 1);
    check!("DB: DR6.B0", fault.dr6 & 0x600f == 1, "DR6 {:#x}", fault.dr6);
    let past = user::run(&user::Entry { rip: target + 1, rflags: 2 | RF, ..user::ENTRY64 });
    faulted("DB: RF lets the instruction run", &Some(past), trap::UD, 0, 1);

    set_dr6(0);
    set_dr1(mem::FREE + 8);
    set_dr7(dr7_for(1, 1, 2));
    let fault = probe!(["mov [{p}], eax", "nop"], p = in(reg) mem::FREE + 12);
    faulted("DB: data write breakpoint, after the instruction", &fault, trap::DB, 0, 2);
    check!("DB: DR6.B1", fault.is_some_and(|f| f.dr6 & 0x600f == 2), "DR6 {:#x}", dr6());
    let fault = probe!(["mov eax, [{p}]", "nop"], p = in(reg) mem::FREE + 12, out("eax") _);
    ran("DB: a read does not match a write breakpoint", &fault);
    set_dr7(dr7_for(1, 3, 2));
    let fault = probe!(["mov eax, [{p}]", "nop"], p = in(reg) mem::FREE + 12, out("eax") _);
    faulted("DB: data read breakpoint", &fault, trap::DB, 0, 2);
    let fault = probe!(["mov eax, [{p}]", "nop"], p = in(reg) mem::FREE + 16, out("eax") _);
    ran("DB: bytes beyond the length do not match", &fault);
    let fault = probe!(["mov rax, [{p}]", "nop"], p = in(reg) mem::FREE + 2, out("rax") _);
    faulted("DB: an access that overlaps the first byte matches", &fault, trap::DB, 0, 3);
    set_dr7(0);
    let fault = probe!(["mov eax, [{p}]", "nop"], p = in(reg) mem::FREE + 12, out("eax") _);
    ran("DB: a disabled breakpoint is quiet", &fault);
    io_breakpoint();
    general_detect();
}

fn io_breakpoint() {
    let name = "DB: I/O breakpoint, after the instruction";
    if !DE.or_skip(name) {
        return;
    }
    set_cr4(cr4() | CR4_DE);
    set_dr6(0);
    set_dr2(0x80);
    set_dr7(dr7_for(2, 2, 0));
    let fault = probe!(["out 0x80, al", "nop"]);
    faulted(name, &fault, trap::DB, 0, 2);
    check!("DB: DR6.B2", fault.is_some_and(|f| f.dr6 & 0x600f == 4), "DR6 {:#x}", dr6());
    set_dr7(0);
    set_cr4(cr4() & !CR4_DE);
}

fn general_detect() {
    set_dr6(0);
    set_dr7(1 << 13);
    let fault = probe!(["mov {x}, dr0"], x = out(reg) _);
    faulted("DB: general detect, before the instruction", &fault, trap::DB, 0, 0);
    check!("DB: DR6.BD", fault.is_some_and(|f| f.dr6 & 0x2000 != 0), "DR6 {:#x}", dr6());
    check!("DB: the exception cleared DR7.GD", dr7() & 1 << 13 == 0, "DR7 {:#x}", dr7());
    set_dr7(0);
}

fn debug_registers() {
    set_dr6(0);
    equal("DR6 reads its fixed bits", dr6() & 0xffff_0ff0, 0xffff_0ff0);
    set_dr7(0);
    equal("DR7 reads bit 10 as one", dr7(), 0x400);
    faulted("MOV DR7 with a high bit", &probe!(["mov dr7, {x}"], x = in(reg) 1u64 << 32), trap::GP, 0, 0);
    faulted("MOV DR6 with a high bit", &probe!(["mov dr6, {x}"], x = in(reg) 1u64 << 32), trap::GP, 0, 0);
    // mov rax, dr4
    ran("DR4 is DR6 without CR4.DE", &probe!([".byte 0x0f, 0x21, 0xe0"], out("rax") _));
    if DE.or_skip("UD: DR4 with CR4.DE") {
        set_cr4(cr4() | CR4_DE);
        faulted("UD: DR4 with CR4.DE", &probe!([".byte 0x0f, 0x21, 0xe0"], out("rax") _), trap::UD, 0, 0);
        set_cr4(cr4() & !CR4_DE);
    }
    faulted("GP: MOV from DR0 in ring 3", &Some(user::run64(&[0x0f, 0x21, 0xc0])), trap::GP, 0, 0);
}

fn invalid_opcodes() {
    const CODES: &[(&str, &[u8])] = &[
        ("UD: UD2", &[0x0f, 0x0b]),
        ("UD: UD1", &[0x0f, 0xb9, 0xc0]),
        ("UD: UD0", &[0x0f, 0xff, 0xc0]),
        ("UD: PUSH ES in 64-bit code", &[0x06]),
        ("UD: INTO in 64-bit code", &[0xce]),
        ("UD: AAM in 64-bit code", &[0xd4, 0x0a]),
        ("UD: far JMP to an immediate in 64-bit code", &[0xea, 0, 0, 0, 0, 8, 0]),
        ("UD: LEA of a register", &[0x8d, 0xc0]),
        ("UD: MOV to CS", &[0x8e, 0xc8]),
        ("UD: MOV from a seventh segment register", &[0x8c, 0xf0]),
        ("UD: far JMP through a register", &[0xff, 0xe8]),
        ("UD: LOCK NOP", &[0xf0, 0x90]),
        ("UD: LOCK MOV", &[0xf0, 0x89, 0x03]),
        ("UD: LOCK ADD to a register", &[0xf0, 0x01, 0xc0]),
        ("UD: LOCK CMP", &[0xf0, 0x39, 0x03]),
        ("UD: LOCK BT", &[0xf0, 0x0f, 0xa3, 0x03]),
        ("UD: CMPXCHG8B of a register", &[0x0f, 0xc7, 0xc8]),
        ("UD: group 11 with a wrong extension", &[0xc7, 0xc8, 0, 0, 0, 0]),
        ("UD: POP group with a wrong extension", &[0x8f, 0xc8]),
    ];
    for (name, code) in CODES {
        faulted(name, &Some(user::run64(code)), trap::UD, 0, 0);
    }
    // aad 10; lock inc dword [SCRATCH]; ud2
    let fault = user::run64(&[0xf0, 0xff, 0x04, 0x25, 0, 0, 1, 0x80, 0x0f, 0x0b]);
    check!(
        "LOCK INC of memory is legal up to its address",
        fault.vector != trap::UD || fault.at == 8,
        "{fault}"
    );
    faulted("UD: MOV from CR1", &probe!([".byte 0x0f, 0x20, 0xc8"], out("rax") _), trap::UD, 0, 0);
    faulted("UD: MOV from CR5", &probe!([".byte 0x0f, 0x20, 0xe8"], out("rax") _), trap::UD, 0, 0);
    let efer = rdmsr(MSR_EFER);
    wrmsr(MSR_EFER, efer & !EFER_SCE);
    faulted("UD: SYSCALL without EFER.SCE", &probe!(["syscall"], out("rcx") _, out("r11") _), trap::UD, 0, 0);
    if AVX.or_skip("UD: AVX without CR4.OSXSAVE") {
        let fault = probe!([".byte 0xc5, 0xfc, 0x57, 0xc0"], out("xmm0") _);
        faulted("UD: AVX without CR4.OSXSAVE", &fault, trap::UD, 0, 0);
    }
    faulted(
        "UD: XGETBV without CR4.OSXSAVE",
        &probe!(["xor ecx, ecx", "xgetbv"], out("rax") _, out("rcx") _, out("rdx") _),
        trap::UD,
        0,
        2,
    );
}

fn instruction_length() {
    // A 15-byte NOP runs, a 16-byte one does not.
    let mut code = [0x66; 18];
    code[14] = 0x90;
    code[15..17].copy_from_slice(&[0x0f, 0x0b]);
    faulted("15 bytes of instruction run", &Some(user::run64(&code)), trap::UD, 0, 15);
    let mut code = [0x66; 16];
    code[15] = 0x90;
    faulted("GP: 16 bytes of instruction", &Some(user::run64(&code)), trap::GP, 0, 0);
}

fn no_math() {
    let cr0 = cr0();
    set_cr0(cr0 | CR0_TS);
    let x87 = probe!(["fld1"]);
    let sse = probe!(["xorps xmm0, xmm0"], out("xmm0") _);
    let wait = probe!(["fwait"]);
    set_cr0((cr0 | CR0_TS) & !CR0_MP);
    let wait_no_mp = probe!(["fwait"]);
    set_cr0(cr0 | CR0_EM);
    let emulated = probe!(["fld1"]);
    let emulated_sse = probe!(["xorps xmm0, xmm0"], out("xmm0") _);
    set_cr0(cr0 | CR0_TS);
    let integer = probe!(["sfence", "pause"]);
    // SAFETY: only clears CR0.TS.
    unsafe { core::arch::asm!("clts") };
    let cleared = cpu::cr0() & CR0_TS == 0;
    set_cr0(cr0);
    faulted("NM: x87 with CR0.TS", &x87, trap::NM, 0, 0);
    faulted("NM: SSE with CR0.TS", &sse, trap::NM, 0, 0);
    faulted("NM: WAIT with CR0.TS and MP", &wait, trap::NM, 0, 0);
    ran("WAIT with CR0.TS and no MP", &wait_no_mp);
    faulted("NM: x87 with CR0.EM", &emulated, trap::NM, 0, 0);
    faulted("UD: SSE with CR0.EM", &emulated_sse, trap::UD, 0, 0);
    ran("SFENCE and PAUSE ignore CR0.TS", &integer);
    check!("CLTS clears CR0.TS", cleared, "CR0 {:#x}", cr0);
    let cr4 = cr4();
    set_cr4(cr4 & !CR4_OSFXSR);
    let fault = probe!(["xorps xmm0, xmm0"], out("xmm0") _);
    set_cr4(cr4);
    faulted("UD: SSE without CR4.OSFXSR", &fault, trap::UD, 0, 0);
}

fn math_faults() {
    let control = 0x037bu16; // zero divide unmasked
    mem::write(mem::FREE, control);
    let fault = probe!(["fninit", "fldcw [{p}]", "fldz", "fld1", "fdiv st(0), st(1)", "fnstsw ax", "fwait"], p = in(reg) mem::FREE, out("rax") _);
    // fninit 2, fldcw 2, fldz 2, fld1 2, fdiv 2, fnstsw 2
    faulted("MF: comes at the next waiting instruction", &fault, trap::MF, 0, 12);
    if let Some(fault) = fault {
        check!(
            "MF: the status word shows the zero divide",
            fault.frame.rax & 0x84 == 0x84,
            "{:#x}",
            fault.frame.rax
        );
    }
    ran("FNCLEX clears it", &probe!(["fnclex", "fwait", "fninit"]));
}

fn simd_faults() {
    let unmasked = 0x1d80u32; // MXCSR with zero divide unmasked
    let mxcsr = mem::FREE;
    mem::write(mxcsr, unmasked);
    mem::write(mxcsr + 4, 0x1f80u32);
    mem::write(mxcsr + 16, [1.0f32; 4]);
    let run = || {
        let fault = probe!(
            ["ldmxcsr [{p}]", "movups xmm0, [{p} + 16]", "xorps xmm1, xmm1", "divps xmm0, xmm1"],
            p = in(reg) mxcsr, out("xmm0") _, out("xmm1") _
        );
        // SAFETY: restores the default MXCSR.
        unsafe { core::arch::asm!("stmxcsr [{p} + 8]", "ldmxcsr [{p} + 4]", p = in(reg) mxcsr) };
        fault
    };
    let fault = run();
    check!(
        "XM: SIMD zero divide",
        fault.is_some_and(|f| f.vector == trap::XM && f.error == 0),
        "{}",
        fault.is_some()
    );
    equal("XM: MXCSR shows the zero divide", mem::read::<u32>(mxcsr + 8), unmasked | 4);
    let cr4 = cr4();
    set_cr4(cr4 & !CR4_OSXMMEXCPT);
    let fault = run();
    set_cr4(cr4);
    check!(
        "UD: SIMD zero divide without CR4.OSXMMEXCPT",
        fault.is_some_and(|f| f.vector == trap::UD),
        "another outcome"
    );
    mem::write(mxcsr, 0x1_0000u32);
    faulted("GP: LDMXCSR with a reserved bit", &probe!(["ldmxcsr [{p}]"], p = in(reg) mxcsr), trap::GP, 0, 0);
}

fn segment_loads() {
    let absent = SPARE;
    let code = SPARE + 8;
    let execute_only = SPARE + 16;
    tables::set_descriptor(absent, FLAT_DATA & !PRESENT);
    tables::set_descriptor(code, FLAT_CODE64 & !PRESENT);
    tables::set_descriptor(execute_only, FLAT_CODE64 & !(1 << 41));
    let beyond = 0x3f8u32;
    faulted(
        "NP: MOV FS, absent data",
        &probe!(["mov fs, {s:e}"], s = in(reg) u32::from(absent)),
        trap::NP,
        absent.into(),
        0,
    );
    faulted(
        "SS: MOV SS, absent data",
        &probe!(["mov ss, {s:e}"], s = in(reg) u32::from(absent)),
        trap::SS,
        absent.into(),
        0,
    );
    faulted("GP: MOV DS beyond the GDT", &probe!(["mov ds, {s:e}"], s = in(reg) beyond), trap::GP, beyond, 0);
    faulted(
        "GP: MOV DS, execute-only code",
        &probe!(["mov ds, {s:e}"], s = in(reg) u32::from(execute_only)),
        trap::GP,
        execute_only.into(),
        0,
    );
    faulted("GP: MOV SS, code", &probe!(["mov ss, {s:e}"], s = in(reg) 8), trap::GP, 8, 0);
    faulted("GP: MOV SS with another RPL", &probe!(["mov ss, {s:e}"], s = in(reg) 0x13), trap::GP, 0x10, 0);
    faulted("GP: MOV DS through an empty LDT", &probe!(["mov ds, {s:e}"], s = in(reg) 0xc), trap::GP, 0xc, 0);
    ran("a null selector loads into DS", &probe!(["mov ds, {s:e}"], s = in(reg) 0));
    ran(
        "a null selector loads into SS in ring 0",
        &probe!(["mov ss, {s:e}", "mov ss, {t:e}"], s = in(reg) 0, t = in(reg) 0x10),
    );
    let far = |selector: u16| {
        mem::write(mem::FREE, 0u32);
        mem::write(mem::FREE + 4, selector);
        probe!(["jmp fword ptr [{p}]"], p = in(reg) mem::FREE)
    };
    faulted("NP: far JMP to absent code", &far(code), trap::NP, code.into(), 0);
    faulted("GP: far JMP to data", &far(0x10), trap::GP, 0x10, 0);
    faulted("GP: far JMP to null", &far(0), trap::GP, 0, 0);
    faulted(
        "GP: LTR of a busy TSS",
        &probe!(["ltr {s:x}"], s = in(reg) u32::from(tables::TSS)),
        trap::GP,
        tables::TSS.into(),
        0,
    );
    faulted("GP: LTR of null", &probe!(["ltr {s:x}"], s = in(reg) 0), trap::GP, 0, 0);
    tables::load_task_register(0);
    faulted("GP: LLDT of data", &probe!(["lldt {s:x}"], s = in(reg) 0x10), trap::GP, 0x10, 0);
    tables::set_descriptor(SPARE + 24, tables::build_descriptor(0, 0xff, 0x02, 0));
    faulted(
        "NP: LLDT of an absent table",
        &probe!(["lldt {s:x}"], s = in(reg) u32::from(SPARE + 24)),
        trap::NP,
        (SPARE + 24).into(),
        0,
    );
    ran("LLDT of null", &probe!(["lldt {s:x}"], s = in(reg) 0));
    // mov eax, 0; mov ss, eax
    faulted(
        "GP: null SS in ring 3 compatibility mode",
        &Some(user::run32(&[0x31, 0xc0, 0x8e, 0xd0])),
        trap::GP,
        0,
        2,
    );
    // mov eax, 0x10; mov ds, eax
    faulted(
        "GP: ring 3 loads a DPL 0 segment",
        &Some(user::run64(&[0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8])),
        trap::GP,
        0x10,
        5,
    );
}

fn stack_faults() {
    let fault = probe!(["mov rsp, {x}", "push rax"], x = in(reg) NON_CANONICAL);
    faulted("SS: PUSH to a non-canonical stack", &fault, trap::SS, 0, 3);
    let fault =
        probe!(["push rbp", "mov rbp, {x}", "mov rax, [rbp]"], x = in(reg) NON_CANONICAL, out("rax") _);
    // The macro does not know that RBP changed: bring it back from the frame that was pushed.
    faulted("SS: non-canonical address through RBP", &restore_rbp(fault), trap::SS, 0, 4);
    let fault = probe!(["mov rax, [rsp + {x}]"], x = in(reg) NON_CANONICAL, out("rax") _);
    faulted("SS: non-canonical address through RSP", &fault, trap::SS, 0, 0);
}

/// A fragment may not name RBP as an operand, so the fragment pushed it; after the fault it lies below RSP.
fn restore_rbp(fault: Option<rt::Fault>) -> Option<rt::Fault> {
    if let Some(fault) = &fault {
        let saved: u64 = mem::read(fault.frame.rsp);
        // SAFETY: gives RBP the value the compiler expects.
        unsafe { core::arch::asm!("mov rbp, {}", in(reg) saved) };
    }
    fault
}

fn general_protection() {
    let bad = NON_CANONICAL;
    faulted(
        "GP: non-canonical read",
        &probe!(["mov al, [{x}]"], x = in(reg) bad, out("al") _),
        trap::GP,
        0,
        0,
    );
    faulted("GP: non-canonical write", &probe!(["mov [{x}], al"], x = in(reg) bad), trap::GP, 0, 0);
    let edge = 0x0000_7fff_ffff_fffcu64;
    let fault = probe!(["mov rax, [{x}]"], x = in(reg) edge, out("rax") _);
    check!(
        "an access across the canonical edge faults",
        fault.is_some_and(|f| matches!(f.vector, trap::GP | trap::PF)),
        "no fault"
    );
    // A branch to a non-canonical address faults before it is taken (SDM, JMP).
    faulted("GP: JMP to a non-canonical address", &probe!(["jmp {x}"], x = in(reg) bad), trap::GP, 0, 0);
    faulted(
        "GP: RET to a non-canonical address",
        &probe!(["push {x}", "ret"], x = in(reg) bad),
        trap::GP,
        0,
        1,
    );
    let fault = probe!(["mov rax, rsp", "push 0x10", "push rax", "push 2", "push 8", "push {x}", "iretq"], x = in(reg) bad, out("rax") _);
    check!(
        "GP: IRETQ to a non-canonical address",
        fault.is_some_and(|f| f.vector == trap::GP && f.error == 0),
        "another outcome"
    );
    faulted(
        "GP: MOVAPS not aligned",
        &probe!(["movaps xmm0, [{p}]"], p = in(reg) mem::FREE + 1, out("xmm0") _),
        trap::GP,
        0,
        0,
    );
    ran("MOVUPS not aligned", &probe!(["movups xmm0, [{p}]"], p = in(reg) mem::FREE + 1, out("xmm0") _));
    let fault = probe!(["push rbx", "cmpxchg16b [{p}]", "pop rbx"], p = in(reg) mem::FREE + 8, out("rax") _, out("rdx") _);
    faulted("GP: CMPXCHG16B not aligned", &fault, trap::GP, 0, 1);
    faulted("GP: FXSAVE not aligned", &probe!(["fxsave [{p}]"], p = in(reg) mem::FREE + 8), trap::GP, 0, 0);
    let fault = probe!(["push {n}", "popfq", "push 0x10", "push rsp", "push 2", "push 8", "push 0", "iretq"], n = in(reg) 0x4002u64);
    check!(
        "GP: IRET with NT in long mode",
        fault.is_some_and(|f| f.vector == trap::GP && f.error == 0),
        "another outcome"
    );
}

fn control_registers() {
    let (cr0, cr4) = (cr0(), cr4());
    // A machine that lets a write pass is put right at once, for the sake of the cases that follow.
    let write_cr0 = |value: u64| {
        let fault = probe!(["mov cr0, {x}"], x = in(reg) value);
        set_cr0(cr0);
        fault
    };
    let write_cr4 = |value: u64| {
        let fault = probe!(["mov cr4, {x}"], x = in(reg) value);
        set_cr4(cr4);
        fault
    };
    faulted("GP: CR0.PG without PE", &write_cr0(cr0 & !1), trap::GP, 0, 0);
    faulted("GP: CR0.NW without CD", &write_cr0((cr0 | 1 << 29) & !(1 << 30)), trap::GP, 0, 0);
    faulted("GP: CR0 with a high bit", &write_cr0(cr0 | 1 << 32), trap::GP, 0, 0);
    if is_tcg() {
        skip("GP: reserved bits of CR3 and CR4, CR4.PAE and CR4.LA57 in long mode", "check in QEMU");
    } else {
        let high_cr3 = probe!(["mov cr3, {x}"], x = in(reg) cr3() | 1 << 62);
        faulted("GP: CR3 with a bit above the physical width", &high_cr3, trap::GP, 0, 0);
        faulted("GP: CR4 with a reserved bit", &write_cr4(cr4 | 1 << 15), trap::GP, 0, 0);
        faulted("GP: CR4.LA57 changed in long mode", &write_cr4(cr4 ^ CR4_LA57), trap::GP, 0, 0);
        faulted("GP: CR4.PAE off in long mode", &write_cr4(cr4 & !CR4_PAE), trap::GP, 0, 0);
    }
    faulted("GP: CR8 above 15", &probe!(["mov cr8, {x}"], x = in(reg) 16u64), trap::GP, 0, 0);
    set_cr8(0);
    ran("LMSW cannot clear CR0.PE", &probe!(["lmsw {x:x}"], x = in(reg) (cr0 & !1) as u32));
    equal("CR0 after LMSW", cpu::cr0(), cr0);
}

fn msr_faults() {
    // A machine that lets a write pass gets the old value back, for the sake of the cases that follow.
    let write = |msr: u32, value: u64| {
        let old = rdmsr(msr);
        let fault = probe!(["wrmsr"], in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32);
        if fault.is_none() {
            wrmsr(msr, old);
        }
        fault
    };
    let unknown = 0x4000_1234;
    faulted(
        "GP: RDMSR of an unknown MSR",
        &probe!(["rdmsr"], in("ecx") unknown, out("eax") _, out("edx") _),
        trap::GP,
        0,
        0,
    );
    faulted(
        "GP: WRMSR of an unknown MSR",
        &probe!(["wrmsr"], in("ecx") unknown, in("eax") 0, in("edx") 0),
        trap::GP,
        0,
        0,
    );
    faulted("GP: EFER with a reserved bit", &write(MSR_EFER, rdmsr(MSR_EFER) | 1 << 9), trap::GP, 0, 0);
    faulted(
        "GP: EFER.LME changed under paging",
        &write(MSR_EFER, rdmsr(MSR_EFER) & !(1 << 8)),
        trap::GP,
        0,
        0,
    );
    faulted("GP: FS base not canonical", &write(MSR_FS_BASE, NON_CANONICAL), trap::GP, 0, 0);
    faulted("GP: LSTAR not canonical", &write(MSR_LSTAR, NON_CANONICAL), trap::GP, 0, 0);
    faulted("GP: SYSENTER_ESP not canonical", &write(MSR_SYSENTER_ESP, NON_CANONICAL), trap::GP, 0, 0);
    faulted("GP: PAT with a reserved type", &write(0x277, 2), trap::GP, 0, 0);
    let base = rdmsr(MSR_APIC_BASE) | 1 << 60;
    faulted("GP: APIC base above the physical width", &write(MSR_APIC_BASE, base), trap::GP, 0, 0);
}

fn user_privileges() {
    const CODES: &[(&str, &[u8])] = &[
        ("GP: HLT in ring 3", &[0xf4]),
        ("GP: CLI in ring 3", &[0xfa]),
        ("GP: STI in ring 3", &[0xfb]),
        ("GP: IN in ring 3", &[0xe4, 0x80]),
        ("GP: OUT in ring 3", &[0xe6, 0x80]),
        ("GP: MOV from CR0 in ring 3", &[0x0f, 0x20, 0xc0]),
        ("GP: MOV to CR3 in ring 3", &[0x0f, 0x22, 0xd8]),
        ("GP: RDMSR in ring 3", &[0x0f, 0x32]),
        ("GP: WRMSR in ring 3", &[0x0f, 0x30]),
        ("GP: CLTS in ring 3", &[0x0f, 0x06]),
        ("GP: INVLPG in ring 3", &[0x0f, 0x01, 0x3b]),
        ("GP: LMSW in ring 3", &[0x0f, 0x01, 0xf0]),
        ("GP: LGDT in ring 3", &[0x0f, 0x01, 0x13]),
        ("GP: LIDT in ring 3", &[0x0f, 0x01, 0x1b]),
        ("GP: LTR in ring 3", &[0x0f, 0x00, 0xd8]),
        ("GP: LLDT in ring 3", &[0x0f, 0x00, 0xd0]),
        ("GP: WBINVD in ring 3", &[0x0f, 0x09]),
        ("GP: SYSRET in ring 3", &[0x48, 0x0f, 0x07]),
        ("GP: SWAPGS in ring 3", &[0x0f, 0x01, 0xf8]),
    ];
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
    for (name, code) in CODES {
        faulted(name, &Some(user::run64(code)), trap::GP, 0, 0);
    }
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) & !EFER_SCE);
}

fn page_faults() {
    let frame = mem::frame();
    let va = user::SCRATCH + 8 * PAGE;
    let read = || probe!(["mov al, [{p}]"], p = in(reg) va + 5, out("al") _);
    let write = || probe!(["mov [{p}], al"], p = in(reg) va + 5);
    paging::set_pte(va, 0);
    page_faulted("PF: read of an absent page", &read(), 0, va + 5, 0);
    page_faulted("PF: write of an absent page", &write(), ERR_W, va + 5, 0);
    let fault = probe!(["mov rax, [{p}]"], p = in(reg) va - 4, out("rax") _);
    page_faulted("PF: CR2 is the second page of a crossing access", &(crossing_base(va), fault).1, 0, va, 0);
    let fault = probe!(["call {p}"], p = in(reg) va);
    // The call has pushed and branched: the fault belongs to the fetch.
    check!(
        "PF: fetch from an absent page",
        fault.is_some_and(|f| f.vector == trap::PF
            && f.cr2 == va
            && f.frame.rip == va
            && f.error & !ERR_I == 0),
        "another outcome"
    );
    paging::set_pte(va, frame | P);
    ran("a read of a read-only page", &read());
    page_faulted("PF: write of a read-only page", &write(), ERR_P | ERR_W, va + 5, 0);
    let with_rsvd = frame | P | W | 1 << 51;
    if physical_bits() < 52 {
        paging::set_pte(va, with_rsvd);
        page_faulted("PF: reserved bit", &read(), ERR_P | ERR_RSVD, va + 5, 0);
    } else {
        skip("PF: reserved bit", "reserved address bit");
    }
    if NX.or_skip("PF: fetch from a no-execute page") {
        paging::set_pte(va, frame | P | W | NO_EXECUTE);
        let fault = probe!(["call {p}"], p = in(reg) va);
        let held = fault.is_some_and(|f| f.vector == trap::PF && f.cr2 == va && f.error == ERR_P | ERR_I);
        check!("PF: fetch from a no-execute page", held, "another outcome");
    }
    user_page_faults(va, frame);
    paging::set_pte(va, 0);
}

/// Maps the page below `va`, so that an access that crosses into `va` faults there.
fn crossing_base(va: u64) {
    paging::set_pte(va - PAGE, mem::frame() | P | W | A | D);
}

fn user_page_faults(va: u64, frame: u64) {
    // mov al, [va]; mov [va], al with an absolute address
    let address = (va as u32).to_le_bytes();
    let mut load = [0x8a, 0x04, 0x25, 0, 0, 0, 0];
    load[3..].copy_from_slice(&address);
    let mut store = load;
    store[0] = 0x88;
    // 32-bit absolute addresses sign-extend in 64-bit code, so run it as 32-bit code, where the SIB form is the same.
    paging::set_pte(va, 0);
    page_faulted("PF: ring 3 reads an absent page", &Some(user::run32(&load)), ERR_U, va, 0);
    page_faulted("PF: ring 3 writes an absent page", &Some(user::run32(&store)), ERR_U | ERR_W, va, 0);
    paging::set_pte(va, frame | P | W);
    page_faulted("PF: ring 3 reads a supervisor page", &Some(user::run32(&load)), ERR_U | ERR_P, va, 0);
    page_faulted(
        "PF: ring 3 writes a supervisor page",
        &Some(user::run32(&store)),
        ERR_U | ERR_P | ERR_W,
        va,
        0,
    );
    paging::set_pte(va, frame | P | U);
    page_faulted(
        "PF: ring 3 writes a read-only page",
        &Some(user::run32(&store)),
        ERR_U | ERR_P | ERR_W,
        va,
        0,
    );
    let fault = user::run(&user::Entry { rip: mem::FREE, ..user::ENTRY64 });
    let wanted = ERR_U | ERR_P | if NX.present() { ERR_I } else { 0 };
    page_faulted("PF: ring 3 fetches from a supervisor page", &Some(fault), wanted, mem::FREE, 0);
}

fn alignment() {
    // mov eax, [rdi]; ud2
    let code = [0x8b, 0x07, 0x0f, 0x0b];
    user::load(&code);
    let entry = user::Entry { rdi: user::SCRATCH + 2, rflags: 2 | 1 << 18, ..user::ENTRY64 };
    faulted("RFLAGS.AC alone checks nothing", &Some(user::run(&entry)), trap::UD, 0, 2);
    set_cr0(cr0() | CR0_AM);
    faulted("AC: ring 3 reads across alignment", &Some(user::run(&entry)), trap::AC, 0, 0);
    let aligned = user::Entry { rdi: user::SCRATCH + 4, ..entry };
    faulted("an aligned read passes", &Some(user::run(&aligned)), trap::UD, 0, 2);
    let off = user::Entry { rflags: 2, ..entry };
    faulted("without RFLAGS.AC it passes", &Some(user::run(&off)), trap::UD, 0, 2);
    let fault = probe!(["pushfq", "or dword ptr [rsp], 0x40000", "popfq", "mov eax, [{p}]", "pushfq", "and dword ptr [rsp], ~0x40000", "popfq"], p = in(reg) mem::FREE + 1, out("eax") _);
    ran("ring 0 is not checked", &fault);
    set_cr0(cr0() & !CR0_AM);
}

fn gates_and_double_faults() {
    let absent = |vector: u8| trap::set_gate(vector, trap::stub(vector), 0x0e, trap::default_ist(vector));
    absent(0x91);
    faulted("NP: INT n through an absent gate", &probe!(["int 0x91"]), trap::NP, 0x91 * 8 + 2, 0);
    trap::reset_gate(0x91);
    absent(trap::UD);
    // The event that failed came from outside the program: EXT is set.
    faulted("NP: UD through an absent gate, with EXT", &probe!(["ud2"]), trap::NP, 6 * 8 + 3, 0);
    trap::reset_gate(trap::UD);

    for (name, vector) in [
        ("DF: GP cannot be delivered", trap::GP),
        ("DF: DE cannot be delivered", trap::DE),
        ("DF: PF cannot be delivered", trap::PF),
    ] {
        absent(vector);
        let fault = match vector {
            trap::GP => probe!(["mov al, [{x}]"], x = in(reg) NON_CANONICAL, out("al") _),
            trap::DE => probe!(["div ecx"], in("ecx") 0, out("eax") _, out("edx") _),
            _ => probe!(["mov al, [{p}]"], p = in(reg) user::SCRATCH + 8 * PAGE, out("al") _),
        };
        trap::reset_gate(vector);
        // RIP of a double fault is undefined by the SDM; every CPU leaves it at the instruction.
        faulted(name, &fault, trap::DF, 0, 0);
    }
    trap::set_gate(0x91, trap::stub(0x91), 0x85, 0);
    faulted("GP: a task gate in long mode", &probe!(["int 0x91"]), trap::GP, 0x91 * 8 + 2, 0);
    trap::set_gate(0x91, NON_CANONICAL >> 1, 0x8e, 0);
    faulted("GP: a gate with a non-canonical entry", &probe!(["int 0x91"]), trap::GP, 0, 0);
    trap::reset_gate(0x91);
    short_idt();
    faulting_ist();
}

fn short_idt() {
    // SIDT, LIDT with room for 0x80 vectors only, INT 0x91, whose fault handler LIDTs back afterwards.
    mem::write(mem::FREE, 0x80u16 * 16 - 1);
    let fault = probe!(["sidt [{p} + 16]", "mov rax, [{p} + 18]", "mov [{p} + 2], rax", "lidt [{p}]", "int 0x91"], p = in(reg) mem::FREE, out("rax") _);
    trap::load_idt();
    let held = fault.is_some_and(|f| f.vector == trap::GP && f.error == 0x91 * 8 + 2);
    check!("GP: a vector beyond the IDT's limit", held, "another outcome");
}

fn faulting_ist() {
    let hole = user::SCRATCH + 9 * PAGE;
    paging::set_pte(hole, 0);
    trap::set_gate(trap::GP, trap::stub(trap::GP), 0x8e, 7);
    tables::set_ist(7, hole + PAGE);
    let fault = probe!(["mov al, [{x}]"], x = in(reg) NON_CANONICAL, out("al") _);
    // A page fault while a contributory exception is delivered is served by itself.
    let held = fault
        .is_some_and(|f| f.vector == trap::PF && f.error == ERR_W && f.cr2 >> 12 == hole >> 12 && f.at == 0);
    check!("PF: the handler's stack is absent", held, "{}", fault.map_or(0, |f| f.vector));
    trap::reset_gate(trap::GP);
    trap::set_gate(trap::PF, trap::stub(trap::PF), 0x8e, 7);
    let fault = probe!(["mov al, [{p}]"], p = in(reg) hole, out("al") _);
    faulted("DF: PF whose handler's stack is absent", &fault, trap::DF, 0, 0);
    trap::set_gate(trap::PF, trap::stub(trap::PF), 0x8e, trap::default_ist(trap::PF));
    tables::set_ist(7, NON_CANONICAL);
    trap::set_gate(0x91, trap::stub(0x91), 0x8e, 7);
    faulted("SS: the handler's stack is not canonical", &probe!(["int 0x91"]), trap::SS, 0, 0);
    trap::reset_gate(0x91);
    tables::set_ist(7, 0);
}

fn task_state_fault() {
    // A TSS too short for its IST entries.
    let selector = SPARE + 32;
    let tss = tables::tss_address(0);
    tables::set_descriptor(selector, tables::build_descriptor(tss as u32, 0x23, 0x89, 0));
    tables::set_descriptor(selector + 8, tss >> 32);
    trap::set_gate(trap::TS, trap::stub(trap::TS), 0x8e, 0);
    // SAFETY: the same TSS with a shorter limit; the full one is back before anything needs it.
    unsafe { core::arch::asm!("ltr {:x}", in(reg) selector) };
    let fault = probe!(["ud2"]);
    tables::load_task_register(0);
    trap::reset_gate(trap::TS);
    faulted("TS: the IST entry is beyond the TSS's limit", &fault, trap::TS, u32::from(selector) | 1, 0);
}

fn interrupt_stacks() {
    let in_stack = |at: u64, top: u64| at < top && at + 0x4000 >= top;
    let fault = probe!(["int 0x91"]);
    let ist = tables::ist(tables::IST_INTERRUPT);
    check!(
        "an IST gate switches stacks in ring 0",
        fault.is_some_and(|f| in_stack(f.frame_at, ist)),
        "wrong stack"
    );
    trap::set_gate(0x91, trap::stub(0x91), 0x8e, 0);
    let fault = probe!(["sub rsp, 0x1005", "mov rax, rsp", "int 0x91"], out("rax") _);
    if let Some(f) = fault {
        let frame_size = core::mem::size_of::<Frame>() as u64;
        equal("without IST the stack stays, aligned to 16", f.frame_at + frame_size, f.frame.rax & !15);
        equal("the frame holds the RSP of before", f.frame.rsp, f.frame.rax);
    }
    trap::set_gate(0x91, trap::stub(0x91), 0xee, 0);
    let fault = user::run64(&[0xcd, 0x91]);
    check!(
        "from ring 3 RSP0 is taken",
        in_stack(fault.frame_at, tables::rsp0()),
        "frame at {:#x}",
        fault.frame_at
    );
    trap::reset_gate(0x91);
}

fn interrupt_shadow() {
    const VECTOR: u8 = 0x92;
    apic::enable();
    apic::send_self(VECTOR);
    let fault = probe!(["sti", "nop", "nop", "nop", "cli"]);
    apic::end_of_interrupt();
    faulted("STI holds interrupts for one instruction", &fault, VECTOR, 0, 2);
    apic::send_self(VECTOR);
    let held = probe!(["sti", "cli", "nop"]);
    ran("STI; CLI lets nothing through", &held);
    let fault = probe!(["push 0x202", "popfq", "nop", "nop", "cli"]);
    apic::end_of_interrupt();
    // push imm32 5, popfq 1
    faulted("POPF opens no shadow", &fault, VECTOR, 0, 6);
    apic::send_self(VECTOR);
    let fault =
        probe!(["push 0x202", "mov eax, 0x10", "sti", "nop", "mov ss, eax", "nop", "cli"], out("eax") _);
    apic::end_of_interrupt();
    check!(
        "the interrupt comes before MOV SS",
        fault.is_some_and(|f| f.vector == VECTOR && f.at == 12),
        "{}",
        fault.map_or(0, |f| f.at)
    );
    apic::send_self(VECTOR);
    // With IF set from the stack by the same POPF whose next instruction is MOV SS.
    let fault = probe!(["push 0x202", "mov eax, 0x10", "popfq", "cli"], out("eax") _);
    apic::end_of_interrupt();
    faulted("a pending interrupt beats CLI after POPF", &fault, VECTOR, 0, 11);
    if let Some(f) = fault {
        check!("the saved RFLAGS has IF", f.frame.rflags & 0x200 != 0, "{:#x}", f.frame.rflags);
    }
}
