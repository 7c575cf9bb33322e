//! Virtual-interrupt delivery, EOI virtualization, posted interrupts.

use crate::apic_access::{ACCESS_PAGE, VIRTUAL_APIC, register, set_register, with_shadow};
use crate::interrupts::{IF, handled};
use crate::want::{Want, to_end};
use rt::apic;
use rt::mem::{self, PAGE};
use rt::report::equal;
use rt::vmx::control::*;
use rt::vmx::exit::event;
use rt::vmx::{Vm, field as f, handler, reason, vmread, vmwrite};
use rt::{check, l2};

/// The virtual interrupt of the cases, and a higher one.
const VECTOR: u8 = 0x61;
const HIGHER: u8 = 0x83;
/// The notification vector of posted interrupts.
const NOTIFICATION: u8 = 0x71;
const DESCRIPTOR: u64 = VIRTUAL_APIC + 4 * PAGE;

pub fn all() {
    evaluation();
    priorities();
    end_of_interrupt();
    eoi_exit();
    self_ipi();
    posted();
    posted_while_running();
}

fn start(name: &str, code: u64) -> Option<Vm> {
    let controls = [
        EXTERNAL_INTERRUPT_EXITING,
        VIRTUALIZE_APIC_ACCESSES,
        APIC_REGISTER_VIRTUALIZATION,
        VIRTUAL_INTERRUPT_DELIVERY,
    ];
    let vm = with_shadow(name, code, &controls)?;
    handler::install();
    vmwrite(f::GUEST_RFLAGS, 2 | IF);
    Some(vm)
}

/// Makes a vector pending in the virtual APIC.
fn request(vector: u8) {
    let offset = apic::IRR + u32::from(vector / 32) * 16;
    set_register(offset, register(offset) | 1 << (vector % 32));
}

fn is_set(registers: u32, vector: u8) -> bool {
    register(registers + u32::from(vector / 32) * 16) >> (vector % 32) & 1 != 0
}

fn status(rvi: u8, svi: u8) -> u64 {
    u64::from(rvi) | u64::from(svi) << 8
}

fn evaluation() {
    let name = "virtual interrupt: delivered at entry";
    let Some(mut vm) = start(name, l2!(["nop", "nop"])) else { return };
    request(VECTOR);
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(VECTOR, 0));
    let exit = vm.run();
    let frame = handled(name, &vm, &exit, VECTOR, 0);
    equal("virtual interrupt: the frame has IF", frame.rflags, 2 | IF);
    check!("virtual interrupt: VIRR is clear", !is_set(apic::IRR, VECTOR), "set");
    check!("virtual interrupt: VISR is set", is_set(apic::ISR, VECTOR), "clear");
    equal("virtual interrupt: RVI and SVI", vmread(f::GUEST_INTERRUPT_STATUS), status(0, VECTOR));
    equal("virtual interrupt: VPPR", register(apic::PPR), u32::from(VECTOR) & 0xf0);
    let Some(mut vm) = start(name, l2!(["nop", "sti", "nop", "nop"])) else { return };
    vmwrite(f::GUEST_RFLAGS, 2);
    request(VECTOR);
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(VECTOR, 0));
    let exit = vm.run();
    handled("virtual interrupt: waits for STI and one instruction", &vm, &exit, VECTOR, 3);
}

fn priorities() {
    let name = "virtual interrupt: VTPR holds it";
    let Some(mut vm) = start(name, l2!(["nop", "mov dword ptr [rbx + 0x80], 0x50", "nop"])) else { return };
    set_register(apic::TPR, 0x60);
    request(VECTOR);
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(VECTOR, 0));
    let exit = vm.run();
    handled("virtual interrupt: a lower VTPR lets it in", &vm, &exit, VECTOR, 11);
    let Some(mut vm) = start(name, l2!(["nop"])) else { return };
    set_register(apic::TPR, 0x60);
    request(VECTOR);
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(VECTOR, 0));
    to_end(name, &mut vm);
    equal("virtual interrupt: VPPR is VTPR", register(apic::PPR), 0x60);
    let Some(mut vm) = start(name, l2!(["mov cr8, rcx", "nop"])) else { return };
    set_register(apic::TPR, 0x60);
    request(VECTOR);
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(VECTOR, 0));
    let exit = vm.run();
    handled("virtual interrupt: MOV to CR8 lets it in", &vm, &exit, VECTOR, 4);
    let Some(mut vm) = start(name, l2!(["nop"])) else { return };
    request(VECTOR);
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(VECTOR, HIGHER));
    to_end("virtual interrupt: SVI holds a lower one", &mut vm);
    equal("virtual interrupt: VPPR is SVI's class", register(apic::PPR), u32::from(HIGHER) & 0xf0);
    let Some(mut vm) = start(name, l2!(["nop"])) else { return };
    request(VECTOR);
    request(HIGHER);
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(HIGHER, VECTOR - 0x20));
    let exit = vm.run();
    handled("virtual interrupt: the highest goes first", &vm, &exit, HIGHER, 0);
    equal("virtual interrupt: RVI is the next", vmread(f::GUEST_INTERRUPT_STATUS), status(VECTOR, HIGHER));
}

