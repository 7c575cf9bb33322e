//! `turtles demo`: boots the embedded guests on every engine that this host has, and says what happened.

use std::io::Write;
use std::time::Instant;

use turtles_guests::{ALL, Guest, by_name};

use crate::config::{ConfigError, EngineConfig, MachineConfig};
use crate::console::{Capture, Output};
use crate::devices::MachineEvent;
use crate::doctor;
use crate::engine::kvm::KvmHost;
use crate::error::RunError;
use crate::stats::Statistics;
use crate::vm::Machine;

/// What `demo` shows if no guest is named.
const SHOWCASE: [&str; 5] = ["hello", "faults", "paging", "compute", "hatchling"];

/// What became of one guest on one engine.
pub struct GuestRun {
    /// Everything it printed.
    pub text: String,
    /// How the run ended.
    pub event: MachineEvent,
    /// Set when it died.
    pub crash: Option<String>,
    /// Wall time in seconds.
    pub seconds: f64,
    /// Instructions by the software CPU.
    pub instructions: u64,
    /// What happened between us and KVM, if that was counted.
    pub kvm: Option<crate::engine::kvm::Stats>,
    /// What the levels of virtualization did, if they were counted.
    pub statistics: Option<Statistics>,
}

impl GuestRun {
    /// The guest said that all its cases passed.
    pub fn passed(&self) -> bool {
        self.event == MachineEvent::DebugExit(turtles_guests::exit_code(turtles_guests::ALL_PASSED))
    }

    /// Lines that begin with `word`.
    pub fn lines<'a>(&'a self, word: &'a str) -> impl Iterator<Item = &'a str> {
        self.text.lines().filter(move |line| line.starts_with(word))
    }
}

/// Runs one embedded guest.
pub fn run_guest(guest: &Guest, config: &MachineConfig) -> Result<GuestRun, RunError> {
    let capture = Capture::default();
    let output = Output::new(Box::new(capture.clone())).map_err(RunError::Thread)?;
    let mut config = config.clone();
    config.kernel = crate::config::KernelSource::Embedded(guest.image);
    let started = Instant::now();
    let outcome = Machine::build(&config, output.writer())?.run()?;
    let seconds = started.elapsed().as_secs_f64();
    drop(output);
    Ok(GuestRun {
        text: capture.text(),
        event: outcome.event,
        crash: outcome.crash.map(|c| c.to_string()),
        seconds,
        instructions: outcome.instructions,
        kvm: outcome.kvm,
        statistics: outcome.statistics,
    })
}

/// vCPUs for a guest: those that test several need them.
pub fn cpus_for(guest: &Guest) -> u32 {
    if matches!(guest.name, "smp" | "hatchling") { 2 } else { 1 }
}

/// Runs the guests named (or the showcase) and prints what happened. True if all passed on the engine that
/// `--engine auto` would take. With `only`, they run on that engine alone, and have to pass there.
///
/// Another engine may fail for reasons of this host: a KVM that emulates ring 0 gets part of the architecture wrong.
/// Such cases are counted, and listed for guests asked for by name.
pub fn run(
    names: &[String],
    only: Option<EngineConfig>,
    quiet: bool,
    out: &mut dyn Write,
) -> Result<bool, RunError> {
    let guests = pick(names)?;
    let chosen = match only {
        None | Some(EngineConfig::Auto) => doctor::probe().choose().engine,
        Some(EngineConfig::Kvm | EngineConfig::KvmL2 | EngineConfig::KvmL2Eager | EngineConfig::KvmHop) => {
            doctor::Chosen::Kvm
        }
        Some(EngineConfig::Soft | EngineConfig::SoftInterpreter) => doctor::Chosen::Soft,
    };
    let kvm = KvmHost::open().err();
    if !quiet {
        say(
            out,
            format_args!(
                "Each guest is a small program without an operating system that tests a part of the machine.\n"
            ),
        );
        if let Some(error) = &kvm {
            say(out, format_args!("On the software CPU alone: {error}.\n"));
        }
    }
    let engines = match only {
        Some(engine) => vec![engine],
        None if kvm.is_none() => vec![EngineConfig::Soft, EngineConfig::Kvm],
        None => vec![EngineConfig::Soft],
    };
    let mut all_passed = true;
    for guest in guests {
        say(out, format_args!("\n{}: {}\n", guest.name, guest.what));
        for &engine in &engines {
            let mut config = MachineConfig::for_image(guest.image);
            config.engine = engine;
            config.cpus = cpus_for(guest);
            config.stats = true;
            let run = run_guest(guest, &config)?;
            let used = only.is_some() || (engine == EngineConfig::Kvm) == (chosen == doctor::Chosen::Kvm);
            all_passed &= run.passed() || !used;
            let detail = match (quiet, used || !names.is_empty()) {
                (true, _) => Detail::Verdict,
                (false, true) => Detail::Everything,
                (false, false) => Detail::Count,
            };
            print_run(out, engine, &run, detail);
        }
    }
    if !quiet {
        let verdict = if all_passed { "All passed" } else { "NOT all passed" };
        say(
            out,
            format_args!(
                "\n{verdict} on {}, {}.\n",
                if only.is_some() {
                    "the engine asked for"
                } else {
                    "the engine that --engine auto takes here"
                },
                engine_name(chosen)
            ),
        );
        say(out, format_args!("Next: turtles doctor, or boot a kernel: turtles run --help\n"));
    }
    Ok(all_passed)
}

