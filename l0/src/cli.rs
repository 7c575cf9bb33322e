//! The command line.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand, ValueEnum};
use turtles::clock::ClockSource;
use turtles::config::{
    DiskConfig, EngineConfig, FlatImage, KernelSource, MachineConfig, Module, NetConfig, SerialConfig,
    parse_cpus, parse_size,
};
use turtles::console::{self, Output, RawTerminal};
use turtles::devices::MachineEvent;
use turtles::error::RunError;
use turtles::vm::{Machine, Outcome, SerialSink};
use turtles::{demo, doctor};

/// Wrong input, or a host that does not let us.
const EXIT_CANNOT: u8 = 2;
/// The guest died.
const EXIT_CRASHED: u8 = 1;

#[derive(Parser)]
#[command(name = "turtles", version, about, max_term_width = 100)]
/// A virtual machine monitor that needs nothing from the host: no VMX, no nested virtualization, not even KVM.
///
/// Start with `turtles demo`. To boot a kernel:
///
///   turtles run --kernel vmlinuz --initrd initrd.gz --cmdline "console=ttyS0"
///
/// The guest's first serial port is this terminal; Ctrl-A x leaves.
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print nothing but the guest's own output, and errors.
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a guest and run it until it powers off.
    Run(Box<RunArgs>),
    /// Boot the embedded guests on every engine that this host has, and print what happened.
    Demo {
        /// Only these guests (default: a showcase); `all` for every one.
        names: Vec<String>,
    },
    /// Say what this host offers, and which engine suits it.
    Doctor,
}

#[derive(Clone, Copy, ValueEnum)]
enum ClockArg {
    /// Guest time follows the host's clock.
    Host,
    /// Guest time counts executed instructions: a run repeats exactly.
    Virtual,
}

#[derive(Args)]
struct RunArgs {
    /// Linux bzImage, PVH or Multiboot ELF, plain ELF, or (with --flat) any bytes.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// Multiboot module with its command line: 'FILE ARGUMENTS'. May be repeated.
    #[arg(long, value_name = "MODULE")]
    module: Vec<Module>,
    /// The kernel is a flat image: load it at ADDRESS (hexadecimal) and enter it there in 16-, 32- or 64-bit mode.
    #[arg(long, value_name = "ADDRESS[,BITS]")]
    flat: Option<FlatImage>,
    /// RAM of the guest.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size)]
    memory: u64,
    /// Number of virtual CPUs.
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_cpus)]
    cpus: u32,
    /// Raw disk image, as a virtio disk; `,ro` makes it read-only. May be repeated.
    #[arg(long, value_name = "FILE[,ro]")]
    disk: Vec<DiskConfig>,
    /// Network interface over an existing tap device. May be repeated.
    #[arg(long, value_name = "tap=NAME")]
    net: Vec<NetConfig>,
    /// CPU model and flags, as QEMU spells them: `turtles,-avx2`, `host`.
    #[arg(long, value_name = "MODEL[,±FLAG...]", default_value = "turtles", allow_hyphen_values = true)]
    cpu: String,
    /// What executes the guest.
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineConfig,
    /// Where the first serial port goes: stdio, file=FILE, pty, null.
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: SerialConfig,
    /// Where guest time comes from.
    #[arg(long, value_enum, default_value = "host")]
    clock: ClockArg,
    /// Leave out the virtio entropy device.
    #[arg(long)]
    no_rng: bool,
    /// Add a virtio memory balloon.
    #[arg(long)]
    balloon: bool,
    /// Say at the end how long it took and what was executed.
    #[arg(long)]
    stats: bool,
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
        }
    }
}

/// The whole command.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = if cli.quiet { "error" } else { "warn" };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level))
        .format_timestamp(None)
        .init();
    match cli.command {
        Command::Run(args) => run(&args, cli.quiet),
        Command::Demo { names } => match demo::run(&names, cli.quiet, &mut std::io::stdout()) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::from(EXIT_CRASHED),
            Err(error) => cannot(&error),
        },
        Command::Doctor => {
            println!("{}", doctor::probe());
            ExitCode::SUCCESS
        }
    }
}

