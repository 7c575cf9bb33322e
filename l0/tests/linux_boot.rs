//! Debian's own kernels boot on the software CPU to a busybox initramfs, do real work and power off, with one and two
//! vCPUs and a disk that is clean afterwards.
//!
//! `tests/data/guest-init` is the guest's `/init`: it takes jobs from the kernel command line and prints markers. The
//! images are made by `scripts/fetch-images`; a missing one is a failure that says so.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A hang shows up as a failure after this long, whatever the machine's load.
const PATIENCE: Duration = Duration::from_secs(600);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_path_buf()
}

fn image(name: &str) -> PathBuf {
    let path = root().join(".images").join(name);
    assert!(path.exists(), "{} is missing: run scripts/fetch-images", path.display());
    path
}

/// One `turtles run` of a Debian kernel.
struct Boot {
    kernel: &'static str,
    cpus: u32,
    jobs: &'static str,
    engine: &'static str,
    extra: Vec<String>,
}

impl Boot {
    fn new(kernel: &'static str, cpus: u32, jobs: &'static str) -> Self {
        Self { kernel, cpus, jobs, engine: "soft", extra: Vec::new() }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_turtles"));
        command
            .args(["run", "--engine", self.engine, "--memory", "512M", "--stats"])
            .arg("--kernel")
            .arg(image(&format!("vmlinuz-{}", self.kernel)))
            .arg("--initrd")
            .arg(image(&format!("initrd-{}.gz", self.kernel)))
            .args(["--cpus", &self.cpus.to_string()])
            .args(["--cmdline", &format!("console=ttyS0 turtles.run={}", self.jobs)])
            .args(&self.extra);
        command
    }

    /// Runs to the end; returns what the guest printed and what turtles said.
    fn run(&self) -> (String, String) {
        let mut child = self
            .command()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("turtles starts");
        let console = reader(child.stdout.take().expect("piped"));
        let said = reader(child.stderr.take().expect("piped"));
        let status = wait(&mut child);
        let (console, said) = (console.join().expect("read"), said.join().expect("read"));
        assert!(status, "turtles failed:\n{console}\n{said}");
        (console, said)
    }
}

fn reader(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
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
    let _ = child.kill();
    false
}

fn assert_jobs_done(console: &str, jobs: &str) {
    for job in jobs.split(',') {
        assert!(console.contains(&format!("turtles: end {job}")), "job {job} did not end:\n{console}");
    }
    assert!(console.contains("turtles: done"), "not done:\n{console}");
}

/// A fresh copy of the ext4 image, removed at the end.
struct Disk(PathBuf);

impl Disk {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("turtles-{}-{name}.img", std::process::id()));
        std::fs::copy(image("ext4.img"), &path).expect("copy the disk image");
        Self(path)
    }

    fn assert_clean(&self) {
        let check = Command::new(image("e2fsck")).arg("-fn").arg(&self.0).output().expect("e2fsck runs");
        let said = String::from_utf8_lossy(&check.stdout);
        assert!(check.status.success(), "e2fsck: {said}");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// sha256sum of 32 MiB of zeros, as the host computes it too.
const ZEROS_SUM: &str = "83ee47245398adee79bd9c0a8bc57b821e92aba10f5f9ade8a5d1fae4d8c4302";

#[test]
fn cloud_kernel_works_on_one_cpu() {
    let jobs = "dd,sha,forks,pipe";
    let (console, _) = Boot::new("cloud", 1, jobs).run();
    assert_jobs_done(&console, jobs);
    assert!(console.contains(ZEROS_SUM), "wrong sum:\n{console}");
    assert!(console.contains("turtles: machine cpus 1"));
}

/// The reference by itself: what the translator falls back to also has to carry a whole system.
#[test]
fn cloud_kernel_works_in_the_interpreter() {
    let jobs = "forks,pipe";
    let mut boot = Boot::new("cloud", 2, jobs);
    boot.engine = "soft,interpreter";
    let (console, _) = boot.run();
    assert_jobs_done(&console, jobs);
}

#[test]
fn cloud_kernel_keeps_its_disk_clean_on_two_cpus() {
    let disk = Disk::new("cloud");
    let mut boot = Boot::new("cloud", 2, "smp,disk");
    boot.extra = vec!["--disk".into(), disk.0.display().to_string()];
    let (console, _) = boot.run();
    assert_jobs_done(&console, "smp,disk");
    assert!(console.contains("turtles: machine cpus 2"));
    disk.assert_clean();
}

#[test]
fn full_kernel_works_on_one_and_two_cpus() {
    let (console, _) = Boot::new("full", 1, "forks").run();
    assert_jobs_done(&console, "forks");
    let disk = Disk::new("full");
    let mut boot = Boot::new("full", 2, "dd,sha,forks,disk");
    boot.extra = vec!["--disk".into(), disk.0.display().to_string()];
    let (console, _) = boot.run();
    assert_jobs_done(&console, "dd,sha,forks,disk");
    assert!(console.contains(ZEROS_SUM), "wrong sum:\n{console}");
    disk.assert_clean();
}

#[test]
fn a_read_only_disk_stays_as_it_was() {
    let disk = Disk::new("readonly");
    let before = std::fs::read(&disk.0).expect("read");
    let mut boot = Boot::new("cloud", 1, "diskro");
    boot.extra = vec!["--disk".into(), format!("{},ro", disk.0.display())];
    let (console, _) = boot.run();
    assert_jobs_done(&console, "diskro");
    assert!(before == std::fs::read(&disk.0).expect("read"), "the image changed");
}

#[test]
fn a_run_in_virtual_time_repeats_exactly() {
    let mut boot = Boot::new("cloud", 1, "poweroff");
    boot.extra = vec!["--clock".into(), "virtual".into()];
    let instructions = |said: &str| {
        let told = said.lines().find_map(|line| line.strip_suffix(" instructions"));
        told.and_then(|line| line.rsplit(", ").next()).map(str::to_owned)
    };
    let (first, said_first) = boot.run();
    let (second, said_second) = boot.run();
    assert_jobs_done(&first, "poweroff");
    assert_eq!(first, second, "the console differs");
    let count = instructions(&said_first);
    assert!(count.is_some(), "no count in: {said_first}");
    assert_eq!(count, instructions(&said_second));
}

#[test]
fn the_console_is_a_shell_and_ctrl_a_x_leaves() {
    let mut child = Boot::new("cloud", 1, "shell")
        .command()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("turtles starts");
    let mut keyboard = child.stdin.take().expect("piped");
    let mut screen = child.stdout.take().expect("piped");
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok(n @ 1..) = screen.read(&mut buffer) {
            let _ = sender.send(buffer[..n].to_vec());
        }
    });
    let mut seen = String::new();
    let mut until = |mark: &str| {
        let started = Instant::now();
        while !seen.contains(mark) {
            assert!(started.elapsed() < PATIENCE, "no '{mark}' in:\n{seen}");
            if let Ok(bytes) = receiver.recv_timeout(Duration::from_millis(100)) {
                seen.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
    };
    until("turtles# ");
    keyboard.write_all(b"echo $((6*7))-$(uname -m)\n").expect("type");
    until("42-x86_64");
    keyboard.write_all(b"\x01x").expect("type");
    assert!(wait(&mut child), "Ctrl-A x did not end the run with exit code 0");
}
