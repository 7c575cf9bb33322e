//! Editing the page tables in use: walking to an entry, splitting large pages, mapping.

use crate::cpu::{cr3, invlpg, set_cr3};
use crate::mem::{self, PAGE};

pub const P: u64 = 1 << 0;
pub const W: u64 = 1 << 1;
pub const U: u64 = 1 << 2;
pub const PWT: u64 = 1 << 3;
pub const PCD: u64 = 1 << 4;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
pub const PS: u64 = 1 << 7;
pub const G: u64 = 1 << 8;
pub const NX: u64 = 1 << 63;
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Page-fault error code bits.
pub const ERR_P: u32 = 1 << 0;
pub const ERR_W: u32 = 1 << 1;
pub const ERR_U: u32 = 1 << 2;
pub const ERR_RSVD: u32 = 1 << 3;
pub const ERR_I: u32 = 1 << 4;
pub const ERR_PK: u32 = 1 << 5;

/// Level of a table: 1 the page table, 2 the directory, 3 the pointer table, 4 PML4.
pub type Level = u32;

fn index(va: u64, level: Level) -> u64 {
    va >> (12 + 9 * (level - 1)) & 511
}

/// Address of the entry for `va` at `level`, below 4-level CR3. Missing tables are made; large pages in the way are
/// split, so the map stays the same.
pub fn entry_at(va: u64, level: Level) -> u64 {
    let mut table = cr3() & ADDRESS;
    let mut current = 4;
    while current > level {
        let at = table + index(va, current) * 8;
        let entry: u64 = mem::read(at);
        if entry & P == 0 {
            mem::write(at, mem::frame() | P | W | U);
        } else if entry & PS != 0 && current < 4 {
            split(at, entry, current);
        }
        table = mem::read::<u64>(at) & ADDRESS;
        current -= 1;
    }
    table + index(va, level) * 8
}

/// Replaces a large page by a table of the next smaller pages.
fn split(at: u64, entry: u64, level: Level) {
    let table = mem::frame();
    let step = PAGE << (9 * (level - 2));
    let base = entry & ADDRESS & !((step << 9) - 1);
    let flags = entry & !ADDRESS & if level == 2 { !PS } else { !0 };
    for i in 0..512 {
        mem::write(table + i * 8, (base + i * step) | flags);
    }
    mem::write(at, table | P | W | U);
    flush();
}

/// Reads the leaf entry of a 4 KiB page.
pub fn pte(va: u64) -> u64 {
    mem::read(entry_at(va, 1))
}

/// Writes the leaf entry of a 4 KiB page and invalidates it.
pub fn set_pte(va: u64, entry: u64) {
    set_entry(va, 1, entry);
}

/// Writes the entry of a level and invalidates the address.
pub fn set_entry(va: u64, level: Level, entry: u64) {
    mem::write(entry_at(va, level), entry);
    invlpg(va);
}

/// Maps 4 KiB pages.
pub fn map_pages(va: u64, pa: u64, count: u64, flags: u64) {
    for i in 0..count {
        set_pte(va + i * PAGE, (pa + i * PAGE) | flags);
    }
}

/// Invalidates everything but global pages.
pub fn flush() {
    set_cr3(cr3());
}
