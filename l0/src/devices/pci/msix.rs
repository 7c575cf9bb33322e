//! MSI-X: the table of messages, the pending bits, and when a message is sent.
//!
//! Shared between the guest's accesses (through the device's BAR and capability) and the threads that raise
//! interrupts. A message is sent after the lock is released, so whoever takes it may do as it likes.

use std::sync::{Arc, Mutex};

use crate::devices::MsiSink;
use crate::vcpu_signal::lock;

/// Bytes of one table entry: address low, address high, data, vector control.
pub const MSIX_ENTRY_SIZE: usize = 16;
/// Offset of vector control in an entry; its bit 0 masks the entry.
const VECTOR_CONTROL: usize = 12;

struct State {
    enabled: bool,
    masked: bool,
    table: Vec<[u8; MSIX_ENTRY_SIZE]>,
    pending: Vec<bool>,
}

/// MSI-X of one function.
pub struct Msix {
    state: Mutex<State>,
    sink: Arc<dyn MsiSink>,
}

impl Msix {
    /// `vectors` entries, all masked; MSI-X itself is off.
    pub fn new(vectors: usize, sink: Arc<dyn MsiSink>) -> Self {
        let state = State {
            enabled: false,
            masked: false,
            table: vec![[0; 16]; vectors],
            pending: vec![false; vectors],
        };
        let msix = Self { state: Mutex::new(state), sink };
        msix.reset();
        msix
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> usize {
        lock(&self.state).table.len()
    }

    /// Whether the guest turned MSI-X on; INTx is then silent.
    pub fn enabled(&self) -> bool {
        lock(&self.state).enabled
    }

    /// Back to power-on.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        state.enabled = false;
        state.masked = false;
        state.pending.fill(false);
        for entry in &mut state.table {
            *entry = [0; MSIX_ENTRY_SIZE];
            entry[VECTOR_CONTROL] = 1;
        }
    }

    /// Follows the enable bit, and the function mask: set by the guest or because the function may not write
    /// memory (bus mastering off). Sends what waited for the mask to go.
    pub fn set_control(&self, enabled: bool, masked: bool) {
        let mut state = lock(&self.state);
        state.enabled = enabled;
        state.masked = masked;
        self.send_pending(state);
    }

    /// Raises `vector`: sends its message, or remembers it while masked. Vectors that do not exist are ignored.
    pub fn notify(&self, vector: u16) {
        let mut state = lock(&self.state);
        let State { enabled: true, ref mut pending, .. } = *state else { return };
        if let Some(bit) = pending.get_mut(usize::from(vector)) {
            *bit = true;
            self.send_pending(state);
        }
    }

    fn send_pending(&self, mut guard: std::sync::MutexGuard<'_, State>) {
        let State { enabled: true, masked: false, ref table, ref mut pending } = *guard else { return };
        let mut messages = Vec::new();
        for (entry, pending) in table.iter().zip(pending) {
            if *pending && entry[VECTOR_CONTROL] & 1 == 0 {
                *pending = false;
                let field =
                    |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
                messages.push((u64::from(field(4)) << 32 | u64::from(field(0)), field(8)));
            }
        }
        drop(guard);
        for (address, data) in messages {
            self.sink.send(address, data);
        }
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let bytes = state.table.as_flattened().get(offset as usize..).unwrap_or_default();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(i).copied().unwrap_or(0);
        }
    }

    /// The guest writes the table; only aligned dwords and qwords are defined.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let at = offset as usize;
        if !matches!(data.len(), 4 | 8) || at % data.len() != 0 {
            return;
        }
        let mut state = lock(&self.state);
        let Some(entry) = state.table.get_mut(at / MSIX_ENTRY_SIZE) else { return };
        let within = at % MSIX_ENTRY_SIZE;
        entry[within..within + data.len()].copy_from_slice(data);
        entry[0] &= !3; // the address is that of a dword
        entry[VECTOR_CONTROL] &= 1;
        entry[VECTOR_CONTROL + 1..].fill(0);
        self.send_pending(state);
    }

    /// The guest reads the pending bits, which it cannot write.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        for (i, byte) in data.iter_mut().enumerate() {
            let at = (offset as usize).saturating_add(i);
            let bits = state.pending.iter().skip(at.saturating_mul(8)).take(8);
            *byte = bits.enumerate().fold(0, |byte, (i, &bit)| byte | u8::from(bit) << i);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, u32)>>);

    impl MsiSink for Recorder {
        fn send(&self, address: u64, data: u32) {
            lock(&self.0).push((address, data));
        }
    }

    fn msix() -> (Msix, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        let msix = Msix::new(10, Arc::clone(&recorder) as Arc<dyn MsiSink>);
        for vector in 0..10u64 {
            msix.write_table(vector * 16, &(0xfee0_0000u64 + (vector << 12)).to_le_bytes());
            msix.write_table(vector * 16 + 8, &(0x40 + vector as u32).to_le_bytes());
        }
        (msix, recorder)
    }

    fn pending(msix: &Msix) -> u16 {
        let mut data = [0; 2];
        msix.read_pending(0, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn entries_start_masked_and_messages_wait_for_the_unmask() {
        let (msix, recorder) = msix();
        msix.set_control(true, false);
        msix.notify(9);
        msix.notify(9);
        assert!(lock(&recorder.0).is_empty());
        assert_eq!(pending(&msix), 1 << 9);
        msix.write_table(9 * 16 + 12, &0u32.to_le_bytes());
        assert_eq!(*lock(&recorder.0), [(0xfee0_9000, 0x49)], "two while masked are one");
        assert_eq!(pending(&msix), 0);
        msix.notify(9);
        assert_eq!(lock(&recorder.0).len(), 2);
    }

    #[test]
    fn the_function_mask_holds_all_vectors() {
        let (msix, recorder) = msix();
        for vector in 0..2 {
            msix.write_table(vector * 16 + 12, &0u32.to_le_bytes());
        }
        msix.set_control(true, true);
        msix.notify(0);
        msix.notify(1);
        assert_eq!((pending(&msix), lock(&recorder.0).len()), (3, 0));
        msix.set_control(true, false);
        assert_eq!(*lock(&recorder.0), [(0xfee0_0000, 0x40), (0xfee0_1000, 0x41)]);
    }

    #[test]
    fn nothing_is_sent_or_remembered_while_off() {
        let (msix, recorder) = msix();
        msix.notify(0);
        msix.set_control(true, false);
        msix.write_table(12, &0u32.to_le_bytes());
        msix.notify(0xffff);
        assert_eq!((pending(&msix), lock(&recorder.0).len()), (0, 0));
    }

    #[test]
    fn odd_accesses_change_nothing() {
        let (msix, _) = msix();
        msix.write_table(2, &[0xff; 4]);
        msix.write_table(8, &[0xff; 2]);
        msix.write_table(1 << 40, &[0xff; 8]);
        let mut entry = [0xee; 8];
        msix.read_table(0, &mut entry);
        assert_eq!(u64::from_le_bytes(entry), 0xfee0_0000);
        msix.read_table(u64::MAX, &mut entry[..4]);
        msix.read_pending(u64::MAX, &mut entry);
        msix.write_table(12, &[0xff; 4]);
        msix.read_table(12, &mut entry[..4]);
        assert_eq!(entry[..4], [1, 0, 0, 0], "reserved bits of vector control read as zero");
    }
}
