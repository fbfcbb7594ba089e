//! One enum for everything a caller can do wrong; each variant carries the offending value.

use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

/// The error of a wrong length.
pub fn expect(name: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { name, expected, found }) }
}

#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// An array whose length does not follow from the other arguments.
    Length { name: &'static str, expected: usize, found: usize },
    /// `indptr` does not rise from 0 to the number of indices.
    Indptr { name: &'static str, row: usize },
    /// A CSR row that is not ascending and unique.
    Unsorted { name: &'static str, row: usize, item: i32 },
    /// A number outside `0..bound`.
    Index { name: &'static str, position: usize, found: i64, bound: usize },
    /// A scalar argument outside its range.
    Argument { name: &'static str, found: String, expected: &'static str },
    /// NaN (or, in embeddings, an infinity) where a number is needed.
    NonFinite { name: &'static str, unit: &'static str, row: usize, count: usize },
    /// Vectors so long that their product leaves the range of `f32`.
    Overflow,
    /// A result that does not fit into memory.
    Memory { rows: usize, columns: usize },
    /// Nothing can be drawn for this user.
    NoFreeItem { user: usize, seen: usize, n_items: usize },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { name, expected, found } => write!(f, "{name} has {found} entries, expected {expected}"),
            Self::Indptr { name, row } => {
                write!(f, "{name} does not rise from 0 to the number of indices at row {row}")
            }
            Self::Unsorted { name, row, item } => {
                write!(f, "{name}: row {row} is not ascending and unique at item {item}")
            }
            Self::Index { name, position, found, bound } => {
                write!(f, "{name}[{position}] is {found}, expected 0 or more and less than {bound}")
            }
            Self::Argument { name, found, expected } => write!(f, "{name} is {found}, expected {expected}"),
            Self::NonFinite { name, unit, row, count } => {
                let what = if *unit == "user" { "score" } else { "number" };
                write!(f, "{name}: {unit} {row} has {count} non-finite {what}{}", if *count == 1 { "" } else { "s" })
            }
            Self::Overflow => write!(f, "user_emb x item_emb can leave the range of float32"),
            Self::Memory { rows, columns } => write!(f, "no memory for a result of {rows} x {columns} numbers"),
            Self::NoFreeItem { user, seen, n_items } => {
                write!(f, "user {user} has no free item to draw ({seen} of {n_items} items seen)")
            }
        }
    }
}

impl std::error::Error for Error {}
