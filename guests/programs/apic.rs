//! Interrupts: local APIC and its timer, x2APIC, priorities, NMI, I/O APIC, 8259 and 8254, HLT wake-up.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};
use rt::apic::{self, *};
use rt::cpu::{self, *};
use rt::report::{equal, faulted, ran};
use rt::trap::{self, Frame};
use rt::{check, pic, println, probe};

const LOW: u8 = 0x41;
const MIDDLE: u8 = 0x61;
const HIGH: u8 = 0x91;
const TIMER: u8 = 0x50;
const PIC_BASE: u8 = 0x30;
/// PC chipsets have the 8254 at this pin of the I/O APIC.
const PIT_PIN: u32 = 2;
/// How long an interrupt may take, in TSC ticks.
const PATIENCE: u64 = 10_000_000_000;

/// How often each of the vectors came, and in which order (a byte each, the last lowest).
static COUNT: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];
static ORDER: AtomicU64 = AtomicU64::new(0);
static SEEN_IN_SERVICE: AtomicU32 = AtomicU32::new(0);

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    for vector in [LOW, MIDDLE, HIGH, TIMER] {
        trap::on(vector, local);
    }
    trap::on(SPURIOUS_VECTOR, |_| note(SPURIOUS_VECTOR));
    apic::enable();
    println!("APIC version {:#x}, ID {}", apic::read(VERSION), apic::id());
    local_suite("xAPIC");
    dividers();
    virtual_wire();
    through_the_io_apic();
    error_status();
    software_disable();
    non_maskable();
    x2apic();
    base_register();
}

fn note(vector: u8) {
    COUNT[vector as usize].fetch_add(1, AcqRel);
    ORDER.store(ORDER.load(Relaxed) << 8 | u64::from(vector), Relaxed);
}

fn local(frame: &mut Frame) {
    let vector = frame.vector as u8;
    note(vector);
    SEEN_IN_SERVICE.store(u32::from(apic::bit(ISR, vector)), Relaxed);
    apic::end_of_interrupt();
}

fn count(vector: u8) -> u64 {
    COUNT[vector as usize].load(Acquire)
}

fn forget() {
    COUNT.iter().for_each(|count| count.store(0, Release));
    ORDER.store(0, Relaxed);
}

/// Opens interrupts until a vector came so often; what came instead.
fn wait_for(vector: u8, wanted: u64) -> u64 {
    let start = cpu::tsc();
    while count(vector) < wanted && cpu::tsc() - start < PATIENCE {
        cpu::sti_window();
    }
    count(vector)
}

/// Opens interrupts for a moment in which nothing may come.
fn open_for(ticks: u64) {
    let start = cpu::tsc();
    cpu::sti();
    while cpu::tsc() - start < ticks {
        core::hint::spin_loop();
    }
    cpu::cli();
}

/// What both modes of the local APIC have in common.
fn local_suite(mode: &str) {
    println!("{mode}:");
    self_interrupt();
    priorities();
    task_priority();
    timer_one_shot();
    timer_periodic();
    timer_deadline();
}

fn self_interrupt() {
    forget();
    apic::send_self(LOW);
    check!("an interrupt waits while IF is clear", apic::bit(IRR, LOW) && count(LOW) == 0, "IRR is clear");
    equal("self IPI", wait_for(LOW, 1), 1);
    equal("it was in service in its handler", SEEN_IN_SERVICE.load(Relaxed), 1);
    check!("it is gone after EOI", !apic::bit(ISR, LOW) && !apic::bit(IRR, LOW), "still set");
    apic::send_self(LOW);
    apic::send_self(LOW);
    wait_for(LOW, 2);
    open_for(1_000_000);
    equal("two of one vector before the handler are one", count(LOW), 2);
    apic::send(apic::id(), ASSERT | FIXED | u32::from(LOW));
    equal("IPI to the own ID", wait_for(LOW, 3), 3);
    // HLT with the interrupt pending: STI's shadow lets HLT run first, then the interrupt ends it.
    apic::send_self(LOW);
    cpu::sti_hlt();
    equal("STI; HLT is woken", count(LOW), 4);
}

fn priorities() {
    forget();
    for vector in [LOW, HIGH, MIDDLE] {
        apic::send_self(vector);
    }
    open_for(1_000_000);
    equal("pending interrupts come by priority", ORDER.load(Relaxed), 0x91_6141);
}

