//! The machine: RAM, chips, PCI devices, vCPUs; built from a [`MachineConfig`], run to its end.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use turtles_cpu::Cpu;
use turtles_cpu::attention::Attention;
use turtles_cpu::cpuid::{CpuModel, Feature};
use turtles_cpu::mmu::walk::PHYSICAL_BITS;
use turtles_cpu::phys::{PhysMemory, RamRange};
use turtles_cpu::state::{Activity, CpuState, X87State};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmcs_shadow::access::Access;
use vmcs_shadow::caps::Capabilities;
use x86defs::efer;
use x86defs::vmx::feature_control;

use crate::boot::{self, BootState};
use crate::chipset::Chipset;
use crate::clock::{Clock, ClockSource};
use crate::config::{EngineConfig, FlatImage, KernelSource, MachineConfig};
use crate::console;
use crate::cpu_option::CpuOption;
use crate::crash::CrashReport;
use crate::devices::lapic::APIC_TIMER_HZ;
use crate::devices::virtio::DmaObserver;
use crate::devices::{MachineControl, MachineEvent};
use crate::doctor;
use crate::engine::kvm::{self, GuestTsc, KvmHost, KvmVm, L2Policy, Share};
use crate::engine::{Engine, EngineError, Soft};
use crate::error::RunError;
use crate::memory::{HIGH_RAM_START, LOW_RAM_END, Ram};
use crate::nested::{Explainer, Nested, PreemptionTimer};
use crate::profile::Profiles;
use crate::recorder::Recorder;
use crate::stats::{AllStatistics, Statistics};
use crate::trace::Trace;
use crate::vcpu::{MachineBus, Vcpu};
use crate::vcpu_signal::{VcpuSignal, lock};

/// Guest TSC frequency when time is the host's: near what server parts have, and a round number.
const HOST_TSC_HZ: u64 = 2_000_000_000;
/// Guest TSC frequency in virtual time: one tick an instruction.
const VIRTUAL_TSC_HZ: u64 = 1_000_000_000;
/// Wall-clock time at power-on when time is virtual: 2026-01-01 00:00:00 UTC.
const VIRTUAL_EPOCH: u64 = 1_767_225_600;

/// How a run ends: the first request wins.
#[derive(Default)]
pub struct Stop {
    set: AtomicBool,
    event: Mutex<Option<MachineEvent>>,
    crash: Mutex<Option<CrashReport>>,
    failure: Mutex<Option<RunError>>,
    signals: Mutex<Vec<Arc<VcpuSignal>>>,
    changed: Condvar,
}

impl Stop {
    /// The run is over.
    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }

    /// Keeps what is to be said of a guest that died.
    pub fn crashed(&self, report: CrashReport) {
        lock(&self.crash).get_or_insert(report);
    }

    fn failed(&self, failure: RunError) {
        lock(&self.failure).get_or_insert(failure);
        self.request(MachineEvent::Quit);
    }
}

impl MachineControl for Stop {
    fn request(&self, event: MachineEvent) {
        lock(&self.event).get_or_insert(event);
        self.set.store(true, Ordering::Release);
        for signal in lock(&self.signals).iter() {
            signal.raise(Attention::CANCEL);
        }
        self.changed.notify_all();
    }

    fn fail(&self, why: String) {
        self.failed(RunError::Device(why));
    }
}

/// Why and how a run ended.
pub struct Outcome {
    /// What ended it.
    pub event: MachineEvent,
    /// Set when a vCPU shut down (triple fault).
    pub crash: Option<CrashReport>,
    /// Instructions executed by the software CPU, all vCPUs.
    pub instructions: u64,
    /// Time from process start, or from [`Machine::build`], to the first guest instruction.
    pub ready: std::time::Duration,
    /// Name of the engine.
    pub engine: &'static str,
    /// What `--stats` counted between us and KVM.
    pub kvm: Option<kvm::Stats>,
    /// What `--stats` counted.
    pub statistics: Option<Statistics>,
    /// What the vCPUs' time went to, with `--stats`.
    pub profiles: Option<Profiles>,
}

/// Tells the software CPU what devices wrote.
struct DmaToCpu(Arc<PhysMemory>);

impl DmaObserver for DmaToCpu {
    fn wrote(&self, gpa: u64, len: u64) {
        self.0.wrote(gpa, len);
    }
}

