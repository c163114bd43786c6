// SPDX-License-Identifier: MIT OR Apache-2.0
//! The house rules that no linter knows, as tests.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Files that may be longer than [`MAX_LINES`], each with its reason.
const LONG_FILES: &[(&str, &str)] = &[
    ("actors/core/src/client.rs", "the handle, its futures and the driver share private state"),
    ("actors/core/src/session.rs", "the loop's steps share private state"),
    ("actors/core/src/json.rs", "one scanner, half of it tests"),
];

const MAX_LINES: usize = 900;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file of the repository below `folder` for which `wanted` holds, as paths from the root.
fn files(folder: &str, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            match path.is_dir() {
                true if ["target", "node_modules", ".git"].contains(&&*name) => {}
                true => walk(&path, found),
                false => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), &mut found);
    let mut names: Vec<_> = found
        .iter()
        .map(|path| path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/"))
        .filter(|name| wanted(name))
        .collect();
    names.sort();
    names
}

fn sources() -> Vec<String> {
    let sources = files("", |name| name.ends_with(".rs"));
    assert!(sources.len() > 30, "the walk has lost its way: {sources:?}");
    sources
}

/// Fails with all of the complaints, if there are any.
#[track_caller]
fn check(rule: &str, complaints: Vec<String>) {
    assert!(complaints.is_empty(), "{rule}:\n  {}", complaints.join("\n  "));
}

fn packages() -> BTreeMap<String, Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1", "--manifest-path"])
        .arg(root().join("Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    packages.iter().map(|package| (package["name"].as_str().unwrap().to_owned(), package.clone())).collect()
}

/// The names a package depends on; `kind` is null for what it is built with, `dev` for its tests.
fn dependencies(package: &Value, kind: Option<&str>) -> BTreeSet<String> {
    let dependencies = package["dependencies"].as_array().unwrap().iter();
    dependencies
        .filter(|dependency| dependency["kind"].as_str() == kind)
        .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
        .collect()
}

// === crates ===

#[test]
fn crates_depend_in_one_direction() {
    // Package, what it may be built with of ours, what its tests may use besides.
    let rules: &[(&str, &[&str], &[&str])] = &[
        (
            "martlet",
            &[
                "martlet-core",
                "martlet-macros",
                "martlet-tcp",
                "martlet-nats",
                "martlet-redis",
                "martlet-rabbitmq",
                "martlet-mqtt",
            ],
            &["martlet-testkit"],
        ),
        ("martlet-core", &[], &["martlet-testkit"]),
        ("martlet-tls", &["martlet-core"], &[]),
        ("martlet-tcp", &["martlet-core", "martlet-tls"], &["martlet-testkit"]),
        ("martlet-nats", &["martlet-core"], &["martlet-testkit"]),
        ("martlet-redis", &["martlet-core", "martlet-tls"], &["martlet-testkit"]),
        ("martlet-rabbitmq", &["martlet-core", "martlet-tls"], &["martlet-testkit"]),
        ("martlet-mqtt", &["martlet-core", "martlet-tls"], &["martlet-testkit"]),
        ("martlet-macros", &[], &["martlet", "martlet-core", "martlet-testkit"]),
        ("martlet-testkit", &["martlet-core"], &[]),
    ];
    let packages = packages();
    let mut complaints = Vec::new();
    for (name, package) in &packages {
        if ["martlet-bench", "martlet-fuzz"].contains(&name.as_str()) {
            continue;
        }
        let Some((_, built_with, tested_with)) = rules.iter().find(|(known, ..)| known == name) else {
            complaints.push(format!("{name} has no rule in this test"));
            continue;
        };
        for (kind, allowed) in
            [(None, built_with.to_vec()), (Some("dev"), [*built_with, *tested_with].concat())]
        {
            for other in dependencies(package, kind) {
                if packages.contains_key(&other) && !allowed.contains(&other.as_str()) {
                    complaints.push(format!("{name} must not depend on {other}"));
                }
            }
        }
    }
    check("dependencies between our crates", complaints);
}

#[test]
fn protocol_libraries_stay_in_their_crate() {
    let owners = [
        ("async-nats", "martlet-nats"),
        ("redis", "martlet-redis"),
        ("deadpool-redis", "martlet-redis"),
        ("lapin", "martlet-rabbitmq"),
        ("rumqttc-v4-next", "martlet-mqtt"),
        ("rumqttc-v5-next", "martlet-mqtt"),
        ("socket2", "martlet-tcp"),
    ];
    let mut complaints = Vec::new();
    for (name, package) in packages().iter().filter(|(name, _)| *name != "martlet-bench") {
        for other in dependencies(package, None) {
            if owners.iter().any(|(library, owner)| other == *library && name != owner) {
                complaints.push(format!("{name} must not be built with {other}"));
            }
        }
    }
    check("protocol libraries", complaints);
}

#[test]
fn pure_modules_know_no_runtime() {
    let pure = ["packet", "pattern", "codec", "payload", "json", "msgpack", "headers", "backoff", "error"];
    let mut complaints = Vec::new();
    for module in pure {
        let path = format!("actors/core/src/{module}.rs");
        let source = read(&path);
        let code = source.split("#[cfg(test)]").next().unwrap();
        for (number, line) in code.lines().enumerate() {
            let is_code = !line.trim_start().starts_with("//");
            // Without what is inside of strings.
            let code: String = line.split('"').step_by(2).collect();
            if is_code && ["actix::", "actix_rt::", "tokio::"].iter().any(|name| code.contains(name)) {
                complaints.push(format!("{path}:{}: {line}", number + 1));
            }
        }
    }
    check("pure modules", complaints);
}

// === the README ===

/// The first cells of the rows of the first table below a heading, without their back-ticks.
fn first_column(text: &str, heading: &str) -> BTreeSet<String> {
    let section = text.split(&format!("\n{heading}\n")).nth(1).unwrap_or_else(|| panic!("no {heading}"));
    section
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|row| row.split('|').nth(1).unwrap().trim().trim_matches('`').to_owned())
        .collect()
}