/// L2's handler writes EOI: here L1 sends L2 on from the handler to such code.
fn end_of_interrupt() {
    let name = "virtual EOI: the next interrupt follows";
    let Some(mut vm) = start(name, l2!(["mov dword ptr [rbx + 0xb0], 0", "nop"])) else { return };
    request(VECTOR);
    set_register(apic::ISR + 0x40, 1 << (HIGHER % 32));
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(VECTOR, HIGHER));
    let exit = vm.run();
    handled(name, &vm, &exit, VECTOR, 10);
    check!("virtual EOI: VISR is cleared", !is_set(apic::ISR, HIGHER), "set");
    equal("virtual EOI: RVI and SVI", vmread(f::GUEST_INTERRUPT_STATUS), status(0, VECTOR));
    let Some(mut vm) = start(name, l2!(["mov dword ptr [rbx + 0xb0], 0", "nop"])) else { return };
    for vector in [VECTOR, HIGHER] {
        set_register(apic::ISR + u32::from(vector / 32) * 16, 1 << (vector % 32));
    }
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(0, HIGHER));
    to_end("virtual EOI: nothing pending", &mut vm);
    equal("virtual EOI: SVI is the next in service", vmread(f::GUEST_INTERRUPT_STATUS), status(0, VECTOR));
    equal("virtual EOI: VPPR follows", register(apic::PPR), u32::from(VECTOR) & 0xf0);
}

fn eoi_exit() {
    let name = "virtual EOI: exits by the EOI-exit bitmap";
    let Some(mut vm) = start(name, l2!(["mov dword ptr [rbx + 0xb0], 0", "nop"])) else { return };
    set_register(apic::ISR + 0x40, 1 << (HIGHER % 32));
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(0, HIGHER));
    vmwrite(f::EOI_EXIT_BITMAP2, 1 << (HIGHER % 64));
    Want::exit(reason::VIRTUALIZED_EOI).qualification(HIGHER.into()).at(10).run(name, &mut vm);
    equal("virtual EOI: SVI is clear at the exit", vmread(f::GUEST_INTERRUPT_STATUS), 0);
    let Some(mut vm) = start(name, l2!(["mov dword ptr [rbx + 0xb0], 0", "nop"])) else { return };
    set_register(apic::ISR + 0x40, 1 << (HIGHER % 32));
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(0, HIGHER));
    vmwrite(f::EOI_EXIT_BITMAP2, !(1 << (HIGHER % 64)));
    to_end("virtual EOI: other bits do not exit", &mut vm);
}

/// A write of ICR that is a self-IPI is virtualized; others exit behind the write.
fn self_ipi() {
    let name = "virtual self-IPI";
    let Some(mut vm) = start(name, l2!(["mov [rbx + 0x300], eax", "nop"])) else { return };
    vm.regs.rax = u64::from(apic::TO_SELF) | u64::from(VECTOR);
    let exit = vm.run();
    handled(name, &vm, &exit, VECTOR, 6);
    equal("virtual self-IPI: SVI", vmread(f::GUEST_INTERRUPT_STATUS), status(0, VECTOR));
    let Some(mut vm) = start(name, l2!(["mov [rbx + 0x300], eax", "nop"])) else { return };
    vm.regs.rax = u64::from(apic::TO_OTHERS) | u64::from(VECTOR);
    let want = Want::exit(reason::APIC_WRITE).qualification(0x300).at(6);
    want.run("virtual IPI to others exits behind the write", &mut vm);
    let Some(mut vm) = start(name, l2!(["mov [rbx + 0x300], eax", "nop"])) else { return };
    vm.regs.rax = u64::from(apic::TO_SELF) | 5;
    want.run("virtual self-IPI of a vector below 16 exits", &mut vm);
    x2apic_self_ipi();
    check!(
        "virtual APIC: the access page is not written",
        mem::read::<u32>(ACCESS_PAGE + 0x300) == 0,
        "written"
    );
}

