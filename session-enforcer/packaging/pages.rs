//! Writes the manual pages and the shells' completions into a folder: `cargo xtask dist` packs them.

use std::{env, fs, io, path::Path};

use clap::{Command, CommandFactory as _};
use clap_complete::{Shell, generate_to};
use clap_mangen::roff::{Roff, bold, roman};
use session_enforcer::{
    cli::{Cli, DEFAULT_CONFIG},
    config::{Key, MANUAL},
};

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
    section(&mut page, "NAME");
    page.text([roman(
        "session-enforcer.toml - configuration of session-enforcer",
    )]);
    section(&mut page, "DESCRIPTION");
    page.text([roman(format!(
        "The file is {DEFAULT_CONFIG} unless --config names another. It is TOML. Times are written \
         as 90s, 15m, 12h, 7d or 1h30m, from 1s on. An unknown key is an error. \
         `session-enforcer check` prints the rules as they are understood. SIGHUP puts the file into \
         force for live sessions too; a wrong file changes nothing."
    ))]);
    for table in &MANUAL {
        section(&mut page, table.header);
        page.text([roman(table.about)]);
        for key in table.keys {
            describe(&mut page, key);
        }
    }
    section(&mut page, "EXAMPLE");
    page.control("nf", []);
    for line in EXAMPLE.lines() {
        page.text([roman(line)]);
    }
    page.control("fi", []);
    section(&mut page, "SEE ALSO");
    page.text([bold("session-enforcer"), roman("(1)")]);
    page.render()
}

fn section(page: &mut Roff, title: &str) {
    page.control("SH", [title]);
}

fn describe(page: &mut Roff, key: &Key) {
    page.control("TP", []);
    page.text([bold(key.name)]);
    let default = match key.default {
        Some(default) => format!(" Default: {default}."),
        None => String::new(),
    };
    page.text([roman(format!("{}{default}", key.about))]);
}
