//! Exceptions of L2: the exception bitmap, page-fault mask and match, software exceptions, debug exceptions, events
//! that fail to be delivered, the triple fault.

use crate::want::{Want, to_end};
use rt::cpu;
use rt::mem::{self, PAGE};
use rt::report::equal;
use rt::vmx::control::{LOAD_DEBUG_CONTROLS, SAVE_DEBUG_CONTROLS};
use rt::vmx::exit::event::{
    HARDWARE_EXCEPTION, PRIVILEGED_SOFTWARE_EXCEPTION, SOFTWARE_EXCEPTION, SOFTWARE_INTERRUPT,
};
use rt::vmx::vm::{CODE32_RIGHTS, Segment};
use rt::vmx::{Vm, field as f, handler, reason, vmread, vmwrite};
use rt::{check, l2, paging, tables, trap, user};

const RF: u64 = 1 << 16;
const TF: u64 = 1 << 8;

pub fn all() {
    hardware();
    software();
    delivery_to_l2();
    page_faults();
    resume_flag();
    single_step();
    breakpoints();
    failed_delivery();
    double_and_triple_faults();
}

/// An exception exit by vector.
fn exception(vector: u8) -> Want {
    Want::exit(reason::EXCEPTION_OR_NMI).event(HARDWARE_EXCEPTION | u32::from(vector))
}

fn exception_with_error(vector: u8, error: u32) -> Want {
    Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(HARDWARE_EXCEPTION | u32::from(vector), error)
}

/// A machine that exits on these vectors only, others go to L2's reporting handlers.
fn with_bitmap(code: u64, vectors: u32) -> Vm {
    let vm = Vm::fresh(code);
    handler::install();
    vmwrite(f::EXCEPTION_BITMAP, vectors.into());
    vm
}

fn hardware() {
    exception(trap::UD).run("#UD exits", &mut Vm::fresh(l2!(["ud2"])));
    let mut vm = Vm::fresh(l2!(["div ecx"]));
    exception(trap::DE).run("#DE exits", &mut vm);
    let mut vm = Vm::fresh(l2!(["mov [rbx], al"]));
    vm.regs.rbx = 1 << 63;
    exception_with_error(trap::GP, 0).run("#GP exits with its error code", &mut vm);
    let mut vm = Vm::fresh(l2!(["mov ds, ax"]));
    vm.regs.rax = 0x170;
    tables::set_descriptor(0x170, 0);
    exception_with_error(trap::GP, 0x170).run("#GP of a selector exits with it", &mut vm);
    tables::set_descriptor(0x168, tables::FLAT_DATA & !tables::PRESENT);
    vm.regs.rax = 0x168;
    exception_with_error(trap::NP, 0x168).run("#NP exits", &mut vm);
    let mut vm = Vm::fresh(l2!(["mov ss, ax"]));
    vm.regs.rax = 0x168;
    exception_with_error(trap::SS, 0x168).run("#SS exits", &mut vm);
    let mut vm = Vm::fresh(l2!(["fld1"]));
    vmwrite(f::GUEST_CR0, cpu::cr0() | cpu::CR0_TS);
    exception(trap::NM).run("#NM exits", &mut vm);
}