fn x2apic_self_ipi() {
    let name = "virtual self-IPI in x2APIC mode";
    let start = |msr: u64, value: u64| {
        let mut vm = start(name, l2!(["wrmsr", "nop"]))?;
        vm.unset(&[VIRTUALIZE_APIC_ACCESSES]);
        if !vm.set_or_skip(name, &[VIRTUALIZE_X2APIC, USE_MSR_BITMAPS]) {
            return None;
        }
        mem::fill(DESCRIPTOR, 0, PAGE);
        vmwrite(f::MSR_BITMAP, DESCRIPTOR);
        (vm.regs.rcx, vm.regs.rax) = (msr, value);
        Some(vm)
    };
    let Some(mut vm) = start(0x83f, VECTOR.into()) else { return };
    let exit = vm.run();
    handled(name, &vm, &exit, VECTOR, 2);
    let Some(mut vm) = start(0x80b, 0) else { return };
    set_register(apic::ISR + 0x40, 1 << (HIGHER % 32));
    vmwrite(f::GUEST_INTERRUPT_STATUS, status(0, HIGHER));
    to_end("virtual EOI in x2APIC mode", &mut vm);
    equal("virtual EOI in x2APIC mode: SVI", vmread(f::GUEST_INTERRUPT_STATUS), 0);
}

fn with_descriptor(name: &str, code: u64) -> Option<Vm> {
    let mut vm = start(name, code)?;
    if !vm.set_or_skip(name, &[ACKNOWLEDGE_INTERRUPT, POSTED_INTERRUPTS]) {
        return None;
    }
    mem::fill(DESCRIPTOR, 0, 64);
    vmwrite(f::POSTED_INTERRUPT_DESCRIPTOR, DESCRIPTOR);
    vmwrite(f::POSTED_INTERRUPT_VECTOR, NOTIFICATION.into());
    Some(vm)
}

fn post(vector: u8) {
    mem::write(DESCRIPTOR + u64::from(vector / 8), 1u8 << (vector % 8));
    mem::write(DESCRIPTOR + 32, 1u8);
}

fn posted() {
    let name = "posted interrupt: a pending notification delivers it";
    let Some(mut vm) = with_descriptor(name, l2!(["nop", "nop"])) else { return };
    post(VECTOR);
    apic::send_self(NOTIFICATION);
    let exit = vm.run();
    // At entry, or an instruction later: the SDM has delivery as a step of its own.
    let frame = handler::delivered(&exit);
    let right = frame.is_some_and(|frame| frame.vector == VECTOR.into() && frame.rip - vm.start <= 1);
    check!(name, right, "{exit}");
    equal("posted interrupt: the requests are cleared", mem::read::<u64>(DESCRIPTOR + 8), 0);
    equal("posted interrupt: the outstanding bit is cleared", mem::read::<u8>(DESCRIPTOR + 32) & 1, 0);
    check!(
        "posted interrupt: the notification is acknowledged",
        !apic::bit(apic::IRR, NOTIFICATION),
        "in the IRR"
    );
    check!("posted interrupt: and out of service", !apic::bit(apic::ISR, NOTIFICATION), "in the ISR");
    equal("posted interrupt: SVI", vmread(f::GUEST_INTERRUPT_STATUS), status(0, VECTOR));
    let Some(mut vm) = with_descriptor(name, l2!(["nop"])) else { return };
    post(VECTOR);
    apic::send_self(NOTIFICATION + 1);
    let event = event::EXTERNAL_INTERRUPT | u32::from(NOTIFICATION + 1);
    Want::exit(reason::EXTERNAL_INTERRUPT)
        .event(event)
        .run("posted interrupt: another vector exits", &mut vm);
    apic::end_of_interrupt();
    check!("posted interrupt: the request is still there", mem::read::<u64>(DESCRIPTOR + 8) != 0, "gone");
    let Some(mut vm) = with_descriptor(name, l2!(["nop"])) else { return };
    vmwrite(f::GUEST_RFLAGS, 2 | IF);
    set_register(apic::TPR, 0xf0);
    post(VECTOR);
    apic::send_self(NOTIFICATION);
    to_end("posted interrupt: VTPR holds it", &mut vm);
    equal("posted interrupt: RVI", vmread(f::GUEST_INTERRUPT_STATUS), status(VECTOR, 0));
    check!("posted interrupt: VIRR", is_set(apic::IRR, VECTOR), "clear");
}

/// The notification arrives while L2 runs: here L2 sends it through the real APIC.
fn posted_while_running() {
    let name = "posted interrupt: a notification while L2 runs";
    if apic::is_x2apic() {
        return;
    }
    let Some(mut vm) = with_descriptor(name, l2!(["mov [rdx], eax", "2:", "jmp 2b"])) else { return };
    post(VECTOR);
    vm.regs.rdx = apic::BASE + u64::from(apic::ICR);
    vm.regs.rax = u64::from(apic::TO_SELF | apic::ASSERT | apic::FIXED) | u64::from(NOTIFICATION);
    let exit = vm.run();
    handled(name, &vm, &exit, VECTOR, 2);
}
