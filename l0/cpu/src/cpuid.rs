//! placeholder
pub struct CpuModel;