fn software() {
    let event = |kind: u32, vector: u8| {
        Want::instruction(reason::EXCEPTION_OR_NMI, 1).event(kind | u32::from(vector))
    };
    event(SOFTWARE_EXCEPTION, trap::BP)
        .run("INT3 exits as a software exception", &mut Vm::fresh(l2!(["int3"])));
    let name = "INT1 exits as a privileged software exception";
    event(PRIVILEGED_SOFTWARE_EXCEPTION, trap::DB).run(name, &mut Vm::fresh(l2!([".byte 0xf1"])));
    let mut vm = Vm::fresh(l2!([".byte 0xce"]));
    Segment::Cs.write(tables::CODE32, 0, 0xffff_ffff, CODE32_RIGHTS);
    vmwrite(f::GUEST_RFLAGS, 0x802);
    event(SOFTWARE_EXCEPTION, trap::OF).run("INTO exits as a software exception", &mut vm);
    // BOUND is not one: bound eax, [eax]
    let mut vm = Vm::fresh(l2!([".byte 0x62, 0x00"]));
    Segment::Cs.write(tables::CODE32, 0, 0xffff_ffff, CODE32_RIGHTS);
    mem::write(mem::FREE, [0i32, 1]);
    vm.regs.rax = mem::FREE;
    exception(trap::BR).run("#BR of BOUND exits as a hardware exception", &mut vm);
    for vector in [1u8, 3, 4, 5, 6] {
        let mut vm = with_bitmap(interrupt(vector), !0);
        delivered("INT n does not look at the exception bitmap", &mut vm, vector, 2);
    }
}

/// Code that is `INT vector`.
fn interrupt(vector: u8) -> u64 {
    let at = user::CODE + 0x800;
    mem::copy(at, &[0xcd, vector, 0x0f, 0x01, 0xc1]);
    at
}

/// L2's handler of this vector runs, with a saved RIP that counts from the start.
fn delivered(name: &str, vm: &mut Vm, vector: u8, at: u64) -> handler::Delivered {
    let exit = vm.run();
    let Some(frame) = handler::delivered(&exit) else {
        rt::report::fail(name, format_args!("{exit}, wanted the handler of vector {vector}"));
        return handler::Delivered::default();
    };
    let saved = frame.rip.wrapping_sub(vm.start);
    let right = frame.vector == u64::from(vector) && saved == at;
    check!(name, right, "vector {} at +{saved:#x}, wanted {vector} at +{at:#x}", frame.vector);
    frame
}

fn delivery_to_l2() {
    let mut vm = with_bitmap(l2!(["nop", "ud2"]), !(1 << trap::UD));
    let frame = delivered("a clear bit delivers to L2", &mut vm, trap::UD, 1);
    check!(
        "L2's frame has its CS and SS",
        (frame.cs, frame.ss) == (8, 16),
        "{:#x}, {:#x}",
        frame.cs,
        frame.ss
    );
    equal("L2's frame has its RSP", frame.rsp, rt::vmx::vm::stack_top());
    equal("L2's frame has RF set", frame.rflags, 2 | RF);
    let mut vm = with_bitmap(l2!(["int3"]), 0);
    delivered("INT3 reaches L2", &mut vm, trap::BP, 1);
    vm.skip();
    to_end("L2's handler returns", &mut vm);
    let mut vm = with_bitmap(l2!(["mov [rbx], al"]), 0);
    vm.regs.rbx = 1 << 63;
    let frame = delivered("#GP reaches L2", &mut vm, trap::GP, 0);
    equal("L2's frame has the error code", frame.error, 0);
}

/// Bit 14 and the page-fault mask and match: a fault exits if bit 14 equals (error & mask == match).
fn page_faults() {
    let absent = user::SCRATCH + 24 * PAGE;
    paging::set_pte(absent, 0);
    let (read, write) = (l2!(["mov al, [rbx]"]), l2!(["mov [rbx], al"]));
    let bit = 1 << trap::PF;
    let cases = [
        ("#PF: bit 14 set, mask 0, match 0: exits", bit, 0, 0, write, true),
        ("#PF: bit 14 set, write matches: exits", bit, 2, 2, write, true),
        ("#PF: bit 14 set, read does not match: L2", bit, 2, 2, read, false),
        ("#PF: bit 14 set, nothing matches: L2", bit, 0, 1, write, false),
        ("#PF: bit 14 clear, mask 0, match 0: L2", 0, 0, 0, write, false),
        ("#PF: bit 14 clear, write matches: L2", 0, 2, 2, write, false),
        ("#PF: bit 14 clear, read does not match: exits", 0, 2, 2, read, true),
        ("#PF: bit 14 clear, nothing matches: exits", 0, 0, 1, write, true),
    ];
    for (name, bitmap, mask, matching, code, exits) in cases {
        let mut vm = with_bitmap(code, bitmap);
        vm.regs.rbx = absent + 0x123;
        vmwrite(f::PAGE_FAULT_MASK, mask);
        vmwrite(f::PAGE_FAULT_MATCH, matching);
        cpu::set_cr2(0x5555);
        let error = if code == write { 2 } else { 0 };
        if exits {
            let want = exception_with_error(trap::PF, error).qualification(absent + 0x123);
            want.run(name, &mut vm);
            equal("a #PF that exits leaves CR2", cpu::cr2(), 0x5555);
        } else {
            let frame = delivered(name, &mut vm, trap::PF, 0);
            equal("a #PF that L2 gets has its error code", frame.error, error.into());
            equal("a #PF that L2 gets sets CR2", cpu::cr2(), absent + 0x123);
        }
    }
}

