//! Saving and restoring the processor's extended state: FXSAVE, FXRSTOR and the XSAVE family ("Managing State Using
//! the XSAVE Feature Set").
//!
//! State components: x87 (0), SSE (1), AVX (2) and PKRU (9). No supervisor component exists yet, so IA32_XSS is 0 and
//! XSAVES and XRSTORS work on the same ones.
//!
//! An instruction first finds out whether all of its writes would succeed, then writes; it reads and checks a whole
//! image before it changes any register.

#[cfg(test)]
mod tests;

use iced_x86::{Instruction, Mnemonic};
use x86defs::vmx::{reason, secondary};
use x86defs::{cr0, cr4, vector, xcr0};

use super::vector::exceptions::MXCSR_VALID;
use crate::Cpu;
use crate::op::{Cold, ColdHandler};
use crate::state::{CpuState, X87State, reg};
use crate::trap::{Exec, Fault};

/// Offset and size of the AVX component in the standard format (CPUID leaf 0DH, sub-leaf 2).
pub(crate) const AVX_OFFSET: usize = 576;
pub(crate) const AVX_SIZE: usize = 256;
/// Offset and size of the PKRU component in the standard format (CPUID leaf 0DH, sub-leaf 9).
pub(crate) const PKRU_OFFSET: usize = 2688;
pub(crate) const PKRU_SIZE: usize = 8;

const LEGACY_SIZE: usize = 512;
const HEADER_SIZE: usize = 64;
const MXCSR_AT: usize = 24;
const ST_AT: usize = 32;
const XMM_AT: usize = 160;
const COMPACTED: u64 = 1 << 63;
const MXCSR_INITIAL: u32 = 0x1f80;

/// How to execute an instruction of this family; none for others.
pub(crate) fn lower(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    use Mnemonic as M;
    let handler: ColdHandler = match insn.mnemonic() {
        M::Fxsave | M::Fxsave64 => fxsave,
        M::Fxrstor | M::Fxrstor64 => fxrstor,
        M::Xsave | M::Xsave64 => |cpu, cold| xsave(cpu, cold, Form::Plain),
        M::Xsaveopt | M::Xsaveopt64 => |cpu, cold| xsave(cpu, cold, Form::Optimised),
        M::Xsavec | M::Xsavec64 => |cpu, cold| xsave(cpu, cold, Form::Compacted),
        M::Xsaves | M::Xsaves64 => |cpu, cold| xsave(cpu, cold, Form::Supervisor),
        M::Xrstor | M::Xrstor64 => |cpu, cold| xrstor(cpu, cold, Form::Plain),
        M::Xrstors | M::Xrstors64 => |cpu, cold| xrstor(cpu, cold, Form::Supervisor),
        _ => return None,
    };
    Some((handler, 0))
}

/// The state components that are not in their initial configuration, as XGETBV with ECX = 1 shows them (before they
/// are masked with XCR0).
pub(crate) fn xinuse(state: &CpuState) -> u64 {
    let mut inuse = 0;
    let initial = X87State::default();
    let x87 = &state.x87;
    let words = (x87.fcw, x87.fsw, x87.ftw, x87.fop, x87.fip, x87.fdp);
    if words != (initial.fcw, 0, 0, 0, 0, 0) || x87.st.iter().any(|st| st[..10] != [0; 10]) {
        inuse |= xcr0::X87;
    }
    let ymm = &state.vector.ymm;
    if state.vector.mxcsr != MXCSR_INITIAL || ymm.iter().any(|r| r[..16] != [0; 16]) {
        inuse |= xcr0::SSE;
    }
    if ymm.iter().any(|r| r[16..] != [0; 16]) {
        inuse |= xcr0::AVX;
    }
    if state.pkru != 0 {
        inuse |= xcr0::PKRU;
    }
    inuse
}

/// The instructions that save (and restore).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Form {
    Plain,
    Optimised,
    Compacted,
    Supervisor,
}

/// Outside 64-bit mode only the first eight registers are saved and restored.
fn vector_count(cpu: &Cpu) -> usize {
    if cpu.code_bits == 64 { 16 } else { 8 }
}

/// The forms with REX.W save 64-bit instruction pointers.
fn wide(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Fxsave64
            | M::Fxrstor64
            | M::Xsave64
            | M::Xsaveopt64
            | M::Xsavec64
            | M::Xsaves64
            | M::Xrstor64
            | M::Xrstors64
    )
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u64_at(bytes, at) as u32
}

