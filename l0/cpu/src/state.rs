//! What a vCPU is: plain data. An engine takes it, executes, and gives it back; nothing of the vCPU lives only
//! inside an engine.

use x86defs::{cr0, dr, msr, rflags, segment, xcr0};

/// Byte offset of "no register" in the register file: a slot that always reads zero.
pub const SLOT_ZERO: u8 = 16 * 8;
/// Byte offset of the slot that holds the instruction pointer at the start of the running block.
pub const SLOT_BLOCK_IP: u8 = 17 * 8;

/// The general registers, in encoding order (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15), then the slots above.
///
/// Operands name a register by its *byte offset* here, so that AH is 1, CH is 9, and one access routine
/// serves every register of a width. Any `u8` offset is in bounds for eight bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct RegisterFile {
    pub(crate) raw: [u64; 33],
}

impl Default for RegisterFile {
    fn default() -> Self {
        Self { raw: [0; 33] }
    }
}

impl RegisterFile {
    /// General register number `index` (0 to 15).
    #[inline(always)]
    pub fn get(&self, index: usize) -> u64 {
        self.raw[index & 15]
    }

    /// Sets general register number `index` (0 to 15).
    #[inline(always)]
    pub fn set(&mut self, index: usize, value: u64) {
        self.raw[index & 15] = value;
    }
}

/// Numbers of the general registers.
pub mod reg {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Segment registers in encoding order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Seg {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// A segment register with its hidden part. `access` is in the VMCS's access-rights format (see
/// [`x86defs::segment`]); `limit` is in bytes, already scaled by the granularity bit.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Segment {
    pub base: u64,
    pub limit: u32,
    pub access: u32,
    pub selector: u16,
}

impl Segment {
    /// A real-mode or virtual-8086 data segment: 64 KiB at `selector * 16`.
    pub fn real(selector: u16) -> Self {
        Self { base: u64::from(selector) << 4, limit: 0xffff, access: 0x93, selector }
    }

    /// True when no segment is loaded (null selector).
    #[inline(always)]
    pub fn unusable(&self) -> bool {
        self.access & segment::UNUSABLE != 0
    }

    /// Descriptor privilege level.
    #[inline(always)]
    pub fn dpl(&self) -> u8 {
        ((self.access >> segment::DPL_SHIFT) & 3) as u8
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct TableRegister {
    pub base: u64,
    pub limit: u16,
}

/// What the logical processor does ("activity state" in the SDM's VMX chapters).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Activity {
    #[default]
    Active,
    Halted,
    Shutdown,
    WaitForSipi,
}

/// Blocking by STI or by MOV SS, in force for the next instruction.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Shadow {
    #[default]
    None,
    Sti,
    MovSs,
}

/// How an event came about; it decides error codes, saved RIP and privilege checks on delivery.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EventKind {
    ExternalInterrupt,
    Nmi,
    HardwareException,
    /// INT n.
    SoftwareInterrupt,
    /// INT1 (ICEBP).
    PrivilegedSoftwareException,
    /// INT3 and INTO.
    SoftwareException,
}

/// An interrupt or exception to deliver through the IDT.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Event {
    pub vector: u8,
    pub kind: EventKind,
    pub error_code: Option<u32>,
    /// Length of the instruction that raised a software event (RIP is saved past it).
    pub instruction_length: u8,
}

impl Event {
    /// An event that comes with nothing but its vector.
    pub(crate) fn new(vector: u8, kind: EventKind) -> Self {
        Self { vector, kind, error_code: None, instruction_length: 0 }
    }
}

/// x87 state in the layout of FXSAVE's first 160 bytes (64-bit form), so that the host can load it as it is.
///
/// The x87 last-instruction pointers (FIP, FDP, FOP) are the guest's. ST registers are in stack order.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct X87State {
    pub fcw: u16,
    pub fsw: u16,
    /// Abridged tag word: bit set = physical register not empty.
    pub ftw: u8,
    pub reserved: u8,
    pub fop: u16,
    pub fip: u64,
    pub fdp: u64,
    /// Not used here: MXCSR lives in [`VectorState`].
    pub mxcsr_image: u32,
    pub mxcsr_mask_image: u32,
    pub st: [[u8; 16]; 8],
    /// Room for the rest of an FXSAVE image (XMM registers, reserved); contents are meaningless.
    pub rest: [u8; 352],
}

