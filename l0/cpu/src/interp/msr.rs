//! RDMSR and WRMSR: the MSRs that are the CPU's own, with the rules for what may be written. The owner is asked for all
//! others; what nobody knows is #GP(0).

use iced_x86::{Instruction, Mnemonic};
use x86defs::msr::{self as m, apic_base};
use x86defs::vmx::{feature_control, msr as capability};
use x86defs::{cr0, efer};

use crate::Cpu;
use crate::bus::MsrRefused;
use crate::cpuid::{ARCH_CAPABILITIES, Feature, MISC_LIMIT_CPUID, MISC_XD_DISABLE};
use crate::mmu::walk::PHYSICAL_BITS;
use crate::op::{Cold, ColdHandler};
use crate::state::{Seg, reg};
use crate::trap::{Exec, Fault};

/// How this family executes `insn`, if it is its own.
pub(crate) fn lower(insn: &Instruction) -> Option<ColdHandler> {
    Some(match insn.mnemonic() {
        Mnemonic::Rdmsr => rdmsr,
        Mnemonic::Wrmsr => wrmsr,
        _ => return None,
    })
}

/// Both leave the block: reading may move an owner's state on.
pub(crate) fn ends_block(_: &Instruction) -> bool {
    true
}

/// Variable-range MTRRs.
const VARIABLE_MTRRS: u64 = 8;
/// IA32_MTRRCAP: the above, fixed ranges, write-combining.
const MTRR_CAP: u64 = VARIABLE_MTRRS | 1 << 8 | 1 << 10;
const MTRR_DEF_TYPE_BITS: u64 = 0xcff;
const MTRR_MASK_VALID: u64 = 1 << 11;
/// IA32_MISC_ENABLE: no BTS, no PEBS (read-only).
const MISC_READ_ONLY: u64 = 1 << 11 | 1 << 12;
const MISC_PERFMON: u64 = 1 << 7;
/// Fast strings, TCC, EIST, MONITOR, CPUID limit, xTPR disable, XD disable.
const MISC_WRITABLE: u64 = 1 | 1 << 3 | 1 << 16 | 1 << 18 | MISC_LIMIT_CPUID | 1 << 23 | MISC_XD_DISABLE;
/// IA32_FEATURE_CONTROL without VMX.
const FEATURE_CONTROL: u64 = feature_control::LOCK;
/// Its bits with VMX (and without SMX).
const FEATURE_CONTROL_BITS: u64 = feature_control::LOCK | feature_control::VMX_OUTSIDE_SMX;
/// IA32_DEBUGCTL: LBR (accepted and forgotten) and BTF.
const DEBUGCTL_LBR: u64 = 1;
const DEBUGCTL_BTF: u64 = 2;
/// Microcode revision in IA32_BIOS_SIGN_ID.
const MICROCODE: u64 = 1 << 32;
/// IA32_MCG_CAP: no error-reporting banks.
const MCG_CAP: u64 = 0;

type Answer<T> = Result<T, MsrRefused>;

fn allow(condition: bool) -> Answer<()> {
    if condition { Ok(()) } else { Err(MsrRefused) }
}

/// Memory types of MTRRs and (with `UC-`, 7) the PAT.
fn is_memory_type(kind: u64) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

fn all_bytes(value: u64, good: impl Fn(u64) -> bool) -> bool {
    value.to_le_bytes().iter().all(|&b| good(u64::from(b)))
}

/// Index of a fixed-range MTRR in [`crate::state::Mtrrs::fixed`].
fn fixed_mtrr(index: u32) -> Option<usize> {
    match index {
        m::IA32_MTRR_FIX64K_00000 => Some(0),
        m::IA32_MTRR_FIX16K_80000 => Some(1),
        m::IA32_MTRR_FIX16K_A0000 => Some(2),
        m::IA32_MTRR_FIX4K_C0000..=m::IA32_MTRR_FIX4K_F8000 => {
            Some(3 + (index - m::IA32_MTRR_FIX4K_C0000) as usize)
        }
        _ => None,
    }
}

fn variable_mtrr(index: u32) -> Option<usize> {
    let offset = index.wrapping_sub(m::IA32_MTRR_PHYSBASE0);
    (u64::from(offset) < 2 * VARIABLE_MTRRS).then_some(offset as usize)
}

impl Cpu {
    fn needs(&self, feature: Feature) -> Answer<()> {
        allow(self.model.has(feature))
    }

    fn needs_canonical(&self, value: u64) -> Answer<()> {
        allow(self.is_canonical(value))
    }

    /// Base frequency over 100 MHz.
    fn bus_ratio(&self) -> u64 {
        (self.model.tsc_hz() / 100_000_000).clamp(1, 255)
    }