fn task_priority() {
    forget();
    cpu::set_cr8(6);
    equal("CR8 is the upper half of TPR", apic::read(TPR), 0x60);
    apic::send_self(MIDDLE);
    apic::send_self(HIGH);
    open_for(1_000_000);
    equal("TPR lets a higher class through alone", ORDER.load(Relaxed), u64::from(HIGH));
    equal("PPR follows TPR", apic::read(PPR) & 0xf0, 0x60);
    cpu::set_cr8(5);
    open_for(1_000_000);
    equal("a lower TPR lets the waiting one through", ORDER.load(Relaxed), 0x9161);
    apic::write(TPR, 0x30);
    equal("TPR shows in CR8", cpu::cr8(), 3);
    cpu::set_cr8(0);
}

fn timer_one_shot() {
    forget();
    apic::write(TIMER_DIVIDE, 0xb);
    apic::write(LVT_TIMER, u32::from(TIMER));
    apic::write(TIMER_INITIAL, 0xffff_ffff);
    let first = apic::read(TIMER_CURRENT);
    let start = cpu::tsc();
    while cpu::tsc() - start < 1_000_000 {}
    let second = apic::read(TIMER_CURRENT);
    check!("the timer counts down", second < first, "{first:#x} then {second:#x}");
    apic::write(TIMER_INITIAL, 0);
    equal("an initial count of zero stops it", apic::read(TIMER_CURRENT), 0);
    apic::write(TIMER_INITIAL, 100_000);
    equal("one-shot timer", wait_for(TIMER, 1), 1);
    open_for(5_000_000);
    equal("one-shot fires once", count(TIMER), 1);
    equal("its count stays at zero", apic::read(TIMER_CURRENT), 0);
    apic::write(LVT_TIMER, MASKED | u32::from(TIMER));
    apic::write(TIMER_INITIAL, 1000);
    open_for(5_000_000);
    equal("a masked timer is quiet", count(TIMER), 1);
    apic::write(LVT_TIMER, u32::from(TIMER));
    apic::write(TIMER_INITIAL, 200_000);
    cpu::sti_hlt();
    equal("the timer ends HLT", count(TIMER), 2);
}

fn timer_periodic() {
    forget();
    apic::write(LVT_TIMER, PERIODIC | u32::from(TIMER));
    apic::write(TIMER_INITIAL, 200_000);
    for _ in 0..5 {
        cpu::sti_hlt();
    }
    // On a busy host the next one may be due before the last HLT's CLI.
    check!("periodic timer, five times from HLT", count(TIMER) >= 5, "{}", count(TIMER));
    apic::write(TIMER_INITIAL, 0);
    open_for(10_000_000);
    let stopped = count(TIMER);
    open_for(5_000_000);
    equal("it stops", count(TIMER), stopped);
    apic::write(LVT_TIMER, MASKED);
}

fn timer_deadline() {
    if !cpu::TSC_DEADLINE.or_skip("TSC deadline") {
        return;
    }
    forget();
    apic::write(LVT_TIMER, apic::TSC_DEADLINE | u32::from(TIMER));
    apic::write(TIMER_INITIAL, 1000);
    equal("TSC deadline: the initial count is ignored", apic::read(TIMER_CURRENT), 0);
    // Far enough that a busy host gets to the next line before.
    let deadline = cpu::tsc() + 30_000_000;
    wrmsr(MSR_TSC_DEADLINE, deadline);
    equal("TSC deadline: the MSR holds it", rdmsr(MSR_TSC_DEADLINE), deadline);
    cpu::sti_hlt();
    let now = cpu::tsc();
    equal("TSC deadline: fires and ends HLT", count(TIMER), 1);
    check!("TSC deadline: not early", now >= deadline, "{} ticks early", deadline - now);
    equal("TSC deadline: the MSR is zero afterwards", rdmsr(MSR_TSC_DEADLINE), 0);
    wrmsr(MSR_TSC_DEADLINE, 1);
    equal("TSC deadline: one in the past fires at once", wait_for(TIMER, 2), 2);
    wrmsr(MSR_TSC_DEADLINE, cpu::tsc() + 30_000_000);
    wrmsr(MSR_TSC_DEADLINE, 0);
    open_for(35_000_000);
    equal("TSC deadline: zero disarms", count(TIMER), 2);
    apic::write(LVT_TIMER, MASKED);
    wrmsr(MSR_TSC_DEADLINE, cpu::tsc() + 1000);
    equal("TSC deadline: the MSR is zero in other modes", rdmsr(MSR_TSC_DEADLINE), 0);
}

