//! Several CPUs: start-up, locked instructions, memory order, TLB shootdown, cross-modifying code.
#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};
use rt::mem::{self, FREE, PAGE};
use rt::paging::{self, A, D, P, W};
use rt::report::{equal, skip};
use rt::{apic, check, cpu, println, smp, trap};

static CPUS: AtomicUsize = AtomicUsize::new(1);

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    apic::enable();
    let cpus = smp::start();
    CPUS.store(cpus, Relaxed);
    println!("{cpus} CPUs");
    identities(cpus);
    if cpus == 1 {
        return skip("everything about several CPUs", "second CPU");
    }
    locked_counters(cpus);
    spin_lock(cpus);
    split_locks(cpus);
    message_passing();
    coherence();
    store_buffering();
    shootdown(cpus);
    cross_modifying(cpus);
    page_table_bits();
    non_maskable(cpus);
    broadcast(cpus);
    halted_cpu_restarts(cpus);
}

fn identities(cpus: usize) {
    let mut distinct = true;
    for a in 0..cpus {
        for b in 0..a {
            distinct &= smp::apic_id(a) != smp::apic_id(b);
        }
    }
    check!("every CPU has an APIC ID of its own", distinct, "IDs repeat");
    let bsp = cpu::rdmsr(cpu::MSR_APIC_BASE) & apic::BSP;
    equal("the boot CPU says it is", bsp, apic::BSP);
    let id = rt::cpu::cpuid(1, 0).ebx >> 24;
    equal("CPUID and APIC agree on the ID", id, apic::id() & 0xff);
}

/// All CPUs wait here for each other.
struct Barrier {
    arrived: AtomicU32,
    round: AtomicU32,
}

static BARRIER: Barrier = Barrier { arrived: AtomicU32::new(0), round: AtomicU32::new(0) };

impl Barrier {
    fn wait(&self, parties: u32) {
        let round = self.round.load(Acquire);
        if self.arrived.fetch_add(1, AcqRel) + 1 == parties {
            self.arrived.store(0, Relaxed);
            self.round.store(round.wrapping_add(1), Release);
            return;
        }
        while self.round.load(Acquire) == round {
            core::hint::spin_loop();
        }
    }
}

const ROUNDS: u64 = 5_000;

static XADD: AtomicU64 = AtomicU64::new(0);
static XADD_SEEN: AtomicU64 = AtomicU64::new(0);
static INC: AtomicU64 = AtomicU64::new(0);
static CMPXCHG: AtomicU64 = AtomicU64::new(0);
#[repr(align(16))]
struct Wide(#[allow(dead_code)] [AtomicU64; 2]);
static WIDE: Wide = Wide([AtomicU64::new(0), AtomicU64::new(0)]);
static EIGHT: AtomicU64 = AtomicU64::new(0);
static BITS: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];

fn locked_counters(cpus: usize) {
    smp::run(cpus, |_| {
        BARRIER.wait(CPUS.load(Relaxed) as u32);
        let mut sum = 0u64;
        for _ in 0..ROUNDS {
            sum = sum.wrapping_add(XADD.fetch_add(1, Relaxed));
            INC.fetch_add(2, Relaxed);
            CMPXCHG.fetch_update(Relaxed, Relaxed, |v| Some(v + 3)).ok();
        }
        XADD_SEEN.fetch_add(sum, Relaxed);
    });
    let total = cpus as u64 * ROUNDS;
    equal("LOCK XADD loses nothing", XADD.load(Relaxed), total);
    equal("LOCK XADD gives every value once", XADD_SEEN.load(Relaxed), total * (total - 1) / 2);
    equal("LOCK ADD loses nothing", INC.load(Relaxed), 2 * total);
    equal("LOCK CMPXCHG loses nothing", CMPXCHG.load(Relaxed), 3 * total);

    smp::run(cpus, |_| {
        for _ in 0..ROUNDS / 4 {
            increment_wide();
            increment_eight();
        }
    });
    let total = cpus as u64 * (ROUNDS / 4);
    equal("LOCK CMPXCHG16B loses nothing, low", WIDE.0[0].load(Relaxed), total);
    equal("LOCK CMPXCHG16B loses nothing, high", WIDE.0[1].load(Relaxed), total.wrapping_mul(3));
    equal("LOCK CMPXCHG8B loses nothing", EIGHT.load(Relaxed), total * 0x1_0000_0001);

    smp::run(cpus, |cpu| {
        for bit in (cpu as u64..512).step_by(CPUS.load(Relaxed)) {
            // SAFETY: the bit lies in the array.
            unsafe { asm!("lock bts [{p}], {b}", p = in(reg) &BITS, b = in(reg) bit) };
        }
    });
    check!(
        "LOCK BTS loses no bit",
        BITS.iter().all(|word| word.load(Relaxed) == u64::MAX),
        "bits are missing"
    );
}

