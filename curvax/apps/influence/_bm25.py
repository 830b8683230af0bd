"""Which texts share rare tokens with a query: a filter before influence is computed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse

from curvax._checks import check_count


class Candidates(NamedTuple):
    """Documents by their score against each query, the best first.

    Attributes:
      scores: `[queries, k]`.
      documents: `[queries, k]`, their numbers.
    """

    scores: np.ndarray
    documents: np.ndarray


def bm25(
    queries: Sequence[Iterable[Hashable]], documents: Iterable[Iterable[Hashable]], k: int = 10_000
) -> Candidates:
    """Find for each query the k documents that share the rarest tokens with it.

    The score is the sum of `IDF(t) = log((C - n_t + 1/2) / (n_t + 1/2) + 1)` over the query's tokens t (repeated ones count
    again) that the document holds, n_t of all C documents holding t. How often, and how long a document is, do not matter.

    Among documents that are found so, influence shows which of the texts that look alike matter. Those that influence a
    query by meaning alone are lost.

    Args:
      queries: sequences of tokens (numbers or strings).
      documents: sequences of tokens, gone through once.
      k: documents to keep for each query; all, if there are fewer.

    Returns:
      `Candidates`, NumPy arrays; of equal scores the document with the smaller number comes first.

    Raises:
      ValueError: no document, or k below 1.

    Cost: a pass over the documents, and for each query a sort of all scores. Memory: a number for each pair of both.

    Example:
      >>> from curvax.apps import influence
      >>> documents = ["the cat sat".split(), "the dog ran".split(), "the cat ran".split()]
      >>> found = influence.bm25(["the dog".split()], documents, k=2)
      >>> found.documents.tolist(), found.scores.round(3).tolist()
      ([[1, 0]], [[1.114, 0.134]])

    References: Grosse et al. (2023), Studying large language model generalization with influence functions, section 3.2.1:
      BM25 with presence in place of counts, where its k1 cancels.
    """
    check_count(1, k=k)
    queries = [list(query) for query in queries]
    column = {
        token: i
        for i, token in enumerate(dict.fromkeys(token for query in queries for token in query))
    }
    known = [
        sorted({column[token] for token in document if token in column}) for document in documents
    ]
    if not known:
        raise ValueError("documents is empty; give at least one sequence of tokens.")
    held = _matrix(known, len(column))
    number = np.asarray(held.sum(axis=0)).ravel()
    idf = np.log((len(known) - number + 0.5) / (number + 0.5) + 1)
    asked = _matrix([[column[token] for token in query] for query in queries], len(column))
    scores = (asked * idf) @ held.T
    dense = scores.toarray()
    best = np.argsort(-dense, axis=1, kind="stable")[:, :k]
    return Candidates(np.take_along_axis(dense, best, axis=1), best)


def _matrix(rows: Sequence[Sequence[int]], columns: int) -> scipy.sparse.csr_array:
    """Count the entries of each row by column."""
    ends = np.cumsum([0, *map(len, rows)])
    places = np.concatenate([np.asarray(row, int) for row in rows]) if rows else np.zeros(0, int)
    return scipy.sparse.csr_array((np.ones(len(places)), places, ends), shape=(len(rows), columns))