/// A larger divider counts slower: compare what two of them count in the same time.
fn dividers() {
    apic::write(LVT_TIMER, MASKED | u32::from(TIMER));
    let counted = |divide: u32| {
        apic::write(TIMER_DIVIDE, divide);
        apic::write(TIMER_INITIAL, 0xffff_ffff);
        let start = cpu::tsc();
        while cpu::tsc() - start < 20_000_000 {}
        let count = 0xffff_ffff - apic::read(TIMER_CURRENT);
        // A busy host may have stretched the wait: the rate is what counts.
        let waited = cpu::tsc() - start;
        apic::write(TIMER_INITIAL, 0);
        u64::from(count) * 20_000_000 / waited
    };
    let by_1 = counted(0b1011);
    let by_16 = counted(0b0011);
    let ratio = by_1 * 10 / by_16.max(1);
    check!("divide by 16 is 16 times slower", (80..320).contains(&ratio), "{by_1} and {by_16} counts");
    apic::write(TIMER_DIVIDE, 0b1011);
}

fn virtual_wire() {
    forget();
    trap::on(PIC_BASE, |_| {
        note(PIC_BASE);
        pic::end_of_interrupt();
    });
    trap::on(PIC_BASE + 7, |_| note(PIC_BASE + 7));
    pic::init(PIC_BASE);
    pic::set_mask(0xfffe);
    apic::write(LVT_LINT0, EXTINT);
    pic::start_pit(0, 2000);
    cpu::sti_hlt();
    equal("8254 through 8259 and LINT0 ends HLT", count(PIC_BASE), 1);
    equal("8259: nothing in service after EOI", pic::in_service(), 0);
    pic::start_pit(2, 3000);
    equal("8254 in mode 2 repeats", wait_for(PIC_BASE, 4).min(4), 4);
    pic::set_mask(0xffff);
    open_for(3_000_000);
    let masked = count(PIC_BASE);
    open_for(10_000_000);
    equal("8259 mask", count(PIC_BASE), masked);
    apic::write(LVT_LINT0, MASKED | EXTINT);
    pic::set_mask(0xfffe);
    open_for(10_000_000);
    equal("LINT0 mask", count(PIC_BASE), masked);
    pic::set_mask(0xffff);
    let first = pic::pit_count();
    let start = cpu::tsc();
    while pic::pit_count() == first && cpu::tsc() - start < PATIENCE {}
    check!("the 8254 counts", pic::pit_count() != first, "stays at {first}");
}

fn through_the_io_apic() {
    forget();
    check!("I/O APIC version", pic::ioapic_read(1) & 0xff >= 0x11, "{:#x}", pic::ioapic_read(1));
    check!("I/O APIC has 24 pins", pic::ioapic_read(1) >> 16 & 0xff >= 0x17, "{:#x}", pic::ioapic_read(1));
    pic::ioapic_route(PIT_PIN, u32::from(MIDDLE), apic::id());
    equal("an entry reads back", pic::ioapic_read(0x10 + PIT_PIN * 2) & 0x1_00ff, u32::from(MIDDLE));
    pic::start_pit(2, 3000);
    cpu::sti_hlt();
    // Where the host was busy, the next tick has come before the first was handled.
    check!("8254 through the I/O APIC ends HLT", count(MIDDLE) >= 1, "{}", count(MIDDLE));
    equal("it repeats, edge by edge", wait_for(MIDDLE, 4).min(4), 4);
    pic::ioapic_route(PIT_PIN, MASKED | u32::from(MIDDLE), apic::id());
    open_for(3_000_000);
    let masked = count(MIDDLE);
    open_for(10_000_000);
    equal("I/O APIC mask", count(MIDDLE), masked);
    // Logical destination: the flat model's bit 0.
    apic::write(DFR, 0xffff_ffff);
    apic::write(LDR, 1 << 24);
    pic::ioapic_route(PIT_PIN, LOGICAL | u32::from(LOW), 1);
    equal("logical destination", wait_for(LOW, 2).min(2), 2);
    pic::ioapic_route(PIT_PIN, MASKED, 0);
    // The counter stops when a mode 0 count is given and never loaded fully; one last tick is masked.
    pic::start_pit(0, 1);
}

fn error_status() {
    apic::write(ERROR_STATUS, 0);
    apic::write(ERROR_STATUS, 0);
    equal("no error to begin with", apic::read(ERROR_STATUS), 0);
    apic::send_self(8);
    apic::write(ERROR_STATUS, 0);
    let status = apic::read(ERROR_STATUS);
    check!("a vector below 16 is an error", status & 0x60 != 0, "ESR {status:#x}");
    apic::write(ERROR_STATUS, 0);
}

