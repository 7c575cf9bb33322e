//! Control and debug registers, XCR0, and invalidation of translations.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86defs::vmx::{reason, secondary};
use x86defs::{cr0, cr3, cr4, dr, efer, paging, segment, xcr0};

use crate::Cpu;
use crate::cpuid::{CpuModel, Feature};
use crate::events::is_tss32;
use crate::mmu::tlb::SpaceTag;
use crate::mmu::walk::PHYSICAL_BITS;
use crate::op::{Cold, ColdHandler};
use crate::state::{Seg, reg};
use crate::trap::{Exec, Fault};
use crate::vmx::Operation;

/// How this family executes `insn`, if it is its own.
pub(crate) fn lower(insn: &Instruction) -> Option<ColdHandler> {
    let is = |index, test: fn(iced_x86::Register) -> bool| {
        insn.op_count() == 2 && insn.op_kind(index) == OpKind::Register && test(insn.op_register(index))
    };
    Some(match insn.mnemonic() {
        Mnemonic::Mov if is(0, |r| r.is_cr()) => mov_to_cr,
        Mnemonic::Mov if is(1, |r| r.is_cr()) => mov_from_cr,
        Mnemonic::Mov if is(0, |r| r.is_dr()) => mov_to_dr,
        Mnemonic::Mov if is(1, |r| r.is_dr()) => mov_from_dr,
        Mnemonic::Lmsw => lmsw,
        Mnemonic::Smsw => smsw,
        Mnemonic::Clts => clts,
        Mnemonic::Invlpg => invlpg,
        Mnemonic::Invpcid => invpcid,
        Mnemonic::Xgetbv => xgetbv,
        Mnemonic::Xsetbv => xsetbv,
        _ => return None,
    })
}

/// False for those that a block may go on after.
pub(crate) fn ends_block(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        Mnemonic::Smsw | Mnemonic::Xgetbv | Mnemonic::Clts => false,
        Mnemonic::Mov => !(insn.op1_kind() == OpKind::Register && insn.op1_register().is_cr()),
        _ => true,
    }
}

/// Bits of CR4 whose change flushes every translation.
const CR4_FLUSHES: u64 =
    cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::LA57;
/// Bits of CR4 whose change reloads the PDPTE registers under PAE paging.
const CR4_RELOADS_PDPTES: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP;
/// Reserved bits of a PDPTE register besides those above the physical-address width.
const PDPTE_RESERVED: u64 = 0x1e6;
const DR6_WRITABLE: u64 = 0xe00f;
const DR7_WRITABLE: u64 = 0xffff_23ff;

impl CpuModel {
    /// CR4 bits that the model has.
    pub fn cr4_allowed(&self) -> u64 {
        const BY_FEATURE: &[(Feature, u64)] = &[
            (Feature::Vme, cr4::VME | cr4::PVI),
            (Feature::Tsc, cr4::TSD),
            (Feature::De, cr4::DE),
            (Feature::Pse, cr4::PSE),
            (Feature::Pae, cr4::PAE),
            (Feature::Mce, cr4::MCE),
            (Feature::Pge, cr4::PGE),
            (Feature::Fxsr, cr4::OSFXSR),
            (Feature::Sse, cr4::OSXMMEXCPT),
            (Feature::Umip, cr4::UMIP),
            (Feature::La57, cr4::LA57),
            (Feature::Fsgsbase, cr4::FSGSBASE),
            (Feature::Pcid, cr4::PCIDE),
            (Feature::Xsave, cr4::OSXSAVE),
            (Feature::Smep, cr4::SMEP),
            (Feature::Smap, cr4::SMAP),
            (Feature::Pku, cr4::PKE),
            (Feature::Vmx, cr4::VMXE),
        ];
        BY_FEATURE.iter().filter(|f| self.has(f.0)).fold(cr4::PCE, |mask, f| mask | f.1)
    }
}

impl Cpu {
    /// The PDPTE registers under `cr3`; none if a present one has reserved bits set.
    pub(crate) fn read_pdptes(&mut self, cr3: u64) -> Exec<Option<[u64; 4]>> {
        let table = cr3 & 0xffff_ffe0;
        // Aligned, so within a page.
        let table = self.guest_physical_page(table)? | table & 4095;
        Ok(self.pdptes_at(table))
    }

