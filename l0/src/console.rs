//! The person's side of COM1: where its output goes, and where its input comes from.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, SendError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::devices::{MachineControl, MachineEvent};
use crate::vcpu_signal::lock;

/// Ctrl-A, which starts a command to us.
const ESCAPE: u8 = 1;

/// Bytes that wait for the sink at most: what a guest prints while nobody reads must not grow without end.
const MOST_WAITING: usize = 4 << 20;
/// How long a vCPU waits for a sink that takes nothing; after that, what the guest prints is lost.
const PATIENCE: Duration = Duration::from_secs(5);

/// Writes on a thread of its own, so that a slow terminal does not stop a vCPU; many bytes go out in one write.
///
/// A sink that is slower than the guest in the long run does stop it, as a serial line with flow control would; one
/// that takes nothing at all (a pipe nobody reads) loses output, so that nothing the guest prints can hang the machine
/// or fill the host's memory.
pub struct Output {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Queue {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    /// Nothing more will come.
    closed: bool,
    /// The sink took nothing for too long; true until it takes something again.
    stuck: bool,
}

impl Output {
    /// Starts the thread that writes to `sink`.
    pub fn new(sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let body = Arc::clone(&queue);
        let thread = std::thread::Builder::new().name("console".into()).spawn(move || body.drain(sink))?;
        Ok(Self { queue, thread: Some(thread) })
    }

