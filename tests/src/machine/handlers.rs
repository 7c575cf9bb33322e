//! The supervisor: every exception goes on at the program's next section, interrupts and debug exceptions where they
//! came. What was seen goes into a hash, so that nothing that a handler was told can differ unnoticed.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::world::{KERNEL, KERNEL_CODE, KERNEL_DATA, at};

/// Offsets from [`at::VARIABLES`].
pub mod variable {
    /// Where the program goes on after an exception.
    pub const RESUME: u64 = 0;
    /// Its stack then.
    pub const STACK: u64 = 8;
    pub const HASH: u64 = 16;
    /// Exceptions and interrupts so far.
    pub const COUNT: u64 = 24;
    /// Debug exceptions until the handler clears TF and DR7.
    pub const STEPS: u64 = 32;
}

/// Exceptions after which a program is over.
const MOST: i32 = 400;
/// Distance between the stubs of two vectors.
const STUB: u64 = 16;
/// Offset of the system call's entry in the handlers' page.
const SYSTEM_CALL: u64 = 0x800;

/// Physical address of a vector's stub.
pub fn stub(vector: u8) -> u64 {
    at::STUBS + u64::from(vector) * STUB
}

/// Physical address of SYSCALL's target.
pub fn system_call() -> u64 {
    at::HANDLERS + SYSTEM_CALL
}

/// Writes stubs and handlers.
pub fn write(ram: &mut [u8]) {
    for vector in 0..=255 {
        let code = assemble(KERNEL + stub(vector), |a| {
            if !matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30) {
                a.push(0)?;
            }
            a.push(i32::from(vector))?;
            a.jmp(KERNEL + at::HANDLERS)
        });
        ram[stub(vector) as usize..][..code.len()].copy_from_slice(&code);
    }
    let code = assemble(KERNEL + at::HANDLERS, exception);
    assert!(code.len() < SYSTEM_CALL as usize);
    ram[at::HANDLERS as usize..][..code.len()].copy_from_slice(&code);
    let code = assemble(KERNEL + system_call(), |a| {
        a.mov(rax, KERNEL + at::VARIABLES)?;
        a.mov(rsp, ptr(rax + variable::STACK as i32))?;
        a.jmp(qword_ptr(rax + variable::RESUME as i32))
    });
    ram[system_call() as usize..][..code.len()].copy_from_slice(&code);
}

fn assemble(address: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("64-bit code");
    write(&mut a).and_then(|()| a.assemble(address)).expect("valid instructions")
}

/// On the stack: RDX, RCX, RAX, vector, error code, RIP, CS, RFLAGS, RSP, SS.
fn exception(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (vector, error, ip, code, flags, top, stack) = (24, 32, 40, 48, 56, 64, 72);
    let (mut debug, mut leave, mut stop) = (a.create_label(), a.create_label(), a.create_label());
    let hash = ptr(rcx + variable::HASH as i32);
    let count = qword_ptr(rcx + variable::COUNT as i32);
    a.push(rax)?;
    a.push(rcx)?;
    a.push(rdx)?;
    a.mov(rcx, KERNEL + at::VARIABLES)?;
    a.mov(rax, hash)?;
    a.rol(rax, 5)?;
    a.xor(rax, qword_ptr(rsp + vector))?;
    a.add(rax, qword_ptr(rsp + ip))?;
    a.xor(rax, qword_ptr(rsp + error))?;
    a.add(rax, qword_ptr(rsp + flags))?;
    a.mov(rdx, cr2)?;
    a.add(rax, rdx)?;
    a.mov(hash, rax)?;
    a.inc(count)?;
    a.cmp(count, MOST)?;
    a.jae(stop)?;
    a.mov(rax, qword_ptr(rsp + vector))?;
    a.cmp(eax, 1)?;
    a.je(debug)?;
    a.cmp(eax, 0x80)?;
    let mut exception = a.create_label();
    a.je(exception)?;
    a.cmp(eax, 0x20)?;
    a.jae(leave)?;
    a.set_label(&mut exception)?;
    a.mov(rax, ptr(rcx + variable::RESUME as i32))?;
    a.mov(ptr(rsp + ip), rax)?;
    a.mov(rax, ptr(rcx + variable::STACK as i32))?;
    a.mov(ptr(rsp + top), rax)?;
    a.mov(qword_ptr(rsp + code), i32::from(KERNEL_CODE))?;
    a.mov(qword_ptr(rsp + stack), i32::from(KERNEL_DATA))?;
    a.and(dword_ptr(rsp + flags), 0x202)?;
    a.jmp(leave)?;
    a.set_label(&mut debug)?;
    a.mov(rax, dr6)?;
    a.xor(hash, rax)?;
    a.mov(eax, 0xffff_0ff0u32)?;
    a.mov(dr6, rax)?;
    // RF
    a.or(dword_ptr(rsp + flags), 0x1_0000)?;
    a.dec(dword_ptr(rcx + variable::STEPS as i32))?;
    a.jg(leave)?;
    a.and(dword_ptr(rsp + flags), !0x100)?;
    a.mov(eax, 0x400)?;
    a.mov(dr7, rax)?;
    a.set_label(&mut leave)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.pop(rax)?;
    a.add(rsp, 16)?;
    a.iretq()?;
    a.set_label(&mut stop)?;
    a.cli()?;
    a.hlt()?;
    a.jmp(stop)
}
