//! Compiles the guest runtime and each guest program into a freestanding ELF image.
//!
//! Cargo cannot build a bare-metal binary as a plain dependency, so this script calls the same `rustc` that
//! cargo uses. The images do not depend on the cargo profile: a debug build tests the same guests as a
//! release build. Nothing is fetched; the only tool needed beside `rustc` is a linker.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// The only target installed with a plain Rust on Linux; everything of an OS is switched off below.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    for watched in ["build.rs", "link.ld", "runtime", "programs", "flat"] {
        println!("cargo:rerun-if-changed={watched}");
    }
    println!("cargo:rerun-if-env-changed=TURTLES_GUEST_LD");

    let build = Build::from_env();
    let programs = sources(&build.root.join("programs"));
    build.runtime();
    // Two at a time: each is a whole rustc, and small machines are the common case.
    for pair in programs.chunks(2) {
        std::thread::scope(|scope| {
            for source in pair {
                scope.spawn(|| build.program(source));
            }
        });
    }
    build.flat();
    build.table(&programs);
}

/// What every compiler call needs to know.
struct Build {
    rustc: PathBuf,
    linker: Linker,
    root: PathBuf,
    out: PathBuf,
}

/// A linker and the way to speak to it.
struct Linker {
    path: PathBuf,
    flavor: &'static str,
}

impl Build {
    fn from_env() -> Build {
        let var =
            |name: &str| PathBuf::from(env::var_os(name).unwrap_or_else(|| die(&format!("{name} not set"))));
        let rustc = var("RUSTC");
        let linker = Linker::find(&rustc);
        Build { rustc, linker, root: var("CARGO_MANIFEST_DIR"), out: var("OUT_DIR") }
    }

    /// A `rustc` call with the flags that make code freestanding.
    fn rustc(&self, crate_name: &str, source: &Path) -> Command {
        let mut command = Command::new(&self.rustc);
        command.args(["--edition", "2024", "--target", TARGET, "--crate-name", crate_name]);
        command.args(["-C", "panic=abort", "-C", "relocation-model=static", "-C", "code-model=small"]);
        command.args(["-C", "target-cpu=x86-64", "-C", "no-redzone=yes", "-C", "opt-level=2"]);
        command.args(["-C", "force-unwind-tables=no", "-C", "codegen-units=1", "-C", "debuginfo=0"]);
        command.arg(source);
        command
    }

    fn runtime(&self) {
        let mut command = self.rustc("rt", &self.root.join("runtime/lib.rs"));
        command.args(["--crate-type", "rlib", "-o"]).arg(self.out.join("librt.rlib"));
        run(command, "compiling the guest runtime");
    }

    fn program(&self, source: &Path) {
        let name = stem(source);
        let mut command = self.rustc(&name, source);
        command.args(["--crate-type", "bin", "--extern"]).arg(with_path("rt=", &self.out.join("librt.rlib")));
        command.args(["-C", &format!("linker-flavor={}", self.linker.flavor), "-C"]);
        command.arg(with_path("linker=", &self.linker.path));
        command.arg("-C").arg(with_path("link-arg=-T", &self.root.join("link.ld")));
        for arg in
            ["-nostdlib", "-static", "-no-pie", "--build-id=none", "-zmax-page-size=0x1000", "--strip-debug"]
        {
            command.args(["-C", &format!("link-arg={arg}")]);
        }
        // `build-id`, `gdb` sections and temporary objects must not depend on the machine: equal sources, equal images.
        command.args(["-C", "strip=debuginfo", "-o"]).arg(self.out.join(format!("{name}.elf")));
        run(command, &format!("building the guest program `{name}`"));
    }

    /// The real-mode image is a program without the runtime: one section, linked at 0x7c00, no headers.
    fn flat(&self) {
        let object = self.out.join("flat.o");
        let mut command = self.rustc("flat", &self.root.join("flat/boot16.rs"));
        command.args(["--crate-type", "lib", "--emit", "obj", "-o"]).arg(&object);
        run(command, "compiling the flat real-mode image");
        let mut command = Command::new(&self.linker.path);
        if self.linker.flavor == "ld.lld" {
            command.args(["-flavor", "gnu"]);
        }
        command.args(["-nostdlib", "-Ttext=0x7c00", "-e", "0x7c00", "--oformat", "binary", "-o"]);
        command.arg(self.out.join("flat.bin")).arg(&object);
        run(command, "linking the flat real-mode image");
    }

    /// Writes the table that `lib.rs` includes: names, descriptions (the first `//!` line), bytes.
    fn table(&self, programs: &[PathBuf]) {
        let mut table = String::from("&[\n");
        for source in programs {
            let name = stem(source);
            let text =
                fs::read_to_string(source).unwrap_or_else(|e| die(&format!("{}: {e}", source.display())));
            let what = text.lines().next().and_then(|line| line.strip_prefix("//! ")).unwrap_or_else(|| {
                die(&format!("{}: the first line must be `//! ` and say what it shows", source.display()))
            });
            let image = self.out.join(format!("{name}.elf"));
            let _ = writeln!(
                table,
                "    Guest {{ name: {name:?}, what: {what:?}, image: include_bytes!({image:?}) }},"
            );
        }
        table.push(']');
        let path = self.out.join("table.rs");
        fs::write(&path, table).unwrap_or_else(|e| die(&format!("{}: {e}", path.display())));
    }
}

impl Linker {
    /// The linker the user names, else GNU ld, else the lld that comes with Rust.
    fn find(rustc: &Path) -> Linker {
        if let Some(path) = env::var_os("TURTLES_GUEST_LD") {
            return Linker { path: path.into(), flavor: "ld" };
        }
        if Command::new("ld").arg("--version").output().is_ok_and(|o| o.status.success()) {
            return Linker { path: "ld".into(), flavor: "ld" };
        }
        let sysroot =
            Command::new(rustc).args(["--print", "sysroot"]).output().map(|o| o.stdout).unwrap_or_default();
        let bundled = PathBuf::from(String::from_utf8_lossy(&sysroot).trim())
            .join("lib/rustlib")
            .join(env::var("HOST").unwrap_or_default())
            .join("bin/rust-lld");
        if bundled.is_file() {
            return Linker { path: bundled, flavor: "ld.lld" };
        }
        die(
            "no linker found for the embedded guest programs. Install one (Debian, Ubuntu: `apt install gcc`, which \
             brings GNU ld) or name one in TURTLES_GUEST_LD",
        )
    }
}

/// The `.rs` files of a folder, sorted by name.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| die(&format!("{}: {e}", folder.display())));
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .collect();
    found.sort();
    found
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn with_path(prefix: &str, path: &Path) -> std::ffi::OsString {
    let mut text = std::ffi::OsString::from(prefix);
    text.push(path);
    text
}

fn run(mut command: Command, doing: &str) {
    match command.output() {
        Ok(output) if output.status.success() => {
            for line in String::from_utf8_lossy(&output.stderr).lines() {
                println!("cargo:warning={line}");
            }
        }
        Ok(output) => die(&format!("{doing} failed:\n{}", String::from_utf8_lossy(&output.stderr))),
        Err(error) => die(&format!("{doing}: cannot run {:?}: {error}", command.get_program())),
    }
}

fn die(message: &str) -> ! {
    eprintln!("error: {message}");
    exit(1)
}
