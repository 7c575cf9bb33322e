//! The person's side of COM1: where its output goes, and where its input comes from.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::devices::{MachineControl, MachineEvent};
use crate::vcpu_signal::lock;

/// Ctrl-A, which starts a command to us.
const ESCAPE: u8 = 1;

/// Writes on a thread of its own, so that a slow terminal does not stop a vCPU; many bytes go out in one write.
pub struct Output {
    sender: Option<Sender<u8>>,
    thread: Option<JoinHandle<()>>,
}

impl Output {
    /// Starts the thread that writes to `sink`.
    pub fn new(sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let (sender, receiver) = channel();
        let thread =
            std::thread::Builder::new().name("console".into()).spawn(move || drain(&receiver, sink))?;
        Ok(Self { sender: Some(sender), thread: Some(thread) })
    }

    /// The device's end.
    pub fn writer(&self) -> Box<dyn Write + Send> {
        Box::new(OutputWriter { sender: self.sender.clone() })
    }
}

impl Drop for Output {
    /// Waits until everything is written. The devices must be gone (their writers hold the other end).
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn drain(receiver: &Receiver<u8>, mut sink: Box<dyn Write + Send>) {
    while let Ok(first) = receiver.recv() {
        let mut bytes = vec![first];
        bytes.extend(receiver.try_iter().take(4096));
        // A console that went away (closed pipe) is no reason to stop the guest.
        drop(sink.write_all(&bytes).and_then(|()| sink.flush()));
    }
}

struct OutputWriter {
    sender: Option<Sender<u8>>,
}

impl Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(sender) = &self.sender {
            for &byte in bytes {
                let _ = sender.send(byte);
            }
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
