//! Random accesses to every register of a whole PC: ports, MMIO, PCI configuration, BARs, local and I/O APICs, with
//! virtqueues full of nonsense in memory. Nothing may panic, hang, or take the machine's other half with it.
//!
//! `TURTLES_FUZZ_CASES` sets how many machines are tried, `TURTLES_FUZZ_SEED` where they begin.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use turtles::chipset::Chipset;
use turtles::clock::{Clock, ClockSource};
use turtles::config::{DiskConfig, MachineConfig};
use turtles::devices::virtio::DmaObserver;
use turtles::memory::Ram;
use turtles::vcpu_signal::VcpuSignal;
use turtles::vm::Stop;
use turtles_tests::random::Random;
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 4 << 20;
const VCPUS: usize = 3;
const ECAM: u64 = 0xe000_0000;
/// Devices behind the bridge: disk, entropy, balloon.
const DEVICES: u64 = 3;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Checks that devices say they wrote to RAM only.
struct InRam;

impl DmaObserver for InRam {
    fn wrote(&self, gpa: u64, len: u64) {
        assert!(gpa.checked_add(len).is_some_and(|end| end <= RAM), "DMA to {gpa:#x}, {len:#x} bytes");
    }
}

/// Swallows what the serial port sends.
struct Nowhere;

impl Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Pc {
    chipset: Chipset,
    clock: Arc<Clock>,
    ram: Ram,
}

fn pc(source: ClockSource, disk: &std::path::Path) -> Pc {
    let mut config = MachineConfig::for_image(&[]);
    config.memory = RAM;
    config.cpus = VCPUS as u32;
    config.clock = source;
    config.rng = true;
    config.balloon = true;
    config.disks.push(DiskConfig { path: disk.to_owned(), read_only: false });
    let ram = Ram::new(RAM).expect("a little memory");
    let clock = Clock::new(source, 1_000_000_000);
    let signals: Vec<_> = (0..VCPUS).map(|_| Arc::new(VcpuSignal::default())).collect();
    let stop = Arc::new(Stop::default());
    let chipset = Chipset::build(
        &config,
        &ram,
        &clock,
        &signals,
        stop,
        Arc::new(InRam),
        Box::new(Nowhere),
        1_767_225_600,
    )
    .expect("a chipset");
    let pc = Pc { chipset, clock, ram };
    // As firmware would: memory space and bus mastering on, so that the BARs answer.
    for slot in 1..=DEVICES {
        pc.chipset.mmio.write(ECAM + (slot << 15) + 4, &6u16.to_le_bytes());
    }
    pc
}

fn temporary_disk(name: &str) -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("turtles-devices-{}-{name}", std::process::id()));
    std::fs::write(&path, vec![0; 1 << 20]).expect("a temporary file");
    path
}

/// Where the BAR of `slot` is now.
fn bar(pc: &Pc, slot: u64) -> u64 {
    let mut word = [0; 8];
    pc.chipset.mmio.read(ECAM + (slot << 15) + 0x10, &mut word);
    u64::from_le_bytes(word) & !0xf
}

fn port(random: &mut Random) -> u64 {
    match random.below(12) {
        0 => 0x20 + random.below(2),
        1 => 0xa0 + random.below(2),
        2 => 0x40 + random.below(4),
        3 => 0x60 + random.below(8),
        4 => 0x70 + random.below(2),
        5 => 0x3f8 + random.below(8),
        6 => 0xcf8 + random.below(8),
        7 => 0x600 + random.below(0x30),
        8 => 0x4d0 + random.below(2),
        9 => random.pick(&[0x80, 0x92, 0xb2, 0xb3, 0xf4, 0x61, 0x402]),
        10 => 0xc000 + random.below(0x4000),
        _ => random.below(0x1_0000),
    }
}

fn address(random: &mut Random, pc: &Pc) -> u64 {
    let aligned = |random: &mut Random, below: u64| {
        random.below(below / 4) * 4 + if random.chance(90) { 0 } else { random.below(4) }
    };
    match random.below(12) {
        0 => 0xfec0_0000 + random.pick(&[0, 0x10, 0x40, 0]),
        1 => 0xfed0_0000 + aligned(random, 0x400),
        2 | 3 => ECAM + (random.below(DEVICES + 2) << 15) + aligned(random, 0x1000),
        4 => ECAM + random.bits() % 0x1000_0000,
        5..=9 => {
            let base = bar(pc, 1 + random.below(DEVICES));
            // Common configuration, then interrupt status, device registers, notification; or anywhere.
            base + match random.below(4) {
                0 => random.below(0x40),
                1 => random.below(8) << 12 | random.below(0x40),
                _ => aligned(random, 0x8000),
            }
        }
        10 => random.bits() & 0x3fff_ffff_ffff,
        _ => 0xc000_0000 + random.bits() % 0x4000_0000,
    }
}

