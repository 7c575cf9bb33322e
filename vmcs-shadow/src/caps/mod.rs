//! What virtual-machine extensions a guest hypervisor is offered, and the capability MSRs that say so (SDM volume 3,
//! appendix A). Never offers what isn't implemented.

mod flags;

use x86defs::cpuid::Feature;
use x86defs::vmx::{basic_cap, ept_vpid_cap, msr, primary, secondary};
use x86defs::{cr0, cr4};

pub use flags::Word;
use flags::{ALIASES, DEPENDENCIES, FEATURES, FLAGS, Offer, WORDS, Words, find};

use crate::access::Access;

/// Bits 30:0 of IA32_VMX_BASIC, and the first word of every VMXON and VMCS region. Changes with the region's layout.
pub const REVISION: u32 = 0x5452_4c01;
/// The VMX-preemption timer counts down once each 2^5 of the TSC.
pub const PREEMPTION_TIMER_RATE: u32 = 5;
/// CR3-target values.
pub const CR3_TARGETS: u32 = 4;
/// Highest recommended number of entries of an MSR area; processors (and we) fail VM entry with more at will.
pub const MSR_LIST_MAX: u32 = 512;

/// Controls of the default1 class: reserved to 1 but where a TRUE capability MSR says otherwise ("Reserved Controls and
/// Default Settings").
mod default1 {
    pub const PIN: u32 = 0x16;
    pub const PRIMARY: u32 = 0x0401_e172;
    pub const EXIT: u32 = 0x0003_6dff;
    pub const ENTRY: u32 = 0x0000_11ff;
}

/// Allowed settings of a group of controls.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Allowed {
    /// Bits that must be 1: bits 31:0 of the capability MSR.
    pub zeros_must_be_one: u32,
    /// Bits that may be 1: bits 63:32 of the capability MSR.
    pub may_be_one: u32,
}

impl Allowed {
    /// True if these controls are allowed.
    pub fn allows(self, controls: u32) -> bool {
        !controls & self.zeros_must_be_one == 0 && controls & !self.may_be_one == 0
    }

    fn msr(self) -> u64 {
        u64::from(self.may_be_one) << 32 | u64::from(self.zeros_must_be_one)
    }
}

/// Why a flag was refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum UnknownFlag {
    #[error("there is no such VMX flag")]
    NoSuchFlag,
    #[error("VMX flag '{name}' is not implemented; leave it out")]
    NotImplemented { name: &'static str },
}

/// The VMX that is offered.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// As asked for.
    wanted: Words,
    /// What the processor has no instruction or mode for.
    denied: Words,
    /// What is offered: as wanted, less what is denied and what depends on something that is missing.
    offered: Words,
    /// CR4 bits the processor has; IA32_VMX_CR4_FIXED1.
    pub cr4_allowed: u64,
}

impl Default for Capabilities {
    fn default() -> Self {
        let mut wanted = Words::default();
        for flag in FLAGS.iter().filter(|flag| flag.offer == Offer::On) {
            wanted.set(flag.word, flag.bits, true);
        }
        let cr4_allowed = 0x7f_ffff & !(cr4::LA57 | cr4::SMXE | 1 << 15 | 1 << 19);
        let mut caps = Self { wanted, denied: Words::default(), offered: wanted, cr4_allowed };
        caps.settle();
        caps
    }
}

impl Capabilities {
    /// Switches a capability on or off by QEMU's name, and with it what depends on it.
    pub fn set_flag(&mut self, name: &str, on: bool) -> Result<(), UnknownFlag> {
        let flag = find(name).ok_or(UnknownFlag::NoSuchFlag)?;
        if on && flag.offer == Offer::Never {
            return Err(UnknownFlag::NotImplemented { name: flag.name });
        }
        self.wanted.set(flag.word, flag.bits, on);
        self.settle();
        Ok(())
    }

    /// True if the capability of this name is offered.
    pub fn is_offered(&self, name: &str) -> bool {
        find(name).is_some_and(|flag| self.offered.has(flag.word, flag.bits))
    }

