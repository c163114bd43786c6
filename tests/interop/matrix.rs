// SPDX-License-Identifier: MIT OR Apache-2.0
//! `docs/compatibility.md`: a table of what ran and passed, and nothing else.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use crate::wire::Transport;
use crate::{Direction, Test, VERSIONS};

const HEAD: &str = "\
<!-- Written by `UPDATE_COMPATIBILITY=1 cargo test --all-features --test interop`. Do not edit: a run of the test fails when this
file differs from what ran. -->

# Compatibility with NestJS

Each cell names the test that proved it, against unmodified NestJS from npm (the exact versions are in
`tests/interop/README.md`). A cell is here because that test ran and passed when this file was written. `-` means that this
NestJS version or transport has no such thing.

Run all of them with `tests/interop/setup.sh && cargo test --all-features --test interop`, one of them with its name
appended after `--`.
";

pub(crate) fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/compatibility.md")
}

/// The file for these tests, all of which passed.
pub(crate) fn render(passed: &[Test]) -> String {
    let mut page = HEAD.to_owned();
    for transport in Transport::all() {
        for direction in Direction::ALL {
            let section: Vec<&Test> = passed
                .iter()
                .filter(|test| test.transport == transport && test.direction == direction)
                .collect();
            if section.is_empty() {
                continue;
            }
            let title = match direction {
                Direction::ToMartlet => "a NestJS client calls a Martlet service",
                Direction::ToExample => "a NestJS client calls `examples/interop_service.rs`",
                Direction::ToNest => "a Martlet client calls a NestJS service",
            };
            writeln!(page, "\n## {}: {title}\n", transport.wire().title).unwrap();
            writeln!(page, "| behaviour | NestJS 10 | NestJS 11 | NestJS 12 |\n|---|---|---|---|").unwrap();
            let mut rows: Vec<&str> = Vec::new();
            for test in &section {
                if !rows.contains(&test.behaviour) {
                    rows.push(test.behaviour);
                }
            }
            for row in rows {
                write!(page, "| {row} |").unwrap();
                for version in VERSIONS {
                    let found = section.iter().find(|test| test.behaviour == row && test.version == version);
                    match found {
                        Some(test) => write!(page, " `{}` |", test.name()).unwrap(),
                        None => page.push_str(" - |"),
                    }
                }
                page.push('\n');
            }
        }
    }
    page
}
