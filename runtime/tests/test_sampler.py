"""The distributions are those of transformers, and a sample depends on seed, position and logits alone."""

import numpy as np
import pytest

from castlm_runtime import library
from castlm_runtime.errors import InputError
from castlm_runtime.sampler import Chooser, Sampling, choose, score

INFINITY = np.float32(np.inf)


def some_logits(vocabulary: int, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal(vocabulary)).astype(np.float32)


def draws(
    logits: np.ndarray, count: int, threads: int = 1, prompt=(), answer=(), allowed=None, **settings
) -> np.ndarray:
    """`count` samples of the same logits, each with a seed of its own."""
    choosers = []
    for seed in range(count):
        chooser = Chooser(Sampling(**{"temperature": 1.0, "seed": seed} | settings), prompt, len(logits))
        for token in answer:
            chooser.add(token)
        chooser.allow(allowed)
        choosers.append(chooser)
    chosen = choose(np.tile(logits, (count, 1)), choosers, threads)
    assert not chosen.errors
    return np.array(chosen.tokens)


def transformers_probabilities(logits: np.ndarray, prompt=(), answer=(), **settings) -> np.ndarray:
    """The probabilities after transformers' processors; presence and frequency penalties, which it lacks, by hand."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").generation.logits_process
    history, scores = torch.tensor([[*prompt, *answer]]), torch.tensor(logits)[None].clone()
    if settings.get("logit_bias"):
        scores = process.SequenceBiasLogitsProcessor({(t,): b for t, b in settings["logit_bias"].items()})(
            history, scores
        )
    if "repetition_penalty" in settings:
        scores = process.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])(history, scores)
    for token in set(answer):
        times = answer.count(token)
        scores[0, token] -= settings.get("presence_penalty", 0) + settings.get("frequency_penalty", 0) * times
    scores = process.TemperatureLogitsWarper(settings.get("temperature", 1.0))(history, scores)
    if settings.get("top_k"):
        scores = process.TopKLogitsWarper(settings["top_k"])(history, scores)
    if "top_p" in settings:
        scores = process.TopPLogitsWarper(settings["top_p"])(history, scores)
    if "min_p" in settings:
        scores = process.MinPLogitsWarper(settings["min_p"])(history, scores)
    return scores.double().softmax(-1)[0].numpy()


def check_distribution(tokens: np.ndarray, probabilities: np.ndarray) -> None:
    """A chi-square test; tokens that come less than 5 times on average are counted together."""
    stats = pytest.importorskip("scipy.stats")
    expected, found = probabilities * len(tokens), np.bincount(tokens, minlength=len(probabilities))
    assert not found[probabilities == 0].any()
    is_rare = expected < 5
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    found = np.append(found[~is_rare], found[is_rare].sum())
    if len(expected) == 1 or (expected > 0).sum() == 1:
        return
    assert stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 150},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "temperature": 0.7},
        {"top_p": 0.9, "min_p": 0.02, "temperature": 1.5},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7, "top_p": 0.9},
        {"presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "top_k": 50},
        {"logit_bias": {0: 4.0, 3: -100.0}, "top_p": 0.95},
    ],
    ids=str,
)
def test_distributions_are_those_of_transformers(settings):
    for vocabulary in (1, 7, 64, 200, 1000):
        if vocabulary == 1 and "logit_bias" in settings:
            continue
        logits = some_logits(vocabulary)
        context = {"prompt": [0, 0, 5 % vocabulary], "answer": [2 % vocabulary, 6 % vocabulary, 2 % vocabulary]}
        expected = transformers_probabilities(logits, **context, **settings)
        check_distribution(draws(logits, 4000, **context, **settings), expected)


@pytest.mark.parametrize("spread", [0.3, 2.5])
@pytest.mark.parametrize(
    "settings", [{"top_p": 0.9}, {"top_k": 3000, "top_p": 0.5}, {"min_p": 0.3}, {"top_k": 40}], ids=str
)
def test_a_large_vocabulary_is_cut_where_a_sort_cuts_it(spread, settings):
    logits = some_logits(152_000, spread=spread)
    probabilities = transformers_probabilities(logits, **settings)
    tokens = draws(logits, 300, **settings)
    assert (probabilities[tokens] > 0).mean() > 0.99  # torch sums up in fp32
    least = logits[probabilities > 0].min()
    assert logits[tokens].min() >= least - 1e-3
    # The half with the smaller logits is sampled from, too.
    order = np.sort(logits[probabilities > 0])
    share = probabilities[(logits <= order[len(order) // 2]) & (probabilities > 0)].sum()
    assert (logits[tokens] <= order[len(order) // 2]).mean() == pytest.approx(share, abs=0.1)


def test_random_numbers_are_philox_by_seed_and_position():
    vocabulary = 1 << 16
    logits = np.zeros((1, vocabulary), np.float32)
    for seed in (0, 1, 12345, (1 << 64) - 1):
        chooser = Chooser(Sampling(temperature=1.0, seed=seed), [0, 1, 2], vocabulary)
        for position in range(3, 8):
            # numpy counts up before the first number.
            raw = np.random.Philox(key=seed, counter=position - 1).random_raw()
            assert choose(logits, [chooser]).tokens[0] == raw >> 48
            chooser.add(0)


def test_the_sample_is_the_same_in_any_batch_on_any_number_of_threads_and_at_any_level():
    logits = np.stack([some_logits(1000, seed) for seed in range(24)])
    settings = [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 0.0},
        {"min_p": 0.1, "top_p": 0.9},
        {"top_k": 30, "top_p": 0.5},
    ]
    choosers = [
        Chooser(Sampling(**{"temperature": 0.9, "seed": row} | settings[row % 6]), [1] * row, 1000) for row in range(24)
    ]
    alone = [choose(logits[row : row + 1], [choosers[row]]).tokens[0] for row in range(24)]
    for threads in range(1, 9):
        assert choose(logits, choosers, threads).tokens == alone
    used = library.level()
    try:
        for level in library.levels():
            library.use_level(level)
            assert choose(logits, choosers).tokens == alone
    finally:
        library.use_level(used)


def test_without_a_seed_each_sequence_draws_its_own():
    logits = np.zeros((1, 1 << 20), np.float32)
    assert (
        len({int(choose(logits, [Chooser(Sampling(temperature=1.0), [], 1 << 20)]).tokens[0]) for _ in range(5)}) == 5
    )


def test_greedy_takes_the_first_one_of_equals():
    logits = some_logits(300)
    logits[[70, 130, 299]] = 50
    assert set(draws(logits, 5, temperature=0.0)) == {70}
    assert set(draws(logits, 5, temperature=9e-7)) == {70}
    assert set(draws(logits, 200, temperature=1e-6)) == {70, 130, 299}


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.5}, {"temperature": 0.0}], ids=str)
def test_masked_tokens_are_never_chosen(settings):
    logits = np.full(500, -INFINITY)
    logits[[3, 499]] = -1e30, -1e30
    assert set(draws(logits, 100, **settings)) <= {3, 499}
    logits[3] = np.finfo(np.float32).max
    assert set(draws(logits, 20, **settings)) == {3}


def test_a_row_that_is_not_finite_is_refused_and_the_others_are_not():
    logits = np.stack([some_logits(130) for _ in range(5)])
    logits[0, 129], logits[1, 0], logits[2] = np.nan, INFINITY, -INFINITY
    for settings in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 3, "num_logprobs": 2}):
        choosers = [Chooser(Sampling(**settings, seed=1), [], 130) for _ in range(5)]
        choosers[3].allow(np.zeros(5, np.uint32))
        chosen = choose(logits, choosers)
        assert sorted(chosen.errors) == [0, 1, 2, 3]
        assert "finite" in chosen.errors[2]
        assert "allowed" in chosen.errors[3]
        assert chosen.tokens[4] >= 0


def test_shares_at_their_ends():
    logits = some_logits(1000)
    best = int(logits.argmax())
    for settings in ({"top_p": 0.0}, {"top_p": 1e-30}, {"min_p": 1.0}, {"top_k": 1}):
        assert set(draws(logits, 20, **settings)) == {best}
    for same in ({"top_k": 1000}, {"top_k": 10**12}, {"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}):
        assert draws(logits, 100, **same).tolist() == draws(logits, 100).tolist()


def test_equal_logits():
    logits = np.zeros(20_000, np.float32)
    assert draws(logits, 500, top_p=0.25).max() < 5000  # the first ones of equals, as many as there must be
    assert draws(logits, 500, top_p=0.25).max() > 4800
    assert draws(logits, 500, top_k=5).max() > 15_000  # transformers keeps all that equal the k-th largest


def test_only_allowed_tokens():
    logits, allowed = some_logits(100), np.zeros(4, np.uint32)
    for token in (5, 31, 32, 99):
        allowed[token // 32] |= np.uint32(1 << token % 32)
    masked = np.full(100, -INFINITY)
    masked[[5, 31, 32, 99]] = logits[[5, 31, 32, 99]]
    check_distribution(draws(logits, 2000, allowed=allowed), transformers_probabilities(masked))


@pytest.mark.parametrize("vocabulary", [5, 100, 5000])
def test_log_probabilities_are_of_the_logits_as_they_came(vocabulary):
    rows = np.stack([some_logits(vocabulary, seed) for seed in range(4)])
    rows[2, :3] = 30
    before = rows.copy()
    settings = {"temperature": 0.3, "top_k": 2, "repetition_penalty": 2.0, "logit_bias": {1: 3.0}}
    numbers = (0, 5, 5, None)
    choosers = [Chooser(Sampling(**settings, seed=7, num_logprobs=number), [0, 2], vocabulary) for number in numbers]
    chosen = choose(rows, choosers)
    assert (rows == before).all()
    exact = rows.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    for row, number in enumerate(numbers[:3]):
        assert chosen.logprobs[row, 0] == pytest.approx(exact[row, chosen.tokens[row]], abs=1e-5)
        order = np.argsort(-rows[row], kind="stable")[:number]
        assert chosen.best[row, :number].tolist() == order.tolist()
        np.testing.assert_allclose(chosen.logprobs[row, 1 : 1 + number], exact[row, order], atol=1e-5)
    given = score(rows, [4, 3, 2, 1], num_best=2)
    np.testing.assert_allclose(given.logprobs[:, 0], exact[range(4), [4, 3, 2, 1]], atol=1e-5)
    assert given.tokens == [4, 3, 2, 1]
    assert given.best[:, 0].tolist() == rows.argmax(1).tolist()


def test_a_long_answer_keeps_its_penalties():
    logits = np.zeros(1000, np.float32)
    chooser = Chooser(Sampling(frequency_penalty=1.0), [7], 1000)
    for _ in range(2000):
        chooser.add(int(choose(logits[None], [chooser]).tokens[0]))
    assert chooser.num_tokens == 2001
    # Each token came twice, in order, the one of the prompt too.
    assert int(choose(logits[None], [chooser]).tokens[0]) == 0
    chooser.add(0)
    assert int(choose(logits[None], [chooser]).tokens[0]) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("seed", -1),
        ("seed", 1 << 64),
        ("logit_bias", {3: float("nan")}),
        ("logit_bias", {3: 1e4}),
        ("logit_bias", {10: 1.0}),
        ("num_logprobs", 11),
    ],
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(InputError, match=name):
        Chooser(Sampling(**{name: value}), [0], 10)


def test_any_settings_of_any_logits_give_a_token_that_is_not_masked():
    random = np.random.default_rng(0)

    def one_of(*values):
        return values[random.integers(len(values))]

    for _ in range(600):
        vocabulary = one_of(1, 2, 63, 64, 65, 127, 5000)
        logits = some_logits(vocabulary, random.integers(1 << 30), one_of(0, 0.01, 1, 1e4, 1e30))
        logits[random.random(vocabulary) < one_of(0, 0.5, 1)] = -INFINITY
        logits[random.integers(vocabulary)] = one_of(0, -0.0, 1e30, -1e30)
        sampling = Sampling(
            temperature=one_of(0, 1e-6, 0.5, 1, 1e6),
            top_k=one_of(0, 1, 50, vocabulary, vocabulary // 64 + 1),
            top_p=one_of(0, 1e-20, 0.3, 0.9999999, 1),
            min_p=one_of(0, 1e-30, 0.1, 1),
            repetition_penalty=one_of(1, 1.3),
            frequency_penalty=one_of(0, -1),
        )
        chooser = Chooser(sampling, random.integers(0, vocabulary, 20), vocabulary)
        chosen = choose(logits[None], [chooser])
        assert not chosen.errors, sampling
        assert logits[chosen.tokens[0]] > -INFINITY, sampling
