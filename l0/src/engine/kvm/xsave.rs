//! x87, vector and protection-key state as an XSAVE area in standard format.

use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::VcpuFd;
use turtles_cpu::state::CpuState;
use x86defs::xcr0;

use super::{KvmHost, failed};
use crate::engine::EngineError;

const MXCSR: usize = 24;
/// Bytes of the x87 part: control words, MXCSR and its mask, eight registers of 16 bytes.
const X87_LEN: usize = 160;
const XMM: usize = 160;
const XSTATE_BV: usize = 512;
/// The extended components we hold end within KVM's 4-KiB area.
const AREA: usize = 4096;
const YMM_HIGH_LEN: usize = 256;

/// An XSAVE area and its layout on this host.
pub(super) struct XsaveArea {
    /// What KVM holds at present.
    area: Xsave,
    /// KVM_GET_XSAVE2 is to be used.
    large: bool,
    /// The components KVM takes.
    components: u64,
    ymm_high: Option<usize>,
    pkru: Option<usize>,
}

fn bytes_at(area: &kvm_xsave, at: usize) -> [u8; 4] {
    area.region.get(at / 4).copied().unwrap_or(0).to_le_bytes()
}

fn read(area: &kvm_xsave, at: usize, to: &mut [u8]) {
    for (index, chunk) in to.chunks_mut(4).enumerate() {
        chunk.copy_from_slice(&bytes_at(area, at + 4 * index)[..chunk.len()]);
    }
}

fn write(area: &mut kvm_xsave, at: usize, from: &[u8]) {
    for (index, chunk) in from.chunks_exact(4).enumerate() {
        if let (Some(word), Ok(bytes)) = (area.region.get_mut(at / 4 + index), chunk.try_into()) {
            *word = u32::from_le_bytes(bytes);
        }
    }
}

impl XsaveArea {
    /// Finds the layout; `supported_cpuid` says where the host's components are.
    pub(super) fn new(host: &KvmHost, vcpu: &VcpuFd) -> Result<Self, EngineError> {
        let [low, _, _, high] = host.supported_cpuid(0xd, 0);
        let supported = u64::from(low) | u64::from(high) << 32;
        let place = |bit: u64, number: u32, len: usize| {
            let at = host.supported_cpuid(0xd, number)[1] as usize;
            (supported & bit != 0 && at >= XSTATE_BV + 64 && at + len <= AREA && at % 4 == 0).then_some(at)
        };
        let ymm_high = place(xcr0::AVX, 2, YMM_HIGH_LEN);
        let pkru = place(xcr0::PKRU, 9, 4);
        let mut components = xcr0::X87 | xcr0::SSE;
        components |= if ymm_high.is_some() { xcr0::AVX } else { 0 };
        components |= if pkru.is_some() { xcr0::PKRU } else { 0 };
        let large = host.xsave_size > AREA;
        let area = Xsave::new((host.xsave_size - AREA).div_ceil(4)).map_err(|error| EngineError::Kvm {
            what: "making an XSAVE area".into(),
            source: std::io::Error::other(format!("{error:?}")),
        })?;
        let mut this = Self { area, large, components, ymm_high, pkru };
        this.fetch(vcpu)?;
        Ok(this)
    }

    fn fetch(&mut self, vcpu: &VcpuFd) -> Result<(), EngineError> {
        let what = "reading vector state";
        if self.large {
            // SAFETY: the area has the size that KVM named for KVM_CAP_XSAVE2.
            unsafe { vcpu.get_xsave2(&mut self.area) }.map_err(failed(what))
        } else {
            let area = vcpu.get_xsave().map_err(failed(what))?;
            self.region().region = area.region;
            Ok(())
        }
    }

    fn region(&mut self) -> &mut kvm_xsave {
        // SAFETY: the flexible array's length is not changed.
        unsafe { &mut self.area.as_mut_fam_struct().xsave }
    }

    /// Moves the state into KVM if it differs.
    pub(super) fn set(&mut self, vcpu: &VcpuFd, state: &CpuState) -> Result<(), EngineError> {
        let (components, ymm_high, pkru) = (self.components, self.ymm_high, self.pkru);
        let region = self.region();
        let before = region.region;
        let x87 = &state.x87;
        let mut legacy = [0; X87_LEN];
        legacy[0..2].copy_from_slice(&x87.fcw.to_le_bytes());
        legacy[2..4].copy_from_slice(&x87.fsw.to_le_bytes());
        legacy[4] = x87.ftw;
        legacy[6..8].copy_from_slice(&x87.fop.to_le_bytes());
        legacy[8..16].copy_from_slice(&x87.fip.to_le_bytes());
        legacy[16..24].copy_from_slice(&x87.fdp.to_le_bytes());
        legacy[MXCSR..MXCSR + 4].copy_from_slice(&state.vector.mxcsr.to_le_bytes());
        legacy[28..32].copy_from_slice(&bytes_at(region, 28));
        for (to, from) in legacy[32..].chunks_exact_mut(16).zip(&x87.st) {
            to.copy_from_slice(from);
        }
        write(region, 0, &legacy);
        for (index, register) in state.vector.ymm.iter().enumerate() {
            write(region, XMM + 16 * index, &register[..16]);
            if let Some(at) = ymm_high {
                write(region, at + 16 * index, &register[16..]);
            }
        }
        if let Some(at) = pkru {
            write(region, at, &state.pkru.to_le_bytes());
        }
        write(region, XSTATE_BV, &components.to_le_bytes());
        if region.region == before {
            return Ok(());
        }
        let what = "writing vector state";
        if self.large {
            // SAFETY: the area has the size that KVM named for KVM_CAP_XSAVE2.
            unsafe { vcpu.set_xsave2(&self.area) }.map_err(failed(what))
        } else {
            // SAFETY: without a larger KVM_CAP_XSAVE2, KVM reads the structure's 4 KiB.
            unsafe { vcpu.set_xsave(self.region()) }.map_err(failed(what))
        }
    }

    /// Moves the state out of KVM. KVM fills in components in their initial state.
    pub(super) fn get(&mut self, vcpu: &VcpuFd, state: &mut CpuState) -> Result<(), EngineError> {
        self.fetch(vcpu)?;
        let (ymm_high, pkru) = (self.ymm_high, self.pkru);
        let region = &*self.region();
        let mut legacy = [0; X87_LEN];
        read(region, 0, &mut legacy);
        let word = |at: usize| u16::from_le_bytes([legacy[at], legacy[at + 1]]);
        let quad = |at: usize| {
            u64::from(word(at))
                | u64::from(word(at + 2)) << 16
                | u64::from(word(at + 4)) << 32
                | u64::from(word(at + 6)) << 48
        };
        state.x87.fcw = word(0);
        state.x87.fsw = word(2);
        state.x87.ftw = legacy[4];
        state.x87.fop = word(6);
        state.x87.fip = quad(8);
        state.x87.fdp = quad(16);
        state.vector.mxcsr = u32::from(word(MXCSR)) | u32::from(word(MXCSR + 2)) << 16;
        for (to, from) in state.x87.st.iter_mut().zip(legacy[32..].chunks_exact(16)) {
            to.copy_from_slice(from);
        }
        for (index, register) in state.vector.ymm.iter_mut().enumerate() {
            read(region, XMM + 16 * index, &mut register[..16]);
            if let Some(at) = ymm_high {
                read(region, at + 16 * index, &mut register[16..]);
            }
        }
        if let Some(at) = pkru {
            state.pkru = u32::from_le_bytes(bytes_at(region, at));
        }
        Ok(())
    }
}
