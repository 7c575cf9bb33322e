//! A vCPU's thread: run → exit → act, as an explicit state.
//!
//! [`MachineBus`] is the vCPU's owner towards every engine: it answers what an instruction under way asks for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use turtles_cpu::attention::Attention;
use turtles_cpu::bus::{Bus as CpuBus, MsrRefused};
use turtles_cpu::profile::{Doing, Profile};
use turtles_cpu::state::Activity;
use turtles_cpu::vmx::Operation;
use turtles_cpu::{Cpu, Exit};
use vmcs_shadow::caps::Capabilities;
use x86defs::vmx::{pin, reason};
use x86defs::{msr, rflags};

use crate::clock::{Clock, ClockSource};
use crate::crash::CrashReport;
use crate::devices::irqchip::IrqChip;
use crate::devices::{Bus, MachineControl, MachineEvent};
use crate::engine::{Engine, EngineError};
use crate::nested::{After, Nested};
use crate::recorder::Recorder;
use crate::vcpu_signal::VcpuSignal;
use crate::vm::Stop;

/// Instructions between two looks at the run as a whole; large enough to cost nothing.
const SLICE: u64 = 50_000_000;

/// What a vCPU's instructions reach outside RAM and CPU.
pub struct MachineBus {
    /// vCPU number.
    pub index: usize,
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Physical addresses without RAM.
    pub mmio: Arc<Bus>,
    /// Interrupt controllers.
    pub irqchip: Arc<IrqChip>,
    /// Guest time.
    pub clock: Arc<Clock>,
    /// This vCPU's mailbox.
    pub signal: Arc<VcpuSignal>,
    /// What VMX the guest is told of.
    pub vmx: Option<Arc<Capabilities>>,
    /// State of the generator behind RDRAND when time is virtual; none takes the host's random bits.
    pub seed: Option<u64>,
    /// Told when devices are at work.
    pub profile: Option<Arc<Profile>>,
}

impl MachineBus {
    /// In virtual time a device may have armed a timer that is due before the present run ends: let the vCPU loop
    /// look.
    fn wrote(&self) {
        if self.clock.source() == ClockSource::Virtual {
            self.signal.attention.raise(Attention::CANCEL);
        }
    }

    /// Offset in this vCPU's local APIC page.
    fn apic_offset(&self, address: u64) -> Option<u64> {
        let page = self.irqchip.apic_page(self.index)?;
        (address & !4095 == page).then_some(address & 4095)
    }
}

impl MachineBus {
    /// Devices do something.
    fn work<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let Some(before) = self.profile.as_ref().map(|profile| profile.begin(Doing::Devices)) else {
            return work(self);
        };
        let result = work(self);
        if let Some(profile) = &self.profile {
            profile.resume(before);
        }
        result
    }
}

impl CpuBus for MachineBus {
    fn mmio_read(&mut self, address: u64, data: &mut [u8]) {
        self.work(|bus| match bus.apic_offset(address) {
            Some(offset) => bus.irqchip.apic_mmio_read(bus.index, offset, data),
            None => drop(bus.mmio.read(address, data)),
        });
    }

    fn mmio_write(&mut self, address: u64, data: &[u8]) {
        self.work(|bus| match bus.apic_offset(address) {
            Some(offset) => bus.irqchip.apic_mmio_write(bus.index, offset, data),
            None => drop(bus.mmio.write(address, data)),
        });
        self.wrote();
    }

    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        self.work(|bus| bus.ports.read(u64::from(port), data));
    }

    fn port_write(&mut self, port: u16, data: &[u8]) {
        self.work(|bus| bus.ports.write(u64::from(port), data));
        self.wrote();
    }

    fn read_msr(&mut self, msr: u32) -> Result<u64, MsrRefused> {
        match msr {
            msr::IA32_APIC_BASE => Ok(self.irqchip.apic_base(self.index)),
            msr::IA32_TSC_DEADLINE => Ok(self.irqchip.tsc_deadline(self.index)),
            msr::IA32_VMX_BASIC..=msr::IA32_VMX_VMFUNC => {
                self.vmx.as_ref().and_then(|vmx| vmx.msr(msr)).ok_or(MsrRefused)
            }
            _ => self.work(|bus| bus.irqchip.apic_msr_read(bus.index, msr)).map_err(|_| MsrRefused),
        }
    }

    fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), MsrRefused> {
        let result = self.work(|bus| match msr {
            msr::IA32_APIC_BASE => bus.irqchip.set_apic_base(bus.index, value),
            msr::IA32_TSC_DEADLINE => {
                bus.irqchip.set_tsc_deadline(bus.index, value);
                Ok(())
            }
            _ => bus.irqchip.apic_msr_write(bus.index, msr, value),
        });
        self.wrote();
        result.map_err(|_| MsrRefused)
    }

    fn cr8(&mut self) -> u8 {
        self.irqchip.cr8(self.index)
    }

    fn set_cr8(&mut self, value: u8) {
        self.irqchip.set_cr8(self.index, value);
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.irqchip.acknowledge(self.index)
    }

    fn tsc(&mut self, ticks: u64) -> u64 {
        self.clock.executed(ticks);
        self.clock.tsc_at(self.clock.now_ns())
    }

    fn random(&mut self) -> Option<u64> {
        if let Some(state) = &mut self.seed {
            // splitmix64: a run in virtual time repeats its random numbers too.
            *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            return Some(mixed ^ mixed >> 31);
        }
        let mut bytes = [0; 8];
        // SAFETY: the pointer and length describe `bytes`.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        (got == 8).then(|| u64::from_le_bytes(bytes))
    }

    fn at(&mut self, ticks: u64) {
        self.clock.executed(ticks);
    }
}

