//! One pass of many queries over all items, the product fused with whatever is kept of it.
//!
//! The loop nest is that of a blocked matrix product (Goto and van de Geijn 2008): items are
//! copied once into panels that the kernel reads front to back, a block of panels stays in the
//! second-level cache while a group of queries passes over it, and one tile of scores lives in
//! registers. The difference is the end of it: the kernel compares the tile with each query's
//! threshold (its current K-th score, say) and only scores that reach it leave the tile. After a
//! few hundred items that is almost none, so selection costs next to nothing.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::csr::CsrView;
use crate::error::{Error, Result};
use crate::simd::{self, Kernel};

/// Bytes of panels packed at a time, and of query states alive at a time: together with the
/// threads' buffers they keep every call below 64 MB, whatever the numbers of users and items.
const PANEL_BYTES: usize = 16 << 20;
const STATE_BYTES: usize = 24 << 20;
/// Items of a block at most: the bits of a [`Row`] stay below 8 KB.
const BLOCK_ITEMS: usize = 1 << 16;
/// Bytes of panels that a thread goes over with all its queries before it takes the next.
const CACHE_BYTES: usize = 512 << 10;
/// Bytes of queries that one task packs.
const QUERY_BYTES: usize = 512 << 10;

/// Row-major vectors in either precision.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
}

/// `len` vectors of `dim` numbers; with `norms`, each is divided by its own on reading.
#[derive(Clone, Copy)]
pub struct Vectors<'a> {
    pub values: Values<'a>,
    pub dim: usize,
    pub len: usize,
    pub norms: Option<&'a [f64]>,
}

impl<'a> Vectors<'a> {
    pub fn new(values: Values<'a>, dim: usize, len: usize) -> Self {
        Self { values, dim, len, norms: None }
    }

    /// One vector as the kernels see it: where it lies, if it can be taken as it is, or in `buffer`.
    pub fn read<'b>(&'b self, row: usize, buffer: &'b mut [f32]) -> &'b [f32] {
        let span = row * self.dim..(row + 1) * self.dim;
        match (self.values, self.norms) {
            (Values::F32(values), None) => return &values[span],
            (Values::F32(values), _) => buffer.copy_from_slice(&values[span]),
            (Values::F16(values), _) => values[span].convert_to_f32_slice(buffer),
        }
        if let Some(norms) = self.norms
            && norms[row] > 0.0
        {
            buffer.iter_mut().for_each(|value| *value = (*value as f64 / norms[row]) as f32);
        }
        buffer
    }

    /// Euclidean lengths in `f64`; refuses NaN and infinities by row.
    pub fn lengths(&self, name: &'static str) -> Result<Vec<f64>> {
        let length = |buffer: &mut Vec<f32>, row| {
            buffer.resize(self.dim, 0.0); // here, for without a row it may be longer than any memory
            self.read(row, buffer).iter().map(|&value| value as f64 * value as f64).sum::<f64>().sqrt()
        };
        let lengths: Vec<f64> = (0..self.len).into_par_iter().map_init(Vec::new, length).collect();
        let Some(row) = lengths.iter().position(|length| !length.is_finite()) else {
            return Ok(lengths);
        };
        let mut bad = vec![0.0; self.dim];
        let count = self.read(row, &mut bad).iter().filter(|value| !value.is_finite()).count();
        Err(Error::NonFinite { name, unit: "row", row, count })
    }
}

/// The order of a scan: items by how often users have them, the most popular first, and the place
/// of every item in it. Models like popular items, so thresholds rise early, held-out items that
/// will be beaten K times are beaten early, and the rest of the scan is the bare product.
fn by_popularity(users: CsrView) -> (Vec<i32>, Vec<i32>) {
    let mut count = vec![0u32; users.n_cols];
    for &item in users.indices {
        if let Some(n) = count.get_mut(item as usize) {
            *n += 1;
        }
    }
    let mut order: Vec<i32> = (0..users.n_cols as i32).collect();
    order.sort_by_key(|&item| std::cmp::Reverse(count[item as usize]));
    let mut places = vec![0; order.len()];
    order.iter().zip(0..).for_each(|(&item, place)| places[item as usize] = place);
    (order, places)
}

