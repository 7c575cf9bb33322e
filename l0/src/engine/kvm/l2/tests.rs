//! L2 on KVM and L2 in the software CPU must show L1 the same: the same exits with the same information, the same
//! registers and memory. Where /dev/kvm cannot be opened, these say SKIP.

use turtles_cpu::Exit;
use turtles_cpu::attention::Attention;
use turtles_cpu::state::{CpuState, Seg, Segment, TableRegister, reg};
use turtles_cpu::vmx::{Controls, VmExit};
use x86defs::vmx::{pin, primary, reason, secondary};
use x86defs::{cr0, cr4, efer, paging, rflags};

use crate::engine::kvm::Share;
use crate::engine::kvm::tests::{Machine, flat, machine_with};
use crate::nested::second_level::CombinedTables;

/// EPT12 in L1's memory. L2's 2 MiB are L1's from `L2_AT` on, in pages of 4 KiB.
const EPT: u64 = 0x10_000;
const L2_AT: u64 = 0x20_0000;
const LOG: u64 = 0x1f_000;
/// Bits of EPT entries.
const RWX: u64 = 7;
const WRITE_BACK: u64 = 6 << 3;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const EPTP: u64 = EPT | 0x1e;
const FLAGS: u64 = 1 << 6;

/// L2's own memory.
const CODE: u64 = 0x1000;
const HANDLERS: u64 = 0x2000;
const IDT: u64 = 0x3000;
const PML4: u64 = 0x4000;
const GDT: u64 = 0x7000;
const STACK: u64 = 0x9000;
const TSS: u64 = 0xa000;
const DATA: u64 = 0x10_000;

/// What L1 asks for.
type Asked = fn(&mut Controls);
/// The EPT entry of a page.
type Leaf = fn(u64) -> u64;

struct L2 {
    m: Machine,
    controls: Controls,
}

impl L2 {
    /// L2 in 64-bit ring 3 at `CODE`; every vector and SYSCALL lead to a HLT in ring 0, which exits.
    fn new(code: &[u8]) -> Option<Self> {
        let m = machine_with(Share::User)?;
        let controls = Controls {
            pin: pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING,
            primary: primary::HLT_EXITING
                | primary::USE_TSC_OFFSETTING
                | primary::UNCONDITIONAL_IO_EXITING
                | primary::ACTIVATE_SECONDARY,
            secondary: secondary::ENABLE_EPT | secondary::ENABLE_VPID | secondary::UNRESTRICTED_GUEST,
            tsc_offset: 0x1234_5678_0000_0000,
            tsc_multiplier: 1 << 48,
            ept_pointer: EPTP,
            vpid_tag: 1,
            ..Controls::default()
        };
        let mut this = Self { m, controls };
        this.tables();
        this.memory(code);
        this.start();
        Some(this)
    }

    fn tables(&self) {
        for level in 0..3 {
            self.m.put64(EPT + 0x1000 * level, (EPT + 0x1000 * (level + 1)) | RWX);
        }
        for page in 0..512 {
            self.leaf(page, (L2_AT + (page << 12)) | WRITE_BACK | RWX);
        }
    }

    /// The entry for one page of L2's.
    fn leaf(&self, page: u64, entry: u64) {
        self.m.put64(EPT + 0x3000 + 8 * page, entry);
    }

    fn entry(&self, page: u64) -> u64 {
        self.m.get64(EPT + 0x3000 + 8 * page)
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.m.put(L2_AT + gpa, bytes);
    }

    fn put64(&self, gpa: u64, value: u64) {
        self.m.put64(L2_AT + gpa, value);
    }

    fn get64(&self, gpa: u64) -> u64 {
        self.m.get64(L2_AT + gpa)
    }