fn cannot(error: &RunError) -> ExitCode {
    eprintln!("turtles: {error}");
    ExitCode::from(EXIT_CANNOT)
}

fn run(args: &RunArgs, quiet: bool) -> ExitCode {
    match run_machine(args, quiet) {
        Ok(outcome) => report(&outcome, args, quiet),
        Err(error) => cannot(&error),
    }
}

fn run_machine(args: &RunArgs, quiet: bool) -> Result<Outcome, RunError> {
    let config = args.config();
    let console = Console::open(&config.serial, quiet)?;
    let machine = Machine::build(&config, console.sink())?;
    if !quiet && std::io::stderr().is_terminal() {
        let leave = if config.serial == SerialConfig::Stdio { "; Ctrl-A x leaves" } else { "" };
        eprintln!("turtles: running on the {} engine{leave}", machine.engine());
    }
    let raw = console.start(&machine)?;
    let outcome = machine.run();
    drop(raw);
    outcome
}

/// The person's side of COM1.
struct Console {
    output: Option<Output>,
    input: Option<Box<dyn Read + Send>>,
    stdio: bool,
}

impl Console {
    fn open(serial: &SerialConfig, quiet: bool) -> Result<Self, RunError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source| RunError::Console { what, source }
        };
        let (sink, input): (SerialSink, Option<Box<dyn Read + Send>>) = match serial {
            SerialConfig::Stdio => (Box::new(std::io::stdout()), Some(Box::new(std::io::stdin()))),
            SerialConfig::Null => (Box::new(std::io::sink()), None),
            SerialConfig::File(path) => {
                let file = console::open_file(path).map_err(failed(&path.display().to_string()))?;
                (Box::new(file), None)
            }
            SerialConfig::Pty => {
                let (file, name) = console::open_pty().map_err(failed("pty"))?;
                if !quiet {
                    eprintln!("turtles: the serial port is at {name}");
                }
                let input = file.try_clone().map_err(failed("pty"))?;
                (Box::new(file), Some(Box::new(input)))
            }
        };
        let output = Output::new(sink).map_err(RunError::Thread)?;
        Ok(Self { output: Some(output), input, stdio: *serial == SerialConfig::Stdio })
    }

    fn sink(&self) -> SerialSink {
        match &self.output {
            Some(output) => output.writer(),
            None => Box::new(std::io::sink()),
        }
    }

    /// Starts reading input; raw mode lasts as long as what is returned.
    fn start(mut self, machine: &Machine) -> Result<Running, RunError> {
        let raw = if self.stdio { RawTerminal::stdin() } else { None };
        if let Some(input) = self.input.take() {
            let sink = machine.serial_input();
            console::start_input(input, self.stdio, sink, machine.control()).map_err(RunError::Thread)?;
        }
        Ok(Running { _raw: raw, _output: self.output.take().map(Arc::new) })
    }
}

/// Keeps the console as a running guest needs it.
struct Running {
    _raw: Option<RawTerminal>,
    _output: Option<Arc<Output>>,
}

fn report(outcome: &Outcome, args: &RunArgs, quiet: bool) -> ExitCode {
    drop(std::io::stdout().flush());
    if args.stats {
        eprintln!(
            "turtles: engine {}, first instruction after {:.1} ms, {} instructions",
            outcome.engine,
            outcome.ready.as_secs_f64() * 1e3,
            outcome.instructions
        );
    }
    if let Some(crash) = &outcome.crash {
        eprintln!("turtles: the guest shut down (triple fault)\n{crash}");
        return ExitCode::from(EXIT_CRASHED);
    }
    match outcome.event {
        MachineEvent::DebugExit(code) => ExitCode::from(code),
        MachineEvent::Reset => {
            if !quiet {
                eprintln!("turtles: the guest asked for a reset, which ends the run");
            }
            ExitCode::SUCCESS
        }
        MachineEvent::PowerOff | MachineEvent::Quit => ExitCode::SUCCESS,
    }
}