fn value(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.bits(),
        1 => 0,
        2 => u64::MAX,
        3 => random.below(16),
        4 => 1 << random.below(64),
        5 => random.below(256),
        // Where queues are.
        _ => random.below(RAM / 4096) << 12,
    }
}

/// Descriptors that mostly point into RAM, in tables all over it.
fn scatter_queues(random: &mut Random, pc: &Pc) {
    for _ in 0..20 {
        let at = random.below(RAM / 4096 - 1) << 12;
        for i in 0..16 {
            let mut descriptor = [0; 16];
            let target = if random.chance(90) { random.below(RAM) } else { random.bits() };
            let len = random.pick(&[1, 16, 512, 4096, 0x1_0000, u32::MAX]);
            let flags = random.below(8) as u16;
            descriptor[..8].copy_from_slice(&target.to_le_bytes());
            descriptor[8..12].copy_from_slice(&len.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&(random.below(20) as u16).to_le_bytes());
            let _ = pc.ram.memory.write_slice(&descriptor, GuestAddress(at + i * 16));
        }
    }
}

/// One access of any kind.
fn access(random: &mut Random, pc: &Pc) {
    let mut data = value(random).to_le_bytes();
    let vcpu = random.below(VCPUS as u64) as usize;
    let chips = &pc.chipset.irqchip;
    match random.below(20) {
        0..=3 => {
            let len = random.pick(&[1, 1, 1, 2, 4]);
            pc.chipset.ports.write(port(random), &data[..len]);
        }
        4..=6 => {
            let len = random.pick(&[1, 1, 1, 2, 4]);
            pc.chipset.ports.read(port(random), &mut data[..len]);
        }
        7..=11 => {
            let len = random.pick(&[1, 2, 4, 4, 8]);
            pc.chipset.mmio.write(address(random, pc), &data[..len]);
        }
        12 | 13 => {
            let len = random.pick(&[1, 2, 4, 4, 8]);
            pc.chipset.mmio.read(address(random, pc), &mut data[..len]);
        }
        14 => chips.apic_mmio_write(vcpu, random.below(0x100) << 4, &data[..4]),
        15 => chips.apic_mmio_read(vcpu, random.below(0x1000), &mut data[..random.pick(&[1, 2, 4, 8])]),
        16 => {
            let msr = 0x800 + random.below(0x100) as u32;
            let _ = chips.apic_msr_write(vcpu, msr, u64::from_le_bytes(data));
            let _ = chips.apic_msr_read(vcpu, msr);
        }
        17 => {
            if random.chance(10) {
                let _ = chips.set_apic_base(vcpu, u64::from_le_bytes(data) & 0xd00 | 0xfee0_0000);
            }
            chips.set_tsc_deadline(vcpu, pc.clock.now_ns() + random.below(1 << 20));
        }
        18 => drop(chips.acknowledge(vcpu)),
        _ => {
            chips.set_cr8(vcpu, data[0] & 15);
            let taken = (pc.chipset.serial_input())(&data);
            assert!(taken <= data.len());
        }
    }
}

/// Fails the test if `body` does not come back.
fn within(limit: Duration, what: &str, body: impl FnOnce() + Send + 'static) {
    let (done, waiting) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        body();
        let _ = done.send(());
    });
    match waiting.recv_timeout(limit) {
        Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => {
            if let Err(panic) = thread.join() {
                eprintln!("{what}");
                std::panic::resume_unwind(panic);
            }
        }
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what}: still not done after {limit:?}"),
    }
}

