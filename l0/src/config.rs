//! What a machine is made of, checked: the command line's words turned into values, each with an error that says
//! what to write instead.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::clock::ClockSource;

/// A machine to build.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// What to boot.
    pub kernel: KernelSource,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Multiboot modules: file and its command line.
    pub modules: Vec<Module>,
    /// Where and how to enter a flat image.
    pub flat: Option<FlatImage>,
    /// Bytes of RAM.
    pub memory: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// virtio disks.
    pub disks: Vec<DiskConfig>,
    /// virtio network interfaces.
    pub nets: Vec<NetConfig>,
    /// CPU model and flags.
    pub cpu: String,
    /// Where COM1 goes.
    pub serial: SerialConfig,
    /// Where time comes from.
    pub clock: ClockSource,
    /// Which engine executes.
    pub engine: EngineConfig,
    /// Adds a virtio-rng device.
    pub rng: bool,
    /// Adds a virtio-balloon device.
    pub balloon: bool,
    /// Tell why VMX instructions and VM entries fail.
    pub explain: bool,
    /// Count returns to L0 and what they cost.
    pub stats: bool,
    /// Write what happens to this file.
    pub trace: Option<PathBuf>,
}

impl MachineConfig {
    /// A machine with one CPU and 256 MiB for a kernel image in memory; everything else at its default.
    pub fn for_image(image: &'static [u8]) -> Self {
        Self {
            kernel: KernelSource::Embedded(image),
            initrd: None,
            cmdline: String::new(),
            modules: Vec::new(),
            flat: None,
            memory: 256 << 20,
            cpus: 1,
            disks: Vec::new(),
            nets: Vec::new(),
            cpu: "turtles".into(),
            serial: SerialConfig::Null,
            clock: ClockSource::Host,
            engine: EngineConfig::Soft,
            rng: false,
            balloon: false,
            explain: false,
            stats: false,
            trace: None,
        }
    }

    /// Every file that the guest is made of.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let kernel = match &self.kernel {
            KernelSource::File(path) => Some(path.as_path()),
            KernelSource::Embedded(_) => None,
        };
        let modules = self.modules.iter().map(|module| module.path.as_path());
        let disks = self.disks.iter().map(|disk| disk.path.as_path());
        kernel.into_iter().chain(self.initrd.as_deref()).chain(modules).chain(disks)
    }
}

/// Where the kernel image comes from.
#[derive(Clone, Debug)]
pub enum KernelSource {
    /// A file.
    File(PathBuf),
    /// Embedded in the program.
    Embedded(&'static [u8]),
}

/// A word of the command line that cannot be used.
#[derive(Debug, thiserror::Error, Eq, PartialEq)]
#[error("{0}")]
pub struct ConfigError(pub String);

fn bad<T>(message: String) -> Result<T, ConfigError> {
    Err(ConfigError(message))
}

/// `--engine`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum EngineConfig {
    /// Measure what the host's KVM can do, and pick.
    Auto,
    /// The software CPU.
    Soft,
    /// The software CPU without its translator.
    #[value(name = "soft,interpreter")]
    SoftInterpreter,
    /// The host's KVM.
    Kvm,
    /// The host's KVM, for the ring 3 of guests' guests too where some of its instructions go unnoticed there (`turtles
    /// doctor` names them).
    #[value(name = "kvm,l2")]
    KvmL2,
    /// The same at once, not when it pays: for tests.
    #[value(name = "kvm,l2-eager", hide = true)]
    KvmL2Eager,
    /// KVM and the software CPU in turns, at random: a test.
    #[value(name = "kvm,hop", hide = true)]
    KvmHop,
}

/// `--disk FILE[,ro]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DiskConfig {
    /// Raw image.
    pub path: PathBuf,
    /// The guest may not write.
    pub read_only: bool,
}

impl FromStr for DiskConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let (path, read_only) = match text.rsplit_once(',') {
            Some((path, "ro")) => (path, true),
            Some((path, "rw")) => (path, false),
            Some((_, option)) => {
                return bad(format!(
                    "disk option '{option}' is not known; write --disk FILE or --disk FILE,ro"
                ));
            }
            None => (text, false),
        };
        if path.is_empty() {
            return bad("a disk needs a file; write --disk FILE or --disk FILE,ro".into());
        }
        Ok(Self { path: path.into(), read_only })
    }
}

