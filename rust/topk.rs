//! Rank the whole catalogue per user: the first K items, or just the ranks of the held-out ones.

use std::array::from_fn;

use rayon::prelude::*;

use crate::csr::CsrView;
use crate::error::{Error, Result, expect};
use crate::scan::{State, Vectors, scan};
use crate::simd::{DOTS, Kernel};
use crate::threads;

/// Larger for a higher score, then for a smaller item. Floats order as their bits do once the
/// negative ones are turned around; adding zero makes -0.0 and 0.0 the tie that they are.
#[inline(always)]
fn key(score: f32, item: i32) -> u64 {
    let bits = (score + 0.0).to_bits();
    let rising = bits ^ (((bits as i32 >> 31) as u32) | 0x8000_0000);
    (rising as u64) << 32 | !item as u32 as u64
}

fn score_of(key: u64) -> f32 {
    let rising = (key >> 32) as u32;
    f32::from_bits(rising ^ ((!(rising as i32) >> 31) as u32 | 0x8000_0000))
}

fn item_of(key: u64) -> i32 {
    !(key as u32) as i32
}

/// The best K of the scores offered.
///
/// Candidates are collected in a buffer of about twice the size. When it is full the better K
/// are kept and the threshold rises to the last of them: cheaper than keeping a heap in order for
/// candidates of which most will fall out again. Score and item are one whole number (see
/// [`key`]), so that comparing them is one instruction.
pub struct Best {
    threshold: f32,
    k: usize,
    buffer: Vec<u64>,
}

impl Best {
    /// Only scores from `floor` up count; `k` > 0.
    pub fn new(floor: f32, k: usize) -> Self {
        Self { threshold: floor, k, buffer: Vec::new() }
    }

    /// Room for K and for about as many more.
    fn capacity(k: usize) -> usize {
        2 * k + 8
    }

    #[inline(always)]
    pub fn offer(&mut self, item: i32, score: f32) {
        if score >= self.threshold {
            self.buffer.push(key(score, item));
            if self.buffer.len() == Self::capacity(self.k) {
                self.keep_best();
            }
        }
    }

    fn keep_best(&mut self) {
        if self.buffer.len() > self.k {
            self.buffer.select_nth_unstable_by(self.k - 1, |a, b| b.cmp(a));
            self.buffer.truncate(self.k);
            self.threshold = score_of(self.buffer[self.k - 1]);
        }
    }

    /// The list by [`key`], the best first.
    fn ranked(mut self) -> Vec<u64> {
        self.keep_best();
        self.buffer.sort_unstable_by(|a, b| b.cmp(a));
        self.buffer
    }

    /// Writes the list, the best first, into arrays of -1 and `-inf`.
    pub fn finish(self, items: &mut [i32], scores: &mut [f32]) {
        for (at, key) in self.ranked().into_iter().enumerate() {
            (items[at], scores[at]) = (item_of(key), score_of(key));
        }
    }
}

/// The list of one query, without its excluded items. What counts, and as what, `adjust` says;
/// what becomes of the list, `then`.
struct List<'a, F, G> {
    best: Best,
    excluded: &'a [i32],
    adjust: F,
    then: G,
}

impl<F: Fn(i32, f32) -> Option<f32> + Send, G: FnOnce(Best) + Send> State for List<'_, F, G> {
    fn threshold(&self) -> f32 {
        self.best.threshold
    }

    fn skipped(&self) -> impl Iterator<Item = &i32> {
        self.excluded.iter()
    }

    fn start(&mut self, _query: &[f32], _kernel: &Kernel) {
        self.best.buffer.reserve_exact(Best::capacity(self.best.k).min(1 << 12)); // longer lists grow
    }

    fn offer(&mut self, item: i32, score: f32) {
        if let Some(score) = (self.adjust)(item, score) {
            self.best.offer(item, score);
        }
    }

    fn finish(self) {
        (self.then)(self.best);
    }
}

/// The lists of all queries, into `items` and `scores` `[N, k]`. `of` says whose items a query
/// leaves out, and from which score on something counts for it.
pub fn lists(
    queries: &Vectors, catalogue: &Vectors, excluded: CsrView, k: usize, of: impl Fn(usize) -> (usize, f32),
    adjust: impl Fn(i32, f32) -> Option<f32> + Send + Copy, (items, scores): (&mut [i32], &mut [f32]),
) -> Result<()> {
    let slots = items.chunks_mut(k.max(1)).zip(scores.chunks_mut(k.max(1)));
    let states = slots.enumerate().map(|(query, (items, scores))| {
        let (user, floor) = of(query);
        let then = |best: Best| best.finish(items, scores);
        Ok(List { best: Best::new(floor, k), excluded: excluded.row(user)?, adjust, then })
    });
    scan(queries, catalogue, excluded, size_of::<u64>() * Best::capacity(k), states)
}

