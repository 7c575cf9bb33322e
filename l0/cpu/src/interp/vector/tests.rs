//! Every class of vector instruction against the host: the same instruction, executed natively with other
//! registers and memory around it.

use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, Instruction};
use x86defs::{cr0, cr4, efer, rflags, segment, vector, xcr0};

use crate::Cpu;
use crate::attention::Attention;
use crate::bus::{Bus, MsrRefused};
use crate::cpuid::CpuModel;
use crate::native::FeatureSet;
use crate::native::oracle::{Machine, available, instructions};
use crate::op::Cold;
use crate::phys::{PhysMemory, RamRange};
use crate::state::{Seg, Segment, reg};
use crate::trap::{Exec, Trap};

struct NoBus;

impl Bus for NoBus {
    fn mmio_read(&mut self, _address: u64, _data: &mut [u8]) {}
    fn mmio_write(&mut self, _address: u64, _data: &[u8]) {}
    fn port_read(&mut self, _port: u16, _data: &mut [u8]) {}
    fn port_write(&mut self, _port: u16, _data: &[u8]) {}
    fn read_msr(&mut self, _msr: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn write_msr(&mut self, _msr: u32, _value: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _value: u8) {}
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn tsc(&mut self, instructions: u64) -> u64 {
        instructions
    }
}

const RAM: usize = 1 << 16;
/// Where tests put memory operands; the page after the next is the last.
pub(crate) const OPERAND: u64 = 0x3000;
/// The first address past RAM's last page that is mapped by nothing: not used as RAM in tests of faults.
pub(crate) const PAGE_TABLES: u64 = 0x8000;

/// A vCPU in 64-bit mode with 64 KiB of RAM mapped one to one by 4-KiB pages, all features enabled.
pub(crate) fn cpu() -> Cpu {
    #[repr(align(4096))]
    struct Ram([u8; RAM]);
    let ram = Box::leak(Box::new(Ram([0; RAM])));
    let range = RamRange { start: 0, len: RAM as u64, host: ram.0.as_mut_ptr() };
    // SAFETY: the memory is leaked and used as guest memory only.
    let memory = Arc::new(unsafe { PhysMemory::new(vec![range], Box::new(())) });
    let mut tables = vec![(PAGE_TABLES, 0x9003_u64), (0x9000, 0xa003), (0xa000, 0xb003)];
    tables.extend((0..16).map(|page| (0xb000 + page * 8, page << 12 | 3)));
    for (at, entry) in tables {
        memory.write(at, &entry.to_le_bytes());
    }
    let mut cpu = Cpu::new(memory, Box::new(NoBus), test_model(), Arc::new(Attention::default()), 0);
    let state = &mut cpu.state;
    state.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::MP | cr0::ET | cr0::WP;
    state.cr3 = PAGE_TABLES;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    state.efer = efer::LME | efer::LMA;
    state.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::PKRU;
    *state.seg_mut(Seg::Cs) = Segment { base: 0, limit: !0, access: 0x9b | segment::L, selector: 8 };
    state.x87 = crate::state::X87State::default();
    state.rip = 0x1000;
    cpu.state_changed();
    cpu
}

fn test_model() -> Arc<CpuModel> {
    Arc::new(CpuModel::default())
}

/// Removes a page from the tables of [`cpu`].
pub(crate) fn unmap(cpu: &mut Cpu, address: u64) {
    cpu.memory.write(0xb000 + (address >> 12) * 8, &[0; 8]);
    cpu.state_changed();
}

pub(crate) fn read<const N: usize>(cpu: &Cpu, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    cpu.memory.read(address, &mut bytes);
    bytes
}

/// xorshift64*: repeatable and good enough to pick operands.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Eight bytes that are now and then interesting numbers of some type.
    pub(crate) fn word(&mut self) -> u64 {
        let [single, other] = [0, 0].map(|_: u8| {
            const SINGLES: [u32; 8] =
                [0, 0x8000_0000, 0x3f80_0000, 0x7f80_0000, 0x7fc0_0001, 0x7f80_0001, 1, 0x7f7f_ffff];
            u64::from(SINGLES[(self.next() >> 40) as usize & 7])
        });
        match self.next() >> 60 {
            0 => 0x3ff0_0000_0000_0000,
            1 => self.next() >> 48,
            2 => (self.next() as i64 >> 50) as u64,
            3 => [0, 1 << 63, 0x7ff0_0000_0000_0000, 0x7ff0_0000_0000_0001, 1, 0x7fef_ffff_ffff_ffff]
                [(self.next() % 6) as usize],
            4..=6 => single << 32 | other,
            7..=8 => {
                // Singles of moderate size.
                let pick = |r: u64| r & 0x8fff_ffff | 0x3000_0000;
                pick(self.next() >> 32) << 32 | pick(self.next() >> 32)
            }
            9..=10 => self.next() & 0x801f_ffff_ffff_ffff | (0x3f0 + (self.next() >> 59)) << 52,
            _ => self.next(),
        }
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.word().to_le_bytes()[..chunk.len()]);
        }
    }
}

pub(crate) fn decode(code: &[u8]) -> Instruction {
    Decoder::new(64, code, DecoderOptions::NONE).decode()
}

/// Lowers the instruction as the decoder would and executes it.
pub(crate) fn execute(cpu: &mut Cpu, insn: Instruction) -> Exec {
    let (handler, data) = super::lower(&insn)
        .or_else(|| crate::interp::x87::lower(&insn))
        .or_else(|| crate::interp::xstate::lower(&insn))
        .unwrap_or_else(|| panic!("nobody executes {:?}", insn.code()));
    handler(cpu, &Cold { insn, handler, data })
}