/// A machine, ready to run.
pub struct Machine {
    started: Instant,
    vcpus: Vec<Vcpu>,
    chipset: Chipset,
    clock: Arc<Clock>,
    stop: Arc<Stop>,
    counters: Vec<Arc<AtomicU64>>,
    engine: &'static str,
    trace: Option<Arc<Trace>>,
    trace_path: Option<PathBuf>,
    statistics: Option<AllStatistics>,
    profiles: Option<Profiles>,
}

/// The other half of what a machine needs: where COM1's output goes.
pub type SerialSink = Box<dyn std::io::Write + Send>;

impl Machine {
    /// Builds a machine; `serial` takes COM1's output.
    pub fn build(config: &MachineConfig, serial: SerialSink) -> Result<Self, RunError> {
        let started = Instant::now();
        let ram = Ram::new(config.memory)?;
        let kvm = open_engine(config, &ram)?;
        let guest_tsc = kvm.as_ref().map(|kvm| kvm.tsc);
        let tsc_hz = match config.clock {
            ClockSource::Host => guest_tsc.and_then(|tsc| tsc.hz).unwrap_or(HOST_TSC_HZ),
            ClockSource::Virtual => VIRTUAL_TSC_HZ,
        };
        if config.clock == ClockSource::Virtual && config.cpus != 1 {
            return Err(RunError::VirtualClockCpus);
        }
        let asked = CpuOption::parse(&config.cpu)?;
        let asked = match &kvm {
            Some(kvm) if kvm.vm.host().share() == Share::All => limit_to_kvm(asked, kvm.vm.host())?,
            _ => asked,
        };
        let model = asked.model.with_clocks(tsc_hz, APIC_TIMER_HZ).with_cpus(config.cpus);
        for warning in model.warnings() {
            log::warn!("{warning}");
        }
        let physical = software_memory(&ram);
        let tsc_start = if guest_tsc.is_some_and(|tsc| !tsc.settable) { GuestTsc::host_now() } else { 0 };
        let clock = Clock::with_tsc_start(config.clock, tsc_hz, tsc_start);
        let stop = Arc::new(Stop::default());
        let signals: Vec<_> = (0..config.cpus).map(|_| Arc::new(VcpuSignal::default())).collect();
        lock(&stop.signals).clone_from(&signals);
        let observer = Arc::new(DmaToCpu(Arc::clone(&physical)));
        let chipset = Chipset::build(
            config,
            &ram,
            &clock,
            &signals,
            Arc::clone(&stop),
            observer,
            serial,
            wall_clock(config),
        )?;
        let start = load(config, &ram)?;
        if start.efer & efer::LMA != 0 && !model.features().has(Feature::Lm) {
            return Err(RunError::NoLongMode);
        }
        let trace = config.trace.as_ref().map(|path| start_trace(path, config, &clock)).transpose()?;
        let mut machine = Self {
            started,
            vcpus: Vec::new(),
            chipset,
            clock,
            stop,
            counters: Vec::new(),
            trace,
            trace_path: config.trace.clone(),
            statistics: config.stats.then(AllStatistics::default),
            profiles: config.stats.then(Profiles::default),
            engine: if kvm.is_some() { "kvm" } else { "soft" },
        };
        let vm = kvm.map(|kvm| Arc::new(kvm.vm));
        let vmx = asked.vmx.map(Arc::new);
        let model = Arc::new(model);
        for (index, signal) in signals.iter().enumerate() {
            let vcpu = machine.vcpu(index, signal, &physical, &model, vmx.as_ref(), config, vm.as_ref())?;
            machine.vcpus.push(vcpu);
        }
        if let Some(first) = machine.vcpus.first_mut() {
            first.cpu.state = cpu_state(&start);
            leave_as_firmware(&mut first.cpu.state, vmx.is_some());
            first.cpu.state_changed();
        }
        Ok(machine)
    }

