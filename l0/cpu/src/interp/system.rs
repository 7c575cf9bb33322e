//! HLT, caches, counters, CPUID, protection keys, and the instructions that this processor does not have.

use iced_x86::{Instruction, Mnemonic};
use x86defs::cr4;
use x86defs::vmx::{primary, reason, secondary};

use crate::Cpu;
use crate::cpuid::{Dynamic, Feature};
use crate::op::{Cold, ColdHandler};
use crate::state::{Activity, reg};
use crate::trap::{Exec, Fault};
use crate::tunables::SPINS_BEFORE_YIELD;

/// How this family executes `insn`, if it is its own.
pub(crate) fn lower(insn: &Instruction) -> Option<ColdHandler> {
    Some(match insn.mnemonic() {
        Mnemonic::Hlt => hlt,
        // CLDEMOTE is a hint, and RDSSP does nothing without shadow stacks.
        Mnemonic::Cldemote | Mnemonic::Rdsspd | Mnemonic::Rdsspq => nothing,
        Mnemonic::Pause => pause,
        Mnemonic::Invd => invd,
        // Without the feature WBNOINVD's prefix is ignored and it is WBINVD: the same here.
        Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => wbinvd,
        Mnemonic::Clflush => clflush,
        Mnemonic::Clflushopt => clflushopt,
        Mnemonic::Clwb => clwb,
        Mnemonic::Rdtsc => rdtsc,
        Mnemonic::Rdtscp => rdtscp,
        Mnemonic::Rdpid => rdpid,
        Mnemonic::Rdpmc => rdpmc,
        Mnemonic::Cpuid => cpuid,
        Mnemonic::Rdpkru => rdpkru,
        Mnemonic::Wrpkru => wrpkru,
        Mnemonic::Serialize => serialize,
        m if is_absent(m) => absent,
        _ => return None,
    })
}

/// False for those that a block may go on after. PAUSE ends one: where a loop gives a lock up only across its PAUSE (firmware that waits for other processors does),
/// interrupts have to be taken there too. Taken at the loop's start alone, they would always find the lock held, and a
/// hypervisor that runs two virtual CPUs in turns would never see the other one get it.
pub(crate) fn ends_block(insn: &Instruction) -> bool {
    !matches!(
        insn.mnemonic(),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb | Mnemonic::Rdpid | Mnemonic::Rdpkru
    )
}

/// Instructions of features that no model has.
fn is_absent(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Vmrun
            | Vmmcall
            | Vmload
            | Vmsave
            | Vmgexit
            | Stgi
            | Clgi
            | Skinit
            | Invlpga
            | Invlpgb
            | Tlbsync
            | Monitor
            | Mwait
            | Monitorx
            | Mwaitx
            | Umonitor
            | Umwait
            | Tpause
            | Getsec
            | Encls
            | Enclu
            | Enclv
            | Rsm
            | Xbegin
            | Xend
            | Xabort
            | Xtest
            | Pconfig
            | Ptwrite
            | Enqcmd
            | Enqcmds
            | Rdpru
            | Clzero
            | Hreset
            | Incsspd
            | Incsspq
            | Rstorssp
            | Saveprevssp
            | Setssbsy
            | Clrssbsy
            | Wrssd
            | Wrssq
            | Wrussd
            | Wrussq
    )
}

/// The processor does not have it.
fn absent(cpu: &mut Cpu, _: &Cold) -> Exec {
    Err(cpu.raise(Fault::ud()))
}

fn hlt(cpu: &mut Cpu, _: &Cold) -> Exec {
    cpu.require_cpl0()?;
    cpu.exit_on_primary(primary::HLT_EXITING, reason::HLT)?;
    cpu.state.activity = Activity::Halted;
    cpu.attend();
    Ok(())
}

fn nothing(_: &mut Cpu, _: &Cold) -> Exec {
    Ok(())
}

fn pause(cpu: &mut Cpu, _: &Cold) -> Exec {
    // Who is waited for may be a vCPU whose thread waits for a processor.
    cpu.spins = cpu.spins.wrapping_add(1);
    if cpu.spins % SPINS_BEFORE_YIELD == 0 {
        std::thread::yield_now();
    }
    if cpu.non_root() { cpu.exit_on_pause() } else { Ok(()) }
}

/// Guest memory is coherent, so there is nothing to write back or drop.
fn invd(cpu: &mut Cpu, _: &Cold) -> Exec {
    cpu.require_cpl0()?;
    cpu.exit_always(reason::INVD)
}

fn wbinvd(cpu: &mut Cpu, _: &Cold) -> Exec {
    cpu.require_cpl0()?;
    cpu.exit_on_secondary(secondary::WBINVD_EXITING, reason::WBINVD)
}

/// A cache-line flush checks its address as a load of one byte does.
fn flush_line(cpu: &mut Cpu, cold: &Cold, feature: Feature) -> Exec {
    cpu.require(feature)?;
    let linear = cpu.operand_linear(&cold.insn, 1, false)?;
    cpu.probe_read(linear, 1)
}

fn clflush(cpu: &mut Cpu, cold: &Cold) -> Exec {
    flush_line(cpu, cold, Feature::Clflush)
}