/// What is kept of one query's scores.
pub trait State: Send {
    /// Scores below this are of no interest any more; infinity ends the scan of this query.
    fn threshold(&self) -> f32;
    /// Items that are never offered.
    fn skipped(&self) -> impl Iterator<Item = &i32>;
    /// Called once before the first score, with the query and the kernel in use.
    fn start(&mut self, _query: &[f32], _kernel: &Kernel) {}
    /// Called with every score that reached the threshold.
    fn offer(&mut self, item: i32, score: f32);
    /// Called once after the last score.
    fn finish(self);
}

/// Passes every query over every item, those that many of `users` have first. State `q` of the
/// iterator belongs to query `q`, and takes about `state_bytes` while it is alive.
pub fn scan<S: State>(
    queries: &Vectors, items: &Vectors, users: CsrView, state_bytes: usize, states: impl Iterator<Item = Result<S>>,
) -> Result<()> {
    let (order, places) = by_popularity(users);
    let kernel = simd::kernel();
    let batch = (STATE_BYTES / (state_bytes + size_of::<S>())).clamp(64, 1 << 14);
    let block = (PANEL_BYTES / (4 * items.dim * kernel.cols).max(1)).clamp(1, BLOCK_ITEMS / kernel.cols) * kernel.cols;
    let group = (QUERY_BYTES / (4 * items.dim).max(1)).clamp(1, 128).next_multiple_of(kernel.rows);
    let mut panels = Panels { kernel, dim: items.dim, values: Vec::new(), first: 0, items: &[] };
    let mut states = states.peekable();
    let mut first = 0;
    while states.peek().is_some() {
        let mut alive: Vec<S> = states.by_ref().take(batch).collect::<Result<_>>()?;
        for (b, part) in order.chunks(block).enumerate() {
            if first == 0 || order.len() > block {
                panels.pack(items, b * block, part);
            }
            alive.par_chunks_mut(group).enumerate().for_each_init(Vec::new, |skipped, (g, states)| {
                scan_group(&panels, &places, queries, first + g * group, states, skipped);
            });
        }
        first += alive.len();
        alive.into_par_iter().for_each(S::finish);
    }
    Ok(())
}

/// A block of items, `kernel.cols` side by side: dimension after dimension, item after item. `first`
/// is the place of `items[0]` in the order of the scan.
struct Panels<'a> {
    kernel: &'static Kernel,
    dim: usize,
    values: Vec<f32>,
    first: usize,
    items: &'a [i32],
}

impl<'a> Panels<'a> {
    fn pack(&mut self, items: &Vectors, first: usize, part: &'a [i32]) {
        let (width, size) = (self.kernel.cols, self.kernel.cols * self.dim);
        (self.first, self.items) = (first, part);
        self.values.resize(part.len().div_ceil(width) * size, 0.0);
        self.values.par_chunks_mut(size.max(1)).zip(part.par_chunks(width)).for_each_init(
            || vec![0.0; items.dim],
            |row, (panel, part)| {
                panel[..].fill(0.0);
                for (c, &item) in part.iter().enumerate() {
                    let row = items.read(item as usize, row);
                    row.iter().zip(panel[c..].iter_mut().step_by(width)).for_each(|(&value, slot)| *slot = value);
                }
            },
        );
    }
}

/// A query, what is kept of its scores, and the items of the block that it skips, as bits in the
/// order of the scan: leaving them out of the hits of a tile is one instruction, however many.
struct Row<'a, S> {
    query: &'a [f32],
    state: &'a mut S,
    skipped: &'a [u64],
}