    fn vcpu(
        &mut self,
        index: usize,
        signal: &Arc<VcpuSignal>,
        physical: &Arc<PhysMemory>,
        model: &Arc<CpuModel>,
        vmx: Option<&Arc<Capabilities>>,
        config: &MachineConfig,
        vm: Option<&Arc<KvmVm>>,
    ) -> Result<Vcpu, RunError> {
        let profile = self.profiles.as_ref().map(Profiles::add_vcpu);
        let bus = MachineBus {
            index,
            ports: Arc::clone(&self.chipset.ports),
            mmio: Arc::clone(&self.chipset.mmio),
            irqchip: Arc::clone(&self.chipset.irqchip),
            clock: Arc::clone(&self.clock),
            signal: Arc::clone(signal),
            vmx: vmx.cloned(),
            seed: (config.clock == ClockSource::Virtual).then_some(1),
            profile: profile.clone(),
        };
        let attention = Arc::clone(&signal.attention);
        let mut cpu =
            Cpu::new(Arc::clone(physical), Box::new(bus), Arc::clone(model), attention, index as u32);
        cpu.set_translate(config.engine != EngineConfig::SoftInterpreter);
        if let Some(profile) = &profile {
            cpu.set_profile(Arc::clone(profile));
        }
        cpu.state.activity = Activity::WaitForSipi;
        leave_as_firmware(&mut cpu.state, vmx.is_some());
        cpu.state_changed();
        let engine: Box<dyn Engine> = match vm {
            Some(vm) => {
                cpu.expect_foreign_writes();
                let mut vcpu = vm.vcpu(index, Arc::clone(signal), &cpu)?;
                if config.engine == EngineConfig::KvmHop {
                    vcpu.hop(index);
                }
                Box::new(vcpu)
            }
            None => Box::new(Soft),
        };
        let nested = vmx.map(|capabilities| {
            cpu.vmx.access = Access::new(capabilities);
            let mut nested = Nested::new(Arc::clone(capabilities), PreemptionTimer::new(&self.clock, signal));
            if config.explain {
                nested.explain(Explainer::new(index));
            }
            let statistics = self.statistics.as_mut().map(AllStatistics::add_vcpu);
            nested.recorder = Recorder::new(index, Arc::clone(&self.clock), self.trace.clone(), statistics);
            nested
        });
        let instructions = Arc::new(AtomicU64::new(0));
        self.counters.push(Arc::clone(&instructions));
        Ok(Vcpu {
            index,
            cpu,
            engine,
            nested,
            init_pending: false,
            signal: Arc::clone(signal),
            irqchip: Arc::clone(&self.chipset.irqchip),
            clock: Arc::clone(&self.clock),
            stop: Arc::clone(&self.stop),
            instructions,
            profile,
        })
    }

    /// The COM1 device's input side.
    pub fn serial_input(&self) -> crate::console::InputSink {
        self.chipset.serial_input()
    }

    /// Ends the run from outside.
    pub fn control(&self) -> Arc<dyn MachineControl> {
        Arc::clone(&self.stop) as Arc<dyn MachineControl>
    }

    /// What `--stats` counts, for looking at it meanwhile.
    pub fn statistics(&self) -> Option<AllStatistics> {
        self.statistics.clone()
    }

    /// What `--stats` samples, likewise.
    pub fn profiles(&self) -> Option<Profiles> {
        self.profiles.clone()
    }