    /// The device's end.
    pub fn writer(&self) -> Box<dyn Write + Send> {
        Box::new(OutputWriter { queue: Arc::clone(&self.queue), patience: PATIENCE })
    }
}

impl Drop for Output {
    /// Waits until everything is written. What devices write afterwards is lost.
    fn drop(&mut self) {
        lock(&self.queue.state).closed = true;
        self.queue.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Queue {
    fn drain(&self, mut sink: Box<dyn Write + Send>) {
        loop {
            let mut state = lock(&self.state);
            while state.bytes.is_empty() && !state.closed {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.bytes.is_empty() {
                return;
            }
            let count = state.bytes.len().min(4096);
            let piece: Vec<u8> = state.bytes.drain(..count).collect();
            drop(state);
            // A console that went away (closed pipe) is no reason to stop the guest.
            drop(sink.write_all(&piece).and_then(|()| sink.flush()));
            lock(&self.state).stuck = false;
            self.changed.notify_all();
        }
    }

    fn push(&self, bytes: &[u8], patience: Duration) {
        let mut state = lock(&self.state);
        let mut since = Instant::now();
        let mut waiting = state.bytes.len();
        while state.bytes.len() + bytes.len() > MOST_WAITING && !state.closed {
            if state.stuck {
                return;
            }
            let left = patience.saturating_sub(since.elapsed());
            if left.is_zero() {
                log::warn!("nobody reads the guest's serial port: its output is lost");
                state.stuck = true;
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            if state.bytes.len() < waiting {
                (since, waiting) = (Instant::now(), state.bytes.len());
            }
        }
        if !state.closed {
            state.bytes.extend(bytes);
            drop(state);
            self.changed.notify_all();
        }
    }
}

struct OutputWriter {
    queue: Arc<Queue>,
    patience: Duration,
}

impl Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(MOST_WAITING)];
        self.queue.push(piece, self.patience);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Collects what a guest prints, for tests and the demo.
#[derive(Clone, Default)]
pub struct Capture(Arc<Mutex<Vec<u8>>>);

impl Capture {
    /// Everything printed so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&lock(&self.0)).into_owned()
    }
}

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Puts a terminal into raw mode; the old mode comes back on drop.
pub struct RawTerminal {
    saved: libc::termios,
}

impl RawTerminal {
    /// Raw mode for standard input, if it is a terminal.
    pub fn stdin() -> Option<Self> {
        // SAFETY: `termios` is plain data that tcgetattr fills; the descriptor is standard input.
        unsafe {
            let mut saved: libc::termios = std::mem::zeroed();
            if libc::isatty(0) == 0 || libc::tcgetattr(0, &mut saved) != 0 {
                return None;
            }
            let mut raw = saved;
            libc::cfmakeraw(&mut raw);
            // Output processing stays: our own messages end in plain newlines.
            raw.c_oflag = saved.c_oflag;
            (libc::tcsetattr(0, libc::TCSANOW, &raw) == 0).then_some(Self { saved })
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // SAFETY: restores the mode that tcgetattr gave for the same descriptor.
        unsafe {
            libc::tcsetattr(0, libc::TCSANOW, &self.saved);
        }
    }
}

/// Where input goes: takes bytes, returns how many it had room for.
pub type InputSink = Arc<dyn Fn(&[u8]) -> usize + Send + Sync>;

/// Pieces of input (each at most [`READ_SIZE`] bytes) that wait for the guest to take them.
const MOST_INPUT: usize = 256;
const READ_SIZE: usize = 256;

/// Reads `source` and feeds the guest; with `escapes` Ctrl-A x ends the run, Ctrl-A Ctrl-A sends Ctrl-A.
///
/// Reading and feeding have a thread each: a guest that takes no input must not keep Ctrl-A x from being read. What
/// is typed at such a guest is lost once enough of it waits; without escapes the source waits for ever instead.
pub fn start_input(
    mut source: Box<dyn Read + Send>,
    escapes: bool,
    sink: InputSink,
    control: Arc<dyn MachineControl>,
) -> io::Result<()> {
    let (sender, receiver) = sync_channel(MOST_INPUT);
    let mut sender = Typed { sender, stuck: false };
    let body = move || {
        let mut escaped = false;
        let mut buffer = [0; READ_SIZE];
        while let Ok(n @ 1..) = source.read(&mut buffer) {
            let mut bytes = Vec::with_capacity(n);
            for &byte in &buffer[..n] {
                match (escapes, escaped, byte) {
                    (true, false, ESCAPE) => escaped = true,
                    (true, true, b'x' | b'X') => {
                        control.request(MachineEvent::Quit);
                        return;
                    }
                    _ => {
                        escaped = false;
                        bytes.push(byte);
                    }
                }
            }
            if sender.send(bytes, if escapes { Some(PATIENCE) } else { None }).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("input".into()).spawn(body)?;
    std::thread::Builder::new().name("keyboard".into()).spawn(move || feed(&receiver, &sink)).map(drop)
}

/// The reader's end of what waits for the guest.
struct Typed {
    sender: SyncSender<Vec<u8>>,
    /// The guest took nothing for too long; true until there is room again.
    stuck: bool,
}

impl Typed {
    /// Waits for room as long as `patience` says (for ever without); then the input is lost. An error says that
    /// nobody is there to take it.
    fn send(&mut self, piece: Vec<u8>, patience: Option<Duration>) -> Result<(), SendError<Vec<u8>>> {
        let Some(patience) = patience else { return self.sender.send(piece) };
        let (since, mut piece) = (Instant::now(), piece);
        loop {
            piece = match self.sender.try_send(piece) {
                Err(TrySendError::Full(piece)) => piece,
                Err(TrySendError::Disconnected(piece)) => return Err(SendError(piece)),
                Ok(()) => {
                    self.stuck = false;
                    return Ok(());
                }
            };
            if self.stuck || since.elapsed() >= patience {
                self.stuck = true;
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Hands over all bytes, waiting while the guest has no room for more.
fn feed(receiver: &Receiver<Vec<u8>>, sink: &InputSink) {
    while let Ok(piece) = receiver.recv() {
        let mut bytes = &piece[..];
        while !bytes.is_empty() {
            let taken = sink(bytes).min(bytes.len());
            bytes = &bytes[taken..];
            if !bytes.is_empty() {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Opens a pseudo-terminal; returns our end and the other end's name.
pub fn open_pty() -> io::Result<(File, String)> {
    let check = |code: libc::c_int| if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: posix_openpt returns a new descriptor or -1; the others take that descriptor; ptsname_r writes at most
    // the given length, with a terminating zero.
    unsafe {
        let fd = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let file = File::from(OwnedFd::from_raw_fd(fd));
        check(libc::grantpt(fd))?;
        check(libc::unlockpt(fd))?;
        let mut name = [0u8; 128];
        check(libc::ptsname_r(fd, name.as_mut_ptr().cast(), name.len()))?;
        let len = name.iter().position(|&b| b == 0).unwrap_or(0);
        let mut mode: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(file.as_raw_fd(), &mut mode) == 0 {
            libc::cfmakeraw(&mut mode);
            libc::tcsetattr(file.as_raw_fd(), libc::TCSANOW, &mode);
        }
        Ok((file, String::from_utf8_lossy(&name[..len]).into_owned()))
    }
}

/// Opens the file that `--serial file=` names.
pub fn open_file(path: &Path) -> io::Result<File> {
    File::create(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// A sink that takes nothing until it is told to.
    struct Stuck(mpsc::Receiver<()>, Capture);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            self.1.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_comes_out_whole_and_in_order() {
        let capture = Capture::default();
        let output = Output::new(Box::new(capture.clone())).unwrap();
        let mut writer = output.writer();
        let text: String = (0..20_000).map(|n| format!("{n}\n")).collect();
        writer.write_all(text.as_bytes()).unwrap();
        drop(output);
        assert_eq!(capture.text(), text);
    }

    #[test]
    fn a_sink_that_takes_nothing_costs_neither_memory_nor_the_guest_s_time() {
        let capture = Capture::default();
        let (go, stuck) = mpsc::channel();
        let output = Output::new(Box::new(Stuck(stuck, capture.clone()))).unwrap();
        let mut writer =
            OutputWriter { queue: Arc::clone(&output.queue), patience: Duration::from_millis(50) };
        let started = Instant::now();
        for _ in 0..4 * MOST_WAITING / 4096 {
            writer.write_all(&[b'x'; 4096]).unwrap();
        }
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "the patience is spent once, not at every write"
        );
        assert!(lock(&output.queue.state).bytes.len() <= MOST_WAITING);
        drop(go);
        drop(output);
        assert!(capture.text().len() >= MOST_WAITING / 2, "what was taken comes out");
    }

    struct Quit(Mutex<Option<MachineEvent>>, Condvar);

    impl MachineControl for Quit {
        fn request(&self, event: MachineEvent) {
            *lock(&self.0) = Some(event);
            self.1.notify_all();
        }
    }

    #[test]
    fn the_escape_is_heard_while_the_guest_takes_no_input() {
        let mut typed = vec![b'k'; 200_000];
        typed.extend([ESCAPE, b'x']);
        let quit = Arc::new(Quit(Mutex::default(), Condvar::new()));
        start_input(Box::new(io::Cursor::new(typed)), true, Arc::new(|_| 0), quit.clone()).unwrap();
        let seen = lock(&quit.0);
        let (seen, _) =
            quit.1.wait_timeout_while(seen, Duration::from_secs(30), |seen| seen.is_none()).unwrap();
        assert_eq!(*seen, Some(MachineEvent::Quit));
    }
}
