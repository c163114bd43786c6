// SPDX-License-Identifier: MIT OR Apache-2.0
//! Printing: values on stdout, everything else on stderr.

use std::io::{self, IsTerminal, Write};

use super::json::{Style, lay_out};

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Colour {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl Colour {
    fn on(self, terminal: bool) -> bool {
        match self {
            // https://no-color.org: set to anything but nothing.
            Self::Auto => terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
            Self::Always => true,
            Self::Never => false,
        }
    }
}

/// How to print JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Layout {
    /// Pretty on a terminal, compact elsewhere.
    Auto,
    /// With line breaks and indentation.
    Pretty,
    /// On one line.
    Compact,
}

impl Layout {
    fn pretty(self, terminal: bool) -> bool {
        match self {
            Self::Auto => terminal,
            Self::Pretty => true,
            Self::Compact => false,
        }
    }
}

/// Where output goes and how it looks.
#[derive(Clone, Debug)]
pub(super) struct Output {
    values: Style,
    messages: Style,
    terminal: bool,
}

impl Output {
    pub(super) fn new(colour: Colour, layout: Layout) -> Self {
        let (stdout, stderr) = (io::stdout().is_terminal(), io::stderr().is_terminal());
        Self {
            values: Style { colours: colour.on(stdout), pretty: layout.pretty(stdout) },
            messages: Style { colours: colour.on(stderr), pretty: layout.pretty(stderr) },
            terminal: layout.pretty(stdout),
        }
    }

    /// Whether a person reads stdout.
    pub(super) fn for_people(&self) -> bool {
        self.terminal
    }

    /// Prints one JSON value and a line break.
    pub(super) fn value(&self, json: &str) {
        self.line(&lay_out(json, self.values));
    }

    /// JSON as [`value`](Self::value) would print it.
    pub(super) fn laid_out(&self, json: &str) -> String {
        lay_out(json, self.values)
    }

    /// A heading as stdout shows it.
    pub(super) fn heading(&self, text: &str) -> String {
        if self.values.colours { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Prints a line.
    pub(super) fn line(&self, text: &str) {
        let mut line = Vec::with_capacity(text.len() + 1);
        line.extend_from_slice(text.as_bytes());
        line.push(b'\n');
        self.raw(&line);
    }

    /// Prints bytes.
    pub(super) fn raw(&self, bytes: &[u8]) {
        let mut stdout = io::stdout().lock();
        if let Err(error) = stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            // Whoever read has gone (`martlet listen … | head -1`): that is no failure of ours.
            if error.kind() == io::ErrorKind::BrokenPipe {
                std::process::exit(0);
            }
            self.note(&format!("cannot write to stdout: {error}"));
            std::process::exit(super::OTHER.into());
        }
    }

    /// Tells a person something.
    pub(super) fn note(&self, text: &str) {
        // There is nobody to tell when this fails.
        let _ = writeln!(io::stderr().lock(), "{text}");
    }

    /// Tells a person what went wrong.
    pub(super) fn failure(&self, text: &str, value: Option<&str>) {
        let value = value.map(|json| format!(": {}", lay_out(json, self.messages))).unwrap_or_default();
        let label = if self.messages.colours { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
        self.note(&format!("{label} {text}{value}"));
    }
}
