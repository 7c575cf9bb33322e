pub mod clock;
pub mod devices;
pub mod memory;
pub mod vcpu_signal;
