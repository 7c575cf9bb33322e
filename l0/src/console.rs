//! The person's side of COM1: where its output goes, and where its input comes from.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::devices::{MachineControl, MachineEvent};
use crate::vcpu_signal::lock;

/// Ctrl-A, which starts a command to us.
const ESCAPE: u8 = 1;

/// Output that may wait for a slow sink.
const BACKLOG: usize = 1 << 20;
/// How long a guest waits for a sink that takes nothing; then its output is dropped until the sink moves again.
const PATIENCE: Duration = Duration::from_millis(100);

/// Writes on a thread of its own, so that a slow terminal does not stop a vCPU; many bytes go out in one write.
///
/// What waits is bounded: a guest that prints faster than its sink reads is slowed down to the sink's speed, and
/// never stopped by a sink that reads nothing.
pub struct Output {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<Option<io::Error>>>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// No more will come.
    closed: bool,
    /// The sink took nothing for [`PATIENCE`].
    stuck: bool,
}

impl Output {
    /// Starts the thread that writes to `sink`.
    pub fn new(sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let from = Arc::clone(&queue);
        let thread = std::thread::Builder::new().name("console".into()).spawn(move || from.drain_to(sink))?;
        Ok(Self { queue, thread: Some(thread) })
    }

    /// The device's end.
    pub fn writer(&self) -> Box<dyn Write + Send> {
        Box::new(OutputWriter(Arc::clone(&self.queue)))
    }

    /// Waits until everything is written; the first error that the sink gave, if it gave one. A reader that went away
    /// is none.
    pub fn finish(mut self) -> Option<io::Error> {
        self.close()
    }

    fn close(&mut self) -> Option<io::Error> {
        lock(&self.queue.waiting).closed = true;
        self.queue.changed.notify_all();
        let error = self.thread.take()?.join().ok()?;
        error.filter(|e| e.kind() != io::ErrorKind::BrokenPipe)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        drop(self.close());
    }
}

impl Queue {
    fn drain_to(&self, mut sink: Box<dyn Write + Send>) -> Option<io::Error> {
        let mut failed = None;
        loop {
            let mut waiting = lock(&self.waiting);
            while waiting.bytes.is_empty() && !waiting.closed {
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            let bytes = std::mem::take(&mut waiting.bytes);
            waiting.stuck = false;
            drop(waiting);
            self.changed.notify_all();
            if bytes.is_empty() {
                return failed;
            }
            // A sink that fails (a closed pipe, a full disk) is no reason to stop the guest.
            if failed.is_none() {
                failed = sink.write_all(&bytes).and_then(|()| sink.flush()).err();
            }
        }
    }

    /// Waits for room; false if none came.
    fn make_room<'a>(&'a self, waiting: MutexGuard<'a, Waiting>) -> (MutexGuard<'a, Waiting>, bool) {
        let full = |waiting: &mut Waiting| waiting.bytes.len() >= BACKLOG && !waiting.closed;
        let patience = if waiting.stuck { Duration::ZERO } else { PATIENCE };
        let (mut waiting, late) =
            self.changed.wait_timeout_while(waiting, patience, full).unwrap_or_else(PoisonError::into_inner);
        waiting.stuck |= late.timed_out();
        let room = waiting.bytes.len() < BACKLOG;
        (waiting, room)
    }
}

struct OutputWriter(Arc<Queue>);

impl Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (mut waiting, room) = self.0.make_room(lock(&self.0.waiting));
        if room {
            waiting.bytes.extend_from_slice(bytes);
            drop(waiting);
            self.0.changed.notify_all();
        }
        Ok(bytes.len())
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

/// Reads `source` on a thread and feeds the guest; Ctrl-A x ends the run, Ctrl-A Ctrl-A sends Ctrl-A.
pub fn start_input(
    mut source: Box<dyn Read + Send>,
    escapes: bool,
    sink: InputSink,
    control: Arc<dyn MachineControl>,
) -> io::Result<()> {
    let body = move || {
        let mut escaped = false;
        let mut buffer = [0; 256];
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
            feed(&bytes, &sink);
        }
    };
    std::thread::Builder::new().name("input".into()).spawn(body).map(drop)
}