/// Adds 1 to the low and 3 to the high half.
fn increment_wide() {
    // SAFETY: RBX, which the compiler keeps for itself, is saved around its use.
    unsafe {
        asm!(
            "push rbx", "mov rax, [{p}]", "mov rdx, [{p} + 8]",
            "2:", "lea rbx, [rax + 1]", "lea rcx, [rdx + 3]", "lock cmpxchg16b [{p}]", "jnz 2b", "pop rbx",
            p = in(reg) &WIDE, out("rax") _, out("rcx") _, out("rdx") _
        );
    }
}

/// Adds 1 to both halves.
fn increment_eight() {
    // SAFETY: as above.
    unsafe {
        asm!(
            "push rbx", "mov eax, [{p}]", "mov edx, [{p} + 4]",
            "2:", "lea ebx, [rax + 1]", "lea ecx, [rdx + 1]", "lock cmpxchg8b [{p}]", "jnz 2b", "pop rbx",
            p = in(reg) &EIGHT, out("rax") _, out("rcx") _, out("rdx") _
        );
    }
}

static LOCK: AtomicBool = AtomicBool::new(false);

fn spin_lock(cpus: usize) {
    mem::write(FREE, 0u64);
    smp::run(cpus, |_| {
        for _ in 0..ROUNDS / 4 {
            while LOCK.swap(true, Acquire) {
                core::hint::spin_loop();
            }
            let value: u64 = mem::read(FREE);
            mem::write(FREE, value + 1);
            LOCK.store(false, Release);
        }
    });
    equal("a spin lock by XCHG excludes", mem::read::<u64>(FREE), cpus as u64 * (ROUNDS / 4));
}

/// Locked operations over a cache line and over a page.
fn split_locks(cpus: usize) {
    const LINE: u64 = FREE + 64 - 3;
    const OVER_PAGE: u64 = FREE + PAGE - 3;
    mem::write(LINE, 0u64);
    mem::write(OVER_PAGE, 0u64);
    smp::run(cpus, |_| {
        for _ in 0..500 {
            // SAFETY: both lie in free RAM.
            unsafe {
                asm!("lock add qword ptr [{}], 1", in(reg) LINE);
                asm!("lock xadd [{}], {}", in(reg) OVER_PAGE, inout(reg) 1u64 => _);
            }
        }
    });
    equal("a locked operation over a cache line", mem::read::<u64>(LINE), cpus as u64 * 500);
    equal("a locked operation over a page", mem::read::<u64>(OVER_PAGE), cpus as u64 * 500);
}

static BAD: AtomicU64 = AtomicU64::new(0);
static DATA: AtomicU64 = AtomicU64::new(0);
/// On a cache line apart from `DATA`.
#[repr(align(64))]
struct Line(AtomicU64);
static FLAG: Line = Line(AtomicU64::new(0));

/// Plain stores and loads, as the machine does them; the compiler may not reorder volatile accesses.
fn load(at: &AtomicU64) -> u64 {
    mem::read(at as *const AtomicU64 as u64)
}

fn store(at: &AtomicU64, value: u64) {
    mem::write(at as *const AtomicU64 as u64, value);
}

/// Stores become visible in order, loads happen in order (SDM, "Memory Ordering", examples 8-1 and 8-2).
fn message_passing() {
    const MESSAGES: u64 = 20_000;
    smp::run(2, |cpu| {
        BARRIER.wait(2);
        if cpu == 0 {
            for i in 1..=MESSAGES {
                store(&DATA, i);
                store(&FLAG.0, i);
            }
            return;
        }
        loop {
            let flag = load(&FLAG.0);
            if load(&DATA) < flag {
                BAD.fetch_add(1, Relaxed);
            }
            if flag == MESSAGES {
                break;
            }
        }
    });
    equal("message passing is never seen out of order", BAD.swap(0, Relaxed), 0);
}

/// One location never goes back.
fn coherence() {
    store(&DATA, 0);
    smp::run(2, |cpu| {
        BARRIER.wait(2);
        let mut last = 0;
        while last < 20_000 {
            if cpu == 0 {
                last += 1;
                store(&DATA, last);
            } else {
                let value = load(&DATA);
                if value < last {
                    BAD.fetch_add(1, Relaxed);
                }
                last = value;
            }
        }
    });
    equal("a location never goes back", BAD.swap(0, Relaxed), 0);
}

