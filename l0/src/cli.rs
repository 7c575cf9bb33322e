//! The command line.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use turtles::clock::ClockSource;
use turtles::config::{
    DiskConfig, EngineConfig, FlatImage, KernelSource, MachineConfig, Module, NetConfig, SerialConfig,
    parse_cpus, parse_size,
};
use turtles::console::{self, Output, Pty, RawTerminal};
use turtles::devices::MachineEvent;
use turtles::error::RunError;
use turtles::signals::EndingSignals;
use turtles::vm::{Machine, Outcome, SerialSink};
use turtles::{demo, doctor};

/// Wrong input, or a host that does not let us.
const EXIT_CANNOT: u8 = 2;
/// The guest died.
const EXIT_CRASHED: u8 = 1;

#[derive(Parser)]
#[command(name = "turtles", version, about, max_term_width = 100, verbatim_doc_comment)]
/// A virtual machine monitor that needs nothing from the host: no VMX, no nested virtualization, not even KVM.
///
///   turtles demo       runs small guests that are built in: a look at what works here
///   turtles doctor     says what this host offers, and what to do about what it lacks
///   turtles run ...    boots a kernel:
///
///     turtles run --kernel vmlinuz --initrd initrd.gz --cmdline console=ttyS0
///
/// The guest's first serial port is this terminal. Ctrl-A x leaves, Ctrl-A Ctrl-A sends a Ctrl-A.
///
/// Exit codes: 0 the guest powered off or reset itself, 1 it died, 2 something was wrong with the command line, a file
/// or the host (one line on standard error says what), 128 + N signal N ended the run. A guest that writes B to port
/// 0xf4 leaves with (B << 1) | 1, as with QEMU's isa-debug-exit.
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print nothing but the guest's own output, and errors.
    #[arg(long, short, global = true, display_order = 100)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a guest and run it until it powers off.
    Run(Box<RunArgs>),
    /// Run the small guests that are built in, on every engine this host has, and print what happened.
    Demo {
        /// Which guests: their names, or `all` [default: a few that show the most].
        names: Vec<String>,
        /// On this engine alone: soft, kvm, auto
        #[arg(long, value_enum, value_name = "ENGINE", hide_possible_values = true)]
        engine: Option<EngineConfig>,
    },
    /// Say what this host offers, which engine suits it, and what to do about what it lacks.
    Doctor,
}

#[derive(Clone, Copy, ValueEnum)]
enum ClockArg {
    Host,
    Virtual,
}

#[derive(Args)]
struct RunArgs {
    /// What to boot: a Linux bzImage, an ELF file (PVH, Multiboot 1 or 2, or plain), or with --flat any bytes
    #[arg(long, value_name = "FILE", help_heading = "What to boot")]
    kernel: PathBuf,
    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "FILE", help_heading = "What to boot")]
    initrd: Option<PathBuf>,
    /// Command line for the kernel; Linux shows its messages with console=ttyS0
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    #[arg(help_heading = "What to boot")]
    cmdline: String,
    /// Multiboot module and its command line; may be repeated
    #[arg(long, value_name = "'FILE TEXT'", help_heading = "What to boot")]
    module: Vec<Module>,
    /// Load the kernel as it is at ADDRESS (hexadecimal) and enter it there, in 16-, 32- or 64-bit mode
    #[arg(long, value_name = "ADDRESS[,BITS]", help_heading = "What to boot")]
    flat: Option<FlatImage>,

    /// RAM, for example 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size, help_heading = "The machine")]
    memory: u64,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_cpus, help_heading = "The machine")]
    cpus: u32,
    /// CPU model, and flags to add or take away, spelled as QEMU spells them: host,-avx2
    #[arg(long, value_name = "MODEL[,±FLAG...]", default_value = "turtles", help_heading = "The machine")]
    cpu: String,
    /// Raw disk image as a virtio disk, `,ro` for read-only; may be repeated
    #[arg(long, value_name = "FILE[,ro]", help_heading = "The machine")]
    disk: Vec<DiskConfig>,
    /// virtio network card on an existing tap interface; may be repeated
    #[arg(long, value_name = "tap=NAME", help_heading = "The machine")]
    net: Vec<NetConfig>,
    /// Where the first serial port goes: stdio, file=FILE, pty (a new terminal, whose name is printed), null
    #[arg(long, value_name = "WHERE", default_value = "stdio", help_heading = "The machine")]
    serial: SerialConfig,
    /// Add a virtio memory balloon
    #[arg(long, help_heading = "The machine")]
    balloon: bool,
    /// Leave out the virtio entropy device
    #[arg(long, help_heading = "The machine")]
    no_rng: bool,

    /// What executes the guest: soft (the software CPU; soft,interpreter: without
    /// translating guest code), kvm (the host's KVM), auto (whichever is faster here)
    #[arg(long, value_enum, value_name = "ENGINE", default_value = "auto", hide_possible_values = true)]
    #[arg(help_heading = "How to run it")]
    engine: EngineConfig,
    /// Guest time: host follows the host's clock; virtual counts instructions, so that a run repeats exactly
    #[arg(long, value_enum, value_name = "CLOCK", default_value = "host", hide_possible_values = true)]
    #[arg(help_heading = "How to run it")]
    clock: ClockArg,
    /// Say why, with the rule and the fields, whenever a VMX instruction or a VM entry of the guest fails
    #[arg(long, help_heading = "How to run it")]
    explain: bool,
    /// Say at the end, and on SIGUSR1, what was executed: exits of L2 by reason, who handled them, what that cost
    #[arg(long, help_heading = "How to run it")]
    stats: bool,
    /// Write every exit, VMX instruction, VM entry and EPT fill to FILE: as text, or for Perfetto if its name ends in
    /// .json
    #[arg(long, value_name = "FILE", help_heading = "How to run it")]
    trace: Option<PathBuf>,
}

