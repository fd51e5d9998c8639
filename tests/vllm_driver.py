"""Runs models in vLLM, with the plugin of `plugins/vllm`: for the Python of an environment that has both.

    python tests/vllm_driver.py JOBS OUT

JOBS is JSON, a list of {"folder", "prompts" (lists of token ids), "num_tokens", "options" (of `vllm.LLM`)}; OUT gets
the greedy tokens of each, or the text of its error.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, which imports once


def tokens(job: dict) -> list[list[int]]:
    from vllm import LLM, SamplingParams  # of that environment alone

    model = LLM(job["folder"], **{"dtype": "float32", "max_model_len": 256, "enforce_eager": True, **job["options"]})
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=job["num_tokens"], ignore_eos=True)
    found = [list(answer.outputs[0].token_ids) for answer in model.generate(prompts, sampling, use_tqdm=False)]
    model.llm_engine.engine_core.shutdown()
    return found


if __name__ == "__main__":
    answers = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            answers.append({"tokens": tokens(job)})
        except Exception as error:
            answers.append({"error": str(error)})
    Path(sys.argv[2]).write_text(json.dumps(answers))
