//! `--trace FILE`: what happened, as it happened, for a person (text) or for Perfetto and chrome://tracing (FILE ends in
//! .json: Chrome's trace event format, a process for each vCPU with a thread for each level).

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::clock::Clock;
use crate::vcpu_signal::lock;

/// Who was executing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Level {
    L0,
    L1,
    L2,
}

impl Level {
    fn number(self) -> u32 {
        match self {
            Self::L0 => 0,
            Self::L1 => 1,
            Self::L2 => 2,
        }
    }
}

/// A return to L0, and what L0 made of it.
pub struct Return<'a> {
    pub vcpu: usize,
    /// Who was executing.
    pub level: Level,
    pub rip: u64,
    /// The exit's reason, or L1's VMX instruction.
    pub name: &'a str,
    pub details: &'a str,
    pub outcome: &'a str,
    /// Since when this level has been executing, and what for.
    pub since_ns: u64,
    pub doing: &'a str,
    pub at_ns: u64,
    pub handled_ns: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Format {
    Text,
    Chrome,
}

struct Sink {
    out: Option<BufWriter<Box<dyn io::Write + Send>>>,
    /// Why the rest is missing.
    failure: Option<io::Error>,
    events: u64,
}

/// A trace under way, shared by all vCPUs.
pub struct Trace {
    clock: Arc<Clock>,
    format: Format,
    sink: Mutex<Sink>,
}

impl Trace {
    /// Starts a trace in `file`; its name, `path`, chooses the format.
    pub fn new(file: File, path: &Path, clock: Arc<Clock>, vcpus: usize) -> Arc<Self> {
        let is_json = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
        Self::to_writer(Box::new(file), if is_json { Format::Chrome } else { Format::Text }, clock, vcpus)
    }

    fn to_writer(
        out: Box<dyn io::Write + Send>,
        format: Format,
        clock: Arc<Clock>,
        vcpus: usize,
    ) -> Arc<Self> {
        let sink = Sink { out: Some(BufWriter::with_capacity(1 << 18, out)), failure: None, events: 0 };
        let trace = Self { clock, format, sink: Mutex::new(sink) };
        if format == Format::Chrome {
            (0..vcpus).for_each(|vcpu| trace.name_tracks(vcpu));
        }
        Arc::new(trace)
    }

    /// A return to L0.
    pub fn returned(&self, event: &Return<'_>) {
        match self.format {
            Format::Text => self.write(&text_of(event)),
            Format::Chrome => {
                self.write(&span(event.vcpu, event.level, event.doing, event.since_ns, event.at_ns, &[]));
                let rip = format!("{:#x}", event.rip);
                let arguments = [("rip", &*rip), ("details", event.details), ("outcome", event.outcome)];
                let (from, to) = (event.at_ns, event.handled_ns);
                self.write(&span(event.vcpu, Level::L0, event.name, from, to, &arguments));
            }
        }
    }

    /// Something that happens at once, now.
    pub fn happened(&self, vcpu: usize, level: Level, name: &str, details: &str) {
        let now = self.clock.now_ns();
        match self.format {
            Format::Text => {
                self.write(&format!("{} {:18} {name}: {details}", Stamp(now, vcpu, level), ""));
            }
            Format::Chrome => self.write(&format!(
                r#"{{"ph":"i","s":"t","pid":{vcpu},"tid":{},"ts":{},"name":{},"args":{{"details":{}}}}}"#,
                level.number(),
                Micros(now),
                Quoted(name),
                Quoted(details)
            )),
        }
    }

    /// Writes what is left; fails if some of the trace could not be written.
    pub fn finish(&self) -> io::Result<()> {
        let mut sink = lock(&self.sink);
        if self.format == Format::Chrome {
            let end: &[u8] = if sink.events == 0 { b"[]\n" } else { b"\n]\n" };
            sink.write(end);
        }
        if let Some(mut out) = sink.out.take() {
            if let Err(failure) = out.flush() {
                sink.failure.get_or_insert(failure);
            }
        }
        sink.failure.take().map_or(Ok(()), Err)
    }

    fn name_tracks(&self, vcpu: usize) {
        self.write(&format!(
            r#"{{"ph":"M","pid":{vcpu},"name":"process_name","args":{{"name":"vCPU {vcpu}"}}}}"#
        ));
        for (thread, name) in ["L0", "L1", "L2"].into_iter().enumerate() {
            self.write(&format!(
                r#"{{"ph":"M","pid":{vcpu},"tid":{thread},"name":"thread_name","args":{{"name":"{name}"}}}}"#
            ));
        }
    }

    /// One line of text, or one event.
    fn write(&self, record: &str) {
        let mut sink = lock(&self.sink);
        if self.format == Format::Chrome {
            let separator: &[u8] = if sink.events == 0 { b"[\n" } else { b",\n" };
            sink.write(separator);
        }
        sink.events += 1;
        sink.write(record.as_bytes());
        if self.format == Format::Text {
            sink.write(b"\n");
        }
    }
}

impl Sink {
    /// After the first failure nothing more is written.
    fn write(&mut self, bytes: &[u8]) {
        if let Some(Err(failure)) = self.out.as_mut().map(|out| out.write_all(bytes)) {
            self.out = None;
            self.failure = Some(failure);
        }
    }
}