impl Default for X87State {
    fn default() -> Self {
        Self {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            reserved: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr_image: 0x1f80,
            mxcsr_mask_image: 0,
            st: [[0; 16]; 8],
            rest: [0; 352],
        }
    }
}

/// Vector registers: YMM0..15 whole (XMM is the low half), MXCSR.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct VectorState {
    pub ymm: [[u8; 32]; 16],
    pub mxcsr: u32,
}

impl Default for VectorState {
    fn default() -> Self {
        Self { ymm: [[0; 32]; 16], mxcsr: 0x1f80 }
    }
}

/// The memory type range registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mtrrs {
    pub def_type: u64,
    /// FIX64K_00000, FIX16K_80000, FIX16K_A0000, FIX4K_C0000 .. FIX4K_F8000.
    pub fixed: [u64; 11],
    /// PHYSBASE0, PHYSMASK0, PHYSBASE1, ...
    pub variable: [u64; 16],
}

/// MSRs that are state of the CPU itself (those of the APIC and its timer belong to the owner).
#[derive(Clone, Copy, Debug)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    /// IA32_TSC_ADJUST; the TSC is the owner's clock plus this.
    pub tsc_adjust: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub debugctl: u64,
    pub xss: u64,
    pub bios_sign_id: u64,
    pub mcg_status: u64,
    /// IA32_FEATURE_CONTROL of a processor with VMX.
    pub feature_control: u64,
    pub mtrr: Mtrrs,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            spec_ctrl: 0,
            debugctl: 0,
            xss: 0,
            bios_sign_id: 0,
            mcg_status: 0,
            feature_control: 0,
            mtrr: Mtrrs::default(),
        }
    }
}

/// The whole architectural state of one vCPU.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct CpuState {
    pub rip: u64,
    /// RFLAGS without the six status flags, which live in [`CpuState::status`]; see [`CpuState::rflags`].
    pub(crate) rflags_system: u64,
    /// Status flags as the host gives them: `LAHF` in the high byte, `SETO` in the low byte.
    pub(crate) status: u16,
    pub gpr: RegisterFile,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    pub pkru: u32,
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    /// The PDPTE registers of PAE paging.
    pub pdptes: [u64; 4],
    pub msrs: Msrs,
    pub x87: X87State,
    pub vector: VectorState,
    pub activity: Activity,
    pub shadow: Shadow,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// Debug exceptions waiting for the instruction boundary, as DR6 bits (B0-B3, BS, BT).
    pub pending_debug: u64,
    /// An event to deliver before the next instruction.
    pub injected: Option<Event>,
    /// Current privilege level. (SS.DPL as the SDM has it, kept apart for speed.)
    pub cpl: u8,
    /// Instructions completed since power-on.
    pub instructions: u64,
    /// Events delivered and instructions left half-way since power-on.
    pub stalls: u64,
}

impl Default for CpuState {
    fn default() -> Self {
        Self::reset()
    }
}

impl CpuState {
    /// The state after power-on ("Processor State After Reset").
    pub fn reset() -> Self {
        let mut segments = [Segment::real(0); 6];
        segments[Seg::Cs as usize] =
            Segment { base: 0xffff_0000, limit: 0xffff, access: 0x9b, selector: 0xf000 };
        let mut gpr = RegisterFile::default();
        gpr.set(reg::RDX, u64::from(crate::cpuid::SIGNATURE));
        Self {
            gpr,
            rip: 0xfff0,
            rflags_system: rflags::FIXED_1,
            status: 0,
            segments,
            ldtr: Segment { base: 0, limit: 0xffff, access: 0x82, selector: 0 },
            tr: Segment { base: 0, limit: 0xffff, access: 0x8b, selector: 0 },
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: xcr0::X87,
            pkru: 0,
            dr: [0; 4],
            dr6: dr::DR6_FIXED_1,
            dr7: dr::DR7_FIXED_1,
            pdptes: [0; 4],
            msrs: Msrs::default(),
            x87: X87State { fcw: 0x40, ftw: 0xff, ..X87State::default() },
            vector: VectorState::default(),
            activity: Activity::Active,
            shadow: Shadow::None,
            nmi_blocked: false,
            pending_debug: 0,
            injected: None,
            cpl: 0,
            instructions: 0,
            stalls: 0,
        }
    }

