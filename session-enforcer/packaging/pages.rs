//! Writes the manual pages and the shells' completions into a folder: `cargo xtask dist` packs them.
//!
//! The commands' pages come from the command line's definition, session-enforcer.toml(5) from the page
//! of the documentation that a test holds to the keys of the code.

use std::{env, fs, io, path::Path};

use clap::{Command, CommandFactory as _};
use clap_complete::{Shell, generate_to};
use clap_mangen::roff::{Roff, bold, roman};
use session_enforcer::cli::Cli;

const CONFIGURATION: &str = include_str!("../docs/configuration.md");
const EXAMPLE: &str = include_str!("../examples/config.toml");

fn main() -> io::Result<()> {
    let Some(folder) = env::args_os().nth(1) else {
        return Err(io::Error::other("name the folder for the pages"));
    };
    let folder = Path::new(&folder);
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;
    clap_mangen::generate_to(command(), &man)?;
    fs::write(man.join("session-enforcer.toml.5"), configuration())?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command(), "session-enforcer", &completions)?;
    }
    Ok(())
}

fn command() -> Command {
    // `help SUBCOMMAND` has no page of its own: it prints those of the commands.
    Cli::command().disable_help_subcommand(true)
}

/// session-enforcer.toml(5).
fn configuration() -> String {
    let mut page = Roff::new();
    let version = concat!("session-enforcer ", env!("CARGO_PKG_VERSION"));
    page.control("TH", ["session-enforcer.toml", "5", "", version]);
    page.control("SH", ["NAME"]);
    page.text([roman(
        "session-enforcer.toml - configuration of session-enforcer",
    )]);
    page.control("SH", ["DESCRIPTION"]);
    for (number, part) in CONFIGURATION.split("```").enumerate() {
        match number % 2 {
            0 => prose(&mut page, part),
            // The first line is the language.
            _ => code(&mut page, part.lines().skip(1)),
        }
    }
    page.control("SH", ["EXAMPLE"]);
    code(&mut page, EXAMPLE.lines());
    page.control("SH", ["SEE ALSO"]);
    page.text([bold("session-enforcer"), roman("(1)")]);
    page.render()
}

fn code<'a>(page: &mut Roff, lines: impl Iterator<Item = &'a str>) {
    page.control("nf", []);
    for line in lines {
        page.text([roman(line)]);
    }
    page.control("fi", []);
}

/// Headings, tables of keys, lists and paragraphs.
fn prose(page: &mut Roff, markdown: &str) {
    for block in markdown.split("\n\n").map(str::trim) {
        if let Some(title) = block.strip_prefix("## ") {
            page.control("SH", [title]);
        } else if block.starts_with('|') {
            block.lines().skip(2).for_each(|row| entry(page, row));
        } else if block.starts_with("- ") {
            for item in block.trim_start_matches("- ").split("\n- ") {
                // An item that is a link is one of the list of contents.
                if !item.starts_with('[') {
                    page.control("IP", ["\\(bu", "2"]);
                    page.text([roman(plain(item))]);
                }
            }
        } else if !block.is_empty() && !block.starts_with("# ") {
            page.control("PP", []);
            page.text([roman(plain(block))]);
        }
    }
}

/// A row of a table: the first column is the entry, the last its text. Of keys, those between say what is
/// allowed and what is the default.
fn entry(page: &mut Roff, row: &str) {
    let columns: Vec<String> = row.trim_matches('|').split(" | ").map(plain).collect();
    page.control("TP", []);
    match columns.as_slice() {
        [key, allowed, default, about] => {
            page.text([bold(key)]);
            let text = format!("{about} Allowed: {allowed}. Default: {default}.");
            page.text([roman(text)]);
        }
        [first, rest @ ..] => {
            page.text([bold(first)]);
            page.text([roman(rest.join(" "))]);
        }
        [] => {}
    }
}

/// The text without marks, links without their targets, in one line.
fn plain(markdown: &str) -> String {
    let mut text = String::new();
    let mut rest = markdown;
    while let Some((before, after)) = rest.split_once("](") {
        // The last bracket that is open begins the link.
        let (start, name) = before.rsplit_once('[').unwrap_or(("", before));
        text += start;
        text += name;
        rest = after.split_once(')').map_or("", |(_, rest)| rest);
    }
    text += rest;
    let text = text.replace("**", "").replace('`', "");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
