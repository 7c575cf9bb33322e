//! The child's side of the oracle. After the fork it allocates nothing, uses no thread-local storage (FS is the
//! case's) and makes no system call but futex and exit.
//!
//! Unsafe island: everything here is about executing bytes.

use std::arch::{asm, global_asm};
use std::mem::offset_of;
use std::sync::atomic::Ordering;

use super::{Out, Shared, Slot};
use crate::case::{ARENA_SIZE, HIGH, IMAGE_SIZE, LOW, PAGE, PAGES, Rights, selector};

const SIGNALS: [i32; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];
const STACK_SIZE: usize = 256 * 1024;

/// The slot under execution; null between cases. (The process has one thread.)
static mut CURRENT: *mut Slot = std::ptr::null_mut();
/// Stack pointer of the child's loop while a case executes.
static mut LOOP_STACK: u64 = 0;

unsafe extern "C" {
    /// Loads everything from the slot and goes to the case; returns through [`oracle_leave`].
    fn turtles_oracle_enter(slot: *mut Slot);
    /// Returns from `turtles_oracle_enter`.
    fn turtles_oracle_leave() -> !;
    /// The signal handler's first instructions.
    fn turtles_oracle_signal();
}

global_asm!(
    "turtles_oracle_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + {loop_stack}], rsp",
    "mov eax, {data}",
    "mov ds, eax",
    "mov es, eax",
    "mov rax, [rdi + {fs_base}]",
    "wrfsbase rax",
    "mov rax, [rdi + {gs_base}]",
    "wrgsbase rax",
    "mov eax, 7",
    "xor edx, edx",
    "xrstor64 [rdi + {xsave}]",
    "lea rsp, [rdi + {frame}]",
    "mov rax, [rdi + {gpr} + 0]",
    "mov rcx, [rdi + {gpr} + 8]",
    "mov rdx, [rdi + {gpr} + 16]",
    "mov rbx, [rdi + {gpr} + 24]",
    "mov rbp, [rdi + {gpr} + 40]",
    "mov rsi, [rdi + {gpr} + 48]",
    "mov r8, [rdi + {gpr} + 64]",
    "mov r9, [rdi + {gpr} + 72]",
    "mov r10, [rdi + {gpr} + 80]",
    "mov r11, [rdi + {gpr} + 88]",
    "mov r12, [rdi + {gpr} + 96]",
    "mov r13, [rdi + {gpr} + 104]",
    "mov r14, [rdi + {gpr} + 112]",
    "mov r15, [rdi + {gpr} + 120]",
    "mov rdi, [rdi + {gpr} + 56]",
    "iretq",
    "turtles_oracle_leave:",
    "mov rsp, [rip + {loop_stack}]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    // The kernel leaves AC and NT as the case had them: compiled code is not made for AC, nor IRETQ for NT.
    "turtles_oracle_signal:",
    "pushfq",
    "and dword ptr [rsp], 0xfffbbfff",
    "popfq",
    "jmp {on_signal}",
    loop_stack = sym LOOP_STACK,
    data = const selector::DATA as i32,
    fs_base = const offset_of!(Slot, fs_base),
    gs_base = const offset_of!(Slot, gs_base),
    xsave = const offset_of!(Slot, xsave),
    frame = const offset_of!(Slot, frame),
    gpr = const offset_of!(Slot, gpr),
    on_signal = sym on_signal,
);

/// The child: never returns.
pub(super) fn main(shared: *mut Shared, arena: i32, window: *mut u8) -> ! {
    // SAFETY: sets up this process, which is ours alone and has one thread.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if !map_arena(arena) || !catch_signals() || !confine() {
            exit(2);
        }
    }
    let mut batch = 0;
    loop {
        // SAFETY: the shared mapping lives as long as the process.
        let control = unsafe { &*shared };
        let request = control.request.load(Ordering::SeqCst);
        if request == batch || request == control.done.load(Ordering::SeqCst) {
            futex(control.request.as_ptr(), libc::FUTEX_WAIT, request);
            continue;
        }
        batch = request;
        let count = control.count.load(Ordering::SeqCst) as usize;
        for index in control.first.load(Ordering::SeqCst) as usize..count.min(super::BATCH) {
            // SAFETY: the parent leaves the slots alone until `done`.
            unsafe { execute(&raw mut (*shared).slots[index], window) };
            control.progress.store(index as u32 + 1, Ordering::SeqCst);
        }
        control.done.store(batch, Ordering::SeqCst);
        futex(control.done.as_ptr(), libc::FUTEX_WAKE, 1);
    }
}

/// Executes one case.
///
/// # Safety
/// `slot` must be ours alone, `window` the arena's pages.
unsafe fn execute(slot: *mut Slot, window: *mut u8) {
    // SAFETY: both are IMAGE_SIZE bytes, by the caller's promise; the handlers of every exception are in place.
    unsafe {
        let image = (&raw mut (*slot).image).cast::<u8>();
        std::ptr::copy_nonoverlapping(image, window, IMAGE_SIZE);
        (&raw mut CURRENT).write_volatile(slot);
        turtles_oracle_enter(slot);
        (&raw mut CURRENT).write_volatile(std::ptr::null_mut());
        std::ptr::copy_nonoverlapping(window, image, IMAGE_SIZE);
    }
}

