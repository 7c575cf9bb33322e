//! `--clock virtual`: a run of one vCPU repeats exactly, whatever the host does meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};

use turtles::clock::ClockSource;
use turtles::config::{EngineConfig, MachineConfig};
use turtles::demo::{GuestRun, run_guest};
use turtles_guests::{ALL, Guest};

/// Guests that need more than one vCPU.
const SMP: [&str; 1] = ["smp"];

fn run(guest: &Guest) -> GuestRun {
    let mut config = MachineConfig::for_image(guest.image);
    config.clock = ClockSource::Virtual;
    config.engine = EngineConfig::Soft;
    config.rng = true;
    run_guest(guest, &config).expect("the machine is built")
}

/// Runs `body` while other threads keep the host busy, so that timing differs.
fn on_a_busy_host<T>(body: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let result = body();
        over.store(true, Ordering::Relaxed);
        result
    })
}

#[test]
fn every_guest_repeats_exactly() {
    for guest in ALL.iter().filter(|guest| !SMP.contains(&guest.name)) {
        let first = run(guest);
        let second = on_a_busy_host(|| run(guest));
        assert_eq!(first.text, second.text, "{}: output", guest.name);
        assert_eq!(first.instructions, second.instructions, "{}: instructions", guest.name);
        assert_eq!(first.event, second.event, "{}", guest.name);
    }
}