fn clflushopt(cpu: &mut Cpu, cold: &Cold) -> Exec {
    flush_line(cpu, cold, Feature::Clflushopt)
}

fn clwb(cpu: &mut Cpu, cold: &Cold) -> Exec {
    flush_line(cpu, cold, Feature::Clwb)
}

fn serialize(cpu: &mut Cpu, _: &Cold) -> Exec {
    cpu.require(Feature::Serialize)
}

impl Cpu {
    /// The TSC now.
    pub(crate) fn read_tsc(&mut self) -> u64 {
        let ticks = self.state.ticks();
        let clock = self.bus().tsc(ticks);
        self.state.tsc(clock)
    }

    fn check_tsd(&mut self) -> Exec {
        if self.state.cr4 & cr4::TSD != 0 && self.state.cpl != 0 {
            return Err(self.raise(Fault::gp(0)));
        }
        Ok(())
    }

    fn set_pair(&mut self, value: u64) {
        self.state.gpr.set(reg::RAX, value & 0xffff_ffff);
        self.state.gpr.set(reg::RDX, value >> 32);
    }

    /// What CPUID answers in the present state.
    pub(crate) fn cpuid_now(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        if let Some(answer) = self.bus().cpuid(leaf, subleaf) {
            return answer;
        }
        let apic_enabled = self.apic_enabled();
        let now = Dynamic {
            apic_id: self.apic_id,
            osxsave: self.state.cr4 & cr4::OSXSAVE != 0,
            ospke: self.state.cr4 & cr4::PKE != 0,
            apic_enabled,
            code64: self.code_bits == 64,
            xcr0: self.state.xcr0,
            xss: self.state.msrs.xss,
            misc_enable: self.state.msrs.misc_enable,
        };
        self.model.cpuid(leaf, subleaf, &now)
    }
}

fn rdtsc(cpu: &mut Cpu, _: &Cold) -> Exec {
    cpu.require(Feature::Tsc)?;
    cpu.check_tsd()?;
    cpu.exit_on_primary(primary::RDTSC_EXITING, reason::RDTSC)?;
    let tsc = cpu.shown_tsc();
    cpu.set_pair(tsc);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, _: &Cold) -> Exec {
    cpu.require(Feature::Rdtscp)?;
    cpu.require_enabled(secondary::ENABLE_RDTSCP)?;
    cpu.check_tsd()?;
    cpu.exit_on_primary(primary::RDTSC_EXITING, reason::RDTSCP)?;
    let tsc = cpu.shown_tsc();
    cpu.set_pair(tsc);
    cpu.state.gpr.set(reg::RCX, cpu.state.msrs.tsc_aux & 0xffff_ffff);
    Ok(())
}

fn rdpid(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.require(Feature::Rdpid)?;
    cpu.require_enabled(secondary::ENABLE_RDTSCP)?;
    cpu.write_register(cold.insn.op0_register(), cpu.state.msrs.tsc_aux);
    Ok(())
}

/// There are no performance counters, so every counter number is bad.
fn rdpmc(cpu: &mut Cpu, _: &Cold) -> Exec {
    if cpu.state.cpl == 0 || cpu.state.cr4 & cr4::PCE != 0 {
        cpu.exit_on_primary(primary::RDPMC_EXITING, reason::RDPMC)?;
    }
    Err(cpu.raise(Fault::gp(0)))
}

fn cpuid(cpu: &mut Cpu, _: &Cold) -> Exec {
    cpu.exit_always(reason::CPUID)?;
    let leaf = cpu.state.gpr.get(reg::RAX) as u32;
    let subleaf = cpu.state.gpr.get(reg::RCX) as u32;
    let [eax, ebx, ecx, edx] = cpu.cpuid_now(leaf, subleaf);
    cpu.state.gpr.set(reg::RAX, u64::from(eax));
    cpu.state.gpr.set(reg::RBX, u64::from(ebx));
    cpu.state.gpr.set(reg::RCX, u64::from(ecx));
    cpu.state.gpr.set(reg::RDX, u64::from(edx));
    Ok(())
}

fn check_pke(cpu: &mut Cpu) -> Exec {
    if cpu.state.cr4 & cr4::PKE == 0 {
        return Err(cpu.raise(Fault::ud()));
    }
    if cpu.state.gpr.get(reg::RCX) as u32 != 0 {
        return Err(cpu.raise(Fault::gp(0)));
    }
    Ok(())
}

fn rdpkru(cpu: &mut Cpu, _: &Cold) -> Exec {
    check_pke(cpu)?;
    let pkru = u64::from(cpu.state.pkru);
    cpu.set_pair(pkru);
    Ok(())
}

fn wrpkru(cpu: &mut Cpu, _: &Cold) -> Exec {
    check_pke(cpu)?;
    if cpu.state.gpr.get(reg::RDX) as u32 != 0 {
        return Err(cpu.raise(Fault::gp(0)));
    }
    let pkru = cpu.state.gpr.get(reg::RAX) as u32;
    if pkru != cpu.state.pkru {
        cpu.state.pkru = pkru;
        cpu.tlb.protection_keys_changed();
    }
    Ok(())
}
