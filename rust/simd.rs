//! The tile product: scores of a few queries against one panel of items, and which of them pass.

/// One way of computing a tile of `rows` queries by `cols` items.
pub struct Kernel {
    pub name: &'static str,
    pub rows: usize,
    pub cols: usize,
}

const PLAIN: Kernel = Kernel { name: "plain", rows: 4, cols: 16 };

/// The widest kernel of this processor.
pub fn kernel() -> &'static Kernel {
    &PLAIN
}

impl Kernel {
    /// `scores[r][c] = queries[.][r] . panel[.][c]`, one multiply-add per dimension in order, and
    /// bit `c` of `hits[r]` says whether it is at least `thresholds[r]`.
    pub fn tile(&self, queries: &[f32], panel: &[f32], thresholds: &[f32], scores: &mut [f32], hits: &mut [u64]) {
        scores.fill(0.0);
        for (queries, panel) in queries.chunks_exact(self.rows).zip(panel.chunks_exact(self.cols)) {
            for (query, scores) in queries.iter().zip(scores.chunks_exact_mut(self.cols)) {
                for (score, item) in scores.iter_mut().zip(panel) {
                    *score += query * item;
                }
            }
        }
        for (row, scores) in scores.chunks_exact(self.cols).enumerate() {
            let bits = scores.iter().enumerate().map(|(c, &score)| u64::from(score >= thresholds[row]) << c);
            hits[row] = bits.sum();
        }
    }

    /// One score as `tile` computes it.
    pub fn dot(&self, query: &[f32], item: &[f32]) -> f32 {
        query.iter().zip(item).fold(0.0, |sum, (q, i)| sum + q * i)
    }
}
