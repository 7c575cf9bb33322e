//! tbd
#[unsafe(no_mangle)]
extern "C" fn smp_main() -> ! {
    loop {
        crate::cpu::hlt()
    }
}