fn text_of(event: &Return<'_>) -> String {
    let stamp = Stamp(event.at_ns, event.vcpu, event.level);
    let mut line = format!("{stamp} {:#018x} {}", event.rip, event.name);
    if !event.details.is_empty() {
        // Writing to a String cannot fail.
        let _ = write!(line, ": {}", event.details);
    }
    if !event.outcome.is_empty() {
        let _ = write!(line, " → {}", event.outcome);
    }
    line
}

fn span(vcpu: usize, level: Level, name: &str, from: u64, to: u64, arguments: &[(&str, &str)]) -> String {
    let mut event = format!(
        r#"{{"ph":"X","pid":{vcpu},"tid":{},"ts":{},"dur":{},"name":{}"#,
        level.number(),
        Micros(from),
        Micros(to.saturating_sub(from)),
        Quoted(name)
    );
    for (n, (key, value)) in arguments.iter().filter(|(_, value)| !value.is_empty()).enumerate() {
        let start = if n == 0 { r#","args":{"# } else { "," };
        let _ = write!(event, r#"{start}"{key}":{}"#, Quoted(value));
    }
    event += if arguments.is_empty() { "}" } else { "}}" };
    event
}

/// Time, vCPU and level, in columns.
struct Stamp(u64, usize, Level);

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(ns, vcpu, level) = *self;
        write!(f, "{:5}.{:09} vcpu{vcpu} L{}", ns / 1_000_000_000, ns % 1_000_000_000, level.number())
    }
}

/// Nanoseconds as the format's microseconds.
struct Micros(u64);

impl std::fmt::Display for Micros {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

/// A JSON string.
struct Quoted<'a>(&'a str);

impl std::fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_char('"')?;
        for c in self.0.chars() {
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                c if c < ' ' => write!(f, "\\u{:04x}", u32::from(c))?,
                c => f.write_char(c)?,
            }
        }
        f.write_char('"')
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::clock::ClockSource;

    /// A writer whose bytes the test keeps.
    #[derive(Clone, Default)]
    pub(crate) struct Kept(pub(crate) Arc<Mutex<Vec<u8>>>);

    impl Kept {
        pub(crate) fn text(&self) -> String {
            String::from_utf8(lock(&self.0).clone()).unwrap()
        }
    }

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A trace in text, and what comes out of it.
    pub(crate) fn text(clock: &Arc<Clock>) -> (Arc<Trace>, Kept) {
        let kept = Kept::default();
        (Trace::to_writer(Box::new(kept.clone()), Format::Text, Arc::clone(clock), 1), kept)
    }

    const RETURN: Return<'_> = Return {
        vcpu: 0,
        level: Level::L2,
        rip: 0x1000,
        name: "CPUID",
        details: "leaf 0x1",
        outcome: "L1",
        since_ns: 1500,
        doing: "guest",
        at_ns: 2_000_001_234,
        handled_ns: 2_000_002_000,
    };

    #[test]
    fn text_is_a_line_for_each_event() {
        let clock = Clock::new(ClockSource::Virtual, 1_000_000_000);
        let (trace, kept) = text(&clock);
        trace.returned(&RETURN);
        trace.returned(&Return { details: "", outcome: "", level: Level::L1, ..RETURN });
        trace.happened(1, Level::L2, "EPT02", "0x1000 is 0x2000");
        trace.finish().unwrap();
        assert_eq!(
            kept.text(),
            "    2.000001234 vcpu0 L2 0x0000000000001000 CPUID: leaf 0x1 → L1\n    \
             2.000001234 vcpu0 L1 0x0000000000001000 CPUID\n    \
             0.000000000 vcpu1 L2                    EPT02: 0x1000 is 0x2000\n"
        );
    }

    #[test]
    fn chromes_format_is_an_array_of_events() {
        let clock = Clock::new(ClockSource::Virtual, 1_000_000_000);
        let kept = Kept::default();
        let trace = Trace::to_writer(Box::new(kept.clone()), Format::Chrome, clock, 1);
        trace.returned(&Return { details: "a \"b\" \\ \n", outcome: "", ..RETURN });
        trace.happened(0, Level::L2, "EPT02", "");
        trace.finish().unwrap();
        let text = kept.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines[0], lines[lines.len() - 1]), ("[", "]"));
        assert_eq!(lines[5], r#"{"ph":"X","pid":0,"tid":2,"ts":1.500,"dur":1999999.734,"name":"guest"},"#);
        assert_eq!(
            lines[6],
            r#"{"ph":"X","pid":0,"tid":0,"ts":2000001.234,"dur":0.766,"name":"CPUID","args":{"rip":"0x1000","details":"a \"b\" \\ \u000a"}},"#
        );
        assert_eq!(
            lines[7],
            r#"{"ph":"i","s":"t","pid":0,"tid":2,"ts":0.000,"name":"EPT02","args":{"details":""}}"#
        );
    }

    #[test]
    fn a_failure_to_write_is_told_once_at_the_end() {
        struct Full;
        impl io::Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let clock = Clock::new(ClockSource::Virtual, 1_000_000_000);
        let trace = Trace::to_writer(Box::new(Full), Format::Text, clock, 1);
        trace.returned(&RETURN);
        assert_eq!(trace.finish().unwrap_err().kind(), io::ErrorKind::StorageFull);
        trace.returned(&RETURN);
    }
}