#[test]
fn the_feature_table_is_the_manifest() {
    let packages = packages();
    let features = packages["martlet"]["features"].as_object().unwrap();
    let readme = read("README.md");
    let named: BTreeSet<_> = features.keys().filter(|name| *name != "default").cloned().collect();
    assert_eq!(first_column(&readme, "## Features"), named);

    let default: BTreeSet<_> =
        features["default"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let mut complaints = Vec::new();
    for name in &named {
        let says = if default.contains(name.as_str()) { "yes" } else { "no" };
        if !readme.contains(&format!("| `{name}` | {says} |")) {
            complaints.push(format!("{name} should say {says}"));
        }
    }
    check("defaults in the feature table", complaints);
}

#[test]
fn the_readme_shows_the_first_example() {
    let example = read("examples/hello_tcp.rs");
    let program: Vec<_> =
        example.lines().skip_while(|line| line.starts_with("//") || line.is_empty()).collect();
    let readme = read("README.md");
    let shown = readme.split("```rust\n").nth(1).unwrap().split("```").next().unwrap();
    assert_eq!(shown.trim_end(), program.join("\n").trim_end());

    let (_, prints) = expected_output("examples/hello_tcp.rs").unwrap();
    assert!(
        readme.contains(&format!("```text\n{}\n```", prints.join("\n"))),
        "the README prints something else"
    );
}

// === examples ===

/// The command and the lines of an example's header.
fn expected_output(path: &str) -> Option<(String, Vec<String>)> {
    let source = read(path);
    let header = source.lines().filter_map(|line| line.strip_prefix("//!"));
    let header: Vec<_> = header.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
    let start =
        header.windows(2).position(|pair| pair[0] == "```text" && pair[1].starts_with("$ cargo run"))?;
    let mut lines =
        header[start + 1..].iter().take_while(|line| **line != "```").map(|line| (*line).to_owned());
    Some((lines.next()?, lines.collect()))
}

#[test]
fn every_example_says_what_it_prints_and_is_listed() {
    let list = ["README.md", "docs/examples.md"]
        .iter()
        .filter(|path| root().join(path).exists())
        .map(|path| read(path))
        .collect::<String>();
    let examples = files("examples", |name| name.ends_with(".rs"));
    assert!(!examples.is_empty());
    let mut complaints = Vec::new();
    for path in examples {
        let name = Path::new(&path).file_stem().unwrap().to_string_lossy().into_owned();
        match expected_output(&path) {
            None => complaints.push(format!("{path}: no ```text block that begins with `$ cargo run`")),
            Some((command, prints)) => {
                if !command.split(' ').any(|word| word == name) {
                    complaints.push(format!("{path}: its command runs something else: {command}"));
                }
                if prints.is_empty() {
                    complaints.push(format!("{path}: it says nothing of what it prints"));
                }
            }
        }
        if !list.contains(&format!("`{name}`")) {
            complaints.push(format!("{path}: not listed in README.md or docs/examples.md"));
        }
    }
    check("examples", complaints);
}

// === protocol clauses ===

/// Every id like `TCP-12` in a text; `prefix` is `TCP`.
fn clause_ids(text: &str, prefix: &str) -> BTreeSet<u32> {
    let start = format!("{prefix}-");
    text.match_indices(&start)
        .filter(|(at, _)| !text[..*at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '-'))
        .filter_map(|(at, _)| {
            let digits: String = text[at + start.len()..].chars().take_while(char::is_ascii_digit).collect();
            digits.parse().ok()
        })
        .collect()
}

#[test]
fn every_clause_is_cited_and_every_citation_exists() {
    let mut complaints = Vec::new();
    for page in files("docs/protocol", |name| name.ends_with(".md")) {
        let name = Path::new(&page).file_stem().unwrap().to_string_lossy().into_owned();
        // NestJS's word for RabbitMQ.
        let prefix = if name == "rabbitmq" { "RMQ".to_owned() } else { name.to_uppercase() };
        let text = read(&page);
        let defined: Vec<u32> = text
            .lines()
            .filter_map(|line| line.strip_prefix(&format!("- **{prefix}-"))?.split("**").next()?.parse().ok())
            .collect();
        assert_eq!(defined, (1..=defined.len() as u32).collect::<Vec<_>>(), "{page} numbers its clauses");
        assert!(!defined.is_empty(), "{page} has no clauses");

        let mut cited = BTreeSet::new();
        let citing = files("", |path| {
            path != "tests/tidy.rs" && [".rs", ".mjs", ".md"].iter().any(|ending| path.ends_with(ending))
        });
        for path in citing {
            let ids = clause_ids(&read(&path), &prefix);
            for id in ids.iter().filter(|id| !defined.contains(id)) {
                complaints.push(format!("{path}: {prefix}-{id} does not exist"));
            }
            if !path.ends_with(".md") {
                cited.extend(ids);
            }
        }
        // A transporter that is not written yet has nothing to cite its page.
        let written = files("actors", |path| path.starts_with(&format!("actors/{name}/src/"))).len() > 1;
        for id in defined.iter().filter(|id| written && !cited.contains(id)) {
            complaints.push(format!("{page}: {prefix}-{id} is cited by no source and no test"));
        }
    }
    check("protocol clauses", complaints);
}

// === options ===

/// The public fields of the option types in a source, by type. Macro-made ones are written
/// `"nameInData" name_in_code: Type`.
fn option_fields(source: &str) -> Vec<(String, Vec<String>)> {
    let mut types = Vec::new();
    let mut current: Option<(String, Vec<String>)> = None;
    for line in source.lines() {
        if let Some(rest) = line.strip_prefix("pub struct ")
            && let Some(name) = rest.split([' ', '<', '(', ';']).next()
            && ["Options", "Limits", "Supervision", "Intensity"].iter().any(|ending| name.ends_with(ending))
            && line.ends_with('{')
        {
            current = Some((name.to_owned(), Vec::new()));
        } else if line == "}" {
            types.extend(current.take());
        } else if let Some((_, fields)) = &mut current
            && let Some(field) = line.strip_prefix("    pub ")
            && let Some((name, _)) = field.split_once(": ")
        {
            fields.push(name.to_owned());
        } else if let Some(rest) = line.trim_start().strip_prefix('"')
            && let Some((key, rest)) = rest.split_once("\" ")
            && rest.contains(": ")
            && rest
                .split_once(": ")
                .is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
        {
            types.push((String::new(), vec![key.to_owned()]));
        }
    }
    types
}

#[test]
fn every_option_is_in_the_operations_page() {
    let page = read("docs/operations.md");
    let section = |name: &str| {
        let heading =
            page.lines().find(|line| line.starts_with("### ") && line.contains(&format!("`{name}`")))?;
        let rest = page.split(&format!("{heading}\n")).nth(1)?;
        Some(rest.split("\n### ").next()?.split("\n## ").next()?.to_owned())
    };
    let mut complaints = Vec::new();
    let mut seen = 0;
    for path in files("actors", |path| path.ends_with(".rs") && path.contains("/src/")) {
        for (name, fields) in option_fields(&read(&path)) {
            let text = if name.is_empty() { Some(page.clone()) } else { section(&name) };
            let Some(text) = text else {
                complaints.push(format!("{path}: {name} has no section"));
                continue;
            };
            for field in fields {
                seen += 1;
                if !text.contains(&format!("| `{field}` |")) {
                    complaints.push(format!("{path}: {name} {field} has no row"));
                }
            }
        }
    }
    assert!(seen > 50, "only {seen} options were found");
    check("docs/operations.md", complaints);
}

// === files ===

#[test]
fn every_source_names_its_licence() {
    let line = "// SPDX-License-Identifier: MIT OR Apache-2.0";
    let missing = sources().into_iter().filter(|path| read(path).lines().next() != Some(line)).collect();
    check("the first line is the licence", missing);
}

#[test]
fn no_file_has_outgrown_its_noun() {
    let mut complaints = Vec::new();
    for path in sources() {
        let lines = read(&path).lines().count();
        if lines > MAX_LINES && !LONG_FILES.iter().any(|(known, _)| *known == path) {
            complaints.push(format!("{path} has {lines} lines: look for the second noun in it"));
        }
    }
    for (path, reason) in LONG_FILES {
        if !root().join(path).exists() || reason.is_empty() {
            complaints.push(format!("{path} in LONG_FILES does not exist, or has no reason"));
        }
    }
    check("long files", complaints);
}

#[test]
fn nothing_names_the_machine_it_was_written_on() {
    // In two parts, so that this file does not name them either.
    let words = [("/wo", "rk/"), ("/ro", "ot/"), ("/ho", "me/"), ("crates", ".io/"), ("npmjs", ".org")];
    let endings = [".rs", ".md", ".toml", ".mjs", ".py", ".sh", ".json", "/run"];
    let texts = files("", |path| {
        endings.iter().any(|ending| path.ends_with(ending)) && !path.ends_with("package-lock.json")
    });
    let mut complaints = Vec::new();
    for path in texts {
        let Ok(text) = fs::read_to_string(root().join(&path)) else { continue };
        for (number, line) in text.lines().enumerate() {
            for (first, second) in words {
                if line.contains(&format!("{first}{second}")) {
                    complaints.push(format!("{path}:{}: {first}{second}", number + 1));
                }
            }
        }
    }
    check("paths and hosts", complaints);
}

#[test]
fn links_between_documents_lead_somewhere() {
    // Written by the interop run.
    let generated = ["docs/compatibility.md"];
    let mut complaints = Vec::new();
    for path in files("", |path| path.ends_with(".md")) {
        let text = read(&path);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap();
            if link.contains("://") || target.is_empty() || target.contains(' ') {
                continue;
            }
            let to = Path::new(&path).parent().unwrap().join(target);
            if !root().join(&to).exists()
                && !generated.iter().any(|known| to.ends_with(known) || to == Path::new(known))
            {
                complaints.push(format!("{path}: {link}"));
            }
        }
    }
    check("links", complaints);
}
