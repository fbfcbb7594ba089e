//! Who may be a negative: draws from the complement of a user's training row, and a filter.

use rayon::prelude::*;

use crate::csr::{CsrView, check_users};
use crate::error::{Error, Result};
use crate::random::{Stream, below};
use crate::{simd, threads};

/// Draws per parallel task; small enough to balance and to stay in the cache, large enough to
/// forget the task's cost.
const DRAWS_PER_TASK: usize = 1 << 14;

/// Fills `out`, `n_negatives` per entry of `users`, uniformly with replacement from the items
/// the user does not own.
pub fn sample_uniform(csr: CsrView, users: &[i32], n_negatives: usize, seed: u64, out: &mut [i32]) -> Result<()> {
    draw_rows(&Uniform { n_items: csr.n_cols }, csr, users, n_negatives, seed, out)
}

/// The same with probability proportional to `weights` among the free items.
pub fn sample_popularity(
    csr: CsrView, weights: &[f64], users: &[i32], n_negatives: usize, seed: u64, out: &mut [i32],
) -> Result<()> {
    draw_rows(&Popularity::new(weights)?, csr, users, n_negatives, seed, out)
}

/// Where draws come from: a try chooses one of equally likely columns, a column and a coin an item.
trait Law: Sync {
    fn n_columns(&self) -> u32;
    /// The item behind a column and a coin; -1 for column -1.
    fn item(&self, column: i32, coin: u32) -> i32;
    /// Users with up to so many items never need [`Law::draw_free`].
    fn longest(&self) -> usize;
    /// Draws straight from the free items of a user who owns so much that tries would be in vain;
    /// false for any other user.
    fn draw_free(&self, run: &Run, user: usize, owned: &Owned, out: &mut [i32]) -> Result<bool>;
}

struct Uniform {
    n_items: usize,
}

impl Law for Uniform {
    fn n_columns(&self) -> u32 {
        self.n_items as u32
    }

    #[inline(always)]
    fn item(&self, column: i32, _coin: u32) -> i32 {
        column
    }

    fn longest(&self) -> usize {
        self.n_items.saturating_sub(1) / 4
    }

    fn draw_free(&self, run: &Run, user: usize, owned: &Owned, out: &mut [i32]) -> Result<bool> {
        let n_free = self.n_items - owned.items.len();
        if n_free == 0 {
            return Err(Error::NoFreeItem { user, seen: self.n_items, n_items: self.n_items });
        }
        let is_dense = owned.items.len() * 4 > self.n_items;
        if is_dense {
            run.draw_all(out, |word| below(word, n_free as u32).map(|rank| owned.free_item(rank)));
        }
        Ok(is_dense)
    }
}

/// Walker's alias table (built as by Vose 1991): column `c` stands for one item with probability
/// `keep / 2^32` and for another otherwise, and all columns are equally likely. One word makes a
/// draw: its upper half chooses the column, its lower half the item.
struct Popularity<'a> {
    weights: &'a [f64],
    total: f64,
    columns: Vec<(u32, i32, i32)>,
}

impl<'a> Popularity<'a> {
    fn new(weights: &'a [f64]) -> Result<Self> {
        if let Some(at) = weights.iter().position(|w| !w.is_finite() || *w < 0.0) {
            let found = format!("{} at item {at}", weights[at]);
            return Err(Error::Argument { name: "weights", found, expected: "finite and not negative" });
        }
        let items: Vec<i32> = (0..weights.len() as i32).filter(|&item| weights[item as usize] > 0.0).collect();
        let total: f64 = items.iter().map(|&item| weights[item as usize]).sum();
        if !total.is_finite() {
            return Err(Error::Argument { name: "weights", found: "a sum of inf".into(), expected: "a finite sum" });
        }
        let unit = items.len() as f64 / total;
        let mut share: Vec<f64> = items.iter().map(|&item| weights[item as usize] * unit).collect();
        let mut columns: Vec<(u32, i32, i32)> = items.iter().map(|&item| (u32::MAX, item, item)).collect();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) = (0..items.len()).partition(|&c| share[c] < 1.0);
        while let (Some(&giver), Some(taker)) = (large.last(), small.pop()) {
            columns[taker] = ((share[taker] * 4_294_967_296.0) as u32, items[taker], items[giver]);
            share[giver] -= 1.0 - share[taker];
            if share[giver] < 1.0 {
                large.pop();
                small.push(giver);
            }
        }
        Ok(Self { weights, total, columns })
    }
}