/// In virtual time with devices that work at once: a seed repeats exactly.
#[test]
fn random_register_accesses_are_survived() {
    let first = number("TURTLES_FUZZ_SEED", 0);
    for seed in first..first + number("TURTLES_FUZZ_CASES", 12) {
        within(Duration::from_secs(120), &format!("TURTLES_FUZZ_SEED={seed}"), move || {
            let disk = temporary_disk(&format!("one-{seed}"));
            let mut random = Random::new(seed);
            let pc = pc(ClockSource::Virtual, &disk);
            scatter_queues(&mut random, &pc);
            for _ in 0..20_000 {
                access(&mut random, &pc);
                if random.chance(5) {
                    let step = random.pick(&[1, 1000, 100_000, 50_000_000, 40_000_000_000]);
                    pc.clock.advance_to(pc.clock.now_ns().saturating_add(step));
                    pc.clock.fire_due();
                }
                if random.chance(1) {
                    scatter_queues(&mut random, &pc);
                }
            }
            drop(pc);
            let _ = std::fs::remove_file(disk);
        });
    }
}

/// Three threads at once, the timer thread and the devices' own threads: no two of them may wait for each other.
#[test]
fn random_register_accesses_from_several_threads_do_not_deadlock() {
    let first = number("TURTLES_FUZZ_SEED", 0);
    for seed in first..first + number("TURTLES_FUZZ_CASES", 4) {
        within(Duration::from_secs(120), &format!("TURTLES_FUZZ_SEED={seed}"), move || {
            let disk = temporary_disk(&format!("many-{seed}"));
            let mut pc = pc(ClockSource::Host, &disk);
            pc.clock.start_thread().expect("a thread");
            scatter_queues(&mut Random::new(seed), &pc);
            let (accesses, shared) = (AtomicU64::new(0), &pc);
            std::thread::scope(|scope| {
                for thread in 0..VCPUS as u64 {
                    let accesses = &accesses;
                    scope.spawn(move || {
                        let mut random = Random::new((seed << 8) | (thread + 1));
                        let started = Instant::now();
                        while started.elapsed() < Duration::from_millis(1500) {
                            access(&mut random, shared);
                            accesses.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            });
            assert!(accesses.load(Ordering::Relaxed) > 100, "almost nothing happened");
            pc.clock.stop();
            pc.chipset.finish();
            drop(pc);
            let _ = std::fs::remove_file(disk);
        });
    }
}

/// Whoever waits is woken by whoever raises, however the two interleave.
#[test]
fn no_wake_up_is_lost() {
    use turtles_cpu::attention::Attention;
    within(Duration::from_secs(60), "a lost wake-up", || {
        let signal = Arc::new(VcpuSignal::default());
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..30_000u32 {
                    if round % 3 == 0 {
                        std::thread::yield_now();
                    }
                    signal.raise(if round % 2 == 0 { Attention::INTERRUPT } else { Attention::NMI });
                    while signal.attention.get() != 0 {
                        std::hint::spin_loop();
                        std::thread::yield_now();
                    }
                }
                over.store(true, Ordering::SeqCst);
                signal.raise(Attention::CANCEL);
            });
            while !over.load(Ordering::SeqCst) {
                let bits = Attention::INTERRUPT | Attention::NMI | Attention::CANCEL;
                signal.wait(bits, None);
                signal.attention.take(bits);
            }
        });
    });
}

/// Timers armed from anywhere at any moment fire, none is slept through.
#[test]
fn no_timer_is_slept_through() {
    use turtles::clock::TimerClient;
    struct Bell(mpsc::Sender<u64>);
    impl TimerClient for Bell {
        fn fire(&self, now_ns: u64) {
            let _ = self.0.send(now_ns);
        }
    }
    within(Duration::from_secs(60), "a timer that never fired", || {
        let clock = Clock::new(ClockSource::Host, 1_000_000_000);
        clock.start_thread().expect("a thread");
        let (ring, rung) = mpsc::channel();
        let bell: Arc<dyn TimerClient> = Arc::new(Bell(ring));
        let timer = clock.add_timer(Arc::downgrade(&bell));
        let other = clock.add_timer(Arc::downgrade(&bell));
        let mut random = Random::new(1);
        for _ in 0..5000 {
            // A far deadline that is pulled in, or a near one at once.
            if random.chance(50) {
                clock.arm(timer, clock.now_ns() + 1_000_000_000_000);
            }
            let at = clock.now_ns() + random.below(30_000);
            clock.arm(timer, at);
            if random.chance(30) {
                clock.arm(other, clock.now_ns() + 2_000_000_000_000);
                clock.disarm(other);
            }
            assert!(rung.recv().expect("the bell is there") >= at);
        }
        clock.stop();
    });
}
