//! How a virtio device interrupts: by MSI-X vectors, or by INTx and the ISR register.

use std::sync::{Arc, Mutex};

use crate::devices::IrqLine;
use crate::devices::pci::Msix;
use crate::vcpu_signal::lock;

/// "No vector": that source does not interrupt.
pub(super) const NO_VECTOR: u16 = 0xffff;
/// ISR: a queue has used buffers.
const ISR_QUEUE: u8 = 1 << 0;
/// ISR: configuration changed.
const ISR_CONFIG: u8 = 1 << 1;

struct State {
    isr: u8,
    line_disabled: bool,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

/// The interrupts of one device. Any thread may raise them.
pub(super) struct Interrupts {
    msix: Msix,
    line: IrqLine,
    state: Mutex<State>,
}

impl Interrupts {
    pub(super) fn new(queues: usize, msix: Msix, line: IrqLine) -> Arc<Self> {
        let state = State {
            isr: 0,
            line_disabled: false,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues],
        };
        Arc::new(Self { msix, line, state: Mutex::new(state) })
    }

    pub(super) fn msix(&self) -> &Msix {
        &self.msix
    }

    /// Queue `index` has used buffers that the driver wants to hear of.
    pub(super) fn raise_queue(&self, index: usize) {
        let mut state = lock(&self.state);
        if self.msix.enabled() {
            let vector = state.queue_vectors.get(index).copied().unwrap_or(NO_VECTOR);
            drop(state);
            self.msix.notify(vector);
        } else {
            state.isr |= ISR_QUEUE;
            self.drive_line(&state);
        }
    }

    /// A configuration register or the device's status changed.
    pub(super) fn raise_config(&self) {
        let mut state = lock(&self.state);
        state.isr |= ISR_CONFIG;
        if self.msix.enabled() {
            let vector = state.config_vector;
            drop(state);
            self.msix.notify(vector);
        } else {
            self.drive_line(&state);
        }
    }

    /// The driver reads ISR, which clears it and lets go of the line.
    pub(super) fn take_isr(&self) -> u8 {
        let mut state = lock(&self.state);
        let isr = std::mem::take(&mut state.isr);
        self.drive_line(&state);
        isr
    }

    /// The interrupt status bit of the PCI status register.
    pub(super) fn pending(&self) -> bool {
        lock(&self.state).isr != 0 && !self.msix.enabled()
    }

    /// Follows the command register (INTx disable, bus master) and MSI-X's control bits.
    pub(super) fn set_control(&self, line_disabled: bool, msix_enabled: bool, msix_masked: bool) {
        let mut state = lock(&self.state);
        state.line_disabled = line_disabled;
        self.msix.set_control(msix_enabled, msix_masked);
        self.drive_line(&state);
    }

    pub(super) fn config_vector(&self) -> u16 {
        lock(&self.state).config_vector
    }

    pub(super) fn queue_vector(&self, index: usize) -> u16 {
        lock(&self.state).queue_vectors.get(index).copied().unwrap_or(NO_VECTOR)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        lock(&self.state).config_vector = self.existing(vector);
    }

    pub(super) fn set_queue_vector(&self, index: usize, vector: u16) {
        if let Some(slot) = lock(&self.state).queue_vectors.get_mut(index) {
            *slot = self.existing(vector);
        }
    }

    /// A vector the table does not have reads back as none, which tells the driver.
    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    /// A reset by the driver. MSI-X belongs to PCI and stays.
    pub(super) fn reset(&self) {
        let mut state = lock(&self.state);
        state.isr = 0;
        state.config_vector = NO_VECTOR;
        state.queue_vectors.fill(NO_VECTOR);
        self.drive_line(&state);
    }

    /// Under the lock, so that levels reach the controller in order.
    fn drive_line(&self, state: &State) {
        self.line.set(state.isr != 0 && !state.line_disabled && !self.msix.enabled());
    }
}