/// What exits save as RFLAGS.RF ("Saving RIP, RSP, and RFLAGS").
fn resume_flag() {
    let saved = |code: u64| {
        let mut vm = Vm::fresh(code);
        vmwrite(f::GUEST_RFLAGS, 2 | RF);
        vm.run().rflags & RF
    };
    equal("RF: an instruction that exits saves 0", saved(l2!(["cpuid"])), 0);
    equal("RF: a fault that exits saves 1", saved(l2!(["ud2"])), RF);
    equal("RF: a trap that exits saves 0", saved(l2!(["int3"])), 0);
    equal("RF: an instruction clears it", saved(l2!(["nop", "cpuid"])), 0);
}

fn single_step() {
    cpu::set_dr6(0);
    let mut vm = Vm::fresh(l2!(["nop", "nop"]));
    vmwrite(f::GUEST_RFLAGS, 2 | TF);
    exception(trap::DB).qualification(1 << 14).at(1).run("TF: #DB exits behind the instruction", &mut vm);
    equal("a #DB that exits leaves DR6", cpu::dr6(), 0xffff_0ff0);
    equal("a #DB that exits saves TF", vmread(f::GUEST_RFLAGS) & TF, TF);
    let mut vm = Vm::fresh(l2!(["cpuid"]));
    vmwrite(f::GUEST_RFLAGS, 2 | TF);
    Want::instruction(reason::CPUID, 2).run("TF: an instruction that exits does not trap", &mut vm);
    equal("TF: nothing is pending behind an instruction that exits", vmread(f::GUEST_PENDING_DEBUG), 0);
    let mut vm = with_bitmap(l2!(["nop"]), 0);
    vmwrite(f::GUEST_RFLAGS, 2 | TF);
    let frame = delivered("TF: #DB reaches L2", &mut vm, trap::DB, 1);
    equal("TF is clear in L2's handler", frame.handler_rflags & TF, 0);
    equal("a #DB that L2 gets sets DR6.BS", cpu::dr6() & 0x400f, 0x4000);
    cpu::set_dr6(0);
}

/// Debug registers of L2: DR0 to DR3 and DR6 are shared with L1, DR7 is L2's.
fn with_dr7(code: u64, dr7: u64) -> Vm {
    let mut vm = Vm::fresh(code);
    vm.set(&[LOAD_DEBUG_CONTROLS, SAVE_DEBUG_CONTROLS]);
    vmwrite(f::GUEST_DR7, dr7);
    vm
}

