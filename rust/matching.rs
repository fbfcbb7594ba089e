//! Generated negatives to catalogue items: by cosine of vectors, or by likeness of titles.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use rayon::prelude::*;

use crate::csr::{CsrView, refuse};
use crate::error::Result;
use crate::scan::Vectors;
use crate::threads;
use crate::topk::{Best, lists};

/// The `k` nearest items of every query, without those of the user it was made for. Cosines inside
/// `band` count. A zero vector has no direction: it matches nothing, and nothing matches it.
pub fn match_items(
    queries: Vectors, catalogue: Vectors, users: &[i32], excluded: CsrView, k: usize, band: RangeInclusive<f32>,
    out: (&mut [i32], &mut [f32]),
) -> Result<()> {
    refuse("users", users, 0, excluded.n_rows())?;
    let (query_norms, item_norms) = (queries.lengths("queries")?, catalogue.lengths("items")?);
    let queries = Vectors { norms: Some(&query_norms), ..queries };
    let catalogue = Vectors { norms: Some(&item_norms), ..catalogue };
    let (min, max) = band.into_inner();
    // A computed cosine may lie a rounding error below -1; it is clipped, not lost.
    let floor = if min <= -1.0 { f32::MIN } else { min };
    let of = |query: usize| (users[query] as usize, if query_norms[query] > 0.0 { floor } else { f32::INFINITY });
    let clipped = |item: i32, score: f32| {
        let cosine = score.clamp(-1.0, 1.0);
        (cosine <= max && item_norms[item as usize] > 0.0).then_some(cosine)
    };
    lists(&queries, &catalogue, excluded, k, of, clipped, out)
}

/// The `k` catalogue titles most like each title, by the Dice coefficient of their trigram sets,
/// from `min_similarity` up. Titles without a letter or digit match nothing.
pub fn match_titles(
    titles: &[String], catalogue: &[String], users: &[i32], excluded: CsrView, k: usize, min_similarity: f32,
    (items, scores): (&mut [i32], &mut [f32]),
) -> Result<()> {
    refuse("users", users, 0, excluded.n_rows())?;
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
            let excluded = excluded.row(users[query] as usize)?;
            let mut best = Best::new(min_similarity, k);
            for &item in lists() {
                let shared = std::mem::take(&mut common[item as usize]); // 0 when the item comes again
                if shared > 0 && excluded.binary_search(&item).is_err() {
                    best.offer(item, (2 * shared) as f32 / (own.len() + grams[item as usize].len()) as f32);
                }
            }
            best.finish(items, scores);
            Ok(())
        },
    ))
}

/// The set of three-letter pieces of a title: lower case, runs of anything but letters and digits
/// read as one blank, one blank before and after. "AI" gives " ai" and "ai ".
fn trigrams(title: &str) -> Vec<[char; 3]> {
    let lower = title.to_lowercase();
    let words: Vec<&str> = lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let text: Vec<char> = format!(" {} ", words.join(" ")).chars().collect();
    let mut grams: Vec<[char; 3]> = text.windows(3).map(|w| [w[0], w[1], w[2]]).collect();
    grams.sort_unstable();
    grams.dedup();
    grams
}