    /// Name of the engine chosen.
    pub fn engine(&self) -> &'static str {
        self.engine
    }

    /// Runs until something ends it.
    pub fn run(mut self) -> Result<Outcome, RunError> {
        if self.clock.source() == ClockSource::Host {
            self.clock.start_thread().map_err(RunError::Thread)?;
        }
        let sampler = self.profiles.as_ref().map(Profiles::start).transpose().map_err(RunError::Thread)?;
        let ready = self.started.elapsed();
        let mut threads = Vec::new();
        let mut refused = None;
        for mut vcpu in self.vcpus.drain(..) {
            let stop = Arc::clone(&self.stop);
            let body = move || {
                let guard = StopOnPanic(Arc::clone(&stop));
                if let Some(profile) = &vcpu.profile {
                    crate::profile::begin_thread(profile);
                }
                if let Err(failure) = vcpu.run() {
                    stop.failed(failure.into());
                }
                std::mem::forget(guard);
                vcpu.engine.kvm_stats()
            };
            let name = format!("vcpu{}", threads.len());
            match std::thread::Builder::new().name(name).spawn(body) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    refused = Some(error);
                    self.stop.request(MachineEvent::Quit);
                    break;
                }
            }
        }
        // Whatever went wrong, nothing of the machine runs on: all threads are waited for before anything is said.
        let ended: Vec<_> = threads.into_iter().map(std::thread::JoinHandle::join).collect();
        let panicked = ended.iter().any(Result::is_err);
        let kvm = ended.into_iter().flatten().flatten().reduce(|mut all, one| {
            all += one;
            all
        });
        if let Some((profiles, thread)) = self.profiles.as_ref().zip(sampler) {
            profiles.stop();
            drop(thread.join());
        }
        self.clock.stop();
        self.chipset.finish();
        if let Some(error) = refused {
            return Err(RunError::Thread(error));
        }
        if panicked {
            return Err(RunError::Internal);
        }
        if let Some(failure) = lock(&self.stop.failure).take() {
            return Err(failure);
        }
        if let Some((trace, path)) = self.trace.zip(self.trace_path) {
            trace.finish().map_err(|source| RunError::Trace { path, source })?;
        }
        let event = lock(&self.stop.event).unwrap_or(MachineEvent::Quit);
        Ok(Outcome {
            event,
            crash: lock(&self.stop.crash).take(),
            instructions: self.counters.iter().map(|c| c.load(Ordering::Relaxed)).sum(),
            ready,
            engine: self.engine,
            kvm: self.statistics.is_some().then_some(kvm).flatten(),
            statistics: self.statistics.map(|all| all.sum()),
            profiles: self.profiles,
        })
    }
}

/// A vCPU thread that panics (a bug of ours) must not leave the others waiting for ever.
struct StopOnPanic(Arc<Stop>);

impl Drop for StopOnPanic {
    fn drop(&mut self) {
        self.0.request(MachineEvent::Quit);
    }
}

fn start_trace(path: &Path, config: &MachineConfig, clock: &Arc<Clock>) -> Result<Arc<Trace>, RunError> {
    match console::open_file(path, config.files()) {
        Ok(file) => Ok(Trace::new(file, path, Arc::clone(clock), config.cpus as usize)),
        Err(source) => Err(RunError::Trace { path: path.into(), source }),
    }
}

/// A virtual machine in the host's KVM.
struct OnKvm {
    vm: KvmVm,
    tsc: GuestTsc,
}

impl OnKvm {
    fn new(host: &KvmHost, ram: &Ram) -> Result<Self, EngineError> {
        Ok(Self { tsc: host.guest_tsc()?, vm: KvmVm::new(host, ram)? })
    }
}

/// Opens KVM if it is to be the engine.
fn open_engine(config: &MachineConfig, ram: &Ram) -> Result<Option<OnKvm>, RunError> {
    match config.engine {
        EngineConfig::Soft | EngineConfig::SoftInterpreter => Ok(None),
        EngineConfig::Kvm | EngineConfig::KvmL2 | EngineConfig::KvmL2Eager | EngineConfig::KvmHop
            if config.clock == ClockSource::Virtual =>
        {
            Err(RunError::VirtualClockKvm)
        }
        EngineConfig::Kvm | EngineConfig::KvmHop => Ok(Some(OnKvm::new(&KvmHost::open()?, ram)?)),
        EngineConfig::KvmL2 => Ok(Some(OnKvm::new(&KvmHost::open()?.with_l2(L2Policy::Leaky), ram)?)),
        EngineConfig::KvmL2Eager => Ok(Some(OnKvm::new(&KvmHost::open()?.with_l2(L2Policy::Eager), ram)?)),
        EngineConfig::Auto if config.clock == ClockSource::Virtual => Ok(None),
        EngineConfig::Auto => {
            let choice = doctor::probe().choose();
            log::info!("engine: {choice}");
            if choice.engine == doctor::Chosen::Soft {
                return Ok(None);
            }
            // What KVM could do with a small guest it may refuse this one: too much memory, for example.
            match KvmHost::open().and_then(|host| OnKvm::new(&host, ram)) {
                Ok(kvm) => Ok(Some(kvm)),
                Err(error) => {
                    log::warn!("{error}; the software CPU runs the guest instead");
                    Ok(None)
                }
            }
        }
    }
}

/// The processor as guests on this KVM can have it.
fn limit_to_kvm(asked: CpuOption, host: &KvmHost) -> Result<CpuOption, RunError> {
    let asked = if host.reaches_vmx() {
        asked
    } else {
        log::warn!(
            "VMX instructions do not reach us on this KVM: the guest has no VMX; --engine soft gives it VMX"
        );
        asked.without_vmx()?
    };
    Ok(asked.limited_to(|bit| host.can_give(bit.leaf, bit.subleaf, bit.register, bit.bit))?)
}

