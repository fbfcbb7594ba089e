//! Thread pools, made once per size and kept: starting threads costs more than a small batch.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

/// Pools by process and size. A forked process (a loader worker) inherits the table but not the
/// threads, so it must not find its parent's pools.
static POOLS: Mutex<BTreeMap<(u32, usize), Arc<ThreadPool>>> = Mutex::new(BTreeMap::new());

/// Runs `job` on `n_threads` threads; 0 means one per core.
pub fn run(n_threads: usize, job: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    pool(n_threads)?.install(job)
}

fn pool(n_threads: usize) -> Result<Arc<ThreadPool>> {
    let refused = Error::Argument { name: "n_threads", found: n_threads.to_string(), expected: "0 to 1024" };
    if n_threads > 1024 {
        return Err(refused);
    }
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    match pools.entry((std::process::id(), n_threads)) {
        Entry::Occupied(known) => Ok(known.get().clone()),
        Entry::Vacant(free) => {
            let pool = ThreadPoolBuilder::new().num_threads(n_threads).build().map_err(|_| refused)?;
            Ok(free.insert(Arc::new(pool)).clone())
        }
    }
}

/// The first error in the order of the rows, whichever thread found one first.
pub fn first_error(results: impl IndexedParallelIterator<Item = Result<()>>) -> Result<()> {
    results.find_map_first(Result::err).map_or(Ok(()), Err)
}
