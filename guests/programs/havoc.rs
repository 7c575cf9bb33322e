//! A hypervisor that writes nonsense into its VMCS, EPT and lists and enters it, thousands of times: all must go on.
//!
//! What may happen to L2 is anything; what may not is that L1 or the machine stops. So L1 keeps out of harm by what it
//! leaves alone: the host-state area, lists whose failure is a VMX abort, states that nothing ends. L2 reaches no memory
//! but a playground, and no port.
#![no_std]
#![no_main]

use rt::mem::{self, PAGE};
use rt::report::{abort, equal, pass, skip};
use rt::vmx::control::{self, Group};
use rt::vmx::ept::{self, Ept};
use rt::vmx::exit::event;
use rt::vmx::{self, Control, Vm, field as f, vmread, vmwrite};
use rt::{check, cpu, l2, println};

const ROUNDS: u32 = 12_000;
/// Everything that anything nonsensical may point at.
const PLAYGROUND: u64 = mem::FREE + 0x10_0000;
const PAGES: u64 = 64;

/// splitmix64: every run is the same.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    /// A value of the kinds that rules look at.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.next(),
            1 => 1 << self.below(64),
            2 => !(1 << self.below(64)),
            3 => self.below(0x1_0000),
            4 => self.page(),
            _ => self.next() >> self.below(64),
        }
    }

    /// A page of the playground.
    fn page(&mut self) -> u64 {
        PLAYGROUND + self.below(PAGES) * PAGE
    }

    /// An address that a processor may write to: a page of the playground, or one that no entry takes.
    fn address(&mut self) -> u64 {
        match self.below(4) {
            0 => self.page() | 1 << (52 + self.below(12)),
            1 => self.page() + self.below(PAGE),
            _ => self.page(),
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    if !vmx::VMX.present() {
        pass("there is no VMX to upset");
        return skip("everything", "VMX");
    }
    if let Err(failure) = vmx::on() {
        abort(format_args!("VMXON: {failure}"));
    }
    let needed = [control::PREEMPTION_TIMER, control::ENABLE_EPT, control::UNCONDITIONAL_IO_EXITING];
    if let Some(missing) = needed.iter().find(|control| !control.available()) {
        return skip("everything", missing.name);
    }
    let mut random = Random(0x7475_7274_6c65_7321);
    let mut entered = 0;
    let mut reasons = 0u128;
    let safe = safe_ept();
    for _ in 0..ROUNDS {
        if let Some(reason) = round(&mut random, safe) {
            entered += 1;
            reasons |= 1 << (reason & 127);
        }
    }
    println!("{entered} of {ROUNDS} entries ended in an exit, for {} reasons", reasons.count_ones());
    check!("the machine has gone on", entered > 0, "no entry succeeded");
    survivors();
}

/// The hypervisor is what it was, and a good VMCS still works.
fn survivors() {
    let mut vm = Vm::fresh(l2!(["cpuid"]));
    let exit = vm.run();
    check!("a good VMCS is entered as before", exit.reason == vmx::reason::CPUID, "{exit}");
    equal("L1's CR8", cpu::cr8(), 0);
    equal("L1's FS base", cpu::rdmsr(cpu::MSR_FS_BASE), 0);
}

/// Everything may be read and executed; the playground may be written.
fn safe_ept() -> Ept {
    let ept = Ept::identity();
    for gib in 0..4 {
        for i in 0..512u64 {
            let at = ept.entry_at(gib << 30 | i << 21, 2);
            mem::write(at, mem::read::<u64>(at) & !ept::W);
        }
    }
    for page in 0..PAGES {
        ept.permit(PLAYGROUND + page * PAGE, ept::RWX);
    }
    ept
}

/// One VMCS: good but for what chance changes. The exit reason, if L2 was entered.
fn round(random: &mut Random, safe: Ept) -> Option<u32> {
    let code = l2!([
        "mov rax, cr0",
        "pushfq",
        "popfq",
        "mov [rsp - 8], rax",
        "rdtsc",
        "pause",
        "nop",
        "xor ecx, ecx",
        "vmcall"
    ]);
    let mut vm = Vm::fresh(code);
    shuffle(random);
    for _ in 0..random.below(4) {
        let (field, _) = f::ALL[random.below(f::ALL.len() as u64) as usize];
        change(random, field);
    }
    for _ in 0..random.below(3) {
        let control = control::ALL[random.below(control::ALL.len() as u64) as usize];
        flip(control);
    }
    vmwrite(f::GUEST_RSP, random.page() + 0x800);
    usual_suspects(random);
    vm.regs.rsi = random.page();
    vm.regs.rdi = random.page();
    vm.regs.rbx = random.page();
    keep_in_hand(random, &mut vm, safe);
    let exit = vm.enter().ok()?;
    // Often it is entered again as it is.
    if exit.reason >> 31 == 0 && random.one_in(2) {
        let _ = vm.enter();
    }
    Some(exit.reason & 0xffff)
}

/// Random bytes in a page of the playground: code, tables, lists, a virtual APIC.
fn shuffle(random: &mut Random) {
    let page = random.page();
    for i in 0..PAGE / 8 {
        let word = match random.below(3) {
            0 => random.next(),
            // An entry of EPT or of a list of pages that stays in the playground.
            1 => random.page() | random.below(0x1000),
            _ => 0,
        };
        mem::write(page + i * 8, word);
    }
}

fn change(random: &mut Random, field: u32) {
    let value = random.value();
    let value = match field {
        // L1's own state, and lists whose failure on exit is a VMX abort.
        f::HOST_ES..=f::HOST_TR | f::HOST_PAT..=f::HOST_PERF_GLOBAL_CTRL | f::HOST_SYSENTER_CS => return,
        f::HOST_CR0..=f::HOST_RIP | f::EXIT_MSR_LOAD_COUNT | f::EXIT_MSR_STORE_COUNT => return,
        // No MSR of a list is safe to load for L1; that the list fails is.
        f::ENTRY_MSR_LOAD_COUNT => random.below(2),
        // Nothing ends wait-for-SIPI.
        f::GUEST_ACTIVITY if value & 0xffff_ffff == 3 => return,
        f::EPT_POINTER => random.page() | value & 0xfff,
        f::IO_BITMAP_A..=f::VE_INFORMATION_ADDRESS if field != f::TSC_OFFSET => random.address(),
        f::VMCS_LINK_POINTER => random.address(),
        // L2's own page tables lie in the playground, or are L1's.
        f::GUEST_CR3 => random.address(),
        f::GUEST_RIP => random.page() + random.below(PAGE),
        _ => value,
    };
    vmwrite(field, value);
}

/// What chance alone would seldom hit: events to inject, code in the playground, blocking, debug exceptions.
fn usual_suspects(random: &mut Random) {
    if random.one_in(3) {
        let event = event::VALID | random.below(8) as u32 * event::NMI / 2 | random.below(256) as u32;
        let event = if random.one_in(2) { event & !0xe0 } else { event };
        let error = if random.one_in(3) { event::ERROR_CODE } else { 0 };
        vmwrite(f::ENTRY_INTERRUPTION, (event | error).into());
        vmwrite(f::ENTRY_INSTRUCTION_LENGTH, random.below(4));
        vmwrite(f::GUEST_RFLAGS, 2 | random.below(2) << 9 | random.below(2) << 8);
    }
    if random.one_in(3) {
        vmwrite(f::GUEST_RIP, random.page() + random.below(PAGE));
        vmwrite(f::EXCEPTION_BITMAP, random.next() & 0xffff_ffff);
    }
    if random.one_in(5) {
        vmwrite(f::GUEST_INTERRUPTIBILITY, random.below(16));
        vmwrite(f::GUEST_PENDING_DEBUG, random.next() & 0x5_500f);
        vmwrite(f::GUEST_ACTIVITY, random.below(3));
    }
    if random.one_in(4) {
        vmwrite(f::EPT_POINTER, random.page() | 0x1e | random.below(2) << 6);
    }
}

fn flip(control: Control) {
    let field = control.group.field();
    let value = vmread(field) ^ u64::from(control.mask);
    vmwrite(field, value);
    if control.group == Group::Secondary {
        vmwrite(
            f::PRIMARY_CONTROLS,
            vmread(f::PRIMARY_CONTROLS) | u64::from(control::ACTIVATE_SECONDARY.mask),
        );
    }
}

/// L2 comes back soon, and reaches nothing but the playground.
fn keep_in_hand(random: &mut Random, vm: &mut Vm, safe: Ept) {
    vm.set(&[control::PREEMPTION_TIMER, control::UNCONDITIONAL_IO_EXITING, control::ENABLE_EPT]);
    vm.unset(&[control::USE_IO_BITMAPS, control::USE_MSR_BITMAPS]);
    vmwrite(f::PREEMPTION_TIMER_VALUE, random.below(4000));
    let pointer = vmread(f::EPT_POINTER);
    let garbage = pointer != 0 && random.one_in(2);
    if !garbage {
        vmwrite(f::EPT_POINTER, safe.pointer() | pointer & 1 << 6);
    }
    // An MSR that L1 does not use.
    let list = vmread(f::ENTRY_MSR_LOAD_ADDRESS);
    if vmread(f::ENTRY_MSR_LOAD_COUNT) != 0 && list & 15 == 0 && list >> 52 == 0 {
        mem::write(list.max(PLAYGROUND), [u64::from(cpu::MSR_CSTAR), random.next()]);
        vmwrite(f::ENTRY_MSR_LOAD_ADDRESS, list.max(PLAYGROUND));
    }
}
