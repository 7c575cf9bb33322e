//! `turtles doctor`: what this host offers, in words, and which engine `--engine auto` picks for it.
//!
//! What the CPU's flags and KVM's capabilities promise is not enough to choose by: a KVM that emulates ring 0 has the
//! same ones. So the choice rests on a measurement of a few milliseconds.

use std::fmt;
use std::fs;

use crate::engine::kvm::{
    CAPABILITIES, Capability, Exits, FAST_RING0, GuestTsc, KvmHost, Need, OpenError, Share, Speed, VmxReach,
};

/// The engine that suits this host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Chosen {
    /// The software CPU.
    Soft,
    /// The host's KVM.
    Kvm,
}

/// A choice with its reason.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EngineChoice {
    /// The engine.
    pub engine: Chosen,
    /// Why.
    pub reason: String,
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.engine {
            Chosen::Soft => "soft (the software CPU)",
            Chosen::Kvm => "kvm",
        };
        write!(f, "{name}: {}", self.reason)
    }
}

/// The host's processor.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Processor {
    /// CPUID's vendor.
    pub vendor: String,
    /// Model name.
    pub model: String,
    /// Has Intel's virtualization.
    pub vmx: bool,
    /// Has AMD's.
    pub svm: bool,
    /// Is itself in a virtual machine.
    pub in_vm: bool,
}

/// One KVM module of the host's kernel.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VendorModule {
    /// `kvm_intel`, `kvm_amd`, ...
    pub name: String,
    /// Its `nested` parameter, where it has one.
    pub nested: Option<bool>,
}

/// What /dev/kvm gave us.
#[derive(Debug)]
pub enum KvmReport {
    /// It cannot be used, and why.
    Closed(OpenError),
    /// It can be opened.
    Open(OpenKvm),
}

/// A KVM that answers.
#[derive(Debug)]
pub struct OpenKvm {
    /// What it answers for every capability we use; 0 is no.
    pub capabilities: Vec<(&'static Capability, i32)>,
    /// What was measured, or why not.
    pub speed: Result<Speed, String>,
    /// The TSC a guest reads.
    pub tsc: Option<GuestTsc>,
    /// Which exits were seen, and what the engine gives KVM to execute.
    pub exits: Option<(Exits, Share)>,
    /// What ring 3 of a guest's guest would do there unseen, if that could be tried.
    pub leaks: Option<&'static [&'static str]>,
}

/// What was found.
#[derive(Debug)]
pub struct HostReport {
    /// The processor.
    pub processor: Processor,
    /// KVM's modules.
    pub modules: Vec<VendorModule>,
    /// KVM itself.
    pub kvm: KvmReport,
}

impl Processor {
    fn from_cpuinfo(text: &str) -> Self {
        let value = |name: &str| {
            text.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim().to_owned())
            })
        };
        let flags = value("flags").unwrap_or_default();
        let has = |flag| flags.split_ascii_whitespace().any(|f| f == flag);
        Self {
            vendor: value("vendor_id").unwrap_or_else(|| "unknown".into()),
            model: value("model name").unwrap_or_else(|| "unknown".into()),
            vmx: has("vmx"),
            svm: has("svm"),
            in_vm: has("hypervisor"),
        }
    }
}

/// KVM's vendor modules, by the names in /sys/module.
fn vendor_modules() -> Vec<VendorModule> {
    let Ok(entries) = fs::read_dir("/sys/module") else { return Vec::new() };
    let mut modules: Vec<_> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .map(|name| {
            let nested = fs::read_to_string(format!("/sys/module/{name}/parameters/nested")).ok();
            VendorModule { nested: nested.map(|text| matches!(text.trim(), "Y" | "1")), name }
        })
        .collect();
    modules.sort_by(|a, b| a.name.cmp(&b.name));
    modules
}

fn look_at_kvm() -> KvmReport {
    let kvm = match KvmHost::open_device() {
        Ok(kvm) => kvm,
        Err(error) => return KvmReport::Closed(error),
    };
    let capabilities = CAPABILITIES.iter().map(|c| (c, KvmHost::ask(&kvm, c.number).max(0))).collect();
    drop(kvm);
    let host = KvmHost::open();
    let tsc = host.as_ref().ok().and_then(|host| host.guest_tsc().ok());
    let exits = host.as_ref().ok().map(|host| (host.exits(), host.share()));
    let leaks = host.as_ref().ok().map(KvmHost::ring3_leaks);
    let speed = host.and_then(|host| host.measure()).map_err(|error| error.to_string());
    KvmReport::Open(OpenKvm { capabilities, speed, tsc, exits, leaks })
}