static X: Line = Line(AtomicU64::new(0));
static Y: Line = Line(AtomicU64::new(0));
static READ: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
static FENCE: AtomicU64 = AtomicU64::new(0);
static BOTH_OLD: AtomicU64 = AtomicU64::new(0);

/// Each CPU stores to one location and loads the other. Both loads may see the old value, but not with a fence.
fn store_buffering() {
    for (fence, name) in ["", "MFENCE between store and load", "a locked instruction between store and load"]
        .iter()
        .enumerate()
    {
        FENCE.store(fence as u64, Relaxed);
        BOTH_OLD.store(0, Relaxed);
        smp::run(2, store_buffering_rounds);
        let seen = BOTH_OLD.load(Relaxed);
        if fence == 0 {
            println!("store buffering seen {seen} times (allowed)");
        } else {
            equal(name, seen, 0);
        }
    }
}

fn store_buffering_rounds(cpu: usize) {
    let (mine, other) = if cpu == 0 { (&X.0, &Y.0) } else { (&Y.0, &X.0) };
    let fence = FENCE.load(Relaxed);
    for round in 1..=500 {
        BARRIER.wait(2);
        store(mine, round);
        // SAFETY: both touch nothing but the order of memory.
        match fence {
            1 => unsafe { asm!("mfence") },
            2 => unsafe { asm!("lock or dword ptr [rsp], 0") },
            _ => {}
        }
        READ[cpu].store(load(other), Relaxed);
        BARRIER.wait(2);
        if cpu == 0 && READ.iter().all(|value| value.load(Relaxed) != round) {
            BOTH_OLD.fetch_add(1, Relaxed);
        }
    }
}

const VA: u64 = 0x80_0000_0000;
const SHOOT_VECTOR: u8 = 0xf1;
static ACKS: AtomicU64 = AtomicU64::new(0);
static PHASE: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

/// Interrupts the other CPUs and waits until every handler has run.
fn interrupt_others(cpus: usize) {
    ACKS.store(0, Release);
    apic::send(0, apic::TO_OTHERS | apic::ASSERT | apic::FIXED | u32::from(SHOOT_VECTOR));
    while ACKS.load(Acquire) != cpus as u64 - 1 {
        core::hint::spin_loop();
    }
}

/// Starts `work` on the others with interrupts on, lets `round` run here, and stops them.
fn against_others(cpus: usize, work: fn(usize), rounds: u64, round: impl Fn(u64)) {
    PHASE.store(0, Release);
    STOP.store(false, Release);
    for cpu in 1..cpus {
        smp::begin(cpu, work);
    }
    for i in 1..=rounds {
        round(i);
        interrupt_others(cpus);
        PHASE.store(i, Release);
    }
    STOP.store(true, Release);
    (1..cpus).for_each(smp::wait);
}

/// The page under `VA` holds the number of its round. Who has acknowledged a round may not see an older page.
fn shootdown(cpus: usize) {
    trap::on(SHOOT_VECTOR, |_| {
        cpu::invlpg(VA);
        ACKS.fetch_add(1, AcqRel);
        apic::end_of_interrupt();
    });
    let frames = mem::frames(64);
    mem::write(frames, 0u64);
    paging::set_pte(VA, frames | P | W);
    let pte = paging::entry_at(VA, 1);
    let work = |_| {
        cpu::sti();
        while !STOP.load(Acquire) {
            let phase = PHASE.load(Acquire);
            if mem::read::<u64>(VA) < phase {
                BAD.fetch_add(1, Relaxed);
            }
        }
        cpu::cli();
    };
    against_others(cpus, work, 200, |i| {
        let frame = frames + i % 64 * PAGE;
        mem::write(frame, i);
        mem::write(pte, frame | P | W);
    });
    equal("no CPU uses a page after the shootdown", BAD.swap(0, Relaxed), 0);
}

/// Code changes under a running CPU, which serializes in the interrupt (SDM, "Cross-Modifying Code").
fn cross_modifying(cpus: usize) {
    trap::on(SHOOT_VECTOR, |_| {
        cpu::cpuid(0, 0);
        ACKS.fetch_add(1, AcqRel);
        apic::end_of_interrupt();
    });
    const CODE: u64 = FREE + 8 * PAGE;
    // mov eax, 0; ret
    mem::copy(CODE, &[0xb8, 0, 0, 0, 0, 0xc3]);
    let work = |_| {
        cpu::sti();
        while !STOP.load(Acquire) {
            let phase = PHASE.load(Acquire);
            let value: u64;
            // SAFETY: the code returns and changes RAX alone.
            unsafe { asm!("call {}", in(reg) CODE, out("rax") value) };
            if value < phase {
                BAD.fetch_add(1, Relaxed);
            }
        }
        cpu::cli();
    };
    against_others(cpus, work, 200, |i| mem::write(CODE + 1, i as u32));
    equal("no CPU runs old code after it serialized", BAD.swap(0, Relaxed), 0);
}

