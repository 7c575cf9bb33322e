//! Values for registers and memory: random, with the corners more often than chance would have them.

use std::sync::OnceLock;

use crate::case::{ARENA_SIZE, DATA, FLAGS, Fpu, HIGH, LOW, PAGE, READ_ONLY};
use crate::random::Random;

const CORNERS: [u64; 24] = [
    0,
    1,
    2,
    u64::MAX,
    u64::MAX - 1,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_8000_0000,
    0xffff_ffff_0000_0000,
    0x0000_7fff_ffff_fff8,
    0x0000_8000_0000_0000,
    0xffff_8000_0000_0000,
];

/// binary32 corners: zeros, ones, denormals, largest, infinities, NaNs quiet and signalling, integer limits.
const SINGLES: [u32; 18] = [
    0,
    0x8000_0000,
    0x3f80_0000,
    0xbf80_0000,
    1,
    0x8000_0001,
    0x007f_ffff,
    0x0080_0000,
    0x7f7f_ffff,
    0xff7f_ffff,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0xffc0_1234,
    0x7f80_0001,
    0xffbf_ffff,
    0x4f00_0000,
    0xcf00_0001,
];

const DOUBLES: [u64; 16] = [
    0,
    0x8000_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    1,
    0x000f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff8_0000_0000_1234,
    0x7ff0_0000_0000_0001,
    0x41e0_0000_0000_0000,
    0x43e0_0000_0000_0000,
    0x36a0_0000_0000_0000,
];

/// A general register's value.
pub fn integer(random: &mut Random) -> u64 {
    match random.below(10) {
        0..=2 => random.pick(&CORNERS),
        3 => random.pick(&CORNERS).wrapping_add(random.below(5)).wrapping_sub(2),
        4 => 1 << random.below(64),
        5 => random.below(300),
        6 => i64::from(random.bits() as i32) as u64,
        7 => LOW + random.below(2) * (HIGH - LOW) + random.below(ARENA_SIZE),
        _ => random.bits(),
    }
}

/// A stack pointer: mostly in the data, with room on both sides.
pub fn stack(random: &mut Random, base: u64) -> u64 {
    match random.below(20) {
        0 => base + DATA + random.below(24),
        1 => base + DATA + 2 * PAGE as u64 - random.below(24),
        2 => base + DATA + PAGE as u64 + random.below(33) - 16,
        3 => base + DATA + 0x800 + random.below(0x1000),
        _ => base + DATA + 0x800 + (random.below(0x1000) & !7),
    }
}

/// RFLAGS: status flags as they fall, DF at times.
pub fn flags(random: &mut Random) -> u64 {
    const STATUS: u64 = x86defs::rflags::STATUS;
    let mut flags = random.bits() & STATUS;
    if random.chance(25) {
        flags |= x86defs::rflags::DF;
    }
    if random.chance(3) {
        flags |= x86defs::rflags::AC;
    }
    if random.chance(2) {
        flags |= x86defs::rflags::TF;
    }
    if random.chance(5) {
        flags |= random.bits() & (x86defs::rflags::ID | x86defs::rflags::NT);
    }
    flags & FLAGS
}

/// FS or GS base.
pub fn segment_base(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => 0,
        1 => random.bits() >> 17,
        2 => LOW + random.below(ARENA_SIZE),
        _ => HIGH + DATA + random.below(2 * PAGE as u64),
    }
}

/// Where a memory operand of `size` bytes goes. `low`: only addresses below 4 GiB.
pub fn target(random: &mut Random, size: u64, align: u64, low: bool) -> u64 {
    let base = if low { LOW } else { random.pick(&[LOW, HIGH]) };
    let size = size.clamp(1, PAGE as u64);
    let page = PAGE as u64;
    let room = 2 * page - size + 1;
    match random.below(100) {
        0..=59 => base + DATA + (random.below(room) & !(align.max(1) - 1)),
        60..=77 => base + DATA + random.below(room),
        78..=83 => base + DATA + page - random.below(size + 1),
        84..=86 => base + DATA + 2 * page - random.below(size + 1),
        87 => base + DATA - random.below(size + 1),
        88..=92 => base + READ_ONLY + (random.below(page - size + 1) & !(align.max(1) - 1)),
        93 => base + READ_ONLY + page - random.below(size + 1),
        94 => base + random.below(ARENA_SIZE),
        95 => base + crate::case::CODE + random.below(2 * page),
        96 if !low => {
            random.pick(&[0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63]) ^ random.below(1 << 20)
        }
        97 if !low => 0x7fff_ffff_fff0 + random.below(32),
        98 if !low => 0xffff_8000_0000_0000 + random.below(1 << 40),
        _ => random.bits() & if low { 0xffff_ffff } else { u64::MAX },
    }
}

