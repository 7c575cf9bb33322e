//! ACPI fixed hardware: PM1a events and control, PM timer, one GPE block, and the SMI command port that switches
//! ACPI on. The reset register, port 0xCF9, lies within PCI's configuration address and is the host bridge's.
//!
//! The SCI is level-triggered and follows the registers, but only while SCI_EN is set: before, a PC would send
//! SMIs to its firmware, and there is none.
//!
//! Must not know: ACPI tables; they take the constants from here.
//!
//! ACPI specification, "ACPI Hardware Specification".

use std::sync::{Arc, Mutex, Weak};

use super::oscillator::Oscillator;
use super::window::{Window, read_bytes, read_locked, write_bytes, write_locked};
use super::{Bus, BusDevice, IrqLine, MachineControl, MachineEvent};
use crate::clock::{Clock, TimerClient, TimerId};
use crate::vcpu_signal::lock;

/// PM1a event block: status, then enable, two bytes each.
pub const PM1A_EVENT_PORT: u64 = 0x600;
/// PM1a control block, two bytes.
pub const PM1A_CONTROL_PORT: u64 = 0x604;
/// The PM timer, four bytes.
pub const PM_TIMER_PORT: u64 = 0x608;
/// GPE block 0: status bytes, then as many enable bytes.
pub const GPE0_PORT: u64 = 0x620;
/// Length of GPE block 0, in bytes.
pub const GPE0_LENGTH: u64 = 8;
/// SMI command port.
pub const SMI_COMMAND_PORT: u64 = 0xb2;
/// What to write there to get SCIs.
pub const ACPI_ENABLE: u8 = 0x02;
/// What to write there to lose them again.
pub const ACPI_DISABLE: u8 = 0x03;
/// The host bridge's reset control register, for the FADT.
pub const RESET_PORT: u64 = 0xcf9;
/// What to write there to reset the machine.
pub const RESET_VALUE: u8 = 0x06;
/// SLP_TYP of S5, for the DSDT's \_S5 package. No other sleep state is offered.
pub const S5_SLEEP_TYPE: u8 = 5;
/// The PM timer's frequency.
pub const PM_TIMER_HZ: u64 = 3_579_545;

const PM_TIMER: Oscillator = Oscillator::new(PM_TIMER_HZ);

const STATUS_TIMER: u16 = 1 << 0;
const STATUS_GLOBAL: u16 = 1 << 5;
const STATUS_POWER_BUTTON: u16 = 1 << 8;
/// Timer, global lock, power button.
const EVENTS: u16 = STATUS_TIMER | STATUS_GLOBAL | STATUS_POWER_BUTTON;
/// The RTC's alarm cannot wake a machine that never sleeps, so its event never comes; but it can be enabled.
const ENABLES: u16 = EVENTS | 1 << 10;

const CONTROL_SCI_EN: u16 = 1 << 0;
const CONTROL_BUS_MASTER_RELOAD: u16 = 1 << 1;
const CONTROL_SLEEP_ENABLE: u16 = 1 << 13;
const CONTROL_SLEEP_TYPE: u16 = 7 << 10;

const GPE_BYTES: usize = GPE0_LENGTH as usize / 2;

/// How many bits the PM timer has; FADT's TMR_VAL_EXT must say the same.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TimerWidth {
    /// Without TMR_VAL_EXT.
    Bits24,
    /// With TMR_VAL_EXT.
    Bits32,
}

impl TimerWidth {
    fn bits(self) -> u32 {
        match self {
            Self::Bits24 => 24,
            Self::Bits32 => 32,
        }
    }
}

#[derive(Debug, Default)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: [u8; GPE_BYTES],
    gpe_enable: [u8; GPE_BYTES],
    smi_command: u8,
    smi_status: u8,
    /// How often the timer's highest bit had changed when TMR_STS was last looked at.
    carries_seen: u64,
}

/// The power management registers.
pub struct AcpiPm {
    registers: Registers,
    width: TimerWidth,
    clock: Arc<Clock>,
    timer: TimerId,
    sci: IrqLine,
    machine: Arc<dyn MachineControl>,
}

