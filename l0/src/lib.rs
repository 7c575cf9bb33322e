pub mod boot;
pub mod clock;
pub mod devices;
pub mod engine;
pub mod memory;
pub mod vcpu_signal;
