//! Starting the other CPUs and giving them work.
//!
//! All of them are woken by one broadcast; whoever arrives gets the next number. A CPU waits for work in HLT, so a
//! lost wake-up shows as a hang and not as a slow pass.

use crate::apic;
use crate::cpu::{cli, sti_hlt, tsc};
use crate::mem;
use crate::tables::{self, MAX_CPUS, Shared};
use crate::trap;
use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Where the start-up code lies: SIPI vector 8.
const TRAMPOLINE: u64 = 0x8000;
/// The vector that wakes a CPU for work.
pub const WAKE_VECTOR: u8 = 0xf0;
const STACK: usize = 16 * 1024;
/// How long the last CPU may take to arrive, in TSC ticks: some tenths of a second.
const ARRIVAL: u64 = 600_000_000;

type Work = fn(usize);

#[unsafe(no_mangle)]
static AP_STACKS: Shared<[[u8; STACK]; MAX_CPUS]> = Shared::new([[0; STACK]; MAX_CPUS]);
/// Numbers given out, by the start-up code.
#[unsafe(no_mangle)]
static AP_COUNT: AtomicU32 = AtomicU32::new(0);
/// CPUs that wait for work.
static READY: AtomicUsize = AtomicUsize::new(0);
static APIC_IDS: [AtomicU32; MAX_CPUS] = [const { AtomicU32::new(0) }; MAX_CPUS];
static WORK: [AtomicUsize; MAX_CPUS] = [const { AtomicUsize::new(0) }; MAX_CPUS];

/// Starts all other CPUs and returns the number of CPUs. Call once, with the APIC enabled.
pub fn start() -> usize {
    mem::copy(TRAMPOLINE, crate::code!(ap_start, ap_end));
    APIC_IDS[0].store(apic::id(), Ordering::Relaxed);
    trap::on(WAKE_VECTOR, |_| apic::end_of_interrupt());
    apic::send(0, apic::TO_OTHERS | apic::ASSERT | apic::INIT);
    delay(30_000_000);
    for _ in 0..2 {
        apic::send(0, apic::TO_OTHERS | apic::ASSERT | apic::STARTUP | (TRAMPOLINE >> 12) as u32);
        delay(1_000_000);
    }
    let mut seen = 0;
    let mut since = tsc();
    while tsc() - since < ARRIVAL {
        let now = READY.load(Ordering::Acquire);
        if now != seen {
            seen = now;
            since = tsc();
        }
        core::hint::spin_loop();
    }
    seen + 1
}

fn delay(ticks: u64) {
    let start = tsc();
    while tsc() - start < ticks {
        core::hint::spin_loop();
    }
}

/// Starts a CPU that was sent INIT once more, under its old number; false if it does not come.
pub fn restart(cpu: usize) -> bool {
    let before = READY.load(Ordering::Acquire);
    AP_COUNT.store(cpu as u32 - 1, Ordering::Release);
    apic::send(apic_id(cpu), apic::ASSERT | apic::STARTUP | (TRAMPOLINE >> 12) as u32);
    let start = tsc();
    while READY.load(Ordering::Acquire) == before {
        if tsc() - start > 10 * ARRIVAL {
            return false;
        }
        core::hint::spin_loop();
    }
    run_on(cpu, |_| {});
    true
}

/// Runs `work` on one CPU and waits for it.
pub fn run_on(cpu: usize, work: Work) {
    begin(cpu, work);
    wait(cpu);
}

/// The APIC ID of a CPU.
pub fn apic_id(cpu: usize) -> u32 {
    APIC_IDS[cpu].load(Ordering::Relaxed)
}

/// Runs `work` on CPUs 0 to `count - 1`, here on 0, and waits until all are done.
pub fn run(count: usize, work: Work) {
    for cpu in 1..count {
        begin(cpu, work);
    }
    work(0);
    for cpu in 1..count {
        wait(cpu);
    }
}

/// Gives a CPU work.
pub fn begin(cpu: usize, work: Work) {
    WORK[cpu].store(work as usize, Ordering::Release);
    apic::send(apic_id(cpu), apic::ASSERT | apic::FIXED | u32::from(WAKE_VECTOR));
}

/// Waits until a CPU is done.
pub fn wait(cpu: usize) {
    while WORK[cpu].load(Ordering::Acquire) != 0 {
        core::hint::spin_loop();
    }
}

#[unsafe(no_mangle)]
extern "C" fn smp_main(cpu: usize) -> ! {
    tables::load(cpu);
    trap::load_idt();
    crate::cpu::enable_nx();
    apic::enable();
    APIC_IDS[cpu].store(apic::id(), Ordering::Relaxed);
    READY.fetch_add(1, Ordering::Release);
    loop {
        cli();
        let work = WORK[cpu].load(Ordering::Acquire);
        if work == 0 {
            sti_hlt();
            continue;
        }
        // SAFETY: only `begin` stores here, and it stores a `Work`.
        let work: Work = unsafe { core::mem::transmute::<usize, Work>(work) };
        work(cpu);
        WORK[cpu].store(0, Ordering::Release);
    }
}

global_asm!(
    r#"
    .section .text.ap, "ax"
    .code16
    .globl ap_start, ap_end
ap_start:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl ap_gdt - ap_start
    movl %cr0, %eax
    andl $0x9fffffff, %eax      # caches on
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x18, $ap_32
    .balign 8
ap_gdt:
    .word 64 * 8 - 1
    .long GDT
ap_end:

    .code32
ap_32:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $1, %eax
    lock xaddl %eax, AP_COUNT
    cmpl $7, %eax               # one stack for each but the boot CPU
    jae 1f
    incl %eax
    movl %eax, %ebx
    shll $14, %ebx
    leal AP_STACKS + 0x4000(%ebx), %esp
    jmp enter_long_mode
1:  hlt
    jmp 1b
    .code64
    .text
    "#,
    options(att_syntax)
);