    fn memory(&mut self, code: &[u8]) {
        self.put(CODE, code);
        let entry = paging::PRESENT | paging::WRITE | paging::USER;
        self.put64(PML4, (PML4 + 0x1000) | entry);
        self.put64(PML4 + 0x1000, (PML4 + 0x2000) | entry);
        for large in 0..4 {
            self.put64(PML4 + 0x2000 + 8 * large, large << 21 | entry | paging::LARGE);
        }
        for vector in 0..128u64 {
            let at = HANDLERS + 2 * vector;
            self.put(at, &[0xf4, 0x90]);
            let dpl = if vector == 3 || vector == 0x40 { 0xee } else { 0x8e };
            self.put64(IDT + 16 * vector, at & 0xffff | 8 << 16 | dpl << 40);
        }
        self.put(HANDLERS + 0x200, &[0xf4]);
        for (index, value) in [
            (1, 0x00af_9b00_0000_ffff),
            (2, 0x00cf_9300_0000_ffff),
            (5, 0x00cf_f300_0000_ffff),
            (6, 0x00af_fb00_0000_ffff),
        ] {
            self.put64(GDT + 8 * index, value);
        }
        self.put64(TSS + 4, STACK);
    }

    fn state() -> CpuState {
        let mut state = CpuState::reset();
        state.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP | cr0::MP;
        state.cr3 = PML4;
        state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        state.efer = efer::LME | efer::LMA | efer::SCE;
        state.segments = [flat(0xc0f3, 0x2b); 6];
        *state.seg_mut(Seg::Cs) = flat(0xa0fb, 0x33);
        state.gdtr = TableRegister { base: GDT, limit: 0x3f };
        state.idtr = TableRegister { base: IDT, limit: 16 * 128 - 1 };
        state.tr = Segment { base: TSS, limit: 0x67, access: 0x8b, selector: 0x38 };
        state.msrs.lstar = HANDLERS + 0x200;
        state.msrs.star = 8 << 32 | 0x23 << 48;
        state.rip = CODE;
        state.cpl = 3;
        state.gpr.set(reg::RSP, STACK - 0x800);
        state.set_rflags(rflags::IF);
        state
    }

    fn start(&mut self) {
        let mut tables = CombinedTables::new(&vmcs_shadow::caps::Capabilities::default());
        tables.select(self.controls.ept_pointer, false, None);
        self.m.cpu.vmx.second_level = Some(Box::new(tables));
        self.m.set(Self::state());
        self.enter();
    }

    fn with(mut self, change: impl FnOnce(&mut Controls)) -> Self {
        change(&mut self.controls);
        self.start();
        self
    }

    fn tables_of(&mut self) -> &mut CombinedTables {
        let second = self.m.cpu.vmx.second_level.as_mut().unwrap();
        second.as_any().downcast_mut().unwrap()
    }

    /// VM entry, as the nested code does it.
    fn enter(&mut self) {
        self.m.cpu.enter_non_root(self.controls.clone());
    }

    /// On KVM where that is possible.
    fn on_kvm(&mut self) -> (Exit, VmExit) {
        for _ in 0..100 {
            let exit = self.m.run();
            if exit != Exit::Budget {
                return (exit, self.m.cpu.vmx.exit);
            }
        }
        (Exit::Budget, VmExit::default())
    }

    fn in_software(&mut self) -> (Exit, VmExit) {
        (self.m.cpu.run(100_000_000), self.m.cpu.vmx.exit)
    }

    fn stretches(&self) -> u64 {
        self.m.vcpu.l2_stats().stretches
    }

    /// Everything that L1 could see of L2, less times: RIP, RFLAGS, CR2, CPL and registers, and memory.
    fn outcome(&self) -> (Vec<u64>, Vec<u8>) {
        let s = &self.m.cpu.state;
        let mut memory = vec![0; 0x20_0000];
        self.m.cpu.memory().read(L2_AT, &mut memory);
        let vectors = s.vector.ymm.iter().flat_map(|ymm| ymm.chunks_exact(8));
        let vectors = vectors.map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()));
        let registers = [s.rip, s.rflags(), s.cr2, u64::from(s.cpl)];
        let registers = registers.into_iter().chain((0..16).map(|i| s.gpr.get(i))).chain(vectors).collect();
        (registers, memory)
    }
}

/// A loop that KVM gets to see, then `end`.
fn after_a_loop(end: &[u8]) -> Vec<u8> {
    // mov ecx,400000; 1: dec ecx; jnz 1b
    let mut code = vec![0xb9, 0x80, 0x1a, 0x06, 0, 0xff, 0xc9, 0x75, 0xfc];
    code.extend_from_slice(end);
    code
}

