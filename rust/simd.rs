//! What is written for the processor's vectors: the tile product, scores of a few queries against
//! one panel of items and which of them pass, and the steps of drawing negatives.
//!
//! The only file with `unsafe`. Two reasons: vector instructions that the processor has to be
//! asked for first ([`kernel`] does), and pointers in the innermost loops, whose bounds are checked
//! once per tile or group.

use std::array::from_fn;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::candidates::{Batch, Marks, Scratch};
use crate::error::Result;
use crate::random::{self, Stream, below};

/// One vector register of `f32`, as the tile needs it.
///
/// # Safety
/// The processor has the instructions behind the implementation.
trait Lanes {
    type Vector: Copy;
    const N: usize = size_of::<Self::Vector>() / size_of::<f32>();
    unsafe fn splat(value: f32) -> Self::Vector;
    /// `a * b + c`, rounded once (only [`Plain`] rounds the product, too).
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// Bit `n` says whether lane `n` of `a` is at least that of `b`.
    unsafe fn at_least(a: Self::Vector, b: Self::Vector) -> u64;
}

/// Writes the operations of a type of vectors: splat, multiply_add and at_least.
macro_rules! lanes {
    ($name:ident, $vector:ty, |$value:ident| $splat:expr, |$a:ident, $b:ident, $c:ident| $multiply_add:expr,
     |$x:ident, $y:ident| $at_least:expr) => {
        struct $name;
        #[allow(unsafe_op_in_unsafe_fn)] // each is one operation
        impl Lanes for $name {
            type Vector = $vector;
            #[inline(always)]
            unsafe fn splat($value: f32) -> $vector {
                $splat
            }
            #[inline(always)]
            unsafe fn multiply_add($a: $vector, $b: $vector, $c: $vector) -> $vector {
                $multiply_add
            }
            #[inline(always)]
            unsafe fn at_least($x: $vector, $y: $vector) -> u64 {
                $at_least
            }
        }
    };
}

lanes! {
    Plain, [f32; 4], |v| [v; 4], |a, b, c| from_fn(|n| a[n] * b[n] + c[n]),
    |x, y| (0..4).map(|n| u64::from(x[n] >= y[n]) << n).sum()
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
#[cfg(target_arch = "x86_64")]
lanes! {
    Avx512, __m512, |v| _mm512_set1_ps(v), |a, b, c| _mm512_fmadd_ps(a, b, c),
    |x, y| u64::from(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, y))
}
#[cfg(target_arch = "x86_64")]
lanes! {
    Avx2, __m256, |v| _mm256_set1_ps(v), |a, b, c| _mm256_fmadd_ps(a, b, c),
    |x, y| _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(x, y)) as u64
}

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;
#[cfg(target_arch = "aarch64")]
lanes! {
    Neon, float32x4_t, |v| vdupq_n_f32(v), |a, b, c| vfmaq_f32(c, a, b),
    |x, y| u64::from(vaddvq_u32(vandq_u32(vcgeq_f32(x, y), vld1q_u32([1, 2, 4, 8].as_ptr()))))
}

/// Arguments of a tile: numbers per vector, queries, panel, thresholds, scores, hits.
type Tile = unsafe fn(usize, *const f32, *const f32, &[f32], &mut [f32], &mut [u64]) -> bool;

/// One way of computing a tile of `rows` queries by `cols` items, and of making random numbers.
pub struct Kernel {
    pub name: &'static str,
    pub rows: usize,
    pub cols: usize,
    tile: Tile,
    draw: unsafe fn(&Batch, usize, &mut [i32], &mut Scratch) -> Result<()>,
    dots: unsafe fn(&[f32], [&[f32]; DOTS]) -> [f32; DOTS],
    available: fn() -> bool,
}

/// `R` queries by `C` vectors of items: the sums stay in registers over all dimensions, so each
/// number loaded is used `R` or `C * N` times. With 32 registers 14 x 2 sums leave room for the
/// two vectors of items and the query that they are multiplied with.
#[inline(always)]
unsafe fn tile<L: Lanes, const R: usize, const C: usize>(
    dim: usize, queries: *const f32, panel: *const f32, thresholds: &[f32], scores: &mut [f32], hits: &mut [u64],
) -> bool {
    unsafe {
        let mut sums = [[L::splat(0.0); C]; R];
        for k in 0..dim {
            let items: [L::Vector; C] = from_fn(|c| panel.add((k * C + c) * L::N).cast::<L::Vector>().read_unaligned());
            for (r, sums) in sums.iter_mut().enumerate() {
                let query = L::splat(*queries.add(k * R + r));
                for c in 0..C {
                    sums[c] = L::multiply_add(query, items[c], sums[c]);
                }
            }
        }
        let mut any = 0;
        for (r, sums) in sums.iter().enumerate() {
            let threshold = L::splat(thresholds[r]);
            let bits = |c: usize| L::at_least(sums[c], threshold) << (c * L::N);
            hits[r] = (0..C).map(bits).sum();
            any |= hits[r];
            if hits[r] != 0 {
                for (c, &sum) in sums.iter().enumerate() {
                    scores[(r * C + c) * L::N..].as_mut_ptr().cast::<L::Vector>().write_unaligned(sum);
                }
            }
        }
        any != 0
    }
}

