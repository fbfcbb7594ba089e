//! Per-user metrics from the ranks of the held-out items. The conventions stand in
//! `hnlm_ref/metrics.py`.

use crate::csr::{CsrView, refuse};
use crate::error::{Error, Result};

/// Recall, NDCG, precision, hit, reciprocal rank, average precision: the order of the output.
pub const N_METRICS: usize = 6;

/// The rank of every held-out item in a given list `[U, k]`; `ranks` stays 0 where it is missing.
pub fn ranks_in_lists(lists: &[i32], k: usize, held_out: CsrView, ranks: &mut [i32]) -> Result<()> {
    for user in 0..held_out.n_rows() {
        let ranks = &mut ranks[held_out.span(user)?];
        let items = held_out.row(user)?;
        for (at, item) in lists[user * k..(user + 1) * k].iter().enumerate() {
            if let Ok(slot) = items.binary_search(item)
                && ranks[slot] == 0
            {
                ranks[slot] = at as i32 + 1;
            }
        }
    }
    Ok(())
}

/// All metrics at every cut-off of `ks`, into `out` `[N_METRICS, n_k, U]`; NaN for users with
/// nothing held out. The "items" of `ranks` are the ranks of a user's held-out items.
pub fn user_metrics(ranks: CsrView, ks: &[i64], out: &mut [f64]) -> Result<()> {
    let spans = (0..ranks.n_rows()).map(|user| ranks.span(user)).collect::<Result<Vec<_>>>()?;
    let ranks = ranks.indices;
    if let Some(position) = ks.iter().position(|&k| k < 1) {
        return Err(Error::Argument { name: "ks", found: ks[position].to_string(), expected: "1 or more" });
    }
    refuse("ranks", ranks, 0, i32::MAX as usize)?;
    let (n_users, plane) = (spans.len(), ks.len() * spans.len());
    // Of `n` held-out items in the first places, by `n`: the same sums for every user.
    let longest = spans.iter().map(|span| span.len()).max().unwrap_or(0);
    let mut ideal = vec![0.0; longest + 1];
    (1..=longest).for_each(|n| ideal[n] = ideal[n - 1] + gain(n));
    for (user, span) in spans.iter().enumerate() {
        let mut sorted: Vec<i32> = ranks[span.clone()].iter().copied().filter(|&rank| rank > 0).collect();
        sorted.sort_unstable();
        for (at, &k) in ks.iter().enumerate() {
            for (metric, value) in one_user(&sorted, span.len(), k, &ideal).into_iter().enumerate() {
                out[metric * plane + at * n_users + user] = value;
            }
        }
    }
    Ok(())
}

fn gain(rank: usize) -> f64 {
    1.0 / (rank as f64 + 1.0).log2()
}

/// Metrics of one user at one cut-off from the sorted ranks of the `n_held_out` items found.
fn one_user(ranks: &[i32], n_held_out: usize, k: i64, ideal: &[f64]) -> [f64; N_METRICS] {
    if n_held_out == 0 {
        return [f64::NAN; N_METRICS];
    }
    let hits = &ranks[..ranks.partition_point(|&rank| rank as i64 <= k)];
    let (n_hits, most) = (hits.len() as f64, n_held_out.min(k as usize));
    let dcg = hits.iter().fold(0.0, |sum, &rank| sum + gain(rank as usize)); // `sum()` of nothing is -0.0
    let precisions = hits.iter().enumerate().fold(0.0, |sum, (at, &rank)| sum + (at + 1) as f64 / rank as f64);
    [
        n_hits / n_held_out as f64,
        dcg / ideal[most],
        n_hits / k as f64,
        f64::from(!hits.is_empty()),
        hits.first().map_or(0.0, |&rank| 1.0 / rank as f64),
        precisions / most as f64,
    ]
}
