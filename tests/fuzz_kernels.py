"""Builds the C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and feeds them random input.

    python -m tests.fuzz_kernels [--minutes 10] [--kernels engine]

Each search has so many minutes. It calls the kernels as castlm does, through its modules and ctypes, and compares the
results with torch's. Before each search, one call that reads past a buffer shows that the sanitizer would have stopped
it. Not collected by pytest.
"""

import argparse
import contextlib
import ctypes
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "castlm"
RUNTIME = ROOT / "runtime" / "src" / "castlm_runtime" / "kernels"
FLAGS = ["-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


# Training


def overrun_training(library: Path) -> None:
    """Passes a weight whose width is too large, past the checks of `native`: the sanitizer has to end the process."""
    import torch

    from castlm.core import native

    weight, mask = torch.randn(4, 8), torch.zeros(4, 1, dtype=torch.uint8)
    parameters = native._parameters([weight], [mask])
    parameters[0].width = 4096
    native.load_kernels(str(library)).castlm_refresh(parameters, ctypes.c_int64(1), 2, 4, 1)


def search_training(library: Path, seconds: float) -> None:
    """Runs every check of AdamS's kernels on random input until the time is over."""
    from castlm.core import native
    from tests import kernel_cases as cases

    loaded = native.load_kernels(str(library))
    native.kernels = lambda: loaded  # type: ignore[assignment]
    run_checks(
        {
            "refresh": (cases.refreshes(), cases.check_refresh),
            "update": (cases.updates(), cases.check_update),
            "broken update": (cases.broken_updates(), cases.check_broken_update),
        },
        seconds,
    )


def run_checks(checks: dict[str, tuple[Any, Callable[[Any], None]]], seconds: float) -> None:
    """Runs every check on random input, on 1 to 4 threads in turn, and prints how many inputs each has seen."""
    import torch
    from hypothesis import HealthCheck, given, settings

    counts = dict.fromkeys(checks, 0)

    def batch_of(name: str) -> Callable[[], None]:
        strategy, check = checks[name]

        @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def batch(case):
            counts[name] += 1
            check(case)

        return batch

    until, threads = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        threads = threads % 4 + 1
        torch.set_num_threads(threads)
        for name in checks:
            batch_of(name)()
        print(", ".join(f"{count:,} inputs of {name}" for name, count in counts.items()), flush=True)


# The start


def overrun_start(library: Path) -> None:
    """Passes a weight with fewer rows than the call says: the sanitizer has to end the process."""
    import torch

    from castlm.oneshot import sparsegpt

    weight = torch.randn(8, 8)
    address = weight.data_ptr()
    call = sparsegpt._Call(*[address] * 5, rows=512, columns=8)
    sparsegpt.load_kernels(str(library)).castlm_sweep(call, 0, 8, 2, 4, 1)


def search_start(library: Path, seconds: float) -> None:
    """Runs the check of SparseGPT's sweep on random input until the time is over."""
    from castlm.oneshot import sparsegpt
    from tests import kernel_cases as cases

    loaded = sparsegpt.load_kernels(str(library))
    sparsegpt.kernels = lambda: loaded  # type: ignore[assignment]
    run_checks({"sweep": (cases.sweeps(), cases.check_sweep)}, seconds)


# Weights


def use_runtime(file: Path) -> ctypes.CDLL:
    """Loads a library of the runtime's kernels in place of the installed one."""
    from castlm_runtime import library

    loaded = library.load_kernels(str(file))
    library.kernels = lambda: loaded  # type: ignore[assignment]
    return loaded


def overrun_weights(library: Path) -> None:
    """Claims that a buffer is as long as its header says when it is cut: the sanitizer has to end the process."""
    import torch

    from tests.packed_weights import buffer_of, random_packed

    loaded = use_runtime(library)
    whole = buffer_of(random_packed("bf16", 2, 4, 64, 512))
    cut = (ctypes.c_uint8 * 4096).from_buffer_copy(bytes(whole[:4096].tolist()))
    x, y = torch.randn(1, 512), torch.empty(1, 64)
    loaded.castlm_multiply(ctypes.addressof(cut), whole.numel(), x.data_ptr(), 0, 1, 512, y.data_ptr(), 64, 1)


def search_weights(library: Path, seconds: float) -> None:
    """Tries random levels, weights, shapes, batches and damaged headers until the time is over, and prints how many.

    A buffer with random bytes in its header must be refused or multiplied within its bounds.
    """
    import torch

    from castlm.core.errors import InputError
    from castlm.packed import native
    from castlm_runtime.formats import PACKABLE
    from tests.packed_weights import DENSE_ONLY, PATTERNS, buffer_of, check_product, random_packed

    use_runtime(library)
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        native.use_level(random.choice(native.levels()))
        values = random.choice([*PACKABLE])
        n, m = (0, 0) if values in DENSE_ONLY else random.choice(PATTERNS)
        groups = random.randint(1, 40) if random.randrange(5) else random.randint(500, 900)  # wide ones too
        rows, columns = random.randint(1, 40), groups * (m or 5)
        packed = random_packed(values, n, m, rows, columns, seed=count)
        layouts = ["best", *(["rows"] if m else []), *(["lanes"] if m == 0 or 64 % m == 0 else [])]
        buffer = buffer_of(packed, random.choice(layouts)).clone()  # without room after it
        x = torch.randn(random.choice([1, random.randint(1, 40), random.randint(41, 100)]), columns)  # prompts too
        check_product(packed, buffer, x)
        out = torch.empty(rows, columns)
        native.unpack(buffer, 0, rows, out)
        numbers = torch.randint(rows, (random.randint(1, 20),))
        assert torch.equal(native.gather(buffer, numbers, columns), out[numbers])
        damaged = buffer.clone()
        for _ in range(random.randint(1, 3)):
            damaged[random.randrange(64)] = random.randrange(256)
        with contextlib.suppress(InputError):
            native.multiply(x, damaged, rows)
        with contextlib.suppress(AssertionError):
            native.unpack(damaged, 0, rows, out)
        with contextlib.suppress(IndexError):
            native.gather(damaged, numbers, columns)
        count += 1
    print(f"{count:,} random weights", flush=True)


# The engine and the sampler


def search_engine(library: Path, seconds: float) -> None:
    """Reads random sequences by random models of every family, and compares their logits with those of transformers."""
    import numpy as np
    import torch

    from castlm.packed import native
    from castlm_runtime.families import FAMILIES
    from castlm_runtime.model import BLOCK, Cache, Part
    from tests.engine_model import ERRORS, ids_of
    from tests.packed_weights import DENSE_ONLY, PATTERNS, packed_in_engine
    from tests.tiny import tiny_model

    use_runtime(library)
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        level, kind, family = random.choice(native.levels()), random.choice([*ERRORS]), random.choice([*FAMILIES])
        experts = FAMILIES[family].experts
        sizes = {"hidden_size": 32 * random.randint(1, 6), "num_hidden_layers": random.randint(1, 3)}
        sizes["intermediate_size"] = 8 * random.randint(1, 30)
        if experts:
            number = random.randint(1, 9)
            sizes |= {
                "num_experts_per_tok": random.randint(1, number),
                experts.intermediate_key: 8 * random.randint(1, 20),
            }
            sizes["num_experts" if family in ("qwen3_moe", "olmoe") else "num_local_experts"] = number
        values = random.choice(["fp32", "bf16", "fp16", "int8", "int4", "int6", "int3"])
        n, m = (0, 0) if values in DENSE_ONLY else random.choice([(n, m) for n, m in PATTERNS if m == 0 or 8 % m == 0])
        native.use_level(level)
        model = tiny_model(family, max_position_embeddings=512, **sizes)
        engine = packed_in_engine(model, values, n, m)
        texts = [ids_of(random.choice([random.randint(1, 9), random.randint(1, 300)])) for _ in range(3)]
        with torch.inference_mode():
            exact = [model(text[None]).logits[0] for text in texts]
        cache, read = Cache(engine, kind, 16), [0] * len(texts)
        numbers = random.sample(range(16), 15)
        errors = []
        while left := [row for row, text in enumerate(texts) if read[row] < len(text)]:
            parts, ends = [], []
            for row in random.sample(left, random.randint(1, len(left))):
                length = random.choice([1, random.randint(1, 6), random.randint(1, 300)])
                part, position = texts[row][read[row] : read[row] + length].tolist(), read[row]
                blocks = numbers[5 * row : 5 * row + -(-(position + len(part)) // BLOCK)]
                parts.append(Part(part, position, blocks, np.empty(engine.vocabulary, np.float32)))
                read[row] += len(part)
                ends.append((row, read[row] - 1))
            engine.threads = random.randint(1, 8)
            engine.forward(cache, parts)
            for part, (row, end) in zip(parts, ends):
                found = torch.from_numpy(part.logits)
                assert found.isfinite().all(), (family, sizes, values, n, m, level)
                errors.append(float((found - exact[row][end]).norm() / exact[row][end].norm()))
        # Rounded activations change single logits much, and choose another one of two experts that are nearly equal.
        if kind == "fp32" and values in ("fp32", "bf16", "fp16"):
            error = float(np.median(errors)) if experts else max(errors)
            assert error < 1e-3, (family, sizes, values, n, m, level, errors)
        cache.close()
        count += 1
    print(f"{count:,} random models of {len(FAMILIES)} families", flush=True)


def search_sampler(library: Path, seconds: float) -> None:
    """Samples from random logits by random settings; a token must be one that the settings allow."""
    import numpy as np

    from castlm.packed import native
    from castlm_runtime.sampler import Chooser, Sampling, choose, score

    use_runtime(library)
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        native.use_level(random.choice(native.levels()))
        rng, rows = np.random.default_rng(count), random.randint(1, 6)
        vocabulary = random.choice([random.randint(1, 200), random.randint(1, 5000)])
        logits = (rng.standard_normal((rows, vocabulary)) * random.choice([0, 0.01, 1, 30, 1e6])).astype(np.float32)
        logits[rng.random(logits.shape) < random.choice([0, 0, 0.5, 0.99])] = -np.inf
        if random.randrange(8) == 0:
            logits[random.randrange(rows), random.randrange(vocabulary)] = random.choice([np.nan, np.inf])
        choosers = []
        for _ in range(rows):
            settings = Sampling(
                temperature=random.choice([0.0, 1e-3, 0.7, 1.0, 50.0]),
                top_k=random.choice([0, 1, random.randint(1, 2 * vocabulary)]),
                top_p=random.choice([1.0, 0.0, random.random()]),
                min_p=random.choice([0.0, 1.0, random.random()]),
                repetition_penalty=random.choice([1.0, 1e-3, 1.3, 1e3]),
                presence_penalty=random.choice([0.0, random.uniform(-1e3, 1e3)]),
                frequency_penalty=random.choice([0.0, random.uniform(-2, 2)]),
                logit_bias={
                    random.randrange(vocabulary): random.uniform(-1e3, 1e3) for _ in range(random.randint(0, 5))
                },
                seed=random.getrandbits(64),
                num_logprobs=random.choice([None, random.randint(0, vocabulary)]),
            )
            chooser = Chooser(settings, rng.integers(vocabulary, size=random.randint(0, 300)), vocabulary)
            for token in rng.integers(vocabulary, size=random.randint(0, 100)).tolist():
                chooser.add(token)
            if random.randrange(3) == 0:
                allowed = rng.integers(1 << 32, size=-(-vocabulary // 32), dtype=np.uint32)
                chooser.allow(allowed)
            choosers.append(chooser)
        chosen = choose(logits, choosers, random.randint(1, 8))
        is_sound = np.isfinite(logits.max(1)) & ~np.isnan(logits).any(1)
        for row, (token, chooser) in enumerate(zip(chosen.tokens, choosers)):
            if row in chosen.errors:
                assert chooser._allowed is not None or not is_sound[row]
                continue
            assert is_sound[row], (count, row, token)
            assert np.isfinite(logits[row, token]), (count, row, token)
            assert chooser._allowed is None or chooser._allowed[token // 32] >> token % 32 & 1, (count, row, token)
        if is_sound.all():
            score(logits, rng.integers(vocabulary, size=rows), random.randint(0, vocabulary), random.randint(1, 8))
        count += 1
    print(f"{count:,} random batches", flush=True)


# The program. A search runs in a process of its own, whose allocations the sanitizer watches

KERNELS = {
    "training": (PACKAGE / "core", overrun_training, search_training),
    "start": (PACKAGE / "oneshot", overrun_start, search_start),
    "weights": (RUNTIME, overrun_weights, search_weights),
    "engine": (RUNTIME, overrun_weights, search_engine),
    "sampler": (RUNTIME, overrun_weights, search_sampler),
}


def start(kernels: str, library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": ":".join(runtime), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz_kernels", "--kernels", kernels, "--library", str(library), *arguments]
    stderr = subprocess.PIPE if "--overrun" in arguments else None
    return subprocess.run(command, env=environment, text=True, stderr=stderr)


def build_and_search(kernels: str, minutes: float) -> int:
    """The exit code of a search, which is 1 as well where the sanitizer does not notice a read past a buffer."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "sanitized.so"
        sources = map(str, sorted(KERNELS[kernels][0].glob("*.cpp")))
        subprocess.run(["g++", *FLAGS, "-O1", "-pthread", "-shared", "-fPIC", *sources, "-o", library], check=True)
        proof = start(kernels, library, "--overrun")
        if proof.returncode == 0 or "AddressSanitizer" not in proof.stderr:
            print(f"the sanitizer did not notice a read past a buffer:\n{proof.stderr}", file=sys.stderr)
            return 1
        return start(kernels, library, "--minutes", str(minutes)).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_kernels")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kernels", choices=KERNELS, help="some of them; all by default")
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--overrun", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library is None:
        chosen = [options.kernels] if options.kernels else KERNELS
        return int(any(build_and_search(kernels, options.minutes) for kernels in chosen))
    _, overrun, search = KERNELS[options.kernels]
    if options.overrun:
        overrun(options.library)
    else:
        search(options.library, 60 * options.minutes)
        print("no finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