    /// Every name that may be switched on.
    pub fn flag_names() -> impl Iterator<Item = &'static str> {
        FLAGS.iter().filter(|flag| flag.offer != Offer::Never).map(|flag| flag.name)
    }

    /// Every name [`Self::set_flag`] understands, with those that can only be switched off.
    pub fn known_names() -> impl Iterator<Item = &'static str> {
        FLAGS.iter().map(|flag| flag.name).chain(ALIASES.iter().map(|alias| alias.0))
    }

    /// Takes away what the processor has no instruction or mode for.
    pub fn follow_cpu(&mut self, has: impl Fn(Feature) -> bool) {
        self.denied = Words::default();
        for &(name, feature) in FEATURES {
            if let Some(flag) = find(name).filter(|_| !has(feature)) {
                self.denied.set(flag.word, flag.bits, true);
            }
        }
        self.settle();
    }

    /// Recomputes what is offered.
    fn settle(&mut self) {
        self.offered = Words(std::array::from_fn(|i| self.wanted.0[i] & !self.denied.0[i]));
        let mut before = Words([0; WORDS]);
        while before != self.offered {
            before = self.offered;
            for &(name, needs) in DEPENDENCIES {
                if let Some(flag) = find(name).filter(|_| !self.is_offered(needs)) {
                    self.offered.set(flag.word, flag.bits, false);
                }
            }
            if !self.has_primary(primary::ACTIVATE_SECONDARY) {
                self.offered.0[Word::Secondary as usize] = 0;
            }
        }
    }

    fn word(&self, word: Word) -> u64 {
        self.offered.0[word as usize]
    }

    /// All these bits of a group are offered.
    pub fn has(&self, word: Word, bits: u64) -> bool {
        self.offered.has(word, bits)
    }

    /// All these pin-based controls may be 1.
    pub fn has_pin(&self, bits: u32) -> bool {
        self.has(Word::Pin, bits.into())
    }

    /// All these primary controls may be 1.
    pub fn has_primary(&self, bits: u32) -> bool {
        self.has(Word::Primary, bits.into())
    }

    /// All these secondary controls may be 1.
    pub fn has_secondary(&self, bits: u32) -> bool {
        self.has(Word::Secondary, bits.into())
    }

    /// All these VM-exit controls may be 1.
    pub fn has_exit(&self, bits: u32) -> bool {
        self.has(Word::Exit, bits.into())
    }

    /// All these VM-entry controls may be 1.
    pub fn has_entry(&self, bits: u32) -> bool {
        self.has(Word::Entry, bits.into())
    }

    /// All these bits of IA32_VMX_MISC are set.
    pub fn has_misc(&self, bits: u64) -> bool {
        self.has(Word::Misc, bits)
    }

    /// Allowed settings as the plain capability MSRs report them: default1 controls are 1.
    fn plain(&self, word: Word, default1: u32) -> Allowed {
        Allowed { zeros_must_be_one: default1, may_be_one: default1 | self.word(word) as u32 }
    }

    /// Allowed settings as VM entry checks them, and as the TRUE capability MSRs report them where there are any.
    fn allowed(&self, word: Word, default1: u32) -> Allowed {
        let plain = self.plain(word, default1);
        if self.has(Word::Basic, basic_cap::TRUE_CONTROLS) {
            Allowed { zeros_must_be_one: default1 & !self.word(word) as u32, ..plain }
        } else {
            plain
        }
    }

    /// Pin-based VM-execution controls.
    pub fn pin(&self) -> Allowed {
        self.allowed(Word::Pin, default1::PIN)
    }

    /// Primary processor-based VM-execution controls.
    pub fn primary(&self) -> Allowed {
        self.allowed(Word::Primary, default1::PRIMARY)
    }

    /// Secondary processor-based VM-execution controls.
    pub fn secondary(&self) -> Allowed {
        self.allowed(Word::Secondary, 0)
    }

    /// VM-exit controls.
    pub fn exit(&self) -> Allowed {
        self.allowed(Word::Exit, default1::EXIT)
    }

    /// VM-entry controls.
    pub fn entry(&self) -> Allowed {
        self.allowed(Word::Entry, default1::ENTRY)
    }

    /// CR0 bits that must be 1 in VMX operation (but PE and PG in an unrestricted guest).
    pub fn cr0_fixed0(&self) -> u64 {
        cr0::PE | cr0::NE | cr0::PG
    }

    /// CR0 bits that may be 1.
    pub fn cr0_fixed1(&self) -> u64 {
        0xffff_ffff
    }

    /// CR4 bits that must be 1 in VMX operation.
    pub fn cr4_fixed0(&self) -> u64 {
        cr4::VMXE
    }

    /// CR4 bits that may be 1.
    pub fn cr4_fixed1(&self) -> u64 {
        self.cr4_allowed | cr4::VMXE
    }

    /// VM functions that may be enabled.
    pub fn vm_functions(&self) -> u64 {
        self.word(Word::VmFunctions)
    }

    /// IA32_VMX_EPT_VPID_CAP: what is there of EPT and VPID.
    pub fn ept_vpid(&self) -> u64 {
        let offered = self.word(Word::EptVpid);
        let (mut ept, mut vpid) = (0, 0);
        if self.has_secondary(secondary::ENABLE_EPT) {
            ept = offered & ept_vpid_cap::EPT_HALF | ept_vpid_cap::UNCACHEABLE | ept_vpid_cap::WRITE_BACK;
        }
        if self.has_secondary(secondary::ENABLE_VPID) {
            vpid = offered & !ept_vpid_cap::EPT_HALF;
        }
        ept | vpid
    }

    fn basic(&self) -> u64 {
        const REGION_SIZE: u64 = 4096 << 32;
        const WRITE_BACK: u64 = 6 << 50;
        u64::from(REVISION) | REGION_SIZE | WRITE_BACK | self.word(Word::Basic)
    }

    fn misc(&self) -> u64 {
        let msr_list = u64::from(MSR_LIST_MAX / 512 - 1) << 25;
        u64::from(PREEMPTION_TIMER_RATE) | u64::from(CR3_TARGETS) << 16 | msr_list | self.word(Word::Misc)
    }

    /// A capability MSR, 480H to 491H; `None` where the processor has none, and reading it is #GP.
    pub fn msr(&self, index: u32) -> Option<u64> {
        let true_controls = self.has(Word::Basic, basic_cap::TRUE_CONTROLS);
        let if_true = |allowed: Allowed| true_controls.then(|| allowed.msr());
        let ept_or_vpid =
            self.has_secondary(secondary::ENABLE_EPT) || self.has_secondary(secondary::ENABLE_VPID);
        match index {
            msr::BASIC => Some(self.basic()),
            msr::PINBASED_CTLS => Some(self.plain(Word::Pin, default1::PIN).msr()),
            msr::PROCBASED_CTLS => Some(self.plain(Word::Primary, default1::PRIMARY).msr()),
            msr::EXIT_CTLS => Some(self.plain(Word::Exit, default1::EXIT).msr()),
            msr::ENTRY_CTLS => Some(self.plain(Word::Entry, default1::ENTRY).msr()),
            msr::MISC => Some(self.misc()),
            msr::CR0_FIXED0 => Some(self.cr0_fixed0()),
            msr::CR0_FIXED1 => Some(self.cr0_fixed1()),
            msr::CR4_FIXED0 => Some(self.cr4_fixed0()),
            msr::CR4_FIXED1 => Some(self.cr4_fixed1()),
            msr::VMCS_ENUM => Some(u64::from(Access::new(self).highest_index()) << 1),
            msr::PROCBASED_CTLS2 => {
                self.has_primary(primary::ACTIVATE_SECONDARY).then(|| self.secondary().msr())
            }
            msr::EPT_VPID_CAP => ept_or_vpid.then(|| self.ept_vpid()),
            msr::TRUE_PINBASED_CTLS => if_true(self.pin()),
            msr::TRUE_PROCBASED_CTLS => if_true(self.primary()),
            msr::TRUE_EXIT_CTLS => if_true(self.exit()),
            msr::TRUE_ENTRY_CTLS => if_true(self.entry()),
            msr::VMFUNC => self.has_secondary(secondary::ENABLE_VMFUNC).then(|| self.vm_functions()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