/// Products of a query with some items. Each is a chain of multiply-adds that wait for one another;
/// several chains side by side fill the time.
#[inline(always)]
fn dots(query: &[f32], items: [&[f32]; DOTS], step: impl Fn(f32, f32, f32) -> f32) -> [f32; DOTS] {
    let items = items.map(|item| &item[..query.len()]);
    let mut sums = [0.0; DOTS];
    for (k, &value) in query.iter().enumerate() {
        for (sum, item) in sums.iter_mut().zip(items) {
            *sum = step(value, item[k], *sum);
        }
    }
    sums
}

/// What drawing negatives is made of, each written so that the compiler makes vectors of it where it
/// can. (A value of a kernel's type exists only inside that kernel: the processor has its vectors.)
pub trait Steps {
    /// First tries of whole rows at once: `numbers[r * n + j]` becomes the number below `bound` of draw
    /// `j` of row `first_row + r`, or -1 for a surplus word; `coins`, unless empty, gets the words' lower
    /// halves.
    #[inline(always)]
    fn first_tries(&self, seed: u64, first_row: u64, n: usize, bound: u32, numbers: &mut [i32], coins: &mut [u32]) {
        let number = |row: usize, draw: usize| {
            let word = Stream::new(seed, first_row + row as u64).word(draw as u64, 0);
            (below(word, bound).map_or(-1, |number| number as i32), word as u32)
        };
        if n == 1 {
            // One long loop, for vectors are made of nothing shorter than themselves.
            return fill(numbers, coins, |row| number(row, 0));
        }
        for (row, numbers) in numbers.chunks_exact_mut(n).enumerate() {
            fill(numbers, coins.get_mut(row * n..(row + 1) * n).unwrap_or_default(), |draw| number(row, draw));
        }
    }

    /// Writes the places of draws that are negative or may be marked to the front of `bad`, which is
    /// 16 longer than `draws`, and counts them: no branch that nobody could foresee.
    #[inline(always)]
    fn bad_places(&self, draws: &[i32], marks: &Marks, bad: &mut [u32]) -> usize {
        let mut n_bad = 0;
        for (at, &item) in draws.iter().enumerate() {
            bad[n_bad] = at as u32;
            n_bad += usize::from((item < 0) | marks.may_have(item));
        }
        n_bad
    }

    /// Bit `at` says whether `items[at]` is less than the next.
    #[inline(always)]
    fn rising(&self, items: &[i32; 33]) -> u32 {
        (0..32).fold(0, |bits, at| bits | u32::from(items[at] < items[at + 1]) << at)
    }
}

/// Numbers, and coins if they are wanted: a loop without the question, which would undo its vectors.
#[inline(always)]
fn fill(numbers: &mut [i32], coins: &mut [u32], number: impl Fn(usize) -> (i32, u32)) {
    if coins.is_empty() {
        for (at, slot) in numbers.iter_mut().enumerate() {
            *slot = number(at).0;
        }
    }
    for (at, (slot, coin)) in numbers.iter_mut().zip(coins).enumerate() {
        (*slot, *coin) = number(at);
    }
}

impl Steps for Plain {}
#[cfg(target_arch = "x86_64")]
impl Steps for Avx2 {}
#[cfg(target_arch = "aarch64")]
impl Steps for Neon {}