impl RunArgs {
    fn config(&self) -> MachineConfig {
        MachineConfig {
            kernel: KernelSource::File(self.kernel.clone()),
            initrd: self.initrd.clone(),
            cmdline: self.cmdline.clone(),
            modules: self.module.clone(),
            flat: self.flat,
            memory: self.memory,
            cpus: self.cpus,
            disks: self.disk.clone(),
            nets: self.net.clone(),
            cpu: self.cpu.clone(),
            serial: self.serial.clone(),
            clock: match self.clock {
                ClockArg::Host => ClockSource::Host,
                ClockArg::Virtual => ClockSource::Virtual,
            },
            engine: self.engine,
            rng: !self.no_rng,
            balloon: self.balloon,
            explain: self.explain,
            stats: self.stats,
            trace: self.trace.clone(),
        }
    }
}

/// The whole command.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    start_log(cli.quiet);
    match cli.command {
        Command::Run(args) => run(&args, cli.quiet),
        Command::Demo { names, engine } => match demo::run(&names, engine, cli.quiet, &mut std::io::stdout())
        {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::from(EXIT_CRASHED),
            Err(error) => cannot(&error),
        },
        Command::Doctor => {
            // Whoever closed our output does not want the rest of it.
            drop(writeln!(std::io::stdout(), "{}", doctor::probe()));
            ExitCode::SUCCESS
        }
    }
}

/// Says something on standard error. If that is closed, nobody is left to be told.
fn say(text: std::fmt::Arguments<'_>) {
    drop(writeln!(std::io::stderr(), "turtles: {text}"));
}

fn cannot(error: &dyn std::fmt::Display) -> ExitCode {
    say(format_args!("{error}"));
    ExitCode::from(EXIT_CANNOT)
}

/// Help as it is; a wrong command line as one line.
fn explain(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            drop(error.print());
            return ExitCode::SUCCESS;
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            drop(error.print());
            return ExitCode::from(EXIT_CANNOT);
        }
        _ => {}
    }
    let text = error.to_string();
    let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    // The first paragraph says what is wrong; tips say what was perhaps meant.
    let mut line = one_line(text.split("\n\n").next().unwrap_or_default());
    for tip in text.lines().filter_map(|line| line.trim_start().strip_prefix("tip: ")) {
        line += "; ";
        line += &one_line(tip);
    }
    let help = match std::env::args().nth(1) {
        Some(command) if command == "run" => "turtles run --help",
        _ => "turtles --help",
    };
    cannot(&format_args!("{}; see {help}", line.strip_prefix("error: ").unwrap_or(&line)))
}

/// Messages of the log look like ours, until somebody asks for more of them with RUST_LOG.
fn start_log(quiet: bool) {
    let asked = std::env::var_os("RUST_LOG").is_some();
    let level = if quiet { "error" } else { "warn" };
    let mut log = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level));
    log.format_timestamp(None);
    if !asked {
        log.format(|to, record| writeln!(to, "turtles: {}", record.args()));
    }
    log.init();
}

fn run(args: &RunArgs, quiet: bool) -> ExitCode {
    match run_machine(args, quiet) {
        Ok((outcome, signals)) => report(&outcome, args, quiet, &signals),
        Err(error) => cannot(&error),
    }
}