/// Runs `code` both ways; says what differs.
fn compare(name: &str, code: &[u8], change: impl Fn(&mut Controls), prepare: impl Fn(&L2)) -> Option<String> {
    let mut kvm = L2::new(code)?.with(&change);
    let mut soft = L2::new(code)?.with(&change);
    prepare(&kvm);
    prepare(&soft);
    let (on_kvm, in_software) = (kvm.on_kvm(), soft.in_software());
    if kvm.m.vcpu.host().ring3_leaks() == ["everything"] {
        println!("SKIP kvm: nothing of L2 can run on this KVM");
        return None;
    }
    let same_exit = format!("{on_kvm:?}") == format!("{in_software:?}");
    let (a, b) = (kvm.outcome(), soft.outcome());
    if same_exit && a == b && kvm.stretches() > 0 {
        return None;
    }
    let differs: Vec<_> = a.1.iter().zip(&b.1).enumerate().filter(|(_, (a, b))| a != b).take(8).collect();
    Some(format!(
        "{name}: {:?}\n kvm  {on_kvm:x?}\n      {:x?}\n soft {in_software:x?}\n      {:x?}\n memory {differs:x?}",
        kvm.m.vcpu.l2_stats(),
        &a.0[..20],
        &b.0[..20],
    ))
}