/// Sets both machines to the same random state.
fn randomise(cpu: &mut Cpu, machine: &mut Machine, memory: &mut [u8; 64], random: &mut Random) {
    for ymm in &mut cpu.state.vector.ymm {
        random.fill(ymm);
    }
    // Rounding mode, DAZ and FTZ at random; everything masked; sticky flags at random.
    cpu.state.vector.mxcsr = random.next() as u32 & 0xe07f | 0x1f80;
    random.fill(memory);
    for (i, number) in [reg::RAX, reg::RCX, reg::RDX, reg::RBX].into_iter().enumerate() {
        let value = random.word();
        machine.gpr[i] = value;
        cpu.state.gpr.set(number, value);
    }
    let status = random.next() & rflags::STATUS;
    machine.rflags = status | 2;
    cpu.state.set_status(status);
    randomise_x87(cpu, random);
    machine.vector = cpu.state.vector;
    machine.x87 = cpu.state.x87;
}

fn randomise_x87(cpu: &mut Cpu, random: &mut Random) {
    let x87 = &mut cpu.state.x87;
    for st in &mut x87.st {
        let exponent = match random.next() >> 61 {
            0 => 0x7fff,
            1 => 0,
            2 => random.next() as u16,
            _ => 0x3fff - 20 + (random.next() >> 58) as u16,
        };
        let sign = (random.next() >> 48) as u16 & 0x8000;
        let fraction = match random.next() >> 62 {
            0 => 1 << 63,
            1 => random.next(),
            _ => random.next() | 1 << 63,
        };
        st[..8].copy_from_slice(&fraction.to_le_bytes());
        st[8..10].copy_from_slice(&(exponent | sign).to_le_bytes());
    }
    x87.fsw = random.next() as u16 & 0x7f7f;
    x87.ftw = if random.next() >> 62 == 0 { random.next() as u8 } else { 0xff };
    x87.set_control(random.next() as u16 | if random.next() >> 63 == 0 { 0x3f } else { 0 });
    // A pending exception stops most instructions: that is tested apart.
    let pending = x87.fsw & !x87.fcw & 0x3f;
    x87.fsw &= !pending;
    x87.update_summary();
}

/// Runs every instruction of a table `count` times on both.
pub(crate) fn compare(table: &[(&'static str, &'static [u8])], count: u32) {
    if !available() {
        println!("SKIP: the native oracle needs AVX2");
        return;
    }
    let mut cpu = cpu();
    let mut machine = Machine::new();
    let mut random = Random(0x1234_5678_9abc_def1);
    for &(text, code) in table {
        let insn = decode(code);
        let needs =
            FeatureSet::of(insn.cpuid_features()).unwrap_or_else(|| panic!("{text}: unknown feature"));
        if !FeatureSet::host().contains(needs) {
            println!("SKIP: the host has no {needs:?} for {text}");
            continue;
        }
        for round in 0..count {
            let mut memory = [0; 64];
            randomise(&mut cpu, &mut machine, &mut memory, &mut random);
            compare_one(&mut cpu, &mut machine, memory, (text, code), insn, round);
        }
    }
}

