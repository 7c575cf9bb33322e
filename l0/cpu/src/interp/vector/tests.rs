//! Every class of vector instruction against the host: the same instruction, executed natively with other
//! registers and memory around it.

use iced_x86::{Decoder, DecoderOptions};
use x86defs::{cr0, cr4, segment, vector, xcr0};

use crate::Cpu;
use crate::interp::host_compare::{
    MEMORY, OPERAND, Random, compare, compare_one, compare_random, cpu, decode, raised, randomise, read,
    unmap,
};
use crate::native::FeatureSet;
use crate::native::oracle::{Machine, available, instructions};
use crate::op::Cold;
use crate::state::{Seg, Segment, reg};

#[test]
fn random_encodings_match_the_host() {
    compare_random(0x5eed, 200_000);
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
        randomise(&mut cpu, &mut Machine::new(), &mut [0; MEMORY], &mut random);
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
            let mut memory = [0; MEMORY];
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

#[test]
fn outside_64_bit_mode_operands_go_through_segments() {
    // paddb xmm1, [ebx]; movups [ebx], xmm1; fild word [ebx]
    let codes: [&[u8]; 3] = [&[0x66, 0x0f, 0xfc, 0x0b], &[0x0f, 0x11, 0x0b], &[0xdf, 0x03]];
    let mut cpu = cpu();
    cpu.state.seg_mut(Seg::Cs).access = 0x9b | segment::DB;
    *cpu.state.seg_mut(Seg::Ds) = Segment { base: 0x1000, limit: 0x2fff, access: 0x93, selector: 16 };
    cpu.state_changed();
    cpu.memory.write(OPERAND, &[5; 16]);
    cpu.state.gpr.set(reg::RBX, 0xffff_ffff_0000_0000 | (OPERAND - 0x1000));
    cpu.state.vector.ymm[1] = [1; 32];
    let insn = |code| Decoder::new(32, code, DecoderOptions::NONE).decode();
    for code in codes {
        assert_eq!(raised(&mut cpu, insn(code)), None, "{code:02x?}");
    }
    assert_eq!(cpu.state.vector.ymm[1], [[6; 16], [1; 16]].concat()[..]);
    assert_eq!(read::<16>(&cpu, OPERAND), [6; 16]);
    assert_eq!(cpu.state.x87.st[0][..10], [0, 0, 0, 0, 0, 0, 0xc0, 0xc0, 0x09, 0x40]);
    cpu.state.gpr.set(reg::RBX, 0x2fff);
    for code in codes {
        assert_eq!(raised(&mut cpu, insn(code)), Some((vector::GP, Some(0))), "{code:02x?} past the limit");
    }
}