/// Guest RAM as the software CPU takes it.
pub(crate) fn software_memory(ram: &Ram) -> Arc<PhysMemory> {
    let ranges = ram
        .memory
        .iter()
        .map(|region| RamRange { start: region.start_addr().0, len: region.len(), host: region.as_ptr() })
        .collect();
    // SAFETY: the regions are page-aligned mappings of guest RAM, and `keep_alive` keeps them mapped; everyone else
    // uses them as guest memory through vm-memory.
    Arc::new(unsafe { PhysMemory::new(ranges, Box::new(Arc::clone(&ram.memory))) })
}

fn wall_clock(config: &MachineConfig) -> u64 {
    match config.clock {
        ClockSource::Host => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        ClockSource::Virtual => VIRTUAL_EPOCH,
    }
}

fn load(config: &MachineConfig, ram: &Ram) -> Result<BootState, RunError> {
    let kernel = match &config.kernel {
        KernelSource::File(path) => path.clone(),
        KernelSource::Embedded(_) => "guest".into(),
    };
    let spec = boot::BootSpec {
        kernel,
        initrd: config.initrd.clone(),
        cmdline: config.cmdline.clone(),
        modules: config.modules.iter().map(|m| (m.path.clone(), m.cmdline.clone())).collect(),
        cpus: config.cpus,
        flat: config.flat.map(flat_spec),
    };
    Ok(match &config.kernel {
        KernelSource::File(_) => boot::load(&ram.memory, &ram.ranges, &spec)?,
        KernelSource::Embedded(image) => boot::load_bytes(&ram.memory, &ram.ranges, image, &spec)?,
    })
}

fn flat_spec(flat: FlatImage) -> boot::FlatSpec {
    let mode = match flat.bits {
        16 => boot::FlatMode::Real16,
        64 => boot::FlatMode::Long64,
        _ => boot::FlatMode::Protected32,
    };
    boot::FlatSpec { address: flat.address, mode }
}

/// What firmware would have set up on every CPU: an initialised x87 unit, and memory types (write-back, but
/// uncacheable from the PCI window to 4 GiB), and VMX allowed for good if there is VMX.
fn leave_as_firmware(state: &mut CpuState, vmx: bool) {
    const WRITE_BACK: u64 = 6;
    const UNCACHEABLE: u64 = 0;
    const ENABLE: u64 = 1 << 11;
    const VALID: u64 = 1 << 11;
    state.x87 = X87State::default();
    if vmx {
        state.msrs.feature_control = feature_control::LOCK | feature_control::VMX_OUTSIDE_SMX;
    }
    let mtrr = &mut state.msrs.mtrr;
    mtrr.def_type = ENABLE | WRITE_BACK;
    mtrr.variable[0] = LOW_RAM_END | UNCACHEABLE;
    mtrr.variable[1] = ((1 << PHYSICAL_BITS) - (HIGH_RAM_START - LOW_RAM_END)) | VALID;
}

/// The registers a boot protocol asks for, over the state after INIT.
fn cpu_state(start: &BootState) -> CpuState {
    let mut state = CpuState::reset();
    for (i, &value) in start.gpr.iter().enumerate() {
        state.gpr.set(i, value);
    }
    let segment = |s: &boot::Segment| turtles_cpu::state::Segment {
        base: s.base,
        limit: s.limit,
        access: s.access,
        selector: s.selector,
    };
    for (to, from) in state.segments.iter_mut().zip(&start.segments) {
        *to = segment(from);
    }
    state.ldtr = segment(&start.ldtr);
    state.tr = segment(&start.tr);
    state.gdtr = turtles_cpu::state::TableRegister { base: start.gdtr.base, limit: start.gdtr.limit };
    state.idtr = turtles_cpu::state::TableRegister { base: start.idtr.base, limit: start.idtr.limit };
    state.cr0 = start.cr0;
    state.cr3 = start.cr3;
    state.cr4 = start.cr4;
    state.efer = start.efer;
    state.rip = start.rip;
    state.set_rflags(start.rflags);
    state
}