impl Law for Popularity<'_> {
    fn n_columns(&self) -> u32 {
        self.columns.len() as u32
    }

    #[inline(always)]
    fn item(&self, column: i32, coin: u32) -> i32 {
        let found = self.columns.get(column as u32 as usize);
        found.map_or(-1, |&(keep, own, other)| if coin < keep { own } else { other })
    }

    fn longest(&self) -> usize {
        let heaviest = self.weights.iter().copied().fold(0.0, f64::max);
        (0.5 * self.total / heaviest) as usize // 0 without any weight
    }

    /// By the cumulative weights of the free items, for users who own most of the mass: there the
    /// table would be asked again and again.
    fn draw_free(&self, run: &Run, user: usize, owned: &Owned, out: &mut [i32]) -> Result<bool> {
        let weight = |item: i32| self.weights[item as usize];
        if owned.items.iter().map(|&item| weight(item)).sum::<f64>() < 0.75 * self.total {
            return Ok(false);
        }
        let is_free = |&item: &i32| weight(item) > 0.0 && owned.items.binary_search(&item).is_err();
        let free: Vec<i32> = (0..self.weights.len() as i32).filter(is_free).collect();
        let cumulative = free.iter().scan(0.0, |sum, &item| {
            *sum += weight(item);
            Some(*sum)
        });
        let cumulative: Vec<f64> = cumulative.collect();
        let Some(mass) = cumulative.last() else {
            return Err(Error::NoFreeItem { user, seen: owned.items.len(), n_items: self.weights.len() });
        };
        run.draw_all(out, |word| {
            let point = (word >> 11) as f64 / 9_007_199_254_740_992.0 * mass;
            Some(free[cumulative.partition_point(|&sum| sum <= point).min(free.len() - 1)])
        });
        Ok(true)
    }
}

/// Copies each row of `candidates` without the user's own items and without -1 to the left of
/// `out`, pads with -1, and counts what is left in `kept`.
pub fn filter_candidates(
    csr: CsrView, users: &[i32], candidates: &[i32], out: &mut [i32], kept: &mut [i32],
) -> Result<()> {
    check_users(users, csr.n_rows())?;
    if let Some(position) = candidates.iter().position(|&item| item < -1) {
        let found = candidates[position] as i64;
        return Err(Error::Index { name: "candidates", position, found, bound: i32::MAX as usize });
    }
    let width = candidates.len() / users.len().max(1);
    out.fill(-1);
    for (row, &user) in users.iter().enumerate() {
        let owned = csr.row(user as usize)?;
        let span = row * width..(row + 1) * width;
        let free = candidates[span.clone()].iter().filter(|&&item| item >= 0 && owned.binary_search(&item).is_err());
        kept[row] = out[span].iter_mut().zip(free).map(|(slot, &item)| *slot = item).count() as i32;
    }
    Ok(())
}

/// Neighbouring output rows of one user: what is prepared for the user serves all of them.
struct Run {
    seed: u64,
    first_row: usize,
    n_negatives: usize,
}

impl Run {
    /// The first accepted word of draw `slot` of the run, from try `attempt` on.
    fn draw(&self, slot: usize, attempt: u64, accept: impl Fn(u64) -> Option<i32>) -> i32 {
        let stream = Stream::new(self.seed, (self.first_row + slot / self.n_negatives) as u64);
        let mut words = (attempt..).map(|attempt| stream.word((slot % self.n_negatives) as u64, attempt));
        words.find_map(accept).unwrap_or(-1)
    }

    fn draw_all(&self, out: &mut [i32], accept: impl Fn(u64) -> Option<i32>) {
        out.iter_mut().enumerate().for_each(|(slot, item)| *item = self.draw(slot, 0, &accept));
    }

