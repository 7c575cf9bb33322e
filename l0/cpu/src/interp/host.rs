//! Integer arithmetic on the host's own ALU, with the flags it gives.
//!
//! The guest's status flags are kept as the host delivers them: `LAHF` in the high byte (SF ZF - AF - PF - CF), `SETO`
//! in the low byte. So no flag is computed by us, flags that the manual leaves undefined are the host's, and
//! translated code can use the same representation.
//!
//! Unsafe island: inline assembly on values only; no memory is touched but through `lock_exchange`.

use std::arch::asm;

use crate::phys::Word;

/// Guest status flags: see the module.
pub(crate) type Status = u16;
pub(crate) const CF: Status = 1 << 8;
pub(crate) const PF: Status = 1 << 10;
pub(crate) const ZF: Status = 1 << 14;
pub(crate) const SF: Status = 1 << 15;
pub(crate) const OF: Status = 1;

/// Integer types with the host's operations.
pub(crate) trait Int: Word {
    /// 8, 16, 32, 64.
    const BITS: u32 = Self::SIZE as u32 * 8;
    fn add(s: &mut Status, a: Self, b: Self) -> Self;
    fn or(s: &mut Status, a: Self, b: Self) -> Self;
    fn adc(s: &mut Status, a: Self, b: Self) -> Self;
    fn sbb(s: &mut Status, a: Self, b: Self) -> Self;
    fn and(s: &mut Status, a: Self, b: Self) -> Self;
    fn sub(s: &mut Status, a: Self, b: Self) -> Self;
    fn xor(s: &mut Status, a: Self, b: Self) -> Self;
    fn inc(s: &mut Status, a: Self) -> Self;
    fn dec(s: &mut Status, a: Self) -> Self;
    fn neg(s: &mut Status, a: Self) -> Self;
    fn rol(s: &mut Status, a: Self, count: u8) -> Self;
    fn ror(s: &mut Status, a: Self, count: u8) -> Self;
    fn rcl(s: &mut Status, a: Self, count: u8) -> Self;
    fn rcr(s: &mut Status, a: Self, count: u8) -> Self;
    fn shl(s: &mut Status, a: Self, count: u8) -> Self;
    fn shr(s: &mut Status, a: Self, count: u8) -> Self;
    fn sar(s: &mut Status, a: Self, count: u8) -> Self;
    /// `(low, high)` of the product.
    fn mul(s: &mut Status, a: Self, b: Self) -> (Self, Self);
    fn imul(s: &mut Status, a: Self, b: Self) -> (Self, Self);
    /// Quotient and remainder of `high:low / b`; none where the processor raises #DE.
    fn div(s: &mut Status, low: Self, high: Self, b: Self) -> Option<(Self, Self)>;
    fn idiv(s: &mut Status, low: Self, high: Self, b: Self) -> Option<(Self, Self)>;
    /// If `*at` is `old`, replaces it by `new`, atomically; true if it did.
    ///
    /// # Safety
    /// `at` must point to `SIZE` writable bytes of guest RAM.
    unsafe fn lock_exchange(at: *mut u8, old: Self, new: Self) -> bool;
    fn not(a: Self) -> Self {
        Self::from_u64(!a.to_u64())
    }
}

/// The types that have the two-operand, 16-bit-and-up operations.
pub(crate) trait WideInt: Int {
    fn imul2(s: &mut Status, a: Self, b: Self) -> Self;
    fn shld(s: &mut Status, a: Self, b: Self, count: u8) -> Self;
    fn shrd(s: &mut Status, a: Self, b: Self, count: u8) -> Self;
    fn bt(s: &mut Status, a: Self, b: Self) -> Self;
    fn bts(s: &mut Status, a: Self, b: Self) -> Self;
    fn btr(s: &mut Status, a: Self, b: Self) -> Self;
    fn btc(s: &mut Status, a: Self, b: Self) -> Self;
    /// `old` is the destination's value: kept when `a` is zero.
    fn bsf(s: &mut Status, old: Self, a: Self) -> Self;
    fn bsr(s: &mut Status, old: Self, a: Self) -> Self;
    fn tzcnt(s: &mut Status, old: Self, a: Self) -> Self;
    fn lzcnt(s: &mut Status, old: Self, a: Self) -> Self;
    fn popcnt(s: &mut Status, old: Self, a: Self) -> Self;
}

/// One instruction on values, with the flags after it in AX.
macro_rules! flagged {
    ($status:ident, [$($text:tt)+]; $($operands:tt)*) => {{
        let flags: u16;
        // SAFETY: register-only instructions; the flags and AX are declared as changed.
        unsafe {
            asm!($($text)+, "lahf", "seto al", inout("ax") *$status => flags, $($operands)*
                options(nomem, nostack));
        }
        *$status = flags;
    }};
}

