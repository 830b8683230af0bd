"""Which texts share rare tokens with a query: a filter before influence is computed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from curvax._checks import check_count

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# t: a token, C: the number of documents, n_t: the number of documents that hold t


class Candidates(NamedTuple):
    """Documents by their score against each query, the best first.

    Attributes:
      scores: `[queries, k]`.
      documents: the numbers of the documents, `[queries, k]`.
    """

    scores: np.ndarray
    documents: np.ndarray


def bm25(
    queries: Sequence[Iterable[Hashable]],
    documents: Iterable[Iterable[Hashable]],
    k: int = 10_000,
) -> Candidates:
    """Find for each query the k documents that share the rarest tokens with it.

    A document's score is the sum of `IDF(t) = log((C - n_t + 1/2) / (n_t + 1/2) + 1)` over those
    tokens t of the query that the document holds; tokens that the query repeats count again. How
    often a document holds a token, and how long it is, does not matter.

    Among documents that are chosen this way, influence shows which of the texts that look alike
    matter. Documents that influence a query by their meaning alone are lost.

    Args:
      queries: sequences of tokens (numbers or strings).
      documents: sequences of tokens; they are read once.
      k: the number of documents for each query; if there are fewer, all of them.

    Returns:
      `Candidates` of NumPy arrays; of equal scores the document with the smaller number comes
      first.

    Raises:
      ValueError: there is no document, or k is below 1.

    Cost: a pass over the documents, and for each query a sort of all scores. Memory: a number for
      each pair of a query and a document.

    Example:
      >>> from curvax.apps import influence
      >>> documents = ["the cat sat".split(), "the dog ran".split(), "the cat ran".split()]
      >>> best = influence.bm25(["the dog".split()], documents, k=2)
      >>> best.documents.tolist(), best.scores.round(3).tolist()
      ([[1, 0]], [[1.114, 0.134]])

    References: Grosse et al. (2023), Studying large language model generalization with influence
      functions, https://arxiv.org/abs/2308.03296, section 3.2.1: BM25 with presence in place of
      counts, where its k1 cancels.
    """
    check_count(1, k=k)
    queries = [list(query) for query in queries]
    # Every token of a query gets a column; other tokens of documents do not matter.
    column: dict[Hashable, int] = {}
    for query in queries:
        for token in query:
            column.setdefault(token, len(column))
    presence_rows = [sorted(set(_columns(document, column))) for document in documents]
    if not presence_rows:
        raise ValueError("documents is empty; give at least one sequence of tokens.")
    presence = _matrix(presence_rows, len(column))

    # IDF(t) = log((C - n_t + 1/2) / (n_t + 1/2) + 1)
    num_documents = len(presence_rows)
    n_t = np.asarray(presence.sum(axis=0)).ravel()
    idf = np.log((num_documents - n_t + 0.5) / (n_t + 0.5) + 1)

    # scores [queries, documents]: the sum over t of (count in query) IDF(t) (presence in document)
    count_rows = [_columns(query, column) for query in queries]
    counts = _matrix(count_rows, len(column))
    scores = ((counts * idf) @ presence.T).toarray()
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Candidates(np.take_along_axis(scores, best, axis=1), best)


def _columns(tokens: Iterable[Hashable], column: Mapping[Hashable, int]) -> list[int]:
    """Return the columns of those tokens that some query holds."""
    return [column[token] for token in tokens if token in column]


def _matrix(
    rows: Sequence[Sequence[int]],
    num_columns: int,
) -> csr_array:
    """Build the sparse matrix that counts the entries of each row by column."""
    # Imported here only: it takes a quarter of `import curvax`.
    from scipy.sparse import csr_array

    # CSR: where each row ends, and the columns of all rows one after the other
    ends = np.cumsum([0, *map(len, rows)])
    columns = np.concatenate([np.asarray(row, int) for row in rows]) if rows else np.zeros(0, int)
    shape = (len(rows), num_columns)
    return csr_array((np.ones(len(columns)), columns, ends), shape=shape)
