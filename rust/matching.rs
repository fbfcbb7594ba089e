//! Generated negatives to catalogue items: by cosine of vectors, or by likeness of titles.

use std::collections::HashMap;

use rayon::prelude::*;

use crate::csr::{CsrView, check_users};
use crate::error::Result;
use crate::scan::{Hits, Order, State, Vectors, scan};
use crate::simd::Kernel;
use crate::threads;
use crate::topk::Best;

/// Which cosines count: from `min` to `max`, both included.
#[derive(Clone, Copy)]
pub struct Band {
    pub min: f32,
    pub max: f32,
}

/// The best cosines of one query inside the band. A zero vector has no direction: it matches
/// nothing, and nothing matches it.
struct Nearest<'a> {
    best: Best<'a>,
    excluded: &'a [i32],
    max: f32,
    item_norms: &'a [f64],
}

impl State for Nearest<'_> {
    fn threshold(&self) -> f32 {
        self.best.threshold()
    }

    fn skipped(&self) -> impl Iterator<Item = &i32> {
        self.excluded.iter()
    }

    fn start(&mut self, _query: &[f32], _kernel: &Kernel) {}

    fn offer(&mut self, hits: Hits) {
        let (max, norms) = (self.max, self.item_norms);
        let cosines = hits.map(|(item, score)| (item, score.clamp(-1.0, 1.0)));
        self.best.take(cosines.filter(|&(item, cosine)| cosine <= max && norms[item as usize] > 0.0));
    }

    fn finish(self) {
        self.best.finish();
    }
}

/// The `k` nearest items of every query, without those of the user it was made for.
pub fn match_items(
    queries: Vectors, catalogue: Vectors, users: &[i32], excluded: CsrView, k: usize, band: Band,
    (items, scores): (&mut [i32], &mut [f32]),
) -> Result<()> {
    check_users(users, excluded.n_rows())?;
    let (query_norms, item_norms) = (queries.lengths("queries")?, catalogue.lengths("items")?);
    let queries = Vectors { norms: Some(&query_norms), ..queries };
    let catalogue = Vectors { norms: Some(&item_norms), ..catalogue };
    let order = Order::by_popularity(excluded);
    let slots = items.chunks_mut(k.max(1)).zip(scores.chunks_mut(k.max(1)));
    let states = slots.enumerate().map(|(query, (items, scores))| {
        // A computed cosine may lie a rounding error below -1; it is clipped, not lost.
        let open = if band.min <= -1.0 { f32::MIN } else { band.min };
        let floor = if query_norms[query] > 0.0 { open } else { f32::INFINITY };
        let excluded = excluded.row(users[query] as usize)?;
        Ok(Nearest { best: Best::new(floor, items, scores), excluded, max: band.max, item_norms: &item_norms })
    });
    scan(&queries, &catalogue, &order, Best::bytes(k), states)
}

/// The `k` catalogue titles most like each title, by the Dice coefficient of their trigram sets,
/// from `min_similarity` up. Titles without a letter or digit match nothing.
pub fn match_titles(
    titles: &[String], catalogue: &[String], users: &[i32], excluded: CsrView, k: usize, min_similarity: f32,
    (items, scores): (&mut [i32], &mut [f32]),
) -> Result<()> {
    check_users(users, excluded.n_rows())?;
    let grams: Vec<Vec<[char; 3]>> = catalogue.par_iter().map(|title| trigrams(title)).collect();
    let mut postings: HashMap<[char; 3], Vec<i32>> = HashMap::new();
    for (item, grams) in grams.iter().enumerate() {
        grams.iter().for_each(|&gram| postings.entry(gram).or_default().push(item as i32));
    }
    let slots = items.par_chunks_mut(k.max(1)).zip(scores.par_chunks_mut(k.max(1)));
    threads::first_error(slots.enumerate().map_init(
        || vec![0u32; catalogue.len()],
        |common, (query, (items, scores))| {
            let own = trigrams(&titles[query]);
            let lists = || own.iter().filter_map(|gram| postings.get(gram)).flatten();
            lists().for_each(|&item| common[item as usize] += 1);
            let mut touched: Vec<i32> = lists().copied().collect();
            touched.sort_unstable();
            touched.dedup();
            let excluded = excluded.row(users[query] as usize)?;
            let mut best = Best::new(min_similarity, items, scores);
            for some in touched.chunks(64) {
                let threshold = best.threshold();
                let likeness = some.iter().map(|&item| {
                    let shared = std::mem::take(&mut common[item as usize]);
                    (item, (2 * shared) as f32 / (own.len() + grams[item as usize].len()) as f32)
                });
                let is_hit =
                    |(item, likeness): &(i32, f32)| *likeness >= threshold && excluded.binary_search(item).is_err();
                best.take(likeness.filter(is_hit));
            }
            best.finish();
            Ok(())
        },
    ))
}