/// The x87 part of an image: control words and pointers in the first 24 bytes, registers from 32 on.
fn put_x87(x87: &X87State, wide: bool, image: &mut [u8; LEGACY_SIZE]) {
    image[0..2].copy_from_slice(&x87.fcw.to_le_bytes());
    image[2..4].copy_from_slice(&x87.fsw.to_le_bytes());
    image[4] = x87.ftw;
    image[5] = 0;
    image[6..8].copy_from_slice(&(x87.fop & 0x7ff).to_le_bytes());
    // Without REX.W the upper halves are FCS and FDS, which are deprecated: 0.
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    image[8..16].copy_from_slice(&(x87.fip & mask).to_le_bytes());
    image[16..24].copy_from_slice(&(x87.fdp & mask).to_le_bytes());
    for (to, from) in image[ST_AT..XMM_AT].chunks_exact_mut(16).zip(&x87.st) {
        to[..10].copy_from_slice(&from[..10]);
        to[10..].fill(0);
    }
}

fn get_x87(image: &[u8], wide: bool, x87: &mut X87State) {
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    x87.fsw = u64_at(image, 2) as u16;
    x87.ftw = u64_at(image, 4) as u8;
    x87.fop = u64_at(image, 6) as u16 & 0x7ff;
    x87.fip = u64_at(image, 8) & mask;
    x87.fdp = u64_at(image, 16) & mask;
    for (to, from) in x87.st.iter_mut().zip(image[ST_AT..XMM_AT].chunks_exact(16)) {
        to[..10].copy_from_slice(&from[..10]);
        to[10..].fill(0);
    }
    x87.set_control(u64_at(image, 0) as u16);
}

fn get_xmm(cpu: &mut Cpu, image: &[u8]) {
    let count = vector_count(cpu);
    for (to, from) in cpu.state.vector.ymm[..count].iter_mut().zip(image[XMM_AT..].chunks_exact(16)) {
        to[..16].copy_from_slice(from);
    }
}

fn put_mxcsr(cpu: &Cpu, image: &mut [u8; LEGACY_SIZE]) {
    image[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&cpu.state.vector.mxcsr.to_le_bytes());
    image[MXCSR_AT + 4..MXCSR_AT + 8].copy_from_slice(&MXCSR_VALID.to_le_bytes());
}

fn put_xmm(cpu: &Cpu, image: &mut [u8; LEGACY_SIZE]) {
    let count = vector_count(cpu);
    for (to, from) in image[XMM_AT..].chunks_exact_mut(16).zip(&cpu.state.vector.ymm[..count]) {
        to.copy_from_slice(&from[..16]);
    }
}

/// Address of the image: aligned to `align`, `size` bytes.
fn image_linear(cpu: &mut Cpu, insn: &Instruction, size: usize, align: u64, write: bool) -> Exec<u64> {
    let linear = cpu.operand_linear(insn, size, write)?;
    if linear & (align - 1) != 0 {
        return Err(cpu.raise(Fault::gp(0)));
    }
    Ok(linear)
}

fn fxsave(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check_fx(cpu)?;
    let linear = image_linear(cpu, &cold.insn, LEGACY_SIZE, 16, true)?;
    let mut image = [0; LEGACY_SIZE];
    put_x87(&cpu.state.x87, wide(&cold.insn), &mut image);
    put_mxcsr(cpu, &mut image);
    put_xmm(cpu, &mut image);
    // What follows the registers is left alone: software may keep its own data there.
    let end = XMM_AT + 16 * vector_count(cpu);
    cpu.write_bytes(linear, &image[..end])
}

fn fxrstor(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check_fx(cpu)?;
    let linear = image_linear(cpu, &cold.insn, LEGACY_SIZE, 16, false)?;
    let mut image = [0; LEGACY_SIZE];
    cpu.read_bytes(linear, &mut image)?;
    let mxcsr = u32_at(&image, MXCSR_AT);
    if mxcsr & !MXCSR_VALID != 0 {
        return Err(cpu.raise(Fault::gp(0)));
    }
    get_x87(&image, wide(&cold.insn), &mut cpu.state.x87);
    // "If OSFXSR is clear, FXRSTOR may not restore XMM and MXCSR": processors do not.
    if cpu.state.cr4 & cr4::OSFXSR != 0 {
        cpu.state.vector.mxcsr = mxcsr;
        get_xmm(cpu, &image);
    }
    Ok(())
}

fn check_fx(cpu: &mut Cpu) -> Exec {
    if cpu.state.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(cpu.raise(Fault::plain(vector::NM)));
    }
    Ok(())
}

/// Checks common to the XSAVE family; gives the requested-feature bitmap.
fn requested(cpu: &mut Cpu, form: Form, saves: bool) -> Exec<u64> {
    let edx_eax = cpu.state.gpr.get(reg::RDX) << 32 | cpu.state.gpr.get(reg::RAX) & 0xffff_ffff;
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.raise(Fault::ud()));
    }
    if form == Form::Supervisor {
        cpu.require_enabled(secondary::ENABLE_XSAVES)?;
        cpu.require_cpl0()?;
        let reason = if saves { reason::XSAVES } else { reason::XRSTORS };
        cpu.exit_on_supervisor_state(edx_eax, reason)?;
    }
    if cpu.state.cr0 & cr0::TS != 0 {
        return Err(cpu.raise(Fault::plain(vector::NM)));
    }
    let enabled = match form {
        Form::Supervisor => cpu.state.xcr0 | cpu.state.msrs.xss,
        Form::Plain | Form::Optimised | Form::Compacted => cpu.state.xcr0,
    };
    Ok(edx_eax & enabled)
}

