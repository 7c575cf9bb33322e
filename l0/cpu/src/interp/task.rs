//! Hardware task switches ("Task Management", SDM volume 3): by JMP, CALL, IRET, and by interrupts through task gates.
//!
//! A switch has a point of no return: until then a fault belongs to the old task and nothing has changed; from then on
//! it belongs to the new task, whose RIP it saves. Faults of the second kind are therefore delivered here, and the
//! instruction counts as done.

use x86defs::segment::{self, SELECTOR_TI, system};
use x86defs::vmx::reason;
use x86defs::{cr0, cr4, dr, rflags, vector};

use super::descriptor::{Found, is_null, rpl};
use super::segment::{data_loadable, null_segment};
use crate::Cpu;
use crate::mmu::walk::{Access, Privilege};
use crate::state::{Event, Seg, Segment};
use crate::trap::Exec;

/// What switches tasks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Switch {
    Jump,
    Call,
    /// IRET with NT set.
    Return,
    /// An event through a task gate; `flags` is the image to save.
    Interrupt {
        flags: u64,
        ext: u32,
        event: Event,
    },
}

impl Switch {
    fn ext(self) -> u32 {
        if let Self::Interrupt { ext, .. } = self { ext } else { 0 }
    }

    /// In the exit qualification of task switches.
    fn source(self) -> u64 {
        match self {
            Self::Call => 0,
            Self::Return => 1,
            Self::Jump => 2,
            Self::Interrupt { .. } => 3,
        }
    }

    /// The old task stays busy, linked to by the new one.
    fn nests(self) -> bool {
        matches!(self, Self::Call | Self::Interrupt { .. })
    }
}

/// T flag in a 32-bit TSS's word at 100.
const TSS_TRAP: u16 = 1;
/// Size of a 32-bit TSS's fixed part, and of a 16-bit TSS.
const TSS32_SIZE: usize = 104;
const TSS16_SIZE: usize = 44;
/// Segments in the order both TSS formats have them.
const SEGMENTS: [Seg; 6] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];

/// A task's state as a TSS holds it.
#[derive(Clone, Copy, Debug, Default)]
struct Image {
    cr3: Option<u32>,
    eip: u32,
    eflags: u32,
    gpr: [u32; 8],
    /// In the order of [`SEGMENTS`].
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}

impl Image {
    fn of32(b: &[u8; TSS32_SIZE]) -> Self {
        Self {
            cr3: Some(dword(b, 28)),
            eip: dword(b, 32),
            eflags: dword(b, 36),
            gpr: std::array::from_fn(|i| dword(b, 40 + 4 * i)),
            selectors: std::array::from_fn(|i| word(b, 72 + 4 * i)),
            ldt: word(b, 96),
            trap: word(b, 100) & TSS_TRAP != 0,
        }
    }

    fn of16(b: &[u8; TSS32_SIZE]) -> Self {
        Self {
            cr3: None,
            eip: u32::from(word(b, 14)),
            eflags: u32::from(word(b, 16)),
            gpr: std::array::from_fn(|i| u32::from(word(b, 18 + 2 * i))),
            // A 16-bit TSS has no FS and GS.
            selectors: std::array::from_fn(|i| if i < 4 { word(b, 34 + 2 * i) } else { 0 }),
            ldt: word(b, 42),
            trap: false,
        }
    }
}

fn is_tss16(register_or_descriptor_access: u32) -> bool {
    register_or_descriptor_access & 8 == 0
}

impl Cpu {
    /// Switches to the task of `found`, a TSS descriptor whose type and presence are checked. `state.rip` is what
    /// the old task goes on with.
    pub(crate) fn switch_task(&mut self, found: &Found, how: Switch) -> Exec {
        let ext = how.ext();
        let old_tr = self.state.tr;
        let narrow = is_tss16(found.descriptor.access());
        let size = if narrow { TSS16_SIZE } else { TSS32_SIZE };
        if (found.descriptor.limit() as usize) < size - 1 {
            return Err(self.selector_fault(vector::TS, found.selector, ext));
        }
        if self.non_root() {
            // "Treatment of Task Switches": not allowed, once these checks have passed.
            let qualification = how.source() << 30 | u64::from(found.selector);
            return Err(self.vm_exit(reason::TASK_SWITCH, qualification));
        }
        let mut bytes = [0; TSS32_SIZE];
        self.read_table(u64::from(found.descriptor.base()), &mut bytes[..size])?;
        let image = if narrow { Image::of16(&bytes) } else { Image::of32(&bytes) };
        self.probe_switch(found, how)?;
        let new_pdptes = self.new_task_pdptes(&image, found, ext)?;

        // Everything below succeeds as far as memory goes.
        self.save_task(how)?;
        if how.nests() {
            self.write_system::<u16>(u64::from(found.descriptor.base()), old_tr.selector)?;
        }
        if !how.nests() {
            if let Some(at) = self.descriptor_address(old_tr.selector & !SELECTOR_TI, 8) {
                self.mark_available(at)?;
            }
        }
        if !matches!(how, Switch::Return) {
            self.mark_busy(found.at)?;
        }
        let mut tr = found.descriptor.to_segment(found.selector);
        tr.access |= 2;
        self.state.tr = tr;
        self.load_registers(&image, how, new_pdptes);

        // The new task's own problems from here on.
        if self.load_task_segments(&image, how).is_err() {
            let during = if let Switch::Interrupt { event, .. } = how { Some(event) } else { None };
            self.refresh_mode();
            self.deliver_fault_during(during)?;
        }
        Ok(())
    }

