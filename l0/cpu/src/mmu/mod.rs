//! Memory as instructions see it: linear addresses through the software TLB, with the slow path behind it for
//! misses, page-crossing accesses, MMIO, code pages, alignment checks and data breakpoints.
//!
//! Unsafe island: the fast paths dereference host addresses that a TLB entry vouches for. An entry's host page is
//! guest RAM, mapped for the life of [`crate::phys::PhysMemory`], and the tag compare proves that the whole access lies in it.

pub(crate) mod guard;
pub mod tlb;
pub mod walk;

use x86defs::vmx::reason;
use x86defs::{cr0, cr4, dr, efer, rflags, vector};

use crate::Cpu;
use crate::phys::{PhysMemory, Word};
use crate::profile::{Count, Doing};
use crate::state::{Activity, Seg};
use crate::trap::{Exec, Fault, Trap};
use tlb::{DataEntry, GLOBAL, LARGE, Mode, Regime, SpaceTag, data_index, no_page};
use walk::{Access, Direct, Failure, Nested, Privilege, Translation, translate};

/// Where one piece (within a page) of a slow access goes.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    /// Physical RAM address and host pointer.
    Ram(u64, *mut u8),
    /// Physical address without RAM.
    Mmio(u64),
    /// Offset in the APIC-access page, of an access that goes to the virtual-APIC page.
    Apic(u16),
}

impl Cpu {
    /// Reads at a linear address with the current privilege.
    #[inline(always)]
    pub fn load<T: Word>(&mut self, linear: u64) -> Exec<T> {
        let entry = self.data_entry(linear);
        if entry.reads(linear, T::SIZE) {
            // SAFETY: the tag matched for the access's last byte, and the index was its first byte's: the access
            // lies in the entry's page of RAM.
            return Ok(unsafe { T::load(entry.addend.wrapping_add(linear) as *const u8) });
        }
        self.load_slow(linear)
    }

    /// Writes at a linear address with the current privilege.
    #[inline(always)]
    pub fn store<T: Word>(&mut self, linear: u64, value: T) -> Exec {
        let entry = self.data_entry(linear);
        if entry.writes(linear, T::SIZE) {
            // SAFETY: as in `load`; a write tag is set only where writing is allowed and no code is (TLB-1).
            unsafe { T::store(entry.addend.wrapping_add(linear) as *mut u8, value) };
            return Ok(());
        }
        self.store_slow(linear, value)
    }

    /// Reads, lets `f` compute, writes back: an instruction with a memory destination, not locked. Write permission is
    /// checked before anything is read, as the processor does.
    #[inline(always)]
    pub fn modify<T: Word>(&mut self, linear: u64, f: impl FnOnce(&mut u16, T) -> T) -> Exec {
        let entry = self.data_entry(linear);
        if entry.writes(linear, T::SIZE) {
            let at = entry.addend.wrapping_add(linear) as *mut u8;
            // SAFETY: as in `store`; a writable page is readable.
            unsafe {
                let new = f(&mut self.state.status, T::load(at));
                T::store(at, new);
            }
            return Ok(());
        }
        self.modify_slow(linear, f)
    }

    /// Host pointer to `size` bytes at `linear` that the current privilege may write, all in one page of plain
    /// RAM; none if the access must take another way (the fault, if any, is raised by `probe_write`).
    #[inline(always)]
    pub(crate) fn fast_write_pointer(&self, linear: u64, size: usize) -> Option<*mut u8> {
        let entry = self.data_entry(linear);
        if entry.writes(linear, size) {
            return Some(entry.addend.wrapping_add(linear) as *mut u8);
        }
        let second = self.second_entry(linear);
        second.writes(linear, size).then(|| second.addend.wrapping_add(linear) as *mut u8)
    }

    /// Host pointer to `linear` if the current privilege may read its page through the fast path.
    #[inline(always)]
    pub(crate) fn fast_read_pointer(&self, linear: u64) -> Option<*mut u8> {
        let entry = self.data_entry(linear);
        if entry.reads(linear, 1) {
            return Some(entry.addend.wrapping_add(linear) as *mut u8);
        }
        let second = self.second_entry(linear);
        second.reads(linear, 1).then(|| second.addend.wrapping_add(linear) as *mut u8)
    }

