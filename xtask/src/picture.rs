//! `cargo xtask picture`: generates the pictures of the documentation.

mod dashboard;
mod recording;
mod svg;

use std::fs;
use std::num::NonZero;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use session_enforcer_tests::run_on_terminal;

use self::recording::Recording;
use crate::demo;
use crate::process::say;
use crate::workspace::Workspace;

/// The folder of the pictures, from the root of the repository.
const FOLDER: &str = "session-enforcer/docs/pictures";

/// The terminal width of the demo: its lists are 100 wide and indented by 4.
const COLUMNS: NonZero<u16> = NonZero::new(104).expect("not 0");

/// The time limit of the demo.
const PATIENCE: Duration = Duration::from_secs(120);

/// The picture shows the demo's output from the first heading up to the second.
const PART: [&str; 2] = ["session-enforcer list", "The audit's line"];

/// The subject of a picture.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Subject {
    /// `cargo xtask demo`, which runs as root.
    Demo,
    /// The layout of the Grafana dashboard.
    Dashboard,
}

/// Arguments of `picture`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Picture to draw [default: all].
    subject: Option<Subject>,
}

/// Generates the pictures and prints the path of each.
pub(crate) fn picture(workspace: &Workspace, args: &Args) -> Result<()> {
    let wanted = |subject| args.subject.is_none_or(|asked| asked == subject);
    let folder = workspace.root().join(FOLDER);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    if wanted(Subject::Dashboard) {
        let json = read(&workspace.root().join(dashboard::JSON))?;
        write(&folder.join("dashboard.svg"), &dashboard::svg(&json)?)?;
    }
    if wanted(Subject::Demo) {
        write(&folder.join("demo.svg"), &demo_svg(workspace)?)?;
    }
    Ok(())
}

/// Runs the demo in a pseudo-terminal and draws a part of its output.
fn demo_svg(workspace: &Workspace) -> Result<String> {
    let show = demo::prepare(workspace)?;
    say!("running the demo in a terminal of {COLUMNS} columns");
    let written = run_on_terminal(show, COLUMNS.get(), PATIENCE)?;
    let [from, to] = PART;
    Recording::of(&written, COLUMNS)?
        .part(from, to)?
        .svg("cargo xtask demo")
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn write(path: &Path, svg: &str) -> Result<()> {
    fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_picture_is_whole_and_stands_alone() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for (name, page) in [
            ("demo.svg", "README.md"),
            ("dashboard.svg", "session-enforcer/docs/monitoring.md"),
        ] {
            let text = read(&root.join(FOLDER).join(name)).expect("the picture");
            let picture = roxmltree::Document::parse(&text).expect("well-formed");
            assert!(
                picture
                    .root_element()
                    .has_tag_name(("http://www.w3.org/2000/svg", "svg"))
            );
            assert!(text.len() < 64 * 1024, "{name} has {} bytes", text.len());
            for foreign in ["<script", "href", "url(", "@import"] {
                assert!(!text.contains(foreign), "{foreign} in {name}");
            }
            let page = read(&root.join(page)).expect("the page");
            assert!(
                page.contains(&format!("pictures/{name})")),
                "{name} is on no page"
            );
        }
    }

    #[test]
    fn the_picture_of_the_demo_shows_what_the_demo_does() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let text = read(&root.join(FOLDER).join("demo.svg")).expect("the picture");
        for part in [
            ">READY<",
            ">RESET<",
            ">RECORD<",
            "session-enforcer kill",
            "Connection reset by peer",
        ] {
            assert!(text.contains(part), "{part}");
        }
    }
}
