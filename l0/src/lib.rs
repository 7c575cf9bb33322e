//! `turtles`: a virtual machine monitor whose virtualization is its own.
//!
//! - [`vm`] builds a machine from a [`config`] and runs it; [`vcpu`] is one vCPU's loop
//! - [`engine`] executes vCPUs: the software CPU (crate `turtles_cpu`) or the host's KVM
//! - [`nested`] is the virtual VMX that guest hypervisors use
//! - [`devices`] are the PC's chips, wired in [`chipset`]; [`clock`] is guest time, [`memory`] guest RAM
//! - [`boot`] puts kernels into memory
//! - [`demo`], [`doctor`], [`crash`], [`console`], [`signals`] are what a person sees
//! - [`recorder`] sees every return of a vCPU to us, for [`trace`] and [`stats`]

pub mod boot;
pub mod chipset;
pub mod clock;
pub mod config;
pub mod console;
pub mod cpu_option;
pub mod crash;
pub mod demo;
pub mod devices;
pub mod doctor;
pub mod engine;
pub mod error;
mod exit_words;
pub mod memory;
pub mod nested;
pub mod profile;
pub mod recorder;
pub mod signals;
pub mod stats;
pub mod trace;
pub mod vcpu;
pub mod vcpu_signal;
pub mod vm;