    /// The four PDPTEs at physical address `table` (bits below 5 are ignored); none if a present one has reserved bits
    /// set.
    pub fn pdptes_at(&self, table: u64) -> Option<[u64; 4]> {
        let reserved = PDPTE_RESERVED | !((1u64 << PHYSICAL_BITS) - 1);
        let mut pdptes = [0; 4];
        for (i, pdpte) in pdptes.iter_mut().enumerate() {
            let at = (table & !0x1f) + 8 * i as u64;
            let value =
                self.memory.entry64(at).map_or(u64::MAX, |e| e.load(std::sync::atomic::Ordering::Acquire));
            if value & paging::PRESENT != 0 && value & reserved != 0 {
                return None;
            }
            *pdpte = value;
        }
        Some(pdptes)
    }

    /// Loads the PDPTE registers or raises #GP(0).
    fn load_pdptes(&mut self, cr3: u64) -> Exec {
        match self.read_pdptes(cr3)? {
            Some(pdptes) => {
                self.state.pdptes = pdptes;
                Ok(())
            }
            None => Err(self.raise(Fault::gp(0))),
        }
    }

    fn gp0<T>(&mut self) -> Exec<T> {
        Err(self.raise(Fault::gp(0)))
    }

    /// Selects the spaces of the current virtual processor, under every EPT pointer ("Operations that Invalidate Cached
    /// Mappings").
    fn own_spaces(&self) -> impl Fn(&SpaceTag) -> bool + use<> {
        let own = self.tlb.current_tag().vpid;
        move |tag| tag.vpid == own
    }

    fn current_pcid(&self) -> u16 {
        if self.state.cr4 & cr4::PCIDE != 0 { (self.state.cr3 & cr3::PCID) as u16 } else { 0 }
    }

    /// Drops the current PCID's translations, all but global ones.
    pub(crate) fn flush_non_global(&mut self) {
        let (own, pcid) = (self.own_spaces(), self.current_pcid());
        self.tlb.flush_spaces(true, |tag| own(tag) && tag.pcid == pcid);
    }

    /// Drops every translation of the current virtual processor.
    fn flush_own(&mut self) {
        let own = self.own_spaces();
        self.tlb.flush_spaces(false, own);
    }

    /// CR0 bits that must stay set in VMX operation ("Restrictions on VMX Operation").
    fn cr0_fixed(&self) -> u64 {
        match self.vmx.operation {
            Operation::Off => 0,
            Operation::NonRoot if self.vmx.controls.has_secondary(secondary::UNRESTRICTED_GUEST) => cr0::NE,
            Operation::Root | Operation::NonRoot => cr0::PE | cr0::NE | cr0::PG,
        }
    }

    /// MOV to CR0.
    pub(crate) fn set_cr0(&mut self, value: u64) -> Exec {
        let old = self.state.cr0;
        let new = value & cr0::ALL | cr0::ET;
        let bad = value >> 32 != 0
            || new & cr0::PG != 0 && new & cr0::PE == 0
            || new & cr0::NW != 0 && new & cr0::CD == 0;
        if bad || new & self.cr0_fixed() != self.cr0_fixed() {
            return self.gp0();
        }
        let changed = old ^ new;
        let mut efer_value = self.state.efer;
        if changed & cr0::PG != 0 {
            if new & cr0::PG != 0 {
                efer_value = self.check_paging_on()?;
                if efer_value & efer::LMA == 0 && self.state.cr4 & cr4::PAE != 0 {
                    self.load_pdptes(self.state.cr3)?;
                }
            } else {
                if self.code_bits == 64 || self.state.cr4 & cr4::PCIDE != 0 {
                    return self.gp0();
                }
                efer_value &= !efer::LMA;
            }
        } else if changed & (cr0::CD | cr0::NW) != 0 && self.pae_paging() {
            self.load_pdptes(self.state.cr3)?;
        }
        self.state.cr0 = new;
        self.state.efer = efer_value;
        if changed & (cr0::PG | cr0::PE | cr0::WP) != 0 {
            self.flush_own();
            self.refresh_space();
        } else {
            self.refresh_mode();
        }
        Ok(())
    }

    /// Checks for CR0.PG going from 0 to 1; returns the new EFER.
    fn check_paging_on(&mut self) -> Exec<u64> {
        let value = self.state.efer;
        if value & efer::LME == 0 {
            return Ok(value);
        }
        let long_code = self.state.seg(Seg::Cs).access & segment::L != 0;
        if self.state.cr4 & cr4::PAE == 0 || long_code || !is_tss32(&self.state.tr) {
            return self.gp0();
        }
        Ok(value | efer::LMA)
    }

    fn pae_paging(&self) -> bool {
        self.state.cr0 & cr0::PG != 0 && self.state.cr4 & cr4::PAE != 0 && !self.state.long_mode()
    }

