//! The run loop on small programs in real mode: results, instruction counts, budgets, self-modifying code.

use std::sync::Arc;

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::*;
use turtles_cpu::attention::Attention;
use turtles_cpu::bus::{Bus, MsrRefused};
use turtles_cpu::cpuid::CpuModel;
use turtles_cpu::phys::{PhysMemory, RamRange};
use turtles_cpu::state::{CpuState, Seg, Segment, reg};
use turtles_cpu::{Cpu, Exit};

/// No device but one: a write where no RAM is asks for attention, as an interrupt would.
struct Nothing(Arc<Attention>);

impl Bus for Nothing {
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) {
        self.0.raise(Attention::CANCEL);
    }
    fn port_read(&mut self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&mut self, _: u16, _: &[u8]) {}
    fn read_msr(&mut self, _: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn write_msr(&mut self, _: u32, _: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _: u8) {}
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn tsc(&mut self, instructions: u64) -> u64 {
        instructions
    }
}

/// A CPU in real mode at 0:0x1000, where `code` is.
fn real_mode(code: CodeAssembler) -> Cpu {
    real_mode_in_memory(code).0
}

/// The same, with where its memory begins.
fn real_mode_in_memory(code: CodeAssembler) -> (Cpu, *mut u8) {
    let mut code = code;
    let bytes = code.assemble(0x1000).expect("assembles");
    let ram = Box::leak(vec![0u64; 1 << 17].into_boxed_slice());
    let host = ram.as_mut_ptr().cast::<u8>();
    let host = host.wrapping_add(host.align_offset(4096));
    let range = RamRange { start: 0, len: (1 << 20) - 4096, host };
    // SAFETY: the memory is leaked, so it stays; only the CPU under test uses it.
    let memory = unsafe { PhysMemory::new(vec![range], Box::new(())) };
    memory.write(0x1000, &bytes);
    let model = Arc::new(CpuModel::default());
    let attention = Arc::new(Attention::default());
    let bus = Nothing(Arc::clone(&attention));
    let mut cpu = Cpu::new(Arc::new(memory), Box::new(bus), model, attention, 0);
    cpu.state = CpuState::reset();
    *cpu.state.seg_mut(Seg::Cs) = Segment { access: 0x9b, ..Segment::real(0) };
    cpu.state.rip = 0x1000;
    cpu.state_changed();
    (cpu, host)
}

#[test]
fn a_loop_counts_its_instructions_and_stops_at_its_budget() {
    let mut a = CodeAssembler::new(16).unwrap();
    let mut top = a.create_label();
    a.mov(eax, 0).unwrap();
    a.mov(ecx, 1000).unwrap();
    a.set_label(&mut top).unwrap();
    a.add(eax, ecx).unwrap();
    a.dec(ecx).unwrap();
    a.jnz(top).unwrap();
    let mut end = a.create_label();
    a.set_label(&mut end).unwrap();
    a.jmp(end).unwrap();
    let mut cpu = real_mode(a);
    assert_eq!(cpu.run(2 + 3 * 1000), Exit::Budget);
    assert_eq!(cpu.state.instructions, 3002);
    assert_eq!(cpu.state.gpr.get(reg::RAX), 500_500);
    assert_eq!(cpu.state.gpr.get(reg::RCX), 0);
    assert_eq!(cpu.run(7), Exit::Budget);
    assert_eq!(cpu.state.instructions, 3009);
}

#[test]
fn a_store_into_the_running_block_takes_effect_at_once() {
    let mut a = CodeAssembler::new(16).unwrap();
    let mut patched = a.create_label();
    let mut end = a.create_label();
    // The immediate of MOV BL is overwritten by the instruction just before it.
    a.mov(byte_ptr(0x100a), 0x55).unwrap();
    a.nop().unwrap();
    a.nop().unwrap();
    a.nop().unwrap();
    a.nop().unwrap();
    a.set_label(&mut patched).unwrap();
    a.mov(bl, 0x11).unwrap();
    a.set_label(&mut end).unwrap();
    a.jmp(end).unwrap();
    let mut cpu = real_mode(a);
    assert_eq!(cpu.run(20), Exit::Budget);
    assert_eq!(cpu.state.gpr.get(reg::RBX) & 0xff, 0x55);
}

/// A loop that gives a lock up only across its PAUSE, as firmware does that waits for other processors.
#[test]
fn interrupts_are_taken_after_pause() {
    let mut a = CodeAssembler::new(16).unwrap();
    a.mov(ax, 0xf000).unwrap();
    a.mov(ds, ax).unwrap();
    let mut top = a.create_label();
    a.jmp(top).unwrap();
    a.set_label(&mut top).unwrap();
    a.inc(bx).unwrap();
    a.mov(byte_ptr(0xf000), 0).unwrap();
    a.pause().unwrap();
    let mut after = a.create_label();
    a.set_label(&mut after).unwrap();
    a.inc(cx).unwrap();
    a.jmp(top).unwrap();
    let rip = a.assemble_options(0x1000, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS).unwrap();
    let rip = rip.label_ip(&after).unwrap();
    let mut cpu = real_mode(a);
    assert_eq!(cpu.run(100), Exit::Attention);
    assert_eq!((cpu.state.rip, cpu.state.gpr.get(reg::RBX), cpu.state.gpr.get(reg::RCX)), (rip, 1, 0));
}

#[test]
fn code_that_another_engine_changed_is_decoded_again() {
    let mut code = CodeAssembler::new(16).unwrap();
    code.inc(ax).unwrap();
    code.hlt().unwrap();
    let (mut cpu, memory) = real_mode_in_memory(code);
    cpu.expect_foreign_writes();
    assert_eq!(cpu.run(10), Exit::Halted);
    assert_eq!(cpu.state.gpr.get(reg::RAX), 1);
    let again = |cpu: &mut Cpu| {
        cpu.state.rip = 0x1000;
        cpu.state.activity = turtles_cpu::state::Activity::Active;
        cpu.state_changed();
        assert_eq!(cpu.run(10), Exit::Halted);
        cpu.state.gpr.get(reg::RAX)
    };
    cpu.check_code();
    assert_eq!(again(&mut cpu), 2, "nothing has changed");
    // DEC AX, by a route that the CPU does not see.
    // SAFETY: inside the guest's memory, which stays, and which nobody else uses now.
    unsafe { memory.add(0x1000).write_volatile(0x48) };
    cpu.check_code();
    assert_eq!(again(&mut cpu), 1);
}
