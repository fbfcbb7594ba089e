//! The Python module `hnlm_ref._core`: checks arguments, releases the interpreter lock, calls the
//! pure functions. The only file that knows Python or NumPy.

#![allow(clippy::too_many_arguments)] // a Python function names what it takes

use half::f16;
use numpy::ndarray::{Dimension, Ix1, Ix2};
use numpy::{
    Element, IntoPyArray, PyArray, PyArray1, PyArray2, PyArray3, PyArrayMethods, PyReadonlyArray, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyIndexError, PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::candidates::{Batch, Law};
use crate::csr::{CsrView, HELD_OUT, Names, OWNED};
use crate::error::{Error, Result, expect};
use crate::scan::{Values, Vectors};
use crate::{candidates, matching, metrics, simd, threads, topk};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            Error::Index { .. } => PyIndexError::new_err(error.to_string()),
            Error::Memory { .. } => PyMemoryError::new_err(error.to_string()),
            _ => PyValueError::new_err(error.to_string()),
        }
    }
}

/// An array argument of exactly this dtype and number of dimensions, in C order: nothing is
/// converted or copied in silence. (`as_slice` alone would also accept column-major arrays.)
/// Whatever comes is taken, and refused when it is read, where its name is known: PyO3 would put
/// the name into a note beside the message.
struct Input<'py, T: Element, D: Dimension>(std::result::Result<PyReadonlyArray<'py, T, D>, String>);

impl<'a, 'py, T: Element, D: Dimension> FromPyObject<'a, 'py> for Input<'py, T, D> {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let (n, dtype) = (D::NDIM.unwrap_or(0), numpy::dtype::<T>(object.py()));
        Ok(Self(match object.cast::<PyArray<T, D>>() {
            Ok(array) if array.is_c_contiguous() && array.is_aligned() => {
                array.try_readonly().map_err(|error| error.to_string())
            }
            _ => Err(format!("expected a C-contiguous {n}-dimensional {dtype} array, found {}", describe(&object))),
        }))
    }
}

impl<T: Element, D: Dimension> Input<'_, T, D> {
    /// The numbers and the shape.
    fn read(&self, name: &str) -> PyResult<(&[T], &[usize])> {
        let array = self.0.as_ref().map_err(|wrong| refused(name, wrong))?;
        Ok((array.as_slice()?, array.shape()))
    }

    fn slice(&self, name: &str) -> PyResult<&[T]> {
        Ok(self.read(name)?.0)
    }
}

type Ints<'py> = Input<'py, i32, Ix1>;
type Longs<'py> = Input<'py, i64, Ix1>;
type Table<'py> = Input<'py, f32, Ix2>;

impl Table<'_> {
    fn vectors(&self, name: &str) -> PyResult<Vectors<'_>> {
        let (values, shape) = self.read(name)?;
        Ok(Vectors::new(Values::F32(values), shape[1], shape[0]))
    }
}

/// The matrix of two arguments.
fn csr<'a>(names: Names, indptr: &'a Longs, indices: &'a Ints, n_items: usize) -> PyResult<CsrView<'a>> {
    Ok(CsrView::new(names, indptr.slice(names.0)?, indices.slice(names.1)?, n_items)?)
}

/// Vectors in either precision; at most one of the two could be taken.
struct Floats<'py>(Table<'py>, Input<'py, f16, Ix2>);

impl<'a, 'py> FromPyObject<'a, 'py> for Floats<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self(object.extract()?, object.extract()?))
    }
}

impl Floats<'_> {
    fn vectors(&self, name: &str) -> PyResult<Vectors<'_>> {
        match (&self.0.0, self.1.read(name)) {
            (_, Ok((values, shape))) => Ok(Vectors::new(Values::F16(values), shape[1], shape[0])),
            (Err(wrong), _) => Err(refused(name, &wrong.replacen("float32", "float32 or float16", 1))),
            _ => self.0.vectors(name),
        }
    }
}

/// The TypeError of a wrong argument.
fn refused(name: &str, wrong: &str) -> PyErr {
    PyTypeError::new_err(format!("argument '{name}': {wrong}"))
}

