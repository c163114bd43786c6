// SPDX-License-Identifier: MIT OR Apache-2.0

//! Feeds mutated packets, patterns and frames to the parsers and checks what must hold for any input.
//!
//! ```text
//! martlet-fuzz --seconds 10 --target packet --seed 7
//! ```
//!
//! The corpus is made at run time from the golden data of the crates. Every round derives from the seed and its own
//! number, so a failure is repeated by `--seed S --round N`, which are printed with the input. Exits with 1 on a
//! failure.

use std::any::Any;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

mod checks;
mod corpus;

/// What is fed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// The framings of TCP.
    Frame,
    /// The codecs.
    Packet,
    /// Patterns and routes.
    Pattern,
}

/// Feeds mutated input to the parsers of Martlet.
#[derive(Debug, Parser)]
struct Arguments {
    /// How long to go on.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// One target only; all in turn if not given.
    #[arg(long)]
    target: Option<Target>,
    /// Where the random numbers start; random itself if not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Repeat this round only.
    #[arg(long)]
    round: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(|| rand::rng().random());
    let corpus = corpus::load();
    let targets = match arguments.target {
        Some(target) => vec![target],
        None => vec![Target::Frame, Target::Packet, Target::Pattern],
    };
    // A failed check is reported once, with its input, below.
    std::panic::set_hook(Box::new(|_| {}));
    let (first, end) = match arguments.round {
        Some(round) => (round, round + 1),
        None => (0, u64::MAX),
    };
    let started = Instant::now();
    let mut done = 0;
    for round in first..end {
        if arguments.round.is_none() && started.elapsed() >= Duration::from_secs(arguments.seconds) {
            break;
        }
        for &target in &targets {
            // Every target has its own numbers, so one alone repeats what all together found.
            let mut random =
                StdRng::seed_from_u64(seed ^ round.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ target as u64);
            let input = corpus.mutated(target, &mut random);
            let outcome = catch_unwind(AssertUnwindSafe(|| match target {
                Target::Frame => checks::frame(&input, &mut random),
                Target::Packet => checks::packet(&input),
                Target::Pattern => checks::pattern(&input),
            }));
            if let Err(cause) = outcome {
                report(target, seed, round, &input, &*cause);
                return ExitCode::FAILURE;
            }
            done += 1;
        }
    }
    say(&format!("{done} inputs held, seed {seed}"));
    ExitCode::SUCCESS
}

fn report(target: Target, seed: u64, round: u64, input: &[u8], cause: &(dyn Any + Send)) {
    let cause = match (cause.downcast_ref::<String>(), cause.downcast_ref::<&str>()) {
        (Some(text), _) => text,
        (_, Some(text)) => *text,
        _ => "a panic without text",
    };
    let target = target.to_possible_value().map(|it| it.get_name().to_owned()).unwrap_or_default();
    say(&format!(
        "failed: {cause}\nrepeat: --target {target} --seed {seed} --round {round}\ninput: {}",
        input.escape_ascii()
    ));
}

fn say(text: &str) {
    // Nobody is left to tell if this fails.
    let _ = writeln!(std::io::stdout(), "{text}");
}
