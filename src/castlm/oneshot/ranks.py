"""Divides the work of a start over ranks, so that its result has the same bits on any number of them.

A rounded sum depends on its order, and a rounded product of matrices on how many rows are multiplied at once. So both
are cut in the same way for any number of ranks, one included:

    the text      into 8 parts of whole batches; a statistic is summed in each part, then over the parts, in order
    the rows      of a layer into panels, which are solved one by one

Ranks take the parts, and the panels, in turns: with 2 ranks, rank 0 has parts 0, 2, 4 and 6. After each turn the main
rank adds the parts of this turn, and the next one begins, so a rank holds the sum and one part, never eight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from castlm.world import World

T = TypeVar("T")

PARTS = 8
"""Parts of a text; fewer if there are fewer batches."""
MIN_ROWS, MAX_ROWS = 128, 512
"""Rows of a panel. Below the least, the matrix products of a CPU take longer; the most bounds the memory of ADMM."""
_PANELS = 8  # of a layer with enough rows
_SENT = 2**24  # elements that are sent at a time


class Division:
    """The batches of a text, and those that a rank runs.

    Attributes:
        parts: the batches of each part, by number; with two ranks and 32 batches, range(0, 4), range(4, 8), ...
        own: the numbers of the parts of this rank.
    """

    def __init__(self, num_batches: int, world: World) -> None:
        self.world = world
        num = min(PARTS, num_batches)
        # 13 batches in 8 parts: 1, 2, 1, 2, 2, 1, 2, 2. The cuts depend on the text alone, and so do all sums.
        self.parts = [range(part * num_batches // num, (part + 1) * num_batches // num) for part in range(num)]
        self.own = list(range(world.rank, num, world.size))

    @property
    def batches(self) -> list[int]:
        """The batches of this rank, by their numbers in the text."""
        return [batch for part in self.own for batch in self.parts[part]]

    def owner(self, batch: int) -> int:
        """The rank that has a batch."""
        (part,) = (number for number, batches in enumerate(self.parts) if batch in batches)
        return part % self.world.size

    def turns(self) -> Iterator[tuple[int, range]]:
        """For each turn, the number of ranks that have a part in it, and the own batches of it, counted on this rank.

        The range is empty on a rank without a part.
        """
        begin = 0
        # 8 parts on 3 ranks are three turns, of 3, 3 and 2 parts. Rank 2 has no part in the last, and sends none.
        for first in range(0, len(self.parts), self.world.size):
            own = first + self.world.rank
            end = begin + (len(self.parts[own]) if own < len(self.parts) else 0)
            yield min(self.world.size, len(self.parts) - first), range(begin, end)
            begin = end


def add_part_(world: World, total: Tensor, part: Tensor, num_ranks: int) -> None:
    """On rank 0, adds to `total` the `part` of the first `num_ranks` ranks. Of square matrices, only the upper half."""
    for of_total, of_part in zip(_pieces(total), _pieces(part)):
        world.add_in_order_(of_total, of_part, num_ranks)


def share_sum_(world: World, total: Tensor) -> None:
    """Gives every rank rank 0's `total`. Of square matrices, only the upper half."""
    if world.size == 1:
        return
    for piece in _pieces(total):
        sent = piece.contiguous()
        world.share_(sent, 0)
        piece.copy_(sent)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views of `tensor`; of a square matrix, (some rows, the columns from the diagonal on)."""
    if tensor.dim() != 2:
        yield tensor
        return
    step = max(1, _SENT // tensor.shape[1])  # rows of about 64 MiB in fp32
    is_square = tensor.shape[0] == tensor.shape[1]
    for start in range(0, len(tensor), step):
        yield tensor[start : start + step, start if is_square else 0 :]


def panels_of(num_rows: int) -> list[slice]:
    """The panels of a layer's rows: of about equal size, at most 8 unless they would be too large."""
    # 960 rows (q, k, v): min(8, 960 // 128) = 7 panels of 138. 14,336 rows: 28 panels of 512.
    num = max(1, min(_PANELS, num_rows // MIN_ROWS), math.ceil(num_rows / MAX_ROWS))
    size = math.ceil(num_rows / num)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def by_rows(world: World, function: Callable[..., Any], *matrices: Tensor, at_once: bool = False) -> Tensor:
    """Applies a function of rows that does not mix them to all rows of `matrices`, (rows, columns).

    Each rank computes some panels of rows and receives the others.

    Args:
        function: returns new rows; called for one panel after another. With `at_once`, called with a list of the rows
            of all panels of this rank, and yields new rows for each.
    """
    first = matrices[0]
    panels = panels_of(len(first))
    result = first.new_empty(first.shape)
    own = panels[world.rank :: world.size]
    of_panels = [tuple(matrix[panel] for matrix in matrices) for panel in own]  # views
    found = function(of_panels) if at_once else (function(*rows) for rows in of_panels)
    # `found` comes first: a rank without panels takes part in what a generator shares with the others.
    for rows, panel in zip(found, own, strict=True):
        result[panel] = rows
    if world.size > 1:
        for number, panel in enumerate(panels):  # rows of a panel are contiguous in `result`
            world.share_(result[panel], number % world.size)
    return result


def share_each(world: World, makers: Sequence[Callable[[], Tensor]], like: Tensor) -> Iterator[Tensor]:
    """Yields the tensors of `makers` in order on every rank; each is contiguous, shaped like `like`, and made by one.

    The ranks make as many at a time as there are ranks. A rank holds its own beside the one that it gets.
    """
    for first in range(0, len(makers), world.size):
        numbers = range(first, min(first + world.size, len(makers)))
        own = makers[first + world.rank]() if first + world.rank in numbers else None
        for owner in range(len(numbers)):
            if own is not None and owner == world.rank:
                made, own = own, None
            else:
                made = like.new_empty(like.shape)
            world.share_(made, owner)
            yield made
            del made  # before the next one is made


def each_by_one(world: World, tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Runs each of `tasks` on one rank, and returns all results, which are small and on a CPU, on every rank.

    One rank decides for all, because processors of two kinds may round to two different decisions.
    """
    # rank 1 of 2 does tasks 1, 3, 5
    done: dict[int, Any] = {number: tasks[number]() for number in range(world.rank, len(tasks), world.size)}
    for other in world.gather(done, patient=True):
        done |= other
    return [done[number] for number in range(len(tasks))]