/// What was passed instead of the expected array.
fn describe(object: &Bound<'_, PyAny>) -> String {
    match object.cast::<PyUntypedArray>() {
        Err(_) => object.get_type().to_string(),
        Ok(array) => {
            let start = if array.is_aligned() { "" } else { "misaligned, " };
            let order = if array.is_c_contiguous() { "C-contiguous" } else { "not C-contiguous" };
            format!("{start}{order}, {}-dimensional, {}", array.ndim(), array.dtype())
        }
    }
}

/// Numbers and texts, by `from_py_with` under the name of their argument for the same reason.
mod named {
    use super::*;

    macro_rules! arguments {
        ($check:ident: $($name:ident -> $type:ty),*) => { $(
            pub fn $name(object: &Bound<'_, PyAny>) -> PyResult<$type> {
                $check(stringify!($name), object)
            }
        )* };
    }
    arguments!(whole: n_items -> usize, n_negatives -> usize, seed -> u64, k -> usize, n_threads -> usize);
    arguments!(number: min_similarity -> f32, max_similarity -> f32);
    arguments!(text: titles -> Vec<String>, catalogue -> Vec<String>, name -> String);

    fn whole<T: TryFrom<i128>>(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<T> {
        let value = object.extract::<i128>();
        if value.as_ref().is_err_and(|error| error.is_instance_of::<PyTypeError>(object.py())) {
            return Err(refused(name, &format!("expected a whole number, found {}", describe(object))));
        }
        let expected = "a whole number from 0 up, of at most 64 bits";
        let wrong = Error::Argument { name, found: object.to_string(), expected };
        Ok(value.ok().and_then(|value| T::try_from(value).ok()).ok_or(wrong)?)
    }

    fn number(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<f32> {
        let wrong = |_| refused(name, &format!("expected a number, found {}", describe(object)));
        let value: f32 = object.extract().map_err(wrong)?;
        if value.is_nan() {
            return Err(Error::Argument { name, found: "NaN".into(), expected: "a number" }.into());
        }
        Ok(value)
    }

    fn text<'py, T: FromPyObjectOwned<'py>>(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<T> {
        let wrong =
            |error: T::Error| refused(name, &format!("expected text, found {}: {}", describe(object), error.into()));
        object.extract().map_err(wrong)
    }
}

type Filtered<'py> = (Bound<'py, PyArray2<i32>>, Bound<'py, PyArray1<i32>>);
type Lists<'py> = (Bound<'py, PyArray2<i32>>, Bound<'py, PyArray2<f32>>);

/// Runs `fill` without the interpreter lock on fresh `[rows, k]` arrays of items and scores.
fn lists<'py>(
    py: Python<'py>, (rows, k): (usize, usize), n_threads: usize,
    fill: impl FnOnce((&mut [i32], &mut [f32])) -> Result<()> + Send,
) -> PyResult<Lists<'py>> {
    let size = checked_size(rows, k, size_of::<(i32, f32)>())?;
    let (items, scores) = py.detach(|| {
        let (mut items, mut scores) = (vec![-1; size], vec![f32::NEG_INFINITY; size]);
        threads::run(n_threads, || fill((&mut items, &mut scores)))?;
        Ok::<_, Error>((items, scores))
    })?;
    Ok((items.into_pyarray(py).reshape([rows, k])?, scores.into_pyarray(py).reshape([rows, k])?))
}

/// `rows * k`, if `bytes` for each of so many can be had now: the allocation itself would end the process.
/// NumPy has no array whose row is longer than an address space, even if it has no rows.
fn checked_size(rows: usize, k: usize, bytes: usize) -> Result<usize> {
    let fits = rows.max(1).checked_mul(k).is_some_and(|size| size <= isize::MAX as usize / bytes);
    let can_be_had = fits && Vec::<u8>::new().try_reserve_exact(rows * k * bytes).is_ok();
    can_be_had.then(|| rows * k).ok_or(Error::Memory { rows, columns: k })
}

/// Draw negatives uniformly, with replacement, from the items a user does not own.
///
/// Exact: every free item is equally likely, and no try is ever given up. Draws depend on the seed
/// and on the row r alone, so they are the same for any number of threads (cases B01-B03, B13).
///
/// Parameters
///     indptr       int64 [U+1], indices  int32 [nnz]: the users' own items, ascending and unique in a row
///     n_items      size of the catalogue, above every item in `indices`
///     users        int32 [B], one user per output row; equal neighbours are served together
///     n_negatives  draws per row, 0 or more
///     seed         0 to 2^64 - 1
///     n_threads    0 means one per core
///     out          int32 [B, n_negatives], filled and returned instead of a new array
/// Returns
///     int32 [B, n_negatives]
/// Raises
///     TypeError for a wrong dtype, rank or order; ValueError for wrong lengths, rows out of order and a user
///     who owns every item; IndexError for a user or item out of range (`out` is then undefined); MemoryError
///     for a result that does not fit, here and in every function that makes lists or metrics
#[pyfunction]
#[pyo3(signature = (indptr, indices, n_items, users, n_negatives, seed, n_threads=0, out=None))]
fn sample_uniform<'py>(
    py: Python<'py>, indptr: Longs<'py>, indices: Ints<'py>, #[pyo3(from_py_with = named::n_items)] n_items: usize,
    users: Ints<'py>, #[pyo3(from_py_with = named::n_negatives)] n_negatives: usize,
    #[pyo3(from_py_with = named::seed)] seed: u64, #[pyo3(from_py_with = named::n_threads)] n_threads: usize,
    out: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyArray2<i32>>> {
    let csr = csr(OWNED, &indptr, &indices, n_items)?;
    draw(py, csr, users.slice("users")?, n_negatives, seed, n_threads, out, || Ok(Law::uniform(n_items)))
}

/// Draw negatives by popularity, with replacement, from the items a user does not own.
///
/// A free item's probability is its weight over the weights of all free items of the user; pass
/// `degree ** beta` for popularity sampling with exponent beta (case B06). Items of weight 0 are never drawn.
///
/// Parameters
///     weights      float64 [n_items], finite and not negative
///     others       as in `sample_uniform`
/// Returns
///     int32 [B, n_negatives]
/// Raises
///     as `sample_uniform`; also ValueError for a bad weight and a user without a free item of positive weight
#[pyfunction]
#[pyo3(signature = (indptr, indices, weights, users, n_negatives, seed, n_threads=0, out=None))]
fn sample_popularity<'py>(
    py: Python<'py>, indptr: Longs<'py>, indices: Ints<'py>, weights: Input<'py, f64, Ix1>, users: Ints<'py>,
    #[pyo3(from_py_with = named::n_negatives)] n_negatives: usize, #[pyo3(from_py_with = named::seed)] seed: u64,
    #[pyo3(from_py_with = named::n_threads)] n_threads: usize, out: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyArray2<i32>>> {
    let weights = weights.slice("weights")?;
    let csr = csr(OWNED, &indptr, &indices, weights.len())?;
    draw(py, csr, users.slice("users")?, n_negatives, seed, n_threads, out, || Law::popularity(weights))
}