macro_rules! int {
    ($ty:ident, $signed:ty, $wide:ty, $swide:ty, $class:ident, $m:literal) => {
        impl Int for $ty {
            int!(@binary $ty, $class, $m, add "add", or "or", and "and", sub "sub", xor "xor");
            int!(@carry $ty, $class, $m, adc "adc", sbb "sbb");
            int!(@unary $ty, $class, $m, inc "inc", dec "dec", neg "neg");
            int!(@shift $ty, $class, $m, rol "rol", ror "ror", rcl "rcl", rcr "rcr", shl "shl", shr "shr",
                sar "sar");
            #[inline]
            fn mul(s: &mut Status, a: Self, b: Self) -> (Self, Self) {
                let product = (a as $wide) * (b as $wide);
                let high = (product >> <$ty>::BITS) as $ty;
                set_overflow(s, high != 0);
                (product as $ty, high)
            }
            #[inline]
            fn imul(s: &mut Status, a: Self, b: Self) -> (Self, Self) {
                let product = (a as $signed as $swide) * (b as $signed as $swide);
                set_overflow(s, product != (product as $signed as $swide));
                (product as $ty, (product >> <$ty>::BITS) as $ty)
            }
            #[inline]
            fn div(_: &mut Status, low: Self, high: Self, b: Self) -> Option<(Self, Self)> {
                if b <= high {
                    return None; // b == 0, or the quotient does not fit
                }
                let dividend = (high as $wide) << <$ty>::BITS | low as $wide;
                Some(((dividend / b as $wide) as $ty, (dividend % b as $wide) as $ty))
            }
            #[inline]
            fn idiv(_: &mut Status, low: Self, high: Self, b: Self) -> Option<(Self, Self)> {
                let dividend = ((high as $wide) << <$ty>::BITS | low as $wide) as $swide;
                let divisor = b as $signed as $swide;
                let quotient = dividend.checked_div(divisor)?;
                let fits = quotient == quotient as $signed as $swide;
                fits.then(|| (quotient as $ty, (dividend % divisor) as $ty))
            }
            #[inline]
            unsafe fn lock_exchange(at: *mut u8, old: Self, new: Self) -> bool {
                let swapped: u8;
                // SAFETY: the caller says that `at` is writable guest RAM; a locked access needs no alignment.
                unsafe { int!(@cmpxchg $ty, at, old, new, swapped, $class, $m) };
                swapped != 0
            }
        }
    };
    (@binary $ty:ty, $class:ident, $m:literal, $($name:ident $text:literal),+) => {$(
        #[inline(always)]
        fn $name(s: &mut Status, a: Self, b: Self) -> Self {
            let (r, flags): ($ty, u16);
            // SAFETY: register-only instructions; the flags and AX are declared as changed.
            unsafe {
                asm!(concat!($text, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    a = inout($class) a => r, b = in($class) b, out("ax") flags, options(pure, nomem, nostack));
            }
            *s = flags;
            r
        }
    )+};
    (@carry $ty:ty, $class:ident, $m:literal, $($name:ident $text:literal),+) => {$(
        #[inline(always)]
        fn $name(s: &mut Status, a: Self, b: Self) -> Self {
            let r: $ty;
            flagged!(s, ["bt eax, 8", concat!($text, " {a", $m, "}, {b", $m, "}")];
                a = inout($class) a => r, b = in($class) b,);
            r
        }
    )+};
    (@unary $ty:ty, $class:ident, $m:literal, $($name:ident $text:literal),+) => {$(
        #[inline(always)]
        fn $name(s: &mut Status, a: Self) -> Self {
            let r: $ty;
            flagged!(s, ["bt eax, 8", concat!($text, " {a", $m, "}")]; a = inout($class) a => r,);
            r
        }
    )+};
    (@shift $ty:ty, $class:ident, $m:literal, $($name:ident $text:literal),+) => {$(
        #[inline(always)]
        fn $name(s: &mut Status, a: Self, count: u8) -> Self {
            let r: $ty;
            flagged!(s, ["add al, 127", "sahf", concat!($text, " {a", $m, "}, cl")];
                a = inout($class) a => r, in("cl") count,);
            r
        }
    )+};
    (@cmpxchg u8, $at:ident, $old:ident, $new:ident, $done:ident, $class:ident, $m:literal) => {
        asm!("lock cmpxchg [{at}], {new}", "sete {done}", at = in(reg) $at, new = in(reg_byte) $new,
            done = out(reg_byte) $done, inout("al") $old => _, options(nostack))
    };
    (@cmpxchg u16, $at:ident, $old:ident, $new:ident, $done:ident, $class:ident, $m:literal) => {
        asm!("lock cmpxchg [{at}], {new:x}", "sete {done}", at = in(reg) $at, new = in(reg) $new,
            done = out(reg_byte) $done, inout("ax") $old => _, options(nostack))
    };
    (@cmpxchg u32, $at:ident, $old:ident, $new:ident, $done:ident, $class:ident, $m:literal) => {
        asm!("lock cmpxchg [{at}], {new:e}", "sete {done}", at = in(reg) $at, new = in(reg) $new,
            done = out(reg_byte) $done, inout("eax") $old => _, options(nostack))
    };
    (@cmpxchg u64, $at:ident, $old:ident, $new:ident, $done:ident, $class:ident, $m:literal) => {
        asm!("lock cmpxchg [{at}], {new}", "sete {done}", at = in(reg) $at, new = in(reg) $new,
            done = out(reg_byte) $done, inout("rax") $old => _, options(nostack))
    };
}
int!(u8, i8, u16, i16, reg_byte, "");
int!(u16, i16, u32, i32, reg, ":x");
int!(u32, i32, u64, i64, reg, ":e");
int!(u64, i64, u128, i128, reg, ":r");

/// MUL and IMUL define CF and OF; the others keep what they were (undefined in the manual, kept by AMD's and
/// set from the low half by Intel's processors).
fn set_overflow(s: &mut Status, overflow: bool) {
    *s = *s & !(CF | OF) | if overflow { CF | OF } else { 0 };
}

macro_rules! wide {
    ($ty:ty, $m:literal) => {
        impl WideInt for $ty {
            wide!(@binary $ty, $m, imul2 "imul", bt "bt", bts "bts", btr "btr", btc "btc");
            wide!(@binary_old $ty, $m, bsf "bsf", bsr "bsr", tzcnt "tzcnt", lzcnt "lzcnt", popcnt "popcnt");
            wide!(@double $ty, $m, shld "shld", shrd "shrd");
        }
    };
    (@binary $ty:ty, $m:literal, $($name:ident $text:literal),+) => {$(
        #[inline(always)]
        fn $name(s: &mut Status, a: Self, b: Self) -> Self {
            let r: $ty;
            flagged!(s, ["add al, 127", "sahf", concat!($text, " {a", $m, "}, {b", $m, "}")];
                a = inout(reg) a => r, b = in(reg) b,);
            r
        }
    )+};
    (@binary_old $ty:ty, $m:literal, $($name:ident $text:literal),+) => {$(
        #[inline(always)]
        fn $name(s: &mut Status, old: Self, a: Self) -> Self {
            let r: $ty;
            flagged!(s, ["add al, 127", "sahf", concat!($text, " {o", $m, "}, {a", $m, "}")];
                o = inout(reg) old => r, a = in(reg) a,);
            r
        }
    )+};
    (@double $ty:ty, $m:literal, $($name:ident $text:literal),+) => {$(
        #[inline(always)]
        fn $name(s: &mut Status, a: Self, b: Self, count: u8) -> Self {
            let r: $ty;
            flagged!(s, ["add al, 127", "sahf", concat!($text, " {a", $m, "}, {b", $m, "}, cl")];
                a = inout(reg) a => r, b = in(reg) b, in("cl") count,);
            r
        }
    )+};
}
wide!(u16, ":x");
wide!(u32, ":e");
wide!(u64, ":r");

/// `LOCK CMPXCHG16B`: replaces `*at` by `new` if it is `expected`; returns what was there.
///
/// # Safety
/// `at` must point to 16 aligned, writable bytes of guest RAM.
pub(crate) unsafe fn lock_exchange16(at: *mut u8, expected: u128, new: u128) -> u128 {
    let (low, high): (u64, u64);
    // SAFETY: the caller vouches for `at`; RBX is saved around its use, as the compiler keeps it for itself. The
    // address has a register by name: left to the compiler it might be RBX.
    unsafe {
        asm!("xchg rbx, {new_low}", "lock cmpxchg16b [rdi]", "mov rbx, {new_low}",
            in("rdi") at, new_low = inout(reg) new as u64 => _, in("rcx") (new >> 64) as u64,
            inout("rax") expected as u64 => low, inout("rdx") (expected >> 64) as u64 => high,
            options(nostack));
    }
    u128::from(high) << 64 | u128::from(low)
}

/// A condition code (0 to 15, as encoded in Jcc) on the guest's flags.
#[inline(always)]
pub(crate) fn condition<const CC: u8>(s: Status) -> bool {
    let plain = match CC >> 1 {
        0 => s & OF != 0,
        1 => s & CF != 0,
        2 => s & ZF != 0,
        3 => s & (CF | ZF) != 0,
        4 => s & SF != 0,
        5 => s & PF != 0,
        6 => (s >> 15 ^ s) & 1 != 0,
        _ => (s >> 15 ^ s) & 1 != 0 || s & ZF != 0,
    };
    plain != (CC & 1 != 0)
}