/// One group of queries against one block of panels. Queries that are done (see
/// [`State::threshold`]) leave between two parts of the block, and the others close the ranks; the
/// parts start small, since many leave early, and grow to what the cache holds.
fn scan_group<S: State>(
    panels: &Panels, places: &[i32], queries: &Vectors, first: usize, states: &mut [S], skipped: &mut Vec<u64>,
) {
    let (kernel, dim) = (panels.kernel, panels.dim);
    let n_words = panels.items.len().div_ceil(64);
    let mut vectors = vec![0.0; states.len() * dim];
    skipped.clear();
    skipped.resize(states.len() * n_words, 0);
    let mut active = Vec::with_capacity(states.len());
    let mut vectors = vectors.chunks_mut(dim.max(1));
    for ((q, state), skipped) in states.iter_mut().enumerate().zip(skipped.chunks_mut(n_words.max(1))) {
        let query = queries.read(first + q, vectors.next().unwrap_or_default());
        if panels.first == 0 {
            state.start(query, kernel);
        }
        for &item in state.skipped() {
            let place = (places[item as usize] as usize).wrapping_sub(panels.first);
            if let Some(word) = skipped.get_mut(place / 64) {
                *word |= 1 << (place % 64);
            }
        }
        active.push(Row { query, state, skipped });
    }
    let n_panels = panels.items.len().div_ceil(kernel.cols);
    let most = (CACHE_BYTES / (4 * kernel.cols * dim).max(1)).max(1);
    let (mut start, mut length) = (0, if panels.first == 0 { 4 } else { most });
    let mut tiles = Vec::new();
    while start < n_panels && !active.is_empty() {
        if tiles.is_empty() {
            tiles = active.chunks(kernel.rows).map(|rows| pack_queries(kernel, dim, rows)).collect();
        }
        let end = n_panels.min(start + length.min(most));
        for (rows, packed) in active.chunks_mut(kernel.rows).zip(&tiles) {
            pass(panels, start..end, packed, rows);
        }
        let n_before = active.len();
        active.retain(|row| row.state.threshold() < f32::INFINITY);
        if active.len() < n_before {
            tiles.clear();
        }
        (start, length) = (end, 2 * length);
    }
}

/// Up to `kernel.rows` queries side by side, dimension after dimension.
fn pack_queries<S>(kernel: &Kernel, dim: usize, rows: &[Row<S>]) -> Vec<f32> {
    let mut packed = vec![0.0; kernel.rows * dim];
    for (r, row) in rows.iter().enumerate() {
        let column = packed.iter_mut().skip(r).step_by(kernel.rows);
        row.query.iter().zip(column).for_each(|(&value, slot)| *slot = value);
    }
    packed
}

/// One tile of queries against some panels.
fn pass<S: State>(panels: &Panels, span: std::ops::Range<usize>, packed: &[f32], rows: &mut [Row<S>]) {
    let (kernel, cols, size) = (panels.kernel, panels.kernel.cols, panels.kernel.cols * panels.dim);
    let (mut scores, mut hits) = ([0.0; simd::MAX_TILE], [0; simd::MAX_ROWS]);
    let (scores, hits) = (&mut scores[..kernel.rows * cols], &mut hits[..kernel.rows]);
    let mut thresholds = [f32::INFINITY; simd::MAX_ROWS];
    thresholds.iter_mut().zip(&*rows).for_each(|(threshold, row)| *threshold = row.state.threshold());
    for p in span {
        let panel = &panels.values[p * size..(p + 1) * size];
        if !kernel.tile(panels.dim, packed, panel, &thresholds[..kernel.rows], scores, hits) {
            continue;
        }
        let items = &panels.items[p * cols..panels.items.len().min((p + 1) * cols)];
        for (r, row) in rows.iter_mut().enumerate() {
            let mut bits =
                hits[r] & (u64::MAX >> (64 - items.len())) & !(row.skipped[p * cols / 64] >> (p * cols % 64));
            while bits != 0 {
                let at = bits.trailing_zeros() as usize;
                bits &= bits - 1;
                row.state.offer(items[at], scores[r * cols + at]);
                thresholds[r] = row.state.threshold();
            }
        }
    }
}