    /// The value of an MSR.
    pub(crate) fn read_msr(&mut self, index: u32) -> Answer<u64> {
        if let Some(i) = fixed_mtrr(index) {
            self.needs(Feature::Mtrr)?;
            return Ok(self.state.msrs.mtrr.fixed[i]);
        }
        if let Some(i) = variable_mtrr(index) {
            self.needs(Feature::Mtrr)?;
            return Ok(self.state.msrs.mtrr.variable[i]);
        }
        let msrs = &self.state.msrs;
        Ok(match index {
            m::IA32_TSC => self.shown_tsc(),
            m::IA32_TSC_ADJUST => {
                self.needs(Feature::TscAdjust)?;
                msrs.tsc_adjust
            }
            m::IA32_TSC_DEADLINE => {
                self.needs(Feature::TscDeadline)?;
                match self.bus().read_msr(index)? {
                    0 => 0,
                    deadline => deadline.wrapping_add(self.state.msrs.tsc_adjust),
                }
            }
            m::IA32_P5_MC_ADDR | m::IA32_P5_MC_TYPE | m::IA32_PLATFORM_ID => 0,
            m::IA32_FEATURE_CONTROL if self.model.has(Feature::Vmx) => msrs.feature_control,
            m::IA32_FEATURE_CONTROL => FEATURE_CONTROL,
            m::IA32_BIOS_SIGN_ID => MICROCODE,
            m::MSR_PLATFORM_INFO => self.bus_ratio() << 8,
            m::IA32_PERF_STATUS => self.bus_ratio() << 8,
            m::IA32_MISC_ENABLE => msrs.misc_enable | MISC_READ_ONLY,
            m::IA32_MCG_CAP => MCG_CAP,
            m::IA32_MCG_STATUS => msrs.mcg_status,
            m::IA32_DEBUGCTL => msrs.debugctl,
            m::IA32_SYSENTER_CS => msrs.sysenter_cs,
            m::IA32_SYSENTER_ESP => msrs.sysenter_esp,
            m::IA32_SYSENTER_EIP => msrs.sysenter_eip,
            m::IA32_PAT => msrs.pat,
            m::IA32_MTRRCAP => {
                self.needs(Feature::Mtrr)?;
                MTRR_CAP
            }
            m::IA32_MTRR_DEF_TYPE => {
                self.needs(Feature::Mtrr)?;
                msrs.mtrr.def_type
            }
            m::IA32_SPEC_CTRL => {
                self.needs(Feature::SpecCtrl)?;
                msrs.spec_ctrl
            }
            m::IA32_ARCH_CAPABILITIES => {
                self.needs(Feature::ArchCapabilities)?;
                ARCH_CAPABILITIES
            }
            m::IA32_PRED_CMD | m::IA32_FLUSH_CMD | m::IA32_BIOS_UPDT_TRIG => return Err(MsrRefused),
            m::IA32_XSS => {
                self.needs(Feature::Xsaves)?;
                msrs.xss
            }
            _ => return self.read_long_msr(index),
        })
    }

    /// The MSRs of IA-32e mode, and the owner's.
    fn read_long_msr(&mut self, index: u32) -> Answer<u64> {
        let msrs = &self.state.msrs;
        let value = match index {
            m::IA32_EFER => self.state.efer,
            m::IA32_STAR => msrs.star,
            m::IA32_LSTAR => msrs.lstar,
            m::IA32_CSTAR => msrs.cstar,
            m::IA32_FMASK => msrs.fmask,
            m::IA32_FS_BASE => self.state.seg(Seg::Fs).base,
            m::IA32_GS_BASE => self.state.seg(Seg::Gs).base,
            m::IA32_KERNEL_GS_BASE => msrs.kernel_gs_base,
            m::IA32_TSC_AUX => {
                allow(self.model.has(Feature::Rdtscp) || self.model.has(Feature::Rdpid))?;
                return Ok(msrs.tsc_aux);
            }
            _ => {
                return match self.virtual_x2apic_read(index) {
                    Some(value) => Ok(value),
                    None => self.bus().read_msr(index),
                };
            }
        };
        self.needs(Feature::Lm)
            .or_else(|e| if index == m::IA32_EFER { self.needs(Feature::Nx) } else { Err(e) })?;
        Ok(value)
    }