fn engine_name(engine: doctor::Chosen) -> &'static str {
    match engine {
        doctor::Chosen::Soft => "the software CPU",
        doctor::Chosen::Kvm => "KVM",
    }
}

fn pick(names: &[String]) -> Result<Vec<&'static Guest>, RunError> {
    if names.is_empty() {
        return Ok(SHOWCASE.iter().filter_map(|name| by_name(name)).collect());
    }
    if names == ["all"] {
        return Ok(ALL.iter().collect());
    }
    let find = |name: &String| {
        by_name(name).ok_or_else(|| {
            let known: Vec<_> = ALL.iter().map(|g| g.name).collect();
            ConfigError(format!("there is no guest '{name}'; there are: {}", known.join(", "))).into()
        })
    };
    names.iter().map(find).collect()
}

/// How much to say of a run.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Detail {
    /// The verdict, and what failed.
    Verdict,
    /// The verdict and how many cases failed, on an engine that nobody has to use here.
    Count,
    /// All the guest said but its passed cases.
    Everything,
}

fn print_run(out: &mut dyn Write, engine: EngineConfig, run: &GuestRun, detail: Detail) {
    let name = match engine {
        EngineConfig::Kvm | EngineConfig::KvmL2 | EngineConfig::KvmL2Eager | EngineConfig::KvmHop => "kvm ",
        EngineConfig::Soft | EngineConfig::SoftInterpreter | EngineConfig::Auto => "soft",
    };
    let (pass, fail, skip) =
        (run.lines("PASS").count(), run.lines("FAIL").count(), run.lines("SKIP").count());
    let verdict = if run.passed() { "ok    " } else { "NOT OK" };
    let mut counts = format!("{pass} passed");
    for (count, what) in [(fail, "failed"), (skip, "skipped")] {
        if count > 0 {
            counts += &format!(", {count} {what}");
        }
    }
    let speed = match engine {
        EngineConfig::Kvm | EngineConfig::KvmL2 | EngineConfig::KvmL2Eager | EngineConfig::KvmHop => {
            format!("; {} instructions finished in the software CPU", run.instructions)
        }
        EngineConfig::Soft | EngineConfig::SoftInterpreter | EngineConfig::Auto => {
            format!("; {:.1} million instructions", run.instructions as f64 / 1e6)
        }
    };
    say(out, format_args!("  {name}  {verdict}  {counts} in {:.0} ms{speed}\n", run.seconds * 1e3));
    for line in run.text.lines() {
        let told = match detail {
            Detail::Verdict => line.starts_with("FAIL"),
            Detail::Count => false,
            Detail::Everything => !line.starts_with("PASS") && !line.starts_with("DONE"),
        };
        if told {
            say(out, format_args!("          {line}\n"));
        }
    }
    if let (Detail::Everything, Some(text)) = (detail, run.statistics.as_ref().and_then(levels)) {
        say(out, format_args!("          {text}\n"));
        if let (Some(kvm), Some(statistics)) = (run.kvm, &run.statistics) {
            let each = kvm.runs as f64 / statistics.exits().max(1) as f64;
            say(
                out,
                format_args!("          {} entries into KVM_RUN, {each:.2} for each exit of L2\n", kvm.runs),
            );
        }
    }
    if detail == Detail::Count && fail > 0 {
        say(out, format_args!("          --engine auto does not take kvm here, see turtles doctor\n"));
    }
    if let Some(crash) = &run.crash {
        say(out, format_args!("{crash}\n"));
    }
}

/// What a guest hypervisor cost, if there was one.
fn levels(statistics: &Statistics) -> Option<String> {
    let each = statistics.multiplication()?;
    let exits = statistics.exits();
    Some(format!("all in all {exits} exits of L2, {each:.2} entries to L0 for each (multiplication)"))
}

/// The demo's own output; nobody is left to tell if it cannot be written.
fn say(out: &mut dyn Write, text: std::fmt::Arguments<'_>) {
    drop(out.write_fmt(text));
}
