//! One case of an instruction test: where its memory lies, its registers, and what executing it leads to.
//!
//! The arena is a handful of pages that the native process and the software CPU's page tables map at the same
//! linear addresses with the same rights, twice: once below 4 GiB (for 32-bit addresses and compatibility
//! mode) and once above. Between the pages lie holes.

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// The arena below 4 GiB.
pub const LOW: u64 = 0x1000_0000;
/// The same pages again, above.
pub const HIGH: u64 = 0x10_1000_0000;
/// Offsets in the arena: two pages of data, writable.
pub const DATA: u64 = 0x1000;
/// One page of data that can only be read.
pub const READ_ONLY: u64 = 0x4000;
/// Two pages of code; beyond is a hole.
pub const CODE: u64 = 0x6000;
/// Past the code.
pub const CODE_END: u64 = CODE + 2 * PAGE as u64;
/// A page that may be written and executed, between holes: code that changes itself.
pub const SELF: u64 = 0x9000;
/// Bytes of linear address space that the arena takes.
pub const ARENA_SIZE: u64 = 0xb000;
/// The instruction that ends every case; all code bytes that a case does not set hold it.
pub const STOP: u8 = 0xcc;

/// Rights of an arena page, for user code.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rights {
    ReadWrite,
    ReadOnly,
    ReadExecute,
    ReadWriteExecute,
}

/// Offset and rights of every page, in the order of [`Image`].
pub const PAGES: [(u64, Rights); 6] = [
    (DATA, Rights::ReadWrite),
    (DATA + PAGE as u64, Rights::ReadWrite),
    (READ_ONLY, Rights::ReadOnly),
    (CODE, Rights::ReadExecute),
    (CODE + PAGE as u64, Rights::ReadExecute),
    (SELF, Rights::ReadWriteExecute),
];

/// Bytes of all pages.
pub const IMAGE_SIZE: usize = PAGES.len() * PAGE;
/// Where the code lies in an [`Image`], that of [`SELF`] behind the rest.
pub const IMAGE_CODE: usize = 3 * PAGE;

/// Contents of the arena's pages.
pub type Image = [u8; IMAGE_SIZE];

/// Index in an [`Image`] of a linear address, if a page is there.
pub fn image_index(linear: u64) -> Option<usize> {
    let offset = [LOW, HIGH].into_iter().map(|base| linear.wrapping_sub(base)).find(|&o| o < ARENA_SIZE)?;
    let page = PAGES.iter().position(|&(start, _)| offset.wrapping_sub(start) < PAGE as u64)?;
    Some(page * PAGE + (offset as usize & (PAGE - 1)))
}

/// Offset in the low arena of an index in an [`Image`].
pub fn arena_offset(index: usize) -> u64 {
    PAGES[index / PAGE].0 + (index % PAGE) as u64
}

/// How the code is decoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash, PartialOrd, Ord)]
pub enum Bits {
    B32,
    B64,
}

impl Bits {
    /// 32 or 64.
    pub fn count(self) -> u32 {
        match self {
            Self::B32 => 32,
            Self::B64 => 64,
        }
    }
}

/// Selectors that a Linux process has; the software CPU gets the same.
pub mod selector {
    pub const CODE64: u16 = 0x33;
    pub const CODE32: u16 = 0x23;
    pub const DATA: u16 = 0x2b;
}

/// Flags that a case may set, and that are compared. (RF is compared nowhere: a signal handler's view of it depends
/// on how the kernel was entered.)
pub const FLAGS: u64 = 0x24_4dd5;
/// RFLAGS.IF and the fixed bit: always set in a process.
pub const FIXED_FLAGS: u64 = 0x202;

/// Registers of user code.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub fpu: Fpu,
}

/// x87 and vector registers.
#[derive(Clone, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Fpu {
    pub fcw: u16,
    pub fsw: u16,
    /// Abridged: bit set = physical register in use.
    pub ftw: u8,
    pub mxcsr: u32,
    /// In stack order.
    pub st: [[u8; 10]; 8],
    pub ymm: [[u8; 32]; 16],
}

impl Default for Fpu {
    fn default() -> Self {
        Self { fcw: 0x37f, fsw: 0, ftw: 0, mxcsr: 0x1f80, st: [[0; 10]; 8], ymm: [[0; 32]; 16] }
    }
}

/// Bytes of an XSAVE image in standard format with x87, SSE and AVX state.
pub const XSAVE_SIZE: usize = 832;
const XSTATE_BV: usize = 512;
const YMM_HIGH: usize = 576;

impl Fpu {
    /// As XRSTOR takes it.
    pub fn to_xsave(&self, image: &mut [u8; XSAVE_SIZE]) {
        image.fill(0);
        image[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        image[4] = self.ftw;
        image[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        for (i, st) in self.st.iter().enumerate() {
            image[32 + i * 16..][..10].copy_from_slice(st);
        }
        for (i, ymm) in self.ymm.iter().enumerate() {
            image[160 + i * 16..][..16].copy_from_slice(&ymm[..16]);
            image[YMM_HIGH + i * 16..][..16].copy_from_slice(&ymm[16..]);
        }
        image[XSTATE_BV] = 7;
    }

    /// As XSAVE gives it; components in their initial configuration may be absent from the image.
    pub fn from_xsave(image: &[u8; XSAVE_SIZE]) -> Self {
        let mut fpu = Self::default();
        let present = image[XSTATE_BV];
        if present & 1 != 0 {
            fpu.fcw = u16::from_le_bytes([image[0], image[1]]);
            fpu.fsw = u16::from_le_bytes([image[2], image[3]]);
            fpu.ftw = image[4];
            for (i, st) in fpu.st.iter_mut().enumerate() {
                st.copy_from_slice(&image[32 + i * 16..][..10]);
            }
        }
        fpu.mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
        for (i, ymm) in fpu.ymm.iter_mut().enumerate() {
            if present & 2 != 0 {
                ymm[..16].copy_from_slice(&image[160 + i * 16..][..16]);
            }
            if present & 4 != 0 {
                ymm[16..].copy_from_slice(&image[YMM_HIGH + i * 16..][..16]);
            }
        }
        fpu
    }
}

/// What is executed.
#[derive(Clone, Debug)]
pub struct Case {
    pub bits: Bits,
    /// RIP is where the code starts.
    pub start: Registers,
    /// With the code in it.
    pub image: Box<Image>,
    /// Bytes of code at RIP (the rest is [`STOP`]).
    pub code_len: usize,
    /// Bytes of the image whose final value the architecture or the host leaves open, as (index, length, why).
    pub open: Vec<(usize, usize, &'static str)>,
}

/// How a case ended: with an exception, always ([`STOP`] raises #BP).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Exception {
    pub vector: u8,
    pub error_code: u32,
    /// CR2, of a page fault.
    pub address: u64,
}

/// What came of a case.
#[derive(Clone, Debug)]
pub struct Final {
    pub exception: Exception,
    pub registers: Registers,
    pub image: Box<Image>,
}

/// What executing a case gave.
#[derive(Clone, Debug)]
pub enum Outcome {
    Done(Box<Final>),
    /// It cannot be compared, for the reason given (a system call, an instruction that may differ).
    Skipped(String),
    /// The executor failed: died, hung or panicked.
    Broken(String),
}
