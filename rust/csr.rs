//! Borrowed CSR matrix. The frame is checked when it is made, a row when it is read: a batch of
//! a thousand users pays for a thousand rows and not for the whole log.

use crate::error::{Error, Result, expect};
use crate::simd::{self, Steps};

#[derive(Clone, Copy)]
pub struct CsrView<'a> {
    indptr: &'a [i64],
    /// The items of all rows, unchecked.
    pub indices: &'a [i32],
    pub n_cols: usize,
    names: Names,
}

/// What errors call the two arrays.
pub type Names = (&'static str, &'static str);
pub const OWNED: Names = ("indptr", "indices");
pub const HELD_OUT: Names = ("test_indptr", "test_indices");

impl<'a> CsrView<'a> {
    /// A matrix whose columns are the items `0..n_cols`.
    pub fn new(names: Names, indptr: &'a [i64], indices: &'a [i32], n_cols: usize) -> Result<Self> {
        if indptr.is_empty() {
            return Err(Error::Length { name: names.0, expected: 1, found: 0 });
        }
        if n_cols > i32::MAX as usize {
            return Err(Error::Argument { name: "n_items", found: n_cols.to_string(), expected: "at most 2147483647" });
        }
        let csr = Self { indptr, indices, n_cols, names };
        let ends = [(0, 0), (csr.n_rows(), indices.len() as i64)];
        match ends.into_iter().find(|&(row, expected)| indptr[row] != expected) {
            Some((row, _)) => Err(Error::Indptr { name: names.0, row }),
            None => Ok(csr),
        }
    }

    pub fn n_rows(&self) -> usize {
        self.indptr.len() - 1
    }

    /// The matrix has to have one row per user of the other arguments.
    pub fn expect_rows(&self, expected: usize) -> Result<()> {
        expect(self.names.0, self.indptr.len(), expected + 1)
    }

    /// Where row `row` lies in `indices`.
    pub fn span(&self, row: usize) -> Result<std::ops::Range<usize>> {
        let (start, end) = (self.indptr[row], self.indptr[row + 1]);
        if start < 0 || start > end || end > self.indices.len() as i64 {
            return Err(Error::Indptr { name: self.names.0, row });
        }
        Ok(start as usize..end as usize)
    }

    /// The items of one row, checked: inside the catalogue, ascending, unique.
    pub fn row(&self, row: usize) -> Result<&'a [i32]> {
        let span = self.span(row)?;
        let items = &self.indices[span.clone()];
        // Without a way out on the first fault the comparison is made in vectors.
        if !items.iter().zip(items.get(1..).unwrap_or_default()).fold(true, |rise, (a, b)| rise & (a < b)) {
            let at = items.windows(2).position(|pair| pair[0] >= pair[1]).unwrap_or(0);
            return Err(Error::Unsorted { name: self.names.1, row, item: items[at + 1] });
        }
        for at in [0, items.len().wrapping_sub(1)] {
            if items.get(at).is_some_and(|&item| item < 0 || item as usize >= self.n_cols) {
                let found = items[at] as i64;
                return Err(Error::Index { name: self.names.1, position: span.start + at, found, bound: self.n_cols });
            }
        }
        Ok(items)
    }

    /// The 32 numbers from the beginning of a row of at most 32 items on, and how many of them the row
    /// has, checked as [`CsrView::row`] does but without a loop over the items, whose end no predictor
    /// foresees. `None` for a longer row, one near the end of the array, and one that is wrong.
    #[inline(always)]
    pub fn window(&self, row: usize, steps: &impl Steps) -> Option<(&'a [i32; 32], usize)> {
        let (start, end) = (self.indptr[row], self.indptr[row + 1]);
        let len = end.wrapping_sub(start) as usize;
        let window = self.indices.get(start as usize..)?.first_chunk::<33>().filter(|_| len <= 32)?;
        let is_inside = len == 0 || (window[0] >= 0 && (window[len - 1] as usize) < self.n_cols);
        let rises = steps.rising(window) | u32::MAX.checked_shl(len.max(1) as u32 - 1)? == u32::MAX;
        if rises && is_inside { Some((window.first_chunk()?, len)) } else { None }
    }

    /// Asks for the rows of the users a few places after `at`, which lie anywhere in memory: the
    /// frame of one far ahead, and two lines of items of a nearer one, whose frame has come by now.
    #[inline(always)]
    pub fn prefetch(&self, users: &[i32], at: usize) {
        if let Some(&user) = users.get(at + 16) {
            simd::prefetch(self.indptr, user as usize);
        }
        if let Some(&user) = users.get(at + 8) {
            let start = self.indptr[user as usize] as usize;
            simd::prefetch(self.indices, start);
            simd::prefetch(self.indices, start.wrapping_add(16));
        }
    }
}

/// The error of a number outside `least..bound`, if there is a wrong one.
pub fn refuse(name: &'static str, numbers: &[i32], least: i32, bound: usize) -> Result<()> {
    let allowed = least..=(bound as i64 - 1).min(i32::MAX.into()) as i32;
    // Without a way out on the first fault the comparison is made in vectors.
    if numbers.iter().fold(true, |fine, number| fine & allowed.contains(number)) {
        return Ok(());
    }
    let position = numbers.iter().position(|number| !allowed.contains(number)).unwrap_or(0);
    Err(Error::Index { name, position, found: numbers[position] as i64, bound })
}
