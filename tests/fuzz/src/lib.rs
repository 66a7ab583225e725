//! What the fuzz targets do with their input: one module, one function `run` a target.
//!
//! The functions panic where something does not hold that must. Nothing here knows the size or the
//! layout of a record.

pub mod bytes;
pub mod config;
pub mod netlink;
pub mod packet;
pub mod records;
pub mod seeds;

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// Runs every seed of a target. A target whose last seed is gone would start from nothing.
    fn run_seeds(target: &str, run: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/fuzz/seeds")
            .join(target);
        let seeds = seeds::read(&folder).unwrap();
        assert!(!seeds.is_empty(), "no seed in {}", folder.display());
        for (name, input) in seeds {
            println!("{target}: {name}");
            run(&input);
        }
    }

    #[test]
    fn config_seeds() {
        run_seeds("config", config::run);
    }

    #[test]
    fn netlink_seeds() {
        run_seeds("netlink", netlink::run);
    }

    #[test]
    fn records_seeds() {
        run_seeds("records", records::run);
    }

    #[test]
    fn packet_seeds() {
        run_seeds("packet", packet::run);
    }

    #[test]
    fn every_folder_of_seeds_is_a_target() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/seeds");
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["config", "netlink", "packet", "records"]);
    }

    #[test]
    fn a_seed_in_hex_may_have_comments_and_any_spacing() {
        let text = "# a header\n45 00\n 0028 # length\n\n";
        assert_eq!(seeds::from_hex(text).unwrap(), [0x45, 0, 0, 0x28]);
        assert!(seeds::from_hex("4").is_err());
        assert!(seeds::from_hex("4x").is_err());
        assert!(seeds::from_hex("+4").is_err());
    }
}