/// A vCPU with its engine.
pub struct Vcpu {
    /// vCPU number; 0 is the bootstrap processor.
    pub index: usize,
    /// State and software CPU.
    pub cpu: Cpu,
    /// What executes it.
    pub engine: Box<dyn Engine>,
    /// Its virtual VMX, if it has any.
    pub nested: Option<Nested>,
    /// An INIT signal that VMX root operation blocks.
    pub init_pending: bool,
    /// Its mailbox.
    pub signal: Arc<VcpuSignal>,
    /// Interrupt controllers (INIT resets the local APIC).
    pub irqchip: Arc<IrqChip>,
    /// Guest time.
    pub clock: Arc<Clock>,
    /// The run as a whole.
    pub stop: Arc<Stop>,
    /// Instructions executed, for `--stats`.
    pub instructions: Arc<AtomicU64>,
    /// What it does, for `--stats`.
    pub profile: Option<Arc<Profile>>,
}

/// What the thread does next.
enum State {
    /// Execute.
    Running,
    /// HLT, or waiting for a start-up IPI: sleep.
    Waiting,
    /// The run is over.
    Stopped,
}

impl Vcpu {
    /// Executes until the run is over.
    pub fn run(&mut self) -> Result<(), EngineError> {
        let mut state = State::Running;
        loop {
            state = match state {
                State::Running => self.run_slice()?,
                State::Waiting => self.wait(),
                State::Stopped => return Ok(()),
            };
            self.instructions.store(self.cpu.state.instructions, Ordering::Relaxed);
        }
    }

    fn run_slice(&mut self) -> Result<State, EngineError> {
        if self.stop.is_set() {
            return Ok(State::Stopped);
        }
        let budget = self.budget();
        let before = self.begin(Doing::Engine);
        let exit = self.engine.run(&mut self.cpu, budget);
        self.resume(before);
        let exit = exit?;
        self.clock.executed(self.cpu.state.ticks());
        if self.clock.source() == ClockSource::Virtual {
            self.clock.fire_due();
        }
        Ok(match exit {
            Exit::Budget | Exit::InterruptWindow => State::Running,
            Exit::Halted => State::Waiting,
            Exit::Attention => self.attend(),
            Exit::Vm => {
                let before = self.begin(Doing::Nested);
                let state = self.vm_exit();
                self.resume(before);
                state
            }
            // L2 entered in the shutdown state: it stays there until something L1 wants to see happens.
            Exit::Shutdown if self.cpu.vmx.operation == Operation::NonRoot => State::Waiting,
            Exit::Shutdown => self.shut_down(),
        })
    }

    fn begin(&self, doing: Doing) -> u32 {
        self.profile.as_ref().map_or(0, |profile| profile.begin(doing))
    }

    fn resume(&self, before: u32) {
        if let Some(profile) = &self.profile {
            profile.resume(before);
        }
    }

    /// How far to execute at once: in virtual time, to the next timer.
    fn budget(&self) -> u64 {
        match self.clock.source() {
            ClockSource::Host => SLICE,
            ClockSource::Virtual => self.clock.instructions_to_deadline().unwrap_or(SLICE).clamp(1, SLICE),
        }
    }

    fn shut_down(&mut self) -> State {
        self.stop.crashed(CrashReport::new(self.index, &self.cpu));
        self.stop.request(MachineEvent::Reset);
        State::Stopped
    }