/// Draws without the interpreter lock, into `out` or into a fresh array.
fn draw<'py, 'a>(
    py: Python<'py>, csr: CsrView<'a>, users: &'a [i32], n_negatives: usize, seed: u64, n_threads: usize,
    out: Option<Bound<'py, PyAny>>, law: impl FnOnce() -> Result<Law<'a>> + Send,
) -> PyResult<Bound<'py, PyArray2<i32>>> {
    let batch = || Ok(Batch { law: law()?, csr, users, n_negatives, seed });
    let fill = |out: &mut [i32]| py.detach(|| threads::run(n_threads, || batch()?.draw(simd::kernel(), out)));
    let (rows, n) = (users.len(), n_negatives);
    let Some(out) = out else {
        let mut fresh = vec![0; checked_size(rows, n, size_of::<i32>())?];
        fill(&mut fresh)?;
        return fresh.into_pyarray(py).reshape([rows, n]);
    };
    let expected = "expected a writable C-contiguous 2-dimensional int32 array that no other argument shares";
    let wrong = || refused("out", &format!("{expected}, found {}", describe(&out)));
    let target = out.cast::<PyArray2<i32>>().ok().filter(|array| array.is_c_contiguous() && array.is_aligned());
    let mut target = target.and_then(|array| array.try_readwrite().ok()).ok_or_else(wrong)?;
    if target.shape() != [rows, n] {
        return Err(PyValueError::new_err(format!("out has shape {:?}, expected [{rows}, {n}]", target.shape())));
    }
    let slice = target.as_slice_mut()?;
    fill(slice)?;
    drop(target);
    Ok(out.cast_into()?)
}

