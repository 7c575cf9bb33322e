//! placeholder
/// CPU model.
pub struct CpuModel;
impl CpuModel {
    /// Whether CPUID shows what the instruction needs.
    pub fn allows(&self, _insn: &iced_x86::Instruction) -> bool {
        true
    }
}
impl Default for CpuModel {
    fn default() -> Self {
        CpuModel
    }
}