/// The same where nothing faults.
pub fn calm_target(random: &mut Random, size: u64, low: bool) -> u64 {
    let base = if low { LOW } else { random.pick(&[LOW, HIGH]) };
    let size = size.clamp(1, PAGE as u64);
    let room = 2 * PAGE as u64 - size + 1;
    let align = if size >= 16 || random.chance(70) { size.next_power_of_two() } else { 1 };
    base + DATA + (random.below(room) & !(align - 1))
}

/// x87 and vector registers with their control words.
pub fn fpu(random: &mut Random) -> Fpu {
    let mut fpu = Fpu::default();
    if random.chance(50) {
        let control = random.bits() as u16;
        fpu.fcw = control & 0x0f00 | 0x40 | if random.chance(70) { 0x3f } else { control & 0x3f };
    }
    fpu.fsw = random.bits() as u16 & 0x7f00;
    if random.chance(15) {
        fpu.fsw |= random.bits() as u16 & 0x7f;
    }
    // ES and B summarize the unmasked exceptions.
    fpu.fsw &= 0x7f7f;
    if fpu.fsw & !fpu.fcw & 0x3f != 0 {
        fpu.fsw |= 0x8080;
    }
    let tags = random.bits() as u8;
    fpu.ftw = random.pick(&[0, 0xff, 0xff, tags]);
    for st in &mut fpu.st {
        *st = extended(random);
    }
    if random.chance(50) {
        let control = random.bits() as u32;
        fpu.mxcsr = control & 0xe07f | if random.chance(70) { 0x1f80 } else { control & 0x1f80 };
    }
    for ymm in &mut fpu.ymm {
        fill(random, ymm);
    }
    fpu
}

/// An 80-bit floating-point value; the malformed ones (unnormals, pseudo-denormals) too.
pub fn extended(random: &mut Random) -> [u8; 10] {
    let mantissa = match random.below(8) {
        0 => 0x8000_0000_0000_0000,
        1 => 0xc000_0000_0000_0000,
        2 => 0,
        3 => random.bits(),
        _ => random.bits() | 1 << 63,
    };
    let exponent = match random.below(10) {
        0 => 0,
        1 => 0x7fff,
        2 => 0x7ffe,
        3 => 1,
        4 => random.bits() as u16 & 0x7fff,
        _ => 0x3fff - 70 + random.below(140) as u16,
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
    bytes[8..].copy_from_slice(&(exponent | (random.bits() as u16) << 15).to_le_bytes());
    bytes
}

/// Packed decimal digits, at times one that is none.
pub fn packed_decimal(random: &mut Random) -> [u8; 10] {
    let mut bytes = [0; 10];
    for byte in &mut bytes[..9] {
        *byte = (random.below(10) << 4 | random.below(10)) as u8;
    }
    let sign = random.bits() as u8;
    bytes[9] = random.pick(&[0, 0x80, 0x80, sign]);
    if random.chance(5) {
        bytes[random.below(9) as usize] = random.bits() as u8;
    }
    bytes
}

/// Fills memory or a vector register with elements of one kind or a mixture.
pub fn fill(random: &mut Random, bytes: &mut [u8]) {
    if bytes.len() > 64 {
        return fill_from_pool(random, bytes);
    }
    let kind = random.below(6);
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&element(random, kind).to_le_bytes());
    }
}

fn element(random: &mut Random, kind: u64) -> u64 {
    let single = |random: &mut Random| {
        u64::from(match random.below(3) {
            0 => random.pick(&SINGLES),
            1 => (random.below(2000) as f32 / 7.0 - 140.0).to_bits(),
            _ => random.bits() as u32,
        })
    };
    match kind {
        0 => single(random) | single(random) << 32,
        1 => match random.below(3) {
            0 => random.pick(&DOUBLES),
            1 => (random.below(2000) as f64 / 7.0 - 140.0).to_bits(),
            _ => random.bits(),
        },
        2 => random.pick(&CORNERS),
        3 => random.bits() & 0x7f7f_7f7f_7f7f_7f7f,
        4 => integer(random),
        _ => random.bits(),
    }
}

/// Large areas come from a pool that is made once: cases are many, and filling pages anew would cost more than
/// executing them.
fn fill_from_pool(random: &mut Random, bytes: &mut [u8]) {
    const SIZE: usize = 1 << 18;
    static POOL: OnceLock<Vec<u8>> = OnceLock::new();
    let pool = POOL.get_or_init(|| {
        let mut random = Random::new(1);
        let mut pool = Vec::with_capacity(SIZE);
        while pool.len() < SIZE {
            let kind = random.below(6);
            for _ in 0..1 + random.below(16) {
                pool.extend_from_slice(&element(&mut random, kind).to_le_bytes());
            }
        }
        pool
    });
    let start = random.below((pool.len() - bytes.len()) as u64) as usize & !7;
    bytes.copy_from_slice(&pool[start..start + bytes.len()]);
}