/// Drop the users' own items, and -1, from given candidate lists.
///
/// Parameters
///     indptr      int64 [U+1], indices  int32 [nnz]: the users' own items, ascending and unique in a row
///     users       int32 [B]
///     candidates  int32 [B, C], -1 where there is none
/// Returns
///     int32 [B, C]  what is left of each row, in its order, packed to the left, padded with -1
///     int32 [B]     how many are left
/// Raises
///     TypeError, ValueError, IndexError as `sample_uniform`; IndexError for a candidate below -1
#[pyfunction]
fn filter_candidates<'py>(
    py: Python<'py>, indptr: Longs<'py>, indices: Ints<'py>, users: Ints<'py>, candidates: Input<'py, i32, Ix2>,
) -> PyResult<Filtered<'py>> {
    let csr = csr(OWNED, &indptr, &indices, i32::MAX as usize)?;
    let users = users.slice("users")?;
    let (candidates, shape) = candidates.read("candidates")?;
    expect("users", users.len(), shape[0])?;
    let (mut out, mut kept) = (vec![-1; candidates.len()], vec![0; users.len()]);
    py.detach(|| candidates::filter_candidates(csr, users, candidates, &mut out, &mut kept))?;
    Ok((out.into_pyarray(py).reshape([shape[0], shape[1]])?, kept.into_pyarray(py)))
}

/// Find the catalogue items nearest to each generated vector, by cosine, without the user's own items.
///
/// Both sides are scaled to length 1 in float64 and rounded to float32; a cosine is their product, one fused
/// multiply-add per dimension in order, clipped to [-1, 1]. A tie is a tie of these float32 values and goes
/// to the smaller item (case D09). A zero vector matches nothing, on either side.
///
/// Parameters
///     queries         float32 or float16 [N, d]
///     items           float32 or float16 [I, d]
///     users           int32 [N], whose items are left out for each query
///     indptr          int64 [U+1], indices  int32 [nnz]: the users' own items, ascending and unique in a row
///     k               length of the lists, may exceed the catalogue
///     min_similarity, max_similarity  cosines that count, both ends included; the upper one guards against
///                     false negatives
///     n_threads       0 means one per core
/// Returns
///     int32 [N, k]    items, best first, -1 where nothing is left
///     float32 [N, k]  their cosines, -inf where nothing is left
/// Raises
///     TypeError for a wrong dtype, rank or order; ValueError for wrong lengths, rows out of order and NaN or
///     infinity (naming the row); IndexError for a user or item out of range
#[pyfunction]
#[pyo3(signature = (queries, items, users, indptr, indices, k, min_similarity=-1.0, max_similarity=1.0, n_threads=0))]
#[pyo3(
    text_signature = "(queries, items, users, indptr, indices, k, min_similarity=-1.0, max_similarity=1.0, n_threads=0)"
)]
fn match_items<'py>(
    py: Python<'py>, queries: Floats<'py>, items: Floats<'py>, users: Ints<'py>, indptr: Longs<'py>,
    indices: Ints<'py>, #[pyo3(from_py_with = named::k)] k: usize,
    #[pyo3(from_py_with = named::min_similarity)] min_similarity: f32,
    #[pyo3(from_py_with = named::max_similarity)] max_similarity: f32,
    #[pyo3(from_py_with = named::n_threads)] n_threads: usize,
) -> PyResult<Lists<'py>> {
    let (queries, items, users) = (queries.vectors("queries")?, items.vectors("items")?, users.slice("users")?);
    expect("items (dimensions)", items.dim, queries.dim)?;
    expect("users", users.len(), queries.len)?;
    let band = min_similarity..=max_similarity;
    let excluded = csr(OWNED, &indptr, &indices, items.len)?;
    lists(py, (queries.len, k), n_threads, |out| matching::match_items(queries, items, users, excluded, k, band, out))
}

