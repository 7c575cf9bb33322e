//! `turtles demo`: boots the embedded guests on every engine that this host has, and says what happened.

use std::io::Write;
use std::time::Instant;

use turtles_guests::{ALL, Guest, by_name};

use crate::config::{ConfigError, EngineConfig, MachineConfig};
use crate::console::{Capture, Output};
use crate::devices::MachineEvent;
use crate::engine::kvm::KvmHost;
use crate::error::RunError;
use crate::vm::Machine;

/// What `demo` shows if no guest is named.
const SHOWCASE: [&str; 4] = ["hello", "faults", "paging", "compute"];

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
    })
}

/// Runs the guests named (or the showcase) and prints a table. True if all passed.
pub fn run(names: &[String], quiet: bool, out: &mut dyn Write) -> Result<bool, RunError> {
    let guests = pick(names)?;
    let mut engines = vec![EngineConfig::Soft];
    match KvmHost::open() {
        Ok(_) => engines.push(EngineConfig::Kvm),
        Err(error) => say(out, format_args!("(only the software CPU: {error})\n")),
    }
    let mut all_passed = true;
    for guest in guests {
        say(out, format_args!("{}: {}\n", guest.name, guest.what));
        for &engine in &engines {
            let mut config = MachineConfig::for_image(guest.image);
            config.engine = engine;
            config.cpus = if guest.name == "smp" { 2 } else { 1 };
            let run = run_guest(guest, &config)?;
            all_passed &= run.passed();
            print_run(out, engine, &run, quiet);
        }
    }
    Ok(all_passed)
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

fn print_run(out: &mut dyn Write, engine: EngineConfig, run: &GuestRun, quiet: bool) {
    let name = match engine {
        EngineConfig::Kvm => "kvm ",
        EngineConfig::Soft | EngineConfig::Auto => "soft",
    };
    let (pass, fail, skip) =
        (run.lines("PASS").count(), run.lines("FAIL").count(), run.lines("SKIP").count());
    let verdict = if run.passed() { "ok" } else { "NOT OK" };
    let rate = run.instructions as f64 / run.seconds / 1e6;
    say(
        out,
        format_args!(
            "  {name}  {verdict}: {pass} passed, {fail} failed, {skip} skipped in {:.0} ms ({} instructions on the software CPU, {rate:.0} million/s)\n",
            run.seconds * 1e3,
            run.instructions
        ),
    );
    if !quiet {
        let told = run.text.lines().filter(|l| !l.starts_with("PASS") && !l.starts_with("DONE"));
        for line in told {
            say(out, format_args!("        {line}\n"));
        }
    }
    if let Some(crash) = &run.crash {
        say(out, format_args!("{crash}\n"));
    }
}

/// The demo's own output; nobody is left to tell if it cannot be written.
fn say(out: &mut dyn Write, text: std::fmt::Arguments<'_>) {
    drop(out.write_fmt(text));
}
