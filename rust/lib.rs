//! The three jobs of HNLMRec that are slow in Python, as pure functions over slices.
//!
//! * [`candidates`]: who may be a negative. Draws from the complement of a user's training row,
//!   uniformly or by popularity, and filters given candidate lists.
//! * [`matching`]: which catalogue items a generated negative stands for, by vector or by title.
//! * [`topk`] and [`metrics`]: rank the whole catalogue for every user, and score the ranking.
//!
//! Vocabulary, used everywhere under the same name:
//!
//! | word | meaning |
//! |---|---|
//! | user, item | dense row numbers, `i32`, from 0 |
//! | CSR | `indptr` (`i64`, one more than rows) and `indices` (`i32`, ascending and unique in a row) |
//! | excluded | the items of a user's CSR row: never drawn, matched or ranked |
//! | better | higher score, and at equal scores the smaller item number |
//! | tie | two equal `f32` scores as computed here: one fused multiply-add per dimension, in order |
//! | never | a score of `-inf`; NaN is refused by name |
//! | stream | the random words of one output row; they depend on the seed and the row alone |
//!
//! A product and the selection from it are fused in [`scan`]: scores live in one cache-resident
//! tile and never reach memory. [`simd`] is the only file with `unsafe`, `py.rs` (feature
//! `python`) the only one that knows Python.

pub mod candidates;
pub mod csr;
pub mod error;
pub mod matching;
pub mod metrics;
#[cfg(feature = "python")]
mod py;
pub mod random;
pub mod scan;
pub mod simd;
pub mod threads;
pub mod topk;
