//! The configurations that the documentation shows, and the tests that it names.

use std::collections::BTreeMap;

use super::*;

const COOKBOOK: &str = include_str!("../../../docs/cookbook.md");
const FAULTS: &str = include_str!("../../../docs/faults.md");
const README: &str = include_str!("../../../../README.md");

/// The example that the README's first configuration goes with, and no page shows.
const FIRST: &str = "config.toml";

fn examples() -> BTreeMap<String, String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let paths = std::fs::read_dir(directory).unwrap();
    let named = paths.map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, std::fs::read_to_string(&path).unwrap())
    });
    named.collect()
}

/// The TOML blocks of a page, each with what was before it.
fn blocks(page: &str) -> Vec<(&str, &str)> {
    let mut blocks = Vec::new();
    let mut rest = page;
    while let Some((before, after)) = rest.split_once("```toml\n") {
        let (block, after) = after.split_once("```").unwrap();
        blocks.push((before, block));
        rest = after;
    }
    blocks
}

#[test]
fn each_example_is_in_the_cookbook_word_for_word() {
    let mut missing = examples();
    missing.remove(FIRST).unwrap();
    for (before, block) in blocks(COOKBOOK) {
        let name = before.trim_end().rsplit("](../examples/").next().unwrap();
        let name = name.trim_end_matches(')');
        let example = missing.remove(name);
        assert_eq!(example.as_deref(), Some(block), "{name} above the block");
    }
    assert_eq!(missing, BTreeMap::new());
}

#[test]
fn what_the_pages_show_is_valid_and_without_a_warning() {
    let shown = blocks(COOKBOOK).into_iter().chain(blocks(README));
    let configs = shown.map(|(_, block)| Config::parse("x.toml", block).unwrap());
    let configs: Vec<_> = configs.collect();
    assert_eq!(configs.len(), examples().len() - 1 + 1);
    for config in configs {
        assert_eq!(config.warnings, []);
        assert_eq!(config.mode, Mode::Observe, "what is copied cuts nobody");
    }
}

#[test]
fn each_recipe_has_its_parts_and_a_place_in_the_list() {
    let recipes: Vec<_> = COOKBOOK
        .split("\n## ")
        .filter(|part| part.contains("```toml\n"))
        .collect();
    assert_eq!(recipes.len(), examples().len() - 1);
    for recipe in recipes {
        let title = recipe.lines().next().unwrap();
        for part in [
            "\nFor ",
            "\n**What it does.** ",
            "\n**Limits.** ",
            "\n**Introduce it.** ",
        ] {
            assert!(recipe.contains(part), "{title}: {part}");
        }
        assert!(COOKBOOK.contains(&format!("\n- [{title}](#")), "{title}");
    }
}

/// Words of a page that name a test, as file and name.
fn named_tests(page: &str) -> Vec<(&str, &str)> {
    let words = page.split('`').skip(1).step_by(2);
    let tests = words.filter_map(|word| word.split_once("::"));
    tests.filter(|named| *named != ("file", "name")).collect()
}

#[test]
fn each_test_that_the_page_of_faults_names_is_there() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tests = named_tests(FAULTS);
    assert!(tests.len() > 40, "{}", tests.len());
    for (file, name) in tests {
        let places = ["../tests/tests", "src"].map(|place| package.join(place));
        let mut sources = places
            .iter()
            .filter_map(|place| std::fs::read_to_string(place.join(format!("{file}.rs"))).ok());
        let test = format!("#[test]\nfn {name}(");
        let indented = format!("#[test]\n    fn {name}(");
        assert!(
            sources.any(|source| source.contains(&test) || source.contains(&indented)),
            "{file}::{name}"
        );
    }
}

#[test]
fn each_fault_has_a_test() {
    let rows = FAULTS.lines().filter(|line| line.starts_with("| "));
    for row in rows.filter(|row| !row.starts_with("| fault |")) {
        assert_eq!(row.matches(" |").count(), 4, "{row}");
        assert!(row.contains("::"), "{row}");
    }
}