/// Find the catalogue titles most like each generated title, without the user's own items.
///
/// Likeness is the Dice coefficient 2 |A & B| / (|A| + |B|) of the sets of three-letter pieces, after lower case
/// and with every run of other characters than letters and digits read as one blank. Equal titles give 1. Titles
/// without a letter or digit match nothing. Ties go to the smaller item.
///
/// Parameters
///     titles          list of N str
///     catalogue       list of I str
///     users, indptr, indices, k  as in `match_items`
///     min_similarity  smallest likeness that counts; titles that share nothing never match
/// Returns, Raises
///     as `match_items`
#[pyfunction]
fn match_titles<'py>(
    py: Python<'py>, #[pyo3(from_py_with = named::titles)] titles: Vec<String>,
    #[pyo3(from_py_with = named::catalogue)] catalogue: Vec<String>, users: Ints<'py>, indptr: Longs<'py>,
    indices: Ints<'py>, #[pyo3(from_py_with = named::k)] k: usize,
    #[pyo3(from_py_with = named::min_similarity)] min_similarity: f32,
) -> PyResult<Lists<'py>> {
    let users = users.slice("users")?;
    expect("users", users.len(), titles.len())?;
    let excluded = csr(OWNED, &indptr, &indices, catalogue.len())?;
    lists(py, (titles.len(), k), 0, |out| {
        matching::match_titles(&titles, &catalogue, users, excluded, k, min_similarity, out)
    })
}

/// Rank the whole catalogue for every user by inner product and return the first K items.
///
/// Scores are float32, one fused multiply-add per dimension in order; users x items scores are never held. A
/// tie is a tie of these float32 values and goes to the smaller item (cases C04-C08).
///
/// Parameters
///     user_emb   float32 [U, d];  item_emb  float32 [I, d]
///     indptr     int64 [U+1], indices  int32 [nnz]: items that can never be recommended to a user, ascending and
///                unique in a row
///     k          length of the lists, may exceed the catalogue
///     n_threads  0 means one per core
/// Returns
///     int32 [U, k]    items, best first, -1 pads short lists
///     float32 [U, k]  their scores, -inf pads
/// Raises
///     TypeError for a wrong dtype, rank or order; ValueError for wrong lengths, rows out of order, NaN or infinity
///     (naming the row, case C11) and vectors so long that scores leave float32; IndexError for an item out of range
#[pyfunction]
#[pyo3(name = "topk", signature = (user_emb, item_emb, indptr, indices, k, n_threads=0))]
fn topk_py<'py>(
    py: Python<'py>, user_emb: Table<'py>, item_emb: Table<'py>, indptr: Longs<'py>, indices: Ints<'py>,
    #[pyo3(from_py_with = named::k)] k: usize, #[pyo3(from_py_with = named::n_threads)] n_threads: usize,
) -> PyResult<Lists<'py>> {
    let (users, items) = (user_emb.vectors("user_emb")?, item_emb.vectors("item_emb")?);
    let excluded = csr(OWNED, &indptr, &indices, items.len)?;
    lists(py, (users.len, k), n_threads, |out| topk::topk(&users, &items, excluded, k, out))
}

/// The same from given scores of any model.
///
/// Parameters
///     scores     float32 [U, I]; -inf means never
///     others     as in `topk`
/// Returns
///     as `topk`
/// Raises
///     as `topk`; ValueError for NaN names the user and the count (case C11)
#[pyfunction]
#[pyo3(signature = (scores, indptr, indices, k, n_threads=0))]
fn topk_scores<'py>(
    py: Python<'py>, scores: Table<'py>, indptr: Longs<'py>, indices: Ints<'py>,
    #[pyo3(from_py_with = named::k)] k: usize, #[pyo3(from_py_with = named::n_threads)] n_threads: usize,
) -> PyResult<Lists<'py>> {
    let (matrix, shape) = scores.read("scores")?;
    let (n_users, n_items) = (shape[0], shape[1]);
    let excluded = csr(OWNED, &indptr, &indices, n_items)?;
    excluded.expect_rows(n_users)?;
    lists(py, (n_users, k), n_threads, |out| topk::topk_scores(matrix, excluded, k, out))
}

/// The ranks of the held-out items in the rankings of `topk`, without making the lists.
///
/// Parameters
///     user_emb, item_emb, indptr, indices, k, n_threads  as in `topk`
///     test_indptr  int64 [U+1], test_indices  int32 [nnz_test]: the held-out items, ascending and unique in a row
/// Returns
///     int32 [nnz_test]  1 for the best item of the user; 0 beyond place k and for items that are excluded
/// Raises
///     as `topk`
#[pyfunction]
#[pyo3(signature = (user_emb, item_emb, indptr, indices, test_indptr, test_indices, k, n_threads=0))]
fn test_ranks<'py>(
    py: Python<'py>, user_emb: Table<'py>, item_emb: Table<'py>, indptr: Longs<'py>, indices: Ints<'py>,
    test_indptr: Longs<'py>, test_indices: Ints<'py>, #[pyo3(from_py_with = named::k)] k: usize,
    #[pyo3(from_py_with = named::n_threads)] n_threads: usize,
) -> PyResult<Bound<'py, PyArray1<i32>>> {
    let (users, items) = (user_emb.vectors("user_emb")?, item_emb.vectors("item_emb")?);
    let excluded = csr(OWNED, &indptr, &indices, items.len)?;
    let held_out = csr(HELD_OUT, &test_indptr, &test_indices, items.len)?;
    let mut ranks = vec![0; held_out.indices.len()];
    py.detach(|| threads::run(n_threads, || topk::test_ranks(&users, &items, excluded, held_out, k, &mut ranks)))?;
    Ok(ranks.into_pyarray(py))
}