#[test]
fn whatever_ring_3_does_l1_sees_the_same_exit() {
    let cases: &[(&str, &[u8])] = &[
        ("UD2", &[0x0f, 0x0b]),
        ("INT3", &[0xcc]),
        ("INT 3 in two bytes", &[0xcd, 3]),
        ("INT n with DPL 3", &[0xcd, 0x40]),
        ("INT n with DPL 0", &[0xcd, 0x41]),
        ("HLT", &[0xf4]),
        ("IN", &[0xe4, 0x10]),
        ("OUTS", &[0x6e]),
        ("SYSCALL", &[0x0f, 0x05]),
        ("VMCALL", &[0x0f, 0x01, 0xc1]),
        ("VMMCALL", &[0x0f, 0x01, 0xd9]),
        ("VMRESUME", &[0x0f, 0x01, 0xc3]),
        ("VMFUNC", &[0x0f, 0x01, 0xd4]),
        ("RDMSR", &[0x0f, 0x32]),
        ("RDPMC", &[0x0f, 0x33]),
        ("MOV from CR8", &[0x44, 0x0f, 0x20, 0xc0]),
        ("MOV to DR7", &[0x0f, 0x23, 0xf8]),
        ("INVLPG", &[0x0f, 0x01, 0x38]),
        ("WBINVD", &[0x0f, 0x09]),
        ("XSETBV", &[0x0f, 0x01, 0xd1]),
        ("MWAIT", &[0x0f, 0x01, 0xc9]),
        ("#DE", &[0x31, 0xc9, 0x48, 0xf7, 0xf1]),
        ("#PF", &[0x48, 0xa1, 0, 0, 0, 0, 0x12, 0, 0, 0]),
        ("an address without EPT entry", &[0x8a, 0x04, 0x25, 0, 0, 0x30, 0]),
        ("a write there", &[0x88, 0x04, 0x25, 7, 0, 0x30, 0]),
        ("a jump there", &[0xb8, 0, 0, 0x30, 0, 0xff, 0xe0]),
        ("TF by POPF, NOP", &[0x68, 2, 3, 0, 0, 0x9d, 0x90, 0x90]),
        ("TF by POPF, UD2", &[0x68, 2, 3, 0, 0, 0x9d, 0x0f, 0x0b]),
        ("PUSHF", &[0x9c, 0x58, 0x0f, 0x0b]),
        ("MOV DS, 0; UD2", &[0x31, 0xc0, 0x8e, 0xd8, 0x0f, 0x0b]),
        ("PSHUFD; UD2", &[0x66, 0x0f, 0x76, 0xc0, 0x66, 0x0f, 0x70, 0xc8, 0x1b, 0x0f, 0x0b]),
    ];
    let asked: &[(&str, Asked)] = &[
        ("", |_| {}),
        (", exceptions exit", |c| c.exception_bitmap = !0),
        (", page faults do not", |c| (c.exception_bitmap, c.page_fault_mask) = (!(1 << 14), 0)),
    ];
    let Some(l2) = L2::new(&[0x0f, 0x0b]) else { return };
    let leaks = l2.m.vcpu.host().ring3_leaks();
    let mut wrong = Vec::new();
    for (name, end) in cases.iter().filter(|(name, _)| !leaks.contains(name)) {
        for (what, change) in asked {
            wrong.extend(compare(&format!("{name}{what}"), &after_a_loop(end), change, |_| {}));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn reading_what_the_host_must_not_show() {
    let Some(l2) = L2::new(&[0x0f, 0x0b]) else { return };
    let leaks = l2.m.vcpu.host().ring3_leaks();
    println!("ring 3 of L2 does unseen on this KVM: {leaks:?}");
    let cases: &[(&str, &[u8])] = &[
        ("CPUID", &[0x0f, 0xa2]),
        ("RDTSC", &[0x0f, 0x31]),
        ("RDTSCP", &[0x0f, 0x01, 0xf9]),
        ("RDPID", &[0xf3, 0x0f, 0xc7, 0xf8]),
        ("SGDT", &[0x0f, 0x01, 0x04, 0x24]),
        ("SIDT", &[0x0f, 0x01, 0x0c, 0x24]),
        ("SMSW", &[0x0f, 0x01, 0xe0]),
    ];
    let asked = |c: &mut Controls| {
        c.exception_bitmap = !0;
        c.primary |= primary::RDTSC_EXITING;
        c.secondary |= secondary::DESCRIPTOR_TABLE_EXITING;
    };
    let mut wrong = Vec::new();
    for (name, bytes) in cases.iter().filter(|(name, _)| !leaks.contains(name)) {
        let code = after_a_loop(&[*bytes, &[0x0f, 0x0b]].concat());
        wrong.extend(compare(name, &code, asked, |_| {}));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// `mov esi,DATA; mov ecx,100; 1: inc dword [rsi]; add esi,4096; dec ecx; jnz 1b` over 100 pages, `times` times, and UD2.
fn over_pages(times: u32) -> Vec<u8> {
    let mut code = vec![0xbb];
    code.extend(times.to_le_bytes());
    code.extend([0xbe, 0, 0, 1, 0, 0xb9, 100, 0, 0, 0]);
    code.extend([0xff, 0x06, 0x81, 0xc6, 0, 0x10, 0, 0, 0xff, 0xc9, 0x75, 0xf4, 0xff, 0xcb, 0x75, 0xe6]);
    code.extend([0x0f, 0x0b]);
    code
}

#[test]
fn memory_of_every_kind_of_mapping() {
    let page = DATA >> 12;
    let kinds: &[(&str, Leaf)] = &[
        ("as they are", |i| (L2_AT + (i << 12)) | WRITE_BACK | RWX),
        ("backwards", |i| (L2_AT + ((300 - i) << 12)) | WRITE_BACK | RWX),
        ("all the same", |_| (L2_AT + 0x1f_0000) | WRITE_BACK | RWX),
        ("read-only in the middle", |i| (L2_AT + (i << 12)) | WRITE_BACK | if i == 50 { 5 } else { RWX }),
        ("not executable", |i| (L2_AT + (i << 12)) | WRITE_BACK | 3),
        ("missing in the middle", |i| if i == 70 { 0 } else { (L2_AT + (i << 12)) | WRITE_BACK | RWX }),
        ("misconfigured in the middle", |i| (L2_AT + (i << 12)) | WRITE_BACK | if i == 71 { 2 } else { RWX }),
        ("not RAM in the middle", |i| {
            (if i == 72 { 0x4000_0000 } else { L2_AT + (i << 12) }) | WRITE_BACK | RWX
        }),
    ];
    let mut wrong = Vec::new();
    for (name, kind) in kinds {
        for flags in [0, FLAGS] {
            let change = |c: &mut Controls| {
                c.ept_pointer |= flags;
                c.exception_bitmap = !0;
            };
            let prepare = |l2: &L2| (page..page + 100).for_each(|i| l2.leaf(i, kind(i)));
            wrong.extend(compare(&format!("{name} {flags:#x}"), &over_pages(20), change, prepare));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn ept_flags_and_the_log_are_kept() {
    let Some(mut l2) = L2::new(&over_pages(3)) else { return };
    l2.controls.ept_pointer |= FLAGS;
    l2.controls.exception_bitmap = !0;
    l2.start();
    l2.tables_of().select(EPTP | FLAGS, false, Some((LOG, 150)));
    assert_eq!(l2.on_kvm().1.reason, reason::EXCEPTION_OR_NMI);
    for page in 0..100 {
        assert_eq!(l2.entry((DATA >> 12) + page) & (ACCESSED | DIRTY), ACCESSED | DIRTY, "page {page}");
    }
    assert_eq!(l2.entry((DATA >> 12) + 120) & (ACCESSED | DIRTY), 0);
    let index = l2.tables_of().log_index();
    let logged: Vec<_> = (index.unwrap_or(0) + 1..=150).map(|i| l2.m.get64(LOG + 8 * u64::from(i))).collect();
    for page in 0..100 {
        assert_eq!(logged.iter().filter(|&&gpa| gpa == DATA + (page << 12)).count(), 1, "page {page}");
    }
}

#[test]
fn invept_takes_effect_and_what_is_no_longer_there_is_missed() {
    let Some(mut l2) = L2::new(&over_pages(3)) else { return };
    l2.controls.exception_bitmap = !0;
    l2.start();
    assert_eq!(l2.on_kvm().1.reason, reason::EXCEPTION_OR_NMI);
    assert_eq!(l2.get64(DATA + 5 * 4096), 3);
    let page = (DATA >> 12) + 5;
    l2.leaf(page, (L2_AT + 0x1f_0000) | WRITE_BACK | RWX);
    l2.tables_of().invalidate_context(EPTP);
    l2.m.cpu.invalidate(|_| true);
    l2.m.set(L2::state());
    l2.enter();
    assert_eq!(l2.on_kvm().1.reason, reason::EXCEPTION_OR_NMI);
    assert_eq!((l2.get64(DATA + 5 * 4096), l2.get64(0x1f_0000), l2.get64(DATA)), (3, 3, 6));
    l2.leaf(page, 0);
    l2.tables_of().invalidate_all();
    l2.m.cpu.invalidate(|_| true);
    l2.m.set(L2::state());
    l2.enter();
    let exit = l2.on_kvm().1;
    assert_eq!((exit.reason, exit.guest_physical), (reason::EPT_VIOLATION, DATA + 5 * 4096));
    assert!(l2.stretches() > 0);
}

#[test]
fn roots_have_memory_of_their_own_and_keep_it() {
    let Some(mut l2) = L2::new(&over_pages(2)) else { return };
    l2.controls.exception_bitmap = !0;
    // A second root, whose pages lie 1 MiB further.
    let second = EPT + 0x8000;
    for level in 0..3 {
        l2.m.put64(second + 0x1000 * level, (second + 0x1000 * (level + 1)) | RWX);
    }
    for page in 0..512u64 {
        let to = if page < 16 { page } else { (page + 128) & 511 };
        l2.m.put64(second + 0x3000 + 8 * page, (L2_AT + (to << 12)) | WRITE_BACK | RWX);
    }
    for round in 1..4u64 {
        for root in [EPT, second] {
            l2.controls.ept_pointer = root | 0x1e;
            if round == 1 && root == EPT {
                l2.start();
            }
            l2.tables_of().select(root | 0x1e, false, None);
            l2.m.set(L2::state());
            l2.enter();
            assert_eq!(l2.on_kvm().1.reason, reason::EXCEPTION_OR_NMI);
        }
        assert_eq!((l2.get64(DATA), l2.get64(DATA + 0x8_0000)), (2 * round, 2 * round));
    }
    assert!(l2.m.vcpu.l2_stats().guests <= 2);
}

#[test]
fn code_that_writes_to_itself() {
    // mov ecx,300; 1: inc dword [rip+1] (the immediate of the next instruction); mov eax,0; add ebx,eax; dec ecx; jnz 1b
    let code = [
        0xb9, 0x2c, 1, 0, 0, 0xff, 0x05, 1, 0, 0, 0, 0xb8, 0, 0, 0, 0, 0x01, 0xc3, 0xff, 0xc9, 0x75, 0xef,
        0x0f, 0x0b,
    ];
    let wrong = compare("self-modifying", &code, |c| c.exception_bitmap = !0, |_| {});
    assert!(wrong.is_none(), "{}", wrong.unwrap_or_default());
}

#[test]
fn an_nmi_and_an_interrupt_end_a_loop_without_end() {
    for bits in [Attention::NMI, Attention::INTERRUPT] {
        let Some(mut l2) = L2::new(&[0xeb, 0xfe]) else { return };
        let signal = std::sync::Arc::clone(&l2.m.signal);
        let (exit, information) = std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(30));
                signal.raise(bits);
            });
            l2.on_kvm()
        });
        let expected =
            if bits == Attention::NMI { reason::EXCEPTION_OR_NMI } else { reason::EXTERNAL_INTERRUPT };
        assert_eq!((exit, information.reason), (Exit::Vm, expected));
        assert_eq!(l2.m.cpu.state.rip, CODE);
        assert!(l2.stretches() > 0);
    }
}

#[test]
fn controls_that_cannot_be_honoured_on_kvm_keep_l2_off_it() {
    let asked: &[fn(&mut Controls)] = &[
        |c| c.primary |= primary::PAUSE_EXITING,
        |c| c.primary |= primary::MONITOR_TRAP_FLAG,
        |c| c.secondary |= secondary::RDRAND_EXITING,
        |c| c.secondary |= secondary::RDSEED_EXITING,
    ];
    for change in asked {
        let Some(l2) = L2::new(&after_a_loop(&[0xf3, 0x90, 0x0f, 0x0b])) else { return };
        let mut l2 = l2.with(change);
        assert_eq!(l2.on_kvm().0, Exit::Vm);
        assert_eq!(l2.stretches(), 0);
    }
}

/// For people: what L2's ring 3 costs on KVM and in the software CPU. `cargo test --release -- --ignored --nocapture l2`
#[test]
#[ignore = "prints times, proves nothing"]
fn figures() {
    // mov ecx,N; 1: imul eax,eax,7; add eax,ecx; dec ecx; jnz 1b; vmcall
    const TURNS: u32 = 200_000_000;
    let mut code = vec![0xb9];
    code.extend(TURNS.to_le_bytes());
    code.extend([0x6b, 0xc0, 7, 0x01, 0xc8, 0xff, 0xc9, 0x75, 0xf7, 0x0f, 0x01, 0xc1]);
    let Some(mut kvm) = L2::new(&code) else { return };
    let Some(mut soft) = L2::new(&code) else { return };
    soft.m.cpu.set_translate(true);
    let time = |run: &mut dyn FnMut()| {
        let start = std::time::Instant::now();
        run();
        start.elapsed()
    };
    let on_kvm = time(&mut || assert_eq!(kvm.on_kvm().1.reason, reason::VMCALL));
    let in_software = time(&mut || {
        while soft.m.cpu.run(100_000_000) == Exit::Budget {}
    });
    let native = time(&mut || {
        // SAFETY: the same loop, which changes the two registers that it is given.
        unsafe {
            std::arch::asm!("2: imul {a:e}, {a:e}, 7", "add {a:e}, {c:e}", "dec {c:e}", "jnz 2b",
                a = inout(reg) 0u32 => _, c = inout(reg) TURNS => _, options(nomem, nostack));
        }
    });
    println!("{TURNS} turns: KVM {on_kvm:?}, software CPU {in_software:?}, this process {native:?}");
    println!("{:?}", kvm.m.vcpu.l2_stats());
    let Some(mut l2) = L2::new(&over_pages(1)) else { return };
    l2.controls.exception_bitmap = !0;
    l2.start();
    let took = time(&mut || assert_eq!(l2.on_kvm().1.reason, reason::EXCEPTION_OR_NMI));
    let stats = l2.m.vcpu.l2_stats();
    println!("100 pages met one by one: {took:?}, {stats:?}");
    // vmcall; jmp back: every exit is one stretch, where L2 goes to KVM at once.
    let Some(mut l2) = L2::new(&[0x0f, 0x01, 0xc1]) else { return };
    let exits = 1000;
    let before = l2.on_kvm();
    assert_eq!(before.1.reason, reason::VMCALL);
    let first = l2.stretches();
    let took = time(&mut || {
        for _ in 0..exits {
            l2.enter();
            assert_eq!(l2.on_kvm().1.reason, reason::VMCALL);
        }
    });
    println!("{exits} exits: {:?} each, {} entries of KVM", took / exits, l2.stretches() - first);
}
