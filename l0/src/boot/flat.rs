//! Images without a boot protocol: an ELF file entered at `e_entry`, and a flat image entered at its first byte.
//!
//! What they find is this machine's own convention: interrupts off, flat segments, a small stack, and in EBX (and
//! in RDI in 64-bit mode) the address of an `hvm_start_info` as PVH has it. In real mode DS:BX cannot reach that
//! far; there EBX holds its physical address all the same.

use super::Guest;
use super::elf::Elf;
use super::error::BootError;
use super::layout::Layout;
use super::pvh::place_start_info;
use super::state::{BootState, Protocol, gpr};

/// Room for calls and locals until the guest has its own.
const STACK_SIZE: u64 = 16 << 10;
const REAL_MODE_LIMIT: u64 = 0x10_0000;

/// The mode a flat image starts in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FlatMode {
    /// Real mode; the address is below 1 MiB.
    Real16,
    /// Protected mode, flat segments, paging off.
    Protected32,
    /// 64-bit mode, the first 4 GiB mapped to themselves.
    Long64,
}

/// Where and how a flat image starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FlatSpec {
    /// Load address and entry point.
    pub address: u64,
    /// Mode at its first instruction.
    pub mode: FlatMode,
}

/// Loads a flat image.
pub fn load(layout: &mut Layout, guest: &mut Guest, spec: &FlatSpec) -> Result<BootState, BootError> {
    let image = guest.image;
    let what = format!("the flat image {}", image.name);
    layout.claim(spec.address, image.len(), &what)?;
    layout.write(spec.address, image.bytes, &what)?;
    match spec.mode {
        FlatMode::Real16 if spec.address >= REAL_MODE_LIMIT => Err(image.unsupported(format!(
            "real mode does not reach {:#x}: load it below 1M, or start it in protected mode",
            spec.address
        ))),
        FlatMode::Real16 => {
            let start_info = place_start_info(layout, guest)?;
            let stack = layout.reserve_table(STACK_SIZE, 16, "the first stack")?;
            let mut state = BootState::real16(Protocol::Flat, spec.address);
            state.set_real_mode_stack(stack, STACK_SIZE as u16);
            state.gpr[gpr::RBX] = start_info;
            Ok(state)
        }
        FlatMode::Protected32 => start(layout, guest, Protocol::Flat, false, spec.address),
        FlatMode::Long64 => start(layout, guest, Protocol::Flat, true, spec.address),
    }
}

/// Loads an ELF file without any protocol's marks.
pub fn load_elf(layout: &mut Layout, guest: &mut Guest, elf: &Elf) -> Result<BootState, BootError> {
    let entry = elf.physical_entry(elf.entry)?;
    elf.load(layout, 0)?;
    let protocol = if elf.is_64bit { Protocol::Elf64 } else { Protocol::Elf32 };
    start(layout, guest, protocol, elf.is_64bit, entry)
}

fn start(
    layout: &mut Layout,
    guest: &mut Guest,
    protocol: Protocol,
    is_64bit: bool,
    entry: u64,
) -> Result<BootState, BootError> {
    let image = guest.image;
    let entry32 = u32::try_from(entry)
        .map_err(|_| image.unsupported(format!("its entry point {entry:#x} is above 4G: link it lower")))?;
    let start_info = place_start_info(layout, guest)?;
    let stack = layout.reserve_table(STACK_SIZE, 16, "the first stack")?;
    let mut state = match is_64bit {
        true => BootState::long64(layout, protocol, entry)?,
        false => BootState::protected32(layout, protocol, entry32)?,
    };
    state.gpr[gpr::RSP] = stack + STACK_SIZE;
    state.gpr[gpr::RBX] = start_info;
    if is_64bit {
        state.gpr[gpr::RDI] = start_info;
    }
    Ok(state)
}
