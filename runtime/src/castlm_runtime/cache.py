"""Blocks of the cache: which sequence has which, and which of them hold the beginning of a text that comes again.

A whole block is found by a key: the hash of its tokens and of the key of the block before it. So two sequences that
begin alike share blocks, and a conversation's next turn reads its new tokens alone. A block that no sequence uses
stays until its place is needed; the one that was used least recently goes first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from castlm_runtime.model import BLOCK, blocks_for


class Blocks:
    """The blocks of a cache.

    Args:
        num_blocks: of the cache.
        shares_prefixes: whether sequences share blocks.
    """

    def __init__(self, num_blocks: int, shares_prefixes: bool = True):
        self.num_blocks, self.shares_prefixes = num_blocks, shares_prefixes
        self._unused = list(range(num_blocks - 1, -1, -1))  # the lowest number is taken first
        self._users: dict[int, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._left: OrderedDict[int, None] = OrderedDict()  # blocks with a key that nobody uses, the oldest first
        self._reserved = 0
        self.num_hits = 0
        """Tokens that were found and not read again."""

    @property
    def num_used(self) -> int:
        """Blocks that sequences use."""
        return len(self._users)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens fits beside those that are there, to their ends."""
        return blocks_for(num_tokens) <= self.num_blocks - self._reserved

    def open(self, tokens: Sequence[int], most_tokens: int, finds_prefix: bool = True) -> CachedSequence:
        """A sequence that begins with `tokens` and has at most `most_tokens`; it must fit.

        Args:
            finds_prefix: whether it takes blocks that begin alike; otherwise all tokens are read.
        """
        assert self.fits(most_tokens)
        self._reserved += blocks_for(most_tokens)
        return CachedSequence(self, tokens, blocks_for(most_tokens), finds_prefix)

    def _take(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._left.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._users[block] = 1
        return block

    def _share(self, key: bytes) -> int | None:
        block = self._block_of.get(key)
        if block is not None:
            self._left.pop(block, None)
            self._users[block] = self._users.get(block, 0) + 1
        return block

    def _seal(self, block: int, key: bytes) -> None:
        """Makes a whole block known; of two alike the first one stays known."""
        if self.shares_prefixes and key not in self._block_of and block not in self._key_of:
            self._key_of[block], self._block_of[key] = key, block

    def _give_back(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block]:
            return
        del self._users[block]
        if block in self._key_of:
            self._left[block] = None
        else:
            self._unused.append(block)


class CachedSequence:
    """The blocks of a sequence, from `Blocks.open` to `close`.

    Attributes:
        tokens: of prompt and answer.
        num_read: how many of them have their keys and values in the blocks.
    """

    def __init__(self, pool: Blocks, tokens: Sequence[int], num_reserved: int, finds_prefix: bool = True):
        self._pool, self._num_reserved = pool, num_reserved
        self.tokens = list(tokens)
        self.blocks: list[int] = []
        self._keys: list[bytes] = []
        if pool.shares_prefixes and finds_prefix:
            # The last token is always read, because its logits are wanted.
            for number in range((len(self.tokens) - 1) // BLOCK):
                block = pool._share(self._key(number))
                if block is None:
                    break
                self.blocks.append(block)
        self.num_read = len(self.blocks) * BLOCK
        pool.num_hits += self.num_read

    def _key(self, number: int) -> bytes:
        while len(self._keys) <= number:
            before = self._keys[-1] if self._keys else b""
            at = len(self._keys) * BLOCK
            content = np.asarray(self.tokens[at : at + BLOCK], np.int32).tobytes()
            self._keys.append(hashlib.blake2b(before + content, digest_size=16).digest())
        return self._keys[number]

    def make_room(self, num_tokens: int) -> None:
        """Takes blocks for so many tokens."""
        while len(self.blocks) < blocks_for(num_tokens):
            self.blocks.append(self._pool._take())

    def have_read(self, num_tokens: int) -> None:
        """The first `num_tokens` have their keys and values in the blocks now."""
        first, self.num_read = self.num_read // BLOCK, num_tokens
        for number in range(first, num_tokens // BLOCK):
            self._pool._seal(self.blocks[number], self._key(number))

    def close(self) -> None:
        """Gives the blocks back; the last ones are the first to go."""
        for block in reversed(self.blocks):
            self._pool._give_back(block)
        self.blocks = []
        self._pool._reserved -= self._num_reserved
        self._num_reserved = 0