/// Looks at the host. Takes some milliseconds.
pub fn probe() -> HostReport {
    HostReport {
        processor: Processor::from_cpuinfo(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        modules: vendor_modules(),
        kvm: look_at_kvm(),
    }
}

impl OpenKvm {
    /// The first capability that the engine cannot do without.
    fn lacks(&self) -> Option<&'static Capability> {
        self.capabilities.iter().find(|(c, value)| c.need == Need::Required && *value == 0).map(|(c, _)| *c)
    }
}

impl HostReport {
    /// The engine for `--engine auto`.
    pub fn choose(&self) -> EngineChoice {
        let soft = |reason: String| EngineChoice { engine: Chosen::Soft, reason };
        let kvm = match &self.kvm {
            KvmReport::Closed(error) => return soft(error.to_string()),
            KvmReport::Open(kvm) => kvm,
        };
        if let Some(missing) = kvm.lacks() {
            return soft(format!("KVM has no {}: {}", missing.name, missing.without));
        }
        match &kvm.speed {
            Err(error) => soft(format!("KVM could not run a small guest: {error}")),
            Ok(speed) if speed.ring0_per_second >= FAST_RING0 => EngineChoice {
                engine: Chosen::Kvm,
                reason: format!("it runs ring-0 code at {}", Rate(speed.ring0_per_second)),
            },
            Ok(speed) => soft(format!(
                "KVM runs ring-0 code at only {} (it emulates a kernel's instructions one by one), less than {} from \
                 which it pays; with --engine kvm only long stretches of ring 3 would run on KVM, and all else on the \
                 software CPU",
                Rate(speed.ring0_per_second),
                Rate(FAST_RING0)
            )),
        }
    }
}

/// Instructions a second, for people.
struct Rate(f64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 / 1e6 {
            millions if millions < 10.0 => write!(f, "{millions:.1} million instructions/s"),
            millions => write!(f, "{millions:.0} million instructions/s"),
        }
    }
}

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

impl fmt::Display for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Processor: {} ({})", self.model, self.vendor)?;
        writeln!(f, "  Intel VMX: {}; AMD SVM: {}", yes(self.vmx), yes(self.svm))?;
        if self.in_vm {
            writeln!(f, "  This host is itself a virtual machine.")?;
        }
        if !self.vmx && !self.svm {
            writeln!(f, "  Without either, a KVM on it (PVM for one) can only emulate a guest's kernel.")?;
        }
        Ok(())
    }
}

impl fmt::Display for VendorModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, ", self.name)?;
        match self.nested {
            Some(true) => f.write_str("nested=1: it could nest by itself; turtles does not need it"),
            Some(false) => f.write_str("nested=0: it cannot nest by itself; turtles does not need it to"),
            None => f.write_str("which knows no nesting; turtles does not need it to"),
        }
    }
}

fn reach(vmx: VmxReach, share: Share) -> &'static str {
    match (share, vmx) {
        (Share::User, VmxReach::Emulator) => {
            "make this KVM's emulator give up; the software CPU, which has ring 0 here, executes them at once."
        }
        (Share::User, _) => "are the software CPU's, which has ring 0 here.",
        (Share::All, VmxReach::Emulator) => "reach us where this KVM's emulator gives up.",
        (Share::All, VmxReach::Breakpoint) => "reach us by breakpoints on its #UD and #GP handlers.",
        (Share::All, VmxReach::Nothing) => {
            "do not reach us: guests on this KVM have no VMX; --engine soft gives it to them."
        }
    }
}