    /// MOV to CR3.
    pub(crate) fn set_cr3(&mut self, value: u64) -> Exec {
        let pcids = self.state.cr4 & cr4::PCIDE != 0;
        let keep = pcids && value & cr3::NO_FLUSH != 0;
        let new = if pcids { value & !cr3::NO_FLUSH } else { value };
        if self.state.long_mode() && new >> PHYSICAL_BITS != 0 {
            return self.gp0();
        }
        if self.pae_paging() {
            self.load_pdptes(new)?;
        }
        self.state.cr3 = if self.state.long_mode() { new } else { new & 0xffff_ffff };
        if !keep {
            self.flush_non_global();
        }
        self.refresh_space();
        Ok(())
    }

    /// MOV to CR4.
    pub(crate) fn set_cr4(&mut self, value: u64) -> Exec {
        let old = self.state.cr4;
        let changed = old ^ value;
        let long = self.state.long_mode();
        let bad = value & !self.model.cr4_allowed() != 0
            || long && value & cr4::PAE == 0
            || long && changed & cr4::LA57 != 0
            || changed & value & cr4::PCIDE != 0 && (!long || self.state.cr3 & cr3::PCID != 0)
            || self.vmx.operation != Operation::Off && value & cr4::VMXE == 0;
        if bad {
            return self.gp0();
        }
        let pae = self.state.cr0 & cr0::PG != 0 && value & cr4::PAE != 0 && !long;
        if pae && changed & CR4_RELOADS_PDPTES != 0 {
            self.load_pdptes(self.state.cr3)?;
        }
        self.state.cr4 = value;
        if changed & CR4_FLUSHES != 0 {
            self.flush_own();
            self.refresh_space();
        } else {
            self.refresh_mode();
        }
        Ok(())
    }

    /// The number of a debug register after the access checks of MOV from and to it.
    fn debug_register(&mut self, register: Register, other: Register, from: bool) -> Exec<usize> {
        let n = register.number();
        let aliased = matches!(n, 4 | 5);
        if n > 7 {
            return Err(self.raise(Fault::ud()));
        }
        // The VM exit comes before all other faults.
        self.exit_on_mov_dr(n as u64, other, from)?;
        if aliased && self.state.cr4 & cr4::DE != 0 {
            return Err(self.raise(Fault::ud()));
        }
        self.require_cpl0()?;
        if self.state.dr7 & dr::DR7_GD != 0 {
            return Err(self.raise_debug(dr::DR6_BD));
        }
        Ok(if aliased { n + 2 } else { n })
    }
}

/// Value of a register operand for a control or debug register: 64 bits in 64-bit mode, else 32.
fn source(cpu: &Cpu, cold: &Cold) -> u64 {
    cpu.read_register(cold.insn.op1_register())
}

fn mov_to_cr(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let number = cold.insn.op0_register().number();
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.raise(Fault::ud()));
    }
    cpu.require_cpl0()?;
    let mut value = source(cpu, cold);
    if cpu.non_root() {
        value = cpu.guest_cr_write(number as u64, value, &cold.insn)?;
    }
    match number {
        0 => cpu.set_cr0(value),
        2 => {
            cpu.state.cr2 = value;
            Ok(())
        }
        3 => cpu.set_cr3(value),
        4 => cpu.set_cr4(value),
        _ => {
            if value > 15 {
                return cpu.gp0();
            }
            cpu.set_cr8(value as u8);
            Ok(())
        }
    }
}

fn mov_from_cr(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let number = cold.insn.op1_register().number();
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.raise(Fault::ud()));
    }
    cpu.require_cpl0()?;
    cpu.exit_on_cr_read(number as u64, &cold.insn)?;
    let value = match number {
        0 => cpu.shown_cr0(),
        2 => cpu.state.cr2,
        3 => cpu.state.cr3,
        4 => cpu.shown_cr4(),
        _ => u64::from(cpu.cr8()),
    };
    cpu.write_register(cold.insn.op0_register(), value);
    Ok(())
}

fn mov_to_dr(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let n = cpu.debug_register(cold.insn.op0_register(), cold.insn.op1_register(), false)?;
    let value = source(cpu, cold);
    if n >= 6 && value >> 32 != 0 {
        return cpu.gp0();
    }
    match n {
        6 => cpu.state.dr6 = value & DR6_WRITABLE | dr::DR6_FIXED_1,
        7 => cpu.state.dr7 = value & DR7_WRITABLE | dr::DR7_FIXED_1,
        _ => cpu.state.dr[n & 3] = value,
    }
    cpu.refresh_mode();
    cpu.attend();
    Ok(())
}

