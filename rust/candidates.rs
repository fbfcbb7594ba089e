//! Who may be a negative: draws from the complement of a user's training row, and a filter.

use rayon::prelude::*;

use crate::csr::{CsrView, refuse};
use crate::error::{Error, Result};
use crate::random::{Stream, below};
use crate::simd::{Kernel, Steps};
use crate::threads;

/// Draws per parallel task: few enough to stay in the nearest cache, enough to forget the task's cost.
const DRAWS_PER_TASK: usize = 1 << 12;

/// Where draws come from: a try chooses one of equally likely columns, a column and a coin an item.
pub struct Law<'a> {
    n_columns: u32,
    /// Users with up to so many items never need [`Batch::draw_free`].
    longest: usize,
    /// Without it, a column is an item.
    popularity: Option<Popularity<'a>>,
}

/// Walker's alias table (built as by Vose 1991): column `c` stands for one item with probability
/// `keep / 2^32` and for another otherwise. One word makes a draw: its upper half chooses the
/// column, its lower half the item.
struct Popularity<'a> {
    weights: &'a [f64],
    total: f64,
    columns: Vec<(u32, [i32; 2])>,
}

impl<'a> Law<'a> {
    pub fn uniform(n_items: usize) -> Self {
        Self { n_columns: n_items as u32, longest: n_items / 4, popularity: None }
    }

    /// Probability proportional to `weights` among the free items.
    pub fn popularity(weights: &'a [f64]) -> Result<Self> {
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
        let mut columns: Vec<(u32, [i32; 2])> = items.iter().map(|&item| (u32::MAX, [item, item])).collect();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) = (0..items.len()).partition(|&c| share[c] < 1.0);
        while let (Some(&giver), Some(taker)) = (large.last(), small.pop()) {
            columns[taker] = ((share[taker] * 4_294_967_296.0) as u32, [items[taker], items[giver]]);
            share[giver] -= 1.0 - share[taker];
            if share[giver] < 1.0 {
                large.pop();
                small.push(giver);
            }
        }
        let heaviest = weights.iter().copied().fold(0.0, f64::max);
        let longest = (0.5 * total / heaviest) as usize; // 0 without any weight
        let n_columns = columns.len() as u32;
        Ok(Self { n_columns, longest, popularity: Some(Popularity { weights, total, columns }) })
    }

    /// The item behind a column and a coin; -1 for column -1.
    #[inline(always)]
    fn item(&self, column: i32, coin: u32) -> i32 {
        let Some(popularity) = &self.popularity else { return column };
        let found = popularity.columns.get(column as u32 as usize);
        found.map_or(-1, |&(keep, items)| items[usize::from(coin >= keep)])
    }
}

/// Copies each row of `candidates` without the user's own items and without -1 to the left of
/// `out`, which is all -1 at first, and counts what is left in `kept`.
pub fn filter_candidates(
    csr: CsrView, users: &[i32], candidates: &[i32], out: &mut [i32], kept: &mut [i32],
) -> Result<()> {
    refuse("users", users, 0, csr.n_rows())?;
    refuse("candidates", candidates, -1, i32::MAX as usize)?;
    let width = candidates.len() / users.len().max(1);
    for (row, &user) in users.iter().enumerate() {
        let owned = csr.row(user as usize)?;
        let span = row * width..(row + 1) * width;
        let free = candidates[span.clone()].iter().filter(|&&item| item >= 0 && owned.binary_search(&item).is_err());
        kept[row] = out[span].iter_mut().zip(free).map(|(slot, &item)| *slot = item).count() as i32;
    }
    Ok(())
}

/// The arguments of one call.
pub struct Batch<'a> {
    pub law: Law<'a>,
    pub csr: CsrView<'a>,
    pub users: &'a [i32],
    pub n_negatives: usize,
    pub seed: u64,
}