/// Sixteen draws at a time: 1.2 ns a draw where the compiler's code takes 2.3 (16 for each of the pairs
/// of Amazon Toys), 1.4 with its first tries alone.
#[cfg(target_arch = "x86_64")]
impl Steps for Avx512 {
    /// Of 16 neighbouring draws one vector holds the words of the even, one those of the odd ones, so
    /// that two halves of words become one vector without a permutation. The counters of the next 16
    /// are those of the last plus a constant, and another where a draw belongs to a row further on.
    #[inline(always)]
    fn first_tries(&self, seed: u64, row: u64, n: usize, bound: u32, numbers: &mut [i32], coins: &mut [u32]) {
        assert!(coins.is_empty() || coins.len() == numbers.len());
        let n = n as u64;
        let slots: [[u64; 8]; 2] = from_fn(|odd| from_fn(|at| (2 * at + odd) as u64));
        let start = slots.map(|slots| slots.map(|slot| Stream::new(seed, row + slot / n).counter(slot % n, 0)));
        let in_row = slots.map(|slots| slots.map(|slot| slot % n));
        // SAFETY: the processor has AVX-512 (see above); loads are of 8 numbers in an array, stores
        // are masked by `lanes` to the numbers that are left.
        unsafe {
            let load = |lanes: [u64; 8]| _mm512_loadu_epi64(lanes.as_ptr().cast());
            let all = |value: u64| _mm512_set1_epi64(value as i64);
            let (mut counters, mut draws) = (start.map(load), in_row.map(load));
            let (step, next_row) = (all(random::distance(16 / n, 16 % n)), all(random::distance(1, n.wrapping_neg())));
            let (rest, n) = (16 % n, all(n));
            let (bound, surplus) = (all(bound as u64), _mm512_set1_epi32((bound.wrapping_neg() % bound) as i32));
            let [first, second] = random::MULTIPLIERS.map(all);
            for group in (0..numbers.len()).step_by(16) {
                let lanes = u16::MAX >> (16 - (numbers.len() - group).min(16));
                let [even, odd] = counters.map(|word| {
                    let word = _mm512_mullo_epi64(_mm512_xor_si512(word, _mm512_srli_epi64::<30>(word)), first);
                    let word = _mm512_mullo_epi64(_mm512_xor_si512(word, _mm512_srli_epi64::<27>(word)), second);
                    _mm512_xor_si512(word, _mm512_srli_epi64::<31>(word))
                });
                // The shuffles copy upper halves down (F5) and lower halves up (A0).
                let even_product = _mm512_mul_epu32(_mm512_srli_epi64::<32>(even), bound);
                let odd_product = _mm512_mul_epu32(_mm512_srli_epi64::<32>(odd), bound);
                let upper = _mm512_mask_shuffle_epi32::<0xF5>(odd_product, 0x5555, even_product);
                let lower = _mm512_mask_shuffle_epi32::<0xA0>(even_product, 0xAAAA, odd_product);
                let number = _mm512_mask_set1_epi32(upper, _mm512_cmplt_epu32_mask(lower, surplus), -1);
                _mm512_mask_storeu_epi32(numbers.as_mut_ptr().add(group), lanes, number);
                if !coins.is_empty() {
                    let coin = _mm512_mask_shuffle_epi32::<0xA0>(even, 0xAAAA, odd);
                    _mm512_mask_storeu_epi32(coins.as_mut_ptr().add(group).cast(), lanes, coin);
                }
                for (counter, draw) in counters.iter_mut().zip(&mut draws) {
                    *counter = _mm512_add_epi64(*counter, step);
                    if rest > 0 {
                        *draw = _mm512_add_epi64(*draw, all(rest));
                        let is_over = _mm512_cmpge_epu64_mask(*draw, n);
                        *draw = _mm512_mask_sub_epi64(*draw, is_over, *draw, n);
                        *counter = _mm512_mask_add_epi64(*counter, is_over, *counter, next_row);
                    }
                }
            }
        }
    }

    /// One gather fetches the stamps, and the places of the bad ones are compressed to the left.
    #[inline(always)]
    fn bad_places(&self, draws: &[i32], marks: &Marks, bad: &mut [u32]) -> usize {
        let mut n_bad = 0;
        // SAFETY: the processor has AVX-512 (see above); loads are masked to the draws that are left, a
        // place is less than `MARKS` and 4 bytes from there lie inside the stamps, and `to` has room.
        unsafe {
            let stamp = _mm512_set1_epi32(i32::from(marks.stamp));
            let mut places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            for group in (0..draws.len()).step_by(16) {
                let lanes = u16::MAX >> (16 - (draws.len() - group).min(16));
                let items = _mm512_maskz_loadu_epi32(lanes, draws.as_ptr().add(group));
                let at = _mm512_and_si512(items, _mm512_set1_epi32(crate::candidates::MARKS as i32 - 1));
                let found = _mm512_i32gather_epi32::<1>(at, marks.stamps.as_ptr().cast());
                let found = _mm512_and_si512(found, _mm512_set1_epi32(255));
                let hits = lanes & (_mm512_cmpeq_epi32_mask(found, stamp) | _mm512_movepi32_mask(items));
                let to = &mut bad[n_bad..n_bad + 16];
                _mm512_storeu_epi32(to.as_mut_ptr().cast(), _mm512_maskz_compress_epi32(hits, places));
                n_bad += hits.count_ones() as usize;
                places = _mm512_add_epi32(places, _mm512_set1_epi32(16));
            }
        }
        n_bad
    }