fn mov_from_dr(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let n = cpu.debug_register(cold.insn.op1_register(), cold.insn.op0_register(), true)?;
    let value = match n {
        6 => cpu.state.dr6,
        7 => cpu.state.dr7,
        _ => cpu.state.dr[n & 3],
    };
    cpu.write_register(cold.insn.op0_register(), value);
    Ok(())
}

fn lmsw(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.require_cpl0()?;
    let value = cpu.read_operand(cold, 0, 2)?;
    // PE can be set, not cleared.
    let changes = cr0::MP | cr0::EM | cr0::TS | value & cr0::PE;
    let changes = changes & cpu.guest_lmsw(value, &cold.insn)?;
    cpu.set_cr0(cpu.state.cr0 & !changes | value & changes)
}

fn smsw(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.check_umip()?;
    let value = cpu.shown_cr0();
    let size = if cold.insn.op0_kind() == OpKind::Memory { 2 } else { cold.insn.op0_register().size() };
    cpu.write_operand(cold, 0, size, value)
}

fn clts(cpu: &mut Cpu, _: &Cold) -> Exec {
    cpu.require_cpl0()?;
    if cpu.guest_clts()? {
        cpu.state.cr0 &= !cr0::TS;
    }
    Ok(())
}

fn invlpg(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.require_cpl0()?;
    let linear = cpu.unchecked_linear(&cold.insn);
    cpu.exit_on_invlpg(linear)?;
    if cpu.code_bits == 64 && !cpu.is_canonical(linear) {
        // INVLPG of a non-canonical address does nothing.
        return Ok(());
    }
    // Global translations go in every PCID, so the page goes in all of them.
    let own = cpu.own_spaces();
    cpu.tlb.flush_page(linear, false, own);
    Ok(())
}

fn invpcid(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.require(Feature::Invpcid)?;
    cpu.require_enabled(secondary::ENABLE_INVPCID)?;
    cpu.require_cpl0()?;
    cpu.exit_on_invpcid(&cold.insn)?;
    let linear = cpu.operand_linear(&cold.insn, 16, false)?;
    let kind = cpu.read_register(cold.insn.op0_register());
    let pcid = cpu.load::<u64>(linear)?;
    let address = cpu.load::<u64>(cpu.wrap(linear.wrapping_add(8)))?;
    let pcids = cpu.state.cr4 & cr4::PCIDE != 0;
    let bad = kind > 3
        || pcid >> 12 != 0
        || kind <= 1 && !pcids && pcid != 0
        || kind == 0 && !cpu.is_canonical(address);
    if bad {
        return cpu.gp0();
    }
    let own = cpu.own_spaces();
    let one = move |tag: &SpaceTag| own(tag) && u64::from(tag.pcid) == pcid;
    let own = cpu.own_spaces();
    match kind {
        0 => cpu.tlb.flush_page(address, true, one),
        1 => cpu.tlb.flush_spaces(true, one),
        2 => cpu.tlb.flush_spaces(false, own),
        _ => cpu.tlb.flush_spaces(true, own),
    }
    Ok(())
}

fn check_osxsave(cpu: &mut Cpu) -> Exec {
    cpu.require(Feature::Xsave)?;
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.raise(Fault::ud()));
    }
    Ok(())
}

fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.state.gpr.set(reg::RAX, value & 0xffff_ffff);
    cpu.state.gpr.set(reg::RDX, value >> 32);
}

fn xgetbv(cpu: &mut Cpu, _: &Cold) -> Exec {
    check_osxsave(cpu)?;
    let value = match cpu.state.gpr.get(reg::RCX) as u32 {
        0 => cpu.state.xcr0,
        1 if cpu.model.has(Feature::Xgetbv1) => cpu.state.xcr0 & super::xstate::xinuse(&cpu.state),
        _ => return cpu.gp0(),
    };
    set_edx_eax(cpu, value);
    Ok(())
}

fn xsetbv(cpu: &mut Cpu, _: &Cold) -> Exec {
    check_osxsave(cpu)?;
    cpu.require_cpl0()?;
    cpu.exit_always(reason::XSETBV)?;
    let value = cpu.state.gpr.get(reg::RDX) << 32 | cpu.state.gpr.get(reg::RAX) & 0xffff_ffff;
    let bad = cpu.state.gpr.get(reg::RCX) as u32 != 0
        || value & !cpu.model.xcr0_allowed() != 0
        || value & xcr0::X87 == 0
        || value & xcr0::AVX != 0 && value & xcr0::SSE == 0;
    if bad {
        return cpu.gp0();
    }
    cpu.state.xcr0 = value;
    Ok(())
}
