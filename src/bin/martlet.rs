// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command-line tool `martlet`: call, emit, listen and measure from a shell.

#[path = "../cli/mod.rs"]
mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