    /// The state after an INIT signal: as reset, but x87, vector registers, MSRs and the cache-control bits of
    /// CR0 keep their values. The processor then waits for a start-up IPI unless it is the bootstrap processor.
    pub fn init(&mut self) {
        let keep = self.clone();
        *self = Self::reset();
        self.cr0 = cr0::ET | keep.cr0 & (cr0::CD | cr0::NW);
        self.xcr0 = keep.xcr0;
        self.pkru = keep.pkru;
        self.msrs = keep.msrs;
        self.x87 = keep.x87;
        self.vector = keep.vector;
        self.instructions = keep.instructions;
        self.stalls = keep.stalls;
    }

    /// The time this vCPU has used: what budgets and clocks that follow execution count.
    #[inline(always)]
    pub fn ticks(&self) -> u64 {
        self.instructions.wrapping_add(self.stalls)
    }

    /// Starts at `vector << 12` in real mode, as a start-up IPI does.
    pub fn start_up(&mut self, vector: u8) {
        self.segments[Seg::Cs as usize] = Segment {
            base: u64::from(vector) << 12,
            limit: 0xffff,
            access: 0x9b,
            selector: u16::from(vector) << 8,
        };
        self.rip = 0;
        self.activity = Activity::Active;
    }

    /// RFLAGS.
    #[inline]
    pub fn rflags(&self) -> u64 {
        let status = u64::from(self.status);
        self.rflags_system | (status >> 8) & (rflags::STATUS & 0xff) | (status & 1) << 11
    }

    /// Sets RFLAGS; reserved bits are forced to their fixed values.
    #[inline]
    pub fn set_rflags(&mut self, value: u64) {
        self.rflags_system = value & rflags::ALL & !rflags::STATUS | rflags::FIXED_1;
        self.set_status(value);
    }

    /// Sets the six status flags from an RFLAGS image.
    #[inline]
    pub fn set_status(&mut self, value: u64) {
        self.status = ((value & 0xd5) << 8) as u16 | ((value >> 11) & 1) as u16;
    }

    /// One flag (or any of several) outside the status flags.
    #[inline(always)]
    pub fn system_flag(&self, mask: u64) -> bool {
        self.rflags_system & mask != 0
    }

    /// A segment register.
    #[inline(always)]
    pub fn seg(&self, seg: Seg) -> &Segment {
        &self.segments[seg as usize]
    }

    /// A segment register, to change.
    #[inline(always)]
    pub fn seg_mut(&mut self, seg: Seg) -> &mut Segment {
        &mut self.segments[seg as usize]
    }

    /// In IA-32e mode (64-bit or compatibility).
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.efer & x86defs::efer::LMA != 0
    }

    /// Executing 64-bit code.
    #[inline(always)]
    pub fn code64(&self) -> bool {
        self.long_mode() && self.seg(Seg::Cs).access & segment::L != 0
    }

    /// Protected mode (CR0.PE).
    #[inline(always)]
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// Virtual-8086 mode.
    #[inline(always)]
    pub fn v86(&self) -> bool {
        self.rflags_system & rflags::VM != 0
    }

    /// IOPL.
    #[inline(always)]
    pub fn iopl(&self) -> u8 {
        ((self.rflags_system >> rflags::IOPL_SHIFT) & 3) as u8
    }

    /// 16, 32 or 64: how the code at CS is decoded.
    pub fn code_bits(&self) -> u32 {
        let cs = self.seg(Seg::Cs).access;
        match (self.code64(), cs & segment::DB != 0) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        }
    }

    /// The TSC MSR's value when the owner's clock reads `owner_tsc`.
    pub fn tsc(&self, owner_tsc: u64) -> u64 {
        owner_tsc.wrapping_add(self.msrs.tsc_adjust)
    }

    /// True for MSR numbers that [`Msrs`] does not hold and the owner is asked for.
    pub fn is_owner_msr(index: u32) -> bool {
        matches!(index, msr::IA32_APIC_BASE | msr::IA32_TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST)
    }
}