fn run_machine(args: &RunArgs, quiet: bool) -> Result<(Outcome, EndingSignals), RunError> {
    let config = args.config();
    let signals = EndingSignals::take(config.stats).map_err(RunError::Thread)?;
    let console = Console::open(&config, quiet)?;
    let machine = Machine::build(&config, console.output.writer())?;
    if !quiet && std::io::stderr().is_terminal() {
        let leave = if config.serial == SerialConfig::Stdio { "; Ctrl-A x leaves" } else { "" };
        say(format_args!("running on the {} engine{leave}", machine.engine()));
    }
    signals.watch(machine.control());
    if let Some((statistics, profiles)) = machine.statistics().zip(machine.profiles()) {
        signals.report(Box::new(move || say(format_args!("so far\n{profiles}\n{}", statistics.sum()))));
    }
    let running = console.start(&machine)?;
    let outcome = machine.run();
    running.finish()?;
    Ok((outcome?, signals))
}

/// The person's side of COM1.
struct Console {
    output: Output,
    input: Option<Box<dyn Read + Send>>,
    /// What the output is called in messages.
    name: String,
    stdio: bool,
}

impl Console {
    fn open(config: &MachineConfig, quiet: bool) -> Result<Self, RunError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source| RunError::Console { what, source }
        };
        let (name, sink, input): (_, SerialSink, Option<Box<dyn Read + Send>>) = match &config.serial {
            SerialConfig::Stdio => {
                ("standard output".into(), Box::new(std::io::stdout()), Some(Box::new(std::io::stdin())))
            }
            SerialConfig::Null => ("null".into(), Box::new(std::io::sink()), None),
            SerialConfig::File(path) => {
                let name = path.display().to_string();
                let file = console::open_file(path, config.files()).map_err(failed(&name))?;
                (name, Box::new(file), None)
            }
            SerialConfig::Pty => {
                let (pty, name) = Pty::open().map_err(failed("pty"))?;
                if !quiet {
                    say(format_args!("the serial port is at {name}"));
                }
                let input = pty.try_clone().map_err(failed("pty"))?;
                (name, Box::new(pty), Some(Box::new(input)))
            }
        };
        let output = Output::new(sink).map_err(RunError::Thread)?;
        Ok(Self { output, input, name, stdio: config.serial == SerialConfig::Stdio })
    }

    /// Starts reading input; raw mode lasts as long as what is returned.
    fn start(self, machine: &Machine) -> Result<Running, RunError> {
        let raw = if self.stdio { RawTerminal::stdin() } else { None };
        if let Some(input) = self.input {
            let sink = machine.serial_input();
            console::start_input(input, self.stdio, sink, machine.control()).map_err(RunError::Thread)?;
        }
        Ok(Running { raw, output: self.output, name: self.name })
    }
}

/// Keeps the console as a running guest needs it.
struct Running {
    raw: Option<RawTerminal>,
    output: Output,
    name: String,
}

impl Running {
    /// The guest's last words are out and the terminal is as before; fails if some of its words found no place.
    fn finish(self) -> Result<(), RunError> {
        let lost = self.output.finish();
        drop(self.raw);
        match lost {
            None => Ok(()),
            Some(source) => Err(RunError::Output { what: self.name, source }),
        }
    }
}

fn report(outcome: &Outcome, args: &RunArgs, quiet: bool, signals: &EndingSignals) -> ExitCode {
    if args.stats {
        say(format_args!(
            "engine {}, first instruction after {:.1} ms, {} instructions",
            outcome.engine,
            outcome.ready.as_secs_f64() * 1e3,
            outcome.instructions
        ));
    }
    if let Some(profiles) = &outcome.profiles {
        say(format_args!("what the vCPUs' time went to\n{profiles}"));
    }
    if let Some(kvm) = &outcome.kvm {
        say(format_args!("what KVM did\n{kvm}"));
    }
    if let Some(statistics) = &outcome.statistics {
        say(format_args!("what L0 saw\n{statistics}"));
    }
    if let Some(crash) = &outcome.crash {
        say(format_args!("the guest shut down (triple fault)\n{crash}"));
        return ExitCode::from(EXIT_CRASHED);
    }
    match outcome.event {
        MachineEvent::DebugExit(code) => ExitCode::from(code),
        MachineEvent::Reset => {
            if !quiet {
                say(format_args!("the guest asked for a reset, which ends the run"));
            }
            ExitCode::SUCCESS
        }
        MachineEvent::PowerOff => ExitCode::SUCCESS,
        MachineEvent::Quit => signals.exit_code().map_or(ExitCode::SUCCESS, ExitCode::from),
    }
}
