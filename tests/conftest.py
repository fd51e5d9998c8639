"""The common ground of all tests: no hub, one torch thread, and the real small model where the checkout has it."""

import gc
import os
import sys
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or datasets is imported
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too: each would take all cores
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else torch.compile starts processes that import torch

from pathlib import Path

import pytest

STORIES260K = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch  # not where pytest only hands out the tests

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _packed_models_are_loaded_here() -> Iterator[None]:
    """What `castlm pack` writes is loaded in this process: a fresh one takes seconds, and one test starts it."""
    from castlm.export import loads, packed
    from castlm.packed.register import register

    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "check_loads", loads.load_and_compute)
        yield


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """Folder of a real LLaMA of 260k parameters trained on TinyStories, vocabulary 512."""
    if not (STORIES260K / "model.safetensors").is_file():
        pytest.skip("the model stories260K is not beside the repository, at ../shared/models/stories260K")
    return STORIES260K


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """A file of text that every tiny tokenizer can read, long enough for a short run."""
    from tests.tiny import TEXT

    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="session")
def gemma(tmp_path_factory) -> str:
    """Folder of a tiny Gemma: tied embeddings, and grouped keys, whose rows do not divide by 3."""
    from tests.tiny import save_tiny

    return str(save_tiny(tmp_path_factory.mktemp("gemma"), "gemma"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """Folder of a tiny LLaMA. No test changes it."""
    from tests.tiny import save_tiny

    return str(save_tiny(tmp_path_factory.mktemp("llama"), "llama"))


@pytest.fixture(scope="session")
def chat_llama(tmp_path_factory) -> str:
    """Folder of that LLaMA with a chat template. No test changes it."""
    from tests.chats import save_chat_model

    return save_chat_model(tmp_path_factory.mktemp("chat-llama") / "model")


@pytest.fixture(scope="session")
def sparse(llama, tmp_path_factory) -> str:
    """Folder of that LLaMA at 2:4, by `castlm prune --solver magnitude`. No test changes it."""
    from tests.runs import prune_to

    return prune_to(tmp_path_factory.mktemp("sparse") / "model", llama)


@pytest.fixture
def lessons() -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the batches that a teacher has read."""
    from tests.runs import teacher_batches

    with teacher_batches() as read:
        yield read


@pytest.fixture
def users_effort() -> Iterator[None]:
    """Starts as users get them, and not with the few rotations of `tests.efforts`, also in processes of `ranks`."""
    from tests import efforts

    efforts.use(efforts.AS_USERS_GET_IT)
    yield
    efforts.use(efforts.SHORT)


@pytest.fixture
def no_charts(monkeypatch) -> None:
    """Pages and tables as without matplotlib: charts take longer than all the rest of a small run."""
    for place in ("report.charts", "report.run_page", "compare.report"):
        monkeypatch.setattr(f"castlm.lab.{place}.can_draw", lambda: False)


LONGEST_FIRST = (
    "test_train",
    "test_distributed",
    "test_images",
    "test_experts",
    "test_fuzz",
    "test_compare",
    "test_chat",
    "test_teacher",
)
"""Files whose tests take longest. They run first, so that no process is left alone with one of them at the end."""


def pytest_configure() -> None:
    from tests import efforts

    gc.disable()  # until all is imported: a million objects that stay, which each collection would walk through
    efforts.use(efforts.SHORT)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    if "tests.ranks" in sys.modules:
        sys.modules["tests.ranks"].start_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST_FIRST)
