//! Segment and gate descriptors: their fields, fetching them from the descriptor tables, and the bits the processor
//! itself changes there (accessed, busy).

use std::sync::atomic::Ordering;

use x86defs::segment::{self, SELECTOR_RPL, SELECTOR_TI, system};
use x86defs::vector;

use crate::Cpu;
use crate::mmu::Place;
use crate::mmu::walk::{Access, Privilege};
use crate::state::{Segment, TableRegister};
use crate::trap::{Exec, Fault};

/// EXT of a selector error code: the event did not come from the program.
pub(crate) const EXT: u32 = 1;
/// IDT of a selector error code: the index names a gate in the IDT.
pub(crate) const IDT: u32 = 2;

/// The part of a selector that goes into an error code.
pub(crate) fn selector_code(selector: u16) -> u32 {
    u32::from(selector & !SELECTOR_RPL)
}

/// RPL of a selector.
pub(crate) fn rpl(selector: u16) -> u8 {
    (selector & SELECTOR_RPL) as u8
}

/// A null selector (index 0 of the GDT).
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !SELECTOR_RPL == 0
}

/// An 8-byte descriptor, as it is in memory.
///
/// ```text
///  63      56 55  52 51  48 47   40 39        16 15         0
/// | base31:24| flags|lim19:16| access| base23:0   | limit15:0  |   segments
/// | offset31:16     |P DPL S type    | sel | params | offset15:0 |  gates
/// ```
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor(pub(crate) u64);

impl Descriptor {
    /// Access rights in the format of [`Segment::access`].
    pub(crate) fn access(self) -> u32 {
        (self.0 >> 40) as u32 & 0xf0ff
    }

    pub(crate) fn base(self) -> u32 {
        (self.0 >> 16 & 0xff_ffff) as u32 | ((self.0 >> 56) as u32) << 24
    }

    /// In bytes, scaled by G.
    pub(crate) fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff) as u32 | (self.0 >> 32 & 0xf_0000) as u32;
        if self.has(segment::G) { raw << 12 | 0xfff } else { raw }
    }

    pub(crate) fn dpl(self) -> u8 {
        (self.0 >> 45 & 3) as u8
    }

    /// Some access-right bits, any of them.
    pub(crate) fn has(self, bits: u32) -> bool {
        self.access() & bits != 0
    }

    pub(crate) fn present(self) -> bool {
        self.has(segment::PRESENT)
    }

    pub(crate) fn is_code(self) -> bool {
        self.has(segment::S) && self.has(segment::CODE)
    }

    pub(crate) fn is_conforming(self) -> bool {
        self.is_code() && self.has(segment::CONFORMING)
    }

    pub(crate) fn is_readable(self) -> bool {
        self.has(segment::S) && (!self.has(segment::CODE) || self.has(segment::READABLE))
    }

    pub(crate) fn is_writable_data(self) -> bool {
        self.has(segment::S) && !self.has(segment::CODE) && self.has(segment::WRITABLE)
    }

    /// 64-bit code: L set, D clear.
    pub(crate) fn is_code64(self) -> bool {
        self.access() & (segment::L | segment::DB) == segment::L
    }

    /// Type of a system descriptor or gate; none for code and data.
    pub(crate) fn system_type(self) -> Option<u32> {
        (!self.has(segment::S)).then(|| self.access() & segment::TYPE)
    }

    /// A gate's target selector.
    pub(crate) fn gate_selector(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// A gate's target offset (its low 32 bits).
    pub(crate) fn gate_offset(self) -> u32 {
        (self.0 & 0xffff) as u32 | (self.0 >> 32) as u32 & 0xffff_0000
    }

    /// A call gate's parameter count, or an IDT gate's IST index in the low three bits.
    pub(crate) fn gate_count(self) -> u32 {
        (self.0 >> 32 & 0x1f) as u32
    }

    /// What a segment register holds after loading this (accessed bit set) under `selector`.
    pub(crate) fn to_segment(self, selector: u16) -> Segment {
        let accessed = if self.has(segment::S) { segment::ACCESSED } else { 0 };
        Segment {
            base: u64::from(self.base()),
            limit: self.limit(),
            access: self.access() | accessed,
            selector,
        }
    }
}

/// A descriptor and where it was found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) descriptor: Descriptor,
    /// Linear address.
    pub(crate) at: u64,
    pub(crate) selector: u16,
}

impl Cpu {
    /// Linear addresses of the processor's own tables are 32 bits wide outside IA-32e mode.
    pub(crate) fn table_address(&self, base: u64, offset: u64) -> u64 {
        let at = base.wrapping_add(offset);
        if self.state.long_mode() { at } else { at & 0xffff_ffff }
    }