/// Keeps what the kernel says of the exception and goes back to the loop.
unsafe extern "C" fn on_signal(signal: i32, _info: *const libc::siginfo_t, context: *const libc::ucontext_t) {
    // SAFETY: the kernel passes a valid context with an XSAVE image; a null slot means that this loop itself is broken.
    unsafe {
        let slot = (&raw const CURRENT).read_volatile();
        if slot.is_null() {
            exit(3);
        }
        let out: *mut Out = &raw mut (*slot).out;
        let machine = &raw const (*context).uc_mcontext;
        let regs: &[i64; 23] = &(*machine).gregs;
        const ORDER: [i32; 16] = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        for (to, from) in (*out).gpr.iter_mut().zip(ORDER) {
            *to = regs[from as usize] as u64;
        }
        (*out).rip = regs[libc::REG_RIP as usize] as u64;
        (*out).rflags = regs[libc::REG_EFL as usize] as u64;
        (*out).signal = signal as u64;
        (*out).vector = regs[libc::REG_TRAPNO as usize] as u64;
        (*out).error_code = regs[libc::REG_ERR as usize] as u64;
        (*out).address = regs[libc::REG_CR2 as usize] as u64;
        let image = (*machine).fpregs.cast::<u8>();
        std::ptr::copy_nonoverlapping(image, (&raw mut (*out).xsave).cast(), (*out).xsave.len());
        turtles_oracle_leave()
    }
}

/// Maps the arena's pages at their linear addresses.
///
/// # Safety
/// Nothing of the process may use those addresses.
unsafe fn map_arena(file: i32) -> bool {
    for base in [LOW, HIGH] {
        for (index, &(offset, rights)) in PAGES.iter().enumerate() {
            let protection = match rights {
                Rights::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
                Rights::ReadOnly => libc::PROT_READ,
                Rights::ReadExecute => libc::PROT_READ | libc::PROT_EXEC,
                Rights::ReadWriteExecute => libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            };
            let want = (base + offset) as *mut libc::c_void;
            let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
            // SAFETY: NOREPLACE never takes an address that is in use.
            let at = unsafe { libc::mmap(want, PAGE, protection, flags, file, (index * PAGE) as i64) };
            if at != want {
                return false;
            }
        }
    }
    true
}

/// Installs the handler for all exceptions, on a stack of its own.
///
/// # Safety
/// Single-threaded process.
unsafe fn catch_signals() -> bool {
    // SAFETY: plain system calls with structures on our stack; the handler's stack is a new mapping.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let stack = libc::mmap(std::ptr::null_mut(), STACK_SIZE, protection, flags, -1, 0);
        if stack == libc::MAP_FAILED {
            return false;
        }
        let alternate = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK_SIZE };
        if libc::sigaltstack(&raw const alternate, std::ptr::null_mut()) != 0 {
            return false;
        }
        SIGNALS.iter().all(|&signal| {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = turtles_oracle_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut()) == 0
        })
    }
}

/// Forbids all system calls but futex and exit_group, and every one that is made from within the arena.
///
/// # Safety
/// The caller needs no other system call from here on.
unsafe fn confine() -> bool {
    const NR: u32 = 0;
    const ARCH: u32 = 4;
    const IP_LOW: u32 = 8;
    const IP_HIGH: u32 = 12;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        step(LOAD, 0, 0, ARCH),
        step(EQUAL, 0, 10, AUDIT_ARCH_X86_64),
        step(LOAD, 0, 0, IP_HIGH),
        step(EQUAL, 8, 0, (HIGH >> 32) as u32),
        step(EQUAL, 0, 3, 0),
        step(LOAD, 0, 0, IP_LOW),
        step(AT_LEAST, 0, 1, LOW as u32),
        step(AT_LEAST, 0, 4, (LOW + ARENA_SIZE) as u32),
        step(LOAD, 0, 0, NR),
        step(EQUAL, 1, 0, libc::SYS_futex as u32),
        step(EQUAL, 0, 1, libc::SYS_exit_group as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        step(RETURN, 0, 0, libc::SECCOMP_RET_TRAP),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter outlive the calls.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    }
}

fn futex(word: *mut u32, operation: i32, value: u32) {
    // SAFETY: the word lies in the shared mapping; the call writes no other memory. Raw, for errno is in
    // thread-local storage.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") libc::SYS_futex => _,
            in("rdi") word,
            in("rsi") i64::from(operation),
            in("rdx") u64::from(value),
            in("r10") 0u64,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
}

fn exit(status: i32) -> ! {
    // SAFETY: ends the process.
    unsafe {
        asm!("syscall", in("rax") libc::SYS_exit_group, in("rdi") i64::from(status), options(noreturn));
    }
}
