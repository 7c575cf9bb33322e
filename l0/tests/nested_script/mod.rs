//! Runs a script of `scripts/` that ends with a verdict on every level of a nested machine.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A hang shows up as a failure after this long, whatever the machine's load.
const PATIENCE: Duration = Duration::from_secs(1200);

/// A script, and what `scripts/fetch-images` has to have made for it.
pub struct NestedScript {
    pub name: &'static str,
    pub fetch_option: &'static str,
    pub images: &'static [&'static str],
}

impl NestedScript {
    /// Its console, from a run with this build of turtles that succeeded; None, with a line that says so, where its images
    /// were not made.
    pub fn run(&self, arguments: &[&str]) -> Option<String> {
        let (name, option) = (self.name, self.fetch_option);
        for image in self.images {
            if !root().join(".images").join(image).exists() {
                println!("SKIP {name}: no .images/{image}: run scripts/fetch-images {option}");
                return None;
            }
        }
        let mut child = Command::new(root().join("scripts").join(name))
            .args(["--binary", env!("CARGO_BIN_EXE_turtles")])
            .args(arguments)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the script starts");
        let mut console = child.stdout.take().expect("piped");
        let console = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = console.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).replace('\r', "")
        });
        let succeeded = wait(&mut child);
        let console = console.join().expect("read");
        assert!(succeeded, "scripts/{name} {arguments:?} failed:\n{console}");
        Some(console)
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_path_buf()
}

/// Waits for the end; false for an exit code other than 0 or a hang.
fn wait(child: &mut Child) -> bool {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().expect("wait") {
            return status.success();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // The script's children too: they hold the pipe.
    let _ = Command::new("kill").args(["-9", "--", &format!("-{}", child.id())]).status();
    let _ = child.wait();
    false
}

pub fn assert_lines(console: &str, wanted: &[&str]) {
    for line in wanted {
        assert!(console.lines().any(|seen| seen.starts_with(line)), "no line '{line}' in:\n{console}");
    }
}