impl Batch<'_> {
    /// Fills `out`, `n_negatives` per entry of `users`, with replacement from the items the user does not own.
    pub fn draw(&self, kernel: &Kernel, out: &mut [i32]) -> Result<()> {
        refuse("users", self.users, 0, self.csr.n_rows())?;
        if out.is_empty() {
            return Ok(());
        }
        let rows_per_task = DRAWS_PER_TASK.div_ceil(self.n_negatives);
        let n_draws = rows_per_task * self.n_negatives;
        let scratch =
            || Scratch { coins: vec![0; n_draws], bad: vec![0; n_draws + 16], marks: Marks::new(self.csr.n_cols) };
        let tasks = out.par_chunks_mut(n_draws).enumerate();
        threads::first_error(
            tasks.map_init(scratch, |scratch, (task, out)| kernel.draw(self, task * rows_per_task, out, scratch)),
        )
    }

    /// Fills the rows from `first_row` on: first tries of all of them, then user by user the tries
    /// again, where the first was a surplus word or is owned. Whether it is owned the marks say; for a
    /// user with few draws marking would cost more than looking each of them up among the items.
    #[inline(always)]
    pub fn draw_rows(&self, first_row: usize, out: &mut [i32], scratch: &mut Scratch, steps: impl Steps) -> Result<()> {
        let (law, csr, n_negatives, seed) = (&self.law, self.csr, self.n_negatives, self.seed);
        let users = &self.users[first_row..first_row + out.len() / n_negatives];
        let (n_columns, longest) = (law.n_columns, law.longest);
        let Scratch { coins, bad, marks } = scratch;
        if n_columns == 0 {
            let user = users[0] as usize; // no item has a weight
            return Err(Error::NoFreeItem { user, seen: csr.row(user)?.len(), n_items: csr.n_cols });
        }
        let coins = if law.popularity.is_some() { &mut coins[..out.len()] } else { &mut [] };
        steps.first_tries(seed, first_row as u64, n_negatives, n_columns, out, coins);
        out.iter_mut().zip(coins).for_each(|(slot, coin)| *slot = law.item(*slot, *coin));
        let again = |word| below(word, n_columns).map(|column| law.item(column as i32, word as u32));
        let mut row = 0;
        while row < users.len() {
            csr.prefetch(users, row);
            let n_rows = users[row..].iter().take_while(|&&user| user == users[row]).count();
            let user = users[row] as usize;
            let out = &mut out[row * n_negatives..(row + n_rows) * n_negatives];
            let first_row = first_row + row;
            row += n_rows;
            let window = csr.window(user, &steps);
            let owned = match window {
                Some((window, len)) => &window[..len],
                None => csr.row(user)?,
            };
            if owned.len() > longest && self.draw_free(first_row, owned, out)? {
                continue;
            }
            let is_among = |item: i32| owned.binary_search(&item).is_ok();
            let are_marked = out.len() > 2 && 4 * out.len() >= owned.len();
            let mut n_bad = 0;
            if are_marked {
                marks.mark(owned);
                n_bad = steps.bad_places(out, marks, bad);
            } else {
                for (slot, &item) in out.iter().enumerate() {
                    bad[n_bad] = slot as u32;
                    n_bad += usize::from(match window {
                        // All 32, also the items of the next users: a loop of one length.
                        Some((window, _)) => window.iter().fold(item < 0, |hit, &owned| hit | (owned == item)),
                        None => item < 0 || is_among(item),
                    });
                }
            }
            let is_owned =
                |item: i32| (!are_marked || marks.may_have(item)) && (are_marked && marks.are_exact || is_among(item));
            for slot in bad[..n_bad].iter().map(|&slot| slot as usize) {
                if out[slot] < 0 || is_owned(out[slot]) {
                    out[slot] = self.draw_one(first_row, slot, 1, |word| again(word).filter(|&item| !is_owned(item)));
                }
            }
        }
        Ok(())
    }

    /// The first accepted word of draw `slot` of the rows from `first_row` on, from try `attempt` on.
    #[inline(always)]
    fn draw_one(&self, first_row: usize, slot: usize, attempt: u64, accept: impl Fn(u64) -> Option<i32>) -> i32 {
        let stream = Stream::new(self.seed, (first_row + slot / self.n_negatives) as u64);
        let mut words = (attempt..).map(|attempt| stream.word((slot % self.n_negatives) as u64, attempt));
        words.find_map(accept).unwrap_or(-1)
    }

    fn draw_all(&self, first_row: usize, out: &mut [i32], accept: impl Fn(u64) -> Option<i32>) {
        out.iter_mut().enumerate().for_each(|(slot, item)| *item = self.draw_one(first_row, slot, 0, &accept));
    }

    /// Draws straight from the free items of a user who owns so much that tries would be in vain;
    /// false for any other user.
    fn draw_free(&self, first_row: usize, owned: &[i32], out: &mut [i32]) -> Result<bool> {
        let user = self.users[first_row] as usize;
        let n_items = self.csr.n_cols;
        let nothing_free = Error::NoFreeItem { user, seen: owned.len(), n_items };
        let Some(Popularity { weights, total, .. }) = &self.law.popularity else {
            let n_free = n_items - owned.len();
            if n_free == 0 {
                return Err(nothing_free);
            }
            self.draw_all(first_row, out, |word| below(word, n_free as u32).map(|rank| free_item(owned, rank)));
            return Ok(true);
        };
        // By the cumulative weights of the free items, for users who own most of the mass: there the
        // table would be asked again and again.
        let weight = |item: i32| weights[item as usize];
        if owned.iter().map(|&item| weight(item)).sum::<f64>() < 0.75 * total {
            return Ok(false);
        }
        let is_free = |&item: &i32| weight(item) > 0.0 && owned.binary_search(&item).is_err();
        let free: Vec<i32> = (0..n_items as i32).filter(is_free).collect();
        let cumulative = free.iter().scan(0.0, |sum, &item| {
            *sum += weight(item);
            Some(*sum)
        });
        let cumulative: Vec<f64> = cumulative.collect();
        let Some(mass) = cumulative.last() else {
            return Err(nothing_free);
        };
        self.draw_all(first_row, out, |word| {
            let point = (word >> 11) as f64 / 9_007_199_254_740_992.0 * mass;
            Some(free[cumulative.partition_point(|&sum| sum <= point).min(free.len() - 1)])
        });
        Ok(true)
    }
}