impl AcpiPm {
    /// Registers whose SCI is `sci`, which must be configured as level-triggered.
    pub fn new(
        clock: Arc<Clock>,
        sci: IrqLine,
        machine: Arc<dyn MachineControl>,
        width: TimerWidth,
    ) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|weak: &Weak<Mutex<Self>>| {
            let timer = clock.add_timer(weak.clone());
            Mutex::new(Self { registers: Registers::default(), width, clock, timer, sci, machine })
        })
    }

    /// Puts the registers on the bus; false if a port is taken.
    pub fn attach(pm: &Arc<Mutex<Self>>, ports: &Bus) -> bool {
        let timer = Window::shared(
            pm,
            |pm, at, data| {
                let bytes = lock(pm).timer_value().to_le_bytes();
                read_bytes(at, data, |at| bytes.get(at as usize).copied().unwrap_or(0xff));
            },
            |_, _, _| {},
        );
        let gpe = Window::shared(
            pm,
            |pm, at, data| read_locked(pm, at, data, |pm, at| pm.read_gpe(at)),
            |pm, at, data| write_locked(pm, at, data, Self::write_gpe),
        );
        let smi = Window::shared(
            pm,
            |pm, at, data| read_locked(pm, at, data, |pm, at| pm.read_smi(at)),
            |pm, at, data| write_locked(pm, at, data, Self::write_smi),
        );
        ports.insert(PM1A_EVENT_PORT, 6, pm.clone())
            && ports.insert(PM_TIMER_PORT, 4, timer)
            && ports.insert(GPE0_PORT, GPE0_LENGTH, gpe)
            && ports.insert(SMI_COMMAND_PORT, 2, smi)
    }

    /// Back to the state after power-up.
    pub fn reset(&mut self) {
        self.registers = Registers { carries_seen: self.carries(), ..Registers::default() };
        self.update();
    }

    /// Presses the power button. False if the guest is not in ACPI mode or does not listen to the button, and so
    /// will not hear of it.
    pub fn press_power_button(&mut self) -> bool {
        self.registers.status |= STATUS_POWER_BUTTON;
        self.update();
        self.sci_enabled() && self.registers.enable & STATUS_POWER_BUTTON != 0
    }

    /// Raises general purpose event `number`; beyond the block's length nothing happens.
    pub fn raise_gpe(&mut self, number: u8) {
        if let Some(byte) = self.registers.gpe_status.get_mut(usize::from(number / 8)) {
            *byte |= 1 << (number % 8);
            self.update();
        }
    }

    /// Switches to ACPI mode, as firmware may have done before it started an operating system.
    pub fn enable_acpi(&mut self) {
        self.registers.control |= CONTROL_SCI_EN;
        self.update();
    }

    fn sci_enabled(&self) -> bool {
        self.registers.control & CONTROL_SCI_EN != 0
    }

    fn timer_ticks(&self) -> u64 {
        PM_TIMER.ticks_at(self.clock.now_ns())
    }

    fn timer_value(&self) -> u32 {
        (self.timer_ticks() & ((1 << self.width.bits()) - 1)) as u32
    }

    /// How often the timer's highest bit has changed, which is what sets TMR_STS.
    fn carries(&self) -> u64 {
        self.timer_ticks() >> (self.width.bits() - 1)
    }

    /// Brings TMR_STS, the SCI and the timer up to date.
    fn update(&mut self) {
        let carries = self.carries();
        let registers = &mut self.registers;
        if registers.carries_seen < carries {
            registers.carries_seen = carries;
            registers.status |= STATUS_TIMER;
        }
        let event = registers.status & registers.enable & EVENTS != 0;
        let gpe = registers.gpe_status.iter().zip(&registers.gpe_enable).any(|(s, e)| s & e != 0);
        let wants_timer = registers.enable & STATUS_TIMER != 0 && registers.status & STATUS_TIMER == 0;
        self.sci.set(self.sci_enabled() && (event || gpe));
        if wants_timer {
            let next = carries.saturating_add(1) << (self.width.bits() - 1);
            self.clock.arm(self.timer, PM_TIMER.ns_at(next));
        } else {
            self.clock.disarm(self.timer);
        }
    }

    /// PM1a event and control blocks, which follow one another.
    fn read_pm1(&mut self, at: u64) -> u8 {
        self.update();
        let registers = &self.registers;
        let word = match at / 2 {
            0 => registers.status,
            1 => registers.enable,
            2 => registers.control,
            _ => return 0xff,
        };
        word.to_le_bytes()[(at & 1) as usize]
    }

    fn write_pm1(&mut self, at: u64, value: u8) {
        self.update();
        let shift = 8 * (at & 1) as u32;
        let value = u16::from(value) << shift;
        let bits = 0xff << shift;
        let registers = &mut self.registers;
        match at / 2 {
            0 => registers.status &= !value,
            1 => registers.enable = (registers.enable & !bits) | (value & ENABLES),
            2 => self.write_control(value, bits),
            _ => {}
        }
        self.update();
    }

    fn write_control(&mut self, value: u16, bits: u16) {
        // SCI_EN belongs to the firmware: only the SMI command port changes it. The global lock's release bit
        // and sleep enable always read zero.
        let writable = bits & (CONTROL_BUS_MASTER_RELOAD | CONTROL_SLEEP_TYPE);
        let control = (self.registers.control & !writable) | (value & writable);
        self.registers.control = control;
        let sleep_type = (control & CONTROL_SLEEP_TYPE) >> 10;
        if value & CONTROL_SLEEP_ENABLE != 0 && sleep_type == u16::from(S5_SLEEP_TYPE) {
            self.machine.request(MachineEvent::PowerOff);
        }
    }

    fn read_gpe(&self, at: u64) -> u8 {
        let at = at as usize;
        let registers = &self.registers;
        registers.gpe_status.iter().chain(&registers.gpe_enable).nth(at).copied().unwrap_or(0xff)
    }

    fn write_gpe(&mut self, at: u64, value: u8) {
        let at = at as usize;
        if let Some(status) = self.registers.gpe_status.get_mut(at) {
            *status &= !value;
        } else if let Some(enable) = self.registers.gpe_enable.get_mut(at.wrapping_sub(GPE_BYTES)) {
            *enable = value;
        }
        self.update();
    }

    /// Command and status; the status port is a scratch register between software and firmware.
    fn read_smi(&self, at: u64) -> u8 {
        if at == 0 { self.registers.smi_command } else { self.registers.smi_status }
    }

    fn write_smi(&mut self, at: u64, value: u8) {
        if at != 0 {
            self.registers.smi_status = value;
            return;
        }
        self.registers.smi_command = value;
        match value {
            ACPI_ENABLE => self.registers.control |= CONTROL_SCI_EN,
            ACPI_DISABLE => self.registers.control &= !CONTROL_SCI_EN,
            _ => {}
        }
        self.update();
    }
}

