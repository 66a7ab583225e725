//! The seeds: inputs that a person can read and change. A binary one is written as hexadecimal
//! digits (`.hex`), with comments from `#` to the end of a line; any other file is the input itself.

use std::{ffi::OsStr, fs, io, path::Path};

/// The names and inputs of the seeds in a folder, by name.
///
/// # Errors
///
/// Where a file cannot be read, or is no hexadecimal text though its name says so.
pub fn read(folder: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut seeds = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let input = if path.extension() == Some(OsStr::new("hex")) {
            let wrong =
                |what| io::Error::new(io::ErrorKind::InvalidData, format!("{name}: {what}"));
            from_hex(&fs::read_to_string(&path)?).map_err(wrong)?
        } else {
            fs::read(&path)?
        };
        seeds.push((name.into_owned(), input));
    }
    seeds.sort();
    Ok(seeds)
}

/// The bytes that a text in hexadecimal digits stands for.
///
/// # Errors
///
/// Where something else than pairs of digits is in it.
pub fn from_hex(text: &str) -> Result<Vec<u8>, String> {
    let without_comments = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or(""));
    let words = without_comments.flat_map(str::split_whitespace);
    let mut bytes = Vec::new();
    for word in words {
        for pair in word.as_bytes().chunks(2) {
            bytes.push(byte(pair).ok_or_else(|| format!("{word:?} is not pairs of digits"))?);
        }
    }
    Ok(bytes)
}

fn byte(pair: &[u8]) -> Option<u8> {
    let &[high, low] = pair else { return None };
    let digit = |c: u8| char::from(c).to_digit(16);
    u8::try_from(digit(high)? * 16 + digit(low)?).ok()
}