    /// Faults of all later writes, while the old task can still take them.
    fn probe_switch(&mut self, found: &Found, how: Switch) -> Exec {
        let old = self.state.tr;
        let (first, last) = if is_tss16(old.access) { (14, 41) } else { (32, 95) };
        if u64::from(old.limit) < last {
            return Err(self.selector_fault(vector::TS, old.selector, how.ext()));
        }
        for at in [first, last] {
            self.place(self.table_address(old.base, at), 1, Access::Write, Privilege::Implicit)?;
        }
        if how.nests() {
            let base = u64::from(found.descriptor.base());
            for at in [0, 1] {
                self.place(self.table_address(base, at), 1, Access::Write, Privilege::Implicit)?;
            }
        }
        self.probe_descriptor_write(found.at)?;
        if let Some(at) = self.descriptor_address(old.selector & !SELECTOR_TI, 8) {
            self.probe_descriptor_write(at)?;
        }
        Ok(())
    }

    /// The PDPTE registers that the new task's CR3 gives under PAE paging; malformed ones are #TS.
    fn new_task_pdptes(&mut self, image: &Image, found: &Found, ext: u32) -> Exec<Option<[u64; 4]>> {
        let paging = self.state.cr0 & cr0::PG != 0;
        match image.cr3 {
            Some(cr3) if paging && self.state.cr4 & cr4::PAE != 0 => {
                match self.read_pdptes(u64::from(cr3))? {
                    Some(pdptes) => Ok(Some(pdptes)),
                    None => Err(self.selector_fault(vector::TS, found.selector, ext)),
                }
            }
            _ => Ok(None),
        }
    }

    /// Saves the old task in its TSS.
    fn save_task(&mut self, how: Switch) -> Exec {
        let tr = self.state.tr;
        let mut flags = match how {
            Switch::Interrupt { flags, .. } => flags,
            _ => self.state.rflags(),
        };
        if matches!(how, Switch::Return) {
            flags &= !rflags::NT;
        }
        let rip = self.state.rip;
        let gpr: [u64; 8] = std::array::from_fn(|i| self.state.gpr.get(i));
        let selectors = SEGMENTS.map(|s| u64::from(self.state.seg(s).selector));
        let narrow = is_tss16(tr.access);
        let (start, size, count) = if narrow { (14, 2, 4) } else { (32, 4, 6) };
        let mut at = start;
        for value in [rip, flags].into_iter().chain(gpr) {
            self.write_system_sized(self.table_address(tr.base, at), size, value)?;
            at += size as u64;
        }
        for value in &selectors[..count] {
            self.write_system::<u16>(self.table_address(tr.base, at), *value as u16)?;
            at += size as u64;
        }
        Ok(())
    }

    fn write_system_sized(&mut self, at: u64, size: usize, value: u64) -> Exec {
        if size == 2 {
            self.write_system::<u16>(at, value as u16)
        } else {
            self.write_system::<u32>(at, value as u32)
        }
    }

    /// Everything of the new task but its segments' hidden parts.
    fn load_registers(&mut self, image: &Image, how: Switch, pdptes: Option<[u64; 4]>) {
        self.state.cr0 |= cr0::TS;
        if let Some(cr3) = image.cr3.filter(|_| self.state.cr0 & cr0::PG != 0) {
            self.state.cr3 = u64::from(cr3);
            if let Some(pdptes) = pdptes {
                self.state.pdptes = pdptes;
            }
            self.flush_non_global();
        }
        self.state.rip = u64::from(image.eip);
        let nested = if how.nests() { rflags::NT } else { 0 };
        self.state.set_rflags(u64::from(image.eflags) | nested);
        for (i, value) in image.gpr.iter().enumerate() {
            self.state.gpr.set(i, u64::from(*value));
        }
        for (seg, selector) in SEGMENTS.into_iter().zip(image.selectors) {
            *self.state.seg_mut(seg) = null_segment(selector, 0);
        }
        self.state.ldtr = Segment { selector: image.ldt, access: segment::UNUSABLE, ..Segment::default() };
        self.state.cpl = if self.state.v86() { 3 } else { rpl(image.selectors[1]) };
        // Local breakpoints are of the old task.
        self.state.dr7 &= !(0x55 | dr::DR7_LE);
        if image.trap {
            self.state.pending_debug |= dr::DR6_BT;
        }
        self.refresh_mode();
        self.attend();
    }