impl TimerClient for Mutex<AcpiPm> {
    fn fire(&self, _now_ns: u64) {
        lock(self).update();
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |at| self.read_pm1(at));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |at, byte| self.write_pm1(at, byte));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ClockSource;
    use crate::devices::test_bench::{Probe, run_to};

    struct Bench {
        clock: Arc<Clock>,
        probe: Arc<Probe>,
        pm: Arc<Mutex<AcpiPm>>,
        ports: Bus,
    }

    fn bench(width: TimerWidth) -> Bench {
        let clock = Clock::new(ClockSource::Virtual, 1_000_000_000);
        let probe = Arc::new(Probe::default());
        let pm = AcpiPm::new(clock.clone(), IrqLine::new(probe.clone(), 9), probe.clone(), width);
        let ports = Bus::default();
        assert!(AcpiPm::attach(&pm, &ports));
        Bench { clock, probe, pm, ports }
    }

    impl Bench {
        fn inw(&self, port: u64) -> u16 {
            let mut data = [0; 2];
            assert!(self.ports.read(port, &mut data));
            u16::from_le_bytes(data)
        }

        fn outw(&self, port: u64, value: u16) {
            assert!(self.ports.write(port, &value.to_le_bytes()));
        }

        fn inl(&self, port: u64) -> u32 {
            let mut data = [0; 4];
            assert!(self.ports.read(port, &mut data));
            u32::from_le_bytes(data)
        }
    }

    #[test]
    fn timer_counts_and_wraps_at_its_width() {
        let narrow = bench(TimerWidth::Bits24);
        let wide = bench(TimerWidth::Bits32);
        for bench in [&narrow, &wide] {
            run_to(&bench.clock, 1_000_000_000);
            assert_eq!(bench.inl(PM_TIMER_PORT), PM_TIMER_HZ as u32);
            run_to(&bench.clock, 10_000_000_000);
        }
        assert_eq!(wide.inl(PM_TIMER_PORT), 35_795_450);
        assert_eq!(narrow.inl(PM_TIMER_PORT), 35_795_450 & 0xff_ffff);
    }

    #[test]
    fn smi_command_switches_acpi_mode() {
        let bench = bench(TimerWidth::Bits24);
        bench.outw(PM1A_CONTROL_PORT, 1);
        assert_eq!(bench.inw(PM1A_CONTROL_PORT), 0, "SCI_EN is not software's");
        bench.ports.write(SMI_COMMAND_PORT, &[ACPI_ENABLE]);
        assert_eq!(bench.inw(PM1A_CONTROL_PORT), 1);
        bench.ports.write(SMI_COMMAND_PORT, &[ACPI_DISABLE]);
        assert_eq!(bench.inw(PM1A_CONTROL_PORT), 0);
    }

    #[test]
    fn power_button_raises_sci_until_its_status_is_cleared() {
        let bench = bench(TimerWidth::Bits24);
        assert!(!lock(&bench.pm).press_power_button(), "nobody listens yet");
        bench.outw(PM1A_EVENT_PORT, 0xffff);
        bench.ports.write(SMI_COMMAND_PORT, &[ACPI_ENABLE]);
        bench.outw(PM1A_EVENT_PORT + 2, 0x0100);
        assert!(!bench.probe.level(9));
        assert!(lock(&bench.pm).press_power_button());
        assert!(bench.probe.level(9));
        assert_eq!(bench.inw(PM1A_EVENT_PORT), 0x0100);
        bench.outw(PM1A_EVENT_PORT, 0x0001);
        assert!(bench.probe.level(9));
        bench.ports.write(PM1A_EVENT_PORT + 1, &[1]);
        assert!(!bench.probe.level(9));
    }

    #[test]
    fn timer_carry_sets_status_and_interrupts() {
        let bench = bench(TimerWidth::Bits24);
        bench.ports.write(SMI_COMMAND_PORT, &[ACPI_ENABLE]);
        bench.outw(PM1A_EVENT_PORT + 2, 1);
        let carry = PM_TIMER.ns_at(1 << 23);
        run_to(&bench.clock, carry - 1);
        assert!(!bench.probe.level(9));
        run_to(&bench.clock, carry);
        assert!(bench.probe.level(9));
        bench.outw(PM1A_EVENT_PORT, 1);
        assert!(!bench.probe.level(9));
        run_to(&bench.clock, PM_TIMER.ns_at(2 << 23));
        assert!(bench.probe.level(9));
    }

    #[test]
    fn sleep_powers_off_for_s5_only() {
        let bench = bench(TimerWidth::Bits24);
        bench.outw(PM1A_CONTROL_PORT, 1 << 13 | 1 << 10);
        assert!(bench.probe.events().is_empty());
        bench.outw(PM1A_CONTROL_PORT, 1 << 13 | 5 << 10);
        assert_eq!(bench.probe.events(), [MachineEvent::PowerOff]);
        assert_eq!(bench.inw(PM1A_CONTROL_PORT) & 1 << 13, 0, "sleep enable is write-only");
    }

    #[test]
    fn gpe_drives_the_sci() {
        let bench = bench(TimerWidth::Bits24);
        lock(&bench.pm).enable_acpi();
        lock(&bench.pm).raise_gpe(9);
        lock(&bench.pm).raise_gpe(255);
        assert!(!bench.probe.level(9));
        bench.ports.write(GPE0_PORT + 4 + 1, &[2]);
        assert!(bench.probe.level(9));
        bench.ports.write(GPE0_PORT + 1, &[2]);
        assert!(!bench.probe.level(9));
    }
}