    /// Address of the descriptor that a selector names, `size` bytes long; none if outside its table.
    pub(crate) fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let index = u64::from(selector & !7);
        let (base, limit) = if selector & SELECTOR_TI == 0 {
            (self.state.gdtr.base, u64::from(self.state.gdtr.limit))
        } else if self.state.ldtr.unusable() {
            return None;
        } else {
            (self.state.ldtr.base, u64::from(self.state.ldtr.limit))
        };
        (index + size - 1 <= limit).then(|| self.table_address(base, index))
    }

    /// Fetches the descriptor that a non-null selector names; outside its table is `vector`(selector | `ext`).
    pub(crate) fn fetch_descriptor(&mut self, selector: u16, vector: u8, ext: u32) -> Exec<Found> {
        let Some(at) = self.descriptor_address(selector, 8) else {
            return Err(self.selector_fault(vector, selector, ext));
        };
        let descriptor = Descriptor(self.read_system::<u64>(at)?);
        Ok(Found { descriptor, at, selector })
    }

    /// Raises `vector` with a selector's error code.
    #[cold]
    pub(crate) fn selector_fault(&mut self, vector: u8, selector: u16, ext: u32) -> crate::trap::Trap {
        self.raise(Fault::with_code(vector, selector_code(selector) | ext))
    }

    /// Fetches the upper half of a 16-byte system descriptor (IA-32e mode): base or offset bits 63:32. The type
    /// field there must be zero.
    pub(crate) fn fetch_upper_half(&mut self, found: &Found, vector: u8, ext: u32) -> Exec<u64> {
        if self.descriptor_address(found.selector, 16).is_none() {
            return Err(self.selector_fault(vector, found.selector, ext));
        }
        let upper = self.read_system::<u64>(self.table_address(found.at, 8))?;
        if upper >> 40 & 0x1f != 0 {
            return Err(self.selector_fault(vector, found.selector, ext));
        }
        Ok(upper << 32)
    }

    /// Sets the accessed bit of a code or data segment's descriptor.
    pub(crate) fn mark_accessed(&mut self, found: &Found) -> Exec {
        if found.descriptor.has(segment::S) && !found.descriptor.has(segment::ACCESSED) {
            self.change_access_byte(found.at, segment::ACCESSED as u8, 0)?;
        }
        Ok(())
    }

    /// Sets the accessed bit of the descriptor at `at`.
    pub(crate) fn set_accessed_at(&mut self, at: u64) -> Exec {
        self.change_access_byte(at, segment::ACCESSED as u8, 0)
    }

    /// Sets the busy bit of a TSS descriptor.
    pub(crate) fn mark_busy(&mut self, at: u64) -> Exec {
        self.change_access_byte(at, 2, 0)
    }

    /// Clears the busy bit of a TSS descriptor.
    pub(crate) fn mark_available(&mut self, at: u64) -> Exec {
        self.change_access_byte(at, 0, 2)
    }

    /// Sets and clears bits in the access byte of the descriptor at `at`, with a locked access where it is RAM.
    fn change_access_byte(&mut self, at: u64, set: u8, clear: u8) -> Exec {
        let at = self.table_address(at, 5);
        match self.place(at, 1, Access::Write, Privilege::Implicit)? {
            Place::Ram(physical, _) => {
                let shift = (physical & 3) * 8;
                if let Some(word) = self.memory.entry32(physical) {
                    if set != 0 {
                        word.fetch_or(u32::from(set) << shift, Ordering::SeqCst);
                    }
                    if clear != 0 {
                        word.fetch_and(!(u32::from(clear) << shift), Ordering::SeqCst);
                    }
                }
                self.wrote_ram(physical, 1);
            }
            Place::Mmio(_) | Place::Apic(_) => {
                let byte = self.read_system::<u8>(at)?;
                self.write_system::<u8>(at, byte & !clear | set)?;
            }
        }
        Ok(())
    }

    /// Raises the fault that marking a descriptor would raise, so that a later mark cannot fail.
    pub(crate) fn probe_descriptor_write(&mut self, at: u64) -> Exec {
        self.place(self.table_address(at, 5), 1, Access::Write, Privilege::Implicit).map(|_| ())
    }
}

/// Loads of LDTR and TR: LLDT and LTR.
impl Cpu {
    /// LLDT. A null selector makes LDTR unusable.
    pub(crate) fn load_ldtr(&mut self, selector: u16) -> Exec {
        if is_null(selector) {
            self.state.ldtr = Segment { selector, access: segment::UNUSABLE, ..Segment::default() };
            return Ok(());
        }
        if selector & SELECTOR_TI != 0 {
            return Err(self.selector_fault(vector::GP, selector, 0));
        }
        let found = self.fetch_descriptor(selector, vector::GP, 0)?;
        if found.descriptor.system_type() != Some(system::LDT) {
            return Err(self.selector_fault(vector::GP, selector, 0));
        }
        if !found.descriptor.present() {
            return Err(self.selector_fault(vector::NP, selector, 0));
        }
        let mut register = found.descriptor.to_segment(selector);
        if self.state.long_mode() {
            register.base |= self.fetch_upper_half(&found, vector::GP, 0)?;
            self.check_table_base(register.base)?;
        }
        self.state.ldtr = register;
        Ok(())
    }

    /// LTR.
    pub(crate) fn load_tr(&mut self, selector: u16) -> Exec {
        if is_null(selector) {
            return Err(self.raise(Fault::gp(0)));
        }
        if selector & SELECTOR_TI != 0 {
            return Err(self.selector_fault(vector::GP, selector, 0));
        }
        let found = self.fetch_descriptor(selector, vector::GP, 0)?;
        let long = self.state.long_mode();
        match found.descriptor.system_type() {
            Some(system::TSS_AVAILABLE) => {}
            Some(system::TSS16_AVAILABLE) if !long => {}
            _ => return Err(self.selector_fault(vector::GP, selector, 0)),
        }
        if !found.descriptor.present() {
            return Err(self.selector_fault(vector::NP, selector, 0));
        }
        let mut register = found.descriptor.to_segment(selector);
        if long {
            register.base |= self.fetch_upper_half(&found, vector::GP, 0)?;
            self.check_table_base(register.base)?;
        }
        register.access |= 2;
        self.mark_busy(found.at)?;
        self.state.tr = register;
        Ok(())
    }

    fn check_table_base(&mut self, base: u64) -> Exec {
        if self.is_canonical(base) { Ok(()) } else { Err(self.raise(Fault::gp(0))) }
    }

    /// LGDT and LIDT in 64-bit mode: the base must be canonical.
    pub(crate) fn check_table_register(&mut self, table: TableRegister) -> Exec {
        if self.code_bits == 64 { self.check_table_base(table.base) } else { Ok(()) }
    }
}