/// Where the extended components are, in the standard format or compacted to those in `compacted`.
#[derive(Clone, Copy)]
struct Layout {
    avx: usize,
    pkru: usize,
}

impl Layout {
    const STANDARD: Self = Self { avx: AVX_OFFSET, pkru: PKRU_OFFSET };

    fn compacted(components: u64) -> Self {
        let avx = LEGACY_SIZE + HEADER_SIZE;
        let pkru = if components & xcr0::AVX != 0 { avx + AVX_SIZE } else { avx };
        Self { avx, pkru }
    }

    /// Bytes up to the end of the last of `components`.
    fn size(self, components: u64) -> usize {
        if components & xcr0::PKRU != 0 {
            self.pkru + PKRU_SIZE
        } else if components & xcr0::AVX != 0 {
            self.avx + AVX_SIZE
        } else {
            LEGACY_SIZE + HEADER_SIZE
        }
    }
}

fn xsave(cpu: &mut Cpu, cold: &Cold, form: Form) -> Exec {
    let rfbm = requested(cpu, form, true)?;
    let compacts = matches!(form, Form::Compacted | Form::Supervisor);
    let layout = if compacts { Layout::compacted(rfbm) } else { Layout::STANDARD };
    let inuse = xinuse(&cpu.state) & rfbm;
    // XSAVE writes initial state too; the others leave it out.
    let saved = if form == Form::Plain { rfbm } else { inuse };
    let linear = image_linear(cpu, &cold.insn, layout.size(rfbm), 64, true)?;
    probe_image(cpu, linear, layout.size(rfbm))?;
    let mut header = [0; 16];
    let mut header_size = 8;
    if compacts {
        header[..8].copy_from_slice(&inuse.to_le_bytes());
        header[8..].copy_from_slice(&(rfbm | COMPACTED).to_le_bytes());
        header_size = 16;
    } else {
        let old = cpu.load::<u64>(linear.wrapping_add(LEGACY_SIZE as u64))?;
        header[..8].copy_from_slice(&(old & !rfbm | inuse).to_le_bytes());
    }
    save_legacy(cpu, linear, saved, rfbm, compacts, wide(&cold.insn))?;
    let at = |offset: usize| linear.wrapping_add(offset as u64);
    if saved & xcr0::AVX != 0 {
        let mut upper = [0; AVX_SIZE];
        let count = vector_count(cpu);
        for (to, from) in upper.chunks_exact_mut(16).zip(&cpu.state.vector.ymm[..count]) {
            to.copy_from_slice(&from[16..]);
        }
        cpu.write_bytes(at(layout.avx), &upper[..16 * count])?;
    }
    if saved & xcr0::PKRU != 0 {
        let pkru = u64::from(cpu.state.pkru).to_le_bytes();
        cpu.write_bytes(at(layout.pkru), &pkru)?;
    }
    cpu.write_bytes(at(LEGACY_SIZE), &header[..header_size])
}

/// Raises the fault of any page of the image before anything is written.
fn probe_image(cpu: &mut Cpu, linear: u64, size: usize) -> Exec {
    for offset in (0..size).step_by(4096) {
        cpu.probe_write(linear.wrapping_add(offset as u64), (size - offset).min(4096))?;
    }
    Ok(())
}

fn save_legacy(cpu: &mut Cpu, linear: u64, saved: u64, rfbm: u64, compacts: bool, wide: bool) -> Exec {
    let at = |offset: usize| linear.wrapping_add(offset as u64);
    let mut image = [0; LEGACY_SIZE];
    if saved & xcr0::X87 != 0 {
        put_x87(&cpu.state.x87, wide, &mut image);
        cpu.write_bytes(linear, &image[..MXCSR_AT])?;
        cpu.write_bytes(at(ST_AT), &image[ST_AT..XMM_AT])?;
    }
    // The compacted format treats MXCSR as part of SSE state; the standard one saves it with SSE and with AVX.
    let with_mxcsr = if compacts { saved & xcr0::SSE != 0 } else { rfbm & (xcr0::SSE | xcr0::AVX) != 0 };
    if with_mxcsr {
        put_mxcsr(cpu, &mut image);
        cpu.write_bytes(at(MXCSR_AT), &image[MXCSR_AT..MXCSR_AT + 8])?;
    }
    if saved & xcr0::SSE != 0 {
        put_xmm(cpu, &mut image);
        let end = XMM_AT + 16 * vector_count(cpu);
        cpu.write_bytes(at(XMM_AT), &image[XMM_AT..end])?;
    }
    Ok(())
}

