//! The entropy device: random bytes from the host, or from a seed where a run has to repeat.

use std::io;
use std::sync::Arc;

use super::queue::{QueueError, VirtQueue};
use super::{DeviceConfig, DeviceType, FixedConfig, VirtioDevice};

/// The most one request gets; a device may give less than was asked for.
const LIMIT: usize = 64 << 10;
/// getrandom gives this many bytes in one go, whatever signals arrive.
const CHUNK: usize = 256;

/// Where the bytes come from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RngSource {
    /// The host's getrandom.
    Host,
    /// This seed: the same bytes every time, for `--clock virtual`. Not for keys.
    Seed(u64),
}

/// A virtio entropy device.
pub struct Rng {
    source: RngSource,
    state: u64,
}

impl Rng {
    /// An entropy device fed from `source`.
    pub fn new(source: RngSource) -> Self {
        let state = if let RngSource::Seed(seed) = source { seed } else { 0 };
        Self { source, state }
    }

    fn fill(&mut self, data: &mut [u8]) -> io::Result<()> {
        match self.source {
            RngSource::Host => data.chunks_mut(CHUNK).try_for_each(getrandom),
            RngSource::Seed(_) => {
                for chunk in data.chunks_mut(8) {
                    let bytes = self.next_word().to_le_bytes();
                    chunk.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
                }
                Ok(())
            }
        }
    }

    /// SplitMix64.
    fn next_word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.state;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }
}

fn getrandom(data: &mut [u8]) -> io::Result<()> {
    loop {
        // SAFETY: the pointer and length are those of `data`, which is ours alone for the call.
        let count = unsafe { libc::getrandom(data.as_mut_ptr().cast(), data.len(), 0) };
        if count == data.len() as isize {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if count < 0 && error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        Arc::new(FixedConfig([]))
    }

    fn process(&mut self, _index: usize, queue: &mut VirtQueue) -> Result<(), QueueError> {
        while let Some(chain) = queue.pop()? {
            let mut data = vec![0; chain.writable.len().min(LIMIT as u64) as usize];
            let given = match self.fill(&mut data) {
                Ok(()) => queue.dma().write(&chain.writable, 0, &data).map_or(0, |()| data.len()),
                Err(error) => {
                    log::error!("virtio entropy: the host gives no random bytes: {error}");
                    0
                }
            };
            queue.complete(&chain, given as u32)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Processing;
    use super::super::test_driver::*;
    use super::*;

    #[test]
    fn a_seed_repeats_and_the_host_does_not() {
        let bytes = |source| {
            let mut driver = Driver::ready(Rng::new(source), 0, 1);
            driver.submit(0, &[(BUFFERS, 100, WRITE), (BUFFERS + 0x1000, 400, WRITE)]);
            assert_eq!(driver.take_used(0), Some((0, 500)));
            [driver.get(BUFFERS, 100), driver.get(BUFFERS + 0x1000, 400)].concat()
        };
        assert_eq!(bytes(RngSource::Seed(7)), bytes(RngSource::Seed(7)));
        assert_ne!(bytes(RngSource::Seed(7)), bytes(RngSource::Seed(8)));
        let (first, second) = (bytes(RngSource::Host), bytes(RngSource::Host));
        assert_ne!(first, second);
        assert!(first[490..].iter().any(|&byte| byte != 0), "filled to the end");
    }

    #[test]
    fn works_on_its_own_thread_through_resets() {
        let mut driver = Driver::new(Rng::new(RngSource::Host), Processing::Thread);
        for _ in 0..20 {
            driver.put(Driver::areas(0)[1], &[0; 64]);
            driver.put(Driver::areas(0)[2], &[0; 256]);
            driver.start(0, 1);
            for _ in 0..10 {
                let head = driver.submit(0, &[(BUFFERS, 32, WRITE)]);
                assert_eq!(driver.wait_used(0), (head, 32));
            }
            wait_until(|| *crate::vcpu_signal::lock(&driver.world.line));
            driver.submit(0, &[(BUFFERS, 32, WRITE)]);
            driver.reset();
            assert!(!*crate::vcpu_signal::lock(&driver.world.line));
        }
    }
}
