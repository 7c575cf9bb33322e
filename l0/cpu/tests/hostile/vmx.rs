//! The same in VMX operation: random code as a hypervisor, and as a guest under random controls over a second level of
//! translation that refuses at random, with an owner that completes, injects, resumes and re-enters at random.

use std::any::Any;
use std::sync::Arc;

use turtles_cpu::attention::Attention;
use turtles_cpu::bus::{Bus, MsrRefused};
use turtles_cpu::cpuid::CpuModel;
use turtles_cpu::phys::PhysMemory;
use turtles_cpu::state::{Activity, CpuState, Event, EventKind, Seg, Shadow};
use turtles_cpu::trap::Fault;
use turtles_cpu::vmx::{Controls, EptAccess, EptFault, EptPage, Operation, SecondLevel};
use turtles_cpu::{Cpu, Exit};
use vmcs_shadow::Vmcs;
use x86defs::vmx::{event, exit_ctl, pin, primary, reason, secondary};
use x86defs::{cr0, cr4, dr};

use crate::guest::{self, PAGE};
use crate::{MODES, Mode, RAM, Random, TICKS, cases, check, prepare, report};

/// Devices that answer at random.
struct Noise(Random);

impl Bus for Noise {
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(self.0.next() as u8);
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) {}
    fn port_read(&mut self, _: u16, data: &mut [u8]) {
        data.fill(self.0.next() as u8);
    }
    fn port_write(&mut self, _: u16, _: &[u8]) {}
    fn read_msr(&mut self, _: u32) -> Result<u64, MsrRefused> {
        if self.0.one_in(2) { Ok(self.0.next()) } else { Err(MsrRefused) }
    }
    fn write_msr(&mut self, _: u32, _: u64) -> Result<(), MsrRefused> {
        if self.0.one_in(2) { Ok(()) } else { Err(MsrRefused) }
    }
    fn cr8(&mut self) -> u8 {
        self.0.next() as u8 & 15
    }
    fn set_cr8(&mut self, _: u8) {}
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        (!self.0.one_in(4)).then(|| self.0.next() as u8 | 0x10)
    }
    fn tsc(&mut self, ticks: u64) -> u64 {
        ticks
    }
}

/// Maps pages to themselves, and refuses by a page's number.
struct Level {
    salt: u64,
}