/// The processor sets A and D with a locked operation: a bit that software sets at the same time stays.
fn page_table_bits() {
    let frame = mem::frame();
    paging::set_pte(VA, frame | P | W);
    smp::run(2, |cpu_number| {
        let pte = paging::entry_at(VA, 1);
        for _ in 0..300 {
            BARRIER.wait(2);
            if cpu_number == 0 {
                // SAFETY: sets an ignored bit of the entry.
                unsafe { asm!("lock or qword ptr [{}], 0x200", in(reg) pte) };
            } else {
                cpu::invlpg(VA);
                mem::write(VA, 1u8);
            }
            BARRIER.wait(2);
            if cpu_number == 0 {
                let entry: u64 = mem::read(pte);
                if entry & (0x200 | A | D) != 0x200 | A | D {
                    BAD.fetch_add(1, Relaxed);
                }
                mem::write(pte, entry & !(0x200 | A | D));
            }
        }
    });
    equal("A and D updates lose no bit of the entry", BAD.swap(0, Relaxed), 0);
}

static COUNT: AtomicU64 = AtomicU64::new(0);

fn wait_for(counter: &AtomicU64, wanted: u64) -> u64 {
    let start = cpu::tsc();
    while counter.load(Acquire) < wanted && cpu::tsc() - start < 10_000_000_000 {
        core::hint::spin_loop();
    }
    counter.load(Acquire)
}

fn non_maskable(cpus: usize) {
    trap::on(trap::NMI, |_| {
        COUNT.fetch_add(1, AcqRel);
    });
    for cpu in 1..cpus {
        apic::send(smp::apic_id(cpu), apic::ASSERT | apic::NMI);
        wait_for(&COUNT, cpu as u64);
    }
    equal("an NMI reaches each halted CPU once", COUNT.swap(0, AcqRel), cpus as u64 - 1);
    // With interrupts off in a loop.
    STOP.store(false, Release);
    for cpu in 1..cpus {
        smp::begin(cpu, |_| {
            while !STOP.load(Acquire) {
                core::hint::spin_loop();
            }
        });
    }
    apic::send(0, apic::TO_OTHERS | apic::ASSERT | apic::NMI);
    let count = wait_for(&COUNT, cpus as u64 - 1);
    STOP.store(true, Release);
    (1..cpus).for_each(smp::wait);
    equal("an NMI interrupts CPUs with IF clear", count, cpus as u64 - 1);
    COUNT.store(0, Release);
}

fn broadcast(cpus: usize) {
    trap::on(SHOOT_VECTOR, |_| {
        COUNT.fetch_add(1, AcqRel);
        apic::end_of_interrupt();
    });
    apic::send(0, apic::TO_ALL | apic::ASSERT | apic::FIXED | u32::from(SHOOT_VECTOR));
    wait_for(&COUNT, cpus as u64 - 1);
    cpu::sti();
    let count = wait_for(&COUNT, cpus as u64);
    cpu::cli();
    equal("a broadcast reaches all with the sender", count, cpus as u64);
    COUNT.store(0, Release);
    // Logical destination, flat model: a bit for each CPU.
    for cpu in 1..cpus {
        smp::begin(cpu, |cpu| apic::write(apic::LDR, 1 << (24 + cpu)));
        smp::wait(cpu);
    }
    let all = (1u32 << cpus) - 2;
    apic::send(all, apic::LOGICAL | apic::ASSERT | apic::FIXED | u32::from(SHOOT_VECTOR));
    equal("a logical destination reaches its set", wait_for(&COUNT, cpus as u64 - 1), cpus as u64 - 1);
    COUNT.store(0, Release);
}

/// INIT takes a CPU back to wait-for-SIPI from HLT; it starts anew.
fn halted_cpu_restarts(cpus: usize) {
    let last = cpus - 1;
    apic::send(smp::apic_id(last), apic::ASSERT | apic::INIT);
    let start = cpu::tsc();
    while cpu::tsc() - start < 30_000_000 {
        core::hint::spin_loop();
    }
    // In wait-for-SIPI a fixed interrupt does nothing.
    apic::send(smp::apic_id(last), apic::ASSERT | apic::FIXED | u32::from(SHOOT_VECTOR));
    let start = cpu::tsc();
    while cpu::tsc() - start < 30_000_000 {
        core::hint::spin_loop();
    }
    equal("a CPU that waits for SIPI takes no interrupt", COUNT.load(Acquire), 0);
    equal("INIT and SIPI start a CPU again", smp::restart(last) as u64, 1);
}