/// What a thread needs from task to task.
pub struct Scratch {
    coins: Vec<u32>,
    bad: Vec<u32>,
    marks: Marks,
}

/// Room for marks: 32 KiB, to stay in the nearest cache beside the draws.
pub const MARKS: usize = 1 << 15;

/// The items of one user, each with the user's stamp at its number modulo [`MARKS`]: other users' stamps
/// need not be taken away, and nothing is read before it is written. In a larger catalogue several
/// items share a place, and a marked one has to be looked for among the user's items.
pub struct Marks {
    /// 3 more, so that 4 bytes can be read at each place.
    pub stamps: Box<[u8; MARKS + 3]>,
    pub stamp: u8,
    are_exact: bool,
}

impl Marks {
    fn new(n_items: usize) -> Self {
        Self { stamps: Box::new([0; MARKS + 3]), stamp: 0, are_exact: n_items <= MARKS }
    }

    /// Marks `owned`, and nothing else.
    #[inline(always)]
    fn mark(&mut self, owned: &[i32]) {
        self.stamp = self.stamp.wrapping_add(1);
        if self.stamp == 0 {
            self.stamps.fill(0);
            self.stamp = 1;
        }
        owned.iter().for_each(|&item| self.stamps[item as usize % MARKS] = self.stamp);
    }

    #[inline(always)]
    pub fn may_have(&self, item: i32) -> bool {
        self.stamps[item as usize % MARKS] == self.stamp
    }
}

/// The free item that has `rank` free items before it. `owned[j] - j` free items stand before
/// `owned[j]`, a number that never falls, so a binary search counts the owned ones in front.
fn free_item(owned: &[i32], rank: u32) -> i32 {
    let (mut low, mut high) = (0, owned.len());
    while low < high {
        let middle = low.midpoint(high);
        if owned[middle] as usize - middle <= rank as usize {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    rank as i32 + low as i32
}