/// Hands over all bytes, waiting while the guest has no room for more.
fn feed(mut bytes: &[u8], sink: &InputSink) {
    while !bytes.is_empty() {
        let taken = sink(bytes).min(bytes.len());
        bytes = &bytes[taken..];
        if !bytes.is_empty() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}

/// Our end of a pseudo-terminal. Output is dropped while nobody has the other end open.
pub struct Pty(File);

/// How long a terminal program may take to read on before output to it is dropped.
const PTY_PATIENCE_MS: libc::c_int = 5000;

impl Pty {
    /// Opens one; returns our end and the other end's name.
    pub fn open() -> io::Result<(Self, String)> {
        let check = |code: libc::c_int| if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
        // SAFETY: posix_openpt returns a new descriptor or -1; the others take that descriptor; ptsname_r writes at
        // most the given length, with a terminating zero; `termios` is plain data that tcgetattr fills.
        unsafe {
            let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK;
            let fd = libc::posix_openpt(flags);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let file = File::from(OwnedFd::from_raw_fd(fd));
            check(libc::grantpt(fd))?;
            check(libc::unlockpt(fd))?;
            let mut name = [0u8; 128];
            check(libc::ptsname_r(fd, name.as_mut_ptr().cast(), name.len()))?;
            let len = name.iter().position(|&b| b == 0).unwrap_or(0);
            let name = String::from_utf8_lossy(&name[..len]).into_owned();
            let mut mode: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(fd, &mut mode) == 0 {
                libc::cfmakeraw(&mut mode);
                libc::tcsetattr(fd, libc::TCSANOW, &mode);
            }
            // Only an end that was closed again shows as closed; one that was never open looks like a slow one.
            drop(File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&name));
            Ok((Self(file), name))
        }
    }

    /// The same end once more, for input.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// What the kernel says of the terminal: ready, hung up, or neither in time.
    fn poll(&self, events: libc::c_short, timeout_ms: libc::c_int) -> libc::c_short {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events, revents: 0 };
        // SAFETY: one pollfd, valid through the call.
        match unsafe { libc::poll(&raw mut poll, 1, timeout_ms) } {
            1 => poll.revents,
            _ => 0,
        }
    }
}

impl Write for Pty {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let state = self.poll(libc::POLLOUT, PTY_PATIENCE_MS);
        if state & libc::POLLHUP != 0 || state & libc::POLLOUT == 0 {
            return Ok(bytes.len());
        }
        match self.0.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::Interrupted.into()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Pty {
    /// Waits for input, also through times when nobody has the other end open.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let state = self.poll(libc::POLLIN, -1);
            if state & libc::POLLIN == 0 {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
            match self.0.read(buffer) {
                Ok(0) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EAGAIN)) => {}
                other => return other,
            }
        }
    }
}

/// Opens the file that `--serial file=` names, unless it is one of `images`: those would be lost.
pub fn open_file<'a>(path: &Path, images: impl Iterator<Item = &'a Path>) -> io::Result<File> {
    let place = |path: &Path| std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    if let Some(here) = place(path) {
        for image in images {
            if place(image) == Some(here) {
                let what = format!("it is the same file as {}, which would be overwritten", image.display());
                return Err(io::Error::other(what));
            }
        }
    }
    File::create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes nothing until told.
    struct Gate(Arc<Mutex<()>>, Capture);

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _open = lock(&self.0);
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_written_arrives_in_order() {
        let capture = Capture::default();
        let output = Output::new(Box::new(capture.clone())).expect("a thread");
        let mut writer = output.writer();
        let expected: String = (0..5000).map(|i| format!("line {i}\n")).collect();
        for byte in expected.bytes() {
            writer.write_all(&[byte]).expect("never fails");
        }
        assert!(output.finish().is_none());
        assert_eq!(capture.text(), expected);
    }

    #[test]
    fn a_sink_that_reads_nothing_neither_stops_the_guest_nor_fills_the_host() {
        let gate = Arc::new(Mutex::new(()));
        let capture = Capture::default();
        let output = Output::new(Box::new(Gate(Arc::clone(&gate), capture.clone()))).expect("a thread");
        let mut writer = output.writer();
        let closed = lock(&gate);
        for _ in 0..64 {
            writer.write_all(&[b'x'; 65536]).expect("never fails");
        }
        assert!(lock(&output.queue.waiting).bytes.len() < BACKLOG + 65536);
        drop(closed);
        assert!(output.finish().is_none());
        assert!(capture.text().len() >= BACKLOG);
    }

    #[test]
    fn a_pty_that_nobody_opened_takes_any_amount() {
        let (mut pty, name) = Pty::open().expect("a pseudo-terminal");
        assert!(name.starts_with("/dev/pts/"));
        pty.write_all(&[b'x'; 100_000]).expect("dropped");
    }

    #[test]
    fn a_pty_can_be_left_and_opened_again() {
        let (mut pty, name) = Pty::open().expect("a pseudo-terminal");
        let mut buffer = [0; 16];
        for word in [b"one\n", b"two\n"] {
            let mut other = File::options().read(true).write(true).open(&name).expect("its other end");
            other.write_all(word).expect("room");
            assert_eq!(pty.read(&mut buffer).expect("a word"), 4);
            assert_eq!(&buffer[..4], word);
            pty.write_all(b"pong").expect("somebody is there");
            assert_eq!(other.read(&mut buffer).expect("an answer"), 4);
        }
    }
}