    /// Tries again where the first try was a surplus word (-1) or an item that is `owned`. The slots
    /// are gathered first, without a branch that nobody could foresee.
    #[inline(always)]
    fn replace(&self, out: &mut [i32], owned: impl Fn(i32) -> bool, again: impl Fn(u64) -> Option<i32>) {
        let mut bad = [0u8; 64];
        for (group, items) in out.chunks_mut(64).enumerate() {
            let mut n_bad = 0;
            for (at, &item) in items.iter().enumerate() {
                bad[n_bad] = at as u8;
                n_bad += usize::from((item < 0) | owned(item));
            }
            for &at in &bad[..n_bad] {
                let slot = 64 * group + at as usize;
                items[at as usize] = self.draw(slot, 1, |word| again(word).filter(|&item| !owned(item)));
            }
        }
    }
}

/// Fills `out` by `law`, in three steps that each go over a whole task, so that the change from one
/// user to the next costs nothing: first tries in vectors; a comparison of each with its user's
/// items; then, one by one, what was found and the users whose items are too many to compare.
fn draw_rows(
    law: &impl Law, csr: CsrView, users: &[i32], n_negatives: usize, seed: u64, out: &mut [i32],
) -> Result<()> {
    check_users(users, csr.n_rows())?;
    if n_negatives == 0 {
        return Ok(());
    }
    let (kernel, n_columns, longest) = (simd::kernel(), law.n_columns(), law.longest());
    let rows_per_task = DRAWS_PER_TASK.div_ceil(n_negatives);
    let again = |word| below(word, n_columns).map(|column| law.item(column as i32, word as u32));
    let work = |(bits, coins, found): &mut Scratch, (task, (out, users)): (usize, (&mut [i32], &[i32]))| {
        let first_row = task * rows_per_task;
        if n_columns == 0 {
            let user = users[0] as usize; // no item has a weight
            return Err(Error::NoFreeItem { user, seen: csr.row(user)?.len(), n_items: csr.n_cols });
        }
        kernel.tries(seed, first_row as u64, n_negatives, n_columns, out, &mut coins[..out.len()]);
        out.iter_mut().zip(&*coins).for_each(|(slot, &coin)| *slot = law.item(*slot, coin));
        kernel.screen(csr, users, longest, out, found);
        for &slot in &found.slots {
            let row = slot / n_negatives;
            let owned = csr.row(users[row] as usize)?;
            let run = Run { seed, first_row: first_row + row, n_negatives };
            let is_owned = |item: i32| owned.binary_search(&item).is_ok();
            if out[slot] < 0 || is_owned(out[slot]) {
                out[slot] = run.draw(slot % n_negatives, 1, |word| again(word).filter(|&item| !is_owned(item)));
            }
        }
        for &row in &found.rows {
            csr.prefetch(users, row);
            let user = users[row] as usize;
            let n_rows = users[row..].iter().take_while(|other| **other as usize == user).count();
            let out = &mut out[row * n_negatives..(row + n_rows) * n_negatives];
            let run = Run { seed, first_row: first_row + row, n_negatives };
            let mut owned = Owned { items: csr.row(user)?, bits };
            if !law.draw_free(&run, user, &owned, out)? {
                if 4 * out.len() > owned.items.len() {
                    owned.mark();
                    run.replace(out, |item| owned.has(item), again);
                    owned.unmark();
                } else {
                    run.replace(out, |item| owned.items.binary_search(&item).is_ok(), again);
                }
            }
        }
        Ok(())
    };
    let scratch = || (vec![0; csr.n_cols.div_ceil(64)], vec![0; rows_per_task * n_negatives], Found::default());
    let tasks = out.par_chunks_mut(rows_per_task * n_negatives).zip(users.par_chunks(rows_per_task)).enumerate();
    threads::first_error(tasks.map_init(scratch, work))
}

/// What a thread needs from task to task: a bitset over the catalogue, room for coins and findings.
type Scratch = (Vec<u64>, Vec<u32>, Found);

/// What [`screen`] has found in a task.
#[derive(Default)]
pub struct Found {
    slots: Vec<usize>,
    rows: Vec<usize>,
}

