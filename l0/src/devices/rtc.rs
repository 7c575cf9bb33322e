//! The MC146818 real-time clock and its CMOS memory, at ports 0x70 and 0x71.
//!
//! The date is not counted but derived from guest time. Interrupt flags are found when they matter: at reads of
//! register C, and by the clock only while an enabled interrupt has not yet been raised.
//!
//! Bit 7 of port 0x70, the NMI mask of PCs, is ignored.
//!
//! Must not know: the host's time (it gets the start as a number), memory beyond its sizes.
//!
//! Motorola MC146818A datasheet; PC use of CMOS bytes as in Intel's chipset datasheets.

use std::sync::{Arc, Mutex, Weak};

use super::oscillator::{MIN_SPACING_NS, Oscillator, next_after};
use super::window::{read_bytes, write_bytes};
use super::{Bus, BusDevice, IrqLine};
use crate::clock::{Clock, ClockSource, TimerClient, TimerId};
use crate::memory::LOW_RAM_END;
use crate::vcpu_signal::lock;

/// Index port, then data port.
pub const RTC_PORT: u64 = 0x70;

/// With `--clock virtual` every run starts at this time, 2024-01-01 00:00:00 UTC, so that runs repeat.
pub const VIRTUAL_EPOCH: u64 = 1_704_067_200;

const CRYSTAL: Oscillator = Oscillator::new(32_768);
const SECOND: i128 = 1_000_000_000;
/// UIP rises this long before the registers change, and stays until they have.
const UPDATE_WINDOW_NS: u64 = 244_000 + 1_984_000;

const SECONDS: usize = 0x00;
const SECONDS_ALARM: usize = 0x01;
const MINUTES: usize = 0x02;
const MINUTES_ALARM: usize = 0x03;
const HOURS: usize = 0x04;
const HOURS_ALARM: usize = 0x05;
const WEEKDAY: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const A: usize = 0x0a;
const B: usize = 0x0b;
const C: usize = 0x0c;
const D: usize = 0x0d;
/// Register of the century, as the FADT says.
pub const CENTURY: usize = 0x32;

const A_UIP: u8 = 0x80;
const B_SET: u8 = 0x80;
const B_PERIODIC: u8 = 0x40;
const B_ALARM: u8 = 0x20;
const B_UPDATE: u8 = 0x10;
const B_BINARY: u8 = 0x04;
const B_24H: u8 = 0x02;
const C_IRQ: u8 = 0x80;
const D_VALID: u8 = 0x80;

/// A date of the Gregorian calendar, UTC.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Date {
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

impl Date {
    /// Days in 400 years.
    const ERA: i64 = 146_097;

    fn from_unix(seconds: i64) -> Self {
        let (days, time) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        // Years that begin in March put the leap day last; 719468 days from March of year 0 to 1970.
        let days = days + 719_468;
        let (era, of_era) = (days.div_euclid(Self::ERA), days.rem_euclid(Self::ERA));
        let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        Self {
            year: year + era * 400 + i64::from(month <= 2),
            month,
            day,
            hour: time / 3600,
            minute: time / 60 % 60,
            second: time % 60,
        }
    }

    /// Values out of range carry over; the month, which indexes, is forced into its range.
    fn to_unix(self) -> i64 {
        let month = self.month.clamp(1, 12);
        let year = self.year - i64::from(month <= 2);
        let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let of_year = (153 * ((month + 9) % 12) + 2) / 5 + self.day - 1;
        let days = era * Self::ERA + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
        days * 86_400 + self.hour * 3600 + self.minute * 60 + self.second
    }
}

/// The chip.
pub struct Rtc {
    index: u8,
    cmos: [u8; 128],
    /// Nanoseconds since 1970 at guest time zero; guest time runs from there while the date is not held.
    epoch_ns: i128,
    /// Sub-second part of the date at the moment it was held.
    held_fraction: Option<i128>,
    /// What register 6 is ahead of the true day of the week, modulo 7.
    weekday_shift: i64,
    /// Guest time up to which register C is up to date.
    flags_at: u64,
    last_interrupt: u64,
    clock: Arc<Clock>,
    timer: TimerId,
    irq: IrqLine,
}