    /// Sets an MSR.
    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> Answer<()> {
        if fixed_mtrr(index).is_some() || variable_mtrr(index).is_some() {
            return self.write_mtrr(index, value);
        }
        match index {
            m::IA32_TSC => {
                let ticks = self.state.ticks();
                let clock = self.bus().tsc(ticks);
                self.state.msrs.tsc_adjust = value.wrapping_sub(clock);
            }
            m::IA32_TSC_ADJUST => {
                self.needs(Feature::TscAdjust)?;
                self.state.msrs.tsc_adjust = value;
            }
            m::IA32_TSC_DEADLINE => {
                self.needs(Feature::TscDeadline)?;
                // 0 disarms; the owner's timer runs by its own clock, to which the adjustment is unknown.
                let adjust = self.state.msrs.tsc_adjust;
                let deadline = match value {
                    0 => 0,
                    _ if (adjust as i64) < 0 => value.saturating_add(adjust.wrapping_neg()),
                    _ => value.saturating_sub(adjust).max(1),
                };
                self.bus().write_msr(index, deadline)?;
            }
            // Machine-check registers can only be cleared; a microcode update is taken and forgotten.
            m::IA32_P5_MC_ADDR | m::IA32_P5_MC_TYPE => allow(value == 0)?,
            m::IA32_BIOS_UPDT_TRIG => {}
            m::IA32_BIOS_SIGN_ID => self.state.msrs.bios_sign_id = value,
            m::IA32_MISC_ENABLE => self.write_misc_enable(value)?,
            m::IA32_MCG_STATUS => {
                allow(value & !7 == 0)?;
                self.state.msrs.mcg_status = value;
            }
            m::IA32_DEBUGCTL => {
                allow(value & !(DEBUGCTL_LBR | DEBUGCTL_BTF) == 0)?;
                // UNSUPPORTED: last-branch recording. LBR reads back as 0.
                self.state.msrs.debugctl = value & DEBUGCTL_BTF;
            }
            m::IA32_SYSENTER_CS => self.state.msrs.sysenter_cs = value,
            m::IA32_SYSENTER_ESP => {
                self.needs_canonical(value)?;
                self.state.msrs.sysenter_esp = value;
            }
            m::IA32_SYSENTER_EIP => {
                self.needs_canonical(value)?;
                self.state.msrs.sysenter_eip = value;
            }
            m::IA32_PAT => {
                allow(all_bytes(value, |t| is_memory_type(t) || t == 7))?;
                self.state.msrs.pat = value;
            }
            m::IA32_MTRR_DEF_TYPE => {
                self.needs(Feature::Mtrr)?;
                allow(value & !MTRR_DEF_TYPE_BITS == 0 && is_memory_type(value & 0xff))?;
                self.state.msrs.mtrr.def_type = value;
            }
            m::IA32_SPEC_CTRL => self.write_spec_ctrl(value)?,
            m::IA32_PRED_CMD => {
                self.needs(Feature::SpecCtrl)?;
                allow(value & !1 == 0)?;
            }
            m::IA32_FLUSH_CMD => {
                self.needs(Feature::FlushL1d)?;
                allow(value & !1 == 0)?;
            }
            m::IA32_XSS => {
                self.needs(Feature::Xsaves)?;
                // No supervisor state components.
                allow(value == 0)?;
            }
            m::IA32_FEATURE_CONTROL => self.write_feature_control(value)?,
            m::IA32_PLATFORM_ID
            | m::MSR_PLATFORM_INFO
            | m::IA32_PERF_STATUS
            | m::IA32_MCG_CAP
            | m::IA32_MTRRCAP
            | m::IA32_ARCH_CAPABILITIES
            | capability::BASIC..=capability::VMFUNC => return Err(MsrRefused),
            _ => return self.write_long_msr(index, value),
        }
        Ok(())
    }

    fn write_long_msr(&mut self, index: u32, value: u64) -> Answer<()> {
        let long = matches!(index, m::IA32_STAR..=m::IA32_FMASK | m::IA32_FS_BASE..=m::IA32_KERNEL_GS_BASE);
        if long {
            self.needs(Feature::Lm)?;
        }
        if matches!(index, m::IA32_LSTAR | m::IA32_CSTAR | m::IA32_FS_BASE..=m::IA32_KERNEL_GS_BASE) {
            self.needs_canonical(value)?;
        }
        let msrs = &mut self.state.msrs;
        match index {
            m::IA32_EFER => self.write_efer(value)?,
            m::IA32_STAR => msrs.star = value,
            m::IA32_LSTAR => msrs.lstar = value,
            m::IA32_CSTAR => msrs.cstar = value,
            m::IA32_FMASK => {
                allow(value >> 32 == 0)?;
                msrs.fmask = value;
            }
            m::IA32_FS_BASE => self.set_segment_base(Seg::Fs, value),
            m::IA32_GS_BASE => self.set_segment_base(Seg::Gs, value),
            m::IA32_KERNEL_GS_BASE => msrs.kernel_gs_base = value,
            m::IA32_TSC_AUX => {
                allow(self.model.has(Feature::Rdtscp) || self.model.has(Feature::Rdpid))?;
                allow(value >> 32 == 0)?;
                self.state.msrs.tsc_aux = value;
            }
            _ => {
                if !self.virtual_x2apic_write(index, value)? {
                    self.bus().write_msr(index, value)?;
                }
                self.attend();
            }
        }
        Ok(())
    }

