//! `--stats`: what the vCPUs' time goes to. A thread looks a thousand times a second at what each vCPU says it is doing
//! ([`turtles_cpu::profile`]), and how much processor time it has had since: what the host gave to others counts for nothing.
//! Beside the shares stand exact counts of what costs time.
//!
//! `unsafe` here: reading threads' clocks.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use turtles_cpu::profile::{Count, Doing, Profile, mnemonic_name};

use crate::vcpu_signal::lock;

/// Time between samples; no multiple of a guest's timer.
const INTERVAL: Duration = Duration::from_micros(997);
/// Mnemonics that are listed.
const LISTED: usize = 16;

/// Samples of one vCPU, in nanoseconds of processor time.
#[derive(Clone, Debug, Default)]
struct Samples {
    doing: BTreeMap<&'static str, u64>,
    /// Of them, in a handler that translated code called: by number of the mnemonic.
    handlers: BTreeMap<usize, u64>,
    all: u64,
    /// Samples in which it slept, of how many.
    asleep: u64,
    count: u64,
}

impl Samples {
    fn take(&mut self, profile: &Profile) {
        let Some(time) = profile.clock().and_then(read_clock) else { return };
        let spent = time.saturating_sub(self.all);
        let (Some(doing), mnemonic) = profile.now() else { return };
        *self.doing.entry(doing.name()).or_default() += spent;
        if doing == Doing::Handler {
            *self.handlers.entry(mnemonic).or_default() += spent;
        }
        self.all = time;
        self.asleep += u64::from(doing == Doing::Idle);
        self.count += 1;
    }
}

/// Nanoseconds on a clock.
fn read_clock(clock: i32) -> Option<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is ours to be written. A clock whose thread has ended is an error.
    let read = unsafe { libc::clock_gettime(clock, &raw mut time) } == 0;
    read.then_some(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// The calling thread is the vCPU's.
pub fn begin_thread(profile: &Profile) {
    let mut clock = 0;
    // SAFETY: `clock` is ours to be written, the thread is the calling one.
    if unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) } == 0 {
        profile.set_clock(clock);
    }
}

#[derive(Default)]
struct Vcpus {
    profiles: Vec<Arc<Profile>>,
    samples: Vec<Samples>,
}

/// The profiles of all vCPUs.
#[derive(Clone, Default)]
pub struct Profiles {
    vcpus: Arc<Mutex<Vcpus>>,
    ended: Arc<AtomicBool>,
}

impl Profiles {
    /// One more vCPU.
    pub fn add_vcpu(&self) -> Arc<Profile> {
        let profile = Arc::new(Profile::default());
        let mut vcpus = lock(&self.vcpus);
        vcpus.profiles.push(Arc::clone(&profile));
        vcpus.samples.push(Samples::default());
        profile
    }

    /// Starts the thread that samples; it runs until [`Profiles::stop`].
    pub fn start(&self) -> io::Result<JoinHandle<()>> {
        let all = self.clone();
        std::thread::Builder::new().name("profile".into()).spawn(move || {
            while !all.ended.load(Ordering::Relaxed) {
                std::thread::sleep(INTERVAL);
                let Vcpus { profiles, samples } = &mut *lock(&all.vcpus);
                for (profile, samples) in profiles.iter().zip(samples) {
                    samples.take(profile);
                }
            }
        })
    }

    /// Ends the thread.
    pub fn stop(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// The tables.
impl fmt::Display for Profiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vcpus = lock(&self.vcpus);
        write!(f, "{:<28}", "")?;
        for index in 0..vcpus.samples.len() {
            write!(f, " {:>9}", format!("vCPU {index}"))?;
        }
        for doing in Doing::ALL {
            let of = |samples: &Samples| samples.doing.get(doing.name()).copied().unwrap_or(0);
            if vcpus.samples.iter().all(|samples| of(samples) == 0) {
                continue;
            }
            write!(f, "\n{:<28}", doing.name())?;
            for samples in &vcpus.samples {
                write!(f, " {:>8.1}%", share(of(samples), samples.all))?;
            }
        }
        write!(f, "\n{:<28}", "processor time")?;
        for samples in &vcpus.samples {
            write!(f, " {:>7.2} s", samples.all as f64 / 1e9)?;
        }
        write!(f, "\n{:<28}", "asleep, of all the time")?;
        for samples in &vcpus.samples {
            write!(f, " {:>8.1}%", share(samples.asleep, samples.count))?;
        }
        for (count, name) in Count::ALL {
            write!(f, "\n{name:<28}")?;
            for profile in &vcpus.profiles {
                write!(f, " {:>9}", short(profile.count(count)))?;
            }
        }
        write_handlers(f, &vcpus)
    }
}

fn share(part: u64, all: u64) -> f64 {
    100.0 * part as f64 / all.max(1) as f64
}

/// A count in at most nine characters.
fn short(count: u64) -> String {
    match count {
        0..=9_999_999 => count.to_string(),
        10_000_000..=9_999_999_999 => format!("{:.1}M", count as f64 / 1e6),
        _ => format!("{:.0}M", count as f64 / 1e6),
    }
}

/// The handlers that took most of the time, all vCPUs together.
fn write_handlers(f: &mut fmt::Formatter<'_>, vcpus: &Vcpus) -> fmt::Result {
    let (mut times, mut calls) = (BTreeMap::<usize, u64>::new(), BTreeMap::<usize, u64>::new());
    for (profile, samples) in vcpus.profiles.iter().zip(&vcpus.samples) {
        for (&mnemonic, &time) in &samples.handlers {
            *times.entry(mnemonic).or_default() += time;
        }
        for (mnemonic, called) in profile.handlers() {
            *calls.entry(mnemonic).or_default() += called;
        }
    }
    let all: u64 = vcpus.samples.iter().map(|samples| samples.all).sum();
    let mut sorted: Vec<_> = calls.into_iter().collect();
    sorted.sort_by_key(|&(mnemonic, called)| {
        std::cmp::Reverse((times.get(&mnemonic).copied().unwrap_or(0), called))
    });
    if sorted.is_empty() {
        return Ok(());
    }
    write!(f, "\n{:<28} {:>9} {:>9}", "handlers, by instruction", "time", "calls")?;
    for (mnemonic, called) in sorted.into_iter().take(LISTED) {
        let time = share(times.get(&mnemonic).copied().unwrap_or(0), all);
        write!(f, "\n  {:<26} {time:>8.1}% {:>9}", mnemonic_name(mnemonic), short(called))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sampled_comes_out() {
        let profiles = Profiles::default();
        let profile = profiles.add_vcpu();
        profiles.add_vcpu();
        begin_thread(&profile);
        let before = profile.begin(Doing::Translated);
        lock(&profiles.vcpus).samples[0].take(&profile);
        profile.resume(before);
        profile.begin(Doing::Idle);
        lock(&profiles.vcpus).samples[0].count += 3;
        let table = profiles.to_string();
        let line = |start: &str| table.lines().find(|line| line.starts_with(start)).unwrap_or_default();
        assert!(line("translated code").contains("100.0%"), "{table}");
        assert!(line("asleep").contains("0.0%"), "{table}");
        assert!(line("processor time").ends_with("0.00 s"), "vCPU 1 never began: {table}");
        assert_eq!(line("interpreter"), "", "what never happened is not listed");
    }

    #[test]
    fn counts_stay_in_their_column() {
        for count in [0, 9_999_999, 10_000_000, 9_999_999_999, u64::MAX / 1_000_000_000] {
            assert!(short(count).len() <= 9 || count > 1 << 40, "{count}");
        }
    }
}