/// `--net tap=NAME`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NetConfig {
    /// Name of the tap device.
    pub tap: String,
}

impl FromStr for NetConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.strip_prefix("tap=") {
            Some(name) if !name.is_empty() => Ok(Self { tap: name.into() }),
            _ => bad(format!("network '{text}' is not known; write --net tap=NAME")),
        }
    }
}

/// `--module FILE[ ARGUMENTS]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Module {
    /// The file.
    pub path: PathBuf,
    /// Its command line.
    pub cmdline: String,
}

impl FromStr for Module {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let (path, cmdline) = text.split_once(' ').unwrap_or((text, ""));
        if path.is_empty() {
            return bad("a module needs a file; write --module 'FILE ARGUMENTS'".into());
        }
        Ok(Self { path: path.into(), cmdline: cmdline.into() })
    }
}

/// `--flat ADDRESS[,16|32|64]`: load the kernel file as it is, and enter it at its first byte.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FlatImage {
    /// Load and entry address.
    pub address: u64,
    /// Mode it is entered in.
    pub bits: u32,
}

impl FromStr for FlatImage {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let (address, bits) = text.split_once(',').unwrap_or((text, "32"));
        let digits = address.strip_prefix("0x").unwrap_or(address);
        let parsed = u64::from_str_radix(digits, 16).ok().zip(bits.parse().ok());
        match parsed {
            Some((address, bits @ (16 | 32 | 64))) => Ok(Self { address, bits }),
            _ => bad(format!(
                "'{text}' is not a place for a flat image; write --flat 0x100000,32 (or 16, or 64)"
            )),
        }
    }
}

/// `--serial stdio|file=F|pty|null`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SerialConfig {
    /// The terminal this program runs in.
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// A new pseudo-terminal, whose name is printed.
    Pty,
    /// Nowhere.
    Null,
}

impl FromStr for SerialConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "stdio" => Ok(Self::Stdio),
            "pty" => Ok(Self::Pty),
            "null" => Ok(Self::Null),
            _ => match text.strip_prefix("file=") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => bad(format!("serial '{text}' is not known; write stdio, file=FILE, pty or null")),
            },
        }
    }
}

/// A size such as `512M`, `1G`, or plain bytes.
pub fn parse_size(text: &str) -> Result<u64, ConfigError> {
    let (digits, shift) = match text.char_indices().last() {
        Some((i, 'k' | 'K')) => (&text[..i], 10),
        Some((i, 'm' | 'M')) => (&text[..i], 20),
        Some((i, 'g' | 'G')) => (&text[..i], 30),
        Some((i, 't' | 'T')) => (&text[..i], 40),
        _ => (text, 0),
    };
    let size = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    match size {
        Some(size) => Ok(size),
        None => bad(format!("'{text}' is not a size; write for example 512M or 2G")),
    }
}

/// Most virtual CPUs: xAPIC identifiers end at 254.
pub const MAX_CPUS: u32 = 64;

/// Checks `--cpus`.
pub fn parse_cpus(text: &str) -> Result<u32, ConfigError> {
    match text.parse() {
        Ok(n @ 1..=MAX_CPUS) => Ok(n),
        _ => bad(format!("'{text}' CPUs: write a number from 1 to {MAX_CPUS}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_the_usual_suffixes() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2g"), Ok(2 << 30));
        for wrong in ["", "M", "1.5G", "-1", "99999999999999T", "1Q"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn disks_and_nets_are_read_or_refused() {
        assert_eq!("a,b.img,ro".parse(), Ok(DiskConfig { path: "a,b.img".into(), read_only: true }));
        assert_eq!("a.img".parse(), Ok(DiskConfig { path: "a.img".into(), read_only: false }));
        assert!("a.img,cow".parse::<DiskConfig>().is_err());
        assert!("user".parse::<NetConfig>().is_err());
        assert_eq!("tap=t0".parse(), Ok(NetConfig { tap: "t0".into() }));
        assert_eq!("0x7c00,16".parse(), Ok(FlatImage { address: 0x7c00, bits: 16 }));
        assert!("0x7c00,8".parse::<FlatImage>().is_err());
    }
}