/// The set of three-letter pieces of a title: lower case, runs of anything but letters and digits
/// read as one blank, one blank before and after. "AI" gives " ai" and "ai ".
fn trigrams(title: &str) -> Vec<[char; 3]> {
    let lower = title.to_lowercase();
    let words: Vec<&str> = lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    if words.is_empty() {
        return Vec::new();
    }
    let text: Vec<char> = format!(" {} ", words.join(" ")).chars().collect();
    let mut grams: Vec<[char; 3]> = text.windows(3).map(|w| [w[0], w[1], w[2]]).collect();
    grams.sort_unstable();
    grams.dedup();
    grams
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::scan::Values;

    const OPEN: Band = Band { min: -1.0, max: 1.0 };

    fn nearest(query: [f32; 2], excluded: &[i32], band: Band) -> Result<(Vec<i32>, Vec<f32>)> {
        let values = [1.0, 0.0, 0.0, 1.0, 3.0, 3.0, -1.0, 0.0, 30.0, 30.0];
        let indptr = [0, excluded.len() as i64];
        let csr = CsrView::new(&indptr, excluded, 5)?;
        let (mut items, mut scores) = (vec![0; 10], vec![0.0; 10]);
        let queries = Vectors::new(Values::F32(&query), 2, 1);
        let catalogue = Vectors::new(Values::F32(&values), 2, 5);
        match_items(queries, catalogue, &[0], csr, 10, band, (&mut items, &mut scores))?;
        items.retain(|&item| item >= 0);
        scores.truncate(items.len());
        Ok((items, scores))
    }

    #[test]
    fn cosine_and_not_inner_product_decides() {
        // Case D09.
        let (items, scores) = nearest([1.0, 0.1], &[], OPEN).unwrap();
        assert_eq!(items, [0, 2, 4, 1, 3]);
        for (found, expected) in scores.iter().zip([0.995037, 0.773957, 0.773957, 0.099504, -0.995037]) {
            assert!((found - expected).abs() < 1e-6);
        }
        assert_eq!(nearest([1.0, 0.1], &[0], OPEN).unwrap().0, [2, 4, 1, 3]);
        assert_eq!(nearest([2.0, 2.0], &[], OPEN).unwrap().0, [2, 4, 0, 1, 3]);
        assert_eq!(nearest([1.0, 0.1], &[0, 1, 2, 3, 4], OPEN).unwrap().0, []);
    }

    #[test]
    fn a_zero_query_matches_nothing_and_nan_is_refused() {
        assert_eq!(nearest([0.0, 0.0], &[], OPEN).unwrap().0, []);
        let found = nearest([f32::NAN, 1.0], &[], OPEN).unwrap_err();
        assert!(matches!(found, Error::NonFinite { name: "queries", row: 0, count: 1, .. }));
    }

    #[test]
    fn the_band_includes_its_ends() {
        assert_eq!(nearest([1.0, 0.0], &[], Band { min: 0.0, max: 0.8 }).unwrap().0, [2, 4, 1]);
        assert_eq!(nearest([1.0, 0.0], &[], Band { min: 1.0, max: 1.0 }).unwrap().0, [0]);
    }

    #[test]
    fn titles_match_whatever_their_case_and_punctuation() {
        let catalogue = ["Toy Story (1995)", "Toy Soldiers", "!!!", "Heat"].map(String::from);
        let titles = ["toy story, 1995", "zzz", ""].map(String::from);
        let csr = CsrView::new(&[0, 0], &[], 4).unwrap();
        let (mut items, mut scores) = ([0; 6], [0.0; 6]);
        match_titles(&titles, &catalogue, &[0, 0, 0], csr, 2, 0.2, (&mut items, &mut scores)).unwrap();
        assert_eq!(items, [0, 1, -1, -1, -1, -1]);
        // 15 trigrams of " toy story 1995 " are 14, of " toy soldiers " 12; common: " to" "toy"
        // "oy " "y s" " so"? no: " st" against " so", so four.
        assert_eq!(scores[..2], [1.0, 8.0 / 26.0]);
    }
}