impl Rtc {
    /// A clock that shows `unix_seconds` at guest time zero. See [`start_time`].
    pub fn new(clock: Arc<Clock>, irq: IrqLine, unix_seconds: u64, memory_size: u64) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|weak: &Weak<Mutex<Self>>| {
            let timer = clock.add_timer(weak.clone());
            let mut rtc = Self {
                index: 0,
                cmos: [0; 128],
                epoch_ns: i128::from(unix_seconds) * SECOND,
                held_fraction: None,
                weekday_shift: 0,
                flags_at: 0,
                last_interrupt: 0,
                clock,
                timer,
                irq,
            };
            // 32768 Hz crystal, 1024 Hz periodic rate; 24 hours, BCD.
            rtc.cmos[A] = 0x26;
            rtc.cmos[B] = B_24H;
            rtc.cmos[D] = D_VALID;
            rtc.describe_memory(memory_size);
            Mutex::new(rtc)
        })
    }

    /// Puts both ports on the bus; false if one is taken.
    pub fn attach(rtc: &Arc<Mutex<Self>>, ports: &Bus) -> bool {
        ports.insert(RTC_PORT, 2, rtc.clone())
    }

    /// RESET: interrupts are disabled and forgotten; time and memory are the battery's.
    pub fn reset(&mut self) {
        self.cmos[B] &= !(B_PERIODIC | B_ALARM | B_UPDATE);
        self.cmos[C] = 0;
        self.index = 0;
        self.update_interrupt();
    }

    /// What firmware leaves in CMOS about memory, and their checksum.
    fn describe_memory(&mut self, size: u64) {
        let mut put = |at: usize, value: u64| {
            self.cmos[at] = value as u8;
            self.cmos[at + 1] = (value >> 8) as u8;
        };
        let low = size.min(LOW_RAM_END);
        put(0x15, 640);
        let extended = (low.saturating_sub(1 << 20) >> 10).min(0xffff);
        put(0x17, extended);
        put(0x30, extended);
        put(0x34, (low.saturating_sub(16 << 20) >> 16).min(0xffff));
        let high = (size - low) >> 16;
        put(0x5b, high & 0xffff);
        self.cmos[0x5d] = (high >> 16) as u8;
        // Equipment: coprocessor.
        self.cmos[0x14] = 0x02;
        let sum: u16 = self.cmos[0x10..=0x2d].iter().map(|&byte| u16::from(byte)).sum();
        [self.cmos[0x2e], self.cmos[0x2f]] = sum.to_be_bytes();
    }

    /// The date in nanoseconds since 1970 at guest time `now`.
    fn date_ns(&self, now: u64) -> i128 {
        self.epoch_ns + i128::from(now)
    }

    /// SET, or the divider chain in reset.
    fn is_held(&self) -> bool {
        self.cmos[B] & B_SET != 0 || self.divider_reset()
    }

    fn divider_reset(&self) -> bool {
        self.cmos[A] & 0x60 == 0x60
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value.rem_euclid(100) as u8;
        if self.cmos[B] & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, raw: u8) -> i64 {
        if self.cmos[B] & B_BINARY != 0 { raw.into() } else { i64::from(raw >> 4) * 10 + i64::from(raw & 15) }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.cmos[B] & B_24H != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { 0x80 } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, raw: u8) -> i64 {
        if self.cmos[B] & B_24H != 0 {
            return self.decode(raw);
        }
        self.decode(raw & 0x7f) % 12 + if raw & 0x80 != 0 { 12 } else { 0 }
    }

    /// Writes the date at guest time `now` to its registers.
    fn store_date(&mut self, now: u64) {
        let seconds = self.date_ns(now).div_euclid(SECOND) as i64;
        let date = Date::from_unix(seconds);
        // 1970 began on a Thursday; Sunday is 1.
        let weekday = (seconds.div_euclid(86_400) + 4 + self.weekday_shift).rem_euclid(7) + 1;
        self.cmos[SECONDS] = self.encode(date.second);
        self.cmos[MINUTES] = self.encode(date.minute);
        self.cmos[HOURS] = self.encode_hour(date.hour);
        self.cmos[WEEKDAY] = self.encode(weekday);
        self.cmos[DAY] = self.encode(date.day);
        self.cmos[MONTH] = self.encode(date.month);
        self.cmos[YEAR] = self.encode(date.year);
        self.cmos[CENTURY] = self.encode(date.year.div_euclid(100));
    }

    /// Goes on from the date in the registers, `fraction` nanoseconds into its second.
    fn load_date(&mut self, now: u64, fraction: i128) {
        let date = Date {
            year: self.decode(self.cmos[CENTURY]) * 100 + self.decode(self.cmos[YEAR]),
            month: self.decode(self.cmos[MONTH]),
            day: self.decode(self.cmos[DAY]),
            hour: self.decode_hour(self.cmos[HOURS]),
            minute: self.decode(self.cmos[MINUTES]),
            second: self.decode(self.cmos[SECONDS]),
        };
        let seconds = date.to_unix();
        self.epoch_ns = i128::from(seconds) * SECOND + fraction - i128::from(now);
        let weekday = self.decode(self.cmos[WEEKDAY]) - 1;
        self.weekday_shift = (weekday - (seconds.div_euclid(86_400) + 4)).rem_euclid(7);
    }

    /// Changes register A or B, or a register of the date, which may stop the date or let it go on.
    fn change(&mut self, at: usize, value: u8, now: u64) {
        let was_held = self.is_held();
        let was_reset = self.divider_reset();
        if !was_held {
            self.store_date(now);
            self.held_fraction = Some(self.date_ns(now).rem_euclid(SECOND));
        }
        self.cmos[at] = value;
        if self.is_held() {
            return;
        }
        // A divider chain let go gives its first update after half a second.
        let fraction = match was_reset {
            true => SECOND / 2,
            false => self.held_fraction.take().unwrap_or(0),
        };
        self.held_fraction = None;
        // Only what was written changes; a new format alone reinterprets nothing.
        if at == B && !was_held {
            return;
        }
        self.load_date(now, fraction);
    }

    fn uip(&self, now: u64) -> bool {
        let left = SECOND - self.date_ns(now).rem_euclid(SECOND);
        !self.is_held() && left <= i128::from(UPDATE_WINDOW_NS)
    }

    /// Crystal ticks between periodic interrupts.
    fn period(&self) -> Option<u64> {
        match self.cmos[A] & 15 {
            0 => None,
            // The two fastest codes of this crystal repeat codes 8 and 9.
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// The first second after `after` (since 1970) at which the alarm registers match.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let wanted = |raw: u8, value: i64| (raw < 0xc0).then_some(value);
        let hour = wanted(self.cmos[HOURS_ALARM], self.decode_hour(self.cmos[HOURS_ALARM]));
        let minute = wanted(self.cmos[MINUTES_ALARM], self.decode(self.cmos[MINUTES_ALARM]));
        let second = wanted(self.cmos[SECONDS_ALARM], self.decode(self.cmos[SECONDS_ALARM]));
        let mut at = after + 1;
        // At most one step for each hour, minute and second of a day and the next.
        for _ in 0..24 + 60 + 60 + 3 {
            let time = at.rem_euclid(86_400);
            if hour.is_some_and(|hour| hour != time / 3600) {
                at += 3600 - time % 3600;
            } else if minute.is_some_and(|minute| minute != time / 60 % 60) {
                at += 60 - time % 60;
            } else if second.is_some_and(|second| second != time % 60) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }

    /// Sets the flags of register C for what has happened up to now.
    fn find_flags(&mut self, now: u64) {
        let from = std::mem::replace(&mut self.flags_at, now).min(now);
        if let Some(period) = self.period().filter(|_| !self.divider_reset()) {
            if CRYSTAL.ticks_at(from) / period != CRYSTAL.ticks_at(now) / period {
                self.cmos[C] |= B_PERIODIC;
            }
        }
        if self.is_held() {
            return;
        }
        let before = self.date_ns(from).div_euclid(SECOND) as i64;
        let after = self.date_ns(now).div_euclid(SECOND) as i64;
        if after > before {
            self.cmos[C] |= B_UPDATE;
            if self.next_alarm(before).is_some_and(|alarm| alarm <= after) {
                self.cmos[C] |= B_ALARM;
            }
        }
    }

    /// Drives the line, and arms the clock for the next enabled event if the line is still low.
    fn update_interrupt(&mut self) {
        let now = self.clock.now_ns();
        self.find_flags(now);
        let raised = self.cmos[C] & self.cmos[B] & (B_PERIODIC | B_ALARM | B_UPDATE) != 0;
        if raised && self.cmos[C] & C_IRQ == 0 {
            self.last_interrupt = now;
        }
        self.cmos[C] = self.cmos[C] & !C_IRQ | if raised { C_IRQ } else { 0 };
        self.irq.set(raised);
        match self.next_event(now).filter(|_| !raised) {
            Some(at) => {
                self.clock.arm(self.timer, at.max(self.last_interrupt.saturating_add(MIN_SPACING_NS)));
            }
            None => self.clock.disarm(self.timer),
        }
    }

    /// Guest time of the next event whose interrupt is enabled.
    fn next_event(&self, now: u64) -> Option<u64> {
        let enabled = self.cmos[B];
        let periodic = self.period().filter(|_| enabled & B_PERIODIC != 0 && !self.divider_reset());
        let periodic = periodic.map(|ticks| CRYSTAL.ns_at(next_after(0, ticks, CRYSTAL.ticks_at(now))));
        let second = self.date_ns(now).div_euclid(SECOND) as i64;
        let at_second = |second: i64| {
            u64::try_from(i128::from(second) * SECOND - self.epoch_ns).unwrap_or(u64::MAX).max(now + 1)
        };
        let running = !self.is_held();
        let update = (running && enabled & B_UPDATE != 0).then(|| at_second(second + 1));
        let alarm =
            if running && enabled & B_ALARM != 0 { self.next_alarm(second).map(at_second) } else { None };
        [periodic, update, alarm].into_iter().flatten().min()
    }

    fn read_data(&mut self) -> u8 {
        let now = self.clock.now_ns();
        let at = usize::from(self.index & 0x7f);
        match at {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                if !self.is_held() {
                    self.store_date(now);
                }
                self.cmos[at]
            }
            A => self.cmos[A] | if self.uip(now) { A_UIP } else { 0 },
            C => {
                self.update_interrupt();
                let flags = std::mem::take(&mut self.cmos[C]);
                self.update_interrupt();
                flags
            }
            _ => self.cmos[at],
        }
    }

    fn write_data(&mut self, value: u8) {
        let now = self.clock.now_ns();
        self.update_interrupt();
        let at = usize::from(self.index & 0x7f);
        match at {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => self.change(at, value, now),
            A => self.change(A, value & !A_UIP, now),
            // SET going up switches the update-ended interrupt off.
            B => self.change(B, if value & B_SET != 0 { value & !B_UPDATE } else { value }, now),
            C | D => {}
            _ => self.cmos[at] = value,
        }
        self.update_interrupt();
    }
}

/// Seconds since 1970 that the RTC should show at guest time zero: the host's time, or with a virtual clock a
/// fixed one.
pub fn start_time(clock: &Clock) -> u64 {
    match clock.source() {
        ClockSource::Virtual => VIRTUAL_EPOCH,
        ClockSource::Host => {
            let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            host.as_secs().saturating_sub(clock.now_ns() / 1_000_000_000)
        }
    }
}

impl TimerClient for Mutex<Rtc> {
    fn fire(&self, _now_ns: u64) {
        lock(self).update_interrupt();
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The index cannot be read back.
        read_bytes(offset, data, |port| if port == 1 { self.read_data() } else { 0xff });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |port, byte| match port {
            0 => self.index = byte & 0x7f,
            1 => self.write_data(byte),
            _ => {}
        });
    }
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;
