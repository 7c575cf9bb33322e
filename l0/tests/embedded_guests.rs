//! Every embedded guest passes all its cases on every engine that this host has, and on the software CPU in virtual time.

use turtles::clock::ClockSource;
use turtles::config::{EngineConfig, MachineConfig};
use turtles::demo::run_guest;
use turtles::engine::kvm::KvmHost;
use turtles_guests::{ALL, Guest};

fn assert_passes(guest: &Guest, config: &MachineConfig) {
    let run = run_guest(guest, config).expect("the machine starts");
    let failures: Vec<_> = run.lines("FAIL").collect();
    assert!(
        run.passed(),
        "{} on {:?}, {:?}: {failures:#?}\n{}",
        guest.name,
        config.engine,
        config.clock,
        run.crash.as_deref().unwrap_or_default()
    );
    assert!(run.lines("PASS").count() > 0, "{} reported nothing", guest.name);
}

fn config(guest: &Guest, engine: EngineConfig) -> MachineConfig {
    let mut config = MachineConfig::for_image(guest.image);
    config.engine = engine;
    config.cpus = if matches!(guest.name, "smp" | "hatchling") { 2 } else { 1 };
    config
}

#[test]
fn on_the_software_cpu() {
    for guest in ALL {
        assert_passes(guest, &config(guest, EngineConfig::Soft));
    }
}

#[test]
fn in_virtual_time() {
    for guest in ALL.iter().filter(|g| g.name != "smp") {
        let mut config = config(guest, EngineConfig::Soft);
        config.clock = ClockSource::Virtual;
        config.cpus = 1;
        assert_passes(guest, &config);
    }
}

#[test]
fn on_kvm() {
    if let Err(why) = KvmHost::open() {
        println!("SKIP kvm: {why}");
        return;
    }
    for guest in ALL {
        assert_passes(guest, &config(guest, EngineConfig::Kvm));
    }
}

/// A vCPU is plain data that both engines agree on: changing between them at random shows nowhere.
#[test]
fn hopping_between_kvm_and_the_software_cpu() {
    if let Err(why) = KvmHost::open() {
        println!("SKIP hopping: {why}");
        return;
    }
    for guest in ALL {
        assert_passes(guest, &config(guest, EngineConfig::KvmHop));
    }
}