impl fmt::Display for OpenKvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (capability, value) in &self.capabilities {
            match (value, capability.need) {
                (0, Need::Required) => {
                    writeln!(f, "  {}: MISSING, and needed: {}", capability.name, capability.without)?;
                }
                (0, Need::Optional) => writeln!(f, "  {}: no: {}", capability.name, capability.without)?,
                _ => writeln!(f, "  {}: yes", capability.name)?,
            }
        }
        if self.tsc.is_some_and(|tsc| !tsc.settable) {
            writeln!(f, "  A guest reads the host's own TSC, whatever KVM is asked.")?;
        }
        if let Some((exits, share)) = &self.exits {
            writeln!(f, "  VMX instructions of a guest hypervisor {}", reach(exits.vmx, *share))?;
            if !exits.tsc_deadline {
                writeln!(
                    f,
                    "  This kernel drops writes of IA32_TSC_DEADLINE: guests on KVM see no such timer."
                )?;
            }
        }
        match self.leaks {
            Some([]) => {
                writeln!(f, "  Guests' guests run their ring 3 on it: whatever they do there can be seen.")?;
            }
            Some(leaks) => writeln!(
                f,
                "  Guests' guests run in the software CPU, since their ring 3 would do unseen here: {}; --engine kvm,l2 \
                 accepts that.",
                leaks.join(", ")
            )?,
            None => {}
        }
        match &self.speed {
            Ok(speed) => {
                let micros = speed.out_round_trip.as_secs_f64() * 1e6;
                writeln!(
                    f,
                    "  Measured: {} in ring 0; {micros:.1} µs for an OUT and back",
                    Rate(speed.ring0_per_second)
                )
            }
            Err(error) => writeln!(f, "  Measured: nothing, because {error}"),
        }
    }
}

impl fmt::Display for HostReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.processor)?;
        match self.modules.as_slice() {
            [] => writeln!(f, "KVM's modules: none loaded (it may be built into the kernel)")?,
            modules => {
                for module in modules {
                    writeln!(f, "KVM's module: {module}")?;
                }
            }
        }
        match &self.kvm {
            KvmReport::Closed(error) => writeln!(f, "KVM: {error}")?,
            KvmReport::Open(kvm) => write!(f, "KVM: /dev/kvm can be opened\n{kvm}")?,
        }
        write!(f, "Engine that --engine auto picks: {}", self.choose())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn report(kvm: KvmReport) -> HostReport {
        HostReport { processor: Processor::default(), modules: Vec::new(), kvm }
    }

    fn open(ring0_per_second: f64) -> KvmReport {
        let speed = Speed { ring0_per_second, out_round_trip: Duration::from_micros(2) };
        let capabilities = CAPABILITIES.iter().map(|c| (c, 1)).collect();
        KvmReport::Open(OpenKvm { capabilities, speed: Ok(speed), tsc: None, exits: None, leaks: None })
    }

    #[test]
    fn the_measurement_decides() {
        assert_eq!(report(open(3e9)).choose().engine, Chosen::Kvm);
        let slow = report(open(3e6)).choose();
        assert_eq!(slow.engine, Chosen::Soft);
        assert!(slow.reason.contains("3.0 million"), "{}", slow.reason);
    }

    #[test]
    fn a_missing_capability_is_named() {
        let KvmReport::Open(mut kvm) = open(3e9) else { unreachable!() };
        for (capability, value) in &mut kvm.capabilities {
            *value = i32::from(capability.name != "KVM_CAP_X86_MSR_FILTER");
        }
        let choice = report(KvmReport::Open(kvm)).choose();
        assert_eq!(choice.engine, Chosen::Soft);
        assert!(choice.reason.contains("KVM_CAP_X86_MSR_FILTER") && choice.reason.contains("5.10"));
    }

    #[test]
    fn no_kvm_says_what_to_do() {
        for (error, advice) in [(OpenError::Missing, "modprobe"), (OpenError::NotPermitted, "group")] {
            let text = report(KvmReport::Closed(error)).to_string();
            assert!(text.contains(advice) && text.contains("picks: soft"), "{text}");
        }
    }

    #[test]
    fn cpuinfo_is_read() {
        let text =
            "vendor_id\t: GenuineIntel\nmodel name\t: Some CPU @ 2GHz\nflags\t\t: fpu vmx hypervisor\n";
        let processor = Processor::from_cpuinfo(text);
        assert_eq!((processor.vendor.as_str(), processor.vmx, processor.svm), ("GenuineIntel", true, false));
        assert!(processor.in_vm && processor.model == "Some CPU @ 2GHz");
    }

    #[test]
    fn this_host_is_described() {
        let text = probe().to_string();
        println!("{text}");
        assert!(text.contains("Processor: ") && text.contains("picks: "));
    }
}
