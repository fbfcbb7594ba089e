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

use crate::error::{Error, Result};
use crate::simd::{self, Kernel};

/// Bytes of panels packed at a time, and of query states alive at a time: together with the
/// threads' buffers they keep every call below 64 MB, whatever the numbers of users and items.
const PANEL_BYTES: usize = 16 << 20;
const STATE_BYTES: usize = 24 << 20;
/// Bytes of panels that a thread goes over with all its queries before it takes the next.
const CACHE_BYTES: usize = 512 << 10;
/// Bytes of queries that one task packs.
const QUERY_BYTES: usize = 128 << 10;

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

    fn copy(&self, row: usize, out: &mut [f32]) {
        let span = row * self.dim..(row + 1) * self.dim;
        match self.values {
            Values::F32(values) => out.copy_from_slice(&values[span]),
            Values::F16(values) => values[span].convert_to_f32_slice(out),
        }
    }

    /// One vector as the kernels see it.
    pub fn read(&self, row: usize, out: &mut [f32]) {
        self.copy(row, out);
        if let Some(norms) = self.norms
            && norms[row] > 0.0
        {
            out.iter_mut().for_each(|value| *value = (*value as f64 / norms[row]) as f32);
        }
    }

    /// Euclidean lengths in `f64`; refuses NaN and infinities by row.
    pub fn lengths(&self, name: &'static str) -> Result<Vec<f64>> {
        let length = |buffer: &mut Vec<f32>, row| {
            self.copy(row, buffer);
            let square: f64 = buffer.iter().map(|&value| value as f64 * value as f64).sum();
            if square.is_finite() {
                return Ok(square.sqrt());
            }
            let count = buffer.iter().filter(|value| !value.is_finite()).count();
            Err(Error::NonFinite { name, unit: "row", row, count })
        };
        (0..self.len).into_par_iter().map_init(|| vec![0.0; self.dim], length).collect()
    }
}

/// What is kept of one query's scores.
pub trait State: Send {
    /// Scores below this are of no interest any more; infinity ends the scan of this query.
    fn threshold(&self) -> f32;
    /// Called once before the first score, with the query and the kernel in use.
    fn start(&mut self, query: &[f32], kernel: &Kernel);
    /// A score that reached the threshold. Items come in ascending order.
    fn offer(&mut self, item: i32, score: f32);
    /// Called once after the last score.
    fn finish(self);
}

/// Passes every query over every item. State `q` of the iterator belongs to query `q`, and takes
/// about `state_bytes` while it is alive.
pub fn scan<S: State>(
    queries: &Vectors,
    items: &Vectors,
    state_bytes: usize,
    states: impl Iterator<Item = Result<S>>,
) -> Result<()> {
    let kernel = simd::kernel();
    let batch = (STATE_BYTES / (state_bytes + size_of::<S>())).clamp(64, 1 << 14);
    let block = (PANEL_BYTES / (4 * items.dim.max(1) * kernel.cols)).max(1) * kernel.cols;
    let mut panels = Panels::default();
    let mut states = states.peekable();
    let mut first = 0;
    while states.peek().is_some() {
        let mut alive: Vec<S> = states.by_ref().take(batch).collect::<Result<_>>()?;
        for start in (0..items.len.max(1)).step_by(block) {
            panels.pack(kernel, items, start..items.len.min(start + block));
            let group = (QUERY_BYTES / (4 * items.dim.max(1))).clamp(1, 64).next_multiple_of(kernel.rows);
            alive.par_chunks_mut(group).enumerate().for_each(|(g, states)| {
                scan_group(kernel, queries, first + g * group, states, &panels);
            });
        }
        first += alive.len();
        alive.into_par_iter().for_each(S::finish);
    }
    Ok(())
}

/// A block of items, `kernel.cols` side by side: dimension after dimension, item after item.
#[derive(Default)]
struct Panels {
    values: Vec<f32>,
    items: std::ops::Range<usize>,
}

impl Panels {
    fn pack(&mut self, kernel: &Kernel, items: &Vectors, span: std::ops::Range<usize>) {
        if self.items == span && !self.values.is_empty() {
            return;
        }
        let (width, size) = (kernel.cols, kernel.cols * items.dim);
        self.values.resize(span.len().div_ceil(width) * size, 0.0);
        self.items = span.clone();
        self.values.par_chunks_mut(size.max(1)).enumerate().for_each_init(
            || vec![0.0; items.dim],
            |row, (p, panel)| {
                for c in 0..width {
                    let item = span.start + p * width + c;
                    if item < span.end {
                        items.read(item, row)
                    } else {
                        row.fill(0.0)
                    }
                    row.iter().enumerate().for_each(|(k, &value)| panel[k * width + c] = value);
                }
            },
        );
    }
}

fn scan_group<S: State>(kernel: &Kernel, queries: &Vectors, first: usize, states: &mut [S], panels: &Panels) {
    let (rows, cols, dim) = (kernel.rows, kernel.cols, queries.dim);
    let mut packed = vec![0.0; states.len().div_ceil(rows) * rows * dim];
    let mut row = vec![0.0; dim];
    for (q, state) in states.iter_mut().enumerate() {
        queries.read(first + q, &mut row);
        if panels.items.start == 0 {
            state.start(&row, kernel);
        }
        let tile = &mut packed[q / rows * rows * dim..];
        row.iter().enumerate().for_each(|(k, &value)| tile[k * rows + q % rows] = value);
    }
    let size = cols * dim;
    let per_cache = (CACHE_BYTES / (4 * size.max(1))).max(1);
    let (mut scores, mut hits, mut thresholds) = (vec![0.0; rows * cols], vec![0; rows], vec![f32::INFINITY; rows]);
    let n_panels = panels.items.len().div_ceil(cols);
    for block in (0..n_panels).step_by(per_cache) {
        for (tile, states) in states.chunks_mut(rows).enumerate() {
            thresholds.fill(f32::INFINITY);
            thresholds.iter_mut().zip(&*states).for_each(|(threshold, state)| *threshold = state.threshold());
            for p in block..n_panels.min(block + per_cache) {
                let queries = &packed[tile * rows * dim..(tile + 1) * rows * dim];
                kernel.tile(queries, &panels.values[p * size..(p + 1) * size], &thresholds, &mut scores, &mut hits);
                let start = panels.items.start + p * cols;
                let real = u64::MAX >> (64 - cols.min(panels.items.end - start));
                for (r, state) in states.iter_mut().enumerate() {
                    let mut bits = hits[r] & real;
                    while bits != 0 {
                        let c = bits.trailing_zeros() as usize;
                        state.offer((start + c) as i32, scores[r * cols + c]);
                        thresholds[r] = state.threshold();
                        bits &= bits - 1;
                    }
                }
            }
        }
    }
}