    fn write_mtrr(&mut self, index: u32, value: u64) -> Answer<()> {
        self.needs(Feature::Mtrr)?;
        if let Some(i) = fixed_mtrr(index) {
            allow(all_bytes(value, is_memory_type))?;
            self.state.msrs.mtrr.fixed[i] = value;
        } else if let Some(i) = variable_mtrr(index) {
            allow(value >> PHYSICAL_BITS == 0)?;
            if i % 2 == 0 {
                allow(value & 0xf00 == 0 && is_memory_type(value & 0xff))?;
            } else {
                allow(value & 0xfff & !MTRR_MASK_VALID == 0)?;
            }
            self.state.msrs.mtrr.variable[i] = value;
        }
        Ok(())
    }

    /// It can be written until it is locked.
    fn write_feature_control(&mut self, value: u64) -> Answer<()> {
        self.needs(Feature::Vmx)?;
        let locked = self.state.msrs.feature_control & feature_control::LOCK != 0;
        allow(!locked && value & !FEATURE_CONTROL_BITS == 0)?;
        self.state.msrs.feature_control = value;
        Ok(())
    }

    fn write_misc_enable(&mut self, value: u64) -> Answer<()> {
        allow(value & !(MISC_WRITABLE | MISC_READ_ONLY | MISC_PERFMON) == 0)?;
        let xd_before = self.state.msrs.misc_enable & MISC_XD_DISABLE;
        self.state.msrs.misc_enable = value & MISC_WRITABLE;
        if value & MISC_XD_DISABLE != 0 && xd_before == 0 && self.state.efer & efer::NXE != 0 {
            self.state.efer &= !efer::NXE;
            self.tlb.flush_all();
            self.refresh_space();
        }
        Ok(())
    }

    fn write_spec_ctrl(&mut self, value: u64) -> Answer<()> {
        self.needs(Feature::SpecCtrl)?;
        let stibp = if self.model.has(Feature::Stibp) { 2 } else { 0 };
        let ssbd = if self.model.has(Feature::Ssbd) { 4 } else { 0 };
        allow(value & !(1 | stibp | ssbd) == 0)?;
        self.state.msrs.spec_ctrl = value;
        Ok(())
    }

    fn write_efer(&mut self, value: u64) -> Answer<()> {
        let xd_off = self.state.msrs.misc_enable & MISC_XD_DISABLE != 0;
        let by_feature = [
            (efer::SCE, self.model.has(Feature::Syscall)),
            (efer::LME | efer::LMA, self.model.has(Feature::Lm)),
            (efer::NXE, self.model.has(Feature::Nx) && !xd_off),
        ];
        let writable = by_feature.iter().filter(|f| f.1).fold(0, |mask, f| mask | f.0);
        allow(value & !writable == 0)?;
        let changed = self.state.efer ^ value;
        allow(changed & efer::LME == 0 || self.state.cr0 & cr0::PG == 0)?;
        // LMA is the processor's own: writes to it are ignored.
        self.state.efer = value & !efer::LMA | self.state.efer & efer::LMA;
        if changed & efer::NXE != 0 {
            self.tlb.flush_all();
        }
        self.refresh_space();
        Ok(())
    }

    /// True if the local APIC is globally enabled.
    pub(crate) fn apic_enabled(&mut self) -> bool {
        self.bus().read_msr(m::IA32_APIC_BASE).is_ok_and(|base| base & apic_base::ENABLE != 0)
    }
}

fn rdmsr(cpu: &mut Cpu, _: &Cold) -> Exec {
    cpu.require_cpl0()?;
    let index = cpu.state.gpr.get(reg::RCX) as u32;
    cpu.exit_on_msr(index, false)?;
    match cpu.read_msr(index) {
        Ok(value) => {
            cpu.state.gpr.set(reg::RAX, value & 0xffff_ffff);
            cpu.state.gpr.set(reg::RDX, value >> 32);
            Ok(())
        }
        Err(MsrRefused) => Err(cpu.raise(Fault::gp(0))),
    }
}

fn wrmsr(cpu: &mut Cpu, _: &Cold) -> Exec {
    cpu.require_cpl0()?;
    let index = cpu.state.gpr.get(reg::RCX) as u32;
    cpu.exit_on_msr(index, true)?;
    let value = cpu.state.gpr.get(reg::RDX) << 32 | cpu.state.gpr.get(reg::RAX) & 0xffff_ffff;
    match cpu.write_msr(index, value) {
        Ok(()) => Ok(()),
        Err(MsrRefused) => Err(cpu.raise(Fault::gp(0))),
    }
}