/// The first `k` items of every user by inner product.
pub fn topk(
    users: &Vectors, catalogue: &Vectors, excluded: CsrView, k: usize, out: (&mut [i32], &mut [f32]),
) -> Result<()> {
    check(users, catalogue, excluded)?;
    lists(users, catalogue, excluded, k, |user| (user, f32::MIN), |_, score| Some(score), out)
}

/// The same from given scores `[U, I]` of any model; `-inf` means never.
pub fn topk_scores(
    matrix: &[f32], excluded: CsrView, k: usize, (items, scores): (&mut [i32], &mut [f32]),
) -> Result<()> {
    let n_items = excluded.n_cols;
    let row = |user: usize| {
        let row = &matrix[user * n_items..(user + 1) * n_items];
        match row.iter().filter(|score| score.is_nan()).count() {
            0 => Ok(row),
            count => Err(Error::NonFinite { name: "scores", unit: "user", row: user, count }),
        }
    };
    if k == 0 {
        return (0..excluded.n_rows()).try_for_each(|user| row(user).map(|_| ()));
    }
    let slots = items.par_chunks_mut(k).zip(scores.par_chunks_mut(k));
    threads::first_error(slots.enumerate().map(|(user, (items, scores))| {
        let mut excluded = excluded.row(user)?.iter().peekable();
        let mut best = Best::new(f32::MIN, k);
        for (item, &score) in (0..).zip(row(user)?) {
            if score >= best.threshold {
                // Both sequences rise, so one walk along the row finds every excluded item.
                while excluded.next_if(|&&excluded| excluded < item).is_some() {}
                if excluded.peek() != Some(&&item) {
                    best.offer(item, score);
                }
            }
        }
        best.finish(items, scores);
        Ok(())
    }))
}

/// Whether sizes fit and no score is NaN or infinity: of finite vectors none is whose lengths' product
/// is far below the end of `f32`, as by Cauchy and Schwarz no partial sum is larger than that.
fn check(users: &Vectors, items: &Vectors, excluded: CsrView) -> Result<()> {
    expect("item_emb (dimensions)", items.dim, users.dim)?;
    excluded.expect_rows(users.len)?;
    let longest = |lengths: Vec<f64>| lengths.into_iter().fold(0.0, f64::max);
    let most = longest(users.lengths("user_emb")?) * longest(items.lengths("item_emb")?);
    if most < f32::MAX as f64 / 2.0 { Ok(()) } else { Err(Error::Overflow) }
}

/// Ranks of a user's held-out items, without a list: an item's rank is one more than the number
/// of items better than it. The held-out items stand in line, the best first, at most `k` of them.
/// A score of another item that beats some of them beats all behind the first of these, so it is
/// counted there alone. Whatever is counted beats the last in line; when that and those before it
/// make `k`, the last leaves, and the threshold rises to the score of the one before it.
struct Ranks<'a> {
    excluded: &'a [i32],
    catalogue: &'a Vectors<'a>,
    held_out: &'a [i32],
    k: usize,
    /// The line, by [`key`].
    racing: Vec<u64>,
    /// Other items better than each of the line, but not than the one before it; and their sum.
    n_between: Vec<u32>,
    n_better: usize,
    ranks: &'a mut [i32],
}