    #[inline(always)]
    fn rising(&self, items: &[i32; 33]) -> u32 {
        // SAFETY: the processor has AVX-512 (see above); 16 numbers from 0, 1, 16 and 17 on lie inside the 33.
        let less = |at| unsafe {
            let this = items.as_ptr().add(at);
            _mm512_cmplt_epi32_mask(_mm512_loadu_epi32(this), _mm512_loadu_epi32(this.add(1)))
        };
        u32::from(less(0)) | u32::from(less(16)) << 16
    }
}

/// A kernel, its `multiply_add` of single numbers and the features it is compiled with, for which the
/// processor has to be asked.
macro_rules! kernel {
    ($name:literal, $lanes:ident, $rows:literal x $vectors:literal, $step:expr $(, $feature:tt)*) => {{
        $(#[target_feature(enable = $feature)])*
        unsafe fn draw(batch: &Batch, first_row: usize, out: &mut [i32], scratch: &mut Scratch) -> Result<()> {
            batch.draw_rows(first_row, out, scratch, $lanes)
        }
        $(#[target_feature(enable = $feature)])*
        unsafe fn dots(query: &[f32], items: [&[f32]; DOTS]) -> [f32; DOTS] {
            self::dots(query, items, $step)
        }
        $(#[target_feature(enable = $feature)])*
        unsafe fn tile(d: usize, q: *const f32, p: *const f32, t: &[f32], s: &mut [f32], h: &mut [u64]) -> bool {
            unsafe { self::tile::<$lanes, $rows, $vectors>(d, q, p, t, s, h) }
        }
        let available = || true $(&& is_x86_feature_detected!($feature))*;
        Kernel { name: $name, rows: $rows, cols: $vectors * $lanes::N, tile, draw, dots, available }
    }};
}

/// Products that [`Kernel::dots`] makes at a time.
pub const DOTS: usize = 8;

/// Room for the tile of any kernel.
pub const MAX_ROWS: usize = 14;
pub const MAX_TILE: usize = 14 * 32;

/// All kernels of this kind of processor, widest first.
static KERNELS: &[Kernel] = &[
    #[cfg(target_arch = "x86_64")] // Skylake-X, Zen 4 and later
    kernel!("avx512", Avx512, 14 x 2, f32::mul_add, "avx512f", "avx512dq", "avx512bw", "avx512vl"),
    #[cfg(target_arch = "x86_64")]
    kernel!("avx2", Avx2, 6 x 2, f32::mul_add, "avx2", "fma"),
    #[cfg(target_arch = "aarch64")]
    kernel!("neon", Neon, 6 x 4, f32::mul_add),
    kernel!("plain", Plain, 4 x 2, |a, b, c| a * b + c),
];

/// The place of the kernel in use among [`available`]'s.
static IN_USE: AtomicUsize = AtomicUsize::new(0);

/// The kernels this processor can run, widest first.
pub fn available() -> impl Iterator<Item = &'static Kernel> {
    KERNELS.iter().filter(|kernel| (kernel.available)())
}

/// The widest kernel of this processor, or the one that was asked for.
pub fn kernel() -> &'static Kernel {
    available().nth(IN_USE.load(Ordering::Relaxed)).unwrap_or(&KERNELS[KERNELS.len() - 1])
}

/// Makes all later calls use one kernel; false if this processor cannot. For tests and benches.
pub fn choose(name: &str) -> bool {
    let found = available().position(|kernel| kernel.name == name);
    found.inspect(|&at| IN_USE.store(at, Ordering::Relaxed)).is_some()
}

/// Starts to bring `slice[at]` into the cache; nothing happens beyond its end.
#[inline(always)]
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
pub fn prefetch<T>(slice: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(value) = slice.get(at) {
        // SAFETY: every x86-64 processor has the instruction, and the address is a reference.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) }
    }
}

impl Kernel {
    /// `scores[r][c] = queries[.][r] . panel[.][c]`, one multiply-add per dimension in order, and
    /// bit `c` of `hits[r]` says whether it is at least `thresholds[r]`; scores of a row without
    /// hits are not written. Whether anything was hit.
    #[inline]
    pub fn tile(
        &self, dim: usize, queries: &[f32], panel: &[f32], thresholds: &[f32], scores: &mut [f32], hits: &mut [u64],
    ) -> bool {
        assert!(queries.len() == dim * self.rows && panel.len() == dim * self.cols);
        assert!(thresholds.len() == self.rows && hits.len() == self.rows && scores.len() == self.rows * self.cols);
        // SAFETY: only kernels that the processor has are ever handed out, and the tile reads
        // `dim` times `rows` queries and `dim` times `cols` items and writes `rows` times `cols` scores,
        // which the assertions grant.
        unsafe { (self.tile)(dim, queries.as_ptr(), panel.as_ptr(), thresholds, scores, hits) }
    }

    /// [`Batch::draw_rows`] in this kernel's vectors.
    pub fn draw(&self, batch: &Batch, first_row: usize, out: &mut [i32], scratch: &mut Scratch) -> Result<()> {
        // SAFETY: only kernels that the processor has are ever handed out.
        unsafe { (self.draw)(batch, first_row, out, scratch) }
    }

    /// Scores as `tile` computes them.
    pub fn dots(&self, query: &[f32], items: [&[f32]; DOTS]) -> [f32; DOTS] {
        // SAFETY: only kernels that the processor has are ever handed out.
        unsafe { (self.dots)(query, items) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidates::Law;
    use crate::csr::{CsrView, OWNED};

    /// Numbers between -1 and 1 with many digits.
    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        (0..n as u64).map(|at| (Stream::new(seed, 0).word(at, 0) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    #[test]
    fn every_score_of_a_tile_is_its_dot_product_and_hits_are_those_at_least_the_threshold() {
        for kernel in available() {
            for dim in [0, 1, 5, 33] {
                let (rows, cols) = (kernel.rows, kernel.cols);
                assert!(rows <= MAX_ROWS && rows * cols <= MAX_TILE && cols <= 64);
                let (queries, panel) = (numbers(rows * dim, 1), numbers(cols * dim, 2));
                let (mut scores, mut hits) = (vec![f32::NAN; rows * cols], vec![0; rows]);
                kernel.tile(dim, &queries, &panel, &vec![f32::MIN; rows], &mut scores, &mut hits);
                // Each row's threshold is one of its scores: a tie with the threshold is a hit.
                let thresholds: Vec<f32> = (0..rows).map(|r| scores[r * cols + r % cols]).collect();
                kernel.tile(dim, &queries, &panel, &thresholds, &mut scores, &mut hits);
                for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                    let column =
                        |from: &[f32], at: usize, width| (0..dim).map(|k| from[k * width + at]).collect::<Vec<_>>();
                    let expected = kernel.dots(&column(&queries, r, rows), [&column(&panel, c, cols); DOTS])[0];
                    assert_eq!(hits[r] >> c & 1 == 1, expected >= thresholds[r], "{} {dim}", kernel.name);
                    assert_eq!(scores[r * cols + c], expected, "{} {dim}", kernel.name);
                }
            }
        }
    }

    #[test]
    fn every_draw_is_the_first_word_of_its_stream_that_is_no_surplus_and_not_owned() {
        // Nearly a third of the words are surplus for 1.5 billion items. Rows of 0, 3 and 40 items, and
        // enough after them that the first two are compared in one window.
        let items: Vec<i32> = [2, 3, 5].into_iter().chain(0..40).chain(0..60).collect();
        for (kernel, n) in available().flat_map(|kernel| [1, 2, 16, 17, 5000].map(|n| (kernel, n))) {
            for (n_items, users) in [(1_500_000_000, [0; 5]), (300, [0, 1, 1, 2, 1])] {
                let csr = CsrView::new(OWNED, &[0, 0, 3, 43, 103], &items, n_items).unwrap();
                let mut found = vec![0; 5 * n];
                let batch = Batch { law: Law::uniform(n_items), csr, users: &users, n_negatives: n, seed: 7 };
                batch.draw(kernel, &mut found).unwrap();
                for at in 0..5 * n {
                    let owned = csr.row(users[at / n] as usize).unwrap();
                    let mut words = (0..).map(|attempt| Stream::new(7, (at / n) as u64).word((at % n) as u64, attempt));
                    let free = |word| below(word, n_items as u32).filter(|&item| !owned.contains(&(item as i32)));
                    assert_eq!(found[at], words.find_map(free).unwrap() as i32, "{} {n} {at}", kernel.name);
                }
            }
        }
    }

    #[test]
    fn the_kernel_can_be_chosen_and_prefetching_knows_the_end() {
        assert!(!choose("abacus") && available().any(|kernel| kernel.name == "plain"));
        prefetch(&[1, 2, 3], 3);
    }
}
