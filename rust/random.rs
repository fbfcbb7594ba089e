//! The counter-based generator: a random word is a pure function of seed, row and counter.
//!
//! SplitMix64 (Steele, Lea and Flood 2014) without its state: word `c` of row `r` is the
//! generator's output function at `mix(seed) + r * ROW + c * GOLDEN`. Nothing is carried from one
//! draw to the next, so draws of one row can be computed in any order, on any number of threads
//! and several at a time in one vector.

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
pub const MULTIPLIERS: [u64; 2] = [0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB];
/// Another odd constant keeps the rows' sequences apart.
const ROW: u64 = MULTIPLIERS[1];

#[inline(always)]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(MULTIPLIERS[0]);
    z = (z ^ (z >> 27)).wrapping_mul(MULTIPLIERS[1]);
    z ^ (z >> 31)
}

/// What the generator's counter gains by some rows and draws.
#[inline(always)]
pub fn distance(rows: u64, draws: u64) -> u64 {
    rows.wrapping_mul(ROW).wrapping_add(draws.wrapping_mul(GOLDEN))
}

/// The random words of one output row.
#[derive(Clone, Copy)]
pub struct Stream(u64);

impl Stream {
    #[inline(always)]
    pub fn new(seed: u64, row: u64) -> Self {
        Self(mix(seed.wrapping_add(GOLDEN)).wrapping_add(distance(row, 0)))
    }

    /// Word for try `attempt` of draw `draw`.
    #[inline(always)]
    pub fn word(self, draw: u64, attempt: u64) -> u64 {
        mix(self.counter(draw, attempt))
    }

    /// What [`Stream::word`] is made from.
    #[inline(always)]
    pub fn counter(self, draw: u64, attempt: u64) -> u64 {
        self.0.wrapping_add(distance(0, draw + 1 + (attempt << 32)))
    }
}

/// The upper half of `word` as an exactly uniform number below `bound` (Lemire 2019), or `None`
/// for the fewer than `bound / 2^32` words that would make small numbers likelier: try again.
#[inline(always)]
pub fn below(word: u64, bound: u32) -> Option<u32> {
    let product = (word >> 32) * bound as u64;
    let surplus = bound.wrapping_neg() % bound;
    (product as u32 >= surplus).then_some((product >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_function_is_splitmix64() {
        // First outputs of SplitMix64 from state 1234567, as its authors' C code prints them.
        let state = 1_234_567u64;
        assert_eq!(mix(state.wrapping_add(GOLDEN)), 6_457_827_717_110_365_317);
        assert_eq!(mix(state.wrapping_add(GOLDEN.wrapping_mul(2))), 3_203_168_211_198_807_973);
    }

    #[test]
    fn a_word_depends_on_seed_row_draw_and_attempt() {
        let words: std::collections::HashSet<u64> = (0..2)
            .flat_map(|seed| (0..20).map(move |row| Stream::new(seed, row)))
            .flat_map(|stream| (0..20).flat_map(move |draw| (0..3).map(move |attempt| stream.word(draw, attempt))))
            .collect();
        assert_eq!(words.len(), 2 * 20 * 20 * 3);
    }

    #[test]
    fn every_number_below_the_bound_is_equally_likely() {
        // 2^32 = 1 (mod 3): exactly one word is sent back, the rest split in three equal parts.
        assert_eq!(below(0, 3), None);
        assert_eq!(below(1 << 32, 3), Some(0));
        assert_eq!(below(u64::MAX, 3), Some(2));
        assert_eq!(below(12345, 1), Some(0));
    }
}