    #[inline(always)]
    fn data_entry(&self, linear: u64) -> DataEntry {
        // SAFETY: `data_table` always points to the current table of `self.tlb` (see `refresh_mode`), which lives
        // in a box that is never freed while the CPU lives.
        unsafe { (*self.data_table).entry(linear) }
    }

    /// What is in the second place of `linear`.
    fn second_entry(&self, linear: u64) -> DataEntry {
        // SAFETY: as in `data_entry`.
        unsafe { (*self.data_table).second(linear) }
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Word>(&mut self, linear: u64) -> Exec<T> {
        let second = self.second_entry(linear);
        if second.reads(linear, T::SIZE) {
            // SAFETY: as in `load`.
            return Ok(unsafe { T::load(second.addend.wrapping_add(linear) as *mut u8) });
        }
        if self.is_plain_miss(linear, T::SIZE) {
            self.check_address(linear, T::SIZE)?;
            if let Place::Ram(_, host) = self.place(linear, T::SIZE, Access::Read, self.privilege())? {
                // SAFETY: `place` returned the host address of `linear` in a page of RAM, in which the access lies.
                return Ok(unsafe { T::load(host) });
            }
        }
        let mut bytes = [0; 16];
        self.read_bytes(linear, &mut bytes[..T::SIZE])?;
        Ok(T::from_bytes(&bytes[..T::SIZE]))
    }

    /// An access that the TLB does not know, but that lies in one page and has nothing special about it: no alignment
    /// check, no data breakpoints.
    fn is_plain_miss(&self, linear: u64, size: usize) -> bool {
        self.data_mode != Mode::Slow && linear as usize & 4095 <= 4096 - size
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Word>(&mut self, linear: u64, value: T) -> Exec {
        let second = self.second_entry(linear);
        if second.writes(linear, T::SIZE) {
            // SAFETY: as in `store`.
            unsafe { T::store(second.addend.wrapping_add(linear) as *mut u8, value) };
            return Ok(());
        }
        if self.is_plain_miss(linear, T::SIZE) {
            self.check_address(linear, T::SIZE)?;
            if let Place::Ram(address, host) = self.place(linear, T::SIZE, Access::Write, self.privilege())? {
                // SAFETY: as in `load_slow`; writing is allowed.
                unsafe { T::store(host, value) };
                self.wrote_ram(address, T::SIZE as u64);
                return Ok(());
            }
        }
        let mut bytes = [0; 16];
        value.to_bytes(&mut bytes[..T::SIZE]);
        self.write_bytes(linear, &bytes[..T::SIZE])
    }

    #[cold]
    #[inline(never)]
    fn modify_slow<T: Word>(&mut self, linear: u64, f: impl FnOnce(&mut u16, T) -> T) -> Exec {
        let second = self.second_entry(linear);
        if second.writes(linear, T::SIZE) {
            let at = second.addend.wrapping_add(linear) as *mut u8;
            // SAFETY: as in `modify`.
            unsafe {
                let new = f(&mut self.state.status, T::load(at));
                T::store(at, new);
            }
            return Ok(());
        }
        self.probe_write(linear, T::SIZE)?;
        let old = self.load::<T>(linear)?;
        let mut status = self.state.status;
        let new = f(&mut status, old);
        self.store_slow(linear, new)?;
        self.state.status = status;
        Ok(())
    }

    /// Reads up to a few pages with the current privilege, as one access.
    pub fn read_bytes(&mut self, linear: u64, data: &mut [u8]) -> Exec {
        self.read_with(linear, data, self.privilege())
    }

    /// Writes with the current privilege, as one access: nothing is written if any part would fault.
    pub fn write_bytes(&mut self, linear: u64, data: &[u8]) -> Exec {
        self.write_with(linear, data, self.privilege())
    }

    /// Raises the fault that a write of `size` bytes at `linear` would raise.
    pub fn probe_write(&mut self, linear: u64, size: usize) -> Exec {
        self.check_address(linear, size)?;
        self.probe(linear, size, Access::Write)
    }

    /// Raises the fault that a read of `size` bytes at `linear` would raise.
    pub fn probe_read(&mut self, linear: u64, size: usize) -> Exec {
        self.check_address(linear, size)?;
        self.probe(linear, size, Access::Read)
    }

    fn probe(&mut self, linear: u64, size: usize, access: Access) -> Exec {
        let privilege = self.privilege();
        let first = (4096 - (linear & 4095) as usize).min(size);
        self.place(linear, first, access, privilege)?;
        if size > first {
            self.place(self.following(linear, first), size - first, access, privilege)?;
        }
        Ok(())
    }

    /// The processor's own read (descriptor tables, TSS): supervisor whatever CPL is.
    pub fn read_system<T: Word>(&mut self, linear: u64) -> Exec<T> {
        let mut bytes = [0; 16];
        self.read_with(linear, &mut bytes[..T::SIZE], Privilege::Implicit)?;
        Ok(T::from_bytes(&bytes[..T::SIZE]))
    }

    /// The processor's own write.
    pub fn write_system<T: Word>(&mut self, linear: u64, value: T) -> Exec {
        let mut bytes = [0; 16];
        value.to_bytes(&mut bytes[..T::SIZE]);
        self.write_with(linear, &bytes[..T::SIZE], Privilege::Implicit)
    }

    /// Reads with a chosen privilege (stack switches, descriptor tables).
    pub fn read_with(&mut self, linear: u64, data: &mut [u8], privilege: Privilege) -> Exec {
        self.check_address(linear, data.len())?;
        if privilege == Privilege::User {
            self.check_alignment(linear, data.len())?;
        }
        if let Some(host) = self.remembered(linear, data.len(), Access::Read, privilege) {
            // SAFETY: the entry vouches for its whole page, in which the access lies.
            unsafe { copy_from_ram(host, data) };
            self.note_data_breakpoint(linear, data.len(), false);
            return Ok(());
        }
        let mut pieces = [(Place::Mmio(0), 0); 3];
        let count = self.places(linear, data.len(), Access::Read, privilege, &mut pieces)?;
        let mut done = 0;
        for &(place, len) in &pieces[..count] {
            let part = &mut data[done..done + len];
            match place {
                // SAFETY: `places` returned a pointer to `len` bytes of RAM inside one page.
                Place::Ram(_, host) => unsafe { copy_from_ram(host, part) },
                Place::Mmio(address) => self.mmio_read(address, part),
                Place::Apic(offset) => self.read_apic_page(offset, part),
            }
            done += len;
        }
        self.note_data_breakpoint(linear, data.len(), false);
        Ok(())
    }

    /// Writes with a chosen privilege; nothing is written if any part would fault.
    pub fn write_with(&mut self, linear: u64, data: &[u8], privilege: Privilege) -> Exec {
        self.check_address(linear, data.len())?;
        if privilege == Privilege::User {
            self.check_alignment(linear, data.len())?;
        }
        if let Some(host) = self.remembered(linear, data.len(), Access::Write, privilege) {
            // SAFETY: as in `read_with`; a write tag is set only where writing is allowed and no code is (TLB-1).
            unsafe { copy_to_ram(data, host) };
            self.note_data_breakpoint(linear, data.len(), true);
            return Ok(());
        }
        let mut pieces = [(Place::Mmio(0), 0); 3];
        let count = self.places(linear, data.len(), Access::Write, privilege, &mut pieces)?;
        let mut done = 0;
        for &(place, len) in &pieces[..count] {
            let part = &data[done..done + len];
            match place {
                Place::Ram(address, host) => {
                    // SAFETY: `places` returned a pointer to `len` bytes of RAM inside one page.
                    unsafe { copy_to_ram(part, host) };
                    self.wrote_ram(address, len as u64);
                }
                Place::Mmio(address) => self.bus().mmio_write(address, part),
                Place::Apic(offset) => self.write_apic_page(offset, part),
            }
            done += len;
        }
        self.note_data_breakpoint(linear, data.len(), true);
        Ok(())
    }

    /// Host address of an access of the processor's own, or with a chosen privilege, if the TLB allows it.
    fn remembered(&self, linear: u64, size: usize, access: Access, privilege: Privilege) -> Option<*mut u8> {
        let table = self.tlb.data(self.table_of(privilege));
        let size = size.max(1);
        let allows = |entry: &DataEntry| match access {
            Access::Write => entry.writes(linear, size),
            _ => entry.reads(linear, size),
        };
        let entry = [table.entry(linear), table.second(linear)].into_iter().find(allows)?;
        Some(entry.addend.wrapping_add(linear) as *mut u8)
    }

    /// The data table whose entries are for accesses with `privilege`.
    fn table_of(&self, privilege: Privilege) -> Mode {
        let smap = self.state.cr4 & cr4::SMAP != 0;
        match privilege {
            Privilege::User => Mode::User,
            Privilege::Supervisor if smap && !self.state.system_flag(rflags::AC) => Mode::Supervisor,
            Privilege::Implicit if smap => Mode::Supervisor,
            Privilege::Supervisor | Privilege::Implicit => Mode::SupervisorAc,
        }
    }

    fn mmio_read(&mut self, address: u64, part: &mut [u8]) {
        part.fill(0xff);
        self.bus().mmio_read(address, part);
    }

    /// Takes notice of a slow write to RAM: code there is forgotten, and if it may be the running block, the
    /// block is left after this instruction.
    pub(crate) fn wrote_ram(&mut self, address: u64, len: u64) {
        if let Some((_, code)) = self.memory.page(address) {
            if PhysMemory::wrote_page(code, address & 4095, len) {
                self.count(Count::Overwritten);
                self.leave_block();
            }
        }
    }

    fn places(
        &mut self,
        linear: u64,
        size: usize,
        access: Access,
        privilege: Privilege,
        out: &mut [(Place, usize); 3],
    ) -> Exec<usize> {
        let (mut at, mut left, mut count) = (linear, size, 0);
        while left > 0 && count < out.len() {
            let len = left.min(4096 - (at & 4095) as usize);
            out[count] = (self.place(at, len, access, privilege)?, len);
            count += 1;
            left -= len;
            at = self.following(at, len);
        }
        Ok(count)
    }

    /// Linear addresses outside 64-bit mode are 32 bits wide.
    #[inline(always)]
    pub(crate) fn wrap(&self, linear: u64) -> u64 {
        if self.code_bits == 64 { linear } else { linear & 0xffff_ffff }
    }

    /// The next page's address in an access that crosses pages. Compatibility-mode code wraps at 4 GiB; the
    /// processor's own tables and stacks in IA-32e mode do not.
    fn following(&self, at: u64, len: usize) -> u64 {
        let next = at.wrapping_add(len as u64);
        if at >> 32 != 0 && self.state.long_mode() { next } else { self.wrap(next) }
    }

    /// Translates through as many levels as are in use; raises the page fault, or leaves non-root operation.
    fn translate(&mut self, linear: u64, access: Access, privilege: Privilege) -> Exec<Translation> {
        let before = self.begin(Doing::Walking);
        self.count(Count::Walks);
        let done = self.walk(linear, access, privilege);
        self.resume(before);
        done
    }

    fn walk(&mut self, linear: u64, access: Access, privilege: Privilege) -> Exec<Translation> {
        let done = if self.vmx.nested_paging() {
            let Some(second) = self.vmx.second_level.as_deref_mut() else {
                return Err(self.vm_exit(reason::EPT_MISCONFIGURATION, 0));
            };
            let mut physical = Nested { memory: &self.memory, second, apic_page: self.apic_page };
            translate(&self.state, &mut physical, linear, access, privilege)
        } else {
            translate(&self.state, &mut Direct(&self.memory), linear, access, privilege)
        };
        match done {
            Ok(to) => Ok(to),
            Err(Failure::Page(fault)) => Err(self.raise(fault)),
            Err(Failure::Refused(refused, to)) => Err(self.refused_at(linear, refused, to)),
        }
    }

    /// Translates one page's piece of an access, filling the TLB; raises the page fault if there is one.
    pub(crate) fn place(
        &mut self,
        linear: u64,
        size: usize,
        access: Access,
        privilege: Privilege,
    ) -> Exec<Place> {
        let to = self.translate(linear, access, privilege)?;
        if to.physical == self.apic_page {
            let offset = (linear & 4095) as u16;
            return self.apic_access(offset, size, access).map(|()| Place::Apic(offset));
        }
        let physical = to.physical | linear & 4095;
        let Some((host, code)) = self.memory.page(to.physical) else { return Ok(Place::Mmio(physical)) };
        let plain = code.is_plain();
        if !plain && access == Access::Write {
            self.count(Count::BesideCode);
        }
        if access != Access::Fetch {
            self.fill_data(self.table_of(privilege), linear & !4095, &to, host, plain);
        }
        // SAFETY: `host` is a whole mapped page.
        Ok(Place::Ram(physical, unsafe { host.add((linear & 4095) as usize) }))
    }

    fn fill_data(&mut self, mode: Mode, page: u64, to: &Translation, host: *mut u8, plain: bool) {
        let write_protect = self.state.cr0 & cr0::WP != 0;
        let mut can_write = to.dirty && plain && (to.writable || mode != Mode::User && !write_protect);
        if to.user && self.state.cr4 & cr4::PKE != 0 && self.state.long_mode() {
            let no_write = self.state.pkru >> (to.key * 2) & 2 != 0;
            can_write &= !(no_write && (mode == Mode::User || write_protect));
        }
        let info = to.physical | if to.global { GLOBAL } else { 0 } | if to.large { LARGE } else { 0 };
        let entry = DataEntry {
            read: page.wrapping_neg(),
            write: if can_write { page.wrapping_neg() } else { no_page(data_index(page)) },
            addend: (host as u64).wrapping_sub(page),
            info,
        };
        let key = if to.user { to.key } else { 0 };
        self.tlb.insert_data(mode, page, entry, key);
    }

    /// Guest-physical address of the instruction byte at `linear`; raises the fetch's page fault.
    pub(crate) fn fetch_physical(&mut self, linear: u64) -> Exec<u64> {
        let user = self.state.cpl == 3;
        let entry = self.tlb.fetch(user, linear);
        if entry.page == linear & !4095 {
            return Ok(entry.physical | linear & 4095);
        }
        let privilege = if user { Privilege::User } else { Privilege::Supervisor };
        let to = self.translate(linear, Access::Fetch, privilege)?;
        if to.physical == self.apic_page {
            self.apic_access((linear & 4095) as u16, 1, Access::Fetch)?;
        }
        let info = if to.global { GLOBAL } else { 0 } | if to.large { LARGE } else { 0 };
        let page = linear & !4095;
        // GUARD-1
        if !self.guarded.has(page) {
            self.tlb.insert_fetch(user, page, to.physical, info);
        }
        Ok(to.physical | linear & 4095)
    }

    /// Canonical-address check of a data access in 64-bit mode. (The run loop makes #SS of it where the operand was
    /// relative to SS.)
    pub(crate) fn check_address(&mut self, linear: u64, size: usize) -> Exec {
        if !self.state.long_mode() {
            return Ok(());
        }
        let last = linear.wrapping_add(size.max(1) as u64 - 1);
        if self.is_canonical(linear) && self.is_canonical(last) {
            return Ok(());
        }
        self.non_canonical = true;
        Err(self.raise(Fault::with_code(vector::GP, 0)))
    }

    /// True for a canonical address under the present paging mode.
    #[inline]
    pub fn is_canonical(&self, linear: u64) -> bool {
        let unused = if self.state.cr4 & cr4::LA57 != 0 { 7 } else { 16 };
        (linear << unused) as i64 >> unused == linear as i64
    }

    /// #AC: CR0.AM, RFLAGS.AC and CPL 3.
    pub(crate) fn check_alignment(&mut self, linear: u64, size: usize) -> Exec {
        if !self.alignment_checked() || size > 8 || !size.is_power_of_two() || linear & (size as u64 - 1) == 0
        {
            return Ok(());
        }
        Err(self.raise(Fault::with_code(vector::AC, 0)))
    }

    fn alignment_checked(&self) -> bool {
        self.state.cpl == 3 && self.state.cr0 & cr0::AM != 0 && self.state.system_flag(rflags::AC)
    }

    /// Remembers data breakpoints that an access hit; they trap after the instruction.
    pub(crate) fn note_data_breakpoint(&mut self, linear: u64, size: usize, write: bool) {
        if self.state.dr7 & dr::DR7_ENABLES == 0 {
            return;
        }
        for i in 0..4 {
            let (kind, len) = self.breakpoint(i);
            let hit = match kind {
                1 => write,
                3 => true,
                _ => false,
            };
            let start = self.state.dr[i] & !(len - 1);
            if hit && linear < start.wrapping_add(len) && start < linear.wrapping_add(size as u64) {
                self.state.pending_debug |= 1 << i;
                if self.state.dr7 & 3 << (2 * i) != 0 {
                    self.attend();
                    self.leave_block();
                }
            }
        }
        // Breakpoints not enabled do not trap, though DR6 may show them; we show only enabled ones.
        let enabled = (0..4).filter(|i| self.state.dr7 & 3 << (2 * i) != 0).fold(0, |m, i| m | 1u64 << i);
        self.state.pending_debug &= enabled | !0xf;
    }

    /// R/W and LEN fields of breakpoint `i`.
    pub(crate) fn breakpoint(&self, i: usize) -> (u64, u64) {
        let control = self.state.dr7 >> (16 + 4 * i);
        let len = [1, 2, 8, 4][(control >> 2 & 3) as usize];
        (control & 3, len)
    }

    /// Privilege of the program's own data accesses.
    #[inline]
    pub(crate) fn privilege(&self) -> Privilege {
        if self.state.cpl == 3 { Privilege::User } else { Privilege::Supervisor }
    }

    /// Guards the pages of instruction breakpoints (GUARD-1).
    fn guard_breakpoints(&mut self) {
        if self.state.dr7 & dr::DR7_ENABLES == 0 {
            return;
        }
        let armed = |cpu: &Self, i: usize| cpu.state.dr7 & 3 << (2 * i) != 0 && cpu.breakpoint(i).0 == 0;
        for i in 0..4 {
            if armed(self, i) {
                self.guarded.touch(self.state.dr[i]);
            }
        }
        for i in 0..4 {
            if armed(self, i) && self.guarded.add(self.state.dr[i]) {
                self.tlb.flush_page(self.state.dr[i], false, |_| true);
            }
        }
    }

    /// Recomputes what depends on CPL, CR0, CR4, EFER, RFLAGS.AC, DR7 and the code segment: call after changing any.
    pub fn refresh_mode(&mut self) {
        self.mode_changes = self.mode_changes.wrapping_add(1);
        self.mode_since = self.state.ticks();
        self.code_bits = self.state.code_bits();
        self.guard_breakpoints();
        let data_breakpoints =
            (0..4).any(|i| self.state.dr7 & 3 << (2 * i) != 0 && matches!(self.breakpoint(i).0, 1 | 3));
        self.data_mode = if data_breakpoints || self.alignment_checked() {
            Mode::Slow
        } else if self.state.cpl == 3 {
            Mode::User
        } else if self.state.cr4 & cr4::SMAP == 0 || self.state.system_flag(rflags::AC) {
            Mode::SupervisorAc
        } else {
            Mode::Supervisor
        };
        self.data_table = self.tlb.data(self.data_mode);
        let flat = self.code_bits == 64;
        for (i, base) in self.linear_base.iter_mut().enumerate().take(6) {
            *base = if flat && i < 4 { 0 } else { self.state.segments[i].base };
        }
        if self.state.activity != Activity::Active {
            self.attend();
        }
    }

    /// Takes up the address space that CR3, CR4 and the VMX operation name: call after changing CR3's PCID, CR4.PCIDE,
    /// the operation or the EPT pointer.
    pub fn refresh_space(&mut self) {
        let pcid = if self.state.cr4 & cr4::PCIDE != 0 { (self.state.cr3 & 0xfff) as u16 } else { 0 };
        let (vpid, eptp) = self.vmx.space();
        self.apic_page = self.apic_access_page();
        self.tlb.switch(SpaceTag { pcid, vpid, eptp }, self.regime());
        self.refresh_mode();
    }

    /// What translations depend on besides their tag. (Whoever changes one of these bits by an instruction flushes and
    /// takes up the space anew; the owner may change them between exits.)
    fn regime(&self) -> Regime {
        let s = &self.state;
        let translating = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::LA57;
        // EFER's bits 10 and 11, CR0's 0, 16 and 31; CR4's are moved out of their way.
        let modes = s.cr0 & (cr0::PG | cr0::PE | cr0::WP)
            | s.efer & (efer::LMA | efer::NXE)
            | (s.cr4 & translating) << 32;
        Regime { modes, second_level: self.vmx.second_level_modes(), apic_page: self.apic_page }
    }

    /// Offset in a segment to linear address, with the segment's checks for an access of `size` bytes.
    #[inline(always)]
    pub fn linear(&mut self, seg: Seg, offset: u64, size: usize, write: bool) -> Exec<u64> {
        if self.code_bits == 64 {
            return Ok(self.linear_base[seg as usize].wrapping_add(offset));
        }
        self.linear_checked(seg, offset, size, write)
    }

    #[inline(never)]
    fn linear_checked(&mut self, seg: Seg, offset: u64, size: usize, write: bool) -> Exec<u64> {
        use x86defs::segment as s;
        let register = *self.state.seg(seg);
        let vector = if seg == Seg::Ss { vector::SS } else { vector::GP };
        let fault = Fault::with_code(vector, 0);
        if self.state.protected() && !self.state.v86() {
            let access = register.access;
            let refused = if access & s::UNUSABLE != 0 {
                true
            } else if access & s::CODE != 0 {
                write || access & s::READABLE == 0
            } else {
                write && access & s::WRITABLE == 0
            };
            if refused {
                // A null or wrongly typed segment is #GP, but a stack segment's problem is #SS.
                return Err(self.raise(fault));
            }
        }
        let last = offset.wrapping_add(size.max(1) as u64 - 1);
        let expand_down = register.access & (s::S | s::CODE | s::EXPAND_DOWN) == s::S | s::EXPAND_DOWN;
        let limit = u64::from(register.limit);
        let outside = if expand_down {
            let top = if register.access & s::DB != 0 { 0xffff_ffff } else { 0xffff };
            offset <= limit || last > top
        } else {
            last > limit
        };
        if outside {
            return Err(self.raise(fault));
        }
        Ok(register.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Reads `seg:offset`.
    #[inline(always)]
    pub fn load_at<T: Word>(&mut self, seg: Seg, offset: u64) -> Exec<T> {
        let linear = self.linear(seg, offset, T::SIZE, false)?;
        self.load(linear)
    }

    /// Writes `seg:offset`.
    #[inline(always)]
    pub fn store_at<T: Word>(&mut self, seg: Seg, offset: u64, value: T) -> Exec {
        let linear = self.linear(seg, offset, T::SIZE, true)?;
        self.store(linear, value)
    }

    /// Keeps the fault's details for whoever delivers it.
    #[cold]
    pub fn raise(&mut self, fault: Fault) -> Trap {
        self.fault = fault;
        Trap::Fault
    }
}

/// Copies out of guest RAM, with one access where the size is an operand's.
///
/// # Safety
/// `host` must point to `to.len()` readable bytes of guest RAM.
unsafe fn copy_from_ram(host: *const u8, to: &mut [u8]) {
    // SAFETY: the caller's promise covers `to.len()` bytes at `host` in each case.
    unsafe {
        match to.len() {
            1 => u8::load(host).to_bytes(to),
            2 => u16::load(host).to_bytes(to),
            4 => u32::load(host).to_bytes(to),
            8 => u64::load(host).to_bytes(to),
            n => std::ptr::copy_nonoverlapping(host, to.as_mut_ptr(), n),
        }
    }
}

/// Copies into guest RAM, with one access where the size is an operand's.
///
/// # Safety
/// `host` must point to `from.len()` writable bytes of guest RAM.
unsafe fn copy_to_ram(from: &[u8], host: *mut u8) {
    // SAFETY: the caller's promise covers `from.len()` bytes at `host` in each case.
    unsafe {
        match from.len() {
            1 => u8::store(host, from[0]),
            2 => u16::store(host, u16::from_bytes(from)),
            4 => u32::store(host, u32::from_bytes(from)),
            8 => u64::store(host, u64::from_bytes(from)),
            n => std::ptr::copy_nonoverlapping(from.as_ptr(), host, n),
        }
    }
}
