//! Linux's KVM as guest hypervisor, end to end: Debian's kernel with kvm_intel is L1, Debian's own QEMU in it boots the
//! same kernel as L2 to a shell prompt, and both power off. `scripts/nested-kvm` makes the images and runs it; its exit
//! code is 0 only if every level did what was asked.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A hang shows up as a failure after this long, whatever the machine's load.
const PATIENCE: Duration = Duration::from_secs(1200);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_path_buf()
}

/// `scripts/nested-kvm` with this build of turtles; None, with a line that says so, where its images were not made.
fn nested_kvm(arguments: &[&str]) -> Option<String> {
    for name in ["vmlinuz-cloud", "kvm.img", "initrd-kvm.gz"] {
        if !root().join(".images").join(name).exists() {
            println!("SKIP nested KVM: no .images/{name}: run scripts/fetch-images --kvm");
            return None;
        }
    }
    let mut child = Command::new(root().join("scripts/nested-kvm"))
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
    assert!(succeeded, "scripts/nested-kvm {arguments:?} failed:\n{console}");
    Some(console)
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

fn assert_lines(console: &str, wanted: &[&str]) {
    for line in wanted {
        assert!(console.lines().any(|seen| seen.starts_with(line)), "no line '{line}' in:\n{console}");
    }
}

#[test]
fn debian_kvm_boots_linux_as_l2_to_a_prompt() {
    let Some(console) = nested_kvm(&[]) else { return };
    assert_lines(
        &console,
        &[
            "L1: kvm_intel loaded, ept=Y",
            "L2: turtles: init reached",
            "L2: turtles# Linux",
            "L2: turtles: done",
            "L1: L2 done",
            "turtles: done",
        ],
    );
}

#[test]
fn l2_on_shadow_paging_keeps_its_disk_clean() {
    let Some(console) = nested_kvm(&["--l1-options", "ept=0", "--l2-disk", "--machine", "microvm"]) else {
        return;
    };
    assert_lines(
        &console,
        &[
            "L1: kvm_intel loaded, ept=N",
            "L2: turtles: end disk",
            "L1: L2 done",
            "nested-kvm: L2's disk is clean",
        ],
    );
}
