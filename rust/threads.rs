//! Thread pools, made once per size and kept: starting threads costs more than a small batch.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

/// Pools by process and size. A forked process (a loader worker) inherits the table but not the
/// threads, so it must not find its parent's pools, nor wait for a thread that was just adding one:
/// who cannot have the table makes a pool for one call.
static POOLS: RwLock<BTreeMap<(u32, usize), Arc<ThreadPool>>> = RwLock::new(BTreeMap::new());

/// Runs `job` on `n_threads` threads; 0 means one per core.
pub fn run(n_threads: usize, job: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    pool(n_threads)?.install(job)
}

fn pool(n_threads: usize) -> Result<Arc<ThreadPool>> {
    let key = (std::process::id(), n_threads);
    if let Some(known) = POOLS.try_read().ok().and_then(|pools| pools.get(&key).cloned()) {
        return Ok(known);
    }
    let made = (n_threads <= 1024).then(|| ThreadPoolBuilder::new().num_threads(n_threads).build());
    let Some(Ok(pool)) = made else {
        return Err(Error::Argument { name: "n_threads", found: n_threads.to_string(), expected: "0 to 1024" });
    };
    let pool = Arc::new(pool);
    if let Ok(mut pools) = POOLS.try_write() {
        pools.insert(key, pool.clone());
    }
    Ok(pool)
}

/// The first error in the order of the rows, whichever thread found one first.
pub fn first_error(results: impl IndexedParallelIterator<Item = Result<()>>) -> Result<()> {
    results.find_map_first(Result::err).map_or(Ok(()), Err)
}
