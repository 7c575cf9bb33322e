//! EPT paging structures: an identity map of the low 4 GiB, and editing it.

use super::capability;
use super::insn::{self, Outcome};
use crate::mem::{self, PAGE};

pub const R: u64 = 1 << 0;
pub const W: u64 = 1 << 1;
pub const X: u64 = 1 << 2;
pub const RWX: u64 = R | W | X;
pub const IGNORE_PAT: u64 = 1 << 6;
pub const LARGE: u64 = 1 << 7;
pub const A: u64 = 1 << 8;
pub const D: u64 = 1 << 9;
/// User-mode execute, with mode-based execute control.
pub const XU: u64 = 1 << 10;
/// Every permission. Without mode-based execute control XU is ignored.
pub const ALL: u64 = RWX | XU;
/// The entry's violations never become #VE.
pub const SUPPRESS_VE: u64 = 1 << 63;
pub const WB: u64 = 6 << 3;
pub const UC: u64 = 0 << 3;
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// EPTP: accessed and dirty flags on.
pub const POINTER_AD: u64 = 1 << 6;

/// One EPT hierarchy of four levels.
#[derive(Clone, Copy)]
pub struct Ept {
    pub root: u64,
}

impl Ept {
    /// Maps the low 4 GiB to themselves by 2 MiB pages, write-back up to 3 GiB and uncached above.
    pub fn identity() -> Ept {
        let root = mem::frames(6);
        let (pointers, directories) = (root + PAGE, root + 2 * PAGE);
        mem::write(root, pointers | ALL);
        for gib in 0..4 {
            mem::write(pointers + gib * 8, (directories + gib * PAGE) | ALL);
        }
        let ept = Ept { root };
        ept.reset();
        ept
    }

    /// Makes all of it an identity map of 2 MiB pages again. Split tables are lost.
    pub fn reset(self) {
        let directories = self.root + 2 * PAGE;
        for i in 0..2048 {
            let kind = if i < 1536 { WB } else { UC };
            mem::write(directories + i * 8, i << 21 | ALL | LARGE | kind);
        }
    }

    /// The EPT pointer: write-back, four levels.
    pub fn pointer(self) -> u64 {
        let kind = if capability::ept_vpid() & capability::EPT_WB != 0 { 6 } else { 0 };
        self.root | 3 << 3 | kind
    }

    /// Address of the entry for `gpa` at `level` (1 the last, 4 the root's). Large pages in the way are split.
    pub fn entry_at(self, gpa: u64, level: u32) -> u64 {
        let mut table = self.root;
        let mut current = 4;
        loop {
            let at = table + (gpa >> (12 + 9 * (current - 1)) & 511) * 8;
            if current == level {
                return at;
            }
            let entry: u64 = mem::read(at);
            if entry & LARGE != 0 && current < 4 {
                split(at, entry, current);
            } else if entry & RWX == 0 {
                mem::write(at, mem::frame() | ALL);
            }
            table = mem::read::<u64>(at) & ADDRESS;
            current -= 1;
        }
    }

    /// Writes the entry of a 4 KiB page.
    pub fn set(self, gpa: u64, entry: u64) {
        mem::write(self.entry_at(gpa, 1), entry);
    }

    /// The entry of a 4 KiB page.
    pub fn get(self, gpa: u64) -> u64 {
        mem::read(self.entry_at(gpa, 1))
    }

    /// Maps a 4 KiB page to itself with these permissions.
    pub fn permit(self, gpa: u64, permissions: u64) {
        self.set(gpa, gpa & ADDRESS | WB | permissions);
    }

    /// INVEPT of this hierarchy alone, or of all where that does not exist.
    pub fn invalidate(self) -> Outcome {
        if capability::ept_vpid() & capability::INVEPT_SINGLE != 0 {
            insn::invept(1, [self.pointer(), 0])
        } else {
            insn::invept(2, [0, 0])
        }
    }
}

/// Replaces a large page by a table of the next smaller ones.
fn split(at: u64, entry: u64, level: u32) {
    let table = mem::frame();
    let step = PAGE << (9 * (level - 2));
    let base = entry & ADDRESS & !((step << 9) - 1);
    let flags = entry & !ADDRESS & if level == 2 { !LARGE } else { !0 };
    for i in 0..512 {
        mem::write(table + i * 8, (base + i * step) | flags);
    }
    mem::write(at, table | ALL);
}