impl State for Ranks<'_> {
    fn threshold(&self) -> f32 {
        self.racing.last().map_or(f32::INFINITY, |&last| score_of(last))
    }

    fn skipped(&self) -> impl Iterator<Item = &i32> {
        self.excluded.iter().chain(self.held_out)
    }

    fn start(&mut self, query: &[f32], kernel: &Kernel) {
        let mut vectors = vec![0.0; DOTS * query.len()];
        self.racing.reserve_exact(self.held_out.len());
        for items in self.held_out.chunks(DOTS) {
            let mut vectors = vectors.chunks_mut(query.len().max(1));
            let vectors = from_fn(|n| {
                let vector = vectors.next().unwrap_or_default();
                self.catalogue.read(items[n.min(items.len() - 1)] as usize, vector)
            });
            let scores = kernel.dots(query, vectors);
            let racing = items.iter().zip(scores).filter(|(item, _)| self.excluded.binary_search(item).is_err());
            self.racing.extend(racing.map(|(&item, score)| key(score, item)));
        }
        self.racing.sort_unstable_by(|a, b| b.cmp(a));
        self.racing.truncate(self.k);
        self.n_between.resize(self.racing.len(), 0);
    }

    fn offer(&mut self, item: i32, score: f32) {
        let key = key(score, item);
        let behind = self.racing.partition_point(|&racer| racer > key);
        let Some(n_between) = self.n_between.get_mut(behind) else { return };
        *n_between += 1;
        self.n_better += 1;
        if self.racing.len() + self.n_better > self.k {
            self.racing.pop();
            self.n_better -= self.n_between.pop().unwrap_or(0) as usize;
        }
    }

    fn finish(self) {
        let mut rank = 0;
        for (racer, n_between) in self.racing.iter().zip(self.n_between) {
            rank += 1 + n_between as i32;
            if let Ok(slot) = self.held_out.binary_search(&item_of(*racer)) {
                self.ranks[slot] = rank;
            }
        }
    }
}

/// Held-out items of a user, on average, from which on a list costs less than their race: it costs
/// the same however many they are, the race more with each. With 6,000 users x 3,700 items the two
/// cross between 10 and 33 at every `k` from 10 to 100.
const MANY_HELD_OUT: usize = 20;

/// The 1-based rank of every held-out item in its user's ranking, 0 where it is beyond `k` or
/// excluded; `ranks`, zeros at first, lies as the indices of `held_out` do.
pub fn test_ranks(
    users: &Vectors, catalogue: &Vectors, excluded: CsrView, held_out: CsrView, k: usize, ranks: &mut [i32],
) -> Result<()> {
    check(users, catalogue, excluded)?;
    held_out.expect_rows(users.len)?;
    let mut rest = ranks;
    let rows = (0..users.len).map(|user| {
        let held_out = held_out.row(user)?;
        let (ranks, tail) = std::mem::take(&mut rest).split_at_mut(held_out.len());
        rest = tail;
        Ok((excluded.row(user)?, held_out, ranks))
    });
    if k == 0 || held_out.indices.len() < MANY_HELD_OUT * users.len {
        let states = rows.map(|row: Result<_>| {
            let (excluded, held_out, ranks) = row?;
            let (racing, n_between) = (Vec::new(), Vec::new());
            Ok(Ranks { excluded, catalogue, held_out, k, racing, n_between, n_better: 0, ranks })
        });
        return scan(users, catalogue, excluded, 64, states);
    }
    let states = rows.map(|row| {
        let (excluded, held_out, ranks) = row?;
        let then = |best: Best| {
            for (key, rank) in best.ranked().into_iter().zip(1..) {
                if let Ok(slot) = held_out.binary_search(&item_of(key)) {
                    ranks[slot] = rank;
                }
            }
        };
        Ok(List { best: Best::new(f32::MIN, k), excluded, adjust: |_, score| Some(score), then })
    });
    scan(users, catalogue, excluded, size_of::<u64>() * Best::capacity(k), states)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csr::{HELD_OUT, OWNED};
    use crate::scan::Values;

    #[test]
    fn ranks_agree_with_lists() {
        // One dimension, query 1: the score is the item's number in the catalogue.
        let users = Vectors::new(Values::F32(&[1.0]), 1, 1);
        let values: Vec<f32> = (0..200).map(|item| (item % 50) as f32).collect();
        let catalogue = Vectors::new(Values::F32(&values), 1, 200);
        let excluded = CsrView::new(OWNED, &[0, 1], &[49], 200).unwrap();
        let (mut items, mut scores) = ([0; 5], [0.0; 5]);
        topk(&users, &catalogue, excluded, 5, (&mut items, &mut scores)).unwrap();
        assert_eq!(items, [99, 149, 199, 48, 98]);
        let held_out = CsrView::new(HELD_OUT, &[0, 4], &[48, 49, 149, 198], 200).unwrap();
        let mut ranks = [0; 4];
        test_ranks(&users, &catalogue, excluded, held_out, 5, &mut ranks).unwrap();
        assert_eq!(ranks, [4, 0, 2, 0]);
    }
}