impl SecondLevel for Level {
    fn translate(&mut self, _: &PhysMemory, gpa: u64, access: EptAccess) -> Result<EptPage, EptFault> {
        let mood = ((gpa >> 12) ^ self.salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
        match mood {
            0 => return Err(EptFault::Misconfiguration),
            1 => return Err(EptFault::LogFull),
            2..=5 => return Err(EptFault::Violation { allowed: 0, suppress_ve: mood & 1 != 0 }),
            6..=9 if access.write => return Err(EptFault::Violation { allowed: 8, suppress_ve: false }),
            _ => {}
        }
        Ok(EptPage {
            physical: gpa & !(PAGE - 1),
            large: mood & 0x10 != 0,
            write: mood > 9,
            execute_supervisor: mood & 0x60 != 0,
            execute_user: mood & 0x60 != 0x20,
        })
    }
    fn peek(&self, _: &PhysMemory, gpa: u64) -> Option<u64> {
        Some(gpa)
    }
    fn set_root(&mut self, pointer: u64) -> bool {
        self.salt = pointer;
        pointer & 1 == 0
    }
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}

fn bits32(random: &mut Random, bits: &[u32]) -> u32 {
    let rare = random.one_in(2);
    bits.iter()
        .filter(|_| if rare { random.one_in(8) } else { random.one_in(2) })
        .fold(0, |sum, bit| sum | bit)
}

fn random_controls(random: &mut Random) -> Controls {
    use primary as p;
    use secondary as s;
    let mut pins =
        bits32(random, &[pin::EXTERNAL_INTERRUPT_EXITING, pin::NMI_EXITING, pin::PREEMPTION_TIMER]);
    if pins & pin::NMI_EXITING != 0 && random.one_in(2) {
        pins |= pin::VIRTUAL_NMIS;
    }
    if pins & pin::EXTERNAL_INTERRUPT_EXITING != 0 && random.one_in(3) {
        pins |= pin::POSTED_INTERRUPTS;
    }
    let bits = u32::from(random.next() as u16) << 16 | u32::from(random.next() as u16);
    let primary = bits
        & if random.one_in(2) { !0 } else { p::USE_MSR_BITMAPS | p::USE_IO_BITMAPS | p::USE_TSC_OFFSETTING }
        & !(p::HLT_EXITING | p::MONITOR_TRAP_FLAG)
        | bits32(random, &[p::HLT_EXITING, p::MONITOR_TRAP_FLAG, p::INTERRUPT_WINDOW_EXITING]);
    let secondary = random.next() as u32 | if random.one_in(4) { 0 } else { s::UNRESTRICTED_GUEST };
    Controls {
        pin: pins,
        primary,
        secondary,
        exit: if random.one_in(2) { exit_ctl::ACKNOWLEDGE_INTERRUPT } else { 0 },
        exception_bitmap: if random.one_in(2) { 0 } else { random.next() as u32 },
        page_fault_mask: random.next() as u32 & 0x1f,
        page_fault_match: random.next() as u32 & 0x1f,
        cr0_mask: random.next() & random.next(),
        cr0_shadow: random.next(),
        cr4_mask: random.next() & random.next(),
        cr4_shadow: random.next(),
        cr3_targets: [random.number(); 4],
        cr3_target_count: random.below(5) as u32,
        io_bitmaps: [random.address() & !4095, random.number() & !4095],
        msr_bitmap: random.address() & !4095,
        vmread_bitmap: random.address() & !4095,
        vmwrite_bitmap: random.number() & !4095,
        xss_exiting_bitmap: random.next(),
        tsc_offset: random.next(),
        tsc_multiplier: random.next(),
        apic_access_page: random.address() & !4095,
        virtual_apic_page: random.address() & !4095,
        tpr_threshold: random.below(16) as u32,
        eoi_exit_bitmap: [random.next(); 4],
        interrupt_status: random.next() as u16,
        posted_interrupt_vector: random.next() as u8,
        posted_interrupt_descriptor: random.address() & !63,
        ept_pointer: random.next(),
        vpid_tag: 1 + random.below(3) as u32,
        ple_gap: random.below(100) as u32,
        ple_window: random.below(1000) as u32,
        vm_function_controls: random.below(4),
        eptp_list: random.address() & !4095,
        eptp_index: random.next() as u16,
        ve_information: random.address() & !4095,
        preemption_deadline: random.below(4 * TICKS),
        pending_mtf: random.one_in(8),
    }
}

/// Any event that a VM entry may inject.
fn random_event(random: &mut Random, state: &CpuState) -> Event {
    let kind = random.pick(&[
        EventKind::ExternalInterrupt,
        EventKind::Nmi,
        EventKind::HardwareException,
        EventKind::SoftwareInterrupt,
        EventKind::PrivilegedSoftwareException,
        EventKind::SoftwareException,
    ]);
    let vector = match kind {
        EventKind::Nmi => 2,
        EventKind::HardwareException => random.below(32) as u8,
        EventKind::PrivilegedSoftwareException => 1,
        EventKind::SoftwareException => random.pick(&[3, 4]),
        EventKind::ExternalInterrupt | EventKind::SoftwareInterrupt => random.next() as u8,
    };
    let coded = kind == EventKind::HardwareException && matches!(vector, 8 | 10..=14 | 17);
    let code = coded && state.protected();
    Event {
        vector,
        kind,
        error_code: code.then(|| random.next() as u32 & 0xffff),
        instruction_length: random.below(16) as u8,
    }
}

/// What the owner sets before it enters, or enters again.
fn set_up_entry(random: &mut Random, cpu: &mut Cpu) {
    let state = &mut cpu.state;
    state.activity = random.pick(&[
        Activity::Active,
        Activity::Active,
        Activity::Active,
        Activity::Halted,
        Activity::Shutdown,
        Activity::WaitForSipi,
    ]);
    if random.one_in(8) {
        state.pending_debug = random.next() & (0xf | dr::DR6_BS);
    }
    if random.one_in(3) {
        state.injected = Some(random_event(random, state));
        state.activity = Activity::Active;
    }
    let controls = random_controls(random);
    cpu.vmx.current = random.one_in(2).then(|| Box::new(Vmcs::default()));
    cpu.enter_non_root(controls);
}

/// What every VM exit says.
fn check_exit(cpu: &Cpu) {
    let exit = cpu.vmx.exit;
    assert!(exit.reason <= reason::LAST, "{exit:x?}");
    assert!(exit.instruction_length <= 15, "{exit:x?}");
    assert!(exit.interruption == 0 || exit.interruption & event::VALID != 0, "{exit:x?}");
    assert!(exit.idt_vectoring == 0 || exit.idt_vectoring & event::VALID != 0, "{exit:x?}");
    if cpu.vmx.operation == Operation::NonRoot {
        let never = [reason::INIT, reason::SIPI, reason::ENTRY_FAILURE_GUEST_STATE, reason::RSM];
        assert!(!never.contains(&exit.reason), "{exit:x?}");
        let in_delivery = exit.idt_vectoring != 0;
        assert!(!in_delivery || cpu.state.shadow == Shadow::None, "{exit:x?}");
        assert!(!in_delivery || cpu.state.activity == Activity::Active, "{exit:x?}");
    }
}

/// Does with a VM exit what an owner might.
fn act(random: &mut Random, cpu: &mut Cpu) {
    match random.below(6) {
        0 if cpu.vmx.exit.instruction_length != 0 => cpu.complete_instruction(),
        1 => {
            let vector = random.pick(&[0, 1, 6, 13, 14]);
            let code = matches!(vector, 13 | 14).then(|| random.next() as u32 & 0x1f);
            cpu.inject_fault(Fault { vector, error_code: code, address: random.address() });
        }
        2 if cpu.vmx.operation == Operation::Root => {
            cpu.vm_fail_valid(random.next() as u32 & 31);
            cpu.complete_instruction();
        }
        3 if cpu.vmx.operation == Operation::NonRoot => set_up_entry(random, cpu),
        4 => cpu.state.injected = Some(random_event(random, &cpu.state)),
        _ => {}
    }
}

fn go(random: &mut Random, cpu: &mut Cpu, attention: &Attention) {
    for _ in 0..24 {
        let before = cpu.state.ticks();
        let exit = cpu.run(TICKS);
        let used = cpu.state.ticks() - before;
        assert!(used <= TICKS, "{used} ticks of {TICKS}");
        check(&cpu.state);
        match exit {
            Exit::Attention => return,
            Exit::Shutdown => {
                assert_ne!(cpu.vmx.operation, Operation::NonRoot);
                return;
            }
            Exit::Budget => assert_eq!(used, TICKS),
            Exit::Halted | Exit::InterruptWindow => {}
            Exit::Vm => {
                check_exit(cpu);
                act(random, cpu);
            }
        }
        if random.one_in(3) {
            let bits =
                [Attention::NMI, Attention::INTERRUPT, Attention::FORGET_WRITES, Attention::PREEMPTION];
            attention.raise(random.pick(&bits));
        }
    }
}

fn machine(memory: &Arc<PhysMemory>) -> (Cpu, Arc<Attention>) {
    let attention = Arc::new(Attention::default());
    let model = Arc::new(CpuModel::parse("max").expect("a model we have"));
    let bus = Box::new(Noise(Random(1)));
    (Cpu::new(Arc::clone(memory), bus, model, Arc::clone(&attention), 0), attention)
}

/// Instructions that VMX is about, where execution starts.
fn write_system_code(random: &mut Random, memory: &PhysMemory, cpu: &Cpu) {
    let mut at = cpu.state.seg(Seg::Cs).base.wrapping_add(cpu.state.rip);
    for _ in 0..random.below(12) {
        let modrm = random.next() as u8;
        let code: &[u8] = random.pick::<&[u8]>(&[
            &[0x0f, 0xa2],
            &[0x0f, 0x30],
            &[0x0f, 0x32],
            &[0x0f, 0x31],
            &[0x0f, 0x33],
            &[0x0f, 0x08],
            &[0x0f, 0x09],
            &[0x0f, 0x06],
            &[0xf4],
            &[0xf1],
            &[0xcc],
            &[0xce],
            &[0xcf],
            &[0xec],
            &[0xef],
            &[0xe4, 0x70],
            &[0xf3, 0x6c],
            &[0x6f],
            &[0xf3, 0x90],
            &[0x0f, 0x01, 0xc1],
            &[0x0f, 0x01, 0xc2],
            &[0x0f, 0x01, 0xc4],
            &[0x0f, 0x01, 0xd0],
            &[0x0f, 0x01, 0xd1],
            &[0x0f, 0x01, 0xd4],
            &[0x0f, 0x01, 0xf9],
            &[0xfb],
            &[0x9d],
            &[0x17],
            &[0x8e, 0xd0],
        ]);
        let with_modrm: &[u8] = random.pick::<&[u8]>(&[
            &[0x0f, 0x00],
            &[0x0f, 0x01],
            &[0x0f, 0x20],
            &[0x0f, 0x21],
            &[0x0f, 0x22],
            &[0x0f, 0x23],
            &[0x0f, 0x78],
            &[0x0f, 0x79],
            &[0x0f, 0xc7],
            &[0xf3, 0x0f, 0xc7],
            &[0x66, 0x0f, 0xc7],
            &[0x66, 0x0f, 0x38, 0x80],
            &[0x66, 0x0f, 0x38, 0x81],
            &[0x66, 0x0f, 0x38, 0x82],
            &[0x0f, 0xae],
        ]);
        let mut bytes = if random.one_in(2) { code.to_vec() } else { [with_modrm, &[modrm]].concat() };
        bytes.resize(bytes.len() + random.below(2) as usize, 0x90);
        memory.write(at, &bytes);
        at = at.wrapping_add(bytes.len() as u64);
    }
}

/// Puts the machine into VMX operation, in a mode that VMX operation has.
fn prepare_vmx(random: &mut Random, memory: &PhysMemory, cpu: &mut Cpu, mode: Mode, operation: Operation) {
    cpu.vmx.operation = operation;
    prepare(random, memory, cpu, mode);
    cpu.state.cr0 |= cr0::NE;
    cpu.state.cr4 |= cr4::VMXE;
    cpu.state.msrs.feature_control = 5;
    cpu.vmx.current = (!random.one_in(4)).then(|| Box::new(Vmcs::default()));
    write_system_code(random, memory, cpu);
    cpu.vmx.second_level = Some(Box::new(Level { salt: random.next() }));
    cpu.state_changed();
}

#[test]
fn random_hypervisors_are_survived() {
    let memory = guest::ram(&RAM);
    let (mut cpu, attention) = machine(&memory);
    for seed in cases(1500) {
        let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let mode = random.pick(&[Mode::Long, Mode::Long, Mode::Compatibility, Mode::Protected32]);
        let operation = random.pick(&[Operation::Off, Operation::Root, Operation::Root]);
        attention.clear(!0);
        report(seed, mode, || {
            prepare_vmx(&mut random, &memory, &mut cpu, mode, operation);
            go(&mut random, &mut cpu, &attention);
        });
    }
}

#[test]
fn random_guests_under_random_controls_are_survived() {
    let memory = guest::ram(&RAM);
    let (mut cpu, attention) = machine(&memory);
    for seed in cases(3000) {
        let mut random = Random(seed.wrapping_mul(0xda94_2042_e4dd_58b5));
        let mode = MODES[(seed % MODES.len() as u64) as usize];
        attention.clear(!0);
        report(seed, mode, || {
            prepare_vmx(&mut random, &memory, &mut cpu, mode, Operation::Root);
            set_up_entry(&mut random, &mut cpu);
            go(&mut random, &mut cpu, &attention);
        });
    }
}

/// One instruction at a time: each uses exactly one tick, or something has stopped the guest.
#[test]
fn random_guests_are_survived_step_by_step() {
    let memory = guest::ram(&RAM);
    let (mut cpu, attention) = machine(&memory);
    for seed in cases(600) {
        let mut random = Random(seed.wrapping_mul(0x1357_9bdf_0246_8ac1));
        let mode = MODES[(seed % MODES.len() as u64) as usize];
        attention.clear(!0);
        report(seed, mode, || {
            prepare_vmx(&mut random, &memory, &mut cpu, mode, Operation::Root);
            set_up_entry(&mut random, &mut cpu);
            for _ in 0..200 {
                let before = cpu.state.ticks();
                let exit = cpu.step();
                let used = cpu.state.ticks() - before;
                assert!(used == 1 || used == 0 && exit != Exit::Budget, "{used} ticks, {exit:?}");
                check(&cpu.state);
                match exit {
                    Exit::Budget => {}
                    Exit::Vm => act(&mut random, &mut cpu),
                    _ => break,
                }
            }
        });
    }
}
