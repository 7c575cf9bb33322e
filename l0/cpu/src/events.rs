//! placeholder
use crate::{Cpu, state::Event, trap::Exec};
impl Cpu {
    pub(crate) fn deliver(&mut self, _event: Event) -> Exec {
        Ok(())
    }
    pub(crate) fn deliver_fault(&mut self) -> bool {
        false
    }
}