    /// LDTR and the segment registers, then the error code onto the new stack.
    fn load_task_segments(&mut self, image: &Image, how: Switch) -> Exec {
        let ext = how.ext();
        self.load_task_ldt(image.ldt, ext)?;
        if self.state.v86() {
            for (seg, selector) in SEGMENTS.into_iter().zip(image.selectors) {
                *self.state.seg_mut(seg) = Segment { access: 0xf3, ..Segment::real(selector) };
            }
        } else {
            let [es, cs, ss, ds, fs, gs] = image.selectors;
            self.load_task_code(cs, ext)?;
            self.load_task_stack(ss, ext)?;
            for (seg, selector) in [(Seg::Es, es), (Seg::Ds, ds), (Seg::Fs, fs), (Seg::Gs, gs)] {
                self.load_task_data(seg, selector, ext)?;
            }
        }
        self.refresh_mode();
        if self.state.rip > u64::from(self.state.seg(Seg::Cs).limit) {
            return Err(self.raise(crate::trap::Fault::gp(ext)));
        }
        if let Switch::Interrupt { event: Event { error_code: Some(code), .. }, .. } = how {
            let size = if is_tss16(self.state.tr.access) { 2 } else { 4 };
            self.push_after_switch(size, u64::from(code), ext)?;
        }
        Ok(())
    }

    fn load_task_ldt(&mut self, selector: u16, ext: u32) -> Exec {
        if is_null(selector) {
            return Ok(());
        }
        if selector & SELECTOR_TI != 0 {
            return Err(self.selector_fault(vector::TS, selector, ext));
        }
        let found = self.fetch_descriptor(selector, vector::TS, ext)?;
        if found.descriptor.system_type() != Some(system::LDT) || !found.descriptor.present() {
            return Err(self.selector_fault(vector::TS, selector, ext));
        }
        self.state.ldtr = found.descriptor.to_segment(selector);
        Ok(())
    }

    fn load_task_code(&mut self, selector: u16, ext: u32) -> Exec {
        if is_null(selector) {
            return Err(self.selector_fault(vector::TS, selector, ext));
        }
        let found = self.fetch_descriptor(selector, vector::TS, ext)?;
        let d = found.descriptor;
        let allowed = if d.is_conforming() { d.dpl() <= rpl(selector) } else { d.dpl() == rpl(selector) };
        if !d.is_code() || !allowed {
            return Err(self.selector_fault(vector::TS, selector, ext));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector, ext));
        }
        self.mark_accessed(&found)?;
        *self.state.seg_mut(Seg::Cs) = d.to_segment(selector);
        self.refresh_mode();
        Ok(())
    }

    fn load_task_stack(&mut self, selector: u16, ext: u32) -> Exec {
        if is_null(selector) {
            return Err(self.selector_fault(vector::TS, selector, ext));
        }
        let found = self.fetch_stack_descriptor(selector, self.state.cpl, vector::TS, ext)?;
        self.mark_accessed(&found)?;
        *self.state.seg_mut(Seg::Ss) = found.descriptor.to_segment(selector);
        Ok(())
    }

    fn load_task_data(&mut self, seg: Seg, selector: u16, ext: u32) -> Exec {
        if is_null(selector) {
            return Ok(());
        }
        let found = self.fetch_descriptor(selector, vector::TS, ext)?;
        if !data_loadable(found.descriptor, self.state.cpl, rpl(selector)) {
            return Err(self.selector_fault(vector::TS, selector, ext));
        }
        if !found.descriptor.present() {
            return Err(self.selector_fault(vector::NP, selector, ext));
        }
        self.mark_accessed(&found)?;
        *self.state.seg_mut(seg) = found.descriptor.to_segment(selector);
        Ok(())
    }

    /// IRET with NT: back to the task that the TSS's link names.
    pub(crate) fn return_to_linked_task(&mut self) -> Exec {
        let selector = self.read_system::<u16>(self.table_address(self.state.tr.base, 0))?;
        if is_null(selector) || selector & SELECTOR_TI != 0 {
            return Err(self.selector_fault(vector::TS, selector, 0));
        }
        let found = self.fetch_descriptor(selector, vector::TS, 0)?;
        if !matches!(found.descriptor.system_type(), Some(system::TSS_BUSY | system::TSS16_BUSY)) {
            return Err(self.selector_fault(vector::TS, selector, 0));
        }
        if !found.descriptor.present() {
            return Err(self.selector_fault(vector::NP, selector, 0));
        }
        self.switch_task(&found, Switch::Return)
    }

    /// Far JMP or CALL to a TSS, or through a task gate (both checked for privilege by the caller).
    pub(crate) fn enter_task(&mut self, found: &Found, how: Switch) -> Exec {
        let available = [Some(system::TSS_AVAILABLE), Some(system::TSS16_AVAILABLE)];
        if !available.contains(&found.descriptor.system_type()) {
            return Err(self.selector_fault(vector::GP, found.selector, 0));
        }
        if !found.descriptor.present() {
            return Err(self.selector_fault(vector::NP, found.selector, 0));
        }
        self.switch_task(found, how)
    }
}