/// Compares every draw with a window of [`WINDOW`] items that begins with those of its user. Slots
/// with a surplus word or an item of the window, which may belong to the next users, go to
/// `found.slots`; the first rows of users with more items, or with items out of order, to
/// `found.rows`.
#[inline(always)]
pub fn screen(csr: CsrView, users: &[i32], longest: usize, out: &[i32], found: &mut Found) {
    found.slots.clear();
    found.rows.clear();
    let (n_negatives, mut window) = (out.len() / users.len(), None);
    for (row, (&user, items)) in users.iter().zip(out.chunks_exact(n_negatives)).enumerate() {
        if row == 0 || user != users[row - 1] {
            csr.prefetch(users, row);
            window = csr.window(user as usize, longest);
            if window.is_none() {
                found.rows.push(row);
            }
        }
        let Some(window) = window else { continue };
        for (at, &item) in items.iter().enumerate() {
            if window.iter().fold(item < 0, |hit, &owned| hit | (owned == item)) {
                found.slots.push(row * n_negatives + at);
            }
        }
    }
}

/// A user's items, as the sorted row and, once marked, as a bitset over the catalogue.
struct Owned<'a> {
    items: &'a [i32],
    bits: &'a mut [u64],
}

impl Owned<'_> {
    fn mark(&mut self) {
        self.items.iter().for_each(|&item| self.bits[item as usize / 64] |= 1 << (item % 64));
    }

    fn unmark(&mut self) {
        self.items.iter().for_each(|&item| self.bits[item as usize / 64] = 0);
    }

    #[inline(always)]
    fn has(&self, item: i32) -> bool {
        self.bits.get(item as u32 as usize / 64).unwrap_or(&0) >> (item & 63) & 1 == 1
    }

    /// The free item that has `rank` free items before it. `items[j] - j` free items stand before
    /// `items[j]`, a number that never falls, so a binary search counts the owned ones in front.
    fn free_item(&self, rank: u32) -> i32 {
        let (mut low, mut high) = (0, self.items.len());
        while low < high {
            let middle = low.midpoint(high);
            if self.items[middle] as usize - middle <= rank as usize {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        rank as i32 + low as i32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(indices: &[i32], n_items: usize, n: usize, weights: Option<&[f64]>) -> Result<Vec<i32>> {
        let indptr = [0, indices.len() as i64];
        let csr = CsrView::new(&indptr, indices, n_items)?;
        let mut out = vec![-1; n];
        match weights {
            None => sample_uniform(csr, &[0], n, 7, &mut out)?,
            Some(weights) => sample_popularity(csr, weights, &[0], n, 7, &mut out)?,
        }
        Ok(out)
    }

    fn share(draws: &[i32], item: i32) -> f64 {
        draws.iter().filter(|&&drawn| drawn == item).count() as f64 / draws.len() as f64
    }

    #[test]
    fn free_items_are_equally_likely_in_sparse_and_in_dense_rows() {
        for owned in [&[2][..], &[0, 2, 3]] {
            let drawn = draws(owned, 6, 60_000, None).unwrap();
            for item in 0..6 {
                let expected = if owned.contains(&item) { 0.0 } else { 1.0 / (6 - owned.len()) as f64 };
                assert!((share(&drawn, item) - expected).abs() < 0.01);
            }
        }
    }

    #[test]
    fn popularity_is_followed_among_the_free_items() {
        // Weights 8:1:1 (case B06), then without item 0, whose mass of 0.8 asks for `draw_free`.
        let drawn = draws(&[], 3, 60_000, Some(&[8.0, 1.0, 1.0])).unwrap();
        assert!((share(&drawn, 0) - 0.8).abs() < 0.01 && (share(&drawn, 1) - 0.1).abs() < 0.01);
        let drawn = draws(&[0], 3, 60_000, Some(&[8.0, 1.0, 1.0])).unwrap();
        assert!(share(&drawn, 0) == 0.0 && (share(&drawn, 1) - 0.5).abs() < 0.01);
        assert_eq!(share(&draws(&[], 3, 1000, Some(&[1.0, 0.0, 1.0])).unwrap(), 1), 0.0);
    }
}