/// The ranks of the held-out items in given lists.
///
/// Parameters
///     topk         int32 [U, K], best first; -1 pads, a repeated item counts at its first place
///     test_indptr  int64 [U+1], test_indices  int32 [nnz_test]: the held-out items, ascending and unique in a row
/// Returns
///     int32 [nnz_test]  1-based place in the user's list, 0 where the item is missing
/// Raises
///     TypeError, ValueError, IndexError as `topk`
#[pyfunction]
fn ranks_in_lists<'py>(
    py: Python<'py>, topk: Input<'py, i32, Ix2>, test_indptr: Longs<'py>, test_indices: Ints<'py>,
) -> PyResult<Bound<'py, PyArray1<i32>>> {
    let held_out = csr(HELD_OUT, &test_indptr, &test_indices, i32::MAX as usize)?;
    let (found, shape) = topk.read("topk")?;
    held_out.expect_rows(shape[0])?;
    let mut ranks = vec![0; held_out.indices.len()];
    py.detach(|| metrics::ranks_in_lists(found, shape[1], held_out, &mut ranks))?;
    Ok(ranks.into_pyarray(py))
}

/// Metrics of every user from the ranks of the held-out items (cases C01-C12).
///
/// With T held-out items of a user and H of them in the first K, at ranks r: recall H / T; NDCG
/// sum 1/log2(r + 1) over that of an ideal list of min(K, T); precision H / K; hit 1 if H > 0; MRR 1 / best r; MAP
/// sum (hits up to r) / r over min(K, T).
///
/// Parameters
///     ranks        int32 [nnz_test], 1-based, 0 where an item was not reached
///     test_indptr  int64 [U+1]
///     ks           int64 [n_k], each 1 or more and at most the K the ranks were made with
/// Returns
///     float64 [6, n_k, U] in the order above; NaN for users with nothing held out
/// Raises
///     TypeError, ValueError as `topk`; IndexError for a negative rank
#[pyfunction]
fn user_metrics<'py>(
    py: Python<'py>, ranks: Ints<'py>, test_indptr: Longs<'py>, ks: Longs<'py>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    let ranks = csr((HELD_OUT.0, "ranks"), &test_indptr, &ranks, i32::MAX as usize)?;
    let ks = ks.slice("ks")?;
    let (n_users, n_values) = (ranks.n_rows(), metrics::N_METRICS * ks.len());
    let mut out = vec![0.0; checked_size(n_users, n_values, size_of::<f64>())?];
    py.detach(|| metrics::user_metrics(ranks, ks, &mut out))?;
    out.into_pyarray(py).reshape([metrics::N_METRICS, ks.len(), n_users])
}

/// Names of the kernels this processor can run, widest first: "avx512", "avx2", "neon", "plain".
#[pyfunction]
fn kernels() -> Vec<&'static str> {
    simd::available().map(|kernel| kernel.name).collect()
}

/// Make all later calls use one of `kernels()`; for tests and benches. ValueError for any other name.
#[pyfunction]
fn use_kernel(#[pyo3(from_py_with = named::name)] name: String) -> PyResult<()> {
    if simd::choose(&name) {
        return Ok(());
    }
    Err(Error::Argument { name: "name", found: name, expected: "one of kernels()" }.into())
}

/// Whether the extension was built without optimisation; benches refuse such a build.
#[pyfunction]
fn is_debug_build() -> bool {
    cfg!(debug_assertions)
}

#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::{
        filter_candidates, is_debug_build, kernels, match_items, match_titles, ranks_in_lists, sample_popularity,
        sample_uniform, test_ranks, topk_py, topk_scores, use_kernel, user_metrics,
    };
}
