//! Builds cargo-deb and cargo-generate-rpm into the target directory.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::build::Profile;
use crate::process::{output_of, say};
use crate::setup::lock;
use crate::workspace::{Workspace, install};

/// A program that builds packages.
#[derive(Clone, Copy)]
pub(super) enum Tool {
    Deb,
    Rpm,
}

impl Tool {
    /// The programs that a build of this profile needs. Only a release has an RPM: its program takes longest to build.
    const fn of(profile: Profile) -> &'static [Self] {
        match profile {
            Profile::Release => &[Self::Deb, Self::Rpm],
            Profile::Debug => &[Self::Deb],
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Deb => "cargo-deb",
            Self::Rpm => "cargo-generate-rpm",
        }
    }

    const fn version(self) -> &'static str {
        match self {
            Self::Deb => "3.8.0",
            Self::Rpm => "0.21.1",
        }
    }
}

/// The installed programs.
pub(super) struct Tools {
    folder: PathBuf,
}

impl Tools {
    /// A command that runs one of the programs.
    pub(super) fn command(&self, tool: Tool) -> Command {
        Command::new(self.folder.join("bin").join(tool.name()))
    }

    fn stands(&self, tool: Tool) -> bool {
        // Both programs print the version alone or after their name.
        output_of(self.command(tool).arg("--version"))
            .is_ok_and(|printed| printed.trim().ends_with(tool.version()))
    }
}

/// Ensures that the programs are installed in the pinned versions. The profile is that of a build, if one is needed.
pub(super) fn ensure(workspace: &Workspace, profile: Profile) -> Result<Tools> {
    let _lock = lock(workspace)?;
    let tools = Tools {
        folder: workspace.target().join("dist-tools"),
    };
    for tool in Tool::of(profile) {
        if !tools.stands(*tool) {
            let (name, version) = (tool.name(), tool.version());
            say!("building {name} {version}, which makes packages (some minutes)");
            install(name, version, &tools.folder, profile)?;
        }
    }
    Ok(tools)
}