fn compare_one(
    cpu: &mut Cpu,
    machine: &mut Machine,
    memory: [u8; 64],
    (text, code): (&str, &'static [u8]),
    insn: Instruction,
    round: u32,
) {
    let before = machine.clone();
    let mut operand = [0; 128];
    let at = 64 - (operand.as_ptr() as usize & 31);
    operand[at..at + 64].copy_from_slice(&memory);
    // SAFETY: the tables hold instructions on the registers and on up to 64 bytes at R8, and the host has them.
    unsafe { machine.execute(code.as_ptr(), &mut operand) };
    cpu.memory.write(OPERAND, &memory);
    cpu.state.gpr.set(8, OPERAND);
    let done = execute(cpu, insn);
    let context = format!("{text}, round {round}, mxcsr {:#x}", before.vector.mxcsr);
    assert_eq!(done, Ok(()), "{context}: {:?}", cpu.fault);
    for i in 0..16 {
        let (ours, theirs) = (cpu.state.vector.ymm[i], machine.vector.ymm[i]);
        assert_eq!(ours, theirs, "{context}: ymm{i}, before {:x?}", before.vector.ymm[i]);
    }
    assert_eq!(cpu.state.vector.mxcsr, machine.vector.mxcsr, "{context}: mxcsr");
    for (i, number) in [reg::RAX, reg::RCX, reg::RDX, reg::RBX].into_iter().enumerate() {
        assert_eq!(cpu.state.gpr.get(number), machine.gpr[i], "{context}: general register {number}");
    }
    let status = (cpu.state.rflags() & rflags::STATUS, machine.rflags & rflags::STATUS);
    assert_eq!(status.0, status.1, "{context}: flags");
    assert_eq!(read::<64>(cpu, OPERAND), operand[at..at + 64], "{context}: memory");
    let words = |x: &crate::state::X87State| (x.fcw, x.fsw, x.ftw);
    assert_eq!(words(&cpu.state.x87), words(&machine.x87), "{context}: x87 control, status, tags");
    for i in 0..8 {
        assert_eq!(cpu.state.x87.st[i][..10], machine.x87.st[i][..10], "{context}: st{i}");
    }
}

#[test]
fn legacy_integer_instructions_match_the_host() {
    let table = instructions!(
        turtles_test_legacy_integer,
        "paddb xmm1, xmm2",
        "paddw xmm1, [r8]",
        "paddsb xmm9, xmm15",
        "psubusw xmm0, [r8]",
        "pmaddwd xmm3, xmm3",
        "pmulhuw xmm3, [r8]",
        "pmuludq xmm4, xmm5",
        "psadbw xmm4, [r8]",
        "pavgb xmm1, xmm2",
        "pminub xmm1, [r8]",
        "pmaxsw xmm1, xmm0",
        "pcmpeqd xmm1, [r8]",
        "pcmpgtb xmm1, xmm2",
        "packssdw xmm1, [r8]",
        "packuswb xmm1, xmm2",
        "punpcklbw xmm1, [r8]",
        "punpckhqdq xmm1, xmm2",
        "pshufd xmm1, [r8], 0x1b",
        "pshufhw xmm1, xmm2, 0x9c",
        "pshuflw xmm1, [r8], 0x72",
        "psllw xmm1, xmm2",
        "pslld xmm1, 7",
        "psrlq xmm1, [r8]",
        "psraw xmm1, 3",
        "pslldq xmm1, 5",
        "psrldq xmm14, 11",
        "pand xmm1, [r8]",
        "pandn xmm1, xmm2",
        "por xmm1, xmm2",
        "pxor xmm1, [r8]",
        "pxor xmm7, xmm7",
        "xorps xmm8, xmm8",
        "xorpd xmm8, xmm9",
        "andnps xmm1, [r8]",
        "orpd xmm1, xmm2",
        "shufps xmm1, [r8], 0x39",
        "shufpd xmm1, xmm2, 1",
        "unpcklps xmm1, [r8]",
        "unpckhpd xmm1, xmm2",
        "pmovmskb eax, xmm3",
        "movmskps ecx, xmm3",
        "movmskpd edx, xmm12",
        "pinsrw xmm1, eax, 5",
        "pinsrw xmm1, [r8], 2",
        "pextrw ebx, xmm2, 6",
        "pshufb xmm1, [r8]",
        "phaddw xmm1, xmm2",
        "phsubsw xmm1, [r8]",
        "pmaddubsw xmm1, xmm2",
        "psignb xmm1, [r8]",
        "pabsd xmm1, [r8]",
        "palignr xmm1, xmm2, 9",
        "pmulhrsw xmm1, [r8]",
        "pblendvb xmm1, [r8], xmm0",
        "blendvps xmm1, xmm2, xmm0",
        "blendvpd xmm1, [r8], xmm0",
        "blendps xmm1, xmm2, 5",
        "pblendw xmm1, [r8], 0x5a",
        "pmovsxbw xmm1, [r8]",
        "pmovzxbq xmm1, [r8]",
        "pmovzxdq xmm1, xmm2",
        "pmovsxbd xmm1, [r8]",
        "pmulld xmm1, xmm2",
        "pmuldq xmm1, [r8]",
        "pminsd xmm1, xmm2",
        "pmaxuw xmm1, [r8]",
        "packusdw xmm1, xmm2",
        "phminposuw xmm1, [r8]",
        "mpsadbw xmm1, [r8], 5",
        "pcmpeqq xmm1, xmm2",
        "pcmpgtq xmm1, [r8]",
        "ptest xmm1, [r8]",
        "ptest xmm2, xmm2",
        "insertps xmm1, [r8], 0x9c",
        "insertps xmm1, xmm2, 0x4a",
        "extractps eax, xmm1, 2",
        "extractps [r8], xmm1, 3",
        "pinsrb xmm1, ebx, 13",
        "pinsrb xmm1, [r8], 3",
        "pinsrd xmm1, [r8], 2",
        "pinsrq xmm1, rcx, 1",
        "pextrb eax, xmm1, 7",
        "pextrb [r8], xmm1, 9",
        "pextrd ebx, xmm1, 1",
        "pextrq [r8], xmm1, 1",
        "pextrq rdx, xmm1, 1",
        "pextrw [r8], xmm1, 3",
        "pcmpistri xmm1, [r8], 0x0c",
        "pcmpistrm xmm1, xmm2, 0x40",
        "pcmpestri xmm1, xmm2, 0x1a",
        "pcmpestrm xmm1, [r8], 0x4d",
        "pcmpistri xmm3, xmm2, 0x44",
    );
    compare(&table, 40);
}

#[test]
fn moves_match_the_host() {
    let table = instructions!(
        turtles_test_moves,
        "movaps xmm1, [r8]",
        "movups xmm1, [r8 + 3]",
        "movapd [r8], xmm11",
        "movdqu [r8 + 5], xmm1",
        "movdqa xmm1, xmm12",
        "movdqa xmm1, [r8 + 16]",
        "lddqu xmm1, [r8 + 1]",
        "movntdqa xmm1, [r8]",
        "movntps [r8], xmm1",
        "movntdq [r8], xmm1",
        "movss xmm1, [r8]",
        "movss [r8], xmm1",
        "movss xmm1, xmm2",
        "movsd xmm1, [r8 + 1]",
        "movsd [r8], xmm1",
        "movsd xmm1, xmm2",
        "movd xmm1, eax",
        "movd xmm1, [r8]",
        "movd ecx, xmm1",
        "movd [r8], xmm1",
        "movq xmm1, rbx",
        "movq xmm1, [r8]",
        "movq rdx, xmm1",
        "movq [r8], xmm1",
        "movq xmm1, xmm2",
        "movlps xmm1, [r8]",
        "movlps [r8], xmm1",
        "movhps xmm1, [r8]",
        "movhpd [r8], xmm1",
        "movlhps xmm1, xmm2",
        "movhlps xmm1, xmm2",
        "movddup xmm1, [r8]",
        "movshdup xmm1, [r8]",
        "movsldup xmm1, xmm2",
        "vmovaps xmm1, [r8]",
        "vmovups ymm1, [r8 + 3]",
        "vmovdqa ymm13, [r8]",
        "vmovdqa [r8 + 32], ymm1",
        "vmovdqu [r8 + 7], ymm1",
        "vmovaps xmm1, xmm2",
        "vmovaps ymm1, ymm14",
        "vmovss xmm1, [r8]",
        "vmovss xmm1, xmm2, xmm3",
        "vmovsd [r8], xmm1",
        "vmovd xmm1, eax",
        "vmovq xmm1, xmm2",
        "vmovq rax, xmm1",
        "vmovlps xmm1, xmm2, [r8]",
        "vmovhps [r8], xmm1",
        "vmovhpd xmm1, xmm2, [r8]",
        "vmovddup ymm1, [r8]",
        "vmovntdq [r8], ymm1",
        "vmovntdqa ymm1, [r8]",
        "vlddqu ymm1, [r8 + 1]",
        "vzeroupper",
        "vzeroall",
        "vpxor xmm1, xmm2, xmm2",
        "vxorps ymm1, ymm3, ymm3",
        "vpxor ymm1, ymm3, ymm3",
        "stmxcsr [r8]",
        "vstmxcsr [r8]",
    );
    compare(&table, 25);
}

#[test]
fn vex_instructions_match_the_host() {
    let table = instructions!(
        turtles_test_vex,
        "vpaddb ymm1, ymm2, [r8]",
        "vpaddd xmm1, xmm2, xmm15",
        "vpmaddwd ymm1, ymm2, ymm3",
        "vpand ymm1, ymm2, [r8]",
        "vpshufb ymm1, ymm2, [r8]",
        "vpermd ymm1, ymm2, [r8]",
        "vpermq ymm1, [r8], 0x4e",
        "vperm2i128 ymm1, ymm2, [r8], 0x21",
        "vperm2f128 ymm1, ymm2, ymm3, 0x83",
        "vpermilps ymm1, ymm2, [r8]",
        "vpermilpd xmm1, xmm2, 1",
        "vbroadcastss ymm1, [r8]",
        "vbroadcastsd ymm1, xmm2",
        "vbroadcastf128 ymm1, [r8]",
        "vpbroadcastb ymm1, [r8]",
        "vpbroadcastw xmm1, xmm2",
        "vinsertf128 ymm1, ymm2, [r8], 1",
        "vextractf128 [r8], ymm1, 1",
        "vextracti128 xmm1, ymm2, 1",
        "vinserti128 ymm1, ymm2, xmm3, 0",
        "vpsllvd ymm1, ymm2, [r8]",
        "vpsravd xmm1, xmm2, xmm3",
        "vpslld ymm1, ymm2, [r8]",
        "vpsrlq ymm1, ymm2, 9",
        "vpsrldq ymm1, ymm2, 3",
        "vpblendd ymm1, ymm2, [r8], 0xa5",
        "vpblendvb ymm1, ymm2, [r8], ymm4",
        "vblendvps xmm1, xmm2, xmm3, xmm4",
        "vpmovmskb eax, ymm1",
        "vmovmskps ecx, ymm1",
        "vptest ymm1, [r8]",
        "vtestps ymm1, ymm2",
        "vtestpd xmm1, [r8]",
        "vpmovsxbw ymm1, [r8]",
        "vpmovzxbq ymm1, [r8]",
        "vpalignr ymm1, ymm2, [r8], 7",
        "vpacksswb ymm1, ymm2, [r8]",
        "vpinsrd xmm1, xmm2, eax, 2",
        "vpextrb [r8], xmm1, 3",
        "vpcmpistri xmm1, [r8], 0x0c",
        "vpcmpestrm xmm1, xmm2, 0x40",
        "vmpsadbw ymm1, ymm2, [r8], 0x2a",
        "vaddps ymm1, ymm2, [r8]",
        "vmulpd ymm1, ymm2, ymm3",
        "vdivss xmm1, xmm2, [r8]",
        "vsqrtpd ymm1, [r8]",
        "vaddsubps ymm1, ymm2, ymm3",
        "vhaddpd ymm1, ymm2, [r8]",
        "vdpps ymm1, ymm2, [r8], 0xf1",
        "vcmpps ymm1, ymm2, [r8], 0x1d",
        "vroundps ymm1, [r8], 4",
        "vcvtdq2pd ymm1, [r8]",
        "vcvtpd2ps xmm1, ymm2",
        "vcvtps2pd ymm1, [r8]",
        "vcvtsi2sd xmm1, xmm2, rax",
        "vcvttss2si rcx, [r8]",
        "vucomisd xmm1, [r8]",
        "vrcpps ymm1, ymm2",
        "vrsqrtss xmm1, xmm2, [r8]",
        "vfmadd213ps ymm1, ymm2, [r8]",
        "vfnmsub231sd xmm1, xmm2, xmm3",
        "vfmaddsub132pd ymm1, ymm2, [r8]",
        "vcvtph2ps ymm1, [r8]",
        "vcvtps2ph [r8], ymm1, 4",
        "vcvtps2ph xmm1, ymm2, 3",
        "vaesenc xmm1, xmm2, [r8]",
        "vaesdec ymm1, ymm2, [r8]",
        "vpclmulqdq xmm1, xmm2, [r8], 0x11",
        "vpclmulqdq ymm1, ymm2, ymm3, 0x01",
        "vgf2p8mulb ymm1, ymm2, [r8]",
    );
    compare(&table, 40);
}

#[test]
fn floating_point_and_cryptography_match_the_host() {
    let table = instructions!(
        turtles_test_floating,
        "addps xmm1, [r8]",
        "addsd xmm1, [r8]",
        "subss xmm1, xmm2",
        "mulpd xmm1, [r8]",
        "divps xmm1, xmm2",
        "divsd xmm1, [r8]",
        "sqrtss xmm1, xmm2",
        "sqrtpd xmm1, [r8]",
        "minps xmm1, xmm2",
        "maxsd xmm1, [r8]",
        "cmpps xmm1, [r8], 2",
        "cmpsd xmm1, xmm2, 5",
        "comiss xmm1, [r8]",
        "ucomisd xmm1, xmm2",
        "cvtsi2ss xmm1, eax",
        "cvtsi2sd xmm1, rbx",
        "cvtsi2sd xmm1, dword ptr [r8]",
        "cvtsi2ss xmm1, qword ptr [r8]",
        "cvtss2si eax, [r8]",
        "cvtsd2si rcx, xmm2",
        "cvttsd2si edx, [r8]",
        "cvttss2si rbx, xmm1",
        "cvtss2sd xmm1, [r8]",
        "cvtsd2ss xmm1, xmm2",
        "cvtdq2ps xmm1, [r8]",
        "cvtps2dq xmm1, xmm2",
        "cvttps2dq xmm1, [r8]",
        "cvtpd2dq xmm1, [r8]",
        "cvttpd2dq xmm1, xmm2",
        "cvtdq2pd xmm1, [r8]",
        "cvtpd2ps xmm1, [r8]",
        "cvtps2pd xmm1, [r8]",
        "rcpps xmm1, [r8]",
        "rsqrtss xmm1, xmm2",
        "haddps xmm1, [r8]",
        "addsubpd xmm1, xmm2",
        "dpps xmm1, [r8], 0x7f",
        "dppd xmm1, xmm2, 0x31",
        "roundss xmm1, [r8], 1",
        "roundpd xmm1, xmm2, 4",
        "aesenc xmm1, [r8]",
        "aesdeclast xmm1, xmm2",
        "aesimc xmm1, [r8]",
        "aeskeygenassist xmm1, xmm2, 0x1b",
        "pclmulqdq xmm1, [r8], 0x10",
        "sha1rnds4 xmm1, xmm2, 2",
        "sha1nexte xmm1, [r8]",
        "sha1msg1 xmm1, xmm2",
        "sha256rnds2 xmm1, [r8], xmm0",
        "sha256msg1 xmm1, xmm2",
        "sha256msg2 xmm1, [r8]",
        "gf2p8affineqb xmm1, [r8], 0x63",
        "gf2p8affineinvqb xmm1, xmm2, 5",
    );
    compare(&table, 80);
}

#[test]
fn mmx_instructions_match_the_host() {
    let table = instructions!(
        turtles_test_mmx,
        "movq mm1, [r8]",
        "movq [r8], mm2",
        "movd mm3, eax",
        "movd ecx, mm3",
        "movq rbx, mm4",
        "movq mm1, mm2",
        "paddb mm1, [r8]",
        "pmaddwd mm1, mm2",
        "pshufw mm1, [r8], 0x1b",
        "packsswb mm1, mm2",
        "punpcklbw mm1, [r8]",
        "psllq mm1, 5",
        "pinsrw mm1, eax, 2",
        "pextrw ecx, mm1, 3",
        "pmovmskb edx, mm1",
        "pavgb mm1, [r8]",
        "movntq [r8], mm1",
        "emms",
        "pshufb mm1, [r8]",
        "paddq mm1, mm2",
        "palignr mm1, mm2, 3",
        "pabsb mm1, [r8]",
        "movq2dq xmm1, mm2",
        "movdq2q mm1, xmm2",
        "cvtpi2ps xmm1, mm2",
        "cvtps2pi mm1, [r8]",
        "cvttps2pi mm1, xmm2",
        "cvtpi2pd xmm1, mm3",
        "cvtpi2pd xmm1, [r8]",
        "cvtpd2pi mm1, [r8]",
        "cvttpd2pi mm1, xmm2",
        "cvtpi2ps xmm1, [r8]",
    );
    compare(&table, 40);
}

#[test]
fn x87_instructions_match_the_host() {
    let table = instructions!(
        turtles_test_x87,
        "fadd st, st(1)",
        "fadd dword ptr [r8]",
        "fadd qword ptr [r8]",
        "faddp st(2), st",
        "fiadd word ptr [r8]",
        "fisub dword ptr [r8]",
        "fsubr st, st(3)",
        "fmul qword ptr [r8]",
        "fdiv st(1), st",
        "fdivr dword ptr [r8]",
        "fidiv word ptr [r8]",
        "fld st(2)",
        "fld dword ptr [r8]",
        "fld qword ptr [r8]",
        "fld tbyte ptr [r8]",
        "fild word ptr [r8]",
        "fild dword ptr [r8]",
        "fild qword ptr [r8]",
        "fbld [r8]",
        "fst dword ptr [r8]",
        "fst qword ptr [r8]",
        "fstp dword ptr [r8]",
        "fstp qword ptr [r8]",
        "fstp tbyte ptr [r8]",
        "fstp st(3)",
        "fist word ptr [r8]",
        "fistp dword ptr [r8]",
        "fistp qword ptr [r8]",
        "fisttp word ptr [r8]",
        "fbstp [r8]",
        "fld1",
        "fldz",
        "fldpi",
        "fldl2e",
        "fabs",
        "fchs",
        "fsqrt",
        "frndint",
        "fscale",
        "fxtract",
        "fprem",
        "fprem1",
        "fsin",
        "fcos",
        "fsincos",
        "fptan",
        "fpatan",
        "f2xm1",
        "fyl2x",
        "fyl2xp1",
        "fxam",
        "ftst",
        "fxch st(2)",
        "fcom st(1)",
        "fcom dword ptr [r8]",
        "fcompp",
        "fucom st(2)",
        "fucompp",
        "ficom word ptr [r8]",
        "fcomi st, st(1)",
        "fcomip st, st(2)",
        "fucomi st, st(3)",
        "fucomip st, st(1)",
        "fcmovb st, st(1)",
        "fcmovne st, st(2)",
        "fcmovu st, st(3)",
        "fcmovnbe st, st(1)",
        "fincstp",
        "fdecstp",
        "ffree st(2)",
        "fnop",
        "fninit",
        "fnclex",
        "fldcw [r8]",
        "fnstcw [r8]",
        "fnstsw [r8]",
        "fnstsw ax",
    );
    compare(&table, 120);
}

fn raised(cpu: &mut Cpu, insn: Instruction) -> Option<(u8, Option<u32>)> {
    match execute(cpu, insn) {
        Ok(()) => None,
        Err(Trap::Fault) => Some((cpu.fault.vector, cpu.fault.error_code)),
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn control_registers_decide_what_may_execute() {
    let table = instructions!(
        turtles_test_controls,
        "paddb xmm1, xmm2",
        "vpaddb xmm1, xmm2, xmm3",
        "paddb mm1, mm2",
        "fadd st, st(1)",
        "movaps xmm1, xmm2",
        "vzeroupper",
        "fninit",
        "stmxcsr [r8]",
        "fxsave [r8]",
        "xsave [r8]",
        "cvtpi2ps xmm0, mm1",
        "emms",
    );
    // EM, TS, OSFXSR clear, OSXSAVE clear, XCR0 without AVX.
    const UD: u8 = vector::UD;
    const NM: u8 = vector::NM;
    let expected: [[u8; 5]; 12] = [
        [UD, NM, UD, 0, 0],
        [0, NM, 0, UD, UD],
        [UD, NM, 0, 0, 0],
        [NM, NM, 0, 0, 0],
        [UD, NM, UD, 0, 0],
        [0, NM, 0, UD, UD],
        [NM, NM, 0, 0, 0],
        [UD, NM, UD, 0, 0],
        [NM, NM, 0, 0, 0],
        [0, NM, 0, UD, 0],
        [UD, NM, 0, 0, 0],
        [UD, NM, 0, 0, 0],
    ];
    if !FeatureSet::host().contains(FeatureSet::AVX2) {
        println!("SKIP: the host has no AVX2");
        return;
    }
    let changes: [fn(&mut Cpu); 5] = [
        |cpu| cpu.state.cr0 |= cr0::EM,
        |cpu| cpu.state.cr0 |= cr0::TS,
        |cpu| cpu.state.cr4 &= !cr4::OSFXSR,
        |cpu| cpu.state.cr4 &= !cr4::OSXSAVE,
        |cpu| cpu.state.xcr0 = xcr0::X87 | xcr0::SSE,
    ];
    for ((text, code), expected) in table.into_iter().zip(expected) {
        for (change, expected) in changes.into_iter().zip(expected) {
            let mut cpu = cpu();
            cpu.state.gpr.set(8, OPERAND);
            change(&mut cpu);
            let found = raised(&mut cpu, decode(code));
            assert_eq!(found.map_or(0, |f| f.0), expected, "{text}");
        }
    }
}

#[test]
fn misaligned_operands_fault_where_the_architecture_says() {
    let faults = instructions!(
        turtles_test_misaligned,
        "movaps xmm1, [r8]",
        "movdqa [r8], xmm1",
        "paddb xmm1, [r8]",
        "movntdq [r8], xmm1",
        "vmovdqa ymm1, [r8]",
        "vmovaps [r8], xmm1",
        "sqrtpd xmm1, [r8]",
        "cvtpd2pi mm0, [r8]",
        "sha256msg1 xmm1, [r8]",
        "movntdqa xmm0, [r8]",
    );
    let passes = instructions!(
        turtles_test_unaligned,
        "movups xmm1, [r8]",
        "movdqu [r8], xmm1",
        "lddqu xmm1, [r8]",
        "vpaddb xmm1, xmm2, [r8]",
        "addsd xmm1, [r8]",
        "pcmpistri xmm1, [r8], 0",
        "vmovdqu ymm1, [r8]",
        "paddb mm1, [r8]",
        "pmovsxbw xmm1, [r8]",
    );
    if !FeatureSet::host().contains(FeatureSet::AVX2.and(FeatureSet::SHA)) {
        println!("SKIP: the host has no AVX2 or SHA");
        return;
    }
    let mut cpu = cpu();
    cpu.state.gpr.set(8, OPERAND + 8 + 1);
    for (text, code) in faults {
        assert_eq!(raised(&mut cpu, decode(code)), Some((vector::GP, Some(0))), "{text}");
    }
    for (text, code) in passes {
        assert_eq!(raised(&mut cpu, decode(code)), None, "{text}");
    }
}

#[test]
fn page_faults_change_nothing() {
    let table = instructions!(
        turtles_test_page_faults,
        "movups xmm1, [r8]",
        "movups [r8], xmm1",
        "paddb mm1, [r8]",
        "movq [r8], mm1",
        "fistp qword ptr [r8]",
        "fld tbyte ptr [r8]",
        "addpd xmm1, [r8 + 8]",
        "vmovdqu [r8], ymm1",
        "vextracti128 [r8], ymm2, 1",
        "fnsave [r8]",
        "vcvtps2ph [r8], ymm1, 0",
        "fnstenv [r8]",
        "frstor [r8]",
        "fbstp [r8]",
    );
    if !FeatureSet::host().contains(FeatureSet::AVX2) {
        println!("SKIP: the host has no AVX2");
        return;
    }
    for (text, code) in table {
        let mut cpu = cpu();
        unmap(&mut cpu, 0x5000);
        let mut random = Random(99);
        randomise(&mut cpu, &mut Machine::new(), &mut [0; 64], &mut random);
        cpu.state.gpr.set(8, 0x5000 - 4);
        if text.starts_with("addpd") {
            cpu.state.gpr.set(8, 0x5000 - 8);
        }
        let before = cpu.state.clone();
        let memory: [u8; 64] = read(&cpu, 0x5000 - 64);
        assert_eq!(raised(&mut cpu, decode(code)).map(|f| f.0), Some(vector::PF), "{text}");
        assert_eq!(cpu.fault.address, 0x5000, "{text}");
        assert_eq!(cpu.state.vector.ymm, before.vector.ymm, "{text}");
        assert_eq!(cpu.state.vector.mxcsr, before.vector.mxcsr, "{text}");
        assert_eq!(cpu.state.x87.st, before.x87.st, "{text}");
        assert_eq!((cpu.state.x87.fsw, cpu.state.x87.ftw), (before.x87.fsw, before.x87.ftw), "{text}");
        assert_eq!(read::<64>(&cpu, 0x5000 - 64), memory, "{text}");
    }
}

/// One SIMD instruction under MXCSR: what it raises, and the flags it leaves.
fn simd(code: &[u8], mxcsr: u32, operands: [u64; 2]) -> (Option<u8>, u32, u64) {
    let mut cpu = cpu();
    cpu.state.vector.mxcsr = mxcsr;
    cpu.state.vector.ymm[1][..8].copy_from_slice(&operands[0].to_le_bytes());
    cpu.state.vector.ymm[2][..8].copy_from_slice(&operands[1].to_le_bytes());
    let fault = raised(&mut cpu, decode(code)).map(|f| f.0);
    let mut result = [0; 8];
    result.copy_from_slice(&cpu.state.vector.ymm[1][..8]);
    (fault, cpu.state.vector.mxcsr & 0x3f, u64::from_le_bytes(result))
}

#[test]
fn unmasked_floating_point_exceptions_keep_the_destination() {
    let table = instructions!(
        turtles_test_unmasked,
        "divsd xmm1, xmm2",
        "mulsd xmm1, xmm2",
        "addsd xmm1, xmm2",
        "maxsd xmm1, xmm2",
        "sqrtsd xmm1, xmm2",
    );
    let [div, mul, add, max, _] = [0, 1, 2, 3, 4].map(|i: usize| table[i].1);
    const ONE: u64 = 0x3ff0_0000_0000_0000;
    const HALF: u64 = 0x3fe0_0000_0000_0000;
    const TINY: u64 = 0x0010_0000_0000_0000;
    const SNAN: u64 = 0x7ff0_0000_0000_0001;
    let unmask = |flag: u32| 0x1f80 & !(flag << 7);
    let xm = Some(vector::XM);
    // Divide by zero, unmasked and masked.
    assert_eq!(simd(div, unmask(4), [ONE, 0]), (xm, 4, ONE));
    assert_eq!(simd(div, 0x1f80, [ONE, 0]), (None, 4, 0x7ff0_0000_0000_0000));
    // Another exception is unmasked: the masked response.
    assert_eq!(simd(div, unmask(1), [ONE, 0]), (None, 4, 0x7ff0_0000_0000_0000));
    // Invalid.
    assert_eq!(simd(add, unmask(1), [SNAN, ONE]), (xm, 1, SNAN));
    // An exact tiny result underflows only when underflow is unmasked; flushing to zero is then without effect.
    assert_eq!(simd(mul, 0x1f80, [TINY, HALF]), (None, 0, TINY / 2));
    assert_eq!(simd(mul, unmask(16), [TINY, HALF]), (xm, 16, TINY));
    assert_eq!(simd(mul, unmask(16) | 1 << 15, [TINY, HALF]), (xm, 16, TINY));
    // A denormal operand that passes through is no underflow; a denormal sum is.
    assert_eq!(simd(max, unmask(16), [TINY / 2, 0]), (None, 2, TINY / 2));
    assert_eq!(simd(add, unmask(16), [TINY / 2, 0]).0, xm);
    // An unmasked pre-computation exception hides the others.
    assert_eq!(simd(div, unmask(2), [TINY / 2, ONE]), (xm, 2, TINY / 2));
    // Inexact.
    assert_eq!(simd(div, unmask(32), [ONE, 0x4008_0000_0000_0000]), (xm, 32, ONE));
}

#[test]
fn without_osxmmexcpt_floating_point_exceptions_are_undefined_opcodes() {
    let table = instructions!(turtles_test_osxmmexcpt, "divsd xmm1, xmm2");
    let mut cpu = cpu();
    cpu.state.cr4 &= !cr4::OSXMMEXCPT;
    cpu.state.vector.mxcsr = 0x1d80;
    cpu.state.vector.ymm[1][7] = 0x3f;
    assert_eq!(raised(&mut cpu, decode(table[0].1)), Some((vector::UD, None)));
}

#[test]
fn ldmxcsr_refuses_reserved_bits() {
    let table = instructions!(turtles_test_ldmxcsr, "ldmxcsr [r8]");
    let insn = decode(table[0].1);
    let mut cpu = cpu();
    cpu.state.gpr.set(8, OPERAND);
    for (value, expected) in [(0x9fc0_u32, None), (0x1_1f80, Some((vector::GP, Some(0))))] {
        cpu.memory.write(OPERAND, &value.to_le_bytes());
        assert_eq!(raised(&mut cpu, insn), expected);
    }
    assert_eq!(cpu.state.vector.mxcsr, 0x9fc0);
}

#[test]
fn gathers_match_the_host_and_restart_after_faults() {
    let table = instructions!(
        turtles_test_gathers,
        "vpgatherdd ymm1, [r8 + ymm2 * 1], ymm3",
        "vpgatherdq ymm1, [r8 + xmm2 * 1], ymm3",
        "vpgatherqd xmm1, [r8 + ymm2 * 1], xmm3",
        "vpgatherqq xmm1, [r8 + xmm2 * 1], xmm3",
        "vgatherdps xmm1, [r8 + xmm2 * 1], xmm3",
        "vgatherqps xmm1, [r8 + xmm2 * 1], xmm3",
        "vgatherqpd ymm1, [r8 + ymm2 * 1], ymm3",
        "vgatherdpd xmm1, [r8 + xmm2 * 1], xmm3",
    );
    if !available() {
        println!("SKIP: the native oracle needs AVX2");
        return;
    }
    let mut cpu = cpu();
    let mut machine = Machine::new();
    let mut random = Random(7);
    for (text, code) in table {
        let insn = decode(code);
        for round in 0..50 {
            let mut memory = [0; 64];
            randomise(&mut cpu, &mut machine, &mut memory, &mut random);
            let size = if text.contains("gatherd") { 4 } else { 8 };
            for chunk in cpu.state.vector.ymm[2].chunks_exact_mut(size) {
                chunk.fill(0);
                chunk[0] = random.next() as u8 & 31;
            }
            machine.vector.ymm[2] = cpu.state.vector.ymm[2];
            compare_one(&mut cpu, &mut machine, memory, (text, code), insn, round);
        }
    }
    // The third of four elements is not there: the first two are loaded and leave the mask.
    let (_, code) = instructions!(turtles_test_gather_fault, "vpgatherdd xmm1, [r8 + xmm2 * 4], xmm3")[0];
    unmap(&mut cpu, 0x4000);
    cpu.memory.write(OPERAND, &[7; 64]);
    cpu.state.gpr.set(8, OPERAND);
    cpu.state.vector.ymm[1] = [0xee; 32];
    cpu.state.vector.ymm[3] = [0xff; 32];
    cpu.state.vector.ymm[2] = [0; 32];
    cpu.state.vector.ymm[2][8..12].copy_from_slice(&0x400_u32.to_le_bytes());
    assert_eq!(raised(&mut cpu, decode(code)).map(|f| f.0), Some(vector::PF));
    assert_eq!(cpu.fault.address, 0x4000);
    assert_eq!(cpu.state.vector.ymm[1][..16], [[7; 8], [0xee; 8]].concat());
    assert_eq!(cpu.state.vector.ymm[3][..16], [[0; 8], [0xff; 8]].concat());
}

#[test]
fn masked_moves_touch_selected_elements_only() {
    let table = instructions!(
        turtles_test_masked,
        "vpmaskmovd ymm1, ymm2, [r8]",
        "vpmaskmovq [r8], ymm2, ymm3",
        "vmaskmovps [r8], xmm2, xmm3",
        "vmaskmovpd xmm1, xmm2, [r8]",
    );
    compare(&table, 60);
    if !available() {
        return;
    }
    let mut cpu = cpu();
    unmap(&mut cpu, 0x5000);
    cpu.state.gpr.set(8, 0x5000 - 8);
    cpu.state.vector.ymm[2] = [0; 32];
    for (text, code) in &table {
        cpu.state.vector.ymm[2][7] = 0x80;
        assert_eq!(raised(&mut cpu, decode(code)), None, "{text}");
        cpu.state.vector.ymm[2][15] = 0x80;
        assert_eq!(raised(&mut cpu, decode(code)).map(|f| f.0), Some(vector::PF), "{text}");
        cpu.state.vector.ymm[2][15] = 0;
    }
}

#[test]
fn byte_masked_stores_write_selected_bytes() {
    let table = instructions!(
        turtles_test_maskmov,
        "maskmovdqu xmm1, xmm2",
        "vmaskmovdqu xmm1, xmm2",
        "maskmovq mm1, mm2"
    );
    for (text, code) in table {
        let mut cpu = cpu();
        cpu.memory.write(OPERAND, &[0x55; 16]);
        cpu.state.gpr.set(reg::RDI, OPERAND + 1);
        cpu.state.vector.ymm[1] = [0xab; 32];
        cpu.state.vector.ymm[2][..4].copy_from_slice(&[0x80, 0x7f, 0xff, 0]);
        cpu.state.x87.st[1][..8].fill(0xab);
        cpu.state.x87.st[2][..4].copy_from_slice(&[0x80, 0x7f, 0xff, 0]);
        assert_eq!(raised(&mut cpu, decode(code)), None, "{text}");
        assert_eq!(read::<5>(&cpu, OPERAND), [0x55, 0xab, 0x55, 0xab, 0x55], "{text}");
        let mmx = text.starts_with("maskmovq");
        assert_eq!(cpu.state.x87.ftw, if mmx { 0xff } else { 0 }, "{text}");
    }
}

#[test]
fn temporary_thunks_do_the_same() {
    let table = instructions!(turtles_test_temporary, "paddb xmm1, [r8]", "pshufd xmm4, xmm3, 0x1b");
    let mut cpu = cpu();
    cpu.state.gpr.set(8, OPERAND);
    cpu.memory.write(OPERAND, &[3; 16]);
    cpu.state.vector.ymm[1] = [4; 32];
    cpu.state.vector.ymm[3][..4].fill(9);
    for (_, code) in table {
        let insn = decode(code);
        let cold = Cold { insn, handler: super::run_temporary, data: 0 };
        assert_eq!(super::run_temporary(&mut cpu, &cold), Ok(()));
    }
    assert_eq!(cpu.state.vector.ymm[1], [[7; 16], [4; 16]].concat()[..]);
    assert_eq!(cpu.state.vector.ymm[4][..16], [[0; 12].as_slice(), &[9; 4]].concat());
}
