//! A fixed amount of work with a known result: integer mixing and SHA-256, in ring 0 and in ring 3.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU64, Ordering};
use rt::paging::{self, P, PS, U, W};
use rt::{check, cpu, println, report, trap, user};

/// The linear congruential step of Knuth's MMIX.
const MULTIPLIER: u64 = 6364136223846793005;
const INCREMENT: u64 = 1442695040888963407;
/// State after so many steps from 1, computed apart by modular exponentiation.
const STEPS: [(u64, u64); 2] = [(100_000, 0x6cfc9548ff6cbfa1), (4_000_000, 0x3165596fb5c8b101)];

/// FIPS 180-4 examples.
const OF_ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
const OF_TWO_BLOCKS: &str = "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1";
const OF_MILLION_A: &str = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    report::equal("integer loop in ring 0", mix(STEPS[0].0), STEPS[0].1);
    digest("sha256 of one block in ring 0", sha256(b"abc", 1), OF_ABC);
    let two_blocks = sha256(b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1);
    digest("sha256 of two blocks in ring 0", two_blocks, OF_TWO_BLOCKS);

    open_memory_to_ring3();
    in_ring3("integer loop", mix_in_ring3);
    report::equal("integer loop in ring 3", MIXED.load(Ordering::Relaxed), STEPS[1].1);
    in_ring3("sha256", hash_in_ring3);
    // SAFETY: the ring-3 code that wrote it is done.
    digest("sha256 of a million bytes in ring 3", unsafe { HASHED }, OF_MILLION_A);
}

fn mix(steps: u64) -> u64 {
    let mut state = 1u64;
    for _ in 0..steps {
        state = core::hint::black_box(state.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT));
    }
    state
}

static MIXED: AtomicU64 = AtomicU64::new(0);
static mut HASHED: [u8; 32] = [0; 32];

extern "C" fn mix_in_ring3() -> ! {
    MIXED.store(mix(STEPS[1].0), Ordering::Relaxed);
    leave_ring3()
}

extern "C" fn hash_in_ring3() -> ! {
    // SAFETY: nothing else runs until ring 3 is left.
    unsafe { HASHED = sha256(&[b'a'; 1000], 1000) };
    leave_ring3()
}

fn leave_ring3() -> ! {
    // SAFETY: the trap never comes back here.
    unsafe { core::arch::asm!("int 0x80", options(noreturn)) }
}

/// Lets ring 3 use the RAM that the image and its data lie in.
fn open_memory_to_ring3() {
    for page in 0..16 {
        let address = page << 21;
        paging::set_entry(address, 2, address | P | W | U | PS);
    }
    trap::set_gate(0x80, trap::stub(0x80), 0xee, trap::default_ist(0x80));
}

fn in_ring3(what: &str, code: extern "C" fn() -> !) {
    let stack_top = rt::mem::frames(16) + 16 * rt::mem::PAGE;
    let entry = user::Entry { rip: code as usize as u64, rsp: stack_top - 8, ..user::ENTRY64 };
    let start = cpu::tsc();
    let end = user::run(&entry);
    println!("{what}: {} TSC ticks", cpu::tsc() - start);
    if end.vector != 0x80 {
        report::fail(what, format_args!("ring 3 ended with {end}"));
    }
}

fn digest(name: &str, found: [u8; 32], wanted: &str) {
    let hex = found.iter().flat_map(|&byte| [byte >> 4, byte & 15]).map(|d| b"0123456789abcdef"[d as usize]);
    check!(name, hex.eq(wanted.bytes()), "{found:x?}");
}

/// SHA-256 of `count` repetitions of `piece`.
fn sha256(piece: &[u8], count: usize) -> [u8; 32] {
    let mut hasher = Sha256 { state: INITIAL, block: [0; 64], filled: 0, length: 0 };
    for _ in 0..count {
        hasher.update(piece);
    }
    hasher.finish()
}

struct Sha256 {
    state: [u32; 8],
    block: [u8; 64],
    filled: usize,
    length: u64,
}

const INITIAL: [u32; 8] =
    [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19];

#[rustfmt::skip]
const ROUND: [u32; 64] = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
];

impl Sha256 {
    fn update(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64 * 8;
        for &byte in bytes {
            self.block[self.filled] = byte;
            self.filled += 1;
            if self.filled == 64 {
                self.compress();
            }
        }
    }

    fn finish(mut self) -> [u8; 32] {
        let length = self.length.to_be_bytes();
        self.update(&[0x80]);
        while self.filled != 56 {
            self.update(&[0]);
        }
        self.update(&length);
        let mut out = [0; 32];
        for (bytes, word) in out.chunks_mut(4).zip(self.state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        out
    }

    fn compress(&mut self) {
        self.filled = 0;
        let mut w = [0u32; 64];
        for (word, bytes) in w.iter_mut().zip(self.block.chunks(4)) {
            *word = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        for i in 16..64 {
            let s0 = w[i - 15].rotate_right(7) ^ w[i - 15].rotate_right(18) ^ w[i - 15] >> 3;
            let s1 = w[i - 2].rotate_right(17) ^ w[i - 2].rotate_right(19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16].wrapping_add(s0).wrapping_add(w[i - 7]).wrapping_add(s1);
        }
        let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = self.state;
        for i in 0..64 {
            let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
            let choice = e & f ^ !e & g;
            let t1 = h.wrapping_add(s1).wrapping_add(choice).wrapping_add(ROUND[i]).wrapping_add(w[i]);
            let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
            let t2 = s0.wrapping_add(a & b ^ a & c ^ b & c);
            (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t1), c, b, a, t1.wrapping_add(t2));
        }
        for (word, add) in self.state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
            *word = word.wrapping_add(add);
        }
    }
}