fn breakpoints() {
    let mut vm = with_dr7(l2!(["mov [rbx], eax", "nop"]), 0x400 | 1 | 1 << 16 | 3 << 18);
    cpu::set_dr0(mem::FREE + 0x40);
    vm.regs.rbx = mem::FREE + 0x40;
    exception(trap::DB).qualification(1).at(2).run("data breakpoint: #DB exits behind the access", &mut vm);
    let code = l2!(["nop", "nop", "nop"]);
    let mut vm = with_dr7(code, 0x400 | 4);
    cpu::set_dr1(code + 1);
    let name = "instruction breakpoint: #DB exits before the instruction";
    exception(trap::DB).qualification(2).at(1).run(name, &mut vm);
    equal("instruction breakpoint: RF stays clear", vmread(f::GUEST_RFLAGS) & RF, 0);
    vmwrite(f::GUEST_RFLAGS, 2 | RF);
    to_end("instruction breakpoint: RF lets the instruction run", &mut vm);
    let mut vm = with_dr7(l2!(["mov rax, dr6"]), 0x400 | 1 << 13);
    let name = "general detect: #DB exits before the instruction";
    exception(trap::DB).qualification(1 << 13).run(name, &mut vm);
    equal("general detect: an exit leaves GD", vmread(f::GUEST_DR7), 0x400 | 1 << 13);
    equal("exits leave DR6", cpu::dr6(), 0xffff_0ff0);
    cpu::set_dr0(0);
    cpu::set_dr1(0);
}

/// An exception met while delivering another event exits with IDT-vectoring information.
fn failed_delivery() {
    let start = |code: u64, vectors: u32| {
        let vm = with_bitmap(code, vectors);
        vmwrite(f::GUEST_IDTR_LIMIT, 0);
        vm
    };
    let gp = 1 << trap::GP;
    let ud = HARDWARE_EXCEPTION | u32::from(trap::UD);
    let want = exception_with_error(trap::GP, 6 << 3 | 3).vectoring(ud);
    want.run("delivery of #UD meets #GP", &mut start(l2!(["ud2"]), gp));
    let software = |kind: u32, vector: u32, length: u32| {
        exception_with_error(trap::GP, vector << 3 | 2).vectoring(kind | vector).length(length)
    };
    let want = software(SOFTWARE_INTERRUPT, 0x50, 2);
    want.run("delivery of INT n meets #GP", &mut start(interrupt(0x50), gp));
    let want = software(SOFTWARE_EXCEPTION, 3, 1);
    want.run("delivery of INT3 meets #GP", &mut start(l2!(["int3"]), gp));
    let mut vm = start(l2!(["mov ds, ax"]), gp);
    vm.regs.rax = 0x168;
    let np = HARDWARE_EXCEPTION | u32::from(trap::NP);
    let want = exception_with_error(trap::GP, 11 << 3 | 3).vectoring_with_error(np, 0x168);
    want.run("delivery of #NP meets #GP", &mut vm);
    let absent = user::SCRATCH + 24 * PAGE;
    let mut vm = with_bitmap(l2!(["ud2"]), 1 << trap::PF);
    vmwrite(f::GUEST_RSP, absent + 0x800);
    let exit = vm.run();
    let top = absent + 0x7f8;
    let want = exception_with_error(trap::PF, 2).vectoring(ud).any_qualification();
    want.check("delivery of #UD meets #PF of the stack", &exit);
    check!("its address lies on the stack", (absent + 0x7d8..=top).contains(&exit.qualification), "{exit}");
}

fn double_and_triple_faults() {
    let start = |vectors: u32| {
        let vm = with_bitmap(l2!(["nop", "mov ds, ax"]), vectors);
        vmwrite(f::GUEST_IDTR_LIMIT, 0);
        vm
    };
    // #NP cannot be delivered: #GP; contributory after contributory: #DF, which causes the exit directly.
    let mut vm = start(1 << trap::DF);
    vm.regs.rax = 0x168;
    exception_with_error(trap::DF, 0).at(1).run("#DF exits without IDT-vectoring information", &mut vm);
    let mut vm = start(0);
    vm.regs.rax = 0x168;
    Want::exit(reason::TRIPLE_FAULT).at(1).run("a triple fault exits", &mut vm);
    // #UD is benign: #GP of its delivery is delivered next, which fails in turn.
    let mut vm = with_bitmap(l2!(["ud2"]), 1 << trap::DF);
    vmwrite(f::GUEST_IDTR_LIMIT, 0);
    exception_with_error(trap::DF, 0).run("#DF after a benign exception exits", &mut vm);
}
