//! INTx: each slot's INTA goes to one of eight interrupt inputs, level triggered, shared as a wired OR.

use std::sync::{Arc, Mutex};

use super::{INTX_FIRST_GSI, INTX_GSIS};
use crate::devices::{IrqLine, IrqRouter};
use crate::vcpu_signal::lock;

/// The interrupt input (GSI) of INTA of `slot`; ACPI's _PRT says the same to the guest.
pub fn intx_gsi(slot: u8) -> u32 {
    INTX_FIRST_GSI + u32::from(slot) % INTX_GSIS
}

/// The inputs with the slots that pull them, one bit for each slot.
pub(super) struct SharedLines {
    router: Arc<dyn IrqRouter>,
    pulled: [Mutex<u32>; INTX_GSIS as usize],
}

impl SharedLines {
    pub(super) fn new(router: Arc<dyn IrqRouter>) -> Arc<Self> {
        Arc::new(Self { router, pulled: Default::default() })
    }

    /// The line of one slot.
    pub(super) fn line(self: &Arc<Self>, slot: u8) -> IrqLine {
        IrqLine::new(Arc::new(SlotLine { lines: Arc::clone(self), slot }), intx_gsi(slot))
    }

    fn set(&self, slot: u8, level: bool) {
        let gsi = intx_gsi(slot);
        // The lock is held over the call, so that levels reach the controller in the order they were decided.
        let mut pulled = lock(&self.pulled[(gsi - INTX_FIRST_GSI) as usize]);
        let before = *pulled != 0;
        let bit = 1 << (slot % 32);
        *pulled = if level { *pulled | bit } else { *pulled & !bit };
        if before != (*pulled != 0) {
            self.router.set_irq(gsi, level);
        }
    }
}

struct SlotLine {
    lines: Arc<SharedLines>,
    slot: u8,
}

impl IrqRouter for SlotLine {
    fn set_irq(&self, _gsi: u32, level: bool) {
        self.lines.set(self.slot, level);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u32, bool)>>);

    impl IrqRouter for Recorder {
        fn set_irq(&self, gsi: u32, level: bool) {
            lock(&self.0).push((gsi, level));
        }
    }

    #[test]
    fn a_shared_input_stays_high_until_the_last_slot_lets_go() {
        let recorder = Arc::new(Recorder::default());
        let lines = SharedLines::new(Arc::clone(&recorder) as Arc<dyn IrqRouter>);
        let (one, nine, two) = (lines.line(1), lines.line(9), lines.line(2));
        one.set(true);
        one.set(true);
        nine.set(true);
        two.set(true);
        one.set(false);
        nine.set(false);
        assert_eq!(*lock(&recorder.0), [(17, true), (18, true), (17, false)]);
    }
}
