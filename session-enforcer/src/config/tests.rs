mod documents;
mod files;
mod keys;
mod match_entries;
mod owner_keys;
mod rules;
mod several;
mod shadowed;
mod values;

use super::*;

/// The error of a text. It must be one line.
fn refused(text: &str) -> String {
    let message = Config::parse("x.toml", text).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message:?}");
    message
}

/// Checks each text with its expected error.
fn all_refused(cases: &[(&str, &str)]) {
    for (text, message) in cases {
        assert_eq!(refused(text), *message, "in:\n{text}");
    }
}

/// Parses a rule from the text of its conditions and limits.
fn rule(text: &str) -> Rule {
    let text = format!("[[rule]]\nname = 'a'\n{text}\n");
    match Config::parse("x.toml", &text) {
        Ok(config) => config.rules[0].clone(),
        Err(error) => panic!("{error} in:\n{text}"),
    }
}