    /// A VMX instruction of L1, or an exit of L2.
    fn vm_exit(&mut self) -> State {
        let Some(nested) = &mut self.nested else { return self.shut_down() };
        if nested.handle(&mut self.cpu) == After::Shutdown {
            return self.shut_down();
        }
        if self.init_pending && self.cpu.vmx.operation != Operation::Root {
            self.init_pending = false;
            self.init();
        }
        // L2 entered in an inactive state may have an event to take at once, injected or pending: the CPU sees to it.
        if self.cpu.vmx.operation == Operation::NonRoot { State::Running } else { self.by_activity() }
    }

    fn by_activity(&self) -> State {
        match self.cpu.state.activity {
            Activity::Active => State::Running,
            _ => State::Waiting,
        }
    }

    /// Takes INIT and start-up IPIs, and the owner's wish to stop.
    fn attend(&mut self) -> State {
        let attention = Arc::clone(&self.signal.attention);
        // All at once: a start-up IPI seen without the INIT before it would start nothing.
        let seen = attention.take(Attention::CANCEL | Attention::INIT | Attention::SIPI);
        if self.stop.is_set() {
            return State::Stopped;
        }
        if seen & Attention::INIT != 0 {
            self.init();
        }
        if seen & Attention::SIPI != 0 && self.cpu.state.activity == Activity::WaitForSipi {
            self.start_up();
        }
        self.by_activity()
    }

    fn start_up(&mut self) {
        let vector = self.signal.sipi_vector();
        if let (Operation::NonRoot, Some(nested)) = (self.cpu.vmx.operation, &mut self.nested) {
            nested.signal_exit(&mut self.cpu, reason::SIPI, u64::from(vector));
            return;
        }
        self.cpu.state.start_up(vector);
        self.cpu.state_changed();
    }

    fn init(&mut self) {
        match (self.cpu.vmx.operation, &mut self.nested) {
            (Operation::Root, _) => {
                // "INIT signals are blocked in VMX root operation" and stay pending.
                self.init_pending = true;
                return;
            }
            (Operation::NonRoot, Some(nested)) => {
                nested.signal_exit(&mut self.cpu, reason::INIT, 0);
                return;
            }
            _ => {}
        }
        self.irqchip.init(self.index);
        self.cpu.state.init();
        if self.index == 0 {
            // The bootstrap processor would go on at the reset vector, where firmware is on a PC: that is a reset
            // of the machine.
            self.stop.request(MachineEvent::Reset);
        }
        self.cpu.state.activity = Activity::WaitForSipi;
        self.cpu.state_changed();
    }

    fn wait(&mut self) -> State {
        let signals = Attention::INIT | Attention::SIPI | Attention::CANCEL;
        let wake_by = match self.cpu.state.activity {
            Activity::Active => return State::Running,
            activity if self.cpu.vmx.operation == Operation::NonRoot => signals | self.wakes_l2(activity),
            Activity::Halted if self.cpu.state.rflags() & rflags::IF != 0 => {
                signals | Attention::NMI | Attention::INTERRUPT
            }
            Activity::Halted if !self.cpu.state.nmi_blocked => signals | Attention::NMI,
            _ => signals,
        };
        if let Some(recorder) = self.recorder() {
            recorder.sleep();
        }
        if self.clock.source() == ClockSource::Virtual {
            while self.signal.attention.get() & wake_by == 0 && self.clock.skip_to_next_deadline() {
                self.clock.fire_due();
            }
        }
        let before = self.begin(Doing::Idle);
        self.signal.wait(wake_by, None);
        self.resume(before);
        if let Some(recorder) = self.recorder() {
            recorder.wake();
        }
        let seen = self.signal.attention.get();
        if seen & signals != 0 { self.attend() } else { State::Running }
    }

    fn recorder(&mut self) -> Option<&mut Recorder> {
        self.nested.as_mut()?.recorder.as_deref_mut()
    }

    /// What ends a wait of L2's: what L1 wants to see, and what L2 itself would take.
    fn wakes_l2(&self, activity: Activity) -> u32 {
        let controls = &self.cpu.vmx.controls;
        let state = &self.cpu.state;
        let mut bits = 0;
        if activity == Activity::WaitForSipi {
            return bits;
        }
        if controls.has_pin(pin::NMI_EXITING) || !state.nmi_blocked {
            bits |= Attention::NMI;
        }
        if controls.has_pin(pin::PREEMPTION_TIMER) {
            bits |= Attention::PREEMPTION;
        }
        let interrupts =
            controls.has_pin(pin::EXTERNAL_INTERRUPT_EXITING) || state.rflags() & rflags::IF != 0;
        if interrupts && activity == Activity::Halted {
            bits |= Attention::INTERRUPT;
        }
        bits
    }
}
