//! The console: port 0 only, output to a sink, input from whoever holds the [`ConsoleInput`].

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex};

use super::queue::{Chain, QueueError, VirtQueue};
use super::runner::Waker;
use super::{DeviceConfig, DeviceType, VirtioDevice, feature};
use crate::vcpu_signal::lock;

const RECEIVE: usize = 0;
/// The driver may write single bytes through a register before its queues work.
const F_EMERG_WRITE: u32 = 2;
/// Offset of that register.
const EMERG_WR: usize = 8;
/// Input waiting for the guest; a guest that does not read must not make us grow.
const INPUT_LIMIT: usize = 64 << 10;
/// What one chain may print; the rest of a longer one is dropped.
const OUTPUT_LIMIT: u64 = 1 << 20;
/// Bytes copied at once.
const CHUNK: usize = 4096;

type Sink = Arc<Mutex<Box<dyn Write + Send>>>;

#[derive(Default)]
struct Input {
    bytes: VecDeque<u8>,
    waker: Option<Waker>,
}

/// A virtio console.
pub struct Console {
    sink: Sink,
    input: Arc<Mutex<Input>>,
}

/// Types on the console.
#[derive(Clone)]
pub struct ConsoleInput(Arc<Mutex<Input>>);

impl Console {
    /// A console that prints to `sink`, and its keyboard.
    pub fn new(sink: Box<dyn Write + Send>) -> (Self, ConsoleInput) {
        let input = Arc::new(Mutex::new(Input::default()));
        (Self { sink: Arc::new(Mutex::new(sink)), input: Arc::clone(&input) }, ConsoleInput(input))
    }

    fn transmit(&mut self, chain: &Chain, queue: &VirtQueue) {
        let mut sink = lock(&self.sink);
        let mut buffer = [0; CHUNK];
        let len = chain.readable.len().min(OUTPUT_LIMIT);
        let mut done = 0;
        while done < len {
            let part = (len - done).min(CHUNK as u64) as usize;
            // A closed sink or a bad address loses this output, as an unplugged terminal would.
            let read = queue.dma().read(&chain.readable, done, &mut buffer[..part]);
            if read.is_err() || sink.write_all(&buffer[..part]).is_err() {
                break;
            }
            done += part as u64;
        }
        let _ = sink.flush();
    }

    fn receive(&mut self, queue: &mut VirtQueue) -> Result<(), QueueError> {
        let mut input = lock(&self.input);
        while !input.bytes.is_empty() {
            let Some(chain) = queue.pop()? else { break };
            let room = chain.writable.len().min(input.bytes.len() as u64) as usize;
            let bytes: Vec<u8> = input.bytes.iter().copied().take(room).collect();
            // What goes to a bad address is lost.
            let written = if queue.dma().write(&chain.writable, 0, &bytes).is_ok() { room } else { 0 };
            input.bytes.drain(..room);
            queue.complete(&chain, written as u32)?;
        }
        Ok(())
    }
}

impl ConsoleInput {
    /// Types `bytes`; returns how many of them there was room for.
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        let mut input = lock(&self.0);
        let taken = bytes.len().min(INPUT_LIMIT - input.bytes.len());
        input.bytes.extend(&bytes[..taken]);
        let waker = input.waker.clone();
        drop(input); // the device takes this lock while it works
        if let Some(waker) = waker {
            waker.kick(RECEIVE);
        }
        taken
    }
}

struct Registers(Sink);

impl DeviceConfig for Registers {
    fn read(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: usize, data: &[u8]) {
        if let (EMERG_WR, Some(byte)) = (offset, data.first()) {
            let mut sink = lock(&self.0);
            let _ = sink.write_all(&[*byte]).and_then(|()| sink.flush());
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        feature(F_EMERG_WRITE)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64, 64]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        Arc::new(Registers(Arc::clone(&self.sink)))
    }

    fn connect(&mut self, waker: Waker) {
        lock(&self.input).waker = Some(waker);
    }

    fn process(&mut self, index: usize, queue: &mut VirtQueue) -> Result<(), QueueError> {
        if index == RECEIVE {
            return self.receive(queue);
        }
        while let Some(chain) = queue.pop()? {
            self.transmit(&chain, queue);
            queue.complete(&chain, 0)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::test_driver::*;
    use super::*;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            lock(&self.0).write(data)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn console() -> (Driver, ConsoleInput, Screen) {
        let screen = Screen::default();
        let (console, input) = Console::new(Box::new(screen.clone()));
        (Driver::ready(console, 0, 2), input, screen)
    }

    #[test]
    fn prints_what_the_guest_sends() {
        let (mut driver, _, screen) = console();
        driver.put(BUFFERS, b"hello world");
        driver.submit(1, &[(BUFFERS, 5, 0), (BUFFERS + 5, 6, 0)]);
        assert_eq!(driver.take_used(1), Some((0, 0)));
        driver.submit(1, &[(RAM, 5, 0)]);
        assert_eq!(driver.take_used(1), Some((2, 0)), "a bad buffer is given back");
        driver.write(DEVICE + 8, &u32::from(b'!').to_le_bytes());
        assert_eq!(*lock(&screen.0), b"hello world!");
    }

    #[test]
    fn one_chain_prints_a_mebibyte_at_most() {
        let (mut driver, _, screen) = console();
        driver.submit(1, &[(0, RAM as u32, 0), (0, RAM as u32, 0)]);
        assert_eq!(lock(&screen.0).len() as u64, OUTPUT_LIMIT);
    }

    #[test]
    fn input_waits_for_buffers_and_keeps_its_order() {
        let (mut driver, input, _) = console();
        assert_eq!(input.push_input(b"abcdef"), 6);
        driver.submit(0, &[(BUFFERS, 4, WRITE)]);
        assert_eq!(driver.take_used(0), Some((0, 4)));
        driver.submit(0, &[(BUFFERS + 4, 100, WRITE)]);
        assert_eq!(driver.take_used(0), Some((1, 2)));
        driver.submit(0, &[(BUFFERS + 6, 100, WRITE)]);
        assert_eq!(driver.take_used(0), None);
        input.push_input(b"gh");
        assert_eq!(driver.take_used(0), Some((2, 2)), "inline, so already there");
        assert_eq!(driver.get(BUFFERS, 8), b"abcdefgh");
    }

    #[test]
    fn a_guest_that_does_not_read_fills_a_bounded_buffer() {
        let (console, input) = Console::new(Box::new(io::sink()));
        assert_eq!(input.push_input(&[b'x'; 100_000]), INPUT_LIMIT);
        assert_eq!(input.push_input(b"y"), 0);
        let mut driver = Driver::ready(console, 0, 2);
        driver.submit(0, &[(BUFFERS, 0x2_0000, WRITE)]);
        assert_eq!(driver.take_used(0), Some((0, INPUT_LIMIT as u32)));
        drop(driver);
        assert_eq!(input.push_input(b"y"), 1, "outlives the device");
    }
}