/// An XSAVE image as XRSTOR found it.
struct Image {
    legacy: [u8; LEGACY_SIZE],
    avx: [u8; AVX_SIZE],
    pkru: u32,
    /// Components to load; the other requested ones are initialised.
    present: u64,
    compacted: bool,
}

fn xrstor(cpu: &mut Cpu, cold: &Cold, form: Form) -> Exec {
    let rfbm = requested(cpu, form, false)?;
    let smallest = LEGACY_SIZE + HEADER_SIZE;
    let linear = image_linear(cpu, &cold.insn, smallest, 64, false)?;
    let image = read_image(cpu, cold, linear, rfbm, form)?;
    let loads_mxcsr = if image.compacted {
        rfbm & image.present & xcr0::SSE != 0
    } else {
        rfbm & (xcr0::SSE | xcr0::AVX) != 0
    };
    let mxcsr = u32_at(&image.legacy, MXCSR_AT);
    if loads_mxcsr && mxcsr & !MXCSR_VALID != 0 {
        return Err(cpu.raise(Fault::gp(0)));
    }
    load_components(cpu, &image, rfbm, wide(&cold.insn));
    if loads_mxcsr {
        cpu.state.vector.mxcsr = mxcsr;
    } else if image.compacted && rfbm & xcr0::SSE != 0 {
        cpu.state.vector.mxcsr = MXCSR_INITIAL;
    }
    Ok(())
}

/// Reads and checks an image ("Operation of XRSTOR").
fn read_image(cpu: &mut Cpu, cold: &Cold, linear: u64, rfbm: u64, form: Form) -> Exec<Image> {
    let at = |offset: usize| linear.wrapping_add(offset as u64);
    let mut header = [0; HEADER_SIZE];
    cpu.read_bytes(at(LEGACY_SIZE), &mut header)?;
    let (xstate_bv, xcomp_bv) = (u64_at(&header, 0), u64_at(&header, 8));
    let compacted = xcomp_bv & COMPACTED != 0;
    let enabled = match form {
        Form::Supervisor => cpu.state.xcr0 | cpu.state.msrs.xss,
        Form::Plain | Form::Optimised | Form::Compacted => cpu.state.xcr0,
    };
    let components = xcomp_bv & !COMPACTED;
    let valid = if compacted {
        components & !enabled == 0 && xstate_bv & !components == 0 && header[16..] == [0; 48]
    } else {
        form != Form::Supervisor && xstate_bv & !enabled == 0 && header[8..24] == [0; 16]
    };
    if !valid {
        return Err(cpu.raise(Fault::gp(0)));
    }
    let layout = if compacted { Layout::compacted(components) } else { Layout::STANDARD };
    let present = xstate_bv & rfbm;
    // The segment's limit applies to all that is read.
    cpu.operand_linear(&cold.insn, layout.size(present), false)?;
    let mut image = Image { legacy: [0; LEGACY_SIZE], avx: [0; AVX_SIZE], pkru: 0, present, compacted };
    if rfbm & (xcr0::X87 | xcr0::SSE | xcr0::AVX) != 0 {
        let end = if present & xcr0::SSE != 0 { XMM_AT + 16 * vector_count(cpu) } else { XMM_AT };
        cpu.read_bytes(linear, &mut image.legacy[..end])?;
    }
    if present & xcr0::AVX != 0 {
        let end = 16 * vector_count(cpu);
        cpu.read_bytes(at(layout.avx), &mut image.avx[..end])?;
    }
    if present & xcr0::PKRU != 0 {
        image.pkru = cpu.load(at(layout.pkru))?;
    }
    Ok(image)
}

fn load_components(cpu: &mut Cpu, image: &Image, rfbm: u64, wide: bool) {
    let count = vector_count(cpu);
    if rfbm & xcr0::X87 != 0 {
        if image.present & xcr0::X87 != 0 {
            get_x87(&image.legacy, wide, &mut cpu.state.x87);
        } else {
            cpu.state.x87 = X87State::default();
        }
    }
    if rfbm & xcr0::SSE != 0 {
        // Not present: the image's bytes were not read and are 0, which is the initial state.
        get_xmm(cpu, &image.legacy);
    }
    if rfbm & xcr0::AVX != 0 {
        for (to, from) in cpu.state.vector.ymm[..count].iter_mut().zip(image.avx.chunks_exact(16)) {
            to[16..].copy_from_slice(from);
        }
    }
    if rfbm & xcr0::PKRU != 0 && cpu.state.pkru != image.pkru {
        cpu.state.pkru = image.pkru;
        cpu.tlb.protection_keys_changed();
    }
}
