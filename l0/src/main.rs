//! The `turtles` command: words → configuration → run → exit code.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