fn software_disable() {
    forget();
    apic::write(LVT_TIMER, u32::from(TIMER));
    apic::write(SPURIOUS, u32::from(SPURIOUS_VECTOR));
    equal("software disable masks the LVT", apic::read(LVT_TIMER) & MASKED, MASKED);
    apic::write(LVT_TIMER, u32::from(TIMER));
    equal("an LVT cannot be unmasked then", apic::read(LVT_TIMER) & MASKED, MASKED);
    apic::enable();
}

static DEPTH: AtomicU64 = AtomicU64::new(0);
static DEEPEST: AtomicU64 = AtomicU64::new(0);

fn non_maskable() {
    forget();
    trap::on(trap::NMI, |_| {
        let depth = DEPTH.fetch_add(1, AcqRel) + 1;
        DEEPEST.fetch_max(depth, AcqRel);
        COUNT[2].fetch_add(1, AcqRel);
        if count(2) == 1 {
            // Another one, which has to wait for the IRET of this one.
            apic::send(apic::id(), ASSERT | apic::NMI);
        }
        DEPTH.fetch_sub(1, AcqRel);
    });
    apic::send(apic::id(), ASSERT | apic::NMI);
    let start = cpu::tsc();
    while count(2) < 2 && cpu::tsc() - start < PATIENCE {}
    equal("NMI with IF clear, and one more in its handler", count(2), 2);
    equal("an NMI waits for the IRET of another", DEEPEST.load(Acquire), 1);
    trap::off(trap::NMI);
}

fn x2apic() {
    if !X2APIC.or_skip("x2APIC") {
        return;
    }
    let id = apic::id();
    let base = rdmsr(MSR_APIC_BASE);
    let before = probe!(["rdmsr"], in("ecx") 0x802, out("eax") _, out("edx") _);
    faulted("x2APIC registers in xAPIC mode", &before, trap::GP, 0, 0);
    wrmsr(MSR_APIC_BASE, base | X2APIC_ENABLE);
    check!("x2APIC is on", apic::is_x2apic(), "APIC base {:#x}", rdmsr(MSR_APIC_BASE));
    equal("x2APIC ID", apic::id(), id);
    equal("x2APIC logical ID", apic::read(LDR), id >> 4 << 16 | 1 << (id & 15));
    equal("the spurious vector register stays", apic::read(SPURIOUS), 0x100 | u32::from(SPURIOUS_VECTOR));
    local_suite("x2APIC");
    forget();
    wrmsr(0x83f, LOW.into());
    equal("x2APIC self IPI register", wait_for(LOW, 1), 1);
    let read = |msr: u32| probe!(["rdmsr"], in("ecx") msr, out("eax") _, out("edx") _);
    let write = |msr: u32, value: u64| probe!(["wrmsr"], in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32);
    faulted("x2APIC: DFR does not exist", &read(apic::msr(DFR)), trap::GP, 0, 0);
    faulted("x2APIC: ICR has no second half", &read(apic::msr(ICR_HIGH)), trap::GP, 0, 0);
    faulted("x2APIC: the self IPI register is write-only", &read(0x83f), trap::GP, 0, 0);
    faulted("x2APIC: the ID is read-only", &write(apic::msr(ID), 0), trap::GP, 0, 0);
    faulted("x2APIC: EOI takes zero alone", &write(apic::msr(EOI), 1), trap::GP, 0, 0);
    faulted("x2APIC: reserved bits of TPR", &write(apic::msr(TPR), 0x100), trap::GP, 0, 0);
    faulted("x2APIC: back to xAPIC in one step", &write(MSR_APIC_BASE, base), trap::GP, 0, 0);
    ran("x2APIC: off", &write(MSR_APIC_BASE, base & !ENABLE));
    faulted("EXTD without EN", &write(MSR_APIC_BASE, (base | X2APIC_ENABLE) & !ENABLE), trap::GP, 0, 0);
    equal("CPUID shows no APIC while it is off", cpuid(1, 0).edx >> 9 & 1, 0);
    wrmsr(MSR_APIC_BASE, base);
    equal("xAPIC again: ID", apic::id(), id);
    apic::enable();
    self_interrupt();
}

fn base_register() {
    let base = rdmsr(MSR_APIC_BASE);
    equal("APIC base address", base & 0xffff_f000, BASE);
    check!("the boot CPU is marked", base & BSP != 0, "{base:#x}");
    equal("the APIC is enabled", base & ENABLE, ENABLE);
}
